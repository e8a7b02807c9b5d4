"""Lowering of functions of single numbers, of sums and products of tensors, and of rounding."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.engine.format import CURVES, EACH, NUMBER, ROW, Op
from lowbit.engine.format import Tensor as Stored
from lowbit.engine.values import SHIFT, Lowering, Origin, Value
from lowbit.errors import LowbitError
from lowbit.quantizers.base import ActivationQuantizer, IntegerForm


def curve(lowering: Lowering, x: Value, which: str) -> Value:
    """A function of each number, one of `CURVES`."""
    order = memory_order(x.ids)
    rows = x.ids.permute(order).reshape(-1, x.shape[order[-1]])
    source, offset, step = lowering.rows_of(rows)
    made = Stored(1, len(rows), rows.shape[1])
    number = CURVES.index(which)
    lowering.add(Op("curve" if number else "gelu", [source], made, n={0: offset, 1: step, 2: number}))
    lowering.exact &= which.startswith("hard")
    return _ordered(lowering, made, x.ids, order)


def gelu(lowering: Lowering, x: Value, approximate: str = "none") -> Value:
    """`F.gelu`."""
    return curve(lowering, x, "gelu" if approximate == "none" else "gelu tanh")


def sigmoid(lowering: Lowering, x: Value) -> Value:
    """`torch.sigmoid`."""
    return curve(lowering, x, "sigmoid")


def silu(lowering: Lowering, x: Value, inplace: bool = False) -> Value:
    """`F.silu`."""
    return curve(lowering, x, "silu")


def hardsigmoid(lowering: Lowering, x: Value, inplace: bool = False) -> Value:
    """`F.hardsigmoid`."""
    return curve(lowering, x, "hardsigmoid")


def hardswish(lowering: Lowering, x: Value, inplace: bool = False) -> Value:
    """`F.hardswish`."""
    return curve(lowering, x, "hardswish")


def tanh(lowering: Lowering, x: Value) -> Value:
    """`torch.tanh`, as 2·sigmoid(2x) - 1."""
    doubled = curve(lowering, multiply(lowering, x, 2.0), "sigmoid")
    return add(lowering, multiply(lowering, doubled, 2.0), -1.0)


def divide(lowering: Lowering, x: Any, y: Any) -> Value:
    """A quotient, as a product with inverses, which may differ in the last bit."""
    lowering.exact = False
    return multiply(lowering, x, curve(lowering, y, "inverse") if isinstance(y, Value) else 1 / y)


def _pair_op(lowering: Lowering, kind: str, a: Any, b: Any, relu: bool = False) -> Value:
    """The sum or product of two: "add" or "times". The second one may repeat along the first or the last dims."""
    a, b = lowering.of(a), lowering.of(b)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    if lowering.constant(a.ids) is not None or (a.shape != shape and lowering.constant(b.ids) is None):
        a, b = b, a
    ids = a.ids.expand(shape)
    order = memory_order(ids)
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


def add(lowering: Lowering, a: Any, b: Any, relu: bool = False, alpha: float = 1) -> Any:
    """A sum, of which ``b`` may be a number."""
    return _pair_op(lowering, "add", a, b if alpha == 1 else multiply(lowering, lowering.of(b), alpha), relu)


def subtract(lowering: Lowering, a: Any, b: Any) -> Any:
    """A difference, of which ``b`` may be a number."""
    return add(lowering, a, multiply(lowering, b, -1.0) if isinstance(b, Value) else -b)


def addcmul(lowering: Lowering, x: Any, a: Any, b: Any, value: float = 1) -> Value:
    """`torch.addcmul`."""
    lowering.exact = False  # PyTorch may multiply in another order
    return add(lowering, x, multiply(lowering, a, b), alpha=value)


def multiply(lowering: Lowering, x: Any, y: Any) -> Value:
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
        order = memory_order(x.ids)
        channels = x.ids.permute(order).shape[-1]
        gain = np.full(channels, float(constant), np.float32)
        scaled = affine(lowering, x, gain, None, order=order)
        origin = Origin("scaled", (x.ids.permute(order),), gain=float(constant))
        lowering.origins[lowering.stored[int(scaled.ids.flatten()[0]) >> SHIFT]] = origin
        return scaled
    shape = [1] * (x.ndim - constant.ndim) + list(constant.shape)
    dims = [d for d, n in enumerate(shape) if n > 1]
    if len(dims) != 1 or len(shape) != x.ndim or shape[dims[0]] != x.shape[dims[0]]:
        return _pair_op(lowering, "times", x, constant)
    return affine(lowering, x, constant.reshape(-1).numpy(), None, dim=dims[0])


def affine(
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


def relu(lowering: Lowering, x: Value, inplace: bool = False) -> Value:
    """`F.relu`."""
    return affine(lowering, x, None, None, relu=True, order=memory_order(x.ids))


def hardtanh(lowering: Lowering, x: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Value:
    """`F.hardtanh` from 0 to a positive number, as in ReLU6."""
    if min_val != 0 or max_val <= 0:
        raise LowbitError(f"hardtanh from {min_val} is not an operation of plans; ReLU6, from 0, is")
    return affine(lowering, x, None, None, relu=True, order=memory_order(x.ids), most=max_val)


def leaky_relu(lowering: Lowering, x: Value, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    """The same bits as PyTorch's: one of the two summands is zero."""
    below = multiply(lowering, relu(lowering, multiply(lowering, x, -1.0)), -negative_slope)
    return add(lowering, relu(lowering, x), below)


def batch_norm(
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
    """`F.batch_norm` in inference, that could not be folded into a layer."""
    if training:
        raise LowbitError("a BatchNorm that computes statistics of its input is not an operation of plans")
    inverse = 1 / torch.sqrt(var + eps)
    gain = inverse if weight is None else weight * inverse
    shift = -mean * gain + (0 if bias is None else bias)
    lowering.exact = False
    return affine(lowering, x, gain.detach().float().numpy(), shift.detach().float().numpy(), dim=1)


def rounded(lowering: Lowering, quantizer: ActivationQuantizer, x: Value) -> Value:
    """An activation quantizer of its own: one factor of attention, or the input of a layer that stores codes."""
    form = quantizer.integer()
    if form is None:
        raise LowbitError(f"{type(quantizer).__name__} has no integer form, so it is not an operation of plans")
    order = memory_order(x.ids)
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


def memory_order(ids: Tensor) -> list[int]:
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
