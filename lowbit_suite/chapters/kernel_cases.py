"""Random inputs on which notebook 15 compares the forms of a kernel with their definition."""

from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import PackedWeight, pack_weight


def random_layer(generator: torch.Generator, levels: dict[int, list[Tensor]]) -> tuple[str, Tensor, PackedWeight, dict]:
    """Return a random linear layer, whose sides are seldom multiples of anything.

    Args:
        generator: source of all choices.
        levels: for each number of bits, the level sets to choose from.

    Returns:
        The kind of activations (``"int8"``, ``"uint8"``, ``"float, scale given"`` or ``"float, scale found"``), the
        activations ``[M, K]``, the packed weight, and the keywords ``bias`` and ``x_scale`` of
        `lowbit.kernels.shift_linear`.
    """

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    bits = list(levels)[number(0, len(levels) - 1)]
    m, n, k = number(1, 9), number(1, 70), number(1, 300)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator)
    own = levels[bits][number(0, len(levels[bits]) - 1)]
    weight = pack_weight(codes, own, torch.rand(n, generator=generator))
    options: dict[str, Any] = {"bias": torch.randn(n, generator=generator) if number(0, 1) else None}
    kind = ("int8", "uint8", "float, scale given", "float, scale found")[number(0, 3)]
    if kind == "int8":
        x = torch.randint(-128, 128, (m, k), generator=generator).to(torch.int8)
        options["x_scale"] = torch.rand(m, generator=generator)
    elif kind == "uint8":
        x = torch.randint(0, 256, (m, k), generator=generator).to(torch.uint8)
        options["x_scale"] = torch.rand(1, generator=generator)
    else:
        x = torch.randn(m, k, generator=generator)
        options |= {"x_scale": torch.tensor([0.02])} if "given" in kind else {}
    return kind, x, weight, options


def random_floats(generator: torch.Generator, count: int) -> Tensor:
    """Return float32 numbers of random bits, ``[count]``: subnormal numbers, infinities and NaN too."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    bits[::4] &= -2139095041  # every fourth has an exponent of zero
    bits[::64] = 0
    return bits.view(torch.float32)


def random_normals(generator: torch.Generator, count: int) -> Tensor:
    """Return normal float32 numbers of random bits, ``[count]``, whose products with up to 2^7 are normal too."""
    field = torch.randint(1, 248, (count,), generator=generator)
    fraction = torch.randint(0, 2**23, (count,), generator=generator)
    sign = torch.randint(0, 2, (count,), generator=generator)
    return (field << 23 | fraction | sign << 31).to(torch.int32).view(torch.float32)
