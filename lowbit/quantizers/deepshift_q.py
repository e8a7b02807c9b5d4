"""DeepShift-Q: full-precision weights rounded to powers of two in the log domain, no zero, no scale.

Elhoushi et al., "DeepShift: Toward Multiplication-Less Neural Networks", CVPR Workshops 2021,
arXiv 1905.13298, section 3 (DeepShift-Q); the range as in the authors' code.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method

__all__ = ["DeepShiftQ", "deepshift_q", "deepshift_q_codes", "deepshift_q_levels"]

SPREAD = 0.35
"""Root mean square of starting weights that use all levels, whose range ends at 1."""


def _lowest(bits: int) -> int:
    if not (isinstance(bits, int) and 2 <= bits <= 6):
        raise LowbitError(f"bits={bits!r} is not allowed: DeepShift-Q takes 2 to 6 bits")
    return -(2 ** (bits - 1) - 1)


def deepshift_q_levels(bits: int) -> Tensor:
    """The value set {±2^p : p = -(2^(bits-1)-1) ... 0}, float32, ascending: ±½ and ±1 at 2 bits; no zero."""
    positive = 2.0 ** torch.arange(_lowest(bits), 1, dtype=torch.float32)
    return torch.cat([-positive.flip(0), positive])


def _exponent(w: Tensor, bits: int) -> Tensor:
    """``round(log2|w|)`` after clamping |w| to the range of the levels: integers, as floats; NaN stays NaN."""
    lowest = _lowest(bits)
    return torch.round(torch.log2(w.abs().clamp(2.0**lowest, 1.0))).clamp(lowest, 0)


class _DeepShiftQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int) -> Tensor:
        size = torch.exp2(_exponent(w, bits))
        return torch.where(w >= 0, size, -size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def deepshift_q(w: Tensor, bits: int) -> Tensor:
    """Fake-quantize ``w`` to sign(w)·2^round(log2|w|), |w| clamped to [2^-(2^(bits-1)-1), 1].

    The thresholds between 2^p and 2^(p+1) are geometric, 2^(p+½), with ties to the even exponent. The gradient is
    the identity everywhere, also outside the range. Zero has no logarithm and is no level: ±0.0 become the
    smallest positive level (the authors' code keeps an exact zero, one level more than the bits can hold).

    Args:
        w: float, any shape; there is no scale, so weights above 1 are clipped.
        bits: 2 to 6. The smallest levels at 6 bits, down to 2^-31, do not exist in float16.

    Returns:
        A tensor like ``w``.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    return _DeepShiftQ.apply(as_float(w), bits).to(w.dtype)  # cast outside, see statsq


def deepshift_q_codes(w: Tensor, bits: int) -> Tensor:
    """Indices into `deepshift_q_levels`, int16."""
    with torch.no_grad():
        half, w = 2 ** (bits - 1), as_float(w)
        steps = (_exponent(w, bits) - _lowest(bits)).to(torch.int16)
        return torch.where(w >= 0, half + steps, half - 1 - steps)


@method("deepshift_q")
class DeepShiftQ(Method):
    """Powers of two without zero, by rounding the logarithm of the weight.

    Args:
        bits: 2 to 6; 1 sign bit and bits-1 exponent bits. The range ends at 1, so with few bits all weights of
            ordinary size share the smallest level and only their signs remain; a normalization must absorb the gain.
        clamp: where |w| is clamped. "forward" clamps the value only. "latent" also clamps the full-precision weight
            itself before each training step, as the released code does: a weight then changes its sign only by a single
            step larger than the smallest level, so that at 2 or 3 bits hardly any sign ever changes.
        init: "project" starts from the given weight, as published. "spread" (ours) first scales it to a root mean
            square of `SPREAD`, so that the weights use all levels from the start.
    """

    bits: Annotated[int, Field(ge=2, le=6)] = 4
    clamp: Literal["forward", "latent"] = "forward"
    init: Literal["project", "spread"] = "project"

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return DeepShiftQWeight(self)


class DeepShiftQWeight(WeightQuantizer):
    """`deepshift_q` as a parametrization with one latent, the full-precision weight."""

    def __init__(self, config: DeepShiftQ):
        super().__init__()
        self.config = config

    def forward(self, latent: Tensor) -> Tensor:
        return deepshift_q(latent, self.config.bits)

    @property
    def levels(self) -> Tensor:
        return deepshift_q_levels(self.config.bits)

    def codes(self, latent: Tensor) -> Tensor:
        return deepshift_q_codes(latent, self.config.bits)

    has_scale = False

    def initialize_(self, latent: Tensor) -> None:
        if self.config.init == "spread":
            with torch.no_grad():
                latent.mul_(SPREAD / as_float(latent).square().mean().sqrt().clamp_min(1e-12))

    def scale(self, latent: Tensor) -> Tensor:
        return torch.ones((1,) * latent.ndim, dtype=latent.dtype, device=latent.device)

    def before_step_(self, progress: float, latent: Tensor) -> None:
        if self.config.clamp == "latent":
            with torch.no_grad():
                size = latent.abs().clamp(2.0 ** _lowest(self.config.bits), 1.0)
                latent.copy_(torch.where(latent >= 0, size, -size))
