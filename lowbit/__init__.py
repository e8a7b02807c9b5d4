"""Low-bit training: quantizers, packed kernels, metrics and a training loop for DenseShift and OFQ.

Submodules and functions are loaded on first use, so that ``import lowbit`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

import lazy_loader

__version__ = "0.1.0"

_lazy, _dir, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "data",
        "engine",
        "environment",
        "functional",
        "kernels",
        "metrics",
        "migration",
        "models",
        "nn",
        "paths",
        "quantizers",
        "training",
    ],
    submod_attrs={
        "engine": ["Plan", "load_plan", "plan"],
        "errors": ["LowbitError"],
        "nn": ["QuantConfig", "calibrate", "quantize_"],
        "nn.deploy": ["pack"],
        "nn.fuse": ["fuse"],
        "serialization": ["load", "load_into", "save"],
        "training": ["RunRecord", "TrainConfig", "train"],
    },
)
_OF_NOTEBOOKS = {"record": "record", "skip": "record", "save_table": "tables"}
"""Functions of `lowbit_suite.records` that notebooks write by, with their modules; the library does not use them."""


def __getattr__(name: str) -> Any:
    if name in _OF_NOTEBOOKS:
        return getattr(importlib.import_module(f"lowbit_suite.records.{_OF_NOTEBOOKS[name]}"), name)
    return _lazy(name)


def __dir__() -> list[str]:
    return sorted({*_dir(), *_OF_NOTEBOOKS})


if TYPE_CHECKING:
    # The aliases mark the names as public: type checkers ignore plain imports of a package.
    from lowbit import data as data
    from lowbit import engine as engine
    from lowbit import environment as environment
    from lowbit import functional as functional
    from lowbit import kernels as kernels
    from lowbit import metrics as metrics
    from lowbit import migration as migration
    from lowbit import models as models
    from lowbit import nn as nn
    from lowbit import paths as paths
    from lowbit import quantizers as quantizers
    from lowbit import training as training
    from lowbit.engine import Plan as Plan
    from lowbit.engine import load_plan as load_plan
    from lowbit.engine import plan as plan
    from lowbit.errors import LowbitError as LowbitError
    from lowbit.nn import QuantConfig as QuantConfig
    from lowbit.nn import calibrate as calibrate
    from lowbit.nn import quantize_ as quantize_
    from lowbit.nn.deploy import pack as pack
    from lowbit.nn.fuse import fuse as fuse
    from lowbit.serialization import load as load
    from lowbit.serialization import load_into as load_into
    from lowbit.serialization import save as save
    from lowbit.training.config import TrainConfig as TrainConfig
    from lowbit.training.loop import train as train
    from lowbit.training.run_card import RunRecord as RunRecord
