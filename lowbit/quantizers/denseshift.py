"""DenseShift: weights ±2^p and never zero, trained through a sign and a chain of binary gates.

Li et al., "DenseShift: Toward Accurate and Efficient Low-Bit Power-of-Two Quantization", ICCV 2023,
arXiv 2208.09708; the recursion, its surrogate gradient and the initialization as in the authors' code.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, method, refuse_nan
from lowbit.quantizers.scaling import kaiming_std, nearest_codes, rms, row_scale

__all__ = ["DenseShift", "denseshift", "denseshift_exponent", "denseshift_latents", "denseshift_levels"]

Recursion = Literal["nested", "sum"]
Surrogate = Literal["sqrt", "identity"]

GATES = {2: 1, 3: 3, 4: 7}  # bits -> exponent latents, 2^(b-1) - 1


def denseshift_levels(bits: int) -> Tensor:
    """The value set {±2^p : p = 0 ... 2^(bits-1)-1}, float32, ascending; zero is not in it."""
    positive = 2.0 ** torch.arange(_gates(bits) + 1, dtype=torch.float32)
    return torch.cat([-positive.flip(0), positive])


def _gates(bits: int) -> int:
    if bits not in GATES:
        raise LowbitError(f"bits={bits!r} is not allowed: DenseShift takes 2, 3 or 4 bits")
    return GATES[bits]


def _check_recursion(recursion: Recursion) -> None:
    if recursion not in ("nested", "sum"):
        raise LowbitError(f"recursion={recursion!r} is not allowed; 'nested' and 'sum' are")


def denseshift_exponent(*w_t: Tensor, recursion: Recursion = "nested") -> Tensor:
    """The exponent S_N, float: the number of open gates at the end of the chain (nested), or of all open gates (sum).

    Nested (as published): S_k = (S_(k-1)+1)·[t_k > 0], S_0 = 0. Sum: S_k = S_(k-1) + [t_k > 0].
    """
    _check_recursion(recursion)
    exponent = (w_t[0] > 0).to(w_t[0].dtype)
    for t in w_t[1:]:
        exponent = (exponent + 1) * (t > 0) if recursion == "nested" else exponent + (t > 0)
    return exponent


def _sign(t: Tensor) -> Tensor:
    """+1 where ``t >= 0`` (so ±0.0 give +1), else -1."""
    return torch.where(t >= 0, 1.0, -1.0).to(t.dtype)


class _DenseShift(torch.autograd.Function):
    """Forward sgn·2^S; backward the gradient of sgn·sqrt(S+1), or of the true power, with straight-through gates."""

    @staticmethod
    def forward(ctx: Any, surrogate: Surrogate, recursion: Recursion, w_sign: Tensor, *w_t: Tensor) -> Tensor:
        ctx.surrogate, ctx.recursion = surrogate, recursion
        ctx.save_for_backward(w_sign, *w_t)
        return _sign(w_sign) * torch.exp2(denseshift_exponent(*w_t, recursion=recursion))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w_sign, *w_t = ctx.saved_tensors
        gates = [(t > 0).to(grad.dtype) for t in w_t]
        before = [torch.zeros_like(gates[0])]  # S_(k-1) for k = 1 ... N, then S_N
        for gate in gates:
            before.append((before[-1] + 1) * gate if ctx.recursion == "nested" else before[-1] + gate)
        exponent = before[-1]
        if ctx.surrogate == "sqrt":
            size = torch.sqrt(exponent + 1)
            slope = 0.5 / size
        else:
            size = torch.exp2(exponent)
            slope = size * 0.6931471805599453  # d(2^S)/dS = 2^S·ln 2
        grad_exponent = grad * _sign(w_sign) * slope
        if ctx.recursion == "sum":
            return None, None, grad * size, *(grad_exponent for _ in gates)
        grads = []
        for gate, previous in zip(reversed(gates), reversed(before[:-1]), strict=True):
            grads.append(grad_exponent * (previous + 1))
            grad_exponent = grad_exponent * gate
        return None, None, grad * size, *reversed(grads)


def denseshift(
    w_sign: Tensor,
    *w_t: Tensor,
    surrogate: Surrogate = "sqrt",
    recursion: Recursion = "nested",
) -> Tensor:
    """The DenseShift weight sgn(t_sign)·2^S_N of 2, 4 or 8 latents (2, 3 or 4 bits).

    S_1 = [t_1 > 0], S_k = (S_(k-1)+1)·[t_k > 0]. In the backward pass, both binarizations are straight-through
    without a clipping window. With ``surrogate="sqrt"`` (as published) the gradient is that of sgn·sqrt(S_N+1):
    dL/dt_sign = G·sqrt(S_N+1), dL/dS_N = G·sgn/(2·sqrt(S_N+1)), dL/dt_k = dL/dS_k·(S_(k-1)+1),
    dL/dS_(k-1) = dL/dS_k·[t_k > 0]. With ``"identity"`` it is that of the true value sgn·2^S_N. With
    ``recursion="sum"`` (ours, for comparison) S_N counts the open gates, and dL/dt_k = dL/dS_N for every k.

    Args:
        w_sign: the sign latent, float, any shape; ±0.0 count as positive.
        w_t: 1, 3 or 7 gate latents of the same shape; a gate is open where its latent is > 0.
        surrogate: the value whose gradient is used: "sqrt" for sgn·sqrt(S_N+1), "identity" for the true value.
        recursion: the exponent: "nested" for the open gates at the end of the chain, "sum" for all open gates.

    Returns:
        Float tensor of the latents' shape, every element ±2^p.

    Raises:
        LowbitError: a wrong number of latents, an unknown surrogate or recursion, or NaN in a latent on the CPU.
    """
    if len(w_t) not in GATES.values():
        raise LowbitError(f"{len(w_t)} gate latents were given; DenseShift takes 1, 3 or 7 (2, 3 or 4 bits)")
    if surrogate not in ("sqrt", "identity"):
        raise LowbitError(f"surrogate={surrogate!r} is not allowed; 'sqrt' and 'identity' are")
    _check_recursion(recursion)
    refuse_nan("denseshift", w_sign, *w_t)
    return _DenseShift.apply(surrogate, recursion, w_sign, *w_t)


def denseshift_latents(codes: Tensor, bits: int, size: float = 1e-3) -> tuple[Tensor, ...]:
    """Latents of magnitude ``size`` that give level index ``codes`` (int, 0 ... 2^bits-1): the inverse of `denseshift`.

    The last S gates are open and all gates before them are closed, which is correct for both recursions.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    gates = _gates(bits)
    half = 2 ** (bits - 1)
    positive = codes >= half
    exponent = torch.where(positive, codes - half, half - 1 - codes)
    sign = torch.where(positive, size, -size)
    return sign, *(torch.where(exponent > gates - 1 - k, size, -size) for k in range(gates))


