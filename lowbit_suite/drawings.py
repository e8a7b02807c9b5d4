"""Schematic drawings: what a picture teaches faster than a formula. Each function returns a figure; `ALT` describes it.

They draw from the library's own functions where these decide something: which gates are open, which weights are held,
which bit a code gets.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from lowbit.functional import cga_mask, statsq, statsq_scale
from lowbit.kernels.packing import TOP_BIT
from lowbit.quantizers.denseshift import denseshift
from lowbit_suite import plotting

INK, QUIET, FILL, STRONG = "0.15", "0.55", "#eaf2fb", plotting.PARTS[0]

ALT = {
    "sign_scale": "The sign-scale recursion for 3 bits on an example: latents of a sign and three gates; the first "
    "gate is closed and the others open, so the counts after each gate are 0, 1 and 2, and the weight is plus 2 to the "
    "power of 2, that is 4.",
    "query_key": "Two graphs. Left, separate quantizers: the input goes through rounded query and rounded key weights, "
    "whose outputs are multiplied, so each weight's gradient contains the other, rounded one. Right, query-key "
    "reparameterization: both weights, in full precision, are multiplied first; only the product of a head is rounded.",
    "annealing_zones": "A row of latent weights on an axis with the three thresholds of a 2-bit grid. A narrow zone "
    "around each threshold is shaded: weights inside it may move, all others are held.",
    "packed_layout": "Sixteen outputs by four neighboring inputs form a row of 64 codes. With 2 bits, four rows share "
    "64 bytes, two bits each; with 3 bits, eight rows share 192 bytes: low bits of rows 0 to 3, low bits of rows 4 to "
    "7, and one byte of top bits, one for each row; with 4 bits, two rows share 64 bytes.",
    "suite": "From left to right: a notebook with parameters runs in a process of its own and leaves numbers, tables "
    "and figures; check compares them with the accepted ones; the study's trainings write journals, from which claims "
    "with conditions become verdicts; the report shows all of it.",
}


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure, ax = plt.subplots(figsize=(width, height))
    ax.set_axis_off()
    ax.grid(False)
    return figure, ax


def _box(
    ax: Axes, x: float, y: float, text: str, width: float = 1.5, height: float = 0.62, strong: bool = False
) -> None:
    style = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.1",
        facecolor=FILL if strong else "white",
        edgecolor=STRONG if strong else QUIET,
        linewidth=1.8 if strong else 1.1,
    )
    ax.add_patch(style)
    ax.text(x, y, text, ha="center", va="center", fontsize=10, color=INK)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=12,
            color=QUIET,
            shrinkA=0,
            shrinkB=0,
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def sign_scale(latents: tuple[float, float, float, float] = (0.4, -0.3, 0.6, 0.2)) -> Figure:
    """DenseShift's recursion for 3 bits: how a sign and three gates make a weight.

    Args:
        latents: the sign latent and those of the three gates.
    """
    weight = float(denseshift(*(torch.tensor(t) for t in latents)))
    figure, ax = _canvas(9, 2.9)
    ax.set(xlim=(-0.2, 11.3), ylim=(-1.15, 2.0))
    count = 0
    columns = (2.6, 5.0, 7.4)
    _box(ax, 0.75, 1.4, f"$t_{{sign}}$ = {latents[0]:.1f}")
    _box(ax, 0.75, 0, "count 0", width=1.3)
    before = 0.75 + 0.65
    for k, (x, t) in enumerate(zip(columns, latents[1:], strict=True), 1):
        is_open = t > 0
        count = (count + 1) * is_open
        _box(ax, x + 0.2, 1.4, f"$t_{k}$ = {t:.1f}\n{'open' if is_open else 'closed'}", strong=is_open)
        _box(ax, x + 0.2, 0, f"count {count}", width=1.3, strong=is_open)
        _arrow(ax, (before, 0), (x + 0.2 - 0.68, 0))
        _arrow(ax, (x + 0.2, 1.4 - 0.34), (x + 0.2, 0.34))
        ax.text((before + x - 0.48) / 2, 0.42, "+ 1" if is_open else "back to 0", ha="center", fontsize=9, color=INK)
        before = x + 0.2 + 0.66
    _box(ax, 10.35, 0, f"$w$ = {'+' if weight > 0 else '−'} $2^{{{count}}}$ = {weight:g}", width=1.8, strong=True)
    _arrow(ax, (before, 0), (9.42, 0))
    ax.plot([0.75, 0.75, 10.35], [1.75, 1.95, 1.95], color=QUIET, lw=1.1)
    _arrow(ax, (10.35, 1.95), (10.35, 0.35))
    ax.text(10.45, 1.4, "sign", fontsize=9, color=INK)
    ax.text(5.0, -0.85, "a closed gate starts the count again; an open one adds 1", ha="center", fontsize=10, color=INK)
    return figure


def query_key() -> Figure:
    """Query-key reparameterization: where the rounding stands without and with it."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for ax, title in zip(axes, ("rounded one by one", "reparameterized"), strict=True):
        ax.set_axis_off()
        ax.grid(False)
        ax.set(xlim=(0, 8), ylim=(0, 5.2))
        ax.set_title(title, fontsize=11)
    left, right = axes
    for y, name in ((4.2, "Q"), (2.2, "K")):
        _box(left, 1.1, y, f"$W_{name}$")
        _box(left, 3.6, y, f"round $W_{name}$", width=1.9, strong=True)
        _arrow(left, (1.87, y), (2.63, y))
        _arrow(left, (4.57, y), (5.5, 3.4 if name == "Q" else 3.0))
    _box(left, 6.5, 3.2, r"$x\,\hat W_Q^T \hat W_K\,x^T$", width=1.95)
    left.text(
        4, 0.75, "each gradient contains the other\nweight, rounded: one flip disturbs both", ha="center", fontsize=10
    )
    for y, name in ((4.2, "Q"), (2.2, "K")):
        _box(right, 0.9, y, f"$W_{name}$", width=1.2)
        _arrow(right, (1.52, y), (2.3, 3.4 if name == "Q" else 3.0))
    _box(right, 3.1, 3.2, "$M = W_Q^T W_K$", width=1.65)
    _box(right, 5.2, 3.2, "round $M$", width=1.5, strong=True)
    _box(right, 7.2, 3.2, r"$x\,\hat M\,x^T$", width=1.3)
    _arrow(right, (3.95, 3.2), (4.43, 3.2))
    _arrow(right, (5.97, 3.2), (6.53, 3.2))
    right.text(
        4,
        0.75,
        "gradients contain full-precision weights;\none matrix is rounded for each head",
        ha="center",
        fontsize=10,
    )
    return figure


