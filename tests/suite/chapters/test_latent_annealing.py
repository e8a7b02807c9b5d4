"""Annealing of DenseShift's latents: which move, and that the others are held to the bit."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn import quantized_layers
from lowbit.quantizers import DenseShift
from lowbit_suite.chapters.latent_annealing import AnnealLatents


@pytest.fixture
def layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16))
    lowbit.quantize_(model, lowbit.QuantConfig(weight=DenseShift(bits=2), first_last="same"))
    return list(quantized_layers(model))


def test_only_latents_near_zero_move(layers):
    annealing = AnnealLatents(layers, 0.25)
    before = [latent.detach().clone() for latent in annealing.latents]
    may = annealing.masks()
    for latent in annealing.latents:
        latent.grad = torch.ones_like(latent)
    annealing.on_gradients(None)
    for latent, mask in zip(annealing.latents, may, strict=True):
        assert torch.equal(latent.grad, mask.float())
        with torch.no_grad():
            latent += 1  # as momentum and decay do
    annealing.on_step(None)
    for latent, old, mask in zip(annealing.latents, before, may, strict=True):
        assert 0 < mask.double().mean() < 1
        assert torch.equal(mask, old.abs() <= 0.25 * 2 * old.abs().mean(1, keepdim=True))
        assert torch.equal(latent.detach(), torch.where(mask, old + 1, old))


def test_a_range_of_zero_holds_all(layers):
    assert AnnealLatents(layers, 0.0).movable() == 0
    assert 0 < AnnealLatents(layers, 0.05).movable() < AnnealLatents(layers, 0.5).movable() < 1


def test_the_largest_rate_is_a_tenth_of_the_range_at_the_median_row(layers):
    annealing = AnnealLatents(layers[:1], 0.25)
    for latent in annealing.latents:
        latent.data = torch.tensor([[1.0, -1.0], [3.0, -3.0], [50.0, -150.0]])  # a row far off does not count
    assert annealing.largest_rate() == pytest.approx(0.1 * 0.25 * 2 * 3.0)