@method("denseshift")
class DenseShift(Method):
    """Zero-free power-of-two weights by sign-scale decomposition.

    Training holds 2, 4 or 8 latents per weight (2, 3 or 4 bits) instead of one, each with its optimizer state: with SGD
    and momentum, 24, 48 or 96 bytes per weight (latent, gradient and momentum in float32) instead of 12.

    Args:
        bits: 2, 3 or 4; 1 sign bit and bits-1 exponent bits.
        scale: "none" uses ±2^p without a factor, as published, if a normalization follows; "statistical" keeps each
            output channel at the root mean square of its weight at conversion; "pow2" rounds that to a power of 2.
        surrogate: the value whose gradient is used: "sqrt" as published, or "identity" for the true value.
        recursion: the exponent: "nested" as published, or "sum" for the number of open gates.
        init: "random" draws every latent from N(0, sigma), as published; "kaiming" from N(0, sqrt(2/(k²·C_out))), as S3
            does and as in the published ablation; "project" starts from the given weight.
        sigma: standard deviation of the latents at the start, 1e-3 as published.
    """

    bits: Literal[2, 3, 4] = 4
    scale: Literal["none", "statistical", "pow2"] = "none"
    surrogate: Surrogate = "sqrt"
    recursion: Recursion = "nested"
    init: Literal["random", "kaiming", "project"] = "random"
    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return DenseShiftWeight(self, weight)


class DenseShiftWeight(WeightQuantizer):
    """`denseshift` as a parametrization with 2, 4 or 8 latents, times the optional per-channel scale."""

    rms: Tensor

    def __init__(self, config: DenseShift, weight: Tensor):
        super().__init__()
        self.config = config
        if config.scale != "none":
            self.register_buffer("rms", rms(weight))

    def forward(self, *latents: Tensor) -> Tensor:
        weight = denseshift(*latents, surrogate=self.config.surrogate, recursion=self.config.recursion)
        return weight if self.config.scale == "none" else (weight * self.scale(*latents)).to(weight.dtype)

    @property
    def levels(self) -> Tensor:
        return denseshift_levels(self.config.bits)

    def codes(self, *latents: Tensor) -> Tensor:
        with torch.no_grad():
            exponent = self._exponent(latents).to(torch.int16)
            half = 2 ** (self.config.bits - 1)
            return torch.where(latents[0] >= 0, half + exponent, half - 1 - exponent)

    def scale(self, *latents: Tensor) -> Tensor:
        with torch.no_grad():
            if self.config.scale == "none":
                return torch.ones((1,) * latents[0].ndim, dtype=latents[0].dtype, device=latents[0].device)
            return row_scale(torch.exp2(self._exponent(latents)), self.rms, self.config.scale)

    def _exponent(self, latents: tuple[Tensor, ...]) -> Tensor:
        return denseshift_exponent(*latents[1:], recursion=self.config.recursion)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            if self.config.scale != "none":
                self.rms.copy_(rms(weight))
            codes = nearest_codes(weight, self.levels.to(weight.device), raw=self.config.scale == "none")
            latents = denseshift_latents(codes, self.config.bits, self.config.sigma)
            return tuple(t.to(weight.dtype) for t in latents)

    def initialize_(self, *latents: Tensor) -> None:
        if self.config.init == "project":
            return
        std = kaiming_std(latents[0]) if self.config.init == "kaiming" else self.config.sigma
        with torch.no_grad():
            for t in latents:
                t.normal_(std=std)
