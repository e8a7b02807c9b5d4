"""The interface of all quantizers, and the registry of methods.

A method is one file in this package. It holds the maths as a pure function, a frozen dataclass with the method's
settings (decorated with `method`, which also registers it), and a thin module on top. Importing this
package imports every file in it, so a new file is all that a new method needs.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError, LowbitError
from lowbit.settings import settings

Kind = Literal["weight", "activation"]
R = TypeVar("R")


class Method:
    """Settings of one quantization method; the base of `LSQ`, `StatsQ`, `DenseShift`, ...

    A subclass overrides `weight`, `activation` or both. It must be constructible with no argument.
    """

    name: ClassVar[str] = ""

    def weight(self, weight: Tensor) -> "WeightQuantizer":
        """The quantizer for a weight; ``weight`` (float, rows = output channels = dim 0) is its starting value."""
        raise LowbitError(f"{self!r} does not quantize weights; {_choices('weight')} do")

    def activation(self, channel_dim: int = -1) -> "ActivationQuantizer":
        """The quantizer for a layer's input; ``channel_dim`` holds its channels: -1 for linear layers, else 1."""
        raise LowbitError(f"{self!r} does not quantize activations; {_choices('activation')} do")

    @classmethod
    def quantizes(cls, kind: Kind) -> bool:
        """Whether the method applies to ``kind``: "weight" or "activation".

        Raises:
            LowbitError: another ``kind``.
        """
        if kind not in ("weight", "activation"):
            raise LowbitError(f"kind={kind!r} is not allowed; 'weight' and 'activation' are")
        return getattr(cls, kind) is not getattr(Method, kind)


def _own_latents(method: Callable[..., R]) -> Callable[..., R]:
    """Let an override name its own latents, since their number depends on the method; changes nothing at run time."""
    return method


class WeightQuantizer(nn.Module):
    """A parametrization: latent tensor(s) in, fake-quantized weight out.

    For every method, ``forward(*latents) == scale(*latents) * levels[codes(*latents)]`` holds exactly.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the `right_inverse` of every method refuse a weight that is not finite."""
        super().__init_subclass__(**kwargs)
        if "right_inverse" in cls.__dict__:
            cls.right_inverse = _finite_only(cls.right_inverse)  # type: ignore[method-assign]  # wrapped on purpose

    @_own_latents
    def forward(self, *latents: Tensor) -> Tensor:
        """The fake-quantized weight, float, of the weight's shape; differentiable as the method defines."""
        raise NotImplementedError

    @property
    def levels(self) -> Tensor:
        """The value set before scaling: float32 ``[L]``, strictly ascending."""
        raise NotImplementedError

    @_own_latents
    def codes(self, *latents: Tensor) -> Tensor:
        """Indices into `levels`: int16, of the weight's shape. Neighboring levels have neighboring codes."""
        raise NotImplementedError

    @_own_latents
    def scale(self, *latents: Tensor) -> Tensor:
        """The factor of `levels`: float, broadcastable to the weight, detached."""
        raise NotImplementedError

    @property
    def has_scale(self) -> bool:
        """Whether `scale` can differ from 1, so that it must be stored; its current value does not matter."""
        return getattr(getattr(self, "config", None), "scale", None) != "none"

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Latents for which `forward` returns ``weight``, quantized; makes ``layer.weight`` assignable."""
        refuse_nonfinite("the weight", weight)
        return weight

    @_own_latents
    def initialize_(self, *latents: Tensor) -> None:
        """Overwrite the latents in place if the method starts from a random draw of its own; else do nothing."""

    @_own_latents
    def penalty(self, *latents: Tensor) -> Tensor:
        """A differentiable scalar that `lowbit.train` adds to the loss if the method overrides this."""
        raise NotImplementedError

    @_own_latents
    def before_step_(self, progress: float, *latents: Tensor) -> None:
        """Prepare the latents for a step; `lowbit.train` calls this before each forward pass if overridden.

        Args:
            progress: fraction of the training steps done so far, 0 <= progress < 1.
            latents: the latent tensors, which may be changed in place, without gradient.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class IntegerForm:
    """An activation quantizer as integers: ``q = clip(round((x + before)/scale), low, high)``.

    The output of the quantizer is ``scale·q + after``.

    Attributes:
        scale: float32, detached, broadcastable against the input ``[N, ...]``; if it has as many dimensions, the first
            is 1.
        low, high: the range of q.
        before, after: shifts, float32, broadcastable against the input; None for no shift.
    """

    scale: Tensor
    low: int
    high: int
    before: Tensor | None = None
    after: Tensor | None = None


