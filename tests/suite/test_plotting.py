"""The course's drawings put what they are given where they say."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import metrics
from lowbit_suite import plotting


@pytest.fixture
def ax():
    plt.switch_backend("agg")
    plotting.use_style()
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_matrix_writes_every_number(ax):
    plotting.matrix(ax, torch.tensor([[1.0, -2.5], [0.25, 0.0]]))
    assert sorted(text.get_text() for text in ax.texts) == ["-2.50", "0.00", "0.25", "1.00"]


def test_an_empty_range_does_not_break_the_colors(ax):
    plotting.matrix(ax, torch.zeros(2, 2))


def test_weights_on_grid_marks_levels_shares_and_thresholds(ax):
    weight = torch.tensor([-0.5, -0.5, -0.5, 0.5])
    plotting.weights_on_grid(ax, torch.tensor([-0.4, -0.7, -0.1, 0.9]), weight)
    share = ax.figure.axes[1]
    x, y = share.lines[0].get_data()
    assert x.tolist() == [-0.5, 0.5] and y.tolist() == [75, 25]
    assert [line.get_xdata()[0] for line in ax.lines] == [0.0]


def test_trajectory_shows_only_thresholds_in_view(ax):
    plotting.trajectory(ax, [0.4, 0.6, 0.4], [0, 1, 0], [-1.5, 0.5, 7.0])
    assert [line.get_ydata()[0] for line in ax.lines[:-2]] == [0.5]


def test_number_line_has_a_row_for_each_set(ax):
    plotting.number_line(ax, {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([-1.0])})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]


def test_save_goes_to_the_runs_folder(ax, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CONTEXT", json.dumps({"figures": str(tmp_path / "figures")}))
    path = plotting.save(ax.figure, "name")
    assert path == tmp_path / "figures" / "name.png" and path.read_bytes().startswith(b"\x89PNG")


def test_seaborn_draws_the_interval_that_is_judged(ax):
    values = [1.0, 2.0, 4.0, 8.0, 9.0]
    sns.pointplot(pd.DataFrame({"x": "a", "y": values}), x="x", y="y", errorbar=plotting.interval, ax=ax)
    drawn = sorted({y for line in ax.lines for y in line.get_ydata() if math.isfinite(y)})
    assert np.allclose(drawn, sorted(metrics.interval(values)))


def test_one_seed_has_no_interval(ax):
    sns.pointplot(pd.DataFrame({"x": ["a"], "y": [1.0]}), x="x", y="y", errorbar=plotting.interval, ax=ax)
    assert {y for line in ax.lines for y in line.get_ydata() if math.isfinite(y)} == {1.0}


@pytest.mark.parametrize("panel", [None, "bits"])
def test_learning_rates_ring_what_was_chosen(panel):
    rows = [
        ("a", 2, 0.3, 60.0, False),
        ("a", 2, 1.0, 70.0, True),
        ("b", 3, 0.3, 50.0, True),
        ("b", 3, 1.0, float("nan"), False),
    ]
    rates = pd.DataFrame(rows, columns=["method", "bits", "lr_factor", "accuracy, %", "chosen"])
    figure = plotting.learning_rates(rates, "method", panel)
    rings = [
        xy
        for ax in figure.axes
        for line in ax.lines
        if line.get_markersize() == 13
        for xy in line.get_xydata().tolist()
    ]
    assert rings == [[1.0, 70.0], [0.3, 50.0]]
    assert len(figure.axes) == (2 if panel else 1)
    plt.close(figure)


@pytest.mark.parametrize("arms", [2, 11, 14])
def test_learning_rates_can_be_told_apart(arms):
    rows = [(f"method {i}", x, 50.0 + i, x == 1) for i in range(arms) for x in (0.3, 1.0)]
    figure = plotting.learning_rates(
        pd.DataFrame(rows, columns=["method", "lr_factor", "accuracy, %", "chosen"]), "method"
    )
    (ax,), (legend,) = figure.axes, figure.legends
    looks = {(line.get_color(), line.is_dashed()) for line in ax.lines if line.get_markersize() != 13}
    assert len(looks) == arms
    box = legend.get_window_extent(figure.canvas.get_renderer())
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    plt.close(figure)


def test_apart_worked_by_hand():
    """Two in one place go half the distance each; a third that is near is pushed along, one that is far stays."""
    assert plotting.apart([5.0, 5.0], 2).tolist() == [4, 6]
    assert plotting.apart([9.0, 0.0, 0.0, 1.0], 1).tolist() == pytest.approx([9, -2 / 3, 1 / 3, 4 / 3])


@given(st.lists(st.integers(-50, 50), max_size=20), st.integers(0, 9))
def test_apart_keeps_order_distance_and_what_is_apart_already(values, least):
    placed = plotting.apart(values, least)
    order = np.argsort(values, kind="stable")
    assert (np.diff(placed[order]) >= least - 1e-9).all()
    assert sum(placed) == pytest.approx(sum(values), abs=1e-6)
    assert plotting.apart(placed, least) == pytest.approx(placed, abs=1e-6)
