"""Fused models equal the packed ones to the bit, and fuse as much as can be counted by hand."""

import pytest
import torch
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


MODELS = {"resnet8": {}, "resnet20": {}, "resnet18": {"img_size": 64}, "kws_resnet": {}, "vit_nano": {}}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("native", [True, False], ids=["native", "PyTorch"])
def test_equal_to_the_bit(name, native, monkeypatch):
    if not native:
        monkeypatch.setattr("lowbit.kernels.ops._use_native", lambda: False)
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


def test_inputs_of_other_steps_are_not_handed_on():
    model = packed("resnet8")
    for layer in (m for m in model.modules() if hasattr(m, "x_scale")):
        layer.x_scale = None  # dynamic
    assert not any("out_scale" in kwargs for kwargs in layers(lowbit.fuse(model)))


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

    with pytest.raises(LowbitError, match="Untraceable cannot be fused"):
        lowbit.fuse(Untraceable())
