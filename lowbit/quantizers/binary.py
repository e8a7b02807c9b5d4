"""Binary weights: the sign, times the mean size of its output channel.

The Binary-Weight-Network of Rastegari, Ordonez, Redmon and Farhadi, "XNOR-Net: ImageNet Classification Using Binary
Convolutional Neural Networks", ECCV 2016, arXiv 1603.05279, section 3.1.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method, per_row

__all__ = ["Binary", "binary", "binary_codes", "binary_scale"]

Gradient = Literal["published", "ste"]


def binary_scale(w: Tensor) -> Tensor:
    """The scale ``mean|w|`` of each row (dim 0), detached, with kept dims: ``[rows, 1, ...]``."""
    scale = as_float(w.detach()).abs().mean(per_row(w), keepdim=True)
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


class _Binary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, gradient: Gradient) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(w)
        return (2 * binary_codes(w) - 1) * binary_scale(w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        slope = (w.abs() <= 1).to(w.dtype)
        if ctx.gradient == "published":
            slope = 1 / w[0].numel() + slope * binary_scale(w)
        return grad * slope, None


def binary(w: Tensor, gradient: Gradient = "published") -> Tensor:
    """Fake-quantize ``w`` to ``α·sign(w)`` with α the mean of |w| over its row; ±0 counts as positive.

    The published gradient is ``G·(1/n + α·[|w| <= 1])``, n the number of elements in a row: the sign is
    straight-through inside ±1, and α is differentiated as if each weight were alone in its row. Since α is small, plain
    SGD moves such latents slowly (the authors' code multiplies by n, among other things); Adam is not affected.
    ``"ste"`` is ``G·[|w| <= 1]``.

    Before each step, the authors' code also subtracts the mean over the input channels from the latents and clips them
    to ±1. The paper's algorithm 1 does not, and neither does this function. In the authors' code the sign of 0 is 0,
    which is no level here.

    Args:
        w: float ``[rows, ...]``; each row (dim 0) has its own scale.
        gradient: "published", or "ste" for the plain straight-through estimator inside ±1.

    Returns:
        A tensor like ``w``.

    Raises:
        LowbitError: an unknown gradient.
    """
    if gradient not in ("published", "ste"):
        raise LowbitError(f"gradient={gradient!r} is not allowed; 'published' and 'ste' are")
    return _Binary.apply(as_float(w), gradient).to(w.dtype)  # cast outside, see statsq


def binary_codes(w: Tensor) -> Tensor:
    """Indices into the levels (-1, 1) of `binary`, int16."""
    with torch.no_grad():
        return (w >= 0).to(torch.int16)


@method("binary")
class Binary(Method):
    """Weights of two values, with one scale for each output channel.

    Args:
        bits: 1.
        gradient: "published" or "ste"; see `binary`.
    """

    bits: Literal[1] = 1
    gradient: Gradient = "published"

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return BinaryWeight(self)


class BinaryWeight(WeightQuantizer):
    """`binary` as a parametrization with one latent, the full-precision weight."""

    def __init__(self, config: Binary):
        super().__init__()
        self.config = config

    def forward(self, latent: Tensor) -> Tensor:
        return binary(latent, self.config.gradient)

    @property
    def levels(self) -> Tensor:
        return torch.tensor([-1.0, 1.0])

    def codes(self, latent: Tensor) -> Tensor:
        return binary_codes(latent)

    def scale(self, latent: Tensor) -> Tensor:
        return binary_scale(latent)
