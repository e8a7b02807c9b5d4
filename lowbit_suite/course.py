"""``lowbit course``: copies the notebooks, their embedded data and the accepted results into a new folder.

A wheel holds them in ``lowbit_suite/course`` (see setup.py); a source tree has them at its top level.
"""

import shutil
from pathlib import Path

PARTS = (
    "configs",
    "data",
    "notebooks",
    "results/baselines",
    "results/bench",
    "results/claims.json",
    "results/claims.md",
    "results/journals",
    "results/tables",
)
"""Files and folders of the source tree that make up the course."""


def copy_parts(source: Path, target: Path) -> None:
    """Copy the `PARTS` that ``source`` has into ``target``, which is created if needed."""
    for part in PARTS:
        origin, place = source / part, target / part
        if origin.is_dir():
            shutil.copytree(origin, place, ignore=shutil.ignore_patterns("__pycache__", ".*"), dirs_exist_ok=True)
        elif origin.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, place)


def unpack(folder: Path) -> None:
    """Create a course in ``folder``; every command works inside it.

    Raises:
        LowbitError: the folder is not empty or cannot be written, or this installation has no course.
    """
    from lowbit import paths
    from lowbit.errors import LowbitError

    packed = Path(__file__).with_name("course")
    source = packed if packed.is_dir() else paths.SOURCES
    if not (source / "notebooks").is_dir():
        raise LowbitError("this installation has no course: install lowbit from a wheel or from its source tree")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise LowbitError(f"{folder} is not an empty folder: give an empty or a new one")
        copy_parts(source, folder)
    except OSError as error:
        raise LowbitError(f"{folder} cannot be written: {error.strerror or error}") from None
