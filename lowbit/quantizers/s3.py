"""S3: zero and ±2^p, trained through a sign, a sparsity gate and a chain of shift gates.

Li et al., "S^3: Sign-Sparse-Shift Reparametrization for Effective Training of Low-bit Shift Networks",
NeurIPS 2021, arXiv 2107.03453. The 3-bit form, its gradient, its penalty and its initialization are those of
the authors' code; 2 and 4 bits continue the same chain.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method
from lowbit.quantizers.denseshift import _sign
from lowbit.quantizers.scaling import kaiming_std, nearest_codes, rms, row_scale

__all__ = ["S3", "s3", "s3_codes", "s3_latents", "s3_levels"]

SHIFTS = {2: 0, 3: 2, 4: 6}  # bits -> shift latents, 2^(b-1) - 2


def s3_levels(bits: int) -> Tensor:
    """The value set {0, ±2^p : p = 0 ... 2^(bits-1)-2}, float32, ascending: 3, 7 or 15 values at 2, 3 or 4 bits."""
    positive = 2.0 ** torch.arange(_shifts(bits) + 1, dtype=torch.float32)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def _shifts(bits: int) -> int:
    if bits not in SHIFTS:
        raise LowbitError(f"bits={bits!r} is not allowed: S3 takes 2, 3 or 4 bits")
    return SHIFTS[bits]


def _runs(w_t: tuple[Tensor, ...], like: Tensor) -> list[Tensor]:
    """S_1 ... S_N and 0, S_k = [t_k > 0]·(S_(k+1)+1): the number of consecutive open gates from the k-th on."""
    runs = [torch.zeros_like(like)]
    for t in reversed(w_t):
        runs.append((runs[-1] + 1) * (t > 0))
    return runs[::-1]


class _S3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_sign: Tensor, w_sparse: Tensor, *w_t: Tensor) -> Tensor:
        ctx.save_for_backward(w_sign, w_sparse, *w_t)
        return torch.where(w_sparse > 0, _sign(w_sign) * torch.exp2(_runs(w_t, w_sign)[0]), 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        w_sign, w_sparse, *w_t = ctx.saved_tensors
        runs = _runs(tuple(w_t), w_sign)
        size, sign, kept = torch.exp2(runs[0]), _sign(w_sign), (w_sparse > 0).to(grad.dtype)
        grad_run = grad * sign * kept * size * math.log(2)  # d(2^S)/dS = 2^S·ln 2
        grads = []
        for t, run in zip(w_t, runs[1:], strict=True):
            grads.append(grad_run * (run + 1))
            grad_run = grad_run * (t > 0)
        return grad * kept * size, grad * sign * size, *grads


def s3(w_sign: Tensor, w_sparse: Tensor, *w_t: Tensor) -> Tensor:
    """The S3 weight sgn(t_sign)·[t_sparse > 0]·2^(S_1) of 2, 4 or 8 latents (2, 3 or 4 bits).

    S_k = [t_k > 0]·(S_(k+1)+1), S_(N+1) = 0: at 3 bits S_1 = [t_1 > 0]·([t_2 > 0]+1), as published. So t_1 is the
    master gate: only an unbroken run of open gates from t_1 on counts. In `denseshift` the last latent is the master.

    In the backward pass, all binarizations are straight-through without a clipping window, and the rest is exact:
    dL/dt_sign = G·[t_sparse > 0]·2^S_1, dL/dt_sparse = G·sgn·2^S_1, dL/dS_1 = G·W·ln 2,
    dL/dt_k = dL/dS_k·(S_(k+1)+1), dL/dS_(k+1) = dL/dS_k·[t_k > 0]. A weight that is zero moves only its
    sparsity latent.

    Args:
        w_sign: the sign latent, float, any shape; ±0.0 count as positive.
        w_sparse: the sparsity latent of the same shape; the weight is zero unless it is > 0.
        w_t: 0, 2 or 6 shift latents of the same shape, t_1 first; a gate is open where its latent is > 0.

    Returns:
        Float tensor of the latents' shape, every element 0 or ±2^p.

    Raises:
        LowbitError: a wrong number of shift latents.
    """
    if len(w_t) not in SHIFTS.values():
        raise LowbitError(f"{len(w_t)} shift latents were given; S3 takes 0, 2 or 6 (2, 3 or 4 bits)")
    return _S3.apply(w_sign, w_sparse, *w_t)


def s3_codes(w_sign: Tensor, w_sparse: Tensor, *w_t: Tensor) -> Tensor:
    """Indices into `s3_levels` of the weight that these latents give, int16."""
    with torch.no_grad():
        size = torch.where(w_sparse > 0, _runs(w_t, w_sign)[0] + 1, 0.0).to(torch.int16)
        return len(w_t) + 1 + torch.where(w_sign >= 0, size, -size)


def s3_latents(codes: Tensor, bits: int, size: float = 1e-3) -> tuple[Tensor, ...]:
    """Latents of magnitude ``size`` that give level index ``codes`` (int, 0 ... 2^bits-2): the inverse of `s3`.

    The first S shift gates are open and the others closed; a zero has closed gates and a positive sign.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    shifts = _shifts(bits)
    index = codes - (shifts + 1)
    sign = torch.where(index >= 0, size, -size)
    return sign, *(torch.where(index.abs() > k, size, -size) for k in range(shifts + 1))


