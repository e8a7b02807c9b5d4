"""``torch.ops.lowbit.shift_linear`` and ``torch.ops.lowbit.shift_conv2d``, and the functions that call them.

On the CPU they run the compiled kernels (`lowbit.kernels.native`), where those are missing and on other devices the
PyTorch form (`lowbit.kernels.compiled`). What they compute is defined, to the bit, in `lowbit.kernels.reference`. They
are for inference: no gradient flows through them.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import compiled, native
from lowbit.kernels.packing import BITS, LARGEST_LEVEL, PackedWeight, packed_shape, padded_channels

__all__ = ["shift_conv2d", "shift_linear"]

_WEIGHT = "Tensor packed, int[] levels, Tensor scale, Tensor sums, Tensor? bias, Tensor? x_scale, int bits"
_REST = "int low=-127, int high=127, bool relu=False, float? out_scale=None, int out_low=-128, int out_high=127"
_REST += ", Tensor? add=None, float add_scale=1.0"
torch.library.define("lowbit::shift_linear", f"(Tensor x, {_WEIGHT}, {_REST}) -> Tensor")
torch.library.define(
    "lowbit::shift_conv2d",
    f"(Tensor x, {_WEIGHT}, int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, {_REST})"
    " -> Tensor",
)


def shift_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    low: int = -127,
    high: int = 127,
    relu: bool = False,
    out_scale: float | None = None,
    out_low: int = -128,
    out_high: int = 127,
    add: Tensor | None = None,
    add_scale: float = 1.0,
) -> Tensor:
    """A linear layer with packed weights: ``[..., K]`` → ``[..., N]``, float32, or 8 bits if ``out_scale`` is given.

    Args:
        x: float32, quantized on the way in; or int8 or uint8, taken as it is.
        weight: of `pack_weight`, on ``x``'s device.
        bias: float32 ``[N]``.
        x_scale: float32, one number or one for each row (``x.shape[:-1]``): what an 8-bit step of ``x`` is worth. None,
            for float ``x``, derives it from each row's largest magnitude.
        low: the least step of quantized float ``x``, -128 or more; 0 for unsigned ones.
        high: the largest, up to 127, or 255 if ``low`` is not negative. An activation quantizer of b bits is reproduced
            by its own step and range.
        relu: whether negative outputs become 0.
        out_scale: if given, outputs are quantized by it, to int8, or uint8 if ``out_high > 127``.
        out_low, out_high: range of quantized outputs.
        add: of the output's shape, added to it before ReLU (a residual); float32, or int8 or uint8 times ``add_scale``.
        add_scale: what a step of such an ``add`` is worth.

    Raises:
        LowbitError: a dtype, shape, device or number that does not fit.
    """
    check_dims(x, weight, 2)
    return torch.ops.lowbit.shift_linear(
        x, weight.data, weight.table, weight.scale, weight.sums, bias, x_scale, weight.bits, low, high, relu,
        out_scale, out_low, out_high, add, add_scale,
    )  # fmt: skip


def shift_conv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    low: int = -127,
    high: int = 127,
    relu: bool = False,
    out_scale: float | None = None,
    out_low: int = -128,
    out_high: int = 127,
    add: Tensor | None = None,
    add_scale: float = 1.0,
) -> Tensor:
    """A convolution (``groups=1``) with packed weights: ``[B, C, H, W]`` → ``[B, N, H', W']``, padded by zeros.

    ``x`` is best in channels-last memory (it is copied to it otherwise), and so is the result. ``x_scale`` has one
    number or one for each image, and so has the scale that is derived where it is None. All else as in `shift_linear`.

    Raises:
        LowbitError: a dtype, shape, device or number that does not fit.
    """
    check_dims(x, weight, 4)
    stride, padding, dilation = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    return torch.ops.lowbit.shift_conv2d(
        x, weight.data, weight.table, weight.scale, weight.sums, bias, x_scale, weight.bits, weight.kernel, stride,
        padding, dilation, low, high, relu, out_scale, out_low, out_high, add, add_scale,
    )  # fmt: skip


def check_dims(x: Tensor, weight: PackedWeight, dims: int) -> None:
    """Whether ``weight`` is a linear layer's (2) or a convolution's (4), of as many inputs as ``x`` has.

    The operators themselves see packed bytes alone, whose pads hide a few inputs too many or too few.
    """
    if len(weight.shape) != dims:
        kinds = {2: "a linear layer's", 4: "a convolution's"}
        raise LowbitError(f"the packed weight {list(weight.shape)} is {kinds[6 - dims]}; {kinds[dims]} is needed")
    if (x.ndim != 4 if dims == 4 else x.ndim < 1) or x.shape[1 if dims == 4 else -1] != weight.shape[1]:
        takes = f"[B, {weight.shape[1]}, H, W]" if dims == 4 else f"[..., {weight.shape[1]}]"
        raise LowbitError(f"x is {list(x.shape)}; the packed weight {list(weight.shape)} takes {takes}")


# ---- what is refused, alike for every device ----

_TYPES = {torch.float32: 0, torch.int8: 1, torch.uint8: 2}
LARGEST_FLOAT = torch.finfo(torch.float32).max


def check_weight(packed: Tensor, levels: Sequence[int], scale: Tensor, bias: Tensor | None, bits: int, k: int) -> None:
    """``k`` is K as packed."""
    if bits not in BITS:
        raise LowbitError(f"bits={bits!r} is not allowed: packed weights have 2, 3, 4 or 8 bits")
    if scale.ndim != 1 or scale.dtype != torch.float32 or not scale.numel():
        raise LowbitError(f"scale is {scale.dtype} {list(scale.shape)}; it is float32 [N], one for each output")
    n = scale.shape[0]
    if packed.dtype != torch.uint8 or packed.shape != packed_shape(bits, n, k):
        raise LowbitError(
            f"packed is {packed.dtype} {list(packed.shape)}; for bits={bits}, {n} outputs and K={k} inputs (as x and "
            f"scale say) it is torch.uint8 {list(packed_shape(bits, n, k))}"
        )
    if bits == 8:
        if levels:
            raise LowbitError(f"levels={list(levels)[:4]}... with bits=8: none are allowed, the bytes are the levels")
    elif not 2 <= len(levels) <= 2**bits or min(levels) < -LARGEST_LEVEL or max(levels) > LARGEST_LEVEL:
        raise LowbitError(f"levels={list(levels)}: 2 to {2**bits} integers from -128 to 128 are allowed")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != scale.shape):
        raise LowbitError(f"bias is {bias.dtype} {list(bias.shape)}; it is float32 [{n}]")


class _Weight(NamedTuple):
    """The operators' arguments about the packed weight and its input, in their order."""

    packed: Tensor
    levels: Sequence[int]
    scale: Tensor
    sums: Tensor
    bias: Tensor | None
    x_scale: Tensor | None
    bits: int


