"""PoT-STE: powers of two and zero, reached by rounding, trained straight through. The plain baseline.

The value set is that of Li, Dong and Wang, "Additive Powers-of-Two Quantization", ICLR 2020,
arXiv 1909.13144, equation 2, counted so that b bits hold 2^b - 1 values; scale and gradient are ours,
chosen to be those of the simplest straight-through scheme.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method, nearest, per_row

__all__ = ["PoT", "pot", "pot_codes", "pot_levels", "pot_scale"]

Scale = Literal["mean", "max"]


def pot_levels(bits: int) -> Tensor:
    """The value set {0, ±2^-k : k = 0 ... 2^(bits-1)-2}, float32, ascending: {0, ±1} at 2 bits, 7 values at 3."""
    if not (isinstance(bits, int) and 2 <= bits <= 5):
        raise LowbitError(f"bits={bits!r} is not allowed: PoT takes 2 to 5 bits")
    positive = 2.0 ** -torch.arange(2 ** (bits - 1) - 2, -1, -1, dtype=torch.float32)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def pot_scale(w: Tensor, scale: Scale = "mean") -> Tensor:
    """The scale of each row (dim 0): ``2·mean|w|`` ("mean") or ``max|w|`` ("max"), detached, ``[rows, 1, ...]``."""
    if scale not in ("mean", "max"):
        raise LowbitError(f"scale={scale!r} is not allowed; 'mean' and 'max' are")
    size = as_float(w.detach()).abs()
    value = 2 * size.mean(per_row(w), keepdim=True) if scale == "mean" else size.amax(per_row(w), keepdim=True)
    return value.clamp_min(torch.finfo(value.dtype).tiny)


class _PoT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int, scale: Scale) -> Tensor:
        s, levels = pot_scale(w, scale), pot_levels(bits).to(w.device)
        return s * levels[nearest(w / s, levels).long()]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def pot(w: Tensor, bits: int, scale: Scale = "mean") -> Tensor:
    """Fake-quantize ``w`` to the nearest of ``s·{0, ±2^-k}``; the gradient is the identity everywhere.

    Args:
        w: float ``[rows, ...]``; each row (dim 0) has its own scale s.
        bits: 2 to 5.
        scale: "mean" for s = 2·mean|w|, "max" for s = max|w|.

    Returns:
        A tensor like ``w``.

    Raises:
        LowbitError: ``bits`` out of range, or an unknown ``scale``.
    """
    return _PoT.apply(as_float(w), bits, scale).to(w.dtype)  # cast outside, see statsq


def pot_codes(w: Tensor, bits: int, scale: Scale = "mean") -> Tensor:
    """Indices into `pot_levels`, int16."""
    with torch.no_grad():
        return nearest(as_float(w) / pot_scale(w, scale), pot_levels(bits).to(w.device))


@method("pot")
class PoT(Method):
    """Powers of two with zero, straight-through.

    Args:
        bits: 2 to 5.
        scale: the per-channel scale, "mean" (2·mean|w|, robust) or "max" (max|w|, nothing is clipped).
    """

    bits: Annotated[int, Field(ge=2, le=5)] = 4
    scale: Scale = "mean"

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return PoTWeight(self)


class PoTWeight(WeightQuantizer):
    """`pot` as a parametrization with one latent, the full-precision weight."""

    def __init__(self, config: PoT):
        super().__init__()
        self.config = config

    def forward(self, latent: Tensor) -> Tensor:
        return pot(latent, self.config.bits, self.config.scale)

    @property
    def levels(self) -> Tensor:
        return pot_levels(self.config.bits)

    def codes(self, latent: Tensor) -> Tensor:
        return pot_codes(latent, self.config.bits, self.config.scale)

    def scale(self, latent: Tensor) -> Tensor:
        return pot_scale(latent, self.config.scale)
