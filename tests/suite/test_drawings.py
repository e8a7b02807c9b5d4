"""The schematic drawings say what the library does, and every one has a description."""

import inspect

import matplotlib.pyplot as plt
import pytest
import torch

from lowbit.kernels.packing import pack
from lowbit.quantizers.denseshift import denseshift
from lowbit_suite import drawings

DRAWN = [
    name for name, each in inspect.getmembers(drawings, inspect.isfunction) if each.__module__ == drawings.__name__
]
DRAWN = [name for name in DRAWN if not name.startswith("_") and name != "layout"]


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_every_drawing_is_described():
    assert set(DRAWN) == set(drawings.ALT) and all(len(text) > 100 for text in drawings.ALT.values())


@pytest.mark.parametrize("name", DRAWN)
def test_it_draws_within_its_picture(name):
    figure = getattr(drawings, name)()
    figure.canvas.draw()
    for ax in figure.axes:
        for text in ax.texts:
            low, high = text.get_window_extent().get_points()
            width, height = figure.canvas.get_width_height()
            assert low[0] > -0.02 * width and high[0] < 1.02 * width and low[1] > -0.02 * height, text.get_text()
    plt.close(figure)


@pytest.mark.parametrize("latents", [(0.4, -0.3, 0.6, 0.2), (-0.1, 0.3, 0.6, 0.2), (0.2, 0.5, 0.5, -0.1)])
def test_the_recursion_ends_with_the_library_s_weight(latents):
    weight = float(denseshift(*map(torch.tensor, latents)))
    figure = drawings.sign_scale(latents)
    (last,) = [text for text in texts(figure) if text.startswith("$w$")]
    assert last.endswith(f"= {weight:g}") and ("−" in last) == (weight < 0)
    counts = [int(text.removeprefix("count ")) for text in texts(figure) if text.startswith("count ")]
    assert 2 ** counts[-1] == abs(weight) and f"^{{{counts[-1]}}}" in last
    plt.close(figure)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_layout_drawn_is_that_of_packed_codes(bits):
    parts = drawings.layout(bits)
    rows = {row for part in parts for row in part}
    for row in rows:
        codes = torch.zeros(16, 64, dtype=torch.int64)
        codes[:, 4 * row : 4 * row + 4] = 2**bits - 1
        packed = pack(codes, bits)[0, : 64 * len(parts)].view(len(parts), 64)
        for part, rows_of_bits in zip(packed, parts, strict=True):
            expected = sum(1 << bit for bit, owner in enumerate(rows_of_bits) if owner == row)
            assert part.unique().tolist() == [expected]


def test_weights_that_may_move_lie_in_the_zones_drawn():
    figure = drawings.annealing_zones(0.1)
    held, movable = (line for line in figure.axes[0].lines if line.get_label() in ("held", "may move"))
    zones = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in figure.axes[0].patches]
    inside = [any(low <= x <= high for low, high in zones) for x in movable.get_xdata()]
    outside = [all(not low < x < high for low, high in zones) for x in held.get_xdata()]
    assert len(zones) == 3 and len(inside) > 5 and all(inside) and all(outside)
    plt.close(figure)
