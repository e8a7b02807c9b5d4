"""Quantization methods, one a file, found by name: ``names()``, ``get("statsq")``, or ``StatsQ(bits=2)``."""

import importlib
import pkgutil

from lowbit.quantizers.base import ActivationQuantizer, Method, WeightQuantizer, get, methods, names

MODULES = {
    info.name: importlib.import_module(f"{__name__}.{info.name}")
    for info in pkgutil.iter_modules(__path__)
    if info.name not in ("base", "scaling")  # every other file is a method
}

# The settings classes are offered here under their own names, whichever files there are.
globals().update({cls.__name__: cls for cls in methods()})

__all__ = ["MODULES", "ActivationQuantizer", "Method", "WeightQuantizer", "get", "methods", "names"]
__all__ += [cls.__name__ for cls in methods()]
