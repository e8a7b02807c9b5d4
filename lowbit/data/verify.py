"""Which data is here, and is it what it should be."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowbit import paths
from lowbit.data.archive import checksum, sha256
from lowbit.data.base import Card, card, names
from lowbit.errors import DataError
from lowbit.extras import extra
from lowbit.files import write_atomically

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class FileStatus:
    """One file of a data set: ``status`` "ok", "missing" or "wrong", and a sentence on it."""

    data: str
    status: Literal["ok", "missing", "wrong"]
    detail: str


def places(known: Card) -> dict[str, Path]:
    """Where each file of a data set is, or would be looked for first."""
    if known.kind == "embedded":
        return {file: paths.embedded_data() / known.name.replace("-", "_") / file for file in known.files}
    folders = [paths.cache() / "downloads"] if known.kind == "download" else []
    folders += paths.archives()
    found = {}
    for file in known.files:
        options = [folder / file for folder in folders] or [Path(file)]
        found[file] = next((path for path in options if path.is_file()), options[0])
    return found


def check_files(chosen: list[str] | None = None) -> Iterator[FileStatus]:
    """The state of every file of the data sets ``chosen``, or of all that consist of files."""
    for name in chosen or names():
        known = card(name)
        if not known.files and chosen:
            yield FileStatus(name, "ok", f"{known.kind}: it has no files to verify")
        for file, path in places(known).items():
            expected = known.files[file]
            if not path.is_file():
                yield FileStatus(name, "missing", f"{file}; get it from {known.source}")
            elif checksum(path, expected) != expected:
                yield FileStatus(name, "wrong", f"{path} is truncated or altered; get it anew from {known.source}")
            else:
                yield FileStatus(name, "ok", str(path))


def describe() -> "pandas.DataFrame":
    """One row a data set: name, what it is, task, items, classes, where it is from, whether it is ``here``."""
    with extra("data", "the table of data sets"):
        import pandas as pd

    rows = []
    for name in names():
        known = card(name)
        here = known.kind != "folder" and all(path.is_file() for path in places(known).values())
        rows.append(
            {
                "name": name,
                "title": known.title,
                "task": known.task,
                "items": known.items,
                "classes": known.classes,
                "from": known.kind,
                "here": here,
            }
        )
    return pd.DataFrame(rows)


def manifest(name: str) -> dict[str, Any]:
    """What identifies the data behind ``name`` for run cards and caches: its files' checksums, or its generator's."""
    import inspect

    known = card(name)
    made: dict[str, Any] = {"name": name, "kind": known.kind, "files": dict(known.files)}
    if known.kind == "generated":
        source = inspect.getsourcefile(known.loader)
        if source is None or not Path(source).is_file():
            raise DataError(f"the code that generates {name} has no source file here; install lowbit with its sources")
        made["generator_sha256"] = sha256(Path(source))
    return made


def state() -> dict[str, dict[str, str]]:
    """What data is here: data set name -> file name -> sha256, for files that are there. The name "" stands for all
    that travels with the project.

    An archive is read again only when its size or time of change differ from those noted when it was last read.
    Folders of the user's own are not looked into.
    """
    root = paths.embedded_data()
    embedded = {
        path.relative_to(root.parent).as_posix(): sha256(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {"": embedded}
    memory = paths.cache() / "checksums.json"
    try:
        noted = dict(json.loads(memory.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        noted = {}
    before = dict(noted)
    for name in names():
        if card(name).kind in ("archive", "download"):
            here = {file: path for file, path in places(card(name)).items() if path.is_file()}
            found[name] = {file: _noted_sum(path, noted) for file, path in here.items()}
    if noted != before:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            write_atomically(memory, lambda out: out.write(json.dumps(noted).encode()))
    return found


def _noted_sum(path: Path, noted: dict[str, list[Any]]) -> str:
    stat = path.stat()
    seen = [stat.st_size, stat.st_mtime_ns]
    known = noted.get(str(path))
    if not known or known[:2] != seen:
        noted[str(path)] = known = [*seen, sha256(path)]
    return known[2]
