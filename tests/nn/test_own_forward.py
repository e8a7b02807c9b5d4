"""`lowbit.pack` and layers that do more than torch's own: they keep doing it, or are refused by name."""

import functools
import types
import warnings

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn.packed import PackedConv2d, PackedLinear, is_stored
from lowbit.quantizers import LSQ, StatsQ


class LoRA(nn.Linear):
    def __init__(self, i, o):
        super().__init__(i, o)
        self.a, self.b = nn.Parameter(torch.randn(2, i)), nn.Parameter(torch.randn(o, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class Twice(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OnlyInit(nn.Linear):
    def __init__(self, i, o):
        super().__init__(i, o, bias=False)
        nn.init.orthogonal_(self.weight)


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, padding=1)


class Mirrored(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.flip(-1), bias)


def linear(layer):
    return nn.Sequential(nn.Linear(8, 8), layer, nn.ReLU(), nn.Linear(8, 8)), torch.randn(16, 8)


def convolution(layer):
    return nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(4, 3, 6, 6)


KEPT = {
    "a forward of its own": lambda: linear(LoRA(8, 8)),
    "a __call__ of its own": lambda: linear(Twice(8, 8)),
    "timm's Linear": lambda: linear(timm.layers.Linear(8, 8)),
    "standardized weights": lambda: convolution(Standardized(8, 8, 3, padding=1)),
    "timm's standardized weights": lambda: convolution(timm.layers.ScaledStdConv2d(8, 8, 3, padding=1)),
    "a _conv_forward of its own": lambda: convolution(Mirrored(8, 8, 3, padding=1)),
}


def quantized(model, x):
    config = lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8), first_last="same")
    lowbit.calibrate(lowbit.quantize_(model, config), x)
    return model.eval()