class ActivationQuantizer(nn.Module):
    """A module in front of a layer: float in, fake-quantized float of the same shape and dtype out."""

    @property
    def levels(self) -> Tensor:
        """The value set before scaling: float32 ``[L]``, ascending."""
        raise NotImplementedError

    def codes(self, x: Tensor) -> Tensor:
        """Indices into `levels`: int16, shape of ``x``."""
        raise NotImplementedError

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer has seen the batch that sets its starting step."""
        return True

    def expect_(self, shape: tuple[int | None, ...]) -> None:
        """Prepare for inputs of this shape; `quantize_` calls this before the first batch.

        Args:
            shape: sizes of the last dimensions of the input, None where unknown: ``(C,)`` for a linear layer and
                ``(None, C, None, None)`` for a convolution of images.
        """

    def integer(self) -> IntegerForm | None:
        """This quantizer in the form that integer kernels use; None if it has no such form."""
        return None


UNSEEN = -1
UNCALIBRATED = "this activation quantizer has seen no batch yet, so it has no step: call lowbit.calibrate(model, x)"


class CalibratedQuantizer(ActivationQuantizer):
    """An activation quantizer whose parameters get their starting values from the first batch.

    Until then the parameters are infinite, in their final shape if it is known, and empty (``[0]``) if it is not. Code
    that copies parameters (DistributedDataParallel, averaged copies of a model) thus also copies whether they have
    values. The parameter objects stay the same, so an optimizer built earlier keeps them. An empty batch passes through
    unchanged and sets nothing. A subclass implements `begin` and calls `ready` in its ``forward``.

    Args:
        sign: the sign that `begin` would return, 0 or 1, if it is known without a batch; None otherwise.
    """

    def __init__(self, sign: int | None = 1) -> None:
        super().__init__()
        self._sign = sign
        self._known = UNSEEN  # the sign that `begin` returned; reading the parameters at each step would stall a GPU
        self._grown: set[str] = set()  # parameters that got their shape from the first batch

    def begin(self, x: Tensor) -> tuple[int, dict[str, Tensor]]:
        """Compute from the first batch the sign, 0 or 1 (LSQ: signed codes), and the parameters' values by name."""
        raise NotImplementedError

    @property
    def calibrated(self) -> bool:
        """Whether the parameters have their values and the sign is decided."""
        if self._known == UNSEEN and self._sign is not None and not self._blank():
            self._known = self._sign
        return self._known != UNSEEN

    def _blank(self) -> bool:
        return any(parameter.numel() == 0 or not parameter.isfinite().all() for parameter in self.parameters())

    def ready(self, x: Tensor) -> bool:
        """Whether the parameters have their values; if ``x`` is the first batch, it sets them."""
        if self._known == UNSEEN:
            if torch.compiler.is_exporting():
                raise LowbitError(f"{UNCALIBRATED} before torch.export")
            self._first_batch(x)
        return self._known != UNSEEN

    def require_calibrated(self) -> None:
        """Raise LowbitError if no batch has set the parameters yet."""
        if not self.calibrated:
            raise LowbitError(UNCALIBRATED)

    @torch.compiler.disable(reason="a quantizer that has seen no batch: call lowbit.calibrate(model, x) first")
    def _first_batch(self, x: Tensor) -> None:
        if self.calibrated or x.numel() == 0:
            return
        sign, values = self.begin(x)
        if self._blank():  # else the values are those of another model, and only the sign is missing
            sign = self._set_(sign, values, x)
        self._known = sign

    @torch.no_grad()
    def _set_(self, sign: int, values: dict[str, Tensor], x: Tensor) -> int:
        """Set the parameters and return the sign; with several processes, both are those of the first process."""
        own = {name: self.get_parameter(name) for name in values}
        grows = [name for name, parameter in own.items() if parameter.numel() == 0]
        for name, value in values.items():
            if name not in grows and value.numel() != own[name].numel():
                raise LowbitError(
                    f"an input of shape {list(x.shape)} needs a {name} of {value.numel()} numbers, but its layer "
                    f"has {own[name].numel()} input channels; give inputs that fit the layer"
                )
        wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None and grows:
            raise LowbitError(
                f"the shape of {' and '.join(grows)} depends on the first batch, but DistributedDataParallel wraps the "
                "model already: call lowbit.calibrate(model, x) before wrapping the model"
            )
        for name, value in values.items():
            if name in grows:
                own[name].data = value
                self._grown.add(name)
            else:
                own[name].copy_(value.reshape(own[name].shape))
        if wrapper is None:
            return sign
        # Each process has its own batch, but replicas must not differ.
        shared = torch.tensor(sign, device=x.device)
        for tensor in (shared, *(parameter.data for parameter in own.values())):
            torch.distributed.broadcast(tensor, group_src=0, group=wrapper.process_group)
        return int(shared)

    def get_extra_state(self) -> Tensor:
        """The sign from the first batch as part of the state dict: int8, `UNSEEN` before that batch."""
        return torch.tensor(self._known, dtype=torch.int8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state that `get_extra_state` returned.

        Raises:
            CheckpointError: a state that is not one of the allowed values.
        """
        if state.numel() != 1 or int(state) not in (UNSEEN, 0, 1):
            raise CheckpointError(
                f"the state of a {type(self).__name__} is {state.flatten()[:3].tolist()}; -1, 0 or 1 is allowed: "
                "the checkpoint is damaged, so get it again"
            )
        self._known = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Also read older versions: a step with as many dimensions as the first batch, or empty before it."""
        parameters = {name: own for name, own in self._parameters.items() if own is not None}
        held = {name: state_dict[prefix + name] for name in parameters if prefix + name in state_dict}
        key = prefix + "_extra_state"
        empty = any(saved.numel() == 0 for saved in held.values())
        for name, saved in held.items():
            own = parameters[name]
            if empty:
                own.data = own.new_empty(0) if name in self._grown else torch.full_like(own, torch.inf)
                state_dict[prefix + name] = own.detach()
            elif own.numel() == 0:
                self._grown.add(name)
                own.data = torch.empty(saved.shape, dtype=own.dtype, device=own.device)
            elif [n for n in saved.shape if n != 1] == [n for n in own.shape if n != 1]:
                state_dict[prefix + name] = saved.reshape(own.shape)
        if held and (empty or key not in state_dict):
            state_dict[key] = torch.tensor(UNSEEN if empty else 1, dtype=torch.int8)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


_registry: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


@dataclass_transform(frozen_default=True)
def method(name: str) -> Callable[[type[M]], type[M]]:
    """Turn the decorated settings class into a validated frozen dataclass and register it as ``name``.

    Raises:
        LowbitError: another method has this name.
    """

    def register(cls: type[M]) -> type[M]:
        if name in _registry:
            raise LowbitError(
                f"two quantization methods are called {name!r}, in {_registry[name].__module__} and {cls.__module__}; "
                "rename one of them"
            )
        cls.name = name
        validated = settings(cls)
        _registry[name] = validated
        return validated

    return register


def names(kind: Kind | None = None) -> list[str]:
    """Registered method names, sorted; with ``kind`` "weight" or "activation" only those that apply to it."""
    return sorted(key for key, cls in _registry.items() if kind is None or cls.quantizes(kind))


def get(name: str) -> type[Method]:
    """The settings dataclass registered under ``name``.

    Raises:
        LowbitError: no method has this name.
    """
    if name not in _registry:
        raise LowbitError(f"there is no quantization method {name!r}; the methods are {', '.join(names())}")
    return _registry[name]


def methods() -> Iterator[type[Method]]:
    """Every registered settings dataclass, by name."""
    return (_registry[name] for name in names())


def _choices(kind: Kind) -> str:
    return ", ".join(_registry[name].__name__ for name in names(kind))


def refuse_nonfinite(what: str, x: Tensor) -> None:
    """Raise LowbitError if ``x`` (float, called ``what`` in the message) holds NaN or infinity."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise LowbitError(
            f"{what} holds {bad} NaN or infinite value(s) of {x.numel()}; only finite values can be quantized: "
            "check for a damaged checkpoint or a training run that diverged"
        )


def refuse_nan(what: str, *latents: Tensor) -> None:
    """Raise LowbitError if one of ``latents`` holds NaN, which comparisons would silently treat as a closed gate.

    The check is limited to eager mode on the CPU, where it reads the latents once; on a GPU it would force a wait.
    """
    if torch.compiler.is_compiling():
        return
    for latent in latents:
        if latent.device.type == "cpu" and latent.numel() and latent.detach().amin().isnan():
            raise LowbitError(
                f"{what} holds NaN in a latent; numbers and ±inf are allowed: check whether the training diverged"
            )


def _finite_only(right_inverse: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(right_inverse)
    def checked(self: WeightQuantizer, weight: Tensor) -> R:
        refuse_nonfinite("the weight", weight)
        return right_inverse(self, weight)

    return checked


def per_row(weight: Tensor) -> tuple[int, ...]:
    """The dims of ``weight`` that one output channel (dim 0) spans, for reductions with ``keepdim=True``."""
    return tuple(range(1, weight.ndim))


def as_float(x: Tensor) -> Tensor:
    """``x`` in at least float32: half precision would round the quantization grid itself."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each element of ``x`` (int16; a tie goes to the lower level).

    Args:
        x: float, any shape, already divided by the scale.
        levels: float ``[L]``, strictly ascending.
    """
    midpoints = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(x.contiguous(), midpoints.to(x)).to(torch.int16)