def _weight(packed: Tensor, levels: Sequence[int] | None, *rest: Any) -> _Weight:
    """The arguments as they are, but an empty list of levels, for which AOTInductor's packages give None."""
    return _Weight(packed, levels or (), *rest)


class _Epilogue(NamedTuple):
    """The operators' last arguments, with their defaults: the input's range, and what is done to each sum."""

    low: int = -127
    high: int = 127
    relu: bool = False
    out_scale: float | None = None
    out_low: int = -128
    out_high: int = 127
    add: Tensor | None = None
    add_scale: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return torch.float32 if self.out_scale is None else torch.uint8 if self.out_high > 127 else torch.int8

    def after_sums(self) -> dict[str, Any]:
        """The keywords of `lowbit.kernels.reference.epilogue`."""
        return {
            name: value
            for name, value in self._asdict().items()
            if name in ("relu", "out_scale", "out_low", "out_high", "add_scale")
        }


class _Window(NamedTuple):
    """How a convolution's kernel moves."""

    kernel_size: Sequence[int]
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)


def _check(x: Tensor, weight: _Weight, epilogue: _Epilogue, k: int, rows: int) -> None:
    """``k`` is K as packed, ``rows`` how many scales ``x_scale`` may have."""
    if x.dtype not in _TYPES:
        raise LowbitError(f"x is {x.dtype}; float32, int8 and uint8 activations are allowed")
    check_weight(weight.packed, weight.levels, weight.scale, weight.bias, weight.bits, k)
    sums, scale, x_scale = weight.sums, weight.scale, weight.x_scale
    if sums.dtype != torch.int32 or sums.shape != scale.shape:
        raise LowbitError(f"sums is {sums.dtype} {list(sums.shape)}; it is int32 [{scale.shape[0]}]")
    if x_scale is None:
        if x.dtype != torch.float32:
            raise LowbitError(f"x is {x.dtype}, so x_scale has to say what its steps are worth")
    elif x_scale.dtype != torch.float32 or x_scale.numel() not in (1, rows):
        raise LowbitError(f"x_scale is {x_scale.dtype} {list(x_scale.shape)}; it is float32, of 1 or {rows} numbers")
    low, high, _, out_scale, out_low, out_high, *_ = epilogue
    if not (-128 <= low < high <= 127 or 0 <= low < high <= 255) or high <= 0:
        raise LowbitError(f"low={low}, high={high} is not allowed: inside -128 ... 127 or 0 ... 255, high > 0, is")
    if out_scale is not None and not 0 < out_scale <= LARGEST_FLOAT:
        raise LowbitError(
            f"out_scale={out_scale!r} is not allowed; a positive number of float32's range is, or None for float32 "
            "outputs"
        )
    if not (-128 <= out_low < out_high <= 127 or 0 <= out_low < out_high <= 255):
        raise LowbitError(f"out_low={out_low}, out_high={out_high} is not allowed: inside -128 ... 127 or 0 ... 255 is")


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Not called by what serves the CPU: the dispatcher takes that only if every tensor is there."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise LowbitError(f"{name} is on {tensor.device}, x on {x.device}; they have to be on one device")


