"""Lowering of functions over dims: normalization, softmax, means, sums, maxima and norms."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowbit.engine.elementwise import affine, curve, memory_order, multiply
from lowbit.engine.format import Op
from lowbit.engine.format import Tensor as Stored
from lowbit.engine.values import Lowering, Origin, Value
from lowbit.engine.windows import pool
from lowbit.errors import LowbitError


def _rows(lowering: Lowering, kind: str, x: Value, **more: Any) -> Value:
    """An operation from rows to rows of the last dim."""
    ids = x.ids.reshape(-1, x.shape[-1])
    source, offset, step = lowering.rows_of(ids)
    made = Stored(1, len(ids), ids.shape[1])
    n = {0: offset, 1: step} | more.pop("n", {})
    lowering.add(Op(kind, [source], made, n=n, **more), Origin(kind, (x.ids,)))
    lowering.exact = False
    return lowering.value(made, x.shape)


def layer_norm(
    lowering: Lowering,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    """`F.layer_norm` over the last dim."""
    if len(normalized_shape) != 1:
        raise LowbitError(f"LayerNorm over {len(normalized_shape)} dims is not an operation of plans")
    data = {i: t.detach().float().numpy() for i, t in enumerate((weight, bias)) if t is not None}
    return _rows(lowering, "norm", x, f={0: eps}, data=data)


def group_norm(
    lowering: Lowering,
    x: Value,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    """`F.group_norm`."""
    order = memory_order(x.ids) if num_groups == 1 else list(range(x.ndim))
    ids = x.ids.permute(order)
    rows = _rows(lowering, "norm", Value(ids.reshape(num_groups, -1)), f={0: eps})
    normed = Value(rows.ids.reshape(ids.shape).permute([order.index(d) for d in range(x.ndim)]))
    if weight is None and bias is None:
        return normed
    gain, shift = (None if t is None else t.detach().float().numpy() for t in (weight, bias))
    return affine(lowering, normed, gain, shift, dim=1)


def softmax(lowering: Lowering, x: Value, dim: int | None = -1, _stacklevel: int = 3, dtype: Any = None) -> Value:
    """`F.softmax`."""
    if dim is None:
        raise LowbitError("a softmax over no dim in particular is not an operation of plans")
    return Value(_rows(lowering, "softmax", Value(x.ids.movedim(dim, -1))).ids.movedim(-1, dim))


def mean(
    lowering: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None, **options: Any
) -> Value:
    """The mean over dims, as a pool whose window is all of them; ``options``: of `pool`."""
    dims = sorted(d % x.ndim for d in ([dim] if isinstance(dim, int) else list(dim or range(x.ndim))))
    rest = [d for d in range(x.ndim) if d not in dims]
    if not rest or 0 in dims:
        raise LowbitError("a mean, sum or maximum over the batch is not an operation of plans")
    shape = [1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims]
    if dims == [2, 3] and x.ndim == 4:
        pooled = pool(lowering, x, x.shape[2:], x.shape[2:], **options)
    else:
        ids = x.ids.permute(*dims, *rest).reshape(math.prod(x.shape[d] for d in dims), -1)
        pooled = pool(lowering, Value(ids.t()[None, :, :, None]), (len(ids), 1), (1, 1), **options)
    return Value(pooled.ids.reshape(shape))


def sum_over(lowering: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """`torch.sum` over dims, as a pool that divides by 1."""
    return mean(lowering, x, dim, keepdim, divisor=1)


def amax(lowering: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """`torch.amax`."""
    return mean(lowering, x, dim, keepdim, largest=True)


def norm(lowering: Lowering, x: Value, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Value:
    """`torch.norm` with p=2."""
    if p not in (2, "fro"):
        raise LowbitError(f"a norm with p={p} is not an operation of plans; p=2 is")
    squares = sum_over(lowering, multiply(lowering, x, x), dim, keepdim)
    return multiply(lowering, squares, curve(lowering, squares, "inverse root"))


def normalize(
    lowering: Lowering, x: Value, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Value:
    """`F.normalize` with p=2."""
    if p != 2 or eps != 1e-12:
        raise LowbitError(f"normalize with p={p} and eps={eps} is not an operation of plans; p=2 and eps=1e-12 is")
    squares = sum_over(lowering, multiply(lowering, x, x), dim, keepdim=True)
    return multiply(lowering, x, curve(lowering, squares, "inverse root"))
