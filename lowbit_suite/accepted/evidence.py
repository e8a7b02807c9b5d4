"""Copies an accepted run's tables, which ``lowbit claims`` reads, its trainings and a few figures to ``results/``."""

import shutil
from pathlib import Path

from lowbit import paths
from lowbit_suite.records import journal
from lowbit_suite.running.run_json import Run

WITHOUT = ("smoke",)
"""Profiles that only show mechanisms: ``lowbit claims`` does not read their tables, so none are kept."""

PICTURES = (
    "02_with_and_without_zero",
    "03_freezing_over_epochs",
    "04_training_curves",
    "05_motion_and_accuracy",
    "05_sigma_sweep",
    "06_found",
    "07_accuracy",
    "08_compared",
    "09_shares",
    "10_accuracy_and_oscillation",
    "11_correlations",
    "11_who_oscillates",
    "12_arms",
    "13_ladder",
    "13_start",
    "13_steps",
    "14_accuracy",
    "14_pairs",
    "16_bytes",
    "16_latency",
    "17_pareto",
    "18_annealing",
    "18_factorial",
    "18_freezing_and_transfer",
)
"""The figures to keep at the larger profiles; those of learning rates are kept too."""


def files(run: Run, folder: Path) -> dict[Path, Path]:
    """The place in ``results/`` for each table, journal and figure of the notebooks that passed.

    Args:
        run: the content of ``run.json``; nothing is kept from the profiles in `WITHOUT`.
        folder: the folder of the run.

    Returns:
        The kept file's path for each file of the run.
    """
    found = {}
    for name in (entry.name for entry in run.notebooks if entry.status == "passed"):
        for path in sorted((folder / "tables" / name).glob("*")):
            found[path] = _kept("tables", run.profile) / path.name
        for path in sorted((folder / "figures" / name).glob("*.png")):
            if path.stem in PICTURES or "learning_rates" in path.stem:
                found[path] = _kept("figures", run.profile) / path.name
        if len(journal.read(path := folder / journal.place(name))) > 1:
            found[path] = journal.kept(run.profile, name)
    return {} if run.profile in WITHOUT else found


def changed(run: Run, folder: Path) -> list[Path]:
    """The files in ``results/`` that `keep` would write or remove."""
    found = files(run, folder)
    new = [to for path, to in found.items() if not to.exists() or to.read_bytes() != path.read_bytes()]
    return new + _left_over(run, set(found.values()))


def keep(run: Run, folder: Path) -> None:
    """Copy `files`, and remove those that an earlier run of the same notebooks left there and this one lacks."""
    found = files(run, folder)
    for path in _left_over(run, set(found.values())):
        path.unlink()
    for path, to in found.items():
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)


def _kept(kind: str, profile: str) -> Path:
    return paths.results() / kind / profile


def _left_over(run: Run, stays: set[Path]) -> list[Path]:
    numbers = [entry.name[:3] for entry in run.notebooks if entry.status == "passed"]  # "02_": how all names begin
    places = [_kept(kind, run.profile) for kind in ("tables", "figures", "journals")]
    there = [path for place in places for number in numbers for path in sorted(place.glob(f"{number}*"))]
    return [] if run.profile in WITHOUT else [path for path in there if path not in stays]
