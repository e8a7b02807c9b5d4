"""The kernels in plain PyTorch operations: for torch.compile, other devices, and where the native library is missing.

The packed bytes are decoded inside the graph, so that a compiled model keeps its weights packed. Inductor vectorizes
arithmetic on 32-bit integers best, and neither concatenations nor look-ups by index; so four codes are decoded at once,
as the bytes of an int32 (`look_up`), and each row of the layout (see `lowbit.kernels.packing`) is multiplied by its own
part of the activations.

Every matrix product is exact: by `torch._int_mm` on CPU and CUDA, else by float32 products of so few terms that all
sums stay below 2^24. Quantizer and epilogue are float32: on the CPU, compiled or not, they give the reference's bits;
on a GPU Triton divides approximately unless ``torch._inductor.config.eager_numerics.division_rounding`` is set.

Inductor's ``freezing`` would undo the packing: it folds the decoding away and keeps the weights wide.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels import reference
from lowbit.kernels.packing import TOP_BIT

# Without VNNI, oneDNN adds pairs of products in 16 bits with saturation: exact for weights up to 64 only.
SAFE_WEIGHT = 64
EXACT_IN_FLOAT = 2**24
# Of torch._int_mm. CUDA refuses fewer than 17; and Inductor (2.11) gives the CPU's a single row with a stride of 0,
# which it takes at its word and returns nonsense.
LEAST_ROWS = {"cpu": 2, "cuda": 17}


def row_codes(data: Tensor, bits: int) -> list[tuple[Tensor, ...]]:
    """The bits of the codes of each row of a packing group: 4, 8 or 2 rows for 2, 3 or 4 bits.

    Each row is a tuple of ``bits`` int32 tensors ``[blocks, groups, 16]``, lowest bit first; an element holds the bits
    of an output's four k, 0 or 1 in each byte.
    """
    planes = 3 if bits == 3 else 1
    words = data.view(torch.int32).reshape(data.shape[0], -1, planes, 16)
    first = words[:, :, 0]
    if bits == 4:
        places = [[(first, 4 * r + i) for i in range(4)] for r in range(2)]
    elif bits == 2:
        places = [[(first, 2 * r + i) for i in range(2)] for r in range(4)]
    else:
        places = [
            [(words[:, :, r // 4], 2 * (r % 4) + i) for i in range(2)] + [(words[:, :, 2], TOP_BIT[r % 4] + (r & 4))]
            for r in range(8)
        ]
    return [tuple(word >> place & 0x01010101 for word, place in row) for row in places]


def look_up(code_bits: tuple[Tensor, ...], levels: tuple[int, ...]) -> Tensor:
    """``levels[code]``, four int8 in an int32, by arithmetic only.

    A function of bits is a sum of products of them (for two bits: a + b·c0 + c·c1 + d·c0·c1), and products of bits are
    ANDs. Summed as whole int32 with 128 added to each byte, every byte of the result is 0 to 255, so nothing is carried
    over from one to the next, whatever happens on the way; flipping the bytes' top bits takes the 128 away again.
    """
    terms = [level + 128 for level in levels] + [128] * (2 ** len(code_bits) - len(levels))
    for i in range(len(code_bits)):  # values at all codes -> coefficients of all products
        for code in range(len(terms)):
            if code >> i & 1:
                terms[code] -= terms[code ^ 1 << i]
    total = torch.full((), terms[0] * 0x01010101 - 2**32 * (terms[0] > 127), dtype=torch.int32)
    total = total.to(code_bits[0].device)
    for code, coefficient in enumerate(terms):
        if code and coefficient:
            chosen = [plane for i, plane in enumerate(code_bits) if code >> i & 1]
            product = chosen[0]
            for plane in chosen[1:]:
                product = product & plane
            total = total + product * coefficient
    return total ^ -0x7F7F7F80  # 0x80808080


def split(levels: tuple[int, ...], largest: int = SAFE_WEIGHT) -> list[tuple[int, ...]]:
    """Tables of magnitude <= ``largest`` that add up to ``levels``: one, or two where a level is larger."""
    first = tuple(max(-largest, min(largest, level)) for level in levels)
    rest = tuple(level - part for level, part in zip(levels, first, strict=True))
    return [first, rest] if any(rest) else [first]


def _product(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """``a @ b.T`` of int8 ``[M, K]`` and ``[N, K]`` in int32, exact; no weight ``b`` exceeds ``largest``."""
    if a.device.type in LEAST_ROWS:
        missing = max(0, LEAST_ROWS[a.device.type] - a.shape[0])
        return torch._int_mm(F.pad(a, (0, 0, 0, missing)) if missing else a, b.T)[: a.shape[0]]
    terms = max(1, EXACT_IN_FLOAT // (128 * largest))
    parts = zip(a.float().split(terms, 1), b.float().split(terms, 1), strict=True)
    return sum((x @ w.T).to(torch.int32) for x, w in parts)


def _dense(x: Tensor) -> Tensor:
    """A copy with the usual strides, in dimensions of size 1 too, which `contiguous` leaves alone."""
    return x.clone(memory_format=torch.contiguous_format)


def accumulate(q: Tensor, data: Tensor, levels: tuple[int, ...], bits: int) -> Tensor:
    """``q`` int8 ``[M, K]`` times packed weights: int32 ``[M, 16·blocks]``, exact."""
    m, k = q.shape
    blocks = data.shape[0]
    padded = data.shape[1] // (2 * bits)  # K rounded up to 64
    if bits == 8:
        stored = data.view(torch.int8).reshape(blocks, -1, 16, 4).transpose(1, 2).reshape(blocks * 16, -1)
        first = stored.clamp(-SAFE_WEIGHT, SAFE_WEIGHT)
        q = F.pad(q, (0, padded - k))
        return _product(q, _dense(first), SAFE_WEIGHT) + _product(q, _dense(stored - first), SAFE_WEIGHT)
    rows = row_codes(data, bits)
    words = _dense(F.pad(q, (0, padded - k))).view(torch.int32).reshape(m, -1, len(rows))
    acc = torch.zeros((), dtype=torch.int32, device=q.device)
    for r, code_bits in enumerate(rows):
        part = _dense(words[:, :, r]).view(torch.int8)
        for table in split(levels):
            weight = _dense(look_up(code_bits, table).transpose(1, 2)).reshape(blocks * 16, -1).view(torch.int8)
            acc = acc + _product(part, weight, max(1, *map(abs, table)))
    return acc


def _stored(x: Tensor, x_scale: Tensor | None, low: int, high: int) -> tuple[Tensor, Tensor, int]:
    """Activations as int8, their scale, and the zero point: q = stored - zero."""
    scale = reference.dynamic_scale(x, high) if x_scale is None else x_scale.reshape(-1, *(1,) * (x.ndim - 1))
    if x.is_floating_point():
        q = torch.clamp(torch.round(torch.nan_to_num(x / scale, nan=0.0)), low, high)
        zero = -128 if high > 127 else 0
        return (q + zero).to(torch.int8), scale, zero
    if x.dtype == torch.uint8:
        return (x.to(torch.int16) - 128).to(torch.int8), scale, -128
    return x, scale, 0


def linear(
    x: Tensor,
    data: Tensor,
    levels: tuple[int, ...],
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    low: int = -127,
    high: int = 127,
    add: Tensor | None = None,
    **epilogue: Any,
) -> Tensor:
    """`lowbit.kernels.reference.linear` of packed bytes (see `PackedWeight` for them), bit for bit."""
    q, x_scale, zero = _stored(x.reshape(-1, x.shape[-1]), x_scale, low, high)
    acc = accumulate(q, data, levels, bits)[:, : scale.shape[0]]
    if zero:
        acc = acc - zero * sums
    if add is not None:
        add = add.reshape(acc.shape)
    return reference.epilogue(acc, x_scale, scale, bias, add=add, **epilogue).reshape(*x.shape[:-1], scale.shape[0])


def conv2d(
    x: Tensor,
    data: Tensor,
    levels: tuple[int, ...],
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    kernel: tuple[int, int],
    padded: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    low: int = -127,
    high: int = 127,
    add: Tensor | None = None,
    **epilogue: Any,
) -> Tensor:
    """`lowbit.kernels.reference.conv2d` of packed bytes, bit for bit; ``padded`` is C as packed."""
    q, x_scale, zero = _stored(x, x_scale, low, high)
    q = q.permute(0, 2, 3, 1)
    # A place outside the image holds q = 0, which is stored as `zero`; a channel that is none meets no weight: 0.
    q = F.pad(q, (0, 0, padding[1], padding[1], padding[0], padding[0]), value=zero)
    q = F.pad(q, (0, padded - q.shape[3]))
    ky, kx = kernel
    windows = q.unfold(1, (ky - 1) * dilation[0] + 1, stride[0]).unfold(2, (kx - 1) * dilation[1] + 1, stride[1])
    windows = windows[..., :: dilation[0], :: dilation[1]].permute(0, 1, 2, 4, 5, 3)  # [B, H', W', ky, kx, C]
    batch, height, width = windows.shape[:3]
    acc = accumulate(windows.reshape(batch * height * width, -1), data, levels, bits)[:, : scale.shape[0]]
    if zero:
        acc = acc - zero * sums
    acc = acc.reshape(batch, height, width, -1)
    if add is not None:
        add = add.permute(0, 2, 3, 1)
    return reference.epilogue(acc, x_scale, scale, bias, add=add, **epilogue).permute(0, 3, 1, 2)
