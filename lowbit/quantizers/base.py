"""What every quantiser offers, and the registry that finds them.

A method is one file here. It holds the maths as a pure function, a frozen dataclass with the method's
settings (decorated with `method`, which also registers it), and a thin module on top. Importing this
package imports every file in it, so a new file is all that a new method needs.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar, dataclass_transform

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.settings import settings


class Method:
    """Settings of one quantisation method; the base of `LSQ`, `StatsQ`, `DenseShift`, ...

    A subclass overrides `weight`, `activation` or both. It must be constructible with no argument.
    """

    name: ClassVar[str] = ""

    def weight(self, weight: Tensor) -> "WeightQuantizer":
        """The quantiser for a weight; ``weight`` (float, rows = output channels = dim 0) is its starting value."""
        raise LowbitError(f"{self!r} does not quantise weights; {_choices('weight')} do")

    def activation(self, channel_dim: int = -1) -> "ActivationQuantizer":
        """The quantiser for a layer's input, whose channels lie in ``channel_dim``: -1 for linear layers, else 1."""
        raise LowbitError(f"{self!r} does not quantise activations; {_choices('activation')} do")

    @classmethod
    def quantizes(cls, kind: str) -> bool:
        """Whether the method applies to ``kind``: "weight" or "activation"."""
        return getattr(cls, kind) is not getattr(Method, kind)


class WeightQuantizer(nn.Module):
    """A parametrisation: latent tensor(s) in, fake-quantised weight out.

    Whatever the method, ``forward(*latents) == scale(*latents) * levels[codes(*latents)]`` holds exactly.
    """

    def __init_subclass__(cls, **kwargs) -> None:
        """Every method's `right_inverse` refuses a weight that is not finite."""
        super().__init_subclass__(**kwargs)
        if "right_inverse" in cls.__dict__:
            cls.right_inverse = _finite_only(cls.right_inverse)

    def forward(self, *latents: Tensor) -> Tensor:
        """The fake-quantised weight, float, of the weight's shape; differentiable as the method defines."""
        raise NotImplementedError

    @property
    def levels(self) -> Tensor:
        """The value set before scaling: float32 ``[L]``, strictly ascending."""
        raise NotImplementedError

    def codes(self, *latents: Tensor) -> Tensor:
        """Indices into `levels`: int16, of the weight's shape. Neighbouring levels have neighbouring codes."""
        raise NotImplementedError

    def scale(self, *latents: Tensor) -> Tensor:
        """What multiplies `levels`: float, broadcastable to the weight, detached."""
        raise NotImplementedError

    @property
    def has_scale(self) -> bool:
        """Whether `scale` can be anything but 1, so that it has to be kept; no matter what it is just now."""
        return getattr(getattr(self, "config", None), "scale", None) != "none"

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Latents for which `forward` gives (the quantised form of) ``weight``; lets one assign ``layer.weight``."""
        refuse_nonfinite("the weight", weight)
        return weight

    def initialize_(self, *latents: Tensor) -> None:
        """Overwrites the latents in place where the method starts from its own random draw; else does nothing."""

    def penalty(self, *latents: Tensor) -> Tensor:
        """A differentiable scalar that `lowbit.train` adds to the loss, for methods that override this."""
        raise NotImplementedError

    def before_step_(self, progress: float, *latents: Tensor) -> None:
        """Called by `lowbit.train` before each step's forward pass, for methods that override this.

        Args:
            progress: share of the training's steps that is done, 0 <= progress < 1.
            latents: may be changed in place, without gradient.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class IntegerForm:
    """An activation quantiser as whole numbers: ``q = clip(round((x + before)/scale), low, high)``.

    What the quantiser puts out is ``scale·q + after``.

    Attributes:
        scale: float32, detached; broadcasts against the input ``[N, ...]``, its first dimension being 1.
        low, high: the range of q.
        before, after: float32, broadcast against the input; None is without.
    """

    scale: Tensor
    low: int
    high: int
    before: Tensor | None = None
    after: Tensor | None = None


class ActivationQuantizer(nn.Module):
    """A module that stands in front of a layer: float in, fake-quantised float of the same shape and dtype out."""

    @property
    def levels(self) -> Tensor:
        """The value set before scaling: float32 ``[L]``, ascending."""
        raise NotImplementedError

    def codes(self, x: Tensor) -> Tensor:
        """Indices into `levels`: int16, shape of ``x``."""
        raise NotImplementedError

    @property
    def calibrated(self) -> bool:
        """Whether the quantiser has seen the batch that sets its starting step."""
        return True

    def integer(self) -> IntegerForm | None:
        """The same quantiser for kernels that calculate with integers; None where there is no such form."""
        return None

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """A parameter that is empty until the first batch takes the shape that was saved."""
        for name, own in self._parameters.items():
            saved = state_dict.get(prefix + name)
            if own is not None and own.numel() == 0 and saved is not None:
                own.data = torch.empty_like(saved, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


_registry: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


@dataclass_transform(frozen_default=True)
def method(name: str) -> Callable[[M], M]:
    """Class decorator: makes the settings a validated frozen dataclass and registers the method as ``name``."""

    def register(cls: M) -> M:
        if name in _registry:
            raise LowbitError(
                f"two quantisation methods are called {name!r}: {_registry[name].__module__}, {cls.__module__}"
            )
        cls.name = name
        _registry[name] = settings(cls)
        return _registry[name]

    return register


def names(kind: str | None = None) -> list[str]:
    """Registered method names, sorted; with ``kind`` "weight" or "activation" only those that apply to it."""
    return sorted(key for key, cls in _registry.items() if kind is None or cls.quantizes(kind))


def get(name: str) -> type[Method]:
    """The settings dataclass registered under ``name``."""
    if name not in _registry:
        raise LowbitError(f"there is no quantisation method {name!r}; there are {', '.join(names())}")
    return _registry[name]


def methods() -> Iterator[type[Method]]:
    """Every registered settings dataclass, by name."""
    return (_registry[name] for name in names())


def _choices(kind: str) -> str:
    return ", ".join(_registry[name].__name__ for name in names(kind))


def refuse_nonfinite(what: str, x: Tensor) -> None:
    """Raises LowbitError if ``x`` (float, called ``what`` in the message) holds NaN or infinity."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise LowbitError(
            f"{what} holds {bad} NaN or infinite value(s) of {x.numel()}; it has to be finite to be quantised: "
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


def _finite_only(right_inverse: Callable) -> Callable:
    @functools.wraps(right_inverse)
    def checked(self: WeightQuantizer, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        refuse_nonfinite("the weight", weight)
        return right_inverse(self, weight)

    return checked


def per_row(weight: Tensor) -> tuple[int, ...]:
    """The dims of ``weight`` that one output channel (dim 0) spans, for reductions with ``keepdim=True``."""
    return tuple(range(1, weight.ndim))


def as_float(x: Tensor) -> Tensor:
    """``x`` in at least float32: half precision would round the quantisation grid itself."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each element of ``x`` (int16; a tie goes to the lower level).

    Args:
        x: float, any shape, already divided by the scale.
        levels: float ``[L]``, strictly ascending.
    """
    midpoints = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(x.contiguous(), midpoints.to(x)).to(torch.int16)
