"""torch's attention as layers that can be quantized, and its low-bit products beside those of timm's attention."""

import copy

import pytest
import torch
from timm.layers import attention as timm_attention
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn import quantized_layers
from lowbit.nn.attention import LowBitAttention
from lowbit.nn.multihead import PROJECTIONS, MultiheadAttention, separate_
from lowbit.nn.packed import PackedLinear
from lowbit.nn.products import low_bit_products
from lowbit.quantizers import LSQ, DeepShiftQ, DenseShift, StatsQ
from lowbit.quantizers.deepshift_q import SPREAD

WIDTH, HEADS, TOKENS, KEYS = 16, 4, 5, 7
FORMS = {
    "default": {},
    "batch first": {"batch_first": True},
    "no biases": {"bias": False},
    "other widths": {"kdim": 12, "vdim": 8, "batch_first": True},
}
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "each head's weights": {"average_attn_weights": False},
    "boolean mask": {"attn_mask": torch.arange(KEYS) > torch.arange(TOKENS)[:, None] + 2},
    "causal mask": {"attn_mask": torch.arange(KEYS) > torch.arange(TOKENS)[:, None], "is_causal": True},
    "a mask of each head": {"attn_mask": torch.linspace(-1, 1, 2 * HEADS * TOKENS * KEYS).view(-1, TOKENS, KEYS)},
    "padding": {"key_padding_mask": torch.arange(KEYS) >= torch.tensor([[4], [7]])},
    "padding as numbers": {"key_padding_mask": torch.linspace(-1, 1, 2 * KEYS).view(2, KEYS)},
    "mask and padding": {
        "attn_mask": torch.linspace(-1, 1, TOKENS * KEYS).view(TOKENS, KEYS),
        "key_padding_mask": torch.arange(KEYS) >= torch.tensor([[4], [7]]),
    },
}


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(options):
    torch.manual_seed(1)
    shapes = ((TOKENS, WIDTH), (KEYS, options.get("kdim", WIDTH)), (KEYS, options.get("vdim", WIDTH)))
    batches = [torch.randn(2, *shape) for shape in shapes]
    return batches if options.get("batch_first") else [batch.transpose(0, 1) for batch in batches]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_results_are_those_of_torch_s_module(form, call):
    source = attention(**FORMS[form])
    ours, arguments = MultiheadAttention(copy.deepcopy(source)), CALLS[call]
    for actual, expected in zip(
        ours(*inputs(FORMS[form]), **arguments), source(*inputs(FORMS[form]), **arguments), strict=True
    ):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected)


def test_one_sample_without_a_batch():
    source = attention()
    x, y = torch.randn(TOKENS, WIDTH), torch.randn(KEYS, WIDTH)
    for actual, expected in zip(MultiheadAttention(copy.deepcopy(source))(x, y, y), source(x, y, y), strict=True):
        torch.testing.assert_close(actual, expected)


def test_gradients_are_those_of_torch_s_module():
    source = attention()
    ours = MultiheadAttention(copy.deepcopy(source))
    for module in (ours, source):
        module(*inputs({}))[0].square().sum().backward()
    for name in ("weight", "bias"):
        parts = torch.cat([getattr(getattr(ours, layer), name).grad for layer in PROJECTIONS])
        torch.testing.assert_close(parts, getattr(source, f"in_proj_{name}").grad)
    torch.testing.assert_close(ours.out_proj.weight.grad, source.out_proj.weight.grad)


@pytest.mark.parametrize("form", FORMS)
def test_it_loads_the_state_of_torch_s_module(form):
    source = attention(**FORMS[form])
    ours = MultiheadAttention(nn.MultiheadAttention(WIDTH, HEADS, **FORMS[form])).eval()
    ours.load_state_dict(source.state_dict())
    torch.testing.assert_close(ours(*inputs(FORMS[form])), source(*inputs(FORMS[form])))
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    torch.testing.assert_close(ours(*inputs(FORMS[form])), source(*inputs(FORMS[form])))


def test_a_causal_hint_needs_the_mask():
    with pytest.raises(LowbitError, match="attn_mask, which is None"):
        MultiheadAttention(attention())(*inputs({}), is_causal=True)


class Own(nn.MultiheadAttention):
    def forward(self, query, *others, **named):
        return super().forward(2 * query, *others, **named)


def hooked():
    module = attention()
    module.register_forward_hook(lambda module, args, output: output)
    return module


