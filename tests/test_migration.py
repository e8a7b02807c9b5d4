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
from lowbit.nn.packed import PackedLinear
from lowbit.quantizers import S3, DenseShift
from lowbit.quantizers.base import ActivationQuantizer

BITS, WIDTH, HEADS, DEPTH, TOKENS, PIXELS, CLASSES = 2, 16, 2, 2, 5, 16, 3
IMAGES = torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(5))
# A Swin of two stages, on maps of 8 x 8 and 4 x 4 places; the windows of the first stage's second block are shifted.
WINDOW, SIDE = 4, 8
SWIN = {"embed_dim": WIDTH, "depths": (2, 2), "num_heads": (2, 4), "window_size": WINDOW}
LARGE = torch.randn(2, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(6))


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


def attention_state(name, qkr, tokens, width=WIDTH, heads=HEADS):
    if not qkr:
        state = layer_state(f"{name}.qkv", 3 * width, width, tokens) | {f"{name}.move_qkv_b4.bias": draw(3 * width)}
        state |= {f"{name}.move_{part}_aft.bias": draw(width) for part in "qkv"}
        state |= {f"{name}.quan_a_{part}_fn.s": steps(tokens) for part in "qk"}
    else:
        state = {f"{name}.{part}.weight": draw(width, width) for part in "qkv"} | {f"{name}.v.bias": draw(width)}
        state |= {f"{name}.quant_x_4_qkv.input_quant_fn.s": steps(tokens)}
        state |= {f"{name}.quant_x_4_qkv.move_{part}.bias": draw(width) for part in ("b4", "aft")}
        state |= {f"{name}.quan_a_qkx_fn.s": steps(tokens * heads)}
        state |= {f"{name}.move_qkx_{part}.bias": draw(heads * width) for part in ("b4", "aft")}
        state |= {f"{name}.move_v_{part}.bias": draw(width) for part in ("b4", "aft")}
        state |= {f"{name}.{part}.clip_val": torch.tensor([2.0]) for part in ("qk_quant", "v_quant")}
    state |= {f"{name}.quan_a_v_fn.s": steps(width), f"{name}.quan_a_softmax_fn.s": steps(tokens)}
    return state | layer_state(f"{name}.proj", width, width, tokens)


def norm_state(name, width):
    return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}


def patches_state(name, patch, pixels):
    """The layer that reads the image, of 8 bits, with a bias for each pixel."""
    state = {f"{name}.weight": draw(WIDTH, 3, patch, patch), f"{name}.bias": draw(WIDTH)}
    state |= {f"{name}.lsqw_fn.s": steps(WIDTH) / 50, f"{name}.input_quant_fn.s": steps(3) / 50}
    state |= {f"{name}.move_{part}.bias": draw(pixels * pixels) for part in ("b4", "aft")}
    return state | {f"{name}.input_quant_fn.signed": torch.ones(1)}


def head_state(name, width):
    state = {f"{name}.weight": draw(CLASSES, width), f"{name}.bias": draw(CLASSES)}
    state |= {f"{name}.lsqw_fn.s": steps(CLASSES) / 50, f"{name}.input_quant_fn.s": steps(1) / 50}
    return state | {f"{name}.move_{part}.bias": draw(width) for part in ("b4", "aft")}


def ofq_state(qkr, distilled=False):
    torch.manual_seed(3)
    tokens = TOKENS + distilled
    state = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, tokens, WIDTH)}
    state |= {"dist_token": draw(1, 1, WIDTH)} if distilled else {}
    state |= patches_state("patch_embed.proj", 8, PIXELS)
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        state |= norm_state(f"{block}.norm1", WIDTH) | norm_state(f"{block}.norm2", WIDTH)
        state |= attention_state(f"{block}.attn", qkr, tokens)
        state |= layer_state(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH, tokens)
        state |= layer_state(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH, tokens)
    state |= norm_state("norm", WIDTH)
    for name in heads(state):
        state |= head_state(name, WIDTH)
    return state


