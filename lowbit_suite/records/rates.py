"""The learning rate of every arm of a comparison, chosen by one rule and without the test set: :func:`choose_rates`."""

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
"""The seed of the trials: far from those that are judged, which count from 0."""


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
    """Trains every arm at the same few multiples of its own default learning rate and keeps the best on validation.

    At one shared rate a comparison of methods is also one of how well that rate happens to suit them. Here all arms
    get the same number of trials, with seeds that are not judged, and the test split is not looked at. The rule is
    that of `best_rates`.

    Args:
        run: as for `sweep`, with two more arguments: ``lr_factor`` multiplies the arm's default rate; with
            ``validation=True`` the run trains on a part of the training split and measures on the rest of it
            (`lowbit.data.base.Data.hold_out`). It then returns one mapping that has ``value``.
        arms: keyword arguments of ``run``, one mapping an arm.
        factors: multiples of the default rate to try, the same for all arms. With a single one nothing is run.
        judged: the seeds of the comparison itself.
        name: of the table of trials that `lowbit.save_table` keeps, such as ``"02_learning_rates"``.
        value: what is compared; more is better.
        seeds: each trial runs with each of them.
        workers: as for `sweep`.
        settings: for the table's run card.

    Returns:
        ``(arms, rates)``: the arms, each with its ``lr_factor``, as `sweep` takes them; and a pandas frame of all
        trials with the columns of `best_rates`. A trial whose loss did not stay finite has the value NaN. With a single
        factor the frame has one row an arm, NaN for its value, and is not saved.

    Raises:
        LowbitError: no factors, or not positive ones; seeds that are also judged; what `sweep` or `best_rates` refuses.
    """
    with extra("course", "choosing learning rates"):
        import pandas as pd

    factors = list(factors)
    if not factors or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise LowbitError(f"factors={factors} are not allowed; give positive multiples of the default rate, e.g. [1.0]")
    if len(set(factors)) < len(factors):
        raise LowbitError(f"factors={factors}: give each of them once")
    if both := sorted({*seeds} & {*judged}):
        raise LowbitError(f"seed {both[0]} is also judged; a rate chosen with it would fit its luck: take other seeds")
    trials = [{**arm, "lr_factor": factor} for arm in arms for factor in factors]
    if len(factors) == 1:
        return trials, pd.DataFrame(trials).assign(**{value: math.nan, "chosen": True, "at_edge": False})
    card = {"lr_factors": factors, "trial_seeds": list(seeds), "judged_seeds": list(judged), **settings}
    tried = sweep(partial(_trial, run, value), trials, seeds, workers, description=TRIALS)
    if value not in tried or len(tried) != len(trials) * len(seeds):
        raise LowbitError(f"run(..., validation=True) has to return one mapping with {value!r}")
    save_table(tried, name, **card)  # before the choice, which may refuse: no trial is lost
    by = list(dict.fromkeys(key for arm in arms for key in arm))
    rates = save_table(best_rates(tried, by, value), name, **card)
    best = rates[rates.chosen].drop_duplicates(by).lr_factor
    return [{**arm, "lr_factor": float(factor)} for arm, factor in zip(arms, best, strict=True)], rates


def best_rates(trials, by: Sequence[str], value: str = "accuracy, %"):
    """Marks the best rate of each arm: highest mean ``value`` over the seeds; of equal ones the smaller rate.

    Args:
        trials: a pandas frame with the columns ``by``, ``lr_factor`` and ``value``, one row a run.
        by: the columns that tell arms apart.
        value: more is better; NaN is a run that failed, and a rate with one is not chosen.

    Returns:
        The frame with two more columns: ``chosen``, and ``at_edge``: it is chosen and the smallest or the largest rate
        tried, so that the best one may lie outside, and the trials should be repeated with a wider grid.

    Raises:
        LowbitError: an arm was not tried at the same rates, as often, as the others; or none of its rates worked.
    """
    trials = trials.reset_index(drop=True).assign(chosen=False, at_edge=False)
    grid = None
    for arm, group in trials.groupby(list(by), sort=False, dropna=False):
        counts = group.groupby("lr_factor").size()
        if grid is not None and not counts.equals(grid):
            raise LowbitError(
                f"the arm {_named(by, arm)} was tried at the rates {counts.to_dict()} (factor: runs), another one at "
                f"{grid.to_dict()}; a fair choice gives all arms the same trials"
            )
        grid = counts
        # In ascending order of the rate, and idxmax takes the first of equal ones.
        means = group.groupby("lr_factor")[value].agg(lambda runs: runs.mean(skipna=False))
        if means.isna().all():
            raise LowbitError(f"no rate worked for the arm {_named(by, arm)}: each loss left the finite numbers")
        best = means.idxmax()
        where = group.index[group.lr_factor == best]
        trials.loc[where, "chosen"] = True
        trials.loc[where, "at_edge"] = len(means) > 1 and best in (means.index[0], means.index[-1])
    return trials


def _trial(run: Callable[..., Mapping[str, Any]], value: str, **arguments: Any) -> Mapping[str, Any]:
    try:
        return run(**arguments, validation=True)
    except DivergedError:
        return {value: math.nan}  # too large a rate is an answer, not a failure


def _named(by: Sequence[str], arm: tuple) -> str:
    return ", ".join(f"{key}={found!r}" for key, found in zip(by, arm, strict=True))
