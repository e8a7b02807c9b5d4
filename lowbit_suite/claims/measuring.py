"""Measures the effect of one statement of a claim from the rows of a saved table."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit.metrics.statistics import Effect, interval, paired_difference

if TYPE_CHECKING:
    import pandas

LEAST_BUDGETS = 3
"""Smallest number of training lengths that a trend needs."""

COUNTED = {"repeat": "rounds", "speaker": "speakers"}
"""Names of the pairs that are not seeds."""


@dataclass(frozen=True)
class Measured:
    """The measurement of one statement.

    Attributes:
        effect: the mean difference with its interval, or None.
        holds: whether all checks hold, for statements that have checks instead of an effect.
        table: path of the rows, relative to the project; None if there is no such file.
        missing: why nothing is measured; empty otherwise.
        note: the pairs that were left out, or how many checks hold.
        pairs: the difference of each pair, whose mean is the effect; empty for slopes.
    """

    effect: Effect | None = None
    holds: bool | None = None
    table: str | None = None
    missing: str = ""
    note: str = ""
    pairs: tuple[float, ...] = ()


def measure(item: dict[str, Any], folder: Path, growing: bool = False) -> Measured:
    """Measure one statement with the table in ``folder`` that it names.

    Args:
        item: the statement as `lowbit_suite.claims.load` returns it.
        folder: folder of the tables, or of a run, which has one folder of tables for each notebook.
        growing: whether the table is still being filled: then seeds without their pair are left out, and a missing
            column means that nothing is measured yet.

    Raises:
        LowbitError: a table that is not growing lacks a column or has seeds without their pair, or a query cannot be
            parsed.
    """
    frame = read(folder, item["table"])
    if frame is None:
        return Measured(missing=f"there is no table {item['table']}")
    shown = show_path(find(folder, f"{item['table']}.csv"))
    try:
        return _measure(item, frame, shown, growing)
    except LowbitError as error:
        if not growing:
            raise
        return Measured(table=shown, missing=str(error))


def _measure(item: dict[str, Any], frame: "pandas.DataFrame", shown: str, growing: bool) -> Measured:
    name = item["table"]
    if "all" in item:
        checks = column(rows(frame, item["a"], name) if "a" in item else frame, item["all"], name).astype(bool)
        return Measured(
            holds=bool(len(checks) and checks.all()), table=shown, note=f"{checks.sum()} of {len(checks)} checks hold"
        )
    pair = _pair(frame, item)
    sides = [_values(frame, item["a"], item["value"], pair, item)]
    if "b" in item or "b_value" in item:
        sides.append(_values(frame, item.get("b", item["a"]), item.get("b_value", item["value"]), pair, item))
    for query, side in zip((item["a"], item.get("b", item["a"])), sides, strict=False):
        if side.empty or (growing and side.isna().any()):
            what = "no row" if side.empty else f"a row without a number in {item['value']!r}"
            return Measured(table=shown, missing=f"{what} of {name} fits {_selected(query, item)}")
    counted = COUNTED.get(pair, "seeds")
    if len(sides) == 1:
        effect, left = Effect(*interval(sides[0].tolist()), n=len(sides[0]), unit=item["unit"], of=counted), set()
    elif "slope" in item:
        effect, left = _trend(*sides, item["unit"], counted)
    elif growing:
        effect, left = _common(*sides, item["unit"], counted)
    else:
        effect, left = paired_difference(*sides, unit=item["unit"], of=counted), set()
    if effect is None:
        budgets = f" at {LEAST_BUDGETS} budgets" if "slope" in item else ""
        return Measured(table=shown, missing=f"none of the {counted} in {name} has both arms{budgets}")
    pairs = () if "slope" in item else (sides[0] if len(sides) == 1 else (sides[0] - sides[1]).dropna())
    note = f"left out because their pair is missing: {counted} {', '.join(map(str, sorted(left)))}" if left else ""
    return Measured(effect, table=shown, note=note, pairs=tuple(map(float, pairs)))


def _trend(a: "pandas.Series", b: "pandas.Series", unit: str, counted: str) -> tuple[Effect | None, set]:
    """The mean slope over seeds, from the budgets that both arms have; and the seeds with too few budgets."""
    differences = (a - b).dropna()
    slopes = {seed: slope(group.droplevel(0)) for seed, group in differences.groupby(level=0)}
    slopes = {seed: value for seed, value in slopes.items() if value is not None}
    left = {seed for side in (a, b) for seed, _ in side.index} - {*slopes}
    if not slopes:
        return None, left
    return Effect(*interval(list(slopes.values())), n=len(slopes), unit=unit, of=counted), left


def _common(a: "pandas.Series", b: "pandas.Series", unit: str, counted: str) -> tuple[Effect | None, set]:
    """The paired difference over the seeds that both arms have; and the remaining seeds."""
    both = a.index.intersection(b.index)
    left = {*a.index, *b.index} - {*both}
    return (None if both.empty else paired_difference(a[both], b[both], unit=unit, of=counted)), left


def slope(differences: "pandas.Series") -> float | None:
    """The least-squares slope over log2 of the index, the budgets in steps; None for fewer than `LEAST_BUDGETS`."""
    import numpy as np

    if len(differences) < LEAST_BUDGETS:
        return None
    return float(np.polyfit(np.log2(differences.index.to_numpy(dtype=float)), differences.to_numpy(), 1)[0])


def read(folder: Path, table: str) -> "pandas.DataFrame | None":
    """The rows of a table; None if there is no such file."""
    import pandas

    path = find(folder, f"{table}.csv")
    return pandas.read_csv(path) if path.is_file() else None


def rows(frame: "pandas.DataFrame", query: str, table: str) -> "pandas.DataFrame":
    """The rows that match ``query``; ``table`` is its name, for error messages."""
    try:
        return frame.query(query)
    except Exception as error:  # pandas raises many kinds
        raise LowbitError(f"{table}: the query {query!r} fails: {error}") from None


def column(frame: "pandas.DataFrame", name: str, table: str) -> "pandas.Series":
    """A column of a table; if it is missing, the error lists the existing ones."""
    if name not in frame.columns:
        raise LowbitError(f"{table} has no column {name!r}; it has {', '.join(frame.columns)}")
    return frame[name]


def find(folder: Path, name: str) -> Path:
    """A file in ``folder``, or in the notebooks' folders inside it."""
    return next(iter([*folder.glob(name), *folder.glob(f"*/{name}")]), folder / name)


