"""A packed model for other engines: its integers in ONNX's QuantizeLinear and DequantizeLinear operators (Q/DQ).

Engines read a product between such operators as a product of integers and choose an integer kernel for it. Each layer
becomes ``x → QuantizeLinear → [Clip] → DequantizeLinear → MatMul or Conv``, whose other factor is the integer weight
behind a DequantizeLinear with one scale for each output channel. Activations are UINT8; signed ones have zero point
128. A Clip between the two operators holds integers of fewer bits to their range. In front of them it would keep ONNX
Runtime from joining a layer with the rounding after it.

The file holds a low-bit weight in 4 bits (or 2, see `export_onnx`). If a DequantizeLinear reads 4-bit integers, ONNX
Runtime 1.32 and OpenVINO 2026.4 multiply in floats. So a Cast to 8 bits stands in front of it, which both engines
compute once, when they load the file. Levels outside -8 … 7, such as DenseShift's +8, are stored as 4-bit indices
into a table that a Gather reads.

A linear layer whose inputs have no quantizer may become ONNX Runtime's own operator MatMulNBits instead (see
`NBitsLayer`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.files import write_atomically
from lowbit.kernels import reference
from lowbit.kernels.packing import integer_levels
from lowbit.nn.calls import copied, replace_
from lowbit.nn.packed import PackedConv2d, PackedLayer, PackedLinear, is_stored, output_dtype
from lowbit.quantizers.base import ActivationQuantizer, IntegerForm

OPSET = 21  # the first with 4-bit integers
OPSET_OF_TWO_BITS = 25


class Rounding(nn.Module):
    """An activation quantizer in the form that ONNX has: ``scale·clip(round((x + before)/scale), low, high) + after``.

    Args:
        form: the quantizer's integers. An export stores signed ones plus 128.
    """

    scale: Tensor
    before: Tensor | None
    after: Tensor | None
    step: Tensor
    zero: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, form: IntegerForm):
        super().__init__()
        self.low, self.high = form.low, form.high
        for name in ("scale", "before", "after"):
            self.register_buffer(name, getattr(form, name))
        # Engines have no integer kernels for several steps: x is divided by them first, and then the step is 1.
        self.single = form.scale.numel() == 1
        self.register_buffer("step", form.scale.reshape(()) if self.single else torch.ones(()))
        # Not INT8: ONNX Runtime 1.32 refuses graphs in which it moves such a pair across a reshaping, and computes a
        # product of integers that come from a Clip in floats.
        offset = 128 if form.low < 0 else 0
        for name, value in (("zero", 0), ("lowest", form.low), ("highest", form.high)):
            self.register_buffer(name, torch.tensor(value + offset, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``; float of its shape and dtype."""
        dtype = x.dtype
        x = x.float() if self.before is None else x.float() + self.before
        x = self.pair(x) if self.single else self.pair(x / self.scale) * self.scale
        return (x if self.after is None else x + self.after).to(dtype)

    def pair(self, x: Tensor) -> Tensor:
        """``step·clip(round(x/step), low, high)``; in an export, a QuantizeLinear and a DequantizeLinear."""
        if not torch.onnx.is_in_onnx_export():
            return torch.clamp(torch.round(x / self.step), self.low, self.high) * self.step
        q = _operator("QuantizeLinear", (x, self.step, self.zero), self.zero.dtype, x)
        if self.high - self.low < 255:
            q = _operator("Clip", (q, self.lowest, self.highest), self.zero.dtype, x)
        return _operator("DequantizeLinear", (q, self.step, self.zero), torch.float32, x)


