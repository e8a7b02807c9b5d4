"""What the kernels compute, in eager PyTorch and 64-bit integers: the definition that every other form equals.

1. Activations are integers q of 8 bits: given as int8 or uint8, or made from float32 by
   ``q = clamp(round_half_even(x / s), low, high)``, NaN counting as 0. Either s is given (calibrated: a number, or one
   for each row or image), or it follows the input (dynamic): ``s = max(absmax / high, 2^-126)`` of each row or image.
2. ``acc[m, n] = Σ_k q[m, k] · levels[code[n, k]]``, exact. Every form sums in 32 bits, which `pack_weight` makes sure
   is enough; so the order of summation, hence instruction set and number of threads, cannot matter.
3. The epilogue is float32, each operation rounded on its own (no fused multiply-add), in this order:
   ``y = (float(acc) · s[m]) · scale[n]``, ``y + bias[n]``, ``y + add`` (integers: ``float(add) · add_scale``),
   ReLU, ``clamp(round_half_even(y / out_scale), out_low, out_high)`` to int8 (uint8 if ``out_high > 127``); what is not
   asked for is left out.

Hence all forms agree bit for bit. Activations that stay floats are in `lowbit.kernels.floats`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels.packing import PackedWeight

SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Step 1 for float32 ``x``: integers, int64, of ``x``'s shape; ``scale`` broadcasts against it."""
    return torch.clamp(torch.round(torch.nan_to_num(x / scale, nan=0.0)), low, high).to(torch.int64)


def dynamic_scale(x: Tensor, high: int) -> Tensor:
    """The scale that step 1 derives from float32 ``x``: one for each index of dim 0, kept dims; NaN if one is in it."""
    # A tensor, since CUDA multiplies by the inverse of a plain number.
    divisor = torch.full((), high, dtype=x.dtype, device=x.device)
    return (x.abs().amax(dim=tuple(range(1, x.ndim)), keepdim=True) / divisor).clamp_min(SMALLEST_SCALE)


def epilogue(
    acc: Tensor,
    x_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: float | None = None,
    out_low: int = -128,
    out_high: int = 127,
    add: Tensor | None = None,
    add_scale: float = 1.0,
) -> Tensor:
    """Step 3; ``acc`` and ``add`` are ``[..., N]``, ``x_scale`` broadcasts against them; the others are ``[N]``."""
    y = acc.to(torch.float32) * x_scale * scale
    if bias is not None:
        y = y + bias
    if add is not None:
        y = y + (add if add.is_floating_point() else add.to(torch.float32) * torch.full_like(y, add_scale))
    if relu:
        y = torch.relu(y)
    if out_scale is not None:
        steps = torch.full((), out_scale, dtype=torch.float32, device=y.device)
        return quantize(y, steps, out_low, out_high).to(torch.uint8 if out_high > 127 else torch.int8)
    return y


def _activations(x: Tensor, x_scale: Tensor | None, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Integers (int64) and their scale, which broadcasts against ``x``."""
    scale = dynamic_scale(x, high) if x_scale is None else x_scale.reshape(-1, *(1,) * (x.ndim - 1))
    return (quantize(x, scale, low, high) if x.is_floating_point() else x.to(torch.int64)), scale


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    low: int = -127,
    high: int = 127,
    add: Tensor | None = None,
    **epilogue_options: Any,
) -> Tensor:
    """The linear layer ``[..., K]`` → ``[..., N]``; arguments as of `lowbit.kernels.shift_linear`."""
    q, x_scale = _activations(x.reshape(-1, x.shape[-1]), x_scale, low, high)
    acc = q @ weight.integers().to(torch.int64).T
    if add is not None:
        add = add.reshape(acc.shape)
    y = epilogue(acc, x_scale, weight.scale, bias, add=add, **epilogue_options)
    return y.reshape(*x.shape[:-1], -1)


def conv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    low: int = -127,
    high: int = 127,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    add: Tensor | None = None,
    **epilogue_options: Any,
) -> Tensor:
    """The convolution ``[B, C, H, W]`` → ``[B, N, H', W']``, padded by q = 0; arguments as of `shift_conv2d`."""
    q, x_scale = _activations(x, x_scale, low, high)
    q = F.pad(q, (padding[1], padding[1], padding[0], padding[0]))
    ky, kx = weight.kernel
    windows = q.unfold(2, (ky - 1) * dilation[0] + 1, stride[0]).unfold(3, (kx - 1) * dilation[1] + 1, stride[1])
    windows = windows[..., :: dilation[0], :: dilation[1]]  # [B, C, H', W', ky, kx]
    rows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)  # [B, H', W', C·ky·kx]
    acc = rows @ weight.integers().to(torch.int64).flatten(1).T
    if add is not None:
        add = add.permute(0, 2, 3, 1)
    return epilogue(acc, x_scale, weight.scale, bias, add=add, **epilogue_options).permute(0, 3, 1, 2)
