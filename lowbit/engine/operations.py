"""Which functions and modules of PyTorch are operations of a plan, and what lowers each."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lowbit.engine import attention, elementwise, products, reductions, windows
from lowbit.engine.format import Op
from lowbit.engine.format import Tensor as Stored
from lowbit.engine.values import SHIFT, Lowering, Value
from lowbit.errors import LowbitError
from lowbit.nn.calls import computes_as
from lowbit.nn.deploy import HOOKS
from lowbit.nn.fuse import as_floats, plain_attention
from lowbit.nn.packed import PackedConv2d, PackedLinear, is_stored
from lowbit.quantizers.base import ActivationQuantizer


def _log_mel(lowering: Lowering, front: Any, x: Value) -> Value:
    """`lowbit.models.speech.LogMel`."""
    samples = x.ids.numel()
    source = lowering.stored[int(x.ids.flatten()[0]) >> SHIFT]
    if x.ndim != 2 or not isinstance(source, Stored) or not torch.equal(x.ids, lowering.value(source, x.shape).ids):
        raise LowbitError("log-mel features of anything but the whole input are not an operation of plans")
    made = Stored(front.bands.shape[1], 1 + samples // front.hop, 1)
    angles = 2 * np.pi * np.arange(front.n_fft) / front.n_fft
    data = {0: front.window.numpy(), 1: front.bands.numpy(), 2: np.cos(angles).astype(np.float32)}
    lowering.add(Op("mel", [source], made, n={2: front.n_fft, 3: front.hop}, f={0: front.top_db}, data=data))
    lowering.exact = False
    return Value(lowering.value(made, (1, made.height, made.width)).ids[None])


def _getattr(lowering: Lowering, x: Value, name: str) -> Any:
    return getattr(x, name)


def _batch_norm_module(lowering: Lowering, module: Any, x: Value) -> Value | None:
    if module.running_var is None:
        return None
    return elementwise.batch_norm(
        lowering, x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
    )


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.lowbit.shift_conv2d.default: products.packed_conv2d,
    torch.ops.lowbit.shift_linear.default: products.packed_linear,
    as_floats: lambda lowering, x: x,
    "float": lambda lowering, x: x,
    **dict.fromkeys(("to", "type_as"), lambda lowering, x, *args, **kwargs: x),
    getattr: _getattr,
    F.gelu: elementwise.gelu,
    F.layer_norm: reductions.layer_norm,
    F.scaled_dot_product_attention: attention.attention,
    plain_attention: attention.attention,
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), elementwise.multiply),
    **dict.fromkeys((operator.truediv, torch.div, "div", "div_"), elementwise.divide),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), elementwise.subtract),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), lambda lowering, x: elementwise.multiply(lowering, x, -1.0)),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), elementwise.sigmoid),
    F.silu: elementwise.silu,
    F.hardsigmoid: elementwise.hardsigmoid,
    F.hardswish: elementwise.hardswish,
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), attention.matmul),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), reductions.softmax),
    F.max_pool2d: windows.max_pool2d,
    torch.max_pool2d: windows.max_pool2d,
    F.avg_pool2d: windows.avg_pool2d,
    F.adaptive_avg_pool2d: windows.adaptive_avg_pool2d,
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), elementwise.add),
    **dict.fromkeys((torch.addcmul, "addcmul"), elementwise.addcmul),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), elementwise.relu),
    F.batch_norm: elementwise.batch_norm,
    F.linear: products.linear,
    F.conv2d: products.conv2d,
    F.conv1d: products.conv1d,
    F.pad: windows.pad,
    F.hardtanh: elementwise.hardtanh,
    F.relu6: lambda lowering, x, inplace=False: elementwise.hardtanh(lowering, x, 0.0, 6.0),
    **dict.fromkeys((torch.mean, "mean"), reductions.mean),
    **dict.fromkeys((torch.sum, "sum"), reductions.sum_over),
    **dict.fromkeys((torch.amax, "amax"), reductions.amax),
    F.group_norm: reductions.group_norm,
    F.leaky_relu: elementwise.leaky_relu,
    F.normalize: reductions.normalize,
    **dict.fromkeys((torch.norm, "norm"), reductions.norm),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), elementwise.tanh),
    F.interpolate: windows.interpolate,
    # torchvision's, in inference
    "stochastic_depth": lambda lowering, x, p, mode, training=True: x,
    **dict.fromkeys((F.dropout, F.dropout2d), lambda lowering, x, *args, **kwargs: x),
    # timm's functions around the mask of its attention, which is not there in inference
    "resolve_self_attn_mask": lambda lowering, tokens, attention, mask=None, causal=False: mask,
    "maybe_add_mask": lambda lowering, x, mask=None: x if mask is None else elementwise.add(lowering, x, mask),
    "size": lambda lowering, x, dim=None: x.shape if dim is None else x.shape[dim],
    "dim": lambda lowering, x: x.ndim,
    "numel": lambda lowering, x: x.ids.numel(),
    len: lambda lowering, x: len(x.ids),
}
"""How functions, and methods by their names, are lowered; rearrangements are `_VIEWS` of `lower`."""


def lower_known(lowering: Lowering, module: nn.Module, x: Value) -> Value | None:
    """A call of a module that plans know; None for others."""
    if isinstance(module, PackedLinear | PackedConv2d):
        return products.packed_layer(lowering, module, x)
    if isinstance(module, ActivationQuantizer):
        return elementwise.rounded(lowering, module, x)
    if any(is_stored(module) and computes_as(module, kind, HOOKS) for kind in (nn.Linear, nn.Conv2d)):
        return products.stored_layer(lowering, module, x)
    plain = next((kind for kind in MODULES if computes_as(module, kind)), None)
    if plain is not None:
        return MODULES[plain](lowering, module, x)
    if type(module).__name__ == "LogMel" and type(module).__module__ == "lowbit.models.speech":
        return _log_mel(lowering, module, x)
    return None


MODULES: dict[type[nn.Module], Callable[[Lowering, Any, Value], Value | None]] = {
    **dict.fromkeys((nn.Linear, nn.Conv2d), products.float_layer),
    **dict.fromkeys((nn.Identity, nn.Dropout), lambda lowering, module, x: x),
    **dict.fromkeys((nn.BatchNorm2d, nn.BatchNorm1d), _batch_norm_module),
    nn.LayerNorm: lambda lowering, module, x: reductions.layer_norm(
        lowering, x, module.normalized_shape, module.weight, module.bias, module.eps
    ),
    nn.GroupNorm: lambda lowering, module, x: reductions.group_norm(
        lowering, x, module.num_groups, module.weight, module.bias, module.eps
    ),
    nn.LeakyReLU: lambda lowering, module, x: elementwise.leaky_relu(lowering, x, module.negative_slope),
    nn.GELU: lambda lowering, module, x: elementwise.gelu(lowering, x, module.approximate),
    nn.ReLU: lambda lowering, module, x: elementwise.relu(lowering, x),
    nn.Sigmoid: lambda lowering, module, x: elementwise.sigmoid(lowering, x),
    nn.Tanh: lambda lowering, module, x: elementwise.tanh(lowering, x),
    nn.SiLU: lambda lowering, module, x: elementwise.silu(lowering, x),
    nn.Hardsigmoid: lambda lowering, module, x: elementwise.hardsigmoid(lowering, x),
    nn.Hardswish: lambda lowering, module, x: elementwise.hardswish(lowering, x),
    nn.MaxPool2d: lambda lowering, module, x: windows.max_pool2d(
        lowering, x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode,
        module.return_indices,
    ),
    nn.AvgPool2d: lambda lowering, module, x: windows.avg_pool2d(
        lowering, x, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
        module.divisor_override,
    ),
    nn.AdaptiveAvgPool2d: lambda lowering, module, x: windows.adaptive_avg_pool2d(lowering, x, module.output_size),
    nn.Flatten: lambda lowering, module, x: Value(x.ids.flatten(module.start_dim, module.end_dim)),
}  # fmt: skip
"""How modules are lowered that compute exactly as these classes of torch do. Subclasses with a forward of their own
(timm's LayerNorm2d, BatchNormAct2d, MaxPool2dSame, ...) are traced instead."""
