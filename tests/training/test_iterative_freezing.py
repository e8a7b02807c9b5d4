"""Iterative freezing: Algorithm 1 by hand, weights that stay, and exact resume."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.metrics.oscillation import OscillationState
from lowbit.nn import QuantConfig, quantize_, quantized_layers
from lowbit.quantizers import EWGS, LSQ, DenseShift, PoT, StatsQ
from lowbit.training.iterative_freezing import IterativeFreezing, freezing_step_


def quantized(method):
    torch.manual_seed(0)
    return quantize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), QuantConfig(weight=method, first_last="same"))


def test_the_algorithm_by_hand():
    # m = ½. Weight 0 goes 1 0 1 1, weight 1 goes 1 0 0 0, and is never seen to turn back.
    codes = [torch.tensor(k, dtype=torch.int16) for k in ([1, 1], [0, 0], [1, 0], [1, 0])]
    state = OscillationState(codes[0].clone(), torch.zeros(2, dtype=torch.int8), torch.zeros(2))
    average, frozen = codes[0].float(), torch.full((2,), -1, dtype=torch.int16)
    seen = []
    for k in codes[1:]:
        freezing_step_(k, state, average, frozen, threshold=0.4, momentum=0.5)
        seen.append((state.frequency.tolist(), average.tolist(), frozen.tolist()))
    assert seen[0] == ([0, 0], [0.5, 0.5], [-1, -1])
    assert seen[1] == ([0.5, 0], [0.75, 0.25], [1, -1])  # turned back: 0.5 > 0.4, frozen at round(0.75)
    assert seen[2] == ([0.25, 0], [0.875, 0.125], [1, -1])  # for good, though the frequency has fallen


def test_a_weight_is_frozen_at_its_average_not_at_its_present_code():
    codes = torch.tensor([0], dtype=torch.int16)
    state = OscillationState(torch.tensor([3], dtype=torch.int16), torch.tensor([-1], dtype=torch.int8), torch.zeros(1))
    average, frozen = torch.tensor([3.0]), torch.tensor([-1], dtype=torch.int16)
    freezing_step_(codes, state, average, frozen, threshold=0.05, momentum=0.1)
    assert average.item() == pytest.approx(2.7) and frozen.item() == 3


def test_the_threshold_by_hand():
    freezing = IterativeFreezing(quantized(LSQ()))
    for progress, expected in ((0, 0.1), (0.25, 0.1), (0.5, 0.0775), (0.625, 0.055), (0.875, 0.0160288), (1, 0.01)):
        assert freezing.threshold_of(progress) == pytest.approx(expected, abs=1e-6)
    seen = []
    freezing.update = seen.append
    freezing.on_step(SimpleNamespace(step=5, steps_per_epoch=4, config=SimpleNamespace(epochs=2)))
    assert seen == [pytest.approx(0.055)]


def noisy_steps(model, freezing, count, seed, optimizer=None):
    """SGD with momentum and decay on random gradients, a freezing update after each; codes of every step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.05)
    random, codes = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.grad = torch.randn(p.shape, generator=random) * (0.1 if p.numel() < 20 else 1)
        optimizer.step()
        freezing.update(0.05)
        codes.append([found.codes() for found in quantized_layers(model)])
    return codes