def backward_hooked():
    module = attention()
    module.register_full_backward_pre_hook(lambda module, gradient: gradient)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: attention(add_bias_kv=True),
        lambda: attention(add_zero_attn=True),
        lambda: Own(WIDTH, HEADS),
        hooked,
        backward_hooked,
        lambda: nn.utils.parametrizations.weight_norm(attention(), "in_proj_weight"),
    ],
    ids=["bias_kv", "zero_attn", "subclass", "hook", "backward hook", "parametrized"],
)
def test_modules_that_compute_something_else_stay_aloud(make):
    model = nn.ModuleList([make(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    with pytest.warns(UserWarning, match=r"1 torch.nn.MultiheadAttention .* '0'"):
        lowbit.quantize_(model, lowbit.QuantConfig(StatsQ()))
    assert isinstance(model[0], nn.MultiheadAttention)


class Tokens(nn.Module):
    """A transformer of torch's own parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(6, WIDTH)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True), 2)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x, padding=None):
        return self.out(self.encoder(self.into(x), src_key_padding_mask=padding))


def tokens(n=3):
    return torch.randn(n, TOKENS, 6, generator=torch.Generator().manual_seed(n))


def test_an_encoder_gives_the_same_results_with_padding():
    """In evaluation torch's encoder hands nested tensors to a fused function, which reads weights."""
    model = Tokens().eval()
    padding = torch.arange(TOKENS) >= torch.tensor([[3], [5], [4]])
    ours = copy.deepcopy(model)
    separate_(ours)
    with torch.no_grad():
        expected, actual = model(tokens(), padding), ours(tokens(), padding)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in ours.modules())
    torch.testing.assert_close(actual[~padding], expected[~padding])


@pytest.mark.parametrize("qkr", [False, True])
def test_an_encoder_is_quantized_packed_and_restored(qkr, tmp_path):
    model = Tokens()
    config = lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last=8, attention=True, qkr=qkr)
    lowbit.calibrate(lowbit.quantize_(model, config), tokens())
    names = {found.name for found in quantized_layers(model)}
    assert {f"encoder.layers.{i}.self_attn.out_proj" for i in (0, 1)} < names
    assert ("encoder.layers.0.self_attn.q_proj" in names) != qkr
    assert set(low_bit_products(model)) == {"encoder.layers.0.self_attn", "encoder.layers.1.self_attn"}
    model.train()(tokens()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    packed = lowbit.pack(model, tokens())
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == len(names)
    for each, name in ((model, "model"), (packed, "packed")):
        lowbit.save(each, tmp_path / name)
        restored = lowbit.load_into(Tokens(), tmp_path / name)
        assert torch.equal(restored(tokens()), each(tokens()))
    torch.testing.assert_close(packed(tokens()), model(tokens()))


def test_a_packed_encoder_with_products_in_floats_is_restored(tmp_path):
    """Its file has no quantizers: those of the inputs are in the kernels."""
    model = lowbit.quantize_(Tokens(), lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last="same"))
    packed = lowbit.pack(lowbit.calibrate(model, tokens()), tokens())
    lowbit.save(packed, tmp_path / "packed")
    assert torch.equal(lowbit.load_into(Tokens(), tmp_path / "packed")(tokens()), packed(tokens()))


@pytest.mark.parametrize(
    ("activation", "qkr"),
    [
        (LSQ(bits=4), False),
        (LSQ(bits=4), True),
        (LSQ(bits=4, granularity="token", bias=True), False),
        (LSQ(bits=4, granularity="token", bias=True), True),
        (LSQ(bits=3, granularity="channel"), False),
        (LSQ(bits=3, granularity="channel"), True),
        (None, True),
    ],
)
def test_products_are_those_of_timm_s_attention(activation, qkr):
    """`LowBitAttention` agrees with the authors' code; with the same weights both forms must agree to the last bit."""
    from timm.layers.attention import Attention

    torch.manual_seed(0)
    theirs = Attention(WIDTH, HEADS, qkv_bias=True)
    source = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    source.load_state_dict(
        {
            "in_proj_weight": theirs.qkv.weight,
            "in_proj_bias": theirs.qkv.bias,
            "out_proj.weight": theirs.proj.weight,
            "out_proj.bias": theirs.proj.bias,
        }
    )
    config = lowbit.QuantConfig(
        StatsQ(bits=3), activation, first_last="same", attention=activation is not None, qkr=qkr
    )
    everything = {"one": nn.Sequential(theirs), "other": nn.Sequential(source)}
    for model in everything.values():
        lowbit.quantize_(model, config, lambda layer, name: not qkr or name.endswith(("qkv", *PROJECTIONS)))
    one, other = everything["one"][0], everything["other"][0]
    assert isinstance(one, LowBitAttention) and isinstance(other, MultiheadAttention)
    x = torch.randn(2, TOKENS, WIDTH)
    if not qkr:  # a scale of its own for each of three weights is no scale for all
        kept = one.qkv.parametrizations.weight.original.detach().chunk(3)
        values = torch.cat([getattr(other, name).weight.detach() for name in PROJECTIONS])
        assert all(
            torch.equal(a, getattr(other, b).parametrizations.weight.original)
            for a, b in zip(kept, PROJECTIONS, strict=True)
        )
        torch.nn.utils.parametrize.remove_parametrizations(one.qkv, "weight")
        one.qkv.weight.data.copy_(values)
    results = [one(x), other(x, x, x)[0]]
    torch.testing.assert_close(results[1], results[0])
    for result in results:
        result.square().sum().backward()
    pairs = {"softmax_quantizer": "softmax_quantizer", "v_quantizer": "v_quantizer"}
    pairs |= {"z_quantizer": "z_quantizer"} if qkr else {"q_quantizer": "q_quantizer", "k_quantizer": "k_quantizer"}
    if activation is not None:
        for name in pairs:
            mine, timm_s = getattr(other.low_bit_products, name), getattr(one, name)
            for (part, a), (_, b) in zip(mine.named_parameters(), timm_s.named_parameters(), strict=True):
                torch.testing.assert_close(a, b, msg=f"{name}.{part}")
                torch.testing.assert_close(a.grad, b.grad, msg=f"the gradient of {name}.{part}")
    if qkr:
        latents = [one.qk.parametrizations.weight, other.k_proj.parametrizations.weight]
        for name in ("original0", "original1"):
            torch.testing.assert_close(*(getattr(held, name).grad for held in latents))


@pytest.mark.parametrize("timm_s", [True, False])
def test_the_values_layer_starts_as_its_method_says(timm_s):
    """DeepShift-Q spreads its latents at the start, in every layer."""
    from timm.layers.attention import Attention

    torch.manual_seed(0)
    model = nn.Sequential(Attention(WIDTH, HEADS) if timm_s else attention(batch_first=True))
    lowbit.quantize_(model, lowbit.QuantConfig(DeepShiftQ(init="spread"), first_last="same", qkr=True))
    layers = {found.name.rpartition(".")[2]: found.latents for found in quantized_layers(model)}
    sizes = [float(latents[0].square().mean().sqrt()) for latents in layers.values() if len(latents) == 1]
    assert len(sizes) == 2 and sizes == pytest.approx([SPREAD] * 2, rel=1e-3)


def test_attention_to_other_tokens_cannot_be_reparameterized():
    model = nn.Sequential(attention(batch_first=True))
    lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(), first_last="same", qkr=True))
    x, y = torch.randn(2, TOKENS, WIDTH), torch.randn(2, KEYS, WIDTH)
    model[0](x, x, x)
    with pytest.raises(LowbitError, match="self-attention"):
        model[0](x, y, y)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lowbit.QuantConfig(DenseShift(), qkr=True, first_last="same"), "this method has several"),
        (
            lowbit.QuantConfig(StatsQ(), LSQ(), attention=True, attention_start="as_published"),
            "attention_start='as_published' is for timm",
        ),
    ],
)
def test_a_refused_model_is_as_it_was(config, message):
    model = Tokens()
    before = copy.deepcopy(model)
    with pytest.raises(LowbitError, match=message):
        lowbit.quantize_(model, config)
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert model.encoder.use_nested_tensor and model.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize("qkr", [False, True])
@pytest.mark.parametrize("timm_s", [False, True])
def test_what_is_frozen_stays_frozen(qkr, timm_s):
    """Only the new steps of activation quantizers are trained in a frozen model."""
    if timm_s:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), timm_attention.Attention(WIDTH, HEADS, qkv_bias=True))
    else:
        model = nn.ModuleList([nn.Linear(WIDTH, WIDTH), attention()])
    config = lowbit.QuantConfig(StatsQ(), LSQ(), first_last="same", attention=True, qkr=qkr)
    lowbit.quantize_(model.requires_grad_(False), config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(name.endswith("quantizer.step") for name in trained)


@pytest.mark.parametrize("form", FORMS)
def test_attributes_of_torch_s_module_are_there(form):
    source = attention(**FORMS[form])
    names = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "bias_k", "bias_v")
    assert all(getattr(MultiheadAttention(source), name) == getattr(source, name) for name in names)


