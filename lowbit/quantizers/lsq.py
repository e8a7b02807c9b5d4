"""LSQ: a uniform grid whose step is learned.

Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153, equations 1-5.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit.errors import LowbitError
from lowbit.quantizers.base import (
    UNSEEN,
    ActivationQuantizer,
    CalibratedQuantizer,
    IntegerForm,
    Method,
    WeightQuantizer,
    as_float,
    method,
    per_row,
)

__all__ = ["LSQ", "lsq", "lsq_codes", "lsq_range", "lsq_step"]

SMALLEST_STEP = 1e-8
BIASES = ("bias_in", "bias_out")


def lsq_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """The lowest and the highest integer code, ``(-Qn, Qp)``: (-2, 1) for 2 signed bits, (0, 3) for 2 unsigned ones."""
    if not (isinstance(bits, int) and (2 if signed else 1) <= bits <= 16):
        raise LowbitError(f"bits={bits!r} is not allowed: LSQ takes {'2' if signed else '1'} to 16 bits")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class _LSQ(torch.autograd.Function):
    """One graph node instead of six; it saves x, y and the step, which the layer keeps alive anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: int, high: int, grad_scale: float, inclusive: bool = False
    ) -> Tensor:
        y = torch.div(x, step).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, y, step)
        ctx.range, ctx.grad_scale, ctx.inclusive = (low, high), grad_scale, inclusive
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, step = ctx.saved_tensors
        low, high = ctx.range
        if ctx.inclusive:
            v = x / step
            grad_x = torch.where((v >= low) & (v <= high), grad, 0)
        elif step.numel() == 1 and x.device.type == "cpu":
            # One pass with scalar bounds is ten times as fast as a mask; every torch passes strictly inside them.
            s = step.item()
            grad_x = torch.ops.aten.hardtanh_backward(grad, x, low * s, high * s)
        else:
            grad_x = torch.where((x > low * step) & (x < high * step), grad, 0)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None, None
        # d(y)/d(step) is round(x/s) - x/s inside the range and the bound outside. The rounded and clipped code is
        # y/s in both cases, so the derivative is (y - x·[inside]) / s, and its sum takes two dot products.
        if step.numel() == 1:
            channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
            order = (0, 2, 3, 1) if channels_last else range(x.ndim)
            g, y, g_x, x = (t.permute(*order).reshape(-1) for t in (grad, y, grad_x, x))  # flat without a copy
            total = torch.dot(g, y) - torch.dot(g_x, x)
            grad_step = total.reshape(step.shape)
        else:
            grad_step = (grad * y - grad_x * x).sum_to_size(step.shape)
        return grad_x, grad_step * (ctx.grad_scale / step), None, None, None, None


