"""The state of the data: which files are here, and whether they are intact."""

import contextlib
import json
from collections.abc import Iterator, Sequence
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
    """One file of a data set: ``status`` "ok", "missing" or "wrong", and a sentence that explains it."""

    data: str
    status: Literal["ok", "missing", "wrong"]
    detail: str


def places(known: Card) -> dict[str, Path]:
    """The path of each file of a data set, or the first path at which it would be searched."""
    if known.kind == "embedded":
        return {file: paths.embedded_data() / known.name.replace("-", "_") / file for file in known.files}
    folders = [paths.cache() / "downloads"] if known.kind == "download" else []
    folders += paths.archives()
    paths_of = {}
    for file in known.files:
        options = [folder / file for folder in folders] or [Path(file)]
        paths_of[file] = next((path for path in options if path.is_file()), options[0])
    return paths_of


def check_files(chosen: Sequence[str] | None = None) -> Iterator[FileStatus]:
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
                yield FileStatus(name, "wrong", f"{path} is truncated or altered; get it again from {known.source}")
            else:
                yield FileStatus(name, "ok", str(path))


def describe() -> "pandas.DataFrame":
    """A table with one row per data set: name, title, task, items, classes, origin, and whether it is ``here``."""
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
    """The identity of the data set ``name`` for run cards and caches: checksums of its files or its generator.

    Raises:
        DataError: there is no such data set, or the source file of its generator is missing.
    """
    import inspect

    known = card(name)
    identity: dict[str, Any] = {"name": name, "kind": known.kind, "files": dict(known.files)}
    if known.kind == "generated":
        source = inspect.getsourcefile(known.loader)
        if source is None or not Path(source).is_file():
            raise DataError(f"the code that generates {name} has no source file here; install lowbit with its sources")
        identity["generator_sha256"] = sha256(Path(source))
    return identity


def state() -> dict[str, dict[str, str]]:
    """The files that are here: data set name -> file name -> sha256; the name "" stands for the embedded data.

    An archive is read again only if its size or modification time has changed since it was last read. The user's own
    folders are not read.
    """
    root = paths.embedded_data()
    embedded = {
        path.relative_to(root.parent).as_posix(): sha256(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    sums = {"": embedded}
    memory = paths.cache() / "checksums.json"
    try:
        noted = dict(json.loads(memory.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        noted = {}
    before = dict(noted)
    for name in names():
        if card(name).kind in ("archive", "download"):
            here = {file: path for file, path in places(card(name)).items() if path.is_file()}
            sums[name] = {file: _noted_sum(path, noted) for file, path in here.items()}
    if noted != before:
        with contextlib.suppress(OSError):  # without a writable cache the sums are computed again next time
            write_atomically(memory, lambda out: out.write(json.dumps(noted).encode()))
    return sums


def _noted_sum(path: Path, noted: dict[str, list[Any]]) -> str:
    stat = path.stat()
    seen = [stat.st_size, stat.st_mtime_ns]
    known = noted.get(str(path))
    if not known or known[:2] != seen:
        noted[str(path)] = known = [*seen, sha256(path)]
    return known[2]
