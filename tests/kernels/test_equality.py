"""Every form of the kernels gives the bits of the reference: all instruction sets, thread counts, tables and shapes."""

import threading
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import MODES, TABLES, randn, random_weight

from lowbit.kernels import compiled, pack_weight, reference, shift_conv2d, shift_linear
from lowbit.kernels.packing import largest_k, padded_channels

SHAPES = [(1, 1, 1), (1, 64, 16), (2, 70, 33), (3, 129, 48), (4, 200, 17), (8, 512, 64), (9, 333, 50), (37, 700, 40)]
CONVOLUTIONS = [  # batch, channels, height, width, outputs, kernel, stride, padding, dilation
    (1, 3, 8, 8, 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 64, 9, 7, 33, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 40, 10, 6, 20, (3, 2), (2, 1), (0, 1), (1, 2)),
    (2, 17, 5, 5, 8, (1, 1), (2, 2), (1, 0), (1, 1)),
    (2, 16, 12, 40, 32, (5, 3), (1, 1), (2, 1), (1, 1)),
    (1, 128, 12, 33, 17, (3, 3), (1, 1), (1, 1), (2, 2)),
    (2, 64, 1, 50, 32, (1, 1), (1, 1), (0, 0), (1, 1)),
    (5, 600, 3, 3, 40, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 16, 6, 39, 13, (3, 3), (1, 1), (1, 1), (1, 1)),  # 13 and 48 outputs: a block alone, with lines of 16 places
    (1, 64, 3, 34, 48, (3, 3), (1, 1), (1, 0), (1, 1)),
]


def compiled_linear(x, weight, bias=None, x_scale=None, **kwargs):
    w = weight
    return compiled.linear(x, w.data, w.levels, w.scale, w.sums, bias, x_scale, w.bits, **kwargs)


def compiled_conv2d(x, weight, bias=None, x_scale=None, **kwargs):
    w = weight
    padded = padded_channels(w.shape[1], w.kernel)
    return compiled.conv2d(x, w.data, w.levels, w.scale, w.sums, bias, x_scale, w.bits, w.kernel, padded, **kwargs)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(library, table, shape):
    m, k, n = shape
    weight, x, bias = random_weight(table, (n, k)), randn(m, k), randn(n, seed=2)
    for name, mode in MODES.items():
        kwargs = mode(m)
        expected = reference.linear(x, weight, bias, **kwargs)
        assert torch.equal(compiled_linear(x, weight, bias, **kwargs), expected), name
        for isa in library.isas():
            with library.use(isa):
                assert torch.equal(shift_linear(x, weight, bias, **kwargs), expected), (isa, name)


@pytest.mark.parametrize("table", ["denseshift2", "denseshift3", "denseshift4", "statsq4", "s3_3", "top3", "lsq8"])
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_conv2d(library, table, geometry):
    batch, channels, height, width, n, kernel, stride, padding, dilation = geometry
    weight, x, bias = (
        random_weight(table, (n, channels, *kernel)),
        randn(batch, channels, height, width),
        randn(n, seed=2),
    )
    for name, mode in MODES.items():
        kwargs = {**mode(batch), "stride": stride, "padding": padding, "dilation": dilation}
        expected = reference.conv2d(x, weight, bias, **kwargs)
        assert torch.equal(compiled_conv2d(x, weight, bias, **kwargs), expected), name
        for isa in library.isas():
            with library.use(isa):
                assert torch.equal(shift_conv2d(x, weight, bias, **kwargs), expected), (isa, name)