class Dequantized(nn.Module):
    """A parametrization: integers in, the float weight out, by a DequantizeLinear in an export.

    Args:
        scale: float ``[N]``, one number for each index of ``axis``.
        axis: the dim of the output channels.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, axis: int = 0):
        super().__init__()
        self.axis = axis
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, whole: Tensor) -> Tensor:
        """``scale·whole``, float32 of the shape of ``whole``."""
        if torch.onnx.is_in_onnx_export():
            return _operator("DequantizeLinear", (whole, self.scale), torch.float32, whole, axis=self.axis)
        return whole * self.scale.reshape(-1, *(1,) * (whole.ndim - 1 - self.axis))


class StandardLayer(nn.Module):
    """The computation of a `PackedLayer` without its kernel: activations rounded to integers, products in float32.

    Sums of integers are exact in float32 up to 2^24, and the factors follow in the order of `lowbit.kernels.reference`,
    so below that bound results equal the kernel's to the bit. An export gets Q/DQ operators instead, whose scales are
    in front of the product; the results may differ in the last bits of float32.

    Args:
        layer: the packed layer.
    """

    whole: Tensor
    scale: Tensor
    bias: Tensor | None
    x_scale: Tensor | None
    before: Tensor | None
    minus_bias: Tensor | None
    geometry: dict[str, Any]
    dtype: torch.dtype
    convolution: bool

    def __init__(self, layer: PackedLayer):
        super().__init__()
        self.convolution = isinstance(layer, PackedConv2d)
        whole, scale = _narrow(layer.weight.integers(), layer.scale)
        # No operator of ONNX that multiplies by a transposed matrix is a product of integers to the engines.
        self.register_buffer("whole", whole if self.convolution else whole.T.contiguous())
        self.register_buffer("scale", scale)
        for name in ("bias", "x_scale", "before"):
            self.register_buffer(name, getattr(layer, name))
        self.register_buffer("minus_bias", None if layer.bias is None else -layer.bias)
        self.geometry, self.dtype = layer.geometry, layer.like.dtype
        step = layer.x_scale
        self.single = step is not None and step.numel() == 1
        step = step if step is not None and self.single else layer.scale.new_ones(())
        self.rounding = Rounding(IntegerForm(step, layer.low, layer.high))
        self.dequantized = Dequantized(scale, 0 if self.convolution else 1)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, with the shapes of the packed one."""
        dtype = output_dtype(input, self.dtype)
        x = input.float() if self.before is None else input.float() + self.before
        scale = self.x_scale
        if scale is None:
            over = (1, 2, 3) if self.convolution else (-1,)
            scale = (x.abs().amax(over, keepdim=True) / self.rounding.high).clamp_min(reference.SMALLEST_SCALE)
        return (self._operators if torch.onnx.is_in_onnx_export() else self._exact)(x, scale).to(dtype)

    def _exact(self, x: Tensor, scale: Tensor) -> Tensor:
        q = torch.clamp(torch.round(x / scale), self.rounding.low, self.rounding.high)
        weight = self.whole.float()
        acc = F.conv2d(q, weight, **self.geometry) if self.convolution else q @ weight
        y = acc * scale * self._by_channel(self.scale)
        return y if self.bias is None else y + self._by_channel(self.bias)

    def _operators(self, x: Tensor, scale: Tensor) -> Tensor:
        weight = self.dequantized(self.whole)
        x = self.rounding.pair(x if self.single else x / scale)
        if self.convolution and self.single:
            return F.conv2d(x, weight, self.bias, **self.geometry)
        y = F.conv2d(x, weight, **self.geometry) if self.convolution else x @ weight
        y = y if self.single else y * scale
        # Of a MatMul and an Add, ONNX Runtime makes a Gemm, for which it has no kernel of integers with a float bias.
        return y if self.minus_bias is None else y - self._by_channel(self.minus_bias)

    def _by_channel(self, values: Tensor) -> Tensor:
        return values.reshape(-1, 1, 1) if self.convolution else values


