"""What `quantize_` refuses: one clear error that names the layer, and a model that is as it was."""

import contextlib
import copy
import warnings

import pytest
import torch
from timm.layers.attention import Attention
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations, prune

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn import QuantConfig, calibrate, quantize_, quantized_layers
from lowbit.nn.convert import attach_
from lowbit.quantizers import LSQ, StatsQ, get, names

BOTH = QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8), first_last="same")
INPUTS = QuantConfig(activation=LSQ(bits=8), first_last="same")
warnings.filterwarnings("ignore", category=FutureWarning)


def three(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), middle, nn.Linear(8, 8))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(8, 8)


def inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(8, 8)


def integers() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


class Mine(nn.Parameter):
    pass


def own_kind() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = Mine(layer.weight.detach())
    return layer


def holding_none() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = None
    return layer


LAYERS = {
    "weight_norm, old": (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), r"'1' is computed.*remove_weight_norm"),
    "spectral_norm, old": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), r"'1' is computed.*remove_spectral_norm"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), r"'1' is computed.*prune.remove"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
        r"'1' is parametrized \(_WeightNorm.*undoes",
    ),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), r"'1' is parametrized \(_SpectralNorm"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), r"'1' is parametrized \(_Orthogonal"),
    "lazy": (lambda: nn.LazyLinear(8), r"'1' has no shape yet \(LazyLinear\); give the model one batch"),
    "meta": (on_meta, r"'1' is on the meta device.*to_empty"),
    "int8": (integers, r"'1' has the dtype torch.int8; torch.float16"),
    "complex": (lambda: nn.Linear(8, 8, dtype=torch.complex64), r"'1' has the dtype torch.complex64"),
    "float8": (lambda: nn.Linear(8, 8).to(torch.float8_e4m3fn), r"'1' has the dtype torch.float8"),
    "inference": (inference, r"'1' was made under torch.inference_mode"),
    "empty": (lambda: nn.Linear(0, 8), r"'1' has the shape \[8, 0\].*filter_fn"),
    "another class": (own_kind, r"'1' is a Mine; a plain torch.nn.Parameter"),
    "none": (holding_none, r"'1' is no parameter of the Linear"),
    "quantized by torch": (lambda: torch.ao.nn.quantized.Linear(8, 8), r"'1' is a Linear of torch.ao"),
    "dynamically quantized": (lambda: torch.ao.nn.quantized.dynamic.Linear(8, 8), r"'1' is a Linear of torch.ao"),
    "prepared by torch": (
        lambda: torch.ao.nn.qat.Linear(8, 8, qconfig=torch.ao.quantization.get_default_qat_qconfig()),
        r"'1' is a Linear of torch.ao",
    ),
    "scripted": (lambda: torch.jit.script(nn.Linear(8, 8)), r"'1' is a torch.jit.ScriptModule"),
    "compiled": (lambda: torch.compile(nn.Linear(8, 8)), r"'1' is wrapped in OptimizedModule"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(8, 8)), r"'1' is wrapped in DataParallel"),
}


def described(model: nn.Module) -> list:
    """Everything that quantizing might change."""
    modules = [(name, type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    return [modules, parameters, [(name, id(b)) for name, b in model.named_buffers()]]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("weight", ["statsq", "lsq", "denseshift", "inq"])
def test_a_layer_that_cannot_be_quantized_is_refused_by_name(name, weight):
    make, message = LAYERS[name]
    model = three(make())
    before, values = described(model), copy.deepcopy(model[0].state_dict())
    with pytest.raises(LowbitError, match=message):
        quantize_(model, QuantConfig(weight=get(weight)(), activation=LSQ(), first_last="same"))
    assert described(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model[0].state_dict().items())
    if name not in ("compiled", "data parallel", "quantized by torch", "dynamically quantized", "prepared by torch"):
        quantize_(model, BOTH, lambda layer, name: name != "1")  # what filter_fn leaves out refuses nothing
        assert [found.name for found in quantized_layers(model)] == ["0", "2"]


@pytest.mark.parametrize("name", ["lazy", "meta", "empty"])
def test_inputs_alone_need_a_layer_with_a_shape(name):
    make, message = LAYERS[name]
    with pytest.raises(LowbitError, match=message):
        quantize_(three(make()), INPUTS)


@pytest.mark.parametrize("name", ["weight_norm, old", "spectral_norm, old", "pruned", "weight_norm", "another class"])
def test_inputs_alone_do_not_mind_how_the_weight_is_made(name):
    model = quantize_(three(LAYERS[name][0]()), INPUTS)
    assert len(list(quantized_layers(model))) == 3
    model(torch.randn(4, 8)).sum().backward()


def test_frozen_weights_stay_frozen():
    for weight in names("weight"):
        model = three(nn.Linear(8, 8).requires_grad_(False))
        quantize_(model, QuantConfig(weight=get(weight)(), first_last="same"))
        layers = list(quantized_layers(model))
        assert not any(latent.requires_grad for latent in layers[1].latents)
        assert all(latent.requires_grad for latent in layers[0].latents)


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, FullyShardedDataParallel])
def test_a_model_wrapped_for_several_processes_is_refused(alone, wrap):
    cpu = {"device_id": torch.device("cpu")} if wrap is FullyShardedDataParallel else {}
    model = wrap(three(nn.Linear(8, 8)), **cpu)
    with pytest.raises(LowbitError, match=rf"the model is wrapped in {wrap.__name__}; quantize model.module first"):
        quantize_(model, BOTH)
    if not cpu:
        quantize_(model.module, BOTH)


