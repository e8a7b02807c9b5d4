"""StatsQ against values and gradients worked out by hand, and its invariants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.functional import statsq, statsq_codes, statsq_scale


def test_values_by_hand():
    # row 1: mean|w| = 0.5, s = 1: levels ±¼, ±¾.  row 2: s = 4: levels ±1, ±3
    w = torch.tensor([[0.1, -0.3, 0.6, -1.0], [1.0, 5.0, -1.0, -1.0]])
    assert statsq_scale(w).flatten().tolist() == [1.0, 4.0]
    assert statsq(w, bits=2).tolist() == [[0.25, -0.25, 0.75, -0.75], [1.0, 3.0, -1.0, -1.0]]
    assert statsq_codes(w, bits=2).tolist() == [[2, 1, 3, 0], [2, 3, 1, 1]]


def test_gradient_is_the_identity_even_where_clipped_and_none_flows_through_the_scale():
    w = torch.tensor([[0.1, -0.3, 0.6, -5.0]], requires_grad=True)
    grad = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    statsq(w, bits=2).backward(grad)
    assert torch.equal(w.grad, grad)


@given(bits=st.integers(1, 8), seed=st.integers(0, 999), size=st.sampled_from([1e-20, 1e-3, 1.0, 1e10]))
def test_levels_are_odd_multiples_and_never_zero(bits, seed, size):
    w = size * torch.randn(4, 33, generator=torch.Generator().manual_seed(seed))
    ratio = statsq(w, bits) / statsq_scale(w) * 2**bits
    nearest = ratio.round()
    assert torch.allclose(ratio, nearest, atol=1e-3)
    assert (nearest.remainder(2) == 1).all() and nearest.abs().max() <= 2**bits - 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_extremes_stay_on_the_grid(bits):
    w = torch.tensor([[-1.0, 1.0, -1.0, 1.0], [-9.0, 1e-9, -1e-9, 9.0], [0.0, -0.0, 0.0, 0.0]])
    codes = statsq_codes(w, bits)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert torch.isfinite(statsq(w, bits)).all()


def test_half_precision_does_not_leave_the_grid():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert statsq(w, 2).dtype == torch.bfloat16
    assert statsq(w, 2).float().unique().numel() <= 4 * 8
    assert torch.equal(statsq(w, 2), statsq(w.float(), 2).bfloat16())


def test_convolution_rows_are_output_channels():
    w = torch.randn(3, 2, 3, 3)
    w[1] *= 100
    flat = statsq(w.reshape(3, -1), 3).reshape(w.shape)
    assert torch.equal(statsq(w, 3), flat)


@pytest.mark.parametrize("bits", [0, 9, 2.0])
def test_wrong_bits_are_refused(bits):
    with pytest.raises(LowbitError, match="bits="):
        statsq(torch.ones(1, 1), bits)