@pytest.mark.parametrize("part", ["q_proj", "k_proj"])
def test_layers_that_lose_hooks_to_reparameterization_are_refused(part):
    model = nn.Sequential(MultiheadAttention(attention()))
    getattr(model[0], part).register_forward_hook(print)
    before = [type(module) for module in model.modules()]
    with pytest.raises(LowbitError, match=f"qkr=True is not possible for '0': its '{part}' would lose its hooks"):
        lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(), first_last="same", qkr=True))
    assert before == [type(module) for module in model.modules()]


def test_attention_that_the_filter_excludes_stays():
    model = Tokens()
    lowbit.quantize_(model, lowbit.QuantConfig(StatsQ()), lambda layer, name: ".0.self_attn" not in name)
    assert isinstance(model.encoder.layers[0].self_attn, nn.MultiheadAttention)
    assert isinstance(model.encoder.layers[1].self_attn, MultiheadAttention)


def test_torchvision_s_vision_transformer():
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    model = vision.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    config = lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last=8, attention=True, qkr=True)
    lowbit.calibrate(lowbit.quantize_(model, config), x)
    packed = lowbit.pack(model.eval(), x)
    assert (
        sum(isinstance(module, PackedLinear) for module in packed.modules()) == 11
    )  # 2 x (z, v, out, 2 of the MLP) + 1
    torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)