@pytest.mark.parametrize(
    "method", [LSQ(bits=3), LSQ(bits=8, granularity="channel"), LSQ(bits=2, learn_step=False), EWGS(bits=4)], ids=repr
)
def test_frozen_codes_never_change_again(method):
    model = quantized(method)
    freezing = IterativeFreezing(model, momentum=0.1)
    steps = [found.weight.step.detach().clone() for found in quantized_layers(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.05)
    noisy_steps(model, freezing, 20, 0, optimizer)
    first = [freezing.frozen(name) for name in ("0", "1")]
    assert sum(int((f >= 0).sum()) for f in first) > 10
    for codes in noisy_steps(model, freezing, 40, 1, optimizer):
        for now, held in zip(codes, first, strict=True):
            assert torch.equal(now[held >= 0], held[held >= 0])
    assert freezing.share() > sum(float((f >= 0).float().mean()) for f in first) / 2
    moved = [not torch.equal(found.weight.step, s) for found, s in zip(quantized_layers(model), steps, strict=True)]
    assert all(moved) == getattr(method, "learn_step", True)
    for found, name in zip(quantized_layers(model), ("0", "1"), strict=True):
        held = freezing.frozen(name)
        on_level = found.weight.levels[held.clamp_min(0).long()] * found.weight.scale(*found.latents)
        assert torch.equal(found.latents[0][held >= 0], on_level[held >= 0])


def test_free_weights_are_not_touched():
    model = quantized(LSQ(bits=3))
    freezing = IterativeFreezing(model)
    (latent,) = next(iter(quantized_layers(model))).latents
    freezing._held[0]["frozen"][0, 0] = 5
    before = latent.detach().clone()
    freezing.update(1.0)
    assert not torch.equal(latent[0, 0], before[0, 0])
    assert torch.equal(latent.flatten()[1:], before.flatten()[1:])


def test_state_goes_on_exactly():
    model = quantized(LSQ(bits=3))
    freezing = IterativeFreezing(model, momentum=0.1)
    noisy_steps(model, freezing, 15, 0)
    twin = quantized(LSQ(bits=3))
    twin.load_state_dict(model.state_dict())
    resumed = IterativeFreezing(twin, momentum=0.1)
    resumed.load_state_dict(freezing.state_dict())
    assert 0 < resumed.share() == freezing.share()
    for a, b in zip(noisy_steps(model, freezing, 15, 1), noisy_steps(twin, resumed, 15, 1), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    for a, b in zip(freezing.state_dict()["held"], resumed.state_dict()["held"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_was_cut_off_ends_like_one_that_was_not(few, quick, mlp, tmp_path):
    class StopHere:
        def __init__(self, at):
            self.at = at

        def on_epoch(self, state):
            if state.epoch == self.at:
                raise InterruptedError

    def run(out, stop):
        model = quantize_(mlp(dropout=0.0), QuantConfig(weight=LSQ(bits=2), first_last="same"))
        freezing = IterativeFreezing(model, threshold=0.02, end=0.001, momentum=0.1)
        config = quick(epochs=6, lr=0.05, out=str(tmp_path / out))
        return model, freezing, lambda: lowbit.train(model, few, config, callbacks=[freezing, StopHere(stop)])

    whole, whole_freezing, train = run("whole", None)
    record = train()
    with pytest.raises(InterruptedError):
        run("cut", 3)[2]()
    cut, cut_freezing, go_on = run("cut", None)
    go_on()
    assert record.history[-1]["iteratively_frozen"] == whole_freezing.share() == cut_freezing.share() > 0
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True))


def test_what_cannot_be_frozen_is_refused():
    for method in (StatsQ(bits=2), PoT(bits=3)):
        with pytest.raises(LowbitError, match=r"scale does not follow.*'0'"):
            IterativeFreezing(quantized(method))
    with pytest.raises(LowbitError, match="one latent"):
        IterativeFreezing(quantized(DenseShift()))
    model = quantized(LSQ())
    for wrong in ({"threshold": 1.5}, {"end": -0.1}, {"start": 1.0}, {"momentum": 0.0}):
        with pytest.raises(LowbitError, match=f"{next(iter(wrong))}="):
            IterativeFreezing(model, **wrong)
    with pytest.raises(LowbitError, match="no layer is called '7'"):
        IterativeFreezing(model).frozen("7")
    other = IterativeFreezing(model, threshold=0.2)
    with pytest.raises(LowbitError, match="settings"):
        other.load_state_dict(IterativeFreezing(model).state_dict())
