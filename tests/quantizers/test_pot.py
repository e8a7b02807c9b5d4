"""PoT-STE against values worked out by hand."""

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.functional import pot, pot_codes, pot_levels, pot_scale


def test_levels_by_hand():
    assert pot_levels(2).tolist() == [-1, 0, 1]
    assert pot_levels(3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert len(pot_levels(4)) == 15 and pot_levels(4).abs()[pot_levels(4) != 0].min() == 2**-6


def test_values_and_gradient_by_hand():
    # mean|w| = 0.5, s = 1, 3 bits: midpoints 0.125, 0.375, 0.75
    w = torch.tensor([[0.1, 0.2, -0.6, 1.1]], requires_grad=True)
    y = pot(w, bits=3)
    assert y.tolist() == [[0.0, 0.25, -0.5, 1.0]]
    assert pot_codes(w, bits=3).tolist() == [[3, 4, 1, 6]]
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    y.backward(grad)
    assert torch.equal(w.grad, grad)


def test_max_scale_by_hand():
    assert pot(torch.tensor([[0.5, -2.0, 1.4]]), bits=3, scale="max").tolist() == [[0.5, -2.0, 1.0]]


@pytest.mark.parametrize("bits", [1, 6])
def test_wrong_bits_are_refused(bits):
    with pytest.raises(LowbitError, match="bits="):
        pot(torch.ones(1, 1), bits)


@pytest.mark.parametrize(
    "call", [pot_scale, lambda w, scale: pot(w, 3, scale), lambda w, scale: pot_codes(w, 3, scale)]
)
def test_an_unknown_scale_is_refused(call):
    with pytest.raises(LowbitError, match=r"scale='median'.*'mean' and 'max'"):
        call(torch.ones(1, 1), scale="median")
