"""What ``lowbit bench kernels`` computes: matrix products and convolutions, their data, and the checks of results."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import PackedWeight, pack_weight, reference

COLD_BYTES = 256 * 2**20
"""Weights that are to come from memory are rotated through so many bytes of copies, more than caches hold."""
X_SCALE = 3 / 127  # of activations given in 8 bits: N(0, 1) inside ±3
W_SCALE = 2.0**-6  # of all weights
TRAINED_4_BITS = (3.3, 2.0, 3.3, 4.1, 4.9, 5.9, 8.3, 23.2, 21.7, 7.0, 4.7, 3.3, 2.6, 1.9, 1.1, 2.7)
"""Percent of DenseShift's sixteen 4-bit codes, -128 ... 128, in a ResNet-8 with 65 % on CIFAR-10 (SGD 0.1,
6 epochs, seed 0). Before training ±128 have 0.4 % each."""


@dataclass(frozen=True)
class Case:
    """A product ``[M, K] · [N, K]^T``, or a 3×3 convolution with padding 1 of one image, as the same product.

    Args:
        m: rows, output pixels of a convolution.
        k: inputs, channels of a convolution.
        n: outputs.
        image: height and width of a convolution's input; None for a product.
        cold: whether weights come from memory at every call; else they stay in the caches, if those hold them.
        note: where such a thing occurs.
    """

    m: int
    k: int
    n: int
    image: int | None = None
    cold: bool = False
    note: str = ""

    @property
    def title(self) -> str:
        """The case's name in results."""
        if self.image:
            name = f"conv 3×3, {self.k}→{self.n}, {self.image}×{self.image}"
        else:
            name = f"{self.m}·{self.k}→{self.n}"
        return f"{name}{', cold' * self.cold}{f' ({self.note})' * bool(self.note)}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(N, K)`` or ``(N, C, 3, 3)``."""
        return (self.n, self.k, 3, 3) if self.image else (self.n, self.k)

    @property
    def operations(self) -> int:
        """Multiplications and additions, two for each pair."""
        return 2 * self.m * math.prod(self.weight_shape)

    def input(self) -> Tensor:
        """Activations from N(0, 1), float32, ``[M, K]`` or ``[1, C, H, W]`` with channels last in memory."""
        shape = (1, self.k, self.image, self.image) if self.image else (self.m, self.k)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return x.to(memory_format=torch.channels_last) if self.image else x

    def codes(self, levels: int, shares: Sequence[float] | None = None) -> Tensor:
        """Random codes 0 ... ``levels`` - 1, int16, of the weight's shape: evenly spread, or with these ``shares``."""
        generator = torch.Generator().manual_seed(2)
        if shares is None:
            return torch.randint(levels, self.weight_shape, generator=generator, dtype=torch.int16)
        limits = torch.tensor(shares).cumsum(0)[:-1] / sum(shares)
        return torch.bucketize(torch.rand(self.weight_shape, generator=generator), limits).to(torch.int16)

    def packed(self, bits: int, levels: str = "denseshift") -> PackedWeight:
        """A packed weight: ``levels`` are "denseshift" (±2^p), "trained" (those of 4 bits, spread as in a trained
        network) or "uniform" (the odd numbers, StatsQ's)."""
        if levels == "uniform":
            values = torch.arange(1 - 2**bits, 2**bits, 2, dtype=torch.float32)
        else:
            powers = 2.0 ** torch.arange(2 ** (bits - 1))
            values = torch.cat([-powers.flip(0), powers])
        codes = self.codes(2**bits, TRAINED_4_BITS if levels == "trained" else None)
        return pack_weight(codes, values, torch.full((self.n,), W_SCALE), bits)

    def integers(self, bits: int) -> Tensor:
        """Weights -2^(bits-1) ... 2^(bits-1)-1 for engines that take any integer, int8, of the weight's shape."""
        return (self.codes(2**bits) - 2 ** (bits - 1)).to(torch.int8)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """What is computed, by torch, in the dtype given."""
        return F.conv2d(x, weight, padding=1) if self.image else F.linear(x, weight)

    def copies(self, nbytes: int) -> int:
        """How many copies of a weight of ``nbytes`` an engine has to go round."""
        return math.ceil(COLD_BYTES / nbytes) if self.cold else 1


def rotate(steps: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A function that runs the next of ``steps`` at each call."""
    if len(steps) == 1:
        return steps[0]
    turns = itertools.cycle(steps)
    return lambda: next(turns)()


def exact(case: Case, x: Tensor, weight: PackedWeight) -> Tensor:
    """What `lowbit.kernels.reference` defines, by float64 products: sums of integers below 2^53 are exact in them.

    ``x`` is int8 of scale `X_SCALE`, or float32 that gets its scale from its rows or image.
    """
    if x.is_floating_point():
        scale = reference.dynamic_scale(x, 127)
        q = reference.quantize(x, scale, -127, 127)
    else:
        scale, q = torch.tensor(X_SCALE), x
    acc = case.product(q.double(), weight.integers().double()).to(torch.int64)
    if not case.image:
        return reference.epilogue(acc, scale.reshape(-1, 1), weight.scale)
    rows = reference.epilogue(acc.permute(0, 2, 3, 1).flatten(0, 2), scale.reshape(1, 1), weight.scale)
    return rows.reshape(1, case.image, case.image, case.n).permute(0, 3, 1, 2)


def check_equal(y: Tensor, expected: Tensor) -> None:
    """Refuses a result that is not the expected one to the bit."""
    if y.shape != expected.shape or not torch.equal(y, expected):
        raise LowbitError("its result differs from the reference, so it is not timed")


def check_close(y: Tensor, expected: Tensor, tolerance: float) -> float:
    """``|y - expected| / |expected|`` (Frobenius norms); refuses what is beyond ``tolerance``, NaN too."""
    y, expected = (t.detach().double().reshape(-1) for t in (y, expected))
    if y.shape != expected.shape:
        raise LowbitError(f"its result has {y.numel()} elements, not {expected.numel()}, so it is not timed")
    error = float((y - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise LowbitError(f"its result is off by {error:.1%}, more than {tolerance:.0%}, so it is not timed")
    return error


CASES = {
    "gemv": Case(1, 4096, 4096),
    "gemv-cold": Case(1, 4096, 4096, cold=True),
    "m8": Case(8, 4096, 4096),
    "m64": Case(64, 4096, 4096),
    "m256": Case(256, 4096, 4096),
    "deit-s-fc1": Case(197, 384, 1536, note="DeiT-S fc1"),
    "resnet-late": Case(196, 2304, 256, note="ResNet 3×3"),
    "resnet-early": Case(3136, 576, 64, note="ResNet 3×3"),
    "conv-256": Case(196, 256, 256, image=14),
    "conv-64": Case(3136, 64, 64, image=56),
}
"""By the names that ``--shape`` takes."""
