"""Layers for deployment: packed low-bit weights for integer kernels, and float layers that store their weight as codes.

`lowbit.pack` creates them from a quantized model. They cannot be trained.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.kernels import ops
from lowbit.kernels.packing import PackedWeight
from lowbit.quantizers.base import IntegerForm


class PackedLayer(nn.Module):
    """The base of `PackedLinear` and `PackedConv2d`: the packed weight, and the conversion of inputs to integers.

    The kernels calculate in float32, so the buffers stay float32 when the model is converted (``.to(dtype)``,
    ``.half()``). The output has the dtype that torch's own layer would return: that of autocast where it is enabled,
    else that of a floating-point input.

    Args:
        weight: the packed weight.
        bias: float32 ``[N]`` or None.
        form: the integer form of the input's quantizer. None means that the input has no quantizer: it is converted to
            8-bit integers with a scale computed for each row (of a convolution: for each image).
        geometry: stride, padding and dilation of a convolution.
    """

    like: nn.Parameter
    bits: int
    levels: tuple[int, ...]
    shape: tuple[int, ...]
    geometry: dict[str, Any]
    low: int
    high: int
    data: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor | None
    x_scale: Tensor | None
    before: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None, form: IntegerForm | None, **geometry: Any):
        super().__init__()
        # An empty tensor whose dtype follows `.to(dtype)`: the dtype that `weight` reports. It is a parameter because
        # some models ask `next(self.parameters())` for dtype and device; it is not saved.
        like = torch.empty(0, dtype=weight.dtype, device=weight.device)
        self.like = nn.Parameter(like, requires_grad=False)
        self.bits, self.levels, self.shape = weight.bits, weight.levels, tuple(weight.shape)
        self.geometry = geometry
        for name, tensor in (("data", weight.data), ("scale", weight.scale), ("sums", weight.sums)):
            self.register_buffer(name, tensor)
        self.low, self.high = (-127, 127) if form is None else (form.low, form.high)
        bias = None if bias is None else bias.detach().float()
        if form is not None and form.after is not None:
            # x̂ = s·q + after: the second term contributes a constant to the output.
            share = self._product_with(replace(weight, dtype=torch.float32).dequantize(), form.after.float())
            bias = share if bias is None else bias + share
        self.register_buffer("bias", bias)
        self.register_buffer("x_scale", None if form is None else form.scale.detach().float().clone())
        self.register_buffer("before", None if form is None or form.before is None else form.before.float().clone())

    @property
    def weight(self) -> PackedWeight:
        """The packed weight; code that expects a tensor gets the dequantized weight from it."""
        return PackedWeight(self.data, self.levels, self.scale, self.sums, self.bits, self.shape, self.like.dtype)

    def settings(self) -> dict[str, Any]:
        """Settings that `lowbit.save` stores besides the buffers, as JSON."""
        plain = {"bits": self.bits, "levels": list(self.levels), "shape": list(self.shape)}
        return plain | {"low": self.low, "high": self.high} | {k: list(v) for k, v in self.geometry.items()}

    @classmethod
    def restore(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Self:
        """Rebuild the layer that had these `settings` and buffers.

        Args:
            settings: the `settings` of the saved layer.
            tensors: its buffers by name; floating-point ones may be stored in half precision.
            dtype: dtype of the model.

        Raises:
            LowbitError: the settings and buffers are not those of a packed layer.
        """
        # A file may hold floating-point numbers in half precision.
        tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        missing = [name for name in ("data", "scale", "sums") if name not in tensors]
        if missing:
            raise LowbitError(f"a packed layer needs {', '.join(missing)}")
        geometry = {key: tuple(settings[key]) for key in ("stride", "padding", "dilation") if key in settings}
        levels, shape = tuple(settings["levels"]), tuple(settings["shape"])
        buffers = tensors["data"], levels, tensors["scale"], tensors["sums"]
        weight = PackedWeight(*buffers, settings["bits"], shape, dtype)
        weight.check()
        layer = cls(weight, tensors.get("bias"), None, **geometry)
        layer.low, layer.high = settings["low"], settings["high"]
        for name in ("x_scale", "before"):
            setattr(layer, name, tensors.get(name))
        layer._check_input()
        return layer

    def _check_input(self) -> None:
        """Refuse an input range or input tensors that no quantizer has; the kernels check the rest."""
        low, high = self.low, self.high
        if not (-128 <= low < high <= 127 or 0 <= low < high <= 255) or high <= 0:
            raise LowbitError(f"low={low}, high={high} is not allowed: inside -128 ... 127 or 0 ... 255 is")
        for name, held in (("x_scale", self.x_scale), ("before", self.before), ("bias", self.bias)):
            if held is not None and not held.is_floating_point():
                raise LowbitError(f"{name} is {held.dtype}; it should be floating-point")
        channel, scale, before = 1 if len(self.shape) == 4 else -1, self.x_scale, self.before
        tokens = scale is not None and channel == -1 and scale.ndim > 1 and scale.shape[0] == scale.shape[-1] == 1
        if scale is not None and scale.numel() != 1 and not tokens:
            raise LowbitError(f"x_scale is {list(scale.shape)}; one number, or one for each token, is allowed")
        if before is not None and before.numel() != 1:
            of_channel = before.ndim > max(channel, 0) and before.shape[channel] == before.numel() == self.shape[1]
            if not of_channel:
                raise LowbitError(f"before is {list(before.shape)}; one number, or one for each input, is allowed")
        if self.bias is not None and self.bias.shape != self.scale.shape:
            raise LowbitError(f"bias is {list(self.bias.shape)}; it should be {list(self.scale.shape)}")

    def fold_(self, gain: Tensor, shift: Tensor) -> None:
        """Fold in a BatchNorm that follows: the output y becomes ``gain·y + shift``, both float ``[N]``."""
        self.scale.mul_(gain)
        self.bias = shift if self.bias is None else self.bias * gain + shift

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}like")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({**state_dict, f"{prefix}like": self.like}, prefix, *args)

    def extra_repr(self) -> str:
        """Shape, bit width, and the range of the input's integers."""
        shape = "×".join(map(str, self.shape))
        how = "dynamic" if self.x_scale is None else "calibrated"
        return f"{shape}, {self.bits} bits, activations {self.low}..{self.high} ({how})"

    def _product_with(self, weight: Tensor, after: Tensor) -> Tensor:
        raise NotImplementedError


