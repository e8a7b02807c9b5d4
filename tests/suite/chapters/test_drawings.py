"""The schematic drawings: every text is readable, inside the figure and apart from the others, and described."""

from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import torch

import lowbit.functional as F
from lowbit_suite.chapters import drawings


@pytest.fixture(params=drawings.DRAWINGS)
def figure(request):
    drawn = drawings.DRAWINGS[request.param]()
    yield drawn
    plt.close(drawn)


def test_no_text_overlaps_another_or_leaves_the_figure(figure):
    renderer = figure.canvas.get_renderer()
    boxes = {
        text.get_text(): text.get_window_extent(renderer) for ax in figure.axes for text in ax.texts if text.get_text()
    }
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes.values())
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes.values())
    assert [(a, b) for (a, one), (b, other) in combinations(boxes.items(), 2) if one.overlaps(other)] == []


def test_text_is_readable_at_the_width_of_a_page(figure):
    assert figure.get_figwidth() <= 9
    assert all(text.get_fontsize() >= 11 for ax in figure.axes for text in ax.texts if text.get_text())


def test_each_has_an_alternative_text():
    assert drawings.ALT.keys() == drawings.DRAWINGS.keys()
    assert all(len(text) >= 40 for text in drawings.ALT.values())


def test_the_sign_scale_drawing_shows_the_weight_that_the_library_computes():
    latents = [torch.tensor([[t]]) for t in (-0.2, 0.5, -0.3, 0.4)]
    drawn = drawings.sign_scale()
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert {f"$t_{k} = {t.item():+.1f}$" for k, t in enumerate(latents) if k} <= {*texts}
    assert f"$w = -2^{{S_3}} = {F.denseshift(*latents).item():g}$" in texts
    plt.close(drawn)
