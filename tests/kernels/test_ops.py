"""The custom operators: what they refuse, and that PyTorch's compilers take them."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from kernel_helpers import randn, random_weight

from lowbit.errors import LowbitError
from lowbit.kernels import compiled, pack_weight, reference, shift_conv2d, shift_linear
from lowbit.kernels.ops import check_weight


class Net(torch.nn.Module):
    """A convolution and a linear layer with packed weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = random_weight("denseshift3", (16, 3, 3, 3)), random_weight("statsq4", (5, 16))
        self.bias = torch.nn.Buffer(randn(16))

    def forward(self, x):
        y = shift_conv2d(x, self.first, self.bias, padding=1, relu=True)
        return shift_linear(y.amax((2, 3)), self.second)


def linear_args(dtype=torch.float32, table="denseshift3", **kwargs):
    weight = random_weight(table, (20, 70))
    x = randn(3, 70) if dtype == torch.float32 else torch.ones(3, 70, dtype=dtype)
    scale = None if dtype == torch.float32 else torch.tensor(0.5)
    return (x, weight.data, weight.table, weight.scale, weight.sums, randn(20), scale, weight.bits), kwargs


FORMS = pytest.mark.parametrize("serves", ["library", "no_library"])
QUIET = pytest.mark.filterwarnings("ignore:lowbit's native kernels are not in use")
ADDENDS = [
    {},
    {"relu": True, "out_scale": 0.5},
    {"add": torch.float32},
    {"add": torch.uint8, "add_scale": 0.3, "out_scale": 0.5, "out_low": 0, "out_high": 255},
]


def with_residual(kwargs, *shape):
    return kwargs | ({"add": (3 * randn(*shape).abs()).to(kwargs["add"])} if "add" in kwargs else {})


@QUIET
@FORMS
@pytest.mark.parametrize("kwargs", ADDENDS, ids=str)
@pytest.mark.parametrize("table", ["denseshift3", "lsq8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_opcheck_linear(request, serves, dtype, table, kwargs):
    request.getfixturevalue(serves)
    args, kwargs = linear_args(dtype, table, **with_residual(kwargs, 3, 20))
    torch.library.opcheck(torch.ops.lowbit.shift_linear.default, args, kwargs)


@QUIET
@FORMS
@pytest.mark.parametrize("kwargs", ADDENDS, ids=str)
@pytest.mark.parametrize("table", ["statsq2", "lsq8"])
def test_opcheck_conv2d(request, serves, table, kwargs):
    request.getfixturevalue(serves)
    w = random_weight(table, (10, 5, 3, 3))
    kwargs = with_residual(kwargs, 2, 10, 4, 3)
    for x in (randn(2, 5, 8, 7), randn(2, 5, 8, 7).to(memory_format=torch.channels_last)):
        args = (x, w.data, w.table, w.scale, w.sums, None, None, w.bits, [3, 3], [2, 1], [1, 0], [1, 2])
        torch.library.opcheck(torch.ops.lowbit.shift_conv2d.default, args, kwargs)


def test_compile_without_a_graph_break(library):
    net, x = Net(), randn(2, 3, 9, 9)
    made = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.equal(made(x), net(x))


def test_export_keeps_the_operators(library):
    net, x = Net(), randn(2, 3, 9, 9)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}})
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "lowbit.shift_conv2d.default" in called and "lowbit.shift_linear.default" in called
    x = randn(5, 3, 9, 9)
    assert torch.equal(program.module()(x), net(x))


@pytest.mark.slow
def test_inductor_takes_the_operators(library):
    net, x = Net(), randn(2, 3, 9, 9)
    assert torch.equal(torch.compile(net, fullgraph=True)(x), net(x))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["denseshift2", "denseshift3", "denseshift4", "statsq4", "lsq8"])
def test_inductor_compiles_the_pytorch_form(table):
    torch._dynamo.reset()  # it compiles a function only so many times
    w, x, bias = random_weight(table, (40, 130)), randn(9, 130), randn(40)
    add = torch.arange(9 * 40).reshape(9, 40).to(torch.int8)
    rest = {"relu": True, "out_scale": 0.4, "add_scale": 0.3}

    def form(x, data, bias, add):
        return compiled.linear(x, data, w.table, w.scale, w.sums, bias, None, w.bits, add=add, **rest)

    made = torch.compile(form, fullgraph=True, dynamic=False)
    for rows in (9, 1):
        part, added = x[:rows].clone(), add[:rows].clone()
        assert torch.equal(made(part, w.data, bias, added), reference.linear(part, w, bias, add=added, **rest))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["denseshift4", "lsq8"])
def test_inductor_compiles_the_pytorch_form_of_a_convolution(table):
    w, x, add = random_weight(table, (8, 5, 3, 3)), randn(2, 5, 9, 8), randn(2, 8, 9, 8)

    def form(x, data, add):
        more = {"padding": (1, 1), "add": add}
        return compiled.conv2d(x, data, w.table, w.scale, w.sums, None, None, w.bits, (3, 3), 8, **more)

    made = torch.compile(form, fullgraph=True, dynamic=False)
    assert torch.equal(made(x, w.data, add), reference.conv2d(x, w, padding=(1, 1), add=add))


