"""When an earlier result may stand: what a notebook's outcome depends on, part by part, and which part changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lowbit.suite.notebooks import Notebook
from lowbit.suite.runfile import read_json, write_json

SAYS = {
    "code": "the notebook's code",
    "parameters": "the parameters",
    "library": "the lowbit/ tree",
    "versions": "the installed versions",
    "device": "the device",
    "threads": "the number of threads",
}


def fingerprint(
    notebook: Notebook, parameters: dict[str, Any], library: str, environment: dict, threads: int | None
) -> dict[str, str]:
    """A short text for each part; two runs may share a result only if all parts agree. (Data is not yet a part.)"""
    versions = {k: environment.get(k) for k in ("python", "torch", "torchvision", "torchaudio", "timm", "numpy")}
    return {
        "code": notebook.code_hash,
        "parameters": _digest({**notebook.defaults, **parameters}),
        "library": library,
        "versions": _digest(versions),
        "device": _digest([environment.get("device"), environment.get("gpu")]),
        "threads": str(threads),
    }


def library_hash() -> str:
    """One hash over the sources of this package."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def changed(folder: Path, name: str, now: dict[str, str]) -> str:
    """What differs from the fingerprint kept in ``folder`` for that notebook, in words; empty when nothing does."""
    path = _path(folder, name)
    if not path.exists():
        return "no earlier result is kept"
    before = read_json(path)
    parts = [says for key, says in SAYS.items() if before.get(key) != now[key]]
    return " and ".join(parts) + " changed" if parts else ""


def keep(folder: Path, name: str, now: dict[str, str]) -> None:
    """Writes the fingerprint of a notebook that has just passed."""
    write_json(_path(folder, name), now)


def forget(folder: Path, name: str) -> None:
    """Drops the fingerprint, before the notebook runs again."""
    _path(folder, name).unlink(missing_ok=True)


def _path(folder: Path, name: str) -> Path:
    return folder / "records" / f"{name}.fingerprint.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()
