"""``lowbit course``: the notebooks, the data that travels with them and the accepted results, in a folder of one's own.

A wheel carries them in ``lowbit_suite/course`` (setup.py puts them there); a source tree has them at its top.
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
    """Copies the `PARTS` that ``source`` has into ``target``, which need not exist."""
    for part in PARTS:
        origin, place = source / part, target / part
        if origin.is_dir():
            shutil.copytree(origin, place, ignore=shutil.ignore_patterns("__pycache__", ".*"), dirs_exist_ok=True)
        elif origin.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, place)


def unpack(folder: Path) -> None:
    """Makes a course in ``folder``, from which every command works.

    Raises:
        LowbitError: there is something in the folder already, or it cannot be written.
    """
    from lowbit import paths
    from lowbit.errors import LowbitError

    packed = Path(__file__).with_name("course")
    source = packed if packed.is_dir() else paths.SOURCES
    if not (source / "notebooks").is_dir():
        raise LowbitError("this installation carries no course: install lowbit from a wheel or from its source tree")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise LowbitError(f"{folder} is not an empty folder: name one that is empty or not there yet")
        copy_parts(source, folder)
    except OSError as error:
        raise LowbitError(f"{folder} cannot be written: {error.strerror or error}") from None
