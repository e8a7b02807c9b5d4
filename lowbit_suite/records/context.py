"""Tells a notebook's process where to write its results: one environment variable, set by the runner."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "LOWBIT_CONTEXT"


@dataclasses.dataclass(frozen=True)
class Context:
    """The settings of a notebook's process; every field is None in an interactive session.

    Attributes:
        execution: unique name of this execution.
        notebook: name of the notebook, such as ``"02_zero_free_shifting"``.
        records: the file that `lowbit.record` appends to.
        journal: the file of the trainings that are already done.
        figures: the folder for figures.
        tables: the folder for tables.
    """

    execution: str | None = None
    notebook: str | None = None
    records: Path | None = None
    journal: Path | None = None
    figures: Path | None = None
    tables: Path | None = None

    def variable(self) -> dict[str, str]:
        """The environment variable that holds all fields, by its name."""
        held = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {VARIABLE: json.dumps({name: str(value) for name, value in held.items()})}


def current(environment: Mapping[str, str] = os.environ) -> Context:
    """The context of this process, or of a process with the given environment."""
    held = json.loads(environment.get(VARIABLE) or "{}")
    folders = ("records", "journal", "figures", "tables")
    return Context(**{name: Path(value) if name in folders else value for name, value in held.items()})
