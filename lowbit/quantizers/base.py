"""What every quantizer offers, and the registry that finds them.

A method is one file here. It holds the maths as a pure function, a frozen dataclass with the method's
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
        """The quantizer for a layer's input, whose channels lie in ``channel_dim``: -1 for linear layers, else 1."""
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

    Whatever the method, ``forward(*latents) == scale(*latents) * levels[codes(*latents)]`` holds exactly.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Every method's `right_inverse` refuses a weight that is not finite."""
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
        """What multiplies `levels`: float, broadcastable to the weight, detached."""
        raise NotImplementedError

    @property
    def has_scale(self) -> bool:
        """Whether `scale` can be anything but 1, so that it has to be kept; no matter what it is just now."""
        return getattr(getattr(self, "config", None), "scale", None) != "none"

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Latents for which `forward` gives (the quantized form of) ``weight``; lets one assign ``layer.weight``."""
        refuse_nonfinite("the weight", weight)
        return weight

    @_own_latents
    def initialize_(self, *latents: Tensor) -> None:
        """Overwrites the latents in place where the method starts from its own random draw; else does nothing."""

    @_own_latents
    def penalty(self, *latents: Tensor) -> Tensor:
        """A differentiable scalar that `lowbit.train` adds to the loss, for methods that override this."""
        raise NotImplementedError

    @_own_latents
    def before_step_(self, progress: float, *latents: Tensor) -> None:
        """Called by `lowbit.train` before each step's forward pass, for methods that override this.

        Args:
            progress: share of the training's steps that is done, 0 <= progress < 1.
            latents: may be changed in place, without gradient.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class IntegerForm:
    """An activation quantizer as integers: ``q = clip(round((x + before)/scale), low, high)``.

    What the quantizer puts out is ``scale·q + after``.

    Attributes:
        scale: float32, detached; broadcasts against the input ``[N, ...]``, its first dimension, if it has as many,
            being 1.
        low, high: the range of q.
        before, after: float32, broadcast against the input; None is without.
    """

    scale: Tensor
    low: int
    high: int
    before: Tensor | None = None
    after: Tensor | None = None


class ActivationQuantizer(nn.Module):
    """A module that stands in front of a layer: float in, fake-quantized float of the same shape and dtype out."""

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
        """Told by `quantize_`, before the first batch, what is known of the input's shape.

        Args:
            shape: the last dimensions of the input, None for sizes that are unknown: ``(C,)`` for a linear layer and
                ``(None, C, None, None)`` for a convolution of images.
        """

    def integer(self) -> IntegerForm | None:
        """The same quantizer for kernels that calculate with integers; None where there is no such form."""
        return None


UNSEEN = -1
UNCALIBRATED = "this activation quantizer has seen no batch yet, so it has no step: call lowbit.calibrate(model, x)"