def swin_state(qkr):
    """OFQ's Swin: steps for each token of a window in attention, for each column of the map in the other layers."""
    torch.manual_seed(7)
    state = patches_state("features.0.0", 4, LARGE.shape[-1]) | norm_state("features.0.2", WIDTH)
    places = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))
    distance = places[:, None] - places[None] + WINDOW - 1
    index = distance[..., 0] * (2 * WINDOW - 1) + distance[..., 1]
    for stage, (depth, count) in enumerate(zip(SWIN["depths"], SWIN["num_heads"], strict=True)):
        width, side = WIDTH * 2**stage, SIDE // 2**stage
        if stage:
            merging = f"features.{2 * stage}"
            state |= norm_state(f"{merging}.norm", 2 * width)
            state |= layer_state(f"{merging}.reduction", width, 2 * width, side)
        for block in (f"features.{2 * stage + 1}.{i}" for i in range(depth)):
            state |= norm_state(f"{block}.norm1", width) | norm_state(f"{block}.norm2", width)
            state |= attention_state(f"{block}.attn", qkr, WINDOW**2, width, count)
            state |= {f"{block}.attn.relative_position_bias_table": draw((2 * WINDOW - 1) ** 2, count) * 5}
            state |= {f"{block}.attn.relative_position_index": index.flatten()}
            state |= layer_state(f"{block}.mlp.fc1", 4 * width, width, side)
            state |= layer_state(f"{block}.mlp.fc2", width, 4 * width, side)
    return state | norm_state("norm", width) | head_state("head", width)


def heads(state):
    """The heads of a DeiT; a distilled one has two, whose answers are averaged."""
    return ("head", "head_dist") if "dist_token" in state else ("head",)


def rounded(x, step, bits, unsigned=False):
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    step = step.clamp_min(1e-5)
    return (x / step).clamp(low, high).round() * step


def linear(s, name, x, bits, unsigned=False):
    """A layer for ``[B, N, C]``, with a step for each token, or ``[B, H, W, C]``, with one for each column."""
    x = rounded(x + s[f"{name}.move_b4.bias"], s[f"{name}.input_quant_fn.s"][:, None], bits, unsigned)
    x = x + s[f"{name}.move_aft.bias"]
    return F.linear(x, statsq(s[f"{name}.weight"], bits), s[f"{name}.bias"])


