"""PACT: activations clipped at a learned threshold, then rounded to a uniform grid.

Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", arXiv 1805.06085, equations 1-3.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit.errors import LowbitError
from lowbit.quantizers.base import ActivationQuantizer, CalibratedQuantizer, IntegerForm, Method, as_float, method

__all__ = ["PACT", "pact", "pact_codes"]

SMALLEST_ALPHA = 1e-8


def _steps(bits: int) -> int:
    if not (isinstance(bits, int) and 1 <= bits <= 8):
        raise LowbitError(f"bits={bits!r} is not allowed: PACT takes 1 to 8 bits")
    return 2**bits - 1


def _position(x: Tensor, alpha: Tensor, steps: int) -> Tensor:
    """``round(clip(x, 0, α)/α · steps)``: integers 0 ... steps, as floats."""
    return torch.round((x / alpha).clamp(0, 1) * steps)


class _PACT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return (_position(x, alpha, steps) / steps) * alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, alpha = ctx.saved_tensors
        clipped = x >= alpha
        grad_x = torch.where((x >= 0) & ~clipped, grad, 0)
        return grad_x, torch.where(clipped, grad, 0).sum_to_size(alpha.shape), None


def pact(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Fake-quantize ``x`` to ``round(y·(2^k-1)/α)·α/(2^k-1)`` with ``y = clip(x, 0, α)`` (equations 1 and 2).

    The gradient to ``x`` passes for 0 <= x < α. The gradient to ``α`` is the sum of the gradients where x >= α
    (equation 3); unlike LSQ's, it ignores the rounding errors inside the range.

    Args:
        x: float, any shape; half precision is computed in float32 and cast back.
        alpha: positive float, a scalar or broadcastable against ``x``.
        bits: 1 to 8.

    Returns:
        A tensor like ``x``.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    return _PACT.apply(as_float(x), as_float(alpha), _steps(bits)).to(x.dtype)  # cast outside, see statsq


def pact_codes(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """The integers 0 ... 2^bits-1 that `pact` multiplies by α/(2^bits-1), int16."""
    with torch.no_grad():
        return _position(as_float(x), as_float(alpha), _steps(bits)).to(torch.int16)


@method("pact")
class PACT(Method):
    """Learned clipping of a layer's input, one threshold for each layer. It replaces the ReLU before it.

    The paper regularizes α by the same L2 penalty as the weights. The optimizer's weight decay does so, unless α is
    excluded from it.

    Args:
        bits: 1 to 8.
        alpha: starting threshold; None takes the largest value of the first batch. The penalty shrinks a threshold
            that starts too large, such as the usual 10.0.
    """

    bits: Annotated[int, Field(ge=1, le=8)] = 4
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 10.0

    def activation(self, channel_dim: int = -1) -> ActivationQuantizer:
        """See `Method.activation`; ``channel_dim`` has no effect."""
        return PACTActivation(self)


class PACTActivation(CalibratedQuantizer):
    """`pact` in front of a layer; with ``alpha=None`` the first batch sets the threshold."""

    def __init__(self, config: PACT):
        super().__init__()
        self.config = config
        self.alpha = nn.Parameter(torch.tensor(torch.inf if config.alpha is None else config.alpha))

    def positive_alpha(self) -> Tensor:
        """The threshold, clamped to be positive; its gradient still flows, so training can raise it again."""
        alpha = self.alpha
        return alpha.clamp_min(SMALLEST_ALPHA).detach() + (alpha - alpha.detach())  # the bracket is exactly zero

    def begin(self, x: Tensor) -> tuple[int, dict[str, Tensor]]:
        """See `CalibratedQuantizer.begin`."""
        return 1, {"alpha": as_float(x.detach()).amax().clamp_min(SMALLEST_ALPHA)}

    def forward(self, x: Tensor) -> Tensor:
        return pact(x, self.positive_alpha(), self.config.bits) if self.ready(x) else x

    @property
    def levels(self) -> Tensor:
        steps = _steps(self.config.bits)
        return torch.arange(steps + 1, dtype=torch.float32, device=self.alpha.device) / steps

    def codes(self, x: Tensor) -> Tensor:
        self.require_calibrated()
        return pact_codes(x, self.positive_alpha(), self.config.bits)

    def integer(self) -> IntegerForm:
        """See `ActivationQuantizer.integer`."""
        self.require_calibrated()
        steps = _steps(self.config.bits)
        return IntegerForm(self.positive_alpha().detach() / steps, 0, steps)