def test_without_the_library_the_pytorch_form_serves_and_says_so_once(no_library):
    weight, x = random_weight("denseshift4", (20, 70)), randn(3, 70)
    with pytest.warns(UserWarning, match="LOWBIT_NATIVE=0"):
        y = shift_linear(x, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(shift_linear(x, weight), y)
        image, kernel = randn(2, 5, 6, 6), random_weight("denseshift4", (4, 5, 3, 3))
        assert torch.equal(shift_conv2d(image, kernel, padding=1), reference.conv2d(image, kernel, padding=(1, 1)))
        assert shift_linear(torch.empty(0, 70), weight).shape == (0, 20)
        assert shift_conv2d(torch.empty(0, 5, 6, 6), kernel).shape == (0, 4, 4, 4)
    assert torch.equal(y, reference.linear(x, weight))


def test_the_pytorch_form_is_exact_without_vnni():
    """There oneDNN adds products in 16 bits, with saturation; weights of 128 times 255 must not meet it."""
    code = """
import torch
from lowbit.functional import denseshift_levels
from lowbit.kernels import compiled, pack_weight
w = pack_weight(torch.full((16, 64), 15), denseshift_levels(4))
x = torch.full((4, 64), 255, dtype=torch.uint8)
y = compiled.linear(x, w.data, w.levels, w.scale, w.sums, None, torch.ones(1), 4)
assert (y == 64 * 255 * 128).all(), y
for code, level in ((0, -128), (255, 127)):
    w = pack_weight(torch.full((16, 64), code), torch.arange(-128.0, 128.0))
    y = compiled.linear(x, w.data, w.table, w.scale, w.sums, None, torch.ones(1), 8)
    assert (y == 64 * 255 * level).all(), y
"""
    for isa in ("AVX2", "AVX512_CORE"):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_shapes_without_data():
    weight = random_weight("denseshift3", (20, 70)).to("meta")
    assert shift_linear(torch.empty(2, 3, 70, device="meta"), weight).shape == (2, 3, 20)
    kernel = random_weight("denseshift3", (20, 7, 3, 2)).to("meta")
    x = torch.empty(2, 7, 9, 9, device="meta")
    y = shift_conv2d(x, kernel, stride=(2, 1), padding=(1, 0), dilation=2, out_scale=1.0)
    assert y.shape == (2, 20, 4, 7) and y.dtype == torch.int8
    y = shift_conv2d(x, random_weight("lsq8", (20, 7, 3, 2)).to("meta"), add=torch.empty(2, 20, 7, 8, device="meta"))
    assert y.shape == (2, 20, 7, 8) and y.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=["native", "pytorch form", "meta"])
def form(request):
    """Refusals are alike in all forms."""
    request.getfixturevalue("no_library" if request.param == "pytorch form" else "library")
    return request.param


def test_from_two_levels_to_as_many_as_the_bits_can_tell_apart():
    weight = pack_weight(torch.tensor([[0, 1, 1, 0]], dtype=torch.int16), torch.tensor([-1.0, 1.0]))
    assert shift_linear(torch.ones(1, 4, dtype=torch.int8), weight, x_scale=torch.ones(1)).item() == 0
    data = weight.data, weight.scale, None, 2, 4
    check_weight(data[0], (0, 1, 2, 3), *data[1:])
    for levels in ((1,), (0, 1, 2, 3, 4)):
        with pytest.raises(LowbitError, match="2 to 4 integers"):
            check_weight(data[0], levels, *data[1:])


W = random_weight("denseshift3", (20, 70))
C = random_weight("denseshift3", (20, 7, 3, 3))
W8 = random_weight("lsq8", (20, 70))


