"""Functions of single numbers, sums and products in plans, against their definitions in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowbit
from lowbit.engine.format import CURVES, EACH, MAP, NUMBER, ROW, Op, Tensor, write
from lowbit.errors import LowbitError

SQRT_8_OVER_PI = 1.5957691216057308


def sigmoid(x):
    """In float64, without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, 1) / (1 + small)


# The definition, and the largest error allowed as a share of the second number.
DEFINITIONS = {
    "gelu": (lambda x: x * 0.5 * torch.special.erfc(torch.from_numpy(-x) / 2**0.5).numpy(), np.abs, 2.1e-7),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) + 1e-30, 2e-7),
    "silu": (lambda x: x * sigmoid(x), lambda x: np.abs(x) * sigmoid(x) + 1e-29, 2.5e-7),
    "gelu tanh": (lambda x: x * sigmoid(SQRT_8_OVER_PI * (x + 0.044715 * x**3)), np.abs, 1.6e-7),
    "hardsigmoid": (lambda x: np.clip(x + 3, 0, 6) / 6, np.ones_like, 1.2e-7),
    "hardswish": (lambda x: x * np.clip(x + 3, 0, 6) / 6, np.abs, 1.5e-7),
    "inverse root": (lambda x: np.maximum(x, 1e-24) ** -0.5, lambda x: np.maximum(x, 1e-24) ** -0.5, 1.8e-7),
    "inverse": (lambda x: 1 / np.where(x == 0, np.nan, x), lambda x: 1 / np.maximum(np.abs(x), 1e-50), 6e-8),
}


def curve(which: str, count: int) -> bytes:
    """A plan of one function."""
    x, y = Tensor(1, 1, count), Tensor(1, 1, count)
    return write([Op("curve", [x], y, n={0: 0, 1: count, 2: CURVES.index(which)})], x, y)


