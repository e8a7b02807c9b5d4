"""The error that rounding queries and keys brings into their gradients."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit import LowbitError, QuantConfig
from lowbit.metrics import query_key_misestimation
from lowbit.nn import calibrate
from lowbit.nn.attention import low_bit_attentions
from lowbit.quantizers import LSQ, DenseShift, StatsQ


def vit(weight, **options):
    torch.manual_seed(0)
    model = lowbit.models.create("vit_nano", img_size=8, in_chans=1, patch_size=4, depth=2)
    options = {"activation": LSQ(bits=4), "attention": True, "first_last": None} | options
    model = lowbit.quantize_(model, QuantConfig(weight=weight, **options)).eval()
    return calibrate(model, batch()[0])


def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 8, 8, generator=random), torch.randint(10, (16,), generator=random)


def test_weights_that_lie_on_their_levels_are_estimated_without_error():
    model = vit(LSQ(bits=3))
    for attention in low_bit_attentions(model).values():
        held = attention.qkv.parametrizations.weight
        with torch.no_grad():
            inside = held[0].codes(held.original).clamp(1, 6) - 4  # no gradient passes at the bounds of the range
            held.original.copy_(inside * held[0].step)
    assert query_key_misestimation(model, [batch()]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("qkr", [False, True])
def test_fewer_bits_are_a_larger_error(qkr):
    errors = [query_key_misestimation(vit(StatsQ(bits=bits), qkr=qkr), [batch()]) for bits in (8, 4, 2)]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("qkr", [False, True])
def test_it_is_the_gradient_s_relative_error(qkr):
    """By finite use of autograd: the exact gradient is that of a model whose values alone are rounded."""
    model = vit(StatsQ(bits=2), qkr=qkr)
    x, y = batch()
    attentions = list(low_bit_attentions(model).values())

    def gradients():
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if qkr:
            held = [attention.qk.parametrizations.weight for attention in attentions]
            return [torch.cat([h.original0.grad.flatten(), h.original1.grad.flatten()]).clone() for h in held]
        return [attention.qkv.parametrizations.weight.original.grad[:256].flatten().clone() for attention in attentions]

    rounded = gradients()
    for attention in attentions:
        if qkr:
            attention.qk.parametrizations.weight[0].quantizer = nn.Identity()
        else:
            held = attention.qkv.parametrizations.weight
            kept = held[0].forward(held.original)[256:].detach()
            held[0].forward = lambda latent, kept=kept: torch.cat([latent[:256], kept])
    exact = gradients()
    expected = sum(float((g - e).norm() / e.norm()) for g, e in zip(rounded, exact, strict=True)) / len(exact)
    assert query_key_misestimation(vit(StatsQ(bits=2), qkr=qkr), [batch()]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("qkr", [False, True])
def test_it_leaves_the_model_as_it_was(qkr):
    model = vit(StatsQ(bits=2), qkr=qkr)
    before = model(batch()[0])
    query_key_misestimation(model, [batch()])
    assert torch.equal(model(batch()[0]), before) and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refusals():
    with pytest.raises(LowbitError, match="no low-bit attention"):
        query_key_misestimation(nn.Linear(2, 2), [])
    with pytest.raises(LowbitError, match="not quantized"):
        query_key_misestimation(vit(None), [batch()])
    with pytest.raises(LowbitError, match="several latents"):
        query_key_misestimation(vit(DenseShift(bits=2)), [batch()])
