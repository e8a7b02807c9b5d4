"""Winograd's form of 3x3 convolutions gives the bits of the direct form and of the reference, and is refused where it
could not."""

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import TABLES, forget, randn, random_weight

from lowbit import LowbitError
from lowbit.kernels import native, pack_weight, reference, shift_conv2d

SMALL = ["denseshift2", "denseshift3", "statsq2", "statsq3", "s3_2", "s3_3", "ternary"]  # |level| <= 8, 2 or 3 bits
OUTPUTS = [{}, {"out_scale": 0.7}, {"out_scale": 0.7, "out_low": 0, "out_high": 255}]  # float32, int8, uint8
UNSIGNED = {"x_scale": torch.tensor(0.1), "low": 0, "high": 31}


def both_forms(library, run):
    """The outputs of the direct form and of Winograd's, which has to have been taken."""
    results = []
    for form in ("direct", "winograd"):
        with library.use_form(form):
            results.append(run())
            assert library.form_taken() == form
    return results


@st.composite
def activations(draw, shape, generator):
    """A tensor whose quantized values are 0 to at most 31, and the keyword arguments that quantize it."""
    high = draw(st.sampled_from([1, 3, 7, 15, 31]))
    dtype = draw(st.sampled_from([torch.float32, torch.int8, torch.uint8]))
    scales = draw(st.sampled_from([1, shape[0]] if dtype != torch.float32 else [0, 1, shape[0]]))
    values = torch.randint(0 if dtype != torch.float32 else -high, high + 1, shape, generator=generator)
    scale = torch.rand(scales, generator=generator) + 0.5 if scales else None
    bounds = {"low": 0, "high": high} if dtype == torch.float32 else {}  # integers are looked at
    return values.to(dtype), {"x_scale": scale, **bounds}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 3), channels=st.one_of(st.integers(1, 40), st.integers(60, 140)), n=st.integers(1, 70),
    size=st.tuples(*[st.integers(1, 13)] * 2), padding=st.tuples(*[st.integers(0, 2)] * 2),
    table=st.sampled_from(SMALL), seed=st.integers(0, 999), threads=st.integers(1, 4), bias=st.booleans(),
    relu=st.booleans(), out=st.sampled_from(OUTPUTS),
    added=st.sampled_from([None, torch.float32, torch.int8, torch.uint8]), data=st.data(),
)  # fmt: skip
def test_any_convolution(
    library, batch, channels, n, size, padding, table, seed, threads, bias, relu, out, added, data
):
    generator = torch.Generator().manual_seed(seed)
    size = [max(size[i], 3 - 2 * padding[i]) for i in (0, 1)]
    x, kwargs = data.draw(activations((batch, channels, *size), generator))
    outputs = (batch, n, *(size[i] + 2 * padding[i] - 2 for i in (0, 1)))
    kwargs |= {"padding": padding, "relu": relu, **out}
    if bias:
        kwargs["bias"] = torch.randn(n, generator=generator)
    if added is not None:
        values = torch.randint(-128, 128, outputs, generator=generator).to(added)
        kwargs |= {"add": values, "add_scale": 0.37}
    weight = random_weight(table, (n, channels, 3, 3), seed)
    expected = reference.conv2d(x, weight, **kwargs)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for isa in library.isas():
            with library.use(isa):
                direct, winograd = both_forms(library, lambda: shift_conv2d(x, weight, **kwargs))
                assert torch.equal(direct, expected), isa
                assert torch.equal(winograd, expected), isa
    finally:
        torch.set_num_threads(before)


