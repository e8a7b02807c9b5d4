"""Baselines: the accepted numbers of a profile, and their tolerances.

One file for each profile and device class, ``results/baselines/<profile>-<cpu|cuda>.json``. A metric agrees when
it lies within ``tolerance`` of ``value``. The tolerance comes from runs with other seeds (`spread`): a number that
depends on a seed depends on the machine's rounding in the same way, so another machine is one more draw. A metric
without a measured spread has to be reproduced exactly, up to `ROUNDING`.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit_suite.profiles import Profile, close
from lowbit_suite.records.record import show
from lowbit_suite.running.run_json import Entry, Metric, Run, read_json, show_path, write_json

SCHEMA = 1
LEVEL = 0.99
"""Coverage of the prediction interval: of 100 honest new runs of a metric, about one falls outside."""

ROUNDING = 1e-6
"""Relative tolerance for non-integers: single-precision sums differ by this much between processors."""

EXACT = "not measured: has to be reproduced exactly (lowbit accept --seeds N measures the spread)"


@dataclass(frozen=True)
class Accepted:
    """One accepted metric; ``value`` is the mean of ``values``, the results of single runs."""

    value: float | int
    tolerance: float
    unit: str
    better: str
    method: str
    values: list[float | int] = field(default_factory=list)


@dataclass(frozen=True)
class AcceptedNotebook:
    """A notebook's accepted metrics, and the parameters they hold for."""

    parameters: dict[str, Any]
    metrics: dict[str, Accepted]


@dataclass(frozen=True)
class Baseline:
    """The content of a baseline file."""

    profile: str
    device: str
    accepted: str
    environment: dict
    notebooks: dict[str, AcceptedNotebook]


@dataclass(frozen=True)
class Row:
    """One line of a comparison. ``verdict`` is ``same``, ``improved`` or the fault; ``ok`` is False for a fault."""

    notebook: str
    metric: str
    verdict: str
    ok: bool
    now: str = ""
    accepted: str = ""
    note: str = ""


def path(profile: str, device: str) -> Path:
    """The baseline file of a profile on a device class."""
    return paths.results() / "baselines" / f"{profile}-{device}.json"


def load(profile: str, device: str) -> Baseline:
    """Read the baseline; a missing or broken file raises a `LowbitError` that says what to do."""
    file = path(profile, device)
    if not file.exists():
        raise LowbitError(
            f"there is no baseline {show_path(file)}: look at the run's report, "
            f"then accept its numbers with 'lowbit accept --profile {profile} --seeds 5'"
        )
    tree = read_json(file)
    if tree.get("schema") != SCHEMA:
        raise LowbitError(f"{show_path(file)} has schema {tree.get('schema')!r}; this version reads {SCHEMA}")
    try:
        notebooks = {
            name: AcceptedNotebook(item["parameters"], {k: Accepted(**m) for k, m in item["metrics"].items()})
            for name, item in tree["notebooks"].items()
        }
        found = Baseline(tree["profile"], tree["device"], tree["accepted"], tree["environment"], notebooks)
        wrong = [k for n in notebooks.values() for k, m in n.metrics.items() if not _usable(m)]
    except (KeyError, TypeError, AttributeError) as error:
        raise LowbitError(f"{show_path(file)} is not a baseline of this version: {error}") from None
    if wrong:
        raise LowbitError(f"{show_path(file)}: no finite value or tolerance for {', '.join(wrong)}")
    return found


def _usable(metric: Accepted) -> bool:
    return math.isfinite(metric.value) and math.isfinite(metric.tolerance) and metric.tolerance >= 0


def save(baseline: Baseline) -> Path:
    """Writes the baseline file."""
    file = path(baseline.profile, baseline.device)
    write_json(file, {"schema": SCHEMA, **asdict(baseline)})
    return file


def compare(
    run: Run, baseline: Baseline, only: Sequence[str] | None = None, profile: Profile | None = None
) -> list[Row]:
    """Compare a run with the baseline: one row for each metric, whether it agrees or differs.

    Both sides need the same notebooks and the same metrics. Differences are: a notebook that did not pass, other
    parameters, NaN or infinity, a changed unit or direction, and a missing or new metric. A comparison without any
    number is a difference too. ``only`` restricts the comparison to some notebooks, and ``profile`` says which of
    them may be skipped.
    """
    names = list(dict.fromkeys([*(entry.name for entry in run.notebooks), *baseline.notebooks]))
    for name in only or ():
        if name not in names:
            raise LowbitError(f"neither the run nor the baseline has {name!r}; they have {', '.join(names)}")
    rows = []
    for name in names:
        if only is None or name in only:
            may_skip = profile is not None and profile.lets_skip(name)
            rows += _compare_notebook(name, run.entry(name), baseline.notebooks.get(name), may_skip)
    if all(row.ok and row.verdict == "skipped" for row in rows):
        rows.append(Row("", "", "nothing compared", False, note="neither the run nor the baseline has a number"))
    return rows


