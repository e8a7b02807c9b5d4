"""Profiles: the same notebooks in five sizes, from ``notebooks/profiles.yaml``."""

import difflib
import fnmatch
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator

from lowbit import paths, yamls
from lowbit.errors import LowbitError

NAMES = ("smoke", "embedded", "desk", "gpu", "paper")
"""All profile names."""

STUDY = "study"
"""The long trainings that decide the claims: a queue (``lowbit study run``), not a profile of notebooks."""

FILE = "profiles.yaml"


class Profile(BaseModel):
    """One size of the suite.

    Attributes:
        description: One line for people.
        timeout_minutes: Hard limit for one notebook, start of the kernel included.
        threads: OpenMP/MKL threads of each notebook; None leaves it to the libraries. Sums depend on how they
            are split over threads, so a fixed number makes the metrics independent of ``-j``.
        requires: ``cuda`` where the profile needs a GPU; its notebooks are skipped on other machines.
        may_skip: Notebooks (names or globs) that may be skipped: by ``lowbit.skip``, or because of ``requires``,
            without spoiling the exit code of the run. No other notebook can skip itself.
        listed_only: Whether to refuse notebooks that ``notebooks`` does not list; they would run with their smoke
            values under this profile's name.
        notebooks: For each notebook, the parameters that differ from those in its parameters cell.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    description: str
    timeout_minutes: float = Field(gt=0)
    threads: int | None = Field(default=None, ge=1)
    requires: str | None = Field(default=None, pattern="^cuda$")
    may_skip: list[str] = Field(default_factory=list)
    listed_only: bool = False
    notebooks: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def lets_skip(self, name: str) -> bool:
        """Whether ``may_skip`` lists the notebook."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.may_skip)

    @field_validator("timeout_minutes", mode="before")
    @classmethod
    def _whole_minutes(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("notebooks", mode="before")
    @classmethod
    def _empty_means_none(cls, value: Any) -> Any:
        return {} if value is None else value


class _File(RootModel[dict[str, Profile]]):
    model_config = ConfigDict(strict=True)


def load(path: Path | None = None) -> dict[str, Profile]:
    """All profiles of the file (default: the project's); unknown keys and wrong types raise `LowbitError`."""
    path = path or paths.notebooks() / FILE
    if not path.is_file():
        raise LowbitError(f"there is no {FILE} in {path.parent}: run inside the project, or set LOWBIT_PROJECT to it")
    try:
        tree = yamls.load(path.read_text(encoding="utf-8"), FILE)
        profiles = _File.model_validate(tree).root
    except ValidationError as error:
        lines = [f"{FILE}: {'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()]
        raise LowbitError("\n".join(lines)) from None
    for name in profiles:
        if name not in NAMES:
            raise LowbitError(
                f"{FILE}: no profile is called {name!r}; there are {', '.join(NAMES)}{close(name, NAMES)}"
            )
    return profiles


def get(name: str, path: Path | None = None) -> Profile:
    """One profile by name."""
    if name == STUDY:
        raise LowbitError(f"the profile {STUDY!r} has no notebooks: run its trainings with 'lowbit study run'")
    profiles = load(path)
    if name not in profiles:
        raise LowbitError(f"no profile is called {name!r}; there are {', '.join(profiles)}{close(name, profiles)}")
    return profiles[name]


def close(name: str, allowed) -> str:
    """``"; did you mean 'x'?"`` if an allowed name resembles the given one, else an empty string."""
    match = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
