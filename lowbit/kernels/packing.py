"""Low-bit codes packed into bytes, in the one layout that every kernel reads.

A weight is a matrix of codes ``[N, K]`` (N outputs, K inputs): indices into an ascending table of at most 2^bits small
integers, ``w = scale[n] · levels[code[n, k]]``. For a convolution K runs over (ky, kx, channel), channel fastest.

Layout "N16K4": 16 outputs make a block, and 4 neighboring k of a block make a row of 64 codes, ``[16 n][4 k]``: as
bytes, one 512-bit register, one row of an AMX tile. A block holds its rows in ascending k:

- 2 bits: 4 rows in 64 bytes; row r in bits 2r, 2r+1 of each byte.
- 4 bits: 2 rows in 64 bytes; the even row in the low half of each byte.
- 3 bits: 8 rows in 192 bytes; the two low bits of rows 0-3 as at 2 bits, then those of rows 4-7, then 64 bytes of top
  bits, row r's in bit ``TOP_BIT[r % 4] + (r & 4)``: where one table look-up by 6 bits, which don't care for the other
  three, finds it without shifting.
- 8 bits: a row is 64 bytes, each not a code but the level itself, -128 to 127 (first and last layers).

N is padded to a multiple of 16 and K to one of 64. What the pads decode to has no meaning: kernels multiply them by
zero or drop them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from lowbit.errors import LowbitError

BITS = (2, 3, 4, 8)
TOP_BIT = (2, 0, 1, 3)
LARGEST_LEVEL = 128
LARGEST_ACTIVATION = 255  # 8 bits, signed or not
LARGEST_SUM = 2**31 - 1  # accumulators are int32

__all__ = ["BITS", "PackedWeight", "integer_levels", "largest_k", "pack", "pack_weight", "padded_channels", "unpack"]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise LowbitError(f"bits={bits!r} is not allowed: packed weights have 2, 3, 4 or 8 bits")


def packed_shape(bits: int, n: int, k: int) -> tuple[int, int]:
    """Shape of the packed bytes of an ``[n, k]`` weight: one row for each block of 16 outputs."""
    return _round_up(n, 16) // 16, _round_up(k, 64) * 16 * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs ``codes``, integers ``[N, K]`` from 0 to 2^bits-1, into uint8 ``[⌈N/16⌉, ⌈K/64⌉·128·bits]``.

    With 8 bits ``codes`` are the bytes to keep: levels modulo 256.

    Raises:
        LowbitError: bits other than 2, 3, 4, 8; codes that are no matrix, not integers or out of range.
    """
    _check_bits(bits)
    if codes.ndim != 2 or codes.is_floating_point() or codes.is_complex():
        raise LowbitError(f"codes are {codes.dtype} {list(codes.shape)}; pack takes integers [N, K]")
    n, k = codes.shape
    if not n or not k:
        raise LowbitError(f"codes are {list(codes.shape)}: there is nothing to pack")
    low, high = (int(bound) for bound in codes.aminmax())
    if low < 0 or high >= 2**bits:
        raise LowbitError(f"codes go from {low} to {high}; {bits} bits hold 0 to {2**bits - 1}")
    blocks = _round_up(n, 16) // 16
    padded = F.pad(codes.to(torch.uint8), (0, _round_up(k, 64) - k, 0, blocks * 16 - n))
    rows = padded.reshape(blocks, 16, -1, 4).transpose(1, 2).reshape(blocks, -1, 64)
    if bits == 8:
        return rows.reshape(blocks, -1)
    if bits == 4:
        return (rows[:, 0::2] | rows[:, 1::2] << 4).reshape(blocks, -1)
    two = rows & 3
    quarters = (two[:, 0::4] | two[:, 1::4] << 2) | (two[:, 2::4] << 4 | two[:, 3::4] << 6)
    if bits == 2:
        return quarters.reshape(blocks, -1)
    top = torch.zeros_like(rows[:, 0::8])
    for r in range(8):
        top |= (rows[:, r::8] >> 2) << (TOP_BIT[r % 4] + (r & 4))
    return torch.stack([quarters[:, 0::2], quarters[:, 1::2], top], dim=2).reshape(blocks, -1)


