"""Where things live: the project folder, its notebooks and results, the data archives, the cache."""

import os
from pathlib import Path

import platformdirs


def project() -> Path:
    """The project folder (the one with ``notebooks/``): ``LOWBIT_PROJECT``, the working folder, or the source tree."""
    if given := os.environ.get("LOWBIT_PROJECT"):
        return Path(given).resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "lowbit").is_dir():
            return folder
    return Path(__file__).resolve().parent.parent


def notebooks() -> Path:
    """The folder of the course's notebooks."""
    return project() / "notebooks"


def results() -> Path:
    """The folder of everything measured; ``LOWBIT_RESULTS`` moves it."""
    return Path(os.environ.get("LOWBIT_RESULTS") or project() / "results")


def recorded(name: str) -> Path:
    """A file of `results`, such as ``claims.json``; where that has none, the one that travels with the project."""
    own = results() / name
    return own if own.exists() else project() / "results" / name


def embedded_data() -> Path:
    """The folder of data that travels with the project."""
    return project() / "data"


def archives() -> list[Path]:
    """Folders searched for data archives, in order: ``LOWBIT_DATA``, or ``../shared/data`` beside the project."""
    if given := os.environ.get("LOWBIT_DATA"):
        return [Path(given).expanduser().resolve()]
    beside = project().parent / "shared" / "data"
    return [beside] if beside.is_dir() else []


def cache() -> Path:
    """The user's cache folder for decoded data and downloads; ``LOWBIT_CACHE`` moves it."""
    return Path(os.environ.get("LOWBIT_CACHE") or platformdirs.user_cache_dir("lowbit"))
