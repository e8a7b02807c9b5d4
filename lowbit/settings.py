"""Settings as frozen, validated dataclasses whose errors say what was given and what is allowed."""

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from lowbit.errors import LowbitError

T = TypeVar("T")


def explain(owner: str, allowed: Sequence[str], error: ValidationError) -> str:
    """One readable line for each value that pydantic refused in the settings called ``owner``."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "(all)"
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            close = difflib.get_close_matches(str(item["loc"][-1]), allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            lines.append(f"{owner} has no setting {field!r}; it has {', '.join(allowed)}{hint}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"{owner} needs the setting {field!r}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = f"{field}={item['input']!r} is not allowed: " if item["loc"] else ""
            lines.append(f"{owner}: {given}{message}")
    return "\n".join(lines)


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Class decorator that makes a frozen, strictly typed dataclass; a wrong or unknown value raises `LowbitError`."""
    decorated = pydantic_dataclass(
        frozen=True, config=ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    )(cls)
    validate = decorated.__init__

    @functools.wraps(validate, assigned=(), updated=())  # the signature, nothing else
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            names = [field.name for field in dataclasses.fields(decorated)]
            raise LowbitError(explain(decorated.__name__, names, error)) from None

    decorated.__init__ = __init__  # type: ignore[method-assign]  # pydantic's errors become LowbitErrors
    return cast("type[T]", decorated)  # pydantic hands the class itself back, and types it as one of its own
