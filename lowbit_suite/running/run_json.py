"""run.json: the results of one run of the suite. Written only by the parent, atomically, after every notebook."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.files import write_text
from lowbit_suite.profiles import Profile
from lowbit_suite.records.record import decode, encode

SCHEMA = 1
STATUSES = ("passed", "failed", "timeout", "killed", "oom", "skipped", "not_run")
"""Statuses of a notebook, as its parent process saw it end."""


@dataclass(frozen=True)
class Metric:
    """One recorded number; ``better`` is ``higher``, ``lower`` or ``equal``."""

    value: float | int
    unit: str = ""
    better: str = "equal"


@dataclass
class Entry:
    """One notebook of a run. ``output`` is relative to the folder of run.json, ``seconds`` is wall time,
    ``peak_mb`` the largest resident memory of all its processes together (10^6 bytes)."""

    name: str
    status: str = "not_run"
    reason: str = ""
    cached: bool = False
    why: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0
    parameters: dict = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    output: str = ""


@dataclass
class Run:
    """A whole run; ``environment`` is the result of `lowbit.environment.describe` at its start."""

    profile: str
    started: str
    environment: dict
    notebooks: list[Entry] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def device(self) -> str:
        """The device class whose baseline this run is compared with: ``cpu`` or ``cuda``."""
        return self.environment.get("device", "cpu")

    @property
    def passed(self) -> bool:
        """Whether every notebook of the run passed."""
        return bool(self.notebooks) and all(entry.status == "passed" for entry in self.notebooks)

    def fulfills(self, profile: Profile) -> bool:
        """Whether every notebook passed or was skipped as the profile allows, and at least one passed."""
        good = [e.status == "passed" or (e.status == "skipped" and profile.lets_skip(e.name)) for e in self.notebooks]
        return all(good) and any(entry.status == "passed" for entry in self.notebooks)

    def entry(self, name: str) -> Entry | None:
        """The notebook of that name, if the run has it."""
        return next((entry for entry in self.notebooks if entry.name == name), None)

    def save(self, folder: Path) -> None:
        """Write ``folder/run.json`` atomically: a reader sees the old file or the new one."""
        tree = {
            "schema": self.schema,
            "profile": self.profile,
            "started": self.started,
            "environment": self.environment,
            "notebooks": [asdict(entry) for entry in self.notebooks],
        }
        for entry in tree["notebooks"]:
            for metric in entry["metrics"].values():
                metric["value"] = encode(metric["value"])
        write_json(folder / "run.json", tree)


def load(folder: Path) -> Run:
    """Read ``folder/run.json``; a missing, broken or newer file raises `LowbitError`."""
    path = folder / "run.json"
    if not path.exists():
        raise LowbitError(f"there is no {path.name} in {show_path(folder)}: make one with 'lowbit run --profile ...'")
    tree = read_json(path)
    if tree.get("schema") != SCHEMA:
        raise LowbitError(f"{show_path(path)} has schema {tree.get('schema')!r}; this version reads {SCHEMA}")
    try:
        entries = []
        for item in tree["notebooks"]:
            metrics = {k: Metric(**{**m, "value": decode(m["value"])}) for k, m in item["metrics"].items()}
            entries.append(Entry(**{**item, "metrics": metrics}))
        return Run(tree["profile"], tree["started"], tree["environment"], entries)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LowbitError(
            f"{show_path(path)} is not a run.json of this version ({error}); run the suite again"
        ) from None


def read_json(path: Path) -> dict:
    """The object in a JSON file, or a `LowbitError` that names the file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LowbitError(f"{show_path(path)} cannot be read as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise LowbitError(f"{show_path(path)} does not hold a JSON object")
    return tree


def write_json(path: Path, tree: object) -> None:
    """Write strict JSON (NaN refused) atomically."""
    write_text(path, json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def show_path(path: Path) -> str:
    """The shortest form of a path: relative to the working folder if it is inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