def card(folder: Path, table: str) -> dict[str, Any] | None:
    """The run card beside a table; None if there is none."""
    path = find(folder, f"{table}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def show_path(path: Path) -> str:
    """A path relative to the project, or the name alone for a file elsewhere."""
    return str(path.relative_to(paths.project())) if path.is_relative_to(paths.project()) else path.name


def _selected(query: str, item: dict[str, Any]) -> str:
    return f"({query}) and ({item['at']})" if "at" in item else query


def _values(frame: "pandas.DataFrame", query: str, value: str | list[str], pair: str, item: dict[str, Any]):
    """One number per seed (with ``slope``: per seed and budget): the mean over its rows and the given columns."""
    name = item["table"]
    chosen = rows(frame, _selected(query, item), name)
    columns = [column(chosen, each, name) for each in ([value] if isinstance(value, str) else value)]
    mean = sum(columns) / len(columns) * item.get("times", 1)
    if item.get("log"):  # ratios, such as those of times, multiply
        mean = mean.map(math.log)
    by = [column(chosen, each, name) for each in (pair, *([item["slope"]] if "slope" in item else []))]
    return mean.groupby(by if len(by) > 1 else by[0]).mean()


def _pair(frame: "pandas.DataFrame", item: dict[str, Any]) -> str:
    """The column whose values define the pairs: the first named column that has more than one value."""
    named = item.get("pair", "seed")
    columns = [named] if isinstance(named, str) else named
    return next((name for name in columns if column(frame, name, item["table"]).nunique() > 1), columns[-1])