SIGNS = {  # of the nine taps: each makes one of the 16 transformed weights as large as it can be
    "all alike": [[1, 1, 1]] * 3,
    "middle line": [[1, 1, 1], [-1, -1, -1], [1, 1, 1]],
    "middle column": [[1, -1, 1]] * 3,
    "cross": [[1, -1, 1], [-1, 1, -1], [1, -1, 1]],
}
PLACES = {  # activations of a 9x9 image, as patterns of 0 and 1
    "all": torch.ones(9, 9),
    "lines": (torch.arange(9) // 2 % 2)[:, None].expand(9, 9),
    "columns": (torch.arange(9) % 2)[None, :].expand(9, 9),
    "checkers": (torch.arange(9)[:, None] + torch.arange(9)) % 2,
    "squares": (torch.arange(9)[:, None] // 2 + torch.arange(9) // 2) % 2,
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("channels", [20, 192])
def test_extremes(isa, library, signs, places, channels):
    """All weights at +-8 and activations at 0 or 31: nothing saturates or leaves its bytes on the way."""
    bits, levels = TABLES["denseshift3"]
    assert levels.abs().max() == 8
    sign = torch.tensor(SIGNS[signs])
    for end in (1, -1):
        codes = torch.where(end * sign > 0, len(levels) - 1, 0).expand(17, channels, 3, 3)
        weight = pack_weight(codes, levels, bits=bits)
        x = (31 * PLACES[places]).to(torch.uint8).expand(2, channels, 9, 9).contiguous()
        one = {"x_scale": torch.tensor(1.0), "padding": (1, 1)}
        kernel = (8.0 * end * sign).double().expand(17, channels, 3, 3)
        expected = torch.nn.functional.conv2d(x.double(), kernel, padding=1).float()
        direct, winograd = both_forms(library, lambda x=x, weight=weight, one=one: shift_conv2d(x, weight, **one))
        assert torch.equal(direct, expected) and torch.equal(winograd, expected)


@pytest.mark.parametrize("geometry", [(1, 64, 70, 30, 31), (1, 128, 160, 8, 9), (9, 64, 40, 14, 15)], ids=str)
def test_the_number_of_threads_does_not_matter(isa, library, geometry):
    """Big enough for the work to be divided: by tiles, by outputs, in several parts of the batch."""
    batch, channels, n, height, width = geometry
    weight, x = random_weight("denseshift3", (n, channels, 3, 3)), randn(batch, channels, height, width)
    add = randn(batch, n, height, width, seed=3)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            direct, winograd = both_forms(library, lambda: shift_conv2d(x, weight, padding=1, add=add, **UNSIGNED))
            assert torch.equal(direct, winograd), threads
    finally:
        torch.set_num_threads(before)


REFUSED = {  # table, kernel, stride, dilation, keyword arguments, dtype and largest of the activations
    "4 bits": ("denseshift4", (3, 3), 1, 1, UNSIGNED, torch.float32, 9),
    "8 bits": ("lsq8", (3, 3), 1, 1, UNSIGNED, torch.float32, 9),
    "a level beyond 8": ("top3", (3, 3), 1, 1, UNSIGNED, torch.float32, 9),
    "another kernel": ("denseshift3", (3, 2), 1, 1, UNSIGNED, torch.float32, 9),
    "stride": ("denseshift3", (3, 3), (2, 1), 1, UNSIGNED, torch.float32, 9),
    "dilation": ("denseshift3", (3, 3), 1, (1, 2), UNSIGNED, torch.float32, 9),
    "signed": ("denseshift3", (3, 3), 1, 1, UNSIGNED | {"low": -31}, torch.float32, 9),
    "activations up to 32": ("denseshift3", (3, 3), 1, 1, UNSIGNED | {"high": 32}, torch.float32, 9),
    "a byte of 32": ("denseshift3", (3, 3), 1, 1, {"x_scale": torch.tensor(0.1)}, torch.uint8, 32),
    "a byte of -1": ("denseshift3", (3, 3), 1, 1, {"x_scale": torch.tensor(0.1)}, torch.int8, -1),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_takes_the_direct_form(isa, library, case):
    table, kernel, stride, dilation, kwargs, dtype, largest = REFUSED[case]
    weight = random_weight(table, (20, 40, *kernel))
    x = torch.zeros(1, 40, 9, 9)
    x[0, 39, 8, 8] = largest  # the very last value decides
    kwargs = kwargs | {"stride": stride, "dilation": dilation}
    pairs = {
        name: (kwargs[name],) * 2 if isinstance(kwargs[name], int) else kwargs[name] for name in ("stride", "dilation")
    }
    with library.use_form("winograd"):
        y = shift_conv2d(x.to(dtype), weight, **kwargs)
        assert library.form_taken() == "direct"
    assert torch.equal(y, reference.conv2d(x.to(dtype), weight, **(kwargs | pairs)))


@pytest.mark.parametrize(("largest", "form"), [(8, "winograd"), (9, "direct")])
def test_levels_beyond_8_take_the_direct_form(isa, library, largest, form):
    levels = torch.tensor([-float(largest), -1.0, 1.0, largest])
    weight = pack_weight(torch.full((20, 40, 3, 3), 3), levels)
    x = torch.full((1, 40, 6, 6), 31, dtype=torch.uint8)
    with library.use_form("winograd"):
        y = shift_conv2d(x, weight, x_scale=torch.tensor(1.0))
        assert library.form_taken() == form
    assert (y == 31 * largest * 360).all()


def test_auto_takes_it_for_large_maps_only(library):
    weight = random_weight("denseshift3", (64, 64, 3, 3))
    for isa, large in {"portable": "winograd", "avx2": "winograd", "avx512vnni": "winograd", "amx": "direct"}.items():
        if isa not in library.isas():
            continue
        for size, form in ((28, large), (3, "direct")):
            with library.use(isa), library.use_form("auto"):
                shift_conv2d(randn(1, 64, size, size), weight, padding=1, **UNSIGNED)
                assert library.form_taken() == form, (isa, size)


def test_the_form_can_be_chosen(library, monkeypatch):
    monkeypatch.setenv("LOWBIT_FORM", "direct")
    forget()
    assert library.available()
    shift_conv2d(randn(1, 64, 28, 28), random_weight("denseshift3", (64, 64, 3, 3)), **UNSIGNED)
    assert library.form_taken() == "direct"
    with pytest.raises(LowbitError, match=r"'fft' .* auto, direct and winograd"), library.use_form("fft"):
        pass
    monkeypatch.setenv("LOWBIT_FORM", "fft")
    forget()
    with pytest.raises(LowbitError, match="'fft'"):
        library.available()
    monkeypatch.setenv("LOWBIT_FORM", "auto")
    forget()
    assert library.available()
    monkeypatch.undo()
    forget()


def test_several_python_threads_at_once(library):
    weights = [random_weight(table, (96, 64, 3, 3)) for table in ("denseshift2", "denseshift3", "statsq3")]
    xs = [randn(m, 64, 9, 10, seed=m) for m in (1, 2, 5)]
    expected = [reference.conv2d(x, w, **UNSIGNED) for x, w in zip(xs, weights, strict=True)]
    wrong = []

    def repeat(i):
        for _ in range(30):
            if not torch.equal(shift_conv2d(xs[i], weights[i], **UNSIGNED), expected[i]):
                wrong.append(i)

    with library.use_form("winograd"):
        running = [threading.Thread(target=repeat, args=(i % 3,)) for i in range(6)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    assert not wrong


def test_forms_need_the_compiled_kernels(no_library):
    for ask in (lambda: native.use_form("direct").__enter__(), native.form_taken):
        with pytest.raises(LowbitError, match="no compiled kernels"):
            ask()
