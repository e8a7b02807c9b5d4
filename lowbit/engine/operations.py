"""How the functions and modules of PyTorch become operations of a plan."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.engine.attention import integer_attention
from lowbit.engine.format import CURVES, EACH, NUMBER, ROW, Op
from lowbit.engine.format import Tensor as Stored
from lowbit.engine.values import SHIFT, Lowering, Origin, Value
from lowbit.errors import LowbitError
from lowbit.kernels.packing import integer_levels, weight_codes
from lowbit.kernels.packing import pack as pack_codes
from lowbit.nn.attention import INPUT
from lowbit.nn.calls import computes_as
from lowbit.nn.deploy import HOOKS
from lowbit.nn.fuse import as_floats, plain_attention
from lowbit.nn.packed import PackedConv2d, PackedLinear, is_stored
from lowbit.quantizers.base import ActivationQuantizer, IntegerForm


def _out_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of what a window moves over."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]


def _image(ids: Tensor) -> Tensor:
    """Ids ``[height, width, channels]`` of an image ``[1, channels, height, width]``."""
    if ids.ndim != 4 or len(ids) != 1:
        raise LowbitError(f"a tensor {list(ids.shape)} where plans take one image [1, channels, height, width]")
    return ids[0].permute(1, 2, 0)


def _back(lowering: Lowering, stored: Stored) -> Value:
    """The image ``[1, channels, height, width]`` of a stored tensor."""
    size = (stored.height, stored.width, stored.channels)
    return Value(lowering.value(stored, size).ids.permute(2, 0, 1)[None])


def _product(
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
    size = _out_size(ids.shape, kernel, stride, padding, dilation)
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


def _conv2d(lowering: Lowering, **kwargs: Any) -> Value:
    x = kwargs.pop("x")
    window = (kwargs.pop("kernel_size"), *(kwargs.pop(name) for name in ("stride", "padding", "dilation")))
    for name in ("out_scale", "out_low", "out_high", "add_scale"):
        kwargs.pop(name, None)
    return _back(lowering, _product(lowering, _image(x.ids), *window, name="convolution", **kwargs))


def _linear(lowering: Lowering, **kwargs: Any) -> Value:
    x = kwargs.pop("x")
    for name in ("out_scale", "out_low", "out_high", "add_scale"):
        kwargs.pop(name, None)
    rows = x.ids.reshape(1, -1, x.shape[-1])
    if kwargs["x_scale"] is not None and kwargs["x_scale"].numel() > 1:  # a step for each token
        kwargs["x_scale"] = kwargs["x_scale"].expand(*x.shape[:-1], 1).reshape(-1)
    made = _product(lowering, rows, (1, 1), (1, 1), (0, 0), (1, 1), name="linear", **kwargs)
    return lowering.value(made, (*x.shape[:-1], made.channels))


def _packed_layer(lowering: Lowering, layer: Any, x: Value) -> Value:
    """A packed layer that `fuse` left as a module: its input has an offset, or a step for each token."""
    kwargs = {"packed": layer.data, "levels": layer.weight.table, "scale": layer.scale, "sums": layer.sums}
    kwargs |= {"bias": layer.bias, "x_scale": layer.x_scale, "bits": layer.bits, "low": layer.low, "high": layer.high}
    kwargs |= {"x": x, "before": layer.before}
    if isinstance(layer, PackedConv2d):
        window = {name: list(getattr(layer, name)) for name in ("stride", "padding", "dilation")}
        return _conv2d(lowering, kernel_size=list(layer.kernel_size), **window, **kwargs)
    return _linear(lowering, **kwargs)


def _rows(lowering: Lowering, kind: str, x: Value, **more: Any) -> Value:
    """An operation from rows to rows of the last dim."""
    ids = x.ids.reshape(-1, x.shape[-1])
    source, offset, step = lowering.rows_of(ids)
    made = Stored(1, len(ids), ids.shape[1])
    n = {0: offset, 1: step} | more.pop("n", {})
    lowering.add(Op(kind, [source], made, n=n, **more), Origin(kind, (x.ids,)))
    lowering.exact = False
    return lowering.value(made, x.shape)


def _curve(lowering: Lowering, x: Value, which: str) -> Value:
    """A function of each number, one of `CURVES`."""
    order = _memory_order(x.ids)
    rows = x.ids.permute(order).reshape(-1, x.shape[order[-1]])
    source, offset, step = lowering.rows_of(rows)
    made = Stored(1, len(rows), rows.shape[1])
    number = CURVES.index(which)
    lowering.add(Op("curve" if number else "gelu", [source], made, n={0: offset, 1: step, 2: number}))
    lowering.exact &= which.startswith("hard")
    return _ordered(lowering, made, x.ids, order)


def _gelu(lowering: Lowering, x: Value, approximate: str = "none") -> Value:
    return _curve(lowering, x, "gelu" if approximate == "none" else "gelu tanh")


def _sigmoid(lowering: Lowering, x: Value) -> Value:
    return _curve(lowering, x, "sigmoid")


def _silu(lowering: Lowering, x: Value, inplace: bool = False) -> Value:
    return _curve(lowering, x, "silu")


def _hardsigmoid(lowering: Lowering, x: Value, inplace: bool = False) -> Value:
    return _curve(lowering, x, "hardsigmoid")


def _hardswish(lowering: Lowering, x: Value, inplace: bool = False) -> Value:
    return _curve(lowering, x, "hardswish")


def _batch_norm(
    lowering: Lowering,
    x: Value,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    if training:
        raise LowbitError("a BatchNorm that computes statistics of its input is not an operation of plans")
    inverse = 1 / torch.sqrt(var + eps)
    gain = inverse if weight is None else weight * inverse
    shift = -mean * gain + (0 if bias is None else bias)
    lowering.exact = False
    return _affine(lowering, x, gain.detach().float().numpy(), shift.detach().float().numpy(), dim=1)


def _layer_norm(
    lowering: Lowering,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    if len(normalized_shape) != 1:
        raise LowbitError(f"LayerNorm over {len(normalized_shape)} dims is not an operation of plans")
    data = {i: t.detach().float().numpy() for i, t in enumerate((weight, bias)) if t is not None}
    return _rows(lowering, "norm", x, f={0: eps}, data=data)


def _add(lowering: Lowering, a: Any, b: Any, relu: bool = False, alpha: float = 1) -> Any:
    return _pair_op(lowering, "add", a, b if alpha == 1 else _scaled(lowering, lowering.of(b), alpha), relu)


def _subtract(lowering: Lowering, a: Any, b: Any) -> Any:
    return _add(lowering, a, _scaled(lowering, b, -1.0) if isinstance(b, Value) else -b)


def _pair_op(lowering: Lowering, kind: str, a: Any, b: Any, relu: bool = False) -> Value:
    """The sum or product of two: "add" or "times". The second one may repeat along the first or the last dims."""
    a, b = lowering.of(a), lowering.of(b)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    if lowering.constant(a.ids) is not None or (a.shape != shape and lowering.constant(b.ids) is None):
        a, b = b, a
    ids = a.ids.expand(shape)
    order = _memory_order(ids)
    how, places, elements = _repeats(b.ids.expand(shape).permute(order))
    made = Stored(1, places, ids.numel() // places)
    op = Op(kind, [lowering.dense(ids.permute(order).flatten(), (1, places, made.channels))], made)
    op.n = {2: how, 11: int(relu)}
    constant = lowering.constant(elements)
    if constant is not None:
        op.data[0] = constant
    else:
        op.inputs.append(lowering.dense(elements, (1, 1, elements.numel())))
    lowering.add(op)
    value = _ordered(lowering, made, ids, order)
    # Rows as the second operand repeats, not those of the last dim.
    made.width, made.channels = places, ids.numel() // places
    return value


def _repeats(ids: Tensor) -> tuple[int, int, Tensor]:
    """How elements ``[places, channels]`` repeat, with as many leading (`ROW`) or trailing (`NUMBER`) dims as possible.

    Returns:
        `EACH`, `ROW` or `NUMBER`; the number of places; and the elements that are needed, flat.
    """
    for dims in range(ids.ndim - 1, 0, -1):
        rows = ids.reshape(math.prod(ids.shape[:dims]), -1)
        if len(rows) > 1 and torch.equal(rows, rows[:1].expand_as(rows)):
            return ROW, len(rows), rows[0]
    for dims in range(1, ids.ndim):
        rows = ids.reshape(math.prod(ids.shape[:dims]), -1)
        if rows.shape[1] > 1 and torch.equal(rows, rows[:, :1].expand_as(rows)):
            return NUMBER, len(rows), rows[:, 0]
    return EACH, ids.numel() // ids.shape[-1] if ids.ndim else 1, ids.flatten()


def _addcmul(lowering: Lowering, x: Any, a: Any, b: Any, value: float = 1) -> Value:
    lowering.exact = False  # PyTorch may multiply in another order
    return _add(lowering, x, _scaled(lowering, a, b), alpha=value)


def _memory_order(ids: Tensor) -> list[int]:
    """The dims from the slowest to the fastest in memory, by the elements' numbers."""
    steps = []
    for dim, size in enumerate(ids.shape):  # at the end, since a class token is put before the others
        step = ids.select(dim, -1) - ids.select(dim, -2) if size > 1 else None
        steps.append((-(1 << 62) if step is None else -abs(int(step.flatten()[-1])), dim))
    return [dim for _, dim in sorted(steps)]


