"""Checkpoints in the layouts of the papers' programs: files made here, and what those programs compute with them."""

import argparse

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit.errors import CheckpointError, LowbitError
from lowbit.functional import statsq
from lowbit.migration import load_published_, ofq_config
from lowbit.nn import quantized_layers
from lowbit.quantizers import S3, DenseShift
from lowbit.quantizers.base import ActivationQuantizer

BITS, WIDTH, HEADS, DEPTH, TOKENS, PIXELS, CLASSES = 2, 16, 2, 2, 5, 16, 3
IMAGES = torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(5))


def draw(*shape, positive=False):
    values = torch.randn(*shape)
    return values.abs() * 0.3 + 0.1 if positive else values * 0.3


def steps(count):
    return draw(count, positive=True)


def layer_state(name, out, into, count):
    """A linear layer of OFQ's program: a step for each token, biases before and after the quantizer."""
    return {
        f"{name}.weight": draw(out, into),
        f"{name}.bias": draw(out),
        f"{name}.input_quant_fn.s": steps(count),
        f"{name}.move_b4.bias": draw(into),
        f"{name}.move_aft.bias": draw(into),
        f"{name}.statsq_fn.clip_val": torch.tensor([2.0]),
    }


def attention_state(name, qkr, tokens):
    if not qkr:
        state = layer_state(f"{name}.qkv", 3 * WIDTH, WIDTH, tokens) | {f"{name}.move_qkv_b4.bias": draw(3 * WIDTH)}
        state |= {f"{name}.move_{part}_aft.bias": draw(WIDTH) for part in "qkv"}
        state |= {f"{name}.quan_a_{part}_fn.s": steps(tokens) for part in "qk"}
    else:
        state = {f"{name}.{part}.weight": draw(WIDTH, WIDTH) for part in "qkv"} | {f"{name}.v.bias": draw(WIDTH)}
        state |= {f"{name}.quant_x_4_qkv.input_quant_fn.s": steps(tokens)}
        state |= {f"{name}.quant_x_4_qkv.move_{part}.bias": draw(WIDTH) for part in ("b4", "aft")}
        state |= {f"{name}.quan_a_qkx_fn.s": steps(tokens * HEADS)}
        state |= {f"{name}.move_qkx_{part}.bias": draw(HEADS * WIDTH) for part in ("b4", "aft")}
        state |= {f"{name}.move_v_{part}.bias": draw(WIDTH) for part in ("b4", "aft")}
        state |= {f"{name}.{part}.clip_val": torch.tensor([2.0]) for part in ("qk_quant", "v_quant")}
    state |= {f"{name}.quan_a_v_fn.s": steps(WIDTH), f"{name}.quan_a_softmax_fn.s": steps(tokens)}
    return state | layer_state(f"{name}.proj", WIDTH, WIDTH, tokens)


def ofq_state(qkr, distilled=False):
    torch.manual_seed(3)
    tokens = TOKENS + distilled
    state = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, tokens, WIDTH)}
    state |= {"dist_token": draw(1, 1, WIDTH)} if distilled else {}
    state |= {"patch_embed.proj.weight": draw(WIDTH, 3, 8, 8), "patch_embed.proj.bias": draw(WIDTH)}
    state |= {"patch_embed.proj.lsqw_fn.s": steps(WIDTH) / 50, "patch_embed.proj.input_quant_fn.s": steps(3) / 50}
    state |= {f"patch_embed.proj.move_{part}.bias": draw(PIXELS * PIXELS) for part in ("b4", "aft")}
    state |= {"patch_embed.proj.input_quant_fn.signed": torch.ones(1)}
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        for norm in ("norm1", "norm2"):
            state |= {f"{block}.{norm}.weight": 1 + draw(WIDTH), f"{block}.{norm}.bias": draw(WIDTH)}
        state |= attention_state(f"{block}.attn", qkr, tokens)
        state |= layer_state(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH, tokens)
        state |= layer_state(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH, tokens)
    state |= {"norm.weight": 1 + draw(WIDTH), "norm.bias": draw(WIDTH)}
    for head in heads(state):
        state |= {f"{head}.weight": draw(CLASSES, WIDTH), f"{head}.bias": draw(CLASSES)}
        state |= {f"{head}.lsqw_fn.s": steps(CLASSES) / 50, f"{head}.input_quant_fn.s": steps(1) / 50}
        state |= {f"{head}.move_{part}.bias": draw(WIDTH) for part in ("b4", "aft")}
    return state