def _compare_notebook(
    name: str, entry: Entry | None, accepted: AcceptedNotebook | None, may_skip: bool = False
) -> list[Row]:
    if entry is None:
        return [Row(name, "", "missing", False, note="the baseline has this notebook, the run does not")]
    if entry.status == "skipped" and may_skip:
        return [Row(name, "", "skipped", True, note=entry.reason)]
    if entry.status != "passed":
        return [Row(name, "", entry.status.replace("_", " "), False, note=entry.reason)]
    if accepted is None:
        return [Row(name, "", "new notebook", False, note="not in the baseline yet: lowbit accept")]
    if entry.parameters != accepted.parameters:
        both = {*entry.parameters, *accepted.parameters}
        other = sorted(k for k in both if entry.parameters.get(k) != accepted.parameters.get(k))
        return [Row(name, "", "other parameters", False, note=f"{', '.join(other)}: not those the baseline holds for")]
    keys = list(dict.fromkeys([*accepted.metrics, *entry.metrics]))
    rows = [_compare_metric(name, key, entry.metrics.get(key), accepted.metrics.get(key)) for key in keys]
    return rows or [Row(name, "", "same", True, note="records no numbers")]


def _compare_metric(notebook: str, key: str, now: Metric | None, old: Accepted | None) -> Row:
    if now is None:
        return Row(notebook, key, "vanished", False, "", _interval(old), "the notebook no longer records it")
    shown = _with_unit(now.value, now.unit)
    if not math.isfinite(now.value):
        return Row(notebook, key, "not a number", False, shown, _interval(old) if old else "")
    if old is None:
        return Row(notebook, key, "new", False, shown, "", "not in the baseline yet: lowbit accept")
    if (now.unit, now.better) != (old.unit, old.better):
        note = f"was {old.unit!r}, {old.better}; is {now.unit!r}, {now.better}"
        return Row(notebook, key, "other unit or direction", False, shown, _interval(old), note)
    difference = now.value - old.value
    if abs(difference) <= slack(old):
        return Row(notebook, key, "same", True, shown, _interval(old))
    if old.better == "equal":
        return Row(notebook, key, "changed", False, shown, _interval(old))
    if (difference > 0) == (old.better == "higher"):
        return Row(notebook, key, "improved", True, shown, _interval(old), "beyond the tolerance; accept it to keep it")
    return Row(notebook, key, "worse", False, shown, _interval(old))


