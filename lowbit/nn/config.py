"""`QuantConfig`: what to quantise, how, and what to do with the first and last layers."""

import dataclasses
from typing import Any, Literal

from pydantic import field_validator

from lowbit.errors import LowbitError
from lowbit.quantizers import Method, get, names
from lowbit.settings import settings


@settings
class QuantConfig:
    """How a model is quantised; raises `LowbitError` on anything unknown or out of range.

    Args:
        weight: a weight method's settings, ``StatsQ(bits=2)``, or the same as a dict, ``{"method": "statsq",
            "bits": 2}``; None leaves weights in full precision.
        activation: the same for the inputs of the quantised layers, e.g. ``LSQ(bits=2)``.
        first_last: the first and the last layers: None keeps them in full precision (as DenseShift does), 8 gives
            them 8-bit LSQ weights per channel and 8-bit LSQ inputs (as OFQ does), "same" treats them like the rest.
        qkr: query-key reparameterisation of attention. Not available yet: only False is allowed.
    """

    weight: Any = None
    activation: Any = None
    first_last: Literal[8, "same"] | None = None
    qkr: bool = False

    @field_validator("weight", "activation", mode="before")
    @classmethod
    def _method(cls, value: Any, info: Any) -> Method | None:
        if isinstance(value, dict):
            options = dict(value)
            if "method" not in options:
                raise ValueError(f"it needs the key 'method', one of {', '.join(names(info.field_name))}")
            value = get(options.pop("method"))(**options)
        if value is None:
            return None
        if not isinstance(value, Method) or not value.quantizes(info.field_name):
            choices = ", ".join(get(name).__name__ for name in names(info.field_name))
            raise ValueError(f"for {info.field_name}s the settings of one of these are allowed: {choices}")
        return value

    @field_validator("first_last", mode="before")
    @classmethod
    def _first_last(cls, value: Any) -> Any:
        if value not in (None, 8, "same"):
            raise ValueError("None (full precision), 8 (8 bits) and 'same' (like the other layers) are allowed")
        return value

    @field_validator("qkr")
    @classmethod
    def _qkr(cls, value: bool) -> bool:
        if value:
            raise ValueError("query-key reparameterisation is not available yet; only False is allowed")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers, for files; ``QuantConfig(**d)`` gives the configuration back."""
        made: dict[str, Any] = {"first_last": self.first_last, "qkr": self.qkr}
        for kind in ("weight", "activation"):
            value = getattr(self, kind)
            made[kind] = None if value is None else {"method": value.name, **dataclasses.asdict(value)}
        return made


def check_not_empty(config: QuantConfig) -> None:
    """Refuses a configuration that would change nothing."""
    if config.weight is None and config.activation is None:
        raise LowbitError(
            "QuantConfig: neither weight nor activation is set, so there is nothing to quantise; "
            "give one, e.g. QuantConfig(weight=StatsQ(bits=2))"
        )
