"""What the call of a module runs, and which modules a model calls.

A packed layer or a fused graph replaces a module by what torch's own class computes. That is right only where nothing
else takes part: no method of a subclass, no override on the object, no hook.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CellType

from torch import nn
from torch.nn.utils import parametrize

# By these a class or an object decides what a call computes, or what its own code reads.
_DECIDES = (
    "forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__",
    "weight", "bias",
)  # fmt: skip

_EMPTY = CellType()


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before `torch.nn.utils.parametrize` derived another from it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def computes_as(module: nn.Module, kind: type[nn.Module], allowed: Iterable[Callable] = ()) -> bool:
    """Whether a call of ``module`` runs exactly the code of ``kind``, a class of torch.nn.

    Args:
        module: may be of a subclass, as long as that changes no method that takes part in a call.
        kind: the class.
        allowed: forward pre-hooks that do not count.
    """
    if not isinstance(module, kind) or any(name in module.__dict__ for name in _DECIDES):
        return False
    cls = own_class(module)
    if any(
        inspect.getattr_static(cls, name, None) is not inspect.getattr_static(kind, name, None) for name in _DECIDES
    ):
        return False
    return not module._forward_hooks and all(hook in allowed for hook in module._forward_pre_hooks.values())


def holds_module(function: Callable) -> bool:
    """Whether ``function`` is bound to a module or has one in its closure, which its copies keep calling."""
    cells = getattr(function, "__closure__", None) or ()
    held = [getattr(function, "__self__", None), *(cell.cell_contents for cell in cells if cell != _EMPTY)]
    held += [getattr(one, "__self__", None) for one in held] + list(getattr(function, "args", ()))
    return any(isinstance(one, nn.Module) for one in held)


@contextmanager
def calls_of(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Yield a set that collects which of ``modules`` are called inside."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module), prepend=True) for module in modules]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for a message: quoted, and cut short after ``most``."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
