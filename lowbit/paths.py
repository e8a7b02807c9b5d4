"""Paths: the project folder, its notebooks and results, the data archives, the cache."""

import contextlib
import errno
import os
from pathlib import Path

from lowbit.errors import LowbitError, StorageError
from lowbit.extras import extra

SOURCES = Path(__file__).resolve().parent.parent


def project() -> Path:
    """The folder of the course: ``LOWBIT_PROJECT``, the working folder or one above it, or the source tree.

    Raises:
        LowbitError: ``LOWBIT_PROJECT`` names a folder without ``notebooks/``; or lowbit is not used from its source
            tree, and the working folder is not inside a course.
    """
    if given := os.environ.get("LOWBIT_PROJECT"):
        folder = Path(given).resolve()
        if not (folder / "notebooks").is_dir():
            raise LowbitError(
                f"LOWBIT_PROJECT: {folder} is no lowbit project, since it has no notebooks/: set it to the folder of a "
                "course or of the project's sources, or unset it"
            )
        return folder
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "notebooks" / "profiles.yaml").is_file():
            return folder
    if (SOURCES / "pyproject.toml").is_file():
        return SOURCES
    raise LowbitError(
        f"there is no course in {here}: change into its folder, set LOWBIT_PROJECT to it, "
        "or create one with: lowbit course DIR"
    )


def notebooks() -> Path:
    """The folder of the course's notebooks."""
    return project() / "notebooks"


def results() -> Path:
    """The folder of all measurements, in the project; ``LOWBIT_RESULTS`` moves it."""
    return Path(os.environ.get("LOWBIT_RESULTS") or project() / "results")


def recorded(name: str) -> Path:
    """A file of `results`, such as ``claims.json``; if it is missing there, the file that ships with the project."""
    own = results() / name
    return own if own.exists() else project() / "results" / name


def embedded_data() -> Path:
    """The folder of the data that ships with the project."""
    return project() / "data"


def archives() -> list[Path]:
    """Folders searched for data archives, in order: ``LOWBIT_DATA``, or ``../shared/data`` beside the project."""
    if given := os.environ.get("LOWBIT_DATA"):
        return [Path(given).expanduser().resolve()]
    with contextlib.suppress(LowbitError):
        if (beside := project().parent / "shared" / "data").is_dir():
            return [beside]
    return []


def cache() -> Path:
    """The user's cache folder for decoded data and downloads; ``LOWBIT_CACHE`` moves it."""
    if given := os.environ.get("LOWBIT_CACHE"):
        return Path(given)
    with extra("data", "the cache folder"):
        import platformdirs
    return Path(platformdirs.user_cache_dir("lowbit"))


def create_cache(name: str) -> Path:
    """A folder inside `cache`, created if it is missing; call this before the work whose result goes there.

    Raises:
        StorageError: the folder cannot be created or written.
    """
    folder = cache() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise StorageError(
            f"the cache folder {folder} cannot be written ({error.strerror}): set the environment variable "
            "LOWBIT_CACHE to a folder that can"
        ) from None
    return folder
