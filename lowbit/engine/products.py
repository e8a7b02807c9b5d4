"""Lowering of linear layers and convolutions: packed, with stored codes (depthwise), and in full precision."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.engine.elementwise import rounded
from lowbit.engine.format import Op
from lowbit.engine.format import Tensor as Stored
from lowbit.engine.values import Lowering, Value
from lowbit.engine.windows import ids_of_image, image_of, out_size, pair
from lowbit.errors import LowbitError
from lowbit.kernels.packing import integer_levels, weight_codes
from lowbit.kernels.packing import pack as pack_codes
from lowbit.nn.attention import INPUT
from lowbit.nn.packed import PackedConv2d
from lowbit.quantizers.base import IntegerForm


def packed_layer(lowering: Lowering, layer: Any, x: Value) -> Value:
    """A packed layer that `fuse` left as a module: its input has an offset, or a step for each token."""
    kwargs = {"packed": layer.data, "levels": layer.weight.table, "scale": layer.scale, "sums": layer.sums}
    kwargs |= {"bias": layer.bias, "x_scale": layer.x_scale, "bits": layer.bits, "low": layer.low, "high": layer.high}
    kwargs |= {"x": x, "before": layer.before}
    if isinstance(layer, PackedConv2d):
        window = {name: list(getattr(layer, name)) for name in ("stride", "padding", "dilation")}
        return packed_conv2d(lowering, kernel_size=list(layer.kernel_size), **window, **kwargs)
    return packed_linear(lowering, **kwargs)


def packed_conv2d(lowering: Lowering, **kwargs: Any) -> Value:
    """`torch.ops.lowbit.shift_conv2d`."""
    x = kwargs.pop("x")
    window = (kwargs.pop("kernel_size"), *(kwargs.pop(name) for name in ("stride", "padding", "dilation")))
    for name in ("out_scale", "out_low", "out_high", "add_scale"):
        kwargs.pop(name, None)
    return image_of(lowering, _packed_product(lowering, ids_of_image(x.ids), *window, name="convolution", **kwargs))


def packed_linear(lowering: Lowering, **kwargs: Any) -> Value:
    """`torch.ops.lowbit.shift_linear`."""
    x = kwargs.pop("x")
    for name in ("out_scale", "out_low", "out_high", "add_scale"):
        kwargs.pop(name, None)
    rows = x.ids.reshape(1, -1, x.shape[-1])
    if kwargs["x_scale"] is not None and kwargs["x_scale"].numel() > 1:  # a step for each token
        kwargs["x_scale"] = kwargs["x_scale"].expand(*x.shape[:-1], 1).reshape(-1)
    made = _packed_product(lowering, rows, (1, 1), (1, 1), (0, 0), (1, 1), name="linear", **kwargs)
    return lowering.value(made, (*x.shape[:-1], made.channels))


def _packed_product(
    lowering: Lowering,
    ids: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    name: str,
    packed: Tensor,
    levels: Sequence[int],
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    low: int,
    high: int,
    relu: bool = False,
    add: Any = None,
    before: Tensor | None = None,
) -> Stored:
    channels, outputs = ids.shape[2], len(scale)
    # 8-bit weights have a zero for pads, so the taps of a line of the kernel may follow each other without any.
    tight = bits == 8 and kernel[1] > 1 and channels % 4 != 0 and dilation[1] == 1
    packed = _repack(packed, bits, (outputs, channels, kernel[0], kernel[1]), tight)
    size = out_size(ids.shape, kernel, stride, padding, dilation)
    made = Stored(size[0], size[1], outputs)
    numbers = [bits, *kernel, *stride, *padding, *dilation, int(relu)]
    table = np.zeros(16, np.int16)
    table[: len(levels)] = levels
    data = {0: packed.numpy(), 1: scale.detach().numpy(), 2: sums.numpy(), 4: table}
    if bias is not None:
        data[3] = bias.detach().numpy()
    op = Op("product", [None, None, None], made, n=dict(enumerate(numbers, 2)), data=data, name=name)
    if x_scale is not None and x_scale.numel() == 1:
        op.f[0] = float(x_scale)
    lowering.ask(op, ids, (padding[0], padding[1]), x_scale, low, high, before, tight)
    if add is not None:
        order = add.ids[0].permute(1, 2, 0) if name == "convolution" else add.ids
        summand = lowering.dense(order, (made.height, made.width, outputs))
        if (summand.rows, summand.channels) != (made.rows, outputs):  # a tensor of other rows
            summand = lowering.copy(order.flatten(), (made.height, made.width, outputs))
        op.inputs[1] = summand
    lowering.add(op)
    return made


def _repack(packed: Tensor, bits: int, shape: tuple[int, int, int, int], tight: bool) -> Tensor:
    """Packed bytes for taps of a multiple of 4 channels, or without pads between the taps of a line."""
    outputs, channels, height, width = shape
    if height * width == 1 or (channels % 64 == 0 and not tight):
        return packed
    codes = weight_codes(packed, bits, shape).permute(0, 2, 3, 1)
    if tight:
        codes = codes.reshape(outputs, height, -1)
    codes = F.pad(codes, (0, -codes.shape[-1] % 4)).reshape(outputs, -1)
    return pack_codes(codes.long() % 256 if bits == 8 else codes, bits)


def stored_layer(lowering: Lowering, layer: Any, x: Value) -> Value:
    """A layer that `pack` left with codes: a depthwise convolution on integers, others on floats."""
    quantizer = getattr(layer, INPUT, None)
    form = None if quantizer is None else quantizer.integer()
    if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1:
        whole = form is not None and form.scale.numel() == 1 and form.after is None
        levels, divisor = integer_levels(layer.get_buffer("levels"))
        if form is not None and whole and max(map(abs, levels)) <= 255:
            return _depthwise(lowering, layer, x, form, torch.tensor(levels), divisor)
    return float_layer(lowering, layer, x if quantizer is None else rounded(lowering, quantizer, x))


def _depthwise(
    lowering: Lowering, layer: nn.Conv2d, x: Value, form: IntegerForm, levels: Tensor, divisor: float
) -> Value:
    padding = _padding(layer.padding, layer.kernel_size, layer.dilation)
    ids = ids_of_image(x.ids)
    channels = layer.in_channels
    weights = levels[layer.get_buffer("codes").long()].reshape(channels, -1)
    scale = layer.get_buffer("row_scale").reshape(-1).expand(channels) / divisor
    size = out_size(ids.shape, layer.kernel_size, layer.stride, padding, layer.dilation)
    made = Stored(size[0], size[1], channels)
    numbers = [*layer.kernel_size, *layer.stride, *padding, *layer.dilation, 0]
    data = {0: weights.t().to(torch.int16).numpy(), 1: scale.numpy(), 2: weights.sum(1).to(torch.int32).numpy()}
    if layer.bias is not None:
        data[3] = layer.bias.detach().numpy()
    op = Op("depthwise", [None, None, None], made, n=dict(enumerate(numbers, 3)), data=data, name="convolution")
    op.f[0] = float(form.scale)
    lowering.ask(op, ids, (padding[0], padding[1]), form.scale, form.low, form.high, form.before, tight=False)
    lowering.add(op)
    lowering.exact = False
    return image_of(lowering, made)


def float_layer(lowering: Lowering, layer: Any, x: Value) -> Value:
    """A convolution or linear layer in full precision."""
    if isinstance(layer, nn.Linear):
        return linear(lowering, x, layer.weight, layer.bias)
    if layer.padding_mode != "zeros":
        raise LowbitError(
            f"a convolution in full precision with padding_mode={layer.padding_mode!r} is not an operation of plans"
        )
    return conv2d(lowering, x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def linear(lowering: Lowering, x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    """`F.linear` in full precision."""
    rows = lowering.of(x).ids.reshape(1, -1, x.shape[-1])
    made = _float_product(lowering, rows, weight[:, :, None, None], bias, (1, 1), (0, 0), (1, 1))
    return lowering.value(made, (*x.shape[:-1], made.channels))


def conv2d(
    lowering: Lowering,
    x: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """`F.conv2d` in full precision."""
    window = (pair(stride), _padding(padding, weight.shape[2:], pair(dilation)), pair(dilation))
    return image_of(lowering, _float_product(lowering, ids_of_image(x.ids), weight, bias, *window, groups))


def conv1d(
    lowering: Lowering,
    x: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """A convolution of lines, as one of images with one line."""
    (s,), (d,) = (value if isinstance(value, tuple) else (value,) for value in (stride, dilation))
    pad = padding[0] if isinstance(padding, tuple) else padding
    pads = pad if isinstance(pad, str) else (0, pad)
    image = Value(x.ids[:, :, None])
    made = conv2d(lowering, image, weight[:, :, None], bias, (1, s), pads, (1, d), groups)
    return Value(made.ids[:, :, 0])


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """A convolution's padding as lines and places at each side."""
    if padding != "same":
        return [0, 0] if padding == "valid" else pair(padding)
    around = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(n % 2 for n in around):
        raise LowbitError(f"padding='same' of an even kernel {list(kernel)} is not an operation of plans")
    return [n // 2 for n in around]


def _float_product(
    lowering: Lowering,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Stored:
    weight = weight.detach().float()
    kernel, outputs = weight.shape[2:], len(weight)
    size = out_size(ids.shape, kernel, stride, padding, dilation)
    found = lowering.strided(ids)
    if found is None:
        height, width, channels = ids.shape
        found = (lowering.copy(ids.flatten(), (height, width, channels)), 0, (width * channels, channels, 1))
    source, offset, (step_y, step, step_c) = found
    made = Stored(size[0], size[1], outputs)
    flat = weight.permute(0, 2, 3, 1).reshape(groups, outputs // groups, -1)
    panels = F.pad(flat, (0, 0, 0, -flat.shape[1] % 16)).reshape(-1, 16, flat.shape[2]).transpose(1, 2)
    n = {0: offset, 1: step, 2: step_y, **dict(enumerate([*kernel, *stride, *padding, *dilation, 0], 3))}
    n |= {12: ids.shape[0], 13: ids.shape[1], 14: ids.shape[2], 15: step_c}
    data = {0: panels.contiguous().numpy()}
    if bias is not None:
        data[1] = bias.detach().float().numpy()
    kind, f = ("conv", {}) if groups == 1 else ("grouped conv", {0: float(groups)})
    lowering.add(Op(kind, [source], made, n=n, f=f, data=data))
    lowering.exact = False
    return made
