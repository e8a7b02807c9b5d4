"""`quantize_` over every registered method: real models, and all that a quantized model must survive."""

import copy
import dataclasses

import pytest
import timm
import torch
import torchvision
from torch import nn

from lowbit.errors import LowbitError
from lowbit.models import create
from lowbit.nn import (
    QuantConfig,
    calibrate,
    compile_quantizers,
    first_and_last,
    quantize_,
    quantized_layers,
)
from lowbit.quantizers import LSQ, DenseShift, StatsQ, get, names

WEIGHTS, ACTIVATIONS = names("weight"), names("activation")


def tiny() -> nn.Module:
    """Two convolutions and two linear layers: first and last excluded, one of each is left to quantize."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def both(weight: str, activation: str = "lsq") -> QuantConfig:
    return QuantConfig(weight=get(weight)(), activation=get(activation)())


def bits_of(name: str) -> list[int]:
    """The bit widths that the method's settings accept, among 1 to 8."""
    accepted = []
    for bits in range(1, 9):
        try:
            get(name)(bits=bits)
        except LowbitError:
            continue
        accepted.append(bits)
    return accepted


@pytest.mark.parametrize(("name", "bits"), [(n, b) for n in WEIGHTS for b in bits_of(n)])
def test_every_weight_is_its_scale_times_a_level(name, bits):
    model = quantize_(tiny(), QuantConfig(weight=get(name)(bits=bits)))
    layers = list(quantized_layers(model))
    assert [found.name for found in layers] == ["3", "7"]
    for found in layers:
        weight, quantizer, latents = found.layer.weight, found.weight, found.latents
        codes, levels = found.codes(), quantizer.levels
        assert codes.dtype == torch.int16 and codes.shape == weight.shape
        assert len(levels) <= 2**bits and (levels.diff() > 0).all()
        assert torch.equal(weight, levels[codes.long()] * quantizer.scale(*latents))
        assert all(t.requires_grad for t in latents)


@pytest.mark.parametrize("name", WEIGHTS)
def test_assigning_a_weight_on_the_grid_keeps_it(name):
    model = quantize_(tiny(), QuantConfig(weight=get(name)()))
    layer = model[7]
    before = layer.weight.detach().clone()
    layer.weight = before
    if name in ("lsq", "denseshift"):  # their scale does not follow the weights
        assert torch.allclose(layer.weight, before, rtol=1e-6)
    assert torch.isfinite(layer.weight).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradients_reach_every_parameter_and_a_step_changes_the_loss(name):
    model = quantize_(tiny(), both(name))
    model(images())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    y = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images()), y)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_state_dict_and_deepcopy_give_the_same_output(weight, activation):
    model = quantize_(tiny(), both(weight, activation))
    model(images())
    model.eval()
    expected = model(images())
    other = quantize_(tiny(), both(weight, activation)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert torch.equal(model(images()), expected)  # nothing is shared


@pytest.mark.parametrize("weight", WEIGHTS)
def test_bf16_autocast_keeps_the_grid_in_float32(weight):
    model = quantize_(tiny(), both(weight))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images())
        assert model[3].weight.dtype == torch.float32
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("weight", WEIGHTS)
def test_compiled_model_and_compiled_quantizers_agree_with_eager(weight):
    torch._dynamo.reset()
    model = calibrate(quantize_(tiny(), both(weight)), images())
    model.eval()  # batch statistics would move between the runs
    whole, parts = copy.deepcopy(model), compile_quantizers(copy.deepcopy(model))
    whole.compile(fullgraph=True)
    grads = []
    for m in (model, whole, parts):
        y = m(images())
        y.square().sum().backward()
        grads.append((y.detach(), [p.grad for p in m.parameters()]))
    for y, g in grads[1:]:
        assert torch.allclose(y, grads[0][0], atol=1e-5)
        for a, b in zip(g, grads[0][1], strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(num_classes=10),
        lambda: torchvision.models.mobilenet_v2(num_classes=10),
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2),
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, depth=2),
        lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, depths=(1, 1, 1, 1)),
    ],
    ids=["resnet18", "mobilenet_v2", "vit", "deit", "swin"],
)
def test_real_architectures_convert_and_train(make):
    model = make()
    kinds = {name: type(module) for name, module in model.named_modules()}
    ends = first_and_last(model)
    quantize_(model, both("statsq"))
    quantized = {found.name for found in quantized_layers(model)}
    wanted = {name for name, kind in kinds.items() if issubclass(kind, nn.Linear | nn.Conv2d)}
    assert len(ends) >= 2 and quantized == wanted - ends
    assert all(isinstance(module, kinds[name]) for name, module in model.named_modules() if name in kinds)
    y = model(torch.randn(2, 3, 224, 224))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("first_last", "count", "bits"), [(None, 2, None), (8, 4, 8), ("same", 4, 3)])
def test_first_and_last_layers_are_kept_as_configured(first_last, count, bits):
    model = quantize_(tiny(), QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=3), first_last=first_last))
    found = {layer.name: layer for layer in quantized_layers(model)}
    assert len(found) == count
    for name in ("0", "9"):
        if bits is None:
            assert name not in found
        else:
            assert found[name].weight.config.bits == bits and found[name].activation.config.bits == bits