def output_dtype(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The output dtype of torch's own layer for ``x``: autocast's where it is enabled, else that of ``x``.

    Args:
        x: the input.
        otherwise: the dtype for integer inputs, which torch's layers refuse.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.is_floating_point() else otherwise


class PackedLinear(PackedLayer):
    """A linear layer with a packed weight: ``[..., K]`` in, ``[..., N]`` out."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; `lowbit.kernels.shift_linear` defines what is computed."""
        dtype = output_dtype(input, self.like.dtype)
        x = input.float() if self.before is None else input.float() + self.before
        scale = self.x_scale
        if scale is not None and scale.numel() > 1:  # a step for each token
            scale = scale.expand(*x.shape[:-1], 1).reshape(-1)
        scale = None if scale is None else scale.reshape(-1)
        return ops.shift_linear(x, self.weight, self.bias, scale, self.low, self.high).to(dtype)

    @property
    def in_features(self) -> int:
        """Number of inputs K."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Number of outputs N."""
        return self.shape[0]

    def _product_with(self, weight: Tensor, after: Tensor) -> Tensor:
        return weight @ after.expand(*(1,) * (after.ndim - 1), weight.shape[1]).reshape(-1)


class PackedConv2d(PackedLayer):
    """A convolution (groups=1) with a packed weight: ``[B, C, H, W]`` in, ``[B, N, H', W']`` out."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; `lowbit.kernels.shift_conv2d` defines what is computed."""
        dtype = output_dtype(input, self.like.dtype)
        x = input.float() if self.before is None else input.float() + self.before
        scale = None if self.x_scale is None else self.x_scale.reshape(-1)
        y = ops.shift_conv2d(x, self.weight, self.bias, scale, low=self.low, high=self.high, **self.geometry)
        return y.to(dtype)

    groups, padding_mode = 1, "zeros"

    @property
    def in_channels(self) -> int:
        """Number of input channels C."""
        return self.shape[1]

    @property
    def out_channels(self) -> int:
        """Number of output channels N."""
        return self.shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Height and width of the kernel."""
        return self.shape[2:]

    @property
    def stride(self) -> tuple[int, int]:
        """Stride ``(y, x)``."""
        return self.geometry.get("stride", (1, 1))

    @property
    def padding(self) -> tuple[int, int]:
        """Padding ``(y, x)``."""
        return self.geometry.get("padding", (0, 0))

    @property
    def dilation(self) -> tuple[int, int]:
        """Dilation ``(y, x)``."""
        return self.geometry.get("dilation", (1, 1))

    def _product_with(self, weight: Tensor, after: Tensor) -> Tensor:
        # Padding holds q = 0 without `after`, so only unpadded convolutions could fold it.
        raise LowbitError("a convolution's input quantizer with an offset cannot be folded into a bias")


def store_(
    layer: nn.Module, codes: Tensor, levels: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Store the weight of ``layer`` as uint8 codes, in place; the float weight ``scale·levels[codes]`` is not saved.

    For layers that the kernels do not support (depthwise, 1-d, 5 to 8 bits with float inputs, a forward of their own).
    They keep their class and calculate with floats as before.

    Args:
        layer: a linear layer or convolution without parametrization.
        codes: integers from 0 to 255, of the weight's shape.
        levels: float ``[L]``.
        scale: float, broadcastable to the weight.
        dtype: dtype of the float weight.

    Returns:
        The same layer.
    """
    layer._parameters.pop("weight", None)
    layer.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)
    layer.register_buffer("codes", codes.to(torch.uint8))
    layer.register_buffer("levels", levels.detach().float().clone())
    layer.register_buffer("row_scale", scale.detach().float().clone())
    layer.register_load_state_dict_post_hook(_decode)
    _decode(layer)
    return layer


def _decode(layer: nn.Module, *_: Any) -> None:
    levels, codes, scale = (layer.get_buffer(name) for name in ("levels", "codes", "row_scale"))
    weight = (levels[codes.long()] * scale).to(layer.get_buffer("weight").dtype)
    # Packed convolutions return channels-last memory; after a layer that does not, pooling is ten times slower.
    layer.weight = weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight


def is_stored(layer: nn.Module) -> bool:
    """Whether `store_` was applied to ``layer``."""
    return "row_scale" in layer._buffers
