"""Batches of any size: empty ones, exported programs with an open batch, and dynamic compilation, over the registry."""

import dataclasses

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.functional import lsq, lsq_step, lsqplus, lsqplus_start
from lowbit.nn import QuantConfig, calibrate, quantize_
from lowbit.nn.attention import LowBitAttention
from lowbit.quantizers import LSQ, Binary, DenseShift, DoReFa, StatsQ, Ternary, Uniform, get, names

CONFIGS = {name: QuantConfig(weight=get(name)(), activation=LSQ(bits=4)) for name in names("weight")}
CONFIGS |= {f"{name} inputs": QuantConfig(activation=get(name)()) for name in names("activation")}
CONFIGS |= {
    "statsq, 1 bit": QuantConfig(weight=StatsQ(bits=1)),
    "dorefa, 1 bit": QuantConfig(weight=DoReFa(bits=1)),
    "binary, ste": QuantConfig(weight=Binary(gradient="ste")),
    "ternary, channel": QuantConfig(weight=Ternary(granularity="channel")),
    "denseshift, scale": QuantConfig(weight=DenseShift(scale="pow2")),
    "uniform, learned": QuantConfig(weight=Uniform(scale="learned", gradient="masked")),
    "lsq, channel": QuantConfig(weight=LSQ(granularity="channel"), activation=LSQ(granularity="channel", bias=True)),
    "lsq, inside": QuantConfig(weight=LSQ(bounds="inside"), activation=LSQ(bounds="inside", smallest_step=1e-5)),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model(config: QuantConfig) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    config = dataclasses.replace(config, first_last="same")
    return calibrate(quantize_(nn.Sequential(*layers), config), images(4))


def images(n: int, size: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


@every_config
def test_an_empty_batch_has_no_outputs_and_zero_gradients(config):
    quantized = model(config)
    y = quantized(images(0))
    y.sum().backward()
    assert y.shape == (0, 2)
    assert all(p.grad is None or not p.grad.any() for p in quantized.parameters())


@every_config
def test_an_exported_program_takes_any_batch(config):
    quantized = model(config).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(quantized, (images(3),), dynamic_shapes=shapes).module()
    for n in (1, 5):
        torch.testing.assert_close(program(images(n)), quantized(images(n)))


@every_config
def test_dynamic_compilation_takes_any_batch(config):
    torch._dynamo.reset()
    quantized = model(config)
    compiled = torch.compile(quantized, backend="eager", dynamic=True, fullgraph=True)
    for n in (2, 3, 5):
        y = compiled(images(n))
        torch.testing.assert_close(y, quantized(images(n)))
        y.sum().backward()


ATTENTION = {
    "factors": QuantConfig(StatsQ(bits=2), LSQ(bits=2, granularity="token", bias=True), attention=True),
    "qkr": QuantConfig(StatsQ(bits=2), LSQ(bits=2, granularity="token", bias=True), attention=True, qkr=True),
    "qkr, published options": QuantConfig(
        StatsQ(bits=2),
        LSQ(bits=2, granularity="token", bias=True),
        first_last=8,
        attention=True,
        qkr=True,
        z_bias="head",
        softmax_step="query",
        end_bias=True,
    ),
}


def vit() -> nn.Module:
    return lowbit.models.create("vit_nano", 10, 3, 16, depth=1)


def swin() -> nn.Module:
    options = {"depths": (2, 1), "embed_dim": 24, "num_heads": (2, 4), "window_size": 4}
    return lowbit.models.create("swin_tiny_patch4_window7_224", 10, 3, 64, **options)


@pytest.mark.slow
@pytest.mark.parametrize("config", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize(("make", "size"), [(vit, 16), (swin, 64)], ids=["vit", "swin"])
def test_attention_takes_any_batch(make, size, config):
    torch._dynamo.reset()
    torch.manual_seed(0)
    quantized = calibrate(quantize_(make(), config), images(2, size)).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(quantized, (images(3, size),), dynamic_shapes=shapes).module()
    compiled = torch.compile(quantized, backend="eager", dynamic=True)
    for n in (2, 5):
        torch.testing.assert_close(program(images(n, size)), quantized(images(n, size)))
        torch.testing.assert_close(compiled(images(n, size)), quantized(images(n, size)))


@pytest.mark.parametrize("query_key", [False, True])
@pytest.mark.parametrize("windows", [False, True], ids=["vit", "swin"])
def test_attention_of_an_empty_batch(windows, query_key):
    """Of the layer alone: timm's whole Swin does not take an empty batch, quantized or not."""
    source = WindowAttention(8, 2, window_size=(2, 2)) if windows else Attention(8, 2, qkv_bias=True)
    options = {"mask": torch.zeros(3, 4, 4)} if windows else {}
    low = LowBitAttention(source, StatsQ(bits=2), LSQ(bits=2, granularity="token", bias=True), query_key)
    assert low(torch.randn(0, 4, 8), **options).shape == (0, 4, 8)
    low(torch.randn(6, 4, 8), **options)
    y = low(torch.randn(0, 4, 8), **options)
    y.sum().backward()
    assert y.shape == (0, 4, 8)


def test_functions_of_nothing():
    nothing = torch.empty(0, 3)
    assert lsq(nothing, torch.tensor(1.0), 4).shape == (0, 3)
    assert lsqplus(nothing, torch.tensor(1.0), torch.tensor(0.0), 4).shape == (0, 3)
    for start in (lambda: lsq_step(nothing, (1, 1), 4), lambda: lsqplus_start(nothing, 4)):
        with pytest.raises(LowbitError, match=r"\[0, 3\]"):
            start()
