"""LSQ+: activations on a uniform grid whose step and offset are learned, for ranges that are not symmetric.

Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization", CVPR
Workshops 2020, arXiv 2004.09576, section 3. Use it with LSQ's weights: ``QuantConfig(LSQ(...), LSQPlus(...))``.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit.errors import LowbitError
from lowbit.quantizers.base import ActivationQuantizer, CalibratedQuantizer, IntegerForm, Method, as_float, method
from lowbit.quantizers.lsq import SMALLEST_STEP, PositiveStep, lsq_range, shared_scale

__all__ = ["LSQPlus", "lsqplus", "lsqplus_codes", "lsqplus_start"]

SAMPLE = 2**16


class _LSQPlus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor, low: int, high: int, grad_scale: float) -> Tensor:
        codes = torch.round(((x - offset) / step).clamp(low, high))
        ctx.save_for_backward(x, step, offset)
        ctx.range, ctx.grad_scale = (low, high), grad_scale
        # Step times level (code + offset/step), so that levels near zero keep their digits.
        return (codes + offset / step) * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, offset = ctx.saved_tensors
        low, high = ctx.range
        position = (x - offset) / step
        inside = (position > low) & (position < high)
        grad_x = torch.where(inside, grad, 0)
        slope = torch.where(inside, position.round() - position, position.clamp(low, high))
        grad_step = (grad * slope).sum_to_size(step.shape) * ctx.grad_scale
        grad_offset = torch.where(inside, 0, grad).sum_to_size(offset.shape) * ctx.grad_scale
        return grad_x, grad_step, grad_offset, None, None, None


def lsqplus(
    x: Tensor, step: Tensor, offset: Tensor, bits: int, signed: bool = False, grad_scale: float | None = None
) -> Tensor:
    """Fake-quantize ``x`` to ``step · round(clip((x - offset)/step, n, p)) + offset``.

    With v = (x - offset)/step the gradient to ``x`` passes strictly inside the clip range, n < v < p, and is zero
    outside. The gradient to ``step`` is ``round(v) - v`` inside and n or p outside; the gradient to ``offset`` is 0
    inside and 1 outside. These two are summed over the elements that share them and multiplied by ``grad_scale``.

    Args:
        x: float, any shape; half precision is computed in float32 and cast back.
        step: positive float, broadcastable against ``x``.
        offset: β, float, broadcastable against ``x``.
        bits: 2 to 16 signed, 1 to 16 unsigned.
        signed: True for (n, p) = (-2^(b-1), 2^(b-1)-1), False for (0, 2^b-1). Both reach the same grids; the offset is
            then the value of another code.
        grad_scale: factor of the gradients to ``step`` and ``offset``; None means LSQ's 1/sqrt(p · elements that share
            a step).

    Returns:
        A tensor like ``x``.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    low, high = lsq_range(bits, signed)
    if grad_scale is None:
        grad_scale = shared_scale(high, x.numel(), step)
    return _LSQPlus.apply(as_float(x), as_float(step), as_float(offset), low, high, grad_scale).to(x.dtype)


def lsqplus_codes(x: Tensor, step: Tensor, offset: Tensor, bits: int, signed: bool = False) -> Tensor:
    """The integer codes ``round(clip((x - offset)/step, n, p))`` of `lsqplus`, int16."""
    with torch.no_grad():
        return ((as_float(x) - offset) / step).clamp(*lsq_range(bits, signed)).round().to(torch.int16)


