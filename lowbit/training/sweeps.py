"""The same experiment for every arm and seed, several at once: :func:`sweep`."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lowbit.errors import LowbitError
from lowbit.suite.tables import save_table, tables


def sweep(
    run: Callable[..., Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    arms: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    workers: int | None = None,
    description: str = "runs",
):
    """Calls ``run(**arm, seed=seed)`` for every arm and every seed and returns the results as one table.

    Args:
        run: trains and returns what it measured: a mapping of plain values, or several (one for each epoch, say).
            It may be defined in a notebook; what it uses from there is copied to the workers, so it should load data
            itself.
        arms: keyword arguments of ``run``, one mapping an arm.
        seeds: each arm runs with each of them.
        workers: processes, each with one thread; 1 runs everything in this process. None: as many as torch has
            threads here, but one where there is a GPU. Results do not depend on it.
        description: what the progress bar says.

    Returns:
        A pandas frame in order of arms and seeds: the arm's arguments, ``seed``, and what was returned.

    Raises:
        LowbitError: nothing to run; or a run failed: which one, and why. What had been measured until then is kept
            by `lowbit.save_table`, and the message says where.
    """
    import pandas as pd
    from joblib import Parallel, delayed, parallel_config
    from tqdm.auto import tqdm

    jobs = [(dict(arm), seed) for arm in arms for seed in seeds]
    if not jobs:
        raise LowbitError(f"there is nothing to run: {len(arms)} arms, {len(seeds)} seeds")
    if workers is None:
        workers = 1 if torch.cuda.is_available() else torch.get_num_threads()
    if workers < 1:
        raise LowbitError(f"workers={workers} is not allowed; it takes 1 or more")
    workers = min(workers, len(jobs))
    rows = []
    # joblib restarts a worker that has grown, as those that load a data set do, and warns of it each time.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
    with tqdm(total=len(jobs), desc=description, unit="run") as bar, parallel_config("loky", inner_max_num_threads=1):
        # One worker is this process (joblib's sequential form): no start-up, no copies, a debugger works.
        done = Parallel(workers, return_as="generator")(delayed(_one)(run, arm, seed) for arm, seed in jobs)
        try:
            for (arm, seed), result in zip(jobs, done, strict=True):
                for row in [result] if isinstance(result, Mapping) else result:
                    rows.append({**arm, "seed": seed, **row})
                bar.update()
        except LowbitError as error:
            if not rows:
                raise
            name = "unfinished_" + "_".join(description.split())
            save_table(pd.DataFrame(rows), name)
            kept = f"the {len(rows)} rows measured before it are in {tables() / name}.csv"
            raise LowbitError(f"{error}; {kept}") from None
    return pd.DataFrame(rows)


def _one(run: Callable, arm: dict[str, Any], seed: int) -> Any:
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the number of threads changes the last bits of a sum
    try:
        return run(**arm, seed=seed)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in {**arm, "seed": seed}.items())
        raise LowbitError(f"the run {given} failed: {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)