class NBitsLayer(StandardLayer):
    """A linear layer as ONNX Runtime's operator ``com.microsoft::MatMulNBits``: 4- or 8-bit weights, scales by block.

    A block is some consecutive weights of one output. 4-bit integers are -8 … 7; a block that has +8 (3-bit DenseShift)
    changes its signs, and its scale does too. Layers in which some block has both +8 and -8 take 8 bits. The operator
    rounds its input to 8 bits, with a scale for each block, where the packed layer has one for the row. So the weights
    are exactly those of the packed layer, and the results close to them.

    Args:
        layer: the packed layer, of a kind for which `blocks` is not None.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: PackedLayer):
        super().__init__(layer)
        found = self.blocks(layer)
        assert found is not None
        self.bits, self.size = found
        self.outputs, self.inputs = layer.shape
        blocks, top = _blocks(layer.weight.integers(), self.size), 2 ** (self.bits - 1)
        flip = blocks.amax(2) >= top
        codes = torch.where(flip[..., None], -blocks, blocks) + top
        self.register_buffer("codes", (codes if self.bits == 8 else codes[..., ::2] + 16 * codes[..., 1::2]).byte())
        scale = layer.scale[:, None].expand_as(flip)
        self.register_buffer("scales", torch.where(flip, -scale, scale))

    @staticmethod
    def blocks(layer: nn.Module) -> tuple[int, int] | None:
        """The fewest bits, and the largest size of blocks with these, that hold the layer's integers; else None."""
        if not isinstance(layer, PackedLinear) or layer.x_scale is not None:
            return None
        whole = layer.weight.integers()
        for bits, size in ((bits, size) for bits in (4, 8) for size in (128, 64, 32, 16)):
            blocks, top = _blocks(whole, size), 2 ** (bits - 1)
            low, high = blocks.amin(2), blocks.amax(2)
            if torch.where(high >= top, (low > -top) & (high == top), low >= -top).all():
                return bits, size
        return None

    def _operators(self, x: Tensor, scale: Tensor) -> Tensor:
        sizes: dict[str, Any] = {"K": self.inputs, "N": self.outputs, "bits": self.bits, "block_size": self.size}
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scales),
            sizes | {"accuracy_level": 4},  # arithmetic of 8-bit integers
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.outputs),
            version=1,
        )
        return y if self.bias is None else y + self.bias


def _blocks(whole: Tensor, size: int) -> Tensor:
    """Integers ``[N, K]`` as int16 ``[N, blocks, size]``; zeros complete the last block."""
    return F.pad(whole.short(), (0, -whole.shape[1] % size)).reshape(len(whole), -1, size)


def standard(model: nn.Module, nbits: bool = False) -> nn.Module:
    """A copy of a packed model whose quantized parts are in the form that `export_onnx` writes.

    Every packed layer is a `StandardLayer`, with ``nbits`` an `NBitsLayer` where it can be; activation quantizers (of
    queries, keys, ...) are a `Rounding`; weights that are stored as codes are `Dequantized`, unless their levels are no
    integers (APoT, TTQ).

    Raises:
        LowbitError: the model is not packed.
    """
    model = copied(model).eval()
    modules = list(model.modules())
    packed = [layer for layer in modules if isinstance(layer, PackedLayer)]
    stored = [layer for layer in modules if is_stored(layer)]
    if not packed and not stored:
        raise LowbitError("this model is not packed; lowbit.pack(model) does that")
    for layer in packed:
        kind = NBitsLayer if nbits and NBitsLayer.blocks(layer) else StandardLayer
        replace_(model, layer, kind(layer))
    for floats in stored:
        _dequantize_in_place_(floats)
    for module in modules:
        if isinstance(module, ActivationQuantizer) and module.calibrated and (form := module.integer()) is not None:
            replace_(model, module, Rounding(form))
    return model


def _dequantize_in_place_(layer: nn.Module) -> None:
    """Let the weight of a layer that stores codes be integers with a `Dequantized`."""
    scale, codes = layer.get_buffer("row_scale"), layer.get_buffer("codes")
    if scale.numel() not in (1, len(codes)):
        return
    try:
        levels, divisor = integer_levels(layer.get_buffer("levels"))
    except LowbitError:
        return
    whole = torch.tensor(levels, dtype=torch.int16, device=scale.device)[codes.long()]
    whole, scale = _narrow(whole, (scale / divisor).reshape(-1).expand(len(whole)))
    layer.register_buffer("weight", whole)
    parametrize.register_parametrization(layer, "weight", Dequantized(scale), unsafe=True)


