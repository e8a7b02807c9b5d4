"""Low-bit attention and query-key reparameterization in timm's models."""

import copy
import dataclasses

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import nn

import lowbit
from lowbit import LowbitError, QuantConfig, metrics
from lowbit.nn import calibrate, quantize_, quantized_layers
from lowbit.nn.attention import LowBitAttention, low_bit_attentions
from lowbit.nn.query_key import QueryKeyProduct
from lowbit.quantizers import LSQ, DenseShift, StatsQ

OFQ = QuantConfig(
    weight=StatsQ(bits=2),
    activation=LSQ(bits=2, granularity="token", bias=True),
    first_last=8,
    unsigned=("*.fc2",),
    attention=True,
    qkr=True,
)


def vit(**options):
    return lowbit.models.create("vit_nano", 10, 3, 16, depth=2, **options)


def swin():
    return lowbit.models.create(
        "swin_tiny_patch4_window7_224", 10, 3, 64, depths=(2, 1), embed_dim=24, num_heads=(2, 4), window_size=4
    )


def deit():
    return lowbit.models.create(
        "deit_tiny_distilled_patch16_224", 10, 3, 32, depth=2, embed_dim=48, num_heads=3, patch_size=8
    )


def random_positions_(model):
    """Swin's position tables start at almost zero, where a mistake in adding them would not show."""
    for module in model.modules():
        if hasattr(module, "relative_position_bias_table"):
            nn.init.normal_(module.relative_position_bias_table)
    return model


