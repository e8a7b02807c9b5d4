"""Floating-point activations times ±2^S by integer addition: the DenseShift paper's other trick.

A float32 is sign, 8 bits of exponent and 23 of fraction, worth ±2^(exponent-127)·1.fraction. Adding S to the exponent
multiplies by 2^S, flipping the sign bit negates: one integer addition to the bits does both (Li et al., ICCV 2023,
arXiv 2208.09708). As published that goes wrong where the exponent field says something else: zeros and subnormals
(field 0) and results beyond the largest float (field 255). `shift_multiply` handles them and equals the multiplication
bit for bit; ``raw=True`` shows the trick as it is, and so its failures.

On x86 the multiplication costs less than the shift (one instruction against three), and gives the same bits: so
``torch.ops.lowbit.shift_linear_float`` decodes packed weights to floats in the caches and multiplies. What it computes
is defined by `linear`, to the bit, also how products are added up; the compiled kernels do the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import native, ops
from lowbit.kernels.packing import PackedWeight, unpack

__all__ = ["linear", "shift_conv2d_float", "shift_linear_float", "shift_multiply"]

SIGN = -(2**31)
FIELD = 0x7F800000
FRACTION = 0x007FFFFF
INFINITY = FIELD
LARGEST_SHIFT = 127


def shift_multiply(x: Tensor, exponent: Tensor, negative: Tensor, raw: bool = False) -> Tensor:
    """``x · (-1)^negative · 2^exponent`` by integer operations on the bits of ``x``.

    Args:
        x: float32.
        exponent: integers S from 0 to 127; broadcasts against ``x``.
        negative: bool, where the weight is negative; broadcasts against ``x``.
        raw: only ``bits(x) + ((negative << 31) | (S << 23))``, modulo 2^32, without care for zero (0·2^S gives
            2^(S-127)), subnormals, overflow, infinity and NaN.

    Returns:
        float32; unless ``raw``, the correctly rounded product (always exact, or infinite).

    Raises:
        LowbitError: ``x`` is not float32, or an exponent is out of range.
    """
    if x.dtype != torch.float32:
        raise LowbitError(f"x is {x.dtype}; shift_multiply takes float32")
    in_range = not exponent.numel() or 0 <= exponent.min() <= exponent.max() <= LARGEST_SHIFT
    if exponent.is_floating_point() or not in_range:
        raise LowbitError(f"exponents are {exponent.dtype}; integers from 0 to {LARGEST_SHIFT} are allowed")
    bits = x.contiguous().view(torch.int32)
    exponent = exponent.to(torch.int32)
    sign = torch.where(negative, SIGN, 0).to(torch.int32)
    if raw:
        return (bits + (sign | exponent << 23)).view(torch.float32)  # int32 addition wraps: modulo 2^32
    sign = sign ^ (bits & SIGN)
    magnitude = bits & ~SIGN
    field, fraction = magnitude >> 23, magnitude & FRACTION
    normal = torch.where(field + exponent >= 255, INFINITY, magnitude + (exponent << 23))
    # A subnormal is fraction·2^-149. As a float of its own the fraction is normal, so its field can be added to; while
    # the sum stays below 1 the product is subnormal too, and its bits are the fraction's, shifted.
    as_float = fraction.to(torch.float32).view(torch.int32)
    lifted = as_float + ((exponent - 149) << 23)
    still = (as_float >> 23) + exponent - 149 < 1
    subnormal = torch.where(still, fraction << exponent.clamp_max(23), lifted)
    magnitude = torch.where(field == 255, magnitude, torch.where(field == 0, subnormal, normal))
    return (sign | magnitude).view(torch.float32)


def exponents(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """``(exponent, negative)`` of a packed weight of powers of two, int32 and bool, of its shape.

    Raises:
        LowbitError: a level is no ±2^S.
    """
    odd = [level for level in weight.levels if abs(level) not in {2**s for s in range(8)}]
    if odd:
        raise LowbitError(f"levels {odd} are no ±2^S; only DenseShift's are all")
    integers = weight.integers()
    return torch.log2(integers.abs().float()).round().to(torch.int32), integers < 0


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: float32 ``x`` ``[M, K]`` times whole-numbered ``weight`` ``[N, K]``, to ``[M, N]``.

    Each product and each sum is rounded to float32 on its own. An output has four sums, of the k with the same k % 4,
    each added up in ascending k from 0; ``y = ((s0 + s1) + (s2 + s3)) · scale + bias``.
    """
    pad = -x.shape[1] % 4
    x, weight = F.pad(x, (0, pad)), F.pad(weight.to(x.dtype), (0, pad))
    sums = x.new_zeros(x.shape[0], weight.shape[0], 4)
    for k in range(0, x.shape[1], 4):
        sums = sums + x[:, None, k : k + 4] * weight[None, :, k : k + 4]
    y = ((sums[..., 0] + sums[..., 1]) + (sums[..., 2] + sums[..., 3])) * scale
    return y if bias is None else y + bias