def check_equal(packed, model, x):
    with torch.no_grad():
        expected = model(x)
        assert (packed(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("shown", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("kind", KEPT)
def test_a_layer_with_its_own_forward_keeps_class_and_forward(kind, shown, tmp_path):
    torch.manual_seed(0)
    model, x = KEPT[kind]()
    cls = type(model[1])
    packed = lowbit.pack(quantized(model, x), x if shown else None)
    check_equal(packed, model, x)
    assert type(packed[1]) is cls and is_stored(packed[1])
    assert isinstance(packed[0], PackedLinear | PackedConv2d) and isinstance(packed[3], PackedLinear | PackedConv2d)
    assert type(model[1]) is not cls  # still quantized: the model stays as it was
    again = lowbit.load_into(KEPT[kind]()[0], lowbit.save(packed, tmp_path / "m.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(x), packed(x))


def test_a_model_of_nothing_else_stores_codes():
    torch.manual_seed(0)
    model, x = nn.Sequential(LoRA(8, 8), LoRA(8, 8)), torch.randn(16, 8)
    packed = lowbit.pack(quantized(model, x), x)
    check_equal(packed, model, x)
    assert all(is_stored(layer) for layer in packed)
    with pytest.raises(LowbitError, match="packed already"):
        lowbit.pack(packed)


def test_a_subclass_that_changes_no_call_is_packed():
    torch.manual_seed(0)
    model, x = linear(OnlyInit(8, 8))
    packed = lowbit.pack(quantized(model, x), x)
    check_equal(packed, model, x)
    assert isinstance(packed[1], PackedLinear)


def plus_one(module, args, output):
    return output + 1


def bound(self, x):
    return type(self).forward(self, x) * 3


OBJECTS = {
    "a hook": lambda layer: layer.register_forward_hook(plus_one),
    "a hook with keywords": lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, output: output + 1, with_kwargs=True
    ),
    "a pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "a first pre-hook": lambda layer: layer.register_forward_pre_hook(lambda m, args: (2 * args[0],), prepend=True),
    "a bound method": lambda layer: setattr(layer, "forward", types.MethodType(bound, layer)),
}


@pytest.mark.parametrize("early", [True, False], ids=["before quantize_", "after"])
@pytest.mark.parametrize("shown", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("kind", OBJECTS)
def test_what_one_layer_does_besides_stays(kind, shown, early):
    torch.manual_seed(0)
    model, x = linear(nn.Linear(8, 8))
    if early:
        OBJECTS[kind](model[1])
    quantized(model, x)
    with torch.no_grad():
        before = model(x)
        if not early:
            OBJECTS[kind](model[1])
            assert not torch.allclose(model(x), before)
    packed = lowbit.pack(model, x if shown else None)
    check_equal(packed, model, x)
    assert type(packed[1]) is nn.Linear and is_stored(packed[1])
    with torch.no_grad():  # and it is the copy that answers, not the model it was made of
        model[1].bias.add_(100)
        assert not torch.allclose(packed(x), model(x), rtol=1)


def closure(layer):
    before = layer.forward
    layer.forward = lambda x: before(x) + 1


REFUSED = {
    "a function in the place of the forward": (closure, "function in the place of their forward.*'1'"),
    "a partial in the place of the forward": (
        lambda layer: setattr(layer, "forward", functools.partial(bound, layer)),
        "function in the place of their forward.*'1'",
    ),
    "spectral norm": (lambda layer: parametrizations.spectral_norm(layer), "another parametrization.*'1'"),
    "a parametrized bias": (lambda layer: parametrizations.weight_norm(layer, "bias"), "another parametrization.*'1'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_copied_is_refused_by_name(kind):
    torch.manual_seed(0)
    change, message = REFUSED[kind]
    model, x = linear(nn.Linear(8, 8))
    change(quantized(model, x)[1])
    with torch.no_grad():
        before = model(x)
        with pytest.raises(LowbitError, match=message):
            lowbit.pack(model, x)
        assert torch.equal(model(x), before)


def test_a_parent_s_function_that_keeps_calling_the_old_layers_is_refused():
    torch.manual_seed(0)
    model, x = linear(nn.Sequential(nn.Linear(8, 8)))
    inner = quantized(model, x)[1]
    inner.forward = lambda x: inner[0](x) * 2
    with pytest.raises(LowbitError, match=r"function in the place of their forward.*'1'"):
        lowbit.pack(model, x)
    inner.forward = torch.tanh  # which holds nothing
    check_equal(lowbit.pack(model, x), model, x)


def test_layers_that_are_never_called_are_told_by_an_example():
    torch.manual_seed(0)
    config = lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8), first_last="same")
    model, x = lowbit.quantize_(Reader(), config, lambda layer, name: name == "read").eval(), torch.randn(16, 8)
    with pytest.warns(UserWarning, match="'read'"):
        lowbit.calibrate(model, x)
    with pytest.raises(LowbitError, match=r"seen no batch.*lowbit\.pack\(model, x\).*'read"):
        lowbit.pack(model)
    packed = lowbit.pack(model, x)
    check_equal(packed, model, x)
    assert is_stored(packed.read)


def test_a_wrapper_around_a_layer_keeps_wrapping():
    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a, self.b = base, nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

        def forward(self, x):
            return self.base(x) * self.base.weight.abs().mean() + x @ self.a.T @ self.b.T

    torch.manual_seed(0)
    model, x = linear(Wrapper(nn.Linear(8, 8)))
    packed = lowbit.pack(quantized(model, x), x)
    check_equal(packed, model, x)
    assert isinstance(packed[1].base, PackedLinear)


class Norm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


NORMS = {
    "torch's": (lambda: nn.BatchNorm2d(8), True),
    "timm's": (lambda: timm.layers.BatchNormAct2d(8), True),
    "a subclass": (lambda: Norm(8), False),
    "a hook": (lambda: (norm := nn.BatchNorm2d(8), norm.register_forward_hook(plus_one))[0], False),
}


@pytest.mark.parametrize("kind", NORMS)
def test_only_plain_batchnorms_are_folded(kind):
    torch.manual_seed(0)
    make, folds = NORMS[kind]
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.Conv2d(8, 4, 1)), torch.randn(8, 3, 6, 6)
    packed = lowbit.pack(quantized(model, x), x)
    check_equal(packed, model, x)
    assert packed.folded == (["1"] if folds else [])


# ---- weights that are read without a call ----


class Reader(nn.Module):
    """Its second layer is never called, and its third is called and read."""

    def __init__(self):
        super().__init__()
        self.first, self.read, self.both, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = F.linear(self.first(x).relu(), self.read.weight, self.read.bias)
        return self.last(self.both(x) + F.linear(x, self.both.weight) + x @ self.both.weight.t() * 0.5)


@pytest.mark.parametrize("shown", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("activation", [LSQ(bits=8), None], ids=["8-bit inputs", "float inputs"])
def test_weights_that_are_read_are_the_quantized_ones(activation, shown, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    config = lowbit.QuantConfig(weight=StatsQ(bits=3), activation=activation, first_last="same")
    model = lowbit.quantize_(Reader(), config).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowbit.calibrate(model, x)
    told = [str(w.message) for w in caught if "not called" in str(w.message)]
    assert len(told) == (activation is not None) and all("'read'" in text and "'both'" not in text for text in told)
    packed = lowbit.pack(model, x if shown else None)
    check_equal(packed, model, x)
    assert isinstance(packed.both, PackedLinear)
    if shown or activation is not None:
        assert is_stored(packed.read)
    again = lowbit.load_into(Reader(), lowbit.save(packed, tmp_path / "m.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(x), packed(x))


def test_training_names_layers_that_are_not_called():
    class Images(Reader):
        def forward(self, x):
            return super().forward(x.flatten(1)[:, :8]).repeat(1, 2)[:, :10]

    config = lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8), first_last="same")
    data = lowbit.data.load("digits")
    settings = lowbit.TrainConfig(epochs=1, batch_size=512, augment="none", progress=False)
    with pytest.warns(UserWarning, match="not called.*'read'"):
        lowbit.train(lowbit.quantize_(Images(), config), data, settings, device="cpu")


def test_an_example_that_calls_an_uncalibrated_layer_is_refused():
    class Maybe(Reader):
        def forward(self, x):
            return self.last(self.read(self.first(x)) if len(x) > 2 else self.first(x))

    torch.manual_seed(0)
    model = lowbit.quantize_(Maybe(), lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last="same")).eval()
    with pytest.warns(UserWarning, match="'read', 'both'"):
        lowbit.calibrate(model, torch.randn(1, 8))
    with pytest.raises(LowbitError, match="layer 'read' has seen no batch"):
        lowbit.pack(model, torch.randn(4, 8))
    assert is_stored(lowbit.pack(model, torch.randn(1, 8)).read)


@pytest.mark.parametrize("activation", [LSQ(bits=8), None], ids=["8-bit inputs", "float inputs"])
def test_torch_s_transformer_layers_do_not_read_around_packed_layers(activation):
    """In evaluation `nn.TransformerEncoderLayer` hands its layers' weights to one fused function, if it can."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), torch.randn(4, 5, 16)
    config = lowbit.QuantConfig(weight=StatsQ(bits=3), activation=activation, first_last="same")
    lowbit.quantize_(model, config)
    lowbit.calibrate(model.eval(), x)
    packed = lowbit.pack(model, x)
    check_equal(packed, model, x)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 12


def test_one_layer_in_two_places_stays_one(tmp_path):
    torch.manual_seed(0)

    def make():
        net, _ = linear(nn.Linear(8, 8))
        net.append(net[1])
        return net

    model, x = make(), torch.randn(16, 8)
    packed = lowbit.pack(quantized(model, x), x)
    check_equal(packed, model, x)
    assert packed[1] is packed[4] and isinstance(packed[4], PackedLinear)
    again = lowbit.load_into(make(), lowbit.save(packed, tmp_path / "m.safetensors"))
    assert again[1] is again[4]
    with torch.no_grad():
        assert torch.equal(again(x), packed(x))


def test_a_model_that_fails_or_differs_when_packed_is_refused():
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.a.own_number = 1

        def forward(self, x):
            if isinstance(self.a, nn.Linear):
                return self.b(self.a(x))
            return self.b(self.a(x)) * 3

    class Fails(Wrong):
        def forward(self, x):
            return self.b(self.a(x)) + self.a.own_number

    torch.manual_seed(0)
    x = torch.randn(16, 8)
    with pytest.raises(LowbitError, match=r"Wrong cannot be packed.*answers otherwise"):
        lowbit.pack(quantized(Wrong(), x), x)
    with pytest.raises(LowbitError, match=r"Fails cannot be packed.*own_number"):
        lowbit.pack(quantized(Fails(), x), x)


def test_a_bare_layer_is_told_to_be_wrapped():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8), torch.randn(16, 8)
    with pytest.raises(LowbitError, match=r"torch\.nn\.Sequential"):
        lowbit.pack(quantized(model, x), x)
