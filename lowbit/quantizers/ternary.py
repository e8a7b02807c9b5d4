"""Ternary weights: TWN, whose scale is a statistic, and TTQ, whose two scales are learned.

TWN: Li, Zhang and Liu, "Ternary Weight Networks", arXiv 1605.04711. TTQ: Zhu, Han, Mao and Dally, "Trained Ternary
Quantization", ICLR 2017, arXiv 1612.01064, equations 6-8. Details as in the authors' code.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method, per_row

__all__ = ["Ternary", "ternary", "ternary_codes", "ternary_scale", "ttq", "ttq_codes", "ttq_levels"]

SMALLEST_SCALE = 1e-8

Granularity = Literal["tensor", "channel"]


def _spanned(w: Tensor, granularity: Granularity) -> tuple[int, ...]:
    if granularity not in ("tensor", "channel"):
        raise LowbitError(f"granularity={granularity!r} is not allowed; 'tensor' and 'channel' are")
    return per_row(w) if granularity == "channel" else tuple(range(w.ndim))


def _beyond(w: Tensor, threshold: Tensor) -> Tensor:
    """0, 1 or 2, int16, for ``w < -threshold``, in between (the bounds included) and ``w > threshold``."""
    return (1 + (w > threshold).to(torch.int16) - (w < -threshold).to(torch.int16)).to(torch.int16)


def _twn_threshold(w: Tensor, granularity: Granularity) -> Tensor:
    return 0.7 * as_float(w.detach()).abs().mean(_spanned(w, granularity), keepdim=True)


def ternary_scale(w: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """TWN's scale: the mean of all |w| above 0.7·mean|w|, detached, ``[1, 1, ...]`` or ``[rows, 1, ...]``."""
    dims = _spanned(w, granularity)
    size = as_float(w.detach()).abs()
    kept = size > _twn_threshold(w, granularity)
    scale = (size * kept).sum(dims, keepdim=True) / kept.sum(dims, keepdim=True).clamp_min(1)
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


class _TWN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, granularity: Granularity) -> Tensor:
        return (ternary_codes(w, granularity) - 1) * ternary_scale(w, granularity)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def ternary(w: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Fake-quantize ``w`` with TWN: ``α·sign(w)`` where ``|w| > 0.7·mean|w|``, else 0; the gradient is the identity.

    α, the mean of all |w| above the threshold, minimizes the squared error; no gradient flows through either.

    Args:
        w: float ``[rows, ...]``.
        granularity: elements that share threshold and scale: the whole "tensor" (as published) or a row ("channel").

    Returns:
        A tensor like ``w``.

    Raises:
        LowbitError: an unknown granularity.
    """
    return _TWN.apply(as_float(w), granularity).to(w.dtype)  # cast outside, see statsq


def ternary_codes(w: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Indices into the levels (-1, 0, 1) of `ternary`, int16."""
    with torch.no_grad():
        return _beyond(as_float(w), _twn_threshold(w, granularity))


def ttq_levels(w_p: Tensor, w_n: Tensor) -> Tensor:
    """TTQ's value set over its scale ``w_p``: ``(-w_n/w_p, 0, 1)``, detached, float ``[3]``, ascending."""
    one = torch.ones_like(w_p)
    return as_float(torch.stack([-w_n / w_p, 0 * one, one]).detach())


class _TTQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, w_p: Tensor, w_n: Tensor, threshold: float) -> Tensor:
        codes = ttq_codes(w, threshold)
        ctx.save_for_backward(codes, w_p, w_n)
        return ttq_levels(w_p, w_n)[codes.long()] * w_p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, w_p, w_n = ctx.saved_tensors
        positive, negative = codes == 2, codes == 0
        grad_w = torch.where(positive, w_p * grad, torch.where(negative, w_n * grad, grad))
        return grad_w, (grad * positive).sum(), -(grad * negative).sum(), None


