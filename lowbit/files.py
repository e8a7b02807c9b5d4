"""Files that are whole or not there: `write_atomically`."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.errors import StorageError

PART = ".part"
"""How the names of half-written files end."""


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Call ``write(file)`` on a temporary binary file beside ``path``, then move it there: old file or new, never half.

    Args:
        path: the file; its folder is made if need be.
        write: gets the open file.

    Raises:
        StorageError: the disk is full, or the place cannot be written to. Nothing is left behind, and a file that was
            at ``path`` before is unchanged. Other errors of ``write`` pass through, with the same promise.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files; results are for everyone who may read the folder
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if (reason := _refusal(error)) is not None:
            raise cannot_write(path, reason) from error
        raise


def cannot_write(path: Path, error: OSError) -> StorageError:
    """The error for a file that the system does not let us write: which file, why, and what to do."""
    return StorageError(
        f"{path} could not be written ({error.strerror or error}): make room there, or choose another folder; what the "
        "file held before is unchanged"
    )


def _refusal(error: BaseException) -> OSError | None:
    """The system's refusal behind an error: torch.save turns a full disk into a RuntimeError about positions."""
    while isinstance(error, OSError | RuntimeError):
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
