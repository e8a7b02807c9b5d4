"""The maths of every method as pure functions of tensors, the way ``torch.nn.functional`` is to ``torch.nn``.

Each function lives in its method's file under `lowbit.quantizers` and is offered here under its own
name: ``lowbit.functional.statsq(w, bits=2)``; so is the oscillation frequency of `lowbit.metrics`. `names` lists them.
"""

from lowbit import quantizers as _quantizers
from lowbit.metrics.oscillation import oscillation_step as _oscillation_step

_functions = {
    name: getattr(module, name)
    for module in _quantizers.MODULES.values()
    for name in module.__all__
    if not isinstance(getattr(module, name), type)
}
_functions["oscillation_step"] = _oscillation_step
globals().update(_functions)

__all__ = sorted(_functions)


def names() -> list[str]:
    """The functions offered here."""
    return list(__all__)