def unpack(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The codes ``[n, k]``, int16, that `pack` made into ``packed``.

    Raises:
        LowbitError: bits other than 2, 3, 4, 8, or bytes that are not those of an ``[n, k]`` weight.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != packed_shape(bits, n, k):
        raise LowbitError(
            f"packed is {packed.dtype} {list(packed.shape)}; a {bits}-bit weight [{n}, {k}] is torch.uint8 "
            f"{list(packed_shape(bits, n, k))}"
        )
    blocks = packed.shape[0]
    if bits == 8:
        rows = packed.reshape(blocks, -1, 64)
    elif bits == 4:
        data = packed.reshape(blocks, -1, 64)
        rows = torch.stack([data & 15, data >> 4], dim=2)
    elif bits == 2:
        data = packed.reshape(blocks, -1, 64)
        rows = torch.stack([data >> 2 * r & 3 for r in range(4)], dim=2)
    else:
        data = packed.reshape(blocks, -1, 3, 64)
        eight = [
            (data[:, :, r // 4] >> 2 * (r % 4) & 3) | (data[:, :, 2] >> (TOP_BIT[r % 4] + (r & 4)) & 1) << 2
            for r in range(8)
        ]
        rows = torch.stack(eight, dim=2)
    codes = rows.reshape(blocks, -1, 16, 4).transpose(1, 2).reshape(blocks * 16, -1)
    return codes[:n, :k].to(torch.int16).contiguous()


def padded_channels(channels: int, kernel: tuple[int, int]) -> int:
    """To how many channels each tap of a convolution is padded before its weight is packed.

    From 32 channels on to a multiple of 64, so that a tap fills whole AMX tiles; fewer only to a multiple of 4, the
    row of the layout, lest the pad be most of the work (3 channels: 3·3·4 = 36 of K = 64). A 1×1 kernel has one tap,
    so padding K is enough.
    """
    if kernel == (1, 1):
        return channels
    return _round_up(channels, 64 if channels >= 32 else 4)


def integer_levels(levels: Tensor) -> tuple[tuple[int, ...], float]:
    """Writes a quantizer's ``levels`` (float ``[L]``, ascending) as integers over a common divisor.

    Returns:
        ``(whole, divisor)`` with ``levels == whole / divisor``; the divisor is a power of two where there is one, e.g.
        StatsQ's ±¼, ±¾ are ±1, ±3 over 4, so that dividing a scale by it is exact; else a small integer (DoReFa's
        15), and the equality holds to rounding.

    Raises:
        LowbitError: no such numbers of magnitude <= 128 exist (TTQ's learned levels, for example).
    """
    values = levels.detach().double().cpu()
    for divisor in (1, 2, 4, 8, 16, 32, 64, 128, 3, 5, 7, 9, 15):
        whole = torch.round(values * divisor)
        exact = torch.equal(whole, values * divisor)
        close = exact or (divisor % 2 and torch.allclose(whole, values * divisor, rtol=0, atol=1e-5))
        if close and whole.abs().max() <= LARGEST_LEVEL and (whole.diff() > 0).all():
            return tuple(int(level) for level in whole), float(divisor)
    shown = ", ".join(f"{v:g}" for v in values.tolist())
    raise LowbitError(
        f"levels {shown} are no integers of magnitude <= {LARGEST_LEVEL} over a common divisor, so integer "
        "kernels cannot use them; DenseShift, StatsQ, S3, PoT or LSQ weights can be packed"
    )


def largest_k(levels: tuple[int, ...]) -> int:
    """The largest K for which no sum of 8-bit activations times ``levels`` can leave int32."""
    return LARGEST_SUM // (LARGEST_ACTIVATION * max(abs(level) for level in levels))


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed weight of a linear layer or a convolution; `pack_weight` makes it.

    Args:
        data: uint8, see `pack`; K counts padded channels (`padded_channels`).
        levels: integers, ascending, at most 2^bits of them, magnitudes <= 128; of 8 bits consecutive ones, -128 to
            127. No tensor, so that a compiled graph holds them as constants.
        scale: float32 ``[N]``.
        sums: int32 ``[N]``, the sum of ``levels[code]`` over k, pads left out; kernels correct activations that are
            stored with an offset by it.
        bits: 2, 3, 4 or 8.
        shape: the weight's: ``(N, K)``, or ``(N, C, ky, kx)``.
        dtype: floating-point type of the dequantized weight.

    Where a model's own code expects a tensor (``F.linear(x, layer.weight)``, ``layer.weight.abs()``), a packed weight
    stands for its `dequantize`: torch's functions and methods take it. Each of them unpacks the weight anew.
    """

    data: Tensor
    levels: tuple[int, ...]
    scale: Tensor
    sums: Tensor
    bits: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Where the packed bytes are."""
        return self.data.device

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Hand the dequantized weight to a function of torch that was given a packed one."""

        def dense(leaf: Any) -> Any:
            return leaf.dequantize() if isinstance(leaf, PackedWeight) else leaf

        args, kwargs = tree_map(dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What a tensor has besides: that of the dequantized weight."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"a packed weight has no attribute {name!r}")
        return getattr(self.dequantize(), name)

    @property
    def kernel(self) -> tuple[int, int]:
        """(ky, kx); (1, 1) for a linear layer."""
        return (self.shape[2], self.shape[3]) if len(self.shape) == 4 else (1, 1)

    @property
    def k(self) -> int:
        """K as packed: taps × padded channels, before it is rounded up to 64."""
        return self.kernel[0] * self.kernel[1] * padded_channels(self.shape[1], self.kernel)

    @property
    def table(self) -> tuple[int, ...]:
        """What the operators take as ``levels``: none of 8 bits, whose bytes are the levels themselves."""
        return () if self.bits == 8 else self.levels

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, scales and sums."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale, self.sums))

    def to(self, *args: Any, **kwargs: Any) -> "PackedWeight | Tensor":
        """The same weight with its tensors on a device; with a dtype among the arguments, the dequantized weight."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None or device is None:
            return self.dequantize().to(*args, **kwargs)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), sums=self.sums.to(device))

    def codes(self) -> Tensor:
        """The codes as the quantizer gave them, int16, of the weight's shape."""
        stored = weight_codes(self.data, self.bits, self.shape)
        return (stored.to(torch.uint8).view(torch.int8).to(torch.int16) - self.levels[0]) if self.bits == 8 else stored

    def integers(self) -> Tensor:
        """``levels[codes]``, int16, of the weight's shape."""
        return torch.tensor(self.levels, dtype=torch.int16, device=self.data.device)[self.codes().long()]

    def dequantize(self) -> Tensor:
        """The weight itself, of its shape and ``dtype``; the product is rounded to float32 first."""
        return (self.integers() * self.scale.reshape(-1, *(1,) * (len(self.shape) - 1))).to(self.dtype)

    def check(self) -> None:
        """Refuse tensors and numbers that `pack_weight` does not make.

        Raises:
            LowbitError: naming the first that does not fit.
        """
        _check_bits(self.bits)
        if len(self.shape) not in (2, 4) or min(self.shape) < 1:
            raise LowbitError(
                f"a packed weight of shape {list(self.shape)} is not allowed; [N, K] and [N, C, ky, kx] are"
            )
        low, high = self.levels[0], self.levels[-1]
        ascending = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not 2 <= len(self.levels) <= 2**self.bits or not ascending or max(-low, high) > LARGEST_LEVEL:
            raise LowbitError(f"levels {low} ... {high} are not ascending integers of {self.bits} bits")
        if self.bits == 8 and (len(self.levels) != high - low + 1 or high > 127):
            raise LowbitError(f"levels {low} ... {high} of 8 bits are not consecutive integers from -128 to 127")
        if math.prod(self.shape[1:]) > largest_k(self.levels):
            raise LowbitError(f"a packed weight {list(self.shape)} has so many inputs that its sums could leave int32")
        n = self.shape[0]
        wanted = {
            "data": (torch.uint8, packed_shape(self.bits, n, self.k)),
            "scale": (torch.float32, (n,)),
            "sums": (torch.int32, (n,)),
        }
        for name, (dtype, shape) in wanted.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise LowbitError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it should be {dtype} {list(shape)}")
        if len(self.levels) < 2**self.bits:
            first, last = (int(bound) for bound in self.codes().aminmax())
            if first < 0 or last >= len(self.levels):
                raise LowbitError(f"codes go from {first} to {last}; there are {len(self.levels)} levels")


def _of_dense(name: str) -> Callable:
    return lambda self, *args: getattr(self.dequantize(), name)(*args)


for _name in ("add", "sub", "mul", "truediv", "pow", "radd", "rsub", "rmul", "matmul", "neg", "abs", "getitem", "len"):
    setattr(PackedWeight, f"__{_name}__", _of_dense(f"__{_name}__"))  # operators are looked up in the class


def weight_codes(data: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """What `pack` was given, int16, of a weight of ``shape`` (2 or 4 dimensions) from its packed bytes."""
    if len(shape) == 2:
        return unpack(data, bits, *shape)
    n, c, ky, kx = shape
    padded = padded_channels(c, (ky, kx))
    taps = unpack(data, bits, n, ky * kx * padded).reshape(n, ky, kx, padded)
    return taps[..., :c].permute(0, 3, 1, 2).contiguous()


def pack_weight(codes: Tensor, levels: Tensor, scale: Tensor | float = 1.0, bits: int | None = None) -> PackedWeight:
    """Packs what a `lowbit.quantizers.WeightQuantizer` gives: ``codes(...)``, ``levels`` and ``scale(...)``.

    Args:
        codes: integers, ``[N, K]`` of a linear layer or ``[N, C, ky, kx]`` of a convolution (``groups=1``).
        levels: ``[L]``, ascending, integers up to a common divisor (see `integer_levels`).
        scale: broadcastable to the weight; one number, or one for each output channel.
        bits: 2, 3, 4 or 8; None takes the fewest that hold L codes.

    Raises:
        LowbitError: a shape, table, scale or number of bits that does not fit, or so many inputs K that the sum could
            leave int32.
    """
    if codes.ndim not in (2, 4):
        raise LowbitError(f"codes are {list(codes.shape)}; [N, K] and [N, C, ky, kx] can be packed")
    if codes.is_floating_point() or codes.is_complex():
        raise LowbitError(f"codes are {codes.dtype}; integers, indices into levels, can be packed")
    if levels.ndim != 1 or not 2 <= levels.numel() <= 256:
        raise LowbitError(f"levels are {list(levels.shape)}; 2 to 256 levels in one dimension can be packed")
    if bits is None:
        bits = next(width for width in BITS if levels.numel() <= 2**width)
    _check_bits(bits)
    if levels.numel() > 2**bits:
        raise LowbitError(f"{levels.numel()} levels do not fit into bits={bits}; {2**bits} do")
    low, high = (int(bound) for bound in codes.aminmax()) if codes.numel() else (0, 0)
    if low < 0 or high >= levels.numel():
        raise LowbitError(f"codes go from {low} to {high}; of {levels.numel()} levels they go from 0 on")
    whole, divisor = integer_levels(levels)
    if bits == 8 and whole != tuple(range(max(-128, whole[0]), min(127, whole[-1]) + 1)):
        raise LowbitError(
            f"levels {whole[0]} ... {whole[-1]} ({len(whole)} of them) cannot be packed with 8 bits: consecutive whole "
            "numbers from -128 to 127 can"
        )
    n, k = codes.shape[0], codes[0].numel() if len(codes) else 0
    if k > largest_k(whole):
        raise LowbitError(
            f"K={k} inputs are too many: levels up to {max(map(abs, whole))} times 8-bit activations stay inside "
            f"int32 up to K={largest_k(whole)}; split the layer's inputs into parts and add their outputs, or use "
            "fewer bits"
        )
    table = torch.tensor(whole, dtype=torch.int32, device=codes.device)
    sums = table[codes.reshape(n, -1).long()].sum(1, dtype=torch.int32)
    return PackedWeight(
        pack(_as_matrix(codes, whole[0] if bits == 8 else 0), bits),
        whole,
        _row_scale(scale, divisor, codes),
        sums,
        bits,
        tuple(codes.shape),
    )


def _as_matrix(codes: Tensor, first: int) -> Tensor:
    """``[N, C, ky, kx]`` as ``[N, ky·kx·padded C]``; ``first`` is added, modulo 256."""
    codes = (codes.to(torch.int16) + first) & 255
    if codes.ndim == 2:
        return codes
    n, c, ky, kx = codes.shape
    taps = codes.permute(0, 2, 3, 1)
    return F.pad(taps, (0, padded_channels(c, (ky, kx)) - c)).reshape(n, -1)


def _row_scale(scale: Tensor | float, divisor: float, codes: Tensor) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float32, device=codes.device).detach()
    ones = (1,) * (codes.ndim - 1)
    if scale.numel() != 1 and scale.shape not in ((len(codes),), (len(codes), *ones)):
        raise LowbitError(
            f"scale is {list(scale.shape)}; a packed weight {list(codes.shape)} has one scale, or one for each of its "
            f"{len(codes)} output channels"
        )
    scale = scale.reshape(-1).expand(len(codes)).clone()
    if not torch.isfinite(scale).all():
        raise LowbitError("scale holds NaN or infinity; it has to be finite")
    return scale / divisor
