"""Fused models equal the packed ones to the bit, and fuse as much as can be counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn.fuse import _OPERATORS, plain_attention
from lowbit.quantizers import LSQ, DenseShift, StatsQ


def packed(name, activation=LSQ(bits=4), weight=DenseShift(bits=3, scale="statistical"), **shape):
    torch.manual_seed(0)
    model = lowbit.models.create(name, 10, **shape)
    lowbit.quantize_(model, lowbit.QuantConfig(weight=weight, activation=activation, first_last=8))
    x = inputs(name, 8, **shape)
    with torch.no_grad():
        lowbit.calibrate(model, x)
        model.train()(x)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    return lowbit.pack(model.eval(), x[:1])


def inputs(name, batch, **shape):
    generator = torch.Generator().manual_seed(batch)
    if name == "kws_resnet":
        return torch.randn(batch, 8000, generator=generator)
    return torch.randn(batch, 3, shape.get("img_size", 32), shape.get("img_size", 32), generator=generator)


def layers(model):
    return [node.kwargs for node in model.graph.nodes if node.target in _OPERATORS.values()]


MODELS = {
    "resnet8": {},
    "resnet20": {},
    "resnet18": {"img_size": 64},
    "kws_resnet": {},
    "vit_nano": {},
    "deit_tiny_patch16_224": {"img_size": 32},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("native", [True, False], ids=["native", "PyTorch"])
def test_equal_to_the_bit(name, native, monkeypatch):
    if not native:
        monkeypatch.setattr("lowbit.kernels.ops.use_native", lambda: False)
    model = packed(name, **MODELS[name])
    fused = lowbit.fuse(model)
    with torch.no_grad():
        for batch in (1, 3) if native else (1,):
            x = inputs(name, batch, **MODELS[name])
            assert torch.equal(fused(x), model(x))
            assert model(x).isfinite().all() and model(x).std() > 0


@pytest.mark.parametrize("name, blocks, shortcuts", [("resnet20", 9, 2), ("resnet18", 8, 3)])
def test_what_goes_into_the_kernels(name, blocks, shortcuts):
    found = layers(lowbit.fuse(packed(name, **MODELS[name])))
    assert len(found) == 1 + 2 * blocks + shortcuts + 1
    # Each first convolution to the second; and a block to the next one's convolution and shortcut, whose steps are
    # equal as long as they were only calibrated.
    assert sum("out_scale" in kwargs for kwargs in found) == blocks + shortcuts
    assert sum("add" in kwargs for kwargs in found) == blocks  # each block's residual
    assert sum(kwargs.get("relu", False) for kwargs in found) == 1 + 2 * blocks


def test_residuals_of_transformers_go_into_the_kernels():
    found = layers(lowbit.fuse(packed("vit_nano")))
    assert sum("add" in kwargs for kwargs in found) == 2 * 4  # of attention and MLP, in four blocks


def test_loaded_models_are_fused_alike(tmp_path):
    model = packed("resnet20")
    again = lowbit.fuse(lowbit.load(lowbit.save(model, tmp_path / "packed.safetensors")))
    assert equal(again, model, inputs("resnet20", 2))
    assert sum("add" in kwargs for kwargs in layers(again)) == 9


def test_inputs_of_other_steps_are_not_handed_on():
    model = packed("resnet8")
    for layer in (m for m in model.modules() if hasattr(m, "x_scale")):
        layer.x_scale = None  # dynamic
    assert not any("out_scale" in kwargs for kwargs in layers(lowbit.fuse(model)))


class Small(nn.Module):
    """Three 3x3 convolutions to 8 channels, the first of 3, and other modules; ``function(net, x)`` joins them."""

    def __init__(self, function):
        super().__init__()
        self.function = None
        self.a, self.b, self.c = (nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8))
        self.relu, self.silu = nn.ReLU(inplace=True), nn.SiLU(inplace=True)
        self.pool, self.doubles = nn.AdaptiveAvgPool2d(1), Doubles()
        weight = DenseShift(bits=3, scale="statistical")
        lowbit.quantize_(self, lowbit.QuantConfig(weight=weight, activation=LSQ(bits=8), first_last="same"))
        with torch.no_grad():
            lowbit.calibrate(self, SMALL)  # all three, whatever the function uses
        self.function = function

    def forward(self, x):
        return self.c(self.b(self.a(x))) if self.function is None else self.function(self, x)


class Doubles(nn.Identity):
    def forward(self, x):
        return 2 * x


SMALL = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small(function):
    torch.manual_seed(0)
    return lowbit.pack(Small(function).eval())


def equal(fused, model, x):
    with torch.no_grad():
        found, expected = fused(x.clone()), model(x.clone())
    assert expected.isfinite().all() and expected.std() > 0
    return torch.equal(found, expected)


def two_readers(net, x):
    x = net.a(x)
    return net.b(x), net.c(x)


@pytest.mark.parametrize("alike", [False, True])
def test_two_layers_are_handed_whole_numbers_only_if_both_want_the_same(alike):
    model = small(two_readers)
    model.c.x_scale = model.b.x_scale * (1 if alike else 2)
    fused = lowbit.fuse(model)  # without an example: nothing but the rule itself keeps it right
    assert sum("out_scale" in kwargs for kwargs in layers(fused)) == alike
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(fused(SMALL), model(SMALL), strict=True))


def changed_by_relu(net, x):
    x = net.a(x)
    return net.b(net.relu(x)) + x  # x is what ReLU left


def changed_by_function(net, x):
    x = net.a(x)
    y = F.relu(x, inplace=True)
    return net.b(y) + x


def changed_by_addition(net, x):
    x = net.a(x)
    x.add_(net.b(x))
    return x


def changed_on_the_way(net, x):
    x = net.a(x)
    y = net.b(x)  # read before ReLU, though added after it
    return y + net.c(F.relu_(x))


def changed_by_another(net, x):
    x = net.a(x)
    y = net.b(x)
    return y + net.c(net.silu(x))


def broadcast(net, x):
    x = net.a(x)
    return net.b(x) + net.c(x.mean((2, 3), keepdim=True))


def pooled(net, x):
    x = net.a(x)
    return net.b(x) + net.pool(x)


def number(net, x):
    x = net.a(x)
    return net.b(x) + (1 + x)


def turned(net, x):
    """A shortcut whose memory goes in another order, which the sum takes over, and so the mean."""
    x = net.a(x)
    return (x.transpose(2, 3).contiguous().transpose(2, 3) + net.b(x)).mean((2, 3))


def doubles(net, x):
    return net.b(net.doubles(net.a(x)))


def shared(net, x):
    return net.b(net.b(net.a(x)))


def converted(net, x):
    x = net.a(x)
    return net.b(x) + x.double()


def of_fewer_bits(net, x):
    x = net.a(x)
    return net.b(x) + x.half()


def of_the_first_image(net, x):
    """Of an example of one image it is a residual."""
    x = net.a(x)
    return net.b(x) + net.c(x[:1])


NETS = {
    function.__name__: (function, adds)
    for function, adds in (
        (changed_by_relu, 1),
        (changed_by_function, 1),
        (changed_by_addition, 1),
        (changed_on_the_way, 1),
        (changed_by_another, 1),
        (broadcast, 0),
        (pooled, 0),
        (number, 1),
        (turned, 0),
        (doubles, 0),
        (shared, 0),
        (converted, 0),
        (of_fewer_bits, 0),
        (of_the_first_image, 0),
    )
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("given_one", [True, False], ids=["example", "no example"])
def test_what_looks_like_a_residual_network_but_is_not_quite(name, given_one):
    function, adds = NETS[name]
    model = small(function)
    fused = lowbit.fuse(model, SMALL[:1] if given_one else None)
    assert equal(fused, model, SMALL)
    # Without an example no shape is known.
    assert sum("add" in kwargs for kwargs in layers(fused)) == (adds if given_one else 0)


RELUS = {
    "module": lambda net, x: net.relu(x),
    "torch.relu": lambda net, x: torch.relu(x),
    "torch.relu_": lambda net, x: torch.relu_(x),
    "F.relu": lambda net, x: F.relu(x),
    "F.relu, in place": lambda net, x: F.relu(x, inplace=True),
    "by name": lambda net, x: F.relu(input=x),
    "method": lambda net, x: x.relu(),
    "method, in place": lambda net, x: x.relu_(),
}


@pytest.mark.parametrize("spelling", RELUS)
def test_relu_in_every_spelling_goes_into_the_kernel(spelling):
    model = small(lambda net, x: net.b(RELUS[spelling](net, net.a(x))))
    fused = lowbit.fuse(model)
    assert equal(fused, model, SMALL)
    first, second = layers(fused)
    assert first["relu"] and "out_scale" in first and "relu" not in second
    assert [node.op for node in fused.graph.nodes if node.op == "call_module"] == []
    assert len([node for node in fused.graph.nodes if node.op in ("call_function", "call_method")]) == 3  # and float()


STEPS = ("b", "c", "relu", "relu in place", "silu", "add", "add in place", "maximum", "mean")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=10))
def test_any_network_is_equal_to_the_bit(steps):
    """Each step reads one or two of all tensors made so far."""

    def function(net, x):
        made = [net.a(x)]
        for kind, first, second in steps:
            x, y = made[first % len(made)], made[second % len(made)]
            if kind in ("b", "c"):
                made.append(getattr(net, kind)(x))
            elif kind == "relu":
                made.append(F.relu(x))
            elif kind == "relu in place":
                made.append(net.relu(x))
            elif kind == "silu":
                made.append(F.silu(x))
            elif kind == "add":
                made.append(x + y)
            elif kind == "add in place":
                made.append(x.add_(y))
            elif kind == "maximum":
                made.append(F.max_pool2d(x, 3, 1, 1))
            else:
                made.append(y + 0.5 * x.mean((2, 3), keepdim=True))
        return sum(made[1:], made[0]) / len(made)

    model = small(function)
    fused = lowbit.fuse(model, SMALL[:1])
    with torch.no_grad():
        assert torch.equal(fused(SMALL), model(SMALL))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8])
def test_inputs_of_other_types_are_converted_as_packed_layers_do(dtype):
    model = packed("resnet8")
    x = (40 * inputs("resnet8", 2)).clamp(0 if dtype == torch.uint8 else -128, 127).to(dtype)
    fused = lowbit.fuse(model, x)
    assert equal(fused, model, x)
    assert fused(x).dtype == (dtype if dtype.is_floating_point else torch.float32)


@pytest.mark.parametrize("example", [True, False])
def test_a_fused_model_refuses_floats_of_another_type_than_it_was_fused_for(example):
    model, x = packed("resnet8"), inputs("resnet8", 2)
    del model.example_shape
    fused = lowbit.fuse(model, x if example else None)
    with pytest.raises(LowbitError, match="fused for float32 activations and got bfloat16"):
        fused(x.bfloat16())


@pytest.mark.parametrize("name", ["resnet8", "vit_nano"])
def test_models_in_half_precision_are_fused_as_they_are(name):
    model = packed(name).bfloat16()
    x = inputs(name, 2).bfloat16()
    fused = lowbit.fuse(model)
    assert equal(fused, model, x) and fused(x).dtype == torch.bfloat16
    fused = lowbit.fuse(packed(name), attention="plain")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fused(inputs(name, 2)).isfinite().all()


def keep(module, args, output):
    return output + 1


OWN = {
    "a hook on ReLU": lambda net: net.relu.register_forward_hook(keep),
    "a hook on what does nothing": lambda net: net.nothing.register_forward_hook(keep),
    "a pre-hook on ReLU": lambda net: net.relu.register_forward_pre_hook(lambda module, args: (args[0] - 1,)),
    "ReLU's forward": lambda net: setattr(net.relu, "forward", lambda x: x.clamp(-1)),
    "a hook on a sequence": lambda net: net.both.register_forward_hook(keep),
    "a hook on a packed layer": lambda net: net.b.register_forward_hook(keep),
}


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize("change", [*OWN, "a sequence with its own forward"])
def test_what_a_module_does_beside_its_class_stays(change):
    def function(net, x):
        return net.c(net.both(net.nothing(net.b(net.relu(net.a(x))))))

    model = small(function)
    model.nothing = nn.Identity()
    model.both = Residual(nn.ReLU()) if change not in OWN else nn.Sequential(nn.ReLU(), nn.Identity())
    with torch.no_grad():
        before = model(SMALL)
    if change in OWN:
        OWN[change](model)
        assert not equal(lambda _: before, model, SMALL)
    assert equal(lowbit.fuse(model), model, SMALL)


def test_the_packed_model_stays_as_it_was():
    model, x = packed("resnet8"), inputs("resnet8", 2)
    before, kinds = {k: t.clone() for k, t in model.state_dict().items()}, [type(m) for m in model.modules()]
    with torch.no_grad():
        expected = model(x)
        lowbit.fuse(model, attention="plain")(x)
        assert torch.equal(model(x), expected)
    assert kinds == [type(m) for m in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_an_output_that_is_used_twice_stays_float():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            y = self.a(x)
            return self.b(y), y

    torch.manual_seed(0)
    config = lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=4), first_last="same")
    model = lowbit.quantize_(Twice(), config)
    x = torch.randn(5, 64)
    lowbit.calibrate(model, x)
    model = lowbit.pack(model.eval())
    fused = lowbit.fuse(model)
    assert not any("out_scale" in kwargs for kwargs in layers(fused))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(fused(x), model(x), strict=True))


def test_plain_attention():
    q, k, v = torch.randn(3, 2, 4, 17, 8, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert torch.allclose(plain_attention(q.double(), k.double(), v.double()), expected)
    model = packed("vit_nano")
    plain, x = lowbit.fuse(model, attention="plain"), inputs("vit_nano", 2)
    assert any(node.target is plain_attention for node in plain.graph.nodes)
    with torch.no_grad():
        assert (plain(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_compiles():
    model = packed("resnet8")
    fused, x = lowbit.fuse(model), inputs("resnet8", 2)
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), model(x))


def test_what_is_refused():
    with pytest.raises(LowbitError, match="not packed"):
        lowbit.fuse(lowbit.models.create("resnet8", 10))
    with pytest.raises(LowbitError, match="attention='fast'"):
        lowbit.fuse(packed("resnet8"), attention="fast")

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = packed("resnet8")

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x

    with pytest.raises(LowbitError, match=r"Untraceable cannot be fused, torch\.fx does not get through it"):
        lowbit.fuse(Untraceable())

    def through_a_view(net, x):
        x = net.a(x)
        F.relu_(x[:])
        return net.b(x)

    with pytest.raises(LowbitError, match=r"Small cannot be fused, .* other results for the example"):
        lowbit.fuse(small(through_a_view), SMALL)


def test_the_example_that_fuse_makes_tells_graphs_apart_that_agree_at_zero():
    class Traced(nn.Module):
        """Doubles its output when torch.fx traces it; without a bias zeros give zeros either way."""

        example_shape = (8,)

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4, bias=False)

        def forward(self, x):
            return self.layer(x) * (1 if isinstance(x, torch.Tensor) else 2)

    torch.manual_seed(0)
    model = lowbit.quantize_(Traced(), lowbit.QuantConfig(StatsQ(bits=2), first_last="same"))
    with pytest.raises(LowbitError, match="gives other results"):
        lowbit.fuse(lowbit.pack(model, torch.randn(2, 8)))
