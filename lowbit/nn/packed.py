"""Layers as they are shipped: packed low-bit weights that integer kernels multiply, and codes that stand for floats.

`lowbit.pack` makes them out of a quantized model. Nothing in them can be trained.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import kernels
from lowbit.errors import LowbitError
from lowbit.kernels.packing import PackedWeight
from lowbit.quantizers.base import IntegerForm


class PackedLayer(nn.Module):
    """What `PackedLinear` and `PackedConv2d` share: the packed weight, and how the input becomes integers.

    Args:
        weight: the packed weight.
        bias: float32 ``[N]`` or None.
        form: of the input's quantizer. None: the input has none, and becomes 8-bit numbers whose scale follows each
            row (of a convolution: each image).
        geometry: stride, padding and dilation of a convolution.

    The kernels calculate in float32, so that the buffers stay float32 when the model is converted (``.to(dtype)``,
    ``.half()``). The output has the dtype that torch's own layer would give it: that of a floating-point input, inside
    autocast that of autocast.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None, form: IntegerForm | None, **geometry: Any):
        super().__init__()
        # Follows `.to(dtype)`: the dtype that `weight` is said to have. A parameter, for models whose code asks
        # `next(self.parameters())` for dtype and device; it is not saved.
        like = torch.empty(0, dtype=weight.dtype, device=weight.device)
        self.like = nn.Parameter(like, requires_grad=False)
        self.bits, self.levels, self.shape = weight.bits, weight.levels, tuple(weight.shape)
        self.geometry = geometry
        for name, tensor in (("data", weight.data), ("scale", weight.scale), ("sums", weight.sums)):
            self.register_buffer(name, tensor)
        self.low, self.high = (-127, 127) if form is None else (form.low, form.high)
        bias = None if bias is None else bias.detach().float()
        if form is not None and form.after is not None:
            # x̂ = s·q + after: the second term's share of the output is a constant.
            share = self._product_with(replace(weight, dtype=torch.float32).dequantize(), form.after.float())
            bias = share if bias is None else bias + share
        self.register_buffer("bias", bias)
        self.register_buffer("x_scale", None if form is None else form.scale.detach().float().clone())
        self.register_buffer("before", None if form is None or form.before is None else form.before.float().clone())

    @property
    def weight(self) -> PackedWeight:
        """The packed weight; where a model's own code reads it, it stands for a tensor."""
        return PackedWeight(self.data, self.levels, self.scale, self.sums, self.bits, self.shape, self.like.dtype)

    def settings(self) -> dict[str, Any]:
        """What `lowbit.save` has to know besides the buffers; JSON."""
        plain = {"bits": self.bits, "levels": list(self.levels), "shape": list(self.shape)}
        return plain | {"low": self.low, "high": self.high} | {k: list(v) for k, v in self.geometry.items()}

    @classmethod
    def restore(
        cls, settings: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> "PackedLayer":
        """The layer that had these `settings` and buffers, in a model of ``dtype``.

        Raises:
            LowbitError: they are not those of a packed layer.
        """
        # A file may hold its floating-point numbers at half size.
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
        """Refuse a range or tensors for the input that no quantizer has; the kernels check the rest."""
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
        """Makes the output y into ``gain·y + shift``, both float ``[N]``: a BatchNorm that follows."""
        self.scale.mul_(gain)
        self.bias = shift if self.bias is None else self.bias * gain + shift

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLayer":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(buffer.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}like")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({**state_dict, f"{prefix}like": self.like}, prefix, *args)

    def extra_repr(self) -> str:
        """Shape, bits, and the range of the input's integers."""
        shape = "×".join(map(str, self.shape))
        how = "dynamic" if self.x_scale is None else "calibrated"
        return f"{shape}, {self.bits} bits, activations {self.low}..{self.high} ({how})"

    def _product_with(self, weight: Tensor, after: Tensor) -> Tensor:
        raise NotImplementedError


def output_dtype(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of what torch's own layer puts out for ``x``: autocast's where that is on, else ``x``'s.

    Args:
        x: the input.
        otherwise: the dtype for an ``x`` of integers, which torch's layers refuse.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.is_floating_point() else otherwise


class PackedLinear(PackedLayer):
    """A linear layer with a packed weight: ``[..., K]`` in, ``[..., N]`` out."""

    def forward(self, x: Tensor) -> Tensor:
        """See `lowbit.kernels.shift_linear`."""
        dtype = output_dtype(x, self.like.dtype)
        x = x.float() if self.before is None else x.float() + self.before
        scale = self.x_scale
        if scale is not None and scale.numel() > 1:  # a step for each token
            scale = scale.expand(*x.shape[:-1], 1).reshape(-1)
        scale = None if scale is None else scale.reshape(-1)
        return kernels.shift_linear(x, self.weight, self.bias, scale, self.low, self.high).to(dtype)

    in_features = property(lambda self: self.shape[1], doc="K, as torch's layer calls it.")
    out_features = property(lambda self: self.shape[0], doc="N, as torch's layer calls it.")

    def _product_with(self, weight: Tensor, after: Tensor) -> Tensor:
        return weight @ after.expand(*(1,) * (after.ndim - 1), weight.shape[1]).reshape(-1)


class PackedConv2d(PackedLayer):
    """A convolution (groups=1) with a packed weight: ``[B, C, H, W]`` in, ``[B, N, H', W']`` out."""

    def forward(self, x: Tensor) -> Tensor:
        """See `lowbit.kernels.shift_conv2d`."""
        dtype = output_dtype(x, self.like.dtype)
        x = x.float() if self.before is None else x.float() + self.before
        scale = None if self.x_scale is None else self.x_scale.reshape(-1)
        y = kernels.shift_conv2d(x, self.weight, self.bias, scale, low=self.low, high=self.high, **self.geometry)
        return y.to(dtype)

    in_channels = property(lambda self: self.shape[1], doc="C, as torch's layer calls it.")
    out_channels = property(lambda self: self.shape[0], doc="N, as torch's layer calls it.")
    kernel_size = property(lambda self: self.shape[2:], doc="(ky, kx).")
    stride = property(lambda self: self.geometry.get("stride", (1, 1)), doc="(y, x).")
    padding = property(lambda self: self.geometry.get("padding", (0, 0)), doc="(y, x).")
    dilation = property(lambda self: self.geometry.get("dilation", (1, 1)), doc="(y, x).")
    groups, padding_mode = 1, "zeros"

    def _product_with(self, weight: Tensor, after: Tensor) -> Tensor:
        # A place outside the image holds q = 0 but no `after`, so that only unpadded convolutions could fold it.
        raise LowbitError("a convolution's input quantizer with an offset cannot be folded into a bias")


def store_(
    layer: nn.Module, codes: Tensor, levels: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Makes ``layer`` keep its weight as uint8 codes; its float weight ``scale·levels[codes]`` is not saved.

    For layers that the kernels don't do (depthwise, 1-d, 5 to 8 bits on inputs that stay floats, a forward of their
    own): they keep their class and calculate with floats as before.

    Args:
        layer: a linear layer or convolution without parametrization.
        codes: 0 to 255, of the weight's shape.
        levels: float ``[L]``.
        scale: broadcastable to the weight.
        dtype: of the float weight.
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
    weight = (layer.levels[layer.codes.long()] * layer.row_scale).to(layer.weight.dtype)
    # Packed convolutions put channels last. If the first layer does not, pooling behind it is ten times slower.
    layer.weight = weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight


def is_stored(layer: nn.Module) -> bool:
    """Whether `store_` was applied to ``layer``."""
    return "row_scale" in layer._buffers
