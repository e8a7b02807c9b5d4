"""Chooses the learning rate of every arm of a comparison by one rule, without the test set: :func:`choose_rates`."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lowbit.errors import DivergedError, LowbitError
from lowbit.extras import extra
from lowbit_suite.records.journal import TRIALS
from lowbit_suite.records.sweeps import sweep
from lowbit_suite.records.tables import save_table

SEED = 1000
"""The seed of the trials; judged seeds count from 0 and stay below it."""


def choose_rates(
    run: Callable[..., Mapping[str, Any]],
    arms: Sequence[Mapping[str, Any]],
    factors: Sequence[float],
    judged: Sequence[int],
    name: str,
    *,
    value: str = "accuracy, %",
    seeds: Sequence[int] = (SEED,),
    workers: int | None = None,
    **settings: Any,
):
    """Train every arm at the same multiples of its default learning rate and choose the best one on validation data.

    With one shared rate, a comparison of methods also measures how well that rate suits each of them. Here all arms get
    the same number of trials, with seeds that are not judged, and the test split is not used. `best_rates` has the
    rule.

    Args:
        run: a function as in `sweep` with two more arguments: ``lr_factor`` multiplies the arm's default rate; with
            ``validation=True`` the run trains on a part of the training split and measures on the rest of it
            (`lowbit.data.base.Data.hold_out`). It then returns one mapping that has ``value``.
        arms: keyword arguments of ``run``, one mapping per arm.
        factors: multiples of the default rate to try, the same for all arms. With a single one nothing is run.
        judged: the seeds of the comparison itself.
        name: name of the table of trials for `lowbit.save_table`, such as ``"02_learning_rates"``.
        value: name of the compared number; higher is better.
        seeds: seeds of the trials; each trial runs with each seed.
        workers: number of processes, see `sweep`.
        settings: settings for the table's run card.

    Returns:
        ``(arms, rates)``: the arms, each with its ``lr_factor``, as `sweep` takes them; and a pandas frame of all
        trials with the columns of `best_rates`. A trial whose loss did not stay finite has the value NaN. With a single
        factor the frame has one row an arm, NaN for its value, and is not saved.

    Raises:
        LowbitError: factors are missing or not positive, a seed is also judged, or `sweep` or `best_rates` refuses.
    """
    with extra("course", "choosing learning rates"):
        import pandas as pd

    factors = list(factors)
    if not factors or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise LowbitError(f"factors={factors} are not allowed; give positive multiples of the default rate, e.g. [1.0]")
    if len(set(factors)) < len(factors):
        raise LowbitError(f"factors={factors} has a value twice; give each once")
    if both := sorted({*seeds} & {*judged}):
        raise LowbitError(f"seed {both[0]} is also judged, which would favor the chosen rate: give other seeds")
    trials = [{**arm, "lr_factor": factor} for arm in arms for factor in factors]
    if len(factors) == 1:
        return trials, pd.DataFrame(trials).assign(**{value: math.nan, "chosen": True, "at_edge": False})
    card = {"lr_factors": factors, "trial_seeds": list(seeds), "judged_seeds": list(judged), **settings}
    tried = sweep(partial(_trial, run, value), trials, seeds, workers, description=TRIALS)
    if value not in tried or len(tried) != len(trials) * len(seeds):
        raise LowbitError(f"run(..., validation=True) has to return one mapping with {value!r}")
    save_table(tried, name, **card)  # before the choice, which may raise, so that no trial is lost
    by = list(dict.fromkeys(key for arm in arms for key in arm))
    rates = save_table(best_rates(tried, by, value), name, **card)
    best = rates[rates.chosen].drop_duplicates(by).lr_factor
    return [{**arm, "lr_factor": float(factor)} for arm, factor in zip(arms, best, strict=True)], rates


def best_rates(trials, by: Sequence[str], value: str = "accuracy, %"):
    """Mark the best rate of each arm: highest mean ``value`` over the seeds; ties go to the smaller rate.

    Args:
        trials: a pandas frame with the columns ``by``, ``lr_factor`` and ``value``, one row per run.
        by: the columns that identify an arm.
        value: name of the compared column; higher is better. NaN marks a failed run; its rate is not chosen.

    Returns:
        The frame with two more columns: ``chosen``, and ``at_edge`` for a chosen rate that is the smallest or largest
        tried. The best rate may then lie outside: repeat the trials with a wider grid.

    Raises:
        LowbitError: the arms were not tried equally often at the same rates, or all rates of an arm failed.
    """
    trials = trials.reset_index(drop=True).assign(chosen=False, at_edge=False)
    grid = None
    for arm, group in trials.groupby(list(by), sort=False, dropna=False):
        counts = group.groupby("lr_factor").size()
        if grid is not None and not counts.equals(grid):
            raise LowbitError(
                f"the arm {_named(by, arm)} was tried at the rates {counts.to_dict()} (factor: runs), another one at "
                f"{grid.to_dict()}; give all arms the same trials"
            )
        grid = counts
        # Rates ascend, and idxmax takes the first of equal values.
        means = group.groupby("lr_factor")[value].agg(lambda runs: runs.mean(skipna=False))
        if means.isna().all():
            raise LowbitError(
                f"every rate failed for the arm {_named(by, arm)}: its loss became infinite or NaN; try smaller rates"
            )
        best = means.idxmax()
        where = group.index[group.lr_factor == best]
        trials.loc[where, "chosen"] = True
        trials.loc[where, "at_edge"] = len(means) > 1 and best in (means.index[0], means.index[-1])
    return trials


def _trial(run: Callable[..., Mapping[str, Any]], value: str, **arguments: Any) -> Mapping[str, Any]:
    try:
        return run(**arguments, validation=True)
    except DivergedError:
        return {value: math.nan}  # a rate that is too large is a result, not an error


def _named(by: Sequence[str], arm: tuple) -> str:
    return ", ".join(f"{key}={found!r}" for key, found in zip(by, arm, strict=True))
