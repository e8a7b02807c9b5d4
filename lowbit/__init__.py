"""Low-bit training: quantizers, packed kernels, metrics and a training loop for DenseShift and OFQ.

The names below are loaded when first used, so that ``import lowbit`` stays quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

import lazy_loader

__version__ = "0.1.0"

_lazy, _dir, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "data",
        "environment",
        "functional",
        "kernels",
        "metrics",
        "models",
        "nn",
        "paths",
        "quantizers",
        "training",
    ],
    submod_attrs={
        "errors": ["LowbitError"],
        "nn": ["QuantConfig", "calibrate", "quantize_"],
        "nn.deploy": ["pack"],
        "nn.fuse": ["fuse"],
        "serialization": ["load", "load_into", "save"],
        "training": ["RunRecord", "TrainConfig", "train"],
    },
)
_OF_NOTEBOOKS = {"record": "record", "skip": "record", "save_table": "tables"}
"""What notebooks write by: functions of `lowbit_suite.records`, which the library itself does not use."""


def __getattr__(name: str) -> Any:
    if name in _OF_NOTEBOOKS:
        return getattr(importlib.import_module(f"lowbit_suite.records.{_OF_NOTEBOOKS[name]}"), name)
    return _lazy(name)


def __dir__() -> list[str]:
    return sorted({*_dir(), *_OF_NOTEBOOKS})


if TYPE_CHECKING:
    from lowbit import data, environment, functional, kernels, metrics, models, nn, paths, quantizers, training
    from lowbit.errors import LowbitError
    from lowbit.nn import QuantConfig, calibrate, quantize_
    from lowbit.nn.deploy import pack
    from lowbit.nn.fuse import fuse
    from lowbit.serialization import load, load_into, save
    from lowbit.training import RunRecord, TrainConfig, train
