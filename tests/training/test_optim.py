import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lowbit.training import TrainConfig, optim


def test_schedule_by_hand():
    config = TrainConfig(epochs=4, lr=0.8, min_lr=0.2, warmup_epochs=1)
    rates = [optim.learning_rate(step, 4, config) for step in range(16)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8)  # cos 0
    assert rates[10] == pytest.approx(0.5)  # half-way: the mean of 0.8 and 0.2
    assert rates[7] == pytest.approx(0.2 + 0.6 * (1 + math.sqrt(0.5)) / 2)  # a quarter: cos 45°
    assert rates[15] == pytest.approx(0.2 + 0.6 * (1 + math.cos(math.pi * 11 / 12)) / 2)
    assert all(a > b for a, b in pairwise(rates[4:]))


def test_schedule_constant_and_fractional_warmup():
    config = TrainConfig(epochs=2, lr=0.3, schedule="constant", warmup_epochs=0.5)
    assert [optim.learning_rate(step, 6, config) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])


def test_warmup_may_last_the_whole_run():
    config = TrainConfig(epochs=1, lr=0.4, warmup_epochs=1)
    assert [optim.learning_rate(step, 4, config) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


class Marked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.last.weight.requires_grad_(False)

    def no_weight_decay(self):
        return {"embed"}


def test_groups_without_vectors_embeddings_and_frozen():
    model = Marked()
    decayed, kept = optim.param_groups(model, 0.1, "weights")
    assert [id(p) for p in decayed["params"]] == [id(model.first.weight)]
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    expected = [model.embed, model.first.bias, model.norm.weight, model.norm.bias, model.last.bias]
    assert {id(p) for p in kept["params"]} == {id(p) for p in expected}


def test_groups_with_everything():
    model = Marked()
    (group,) = optim.param_groups(model, 0.1, "all")
    assert len(group["params"]) == 6 and group["weight_decay"] == 0.1


def test_quantizer_steps_are_not_decayed_whatever_their_shape():
    import lowbit

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lsq = {"method": "lsq", "bits": 2, "granularity": "channel"}
    lowbit.quantize_(model, lowbit.QuantConfig(weight=lsq))
    step = model[1].parametrizations.weight[0].step
    assert step.ndim == 2
    decayed, kept = optim.param_groups(model, 0.1, "weights")
    assert id(step) in {id(p) for p in kept["params"]}
    latent = model[1].parametrizations.weight.original
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(latent), id(model[2].weight)}


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("sgd", "SGD"), ("radam", "RAdam")])
def test_optimizers_take_a_step(name, kind):
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = optim.build_optimizer(model, TrainConfig(epochs=1, optimizer=name, lr=0.1, momentum=0.5))
    assert type(optimizer).__name__ == kind
    optim.set_learning_rate(optimizer, 0.2)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)


def test_sgd_step_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    config = TrainConfig(epochs=1, optimizer="sgd", lr=0.1, momentum=0.5, weight_decay=0.25)
    optimizer = optim.build_optimizer(model, config)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    # g = 1 + 0.25·2 = 1.5, w = 2 - 0.15 = 1.85; g = 1 + 0.25·1.85 + 0.5·1.5 = 2.2125, w = 1.62875
    assert model.weight.item() == pytest.approx(1.62875)
