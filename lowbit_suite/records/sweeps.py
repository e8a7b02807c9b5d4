"""Runs an experiment for every arm and seed, several at a time: :func:`sweep`."""

import itertools
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit_suite.records.journal import Journal, plain
from lowbit_suite.records.tables import save_table, tables

_NUMBERS = itertools.count(
    1
)  # numbers of the sweeps in this process; they name the sweeps of a notebook that runs from the top


def sweep(
    run: Callable[..., Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    arms: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    workers: int | None = None,
    description: str = "runs",
):
    """Call ``run(**arm, seed=seed)`` for every arm and seed and return the results as one table.

    Under ``lowbit run`` each result is written to the notebook's journal when it arrives, and an interrupted notebook
    continues from there (`lowbit_suite.records.journal`).

    Args:
        run: a function that trains and returns its measurements: a mapping of plain values, or several (for example
            one per epoch). It may be defined in a notebook; all that it uses from there is copied to the workers, so
            it should load data itself.
        arms: keyword arguments of ``run``, one mapping per arm.
        seeds: random seeds; each arm runs with each seed.
        workers: number of processes, each with one thread; 1 runs everything in this process. None takes torch's number
            of threads, or 1 with a GPU or without semaphores. Results do not depend on it.
        description: text of the progress bar.

    Returns:
        A pandas frame in order of arms and seeds: the arm's arguments, ``seed``, and the returned values.

    Raises:
        LowbitError: there is nothing to run, or a run failed; the message names it and the reason. Earlier results are
            saved by `lowbit.save_table`, and the message names the file.
    """
    with extra("course", "a sweep"):
        from tqdm.auto import tqdm

    jobs = [(dict(arm), seed) for arm in arms for seed in seeds]
    if not jobs:
        raise LowbitError(
            f"there is nothing to run: {len(arms)} arms and {len(seeds)} seeds; give at least one of each"
        )
    if workers is None:
        workers = 1 if torch.cuda.is_available() or _no_semaphores() else torch.get_num_threads()
    if workers < 1:
        raise LowbitError(f"workers={workers} is not allowed; give 1 or more")
    if workers > 1 and (why := _no_semaphores()):
        raise LowbitError(f"workers={workers} needs semaphores, which this system refuses ({why}); give workers=1")
    journal, name = Journal(), f"{next(_NUMBERS)} {description}"
    found = {job: result for job in range(len(jobs)) if (result := journal.get(name, *jobs[job])) is not None}
    left = [job for job in range(len(jobs)) if job not in found]
    workers = min(workers, max(len(left), 1))
    bar = tqdm(total=len(jobs), initial=len(found), desc=description, unit="run")
    with bar:
        try:
            for job, seconds, result in _results(run, {job: jobs[job] for job in left}, workers):
                found[job] = result
                journal.add(name, *jobs[job], seconds, result)
                bar.update()
        except LowbitError as error:
            if not found:
                raise
            unfinished = "unfinished_" + "_".join(description.split())
            kept = save_table(_table(jobs, found), unfinished)
            where = tables() / f"{unfinished}.csv"
            raise LowbitError(f"{error}; the {len(kept)} rows measured before it are in {where}") from None
    return _table(jobs, found)


def _results(run: Callable, jobs: Mapping[int, tuple[dict[str, Any], int]], workers: int) -> Iterator[tuple]:
    """The result of `_one` for each job, as it arrives."""
    if workers == 1:  # in this process: no start-up, copies or semaphores, and a debugger works
        yield from (_one(run, job, *given) for job, given in jobs.items())
        return
    with extra("course", "a sweep of several workers"):
        from joblib import Parallel, delayed, parallel_config

    # joblib restarts a worker whose memory has grown, for example by a data set, and warns each time.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
    with parallel_config("loky", inner_max_num_threads=1):
        parallel = Parallel(workers, return_as="generator_unordered")
        yield from parallel(delayed(_one)(run, job, *given) for job, given in jobs.items())


def _no_semaphores() -> str:
    """The reason why several processes cannot be used here (/dev/shm cannot be written); empty if they can."""
    try:
        multiprocessing.Semaphore()
    except (ImportError, OSError) as error:
        return str(error)
    return ""


def _table(jobs: Sequence[tuple[dict[str, Any], int]], found: Mapping[int, Any]):
    with extra("course", "a sweep"):
        import pandas as pd

    rows = []
    for job in sorted(found):
        (arm, seed), result = jobs[job], found[job]
        rows += [{**arm, "seed": seed, **row} for row in ([result] if isinstance(result, Mapping) else result)]
    return pd.DataFrame(rows)


def _one(run: Callable, job: int, arm: dict[str, Any], seed: int) -> tuple[int, float, Any]:
    start, threads = time.monotonic(), torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the number of threads changes the last bits of a sum
    try:
        result = plain(run(**arm, seed=seed))
        return job, time.monotonic() - start, result
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in {**arm, "seed": seed}.items())
        raise LowbitError(f"the run {given} failed: {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)
