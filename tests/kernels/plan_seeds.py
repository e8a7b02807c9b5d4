"""Small plans that together have every operation: a fuzzer's first inputs.

``python tests/kernels/plan_seeds.py FOLDER`` writes them, a few kB each.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lowbit
from lowbit.engine import Plan
from lowbit.engine.format import Op, Tensor, write
from lowbit.nn import QuantConfig
from lowbit.quantizers import LSQ, DenseShift, StatsQ


class Images(nn.Module):
    """A layer between two convolutions, on images."""

    def __init__(self, layer: nn.Module, channels: int = 3, width: int = 5):
        super().__init__()
        self.first, self.layer = nn.Conv2d(channels, width, 3, padding=1), layer
        self.last = nn.LazyConv2d(2, 1)

    def forward(self, x):
        return self.last(self.layer(self.first(x).relu())).flatten(1)


class Tokens(nn.Module):
    """LayerNorm, GELU, softmax and products of floats."""

    def __init__(self, size: int = 6):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(size, 3 * size), nn.LayerNorm(size), nn.Linear(size, 2)

    def forward(self, x):
        q, k, v = self.first(x).chunk(3, -1)
        rows = nn.functional.gelu(self.norm(x)) + torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return self.last(torch.cat([rows, rows.flip(1)], 1).mean(1))


class Gates(nn.Module):
    """Products and sums of images with a number for each channel, one for each place, and one for each number."""

    def forward(self, x):
        y = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        y = y + nn.functional.hardsigmoid(y.mean(1, keepdim=True))
        y = nn.functional.hardswish(y) * nn.functional.silu(y)
        return y - nn.functional.gelu(y, approximate="tanh")


def small_plans() -> dict[str, Plan]:
    """The plans by name."""
    torch.manual_seed(0)
    made = {}

    def add(name, model, x, bits=3, **more):
        settings = {"weight": DenseShift(bits=bits), "activation": LSQ(bits=8), "first_last": "same"} | more
        with torch.no_grad():
            model(x)
        lowbit.quantize_(model, QuantConfig(**settings))
        lowbit.calibrate(model.eval(), x)
        made[name] = lowbit.plan(lowbit.pack(model, x), x)

    image, tokens = torch.randn(2, 3, 6, 5), torch.randn(2, 5, 6)
    add("pools", Images(nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1))), image)
    add("depthwise", Images(nn.Sequential(nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.ReLU6())), image, 2)
    add("4 bits", Images(nn.Conv2d(5, 5, 3, 2, 1, dilation=2)), image, 4, first_last=8)
    add("more places of 4 bits", Images(nn.Conv2d(5, 5, 3, padding=1)), image, 4)
    add("gates", Images(Gates()), image)
    add("full precision of groups", Images(nn.Conv2d(6, 4, 3, groups=2), width=6), image)
    few = LSQ(bits=4)
    add("winograd", Images(nn.Sequential(nn.Conv2d(8, 9, 3, 1, 1), nn.ReLU()), width=8), image, activation=few)
    wide = Images(nn.Sequential(nn.Conv2d(64, 9, 3, 1, 1), nn.ReLU()), width=64)
    add("winograd of 16 outputs", wide, torch.randn(2, 3, 14, 13))
    add("full precision", Images(nn.Conv2d(5, 4, 3)), image, first_last=None)
    add("scales of images", Images(nn.Conv2d(5, 4, 3, padding=1)), image, activation=None)
    add("scales of rows", nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)), tokens, activation=None)
    each = LSQ(bits=4, granularity="token", bias=True)
    add("steps of tokens", nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)), tokens, activation=each)
    add("tokens", Tokens(), tokens)
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    def vit():
        return VisionTransformer(img_size=4, patch_size=2, in_chans=1, num_classes=2, embed_dim=4, depth=1, num_heads=2)

    def swin():
        window = {"img_size": 4, "patch_size": 1, "window_size": 2, "embed_dim": 4}
        return SwinTransformer(depths=(1,), num_heads=(2,), num_classes=2, **window)

    pixels = torch.randn(2, 1, 4, 4)
    add("vit", vit(), pixels, first_last=8)
    low = {"weight": StatsQ(bits=3), "attention": True}
    add("low-bit attention", vit(), pixels, activation=few, **low)
    add("low-bit attention with biases", vit(), pixels, activation=LSQ(bits=8, bias=True), **low)
    add("query-key attention", vit(), pixels, activation=few, qkr=True, **low)
    add("low-bit attention with positions", swin(), torch.randn(2, 3, 4, 4), activation=few, **low)
    x, y = Tensor(1, 3, 8001), Tensor(1, 3, 1)
    n = {1: 8001, 2: 1, 3: 4000, 4: 4000, 5: 8000, 6: 8001, 7: 8001, 8: 4000, 9: 4000, 10: 1, 11: 1}
    n |= {i: 128 * 1024 + 127 for i in range(12, 16)}
    data = {i: np.full(1, 0.05, np.float32) for i in range(4)}
    attention = Op("integer attention", [x, x, x], y, n=n, f={0: 0.1}, data=data)
    made["a wide head"] = Plan(write([attention], x, y))
    from lowbit.models.speech import LogMel

    class Sound(nn.Module):
        def __init__(self):
            super().__init__()
            self.mel = LogMel(sample_rate=1000, n_mels=6)
            self.first = nn.Conv2d(1, 2, 3, stride=2)

        def forward(self, x):
            return self.first(self.mel(x)).flatten(1)

    add("sound", Sound(), torch.randn(2, 130), first_last=8)
    return made


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    kinds = set()
    for name, plan in small_plans().items():
        plan.save(folder / f"{name.replace(' ', '_')}.lbp")
        print(name, len(plan.content), sorted({row["kind"] for row in plan.operations()}))
        kinds |= {row["kind"] for row in plan.operations()}
    print(len(kinds), "kinds of operations")