def slack(metric: Accepted) -> float:
    """The largest allowed distance from the accepted value."""
    whole = isinstance(metric.value, int) or float(metric.value).is_integer()
    return max(metric.tolerance, 0.0 if whole and metric.tolerance == 0 else ROUNDING * abs(metric.value))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the `LEVEL` prediction interval for one more run like these ``values`` (at least 2).

    Student's t with n - 1 degrees of freedom: ``t * s * sqrt(1 + 1/n)``, for roughly normal values.
    """
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        raise LowbitError(f"a spread needs at least 2 runs, not {len(values)}")
    array = np.asarray(values, dtype=np.float64)
    quantile = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
    return float(array.mean()), float(quantile * array.std(ddof=1) * np.sqrt(1 + 1 / len(values)))


def propose(
    run: Run, old: Baseline | None, repeats: Mapping[str, Sequence[Entry]] | None = None, *, pool: bool = False
) -> Baseline:
    """The new baseline from this run.

    ``repeats`` are further passed runs of a notebook that differ from ``run`` in nothing but the seed; value and
    tolerance of its metrics are then taken from all of them. Without them a metric keeps its earlier tolerance,
    and a new one has to be reproduced exactly. Accepted notebooks that are not in this run are kept while the
    project still has their file.

    With ``pool`` the run, from another machine, is one more draw beside those of the accepted baseline: nothing is
    replaced, and value and tolerance come from all of them. A number that it reproduces up to `ROUNDING` is no new
    draw, and an integer that was the same in every run stays exact.

    Raises:
        LowbitError: A notebook has not passed, a value is not finite, or the repeats record other metrics; with
            ``pool``, the baseline lacks the notebook or holds for other parameters.
    """
    from lowbit_suite.notebooks import available

    repeats = repeats or {}
    notebooks = {}
    if old:
        there = available()
        notebooks = {name: item for name, item in old.notebooks.items() if name in there}
    for entry in run.notebooks:
        for one in (entry, *repeats.get(entry.name, ())):
            if one.status != "passed":
                raise LowbitError(f"{one.name} is {one.status.replace('_', ' ')} ({one.reason}): nothing to accept")
            if set(one.metrics) != set(entry.metrics):
                odd = ", ".join(sorted(set(one.metrics) ^ set(entry.metrics)))
                raise LowbitError(f"{one.name} records other metrics with another seed: {odd}")
            for key, metric in one.metrics.items():
                if not math.isfinite(metric.value):
                    raise LowbitError(f"{one.name}: {key} is {metric.value}; only finite numbers can be accepted")
        before = old.notebooks.get(entry.name) if old else None
        if pool:
            notebooks[entry.name] = _pooled(entry, before)
            continue
        metrics = {}
        for key, metric in entry.metrics.items():
            values = [metric.value, *(one.metrics[key].value for one in repeats.get(entry.name, ()))]
            metrics[key] = _accept(metric, values, before.metrics.get(key) if before else None)
        notebooks[entry.name] = AcceptedNotebook(entry.parameters, metrics)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Baseline(run.profile, run.device, now, run.environment, dict(sorted(notebooks.items())))


def _pooled(entry: Entry, before: AcceptedNotebook | None) -> AcceptedNotebook:
    if before is None or before.parameters != entry.parameters:
        raise LowbitError(
            f"{entry.name}: the baseline has no numbers for these parameters, so there is nothing to add to; "
            "leave out --pool"
        )
    metrics = dict(before.metrics)
    for key, metric in entry.metrics.items():
        old = before.metrics.get(key)
        values = old.values if old else []
        exact = old is None or (old.tolerance == 0 and float(old.value).is_integer())
        if exact or not values or (old.unit, old.better) != (metric.unit, metric.better):
            continue  # a count that never varied, or no accepted metric: `compare` still reports the difference
        if not any(math.isclose(metric.value, value, rel_tol=ROUNDING) for value in values):
            mean, width = spread([*values, metric.value])
            how = f"mean of {len(values) + 1} runs (seeds, machines); half-width of the {LEVEL:.0%} prediction interval"
            metrics[key] = Accepted(mean, width, old.unit, old.better, how, [*values, metric.value])
    return AcceptedNotebook(before.parameters, metrics)


def _accept(metric: Metric, values: list[float | int], before: Accepted | None) -> Accepted:
    if len(values) > 1:
        if len(set(values)) == 1:
            method = f"the same in {len(values)} runs with different seeds"
            return Accepted(metric.value, 0.0, metric.unit, metric.better, method, values)
        mean, width = spread(values)
        method = f"mean of {len(values)} seeds; half-width of the {LEVEL:.0%} prediction interval (Student's t)"
        return Accepted(mean, width, metric.unit, metric.better, method, values)
    if before and before.tolerance > 0 and (before.unit, before.better) == (metric.unit, metric.better):
        kept = before.method.removeprefix("one run; tolerance kept from: ")
        method = f"one run; tolerance kept from: {kept}"
        return Accepted(metric.value, before.tolerance, metric.unit, metric.better, method)
    return Accepted(metric.value, 0.0, metric.unit, metric.better, EXACT)


def changes(old: Baseline | None, new: Baseline) -> list[Row]:
    """The changes from ``old`` to ``new``: one row for each metric that is not exactly the same."""
    rows = []
    for name in sorted({*(old.notebooks if old else {}), *new.notebooks}):
        before = old.notebooks[name].metrics if old and name in old.notebooks else {}
        after = new.notebooks[name].metrics if name in new.notebooks else {}
        for key in dict.fromkeys([*before, *after]):
            a, b = before.get(key), after.get(key)
            if a != b:
                verdict = "new" if a is None else "dropped" if b is None else "changed"
                rows.append(
                    Row(
                        name,
                        key,
                        verdict,
                        True,
                        _interval(b) if b else "",
                        _interval(a) if a else "",
                        b.method if b else "",
                    )
                )
    return rows


def _interval(metric: Accepted) -> str:
    around = f" ± {metric.tolerance:.3g}" if metric.tolerance else ""
    return f"{show(metric.value)}{around}{' ' if metric.unit else ''}{metric.unit}"


def _with_unit(value: float | int, unit: str) -> str:
    return f"{show(value)}{' ' if unit else ''}{unit}"


def pick(names: Sequence[str] | None, run: Run, old: Baseline | None) -> list[str] | None:
    """The notebooks of the run and the baseline that match names and globs as in ``lowbit run``; None for all."""
    if not names:
        return None
    there = sorted({entry.name for entry in run.notebooks} | set(old.notebooks if old else ()))
    chosen: dict[str, None] = {}
    for name in (given.removesuffix(".ipynb") for given in names):
        if not (matches := fnmatch.filter(there, name)):
            raise LowbitError(f"no notebook {name!r} here; there are {', '.join(there)}{close(name, there)}")
        chosen |= dict.fromkeys(matches)
    return list(chosen)
