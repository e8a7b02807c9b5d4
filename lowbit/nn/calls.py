"""Modules: the code that a call runs, the modules that a model calls, the weight of a layer, its replacement.

A packed layer or a fused graph replaces a module by the computation of torch's own class. That is right only if nothing
else takes part: no method of a subclass, no override on the object, no hook.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from lowbit.errors import LowbitError

# Attributes that decide what a call computes, or what a module's own code reads.
_DECIDES = (
    "forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__",
    "weight", "bias",
)  # fmt: skip

_EMPTY = CellType()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``.

    Raises:
        LowbitError: attributes of its modules cannot be copied, such as locks, open files, and tensors that a forward
            pass has left behind; the message names them.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever the attribute's own class raises
        first = (str(error).splitlines() or [""])[0]
        modules = {id(module): module for module in model.modules()}  # what refers to a module is not at fault
        wrong = [
            f"{name}.{attribute}".lstrip(".")
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if attribute != "_modules" and not _can_be_copied(value, dict(modules))
        ]
        raise LowbitError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {first:.100}) because of "
            f"{listed(wrong) or 'its own code'}: delete these attributes (detach tensors that a forward pass left "
            "behind), or give their class a __deepcopy__"
        ) from error


def _can_be_copied(value: Any, known: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, known)
    except Exception:  # see `copied`
        return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module``, or its backward pass, runs hooks, which a module in its place would not have."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before `torch.nn.utils.parametrize` derived another from it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that ``layer`` computes with: a parameter, a buffer, or the result of a parametrization.

    Raises:
        TypeError: the layer's ``weight`` is not a tensor.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight of a {type(layer).__name__} is a {type(weight).__name__}, not a tensor")
    return weight


def weight_parametrization(layer: nn.Module) -> parametrize.ParametrizationList | None:
    """The parametrizations of the weight of ``layer``; None if the weight has none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    held = layer.get_submodule("parametrizations.weight")
    assert isinstance(held, parametrize.ParametrizationList)
    return held


def computes_as(module: nn.Module, kind: type[nn.Module], allowed: Iterable[Callable[..., Any]] = ()) -> bool:
    """Whether a call of ``module`` runs exactly the code of ``kind``, a class of torch.nn.

    Args:
        module: any module; a subclass of ``kind`` must not change a method that takes part in a call.
        kind: a class of torch.nn.
        allowed: forward pre-hooks that ``module`` may have.
    """
    if not isinstance(module, kind) or any(name in module.__dict__ for name in _DECIDES):
        return False
    cls = own_class(module)
    if any(
        inspect.getattr_static(cls, name, None) is not inspect.getattr_static(kind, name, None) for name in _DECIDES
    ):
        return False
    return not module._forward_hooks and all(hook in allowed for hook in module._forward_pre_hooks.values())


def holds_module(function: Callable[..., Any]) -> bool:
    """Whether ``function`` is bound to a module or has one in its closure; copies would keep calling that module."""
    cells = getattr(function, "__closure__", None) or ()
    held = [getattr(function, "__self__", None), *(cell.cell_contents for cell in cells if cell != _EMPTY)]
    held += [getattr(value, "__self__", None) for value in held] + list(getattr(function, "args", ()))
    return any(isinstance(value, nn.Module) for value in held)


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` by ``new`` under all names that ``old`` has in ``model``.

    Raises:
        LowbitError: ``old`` is the model itself.
    """
    if old is model:
        raise LowbitError(
            f"the model is a single {type(model).__name__}, which cannot be replaced inside itself; wrap it: "
            "torch.nn.Sequential(layer)"
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def call(model: nn.Module, batch: Any) -> Any:
    """The result of ``model`` for a batch: one tensor, a tuple or list of arguments, or a dict of named ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def with_first(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of ``module`` with ``function`` applied to the first: what a forward pre-hook returns.

    An input by name is "input" or the first parameter of ``forward``; without one, nothing changes.
    """
    if args:
        return (function(args[0]), *args[1:]), kwargs
    name = "input" if "input" in kwargs else next(iter(inspect.signature(module.forward).parameters))
    return args, {**kwargs, name: function(kwargs[name])} if name in kwargs else kwargs


def size_of(batch: Any) -> int:
    """The number of items in a batch that `call` takes: the length of its first tensor.

    Raises:
        LowbitError: there is no tensor in it.
    """
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None:
        raise LowbitError(f"a batch is a tensor, or a tuple, list or dict with one, not {type(batch).__name__}")
    return len(first)


@contextmanager
def calls_of(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Yield a set that collects those of ``modules`` that are called inside the ``with`` block."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module), prepend=True) for module in modules]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def listed(names: Iterable[str], most: int = 8) -> str:
    """Quoted names for a message, at most ``most`` of them, and the number of the rest."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
