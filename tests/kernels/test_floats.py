"""Multiplying floats by ±2^S through their bits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import randn, random_weight

from lowbit.errors import LowbitError
from lowbit.kernels.floats import exponents, shift_linear_float, shift_multiply


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@given(bits=st.integers(-(2**31), 2**31 - 1), exponent=st.integers(0, 127), negative=st.booleans())
def test_any_float_is_multiplied_exactly(bits, exponent, negative):
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    y = shift_multiply(x, torch.tensor(exponent), torch.tensor(negative))
    expected = x * (-1.0 if negative else 1.0) * 2.0**exponent
    assert y.isnan().all() if x.isnan().all() else same_bits(y, expected)


def test_edges():
    tiny, largest = 2.0**-149, torch.finfo(torch.float32).max
    x = torch.tensor(
        [0.0, -0.0, tiny, -tiny, 3 * tiny, 2.0**-126, 2.0**-127, largest, 1.0, float("inf"), -float("inf")]
    )
    for exponent in range(128):
        for negative in (False, True):
            y = shift_multiply(x, torch.tensor(exponent), torch.tensor(negative))
            assert same_bits(y, x * (-1.0 if negative else 1.0) * 2.0**exponent)


def test_the_published_trick_and_where_it_fails():
    x = randn(1000)
    exponent = torch.randint(0, 8, (1000,))
    negative = torch.rand(1000) < 0.5
    raw = shift_multiply(x, exponent, negative, raw=True)
    assert same_bits(raw, shift_multiply(x, exponent, negative))
    odd = torch.tensor([0.0, 2.0**-127, torch.finfo(torch.float32).max])
    raw = shift_multiply(odd, torch.tensor(7), torch.tensor(False), raw=True)
    assert raw[0] == 2.0**-120  # zero becomes a number
    assert raw[1] == 2.0**-120 * 1.5  # the fraction gets a leading one it never had
    assert raw[2] < 0  # the carry runs into the sign
    assert shift_multiply(odd, torch.tensor(7), torch.tensor(False)).tolist() == [0.0, 2.0**-120, float("inf")]


def test_a_layer_of_shifts():
    weight = random_weight("denseshift4", (6, 20))
    x = randn(3, 20)
    exponent, negative = exponents(weight)
    products = shift_multiply(x[:, None], exponent[None], negative[None])
    assert torch.equal(products, x[:, None] * weight.integers().float())
    y = shift_linear_float(x, weight, torch.ones(6))
    assert torch.allclose(y, products.sum(-1) * weight.scale + 1, rtol=1e-4, atol=1e-3)
    assert torch.allclose(y, F.linear(x, weight.dequantize(), torch.ones(6)), rtol=1e-4, atol=1e-3)


def test_what_is_refused():
    one, no = torch.tensor(1), torch.tensor(False)
    with pytest.raises(LowbitError, match="float64"):
        shift_multiply(torch.ones(1).double(), one, no)
    for wrong in (torch.tensor(-1), torch.tensor(128), torch.tensor(1.0)):
        with pytest.raises(LowbitError, match="0 to 127"):
            shift_multiply(torch.ones(1), wrong, no)
    with pytest.raises(LowbitError, match="levels"):
        exponents(random_weight("statsq2", (2, 2)))