def _narrow(whole: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of magnitude <= 128 as int8, with their scales by dim 0; as int16 if that cannot hold them.

    A channel with +128 changes its sign, and its scale does too.
    """
    flip = whole.flatten(1).amax(1) > 127
    whole = torch.where(flip.reshape(-1, *(1,) * (whole.ndim - 1)), -whole, whole)
    return whole.to(torch.int8 if whole.max() < 128 else torch.int16), torch.where(flip, -scale, scale)


def _operator(name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, like: Tensor, **attributes: int) -> Tensor:
    """A node of the ONNX operator ``name``, whose output has the shape of ``like``."""
    return torch.onnx.ops.symbolic(name, inputs, {**attributes}, dtype=dtype, shape=like.shape, version=OPSET)


def export_onnx(
    model: nn.Module, example: Tensor, path: str | Path, opset: int = OPSET, *, nbits: bool = False
) -> Path:
    """Write a packed ``model`` as an ONNX file with quantized operators, for inputs of the shape of ``example``.

    Weights are stored in 4 bits, and in 8 bits if they have more than 16 levels. Nothing is rounded anew: engines get
    the integers and scales of the packed layers. 4-bit DenseShift reaches ±128, and no 8-bit integer type holds both;
    if a channel has both, engines compute its layer in floats. ONNX Runtime has no integer kernel for a convolution
    whose output stays in floats (before a residual addition), and rounds the bias of the others to the unit of their
    sums. Needs the packages onnx and onnxscript.

    Args:
        model: a model from `lowbit.pack`.
        example: an input batch.
        path: the file to write.
        opset: version of ONNX's operators, at least 21. From 25 on, weights of at most 4 levels are stored in 2 bits
            (ONNX Runtime 1.32 reads such files, OpenVINO 2026.4 does not).
        nbits: write linear layers without an activation quantizer as `NBitsLayer`, for ONNX Runtime alone: the fastest
            that it has for one row of inputs at a time; for many rows its other kernels are faster.

    Returns:
        The path.

    Raises:
        LowbitError: the model is not packed, a package is missing, or ``opset`` is below 21.
    """
    if opset < OPSET:
        raise LowbitError(f"opset={opset} is not allowed: 4-bit integers need {OPSET} or more")
    model = standard(model, nbits)
    with extra("onnx", "ONNX export"):
        import onnx
        import onnxscript  # noqa: F401
    with torch.no_grad():
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False, opset_version=OPSET)
    assert program is not None  # it is None for the exporter without dynamo
    proto = program.model_proto
    # The exporter records source paths of this machine for each node; they are private, and large.
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.functions):
        del part.metadata_props[:]
    for function in proto.functions:
        for node in function.node:
            del node.metadata_props[:]
    if opset > OPSET:
        proto = onnx.version_converter.convert_version(proto, opset)
    _compress_(proto.graph, two_bits=opset >= OPSET_OF_TWO_BITS)
    onnx.checker.check_model(proto)
    write_atomically(path, lambda file: onnx.save(proto, file))
    return Path(path)


def _compress_(graph: Any, two_bits: bool) -> None:
    """Store the integers behind each DequantizeLinear of ``graph``, in place, in as few bits as ONNX has for them."""
    with extra("onnx", "ONNX export"):
        from onnx import TensorProto, helper, numpy_helper

    held = {tensor.name: tensor for tensor in graph.initializer}
    weights = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"} & held.keys()
    first = []
    for name in sorted(weights):
        tensor = held[name]
        whole = numpy_helper.to_array(tensor)
        levels, codes = np.unique(whole, return_inverse=True)
        if len(levels) > 16:
            continue
        bits = 2 if two_bits and len(levels) <= 4 else 4
        fits = levels[0] >= -(2 ** (bits - 1)) and levels[-1] < 2 ** (bits - 1)
        kind, values = (f"INT{bits}", whole) if fits else (f"UINT{bits}", codes)
        stored = helper.make_tensor(
            f"{name}.stored", getattr(TensorProto, kind), whole.shape, values.flatten().tolist()
        )
        if fits:
            first.append(helper.make_node("Cast", [stored.name], [name], f"{name}.cast", to=tensor.data_type))
        else:
            table = numpy_helper.from_array(levels, f"{name}.levels")
            graph.initializer.append(table)
            index = f"{name}.index"
            first.append(helper.make_node("Cast", [stored.name], [index], f"{name}.cast", to=TensorProto.INT32))
            first.append(helper.make_node("Gather", [table.name, index], [name], f"{name}.gather"))
        graph.initializer.remove(tensor)
        graph.initializer.append(stored)
    for node in reversed(first):
        graph.node.insert(0, node)
