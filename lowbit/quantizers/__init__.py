"""Quantization methods, one a file, found by name: ``names()``, ``get("statsq")``, or ``StatsQ(bits=2)``."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from lowbit.quantizers.base import ActivationQuantizer, Method, WeightQuantizer, get, methods, names

MODULES = {
    info.name: importlib.import_module(f"{__name__}.{info.name}")
    for info in pkgutil.iter_modules(__path__)
    if info.name not in ("base", "scaling")  # every other file is a method
}

# Every file's settings class is offered here under its own name.
globals().update({cls.__name__: cls for cls in methods()})

__all__ = ["MODULES", "ActivationQuantizer", "Method", "WeightQuantizer", "get", "methods", "names"]
__all__ += [cls.__name__ for cls in methods()]

if TYPE_CHECKING:  # the same names for type checkers, which see nothing of globals(); a method works without its line
    from lowbit.quantizers.apot import APoT as APoT
    from lowbit.quantizers.binary import Binary as Binary
    from lowbit.quantizers.deepshift_ps import DeepShiftPS as DeepShiftPS
    from lowbit.quantizers.deepshift_q import DeepShiftQ as DeepShiftQ
    from lowbit.quantizers.denseshift import DenseShift as DenseShift
    from lowbit.quantizers.dorefa import DoReFa as DoReFa
    from lowbit.quantizers.ewgs import EWGS as EWGS
    from lowbit.quantizers.inq import INQ as INQ
    from lowbit.quantizers.lsq import LSQ as LSQ
    from lowbit.quantizers.lsqplus import LSQPlus as LSQPlus
    from lowbit.quantizers.pact import PACT as PACT
    from lowbit.quantizers.pot import PoT as PoT
    from lowbit.quantizers.s3 import S3 as S3
    from lowbit.quantizers.statsq import StatsQ as StatsQ
    from lowbit.quantizers.ternary import Ternary as Ternary
    from lowbit.quantizers.uniform import Uniform as Uniform
