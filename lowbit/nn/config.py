"""`QuantConfig`: what to quantize, by which methods, and how to treat the first and last layers."""

import dataclasses
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, get, names
from lowbit.settings import settings


@settings
class QuantConfig:
    """How a model is quantized.

    Args:
        weight: settings of a weight method, ``StatsQ(bits=2)``, or the same as a dict, ``{"method": "statsq",
            "bits": 2}``; None leaves weights in full precision.
        activation: settings of the method for the inputs of quantized layers, e.g. ``LSQ(bits=2)``, a dict, or None.
        first_last: treatment of the first and last layers: None keeps them in full precision (as DenseShift does), 8
            gives them 8-bit LSQ weights per channel and 8-bit LSQ inputs (as OFQ does), "same" treats them like the
            rest.
        unsigned: names of layers (or patterns, ``"*.fc2"``) whose inputs get unsigned codes although some values are
            negative, as in OFQ after GELU. The activation method needs a setting ``signed``.
        attention: whether to quantize, by ``activation``, the factors of attention's own two products in timm's vision
            transformers and Swin (see `lowbit.nn.attention`); False quantizes only the inputs of its layers.
        qkr: whether to apply query-key reparameterization to that attention. Without any method, it changes the output
            only by dropping the biases of queries and keys.
        attention_start: "pretrained" keeps the weights of attention; "as_published" reinitializes ``proj``, ``qkv``
            (without ``qkr``) and Swin's relative position table, as the code released with OFQ does.
        z_bias: with ``qkr`` and biases (``LSQ(bias=True)``), the biases of z, the product of input and query-key
            matrix: one for each "channel", shared by the heads, or one for each "head" and channel as in OFQ's code.
        softmax_step: with ``attention`` and steps per token, the steps of the softmax's output: one for each "head" and
            query, or one for each "query", shared by the heads, as in OFQ's code.
        end_bias: with ``first_last=8``, whether the first and last layers' inputs have learned biases before and after
            quantization, as in OFQ's code: one for each place of an image or feature of a linear layer's input.

    Raises:
        LowbitError: an unknown setting, a value out of range, or settings that exclude each other.
    """

    weight: Any = None
    activation: Any = None
    first_last: Literal[8, "same"] | None = None
    unsigned: tuple[str, ...] = ()
    attention: bool = False
    qkr: bool = False
    attention_start: Literal["pretrained", "as_published"] = "pretrained"
    z_bias: Literal["channel", "head"] = "channel"
    softmax_step: Literal["head", "query"] = "head"
    end_bias: bool = False

    @field_validator("weight", "activation", mode="before")
    @classmethod
    def _method(cls, value: Any, info: ValidationInfo) -> Method | None:
        kind: Literal["weight", "activation"] = "weight" if info.field_name == "weight" else "activation"
        if isinstance(value, dict):
            options = dict(value)
            if "method" not in options:
                raise ValueError(f"it needs the key 'method', one of {', '.join(names(kind))}")
            value = get(options.pop("method"))(**options)
        if value is None:
            return None
        if not isinstance(value, Method) or not value.quantizes(kind):
            choices = ", ".join(get(name).__name__ for name in names(kind))
            raise ValueError(f"for {kind}s the settings of one of these are allowed: {choices}")
        return value

    @field_validator("first_last", mode="before")
    @classmethod
    def _first_last(cls, value: Any) -> Any:
        if value not in (None, 8, "same"):
            raise ValueError("None (full precision), 8 (8 bits) and 'same' (like the other layers) are allowed")
        return value

    @field_validator("unsigned", mode="before")
    @classmethod
    def _unsigned(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _agree(self) -> "QuantConfig":
        if self.attention and self.activation is None:
            raise ValueError("attention=True needs an activation method, e.g. activation=LSQ(bits=4)")
        if self.unsigned and not hasattr(self.activation, "signed"):
            raise ValueError("unsigned=... needs an activation method with the setting 'signed', e.g. LSQ")
        if self.attention_start != "pretrained" and not (self.attention or self.qkr):
            raise ValueError("attention_start='as_published' needs attention=True or qkr=True")
        biased = self.attention and self.qkr and getattr(self.activation, "bias", False)
        if self.z_bias != "channel" and not biased:
            raise ValueError(
                "z_bias='head' needs qkr=True, attention=True and an activation with biases, LSQ(bias=True)"
            )
        by_token = self.attention and getattr(self.activation, "granularity", None) == "token"
        if self.softmax_step != "head" and not by_token:
            raise ValueError("softmax_step='query' needs attention=True and an activation LSQ(granularity='token')")
        if self.end_bias and (self.first_last != 8 or self.activation is None):
            raise ValueError("end_bias=True needs first_last=8 and an activation method, e.g. activation=LSQ(bits=4)")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers for a file; ``QuantConfig(**d)`` restores the configuration."""
        plain: dict[str, Any] = {"first_last": self.first_last, "unsigned": list(self.unsigned)}
        plain |= {"attention": self.attention, "qkr": self.qkr, "attention_start": self.attention_start}
        plain |= {"z_bias": self.z_bias, "softmax_step": self.softmax_step, "end_bias": self.end_bias}
        for kind in ("weight", "activation"):
            value = getattr(self, kind)
            plain[kind] = None if value is None else {"method": value.name, **dataclasses.asdict(value)}
        return plain


def check_not_empty(config: QuantConfig) -> None:
    """Refuse a configuration that would change nothing.

    Raises:
        LowbitError: ``config`` has neither a method nor ``qkr``.
    """
    if config.weight is None and config.activation is None and not config.qkr:
        raise LowbitError(
            "QuantConfig: neither weight nor activation is set, so there is nothing to quantize; "
            "set one, e.g. QuantConfig(weight=StatsQ(bits=2))"
        )
