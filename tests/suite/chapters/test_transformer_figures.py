"""Figures of notebooks 11 to 14: what is drawn is what was given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lowbit_suite.chapters import transformer_figures


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_bars_have_the_height_of_the_shares():
    both = [(kind, qkr) for kind in ("weights only", "weights and activations") for qkr in ("without QKR", "with QKR")]
    rows = [
        {"quantized": kind, "attention": qkr, "seed": 0, "oscillating q, %": 3.0, "oscillating v, %": at}
        for at, (kind, qkr) in enumerate(both, 1)
    ]
    left, right = transformer_figures.restless_parts(pd.DataFrame(rows), ["q", "v"], 2).axes
    assert left.get_title("left") + left.get_title() == "weights only, 2 bits"
    assert [bar.get_height() for bar in left.patches if bar.get_width()] == [3, 1, 3, 2]
    assert [bar.get_height() for bar in right.patches if bar.get_width()] == [3, 3, 3, 4]


def test_flips_are_drawn_step_by_step_and_against_each_other():
    series = {part: np.arange(5) * k for k, part in enumerate(("q", "k", "fc1"), 1)}
    aside = {"q": np.arange(5.0), "k": np.arange(5.0) ** 2, "fc1": -np.arange(5.0)}
    left, middle, right = transformer_figures.flips(series, aside, "first").axes
    assert [line.get_ydata()[-1] for line in left.lines] == [4, 8, 12]
    assert middle.lines[0].get_ydata().tolist() == [0, 1, 4, 9, 16]
    assert "fc1: correlation -1.00" in right.get_title("left") + right.get_title()


def test_scales_go_on_where_the_training_ended():
    before = np.array([[1.0, 2.0], [2.0, 2.0]])
    after = {"no mask": np.array([[2.0, 2.0], [3.0, 2.0]]), "BR": np.array([[2.0, 2.0], [2.0, 2.0]])}
    both, phase = transformer_figures.scales(before, after).axes
    assert both.lines[2].get_xdata().tolist() == [1, 2] and both.lines[2].get_ydata().tolist() == [2, 3]
    assert phase.lines[0].get_ydata().tolist() == [0, 50]
    assert [text.get_text() for text in phase.get_legend().get_texts()] == ["no mask", "BR"]


def test_a_ladder_has_a_panel_for_each_width_and_the_last_rung_apart():
    rows = [
        {"rung": rung, "bits": bits, "seed": seed, "accuracy, %": 10 * bits + at + seed}
        for bits in (2, 3)
        for seed in (0, 1)
        for at, rung in enumerate(("LSQ", "StatsQ", "StatsQ + CGA"))
    ]
    names = ["LSQ", "StatsQ", "StatsQ + CGA"]
    panels = transformer_figures.ladder(pd.DataFrame(rows), names, ["a", "b", "c"], 50.0, "digits").axes
    for bits, ax in zip((2, 3), panels, strict=True):
        assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [
            [10 * bits, 10 * bits + 1],
            [10 * bits + 1, 10 * bits + 2],
        ]
        assert [bars[0].get_ydata()[0] for bars in ax.containers] == [10 * bits + at + 0.5 for at in range(3)]


def test_prices_are_one_line_a_rung():
    points = pd.DataFrame({"rung": ["LSQ", "LSQ", "StatsQ"], "kB": [1.0, 2.0, 3.0], "accuracy, %": [10.0, 20.0, 30.0]})
    (ax,) = transformer_figures.prices(points, 40.0, 1234.0, "t").axes
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["LSQ"].get_xdata().tolist() == [1, 2] and lines["StatsQ"].get_ydata().tolist() == [30]
    assert "full precision, 1,234 kB" in lines


def test_pairs_have_the_band_at_the_only_one_of_its_kind():
    given = {name: pd.Series([at - 1.0, at + 1.0]) for at, name in enumerate("abc")}
    (ax,) = transformer_figures.pairs(given, {"zero": 2, "sizes": 1}, 0.5, "t").axes
    (band,) = ax.patches
    assert (band.get_x(), band.get_width(), band.get_y() + band.get_height() / 2) == (-0.5, 1.0, 2.0)
    assert [bars[0].get_xdata()[0] for bars in ax.containers if hasattr(bars, "has_xerr")] == [0, 1, 2]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == ["alike: within 0.5 points", "sizes", "zero"]
