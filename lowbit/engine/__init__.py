"""Whole packed networks as plans that C code runs in one call, with or without Python.

`plan` lowers what `lowbit.pack` made to a `Plan`: operations in order, their packed weights, and one arena for all
values between them. A plan runs from numpy arrays or torch tensors, is saved as one file, and needs neither torch nor
Python to run: the C library's interface is ``lowbit/kernels/csrc/plan.h``.

From model to file: `lower` walks through the model's graph and looks each call up in the tables of `operations`; these
point to the functions that lower it, in `products`, `attention`, `elementwise`, `reductions` and `windows`. `values`
keeps track of where every element lies, and of the maps of integers that layers read; `format` writes the file, which
`runtime` runs.
"""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["format"],
    submod_attrs={"lower": ["plan"], "module": ["PlanModule"], "runtime": ["Plan", "load_plan"]},
)

if TYPE_CHECKING:
    from lowbit.engine import format as format
    from lowbit.engine.lower import plan as plan
    from lowbit.engine.module import PlanModule as PlanModule
    from lowbit.engine.runtime import Plan as Plan
    from lowbit.engine.runtime import load_plan as load_plan
