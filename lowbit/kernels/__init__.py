"""Packed low-bit weights and the kernels that multiply 8-bit activations by them.

`pack_weight` packs what a weight quantizer gives into 2, 3, 4 or 8 bits a weight; `shift_linear` and `shift_conv2d`
compute with it, by the compiled kernels where there are any (``python -m lowbit.kernels.build`` makes them), else in
PyTorch. All forms give the same bits: those of `lowbit.kernels.reference`.
"""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["build", "compiled", "floats", "native", "ops", "packing", "reference"],
    submod_attrs={
        "ops": ["shift_conv2d", "shift_linear"],
        "packing": ["PackedWeight", "pack", "pack_weight", "unpack"],
    },
)

if TYPE_CHECKING:
    from lowbit.kernels import build, compiled, floats, native, ops, packing, reference
    from lowbit.kernels.ops import shift_conv2d, shift_linear
    from lowbit.kernels.packing import PackedWeight, pack, pack_weight, unpack
