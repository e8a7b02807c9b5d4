"""APoT: sums of a few powers of two, so that the levels lie closer together near the clipping threshold than PoT's.

Li, Dong and Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization for Neural
Networks", ICLR 2020, arXiv 1909.13144. The value sets are those of the authors' code; normalization and gradients
are those of its CIFAR-10 part, see `apot`.
"""

from itertools import product
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method, nearest

__all__ = ["APoT", "apot", "apot_codes", "apot_levels"]

# bits -> for each summand, the exponents k of its values 2^-k, besides 0
SUMMANDS = {2: ((1,),), 3: ((1, 2, 3),), 4: ((1, 2, 4), (3,)), 5: ((1, 3, 5), (2, 4, 6))}
SMALLEST_STD = 1e-5
SMALLEST_ALPHA = 1e-8


def apot_levels(bits: int) -> Tensor:
    """The value set, scaled to a maximum of 1: float32 ``[2^bits - 1]``, ascending, zero included.

    {0, ±1} at 2 bits; {0, ±¼, ±½, ±1} at 3; {0, ±.1, ±.2, ±.3, ±.4, ±.6, ±.8, ±1} at 4; 31 values at 5.
    """
    if bits not in SUMMANDS:
        raise LowbitError(f"bits={bits!r} is not allowed: APoT takes 2 to 5 bits")
    choices = [(0.0, *(2.0**-k for k in exponents)) for exponents in SUMMANDS[bits]]
    sums = torch.tensor(sorted(sum(terms) for terms in product(*choices)))
    positive = sums[1:] / sums[-1]
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def _normalized(w: Tensor) -> Tensor:
    """``(w - mean) / std`` over the whole layer; mean and deviation are statistics without gradient."""
    w = as_float(w)
    fixed = w.detach()
    std = fixed.std(correction=1 if w.numel() > 1 else 0).clamp_min(SMALLEST_STD)
    return (w - fixed.mean()) / std


class _APoT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, bits: int) -> Tensor:
        levels = apot_levels(bits).to(w)
        x = w / alpha
        value = levels[nearest(x, levels).long()]
        ctx.save_for_backward(x, value, alpha)
        return value * alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, value, alpha = ctx.saved_tensors
        slope = torch.where(x.abs() > 1, x.sign(), value - x)
        return grad, (grad * slope).sum_to_size(alpha.shape), None


def apot(w: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Fake-quantize ``w`` to ``α`` times the level nearest to ``clip((w - mean)/(α·std), -1, 1)``.

    Mean and (unbiased) standard deviation are those of the whole layer. They are not restored afterwards, so the
    result has a deviation of about 1, independent of that of ``w``, and a normalization should follow. The gradient to
    the normalized weight is the identity everywhere, also where it is clipped, so the gradient to ``w`` is ``G/std``.
    With x the normalized weight divided by α, the gradient to ``α`` is the sum of ``G·sign(x)`` outside ±1 and of
    ``G·(level - x)`` inside.

    The authors' code exists in two forms. This is the form for CIFAR-10; the form for ImageNet also differentiates mean
    and deviation, and stops the gradient of clipped weights. The paper adds a small ε to the deviation, the code does
    not; here the deviation is at least 1e-5. The CIFAR-10 form has no value set for 2 bits; {0, ±1} is that of the
    ImageNet form.

    Args:
        w: float, any shape.
        alpha: positive float scalar tensor, the clipping threshold in standard deviations.
        bits: 2 to 5.

    Returns:
        A tensor like ``w``.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    return _APoT.apply(_normalized(w), as_float(alpha), bits).to(w.dtype)  # cast outside, see statsq


def apot_codes(w: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Indices into `apot_levels`, int16."""
    with torch.no_grad():
        return nearest(_normalized(w) / as_float(alpha), apot_levels(bits).to(w.device))


@method("apot")
class APoT(Method):
    """Additive powers of two with weight normalization and a learned clipping threshold for each layer.

    Args:
        bits: 2 to 5.
        alpha: starting threshold in standard deviations, 3.0 in the authors' code.
    """

    bits: Annotated[int, Field(ge=2, le=5)] = 4
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return APoTWeight(self, weight)


class APoTWeight(WeightQuantizer):
    """`apot` as a parametrization with one latent, the full-precision weight, and the threshold as a parameter."""

    def __init__(self, config: APoT, weight: Tensor):
        super().__init__()
        self.config = config
        self.alpha = nn.Parameter(torch.tensor(config.alpha, dtype=weight.dtype, device=weight.device))

    def positive_alpha(self) -> Tensor:
        """The threshold, clamped to be positive; its gradient still flows, so training can raise it again."""
        alpha = self.alpha
        return alpha.clamp_min(SMALLEST_ALPHA).detach() + (alpha - alpha.detach())  # the bracket is exactly zero

    def forward(self, latent: Tensor) -> Tensor:
        return apot(latent, self.positive_alpha(), self.config.bits)

    @property
    def levels(self) -> Tensor:
        return apot_levels(self.config.bits).to(self.alpha.device)

    def codes(self, latent: Tensor) -> Tensor:
        return apot_codes(latent, self.positive_alpha(), self.config.bits)

    def scale(self, latent: Tensor) -> Tensor:
        return as_float(self.positive_alpha().detach()).reshape((1,) * latent.ndim)