class _Round(torch.autograd.Function):
    """Straight-through rounding; unlike ``x + (round(x) - x).detach()`` its value is exactly ``round(x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _lsq_composed(x: Tensor, step: Tensor, low: int, high: int, grad_scale: float, inclusive: bool = False) -> Tensor:
    """The same value and gradients as `_LSQ` from small operations, which torch.compile fuses best."""
    step = _ScaleGradient.apply(step, grad_scale)
    v = x / step
    inside = (v >= low) & (v <= high) if inclusive else (v > low) & (v < high)
    return _Round.apply(torch.where(inside, v, v.detach().clamp(low, high))) * step


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def lsq(
    x: Tensor,
    step: Tensor,
    bits: int,
    signed: bool = True,
    grad_scale: float | None = None,
    bounds: Literal["outside", "inside"] = "outside",
) -> Tensor:
    """Fake-quantize ``x`` to ``step · round(clip(x/step, -Qn, Qp))`` (equations 1 and 2).

    The gradient to ``x`` passes inside the clip range and is zero outside; the gradient to ``step``
    is equation 3, ``round(x/step) - x/step`` inside, ``-Qn`` or ``Qp`` outside, times ``grad_scale``.

    Args:
        x: float, any shape; half precision is computed in float32 and cast back.
        step: positive float, broadcastable against ``x``; its shape determines which elements share a step.
        bits: 2 to 16 signed, 1 to 16 unsigned.
        signed: True for codes -2^(b-1) ... 2^(b-1)-1, False for 0 ... 2^b-1.
        grad_scale: factor of the gradient to ``step``; None means the paper's 1/sqrt(Qp · elements that share a step).
        bounds: whether a value exactly at a bound of the clip range counts as "outside" it, or "inside" as in OFQ's
            code.

    Returns:
        A tensor like ``x``.

    Raises:
        LowbitError: ``bits`` out of range, or an unknown ``bounds``.
    """
    low, high = lsq_range(bits, signed)
    if bounds not in ("outside", "inside"):
        raise LowbitError(f"bounds={bounds!r} is not allowed; 'outside' and 'inside' are")
    if grad_scale is None:
        grad_scale = shared_scale(high, x.numel(), step)
    form = _lsq_composed if torch.compiler.is_compiling() else _LSQ.apply
    return form(as_float(x), as_float(step), low, high, grad_scale, bounds == "inside").to(x.dtype)


def shared_scale(high: int, elements: int, step: Tensor) -> float:
    """The gradient scale ``1/sqrt(Qp · elements that share a step)``; 1 where there are no elements."""
    return 1 / math.sqrt(max(high * elements / step.numel(), 1))


def lsq_codes(x: Tensor, step: Tensor, bits: int, signed: bool = True) -> Tensor:
    """The integer codes ``round(clip(x/step))`` of `lsq`, from -Qn to Qp, int16."""
    return torch.clamp(torch.round(as_float(x) / step), *lsq_range(bits, signed)).to(torch.int16)


def lsq_step(x: Tensor, shape: tuple[int, ...], bits: int, signed: bool = True) -> Tensor:
    """The starting step ``2·mean|x|/sqrt(Qp)`` for each group of a step of ``shape`` (section 2.1).

    For unsigned codes it is twice as large, as in OFQ's code; otherwise half of the range would stay unused.

    Raises:
        LowbitError: ``bits`` out of range, or an ``x`` without elements.
    """
    high = lsq_range(bits, signed)[1]
    if x.numel() == 0:
        raise LowbitError(f"x of shape {list(x.shape)} has no values to set a starting step; give a batch with items")
    total = as_float(x.detach()).abs().sum_to_size(shape)
    mean = total * (total.numel() / x.numel())
    return (mean * ((2 if signed else 4) / math.sqrt(high))).clamp_min(SMALLEST_STEP)


@method("lsq")
class LSQ(Method):
    """Learned step size, for weights and activations.

    Args:
        bits: 2 to 8.
        granularity: the elements that share one step: the whole "tensor" (as in the paper), an output "channel" of a
            weight or an input channel of an activation, or a "token" (each position of the ``[batch, ..., channel]``
            input of a linear layer, as in OFQ; this ties the model to its sequence length).
        signed: whether codes are signed; None means signed for weights, and for activations signed if the first batch
            has a negative value.
        learn_step: whether the step is trained; False keeps its starting value.
        bias: for activations: learned shifts b1 before and b2 after quantization, one number per channel each, as in
            OFQ's code: ``lsq(x + b1) + b2``. "place" learns one number per position of an image instead, shared by its
            channels, as in OFQ's patch embedding; this ties the model to the size of its images.
        smallest_step: lower bound of the step, at the start and in each forward pass; 1e-5 in OFQ's code.
        bounds: whether a value exactly at a bound of the clip range counts as "outside" it, where no gradient passes,
            or "inside" as in OFQ's code.
    """

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    granularity: Literal["tensor", "channel", "token"] = "tensor"
    signed: bool | None = None
    learn_step: bool = True
    bias: bool | Literal["place"] = False
    smallest_step: Annotated[float, Field(gt=0, allow_inf_nan=False)] = SMALLEST_STEP
    bounds: Literal["outside", "inside"] = "outside"

    def __repr__(self) -> str:
        """Omit the newest settings at their defaults, since this text identifies the checkpoints of a run."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name not in ("smallest_step", "bounds") or getattr(self, field.name) != field.default
        ]
        return f"LSQ({', '.join(shown)})"

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`; a weight has no tokens."""
        if self.granularity == "token":
            raise LowbitError("LSQ: granularity='token' is not allowed for weights; 'tensor' and 'channel' are")
        if self.signed is False:
            raise LowbitError("LSQ: signed=False is not allowed for weights; True and None are")
        if self.bias:
            raise LowbitError(
                f"LSQ: bias={self.bias!r} is not allowed for weights; False is, since biases shift activations"
            )
        return LSQWeight(self, weight)

    def activation(self, channel_dim: int = -1) -> ActivationQuantizer:
        """See `Method.activation`; the input of a convolution has no tokens."""
        if self.granularity == "token" and channel_dim != -1:
            raise LowbitError(
                "LSQ: granularity='token' is not allowed for the input of a convolution; 'tensor' and 'channel' are: "
                "use one of them, or exclude convolutions by filter_fn"
            )
        if self.bias == "place" and channel_dim == -1:
            raise LowbitError(
                "LSQ: bias='place' is not allowed for the input of a linear layer, which is no image: use False or True"
            )
        return LSQActivation(self, channel_dim)


class PositiveStep(nn.Module):
    """A step that is clamped to be positive in use; its gradient still flows, so training can raise it again."""

    step: Tensor
    smallest_step: float = SMALLEST_STEP

    def positive_step(self) -> Tensor:
        """The step, at least ``smallest_step``."""
        step = self.step
        return step.clamp_min(self.smallest_step).detach() + (step - step.detach())  # the bracket is exactly zero


class LSQWeight(PositiveStep, WeightQuantizer):
    """`lsq` as a parametrization with one latent, the full-precision weight."""

    def __init__(self, config: LSQ, weight: Tensor):
        super().__init__()
        self.config = config
        self.smallest_step = config.smallest_step
        shape = (weight.shape[0],) + (1,) * len(per_row(weight)) if config.granularity == "channel" else ()
        shape = shape or (1,) * weight.ndim
        start = lsq_step(weight, shape, config.bits).clamp_min(config.smallest_step)
        self.step = nn.Parameter(start, requires_grad=config.learn_step)

    def forward(self, latent: Tensor) -> Tensor:
        return lsq(latent, self.positive_step(), self.config.bits, bounds=self.config.bounds)

    @property
    def levels(self) -> Tensor:
        low, high = lsq_range(self.config.bits)
        return torch.arange(low, high + 1, dtype=torch.float32, device=self.step.device)

    def codes(self, latent: Tensor) -> Tensor:
        with torch.no_grad():
            return lsq_codes(latent, self.positive_step(), self.config.bits) - lsq_range(self.config.bits)[0]

    def scale(self, latent: Tensor) -> Tensor:
        return self.positive_step().detach()


class LSQActivation(PositiveStep, CalibratedQuantizer):
    """`lsq` in front of a layer, with ``bias`` between two learned shifts: ``lsq(x + bias_in) + bias_out``.

    The first batch sets the step. The biases start at zero, and are None without ``bias``. One step for the whole
    tensor has the shape ``[]``. A step or bias for each channel gets its final shape from `expect_`, which `quantize_`
    calls; all others are empty until the first batch. As in the paper, the gradient scale counts the elements of one
    sample, so it depends neither on the batch size nor on the number of processes.

    `levels`, `codes` and the step describe ``lsq(x + bias_in)``; ``bias_out`` is added afterwards.

    Args:
        config: the settings.
        channel_dim: the dimension of the input that holds its channels.
        bias_dims: dimensions of the input along which biases differ; None derives them from ``config.bias``.
        step_dims: dimensions of the input along which steps differ; None derives them from ``config.granularity``.
    """

    bias_in: nn.Parameter | None
    bias_out: nn.Parameter | None

    def __init__(
        self,
        config: LSQ,
        channel_dim: int = -1,
        bias_dims: tuple[int, ...] | None = None,
        step_dims: tuple[int, ...] | None = None,
    ):
        super().__init__(None if config.signed is None else int(config.signed))
        self.config = config
        self.channel_dim = channel_dim
        self.bias_dims, self.step_dims = bias_dims, step_dims
        self.smallest_step = config.smallest_step
        self.step = nn.Parameter(torch.empty(0), requires_grad=config.learn_step)
        for name in BIASES:
            self.register_parameter(name, nn.Parameter(torch.empty(0)) if config.bias else None)
        self.expect_(())

    @property
    def signed(self) -> bool:
        """Whether codes are signed: as configured, or as the first batch decided."""
        return self.config.signed is not False if self._known == UNSEEN else self._known == 1

    def expect_(self, shape: tuple[int | None, ...]) -> None:
        """See `ActivationQuantizer.expect_`."""
        for name, wanted in self._shapes(shape).items():
            own = self._parameters[name]
            if wanted is not None and own is not None and own.numel() == 0:
                own.data = torch.full(wanted, torch.inf if name == "step" else 0.0, dtype=own.dtype, device=own.device)

    def _shapes(self, shape: tuple[int | None, ...]) -> dict[str, tuple[int, ...] | None]:
        """Shapes of the step and the biases for an input of ``shape``; None where ``shape`` does not determine them."""
        dims, step_dims, bias_dims = len(shape), self.step_dims, self.bias_dims
        unknown = (dims,)  # no dimension of the input
        if step_dims is None:
            tokens = tuple(range(1, dims - 1)) if dims > 1 else unknown
            step_dims = {"tensor": (), "channel": (self.channel_dim,), "token": tokens}[self.config.granularity]
        if bias_dims is None:
            places = tuple(range(2, dims)) or unknown
            bias_dims = places if self.config.bias == "place" else (self.channel_dim,)
        biases = dict.fromkeys(BIASES if self.config.bias else (), _kept(shape, bias_dims))
        return {"step": _kept(shape, step_dims), **biases}

    def begin(self, x: Tensor) -> tuple[int, dict[str, Tensor]]:
        """See `CalibratedQuantizer.begin`."""
        signed = self.config.signed
        if signed is None:
            signed = bool(x.detach().amin() < 0)
        shapes = self._shapes(tuple(x.shape))
        start = lsq_step(x, shapes.pop("step") or (1,) * x.ndim, self.config.bits, signed)
        start = start.clamp_min(self.config.smallest_step)
        values = {"step": start if self.step.numel() != 1 else start.reshape(self.step.shape)}
        for name, shape in shapes.items():
            if shape is None:
                raise LowbitError(
                    f"LSQ: bias={self.config.bias!r} does not fit an input of shape {list(x.shape)}, which has too few "
                    "dimensions; give a batch: [batch, channels, places, ...]"
                )
            values[name] = start.new_zeros(shape)
        return int(signed), values

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready(x):
            return x
        step, bits, signed, bounds = self.positive_step(), self.config.bits, self.signed, self.config.bounds
        grad_scale = shared_scale(lsq_range(bits, signed)[1], math.prod(x.shape[1:]), step)
        if self.bias_out is None:
            return lsq(x, step, bits, signed, grad_scale, bounds)
        y = lsq(self._shifted(x), step, bits, signed, grad_scale, bounds)
        return (y + as_float(self.bias_out)).to(x.dtype)

    def _shifted(self, x: Tensor) -> Tensor:
        """The input of the rounding: ``x + bias_in`` in at least float32, or ``x`` itself without biases."""
        return x if self.bias_in is None else as_float(x) + as_float(self.bias_in)

    @property
    def levels(self) -> Tensor:
        low, high = lsq_range(self.config.bits, self.signed)
        return torch.arange(low, high + 1, dtype=torch.float32, device=self.step.device)

    def codes(self, x: Tensor) -> Tensor:
        """Indices into `levels` of ``lsq(x + bias_in)``: int16, shape of ``x``."""
        self.require_calibrated()
        with torch.no_grad():
            low = lsq_range(self.config.bits, self.signed)[0]
            return lsq_codes(self._shifted(x), self.positive_step(), self.config.bits, self.signed) - low

    def integer(self) -> IntegerForm:
        """See `ActivationQuantizer.integer`."""
        self.require_calibrated()
        low, high = lsq_range(self.config.bits, self.signed)
        before, after = (None if bias is None else bias.detach() for bias in (self.bias_in, self.bias_out))
        return IntegerForm(self.positive_step().detach(), low, high, before, after)


def _kept(shape: tuple[int | None, ...], dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """``shape`` with 1 in all dimensions but ``dims``; () if ``dims`` is empty, None if one of the sizes is unknown."""
    if any(not -len(shape) <= dim < len(shape) for dim in dims):
        return None
    kept = [1] * len(shape) if dims else []
    for dim in dims:
        size = shape[dim]
        if size is None:
            return None
        kept[dim] = size
    return tuple(kept)
