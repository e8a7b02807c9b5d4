"""Results of earlier runs that can be reused: ``cache.json`` beside run.json, written only by the runner.

An entry is written once a notebook has passed and dropped before it starts again, so a failed or partial execution
never has one. It holds the fingerprint of the result's dependencies and a checksum of every file of the result.
"""

import hashlib
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit_suite.running import fingerprint
from lowbit_suite.running.run_json import Entry, read_json, write_json

FILE = "cache.json"
SCHEMA = 1


class Cache:
    """The kept results of one folder. A missing, broken or foreign file is an empty cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            tree = read_json(folder / FILE)
        except LowbitError:
            tree = {}
        self.kept: dict[str, dict[str, Any]] = tree["kept"] if tree.get("schema") == SCHEMA else {}

    def keep(self, entry: Entry, parts: dict[str, Any]) -> None:
        """Note the result of a notebook that has just passed; its files are in the folder."""
        self.kept[entry.name] = {
            "status": entry.status,
            "seconds": entry.seconds,
            "peak_mb": entry.peak_mb,
            "parts": parts,
            "files": files(self.folder, entry.name),
        }
        self._save()

    def forget(self, *names: str) -> None:
        """Drop the results of these notebooks, in one write."""
        if there := [name for name in names if name in self.kept]:
            for name in there:
                del self.kept[name]
            self._save()

    def stamp(self, name: str) -> str:
        """A string that changes with every execution of the notebook; empty if no result is kept."""
        return self.kept.get(name, {}).get("files", {}).get(f"{name}.ipynb", "")

    def why_not(self, name: str, now: dict[str, Any]) -> str:
        """The reason why the kept result cannot be reused with the dependencies ``now``; empty if it can."""
        kept = self.kept.get(name)
        if kept is None:
            return "no earlier result is kept"
        if kept.get("status") != "passed":
            return f"the kept result has status {kept.get('status')!r}"
        if differs := fingerprint.differing(kept.get("parts", {}), now):
            return f"{differs} changed"
        before, there = kept.get("files", {}), files(self.folder, name)
        if f"{name}.ipynb" not in there:
            return "its executed copy is gone"
        for file in sorted({*before, *there}):
            if before.get(file) != there.get(file):
                return f"{file} {'is gone' if file not in there else 'is new' if file not in before else 'was altered'}"
        return ""

    def seconds(self) -> dict[str, float]:
        """How long each kept notebook took."""
        return {name: kept.get("seconds", 0.0) for name, kept in self.kept.items()}

    def _save(self) -> None:
        write_json(self.folder / FILE, {"schema": SCHEMA, "kept": self.kept})


def files(folder: Path, name: str) -> dict[str, str]:
    """The sha256 of all files of a notebook's result: executed copy, recorded numbers, figures and tables."""
    places = [folder / f"{name}.ipynb", folder / "records" / f"{name}.jsonl"]
    places += [path for kind in ("figures", "tables") for path in sorted((folder / kind / name).rglob("*"))]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in places
        if path.is_file()
    }