def annealing_zones(boundary: float = 0.1) -> Figure:
    """Confidence-guided annealing on a latent axis: which weights may move.

    Args:
        boundary: BR, the half width of the zones in steps. OFQ has 0.005, too narrow to draw.
    """
    generator = torch.Generator().manual_seed(4)
    latent = torch.randn(1, 60, generator=generator)
    step = float(statsq_scale(latent)) / 2
    movable = cga_mask(latent, 2, boundary)[0].bool()
    figure, ax = plt.subplots(figsize=(9, 2.3))
    for threshold in (-step, 0.0, step):
        ax.axvspan(threshold - boundary * step, threshold + boundary * step, color=FILL, zorder=0)
        ax.axvline(threshold, color=STRONG, lw=1)
    heights = np.linspace(0.15, 0.85, 60)[torch.randperm(60, generator=generator).numpy()]
    values = latent[0].numpy()
    ax.plot(values[~movable], heights[~movable], "o", color=QUIET, ms=5, label="held")
    ax.plot(values[movable], heights[movable], "D", color=plotting.PARTS[1], ms=6, label="may move")
    levels = statsq(latent, 2).unique()
    ax.set(xlim=(-2.6, 2.6), ylim=(0, 1), yticks=[], xlabel="latent weight")
    ax.set_xticks([float(level) for level in levels], [f"level {k}" for k in range(len(levels))])
    ax.grid(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    ax.set_title("a narrow zone around each threshold", fontsize=11)
    return figure


def packed_layout() -> Figure:
    """The layout "N16K4" of packed codes: which row of 64 codes has which bits of a byte, for 2, 3 and 4 bits."""
    figure, (ax, *bits_axes) = plt.subplots(
        1, 4, figsize=(9, 3.1), gridspec_kw={"width_ratios": [1.25, 1, 2.2, 1], "wspace": 0.3}
    )
    colors = [plotting.PALETTE[i] for i in (0, 1, 2, 3)]
    ax.set(xlim=(-0.2, 4.2), ylim=(16.6, -1.6))
    for n in range(16):
        for k in range(4):
            ax.add_patch(Rectangle((k, n), 1, 1, facecolor=FILL, edgecolor=QUIET, lw=0.6))
    ax.text(2, -0.4, "4 inputs", ha="center", fontsize=9)
    ax.text(-0.35, 8, "16 outputs", va="center", ha="right", rotation=90, fontsize=9)
    ax.set_title("a row: 64 codes", fontsize=10)
    layouts = {bits: layout(bits) for bits in (2, 3, 4)}
    for axes, (bits, parts) in zip(bits_axes, layouts.items(), strict=True):
        axes.set(xlim=(-0.1, 3.3 * len(parts) - 0.1), ylim=(8.7, -1.6))
        for part, rows in enumerate(parts):
            for bit, row in enumerate(rows):
                x = 3.3 * part
                face = (*colors[row % 4], 0.35 if row < 4 else 0.8)
                axes.add_patch(Rectangle((x, bit), 2.9, 1, facecolor=face, edgecolor="white", lw=1))
                what = "top, row" if part == 2 else "row"
                axes.text(x + 1.45, bit + 0.5, f"{what} {row}", ha="center", va="center", fontsize=8)
            axes.text(3.3 * part + 1.45, -0.35, f"bytes {64 * part} – {64 * part + 63}", ha="center", fontsize=8)
        rows = len({row for part in parts for row in part})
        axes.set_title(f"{bits} bits: {rows} rows in {64 * len(parts)} bytes", fontsize=10)
    for axes in (ax, *bits_axes):
        axes.set_axis_off()
        axes.grid(False)
    bits_axes[0].text(-0.3, 0.5, "bit 0", ha="right", va="center", fontsize=8)
    bits_axes[0].text(-0.3, 7.5, "bit 7", ha="right", va="center", fontsize=8)
    return figure


def layout(bits: int) -> list[list[int]]:
    """For each part of 64 bytes the row of codes to which each bit of its bytes, from the lowest, belongs.

    Args:
        bits: 2, 3 or 4; with 3 the last part holds top bits.
    """
    if bits == 4:
        return [[row for row in range(2) for _ in range(4)]]
    low = [[first + row for row in range(4) for _ in range(2)] for first in ((0,) if bits == 2 else (0, 4))]
    row_of = {TOP_BIT[row % 4] + (row & 4): row for row in range(8)}
    return low if bits == 2 else [*low, [row_of[bit] for bit in range(8)]]


def suite() -> Figure:
    """How a number travels through the suite, from a parameter to a verdict."""
    figure, ax = _canvas(9, 3.3)
    ax.set(xlim=(0, 12.4), ylim=(0, 4.6))
    _box(ax, 1.3, 3.7, "notebook\n+ parameters", width=2.2, height=0.9)
    _box(ax, 4.5, 3.7, "a process\nof its own", width=1.9, height=0.9)
    _box(ax, 7.6, 3.7, "numbers, tables,\nfigures", width=2.3, height=0.9, strong=True)
    _box(ax, 10.9, 3.7, "check: the\naccepted ones?", width=2.3, height=0.9)
    _box(ax, 1.3, 1.1, "study: queue\nof trainings", width=2.2, height=0.9)
    _box(ax, 4.5, 1.1, "journals", width=1.9, height=0.9, strong=True)
    _box(ax, 7.6, 1.1, "claims with\nconditions", width=2.3, height=0.9)
    _box(ax, 10.9, 1.1, "verdict, or\nnot tested", width=2.3, height=0.9)
    for y in (3.7, 1.1):
        for start, end in ((2.42, 3.53), (5.47, 6.43), (8.77, 9.73)):
            _arrow(ax, (start, y), (end, y))
    _box(ax, 7.6, 2.4, "report, README, site", width=2.7, height=0.55)
    _arrow(ax, (7.6, 3.22), (7.6, 2.7))
    _arrow(ax, (10.3, 1.58), (8.98, 2.25))
    _arrow(ax, (10.3, 3.22), (8.98, 2.55))
    return figure
