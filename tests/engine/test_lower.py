"""Plans against the packed models that they are made of."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import lowbit
from lowbit.engine import lower, operations
from lowbit.errors import LowbitError
from lowbit.models import create
from lowbit.nn import QuantConfig
from lowbit.nn.packed import PackedLayer, is_stored
from lowbit.quantizers import LSQ, DenseShift, StatsQ
from lowbit_suite.app import app

SHAPES = {"ds_cnn": (3000,), "kws_resnet": (3000,)}
# Only these have no float operation but the mean of a global average, whose sums may be ordered differently.
INTEGERS = ("resnet8", "resnet20", "ds_cnn", "kws_resnet")


def packed(model: nn.Module, x: torch.Tensor, bits: int = 3, method=DenseShift, filter_fn=None, **more) -> nn.Module:
    """A calibrated and packed model with batch statistics that keep its numbers in range."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    weight = method(bits=bits)
    lowbit.quantize_(
        model, QuantConfig(**{"weight": weight, "activation": LSQ(bits=8), "first_last": 8} | more), filter_fn
    )
    lowbit.calibrate(model, x)
    with torch.no_grad():
        model.train()(x)
    return lowbit.pack(model.eval(), x)


def wrapped(*layers: nn.Module, features: int = 24) -> nn.Module:
    """The layers after a packed linear layer, which `pack` needs."""
    return nn.Sequential(nn.Linear(features, features), *layers)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of the expected norm."""
    return float((actual - expected.flatten(1)).norm() / expected.norm())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["resnet8", "resnet20", "vit_nano_patch8", "ds_cnn", "kws_resnet"])
@torch.no_grad()
def test_plans_of_the_projects_models(name, bits):
    torch.manual_seed(bits)
    x = torch.randn(3, *SHAPES.get(name, (3, 32, 32)))
    model = packed(create(name), x, bits)
    plan = lowbit.plan(model, x[:1])
    actual, expected = plan(x), model(x)
    assert actual.shape == (3, 10)
    if name in INTEGERS and name.startswith("resnet"):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert difference(actual, expected) < 0.03  # one activation that is rounded the other way
    np.testing.assert_array_equal(plan(x.numpy()), actual.numpy())


@pytest.mark.parametrize("qkr", [False, True])
@pytest.mark.parametrize("activation", [LSQ(bits=4), LSQ(bits=4, granularity="token", bias=True)])
@torch.no_grad()
def test_low_bit_attention(activation, qkr):
    torch.manual_seed(3)
    x = torch.randn(2, 3, 32, 32)
    model = packed(create("vit_nano_patch8"), x, 4, StatsQ, attention=True, qkr=qkr, activation=activation)
    assert difference(lowbit.plan(model, x)(x), model(x)) < 0.1


@pytest.mark.parametrize("name", ["mobilenet_v2", pytest.param("resnet18", marks=pytest.mark.slow)])
@torch.no_grad()
def test_models_of_other_libraries(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = packed(create(name, img_size=64), x)
    assert difference(lowbit.plan(model, x)(x), model(x)) < 0.03


@torch.no_grad()
def test_a_shifted_window_transformer():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=5
    )
    model = packed(swin, x)
    assert difference(lowbit.plan(model, x)(x), model(x)) < 0.1


LAYERS = {
    "norm": nn.LayerNorm(24),
    "norm without numbers": nn.LayerNorm(24, elementwise_affine=False, eps=0.1),
    "gelu": nn.GELU(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "softmax": nn.Softmax(-1),
    "softmax of tokens": nn.Softmax(1),
    "tanh gelu": nn.GELU("tanh"),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardswish": nn.Hardswish(),
    "leaky relu": nn.LeakyReLU(0.2),
    "several": nn.Sequential(nn.GELU(), nn.Identity(), nn.Dropout(), nn.LayerNorm(24)),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_float_operations_to_the_last_bits(name):
    torch.manual_seed(1)
    x = 3 * torch.randn(2, 7, 24)
    layer = LAYERS[name]
    if name == "norm":
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    model = packed(wrapped(layer), x, first_last="same")
    actual = lowbit.plan(model, x)(x).reshape(x.shape)
    torch.testing.assert_close(actual, model(x), rtol=3e-6, atol=3e-6)


FUNCTIONS = {
    "silu": nn.functional.silu,
    "silu in place": lambda x: nn.functional.silu(x, inplace=True),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid in place": lambda x: x.sigmoid_(),
    "hardswish": lambda x: nn.functional.hardswish(x, True),
    "timm's hardswish": lambda x: x.mul_(nn.functional.relu6(x + 3.0).div_(6.0)),
    "hardsigmoid": nn.functional.hardsigmoid,
    "leaky relu": lambda x: nn.functional.leaky_relu(x, 0.3),
    "square": lambda x: x * x,
    "square of the rows' mean": lambda x: x.mean(1, keepdim=True) * x.mean(1, keepdim=True),
    "a gate of rows": lambda x: torch.mul(x, x.mean(1, keepdim=True)),
    "a gate of channels": lambda x: x.mean(2, keepdim=True) * x,
    "an outer product": lambda x: x.mean(1, keepdim=True) * x.mean(2, keepdim=True),
    "a gate of heads": lambda x: x.reshape(-1, 7, 4, 6) * x.reshape(-1, 7, 4, 6).mean((1, 3), keepdim=True),
    "a sum of rows": lambda x: x + x.mean(1, keepdim=True),
    "a table": lambda x: x * torch.arange(168.0).reshape(7, 24),
    "differences": lambda x: (1 - x) - (x - 2) - x.mean(2, keepdim=True),
    "a weighted sum": lambda x: torch.add(x, x.flip(1), alpha=0.5),
    "negative": lambda x: -x,
    "quotient": lambda x: x.div(4) - x / 3,
    "sum": lambda x: x.sum(1),
    "largest": lambda x: x.amax(2),
    "unit length": lambda x: nn.functional.normalize(x, dim=-1),
    "unit length of columns": lambda x: nn.functional.normalize(x, dim=1),
    "a sum with a product": lambda x: torch.addcmul(x, x.flip(1), x, value=0.5),
    "length": lambda x: x.norm(p=2, dim=1),
    "an inverse": lambda x: 3 / (x * x + 1),
    "a quotient of tensors": lambda x: x / (x * x + 0.5),
    "tanh": torch.tanh,
}


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_functions_and_methods(name):
    torch.manual_seed(1)
    x = 3 * torch.randn(2, 7, 24)
    model = packed(wrapped(Function(FUNCTIONS[name])), x, first_last="same")
    expected = model(x)
    actual = lowbit.plan(model, x)(x).reshape(expected.shape)
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


IN_PLACE = {
    "method": lambda x: (x.mul_(2), x)[1],
    "function": lambda x: (nn.functional.relu(x, inplace=True), x)[1],
    "module": nn.Sequential(nn.Identity(), nn.Hardswish(inplace=True)),
}


@pytest.mark.parametrize("name", IN_PLACE)
@torch.no_grad()
def test_who_reads_a_tensor_after_it_was_changed_in_place(name):
    torch.manual_seed(2)
    x = torch.randn(2, 7, 24)
    change = IN_PLACE[name]

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.change = change if isinstance(change, nn.Module) else Function(change)

        def forward(self, x):
            self.change(x)
            return x

    model = packed(wrapped(Read()), x, first_last="same")
    torch.testing.assert_close(lowbit.plan(model, x)(x), model(x).flatten(1), rtol=3e-6, atol=3e-6)


class Images(nn.Module):
    """A packed convolution, then ``layer``."""

    def __init__(self, layer: nn.Module, channels: int = 20):
        super().__init__()
        self.conv, self.layer = nn.Conv2d(3, channels, 3, padding=1), layer

    def forward(self, x):
        return self.layer(self.conv(x))


class Gate(nn.Module):
    """A gate of each channel, as squeeze-and-excitation has it, and one of each place."""

    def forward(self, x):
        x = x * nn.functional.hardsigmoid(nn.functional.adaptive_avg_pool2d(x, 1))
        return x * torch.sigmoid(x.mean(1, keepdim=True))


POOLS = {
    "max": nn.MaxPool2d(2),
    "max of cut windows": nn.MaxPool2d(3, 2, ceil_mode=True),
    "overlapping max of cut windows": nn.MaxPool2d(5, 3, 1, ceil_mode=True),
    "max of windows that would start outside": nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    "average of whole windows": nn.AvgPool2d(2, ceil_mode=True),
    "gates": Gate(),
    "groups": nn.Conv2d(20, 8, 3, 2, 1, groups=4),
    "channel by channel": nn.Conv2d(20, 40, 3, groups=20),
    "group norm": nn.GroupNorm(4, 20),
    "layer norm of images": nn.GroupNorm(1, 20),
    "swish": nn.SiLU(),
    "reflected borders": nn.Sequential(nn.ReflectionPad2d((1, 2, 3, 0)), nn.MaxPool2d(2)),
    "repeated borders": nn.Sequential(nn.ReplicationPad2d((1, 2, 3, 0)), nn.MaxPool2d(2)),
    "larger": nn.Upsample(scale_factor=2),
    "overlapping max": nn.MaxPool2d(3, 2, 1),
    "average": nn.AvgPool2d(2),
    "average with pads": nn.AvgPool2d(3, 2, 1),
    "average without pads": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average of a divisor": nn.AvgPool2d(2, divisor_override=3),
    "global": nn.AdaptiveAvgPool2d(1),
    "quarters": nn.AdaptiveAvgPool2d((3, 2)),
    "batchnorm": nn.Sequential(nn.Identity(), nn.BatchNorm2d(20), nn.ReLU()),
    "pooled batchnorm": nn.Sequential(nn.Identity(), nn.BatchNorm2d(20), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
    "of the same size": nn.Conv2d(20, 8, (3, 5), padding="same", groups=2),
    "lines": nn.Sequential(nn.Flatten(2), nn.Conv1d(20, 4, 3, 2, 1)),
    "flatten": nn.Flatten(),
}


@pytest.mark.parametrize("name", POOLS)
@torch.no_grad()
def test_operations_on_images(name):
    torch.manual_seed(2)
    x = torch.randn(2, 3, 12, 8)
    layer = copy.deepcopy(POOLS[name])
    for part in layer.modules():  # the weights of POOLS differ from process to process
        getattr(part, "reset_parameters", int)()
    own = [part for part in layer.modules() if isinstance(part, nn.Conv1d | nn.Conv2d)]
    model = packed(Images(layer), x, first_last="same", filter_fn=lambda module, name: module not in own)
    expected = model(x)
    actual = lowbit.plan(model, x)(x).reshape(expected.shape)
    if own:  # torch adds a convolution's products in an order of each processor's: roundings are of the sums' size
        torch.testing.assert_close(actual, expected, rtol=0, atol=5e-7 * expected.abs().max().item())
    else:
        tolerance = 0 if "max" in name or name in ("flatten", "larger") else 3e-6
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def doubled(layer: nn.Module) -> nn.Module:
    """The layer, as an instance of a subclass whose forward gives twice the result."""
    layer = copy.deepcopy(layer)
    original = type(layer)
    layer.__class__ = type("Doubled", (original,), {"forward": lambda self, x: 2 * original.forward(self, x)})
    return layer


@pytest.mark.parametrize("kind", operations.MODULES, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_a_subclass_with_a_forward_of_its_own_is_not_its_base(kind):
    torch.manual_seed(5)
    made = {
        nn.Linear: lambda: nn.Linear(8, 5),
        nn.Conv2d: lambda: nn.Conv2d(20, 4, 3),
        nn.LayerNorm: lambda: nn.LayerNorm(8),
        nn.BatchNorm2d: lambda: nn.Sequential(nn.Identity(), nn.BatchNorm2d(20))[1],
        nn.MaxPool2d: lambda: nn.MaxPool2d(2),
        nn.AvgPool2d: lambda: nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d: lambda: nn.AdaptiveAvgPool2d(1),
        nn.GroupNorm: lambda: nn.GroupNorm(4, 20),
    }
    x = torch.randn(2, 3, 12, 8)
    flat = kind is nn.BatchNorm1d  # it takes [N, C]
    layer = nn.BatchNorm1d(24) if flat else made.get(kind, kind)()
    x = torch.randn(4, 24) if flat else x
    layer = doubled(layer)
    model = wrapped(layer) if flat else Images(layer)
    model = packed(model, x, first_last="same", filter_fn=lambda module, name: module is not layer)
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d):  # whose forward decides by the number of dims
        with pytest.raises(LowbitError, match="Doubled, is not an operation of plans"):
            lowbit.plan(model, x)
        return
    expected = model(x)
    torch.testing.assert_close(
        lowbit.plan(model, x)(x).reshape(expected.shape), expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
    )


class Halved(nn.Linear):
    """A layer with a forward of its own, which `pack` lets compute with floats."""

    def forward(self, x):
        return 0.5 * nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("activation", [LSQ(bits=2), LSQ(bits=2, bias=True), LSQ(bits=2, granularity="token")])
@torch.no_grad()
def test_the_input_of_a_layer_that_stores_codes_is_rounded(activation):
    torch.manual_seed(6)
    x = torch.randn(3, 4, 24)
    model = packed(wrapped(nn.ReLU(), Halved(24, 5)), x, activation=activation, first_last="same")
    assert is_stored(model[2]) and not isinstance(model[2], PackedLayer)
    torch.testing.assert_close(lowbit.plan(model, x)(x), model(x).flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_of_others_are_refused(register):
    model = wrapped(nn.Sequential(nn.ReLU(), nn.GELU()), nn.GELU())
    x = torch.randn(3, 24)
    model = packed(model, x, first_last="same")
    getattr(model[2], register)(lambda *given: None)
    with pytest.raises(LowbitError, match="has hooks, which plans do not call"):
        lowbit.plan(model, x)


def test_layers_of_timm_that_are_named_like_those_of_torch():
    from timm.layers import BatchNormAct2d, LayerNorm2d

    torch.manual_seed(6)
    x = torch.randn(2, 3, 12, 9)
    for layer in (LayerNorm2d(20), BatchNormAct2d(20)):
        model = packed(Images(nn.Sequential(nn.Identity(), layer)), x, first_last="same")
        with torch.no_grad():
            expected = model(x)
            actual = lowbit.plan(model, x)(x).reshape(expected.shape)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Rearranged(nn.Module):
    """Views, slices, concatenation and sums of what a packed layer gives."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(24, 24), nn.Linear(24, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 24))

    def forward(self, x):
        y = self.first(x)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y.flip(1)], dim=1)
        y = torch.roll(y, 2, 1) + y * 0.5
        y = y.reshape(x.shape[0], -1, 2, 12).transpose(1, 2).flatten(2)
        return self.last(y.reshape(x.shape[0], -1, 24)[:, 1:]).mean(1)


