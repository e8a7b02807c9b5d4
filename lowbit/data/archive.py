"""Archives of real data: find them, check them, and decode them once into a cached array."""

import hashlib
import json
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit import paths
from lowbit.errors import DataError, MissingExtraError
from lowbit.files import write_atomically

CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path, expected: str) -> str:
    """A file's checksum in the form of ``expected``: sha256, or ``"md5:..."`` where only that is published."""
    if not expected.startswith("md5:"):
        return sha256(path)
    with open(path, "rb") as file:
        return "md5:" + hashlib.file_digest(file, "md5").hexdigest()


def find(file: str, source: str) -> Path:
    """The archive ``file`` in the data folders.

    Raises:
        DataError: no data folder has the archive; the message says where to get it and where to put it.
    """
    folders = paths.archives()
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    searched = ", ".join(map(str, folders)) or "no folder: LOWBIT_DATA is not set"
    raise DataError(
        f"the archive {file!r} was not found (searched {searched}). Get it from {source} and put it into a folder "
        "that the environment variable LOWBIT_DATA names"
    )


def check(path: Path, expected: str) -> None:
    """Refuse a file whose sha256 is not ``expected``.

    Raises:
        DataError: the checksums differ; the message names the file and both.
    """
    actual = sha256(path)
    if actual != expected:
        raise DataError(
            f"{path.name} is truncated or altered: its sha256 is {actual[:16]}..., expected "
            f"{expected[:16]}...; get it again"
        )


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes:
    """The contents of one file of a tar archive.

    Args:
        archive: the open archive.
        member: the file.
        name: name of the archive in errors.

    Raises:
        DataError: ``member`` is no file: a folder, a device, or a link to something that the archive lacks.
    """
    try:
        file = archive.extractfile(member)
    except KeyError:  # a link
        file = None
    if file is None:
        raise DataError(f"{name}: {member.name} is a folder, a device or a broken link, not a file; get it again")
    with file:
        return file.read()


def decoded(file: str, expected: str, source: str, decode: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The contents of an archive, decoded once and then read from the user's cache folder.

    Args:
        file: the archive's file name.
        expected: the archive's sha256. An archive is hashed again only if its size or modification time has changed
            since the last successful check.
        source: where to get the archive, for the message if it is missing.
        decode: turns the archive's path into a dict of tensors and plain values; called if the cache, which is keyed
            by the sha256, has no intact copy.

    Raises:
        DataError: the archive is missing, truncated or altered, or cannot be decoded.
        StorageError: the cache folder cannot be written.
    """
    return decoded_file(find(file, source), expected, decode)


def decoded_file(
    path: Path, expected: str, decode: Callable[[Path], dict[str, Any]], variant: str = "v1"
) -> dict[str, Any]:
    """Like `decoded`, for an archive at a known path; ``variant`` separates the caches of different decodings."""
    file = path.name
    cached = paths.cache() / "decoded" / f"{file}.{expected[:16]}.{variant}.pt"
    noted = cached.with_suffix(".json")
    stat = path.stat()
    seen = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if cached.is_file() and noted.is_file():
        try:
            note = json.loads(noted.read_text(encoding="utf-8"))
            if note["archive"] == seen and note["sha256"] == sha256(cached):
                return torch.load(cached, weights_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError):
            pass
        else:
            if note["archive"] == seen:
                warnings.warn(f"the cached copy of {file} is damaged; decoding it again", stacklevel=2)
    paths.create_cache("decoded")
    check(path, expected)
    try:
        contents = decode(path)
    except (DataError, MissingExtraError):
        raise
    except Exception as error:
        raise DataError(f"{file} could not be decoded ({type(error).__name__}: {error}); get it again") from error
    write_atomically(cached, lambda out: torch.save(contents, out))
    note = {"archive": seen, "sha256": sha256(cached)}
    write_atomically(noted, lambda out: out.write(json.dumps(note).encode()))
    return contents
