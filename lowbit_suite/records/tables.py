"""``lowbit.save_table``: a measured table leaves a notebook as a CSV file with its run card."""

import json
from pathlib import Path
from typing import Any

from lowbit import environment, paths
from lowbit_suite.records.context import current


def tables() -> Path:
    """Where tables go: the run's ``tables/<notebook>`` folder under ``lowbit run``, else ``results/scratch/tables``."""
    return current().tables or paths.results() / "scratch" / "tables"


def save_table(frame, name: str, **settings: Any):
    """Writes ``frame`` (pandas) as ``<name>.csv``, and ``<name>.json`` beside it: what was run, with what, where.

    Both go to the folder `tables`.

    Args:
        frame: one row a measurement, the seed among its columns where there is one.
        name: of the two files, such as ``"02_accuracy"``.
        settings: what the numbers depend on (profile, data set, seeds, epochs, ...), as plain values.

    Returns:
        The frame, so that a cell can end with it.
    """
    folder = tables()
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    notebook = current().notebook
    command = f"lowbit run {notebook} --profile {settings.get('profile', 'smoke')}" if notebook else "interactive"
    card = {"table": name, "rows": len(frame), "settings": settings, "command": command}
    card["environment"] = environment.describe()
    (folder / f"{name}.json").write_text(json.dumps(card, indent=1, default=str) + "\n", encoding="utf-8")
    return frame