@method("s3")
class S3(Method):
    """Power-of-two weights with zero by sign-sparse-shift decomposition, with 2, 4 or 8 latents per weight in training.

    Args:
        bits: 2 (ternary, no shift latent), 3 (as published) or 4; one bit pattern in 2^bits is unused.
        scale: "none" uses 0, ±2^p without a factor, as published, if a normalization follows; "statistical" keeps each
            output channel at the root mean square of its weight at conversion; "pow2" rounds that to a power of 2.
        init: "kaiming" draws every latent from N(0, sqrt(2/(k²·C_out))), as published; "dense" is the authors' variant
            with positive sparsity latents and negative shift latents, so that all weights start at ±1; "normal" draws
            from N(0, sigma); "project" starts from the given weight.
        sigma: standard deviation ("normal") or magnitude ("project", and weights assigned later) of the latents.
        sparse_penalty: α of the term α·Σ max(-t_sparse, 0) in the loss, which pulls zeros back toward ±2^p; 1e-5 as
            published, 0 for none.
    """

    bits: Literal[2, 3, 4] = 4
    scale: Literal["none", "statistical", "pow2"] = "none"
    init: Literal["kaiming", "dense", "normal", "project"] = "kaiming"
    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    sparse_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return S3Weight(self, weight)


class S3Weight(WeightQuantizer):
    """`s3` as a parametrization with 2, 4 or 8 latents, times the optional per-channel scale."""

    rms: Tensor

    def __init__(self, config: S3, weight: Tensor):
        super().__init__()
        self.config = config
        if config.scale != "none":
            self.register_buffer("rms", rms(weight))

    def forward(self, *latents: Tensor) -> Tensor:
        weight = s3(*latents)
        if self.config.scale == "none":
            return weight
        return (weight * row_scale(weight, self.rms, self.config.scale)).to(weight.dtype)

    @property
    def levels(self) -> Tensor:
        return s3_levels(self.config.bits)

    def codes(self, *latents: Tensor) -> Tensor:
        return s3_codes(*latents)

    def scale(self, *latents: Tensor) -> Tensor:
        if self.config.scale == "none":
            return torch.ones((1,) * latents[0].ndim, dtype=latents[0].dtype, device=latents[0].device)
        with torch.no_grad():
            return row_scale(s3(*latents), self.rms, self.config.scale)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            if self.config.scale != "none":
                self.rms.copy_(rms(weight))
            codes = nearest_codes(weight, self.levels.to(weight.device), raw=self.config.scale == "none")
            return tuple(t.to(weight.dtype) for t in s3_latents(codes, self.config.bits, self.config.sigma))

    def initialize_(self, *latents: Tensor) -> None:
        if self.config.init == "project":
            return
        std = self.config.sigma if self.config.init == "normal" else kaiming_std(latents[0])
        with torch.no_grad():
            for t in latents:
                t.normal_(std=std)
            if self.config.init == "dense":
                _, w_sparse, *w_t = latents
                w_sparse.abs_()
                for t in w_t:
                    t.abs_().neg_()

    def penalty(self, *latents: Tensor) -> Tensor:
        if self.config.sparse_penalty == 0:
            return latents[1].new_zeros(())
        w_sparse = as_float(latents[1])
        return self.config.sparse_penalty * torch.where(w_sparse >= 0, 0.0, -w_sparse).sum()  # no gradient at 0
