"""Tuned learning rates in the study: the trials, the choice, and the trainings that wait for it.

Every arm of a `lowbit_suite.study.plan.Tune` is tried at the same multiples of its common rate. The trials have seeds
that are not judged, and are scored on a part of the training split. The rule is that of `lowbit_suite.choose_rates`:
the highest mean over the trials; ties go to the smaller rate. If the best multiple is the smallest or the largest one,
the next one beyond it is tried too. The choice depends on the journals' lines and their order alone. So all machines
with the same journals have the same trainings to do, and further lines do not change a choice.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lowbit_suite.study import plan, queue
from lowbit_suite.study.plan import Derived, Table, Training
from lowbit_suite.study.queue import Done

VALUES = ("accuracy, %", "target, %", "mAP, %")
"""The columns that rows are compared by; each table has one of them."""

ArmKey = tuple[str, str, int]


@dataclass(frozen=True)
class Choice:
    """The result of one arm's trials.

    Attributes:
        trials: the planned trials, and the further ones that the choice needs.
        lines: the results that decide, all from one kind of processor; empty while some are missing.
        factor: the chosen multiple of the common rate; None while trials are missing, or if every rate failed.
        at_edge: whether it is the smallest or the largest multiple tried, and no further one is allowed.
    """

    trials: list[Training]
    lines: list[Done]
    factor: float | None = None
    at_edge: bool = False


def trainings(tables: dict[str, Table], lines: Iterable[Done]) -> list[Training]:
    """Every training of the plan, with the further trials and the chosen rates that follow from the journals.

    Args:
        tables: from `lowbit_suite.study.plan.load`.
        lines: the lines of all their journals.
    """
    planned = list(plan.trainings(tables))
    chosen = choices(tables, lines)
    known = {training.key: training for training in planned}
    further = [trial for choice in chosen.values() for trial in choice.trials if trial.key not in known]
    return [_at_chosen_rate(training, chosen, known) for training in planned] + further


def choices(tables: dict[str, Table], lines: Iterable[Done]) -> dict[ArmKey, Choice]:
    """The choice for each arm, by common table, arm name and bits.

    Args:
        tables: from `lowbit_suite.study.plan.load`.
        lines: the lines of all their journals.
    """
    lines = list(lines)
    found: dict[ArmKey, Choice] = {}
    for name, table in tables.items():
        if isinstance(table, Derived) and table.factors:
            arms: dict[ArmKey, list[Training]] = {}
            for trial in plan.trainings({name: table}):
                arms.setdefault((table.common, trial.arm, trial.bits), []).append(trial)
            found |= {arm: _choice(trials, lines, table.further) for arm, trials in arms.items()}
    return found


def _choice(trials: list[Training], lines: list[Done], further: int) -> Choice:
    while True:
        decide = _first_whole(trials, lines)
        if not decide:
            return Choice(trials, [])
        factor, at_edge, failed = _best(decide)
        if not at_edge or not further:
            return Choice(trials, decide, None if failed else factor, at_edge)
        trials = [*trials, *_beyond(trials, factor)]
        further -= 1


def _first_whole(trials: list[Training], lines: list[Done]) -> list[Done]:
    """One line per trial from the kind of processor that finished all trials first; empty if none has yet.

    It is the first kind, not the one with most lines, because a later line must not change a choice.
    """
    digests = {trial.key: trial.digest for trial in trials}
    ended: dict[str, dict[queue.Key, Done]] = {}
    for line in lines:
        if digests.get(line.key) == line.digest:
            own = ended.setdefault(line.kind, {})
            own.setdefault(line.key, line)
            if len(own) == len(trials):
                return [own[trial.key] for trial in trials]
    return []


def _best(lines: list[Done]) -> tuple[float, bool, bool]:
    """The best factor (the smallest if every rate failed), whether it is at the edge, and whether every rate failed."""
    import pandas as pd

    from lowbit_suite.records.rates import best_rates

    rows = [line.line["rows"][0] for line in lines]
    scores = [next(row[name] for name in VALUES if name in row) for row in rows]
    frame = pd.DataFrame({"arm": "", "lr_factor": [row["lr_factor"] for row in rows], "score": scores})
    worked = frame.groupby("lr_factor").score.agg(lambda runs: runs.notna().all())
    if not worked.any():
        return float(worked.index.min()), True, True
    best = best_rates(frame, ["arm"], "score")
    best = best[best.chosen].iloc[0]
    return float(best.lr_factor), bool(best.at_edge), False


def _beyond(trials: list[Training], edge: float) -> list[Training]:
    """The trials at the next multiple beyond the ``edge``, at the same ratio to it as its other neighbor."""
    factors = sorted({trial.factor for trial in trials if trial.factor is not None})
    neighbor = factors[1] if edge == factors[0] else factors[-2]
    return [plan.at_rate(trial, edge * edge / neighbor) for trial in trials if trial.factor == 1]


def _at_chosen_rate(training: Training, chosen: dict[ArmKey, Choice], known: dict[queue.Key, Training]) -> Training:
    if training.common is None or not training.waits:
        return training
    choice = chosen[training.common, training.arm, training.bits]
    if choice.factor is None:
        return training
    made = plan.at_rate(training, choice.factor)
    common = known.get((training.common, *training.key[1:]))
    if common is None or common.run | {"name": training.table} != made.run:
        return made
    return replace(made, same=common)


def marked(choice: Choice, ended: dict[queue.Key, list[Done]]) -> list[Done]:
    """The lines of an arm's trials with two more columns: ``chosen`` and ``at_edge``.

    Args:
        choice: the result of the trials.
        ended: the lines of all trainings; the source of the trials' lines while there is no choice.
    """
    lines = choice.lines or [line for trial in choice.trials for line in ended.get(trial.key, [])]
    return [
        replace(line, line=line.line | {"rows": [_marked(row, choice) for row in line.line["rows"]]}) for line in lines
    ]


def _marked(row: dict, choice: Choice) -> dict:
    chosen = row["lr_factor"] == choice.factor
    return row | {"chosen": chosen, "at_edge": chosen and choice.at_edge}
