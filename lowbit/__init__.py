"""Low-bit training: quantisers, training utilities and executable experiments for DenseShift and OFQ.

The names below are loaded when first used, so that ``import lowbit`` and ``lowbit --help`` stay quick.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "LowbitError": "lowbit.errors",
    "QuantConfig": "lowbit.nn",
    "RunRecord": "lowbit.training",
    "TrainConfig": "lowbit.training",
    "calibrate": "lowbit.nn",
    "load": "lowbit.serialization",
    "quantize_": "lowbit.nn",
    "record": "lowbit.suite.record",
    "save": "lowbit.serialization",
    "train": "lowbit.training",
}
_MODULES = ("data", "environment", "functional", "models", "nn", "paths", "plotting", "quantizers", "suite", "training")

__all__ = [*_EXPORTS, *_MODULES, "__version__"]

if TYPE_CHECKING:
    from lowbit import data, environment, functional, models, nn, paths, plotting, quantizers, suite, training
    from lowbit.errors import LowbitError
    from lowbit.nn import QuantConfig, calibrate, quantize_
    from lowbit.serialization import load, save
    from lowbit.suite.record import record
    from lowbit.training import RunRecord, TrainConfig, train


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"lowbit.{name}")
    else:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
