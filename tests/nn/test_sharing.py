"""Tied weights and modules under several names: they stay shared, or are refused by name."""

import copy

import pytest
import torch
from timm.layers.attention import Attention
from torch import nn

import lowbit
from lowbit.errors import CheckpointError, LowbitError
from lowbit.nn import QuantConfig, calibrate, quantize_, quantized_layers
from lowbit.nn.attention import LowBitAttention
from lowbit.nn.fuse import fuse
from lowbit.nn.packed import PackedLayer
from lowbit.quantizers import LSQ, StatsQ, get, names
from lowbit.serialization import read

WEIGHTS = {name: get(name)() for name in names("weight")}
KEEPS = {
    name: isinstance(method.weight(torch.eye(2)).right_inverse(torch.eye(2)), torch.Tensor)
    for name, method in WEIGHTS.items()
}
every_weight = pytest.mark.parametrize("name", WEIGHTS)


class Tied(nn.Module):
    """An embedding whose weight is also that of the last layer, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.a, self.b, self.h = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.b.weight, self.h.weight = self.a.weight, self.e.weight

    def forward(self, x):
        return self.h(self.b(torch.relu(self.a(self.e(x)))))


@every_weight
def test_tied_weights_stay_tied_or_are_refused_by_name(name):
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    if KEEPS[name]:
        quantize_(model, QuantConfig(weight=WEIGHTS[name], first_last="same"))
        latents = {found.name: found.latents for found in quantized_layers(model)}
        assert latents["a"][0] is latents["b"][0] and latents["h"][0] is model.e.weight
        assert torch.equal(model.e.weight, before["e.weight"])
        return
    with pytest.raises(LowbitError, match=r"'a' is also 'b.weight'.*filter_fn"):
        quantize_(model, QuantConfig(weight=WEIGHTS[name], first_last="same"))
    assert model.a.weight is model.b.weight and model.h.weight is model.e.weight
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_last_layer_alone_is_refused_by_the_embeddings_name():
    with pytest.raises(LowbitError, match=r"'h' is also 'e.weight'"):
        quantize_(Tied(), QuantConfig(weight=get("denseshift")(), first_last="same"), lambda layer, name: name == "h")


def test_query_key_reparameterization_does_not_untie():
    model = vit()
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    with pytest.raises(LowbitError, match=r"'blocks.0.attn.qkv' is also 'blocks.1.attn.qkv.weight'; use qkr=False"):
        quantize_(model, QuantConfig(weight=StatsQ(bits=2), qkr=True))
    assert isinstance(model.blocks[0].attn, Attention)
    quantize_(model, QuantConfig(weight=StatsQ(bits=2)))
    first, second = (model.blocks[i].attn.qkv.parametrizations.weight.original for i in range(2))
    assert first is second


def vit() -> nn.Module:
    return lowbit.models.create("vit_nano", 10, 3, 16, depth=2, embed_dim=16, num_heads=2)


def resave(model: nn.Module, path) -> nn.Module:
    return lowbit.load(lowbit.save(model, path / "model.safetensors"))


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weight", [None, StatsQ(bits=3), LSQ(bits=3)], ids=repr)
def test_ties_survive_save_and_load(weight, tmp_path):
    model = vit().eval()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.blocks[1].norm1.bias.data = model.blocks[0].norm1.bias.data  # two parameters, one memory
    if weight is not None:
        quantize_(model, QuantConfig(weight=weight, activation=LSQ(bits=4)))
        calibrate(model, X)
    again = resave(model, tmp_path)
    assert torch.equal(again(X), model(X))
    assert again.blocks[1].norm1.bias is again.blocks[0].norm1.bias
    layers = [again.blocks[i].mlp.fc1 for i in range(2)]
    held = [layer.weight if weight is None else layer.parametrizations.weight.original for layer in layers]
    assert held[0] is held[1]
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters()) - 16
    tied = read(tmp_path / "model.safetensors")[0]["shared"]
    assert len(tied) == 2 and all(name.startswith("blocks.1") for name in tied)


@pytest.mark.parametrize(
    "config",
    [
        None,
        QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8)),
        QuantConfig(weight=StatsQ(bits=2), activation=LSQ(bits=4, granularity="token", bias=True), attention=True),
        QuantConfig(weight=StatsQ(bits=2), activation=LSQ(bits=4, bias=True), attention=True, qkr=True),
        QuantConfig(weight=get("denseshift")(scale="statistical")),
    ],
    ids=["full precision", "layers", "attention", "qkr", "denseshift"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_modules_under_two_names_survive_everything(config, packed, tmp_path):
    model = vit().eval()
    model.blocks[1] = model.blocks[0]
    if config is not None:
        quantize_(model, config)
        calibrate(model, X)
    if packed and config is not None:
        model = lowbit.pack(model)
        assert any(isinstance(module, PackedLayer) for module in model.blocks[1].modules())
    assert model.blocks[1] is model.blocks[0]
    again = resave(model, tmp_path)
    assert again.blocks[1] is again.blocks[0]
    assert torch.equal(again(X), model(X))


class Shared(nn.Module):
    """Script-like: c is b."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.d = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.c = self.b

    def forward(self, x):
        return self.d(self.c(torch.relu(self.b(self.a(x)))))


def test_one_shared_layer_is_quantized_packed_and_fused_once():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    config = QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8), first_last="same", unsigned=("c",))
    model = quantize_(Shared(), config).eval()
    model(x)
    assert model.b is model.c and not model.c.input_quantizer.signed  # named by either name
    packed = lowbit.pack(model)
    assert packed.b is packed.c and all(isinstance(getattr(packed, name), PackedLayer) for name in "abcd")
    torch.testing.assert_close(packed(x), model(x))
    torch.testing.assert_close(fuse(packed, x)(x), packed(x))


def test_attention_under_two_names_is_replaced_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = Attention(8, 2)
            self.two = self.one

    for options in ({"activation": LSQ(), "attention": True}, {"qkr": True}):
        model = quantize_(Twice(), QuantConfig(**options))
        assert model.one is model.two and isinstance(model.one, LowBitAttention)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("shared", {"head.bias": "norm.weight"}),  # given already
        ("shared", {"blocks.7.norm1.weight": "norm.weight"}),  # no such place
        ("shared", {"x": ["norm.weight"]}),
        ("modules", {"blocks.1": "blocks"}),  # a part of itself
        ("modules", {"": ""}),
        ("modules", {"blocks.1.mlp": "blocks.0.attn"}),  # of another kind
        ("modules", {"blocks.1": ["blocks.0"]}),
        ("modules", 3),
    ],
)
def test_files_that_tie_what_does_not_fit_are_refused(key, wrong, tmp_path):
    import json

    from safetensors.torch import save_file

    from lowbit.container import checksum

    path = lowbit.save(vit(), tmp_path / "model.safetensors")
    header, tensors = read(path)
    header[key] = wrong
    header["sha256"] = checksum(tensors, header)
    save_file(tensors, path, metadata={"lowbit": json.dumps(header)})
    with pytest.raises(CheckpointError):
        lowbit.load(path)
