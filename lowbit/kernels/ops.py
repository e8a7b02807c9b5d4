"""``torch.ops.lowbit.shift_linear`` and ``torch.ops.lowbit.shift_conv2d``, and the functions that call them.

On the CPU they run the compiled kernels (`lowbit.kernels.native`), where those are missing and on other devices the
PyTorch form (`lowbit.kernels.compiled`). What they compute is defined, to the bit, in `lowbit.kernels.reference`. They
are for inference: no gradient flows through them.
"""

import functools
import warnings
from collections.abc import Sequence

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


def _check(
    x: Tensor,
    packed: Tensor,
    levels: Sequence[int],
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    k: int,
    rows: int,
    low: int,
    high: int,
    out_scale: float | None,
    out_low: int,
    out_high: int,
) -> None:
    """``k`` is K as packed, ``rows`` how many scales ``x_scale`` may have."""
    if x.dtype not in _TYPES:
        raise LowbitError(f"x is {x.dtype}; float32, int8 and uint8 activations are allowed")
    check_weight(packed, levels, scale, bias, bits, k)
    if sums.dtype != torch.int32 or sums.shape != scale.shape:
        raise LowbitError(f"sums is {sums.dtype} {list(sums.shape)}; it is int32 [{scale.shape[0]}]")
    if x_scale is None:
        if x.dtype != torch.float32:
            raise LowbitError(f"x is {x.dtype}, so x_scale has to say what its steps are worth")
    elif x_scale.dtype != torch.float32 or x_scale.numel() not in (1, rows):
        raise LowbitError(f"x_scale is {x_scale.dtype} {list(x_scale.shape)}; it is float32, of 1 or {rows} numbers")
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


def _check_add(add: Tensor | None, add_scale: float, shape: tuple[int, ...]) -> None:
    if add is None:
        return
    if add.dtype not in _TYPES or add.shape != shape:
        raise LowbitError(
            f"add is {add.dtype} {list(add.shape)}; it is float32, int8 or uint8, of the output's shape {list(shape)}"
        )
    if not 0 < add_scale <= LARGEST_FLOAT:
        raise LowbitError(f"add_scale={add_scale!r} is not allowed; a positive number of float32's range is")


def _check_linear(
    x, packed, levels, scale, sums, bias, x_scale, bits, low, high, out_scale, out_low, out_high, add, add_scale
) -> tuple[int, ...]:
    """The output's shape."""
    if x.ndim < 1 or not x.shape[-1]:
        raise LowbitError(f"x is {list(x.shape)}; a linear layer takes [..., K]")
    *outer, k = x.shape
    rows = x.numel() // k
    _check(x, packed, levels, scale, sums, bias, x_scale, bits, k, rows, low, high, out_scale, out_low, out_high)
    shape = (*outer, scale.shape[0])
    _check_add(add, add_scale, shape)
    return shape