def lsqplus_start(
    x: Tensor, bits: int, signed: bool = False, init: Literal["mse", "minmax"] = "mse", rounds: int = 20
) -> tuple[Tensor, Tensor]:
    """Starting step and offset for the activations ``x`` (section 3.2), float scalars, detached.

    "minmax" covers the range of the values: ``step = (max - min)/(p - n)``, ``offset = min - n·step``. A single outlier
    then makes the steps wide. "mse", as in the paper, continues from there to a minimum of the mean squared
    quantization error. The paper follows the gradient of this error; here two least-squares solutions alternate,
    ``rounds`` times, so the error never grows: the step and offset for the current codes, and the codes for these. If
    there are more than `SAMPLE` values, it uses a sample of that size, drawn with a fixed seed. If all values are
    equal, the step is a hundred-thousandth of their size, so that the levels differ in float32.

    Raises:
        LowbitError: ``bits`` out of range, an unknown ``init``, or an ``x`` without elements.
    """
    if x.numel() == 0:
        raise LowbitError(f"x of shape {list(x.shape)} has no values to set a starting step; give a batch with items")
    if init not in ("mse", "minmax"):
        raise LowbitError(f"init={init!r} is not allowed; 'mse' and 'minmax' are")
    low, high = lsq_range(bits, signed)
    x = as_float(x.detach()).flatten()
    least, most = torch.aminmax(x)
    narrowest = (1e-5 * torch.maximum(-least, most)).clamp_min(SMALLEST_STEP)
    step = torch.maximum((most - least) / (high - low), narrowest)
    offset = least - low * step
    if init == "minmax":
        return step, offset
    if x.numel() > SAMPLE:
        chosen = torch.randint(x.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(0))
        x = x[chosen.to(x.device)]
    x = x.double()
    for _ in range(rounds):
        codes = ((x - offset) / step).clamp(low, high).round()
        centered = codes - codes.mean()
        spread = centered.square().mean()
        if spread == 0:  # all values are equal, so they determine no step
            break
        step = torch.maximum(((centered * x).mean() / spread).to(step.dtype), narrowest)
        offset = (x.mean() - step * codes.mean()).to(offset.dtype)
    return step, offset


@method("lsqplus")
class LSQPlus(Method):
    """Learned step and offset for a layer's input, one of each for the whole tensor.

    Args:
        bits: 1 to 8; at least 2 if signed.
        signed: whether the offset is the value of the middle code of the grid (True) or of the lowest (False). Both
            reach the same grids, but training moves them differently.
        init: how the first batch sets step and offset: "mse" or "minmax", as in `lsqplus_start`.
    """

    bits: Annotated[int, Field(ge=1, le=8)] = 4
    signed: bool = False
    init: Literal["mse", "minmax"] = "mse"

    @model_validator(mode="after")
    def _two_signed_codes(self) -> Any:
        if self.signed and self.bits == 1:
            raise ValueError("bits=1 is not allowed with signed=True, which takes 2 to 8 bits")
        return self

    def activation(self, channel_dim: int = -1) -> ActivationQuantizer:
        """See `Method.activation`; ``channel_dim`` has no effect."""
        return LSQPlusActivation(self)


class LSQPlusActivation(PositiveStep, CalibratedQuantizer):
    """`lsqplus` in front of a layer; the first batch sets step and offset, of shape ``[]``.

    ``levels`` is n + β/s ... p + β/s, so the output is the step times a level. As in LSQ, the gradient scale counts the
    elements of one sample.
    """

    def __init__(self, config: LSQPlus):
        super().__init__()
        self.config = config
        self.step = nn.Parameter(torch.tensor(torch.inf))
        self.offset = nn.Parameter(torch.tensor(torch.inf))

    def begin(self, x: Tensor) -> tuple[int, dict[str, Tensor]]:
        """See `CalibratedQuantizer.begin`."""
        step, offset = lsqplus_start(x, self.config.bits, self.config.signed, self.config.init)
        return 1, {"step": step, "offset": offset}

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready(x):
            return x
        bits, signed = self.config.bits, self.config.signed
        grad_scale = shared_scale(lsq_range(bits, signed)[1], math.prod(x.shape[1:]), self.step)
        return lsqplus(x, self.positive_step(), self.offset, bits, signed, grad_scale)

    @property
    def levels(self) -> Tensor:
        low, high = lsq_range(self.config.bits, self.config.signed)
        codes = torch.arange(low, high + 1, dtype=torch.float32, device=self.step.device)
        return codes + (self.offset / self.positive_step()).detach()

    def codes(self, x: Tensor) -> Tensor:
        self.require_calibrated()
        bits, signed = self.config.bits, self.config.signed
        return lsqplus_codes(x, self.positive_step(), self.offset, bits, signed) - lsq_range(bits, signed)[0]

    def integer(self) -> IntegerForm:
        """See `ActivationQuantizer.integer`."""
        self.require_calibrated()
        offset = self.offset.detach()
        return IntegerForm(
            self.positive_step().detach(), *lsq_range(self.config.bits, self.config.signed), -offset, offset
        )
