"""The sweep over other libraries' models: what it counts as working, refused and failed."""

import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from tools import sweep_models
from tools.sweep_models import compare, sweep, table, wake_

SMALL = ("timm", "starnet_s050")


def test_the_list_has_each_family_once():
    models = [tuple(line.split()) for line in sweep_models.MODELS.read_text().splitlines()]
    assert len(models) == len(set(models)) >= 60
    known = {"timm": set(timm.list_models()), "torchvision": set(torchvision.models.list_models())}
    assert all(name in known[library] for library, name in models)


@pytest.mark.slow
def test_a_model_works():
    row = sweep(*SMALL)
    assert row.outcome == "works" and int(row.values["packed"]) == 23 and row.values["share"] == "99%", row
    assert "1 of 1 models work, 0 are refused by name, 0 fail. 1 become plans" in table([row])
    assert row.values["plan"] == "yes"
    assert "| `timm starnet_s050` | 64 |" in table([row])


@pytest.mark.slow
def test_a_refusal_of_plans_is_told_and_counts_as_no_failure(monkeypatch):
    def refuse(*_):
        raise LowbitError("a dance is not an operation of plans")

    monkeypatch.setattr(sweep_models.lowbit, "plan", refuse)
    row = sweep(*SMALL)
    assert row.outcome == "works" and "a dance" in row.values["plan"]
    assert "0 fail. 0 become plans" in table([row])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (LowbitError("no layer\nmore"), "pack refuses: no layer"),
        (ValueError("a | b"), r"**pack fails**: ValueError: a \| b"),
    ],
)
def test_refusals_and_failures_are_counted_apart(error, outcome, monkeypatch):
    def broken(*_):
        raise error

    monkeypatch.setattr(lowbit, "pack", broken)
    row = sweep(*SMALL)
    assert row.outcome == outcome
    refused = outcome.startswith("pack refuses")
    assert f"0 of 1 models work, {int(refused)} are refused by name, {int(not refused)} fail" in table([row])


class Scaled(nn.Module):
    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(x) * self.factor


def test_another_answer_is_a_failure():
    model, x = nn.Linear(6, 4), torch.randn(2, 6)
    assert compare(model, model, x)[0] == 0
    with pytest.raises(RuntimeError, match="more than rounding explains"):
        compare(model, Scaled(model, 1.001), x)
    with pytest.raises(RuntimeError, match="both images have the same answer"):
        compare(Scaled(model, 0.0), model, x)


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


@pytest.mark.parametrize("middle", [nn.ReLU(), Sine()])
def test_a_plan_is_compared_and_a_refusal_has_its_reason(middle, monkeypatch):
    model, x = nn.Sequential(nn.Linear(6, 8), middle, nn.Linear(8, 4)), torch.randn(2, 6)
    sweep_models.quantize(model)
    lowbit.calibrate(model, x)
    packed = lowbit.pack(model, x)
    found = sweep_models.plan(packed, x, 1e-7)
    if isinstance(middle, Sine):
        assert "sin is not an operation of plans" in found
        return
    assert found == "yes"
    monkeypatch.setattr(lowbit, "plan", lambda packed, x: Scaled(packed, 1.001))
    with pytest.raises(RuntimeError, match="the plan answers otherwise"):
        sweep_models.plan(packed, x, 1e-7)


def test_parameters_that_start_at_zero_are_woken():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    nn.init.zeros_(model[0].weight)
    wake_(model)
    assert all(parameter.abs().max() > 1e-2 for parameter in model.parameters()) and model[1].momentum == 1


def test_a_name_that_is_not_listed_is_refused():
    done = subprocess.run([sys.executable, sweep_models.__file__, "no_such_model"], capture_output=True, text=True)
    assert done.returncode == 2 and "no_such_model: not among" in done.stderr