def _check_all_devices(x: Tensor, weight: _Weight, epilogue: _Epilogue) -> None:
    tensors = {**weight._asdict(), "add": epilogue.add}
    check_devices(x, **{name: held for name, held in tensors.items() if name not in ("levels", "bits")})


def _check_add(add: Tensor | None, add_scale: float, shape: tuple[int, ...]) -> None:
    if add is None:
        return
    if add.dtype not in _TYPES or add.shape != shape:
        raise LowbitError(
            f"add is {add.dtype} {list(add.shape)}; it is float32, int8 or uint8, of the output's shape {list(shape)}"
        )
    if not 0 < add_scale <= LARGEST_FLOAT:
        raise LowbitError(f"add_scale={add_scale!r} is not allowed; a positive number of float32's range is")


def _check_linear(x: Tensor, weight: _Weight, epilogue: _Epilogue) -> tuple[int, ...]:
    """The output's shape."""
    if x.ndim < 1 or not x.shape[-1]:
        raise LowbitError(f"x is {list(x.shape)}; a linear layer takes [..., K]")
    *outer, k = x.shape
    _check(x, weight, epilogue, k, rows=x.numel() // k)
    shape = (*outer, weight.scale.shape[0])
    _check_add(epilogue.add, epilogue.add_scale, shape)
    return shape


def _check_conv2d(x: Tensor, weight: _Weight, window: _Window, epilogue: _Epilogue) -> tuple[int, int, int, int]:
    """The output's shape."""
    if x.ndim != 4 or not all(x.shape[1:]):
        raise LowbitError(f"x is {list(x.shape)}; a convolution takes [B, C, H, W]")
    for (name, pair), least in zip(window._asdict().items(), (1, 1, 0, 1), strict=True):
        if len(pair) != 2 or pair[0] < least or pair[1] < least:
            raise LowbitError(f"{name}={list(pair)} is not allowed; two integers from {least} are")
    kernel, stride, padding, dilation = window
    k = kernel[0] * kernel[1] * padded_channels(x.shape[1], (kernel[0], kernel[1]))
    _check(x, weight, epilogue, k, rows=x.shape[0])
    size = []
    for i in (0, 1):
        room = x.shape[2 + i] + 2 * padding[i] - (kernel[i] - 1) * dilation[i] - 1
        if room < 0:
            raise LowbitError(
                f"x {list(x.shape)} padded by {list(padding)} is smaller than the kernel {list(kernel)} dilated by "
                f"{list(dilation)}"
            )
        size.append(room // stride[i] + 1)
    shape = (x.shape[0], weight.scale.shape[0], size[0], size[1])
    _check_add(epilogue.add, epilogue.add_scale, shape)
    return shape


# ---- linear: x, the fields of _Weight, the fields of _Epilogue ----


def _of_linear(arguments: Sequence[Any]) -> tuple[_Weight, _Epilogue]:
    return _weight(*arguments[:7]), _Epilogue(*arguments[7:])


def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    weight, epilogue = _of_linear(arguments)
    _check_all_devices(x, weight, epilogue)
    return x.new_empty(_check_linear(x, weight, epilogue), dtype=epilogue.dtype)


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    weight, epilogue = _of_linear(arguments)
    _check_all_devices(x, weight, epilogue)
    shape = _check_linear(x, weight, epilogue)
    if not x.numel():
        return x.new_empty(shape, dtype=epilogue.dtype)
    return compiled.linear(
        x, weight.packed, tuple(weight.levels), weight.scale, weight.sums, weight.bias, weight.x_scale, weight.bits,
        epilogue.low, epilogue.high, epilogue.add, **epilogue.after_sums(),
    )  # fmt: skip


def _linear_cpu(x: Tensor, *arguments: Any) -> Tensor:
    if not use_native():
        return _linear(x, *arguments)
    weight, epilogue = _of_linear(arguments)
    shape = _check_linear(x, weight, epilogue)
    out = x.new_empty(shape, dtype=epilogue.dtype)
    k, n = x.shape[-1], shape[-1]
    add = None if epilogue.add is None else epilogue.add.contiguous()
    _run(x.contiguous(), weight, (x.numel() // k, 1, 1, k, k, n, 1, 1, 1, 1, 0, 0, 1, 1), epilogue, add, out)
    return out


# ---- convolution: x, the fields of _Weight, of _Window, of _Epilogue ----


def _of_conv2d(arguments: Sequence[Any]) -> tuple[_Weight, _Window, _Epilogue]:
    return _weight(*arguments[:7]), _Window(*arguments[7:11]), _Epilogue(*arguments[11:])


def _new_nhwc(x: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _fake_conv2d(x: Tensor, *arguments: Any) -> Tensor:
    weight, window, epilogue = _of_conv2d(arguments)
    _check_all_devices(x, weight, epilogue)
    return _new_nhwc(x, _check_conv2d(x, weight, window, epilogue), epilogue.dtype)


def _conv2d(x: Tensor, *arguments: Any) -> Tensor:
    weight, window, epilogue = _of_conv2d(arguments)
    _check_all_devices(x, weight, epilogue)
    shape = _check_conv2d(x, weight, window, epilogue)
    if not x.numel():
        return _new_nhwc(x, shape, epilogue.dtype)
    kernel, stride, padding, dilation = ((pair[0], pair[1]) for pair in window)
    return compiled.conv2d(
        x, weight.packed, tuple(weight.levels), weight.scale, weight.sums, weight.bias, weight.x_scale, weight.bits,
        kernel, padded_channels(x.shape[1], kernel), stride, padding, dilation, epilogue.low, epilogue.high,
        epilogue.add, **epilogue.after_sums(),
    )  # fmt: skip


def _conv2d_cpu(x: Tensor, *arguments: Any) -> Tensor:
    if not use_native():
        return _conv2d(x, *arguments)
    weight, window, epilogue = _of_conv2d(arguments)
    shape = _check_conv2d(x, weight, window, epilogue)
    out = _new_nhwc(x, shape, epilogue.dtype)
    batch, channels, height, width = x.shape
    kernel, stride, padding, dilation = window
    padded = padded_channels(channels, (kernel[0], kernel[1]))
    geometry = (batch, height, width, channels, padded, shape[1], *kernel, *stride, *padding, *dilation)
    nhwc = torch.channels_last
    add = None if epilogue.add is None else epilogue.add.contiguous(memory_format=nhwc)
    _run(x.contiguous(memory_format=nhwc), weight, geometry, epilogue, add, out)
    return out


# ---- the native call ----


@functools.cache
def use_native() -> bool:
    """Whether the compiled kernels serve; warns once if the slower PyTorch form does."""
    if native.available():
        return True
    warnings.warn(
        f"lowbit's native kernels are not in use: {native.why_not()}. The PyTorch form serves instead, with the same "
        "results, but slower",
        stacklevel=2,
    )
    return False


def _run(
    x: Tensor, weight: _Weight, geometry: tuple[int, ...], epilogue: _Epilogue, add: Tensor | None, out: Tensor
) -> None:
    """``x``, ``add`` and ``out`` lie in memory as the kernels want them, channels fastest."""
    # Held by these names until the call is over: a copy must not be freed under it.
    packed, scale, sums = weight.packed.contiguous(), weight.scale.contiguous(), weight.sums.contiguous()
    bias = None if weight.bias is None else weight.bias.contiguous()
    x_scale = None if weight.x_scale is None else weight.x_scale.contiguous()
    native.run(
        (
            x.data_ptr(), packed.data_ptr(), scale.data_ptr(), sums.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0 if x_scale is None else x_scale.data_ptr(), out.data_ptr(), 0 if add is None else add.data_ptr(),
        ),
        (
            _TYPES[x.dtype], _TYPES[out.dtype], 0 if x_scale is None else x_scale.numel(), weight.bits, *geometry,
            epilogue.low, epilogue.high, epilogue.relu, epilogue.out_low, epilogue.out_high, torch.get_num_threads(),
            0 if add is None else _TYPES[add.dtype],
        ),
        (1.0 if epilogue.out_scale is None else epilogue.out_scale, epilogue.add_scale),
        weight.levels,
    )  # fmt: skip


for _name, _fake, _any, _cpu in (
    ("lowbit::shift_linear", _fake_linear, _linear, _linear_cpu),
    ("lowbit::shift_conv2d", _fake_conv2d, _conv2d, _conv2d_cpu),
):
    torch.library.register_fake(_name, _fake)
    torch.library.impl(_name, "CompositeExplicitAutograd", _any)
    torch.library.impl(_name, "CPU", _cpu)
    torch.library.impl(_name, "Autograd", torch.library.fallthrough_kernel)  # results never require a gradient
