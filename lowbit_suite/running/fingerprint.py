"""Fingerprints: all that a notebook's result depends on, in parts, and the parts that differ between two runs."""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lowbit_suite.notebooks import Notebook

SAYS = {
    "code": "the notebook's code",
    "parameters": "the parameters",
    "before": "the notebooks before it",
    "library": "the library or the suite",
    "data": "the data",
    "versions": "the installed versions",
    "device": "the device",
    "threads": "the number of threads",
}
"""Names of the parts in messages."""

EXTRAS = ("", "course", "onnx", "bench")
"""The optional dependencies that notebooks use if they are installed."""

SWITCHES = ("LOWBIT_FORM", "LOWBIT_ISA", "LOWBIT_NATIVE")
"""The environment variables that select kernels."""


def facts(environment: dict) -> dict[str, dict[str, Any]]:
    """The parts that all notebooks of a run share, on this machine; ``environment`` is its description.

    They exclude the user's own folders (the data sets ``imagenet`` and ``image-folder``).
    """
    from lowbit.data.verify import state

    device = {name: environment.get(name) for name in ("device", "gpu")}
    device |= {name: os.environ.get(name) for name in SWITCHES}
    return {"library": library(), "data": state(), "versions": versions(environment.get("python")), "device": device}


def fingerprint(
    notebook: Notebook,
    parameters: dict[str, Any],
    shared: dict[str, dict[str, Any]],
    threads: int | None,
    before: dict[str, str],
) -> dict[str, Any]:
    """All parts for one notebook; two runs may share a result only if every part agrees.

    Args:
        notebook: the notebook as read from its file.
        parameters: parameters that it gets.
        shared: the result of `facts`.
        threads: OpenMP/MKL threads of its process.
        before: for each notebook that it comes after, a string that changes with every execution.

    The data part covers only the data that the notebook can use: the project's embedded data, and each data set whose
    name occurs in its code or parameters.
    """
    resolved = {name: _text(value) for name, value in {**notebook.defaults, **parameters}.items()}
    meant = "\n".join([notebook.code, *resolved.values()])
    data = {name: files for name, files in shared["data"].items() if not name or _mentions(meant, name)}
    parts = {"code": notebook.code_hash, "parameters": resolved, "before": before, "threads": str(threads)}
    return {**parts, **shared, "data": {file: found for files in data.values() for file, found in files.items()}}


def differing(before: dict[str, Any], now: dict[str, Any], parts: Iterable[str] = SAYS) -> str:
    """The parts that differ, with the items that differ in them; empty if all agree."""
    said = []
    for part in parts:
        old, new = before.get(part), now.get(part)
        if old == new:
            continue
        keys = []
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key) or (key in old) != (key in new))
        more = [f"and {len(keys) - 3} more"] if len(keys) > 4 else keys[3:]
        said.append(SAYS[part] + (f" ({', '.join(keys[:3] + more)})" if keys else ""))
    return " and ".join(said)


def library() -> dict[str, str]:
    """A hash for each file of the library and the suite, checkpoints and compiled kernels among them."""
    root = Path(__file__).resolve().parents[2]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for package in ("lowbit", "lowbit_suite")
        for path in sorted((root / package).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def versions(python: str | None = None) -> dict[str, str | None]:
    """The installed versions of all packages that lowbit requires, directly or indirectly.

    If lowbit is used from its source folder without installation: the versions of all installed packages.
    """
    found: dict[str, str | None] = {"python": python}
    try:
        importlib.metadata.distribution("lowbit")
    except importlib.metadata.PackageNotFoundError:
        return found | {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
    waiting, asked = [("lowbit", extra) for extra in EXTRAS], set()
    metadata = functools.cache(importlib.metadata.metadata)  # reading metadata is slow
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in asked:
            continue
        asked.add((name, extra))
        try:
            here = metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name != "lowbit":  # its own files are another part
            found[name] = here["Version"]
        for text in here.get_all("Requires-Dist") or ():
            if not extra and "extra ==" in text:
                continue  # most of them, and parsing takes long
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]
    return found


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)
