"""The math of every method as pure functions of tensors, as ``torch.nn.functional`` is for ``torch.nn``.

Each function is defined in its method's file under `lowbit.quantizers` and is available here by its own
name: ``lowbit.functional.statsq(w, bits=2)``. `oscillation_step` comes from `lowbit.metrics`. `names` lists them all.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowbit import quantizers as _quantizers
from lowbit.metrics.oscillation import oscillation_step as _oscillation_step

_functions: dict[str, Callable[..., Any]] = {
    name: getattr(module, name)
    for module in _quantizers.MODULES.values()
    for name in module.__all__
    if not isinstance(getattr(module, name), type)
}
_functions["oscillation_step"] = _oscillation_step
globals().update(_functions)

__all__ = sorted(_functions)


def names() -> list[str]:
    """Names of all functions of this module, sorted."""
    return list(__all__)


if TYPE_CHECKING:
    # A new method's functions appear without a change here, so type checkers cannot know their signatures.
    def __getattr__(name: str) -> Callable[..., Any]: ...
