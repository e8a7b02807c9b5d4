"""A new head on an old body: latents are kept, fine-tuning stays on the grid, the result can be saved."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.models import create, replace_head_
from lowbit.nn import quantized_layers
from lowbit.quantizers import LSQ, DenseShift, StatsQ

ALLOWED = {2: {1.0, 2.0}, 3: {1.0, 2.0, 4.0, 8.0}, 4: {2.0**p for p in range(8)}}


@pytest.fixture(scope="module")
def halves():
    whole = lowbit.data.load("digits").subset(train=400, test=100)
    return tuple(whole.only([str(d) for d in part]) for part in (range(5), range(5, 10)))


def train(model, data, **changes):
    settings = {"epochs": 2, "batch_size": 32, "optimizer": "sgd", "lr": 0.1, "progress": False} | changes
    return lowbit.train(model, data, lowbit.TrainConfig(**settings))


def latents(model):
    return {found.name: [t.detach().clone() for t in found.latents] for found in quantized_layers(model)}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_body_is_kept_and_fine_tuning_stays_on_the_grid(halves, bits, tmp_path):
    source, target = halves
    torch.manual_seed(0)
    model = lowbit.quantize_(create("resnet8", 5, 1, 8), lowbit.QuantConfig(weight=DenseShift(bits=bits)))
    train(model, source)
    before, body = latents(model), {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("fc.")}
    old_head = model.fc
    replace_head_(model, 5)
    assert model.fc is not old_head and not torch.equal(model.fc.weight, old_head.weight)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in body.items())
    for name, kept in latents(model).items():
        assert all(torch.equal(a, b) for a, b in zip(kept, before[name], strict=True))
    train(model, target, epochs=1)
    after = latents(model)
    assert any(not torch.equal(a, b) for name in after for a, b in zip(after[name], before[name], strict=True))
    for found in quantized_layers(model):
        assert set(found.layer.weight.abs().unique().tolist()) <= ALLOWED[bits]
    again = lowbit.load(lowbit.save(model, tmp_path / "model.safetensors"))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_another_number_of_classes_and_a_quantized_head(tmp_path):
    config = lowbit.QuantConfig(weight=StatsQ(bits=4), activation=LSQ(bits=4), first_last=8)
    model = lowbit.quantize_(create("vit_nano", 10, 1, 8), config)
    methods = {f.name: (f.weight.config, f.activation.config) for f in quantized_layers(model)}
    replace_head_(model, 3)
    assert {f.name: (f.weight.config, f.activation.config) for f in quantized_layers(model)} == methods
    assert model.head.weight.shape == (3, 128) and model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    lowbit.load(lowbit.save(model, tmp_path / "model.safetensors"))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(LowbitError, match="no linear layer"):
        replace_head_(nn.Conv2d(3, 3, 3), 2)
    with pytest.raises(LowbitError, match="num_classes=0"):
        replace_head_(create("resnet8"), 0)