FEW = {  # shapes of products with enough rows for weights beyond int8 to be added apart (beyond.h)
    "33 rows": (33, 200, 20),
    "more than one part": (1100, 68, 37),
    "two images, in lines": (2, 16, 12, 40, 32, (5, 3), (1, 1), (2, 1), (1, 1)),
    "strides": (1, 64, 21, 19, 33, (3, 3), (2, 2), (1, 1), (1, 1)),
    "dilation": (1, 32, 15, 16, 20, (3, 3), (1, 1), (1, 1), (2, 3)),
    "few channels": (1, 3, 40, 37, 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": (2, 120, 9, 9, 32, (1, 1), (1, 1), (0, 0), (1, 1)),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("table", ["denseshift4", "top3", "top4"])
@pytest.mark.parametrize("case", FEW)
def test_few_weights_beyond_the_rest(library, threads, table, case):
    """As in a trained network, the rarer the larger the level; but all of one output and most of the first inputs."""
    geometry = FEW[case]
    rows, k, n = geometry if len(geometry) == 3 else (geometry[0], geometry[1], geometry[4])
    shape = (n, k, *(geometry[5] if len(geometry) > 3 else ()))
    bits, levels = TABLES[table]
    generator = torch.Generator().manual_seed(3)
    order = levels.abs().argsort(stable=True)
    codes = order[(-torch.log2(torch.rand(shape, generator=generator)) * 2).long().clamp(max=len(levels) - 1)]
    codes[1], codes[2] = len(levels) - 1, int(order[0])
    codes.reshape(n, -1)[:, :3] = len(levels) - 1
    assert 0 < (levels[codes] > 127).float().mean() < 0.25
    weight = pack_weight(codes, levels, torch.rand(n, generator=generator), bits=bits)
    kwargs = {"x_scale": torch.tensor(0.02), "low": 0, "high": 255}
    x = randn(rows, k, *geometry[2:4] if len(geometry) > 3 else ())
    if len(geometry) > 3:
        kwargs |= dict(zip(("stride", "padding", "dilation"), geometry[6:], strict=True))
    multiply, defines = (shift_linear, reference.linear) if x.ndim == 2 else (shift_conv2d, reference.conv2d)
    dynamic = {name: value for name, value in kwargs.items() if name in ("stride", "padding", "dilation")}
    for asked in (kwargs, kwargs | {"low": -127, "high": 127}, dynamic):
        assert_all_equal(library, threads, partial(multiply, x, weight, **asked), defines(x, weight, **asked))


ADDED = {  # a residual of so many numbers
    "float32": lambda size: {"add": randn(*size, seed=5)},
    "int8": lambda size: {"add": torch.arange(-128, 128, dtype=torch.int8).repeat(40)[: size.numel()].reshape(size)},
    "uint8": lambda size: {"add": torch.arange(256).to(torch.uint8).repeat(40)[: size.numel()].reshape(size)},
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("table", ["denseshift3", "lsq8"])
@pytest.mark.parametrize("out_scale", [None, 0.3])
def test_residual(library, added, table, out_scale):
    common = {"x_scale": torch.tensor([0.03]), "relu": True, "out_scale": out_scale, "add_scale": 0.037}
    for x, n, run, forms in (
        (randn(11, 96), 37, shift_linear, (reference.linear, compiled_linear)),
        (randn(2, 33, 5, 7), 21, shift_conv2d, (reference.conv2d, compiled_conv2d)),
    ):
        weight = random_weight(table, (n, x.shape[1], *((3, 3) if x.ndim == 4 else ())))
        without = reference.linear(x, weight) if x.ndim == 2 else reference.conv2d(x, weight)
        kwargs = common | ADDED[added](without.shape)
        expected, other = (form(x, weight, **kwargs) for form in forms)
        assert not torch.equal(expected, forms[0](x, weight, **(kwargs | {"add": None})))
        assert torch.equal(other, expected)
        for isa in library.isas():
            with library.use(isa):
                assert torch.equal(run(x, weight, **kwargs), expected), isa


def test_residuals_of_any_strides(isa):
    weight = random_weight("lsq8", (20, 64))
    x, add = randn(6, 64), randn(20, 6, seed=3).T
    assert not add.is_contiguous()
    assert torch.equal(shift_linear(x, weight, add=add), reference.linear(x, weight, add=add.contiguous()))
    weight = random_weight("denseshift3", (20, 6, 3, 3))
    x, add = randn(2, 6, 9, 8), randn(2, 20, 7, 6, seed=3)
    expected = reference.conv2d(x, weight, add=add)
    for form in (add, add.to(memory_format=torch.channels_last), add.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(shift_conv2d(x, weight, add=form), expected)
    one = torch.randint(-128, 128, (3, 20, 1, 1), dtype=torch.int8)  # one place: in both layouts at once
    y = shift_conv2d(randn(3, 6, 3, 3), weight, add=one.expand(3, 20, 1, 1), add_scale=0.1)
    assert torch.equal(y, reference.conv2d(randn(3, 6, 3, 3), weight, add=one, add_scale=0.1))


@st.composite
def requests(draw, rows):
    """Keyword arguments of a kernel but for bias and residual, and the activations' dtype, for ``rows`` of them."""
    dtype = draw(st.sampled_from([torch.float32, torch.int8, torch.uint8]))
    scales = draw(st.sampled_from([1, rows] if dtype != torch.float32 else [0, 1, rows]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    kwargs = {
        "x_scale": torch.rand(scales, generator=generator) + 0.01 if scales else None,
        "relu": draw(st.booleans()),
    }
    kwargs["out_scale"] = draw(st.sampled_from([None, 0.7]))
    if draw(st.booleans()):
        kwargs |= {"out_low": 0, "out_high": 255}
    return dtype, kwargs


def numbers(shape, dtype, generator):
    """All that 8 bits can hold, -128 and 255 included."""
    made = torch.randint(-128, 128, shape, generator=generator)
    return made.float() if dtype == torch.float32 else made.to(dtype)


def options(kwargs, shape, bias, added, generator):
    """``kwargs`` with a bias and a residual, as far as they are asked for, for outputs of ``shape`` (N in dim 1)."""
    made = kwargs | {"bias": torch.randn(shape[1], generator=generator) if bias else None}
    return made if added is None else made | {"add": numbers(shape, added, generator), "add_scale": 0.37}


def assert_all_equal(library, threads, run, expected):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for isa in library.isas():
            with library.use(isa):
                assert torch.equal(run(), expected), isa
    finally:
        torch.set_num_threads(before)


ADDENDS = [None, torch.float32, torch.int8, torch.uint8]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(
    m=st.integers(1, 40), k=st.integers(1, 300), n=st.integers(1, 70), bits=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 999), threads=st.integers(1, 4), bias=st.booleans(), added=st.sampled_from(ADDENDS),
    data=st.data(),
)  # fmt: skip
def test_any_linear(library, m, k, n, bits, seed, threads, bias, added, data):
    table = data.draw(st.sampled_from(sorted(name for name in TABLES if max(2, TABLES[name][0]) == bits)))
    dtype, kwargs = data.draw(requests(m))
    generator = torch.Generator().manual_seed(seed)
    weight, x = random_weight(table, (n, k), seed), numbers((m, k), dtype, generator)
    kwargs = options(kwargs, (m, n), bias, added, generator)
    expected = reference.linear(x, weight, **kwargs)
    assert torch.equal(compiled_linear(x, weight, **kwargs), expected)
    assert_all_equal(library, threads, lambda: shift_linear(x, weight, **kwargs), expected)


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 70), n=st.integers(1, 40), kernel=PAIR, stride=PAIR,
    dilation=PAIR, padding=st.tuples(*[st.integers(0, 2)] * 2), more=st.tuples(*[st.integers(0, 6)] * 2),
    table=st.sampled_from(["denseshift2", "denseshift3", "denseshift4", "lsq8", "some of 8 bits"]),
    seed=st.integers(0, 999), threads=st.integers(1, 4), bias=st.booleans(), added=st.sampled_from(ADDENDS),
    data=st.data(),
)  # fmt: skip
def test_any_convolution(
    library, batch, channels, n, more, kernel, stride, dilation, padding, table, seed, threads, bias, added, data
):
    dtype, kwargs = data.draw(requests(batch))
    generator = torch.Generator().manual_seed(seed)
    size = [(kernel[i] - 1) * dilation[i] + 1 + more[i] for i in (0, 1)]  # without padding a kernel fits in
    weight = random_weight(table, (n, channels, *kernel), seed)
    x = numbers((batch, channels, *size), dtype, generator)
    outputs = [(more[i] + 2 * padding[i]) // stride[i] + 1 for i in (0, 1)]
    kwargs = options(kwargs, (batch, n, *outputs), bias, added, generator)
    kwargs |= {"stride": stride, "padding": padding, "dilation": dilation}
    expected = reference.conv2d(x, weight, **kwargs)
    assert torch.equal(compiled_conv2d(x, weight, **kwargs), expected)
    assert_all_equal(library, threads, lambda: shift_conv2d(x, weight, **kwargs), expected)


@pytest.fixture
def threads():
    """Sets the number of torch's threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("table", ["denseshift4", "lsq8"])
@pytest.mark.parametrize("m", [1, 5, 130, 700])
def test_the_number_of_threads_does_not_matter(isa, threads, m, table):
    """Big enough for the work to be divided: by outputs, by rows, in several parts."""
    weight, x, add = random_weight(table, (200, 3000)), randn(m, 3000), randn(m, 200, seed=3)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(shift_linear(x, weight, add=add))
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0][:5], reference.linear(x[:5], weight, add=add[:5]))
    assert torch.equal(results[0][-5:], reference.linear(x[-5:], weight, add=add[-5:]))


@pytest.mark.parametrize("table", ["statsq3", "lsq8"])
def test_convolutions_on_threads(isa, threads, table):
    weight, x, add = random_weight(table, (70, 64, 3, 3)), randn(40, 64, 14, 15), randn(40, 70, 14, 15, seed=3)
    threads(1)
    one = shift_conv2d(x, weight, padding=1, add=add)
    for count in (2, 3, 4):
        threads(count)
        assert torch.equal(shift_conv2d(x, weight, padding=1, add=add), one)
    assert torch.equal(one[-1:], reference.conv2d(x[-1:], weight, padding=(1, 1), add=add[-1:]))


def test_several_python_threads_at_once(library, threads):
    threads(3)
    weights = [random_weight(table, (96, 900)) for table in ("denseshift2", "denseshift4", "statsq3")]
    xs = [randn(m, 900, seed=m) for m in (3, 40, 90)]
    expected = [shift_linear(x, w) for x, w in zip(xs, weights, strict=True)]
    wrong = []

    def repeat(i):
        for _ in range(100):
            if not torch.equal(shift_linear(xs[i], weights[i]), expected[i]):
                wrong.append(i)

    running = [threading.Thread(target=repeat, args=(i % 3,)) for i in range(6)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("value", [127, -128, -127, 255])
@pytest.mark.parametrize("table", ["denseshift4", "lsq8"])
@pytest.mark.parametrize("end", [0, -1])
def test_extremes(isa, value, table, end):
    """All weights and activations at an end: nothing saturates on the way."""
    levels = TABLES[table][1]
    dtype = torch.uint8 if value > 127 else torch.int8
    code = range(len(levels))[end]
    one = torch.tensor(1.0)
    for m in (1, 9):
        weight = pack_weight(torch.full((17, 1000), code), levels)
        x = torch.full((m, 1000), value, dtype=dtype)
        assert (shift_linear(x, weight, x_scale=one) == value * levels[end] * 1000).all()
        assert (compiled_linear(x, weight, x_scale=one) == value * levels[end] * 1000).all()
    kernel = pack_weight(torch.full((17, 40, 3, 3), code), levels)
    x = torch.full((2, 40, 5, 4), value, dtype=dtype)
    y = shift_conv2d(x, kernel, x_scale=one, padding=1)
    assert (y[..., 1:-1, 1:-1] == value * levels[end] * 360).all() and (y[..., 0, 0] == value * levels[end] * 160).all()


@pytest.mark.parametrize("table", ["denseshift4", "lsq8"])
def test_k_at_its_bound(isa, table):
    k = largest_k((-128, 128))
    weight = pack_weight(torch.full((1, k), 0), TABLES[table][1])
    x = torch.full((9, k), 255, dtype=torch.uint8)
    total = 255 * -128 * k
    assert -(2**31) < total < 2**15 - 2**31
    for rows in (x, x[:1]):
        y = shift_linear(rows, weight, x_scale=torch.tensor(1.0))
        assert (y == torch.tensor(total, dtype=torch.int64).float()).all()


def test_inputs_of_any_strides(isa):
    weight = random_weight("denseshift3", (20, 64))
    x = randn(64, 30).T
    assert not x.is_contiguous()
    assert torch.equal(shift_linear(x, weight), reference.linear(x.contiguous(), weight))
    x = randn(3, 128, 4)[:, ::2].transpose(1, 2)
    y = shift_linear(x, weight)
    assert y.shape == (3, 4, 20) and torch.equal(y, reference.linear(x, weight))
    weight = random_weight("denseshift3", (20, 6, 3, 3))
    x = randn(2, 6, 9, 8)
    expected = reference.conv2d(x, weight)
    for form in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        y = shift_conv2d(form, weight)
        assert torch.equal(y, expected) and y.is_contiguous(memory_format=torch.channels_last)


def test_rounding_half_to_even_and_clipping(isa):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e30, -1e30, 3e-39, float("inf"), float("nan")]]).T
    weight = pack_weight(torch.tensor([[1]]), torch.tensor([-1.0, 1.0]))
    y = shift_linear(x.contiguous(), weight, x_scale=torch.tensor(1.0), low=-128)
    assert y.flatten().tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, 0, 127, 0]


def test_nan_is_not_hidden_where_the_scale_follows_from_the_input(isa):
    weight = random_weight("statsq2", (20, 100))
    x = randn(12, 100)
    x[3, 50], x[7, 99] = float("nan"), float("inf")
    y = shift_linear(x, weight, relu=True)
    assert y.isnan().all(dim=1).nonzero().flatten().tolist() == [3, 7] and not y[0].isnan().any()
    image = randn(2, 5, 6, 6)
    image[1, 2, 3, 4] = float("nan")
    y = shift_conv2d(image, random_weight("statsq2", (4, 5, 3, 3)))
    assert y[1].isnan().all() and not y[0].isnan().any()


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("relu", [False, True])
def test_nan_is_rounded_to_zero_where_the_scale_is_given(isa, relu, m):
    """In whole blocks of outputs and in the last one, whose 5 outputs are computed one by one."""
    weight, x, add = random_weight("denseshift3", (37, 96)), randn(m, 96), randn(m, 37, seed=5)
    add[-1, [3, 15, 33]], add[-1, [4, 34]] = float("nan"), float("inf")
    kwargs = {"x_scale": torch.tensor([0.03]), "relu": relu, "out_scale": 0.3, "add": add, "out_low": -7}
    y = shift_linear(x, weight, **kwargs)
    assert y[-1, [3, 15, 33]].tolist() == [0, 0, 0] and (y[-1, [4, 34]] == 127).all()
    assert torch.equal(y, reference.linear(x, weight, **kwargs))


def test_the_programs_float_mode_does_not_matter(library):
    weight = random_weight("denseshift3", (20, 64))
    x = 1e-38 * randn(3, 64)
    expected = reference.linear(x, weight)
    torch.set_flush_denormal(True)
    try:
        y = shift_linear(x, weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, expected)


def test_nothing_in_nothing_out(library):
    weight = random_weight("denseshift3", (20, 64))
    assert shift_linear(torch.empty(0, 64), weight).shape == (0, 20)
    assert shift_linear(torch.empty(2, 0, 64), weight).shape == (2, 0, 20)
    weight = random_weight("denseshift3", (20, 6, 3, 3))
    assert shift_conv2d(torch.empty(0, 6, 5, 5), weight).shape == (0, 20, 3, 3)
