"""Activations that stay floats: multiplied by ±2^S through their bits, or by packed weights."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import TABLES, forget, randn, random_weight

from lowbit.errors import LowbitError
from lowbit.kernels import floats, native
from lowbit.kernels.floats import exponents, shift_conv2d_float, shift_linear_float, shift_multiply


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


def test_the_order_of_summation_by_hand():
    big, one = 2.0**24, torch.ones(1)  # big + 1 rounds to big
    # Four sums, then in pairs: (big + 1) + (1 - big); from left to right it were 0.
    assert floats.linear(torch.tensor([[big, 1.0, 1.0, -big]]), torch.ones(1, 4), one).item() == 1.0
    # 0 with 1 and 2 with 3: big, and 1 - big; were it 0 with 2 and 1 with 3, the two ones would both stay.
    assert floats.linear(torch.tensor([[big, 1.0, -big, 1.0]]), torch.ones(1, 4), one).item() == 1.0
    # k = 0 and 4 are one sum: big + 1, then -big.
    assert floats.linear(torch.tensor([[big, -big, 0.0, 0.0, 1.0]]), torch.ones(1, 5), one).item() == 0.0


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("table", TABLES)
def test_all_forms_give_the_same_bits(table, isa):
    for n, k, rows in ((1, 1, 1), (5, 3, 2), (16, 64, 4), (33, 70, 5), (47, 321, 300)):
        weight, x, bias = random_weight(table, (n, k)), randn(rows, k), randn(n)
        expected = floats.linear(x, weight.integers(), weight.scale, bias)
        threads = torch.get_num_threads()
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            with native.use(isa):
                assert same_bits(shift_linear_float(x, weight, bias), expected)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", native.isas())
def test_several_threads_share_the_outputs(isa):
    weight, x = random_weight("denseshift4", (300, 1030)), randn(40, 1030)
    expected = floats.linear(x, weight.integers(), weight.scale)
    threads = torch.get_num_threads()
    with native.use(isa):
        for count in (1, 3):
            torch.set_num_threads(count)
            assert same_bits(shift_linear_float(x, weight), expected)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", native.isas())
def test_what_floats_can_be(isa):
    weight = random_weight("denseshift3", (20, 8))
    x = randn(6, 8)
    x[0, 0], x[1, 1], x[2, 2], x[3] = float("inf"), float("nan"), torch.finfo(torch.float32).max, 2.0**-149
    x[4] = -0.0
    with native.use(isa):
        y = shift_linear_float(x, weight)
    expected = floats.linear(x, weight.integers(), weight.scale)
    assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().any() and y.isinf().any()
    assert torch.equal(y.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("without", [False, True])
def test_the_operator(without, monkeypatch):
    if without:
        monkeypatch.setenv("LOWBIT_NATIVE", "0")
        forget()
    try:
        for table in ("denseshift3", "lsq8"):
            weight, x = random_weight(table, (10, 20)), randn(2, 3, 20)
            args = (x, weight.data, weight.table, weight.scale, randn(10), weight.bits)
            with (
                pytest.warns(UserWarning, match="PyTorch form") if without and table == "denseshift3" else nullcontext()
            ):
                y = shift_linear_float(x[:, :1], weight)
            assert y.shape == (2, 1, 10)
            assert same_bits(y[:, 0], floats.linear(x[:, 0], weight.integers(), weight.scale))
            torch.library.opcheck(torch.ops.lowbit.shift_linear_float.default, args)
            made = torch.compile(lambda x, w=weight: shift_linear_float(x, w) + 1, backend="aot_eager", fullgraph=True)
            assert same_bits(made(x), shift_linear_float(x, weight) + 1)
    finally:
        monkeypatch.undo()
        forget()


def test_convolutions():
    for shape, options in (
        ((7, 5, 3, 3), {}),
        ((20, 33, 3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
        ((4, 6, 1, 1), {"stride": 2}),
    ):
        weight, bias = random_weight("denseshift4", shape), randn(shape[0])
        x = randn(2, shape[1], 9, 8)
        y = shift_conv2d_float(x, weight, bias, **options)
        expected = F.conv2d(x.double(), weight.dequantize().double(), bias.double(), **options)
        assert y.shape == expected.shape
        assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-3 * float(expected.abs().max()) / 100)


def test_what_is_refused():
    one, no = torch.tensor(1), torch.tensor(False)
    with pytest.raises(LowbitError, match="float64"):
        shift_multiply(torch.ones(1).double(), one, no)
    for wrong in (torch.tensor(-1), torch.tensor(128), torch.tensor(1.0)):
        with pytest.raises(LowbitError, match="0 to 127"):
            shift_multiply(torch.ones(1), wrong, no)
    with pytest.raises(LowbitError, match="levels"):
        exponents(random_weight("statsq2", (2, 2)))
    weight = random_weight("denseshift3", (4, 6))
    for x, message in (
        (torch.ones(2, 5), r"\[\.\.\., 6\]"),
        (torch.ones(2, 6).double(), "float64"),
        (torch.tensor(1.0), r"\[\]"),
    ):
        with pytest.raises(LowbitError, match=message):
            shift_linear_float(x, weight)
    with pytest.raises(LowbitError, match="bias"):
        shift_linear_float(torch.ones(2, 6), weight, torch.ones(3))
    with pytest.raises(LowbitError, match="a linear layer's"):
        shift_conv2d_float(torch.ones(1, 6, 3, 3), weight)
    with pytest.raises(LowbitError, match=r"\[B, 6, H, W\]"):
        shift_conv2d_float(torch.ones(1, 5, 3, 3), random_weight("denseshift3", (4, 6, 3, 3)))
