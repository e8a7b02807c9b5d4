"""StatsQ: a mid-rise, zero-free uniform grid whose scale is a statistic of the weights, not a parameter.

Liu, Liu and Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv 2302.02210, section 4.1; details as in the authors' code.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method, per_row

__all__ = ["StatsQ", "cga_mask", "statsq", "statsq_codes", "statsq_scale"]


def statsq_scale(w: Tensor) -> Tensor:
    """The scale ``2·mean|w|`` of each row (dim 0), detached, with kept dims: ``[rows, 1, ...]``."""
    scale = 2 * as_float(w.detach()).abs().mean(dim=per_row(w), keepdim=True)
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


def _half_steps(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``round(clip(w/s)·n - ½)``: integers from -n to n-1, as floats."""
    if not (isinstance(bits, int) and 1 <= bits <= 8):
        raise LowbitError(f"bits={bits!r} is not allowed: StatsQ takes 1 to 8 bits")
    n = 2 ** (bits - 1)
    # At 1 bit, round-half-even would send w = -s to -2, off the grid, so the lower edge needs the same margin.
    # 1e-6 keeps the top inside the last level. It has no name, since torch.compile(dynamic=True) lifts a global number
    # out of an autograd.Function's forward as an input, and then fails.
    low = -1 + 1e-6 if bits == 1 else -1
    return torch.round(torch.clamp(as_float(w) / scale, low, 1 - 1e-6) * n - 0.5)


class _StatsQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int) -> Tensor:
        scale = statsq_scale(w)
        return scale * ((_half_steps(w, scale, bits) + 0.5) / 2 ** (bits - 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def statsq(w: Tensor, bits: int) -> Tensor:
    """Fake-quantize ``w`` with StatsQ: ``s·(round(clip(w/s, -1, 1-1e-6)·n - ½) + ½)/n``, n = 2^(bits-1).

    The levels divided by s are the odd multiples of 1/2^bits: ±¼ and ±¾ at 2 bits. The gradient to ``w`` is the
    identity everywhere, also where ``w`` is clipped, and no gradient flows through the scale.

    Args:
        w: float ``[rows, ...]``; each row (dim 0) has its own scale.
        bits: 1 to 8.

    Returns:
        A tensor like ``w``.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    # The cast stays outside: in torch 2.11 a cast that changes nothing, inside, makes compiled gradients zero.
    return _StatsQ.apply(as_float(w), bits).to(w.dtype)


def statsq_codes(w: Tensor, bits: int) -> Tensor:
    """Level indices of `statsq`, 0 ... 2^bits-1, int16."""
    with torch.no_grad():
        return (_half_steps(w, statsq_scale(w), bits) + 2 ** (bits - 1)).to(torch.int16)


def cga_mask(w: Tensor, bits: int, boundary: float) -> Tensor:
    """Mask of the weights that confidence-guided annealing lets move: those near a decision boundary of `statsq`.

    With ``y = clip(w/s, -1, 1)·n`` the boundaries are the integers k from -(n-1) to n-1; a weight may move if
    ``|y - k| <= boundary`` for one of them. Farther away, the network is confident of the level.

    Args:
        w: float ``[rows, ...]``, the latent weights.
        bits: 1 to 8, as in `statsq`.
        boundary: BR, in units of the distance between boundaries, 0 to 0.5; 0.005 in the paper.

    Returns:
        bool, of ``w``'s shape; True = may move.

    Raises:
        LowbitError: ``bits`` or ``boundary`` out of range.
    """
    check_boundary(boundary)
    if not (isinstance(bits, int) and 1 <= bits <= 8):
        raise LowbitError(f"bits={bits!r} is not allowed: StatsQ takes 1 to 8 bits")
    n = 2 ** (bits - 1)
    with torch.no_grad():
        y = torch.clamp(as_float(w) / statsq_scale(w), -1, 1) * n
        return (y - y.round().clamp(1 - n, n - 1)).abs() <= boundary


def check_boundary(boundary: float) -> None:
    """Raise LowbitError if ``boundary`` lies outside [0, 0.5]."""
    if not 0 <= boundary <= 0.5:
        raise LowbitError(f"boundary={boundary!r} is not allowed; 0 to 0.5 steps are (0.005 in the paper)")


@method("statsq")
class StatsQ(Method):
    """Statistical weight quantization of OFQ, one scale for each output channel.

    Args:
        bits: 1 to 8.
    """

    bits: Annotated[int, Field(ge=1, le=8)] = 4

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return StatsQWeight(self)


class StatsQWeight(WeightQuantizer):
    """`statsq` as a parametrization with one latent, the full-precision weight."""

    def __init__(self, config: StatsQ):
        super().__init__()
        self.config = config

    def forward(self, latent: Tensor) -> Tensor:
        return statsq(latent, self.config.bits)

    @property
    def levels(self) -> Tensor:
        n = 2 ** (self.config.bits - 1)
        return (torch.arange(-n, n, dtype=torch.float32) + 0.5) / n

    def codes(self, latent: Tensor) -> Tensor:
        return statsq_codes(latent, self.config.bits)

    def scale(self, latent: Tensor) -> Tensor:
        return statsq_scale(latent)
