"""DeepShift-PS: powers of two and zero, trained through a shift and a sign for each weight.

Elhoushi et al., "DeepShift: Toward Multiplication-Less Neural Networks", CVPR Workshops 2021,
arXiv 1905.13298, section 3 (DeepShift-PS); range, gradient and initialization as in the authors' code.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method
from lowbit.quantizers.scaling import nearest_codes, rms, row_scale

__all__ = ["DeepShiftPS", "deepshift_ps", "deepshift_ps_codes", "deepshift_ps_latents", "deepshift_ps_levels"]


def _lowest(bits: int) -> int:
    if not (isinstance(bits, int) and 2 <= bits <= 6):
        raise LowbitError(f"bits={bits!r} is not allowed: DeepShift-PS takes 2 to 6 bits")
    return -(2 ** (bits - 1) - 2)


def deepshift_ps_levels(bits: int) -> Tensor:
    """The value set {0, ±2^p : p = -(2^(bits-1)-2) ... 0}, float32, ascending: {0, ±1} at 2 bits, 7 values at 3."""
    positive = 2.0 ** torch.arange(_lowest(bits), 1, dtype=torch.float32)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def _shift_and_sign(p: Tensor, s: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return torch.round(p.clamp(_lowest(bits), 0)), torch.sign(torch.round(s))


class _DeepShiftPS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, s: Tensor, bits: int) -> Tensor:
        shift, sign = _shift_and_sign(p, s, bits)
        weight = torch.exp2(shift) * sign
        ctx.save_for_backward(weight)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad * weight * math.log(2), grad, None


def deepshift_ps(p: Tensor, s: Tensor, bits: int) -> Tensor:
    """The DeepShift-PS weight 2^round(clamp(p))·sign(round(s)), p clamped to [-(2^(bits-1)-2), 0].

    Both roundings go half to even, so the weight is zero where |s| <= ½. In the backward pass, roundings and clamp are
    straight-through: dL/dp = G·W·ln 2 (so the shift of a zero does not move), but dL/ds = G, without the factor 2^p.

    Args:
        p: the shift latent, float, any shape; in training `DeepShiftPS` keeps it inside the range.
        s: the sign latent, of the same shape.
        bits: 2 to 6; at 2 the weight is ternary, 0 or ±1, and ``p`` has no effect. The smallest levels at 6 bits, down
            to 2^-30, do not exist in float16.

    Returns:
        Float tensor of the latents' shape, every element 0 or ±2^p.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    return _DeepShiftPS.apply(p, s, bits)


def deepshift_ps_codes(p: Tensor, s: Tensor, bits: int) -> Tensor:
    """Indices into `deepshift_ps_levels` of the weight that these latents give, int16."""
    with torch.no_grad():
        shift, sign = _shift_and_sign(p, s, bits)
        lowest = _lowest(bits)
        return ((shift - lowest + 1) * sign).to(torch.int16) + (1 - lowest)


def deepshift_ps_latents(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Latents (p, s), integers as float32, that give level index ``codes`` (int, 0 ... 2^bits-2)."""
    lowest = _lowest(bits)
    index = codes - (1 - lowest)
    return (index.abs() - 1 + lowest).clamp_min(lowest).float(), index.sign().float()


@method("deepshift_ps")
class DeepShiftPS(Method):
    """Powers of two with zero, by a trained shift and a trained sign; two latents per weight.

    Train it with RAdam at a learning rate of 0.01, as its authors do. Neighboring levels are 1 apart in the shift
    latent, so learning rates that suit ordinary weights hardly move it. `lowbit.train` clamps the shifts to their
    range before each step, as the authors' code does in its forward pass.

    Args:
        bits: 2 to 6; one bit pattern in 2^bits is unused, and 2 bits are ternary.
        scale: "none" uses 0, ±2^p without a factor, as published, if a normalization follows; "statistical" keeps each
            output channel at the root mean square of its weight at conversion; "pow2" rounds that to a power of 2.
        init: "random" draws s ~ U(-1, 1) and p ~ U(-10, -1), then clamps p, as the authors' convolutions do (their
            linear layers draw p from its whole range since a later version); "project" starts from the given weight:
            without a scale by the authors' conversion p = round(log2|w|), s = sign(w); with one from the nearest
            levels, after a search for the best scale of each row.
    """

    bits: Annotated[int, Field(ge=2, le=6)] = 4
    scale: Literal["none", "statistical", "pow2"] = "none"
    init: Literal["random", "project"] = "random"

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return DeepShiftPSWeight(self, weight)


class DeepShiftPSWeight(WeightQuantizer):
    """`deepshift_ps` as a parametrization with two latents, shift and sign, times the optional per-channel scale."""

    rms: Tensor

    def __init__(self, config: DeepShiftPS, weight: Tensor):
        super().__init__()
        self.config = config
        if config.scale != "none":
            self.register_buffer("rms", rms(weight))

    def forward(self, p: Tensor, s: Tensor) -> Tensor:
        weight = deepshift_ps(p, s, self.config.bits)
        if self.config.scale == "none":
            return weight
        return (weight * row_scale(weight, self.rms, self.config.scale)).to(weight.dtype)

    @property
    def levels(self) -> Tensor:
        return deepshift_ps_levels(self.config.bits)

    def codes(self, p: Tensor, s: Tensor) -> Tensor:
        return deepshift_ps_codes(p, s, self.config.bits)

    def scale(self, p: Tensor, s: Tensor) -> Tensor:
        if self.config.scale == "none":
            return torch.ones((1,) * p.ndim, dtype=p.dtype, device=p.device)
        with torch.no_grad():
            return row_scale(deepshift_ps(p, s, self.config.bits), self.rms, self.config.scale)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            lowest = _lowest(self.config.bits)
            if self.config.scale == "none":
                p, s = torch.round(torch.log2(as_float(weight).abs())).clamp(lowest, 0), torch.sign(weight)
            else:
                self.rms.copy_(rms(weight))
                whole = self.levels.to(weight.device) * 2.0**-lowest
                p, s = deepshift_ps_latents(nearest_codes(weight, whole, raw=False), self.config.bits)
            return p.to(weight.dtype), s.to(weight.dtype)

    def initialize_(self, p: Tensor, s: Tensor) -> None:
        if self.config.init == "random":
            with torch.no_grad():
                p.uniform_(-10, -1).clamp_(_lowest(self.config.bits), 0)
                s.uniform_(-1, 1)

    def before_step_(self, progress: float, p: Tensor, s: Tensor) -> None:
        with torch.no_grad():
            p.clamp_(_lowest(self.config.bits), 0)
