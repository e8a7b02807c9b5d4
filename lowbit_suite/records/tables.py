"""``lowbit.save_table``: writes a measured table as a CSV file with its run card."""

import json
from pathlib import Path
from typing import Any

from lowbit import environment, paths
from lowbit_suite.records.context import current


def tables() -> Path:
    """The folder for tables: ``tables/<notebook>`` of the run under ``lowbit run``, else ``results/scratch/tables``."""
    return current().tables or paths.results() / "scratch" / "tables"


def save_table(frame, name: str, **settings: Any):
    """Write ``frame`` (pandas) as ``<name>.csv``, and its run card ``<name>.json``: command, settings and environment.

    Both go to the folder `tables`.

    Args:
        frame: one row per measurement; if there are seeds, they are a column.
        name: name of the two files, such as ``"02_accuracy"``.
        settings: settings behind the numbers (profile, data set, seeds, epochs, ...), as plain values.

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