def heads(state):
    """The heads of a DeiT; a distilled one has two, whose answers are averaged."""
    return ("head", "head_dist") if "dist_token" in state else ("head",)


def rounded(x, step, bits, unsigned=False):
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (x / step).clamp(low, high).round() * step


def linear(s, name, x, unsigned=False):
    x = rounded(x + s[f"{name}.move_b4.bias"], s[f"{name}.input_quant_fn.s"][:, None], BITS, unsigned)
    x = x + s[f"{name}.move_aft.bias"]
    return F.linear(x, statsq(s[f"{name}.weight"], BITS), s[f"{name}.bias"])


def by_head(x):
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def attend(s, name, x, qkr):
    """Attention as the paper's program computes it, from the tensors that it stores."""
    if qkr:
        x = rounded(
            x + s[f"{name}.quant_x_4_qkv.move_b4.bias"], s[f"{name}.quant_x_4_qkv.input_quant_fn.s"][:, None], BITS
        )
        x = x + s[f"{name}.quant_x_4_qkv.move_aft.bias"]
        wq, wk = (s[f"{name}.{part}.weight"].view(HEADS, -1, WIDTH) for part in "qk")
        product = statsq(torch.cat([q.T @ k for q, k in zip(wq, wk, strict=True)]), BITS)
        z = (x @ product.T + s[f"{name}.move_qkx_b4.bias"]).view(len(x), -1, WIDTH)
        z = rounded(z, s[f"{name}.quan_a_qkx_fn.s"][:, None], BITS).view(*x.shape[:2], -1)
        z = by_head(z + s[f"{name}.move_qkx_aft.bias"])
        logits = x[:, None] @ z.transpose(2, 3)
        v = F.linear(x, statsq(s[f"{name}.v.weight"], BITS), s[f"{name}.v.bias"]) + s[f"{name}.move_v_b4.bias"]
    else:
        q, k, v = (linear(s, f"{name}.qkv", x) + s[f"{name}.move_qkv_b4.bias"]).chunk(3, -1)
        q = rounded(q, s[f"{name}.quan_a_q_fn.s"][:, None], BITS) + s[f"{name}.move_q_aft.bias"]
        k = rounded(k, s[f"{name}.quan_a_k_fn.s"][:, None], BITS) + s[f"{name}.move_k_aft.bias"]
        logits = by_head(q) @ by_head(k).transpose(2, 3)
    v = rounded(v, s[f"{name}.quan_a_v_fn.s"], BITS) + s[f"{name}.move_v_aft.bias"]
    share = (logits * (WIDTH // HEADS) ** -0.5).softmax(-1)
    share = rounded(share, s[f"{name}.quan_a_softmax_fn.s"][:, None], BITS, unsigned=True)
    return linear(s, f"{name}.proj", (share @ by_head(v)).transpose(1, 2).flatten(2))


def ofq_answers(s, images, qkr):
    """The logits of OFQ's program."""
    name = "patch_embed.proj"
    x = images + s[f"{name}.move_b4.bias"].view(PIXELS, PIXELS)
    x = rounded(x, s[f"{name}.input_quant_fn.s"].view(1, 3, 1, 1), 8) + s[f"{name}.move_aft.bias"].view(PIXELS, PIXELS)
    weight = rounded(s[f"{name}.weight"], s[f"{name}.lsqw_fn.s"].view(-1, 1, 1, 1), 8)
    x = F.conv2d(x, weight, s[f"{name}.bias"], 8).flatten(2).transpose(1, 2)
    first = [s[token].expand(len(x), -1, -1) for token in ("cls_token", "dist_token") if token in s]
    x = torch.cat([*first, x], 1) + s["pos_embed"]
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        y = F.layer_norm(x, (WIDTH,), s[f"{block}.norm1.weight"], s[f"{block}.norm1.bias"], 1e-6)
        x = x + attend(s, f"{block}.attn", y, qkr)
        y = F.layer_norm(x, (WIDTH,), s[f"{block}.norm2.weight"], s[f"{block}.norm2.bias"], 1e-6)
        x = x + linear(s, f"{block}.mlp.fc2", F.gelu(linear(s, f"{block}.mlp.fc1", y)), unsigned=True)
    x = F.layer_norm(x, (WIDTH,), s["norm.weight"], s["norm.bias"], 1e-6)
    answers = []
    for token, head in enumerate(heads(s)):
        y = rounded(x[:, token] + s[f"{head}.move_b4.bias"], s[f"{head}.input_quant_fn.s"], 8)
        weight = rounded(s[f"{head}.weight"], s[f"{head}.lsqw_fn.s"][:, None], 8)
        answers.append(F.linear(y + s[f"{head}.move_aft.bias"], weight, s[f"{head}.bias"]))
    return sum(answers) / len(answers)


def vit(qkr, distilled=False):
    size = {"img_size": PIXELS, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    return lowbit.quantize_(timm.create_model(name, num_classes=CLASSES, **size), ofq_config(BITS, qkr))


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("qkr", [True, False])
def test_a_checkpoint_of_ofq_answers_as_its_program(qkr, distilled, tmp_path):
    state = ofq_state(qkr, distilled)
    content = {"epoch": 3, "arch": "deit", "state_dict": state, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, tmp_path / "model_best.pth.tar")
    model = load_published_(vit(qkr, distilled), tmp_path / "model_best.pth.tar", "ofq", IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), ofq_answers(state, IMAGES, qkr), rtol=1e-4, atol=1e-5)
        packed = lowbit.pack(model, IMAGES)
        torch.testing.assert_close(packed(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-3)


def test_after_an_error_the_model_is_as_it_was(tmp_path):
    model, state = vit(True), ofq_state(True)
    with pytest.raises(CheckpointError, match=r"no checkpoint of layout 'ofq'.*lacks 'norm.bias'"):
        load_published_(model, {name: tensor for name, tensor in state.items() if name != "norm.bias"}, "ofq", IMAGES)
    waiting = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    assert waiting and not any(module.calibrated for module in waiting)


def test_an_averaged_model_and_a_parallel_one_are_read(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in ofq_state(True).items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"state_dict": other, "state_dict_ema": state}, tmp_path / "file")
    model = load_published_(vit(True), tmp_path / "file", "ofq", IMAGES)
    assert torch.equal(model.norm.weight, state["module.norm.weight"])


def residual_state(parts):
    """torchvision's ResNet with the latents of a shift network in all but the first and last layers."""
    from torchvision.models import resnet18

    torch.manual_seed(4)
    state, weights = {}, {}
    for name, tensor in resnet18(num_classes=CLASSES).state_dict().items():
        if tensor.ndim == 4 and name != "conv1.weight":
            latents = {part: torch.randn_like(tensor) for part in parts}
            state |= {f"{name}_{part}": latent for part, latent in latents.items()}
            state[name] = latents["sign"]  # the program registers it under both names
            weights[name.removesuffix(".weight")] = latents
        else:
            state[name] = torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor
    return state, weights


def denseshift_weight(sign, t1, t2, t3):
    exponent = (t1 > 0) * 1.0
    for gate in (t2, t3):
        exponent = (exponent + 1) * (gate > 0)
    return torch.where(sign >= 0, 1.0, -1.0) * 2**exponent


def s3_weight(sign, val, shift, shift2):
    exponent = (shift > 0) * ((shift2 > 0) + 1.0)
    return torch.where(sign >= 0, 1.0, -1.0) * (val > 0) * 2**exponent


@pytest.mark.parametrize(
    ("layout", "method", "parts", "weight_of"),
    [
        ("denseshift", DenseShift(bits=3), ("sign", "t1", "t2", "t3"), denseshift_weight),
        ("s3", S3(bits=3), ("sign", "val", "shift", "shift2"), s3_weight),
    ],
)
def test_a_checkpoint_of_a_shift_network_has_the_program_s_weights(layout, method, parts, weight_of, tmp_path):
    from torchvision.models import resnet18

    state, weights = residual_state(parts)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "file")
    model = lowbit.quantize_(resnet18(num_classes=CLASSES), lowbit.QuantConfig(method))
    load_published_(model, tmp_path / "file", layout)
    found = {each.name: each.layer.weight for each in quantized_layers(model)}
    assert found.keys() == weights.keys()
    for name, latents in weights.items():
        assert torch.equal(found[name], weight_of(*latents.values())), name
    assert torch.equal(model.bn1.running_var, state["bn1.running_var"])


@pytest.mark.parametrize(("layout", "method"), [("denseshift", DenseShift(bits=3)), ("s3", S3(bits=3))])
def test_levels_in_the_place_of_latents_are_read(layout, method, tmp_path):
    """The files published with S3 hold 0, ±1, ±2 and ±4 under the names of ordinary layers."""

    def network():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))

    torch.manual_seed(0)
    state, levels = network().state_dict(), method.weight(torch.zeros(1, 1)).levels
    state["1.weight"] = levels[torch.randint(len(levels), (8, 8, 3, 3))]
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "file")
    model = lowbit.quantize_(network(), lowbit.QuantConfig(method))
    latents = [tensor.clone() for tensor in model.parameters()]
    with pytest.raises(CheckpointError, match=r"'1.weight' has neither latents.*(S3|DenseShift)\(.*takes -\d+, "):
        load_published_(model, state | {"1.weight": torch.full((8, 8, 3, 3), 3.0)}, layout)
    assert all(map(torch.equal, latents, model.parameters()))
    load_published_(model, tmp_path / "file", layout)
    assert torch.equal(model[1].weight, state["1.weight"])