def test_filter_and_repeats_and_nothing_left():
    model = quantize_(tiny(), QuantConfig(weight=StatsQ()), filter_fn=lambda layer, name: isinstance(layer, nn.Conv2d))
    assert [found.name for found in quantized_layers(model)] == ["3"]
    with pytest.raises(LowbitError, match="already"):
        quantize_(model, QuantConfig(weight=StatsQ()))
    untouched = tiny()
    with pytest.raises(LowbitError, match="no layer"):
        quantize_(untouched, QuantConfig(weight=StatsQ()), filter_fn=lambda layer, name: False)
    with pytest.raises(LowbitError, match="nothing to quantize"):
        quantize_(untouched, QuantConfig())
    assert not list(quantized_layers(untouched))


def test_a_refusal_half_way_leaves_the_model_alone():
    model = tiny()
    with pytest.raises(LowbitError):
        quantize_(model, QuantConfig(weight=LSQ(granularity="token")))
    assert not list(quantized_layers(model))
    assert not any("parametrizations" in key for key in model.state_dict())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_the_layers_name(bad):
    model = tiny()
    with torch.no_grad():
        model[7].weight[3, 4] = bad
    with pytest.raises(LowbitError, match=r"layer '7' holds 1 NaN or infinite value\(s\) of 512"):
        quantize_(model, QuantConfig(weight=StatsQ()))
    assert not list(quantized_layers(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", WEIGHTS)
def test_assigning_a_weight_that_is_not_finite_is_refused(name, bad):
    model = quantize_(tiny(), QuantConfig(weight=get(name)()))
    before = [t.detach().clone() for t in model.state_dict().values()]
    with pytest.raises(LowbitError, match="NaN or infinite"):
        model[7].weight = torch.full((16, 32), bad)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_torch_attention_is_quantized_by_its_parts():
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2))
    quantize_(model, QuantConfig(weight=StatsQ(), activation=LSQ()))
    parts = {f"1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert {found.name for found in quantized_layers(model)} == {"1.linear1", "1.linear2"} | parts


def test_an_embedding_is_the_first_layer_of_a_model_of_text():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert first_and_last(model) == {"2"}


def test_calibration_does_not_trust_statistics_gathered_before():
    """Raw ±2^p weights make the outputs huge for the old running statistics; training normalizes by the batch."""
    model = quantize_(create("resnet20"), QuantConfig(weight=DenseShift(bits=2), activation=LSQ(bits=4)))
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    calibrate(model, x)
    assert all(found.activation.step.max() < 10 for found in quantized_layers(model))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.training


def test_denseshift_random_and_projected_starts():
    torch.manual_seed(0)
    start = create("resnet20")
    reference = start.layer1[0].conv1.weight.detach().clone()
    project = DenseShift(bits=4, scale="statistical", init="project")
    projected = quantize_(copy.deepcopy(start), QuantConfig(weight=project)).layer1[0].conv1.weight
    random = quantize_(copy.deepcopy(start), QuantConfig(weight=dataclasses.replace(project, init="random")))
    alike = nn.functional.cosine_similarity
    assert alike(projected.flatten(), reference.flatten(), 0) > 0.95
    assert alike(random.layer1[0].conv1.weight.flatten(), reference.flatten(), 0).abs() < 0.2


WRONG = [
    (lambda: StatsQ(bits=9), "bits=9"),
    (lambda: StatsQ(bits="2"), "bits='2'"),
    (lambda: LSQ(bits=1), "bits=1"),
    (lambda: LSQ(bit=2), "no setting 'bit'.*did you mean 'bits'"),
    (lambda: LSQ(granularity="row"), "granularity='row'.*'tensor', 'channel' or 'token'"),
    (lambda: DenseShift(bits=5), "bits=5"),
    (lambda: DenseShift(scale="pow"), "scale='pow'.*'none', 'statistical' or 'pow2'"),
    (lambda: DenseShift(sigma=0.0), "sigma=0.0"),
    (lambda: DenseShift(sigma=float("nan")), "sigma=nan"),
    (lambda: QuantConfig(weight=StatsQ), "weight=.*DenseShift.*LSQ"),
    (lambda: QuantConfig(activation=StatsQ()), "activation=.*LSQ"),
    (lambda: QuantConfig(weight={"bits": 2}), "method"),
    (lambda: QuantConfig(weight={"method": "statq"}), "statq.*statsq"),
    (lambda: QuantConfig(first_last=4), "first_last=4.*None.*8.*'same'"),
    (lambda: QuantConfig(qkr="yes"), "qkr=.yes."),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_bad_configuration_is_refused_at_construction(make, message):
    with pytest.raises(LowbitError, match=message):
        make()


@pytest.mark.parametrize("name", names())
def test_configuration_survives_plain_data(name):
    kind = "weight" if get(name).quantizes("weight") else "activation"
    config = QuantConfig(**{kind: get(name)()}, first_last=8)
    assert QuantConfig(**config.to_dict()) == config


def test_a_weight_in_full_precision_has_no_codes():
    model = quantize_(tiny(), QuantConfig(activation=LSQ(bits=4)))
    layer = next(quantized_layers(model))
    assert layer.latents == (layer.layer.weight,)
    with pytest.raises(LowbitError, match=f"layer '{layer.name}' is in full precision"):
        layer.codes()
