"""A packed model for other engines: the same integers in standard ONNX operators."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.files import write_atomically
from lowbit.kernels import reference
from lowbit.nn.convert import replace_
from lowbit.nn.packed import PackedConv2d, PackedLayer, output_dtype


class StandardLayer(nn.Module):
    """The computation of a `PackedLayer` without its kernel: activations rounded to integers, products in float32.

    Sums of integers are exact in float32 up to 2^24, and the factors follow in the order of `lowbit.kernels.reference`,
    so below that bound results equal the kernel's to the bit.

    Args:
        layer: the packed layer.
    """

    whole: Tensor
    scale: Tensor
    bias: Tensor | None
    x_scale: Tensor | None
    before: Tensor | None
    low: int
    high: int
    geometry: dict[str, Any]
    dtype: torch.dtype
    convolution: bool

    def __init__(self, layer: PackedLayer):
        super().__init__()
        whole = layer.weight.integers()
        self.register_buffer("whole", whole.to(torch.int8) if max(layer.levels) < 128 else whole)
        for name in ("scale", "bias", "x_scale", "before"):
            self.register_buffer(name, getattr(layer, name))
        self.low, self.high, self.geometry, self.dtype = layer.low, layer.high, layer.geometry, layer.like.dtype
        self.convolution = isinstance(layer, PackedConv2d)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, with the shapes of the packed one."""
        dtype = output_dtype(x, self.dtype)
        x = x.float() if self.before is None else x.float() + self.before
        over = (1, 2, 3) if self.convolution else (-1,)
        scale = self.x_scale
        if scale is not None and scale.numel() == 1:  # the exporter would merge factors without dims, reordered
            scale = scale.reshape((1,) * x.ndim)
        if scale is None:
            scale = (x.abs().amax(over, keepdim=True) / self.high).clamp_min(reference.SMALLEST_SCALE)
        q = torch.clamp(torch.round(x / scale), self.low, self.high)
        if self.convolution:
            acc = F.conv2d(q, self.whole.float(), **self.geometry)
            shape: tuple[int, ...] = (-1, 1, 1)
        else:
            acc = F.linear(q, self.whole.float())
            shape = (-1,)
        y = acc * scale * self.scale.reshape(shape)
        return (y if self.bias is None else y + self.bias.reshape(shape)).to(dtype)


def standard(model: nn.Module) -> nn.Module:
    """A copy of a packed model in which every packed layer is a `StandardLayer`.

    Raises:
        LowbitError: the model is not packed.
    """
    model = copy.deepcopy(model).eval()
    packed = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    if not packed:
        raise LowbitError("this model is not packed; lowbit.pack(model) does that")
    for layer in packed:
        replace_(model, layer, StandardLayer(layer))
    return model


def export_onnx(model: nn.Module, example: Tensor, path: str | Path) -> Path:
    """Write a packed ``model`` as an ONNX file, for inputs of the shape of ``example``.

    Weights are integers of 8 bits (16 for 4-bit DenseShift): any engine can read the file, but only the project's own
    kernels calculate with 2 to 4 bits. Needs the packages onnx and onnxscript.

    Args:
        model: a model from `lowbit.pack`.
        example: an input batch.
        path: the file to write.

    Returns:
        The path.

    Raises:
        LowbitError: the model is not packed, or a package is missing.
    """
    model = standard(model)
    with extra("onnx", "ONNX export"):
        import onnx
        import onnxscript  # noqa: F401
    with torch.no_grad():
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    assert program is not None  # it is None for the exporter without dynamo
    proto = program.model_proto
    # The exporter records source paths of this machine for each node; they are private, and large.
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.functions):
        del part.metadata_props[:]
    for function in proto.functions:
        for node in function.node:
            del node.metadata_props[:]
    write_atomically(path, lambda file: onnx.save(proto, file))
    return Path(path)