def _check_conv2d(
    x, packed, levels, scale, sums, bias, x_scale, bits, kernel, stride, padding, dilation, low, high, out_scale,
    out_low, out_high, add, add_scale,
) -> tuple[int, int, int, int]:  # fmt: skip
    """The output's shape."""
    if x.ndim != 4 or not all(x.shape[1:]):
        raise LowbitError(f"x is {list(x.shape)}; a convolution takes [B, C, H, W]")
    pairs = (("kernel_size", kernel, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    for name, pair, least in pairs:
        if len(pair) != 2 or pair[0] < least or pair[1] < least:
            raise LowbitError(f"{name}={list(pair)} is not allowed; two integers from {least} are")
    k = kernel[0] * kernel[1] * padded_channels(x.shape[1], tuple(kernel))
    _check(x, packed, levels, scale, sums, bias, x_scale, bits, k, x.shape[0], low, high, out_scale, out_low, out_high)
    size = []
    for i in (0, 1):
        room = x.shape[2 + i] + 2 * padding[i] - (kernel[i] - 1) * dilation[i] - 1
        if room < 0:
            raise LowbitError(
                f"x {list(x.shape)} padded by {list(padding)} is smaller than the kernel {list(kernel)} dilated by "
                f"{list(dilation)}"
            )
        size.append(room // stride[i] + 1)
    shape = (x.shape[0], scale.shape[0], *size)
    _check_add(add, add_scale, shape)
    return shape


def _out_dtype(out_scale: float | None, out_high: int) -> torch.dtype:
    return torch.float32 if out_scale is None else torch.uint8 if out_high > 127 else torch.int8


# ---- linear ----


def _fake_linear(
    x, packed, levels, scale, sums, bias, x_scale, bits, low=-127, high=127, relu=False, out_scale=None, out_low=-128,
    out_high=127, add=None, add_scale=1.0,
):  # fmt: skip
    check_devices(x, packed=packed, scale=scale, sums=sums, bias=bias, x_scale=x_scale, add=add)
    shape = _check_linear(
        x, packed, levels, scale, sums, bias, x_scale, bits, low, high, out_scale, out_low, out_high, add, add_scale
    )
    return x.new_empty(shape, dtype=_out_dtype(out_scale, out_high))


def _linear(
    x, packed, levels, scale, sums, bias, x_scale, bits, low=-127, high=127, relu=False, out_scale=None, out_low=-128,
    out_high=127, add=None, add_scale=1.0,
):  # fmt: skip
    check_devices(x, packed=packed, scale=scale, sums=sums, bias=bias, x_scale=x_scale, add=add)
    shape = _check_linear(
        x, packed, levels, scale, sums, bias, x_scale, bits, low, high, out_scale, out_low, out_high, add, add_scale
    )
    if not x.numel():
        return x.new_empty(shape, dtype=_out_dtype(out_scale, out_high))
    return compiled.linear(
        x, packed, tuple(levels), scale, sums, bias, x_scale, bits, low, high, add, relu=relu, out_scale=out_scale,
        out_low=out_low, out_high=out_high, add_scale=add_scale,
    )  # fmt: skip


def _linear_cpu(
    x, packed, levels, scale, sums, bias, x_scale, bits, low=-127, high=127, relu=False, out_scale=None, out_low=-128,
    out_high=127, add=None, add_scale=1.0,
):  # fmt: skip
    if not use_native():
        return _linear(
            x, packed, levels, scale, sums, bias, x_scale, bits, low, high, relu, out_scale, out_low, out_high, add,
            add_scale,
        )  # fmt: skip
    shape = _check_linear(
        x, packed, levels, scale, sums, bias, x_scale, bits, low, high, out_scale, out_low, out_high, add, add_scale
    )
    out = x.new_empty(shape, dtype=_out_dtype(out_scale, out_high))
    k, n = x.shape[-1], shape[-1]
    geometry = (x.numel() // k, 1, 1, k, k, n, 1, 1, 1, 1, 0, 0, 1, 1)
    x, add = x.contiguous(), None if add is None else add.contiguous()
    _run(
        x, packed, levels, scale, sums, bias, x_scale, bits, geometry, low, high, relu, out_scale, out_low, out_high,
        add, add_scale, out,
    )  # fmt: skip
    return out


# ---- convolution ----


def _new_nhwc(x: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _fake_conv2d(
    x, packed, levels, scale, sums, bias, x_scale, bits, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
    low=-127, high=127, relu=False, out_scale=None, out_low=-128, out_high=127, add=None, add_scale=1.0,
):  # fmt: skip
    check_devices(x, packed=packed, scale=scale, sums=sums, bias=bias, x_scale=x_scale, add=add)
    shape = _check_conv2d(
        x, packed, levels, scale, sums, bias, x_scale, bits, kernel_size, stride, padding, dilation, low, high,
        out_scale, out_low, out_high, add, add_scale,
    )  # fmt: skip
    return _new_nhwc(x, shape, _out_dtype(out_scale, out_high))


def _conv2d(
    x, packed, levels, scale, sums, bias, x_scale, bits, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
    low=-127, high=127, relu=False, out_scale=None, out_low=-128, out_high=127, add=None, add_scale=1.0,
):  # fmt: skip
    check_devices(x, packed=packed, scale=scale, sums=sums, bias=bias, x_scale=x_scale, add=add)
    shape = _check_conv2d(
        x, packed, levels, scale, sums, bias, x_scale, bits, kernel_size, stride, padding, dilation, low, high,
        out_scale, out_low, out_high, add, add_scale,
    )  # fmt: skip
    if not x.numel():
        return _new_nhwc(x, shape, _out_dtype(out_scale, out_high))
    kernel = tuple(kernel_size)
    return compiled.conv2d(
        x, packed, tuple(levels), scale, sums, bias, x_scale, bits, kernel, padded_channels(x.shape[1], kernel), stride,
        padding, dilation, low, high, add, relu=relu, out_scale=out_scale, out_low=out_low, out_high=out_high,
        add_scale=add_scale,
    )  # fmt: skip


def _conv2d_cpu(
    x, packed, levels, scale, sums, bias, x_scale, bits, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
    low=-127, high=127, relu=False, out_scale=None, out_low=-128, out_high=127, add=None, add_scale=1.0,
):  # fmt: skip
    if not use_native():
        return _conv2d(
            x, packed, levels, scale, sums, bias, x_scale, bits, kernel_size, stride, padding, dilation, low, high,
            relu, out_scale, out_low, out_high, add, add_scale,
        )  # fmt: skip
    shape = _check_conv2d(
        x, packed, levels, scale, sums, bias, x_scale, bits, kernel_size, stride, padding, dilation, low, high,
        out_scale, out_low, out_high, add, add_scale,
    )  # fmt: skip
    out = _new_nhwc(x, shape, _out_dtype(out_scale, out_high))
    batch, channels, *size = x.shape
    padded = padded_channels(channels, tuple(kernel_size))
    geometry = (batch, *size, channels, padded, shape[1], *kernel_size, *stride, *padding, *dilation)
    nhwc = torch.channels_last
    x, add = x.contiguous(memory_format=nhwc), None if add is None else add.contiguous(memory_format=nhwc)
    _run(
        x, packed, levels, scale, sums, bias, x_scale, bits, geometry, low, high, relu, out_scale, out_low, out_high,
        add, add_scale, out,
    )  # fmt: skip
    return out


# ---- the native call ----


@functools.cache
def use_native() -> bool:
    """Says once, where it is so, that the slow form serves."""
    if native.available():
        return True
    warnings.warn(
        f"lowbit's native kernels are not in use: {native.why_not()}. The PyTorch form serves instead, with the same "
        "results, but slower",
        stacklevel=2,
    )
    return False


def _run(
    x, packed, levels, scale, sums, bias, x_scale, bits, geometry, low, high, relu, out_scale, out_low, out_high,
    add, add_scale, out,
) -> None:  # fmt: skip
    """``x``, ``add`` and ``out`` lie in memory as the kernels want them, channels fastest."""
    # Held by these names until the call is over: a copy must not be freed under it.
    packed, scale, sums = packed.contiguous(), scale.contiguous(), sums.contiguous()
    bias = None if bias is None else bias.contiguous()
    x_scale = None if x_scale is None else x_scale.contiguous()
    pointers = (
        x.data_ptr(), packed.data_ptr(), scale.data_ptr(), sums.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if x_scale is None else x_scale.data_ptr(), out.data_ptr(),
        0 if add is None else add.data_ptr(),
    )  # fmt: skip
    native.run(
        pointers,
        (
            _TYPES[x.dtype], _TYPES[out.dtype], 0 if x_scale is None else x_scale.numel(), bits, *geometry, low, high,
            relu, out_low, out_high, torch.get_num_threads(), 0 if add is None else _TYPES[add.dtype],
        ),
        (1.0 if out_scale is None else out_scale, add_scale),
        levels,
    )  # fmt: skip


for _name, _fake, _any, _cpu in (
    ("lowbit::shift_linear", _fake_linear, _linear, _linear_cpu),
    ("lowbit::shift_conv2d", _fake_conv2d, _conv2d, _conv2d_cpu),
):
    torch.library.register_fake(_name, _fake)
    torch.library.impl(_name, "CompositeExplicitAutograd", _any)
    torch.library.impl(_name, "CPU", _cpu)
    torch.library.impl(_name, "Autograd", torch.library.fallthrough_kernel)  # results never require a gradient
