"""Runs the same notebooks with more seeds, to measure the spread of their numbers."""

from pathlib import Path
from typing import Any

from lowbit import environment
from lowbit.errors import LowbitError
from lowbit_suite import notebooks, profiles
from lowbit_suite.running import fingerprint, runner
from lowbit_suite.running.cache import Cache
from lowbit_suite.running.progress import Progress
from lowbit_suite.running.run_json import Entry, Run


def repeat(
    run: Run, seeds: int, folder: Path, *, jobs: int = 1, progress: Progress | None = None
) -> dict[str, list[Entry]]:
    """Run each notebook of ``run`` that has a parameter ``seed`` or ``seeds`` with ``seeds - 1`` more seeds.

    Everything else is as in ``run``. Results go to ``folder/seeds/<seed>``. Returns the passed entries by notebook.
    A notebook that does not pass with another seed raises `LowbitError`, since its number is then due to luck.
    """
    found: dict[str, list[Entry]] = {}
    seeded = [entry for entry in run.notebooks if further(entry.parameters, 1)]
    profile = profiles.get(run.profile)
    if seeds > 1:
        _same_code(run, [entry.name for entry in seeded], profile, folder)
    for step in range(1, seeds if seeded else 1):
        chosen = notebooks.select([entry.name for entry in seeded])
        parameters = {}
        for entry in seeded:
            parameters[entry.name] = {**entry.parameters, **further(entry.parameters, step)}
        plan = runner.Plan(
            run.profile,
            profile,
            chosen,
            parameters,
            folder / "seeds" / f"plus{step}",
            jobs,
            timeout=profile.timeout_minutes * 60,
        )
        for entry in runner.execute(plan, progress=progress).notebooks:
            if entry.status != "passed":
                seed = further(entry.parameters, 0)
                raise LowbitError(f"{entry.name} with {seed} is {entry.status}: {entry.reason}")
            found.setdefault(entry.name, []).append(entry)
    return found


def further(parameters: dict[str, Any], step: int) -> dict[str, Any]:
    """The ``step``-th seeds after those in ``parameters``: an integer ``seed``, or a list ``seeds`` of them.

    A list of n seeds is replaced by the ``step``-th following n, so that no seed counts twice. Empty without seeds.
    """
    seed, seeds = parameters.get("seed"), parameters.get("seeds")
    if type(seed) is int:
        return {"seed": seed + step}
    if isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds):
        return {"seeds": [s + step * (max(seeds) - min(seeds) + 1) for s in seeds]}
    return {}


def _same_code(run: Run, names: list[str], profile: profiles.Profile, folder: Path) -> None:
    """Refuse to measure one spread from runs of different code."""
    if not names:
        return
    kept, shared = Cache(folder), fingerprint.facts(environment.describe())
    for item in notebooks.select(names):
        before = {name: kept.stamp(name) for name in item.after}
        now = fingerprint.fingerprint(item, run.entry(item.name).parameters, shared, profile.threads, before)
        if what := kept.why_not(item.name, now):
            raise LowbitError(f"{item.name}: {what} since the run to accept; run it again first")