class CalibratedQuantizer(ActivationQuantizer):
    """An activation quantizer whose parameters get their starting values from the first batch.

    Until then they are infinite, in their final shape wherever it is known, and else empty (``[0]``). So what copies
    parameters (DistributedDataParallel, averaged copies of a model) also copies whether they have values. The parameter
    objects stay the same, so an optimizer built earlier keeps them. An empty batch says nothing and is handed on as it
    is. A subclass writes `begin`, and asks `ready` in its ``forward``.

    Args:
        sign: what `begin` decides besides the parameters, 0 or 1, if that is known without a batch.
    """

    def __init__(self, sign: int | None = 1) -> None:
        super().__init__()
        self._sign = sign
        self._known = UNSEEN  # what `begin` has decided; asking the parameters at each step would stall a GPU
        self._grown: set[str] = set()  # parameters whose shape the first batch gave

    def begin(self, x: Tensor) -> tuple[int, dict[str, Tensor]]:
        """What the first batch decides: 0 or 1 (LSQ: whether codes have signs), and the parameters' values by name."""
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
        """Whether the parameters have their values, after a look at ``x`` if it is the first batch."""
        if self._known == UNSEEN:
            if torch.compiler.is_exporting():
                raise LowbitError(f"{UNCALIBRATED} before torch.export")
            self._first_batch(x)
        return self._known != UNSEEN

    def require_calibrated(self) -> None:
        """Raises LowbitError before the first batch."""
        if not self.calibrated:
            raise LowbitError(UNCALIBRATED)

    @torch.compiler.disable(reason="a quantizer that has seen no batch: call lowbit.calibrate(model, x) first")
    def _first_batch(self, x: Tensor) -> None:
        if self.calibrated or x.numel() == 0:
            return
        sign, values = self.begin(x)
        if self._blank():  # else a copy has the values of another model, and the batch only decides the sign
            sign = self._set_(sign, values, x)
        self._known = sign

    @torch.no_grad()
    def _set_(self, sign: int, values: dict[str, Tensor], x: Tensor) -> int:
        """Gives the parameters their values; returns the sign, in several processes that of the first."""
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
                f"the shape of {' and '.join(grows)} follows from the first batch, and DistributedDataParallel was "
                "made before it: call lowbit.calibrate(model, x) before wrapping the model"
            )
        for name, value in values.items():
            if name in grows:
                own[name].data = value
                self._grown.add(name)
            else:
                own[name].copy_(value.reshape(own[name].shape))
        if wrapper is None:
            return sign
        # Each process has a batch of its own, but replicas must not differ.
        shared = torch.tensor(sign, device=x.device)
        for tensor in (shared, *(parameter.data for parameter in own.values())):
            torch.distributed.broadcast(tensor, group_src=0, group=wrapper.process_group)
        return int(shared)

    def get_extra_state(self) -> Tensor:
        """What the first batch has decided travels with the state dict (int8; `UNSEEN` before it)."""
        return torch.tensor(self._known, dtype=torch.int8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what `get_extra_state` gave."""
        if state.numel() != 1 or int(state) not in (UNSEEN, 0, 1):
            raise CheckpointError(
                f"the state of a {type(self).__name__} is {state.flatten()[:3].tolist()}; -1, 0 or 1 is allowed: "
                "get the file anew"
            )
        self._known = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Also reads what older versions saved: steps of the first batch's number of dims, or empty before it."""
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
    """Class decorator: makes the settings a validated frozen dataclass and registers the method as ``name``."""

    def register(cls: type[M]) -> type[M]:
        if name in _registry:
            raise LowbitError(
                f"two quantization methods are called {name!r}: {_registry[name].__module__}, {cls.__module__}"
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
    """The settings dataclass registered under ``name``."""
    if name not in _registry:
        raise LowbitError(f"there is no quantization method {name!r}; there are {', '.join(names())}")
    return _registry[name]


def methods() -> Iterator[type[Method]]:
    """Every registered settings dataclass, by name."""
    return (_registry[name] for name in names())


def _choices(kind: Kind) -> str:
    return ", ".join(_registry[name].__name__ for name in names(kind))


def refuse_nonfinite(what: str, x: Tensor) -> None:
    """Raises LowbitError if ``x`` (float, called ``what`` in the message) holds NaN or infinity."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise LowbitError(
            f"{what} holds {bad} NaN or infinite value(s) of {x.numel()}; it has to be finite to be quantized: "
            "look for a damaged checkpoint or a training run that diverged"
        )


def refuse_nan(what: str, *latents: Tensor) -> None:
    """Raises LowbitError if one of ``latents`` holds NaN, which a comparison would quietly take for a closed gate.

    Only eagerly and on the CPU, where it costs one reading of the latents: a GPU would have to be waited for.
    """
    if torch.compiler.is_compiling():
        return
    for latent in latents:
        if latent.device.type == "cpu" and latent.numel() and latent.detach().amin().isnan():
            raise LowbitError(
                f"{what} holds NaN in a latent; latents are numbers (±inf too): did the training diverge?"
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