def ttq(w: Tensor, w_p: Tensor, w_n: Tensor, threshold: float = 0.05) -> Tensor:
    """Fake-quantize ``w`` with TTQ: ``w_p`` where ``w > Δ``, ``-w_n`` where ``w < -Δ``, else 0 (equation 6).

    Δ = threshold·max|w|, without gradient. The gradient to ``w`` is ``w_p·G``, ``G`` or ``w_n·G`` in the positive, the
    zero and the negative range (equation 8). The gradient to ``w_p`` is the sum of G over the positive range, and the
    gradient to ``w_n`` is minus its sum over the negative range (equation 7, with the minus of the true derivative, as
    in the code).

    Args:
        w: float, any shape.
        w_p: positive float scalar tensor.
        w_n: positive float scalar tensor.
        threshold: t of the paper, 0.05 in the authors' code.

    Returns:
        A tensor like ``w``.
    """
    return _TTQ.apply(as_float(w), as_float(w_p), as_float(w_n), threshold).to(w.dtype)  # cast outside, see statsq


def ttq_codes(w: Tensor, threshold: float = 0.05) -> Tensor:
    """Indices into `ttq_levels`, int16."""
    with torch.no_grad():
        w = as_float(w)
        return _beyond(w, threshold * w.abs().amax())


@method("ternary")
class Ternary(Method):
    """Weights of three values.

    Args:
        bits: 2, the width of a code; one of the four codes is never used.
        variant: "twn" (see `ternary`), or "ttq" (see `ttq`) with two learned scales for each layer.
        granularity: for "twn", elements that share a scale: the "tensor", as published, or an output "channel".
        threshold: for "ttq", the share of max|w| below which a weight is 0.
        init: for "ttq", the starting scales: "one", as in the authors' code (a normalization should follow the layer),
            or the "mean" size of the starting weights that each scale replaces.
    """

    bits: Literal[2] = 2
    variant: Literal["twn", "ttq"] = "twn"
    granularity: Granularity = "tensor"
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05
    init: Literal["one", "mean"] = "one"

    @model_validator(mode="after")
    def _one_scale_a_layer(self) -> Any:
        if self.variant == "ttq" and self.granularity == "channel":
            raise ValueError("granularity='channel' is not allowed with variant='ttq', whose scales belong to a layer")
        return self

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return TWNWeight(self) if self.variant == "twn" else TTQWeight(self, weight)


class TWNWeight(WeightQuantizer):
    """`ternary` as a parametrization with one latent, the full-precision weight."""

    def __init__(self, config: Ternary):
        super().__init__()
        self.config = config

    def forward(self, latent: Tensor) -> Tensor:
        return ternary(latent, self.config.granularity)

    @property
    def levels(self) -> Tensor:
        return torch.tensor([-1.0, 0.0, 1.0])

    def codes(self, latent: Tensor) -> Tensor:
        return ternary_codes(latent, self.config.granularity)

    def scale(self, latent: Tensor) -> Tensor:
        return ternary_scale(latent, self.config.granularity)


class TTQWeight(WeightQuantizer):
    """`ttq` as a parametrization with one latent, the full-precision weight, and the two scales as parameters.

    `scale` is w_p, so `levels` depends on the parameters: (-w_n/w_p, 0, 1).
    """

    w_p: nn.Parameter
    w_n: nn.Parameter

    def __init__(self, config: Ternary, weight: Tensor):
        super().__init__()
        self.config = config
        codes = ttq_codes(weight, config.threshold)
        for name, code in (("w_p", 2), ("w_n", 0)):
            start = weight.new_ones(())
            if config.init == "mean" and (codes == code).any():
                start = weight[codes == code].abs().mean()
            self.register_parameter(name, nn.Parameter(start))

    def positive_scales(self) -> tuple[Tensor, Tensor]:
        """w_p and w_n, clamped to be positive; their gradients still flow, so training can raise them again."""
        p, n = as_float(self.w_p), as_float(self.w_n)
        return _positive(p), _positive(n)

    def forward(self, latent: Tensor) -> Tensor:
        return ttq(latent, *self.positive_scales(), self.config.threshold)

    @property
    def levels(self) -> Tensor:
        return ttq_levels(*self.positive_scales())

    def codes(self, latent: Tensor) -> Tensor:
        return ttq_codes(latent, self.config.threshold)

    def scale(self, latent: Tensor) -> Tensor:
        return self.positive_scales()[0].detach().reshape((1,) * latent.ndim)


def _positive(scale: Tensor) -> Tensor:
    return scale.clamp_min(SMALLEST_SCALE).detach() + (scale - scale.detach())  # the bracket is exactly zero