class Branches(nn.Module):
    """Convolutions that read one tensor by the same step, with different paddings: the narrow one first, or last."""

    def __init__(self, paddings):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.branches = nn.ModuleList(nn.Conv2d(8, 4, 2 * p + 1, padding=p) for p in paddings)

    def forward(self, x):
        y = self.first(x)
        return torch.cat([branch(y) for branch in self.branches], 1)


@pytest.mark.parametrize("paddings", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@torch.no_grad()
def test_readers_with_different_paddings_share_a_map(paddings):
    torch.manual_seed(8)
    x = torch.randn(2, 3, 7, 6)
    model = packed(Branches(paddings), x, first_last="same")
    for branch in model.branches:  # as calibration gives it, up to the last bits
        branch.x_scale.copy_(model.branches[0].x_scale)
        branch.low, branch.high = model.branches[0].low, model.branches[0].high
    plan = lowbit.plan(model, x)
    assert torch.equal(plan(x), model(x).flatten(1))
    assert len({row["inputs"][0] for row in plan.operations() if row["kind"] == "product"}) == 2


@torch.no_grad()
def test_rearrangements():
    torch.manual_seed(4)
    x = torch.randn(3, 5, 24)
    model = packed(Rearranged(), x, first_last="same")
    torch.testing.assert_close(lowbit.plan(model, x)(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_first_and_last_layers_in_full_precision():
    torch.manual_seed(7)
    for name in ("resnet8", "vit_nano_patch8"):
        x = torch.randn(2, 3, 32, 32)
        model = packed(create(name), x, first_last=None)
        assert difference(lowbit.plan(model, x)(x), model(x)) < 0.03


@pytest.mark.parametrize("activation", [LSQ(bits=8), LSQ(bits=4), LSQ(bits=4, bias=True), None])
@torch.no_grad()
def test_input_quantizers(activation):
    """With a step from calibration, with biases, and with a scale computed for each row or image."""
    torch.manual_seed(5)
    x = torch.randn(3, 3, 9, 9)
    net = nn.Sequential(nn.Conv2d(3, 10, 3, 2), nn.ReLU(), nn.Conv2d(10, 6, 1), nn.Flatten(), nn.Linear(96, 5))
    model = packed(net, x, activation=activation, first_last="same")
    torch.testing.assert_close(lowbit.plan(model, x)(x), model(x), rtol=0, atol=0)


class Windows(nn.Module):
    """A packed layer whose tokens have two dims, as those of windows do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.first(x).relu()
        return self.last(y.reshape(x.shape[0], 2, 4, 8)).flatten(1)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("net", [Windows, lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))])
@torch.no_grad()
def test_a_step_for_each_token(net, biased):
    torch.manual_seed(9)
    x = torch.randn(3, 8, 6) * torch.rand(8, 1)
    model = packed(net(), x, activation=LSQ(bits=4, granularity="token", bias=biased), first_last="same")
    steps = [layer.x_scale.numel() for layer in model.modules() if isinstance(layer, PackedLayer)]
    assert steps == [8, 8]
    plan = lowbit.plan(model, x)
    kinds = [row["kind"] for row in plan.operations()]
    assert kinds.count("quantize") == kinds.count("product") == 2
    tolerance = 0 if net is Windows else 3e-6
    torch.testing.assert_close(plan(x), model(x).flatten(1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 31, 33])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (5, 2, 2, 1), (3, 1, 0, 2), (1, 2, 0, 1)]
)
@torch.no_grad()
def test_convolutions_of_every_shape(channels, kernel, stride, padding, dilation):
    torch.manual_seed(6)
    x = torch.randn(2, channels, 11, 8)
    convs = (nn.Conv2d(channels, 18, kernel, stride, padding, dilation) for _ in range(2))
    for conv, first_last in zip(convs, ("same", 8), strict=True):  # 3 and 8 bits
        model = packed(nn.Sequential(conv), x, first_last=first_last)
        expected = model(x)
        actual = lowbit.plan(model, x)(x).reshape(expected.shape)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_same_for_any_threads_and_batch():
    x = torch.randn(5, 3, 32, 32)
    model = packed(create("vit_nano"), x)
    one = lowbit.plan(model, x[:1], threads=1)
    expected = torch.cat([one(item[None]) for item in x])
    for threads in (1, 2, 3):
        made = lowbit.Plan(one.content, threads)
        assert torch.equal(made(x), expected)
        assert torch.equal(made(x[:1]), expected[:1])
    assert one(x[:0]).shape == (0, 10)


def test_a_plan_is_one_operator_for_torch():
    x = torch.randn(2, 3, 32, 32)
    plan = lowbit.plan(packed(create("resnet8"), x), x)
    module = nn.Sequential(lowbit.engine.PlanModule(plan), nn.ReLU())
    expected = plan(x).relu()
    assert torch.equal(module(x), expected)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), expected)
    exported = torch.export.export(module, (x,))
    assert "run_plan" in str(exported.graph)
    assert torch.equal(exported.module()(x), expected)


def test_files(tmp_path):
    x = torch.randn(1, 3, 32, 32)
    plan = lowbit.plan(packed(create("resnet8"), x))  # the example is made up
    path = plan.save(tmp_path / "net.lbp")
    again = lowbit.load_plan(path)
    assert again.content == plan.content
    assert torch.equal(again(x), plan(x))
    assert [row["kind"] for row in again.operations()][:2] == ["quantize", "product"]
    assert (again.time(x.numpy(), repeats=2) >= 0).all()
    with pytest.raises(LowbitError, match="cannot be read"):
        lowbit.load_plan(tmp_path / "none.lbp")
    path.write_bytes(plan.content[:-1])
    with pytest.raises(LowbitError, match="cut short"):
        lowbit.load_plan(path)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.zeros(1, 3, 32, 31), "3072 numbers"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "float64"),
        (np.zeros((1, 3, 32, 32)), "float64"),
        ([[0.0]], "list"),
    ],
)
def test_wrong_inputs(x, what):
    plan = lowbit.plan(packed(create("resnet8"), torch.randn(2, 3, 32, 32)))
    with pytest.raises(LowbitError, match=what):
        plan(x)


def test_attention_of_windows():
    torch.manual_seed(3)

    class Attention(nn.Module):
        def forward(self, x):
            q, k, v = x.reshape(-1, 2, 6, 3, 2, 4).permute(3, 0, 1, 4, 2, 5)
            return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)

    x = torch.randn(2, 12, 24)
    model = packed(wrapped(Attention()), x, first_last="same")
    with torch.no_grad():
        torch.testing.assert_close(lowbit.plan(model, x)(x), model(x), rtol=1e-5, atol=1e-5)


class Sine(nn.Module):
    """An operation that plans do not know."""

    def forward(self, x):
        return torch.sin(x)


def test_what_plans_do_not_know():
    x = torch.randn(2, 4, 24)
    with pytest.raises(LowbitError, match=r"1, a Sine: sin is not an operation of plans; lowbit\.fuse takes"):
        lowbit.plan(packed(wrapped(Sine()), x, first_last="same"), x)
    with pytest.raises(LowbitError, match="not packed"):
        lowbit.plan(wrapped(Sine()), x)
    with pytest.raises(LowbitError, match="float64"):
        lowbit.plan(
            packed(create("resnet8"), torch.randn(2, 3, 32, 32)), torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        )


def test_a_plan_that_answers_otherwise_is_refused(monkeypatch):
    x = torch.randn(2, 4, 24)
    model = packed(wrapped(nn.GELU()), x, first_last="same")
    monkeypatch.setattr(lower, "lower_known", lambda lowering, module, x: x)  # GELU becomes nothing
    with pytest.raises(LowbitError, match="another output"):
        lowbit.plan(model, x)


def test_export_by_the_command(tmp_path):
    """A packed or a quantized file becomes a plan; a file without the input's shape is refused in one sentence."""
    x = torch.randn(2, 3, 32, 32)
    model = create("resnet8")
    lowbit.quantize_(model, QuantConfig(weight=StatsQ(bits=2), activation=LSQ(bits=8), first_last=8))
    lowbit.calibrate(model.eval(), x)
    runner = CliRunner()
    for name, each in (("packed", lowbit.pack(model, x)), ("quantized", model)):
        saved = lowbit.save(each, tmp_path / f"{name}.safetensors")
        done = runner.invoke(app, ["export", str(saved), str(tmp_path / f"{name}.lbp")])
        assert done.exit_code == 0, done.output
        assert "3072 -> 10 numbers" in done.output
        assert torch.equal(lowbit.load_plan(tmp_path / f"{name}.lbp")(x), lowbit.plan(lowbit.pack(model, x), x)(x))
    done = runner.invoke(app, ["export", str(tmp_path / "none.safetensors"), str(tmp_path / "none.lbp")])
    assert done.exit_code != 0
    assert not (tmp_path / "none.lbp").exists()
