"""Low-bit training: quantisers, training utilities and executable experiments for DenseShift and OFQ.

The names below are loaded when first used, so that ``import lowbit`` and ``lowbit --help`` stay quick.
"""

from typing import TYPE_CHECKING

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
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
        "plotting",
        "quantizers",
        "suite",
        "training",
    ],
    submod_attrs={
        "errors": ["LowbitError"],
        "nn": ["QuantConfig", "calibrate", "quantize_"],
        "nn.deploy": ["pack"],
        "nn.fuse": ["fuse"],
        "serialization": ["load", "save"],
        "suite.record": ["record", "skip"],
        "suite.tables": ["save_table"],
        "training": ["RunRecord", "TrainConfig", "train"],
    },
)

if TYPE_CHECKING:
    from lowbit import (
        data,
        environment,
        functional,
        kernels,
        metrics,
        models,
        nn,
        paths,
        plotting,
        quantizers,
        suite,
        training,
    )
    from lowbit.errors import LowbitError
    from lowbit.nn import QuantConfig, calibrate, quantize_
    from lowbit.nn.deploy import pack
    from lowbit.nn.fuse import fuse
    from lowbit.serialization import load, save
    from lowbit.suite.record import record, skip
    from lowbit.suite.tables import save_table
    from lowbit.training import RunRecord, TrainConfig, train