def shift_linear_float(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose float32 activations stay as they are: ``[..., K]`` → ``[..., N]``, see `linear`.

    Args:
        x: float32.
        weight: of `pack_weight`, on ``x``'s device; any levels, though only powers of two need no multiplication.
        bias: float32 ``[N]``.

    Raises:
        LowbitError: a dtype, shape or device that does not fit.
    """
    ops.check_dims(x, weight, 2)
    return torch.ops.lowbit.shift_linear_float(x, weight.data, weight.table, weight.scale, bias, weight.bits)


def shift_conv2d_float(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """The convolution (``groups=1``) of float32 ``[B, C, H, W]``, as `shift_linear_float` of copies of its windows.

    Raises:
        LowbitError: a dtype, shape or device that does not fit.
    """
    ops.check_dims(x, weight, 4)
    n, c, ky, kx = weight.shape
    moves = [(v, v) if isinstance(v, int) else (v[0], v[1]) for v in (stride, padding, dilation)]
    sizes = zip(x.shape[2:], (ky, kx), *moves, strict=True)
    height, width = (((size + 2 * p - d * (k - 1) - 1) // s + 1) for size, k, s, p, d in sizes)
    padded = weight.k // (ky * kx)
    windows = F.unfold(x, (ky, kx), moves[2], moves[1], moves[0])  # [B, C·ky·kx, L]
    rows = F.pad(windows.reshape(len(x), c, ky * kx, -1).permute(0, 3, 2, 1), (0, padded - c)).flatten(2)
    y = torch.ops.lowbit.shift_linear_float(rows, weight.data, weight.table, weight.scale, bias, weight.bits)
    return y.permute(0, 2, 1).reshape(len(x), n, height, width)


# ---- the operator ----

torch.library.define(
    "lowbit::shift_linear_float",
    "(Tensor x, Tensor packed, int[] levels, Tensor scale, Tensor? bias, int bits) -> Tensor",
)


def _check(
    x: Tensor, packed: Tensor, levels: Sequence[int], scale: Tensor, bias: Tensor | None, bits: int
) -> tuple[int, ...]:
    """The output's shape."""
    if x.dtype != torch.float32:
        raise LowbitError(f"x is {x.dtype}; activations that stay floats are float32")
    if x.ndim < 1 or not x.shape[-1]:
        raise LowbitError(f"x is {list(x.shape)}; a linear layer takes [..., K]")
    ops.check_devices(x, packed=packed, scale=scale, bias=bias)
    ops.check_weight(packed, levels, scale, bias, bits, x.shape[-1])
    return (*x.shape[:-1], scale.shape[0])


def _fake(x, packed, levels, scale, bias, bits):
    return x.new_empty(_check(x, packed, levels, scale, bias, bits))


def _any(x, packed, levels, scale, bias, bits):
    shape = _check(x, packed, levels, scale, bias, bits)
    codes = unpack(packed, bits, scale.shape[0], x.shape[-1])
    if bits == 8:
        weight = codes.to(torch.uint8).view(torch.int8)
    else:
        weight = torch.tensor(levels, dtype=torch.float32, device=x.device)[codes.long()]
    return linear(x.reshape(-1, x.shape[-1]), weight, scale, bias).reshape(shape)


def _cpu(x, packed, levels, scale, bias, bits):
    if not ops.use_native():
        return _any(x, packed, levels, scale, bias, bits)
    out = x.new_empty(_check(x, packed, levels, scale, bias, bits))
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    native.run_floats(
        (x.data_ptr(), packed.data_ptr(), scale.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()),
        (bits, x.numel() // x.shape[-1], x.shape[-1], scale.shape[0], torch.get_num_threads()),
        levels,
    )
    return out


torch.library.register_fake("lowbit::shift_linear_float", _fake)
torch.library.impl("lowbit::shift_linear_float", "CompositeExplicitAutograd", _any)
torch.library.impl("lowbit::shift_linear_float", "CPU", _cpu)
torch.library.impl("lowbit::shift_linear_float", "Autograd", torch.library.fallthrough_kernel)