def numbers() -> np.ndarray:
    """Floats of all exponents up to 2^100, and many of ordinary size, ``[rows, 997]``: not a multiple of 16."""
    bits = np.arange(0, 1 << 32, 20011, dtype=np.uint64).astype(np.uint32).view(np.float32)
    bits = bits[np.isfinite(bits) & (np.abs(bits) < 2.0**100)]
    x = np.concatenate([bits, np.linspace(-100, 100, 200_001), np.linspace(-8, 8, 200_001)]).astype(np.float32)
    return np.resize(x, (-(-len(x) // 997), 997))


def test_every_function_has_a_definition():
    assert list(CURVES) == list(DEFINITIONS)


@pytest.mark.parametrize("which", CURVES)
def test_functions_of_single_numbers(which, library):
    """Close to the definition; and the same bits on all instruction sets."""
    definition, unit, most = DEFINITIONS[which]
    x = numbers()
    content = curve(which, x.shape[1])
    with library.use("portable"):
        portable = lowbit.Plan(content, 1)(x)
    wide = x.astype(np.float64)
    wanted = definition(wide)
    fits = np.abs(wanted) < 2.0**127
    error, allowed = np.abs(portable - wanted), most * (unit(wide) + 1e-37)  # small ones are rounded coarsely
    assert fits.mean() > 0.95 and (error <= allowed)[fits].all()
    special = np.resize(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3, -3, 5.3, -5.3, 1e30], np.float32), (1, 997))
    with library.use("portable"):
        expected = lowbit.Plan(content, 1)(special)
    for isa in library.isas():
        with library.use(isa):
            plan = lowbit.Plan(content, 1)
            np.testing.assert_array_equal(plan(x), portable, err_msg=isa)
            np.testing.assert_array_equal(plan(special), expected, err_msg=isa)


@pytest.mark.parametrize(("which", "function"), [("hardsigmoid", F.hardsigmoid), ("hardswish", F.hardswish)])
def test_functions_with_the_bits_of_pytorch(which, function, library):
    x = torch.from_numpy(numbers())
    for isa in library.isas():
        with library.use(isa):
            assert torch.equal(lowbit.Plan(curve(which, 997), 1)(x), function(x))


def pair(kind: str, rows: int, channels: int, how: int, relu: int, constant: np.ndarray | None, bounds=None) -> bytes:
    """A plan of one sum or product; its input has the second operand behind the first, unless that is constant.

    With ``bounds`` the result is rounded into a map, whose channels are summed by one packed layer.
    """
    count = {EACH: rows * channels, ROW: channels, NUMBER: rows}[how]
    size = rows * channels
    x = Tensor(1, 1, size + (count if constant is None else 0))
    a, b, y = Tensor(1, rows, channels), Tensor(1, 1, count), Tensor(1, rows, channels)
    ops = [Op("copy", [x], a, data={0: np.array([[0, 0, 0, size]], np.int64)})]
    op = Op(kind, [a], y, n={2: how, 11: relu})
    if constant is None:
        ops.append(Op("copy", [x], b, data={0: np.array([[0, 0, size, count]], np.int64)}))
        op.inputs.append(b)
    else:
        op.data[0] = constant
    ops.append(op)
    if bounds is None:
        return write(ops, x, y)
    place = -(-channels // 4) * 4
    op.map, op.floats, op.f[1] = Tensor(1, rows, channels, MAP, (0, 0), place, *bounds), None, 0.5
    out = Tensor(1, rows, 1)
    ones = {0: np.zeros((-(-place // 64) * 16, 16, 4), np.int8), 1: np.ones(1, np.float32)}
    for channel in range(channels):
        ones[0][channel // 4, 0, channel % 4] = 1
    ones |= {2: np.array([channels], np.int32), 4: np.zeros(16, np.int16)}
    window = {2: 8, 3: 1, 4: 1, 5: 1, 6: 1, 9: 1, 10: 1}
    ops.append(Op("product", [op.map], out, n=window, f={0: 0.5}, data=ones))
    return write(ops, x, out)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["add", "times"]), rows=st.integers(1, 40), channels=st.integers(1, 40),
    how=st.sampled_from([EACH, ROW, NUMBER]), relu=st.integers(0, 1), constant=st.booleans(), rounded=st.booleans(),
)  # fmt: skip
def test_sums_and_products(library, kind, rows, channels, how, relu, constant, rounded):
    draw = np.random.default_rng(rows * 41 + channels)
    a = draw.standard_normal((2, rows, channels)).astype(np.float32)
    shape = {EACH: (rows, channels), ROW: (1, channels), NUMBER: (rows, 1)}[how]
    b = draw.standard_normal(shape if constant else (2, *shape)).astype(np.float32)
    x = a.reshape(2, -1) if constant else np.concatenate([a.reshape(2, -1), b.reshape(2, -1)], 1)
    expected = a + b if kind == "add" else a * b
    expected = np.maximum(expected, 0) if relu else expected
    if rounded:
        expected = (np.clip(np.rint(expected / np.float32(0.5)), -7, 8).sum(-1) * 0.5).astype(np.float32)
    content = pair(kind, rows, channels, how, relu, b.reshape(-1) if constant else None, (-7, 8) if rounded else None)
    for isa in library.isas():
        with library.use(isa):
            for threads in (1, 3):
                np.testing.assert_array_equal(
                    lowbit.Plan(content, threads)(x), expected.reshape(2, -1), err_msg=f"{isa} {threads}"
                )
                np.testing.assert_array_equal(lowbit.Plan(content, threads)(x[:1]), expected[:1].reshape(1, -1))


@pytest.mark.parametrize(
    ("how", "count", "why"),
    [
        (EACH, 12, None),
        (ROW, 4, None),
        (NUMBER, 3, None),
        (EACH, 4, "operands of different shapes"),
        (ROW, 3, "operands of different shapes"),
        (NUMBER, 4, "operands of different shapes"),
        (3, 12, "wrong tensors or numbers"),
    ],
)
@pytest.mark.parametrize("kind", ["add", "times"])
def test_operands_are_checked(kind, how, count, why):
    x, y = Tensor(1, 3, 4), Tensor(1, 3, 4)
    for data in (None, np.ones(count, np.float32)):
        second = Tensor(1, 1, count)
        ops = [Op("copy", [x], second, data={0: np.array([[0, 0, 0, count]], np.int64)})]
        ops.append(
            Op(kind, [x, second if data is None else None], y, n={2: how}, data={} if data is None else {0: data})
        )
        if why is None:
            assert lowbit.Plan(write(ops, x, y)).outputs == 12
            continue
        with pytest.raises(LowbitError, match=f"operation 1: {why}"):
            lowbit.Plan(write(ops, x, y))


def test_a_function_that_does_not_exist():
    x, y = Tensor(1, 1, 4), Tensor(1, 1, 4)
    with pytest.raises(LowbitError, match="operation 0: a curve of unknown kind"):
        lowbit.Plan(write([Op("curve", [x], y, n={0: 0, 1: 4, 2: len(CURVES)})], x, y))


@pytest.mark.parametrize("groups", [0.0, 1.0, 2.0, 8.0, 3.0, -2.0, np.nan, np.inf, 1e300])
def test_groups_of_a_convolution_are_checked(groups):
    """8 channels and 40 outputs of 1x1 kernels: weights of 2 groups are there."""
    x, y = Tensor(1, 1, 8), Tensor(1, 1, 40)
    n = {0: 0, 1: 8, 2: 8, 3: 1, 4: 1, 5: 1, 6: 1, 9: 1, 10: 1, 12: 1, 13: 1, 14: 8, 15: 1}
    weights = np.arange(2 * 2 * 4 * 16, dtype=np.float32).reshape(2, 2, 4, 16)
    op = Op("grouped conv", [x], y, n=n, f={0: groups}, data={0: weights})
    inputs = np.arange(8, dtype=np.float32)[None]
    if groups == 2:
        expected = np.einsum("gk,gpkn->gpn", inputs.reshape(2, 4), weights).reshape(2, 32)[:, :20]
        np.testing.assert_array_equal(lowbit.Plan(write([op], x, y))(inputs), expected.reshape(1, 40))
        return
    why = "(weights of another size|an output of another shape|an impossible number of groups)"
    with pytest.raises(LowbitError, match=f"operation 0: {why}"):
        lowbit.Plan(write([op], x, y))
