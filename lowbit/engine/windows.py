"""Lowering of everything that moves a window over an image, or changes its size: pooling, padding, interpolation.

A function here and in the modules beside it lowers the function of PyTorch that has its name.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.engine.format import Op
from lowbit.engine.format import Tensor as Stored
from lowbit.engine.values import Lowering, Value
from lowbit.errors import LowbitError


def ids_of_image(ids: Tensor) -> Tensor:
    """Ids ``[height, width, channels]`` of an image ``[1, channels, height, width]``."""
    if ids.ndim != 4 or len(ids) != 1:
        raise LowbitError(f"a tensor {list(ids.shape)} where plans take one image [1, channels, height, width]")
    return ids[0].permute(1, 2, 0)


def image_of(lowering: Lowering, stored: Stored) -> Value:
    """The image ``[1, channels, height, width]`` of a stored tensor."""
    size = (stored.height, stored.width, stored.channels)
    return Value(lowering.value(stored, size).ids.permute(2, 0, 1)[None])


def pair(value: Any) -> list[int]:
    """Two numbers, for height and width, of one or two."""
    return [value, value] if isinstance(value, int) else list(value)


def out_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of what a window moves over."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]


def pad(lowering: Lowering, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """`F.pad`."""
    if mode == "constant":
        filler = lowering.value(np.full(1, value or 0.0, np.float32), (1,))
        return Value(F.pad(x.ids, tuple(pad), value=int(filler.ids[0])))
    sides = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]  # the last dim first
    sides = [(0, 0)] * (x.ndim - len(sides)) + sides[::-1]
    return Value(torch.from_numpy(np.pad(x.ids.numpy(), sides, mode=_PADDING[mode])))


_PADDING: dict[str, Any] = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def pool(
    lowering: Lowering,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    largest: bool = False,
    divisor: int = 0,
) -> Value:
    """A pool: the largest number of each window, or the sum by ``divisor`` (0: the places in the image)."""
    ids = ids_of_image(x.ids)
    height, width, channels = ids.shape
    if padding[0] * 2 > kernel[0] or padding[1] * 2 > kernel[1]:
        raise LowbitError("pooling with a padding of more than half its window is not an operation of plans")
    size = out_size((height, width), kernel, stride, padding, (1, 1))
    source = lowering.dense(ids, (height, width, channels))
    if (source.height, source.width) != (height, width):  # its lines are not the image's
        source = _as_image(lowering, source, height, width) or lowering.copy(ids.flatten(), (height, width, channels))
    made = Stored(size[0], size[1], channels)
    numbers = {2: int(largest), **dict(enumerate([*kernel, *stride, *padding, 1, 1, divisor], 3))}
    lowering.add(Op("pool", [source], made, n=numbers))
    if not largest:
        lowering.exact = False
    return image_of(lowering, made)


def _as_image(lowering: Lowering, source: Stored, height: int, width: int) -> Stored | None:
    """A tensor of rows as one of lines and places, if nothing else depends on its lines; otherwise None."""
    read = any(source in op.inputs for op in lowering.ops if op.kind == "pool")
    made = lowering.made.get(source)
    if read or source.channels * height * width != source.rows * source.channels or made is None or made.kind == "mel":
        return None
    source.height, source.width = height, width
    return source


def _beyond(x: Value, kernel: list[int], stride: list[int], padding: list[int]) -> list[int]:
    """How many more lines and places the last windows of ``ceil_mode`` reach: 0 where they start outside the image."""
    more = []
    for size, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True):
        windows = -(-(size + 2 * p - k) // s)
        windows -= windows * s >= size + p
        more.append(max(0, windows * s + k - size - 2 * p))
    return more


def max_pool2d(
    lowering: Lowering,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    """`F.max_pool2d`, without dilation and indices."""
    if return_indices or pair(dilation) != [1, 1]:
        raise LowbitError("max-pooling with dilation or indices is not an operation of plans")
    kernel, pads = pair(kernel_size), pair(padding)
    strides = pair(stride) if stride else kernel
    more = _beyond(x, kernel, strides, pads) if ceil_mode else [0, 0]
    if any(more):
        x = pad(lowering, x, (pads[1], pads[1] + more[1], pads[0], pads[0] + more[0]), value=-math.inf)
        pads = [0, 0]
    return pool(lowering, x, kernel, strides, pads, largest=True)


def avg_pool2d(
    lowering: Lowering,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """`F.avg_pool2d`."""
    kernel, pads = pair(kernel_size), pair(padding)
    strides = pair(stride) if stride else kernel
    if ceil_mode and any(_beyond(x, kernel, strides, pads)):
        raise LowbitError("average pooling with ceil_mode beyond the image is not an operation of plans")
    divisor = divisor_override or (kernel[0] * kernel[1] if count_include_pad else 0)
    return pool(lowering, x, kernel, strides, pads, divisor=divisor)


def adaptive_avg_pool2d(lowering: Lowering, x: Value, output_size: Any) -> Value:
    """`F.adaptive_avg_pool2d` to a divisor of the size."""
    wanted = [n if n is not None else x.shape[2 + i] for i, n in enumerate(pair(output_size))]
    kernel = [x.shape[2 + i] // n for i, n in enumerate(wanted)]
    if any(x.shape[2 + i] % n for i, n in enumerate(wanted)):
        raise LowbitError(f"adaptive pooling of {list(x.shape[2:])} to {wanted} is not an operation of plans")
    return pool(lowering, x, kernel, kernel)


def interpolate(
    lowering: Lowering, x: Value, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **others: Any
) -> Value:
    """`F.interpolate` to a multiple of the size, by nearest places."""
    sizes = list(x.shape[2:])
    wanted = pair(size) if size is not None else [int(n * scale_factor) for n in sizes]
    if mode != "nearest" or x.ndim != 4 or any(w % n for w, n in zip(wanted, sizes, strict=True)):
        raise LowbitError("interpolation other than that of nearest places by an integer is not an operation of plans")
    factors = [w // n for w, n in zip(wanted, sizes, strict=True)]
    return Value(x.ids.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3))
