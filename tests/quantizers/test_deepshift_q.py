"""DeepShift-Q against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowbit.errors import LowbitError
from lowbit.functional import deepshift_q, deepshift_q_codes, deepshift_q_levels
from lowbit.nn import QuantConfig, quantize_
from lowbit.quantizers import DeepShiftQ

weights = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-40, -1e-40, math.inf, -math.inf, 2**-0.5, -(2**-1.5), 2**-2.5]),
    st.floats(-2, 2, width=32),
)


def test_levels_by_hand():
    assert deepshift_q_levels(2).tolist() == [-1, -0.5, 0.5, 1]
    assert deepshift_q_levels(3).tolist() == [-1, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5, 1]
    assert len(deepshift_q_levels(6)) == 64 and deepshift_q_levels(6).abs().min() == 2**-31


def test_values_by_hand():
    # 3 bits: geometric thresholds at 2^-2.5 = 0.177, 2^-1.5 = 0.354 and 2^-0.5 = 0.707
    w = torch.tensor([0.0, -0.0, 0.1, -0.17, 0.18, -0.35, 0.36, 0.70, -0.71, 3.0, -math.inf])
    wanted = [0.125, 0.125, 0.125, -0.125, 0.25, -0.25, 0.5, 0.5, -1, 1, -1]
    assert deepshift_q(w, bits=3).tolist() == wanted
    assert deepshift_q_codes(w, bits=3).tolist() == [4, 4, 4, 3, 5, 2, 6, 6, 0, 7, 0]


def test_next_to_a_threshold_it_is_the_rounded_logarithm():
    """Float neighbors of 2^-½ ... 2^-2½; where the logarithm is a tie it goes to the even exponent."""
    middle = torch.tensor([2**-0.5, 2**-1.5, 2**-2.5])
    w = torch.cat([middle, middle.nextafter(torch.zeros(3)), middle.nextafter(torch.ones(3))])
    assert torch.equal(deepshift_q(w, bits=4), torch.exp2(torch.round(torch.log2(w))))


def test_gradient_is_the_identity_everywhere():
    w = torch.tensor([0.0, -0.3, 5.0, -1e-9], requires_grad=True)
    grad = torch.tensor([1.0, -2.0, 3.0, 4.0])
    deepshift_q(w, bits=2).backward(grad)
    assert torch.equal(w.grad, grad)


@given(st.integers(2, 6), st.lists(weights, min_size=1, max_size=8))
def test_values_are_always_in_the_set_and_agree_with_the_codes(bits, values):
    w = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(deepshift_q(w, bits), deepshift_q_levels(bits)[deepshift_q_codes(w, bits).long()])


@pytest.mark.parametrize("bits", range(2, 7))
def test_levels_are_kept(bits):
    levels = deepshift_q_levels(bits)
    assert torch.equal(deepshift_q(levels, bits), levels)
    assert deepshift_q_codes(levels, bits).tolist() == list(range(2**bits))


def test_nan_is_passed_on():
    assert deepshift_q(torch.tensor([math.nan]), bits=4).isnan().all()


@pytest.mark.parametrize(("clamp", "latent"), [("forward", [0.1, -0.2, 3.0]), ("latent", [0.5, -0.5, 1.0])])
def test_the_released_code_clamps_the_latent_itself(clamp, latent):
    w = torch.tensor([0.1, -0.2, 3.0], requires_grad=True)
    quantizer = DeepShiftQ(bits=2, clamp=clamp).weight(w)
    before = quantizer(w)
    quantizer.before_step_(0.5, w)
    assert w.tolist() == torch.tensor(latent).tolist()
    assert torch.equal(quantizer(w), before)


def test_a_clamped_latent_springs_back_and_keeps_its_sign():
    """Twenty steps of 0.1 down: the plain weight turns negative, the clamped one is put back each time."""
    signs = []
    for clamp in ("forward", "latent"):
        w = torch.tensor([0.6])
        quantizer = DeepShiftQ(bits=2, clamp=clamp).weight(w)
        for _ in range(20):
            quantizer.before_step_(0.0, w)
            w -= 0.1
        signs.append(quantizer(w).item())
    assert signs == [-1.0, 0.5]


@pytest.mark.parametrize("bits", [1, 7, 3.0])
def test_wrong_bits_are_refused(bits):
    for refused in (lambda: deepshift_q(torch.ones(1), bits), lambda: DeepShiftQ(bits=bits)):
        with pytest.raises(LowbitError, match="bits="):
            refused()


@pytest.mark.parametrize(("init", "levels"), [("project", 2), ("spread", 8)])
def test_a_spread_start_uses_all_levels(init, levels):
    """Weights of the usual small size share the smallest level of each sign; spread out they use all eight."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.normal_(std=0.02)
        before = layer.weight.clone()
    quantize_(nn.Sequential(layer), QuantConfig(weight=DeepShiftQ(bits=3, init=init), first_last="same"))
    latent = layer.parametrizations.weight.original
    assert len(layer.weight.unique()) == levels
    assert torch.equal(latent.sign(), before.sign())
    if init == "spread":
        assert latent.square().mean().sqrt().item() == pytest.approx(0.35, rel=1e-5)
