"""Notebook 18's figures draw the numbers of their tables."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from lowbit_suite import plotting
from lowbit_suite.chapters import question_figures


@pytest.fixture(autouse=True)
def style():
    plt.switch_backend("agg")
    plotting.use_style()
    yield
    plt.close("all")


def labels(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_masks_have_rows_in_order_and_gray_squares_for_controls():
    rows = [("no mask", None, 70.0), ("BR = 0.05", 3.0, 72.0), ("all held", 0.0, 71.0)]
    phases = pd.DataFrame(
        [{"mask": m, "may move, %": s, "accuracy, %": a, "oscillating, %": 1.0, "before, %": 69} for m, s, a in rows]
    )
    figure = question_figures.masks(phases, "X1")
    ax = figure.axes[0]
    assert labels(ax) == ["no mask", "BR = 0.05 (3 % may move)", "all held (0 % may move)"]
    means = [line for line in ax.lines if line.get_marker() in ("s", "o")]
    assert [(line.get_marker(), line.get_xdata()[0]) for line in means] == [("s", 70), ("o", 72), ("s", 71)]
    assert to_rgb(means[1].get_color()) == to_rgb(plotting.look("denseshift").color)
    assert [line.get_xdata()[0] for line in ax.lines if line.get_label() == "before the phase"] == [69]


def test_grids_share_one_axis_for_the_shares_and_tell_the_rounding_error():
    weights = torch.tensor([-1.0, -0.01, 0.5, 1.0])
    figure = question_figures.grids(weights, {"a": weights.sign(), "b": torch.tensor([-1.0, 0.0, 0.5, 1.0])})
    assert len({ax.get_ylim() for ax in figure.axes[2:]}) == 1
    assert "25.0 % of weights within 0.02" in figure.axes[0].get_title()  # -0.01 beside the threshold at zero
    assert f"SQNR {question_figures.sqnr(weights, weights.sign()):.1f} dB" in figure.axes[0].get_title()


def test_sqnr_by_hand():
    assert question_figures.sqnr(torch.tensor([10.0, -10.0]), torch.tensor([9.0, -9.0])) == pytest.approx(20)


def test_factorial_draws_cells_twin_and_effects():
    cells = {"mid-rise, follows": 60, "mid-rise, fixed": 61, "mid-tread, follows": 63, "mid-tread, fixed": 64}
    rows = [(*name.split(", "), "identity", name, value) for name, value in cells.items()]
    rows += [("mid-tread", "fixed", "masked", "mid-tread, fixed, masked", 62), (*["full precision"] * 4, 80)]
    results = pd.DataFrame(rows, columns=["grid", "scale", "gradient", "arm", "accuracy, %"])
    left, right = question_figures.factorial(results, {"grid": pd.Series([-3.0])}, 0.5, "X2").axes
    drawn = [list(line.get_ydata()) for line in left.lines]
    assert all(values in drawn for values in ([60, 61], [63, 64], [62], [80, 80]))
    assert labels(right) == ["grid"] and "within ±0.5 points" in right.get_legend().get_texts()[0].get_text()


def test_freezing_draws_what_still_moves_and_judged_correlations_as_dots():
    transfers = pd.DataFrame(
        {"arm": ["lsq", "s3"], "frozen, %": [99.0, 100.0], "target - twin, points": [-1.0, -5.0], "seed": 0}
    )
    values = {"a": [-0.5], "b": [float("nan")], "c": [0.2]}
    left, right = question_figures.freezing(transfers, values, "X3").axes
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in left.lines[:2]}
    assert points == {"lsq": (1.0, -1.0), "s3": (1e-3, -5.0)}, "no weight that moves is drawn at the left edge"
    assert [line.get_marker() for line in right.lines if line.get_marker() in ("o", "s")] == ["o", "s"]
    assert labels(right) == ["a", "b", "c"]