def test_other_models_that_are_refused_whole():
    compiled = three(nn.Linear(8, 8))
    compiled.compile(backend="eager")
    packed = lowbit.pack(calibrate(quantize_(three(nn.Linear(8, 8)), BOTH), torch.randn(2, 8)))
    for model, message in (
        (torch.jit.script(three(nn.Linear(8, 8))), "the model is a torch.jit.ScriptModule"),
        (compiled, "the model is compiled.*before torch.compile"),
        (packed, "packed already"),
        (torch.relu, "takes a torch.nn.Module, not a"),
        (Attention(8, 2), "the model itself is an attention layer"),
    ):
        with pytest.raises(LowbitError, match=message):
            quantize_(model, QuantConfig(StatsQ(bits=2), LSQ(bits=2), "same", attention=isinstance(model, Attention)))


def vit() -> nn.Module:
    return lowbit.models.create("vit_nano", 10, 3, 16, depth=2, embed_dim=16, num_heads=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda attention: parametrizations.weight_norm(attention.qkv), r"'blocks.1.attn.qkv' is parametrized"),
        (lambda attention: nn.utils.weight_norm(attention.qkv), r"'blocks.1.attn.qkv' is computed"),
        (lambda attention: attention.qkv.to("meta"), r"'blocks.1.attn.qkv' is on the meta device"),
        (lambda attention: attention.proj.to("meta"), r"'blocks.1.attn.proj' is on the meta device"),
        (lambda attention: attention.register_forward_hook(print), r"'blocks.1.attn' .*would lose its hooks"),
        (lambda attention: attention.qkv.register_forward_hook(print), r"'blocks.1.attn.qkv' .*would lose its hooks"),
        (lambda attention: setattr(attention, "qkv", type("Lora", (nn.Linear,), {})(16, 48)), r"its qkv is a Lora"),
    ],
)
def test_query_key_reparameterization_refuses_before_anything_changes(change, message):
    model = vit()
    change(model.blocks[1].attn)
    before = described(model)
    with pytest.raises(LowbitError, match=message):
        quantize_(model, QuantConfig(weight=StatsQ(bits=2), activation=LSQ(bits=2), qkr=True, attention=True))
    assert described(model) == before


def test_one_layer_is_refused_like_a_model():
    layer = nn.utils.weight_norm(nn.Linear(8, 8))
    with pytest.raises(LowbitError, match=r"'Linear' is computed by torch.nn.utils.weight_norm"):
        attach_(layer, StatsQ(), LSQ())
    assert not hasattr(layer, "input_quantizer")


class Called(nn.Module):
    """Two layers, called in the way that is asked for."""

    def __init__(self, call, first: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.call = first or nn.Linear(8, 8), nn.Linear(8, 8), call

    def forward(self, x):
        return self.b(self.call(self.a, x))


class Renamed(nn.Linear):
    """Calls its input by another name, and takes more than one."""

    def forward(self, tokens, gain=1.0):
        return gain * super().forward(tokens)


@pytest.mark.parametrize("activation", names("activation"))
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_called_by_keyword_are_quantized_too(activation, compiled):
    config = QuantConfig(StatsQ(bits=3), get(activation)(), first_last="same")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    made = [
        quantize_(Called(call), config)
        for call in (lambda layer, x: layer(x), lambda layer, x: layer(input=x))
    ]  # fmt: skip
    expected, found = (calibrate(model, x)(x) for model in made)
    assert torch.equal(found, expected)
    torch._dynamo.reset()
    if compiled:
        assert torch.equal(torch.compile(made[1], backend="eager", fullgraph=True)(x), expected)


def test_keywords_of_a_layer_with_its_own_forward():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    calls = [
        lambda layer, x: layer(x, 2.0),
        lambda layer, x: layer(tokens=x, gain=2.0),
        lambda layer, x: layer(x, gain=2.0),
    ]
    results = []
    for call in calls:
        torch.manual_seed(0)
        results.append(quantize_(Called(call, Renamed(8, 8)), BOTH)(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with contextlib.suppress(TypeError):  # torch's own error, not one of ours
        quantize_(nn.Sequential(nn.Linear(8, 8)), BOTH)[0](other=x)
