"""The same work done by other libraries, where they are installed (``pip install 'lowbit[bench]'``)."""

import copy
import importlib.util
from collections.abc import Iterator

from torch import nn

from lowbit.nn import first_and_last


def training(model: nn.Module, bits: int) -> Iterator[tuple[str, nn.Module]]:
    """Copies of ``model`` prepared for quantization-aware training by brevitas and torchao, whichever is installed.

    First and last layers stay in full precision, as in our own arms.
    """
    if importlib.util.find_spec("brevitas"):
        yield f"brevitas W{bits}A{bits}", _brevitas(copy.deepcopy(model), bits)
    if importlib.util.find_spec("torchao"):
        made = _torchao(copy.deepcopy(model), bits)
        if any("FakeQuantize" in type(module).__name__ for module in made.modules()):  # it does not do convolutions
            yield f"torchao QAT W{bits}A8, linear layers only", made


def _brevitas(model: nn.Module, bits: int) -> nn.Module:
    """Per-channel weights and per-tensor activations with learned scales, by brevitas's drop-in layers."""
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    options = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": bits,
        "input_quant": Int8ActPerTensorFloat,
        "input_bit_width": bits,
    }
    ends = first_and_last(model)
    for name, layer in list(model.named_modules()):
        if name in ends or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        if isinstance(layer, nn.Linear):
            made = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, **options)
        else:
            made = QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                groups=layer.groups,
                bias=layer.bias is not None,
                **options,
            )
        model.set_submodule(name, made)
    return model


def _torchao(model: nn.Module, bits: int) -> nn.Module:
    """torchao's fake-quantized linear layers: int4-range weights by channel, int8 activations by token."""
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weight = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), "per_channel", is_symmetric=True)
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    ends = first_and_last(model)
    quantize_(
        model,
        QATConfig(weight_config=weight, activation_config=activation, step="prepare"),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name not in ends,
    )
    return model
