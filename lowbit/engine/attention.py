"""Lowering of attention and of products of matrices.

Attention with rounded factors is one operation on integers: ``â·v̂``, where ``â`` is the rounded softmax of ``q̂·k̂ᵀ``.

Steps that differ by head and token (queries, keys), by head and query (the softmax's output), or by head and channel
(values) are factors of a row or a column of a product. A step for each token's values is not, since the second product
sums over tokens; such attention stays in float, as does one with a mask or a table of positions between its products.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.engine.elementwise import add, multiply
from lowbit.engine.format import Op
from lowbit.engine.format import Tensor as Stored
from lowbit.engine.reductions import softmax
from lowbit.engine.values import SHIFT, Lowering, Origin, Value
from lowbit.errors import LowbitError

MOST = 65536
"""Largest number of tokens, and of channels of a head: sums of so many products fit into 32 bits."""


@dataclass(eq=False)
class Factor:
    """A rounded operand of a product.

    Args:
        ids: numbers of the elements before rounding, ``[heads, tokens, channels]``.
        low, high: the range of its integers.
        scale, before, after: as of `lowbit.quantizers.base.IntegerForm`, of the shape of ``ids``; None for no shift.
    """

    ids: Tensor
    low: int
    high: int
    scale: Tensor
    before: Tensor | None
    after: Tensor | None

    def transpose(self) -> "Factor":
        """The factor with its last two dims exchanged."""
        parts = (self.ids, self.scale, self.before, self.after)
        ids, scale, before, after = (None if t is None else t.transpose(1, 2) for t in parts)
        assert ids is not None and scale is not None
        return Factor(ids, self.low, self.high, scale, before, after)


def integer_attention(lowering: Lowering, shares: Value, v: Value) -> Value | None:
    """Lower ``shares @ v``, ``[1, heads, tokens, ...]`` each, and the operations that made both to one operation.

    Returns:
        The product, or None if this is not the second product of attention with rounded factors.
    """
    if shares.ndim != 4 or v.ndim != 4 or not len(shares.ids) == len(v.ids) == 1 or shares.shape[1] != v.shape[1]:
        return None
    share, values = _factor(lowering, shares.ids[0]), _factor(lowering, v.ids[0])
    softmax = None if share is None else _whole(lowering, share.ids, "softmax")
    product = None if softmax is None else _whole(lowering, softmax.operands[0][0], "matmul")
    if share is None or values is None or softmax is None or product is None:
        return None
    left, gain = _unscaled(lowering, product.operands[0])
    q, transposed = _factor(lowering, left), _factor(lowering, product.operands[1])
    if q is None or transposed is None:
        return None
    k = transposed.transpose()
    heads, tokens, size = q.ids.shape
    if not values.ids.shape[1] == k.ids.shape[1] == tokens or max(tokens, size) > MOST or share.after is not None:
        return None
    if share.before is not None or any(f.low < -128 or f.high > 127 for f in (k, values)):
        return None
    steps = [_constant(f.scale, dim) for f, dim in ((q, 2), (k, 2), (values, 1), (share, 2))]
    shifts = [_shift(part, f) for f, part in ((q, q.before), (q, q.after), (k, k.before))]
    shifts += [_shift(part, values) for part in (values.before, values.after)]
    if any(t is None for t in (*steps, *shifts)) or _shift(k.after, k) is None:
        return None
    reads = [_read(lowering, f.ids) for f in (q, k, values)]
    (_, q_at, q_steps), (_, k_at, k_steps), (_, v_at, v_steps) = reads
    n = {0: q_at, 1: q_steps[1], 2: heads, 3: size, 4: k_at, 5: v_at, 6: k_steps[1], 7: v_steps[1]}
    n |= {8: q_steps[0], 9: k_steps[0], 10: v_steps[0], 11: values.ids.shape[2]}
    n |= {12 + i: (f.low + 256) * 1024 + f.high for i, f in enumerate((q, k, values, share))}
    data = {i: _least(t).numpy() for i, t in enumerate(steps) if t is not None}
    if any(part is not None for f in (q, k, values) for part in (f.before, f.after)):
        data[4] = torch.cat([t.flatten() for t in shifts if t is not None]).numpy()
    made = Stored(1, tokens, heads * values.ids.shape[2])
    lowering.add(Op("integer attention", [read[0] for read in reads], made, n=n, f={0: gain}, data=data))
    lowering.taken_over |= {lowering.stored[int(x.ids.flatten()[0]) >> SHIFT] for x in (shares, v)}
    lowering.exact = False
    return Value(lowering.value(made, (1, tokens, heads, values.ids.shape[2])).ids.transpose(1, 2))


def _origin(lowering: Lowering, ids: Tensor, kind: str) -> tuple[Origin, Tensor] | None:
    """The origin of that kind of these elements, and their places in the stored tensor that holds all of them."""
    number = int(ids.flatten()[0]) >> SHIFT
    stored = lowering.stored[number]
    origin = lowering.origins.get(stored) if isinstance(stored, Stored) else None
    if origin is None or origin.kind != kind or not bool((ids >> SHIFT == number).all()):
        return None
    return origin, ids & ((1 << SHIFT) - 1)


def _factor(lowering: Lowering, ids: Tensor) -> Factor | None:
    found = _origin(lowering, ids, "round")
    if found is None:
        return None
    (origin, at), form = found, found[0].form
    assert form is not None
    before, after = (None if t is None else t.flatten()[at] for t in (form.before, form.after))
    return Factor(origin.operands[0].flatten()[at], form.low, form.high, form.scale.flatten()[at], before, after)


def _whole(lowering: Lowering, ids: Tensor, kind: str) -> Origin | None:
    """The origin of that kind of these elements, if they are a whole stored tensor in order, row by row."""
    found = _origin(lowering, ids, kind)
    if found is None or not torch.equal(found[1].flatten(), torch.arange(ids.numel())):
        return None
    rows = found[0].operands[0].shape[-1] if kind == "softmax" else found[0].operands[1].shape[-1]
    return found[0] if rows == ids.shape[-1] else None


def _unscaled(lowering: Lowering, ids: Tensor) -> tuple[Tensor, float]:
    """The elements before they were multiplied by one number, and that number."""
    found = _origin(lowering, ids, "scaled")
    return (ids, 1.0) if found is None else (found[0].operands[0].flatten()[found[1]], found[0].gain)


def _constant(x: Tensor, dim: int) -> Tensor | None:
    """``x`` without a dim along which it does not change; None if it does."""
    first = x.narrow(dim, 0, 1)
    return first.squeeze(dim) if torch.equal(first.expand_as(x), x) else None


def _shift(part: Tensor | None, factor: Factor) -> Tensor | None:
    """A shift ``[heads, channels]`` that all tokens share, zeros for none; None if tokens differ."""
    heads, _, size = factor.ids.shape
    return torch.zeros(heads, size) if part is None else _constant(part, 1)


def _least(steps: Tensor) -> Tensor:
    """One step where all are equal."""
    flat = steps.flatten()
    return (flat[:1] if torch.equal(flat[:1].expand_as(flat), flat) else flat).contiguous()


def _read(lowering: Lowering, ids: Tensor) -> tuple[Stored, int, tuple[int, ...]]:
    """The tensor, offset and steps of ``[heads, tokens, channels]``, copied if channels do not follow each other."""
    found = lowering.strided(ids)
    if found is not None and found[2][2] == 1:
        return found
    heads, tokens, size = ids.shape
    return lowering.copy(ids.flatten(), (1, heads * tokens, size)), 0, (tokens * size, size, 1)


def attention(
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
    """`F.scaled_dot_product_attention`, without dropout and causal masks."""
    if dropout_p or is_causal or any(others.values()):
        raise LowbitError("causal attention is not an operation of plans")
    if attn_mask is None and q.ndim > 4 and q.shape == k.shape == v.shape:  # windows are heads too
        queries, keys, values = (Value(x.ids.flatten(0, -3)[None]) for x in (q, k, v))
        return Value(attention(lowering, queries, keys, values, scale=scale).ids.reshape(q.shape))
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


def _masked_attention(lowering: Lowering, q: Value, k: Value, v: Value, mask: Any, scale: float | None) -> Value:
    """Attention in its parts, with constants that are added to the logits."""
    scaled = multiply(lowering, q, q.shape[-1] ** -0.5 if scale is None else scale)
    logits = matmul(lowering, scaled, Value(k.ids.transpose(-2, -1)))
    logits = logits if mask is None else add(lowering, logits, mask)
    return matmul(lowering, softmax(lowering, logits), v)


def matmul(lowering: Lowering, a: Value, b: Value) -> Value:
    """A product of matrices, or all of attention if its four factors are rounded."""
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