def test_what_does_not_fit_is_named():
    state = ofq_state(True)
    with pytest.raises(CheckpointError, match=r"lacks 'norm.bias'; the model has no place for 'more'"):
        load_published_(
            vit(True),
            {k: v for k, v in state.items() if k != "norm.bias"} | {"more": state["norm.bias"]},
            "ofq",
            IMAGES,
        )
    with pytest.raises(CheckpointError, match=r"'norm.bias' is \[3\] in the file; the model needs \[16\]"):
        load_published_(vit(True), state | {"norm.bias": torch.zeros(3)}, "ofq", IMAGES)
    with pytest.raises(CheckpointError, match=r"no checkpoint of layout 'ofq'.*'blocks.0.attn.q.*weight'"):
        load_published_(vit(False), state, "ofq", IMAGES)
    with pytest.raises(LowbitError, match="needs example"):
        load_published_(vit(True), state, "ofq")
    with pytest.raises(LowbitError, match="layout='lsq' is not allowed; ofq, denseshift, s3 are"):
        load_published_(nn.Linear(2, 2), {}, "lsq")


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content", [{"state_dict": Harmful()}, [1, 2], {"state_dict": {"a": 1}}, {1: torch.zeros(1)}])
def test_a_file_that_holds_something_else_is_refused(content, tmp_path, capsys):
    torch.save(content, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot be read as tensors|holds no tensors by name"):
        load_published_(vit(True), tmp_path / "file", "ofq", IMAGES)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a file of torch", b"PK\x03\x04broken"])
def test_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        load_published_(vit(True), tmp_path / "file", "ofq", IMAGES)
