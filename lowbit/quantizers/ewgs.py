"""EWGS: rounding whose gradient depends on how far each value was moved.

Lee, Kim and Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv 2104.00903, equation 4.
The grid and its learned step are LSQ's. This combination is ours; the paper learns the bounds of an interval.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method
from lowbit.quantizers.lsq import LSQ, LSQWeight, lsq, lsq_range

__all__ = ["EWGS", "ewgs"]


class _ElementWiseScale(torch.autograd.Function):
    """The identity; its gradient is ``g·(1 + δ·sign(g)·error)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Tensor, delta: float) -> Tensor:
        ctx.save_for_backward(error)
        ctx.delta = delta
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (error,) = ctx.saved_tensors
        return grad * (1 + ctx.delta * grad.sign() * error), None, None


def ewgs(
    x: Tensor, step: Tensor, bits: int, delta: float = 0.2, signed: bool = True, grad_scale: float | None = None
) -> Tensor:
    """Fake-quantize ``x`` as `lsq` does, to ``step · round(clip(x/step, -Qn, Qp))``, with another gradient to ``x``.

    Inside the range this is ``g·(1 + δ·sign(g)·(v - round(v)))``, v = x/step: larger where a descent step pulls the
    value toward the level it was rounded to, and smaller where it pushes it away (equation 4). Outside it is zero.
    The gradient to ``step`` is that of `lsq`. With ``delta=0`` this is `lsq`.

    The error ``v - round(v)`` is in units of the step, as in the comparison by Nagel et al. (arXiv 2203.11086), the
    source of the default. The paper's own δ is in units of the clip range, 2^b-1 steps: it is 2^b-1 times this one.

    Args:
        x: float, any shape; half precision is computed in float32 and cast back.
        step: positive float, broadcastable against ``x``; its shape says what shares a step.
        bits: 2 to 16 signed, 1 to 16 unsigned.
        delta: δ, finite, at least 0.
        signed: True for codes -2^(b-1) ... 2^(b-1)-1, False for 0 ... 2^b-1.
        grad_scale: factor of the gradient to ``step``; None means LSQ's 1/sqrt(Qp · elements that share a step).

    Returns:
        A tensor like ``x``.

    Raises:
        LowbitError: ``bits`` or ``delta`` out of range.
    """
    if not 0 <= delta < float("inf"):
        raise LowbitError(f"delta={delta!r} is not allowed; finite numbers from 0 are (0.2 by default)")
    wide = as_float(x)
    with torch.no_grad():
        position = torch.clamp(wide / as_float(step), *lsq_range(bits, signed))
        error = position - position.round()
    return lsq(_ElementWiseScale.apply(wide, error, float(delta)), step, bits, signed, grad_scale).to(x.dtype)


@method("ewgs")
class EWGS(Method):
    """Element-wise gradient scaling of weights on LSQ's grid, see `ewgs`.

    Args:
        bits: 2 to 8.
        granularity: elements that share one learned step: the whole "tensor", or an output "channel".
        delta: how much the gradient depends on the rounding error; 0 is LSQ.
    """

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    granularity: Literal["tensor", "channel"] = "tensor"
    delta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return EWGSWeight(self, weight)


class EWGSWeight(LSQWeight):
    """`ewgs` as a parametrization with one latent, the full-precision weight; all but the gradient is LSQ's."""

    config: EWGS  # type: ignore[assignment]  # of the settings, the inherited methods read `bits` alone

    def __init__(self, config: EWGS, weight: Tensor):
        super().__init__(LSQ(bits=config.bits, granularity=config.granularity), weight)
        self.config = config

    def forward(self, latent: Tensor) -> Tensor:
        return ewgs(latent, self.positive_step(), self.config.bits, self.config.delta)
