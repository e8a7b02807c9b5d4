"""Dampening: the regularizer by hand, its schedule, and the gradient that the callback adds."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn import QuantConfig, quantize_, quantized_layers
from lowbit.quantizers import EWGS, LSQ, APoT, DenseShift, PoT, StatsQ
from lowbit.training.dampening import Dampening, cosine, dampening_loss

METHODS = [LSQ(bits=2), LSQ(bits=3, granularity="channel"), EWGS(bits=2), StatsQ(bits=2), PoT(bits=3)]


def quantized(method, layers=2):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))
    return quantize_(model, QuantConfig(weight=method, first_last="same"))


def test_loss_and_gradient_by_hand():
    w = torch.tensor([-3.0, -0.75, 0.25, 1.5], requires_grad=True)
    q = torch.tensor([-2.0, -1.0, 0.0, 1.0], requires_grad=True)
    loss = dampening_loss(w, q, -2.0, 1.0)
    assert loss.item() == 0 + 0.25**2 + 0.25**2 + 0
    loss.backward()
    assert w.grad.tolist() == [0, 0.5, 0.5, 0]  # 2·(w - q); a clipped weight is free
    assert q.grad is None


def test_bounds_may_differ_by_channel_and_get_no_gradient():
    w = torch.tensor([[0.4, 3.0], [0.4, 3.0]], requires_grad=True)
    high = torch.tensor([[1.0], [4.0]], requires_grad=True)
    dampening_loss(w, torch.zeros(2, 2), -high, high).backward()
    assert torch.allclose(w.grad, torch.tensor([[0.8, 0.0], [0.8, 6.0]])) and high.grad is None


def test_the_strength_goes_from_zero_at_a_quarter_to_all_at_the_end():
    dampening = Dampening(quantized(LSQ()), strength=0.1, start=0.25)
    for progress, expected in (
        (0, 0),
        (0.25, 0),
        (0.5, 0.025),
        (0.625, 0.05),
        (0.875, 0.09330127),
        (1, 0.1),
        (1.3, 0.1),
    ):
        assert dampening.weight_of(progress) == pytest.approx(expected)
    assert cosine(0.5, 0.0, 4.0, 2.0) == pytest.approx(3.0)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("had_gradient", [True, False])
def test_the_added_gradient_is_that_of_the_loss(method, had_gradient):
    model = quantized(method)
    latents = [found.latents[0] for found in quantized_layers(model)]
    with torch.no_grad():
        latents[0].mul_(2.5)  # some weights beyond the grid
    loss = 0
    for found in quantized_layers(model):
        scale, levels = found.weight.scale(*found.latents), found.weight.levels
        loss = loss + dampening_loss(found.latents[0], found.layer.weight, scale * levels[0], scale * levels[-1])
    expected = torch.autograd.grad(0.3 * loss, latents)
    before = [torch.ones_like(p) if had_gradient else torch.zeros_like(p) for p in latents]
    for p, start in zip(latents, before, strict=True):
        p.grad = start.clone() if had_gradient else None
    Dampening(model).add_gradients(0.3)
    for p, start, added in zip(latents, before, expected, strict=True):
        assert added.abs().max() > 0 and torch.allclose(p.grad - start, added, atol=1e-6)


def test_the_callback_counts_the_share_of_all_steps():
    model = quantized(LSQ(bits=2))
    dampening = Dampening(model, strength=0.1, start=0.25)
    (latent,) = next(iter(quantized_layers(model))).latents
    state = SimpleNamespace(config=SimpleNamespace(epochs=2), steps_per_epoch=4)
    state.step = 2
    dampening.on_gradients(state)
    assert latent.grad is None  # a quarter is done: λ = 0 still
    state.step = 5  # half of the rest: λ = 0.05
    dampening.on_gradients(state)
    added = latent.grad.clone()
    latent.grad = None
    dampening.add_gradients(0.05)
    assert torch.allclose(latent.grad, added, rtol=1e-5) and added.any()


def test_dampened_weights_end_nearer_to_their_levels(few, quick, mlp):
    distances = []
    for callbacks in ([], None):
        model = quantize_(mlp(dropout=0.0), QuantConfig(weight=LSQ(bits=3), first_last="same"))
        callbacks = [Dampening(model, strength=2.0, start=0.0)] if callbacks is None else callbacks
        lowbit.train(model, few, quick(epochs=20), callbacks=callbacks)
        (found, _) = quantized_layers(model)
        w, step = found.latents[0], found.weight.scale(*found.latents)
        inside = (w > -4 * step) & (w < 3 * step)
        distances.append(((w - found.layer.weight).abs() / step)[inside].mean().item())
    assert distances[1] < 0.7 * distances[0]


def test_what_cannot_be_dampened_is_refused():
    with pytest.raises(LowbitError, match=r"one latent.*'0'.*has 4"):
        Dampening(quantized(DenseShift(bits=3)))
    with pytest.raises(LowbitError, match=r"nearest level.*'0'.*APoT"):
        Dampening(quantized(APoT()))
    with pytest.raises(LowbitError, match="none; call quantize_"):
        Dampening(nn.Linear(2, 2))
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(LowbitError, match="strength="):
            Dampening(quantized(LSQ()), strength=strength)
    with pytest.raises(LowbitError, match=r"start=1\.0"):
        Dampening(quantized(LSQ()), start=1.0)
