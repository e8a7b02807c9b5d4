"""Counts worked by hand, known totals of known models, and the rule for what remains of a multiplication."""

import copy

import pytest
import timm
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.metrics import cost, totals, training_memory
from lowbit.metrics.costs import code_bits, kind_of_product
from lowbit.quantizers import INQ, LSQ, DenseShift, PoT, StatsQ, get, names


def tiny():
    """Weights 3·8·9 = 216, 8·4·9 = 288 in two groups, 4·4·8 = 128 and 160 at 6 x 6, 6 x 6 and 2 x 2 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),  # 8x8 -> 6x6
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        nn.MaxPool2d(3),  # -> 2x2
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.Linear(16, 5),
    )


MACS = {"0": 216 * 36, "2": 288 * 36, "5": 512, "6": 80}


def table(model):
    return cost(model, (3, 8, 8)).set_index("layer")


def test_full_precision_worked_by_hand():
    frame = table(tiny())
    assert frame.index.tolist() == ["0", "2", "5", "6", "(rest)"]
    assert frame.kind.tolist() == ["Conv2d", "Conv2d", "Linear", "Linear", "rest"]
    # rest: biases 8 + 16 + 5, batch normalization 4 · 8
    assert frame.weights.tolist() == [216, 288, 512, 80, 61]
    assert frame.macs.tolist() == frame.float_multiplications.tolist() == [*MACS.values(), 0]
    assert frame.additions.tolist() == [*MACS.values(), 0]
    assert (frame[["integer_multiplications", "shifts", "scale_multiplications"]] == 0).all(axis=None)
    assert frame.bytes.tolist() == frame.full_precision_bytes.tolist() == [4 * n for n in frame.weights]
    assert totals(frame.reset_index())["compression"] == 1


def test_a_quantized_model_worked_by_hand():
    model = lowbit.quantize_(tiny(), lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=4)))
    frame = table(model)
    quantized, kept = frame.loc[["2", "5"]], frame.loc[["0", "6"]]
    assert quantized.weight_bits.tolist() == [3, 3] and quantized.activation_bits.tolist() == [4, 4]
    assert quantized.kind.tolist() == ["Conv2d", "Linear"]
    assert quantized.integer_multiplications.tolist() == [288 * 36, 512]
    assert quantized.scale_multiplications.tolist() == [8 * 36, 16]  # one an output
    assert quantized.bytes.tolist() == [288 * 3 // 8 + 4 * 8, 512 * 3 // 8 + 4 * 16]  # codes and a scale a row
    assert kept.float_multiplications.tolist() == [MACS["0"], MACS["6"]] and kept.weight_bits.tolist() == [32, 32]
    sums = totals(frame.reset_index())
    assert sums["bytes"] == 108 + 32 + 192 + 64 + 4 * (216 + 80 + 61 + 2)  # a step for each quantized input
    assert sums["full_precision_bytes"] == 4 * (216 + 288 + 512 + 80 + 61)
    assert sums["compression"] == pytest.approx(4628 / 1832)
    assert sums["macs"] == sums["additions"] == sum(MACS.values())
    assert sums["float_multiplications"] == MACS["0"] + MACS["6"]


def test_shift_weights_leave_no_multiplication():
    model = lowbit.quantize_(tiny(), lowbit.QuantConfig(weight=DenseShift(bits=3), first_last="same"))
    sums = totals(cost(model, (3, 8, 8)))
    assert sums["float_multiplications"] == sums["integer_multiplications"] == sums["scale_multiplications"] == 0
    assert sums["shifts"] == sums["additions"] == sum(MACS.values())
    assert sums["bytes"] == (216 + 288 + 512 + 80) * 3 // 8 + 4 * 61  # no scale is stored


@pytest.mark.parametrize(("scale", "multiplications"), [("pow2", 0), ("statistical", 8 * 36 + 16)])
def test_a_power_of_two_scale_is_stored_but_multiplies_nothing(scale, multiplications):
    frame = table(lowbit.quantize_(tiny(), lowbit.QuantConfig(weight=DenseShift(bits=2, scale=scale))))
    assert frame.scale_multiplications.sum() == multiplications
    assert frame.loc["2"].bytes == 288 * 2 // 8 + 4 * 8


@pytest.mark.parametrize("size", [0.7, 1.0, 3.0])
def test_a_scale_that_happens_to_be_one_is_stored_like_any_other(size):
    layer = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.full((8, 8), size))
    model = nn.Sequential(layer)
    lowbit.quantize_(model, lowbit.QuantConfig(weight=INQ(bits=4), first_last="same"))
    assert cost(model, (8,)).set_index("layer").bytes["0"] == 8 * 8 * 4 // 8 + 4


def test_uniform_weights_with_float_inputs_multiply_floats():
    frame = table(lowbit.quantize_(tiny(), lowbit.QuantConfig(weight=StatsQ(bits=2))))
    assert frame.loc["5"].float_multiplications == 512 and frame.loc["5"].integer_multiplications == 0


@pytest.mark.parametrize(
    ("levels", "kind", "bits"),
    [
        ([-1, 1], "addition", 1),
        ([-0.3, 0, 0.3], "addition", 2),
        ([-0.3, 0, 0.7], "addition", 2),  # two sums
        ([-2, -1, 1, 2], "shift", 2),
        ([-6, -3, 0, 3, 6], "shift", 3),  # a common factor belongs to the scale
        ([-2, -1, 0, 1], "shift", 2),
        ([-0.75, -0.25, 0.25, 0.75], "multiplication", 2),
        ([-4, -3, -2, -1, 0, 1, 2, 3], "multiplication", 3),
        ([0.0, 0.5, 1.0, 1.5], "multiplication", 2),
    ],
)
def test_what_is_left_of_a_multiplication(levels, kind, bits):
    levels = torch.tensor(levels, dtype=torch.float32)
    assert kind_of_product(levels) == kind and code_bits(levels) == bits


@pytest.mark.parametrize("name", names("weight"))
def test_every_method_has_a_cost(name):
    model = lowbit.quantize_(tiny(), lowbit.QuantConfig(weight=get(name)()))
    row = table(model).loc["2"]
    assert row.macs == MACS["2"] == row.additions
    assert row.float_multiplications + row.shifts in (0, MACS["2"]) and row.bytes < row.full_precision_bytes / 2


def test_known_totals_of_known_models():
    import torchvision

    meta = torchvision.models.ResNet18_Weights.DEFAULT.meta
    sums = totals(cost(torchvision.models.resnet18(), (3, 224, 224)))
    assert sums["macs"] / 1e9 == pytest.approx(meta["_ops"], abs=5e-4)
    statistics = 2 * 4800  # running means and variances of its 4,800 channels
    assert sums["weights"] == meta["num_params"] + statistics


@pytest.mark.parametrize("fused", [True, False])
def test_attention_products_are_counted_apart(fused):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8,
        patch_size=2,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=4,
        class_token=False,
        global_pool="avg",
    )
    for block in model.blocks:
        block.attn.fused_attn = fused
    lowbit.quantize_(model, lowbit.QuantConfig(weight=PoT(bits=3)))
    row = cost(model, (3, 8, 8)).set_index("layer").loc["(other matrix products)"]
    assert row.macs == row.float_multiplications == 2 * 2 * 16 * 16 * 24  # blocks · products · tokens² · channels
    assert row.weights == row.bytes == 0


def test_torch_attention_is_counted_in_full():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    frame = cost(model, (5, 8)).set_index("layer")
    # in_proj and out_proj: 5 tokens · 8 · (24 + 8), and two products of 5² · 8; both outside of called layers
    assert frame.macs.sum() == 5 * (2 * 8 * 16) + 5 * 8 * 32 + 2 * 25 * 8
    assert frame.loc["linear1"].macs == 5 * 8 * 16


def test_the_model_stays_as_it_was():
    model = lowbit.quantize_(tiny(), lowbit.QuantConfig(weight=LSQ(bits=3), activation=LSQ(bits=3)))
    before = copy.deepcopy(model.state_dict())
    cost(model, (3, 8, 8))
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model[2].input_quantizer.calibrated
    assert all(p.grad is None for p in model.parameters())


def test_activation_steps_are_shipped_but_not_of_the_original():
    model = lowbit.quantize_(tiny(), lowbit.QuantConfig(weight=LSQ(bits=3), activation=LSQ(bits=3)))
    lowbit.calibrate(model, torch.randn(4, 3, 8, 8))
    rest = table(model).loc["(rest)"]
    assert (rest.weights, rest.bytes, rest.full_precision_bytes) == (63, 252, 244)


@pytest.mark.parametrize(("bits", "latents"), [(2, 2), (3, 4), (4, 8)])
@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 3), ("adamw", 4)])
def test_training_memory_worked_by_hand(bits, latents, optimizer, copies):
    """Parameter, gradient and one or two states of 4 bytes for each latent."""
    model = lowbit.quantize_(tiny(), lowbit.QuantConfig(weight=DenseShift(bits=bits)))
    frame = training_memory(model, optimizer).set_index("layer")
    assert frame.index.tolist() == ["0", "2", "5", "6", "(rest)"]
    assert frame.latents.tolist() == [1, latents, latents, 1, 1]
    assert frame.weights.tolist() == [216, 288, 512, 80, 45]  # the rest: biases 29, batch normalization 16
    assert frame.bytes.tolist() == [n * copies * 4 for n in (216, 288 * latents, 512 * latents, 80, 45)]
    assert frame.full_precision_bytes.tolist() == [n * copies * 4 for n in frame.weights]
    assert frame.ratio.tolist() == [1, latents, latents, 1, 1]
    assert (frame.bytes == frame.parameter_bytes + frame.gradient_bytes + frame.state_bytes).all()
    real = {
        "sgd": torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        "adamw": torch.optim.AdamW(model.parameters()),
    }
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    real[optimizer].step()
    states = real[optimizer].state.values()
    assert frame.state_bytes.sum() == sum(t.nbytes for state in states for t in state.values() if t.ndim)


def test_training_memory_of_steps_and_of_frozen_parameters():
    model = lowbit.quantize_(tiny(), lowbit.QuantConfig(weight=LSQ(bits=3), activation=LSQ(bits=3)))
    lowbit.calibrate(model, torch.randn(4, 3, 8, 8))
    model[0].requires_grad_(False)
    frame = training_memory(model, "sgd").set_index("layer")
    assert frame.loc["2"].bytes == 12 * (288 + 1) and frame.loc["2"].full_precision_bytes == 12 * 288
    assert frame.loc["0"].bytes == 4 * 216
    # the rest: 45 and two activation steps, of which the 8 biases of "0" are not trained
    assert frame.loc["(rest)"].bytes == 4 * 47 + 8 * 39
    assert frame.loc["(rest)"].full_precision_bytes == 4 * 45 + 8 * 37


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost(tiny(), (1, 8, 8)), r"\[1, 1, 8, 8\].*without the batch"),
        (lambda: cost(tiny(), (4, 3, 8, 8)), r"\[1, 4, 3, 8, 8\]"),
        (lambda: training_memory(tiny(), "adam"), "optimizer='adam'.*'sgd'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(LowbitError, match=message):
        call()
