"""DoReFa: weights squeezed into ±1 by a tanh, activations clipped to 0 ... 1, both on a uniform grid without a scale.

Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients",
arXiv 1606.06160, sections 2.3 and 2.4. Its quantized gradients are not part of this library.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quantizers.base import ActivationQuantizer, IntegerForm, Method, WeightQuantizer, as_float, method

__all__ = ["DoReFa", "dorefa", "dorefa_activation", "dorefa_activation_codes", "dorefa_codes", "dorefa_scale"]

SMALLEST_RANGE = 1e-8  # lower bound of max|tanh w|, so that values and gradients of a layer of zeros are finite


def _steps(bits: int) -> int:
    if not (isinstance(bits, int) and 1 <= bits <= 8):
        raise LowbitError(f"bits={bits!r} is not allowed: DoReFa takes 1 to 8 bits")
    return 2**bits - 1


class _Round(torch.autograd.Function):
    """Straight-through rounding; unlike ``x + (round(x) - x).detach()`` its value is exactly ``round(x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _ScaledSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return torch.where(w >= 0, 1.0, -1.0).to(w.dtype) * dorefa_scale(w, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _position(w: Tensor, bits: int) -> Tensor:
    """``(2^bits - 1)·(tanh(w)/(2·max|tanh w|) + ½)``: the position of a weight on the grid 0 ... 2^bits - 1."""
    t = torch.tanh(as_float(w))
    largest = t.abs().amax()
    # Not clamp_min: torch 2.14 changed its gradient at the bound.
    largest = torch.where(largest < SMALLEST_RANGE, SMALLEST_RANGE, largest)
    return (t / (2 * largest) + 0.5) * _steps(bits)


def _clip(x: Tensor) -> Tensor:
    """``clip(x, 0, 1)``, whose gradient passes for 0 <= x <= 1; that of clamp stops at 0 and 1 since torch 2.14."""
    inside = (x >= 0) & (x <= 1)
    return torch.where(inside, x, x.detach().clamp(0, 1))


def dorefa(w: Tensor, bits: int) -> Tensor:
    """Fake-quantize a weight: ``2·quantize_k(tanh(w)/(2·max|tanh w|) + ½) - 1``, or ``sign(w)·mean|w|`` at 1 bit.

    quantize_k(v) = round(v·(2^k-1))/(2^k-1), straight-through. The levels are the odd multiples of 1/(2^k-1) from -1
    to 1, without zero. The maximum is that of the whole layer and is differentiated like the tanh, as by automatic
    differentiation in the authors' code; equally large weights share its gradient equally. The result has a size of
    about 1, independent of that of ``w``, so a normalization should follow. At 1 bit the mean is that of the whole
    layer, without gradient; the gradient to ``w`` is the identity everywhere, and ±0 counts as positive (the authors'
    code gives 0).

    Args:
        w: float, any shape.
        bits: 1 to 8.

    Returns:
        A tensor like ``w``.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    steps = _steps(bits)
    if bits == 1:
        return _ScaledSign.apply(as_float(w)).to(w.dtype)
    return ((2 * _Round.apply(_position(w, bits)) - steps) / steps).to(w.dtype)


def dorefa_codes(w: Tensor, bits: int) -> Tensor:
    """Indices into the levels -1, -1 + 2/(2^bits-1), ..., 1 of `dorefa`, int16."""
    with torch.no_grad():
        return (w >= 0).to(torch.int16) if bits == 1 else torch.round(_position(w, bits)).to(torch.int16)


def dorefa_scale(w: Tensor, bits: int) -> Tensor:
    """The factor of the levels: mean|w| at 1 bit, else 1; detached, ``[1, 1, ...]``."""
    w = as_float(w.detach())
    scale = w.abs().mean().clamp_min(torch.finfo(w.dtype).tiny) if bits == 1 else w.new_ones(())
    return scale.reshape((1,) * w.ndim)


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """Fake-quantize an activation: ``quantize_k(clip(x, 0, 1))``; the gradient passes for 0 <= x <= 1.

    Args:
        x: float, any shape.
        bits: 1 to 8.

    Returns:
        A tensor like ``x``, its values multiples of 1/(2^bits-1).

    Raises:
        LowbitError: ``bits`` out of range.
    """
    steps = _steps(bits)
    return (_Round.apply(_clip(as_float(x)) * steps) / steps).to(x.dtype)


def dorefa_activation_codes(x: Tensor, bits: int) -> Tensor:
    """The numerators of `dorefa_activation`, 0 ... 2^bits-1, int16."""
    with torch.no_grad():
        return torch.round(torch.clamp(as_float(x), 0, 1) * _steps(bits)).to(torch.int16)


@method("dorefa")
class DoReFa(Method):
    """Uniform grids without learned parameters, for weights and (non-negative) activations.

    Args:
        bits: 1 to 8.
    """

    bits: Annotated[int, Field(ge=1, le=8)] = 4

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return DoReFaWeight(self)

    def activation(self, channel_dim: int = -1) -> ActivationQuantizer:
        """See `Method.activation`; ``channel_dim`` has no effect."""
        return DoReFaActivation(self)


class DoReFaWeight(WeightQuantizer):
    """`dorefa` as a parametrization with one latent, the full-precision weight."""

    def __init__(self, config: DoReFa):
        super().__init__()
        self.config = config

    def forward(self, latent: Tensor) -> Tensor:
        return dorefa(latent, self.config.bits)

    @property
    def levels(self) -> Tensor:
        steps = _steps(self.config.bits)
        return (2 * torch.arange(steps + 1, dtype=torch.float32) - steps) / steps

    def codes(self, latent: Tensor) -> Tensor:
        return dorefa_codes(latent, self.config.bits)

    def scale(self, latent: Tensor) -> Tensor:
        return dorefa_scale(latent, self.config.bits)

    @property
    def has_scale(self) -> bool:
        return self.config.bits == 1


class DoReFaActivation(ActivationQuantizer):
    """`dorefa_activation` in front of a layer; negative inputs become 0, so it also replaces a ReLU before it."""

    def __init__(self, config: DoReFa):
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return dorefa_activation(x, self.config.bits)

    @property
    def levels(self) -> Tensor:
        steps = _steps(self.config.bits)
        return torch.arange(steps + 1, dtype=torch.float32) / steps

    def codes(self, x: Tensor) -> Tensor:
        return dorefa_activation_codes(x, self.config.bits)

    def integer(self) -> IntegerForm:
        """See `ActivationQuantizer.integer`."""
        steps = _steps(self.config.bits)
        return IntegerForm(torch.tensor(1 / steps), 0, steps)