@pytest.mark.filterwarnings("ignore:lowbit's native kernels are not in use")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda to: shift_linear(to(randn(3, 70).double()), W), "x is torch.float64"),
        (lambda to: shift_linear(to(randn(3, 70).half()), W), "x is torch.float16"),
        (lambda to: shift_linear(to(randn(3, 129)), W), r"takes \[[.]{3}, 70\]"),
        (lambda to: shift_linear(to(randn(3, 69)), W), r"takes \[[.]{3}, 70\]"),
        (lambda to: shift_linear(to(torch.tensor(1.0)), W), r"x is \[\]"),
        (lambda to: shift_linear(to(torch.ones(3, 70, dtype=torch.int8)), W), "x_scale has to say"),
        (lambda to: shift_linear(to(randn(3, 70)), W, x_scale=to(torch.ones(2))), "of 1 or 3 numbers"),
        (lambda to: shift_linear(to(randn(3, 70)), W, x_scale=to(torch.ones(1).double())), "x_scale is torch.float64"),
        (lambda to: shift_linear(to(randn(3, 70)), W, bias=to(torch.ones(19))), r"bias is torch.float32 \[19\]"),
        (lambda to: shift_linear(to(randn(3, 70)), W, low=-129), "low=-129"),
        (lambda to: shift_linear(to(randn(3, 70)), W, low=-1, high=128), "high=128"),
        (lambda to: shift_linear(to(randn(3, 70)), W, low=-5, high=0), "high=0"),
        (lambda to: shift_linear(to(randn(3, 70)), W, out_scale=0.0), "out_scale=0.0"),
        (lambda to: shift_linear(to(randn(3, 70)), W, out_scale=float("nan")), "out_scale=nan"),
        (lambda to: shift_linear(to(randn(3, 70)), W, out_scale=1e39), "out_scale=1e[+]39"),
        (lambda to: shift_linear(to(randn(3, 70)), W, out_low=-1, out_high=255), "out_low=-1"),
        (lambda to: shift_linear(to(randn(3, 70)), W, add=to(randn(3, 70))), r"\[3, 70\]; .* shape \[3, 20\]"),
        (lambda to: shift_linear(to(randn(3, 70)), W, add=to(randn(20))), r"add is torch.float32 \[20\]"),
        (lambda to: shift_linear(to(randn(3, 70)), W, add=to(randn(3, 20).double())), "add is torch.float64"),
        (lambda to: shift_conv2d(to(randn(1, 7, 9, 9)), C, add=to(randn(1, 7, 7, 20))), r"shape \[1, 20, 7, 7\]"),
        *(
            (lambda to, s=s: shift_linear(to(randn(3, 70)), W, add=to(randn(3, 20)), add_scale=s), "add_scale=")
            for s in (0.0, -1.0, float("inf"), float("nan"), 1e39)
        ),
        (lambda to: shift_linear(to(randn(3, 70)), C), "convolution's"),
        (lambda to: shift_conv2d(to(randn(1, 7, 9, 9)), W), "linear layer's"),
        (lambda to: shift_conv2d(to(randn(7, 9, 9)), C), r"x is \[7, 9, 9\]"),
        (lambda to: shift_conv2d(to(randn(1, 70, 9, 9)), C), r"takes \[B, 7, H, W\]"),
        (lambda to: shift_conv2d(to(randn(1, 7, 2, 9)), C), "smaller than the kernel"),
        (lambda to: shift_conv2d(to(randn(1, 7, 9, 9)), C, stride=0), r"stride=\[0, 0\]"),
        (lambda to: shift_conv2d(to(randn(1, 7, 9, 9)), C, padding=-1), r"padding=\[-1, -1\]"),
    ],
)
def test_what_is_refused(form, call, message, monkeypatch):
    where = "meta" if form == "meta" else "cpu"
    for name in ("W", "C"):
        monkeypatch.setitem(globals(), name, globals()[name].to(where))
    with pytest.raises(LowbitError, match=message):
        call(lambda tensor: tensor.to(where))


def test_a_weight_elsewhere_is_refused(library):
    with pytest.raises(LowbitError, match="packed is on meta, x on cpu"):
        shift_linear(randn(3, 70), W.to("meta"))
    with pytest.raises(LowbitError, match="add is on meta, x on cpu"):
        shift_linear(randn(3, 70), W, add=torch.empty(3, 20, device="meta"))
    with pytest.raises(LowbitError, match="add is on meta, x on cpu"):
        shift_conv2d(randn(1, 7, 9, 9), C, add=torch.empty(1, 20, 7, 7, device="meta"))
    with pytest.raises(LowbitError, match="bias is on cpu, x on meta"):
        shift_linear(torch.empty(3, 70, device="meta"), W.to("meta"), torch.ones(20))


def test_wrong_parts_of_a_weight_are_refused(library):
    def call(**changes):
        parts = {"packed": W.data, "levels": W.levels, "scale": W.scale, "sums": W.sums, "bits": 3, **changes}
        torch.ops.lowbit.shift_linear(
            randn(2, 70), parts["packed"], parts["levels"], parts["scale"], parts["sums"], None, None, parts["bits"]
        )

    for changes, message in (
        ({"bits": 5}, "bits=5"),
        ({"bits": 2}, "packed is"),
        ({"packed": W.data.to(torch.int8)}, "packed is torch.int8"),
        ({"packed": W.data[:1]}, "packed is"),
        ({"levels": [1] * 9}, "levels="),
        ({"levels": [-200, 1]}, "levels="),
        ({"bits": 8, "packed": W8.data}, "with bits=8: none are allowed"),
        ({"bits": 8, "levels": []}, "packed is"),
        ({"scale": W.scale.double()}, "scale is torch.float64"),
        ({"sums": W.sums.long()}, "sums is torch.int64"),
        ({"sums": W.sums[:5]}, r"sums is torch.int32 \[5\]"),
    ):
        with pytest.raises(LowbitError, match=message):
            call(**changes)
