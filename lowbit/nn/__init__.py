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
from lowbit.nn.huggingface import Logits, conv1d_to_linear_, family_filter

__all__ = [
    "Logits",
    "QuantConfig",
    "QuantizedLayer",
    "calibrate",
    "compile_quantizers",
    "conv1d_to_linear_",
    "family_filter",
    "first_and_last",
    "quantize_",
    "quantized_layers",
]
