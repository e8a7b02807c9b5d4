"""DeepShift-PS against values and gradients worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.functional import deepshift_ps, deepshift_ps_codes, deepshift_ps_latents, deepshift_ps_levels
from lowbit.nn.convert import attach_
from lowbit.quantizers import DeepShiftPS

latent_values = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.5, -1.5, 1e-40, -1e-40, math.inf, -math.inf]),
    st.floats(-40, 10, width=32),
)


def test_levels_by_hand():
    assert deepshift_ps_levels(2).tolist() == [-1, 0, 1]
    assert deepshift_ps_levels(3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert len(deepshift_ps_levels(6)) == 63 and deepshift_ps_levels(6)[32] == 2**-30


def test_values_by_hand():
    # 3 bits: p in [-2, 0]; halves round to even, so s = ±0.5 is zero and p = -0.5, -1.5 are 0, -2.
    p = torch.tensor([0.0, -0.5, -1.5, -1.4, -9.0, 3.0, -1.0, -1.0])
    s = torch.tensor([0.6, -1.0, 7.0, 0.9, -0.6, 1.0, 0.5, -0.5])
    assert deepshift_ps(p, s, bits=3).tolist() == [1, -1, 0.25, 0.5, -0.25, 1, 0, 0]
    assert deepshift_ps_codes(p, s, bits=3).tolist() == [6, 0, 4, 5, 2, 6, 3, 3]


def test_two_bits_are_ternary():
    p, s = torch.tensor([-5.0, 0.0, 2.0]), torch.tensor([1.0, 0.2, -0.8])
    assert deepshift_ps(p, s, bits=2).tolist() == [1, 0, -1]


def test_gradient_by_hand():
    # W = -¼, 0 and 1 (p clamped to 0); G = 2, 3, 5
    p = torch.tensor([-2.2, -1.0, 1.0], requires_grad=True)
    s = torch.tensor([-0.7, 0.3, 2.0], requires_grad=True)
    weight = deepshift_ps(p, s, bits=3)
    assert weight.tolist() == [-0.25, 0, 1]
    weight.backward(torch.tensor([2.0, 3.0, 5.0]))
    assert p.grad.tolist() == pytest.approx([-0.5 * math.log(2), 0, 5 * math.log(2)])
    assert s.grad.tolist() == [2, 3, 5]


@given(st.integers(2, 6), st.lists(st.tuples(latent_values, latent_values), min_size=1, max_size=8))
def test_values_are_always_in_the_set_and_agree_with_the_codes(bits, values):
    p, s = torch.tensor(values, dtype=torch.float32).unbind(1)
    assert torch.equal(deepshift_ps(p, s, bits), deepshift_ps_levels(bits)[deepshift_ps_codes(p, s, bits).long()])


@pytest.mark.parametrize("bits", range(2, 7))
def test_latents_are_the_inverse(bits):
    codes = torch.arange(2**bits - 1)
    p, s = deepshift_ps_latents(codes, bits)
    assert torch.equal(deepshift_ps(p, s, bits), deepshift_ps_levels(bits))
    assert torch.equal(deepshift_ps_codes(p, s, bits), codes.short())


def test_nan_in_the_shift_is_passed_on():
    assert deepshift_ps(torch.tensor([math.nan]), torch.ones(1), bits=4).isnan().all()


def test_shifts_are_kept_in_range_and_signs_left_alone():
    p, s = torch.tensor([-20.0, -1.3, 4.0], requires_grad=True), torch.tensor([-9.0, 0.1, 9.0], requires_grad=True)
    DeepShiftPS(bits=3).weight(torch.ones(3, 1)).before_step_(0.0, p, s)
    assert p.tolist() == torch.tensor([-2.0, -1.3, 0.0]).tolist()
    assert s.tolist() == torch.tensor([-9.0, 0.1, 9.0]).tolist()


@pytest.mark.parametrize(("bits", "at_the_bound"), [(4, 4 / 9), (3, 8 / 9), (6, 0.0)])
def test_random_start_is_the_published_draw(bits, at_the_bound):
    torch.manual_seed(0)
    layer = torch.nn.Linear(200, 100)
    attach_(layer, DeepShiftPS(bits=bits), None)
    p, s = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    lowest = -(2 ** (bits - 1) - 2)
    share = (p == lowest).double().mean().item()
    assert abs(share - at_the_bound) < 5 * math.sqrt(0.25 / 20_000)
    assert max(lowest, -10) <= p.min() and -1.01 < p.max() <= -1
    assert abs(s.min() + 1) < 0.01 and abs(s.max() - 1) < 0.01
    assert abs((layer.weight == 0).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(20_000)


def test_raw_projection_is_the_authors_conversion():
    weight = torch.tensor([[0.3, -0.8], [0.0, 1e-6], [9.0, -0.02]])
    quantizer = DeepShiftPS(bits=4, init="project").weight(weight)
    p, s = quantizer.right_inverse(weight)
    assert p.tolist() == [[-2, 0], [-6, -6], [0, -6]]
    assert s.tolist() == [[1, -1], [0, 1], [1, -1]]
    assert quantizer(p, s).tolist() == [[0.25, -1], [0, 2**-6], [1, -(2**-6)]]


@pytest.mark.parametrize("scale", ["none", "statistical", "pow2"])
@pytest.mark.parametrize("bits", range(2, 7))
def test_a_weight_on_the_grid_survives_right_inverse(bits, scale):
    torch.manual_seed(1)
    quantizer = DeepShiftPS(bits=bits, scale=scale).weight(0.05 * torch.randn(6, 40))
    weight = quantizer(torch.empty(6, 40).uniform_(-10, 0), torch.empty(6, 40).uniform_(-1, 1))
    assert (weight == 0).any() and (weight != 0).any()
    again = quantizer(*quantizer.right_inverse(weight))
    if scale == "statistical":
        assert torch.allclose(again, weight, rtol=1e-6)
    else:
        assert torch.equal(again, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_scaled_projection_keeps_direction_and_size(bits):
    torch.manual_seed(0)
    start = torch.randn(8, 64) * torch.tensor([0.01, 0.1, 1, 10, 0.02, 0.2, 2, 20])[:, None]
    quantizer = DeepShiftPS(bits=bits, scale="statistical", init="project").weight(start)
    weight = quantizer(*quantizer.right_inverse(start))
    assert torch.allclose(weight.square().mean(1), start.square().mean(1), rtol=1e-5)
    assert torch.nn.functional.cosine_similarity(weight, start).min() > (0.85 if bits == 2 else 0.9)


@pytest.mark.parametrize("bits", [1, 7])
def test_wrong_bits_are_refused(bits):
    for refused in (lambda: deepshift_ps(torch.ones(1), torch.ones(1), bits), lambda: DeepShiftPS(bits=bits)):
        with pytest.raises(LowbitError, match="bits="):
            refused()
