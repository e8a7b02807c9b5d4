"""``lowbit.record``: the only way a number leaves a notebook."""

import json
import math
import numbers
import re
from typing import NoReturn, TypeVar

from lowbit.errors import LowbitError
from lowbit_suite.records.context import current

T = TypeVar("T")

DIRECTIONS = ("higher", "lower", "equal")
"""Directions of a number: ``higher`` or ``lower`` is better, or it has to stay ``equal``."""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:[./-][A-Za-z0-9_]+)*")


def record(name: str, value: T, *, unit: str = "", better: str = "equal") -> T:
    """Record one number for the suite, print it in the notebook and return it unchanged.

    Args:
        name: Letters, digits and ``_``, parts joined by ``.``, ``/`` or ``-``, such as ``"lsq_w2/accuracy"``.
        value: One number: Python's, numpy's, or a tensor or array of one element. NaN and infinities are
            kept, so that ``lowbit check`` fails on them.
        unit: Unit of the value, such as ``"%"`` or ``"s"``.
        better: ``"higher"``, ``"lower"`` or ``"equal"``: the change that is an improvement, if any.

    Under ``lowbit run`` the number is appended to the execution's records, and recording a name
    twice in one notebook makes that notebook fail. In an interactive session nothing is written.

    Raises:
        LowbitError: The name, value, unit or direction is not allowed.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 100:
        raise LowbitError(
            f"record: {name!r} is not a valid name: start with a letter, use letters, digits and _, "
            "join parts by '.', '/' or '-' (at most 100 characters)"
        )
    if better not in DIRECTIONS:
        raise LowbitError(f"record: better={better!r} is not allowed; give one of {', '.join(map(repr, DIRECTIONS))}")
    if not isinstance(unit, str):
        raise LowbitError(f"record: unit={unit!r} is not a string; give one such as '%'")
    number = _number(name, value)
    _append({"name": name, "value": encode(number), "unit": unit, "better": better})
    print(f"{name} = {show(number)}{' ' if unit else ''}{unit}")
    return value


class Skipped(Exception):
    """Raised by `skip`."""


def skip(reason: str) -> NoReturn:
    """End the notebook because something that it needs is missing, such as a data set or a program.

    ``lowbit run`` then reports it as ``skipped`` if ``may_skip`` in ``notebooks/profiles.yaml`` lists it, and as
    ``failed`` if not.

    Args:
        reason: The missing thing, in words.
    """
    raise Skipped(reason)


def complain(what: str) -> None:
    """Make the notebook fail for this reason although its cells continue; does nothing outside ``lowbit run``."""
    _append({"complaint": what})


def _append(item: dict) -> None:
    if path := current().records:
        with path.open("a", encoding="utf-8", buffering=1) as file:  # on disk even if the kernel dies next
            file.write(json.dumps(item) + "\n")


def encode(number: float | int) -> float | int | str:
    """The number in a form that strict JSON allows: NaN and infinities become ``"nan"``, ``"inf"`` and ``"-inf"``."""
    return number if math.isfinite(number) else str(number)


def decode(value: float | int | str) -> float | int:
    """The inverse of `encode`."""
    return float(value) if isinstance(value, str) else value


def show(number: float | int) -> str:
    """Format a number: integers in full, others with four significant digits."""
    return str(number) if isinstance(number, int) else f"{number:.4g}"


def _number(name: str, value: object) -> float | int:
    """The plain Python number in ``value``; a boolean counts as 0 or 1."""
    plain = value
    if not isinstance(value, numbers.Number) and callable(getattr(value, "item", None)):
        try:
            plain = value.item()  # numpy scalars, and tensors or arrays of one element
        except (ValueError, RuntimeError, TypeError):
            shape = tuple(getattr(value, "shape", ()))
            raise LowbitError(f"record: {name!r} needs one number, not an array of shape {shape}") from None
    if isinstance(plain, bool):
        return int(plain)
    if isinstance(plain, numbers.Integral):
        return int(plain)
    if isinstance(plain, numbers.Real):
        return float(plain)
    raise LowbitError(f"record: {name!r} needs one number, not {type(value).__name__} {value!r}")
