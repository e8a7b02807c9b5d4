"""Notebook 16's figures show what is in the files, plans and records they are given."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import lowbit
from lowbit.kernels import native
from lowbit.nn.packed import PackedLayer
from lowbit.quantizers import LSQ, StatsQ
from lowbit_suite.chapters import deploy_figures, deployed


@pytest.fixture(autouse=True)
def closed():
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def network():
    """A quantized ResNet-8 and the packed one."""
    torch.manual_seed(0)
    model = lowbit.models.create("resnet8", num_classes=10, in_chans=1, img_size=8)
    lowbit.quantize_(model, lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8), first_last=8))
    lowbit.calibrate(model, torch.rand(4, 1, 8, 8))
    return model.eval(), lowbit.pack(model.eval())


def test_the_parts_of_a_file_add_up_to_it(network, tmp_path):
    file = lowbit.save(network[1], tmp_path / "packed.safetensors")
    parts = deployed.parts(network[1], file)
    assert sum(parts.values()) == file.stat().st_size and all(value > 0 for value in parts.values())
    assert parts["8-bit layers"] == sum(m.data.numel() for m in network[1].modules() if getattr(m, "bits", 0) == 8)


def test_the_input_of_a_layer_is_what_it_gets(network):
    x = torch.rand(2, 1, 8, 8)
    first = next(module for module in network[1].modules() if isinstance(module, PackedLayer))
    assert torch.equal(deployed.input_of(network[1], first, x), x) and not first._forward_pre_hooks


def test_bars_have_the_sizes_of_files_and_parts():
    files = pd.DataFrame({"model": "m", "file": ["full precision", "packed"], "bytes": [4000, 1000]})
    left, right = deploy_figures.sizes(files, {"m": {"codes": 700, "header": 300}}).axes
    assert [bar.get_width() for bar in left.patches] == [4, 1]
    assert [(bar.get_x(), round(bar.get_width(), 9)) for bar in right.patches] == [(0, 0.7), (0.7, 0.3)]


def test_a_layer_s_corner_shows_integers_and_scales(network):
    name, layer = next((n, m) for n, m in network[1].named_modules() if isinstance(m, PackedLayer) and m.bits == 3)
    axes = deploy_figures.folded(network[0].get_submodule(name).weight.detach(), layer).axes
    drawn = np.array([float(text.get_text()) for text in axes[1].texts]).reshape(8, 8)
    assert np.array_equal(drawn, layer.weight.integers()[:8, :8, 1, 1])


def test_nothing_that_differs_is_drawn_on_the_lowest_line():
    shares = {"values that differ, %": [0.0, 50.0], "integers that differ, %": [0.0, 0.0]}
    (ax,) = deploy_figures.rounding(pd.DataFrame({"model": "m", "index": [0, 1], "numbers": 1000, **shares})).axes
    least = 100 / 1000 / 3
    assert [line.get_ydata().tolist() for line in ax.lines] == [[least, 50], [least, least]]


@pytest.mark.skipif(not native.available(), reason="a plan needs the compiled kernels")
def test_a_plan_is_drawn_whole_and_no_two_values_overlap_in_memory(network):
    plan = lowbit.plan(network[1], threads=1)
    count = len(plan.operations())
    flow, memory, times = deploy_figures.plan(plan, np.arange(1.0, count + 1)).axes
    assert len(flow.patches) == count and [bar.get_height() for bar in times.patches] == [
        1e6 * (i + 1) for i in range(count)
    ]
    inputs = {(at, tensor) for at, row in enumerate(plan.operations()) for tensor in row["inputs"] if tensor > 1}
    assert len(flow.lines) == len(inputs)
    boxes = [patch.get_bbox() for patch in memory.patches]
    assert max(box.y1 for box in boxes) == pytest.approx(plan.arena_bytes / 1000)
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            together = min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5  # one ends, the next begins: they share an operation
            assert not (together and min(a.y1, b.y1) - max(a.y0, b.y0) > 1e-9)


def test_each_peer_is_shown_by_its_fastest_variant_and_lowbit_by_one_plan():
    recorded = json.loads(lowbit.paths.recorded("bench/models.json").read_text())
    case = [row for row in recorded if row["case"] == "resnet18, 224 px, batch 1"]
    ax = deploy_figures.peers().axes[1]
    shown = dict(zip([label.get_text() for label in ax.get_yticklabels()], ax.patches, strict=True))
    assert [name.split()[0] for name in shown] == ["torch", "onnxruntime", "openvino", "lowbit"]
    for name, bar in shown.items():
        rivals = [row["median"] for row in case if row["engine"].startswith(name.split()[0])]
        own = next(row["median"] for row in case if row["engine"] == name)
        assert bar.get_width() == own and (own == min(rivals) or name == "lowbit 3-bit plan")


def test_missing_records_are_said_aloud(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lowbit.paths, "recorded", lambda name: tmp_path / name)
    assert deploy_figures.peers() is None and deploy_figures.peers_caption() == ""
    assert "not here" in capsys.readouterr().out
