"""`evaluate` and `reestimate_batchnorm_`, outside a training run."""

import copy

import pytest
import torch

import lowbit
from lowbit.nn import quantized_layers
from lowbit.quantizers import LSQ, StatsQ


@pytest.fixture(scope="module")
def digits():
    return lowbit.data.load("digits")


@pytest.fixture(scope="module")
def model():
    return lowbit.models.create("resnet20", in_chans=1, img_size=8, pretrained="digits")


def test_accuracy_and_loss_equal_a_plain_loop(model, digits):
    x = (digits.test.x.float() / 255 - digits.mean[0]) / digits.std[0]
    with torch.no_grad():
        logits = model.eval()(x)
    found = lowbit.training.evaluate(model, digits, batch_size=100)
    assert found["acc"] == (logits.argmax(1) == digits.test.y).double().mean().item()
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, digits.test.y).item(), rel=1e-5)


def test_activations_are_calibrated_on_training_images(model, digits):
    quantized = lowbit.quantize_(copy.deepcopy(model), lowbit.QuantConfig(activation=LSQ(bits=4)))
    lowbit.training.evaluate(quantized, digits.subset(test=7))
    assert all(q.activation.calibrated for q in quantized_layers(quantized))
    again = lowbit.quantize_(copy.deepcopy(model), lowbit.QuantConfig(activation=LSQ(bits=4)))
    lowbit.training.evaluate(again, digits.subset(test=200))
    for a, b in zip(quantized_layers(quantized), quantized_layers(again), strict=True):
        assert torch.equal(a.activation.step, b.activation.step)  # whatever the test images


def test_reestimated_statistics_are_those_of_the_training_images(model, digits):
    """Of the first layer, whose input does not depend on other statistics; weights and momentum stay."""
    changed = copy.deepcopy(model)
    before = copy.deepcopy(changed.state_dict())
    changed.bn1.running_mean.add_(5)
    lowbit.training.reestimate_batchnorm_(changed, digits, batch_size=479)  # 3 · 479 = all 1,437
    x = (digits.train.x.float() / 255 - digits.mean[0]) / digits.std[0]
    with torch.no_grad():
        expected = changed.conv1(x).mean((0, 2, 3))
    assert torch.allclose(changed.bn1.running_mean, expected, atol=1e-4)
    assert changed.bn1.momentum == model.bn1.momentum and not changed.training
    for name, tensor in changed.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, before[name])


def test_reestimation_undoes_what_clipping_did_to_a_rounded_network(model, digits):
    rounded = lowbit.quantize_(copy.deepcopy(model), lowbit.QuantConfig(weight=StatsQ(bits=4)))
    stale = lowbit.training.evaluate(rounded, digits)["acc"]
    fresh = lowbit.training.evaluate(lowbit.training.reestimate_batchnorm_(rounded, digits), digits)["acc"]
    assert stale < 0.5 < 0.9 < fresh


def test_a_model_without_batchnorm_is_left_alone(digits):
    model = lowbit.models.create("vit_nano", in_chans=1, img_size=8)
    before = copy.deepcopy(model.state_dict())
    lowbit.training.reestimate_batchnorm_(model, digits)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
