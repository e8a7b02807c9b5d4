"""Benchmarks: the arithmetic of their results, and that every engine really steps. How fast is not tested."""

import gc

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks import training
from benchmarks.report import summarize
from lowbit_suite.app import app


def test_ratio_is_the_median_of_each_rounds_ratio():
    results = summarize("case", {"base": [1.0, 2.0, 4.0], "other": [2.0, 2.0, 12.0]}, "base")
    base, other = results
    assert base["ratio"] == 1 and other["ratio"] == 2  # ratios 2, 1, 3; the ratio of medians would be 1
    assert base["median"] == 2000 and other["unit"] == "ms" and other["repeats"] == 3


def test_an_unknown_model_is_refused():
    result = CliRunner().invoke(app, ["bench", "training", "--model", "vgg"])
    assert result.exit_code == 2 and "vit-d192" in result.stderr


EXPECTED = {
    training.engines: {"fp32", "lsq eager", "statsq eager"},
    training.shift_engines: {
        "fp32",
        *(f"denseshift {bits}-bit eager" for bits in (2, 3, 4)),
        "denseshift 3-bit eager, tracked",
    },
    training.ofq_engines: {
        "fp32",
        *(f"ofq W2A2{qkr} eager{tracked}" for qkr in ("", " + QKR") for tracked in ("", ", tracked")),
    },
    training.study_vit_engines: {"as before", "stored answers"},
    training.study_qkr_engines: {"as before", "stored answers"},
    training.study_resnet_engines: {"as before"},
}


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


@pytest.mark.parametrize("name", [name for name in training.CASES if not name.endswith("-small")])  # as their namesakes
def test_eager_engines_take_a_step_that_changes_their_weights(name):
    torch.manual_seed(0)
    case = training.CASES[name]
    pixels = 64 if "swin" in name else 32  # Swin's last windows would hold one token, which attends to itself only
    x, y = torch.randn(4, 3, pixels, pixels), torch.randint(10, (4,))
    shift = case.engines is training.shift_engines  # the ResNet-18 of "resnet18", whose latents take a minute
    model = small_network() if shift else case.make(pixels)
    with torch.no_grad():  # evenly spread attention, as an untrained model has it, is all zeros at 2 bits
        for attention in (module for module in model.modules() if hasattr(module, "qkv")):
            attention.qkv.weight.mul_(5)
    made = case.engines(model, x, y)
    eager = [e for e in made if "compile" not in e.name and "W4" not in e.name]
    assert EXPECTED[case.engines] <= {engine.name for engine in eager}
    del made
    while eager:  # each goes when it has stepped: all together, with gradients and moments, take gigabytes
        engine = eager.pop()
        parameters = list(engine.model.parameters())
        before = [p.detach().clone() for p in parameters]
        engine.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
        del engine, parameters, before
        gc.collect()  # parametrized layers are part of cycles


def test_the_tracked_engine_looks_at_every_step(monkeypatch):
    looks = []
    monkeypatch.setattr("lowbit.metrics.FreezingTracker.update", lambda self: looks.append(self.codes.size))
    made = training.shift_engines(small_network(), torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    (tracked,) = (engine for engine in made if engine.name.endswith("tracked"))
    tracked.step()
    tracked.step()
    assert looks == [8 * 4 * 3 * 3] * 2  # the first and the last layer are not shifts
