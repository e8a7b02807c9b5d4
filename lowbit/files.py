"""Atomic writing: a file is written under a temporary name beside its path and then moved there."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lowbit.errors import StorageError

PART = ".part"
"""The ending of the names of unfinished files, which begin with a dot."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a new name beside ``path``; the file written under that name takes the place of ``path`` at the end.

    Readers see the old file or the new one. Missing folders are created.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to. As after any other error, an earlier file
            at ``path`` is unchanged and the unfinished one is removed.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):  # the parent is not a folder
            beside.unlink(missing_ok=True)
        if (reason := _refusal(error)) is not None:
            raise cannot_write(path, reason) from error
        raise


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(file)`` with a binary file that takes the place of ``path`` once it is complete."""
    with replacing(path) as beside, open(beside, "xb") as file:
        write(file)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8, newlines as given) atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def remove_parts(folder: Path) -> None:
    """Remove the unfinished files that a killed writer left in ``folder``."""
    for path in folder.glob(f".*{PART}"):
        path.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> StorageError:
    """The error for a file that the system does not let us write: which file, why, and what to do."""
    return StorageError(
        f"{path} could not be written ({error.strerror or error}): make room there, or choose another folder; an "
        "earlier file of that name is unchanged"
    )


def _refusal(error: BaseException | None) -> OSError | None:
    """The system's refusal behind an error: torch.save turns a full disk into a RuntimeError about positions."""
    while isinstance(error, OSError | RuntimeError):
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
