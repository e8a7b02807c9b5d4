"""Notebook 15's figures put what they are given where they say."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from lowbit_suite import plotting
from lowbit_suite.chapters import kernel_figures


@pytest.fixture(autouse=True)
def closed():
    plt.switch_backend("agg")
    yield
    plt.close("all")


PLACES = pd.DataFrame(
    [(0, 0, 0, 0, 0), (0, 0, 1, 0, 1), (15, 31, 2, 191, 7)], columns=["n", "k", "code_bit", "byte", "bit"]
)


def test_the_layout_has_each_bit_in_its_byte_in_the_color_of_its_inputs():
    grid = kernel_figures.layout(PLACES).axes[0].images[0].get_array()
    assert grid.shape == (24, 64)
    assert (grid[0, 0], grid[1, 0], grid[23, 63]) == (0, 0, 7)


def test_the_magnified_layout_writes_input_and_place_value():
    texts = [text.get_text() for ax in kernel_figures.layout_zoom(PLACES).axes for text in ax.texts]
    assert texts == ["k=0: 1", "k=0: 2"]


def test_additions_to_halves_are_called_right_or_wrong():
    examples = {"normal": (0.5, 4.0), "zero": (0.0, 0.0), "one": (1.0, 8.0), "top": (40000.0, float("inf"))}
    titles = [ax.get_title("left") for ax in kernel_figures.half_additions(examples, 3 << 10).axes]
    assert [title.endswith("right") for title in titles] == [True, False, True, False]


def test_products_of_halves_are_sorted_into_right_and_wrong_ones():
    x = torch.tensor([2.0**-20, 1.0, 20000.0, 40000.0], dtype=torch.float16)
    got = torch.tensor([2.0**-12, 8.0, float("nan"), -1e-4], dtype=torch.float16)
    lines = {line.get_label(): line for line in kernel_figures.half_products(x, got, 8 * x.double()).axes[0].lines}
    assert lines["exponent-add, right"].get_xdata().tolist() == [1.0]
    assert lines["exponent-add of subnormal numbers"].get_xdata().tolist() == [2.0**-20]
    assert lines["sign flipped (magnitude drawn)"].get_xdata().tolist() == [40000.0]


def test_every_timed_layer_is_under_the_roofs():
    points = pd.DataFrame(
        {
            "size": 64, "rows": [1, 1, 8], "weights": ["in cache", "from memory", "in cache"], "bits": [32, 3, 3],
            "read MiB": [0.1, 256, 0.1], "GB/s": [10.0, 2, 1], "GOP/s": [5.0, 11, 30],
        }
    )  # fmt: skip
    reading = pd.DataFrame({"bytes": [2**17, 2**28], "GB/s": [50.0, 10.0]})
    left, right = kernel_figures.roofline(points, reading, {"float32": 100.0, "8 bits": 400.0}).axes
    assert [line.get_ydata()[0] for line in left.lines[1:]] == [10, 2]  # the first is the curve; only M = 1 is read
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in right.lines[3:]] == [
        (0.5, 5), pytest.approx((16 / 3, 11)), pytest.approx((128 / 3, 30)),
    ]  # fmt: skip
    assert max(right.lines[1].get_ydata()) == 400


def test_speeds_are_medians_with_a_dot_for_each_round():
    ratios = pd.concat(
        {"a": pd.DataFrame({"x": [1.0, 2, 9], "y": [3.0, 3, 3]}), "b": pd.DataFrame({"x": [4.0], "y": [5.0]})}
    )
    (ax,) = plotting.speeds({"one": ratios}, "speed").axes
    assert [bar.get_y() + bar.get_height() for bar in ax.patches] == [2, 4, 3, 5]
    assert sorted(np.concatenate([line.get_ydata() for line in ax.lines[:-1]])) == [1, 2, 3, 3, 3, 4, 5, 9]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
