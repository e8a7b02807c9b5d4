"""Floating-point activations times ±2^S by integer addition: the DenseShift paper's other trick.

A float32 is sign, 8 bits of exponent and 23 of fraction, worth ±2^(exponent-127)·1.fraction. Adding S to the exponent
multiplies by 2^S, flipping the sign bit negates: one integer addition to the bits does both (Li et al., ICCV 2023,
arXiv 2208.09708). As published that goes wrong where the exponent field says something else: zeros and subnormals
(field 0) and results beyond the largest float (field 255). `shift_multiply` handles them and equals the multiplication
bit for bit; ``raw=True`` shows the trick as it is, and so its failures.

On x86 the multiply-add costs less than the shift (one instruction against three), so no kernel is made of this. Bit
equality is promised for the products; how `shift_linear_float` adds them up is torch's matrix product's affair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.packing import PackedWeight

__all__ = ["shift_linear_float", "shift_multiply"]

SIGN = -(2**31)
FIELD = 0x7F800000
FRACTION = 0x007FFFFF
INFINITY = FIELD
LARGEST_SHIFT = 127


def shift_multiply(x: Tensor, exponent: Tensor, negative: Tensor, raw: bool = False) -> Tensor:
    """``x · (-1)^negative · 2^exponent`` by integer operations on the bits of ``x``.

    Args:
        x: float32.
        exponent: whole numbers S from 0 to 127; broadcasts against ``x``.
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
        raise LowbitError(f"exponents are {exponent.dtype}; whole numbers from 0 to {LARGEST_SHIFT} are allowed")
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


def shift_linear_float(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose float32 activations stay as they are: ``(x @ levels[codes].T) · scale + bias``.

    The products are exact whether shifted or multiplied; they are summed in float32 by torch's matrix product, in its
    order.
    """
    y = F.linear(x, weight.integers().to(x.dtype)) * weight.scale
    return y if bias is None else y + bias
