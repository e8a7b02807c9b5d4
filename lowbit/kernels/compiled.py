"""The kernels in plain PyTorch operations, for torch.compile, for other devices and where the native library is missing.

The packed bytes are decoded inside the graph, so that a compiled model keeps its weights packed. Inductor vectorises
shifts, masks, products and `torch.where` with constants; not concatenations and table look-ups by index. So each row of
the layout (see `lowbit.kernels.packing`) is decoded by itself and multiplied by its own part of the activations.

Every matrix product is exact: by `torch._int_mm` on CPU and CUDA, else by float32 products of so few terms that all sums
stay below 2^24. Inductor's ``freezing`` would undo the packing: it folds the decoding away and keeps the weights wide.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels import reference
from lowbit.kernels.packing import TOP_BIT

# Without VNNI, oneDNN adds pairs of products in 16 bits with saturation: exact for weights up to 64 only.
SAFE_WEIGHT = 64
EXACT_IN_FLOAT = 2**24


def row_codes(data: Tensor, bits: int) -> list[Tensor]:
    """The codes of each row of a packing group: 4, 8 or 2 uint8 tensors ``[blocks, groups, 64]`` for 2, 3 or 4 bits."""
    if bits == 4:
        data = data.reshape(data.shape[0], -1, 64)
        return [data & 15, data >> 4]
    if bits == 2:
        data = data.reshape(data.shape[0], -1, 64)
        return [data >> 2 * r & 3 for r in range(4)]
    data = data.reshape(data.shape[0], -1, 3, 64)
    top = data[:, :, 2]
    return [
        (data[:, :, r // 4] >> 2 * (r % 4) & 3) | (top >> (TOP_BIT[r % 4] + (r & 4)) & 1) << 2 for r in range(8)
    ]


def look_up(codes: Tensor, levels: tuple[int, ...]) -> Tensor:
    """``levels[codes]``, int8, by arithmetic only: an affine map where the levels allow it, else a tree of choices."""
    step = levels[1] - levels[0]
    if all(b - a == step for a, b in zip(levels, levels[1:], strict=False)):
        return codes.to(torch.int8) * step + levels[0]
    bits = (len(levels) - 1).bit_length()
    table = [*levels, *[0] * (2**bits - len(levels))]
    choices: list = [torch.full((), level, dtype=torch.int8, device=codes.device) for level in table]
    for b in range(bits):
        odd = (codes >> b & 1).to(torch.bool)
        choices = [torch.where(odd, high, low) for low, high in zip(choices[0::2], choices[1::2], strict=True)]
    return choices[0]


def split(levels: tuple[int, ...], largest: int = SAFE_WEIGHT) -> list[tuple[int, ...]]:
    """Tables of magnitude <= ``largest`` that add up to ``levels``: one, or two where a level is larger."""
    first = tuple(max(-largest, min(largest, level)) for level in levels)
    rest = tuple(level - part for level, part in zip(levels, first, strict=True))
    return [first, rest] if any(rest) else [first]


def _product(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """``a @ b.T`` of int8 ``[M, K]`` and ``[N, K]`` in int32, exact; no weight ``b`` exceeds ``largest``."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.T)
    if a.device.type == "cuda":  # wants more than 16 rows
        missing = max(0, 17 - a.shape[0])
        return torch._int_mm(F.pad(a, (0, 0, 0, missing)), b.T)[: a.shape[0]]
    terms = max(1, EXACT_IN_FLOAT // (128 * largest))
    parts = zip(a.float().split(terms, 1), b.float().split(terms, 1), strict=True)
    return sum((x @ w.T).to(torch.int32) for x, w in parts)


def accumulate(q: Tensor, data: Tensor, levels: tuple[int, ...], bits: int) -> Tensor:
    """``q`` int8 ``[M, K]`` times packed weights: int32 ``[M, 16·blocks]``, exact."""
    m, k = q.shape
    blocks = data.shape[0]
    padded = data.shape[1] // (2 * bits)  # K rounded up to 64
    q = F.pad(q, (0, padded - k))
    rows = row_codes(data, bits)
    q = q.reshape(m, -1, len(rows), 4)
    acc = None
    for r, codes in enumerate(rows):
        part = q[:, :, r].reshape(m, -1)
        for table in split(levels):
            weight = look_up(codes, table).reshape(blocks, -1, 16, 4).transpose(1, 2).reshape(blocks * 16, -1)
            product = _product(part, weight, max(1, *map(abs, table)))
            acc = product if acc is None else acc + product
    return acc


def _stored(x: Tensor, x_scale: Tensor | None, low: int, high: int) -> tuple[Tensor, Tensor, int]:
    """Activations as int8, their scale, and the zero point: q = stored - zero."""
    if x_scale is not None:
        x_scale = x_scale.reshape(-1, *(1,) * (x.ndim - 1))
    if x.is_floating_point():
        x_scale = reference.dynamic_scale(x, high) if x_scale is None else x_scale
        q = torch.clamp(torch.round(torch.nan_to_num(x / x_scale, nan=0.0)), low, high)
        zero = -128 if high > 127 else 0
        return (q + zero).to(torch.int8), x_scale, zero
    if x.dtype == torch.uint8:
        return (x.to(torch.int16) - 128).to(torch.int8), x_scale, -128
    return x, x_scale, 0


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
    **epilogue,
) -> Tensor:
    """`lowbit.kernels.reference.linear` of packed bytes (see `PackedWeight` for them), bit for bit."""
    q, x_scale, zero = _stored(x.reshape(-1, x.shape[-1]), x_scale, low, high)
    acc = accumulate(q, data, levels, bits)[:, : scale.shape[0]]
    if zero:
        acc = acc - zero * sums
    return reference.epilogue(acc, x_scale, scale, bias, **epilogue).reshape(*x.shape[:-1], scale.shape[0])


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
    **epilogue,
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
    return reference.epilogue(acc, x_scale, scale, bias, **epilogue).permute(0, 3, 1, 2)
