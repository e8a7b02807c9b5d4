"""Uniform: a grid with or without a level at zero, and with a learned, statistical or fixed step.

This method is ours. LSQ and StatsQ differ in three ways at once: the grid, the source of the step, and the gradient.
Here each is an option, so a factorial experiment can attribute an effect. Two combinations are the published methods.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method, per_row
from lowbit.quantizers.lsq import SMALLEST_STEP, PositiveStep

__all__ = ["Uniform", "uniform", "uniform_codes", "uniform_levels", "uniform_step"]

Grid = Literal["mid-rise", "mid-tread"]


def uniform_levels(bits: int, grid: Grid) -> Tensor:
    """The value set in steps, float32, ascending; at 2 bits ±½ and ±1½ (mid-rise) or -2, -1, 0, 1 (mid-tread)."""
    n = _half(bits, grid)
    return torch.arange(-n, n, dtype=torch.float32) + (0.5 if grid == "mid-rise" else 0.0)


def uniform_step(w: Tensor, bits: int, grid: Grid) -> Tensor:
    """The step of each row (dim 0), detached, with kept dims: StatsQ's for mid-rise, LSQ's start for mid-tread.

    These are 2·mean|w|/2^(b-1) and 2·mean|w|/sqrt(2^(b-1)-1); at 2 bits they differ by a factor of 2.
    """
    n = _half(bits, grid)
    mean = as_float(w.detach()).abs().mean(dim=per_row(w), keepdim=True)
    return (2 * mean / (n if grid == "mid-rise" else math.sqrt(n - 1))).clamp_min(SMALLEST_STEP)


def _half(bits: int, grid: Grid) -> int:
    if not (isinstance(bits, int) and 2 <= bits <= 8):
        raise LowbitError(f"bits={bits!r} is not allowed: a uniform grid takes 2 to 8 bits")
    if grid not in ("mid-rise", "mid-tread"):
        raise LowbitError(f"grid={grid!r} is not allowed; 'mid-rise' and 'mid-tread' are")
    return 2 ** (bits - 1)


def _rounded(w: Tensor, step: Tensor, bits: int, grid: Grid) -> Tensor:
    """The index of the level, from -n to n-1, as float; ties at a threshold as in `statsq` and `lsq`."""
    n = _half(bits, grid)
    return torch.round(w / step - (0.5 if grid == "mid-rise" else 0.0)).clamp(-n, n - 1)


class _Uniform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, step: Tensor, bits: int, grid: Grid, masked: bool, grad_scale: float) -> Tensor:
        level = _rounded(w, step, bits, grid) + (0.5 if grid == "mid-rise" else 0.0)
        ctx.save_for_backward(w, step, level)
        n = 2 ** (bits - 1)
        ctx.bounds, ctx.masked, ctx.grad_scale = (-n, n if grid == "mid-rise" else n - 1), masked, grad_scale
        return step * level

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, step, level = ctx.saved_tensors
        scaled = w / step
        inside = (scaled > ctx.bounds[0]) & (scaled < ctx.bounds[1])
        grad_w = torch.where(inside, grad, 0) if ctx.masked else grad
        if not ctx.needs_input_grad[1]:
            return grad_w, None, None, None, None, None
        slope = torch.where(inside, level - scaled, level)
        return grad_w, (grad * slope).sum_to_size(step.shape) * ctx.grad_scale, None, None, None, None


def uniform(
    w: Tensor, step: Tensor, bits: int, grid: Grid = "mid-rise", gradient: Literal["identity", "masked"] = "identity"
) -> Tensor:
    """Fake-quantize ``w`` to the nearest of ``step · uniform_levels(bits, grid)``.

    The gradient to ``w`` is the identity, or with "masked" zero outside the range: -n < w/step < n for mid-rise and
    -n < w/step < n-1 for mid-tread, n = 2^(b-1). The gradient to ``step`` is LSQ's: level - w/step inside the range
    and the level outside, times 1/sqrt((n-1) · elements that share a step).

    Args:
        w: float, any shape.
        step: positive float, broadcastable against ``w``.
        bits: 2 to 8.
        grid: "mid-rise" has no level at zero, "mid-tread" has one.
        gradient: to ``w``; "identity" passes everywhere, "masked" is zero outside the range.

    Returns:
        A tensor like ``w``.

    Raises:
        LowbitError: bits, grid or gradient out of range.
    """
    if gradient not in ("identity", "masked"):
        raise LowbitError(f"gradient={gradient!r} is not allowed; 'identity' and 'masked' are")
    grad_scale = 1 / math.sqrt((_half(bits, grid) - 1) * w.numel() / step.numel())
    return _Uniform.apply(as_float(w), as_float(step), bits, grid, gradient == "masked", grad_scale).to(w.dtype)


def uniform_codes(w: Tensor, step: Tensor, bits: int, grid: Grid) -> Tensor:
    """Indices into `uniform_levels`, int16."""
    with torch.no_grad():
        return (_rounded(as_float(w), step, bits, grid) + _half(bits, grid)).to(torch.int16)


@method("uniform")
class Uniform(Method):
    """A uniform grid for weights, one step for each output channel, every part an option.

    ``Uniform(grid="mid-rise", scale="statistical", gradient="identity")`` is StatsQ;
    ``Uniform(grid="mid-tread", scale="learned", gradient="masked")`` is LSQ per channel.

    Args:
        bits: 2 to 8.
        grid: "mid-rise" has no level at zero, "mid-tread" has one.
        scale: source of the step: "statistical" computes it from the weights in each forward pass, by `uniform_step`;
            "learned" starts from that value and trains it; "fixed" keeps that value.
        gradient: to the latent weight; "identity" passes everywhere, "masked" is zero outside the range.
    """

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    grid: Grid = "mid-rise"
    scale: Literal["statistical", "learned", "fixed"] = "statistical"
    gradient: Literal["identity", "masked"] = "identity"

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return UniformWeight(self, weight)


class UniformWeight(PositiveStep, WeightQuantizer):
    """`uniform` as a parametrization with one latent, the full-precision weight."""

    def __init__(self, config: Uniform, weight: Tensor):
        super().__init__()
        self.config = config
        start = uniform_step(weight, config.bits, config.grid)
        if config.scale == "learned":
            self.step = nn.Parameter(start)
        elif config.scale == "fixed":
            self.register_buffer("step", start)

    def forward(self, latent: Tensor) -> Tensor:
        step = self._step(latent)
        return uniform(latent, step, self.config.bits, self.config.grid, self.config.gradient)

    def _step(self, latent: Tensor) -> Tensor:
        if self.config.scale == "statistical":
            return uniform_step(latent, self.config.bits, self.config.grid)
        return self.positive_step()

    @property
    def levels(self) -> Tensor:
        return uniform_levels(self.config.bits, self.config.grid)

    def codes(self, latent: Tensor) -> Tensor:
        with torch.no_grad():
            return uniform_codes(latent, self._step(latent), self.config.bits, self.config.grid)

    def scale(self, latent: Tensor) -> Tensor:
        return self._step(latent).detach()