@torch.no_grad()
def without_query_key_bias_(model):
    for module in model.modules():
        if isinstance(module, Attention | WindowAttention):
            nn.init.normal_(module.qkv.bias)
            module.qkv.bias[: 2 * len(module.qkv.bias) // 3] = 0
    return model


@pytest.mark.parametrize("make", [vit, swin, deit], ids=lambda make: make.__name__)
def test_reparameterized_logits_are_those_of_attention_without_query_and_key_bias(make):
    torch.manual_seed(0)
    model = without_query_key_bias_(random_positions_(make())).double().eval()
    size = model.patch_embed.img_size[0]
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = model(x)
    assert not low_bit_attentions(model)
    changed = quantize_(copy.deepcopy(model), QuantConfig(qkr=True))
    assert len(low_bit_attentions(changed)) == sum(isinstance(m, Attention | WindowAttention) for m in model.modules())
    torch.testing.assert_close(changed(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [vit, swin, deit], ids=lambda make: make.__name__)
def test_quantized_factors_at_sixteen_bits_change_almost_nothing(make):
    torch.manual_seed(0)
    model = random_positions_(make()).eval()
    size = model.patch_embed.img_size[0]
    x = torch.randn(4, 3, size, size)
    expected = model(x)
    low = quantize_(copy.deepcopy(model), QuantConfig(activation=LSQ(bits=8, granularity="token"), attention=True))
    calibrate(low, x)
    with torch.no_grad():
        for module in low.modules():  # steps that clip nothing: what is left is rounding
            if hasattr(module, "step"):
                module.step.mul_(4)
    coarse = (low(x) - expected).abs().max()
    assert 0 < coarse < 0.25 * expected.abs().max()


def test_product_of_query_and_key_weights_by_hand():
    wq = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    wk = torch.tensor([[3.0, 0.0], [1.0, -1.0]])
    one_head = lowbit.nn.query_key.query_key_product(wq, wk, 1)
    assert torch.equal(one_head, wq.T @ wk)  # [[3, 0], [7, -1]]
    assert one_head.tolist() == [[3.0, 0.0], [7.0, -1.0]]
    two_heads = lowbit.nn.query_key.query_key_product(wq, wk, 2)  # outer products of the rows
    assert two_heads.tolist() == [[3.0, 0.0], [6.0, 0.0], [0.0, 0.0], [1.0, -1.0]]
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    for head in range(2):
        logits = x @ two_heads[2 * head : 2 * head + 2] @ x.T
        torch.testing.assert_close(logits, torch.outer(x @ wq[head], x @ wk[head]))


def test_the_product_is_not_rounded_by_autocast():
    wq, wk = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        product = lowbit.nn.query_key.query_key_product(wq, wk, 4)
    assert product.dtype == torch.float32 and torch.equal(product, lowbit.nn.query_key.query_key_product(wq, wk, 4))


def test_latents_get_the_gradient_of_the_product_unrounded():
    """dL/dWq_h = Wk_h·(dL/dM_h)ᵀ with the full-precision Wk: no rounded factor in it, which is QKR's point."""
    torch.manual_seed(0)
    wq, wk = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    layer = QueryKeyProduct(2, wq, wk, StatsQ(bits=2))
    wq.requires_grad_(), wk.requires_grad_()
    grad = torch.randn(6, 3, dtype=torch.float64)
    layer(wq, wk).backward(grad)
    for h in range(2):
        rows, g = slice(2 * h, 2 * h + 2), grad[3 * h : 3 * h + 3]
        torch.testing.assert_close(wq.grad[rows], wk.detach()[rows] @ g.T)
        torch.testing.assert_close(wk.grad[rows], wq.detach()[rows] @ g)


def test_query_and_key_keep_their_places():
    """Logits are not symmetric: the row is the query, the column the key."""
    torch.manual_seed(0)
    attention = Attention(8, num_heads=2, qkv_bias=False).double()
    wq, wk, _ = attention.qkv.weight.detach().chunk(3)
    low = LowBitAttention(copy.deepcopy(attention), query_key=True)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    logits, _ = low.logits(x)
    q, k = (x @ w.T for w in (wq, wk))
    expected = (q.view(5, 2, 4).transpose(0, 1) @ k.view(5, 2, 4).permute(1, 2, 0)) * attention.scale
    torch.testing.assert_close(logits[0], expected)
    assert not torch.allclose(expected, expected.transpose(1, 2))


@pytest.mark.parametrize("make", [vit, swin, deit], ids=lambda make: make.__name__)
def test_the_whole_of_ofq_trains_saves_and_loads(make, tmp_path):
    torch.manual_seed(0)
    model = quantize_(make(), OFQ)
    size = model.patch_embed.img_size[0]
    x = torch.randn(2, 3, size, size)
    calibrate(model, x)
    model.train()
    model(x).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    weights = {found.name: found.layer.weight for found in quantized_layers(model) if found.weight is not None}
    for found in quantized_layers(model):
        if found.weight is not None:
            expected = found.weight.scale(*found.latents) * found.weight.levels[found.codes().long()]
            assert torch.equal(weights[found.name], expected)
    assert any(name.endswith("attn.qk") for name in weights) and not any(name.endswith("qkv") for name in weights)
    model.eval()
    again = lowbit.load(lowbit.save(model, tmp_path / "model.safetensors"))
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_steps_are_shared_as_published():
    model = quantize_(vit(), OFQ)
    calibrate(model, torch.randn(2, 3, 16, 16))  # 16 tokens, 128 channels, 4 heads
    attention = model.blocks[0].attn
    shapes = {name: tuple(getattr(attention, f"{name}_quantizer").step.shape) for name in ("x", "z", "softmax", "v")}
    assert shapes == {"x": (1, 16, 1), "z": (1, 16, 4, 1), "softmax": (1, 4, 16, 1), "v": (1, 1, 128)}
    assert not attention.softmax_quantizer.signed and not attention.softmax_quantizer.config.bias
    assert attention.z_quantizer.config.bias and attention.x_quantizer.config.bias
    assert not model.blocks[0].mlp.fc2.input_quantizer.signed and model.blocks[0].mlp.fc1.input_quantizer.signed
    assert tuple(model.patch_embed.proj.input_quantizer.step.shape) == (1, 3, 1, 1)  # one for each color
    assert model.head.input_quantizer.step.numel() == 1


def test_attention_without_reparameterization_quantizes_its_factors():
    config = QuantConfig(weight=StatsQ(bits=2), activation=LSQ(bits=2), attention=True)
    model = quantize_(vit(), config)
    calibrate(model, torch.randn(2, 3, 16, 16))
    attention = model.blocks[1].attn
    assert {name for name, _ in attention.named_children()} >= {"qkv", "proj", "q_quantizer", "k_quantizer"}
    for name in ("q", "k", "v", "softmax"):
        assert getattr(attention, f"{name}_quantizer").step.numel() == 1
    row = metrics.cost(model, (3, 16, 16)).set_index("layer").loc["(other matrix products)"]
    assert row.integer_multiplications == row.macs == 2 * 2 * 16 * 16 * 128  # blocks, products, tokens², channels


def test_cost_of_reparameterization():
    """Query-key weights grow by heads/2; their MACs from 2·N·C² to heads·N·C²."""
    plain, with_qkr = (
        metrics.cost(quantize_(vit(), QuantConfig(weight=StatsQ(bits=2), qkr=qkr)), (3, 16, 16)).set_index("layer")
        for qkr in (False, True)
    )
    qkv, qk, v = plain.loc["blocks.0.attn.qkv"], with_qkr.loc["blocks.0.attn.qk"], with_qkr.loc["blocks.0.attn.v"]
    assert qkv.weights == 3 * 128**2 and v.weights == 128**2
    assert qk.weights == 4 * 128**2 and qk.macs == 16 * qk.weights and qk.weight_bits == 2
    products = "(other matrix products)"
    # x·z has the whole width in each head instead of a part: the logits cost `heads` times as much.
    assert with_qkr.loc[products].macs == plain.loc[products].macs * (1 + 4) / 2


def test_layers_that_stay_keep_their_fused_path():
    model = quantize_(vit(), OFQ, filter_fn=lambda layer, name: not name.startswith("blocks.0."))
    assert isinstance(model.blocks[0].attn, Attention) and hasattr(model.blocks[0].attn, "fused_attn")
    assert isinstance(model.blocks[1].attn, LowBitAttention)


def test_attention_keeps_its_pretrained_weights_unless_asked_for_the_published_start():
    torch.manual_seed(0)
    model = swin()
    before = copy.deepcopy(model.layers[0].blocks[0].attn.state_dict())
    kept, fresh = (
        quantize_(
            copy.deepcopy(model),
            QuantConfig(weight=StatsQ(bits=2), activation=LSQ(bits=2), attention=True, attention_start=start),
        )
        .layers[0]
        .blocks[0]
        .attn
        for start in ("pretrained", "as_published")
    )
    for attention, same in ((kept, True), (fresh, False)):
        assert torch.equal(attention.qkv.parametrizations.weight.original, before["qkv.weight"]) == same
        assert torch.equal(attention.proj.parametrizations.weight.original, before["proj.weight"]) == same
        table = attention.relative_position_bias_table
        assert torch.equal(table, before["relative_position_bias_table"]) == same


def test_a_causal_mask_is_obeyed():
    torch.manual_seed(0)
    attention = Attention(8, num_heads=2, qkv_bias=True)
    with torch.no_grad():
        attention.qkv.bias[:16] = 0
    low = LowBitAttention(copy.deepcopy(attention), query_key=True)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(low(x, is_causal=True), attention(x, is_causal=True), rtol=0, atol=1e-5)
    mask = torch.rand(5, 5) > 0.3
    mask.fill_diagonal_(True)
    torch.testing.assert_close(low(x, attn_mask=mask), attention(x, attn_mask=mask), rtol=0, atol=1e-5)


def test_the_tracker_follows_the_product():
    torch.manual_seed(0)
    model = quantize_(vit(), QuantConfig(weight=StatsQ(bits=2), qkr=True))
    tracker = metrics.OscillationTracker(model)
    tracker.watch("blocks.0.attn.qk", [0, 700])
    layer = model.blocks[0].attn.qk
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(-1)  # the whole product changes sign
    tracker.update()
    frame = tracker.trajectories()
    assert (frame.latent_0[:2].to_numpy() == -frame.latent_0[2:].to_numpy()).all() and (frame.latent_0 != 0).all()
    assert tracker.frequency("blocks.0.attn.qk").shape == (512, 128)


def test_compiled_model_agrees_with_the_eager_one():
    torch.manual_seed(0)
    model = quantize_(vit(), OFQ)
    x = torch.randn(2, 3, 16, 16)
    calibrate(model, x)
    model.train()
    results = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        out = forward(x)
        out.square().mean().backward()
        grad = model.blocks[0].attn.qk.parametrizations.weight.original0.grad
        results.append((out.detach(), grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() < 0.05 * eager.norm()  # a sum in another order may flip a rounding
    assert results[0][1].abs().max() > 0


WRONG = [
    (lambda: quantize_(lowbit.models.create("resnet8"), QuantConfig(qkr=True)), "has no attention"),
    (lambda: quantize_(vit(qk_norm=True), QuantConfig(qkr=True)), "q_norm"),
    (lambda: quantize_(vit(), QuantConfig(weight=DenseShift(bits=2), qkr=True)), "several"),
    (lambda: QuantConfig(weight=StatsQ(bits=2), attention=True), "attention=True"),
    (lambda: QuantConfig(weight=StatsQ(bits=2), unsigned=("*.fc2",)), "unsigned"),
    (lambda: QuantConfig(weight=StatsQ(bits=2), attention_start="as_published"), "attention_start"),
    (lambda: quantize_(vit(), QuantConfig(activation=LSQ(bits=2), unsigned=("*.fc9",))), r"\*\.fc9"),
    (lambda: lowbit.nn.query_key.query_key_product(torch.ones(4, 2), torch.ones(4, 2), 3), "3 heads"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[message for _, message in WRONG])
def test_refusals_say_what_is_wrong(wrong, message):
    with pytest.raises(LowbitError, match=message):
        wrong()


def test_a_refused_model_is_unchanged():
    model = vit(qk_norm=True)
    names = list(model.state_dict())
    with pytest.raises(LowbitError):
        quantize_(model, OFQ)
    assert list(model.state_dict()) == names


def test_a_product_cannot_be_assigned():
    model = quantize_(vit(), QuantConfig(weight=StatsQ(bits=2), qkr=True))
    with pytest.raises(LowbitError, match="original0"):
        model.blocks[0].attn.qk.weight = torch.zeros(512, 128)


def test_biases_of_z_by_head_by_hand():
    """Two heads, two channels, everything else in full precision: each head and channel has a bias of its own."""
    torch.manual_seed(0)
    shared, own = (
        LowBitAttention(Attention(2, num_heads=2), None, LSQ(bits=8, bias=True), True, z_bias=z_bias).z_quantizer
        for z_bias in ("channel", "head")
    )
    assert shared.bias_in.shape == (1, 1, 1, 2) and own.bias_in.shape == own.bias_out.shape == (1, 1, 2, 2)
    z = torch.tensor([[[[1.0, -2.0], [3.0, 4.0]]]])  # 1 image, 1 token, 2 heads, 2 channels
    own(z)
    own.step.data.fill_(1.0)
    own.bias_in.data = torch.tensor([[[[0.6, 0.0], [0.0, -0.6]]]])
    own.bias_out.data = torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]])
    y = own(z)
    assert y.tolist() == [[[[2.0, 8.0], [23.0, 33.0]]]]
    y.backward(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert own.bias_in.grad.tolist() == own.bias_out.grad.tolist() == [[[[1, 2], [3, 4]]]]


def test_softmax_steps_by_query_by_hand():
    token = LSQ(bits=2, granularity="token")
    by_head, by_query = (
        LowBitAttention(Attention(4, num_heads=2), None, token, softmax_step=step).softmax_quantizer
        for step in ("head", "query")
    )
    # 1 image, 2 heads, 2 queries, 2 keys; unsigned start 4·mean/sqrt(3)
    weights = torch.tensor([[[[0.25, 0.75], [1.0, 0.0]], [[0.5, 0.5], [0.2, 0.2]]]])
    by_head(weights), by_query(weights)
    assert by_head.step.shape == (1, 2, 2, 1) and by_query.step.shape == (1, 1, 2, 1)
    means = torch.tensor([(0.25 + 0.75 + 0.5 + 0.5) / 4, (1.0 + 0.0 + 0.2 + 0.2) / 4])
    torch.testing.assert_close(by_query.step.detach().flatten(), 4 * means / 3**0.5)
    assert not by_query.signed and by_query.bias_in is None


def test_end_biases_by_place_and_by_feature():
    plain, biased = (quantize_(vit(), dataclasses.replace(OFQ, end_bias=end_bias)) for end_bias in (False, True))
    x = torch.randn(2, 3, 16, 16)
    calibrate(plain, x), calibrate(biased, x)
    assert plain.patch_embed.proj.input_quantizer.bias_in is None and plain.head.input_quantizer.bias_in is None
    assert biased.patch_embed.proj.input_quantizer.bias_in.shape == (1, 1, 16, 16)
    assert biased.patch_embed.proj.input_quantizer.step.shape == (1, 3, 1, 1)
    assert biased.head.input_quantizer.bias_out.shape == (128,)
    assert plain.blocks[0].mlp.fc1.input_quantizer.bias_in is not None


PUBLISHED = dataclasses.replace(
    OFQ,
    activation=LSQ(bits=2, granularity="token", bias=True, smallest_step=1e-5, bounds="inside"),
    z_bias="head",
    softmax_step="query",
    end_bias=True,
)


@pytest.mark.parametrize("make", [vit, swin], ids=lambda make: make.__name__)
def test_ofq_with_its_codes_details_trains_saves_and_loads(make, tmp_path):
    torch.manual_seed(0)
    model = quantize_(make(), PUBLISHED)
    size = model.patch_embed.img_size[0]
    x = torch.randn(2, 3, size, size)
    calibrate(model, x).train()
    model(x).square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    again = lowbit.load(lowbit.save(model.eval(), tmp_path / "model.safetensors"))
    assert torch.equal(again(x), model(x))
    attention = next(iter(low_bit_attentions(again).values()))
    assert attention.settings["z_bias"] == "head" and attention.settings["softmax_step"] == "query"
    assert QuantConfig(**PUBLISHED.to_dict()) == PUBLISHED
    packed = lowbit.pack(model)
    assert (packed(x) - model(x)).abs().max() < 0.5 * model(x).abs().max()


def test_default_options_leave_files_as_they_were():
    (attention, *_) = low_bit_attentions(quantize_(vit(), OFQ)).values()
    assert set(attention.settings) == {"weight", "activation", "query_key", "factors"}


TOKEN = LSQ(bits=2, granularity="token", bias=True)
UNFIT = [
    ({"z_bias": "head", "activation": TOKEN, "attention": True}, "z_bias='head' needs qkr=True"),
    ({"z_bias": "head", "activation": LSQ(bits=2), "attention": True, "qkr": True}, "z_bias='head' needs"),
    ({"z_bias": "heads"}, "z_bias='heads'"),
    ({"softmax_step": "query", "activation": LSQ(bits=2), "attention": True}, "softmax_step='query' needs"),
    ({"softmax_step": "query", "activation": TOKEN}, "softmax_step='query' needs attention=True"),
    ({"end_bias": True, "activation": LSQ(bits=2)}, "end_bias=True needs first_last=8"),
    ({"end_bias": True, "first_last": 8}, "end_bias=True needs first_last=8 and an activation"),
]


@pytest.mark.parametrize(("options", "message"), UNFIT, ids=[message for _, message in UNFIT])
def test_options_that_would_change_nothing_are_refused(options, message):
    with pytest.raises(LowbitError, match=message):
        QuantConfig(weight=StatsQ(bits=2), **options)


def test_an_older_timm_is_named_where_attention_needs_a_newer_one(monkeypatch):
    import timm.layers.attention

    monkeypatch.delattr(timm.layers.attention, "resolve_self_attn_mask")
    monkeypatch.setattr(timm, "__version__", "1.0.24")
    quantize_(vit(), QuantConfig(weight=StatsQ(bits=2)))  # all but attention's own products works
    for options in ({"activation": LSQ(bits=2), "attention": True}, {"qkr": True}):
        model = vit()
        with pytest.raises(
            LowbitError, match=r"needs timm 1\.0\.26 or newer, and timm 1\.0\.24 is installed.*pip install"
        ):
            quantize_(model, QuantConfig(weight=StatsQ(bits=2), **options))
        assert not list(quantized_layers(model))


def test_the_oldest_timm_is_the_one_that_the_project_asks_for():
    import tomllib
    from pathlib import Path

    from lowbit.nn.attention import OLDEST_TIMM

    project = tomllib.loads((Path(lowbit.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = [each for each in project["optional-dependencies"]["models"] if each.startswith("timm")]
    assert asked == [f"timm>={OLDEST_TIMM}"]
