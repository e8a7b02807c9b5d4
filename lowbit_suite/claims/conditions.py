"""Conditions that trainings have to meet before a statement about them is tested, such as an accuracy.

A condition is a number from the recorded rows and a bound on it. It is written down in ``claims.yaml`` before the runs.
It is not met if a table, a row or a column is missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit_suite.claims import measuring

BOUNDS = {
    "at_least": ("at least", lambda found, bound: found >= bound),
    "at_most": ("at most", lambda found, bound: found <= bound),
    "below": ("below", lambda found, bound: found < bound),
}
"""For each kind of bound, its description and its test."""

REDUCE = ("mean", "min", "max")
KEYS = {"says", "table", "rows", "value", "reduce", "minus", *BOUNDS}


@dataclass(frozen=True)
class Check:
    """A condition with the measured number.

    Attributes:
        says: the condition in words, with the number, the bound, and the reason if there is no number.
        met: whether the number satisfies the bound.
    """

    says: str
    met: bool


def parse(claim: str, given: list[Any], named: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The conditions of a list, with names replaced by their definitions.

    Args:
        claim: id of the claim, for error messages.
        given: names, or conditions written out.
        named: the conditions at the top of the file.

    Raises:
        LowbitError: a name is unknown, keys are unknown or missing, or there is not exactly one bound.
    """
    found = []
    for one in given:
        if isinstance(one, str) and one not in named:
            raise LowbitError(f"claim {claim}: no condition is called {one!r}; there are {', '.join(named) or 'none'}")
        item = named[one] if isinstance(one, str) else one
        if set(item) != {"seeds"}:
            wrong = sorted(set(item) - KEYS) + sorted({"says", "rows", "value", "reduce"} - set(item))
            if wrong or item["reduce"] not in REDUCE or len(set(item) & set(BOUNDS)) != 1:
                raise LowbitError(
                    f"claim {claim}: the condition {one!r} is not valid ({', '.join(wrong) or 'reduce or bounds'}); it "
                    f"needs says, rows, value, reduce ({', '.join(REDUCE)}) and one of {', '.join(BOUNDS)}"
                )
        found.append(item)
    return found


def check(item: dict[str, Any], folder: Path, table: str, pairs: int) -> Check:
    """Check one condition against the tables in ``folder``.

    Args:
        item: the condition, from `parse`.
        folder: folder of the tables.
        table: table to use if the condition names none.
        pairs: how many pairs of seeds the statement has.
    """
    if "seeds" in item:
        return Check(f"{pairs} pairs were measured; needed: at least {item['seeds']}", pairs >= item["seeds"])
    (kind,) = set(item) & set(BOUNDS)
    words, keeps = BOUNDS[kind]
    found = _reduced(item, "rows", folder, table)
    if isinstance(found, float) and "minus" in item:
        less = _reduced(item, "minus", folder, table)
        found = found - less if isinstance(less, float) else less
    number, why = (f"{found:.3g}", "") if isinstance(found, float) else ("?", f" ({found})")
    says = f"{item['says'].format(found=number)}; allowed: {words} {item[kind]:g}{why}"
    return Check(says, isinstance(found, float) and bool(keeps(found, item[kind])))


def _reduced(item: dict[str, Any], query: str, folder: Path, table: str) -> float | str:
    """The number, or the reason why there is none."""
    name = item.get("table", table)
    frame = measuring.read(folder, name)
    if frame is None:
        return f"there is no table {name}"
    try:
        column = measuring.column(measuring.rows(frame, item[query], name), item["value"], name)
    except LowbitError as error:
        return str(error)
    if column.empty:
        return f"no row of {name} fits {item[query]}"
    if column.isna().any():
        return f"{column.isna().sum()} of {len(column)} rows of {name} have no number in {item['value']!r}"
    return float(column.astype(float).agg(item["reduce"]))
