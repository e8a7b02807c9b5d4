"""Quantized layers: `quantize_` puts quantizers into a model, the rest finds, calibrates and compiles them."""

from lowbit.nn.config import QuantConfig
from lowbit.nn.convert import (
    QuantizedLayer,
    calibrate,
    compile_quantizers,
    first_and_last,
    quantize_,
    quantized_layers,
)

__all__ = [
    "QuantConfig",
    "QuantizedLayer",
    "calibrate",
    "compile_quantizers",
    "first_and_last",
    "quantize_",
    "quantized_layers",
]
