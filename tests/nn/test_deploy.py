"""`lowbit.pack`: the packed model calculates what the quantized one does, and survives its file."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import CheckpointError, LowbitError
from lowbit.nn import quantized_layers
from lowbit.nn.onnx import standard
from lowbit.nn.packed import PackedConv2d, PackedLayer, PackedLinear, is_stored
from lowbit.quantizers import LSQ, PACT, S3, DenseShift, LSQPlus, StatsQ, get, names


def images(n=4, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def quantized(name, x=None, **config):
    """A model whose BatchNorms and quantizers have seen a batch."""
    torch.manual_seed(0)
    model = lowbit.quantize_(lowbit.models.create(name, 10), lowbit.QuantConfig(**config))
    x = images(16) if x is None else x
    with torch.no_grad():
        lowbit.calibrate(model, x)
        model.train()(x)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(-1, 2)  # negative ones too
            norm.bias.normal_()
    return model.eval()


VIT = {"attention": True, "unsigned": ("*.fc2",), "first_last": 8}
MODELS = {
    "resnet8, DenseShift 3, LSQ 4": ("resnet8", {"weight": DenseShift(bits=3), "activation": LSQ(bits=4)}),
    "resnet8, DenseShift 4, PACT": (
        "resnet8",
        {"weight": DenseShift(bits=4), "activation": PACT(bits=4), "first_last": 8},
    ),
    "resnet8, StatsQ 2, LSQ 8": ("resnet8", {"weight": StatsQ(bits=2), "activation": LSQ(bits=8), "first_last": 8}),
    "vit, StatsQ 2": ("vit_nano", {"weight": StatsQ(bits=2), "activation": LSQ(bits=4), **VIT}),
    "vit, S3, LSQ+": ("vit_nano", {"weight": S3(bits=3), "activation": LSQPlus(bits=4)}),
    "vit, token, biases": (
        "vit_nano",
        {"weight": StatsQ(bits=3), "activation": LSQ(bits=4, granularity="token", bias=True), **VIT},
    ),
    "vit, token, biases, QKR": (
        "vit_nano",
        {"weight": StatsQ(bits=4), "activation": LSQ(bits=4, granularity="token", bias=True), **VIT, "qkr": True},
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def pair(request):
    name, config = MODELS[request.param]
    model = quantized(name, **config)
    with torch.no_grad():  # biases that matter
        for module in model.modules():
            for bias in (getattr(module, "bias_in", None), getattr(module, "bias_out", None)):
                if bias is not None:
                    bias.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    return model, lowbit.pack(model)


def outputs(model, names, x):
    """What each of the layers named puts in and out."""
    kept = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept.update({name: (args[0], output)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return kept


def test_every_layer_calculates_what_it_did(pair):
    """Layer by layer on the same input, so that no rounding of an earlier layer can differ."""
    model, packed = pair
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLayer)}
    inputs = {}

    def keep(name):
        return lambda module, args: inputs.setdefault(name, args[0].detach().clone())

    # A pre-hook put first sees the input as it comes, before the layer's own quantizer.
    hooks = [model.get_submodule(n).register_forward_pre_hook(keep(n), prepend=True) for n in layers]
    names = list(layers)
    out = outputs(model, names, images())
    for hook in hooks:
        hook.remove()
    assert len(layers) >= 6
    norms = dict(zip(packed.folded, packed.folded, strict=True))
    for name, layer in layers.items():
        expected = out[name][1]
        has_norm = isinstance(layer, PackedConv2d) and name != "patch_embed.proj"
        norm = name.replace("conv", "bn") if has_norm else None
        norm = name[:-1] + "1" if norm is not None and name.endswith(".0") else norm  # a shortcut's
        if norm is not None:
            assert norm in norms
            expected = model.get_submodule(norm)(expected)
        with torch.no_grad():
            found = layer(inputs[name])
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_the_whole_model_agrees_up_to_rounding(pair):
    model, packed = pair
    x = images(8)
    with torch.no_grad():
        before, after = model(x), packed(x)
    assert (before - after).norm() <= 0.05 * before.norm()


def test_the_model_stays_as_it_was(pair):
    model, packed = pair
    assert list(quantized_layers(model)) and not any(isinstance(m, PackedLayer) for m in model.modules())
    assert not list(packed.parameters()) or all(not name.endswith("original0") for name, _ in packed.named_parameters())


def test_saved_and_loaded_it_says_the_same_to_the_bit(pair, tmp_path):
    _, packed = pair
    path = lowbit.save(packed, tmp_path / "packed.safetensors")
    again = lowbit.load(path)
    with torch.no_grad():
        assert torch.equal(packed(images()), again(images()))
    kinds = [(name, type(module)) for name, module in packed.named_modules()]
    assert kinds == [(name, type(module)) for name, module in again.named_modules()]


@torch.jit.script
def scripted(y):
    return y * torch.sigmoid(y)


def written(block, x):
    y = block.conv(x)
    z = torch.zeros_like(y)
    z[:] = y
    return block.bn(y) + z


# How a block makes its output of x, and whether its BatchNorm may be folded into its convolution.
USES = {
    "the BatchNorm alone": (True, lambda b, x: b.bn(b.conv(x)) * 2),
    "its shape": (True, lambda b, x: (lambda y: b.bn(y).reshape(y.shape[0], y.size(1), -1).to(y.dtype))(b.conv(x))),
    "both are called twice": (True, lambda b, x: b.bn(b.conv(x)) + b.bn(b.conv(2 * x))),
    "added": (False, lambda b, x: (lambda y: b.bn(y) + y)(b.conv(x))),
    "by keyword": (False, lambda b, x: (lambda y: torch.add(b.bn(y), other=y))(b.conv(x))),
    "in a list": (False, lambda b, x: (lambda y: torch.cat([b.bn(y), y], 1))(b.conv(x))),
    "a tuple comes out": (False, lambda b, x: (lambda y: b.bn(y) + y.max(1, keepdim=True).values)(b.conv(x))),
    "written elsewhere": (False, written),
    "before the BatchNorm": (False, lambda b, x: (lambda y: y.mean() + b.bn(y))(b.conv(x))),
    "scripted": (False, lambda b, x: (lambda y: b.bn(y) + scripted(y))(b.conv(x))),
    "without autograd": (False, lambda b, x: (lambda y: b.bn(y) + y.data)(b.conv(x))),
    "returned": (False, lambda b, x: (lambda y: (b.bn(y), y))(b.conv(x))),
    "two BatchNorms": (False, lambda b, x: (lambda y: b.bn(y) + b.other(input=y))(b.conv(x))),
    "the convolution twice": (False, lambda b, x: b.bn(b.conv(x)) + b.other(b.conv(2 * x))),
    "once without": (False, lambda b, x: b.bn(b.conv(x)) + b.conv(2 * x)),
    "the BatchNorm twice": (False, lambda b, x: b.bn(2 * b.bn(b.conv(x)))),
}


@pytest.mark.parametrize("use", USES)
def test_a_batchnorm_is_folded_only_if_nothing_else_needs_the_convolution(use):
    folds, forward = USES[use]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.other = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.BatchNorm2d(16)

        def forward(self, x):
            return forward(self, x)

    torch.manual_seed(0)
    model, x = Block(), torch.randn(4, 3, 9, 9)
    lowbit.quantize_(model, lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=4), first_last="same"))
    with torch.no_grad():
        lowbit.calibrate(model, x)
        model.train()(x)
        for norm in (model.bn, model.other):
            norm.weight.uniform_(1, 2)
        packed = lowbit.pack(model.eval(), x)
        assert packed.folded == (["bn"] if folds else [])
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_five_to_eight_bits_take_eight(bits, tmp_path):
    torch.manual_seed(0)
    model = lowbit.models.create("resnet8", 10)
    method = LSQ(bits=bits)
    lowbit.quantize_(model, lowbit.QuantConfig(weight=method, activation=method, first_last="same"))
    lowbit.calibrate(model, images())
    packed = lowbit.pack(model.eval())
    before = {found.name: found for found in quantized_layers(model)}
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLayer)}
    assert set(layers) == {name for name, found in before.items() if found.weight is not None}
    for name, layer in layers.items():
        assert layer.bits == 8 and len(layer.levels) == 2**bits
        assert torch.equal(layer.weight.codes().long(), before[name].codes().long())
    with torch.no_grad():
        y = packed(images())
        assert torch.equal(lowbit.load(lowbit.save(packed, tmp_path / "packed.safetensors"))(images()), y)
        assert (y - model(images())).norm() < 0.05 * y.norm()


def test_the_summary_says_how_many_bits(tmp_path):
    model = quantized("resnet8", weight=DenseShift(bits=2), activation=LSQ(bits=4), first_last=8)
    packed = lowbit.pack(model)
    again = lowbit.load(lowbit.save(packed, tmp_path / "packed.safetensors"))
    for made in (packed, again):
        rows = lowbit.nn.deploy.summary(made).set_index("layer")
        assert (rows.drop("(rest)").how == "packed").all()
        assert rows.bits.to_dict() == {n: {"conv1": 8, "fc": 8, "(rest)": 32}.get(n, 2) for n in rows.index}
        stem = made.conv1
        assert rows.bytes["conv1"] == stem.data.numel() + 8 * stem.shape[0]
        assert stem.data.shape == (stem.shape[0] // 16, 64 * 16)  # 3 channels padded to 4: K = 36


def test_files_written_before_there_were_eight_bits_are_read():
    settings = {"bits": 2, "levels": [-2, -1, 1, 2], "shape": [2, 3], "low": -8, "high": 7}
    data = torch.zeros(1, 256, dtype=torch.uint8)
    data[0, :8] = torch.tensor([3, 3, 3, 0, 2, 0, 1, 0], dtype=torch.uint8)  # 2 2 2 / 1 -2 -1
    tensors = {"data": data, "scale": torch.tensor([1.0, 0.5]), "sums": torch.tensor([6, -2], dtype=torch.int32)}
    layer = PackedLinear.restore(settings, tensors | {"x_scale": torch.tensor([0.5])})
    with torch.no_grad():
        assert layer(torch.tensor([[1.0, 9.0, -0.5]])).tolist() == [[(4 + 14 - 2) * 0.5, (2 - 14 + 1) * 0.25]]
    assert layer.settings() == settings


def test_first_and_last_layers_are_packed_with_eight_bits():
    model = quantized("resnet8", weight=DenseShift(bits=2), activation=LSQ(bits=4), first_last=8)
    packed = lowbit.pack(model)
    for layer, before in ((packed.conv1, model.conv1), (packed.fc, model.fc)):
        assert isinstance(layer, PackedLayer) and layer.bits == 8
        codes = next(found for found in quantized_layers(model) if found.layer is before).codes()
        assert torch.equal(layer.weight.codes(), codes.to(torch.int16))


def test_first_and_last_layers_that_get_floats_store_codes():
    config = lowbit.QuantConfig(weight=DenseShift(bits=2), first_last=8)
    packed = lowbit.pack(lowbit.quantize_(lowbit.models.create("resnet8", 10), config).eval())
    assert is_stored(packed.conv1) and is_stored(packed.fc)
    assert packed.conv1.codes.dtype == torch.uint8 and "weight" not in packed.conv1.state_dict()


def test_depthwise_convolutions_store_codes_and_pointwise_ones_are_packed():
    torch.manual_seed(0)
    sound = torch.randn(4, 8000)
    model = lowbit.quantize_(lowbit.models.create("ds_cnn", 10), lowbit.QuantConfig(weight=DenseShift(bits=3)))
    with torch.no_grad():
        model.train()(sound)
    model.eval()
    packed = lowbit.pack(model)
    kinds = {name: type(m) for name, m in packed.named_modules() if isinstance(m, PackedLayer) or is_stored(m)}
    assert sum(kind is PackedConv2d for kind in kinds.values()) == 4
    assert sum(kind is nn.Conv2d for kind in kinds.values()) == 4
    with torch.no_grad():  # inputs of 8 bits, which the model did not have
        assert (model(sound) - packed(sound)).norm() < 0.1 * model(sound).norm()


def test_a_layer_without_input_quantizer_gets_eight_bits():
    torch.manual_seed(0)
    model = lowbit.quantize_(lowbit.models.create("vit_nano", 10), lowbit.QuantConfig(weight=StatsQ(bits=3))).eval()
    packed = lowbit.pack(model)
    with torch.no_grad():
        assert (model(images()) - packed(images())).norm() < 0.05 * model(images()).norm()


@pytest.mark.parametrize("name", names("weight"))
def test_every_method_is_packed_or_stored_and_says_the_same(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    lowbit.quantize_(model, lowbit.QuantConfig(weight=get(name)(), activation=LSQ(bits=8), first_last="same"))
    x = torch.randn(32, 8)
    lowbit.calibrate(model, x)
    try:
        packed = lowbit.pack(model)
    except LowbitError as error:
        assert "no layer of this model can be packed" in str(error)
        return
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-2, atol=1e-2)


def test_a_batchnorm_that_others_use_too_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.norm, self.other, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.conv(self.first(x))
            return self.last(self.norm(x) + self.other(x))

    torch.manual_seed(0)
    model = lowbit.quantize_(Twice(), lowbit.QuantConfig(weight=DenseShift(bits=2), activation=LSQ(bits=8)))
    x = images(2, 8)
    with torch.no_grad():
        model.train()(x)
        model.eval()
        packed = lowbit.pack(model, x)
        assert packed.folded == [] and isinstance(packed.norm, nn.BatchNorm2d)
        assert (packed(x) - model(x)).norm() < 1e-3 * model(x).norm()


WRONG = [
    (lambda: lowbit.pack(lowbit.models.create("resnet8", 10)), "nothing to pack"),
    (lambda: lowbit.pack(lowbit.pack(quantized("resnet8", weight=DenseShift(bits=2)))), "packed already"),
    (
        lambda: lowbit.pack(
            lowbit.quantize_(
                lowbit.models.create("resnet8", 10),
                lowbit.QuantConfig(weight=DenseShift(bits=2), activation=LSQ(bits=4)),
            )
        ),
        "seen no batch",
    ),
    (lambda: lowbit.pack(quantized("resnet8", weight=LSQ(bits=8))), "no layer of this model can be packed"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[message for _, message in WRONG])
def test_refusals_say_what_is_wrong(wrong, message):
    with pytest.raises(LowbitError, match=message):
        wrong()


def test_a_file_of_other_layers_is_refused(tmp_path):
    packed = lowbit.pack(quantized("resnet8", weight=DenseShift(bits=2)))
    other = copy.deepcopy(packed)
    other.spec = other.spec | {"name": "vit_nano"}
    with pytest.raises(CheckpointError, match="vit_nano"):
        lowbit.load(lowbit.save(other, tmp_path / "other.safetensors"))


def test_packed_linear_takes_any_batch_shape():
    torch.manual_seed(0)
    model = lowbit.quantize_(lowbit.models.create("vit_nano", 10), lowbit.QuantConfig(weight=StatsQ(bits=2)))
    layer = next(m for m in lowbit.pack(model.eval()).modules() if isinstance(m, PackedLinear))
    x = torch.randn(2, 3, layer.shape[1])
    assert torch.equal(layer(x)[1, 2], layer(x[1, 2]))


def test_the_pack_command(tmp_path):
    from typer.testing import CliRunner

    from lowbit_suite.app import app

    model = quantized("resnet8", weight=DenseShift(bits=3), activation=LSQ(bits=4), first_last=8)
    path, out = lowbit.save(model, tmp_path / "model.safetensors"), tmp_path / "packed.safetensors"
    result = CliRunner().invoke(app, ["pack", str(path), str(out)])
    assert result.exit_code == 0 and "packed" in result.stdout and "conv1" in result.stdout
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert f"the same in float32 {4 * weights / 1e6:.2f} MB" in " ".join(result.stdout.split())
    with torch.no_grad():
        assert torch.equal(lowbit.load(out)(images()), lowbit.pack(model)(images()))
    assert out.stat().st_size < path.stat().st_size / 9
    assert CliRunner().invoke(app, ["pack", str(tmp_path / "none"), str(out)]).exit_code == 2
    assert CliRunner().invoke(app, ["pack", str(out), str(tmp_path / "again")]).exit_code == 2


class ByName(nn.Module):
    """Calls its layers by the name of their input, as torch's own layers have it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(input=self.conv(input=x).relu().mean((2, 3)))


def test_packed_layers_take_their_input_by_name():
    x = torch.randn(4, 3, 8, 8)
    model = lowbit.quantize_(ByName(), lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last="same"))
    packed = lowbit.pack(lowbit.calibrate(model, x), x)
    assert all(isinstance(layer, PackedLayer) for layer in (packed.conv, packed.linear))
    assert torch.equal(lowbit.fuse(packed, x)(x), packed(x))
    torch.testing.assert_close(torch.from_numpy(lowbit.plan(packed, x)(x.numpy())), packed(x))
    torch.testing.assert_close(standard(packed)(x), packed(x))


def test_scripted_parts_stay_as_they_are():
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), torch.jit.script(nn.ReLU()), nn.Conv2d(8, 4, 1))
    lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last="same"))
    packed = lowbit.pack(lowbit.calibrate(model, x).eval(), x)
    assert isinstance(packed[1], nn.Identity)
    torch.testing.assert_close(packed(x), model(x))
