"""Packed layers inside models of any dtype, and what a model's own code may ask of them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn.packed import PackedConv2d, PackedLayer, PackedLinear, is_stored
from lowbit.quantizers import LSQ, DenseShift, StatsQ

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float64)
VIT = {"attention": True, "first_last": 8}
TOKENS = LSQ(bits=8, granularity="token", bias=True)
MODELS = {
    "resnet8": ("resnet8", {"weight": DenseShift(bits=3), "activation": LSQ(bits=8), "first_last": 8}),
    "resnet8, float inputs": ("resnet8", {"weight": StatsQ(bits=3), "first_last": 8}),
    "depthwise": ("mobilenet_v2", {"weight": StatsQ(bits=4), "activation": LSQ(bits=8), "first_last": 8}),
    "vit": ("vit_nano", {"weight": StatsQ(bits=3), "activation": LSQ(bits=8)}),
    "vit, attention": ("vit_nano", {"weight": StatsQ(bits=3), "activation": LSQ(bits=8), **VIT}),
    "vit, tokens, biases": ("vit_nano", {"weight": StatsQ(bits=3), "activation": TOKENS, **VIT}),
    "vit, tokens, QKR": ("vit_nano", {"weight": StatsQ(bits=4), "activation": TOKENS, **VIT, "qkr": True}),
}


def images(dtype=torch.float32, n=2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def quantized(name, dtype=torch.float32):
    torch.manual_seed(0)
    model, config = MODELS[name]
    model = lowbit.models.create(model, 10).to(dtype)
    with torch.no_grad():
        model.train()(images(dtype, 8))
    model = lowbit.calibrate(lowbit.quantize_(model.eval(), lowbit.QuantConfig(**config)), images(dtype, 8))
    with torch.no_grad():  # biases that matter
        for module in model.modules():
            for bias in (getattr(module, "bias_in", None), getattr(module, "bias_out", None)):
                if bias is not None:
                    bias.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    return model


def near(a, b, share):
    return (a.double() - b.double()).norm() <= share * b.double().norm()


@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for name in MODELS for dtype in DTYPES if name != "depthwise" or dtype == torch.bfloat16],  # slow
    ids=str,
)
def test_outputs_have_the_dtype_of_the_input(name, dtype, tmp_path):
    model, x = quantized(name, dtype), images(dtype)
    packed = lowbit.pack(model, x)
    with torch.no_grad():
        expected, found = model(x), packed(x)
        assert found.dtype == expected.dtype == dtype
        # Norms in half precision move values across steps.
        assert near(found, expected, 0.3 if dtype in HALVES else 0.05)
        again = lowbit.load(lowbit.save(packed, tmp_path / "m.safetensors"))
        assert torch.equal(again(x), found)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["resnet8", "vit, attention"])
def test_a_packed_model_can_be_converted(name, dtype):
    packed = lowbit.pack(quantized(name))
    layers = {name for name, module in packed.named_modules() if isinstance(module, PackedLayer)}
    numbers = {name: buffer.clone() for name, buffer in packed.named_buffers() if name.rpartition(".")[0] in layers}
    with torch.no_grad():
        before = packed(images())
        half = copy.deepcopy(packed).to(dtype)
        after = half(images(dtype))
        assert after.dtype == dtype and near(after, before, 0.3)
        for n, buffer in half.named_buffers():
            if n in numbers:
                assert torch.equal(buffer, numbers[n])  # dtype and all
        assert torch.equal(half.float().to(dtype)(images(dtype)), after)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_gives_what_it_gives_the_quantized_model(name):
    model = quantized(name)
    packed = lowbit.pack(model, images())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = model(images()), packed(images())
    assert found.dtype == expected.dtype and near(found, expected, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_one_layer_in_every_dtype(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8)).to(dtype)
    x = torch.randn(5, 24).to(dtype)
    lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(bits=2), LSQ(bits=8), first_last="same"))
    lowbit.calibrate(model.eval(), x)
    packed = lowbit.pack(model, x)
    layer = packed[0]
    assert next(packed.parameters()).dtype == dtype and not next(packed.parameters()).requires_grad
    assert layer.weight.dtype == dtype and layer.weight.device == x.device and tuple(layer.weight.shape) == (16, 24)
    with torch.no_grad():
        assert layer(x).dtype == dtype and near(layer(x), model[0](x), 0.02)
        assert layer(x[:0]).dtype == dtype and layer(x[:0]).shape == (0, 16)
        assert near(layer.weight.to(torch.float32), model[0].weight, 1e-2)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)


def test_a_packed_weight_stands_for_a_tensor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(bits=2), first_last="same"))
    layer = lowbit.pack(model)[0]
    weight, x = layer.weight, torch.randn(5, 24)
    with torch.no_grad():
        dense = model[0].weight.clone()
    torch.testing.assert_close(weight.dequantize(), dense)
    dense = weight.dequantize()
    for found, expected in (
        (F.linear(x, weight), F.linear(x, dense)),
        (x @ weight.t(), x @ dense.t()),
        (x @ weight.T, x @ dense.T),
        (weight @ x.T, dense @ x.T),
        (weight * 2, dense * 2),
        (2 * weight, 2 * dense),
        (-weight, -dense),
        (weight[3], dense[3]),
        (torch.cat([weight, x]), torch.cat([dense, x])),
        (weight.abs().mean(1), dense.abs().mean(1)),
        (torch.zeros_like(weight), torch.zeros_like(dense)),
        (weight.to(torch.float64), dense.double()),
    ):
        assert torch.equal(found, expected)
    assert x.double().to(weight).dtype == torch.float32
    assert (weight.ndim, weight.dim(), weight.numel(), weight.size(0), len(weight)) == (2, 2, 384, 16, 16)
    assert not weight.requires_grad and weight.is_floating_point() and not weight.is_cuda
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
        weight.unheard_of  # noqa: B018
    again = torch.load(io.BytesIO(_pickled(layer)), weights_only=False)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and torch.equal(again(x), layer(x))


def _pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return file.getvalue()


def test_packed_layers_have_the_sizes_of_torch_s():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, (1, 3), dilation=(1, 2))
    model, x = nn.Sequential(first, second, nn.Flatten(), nn.Linear(16, 6)), torch.randn(2, 3, 4, 11)
    lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(bits=2), first_last="same"))
    packed = lowbit.pack(model, x)
    sizes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    for index in (0, 1):
        assert isinstance(packed[index], PackedConv2d)
        assert [getattr(packed[index], n) for n in sizes] == [getattr(model[index], n) for n in sizes]
    assert isinstance(packed[3], PackedLinear)
    assert [getattr(packed[3], n) for n in ("in_features", "out_features")] == [model[3].in_features, 6]


@pytest.mark.parametrize(
    ("low", "high", "allowed"),
    [(-128, 127, True), (0, 255, True), (-1, 1, True), (0, 256, False), (-1, 128, False), (-129, 1, False),
     (-5, 0, False), (1, 1, False), (2, 1, False)],
)  # fmt: skip
def test_the_input_range_of_a_packed_layer_is_that_of_an_8_bit_integer(low, high, allowed):
    torch.manual_seed(0)
    model = lowbit.quantize_(nn.Sequential(nn.Linear(8, 4)), lowbit.QuantConfig(StatsQ(bits=2), first_last="same"))
    packed = lowbit.pack(model)[0]
    settings = packed.settings() | {"low": low, "high": high}
    if allowed:
        assert PackedLinear.restore(settings, packed.state_dict()).high == high
    else:
        with pytest.raises(LowbitError, match=f"low={low}, high={high} is not allowed"):
            PackedLinear.restore(settings, packed.state_dict())


def test_a_convolution_restored_without_geometry_has_torch_s_defaults():
    torch.manual_seed(0)
    model = lowbit.quantize_(nn.Sequential(nn.Conv2d(2, 4, 3)), lowbit.QuantConfig(StatsQ(bits=2), first_last="same"))
    packed = lowbit.pack(model, torch.randn(1, 2, 5, 5))[0]
    settings = {k: v for k, v in packed.settings().items() if k not in ("stride", "padding", "dilation")}
    bare = PackedConv2d.restore(settings, packed.state_dict())
    assert (bare.stride, bare.padding, bare.dilation) == ((1, 1), (0, 0), (1, 1))
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(bare(x), packed(x))


def test_stored_layers_follow_the_model_s_dtype():
    model = lowbit.quantize_(lowbit.models.create("ds_cnn", 10), lowbit.QuantConfig(weight=DenseShift(bits=3)))
    packed = lowbit.pack(model.eval())
    stored = next(m for m in packed.modules() if is_stored(m))
    assert stored.weight.dtype == torch.float32 and stored.bfloat16().weight.dtype == torch.bfloat16