def _ordered(lowering: Lowering, made: Stored, like: Tensor, order: list[int]) -> Value:
    """The value of ``made``, which holds the elements of ``like`` permuted by ``order``."""
    shape = [like.shape[dim] for dim in order]
    back = [order.index(dim) for dim in range(like.ndim)]
    made.height, made.width, made.channels = 1, math.prod(shape[:-1]), shape[-1]
    return Value(lowering.value(made, shape).ids.permute(back))


def _relu(lowering: Lowering, x: Value, inplace: bool = False) -> Value:
    return _affine(lowering, x, None, None, relu=True, order=_memory_order(x.ids))


_PADDING: dict[str, Any] = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(lowering: Lowering, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    if mode == "constant":
        filler = lowering.value(np.full(1, value or 0.0, np.float32), (1,))
        return Value(F.pad(x.ids, tuple(pad), value=int(filler.ids[0])))
    sides = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]  # the last dim first
    sides = [(0, 0)] * (x.ndim - len(sides)) + sides[::-1]
    return Value(torch.from_numpy(np.pad(x.ids.numpy(), sides, mode=_PADDING[mode])))


def _hardtanh(
    lowering: Lowering, x: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Value:
    if min_val != 0 or max_val <= 0:
        raise LowbitError(f"hardtanh from {min_val} is not an operation of plans; ReLU6, from 0, is")
    return _affine(lowering, x, None, None, relu=True, order=_memory_order(x.ids), most=max_val)


def _affine(
    lowering: Lowering,
    x: Value,
    gain: np.ndarray | None,
    bias: np.ndarray | None,
    relu: bool = False,
    dim: int = -1,
    order: list[int] | None = None,
    most: float = 0.0,
) -> Value:
    """``x·gain + bias`` by channel; ``order``: the dims as they lie in memory, channels last; ``most``: as of ReLU6."""
    order = order or [*(d for d in range(x.ndim) if d != dim % x.ndim), dim % x.ndim]
    ids = x.ids.permute(order)
    rows = ids.reshape(-1, ids.shape[-1])
    source, offset, step = lowering.rows_of(rows)
    made = Stored(1, len(rows), rows.shape[1])
    data = {i: array for i, array in enumerate((gain, bias)) if array is not None}
    lowering.add(Op("affine", [source], made, n={0: offset, 1: step, 11: int(relu)}, f={2: most}, data=data))
    return _ordered(lowering, made, x.ids, order)


def _pool(
    lowering: Lowering,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    largest: bool = False,
    divisor: int = 0,
) -> Value:
    ids = _image(x.ids)
    height, width, channels = ids.shape
    if padding[0] * 2 > kernel[0] or padding[1] * 2 > kernel[1]:
        raise LowbitError("pooling with a padding of more than half its window is not an operation of plans")
    size = _out_size((height, width), kernel, stride, padding, (1, 1))
    source = lowering.dense(ids, (height, width, channels))
    if (source.height, source.width) != (height, width):  # its lines are not the image's
        source = _as_image(lowering, source, height, width) or lowering.copy(ids.flatten(), (height, width, channels))
    made = Stored(size[0], size[1], channels)
    numbers = {2: int(largest), **dict(enumerate([*kernel, *stride, *padding, 1, 1, divisor], 3))}
    lowering.add(Op("pool", [source], made, n=numbers))
    if not largest:
        lowering.exact = False
    return _back(lowering, made)


def _as_image(lowering: Lowering, source: Stored, height: int, width: int) -> Stored | None:
    """A tensor of rows as one of lines and places, if nothing else depends on its lines; otherwise None."""
    read = any(source in op.inputs for op in lowering.ops if op.kind == "pool")
    made = lowering.made.get(source)
    if read or source.channels * height * width != source.rows * source.channels or made is None or made.kind == "mel":
        return None
    source.height, source.width = height, width
    return source


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _beyond(x: Value, kernel: list[int], stride: list[int], padding: list[int]) -> list[int]:
    """How many more lines and places the last windows of ``ceil_mode`` reach: 0 where they start outside the image."""
    more = []
    for size, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True):
        windows = -(-(size + 2 * p - k) // s)
        windows -= windows * s >= size + p
        more.append(max(0, windows * s + k - size - 2 * p))
    return more


def _max_pool2d(
    lowering: Lowering,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    if return_indices or _pair(dilation) != [1, 1]:
        raise LowbitError("max-pooling with dilation or indices is not an operation of plans")
    kernel, pads = _pair(kernel_size), _pair(padding)
    strides = _pair(stride) if stride else kernel
    more = _beyond(x, kernel, strides, pads) if ceil_mode else [0, 0]
    if any(more):
        x = _pad(lowering, x, (pads[1], pads[1] + more[1], pads[0], pads[0] + more[0]), value=-math.inf)
        pads = [0, 0]
    return _pool(lowering, x, kernel, strides, pads, largest=True)


def _avg_pool2d(
    lowering: Lowering,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    kernel, pads = _pair(kernel_size), _pair(padding)
    strides = _pair(stride) if stride else kernel
    if ceil_mode and any(_beyond(x, kernel, strides, pads)):
        raise LowbitError("average pooling with ceil_mode beyond the image is not an operation of plans")
    divisor = divisor_override or (kernel[0] * kernel[1] if count_include_pad else 0)
    return _pool(lowering, x, kernel, strides, pads, divisor=divisor)


def _adaptive_avg_pool2d(lowering: Lowering, x: Value, output_size: Any) -> Value:
    wanted = [n if n is not None else x.shape[2 + i] for i, n in enumerate(_pair(output_size))]
    kernel = [x.shape[2 + i] // n for i, n in enumerate(wanted)]
    if any(x.shape[2 + i] % n for i, n in enumerate(wanted)):
        raise LowbitError(f"adaptive pooling of {list(x.shape[2:])} to {wanted} is not an operation of plans")
    return _pool(lowering, x, kernel, kernel)


def _over_dims(
    lowering: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None, **options: Any
) -> Value:
    """The mean over dims, as a pool whose window is all of them; ``options``: of `_pool`."""
    dims = sorted(d % x.ndim for d in ([dim] if isinstance(dim, int) else list(dim or range(x.ndim))))
    rest = [d for d in range(x.ndim) if d not in dims]
    if not rest or 0 in dims:
        raise LowbitError("a mean, sum or maximum over the batch is not an operation of plans")
    shape = [1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims]
    if dims == [2, 3] and x.ndim == 4:
        pooled = _pool(lowering, x, x.shape[2:], x.shape[2:], **options)
    else:
        ids = x.ids.permute(*dims, *rest).reshape(math.prod(x.shape[d] for d in dims), -1)
        pooled = _pool(lowering, Value(ids.t()[None, :, :, None]), (len(ids), 1), (1, 1), **options)
    return Value(pooled.ids.reshape(shape))


def _sum(lowering: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return _over_dims(lowering, x, dim, keepdim, divisor=1)


def _amax(lowering: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return _over_dims(lowering, x, dim, keepdim, largest=True)


def _norm(lowering: Lowering, x: Value, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Value:
    if p not in (2, "fro"):
        raise LowbitError(f"a norm with p={p} is not an operation of plans; p=2 is")
    squares = _sum(lowering, _scaled(lowering, x, x), dim, keepdim)
    return _scaled(lowering, squares, _curve(lowering, squares, "inverse root"))


def _normalize(
    lowering: Lowering, x: Value, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Value:
    if p != 2 or eps != 1e-12:
        raise LowbitError(f"normalize with p={p} and eps={eps} is not an operation of plans; p=2 and eps=1e-12 is")
    squares = _sum(lowering, _scaled(lowering, x, x), dim, keepdim=True)
    return _scaled(lowering, x, _curve(lowering, squares, "inverse root"))


def _tanh(lowering: Lowering, x: Value) -> Value:
    doubled = _curve(lowering, _scaled(lowering, x, 2.0), "sigmoid")
    return _add(lowering, _scaled(lowering, doubled, 2.0), -1.0)


def _group_norm(
    lowering: Lowering,
    x: Value,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    order = _memory_order(x.ids) if num_groups == 1 else list(range(x.ndim))
    ids = x.ids.permute(order)
    rows = _rows(lowering, "norm", Value(ids.reshape(num_groups, -1)), f={0: eps})
    normed = Value(rows.ids.reshape(ids.shape).permute([order.index(d) for d in range(x.ndim)]))
    if weight is None and bias is None:
        return normed
    gain, shift = (None if t is None else t.detach().float().numpy() for t in (weight, bias))
    return _affine(lowering, normed, gain, shift, dim=1)


def _leaky_relu(lowering: Lowering, x: Value, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    """The same bits as PyTorch's: one of the two summands is zero."""
    below = _scaled(lowering, _relu(lowering, _scaled(lowering, x, -1.0)), -negative_slope)
    return _add(lowering, _relu(lowering, x), below)


def _interpolate(
    lowering: Lowering, x: Value, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **others: Any
) -> Value:
    sizes = list(x.shape[2:])
    wanted = _pair(size) if size is not None else [int(n * scale_factor) for n in sizes]
    if mode != "nearest" or x.ndim != 4 or any(w % n for w, n in zip(wanted, sizes, strict=True)):
        raise LowbitError("interpolation other than that of nearest places by an integer is not an operation of plans")
    factors = [w // n for w, n in zip(wanted, sizes, strict=True)]
    return Value(x.ids.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3))


def _attention(
    lowering: Lowering,
    q: Value,
    k: Value,
    v: Value,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> Value:
    if dropout_p or is_causal or any(others.values()):
        raise LowbitError("causal attention is not an operation of plans")
    if attn_mask is None and q.ndim > 4 and q.shape == k.shape == v.shape:  # windows are heads too
        queries, keys, values = (Value(x.ids.flatten(0, -3)[None]) for x in (q, k, v))
        return Value(_attention(lowering, queries, keys, values, scale=scale).ids.reshape(q.shape))
    if attn_mask is not None or len(q.ids) != 1 or not q.shape == k.shape == v.shape:
        return _masked_attention(lowering, q, k, v, attn_mask, scale)
    if not q.shape == k.shape == v.shape or q.ndim != 4 or len(q.ids) != 1:
        raise LowbitError(
            f"attention of {list(q.shape)}, {list(k.shape)}, {list(v.shape)} is not an operation of plans"
        )
    _, heads, tokens, size = q.shape
    rows = [x.ids[0].transpose(0, 1).reshape(tokens, heads * size) for x in (q, k, v)]
    views = [lowering.view(each) for each in rows]
    if any(found is None for found in views) or len({(id(found[0]), found[2]) for found in views if found}) > 1:
        made = lowering.copy(torch.cat(rows, 1).flatten(), (1, tokens, 3 * heads * size))
        views = [(made, i * heads * size, 3 * heads * size) for i in range(3)]
    (source, at_q, step), (_, at_k, _), (_, at_v, _) = (found for found in views if found)
    out = Stored(1, tokens, heads * size)
    n = {0: at_q, 1: step, 2: heads, 3: size, 4: at_k, 5: at_v}
    lowering.add(Op("attention", [source], out, n=n, f={0: size**-0.5 if scale is None else scale}))
    lowering.exact = False
    ids = lowering.value(out, (tokens, heads, size)).ids
    return Value(ids.transpose(0, 1)[None])


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


def _stored_layer(lowering: Lowering, layer: Any, x: Value) -> Value:
    """A layer that `pack` left with codes: a depthwise convolution on integers, others on floats."""
    quantizer = getattr(layer, INPUT, None)
    form = None if quantizer is None else quantizer.integer()
    if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1:
        whole = form is not None and form.scale.numel() == 1 and form.after is None
        levels, divisor = integer_levels(layer.get_buffer("levels"))
        if form is not None and whole and max(map(abs, levels)) <= 255:
            return _depthwise(lowering, layer, x, form, torch.tensor(levels), divisor)
    return _float_layer(lowering, layer, x if quantizer is None else rounded(lowering, quantizer, x))


def _depthwise(
    lowering: Lowering, layer: nn.Conv2d, x: Value, form: IntegerForm, levels: Tensor, divisor: float
) -> Value:
    padding = _padding(layer.padding, layer.kernel_size, layer.dilation)
    ids = _image(x.ids)
    channels = layer.in_channels
    weights = levels[layer.get_buffer("codes").long()].reshape(channels, -1)
    scale = layer.get_buffer("row_scale").reshape(-1).expand(channels) / divisor
    size = _out_size(ids.shape, layer.kernel_size, layer.stride, padding, layer.dilation)
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
    return _back(lowering, made)


def _float_layer(lowering: Lowering, layer: Any, x: Value) -> Value:
    """A convolution or linear layer in full precision."""
    if isinstance(layer, nn.Linear):
        return _float_linear(lowering, x, layer.weight, layer.bias)
    if layer.padding_mode != "zeros":
        raise LowbitError(
            f"a convolution in full precision with padding_mode={layer.padding_mode!r} is not an operation of plans"
        )
    return _float_conv2d(
        lowering, x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def _float_linear(lowering: Lowering, x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    rows = lowering.of(x).ids.reshape(1, -1, x.shape[-1])
    made = _float_product(lowering, rows, weight[:, :, None, None], bias, (1, 1), (0, 0), (1, 1))
    return lowering.value(made, (*x.shape[:-1], made.channels))


def _float_conv2d(
    lowering: Lowering,
    x: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    window = (_pair(stride), _padding(padding, weight.shape[2:], _pair(dilation)), _pair(dilation))
    return _back(lowering, _float_product(lowering, _image(x.ids), weight, bias, *window, groups))


def _conv1d(
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
    made = _float_conv2d(lowering, image, weight[:, :, None], bias, (1, s), pads, (1, d), groups)
    return Value(made.ids[:, :, 0])


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """A convolution's padding as lines and places at each side."""
    if padding != "same":
        return [0, 0] if padding == "valid" else _pair(padding)
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
    size = _out_size(ids.shape, kernel, stride, padding, dilation)
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


def rounded(lowering: Lowering, quantizer: ActivationQuantizer, x: Value) -> Value:
    """An activation quantizer of its own: one factor of attention, or the input of a layer that stores codes."""
    form = quantizer.integer()
    if form is None:
        raise LowbitError(f"{type(quantizer).__name__} has no integer form, so it is not an operation of plans")
    order = _memory_order(x.ids)
    ids = x.ids.permute(order)
    channels = ids.shape[-1]
    source = lowering.dense(ids, (1, ids.numel() // channels, channels))
    made = Stored(1, ids.numel() // channels, channels)
    data = {}
    for i, part in enumerate((form.scale, form.scale, form.before, form.after)):
        if part is not None:
            whole = part.float() if part.numel() == 1 else part.float().broadcast_to(x.ids.shape).permute(order)
            data[i] = _least(whole.reshape(-1, channels) if part.numel() > 1 else whole.reshape(1, 1))
    op = Op("round", [source], made, n={2: form.low + 256, 3: form.high}, data=data)
    shifts = (form.before, form.after)
    parts = (None if t is None else t.float().broadcast_to(x.ids.shape).permute(order) for t in shifts)
    scale = form.scale.float().broadcast_to(x.ids.shape).permute(order)
    lowering.add(op, Origin("round", (ids,), form=IntegerForm(scale, form.low, form.high, *parts)))
    lowering.exact = False
    return _ordered(lowering, made, x.ids, order)


def _least(rows: Tensor) -> np.ndarray:
    """Rows of numbers, or one row where all are equal."""
    return (rows[:1] if torch.equal(rows, rows[:1].expand_as(rows)) else rows).contiguous().numpy()


def _scaled(lowering: Lowering, x: Any, y: Any) -> Value:
    """A product, element by element; one with constants may be an affine operation."""
    if not isinstance(x, Value):
        x, y = y, x
    if isinstance(y, int | float):
        y = torch.tensor(float(y))
    constant = None if isinstance(y, Value) else y.detach().float()
    if constant is None and (array := lowering.constant(y.ids)) is not None:
        constant = torch.from_numpy(array).reshape(y.ids.shape)
    if constant is None:
        return _pair_op(lowering, "times", x, y)
    if constant.numel() == 1:
        order = _memory_order(x.ids)
        channels = x.ids.permute(order).shape[-1]
        gain = np.full(channels, float(constant), np.float32)
        scaled = _affine(lowering, x, gain, None, order=order)
        origin = Origin("scaled", (x.ids.permute(order),), gain=float(constant))
        lowering.origins[lowering.stored[int(scaled.ids.flatten()[0]) >> SHIFT]] = origin
        return scaled
    shape = [1] * (x.ndim - constant.ndim) + list(constant.shape)
    dims = [d for d, n in enumerate(shape) if n > 1]
    if len(dims) != 1 or len(shape) != x.ndim or shape[dims[0]] != x.shape[dims[0]]:
        return _pair_op(lowering, "times", x, constant)
    return _affine(lowering, x, constant.reshape(-1).numpy(), None, dim=dims[0])


def _divided(lowering: Lowering, x: Any, y: Any) -> Value:
    """A quotient, as a product with inverses, which may differ in the last bit."""
    lowering.exact = False
    return _scaled(lowering, x, _curve(lowering, y, "inverse") if isinstance(y, Value) else 1 / y)


def _softmax(lowering: Lowering, x: Value, dim: int | None = -1, _stacklevel: int = 3, dtype: Any = None) -> Value:
    if dim is None:
        raise LowbitError("a softmax over no dim in particular is not an operation of plans")
    return Value(_rows(lowering, "softmax", Value(x.ids.movedim(dim, -1))).ids.movedim(-1, dim))


def _matmul(lowering: Lowering, a: Value, b: Value) -> Value:
    a, b = lowering.of(a), lowering.of(b)
    joined = integer_attention(lowering, a, b)
    if joined is not None:
        return joined
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (Value(x.ids.expand(*outer, *x.shape[-2:])) for x in (a, b))
    outer, (m, k), n = a.shape[:-2], a.shape[-2:], b.shape[-1]
    left, right = a.ids.reshape(-1, m, k), b.ids.reshape(-1, k, n)
    first, second = lowering.strided(left), lowering.strided(right)
    if first is None or first[2][2] != 1:
        first = (lowering.copy(left.flatten(), (1, len(left) * m, k)), 0, (m * k, k, 1))
    if second is None:
        second = (lowering.copy(right.flatten(), (1, len(left) * k, n)), 0, (k * n, n, 1))
    made = Stored(1, len(left) * m, n)
    numbers = {0: first[1], 1: first[2][1], 2: len(left), 3: m, 4: k, 5: n, 6: first[2][0]}
    numbers |= {7: second[1], 8: second[2][0], 9: second[2][1], 10: second[2][2]}
    lowering.add(Op("matmul", [first[0], second[0]], made, n=numbers), Origin("matmul", (left, right)))
    lowering.exact = False
    return lowering.value(made, (*outer, m, n))


def _masked_attention(lowering: Lowering, q: Value, k: Value, v: Value, mask: Any, scale: float | None) -> Value:
    """Attention in its parts, with constants that are added to the logits."""
    scaled = _scaled(lowering, q, q.shape[-1] ** -0.5 if scale is None else scale)
    logits = _matmul(lowering, scaled, Value(k.ids.transpose(-2, -1)))
    logits = logits if mask is None else _add(lowering, logits, mask)
    return _matmul(lowering, _softmax(lowering, logits), v)


def _getattr(lowering: Lowering, x: Value, name: str) -> Any:
    return getattr(x, name)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.lowbit.shift_conv2d.default: _conv2d,
    torch.ops.lowbit.shift_linear.default: _linear,
    as_floats: lambda lowering, x: x,
    "float": lambda lowering, x: x,
    **dict.fromkeys(("to", "type_as"), lambda lowering, x, *args, **kwargs: x),
    getattr: _getattr,
    F.gelu: _gelu,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    plain_attention: _attention,
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _scaled),
    **dict.fromkeys((operator.truediv, torch.div, "div", "div_"), _divided),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), _subtract),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), lambda lowering, x: _scaled(lowering, x, -1.0)),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), _sigmoid),
    F.silu: _silu,
    F.hardsigmoid: _hardsigmoid,
    F.hardswish: _hardswish,
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), _matmul),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), _softmax),
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((torch.addcmul, "addcmul"), _addcmul),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), _relu),
    F.batch_norm: _batch_norm,
    F.linear: _float_linear,
    F.conv2d: _float_conv2d,
    F.conv1d: _conv1d,
    F.pad: _pad,
    F.hardtanh: _hardtanh,
    F.relu6: lambda lowering, x, inplace=False: _hardtanh(lowering, x, 0.0, 6.0),
    **dict.fromkeys((torch.mean, "mean"), _over_dims),
    **dict.fromkeys((torch.sum, "sum"), _sum),
    **dict.fromkeys((torch.amax, "amax"), _amax),
    F.group_norm: _group_norm,
    F.leaky_relu: _leaky_relu,
    F.normalize: _normalize,
    **dict.fromkeys((torch.norm, "norm"), _norm),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), _tanh),
    F.interpolate: _interpolate,
    # torchvision's, in inference
    "stochastic_depth": lambda lowering, x, p, mode, training=True: x,
    **dict.fromkeys((F.dropout, F.dropout2d), lambda lowering, x, *args, **kwargs: x),
    # timm's functions around the mask of its attention, which is not there in inference
    "resolve_self_attn_mask": lambda lowering, tokens, attention, mask=None, causal=False: mask,
    "maybe_add_mask": lambda lowering, x, mask=None: x if mask is None else _add(lowering, x, mask),
    "size": lambda lowering, x, dim=None: x.shape if dim is None else x.shape[dim],
    "dim": lambda lowering, x: x.ndim,
    "numel": lambda lowering, x: x.ids.numel(),
    len: lambda lowering, x: len(x.ids),
}
"""How functions, and methods by their names, are lowered; rearrangements are `_VIEWS`."""


def lower_known(lowering: Lowering, module: nn.Module, x: Value) -> Value | None:
    """A call of a module that plans know; None for others."""
    if isinstance(module, PackedLinear | PackedConv2d):
        return _packed_layer(lowering, module, x)
    if isinstance(module, ActivationQuantizer):
        return rounded(lowering, module, x)
    if any(is_stored(module) and computes_as(module, kind, HOOKS) for kind in (nn.Linear, nn.Conv2d)):
        return _stored_layer(lowering, module, x)
    plain = next((kind for kind in _PLAIN if computes_as(module, kind)), None)
    if plain is not None:
        return _PLAIN[plain](lowering, module, x)
    if type(module).__name__ == "LogMel" and type(module).__module__ == "lowbit.models.speech":
        return _log_mel(lowering, module, x)
    return None


def _batch_norm_module(lowering: Lowering, module: Any, x: Value) -> Value | None:
    if module.running_var is None:
        return None
    return _batch_norm(lowering, x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps)


_PLAIN: dict[type[nn.Module], Callable[[Lowering, Any, Value], Value | None]] = {
    **dict.fromkeys((nn.Linear, nn.Conv2d), _float_layer),
    **dict.fromkeys((nn.Identity, nn.Dropout), lambda lowering, module, x: x),
    **dict.fromkeys((nn.BatchNorm2d, nn.BatchNorm1d), _batch_norm_module),
    nn.LayerNorm: lambda lowering, module, x: _layer_norm(
        lowering, x, module.normalized_shape, module.weight, module.bias, module.eps
    ),
    nn.GroupNorm: lambda lowering, module, x: _group_norm(
        lowering, x, module.num_groups, module.weight, module.bias, module.eps
    ),
    nn.LeakyReLU: lambda lowering, module, x: _leaky_relu(lowering, x, module.negative_slope),
    nn.GELU: lambda lowering, module, x: _gelu(lowering, x, module.approximate),
    nn.ReLU: lambda lowering, module, x: _relu(lowering, x),
    nn.Sigmoid: lambda lowering, module, x: _sigmoid(lowering, x),
    nn.Tanh: lambda lowering, module, x: _tanh(lowering, x),
    nn.SiLU: lambda lowering, module, x: _silu(lowering, x),
    nn.Hardsigmoid: lambda lowering, module, x: _hardsigmoid(lowering, x),
    nn.Hardswish: lambda lowering, module, x: _hardswish(lowering, x),
    nn.MaxPool2d: lambda lowering, module, x: _max_pool2d(
        lowering, x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode,
        module.return_indices,
    ),
    nn.AvgPool2d: lambda lowering, module, x: _avg_pool2d(
        lowering, x, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
        module.divisor_override,
    ),
    nn.AdaptiveAvgPool2d: lambda lowering, module, x: _adaptive_avg_pool2d(lowering, x, module.output_size),
    nn.Flatten: lambda lowering, module, x: Value(x.ids.flatten(module.start_dim, module.end_dim)),
}  # fmt: skip
"""How modules are lowered that compute exactly as these classes of torch do. Subclasses with a forward of their own
(timm's LayerNorm2d, BatchNormAct2d, MaxPool2dSame, ...) are traced instead."""