def by_head(x, count):
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def attend(s, name, x, qkr, bits, count, added=0.0):
    """Attention as the paper's program computes it, from the tensors that it stores; ``added`` to the logits."""
    width = x.shape[-1]
    if qkr:
        x = rounded(
            x + s[f"{name}.quant_x_4_qkv.move_b4.bias"], s[f"{name}.quant_x_4_qkv.input_quant_fn.s"][:, None], bits
        )
        x = x + s[f"{name}.quant_x_4_qkv.move_aft.bias"]
        wq, wk = (s[f"{name}.{part}.weight"].view(count, -1, width) for part in "qk")
        product = statsq(torch.cat([q.T @ k for q, k in zip(wq, wk, strict=True)]), bits)
        z = (x @ product.T + s[f"{name}.move_qkx_b4.bias"]).view(len(x), -1, width)
        z = rounded(z, s[f"{name}.quan_a_qkx_fn.s"][:, None], bits).view(*x.shape[:2], -1)
        z = by_head(z + s[f"{name}.move_qkx_aft.bias"], count)
        logits = x[:, None] @ z.transpose(2, 3)
        v = F.linear(x, statsq(s[f"{name}.v.weight"], bits), s[f"{name}.v.bias"]) + s[f"{name}.move_v_b4.bias"]
    else:
        q, k, v = (linear(s, f"{name}.qkv", x, bits) + s[f"{name}.move_qkv_b4.bias"]).chunk(3, -1)
        q = rounded(q, s[f"{name}.quan_a_q_fn.s"][:, None], bits) + s[f"{name}.move_q_aft.bias"]
        k = rounded(k, s[f"{name}.quan_a_k_fn.s"][:, None], bits) + s[f"{name}.move_k_aft.bias"]
        logits = by_head(q, count) @ by_head(k, count).transpose(2, 3)
    v = rounded(v, s[f"{name}.quan_a_v_fn.s"], bits) + s[f"{name}.move_v_aft.bias"]
    share = (logits * (width // count) ** -0.5 + added).softmax(-1)
    share = rounded(share, s[f"{name}.quan_a_softmax_fn.s"][:, None], bits, unsigned=True)
    return linear(s, f"{name}.proj", (share @ by_head(v, count)).transpose(1, 2).flatten(2), bits)


def normed(s, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def patches(s, name, images, size):
    """The places of the image, ``[B, C, H, W]``."""
    before, after = (s[f"{name}.move_{part}.bias"].view(images.shape[2:]) for part in ("b4", "aft"))
    x = rounded(images + before, s[f"{name}.input_quant_fn.s"].view(1, 3, 1, 1), 8) + after
    weight = rounded(s[f"{name}.weight"], s[f"{name}.lsqw_fn.s"].view(-1, 1, 1, 1), 8)
    return F.conv2d(x, weight, s[f"{name}.bias"], size)


def mlp(s, name, x, bits):
    return linear(s, f"{name}.fc2", F.gelu(linear(s, f"{name}.fc1", x, bits)), bits, unsigned=True)


def classified(s, name, x):
    x = rounded(x + s[f"{name}.move_b4.bias"], s[f"{name}.input_quant_fn.s"], 8) + s[f"{name}.move_aft.bias"]
    return F.linear(x, rounded(s[f"{name}.weight"], s[f"{name}.lsqw_fn.s"][:, None], 8), s[f"{name}.bias"])


def ofq_answers(s, images, qkr):
    """The logits of OFQ's program."""
    x = patches(s, "patch_embed.proj", images, 8).flatten(2).transpose(1, 2)
    first = [s[token].expand(len(x), -1, -1) for token in ("cls_token", "dist_token") if token in s]
    x = torch.cat([*first, x], 1) + s["pos_embed"]
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        x = x + attend(s, f"{block}.attn", normed(s, f"{block}.norm1", x, 1e-6), qkr, BITS, HEADS)
        x = x + mlp(s, f"{block}.mlp", normed(s, f"{block}.norm2", x, 1e-6), BITS)
    x = normed(s, "norm", x, 1e-6)
    answers = [classified(s, name, x[:, token]) for token, name in enumerate(heads(s))]
    return sum(answers) / len(answers)


def in_windows(x):
    """``[B, H, W, C]`` as ``[B, windows, tokens, C]``."""
    x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def attend_in_windows(s, name, x, qkr, bits, shift):
    """Attention in windows, which a ``shift`` moves over the map's edge: parts from opposite edges do not mix."""
    table = s[f"{name}.relative_position_bias_table"][s[f"{name}.relative_position_index"]]
    count, side = table.shape[-1], x.shape[1]
    added = table.view(WINDOW**2, WINDOW**2, count).permute(2, 0, 1).to(x)[None]
    windows = in_windows(x.roll((-shift, -shift), (1, 2)))
    if shift:
        line = torch.arange(side)
        part = (line >= side - WINDOW).int() + (line >= side - shift)
        part = in_windows((3 * part[:, None] + part)[None, :, :, None])[0, :, :, 0]
        apart = -100.0 * (part[:, :, None] != part[:, None])
        added = (added + apart[:, None]).repeat(len(x), 1, 1, 1)
    y = attend(s, name, windows.flatten(0, 1), qkr, bits, count, added)
    y = y.view(len(x), side // WINDOW, side // WINDOW, WINDOW, WINDOW, -1).transpose(2, 3).reshape(x.shape)
    return y.roll((shift, shift), (1, 2))


def swin_answers(s, images, qkr, bits):
    """The logits of OFQ's Swin."""
    x = normed(s, "features.0.2", patches(s, "features.0.0", images, 4).permute(0, 2, 3, 1), 1e-5)
    for stage, depth in enumerate(SWIN["depths"]):
        if stage:
            merging = f"features.{2 * stage}"
            x = torch.cat([x[:, h::2, w::2] for w in (0, 1) for h in (0, 1)], -1)
            x = linear(s, f"{merging}.reduction", normed(s, f"{merging}.norm", x, 1e-5), bits)
        for i in range(depth):
            block, shift = f"features.{2 * stage + 1}.{i}", i % 2 * WINDOW // 2 * (x.shape[1] > WINDOW)
            y = normed(s, f"{block}.norm1", x, 1e-5)
            x = x + attend_in_windows(s, f"{block}.attn", y, qkr, bits, shift)
            x = x + mlp(s, f"{block}.mlp", normed(s, f"{block}.norm2", x, 1e-5), bits)
    return classified(s, "head", normed(s, "norm", x, 1e-5).mean((1, 2)))


def vit(qkr, distilled=False):
    size = {"img_size": PIXELS, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    return lowbit.quantize_(timm.create_model(name, num_classes=CLASSES, **size), ofq_config(BITS, qkr))


def plain_swin(**options):
    options = {"img_size": LARGE.shape[-1], "num_classes": CLASSES} | SWIN | options
    return lowbit.models.create("swin_tiny_patch4_window7_224", **options)


def swin(qkr, bits=BITS, **options):
    return lowbit.quantize_(plain_swin(**options), ofq_config(bits, qkr))


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


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("qkr", [True, False])
def test_a_checkpoint_of_ofq_s_swin_answers_as_its_program(qkr, bits, tmp_path):
    state = swin_state(qkr)
    args = argparse.Namespace(wq_bitw=bits, aq_bitw=bits)
    torch.save({"epoch": 3, "arch": "swin_t", "state_dict": state, "args": args}, tmp_path / "model_best.pth.tar")
    # In double precision, no value is so close to the border of two steps that the order of a sum decides.
    model = load_published_(swin(qkr, bits).double(), tmp_path / "model_best.pth.tar", "ofq", LARGE.double())
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    with torch.no_grad():
        answers, expected = model(LARGE.double()), swin_answers(state, LARGE.double(), qkr, bits)
    torch.testing.assert_close(answers, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("qkr", [True, False])
def test_ofq_s_swin_is_packed_and_stored(qkr, bits, tmp_path):
    model = load_published_(swin(qkr, bits), swin_state(qkr), "ofq", LARGE)
    packed = lowbit.pack(model, LARGE)
    merging = packed.layers[1].downsample.reduction
    assert isinstance(merging, PackedLinear) and merging.bias is not None
    with torch.no_grad():
        torch.testing.assert_close(packed(LARGE), model(LARGE), rtol=1e-3, atol=1e-3)
        path = lowbit.save(packed, tmp_path / "packed")
        assert torch.equal(lowbit.load(path)(LARGE), packed(LARGE))
        assert torch.equal(lowbit.load_into(plain_swin(), path)(LARGE), packed(LARGE))


def test_before_packing_the_file_of_a_swin_needs_a_swin_with_ofq_s_biases(tmp_path):
    model = load_published_(swin(True), swin_state(True), "ofq", LARGE)
    path, other = lowbit.save(model, tmp_path / "file"), plain_swin()
    with pytest.raises(CheckpointError, match=r"'layers\.1\.downsample\.reduction\.bias' is not in the module"):
        lowbit.load_into(other, path)
    other.layers[1].downsample.reduction.bias = nn.Parameter(torch.zeros(2 * WIDTH))
    with torch.no_grad():
        assert torch.equal(lowbit.load_into(other, path)(LARGE), model(LARGE))


def test_a_step_below_the_smallest_of_ofq_is_read_as_its_program_reads_it():
    state = ofq_state(True)
    for name in ("blocks.0.mlp.fc1.input_quant_fn.s", "blocks.1.attn.quan_a_softmax_fn.s"):
        state[name][1:3] = torch.tensor([-0.3, 1e-7])
    model = load_published_(vit(True), state, "ofq", IMAGES)
    smallest = torch.full((2,), 1e-5)
    assert torch.equal(model.blocks[0].mlp.fc1.input_quantizer.step.flatten()[1:3], smallest)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), ofq_answers(state, IMAGES, True), rtol=1e-4, atol=1e-5)


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
    with pytest.raises(LowbitError, match="needs example"):
        load_published_(swin(True), swin_state(True), "ofq")
    with pytest.raises(LowbitError, match="layout='lsq' is not allowed; ofq, denseshift, s3 are"):
        load_published_(nn.Linear(2, 2), {}, "lsq")


def test_a_swin_and_a_vit_are_not_taken_for_each_other():
    with pytest.raises(CheckpointError, match=r"lacks 'cls_token'.*no place for 'features\.0\.2\.weight'"):
        load_published_(vit(True), swin_state(True), "ofq", IMAGES)
    model = swin(True)
    with pytest.raises(CheckpointError, match=r"lacks 'patch_embed\.norm\.weight'.*no place for 'cls_token'"):
        load_published_(model, ofq_state(True), "ofq", LARGE)
    state = swin_state(True)
    with pytest.raises(CheckpointError, match=r"lacks 'layers\.1\.downsample\.norm\.bias'$"):
        load_published_(model, {k: v for k, v in state.items() if k != "features.2.norm.bias"}, "ofq", LARGE)
    assert model.layers[1].downsample.reduction.bias is None
    with pytest.raises(CheckpointError, match=r"fc1\.input_quantizer\.step' is \[9\] in the file; .* \[1, 64, 1\]"):
        load_published_(model, state | {"features.1.0.mlp.fc1.input_quant_fn.s": steps(9)}, "ofq", LARGE)
    with pytest.raises(CheckpointError, match=r"attn.*step' is \[4\] in the file; the model needs \[1, 16, 1\]"):
        load_published_(model, state | {"features.1.0.attn.proj.input_quant_fn.s": steps(4)}, "ofq", LARGE)


def test_a_model_of_other_widths_than_the_run_is_refused(tmp_path):
    """The tensors do not tell the widths; the command line does, which the program stores beside them."""

    def file(**args):
        torch.save({"state_dict": ofq_state(True), "args": argparse.Namespace(**args)}, tmp_path / "file")
        return tmp_path / "file"

    with pytest.raises(CheckpointError, match=r"weights of 4 bits and activations of 3 .* has 2 and 2: quantize a new"):
        load_published_(vit(True), file(wq_bitw=4, aq_bitw=3), "ofq", IMAGES)
    for args in ({"wq_bitw": 2, "aq_bitw": 2}, {"wq_bitw": 4, "aq_bitw": 4, "quant_teacher": True}, {"wq_bitw": "4"}):
        load_published_(vit(True), file(**args), "ofq", IMAGES)


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
