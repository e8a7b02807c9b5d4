"""Schematic drawings of the course: matplotlib figures that show how a method or a layout is put together.

``python -m lowbit_suite.chapters.drawings FOLDER`` writes all of them as SVG.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from lowbit.extras import extra

with extra("course", "lowbit_suite.chapters.drawings"):
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Rectangle

from lowbit_suite import plotting

FILLS = {"plain": plotting.PAPER, "latent": "#F6DDCC", "rounded": "#CCE3F0", "result": "#DDDDDD"}
"""Light fills, so that black text on them is readable: latents, rounded values, results."""

ALT = {
    "sign_scale": (
        "A chain of three gates. The count starts at zero; each open gate adds one, a closed gate sets it back to "
        "zero. The latents +, -, + give the counts 1, 0, 1; with a negative sign the weight is minus two."
    ),
    "query_key": (
        "Two rows. Above, query and key weights are rounded one by one, then multiplied. Below, their product is "
        "rounded once, so that the gradient of each latent contains the other latent and no rounded matrix."
    ),
    "annealing_zones": (
        "The axis of a latent with three thresholds between four levels. Narrow zones of half width BR around the "
        "thresholds may move; all weights between and beyond them are held."
    ),
    "packed_layout": (
        "From left to right: a matrix of codes with a tile of 16 outputs by 4 inputs; the tile as a row of 64 codes; "
        "one byte of 64, in which four rows have two bits each."
    ),
    "suite": (
        "Notebooks and the study use the library. The suite runs them and keeps numbers, tables and journals in "
        "results; from these it judges the claims, which README, report and site show."
    ),
}
"""The alternative text of each drawing."""


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Axes without frame, one unit of which is an inch."""
    figure = plt.figure(figsize=(width, height), facecolor=plotting.PAPER)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def _box(ax: Axes, x: float, y: float, text: str, width: float = 1.1, fill: str = "plain", size: float = 12) -> None:
    """A box with its center at (x, y)."""
    height = 0.3 + 0.22 * (1 + text.count("\n"))
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=FILLS[fill], edgecolor=plotting.INK, linewidth=1.2,
        )
    )  # fmt: skip
    ax.text(x, y, text, ha="center", va="center", size=size)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
    style = {"arrowstyle": "-|>", "color": plotting.INK, "linewidth": 1.2, "linestyle": "--" if dashed else "-"}
    ax.annotate("", end, start, arrowprops=style | {"shrinkA": 0, "shrinkB": 0})


def sign_scale() -> Figure:
    """The recursion of DenseShift at three bits: gates that count or reset."""
    figure, ax = _canvas(9, 2.9)
    _box(ax, 0.75, 1.2, "$S_0 = 0$", fill="result")
    count = 0
    for k, latent in enumerate((0.5, -0.3, 0.4), 1):
        x, is_open = 0.75 + 2 * k, latent > 0
        count = count + 1 if is_open else 0
        _box(ax, x, 2.4, f"$t_{k} = {latent:+.1f}$", fill="latent")
        _box(ax, x, 1.2, f"$S_{k} = {count}$", fill="result")
        _arrow(ax, (x, 2.12), (x, 1.48))
        ax.text(x + 0.1, 1.8, "open" if is_open else "closed", va="center", size=11)
        _arrow(ax, (x - 1.4, 1.2), (x - 0.6, 1.2))
        ax.text(x - 1, 1.32, "+ 1" if is_open else "reset", ha="center", va="bottom", size=11)
    _box(ax, 1.35, 0.35, "$t_\\mathrm{sign} = -0.2$", width=1.7, fill="latent")
    _box(ax, 6.75, 0.35, "$w = -2^{S_3} = -2$", width=2.1, fill="rounded")
    _arrow(ax, (2.25, 0.35), (5.65, 0.35))
    ax.text(3.9, 0.45, "sign", ha="center", va="bottom", size=11)
    _arrow(ax, (6.75, 0.92), (6.75, 0.63))
    return figure


def query_key() -> Figure:
    """Attention's logits before and after query-key reparameterization."""
    figure, ax = _canvas(9, 3.6)
    for y, title in ((3.4, "as usual: round each, then multiply"), (1.5, "QKR: multiply, then round the product")):
        ax.text(0.1, y, title, va="center", size=12, weight="bold")
    for y, name in ((2.95, "q"), (2.25, "k")):
        _box(ax, 0.7, y, f"$W_{name}$", fill="latent")
        _box(ax, 3.2, y, f"$Q(W_{name})$", width=1.4, fill="rounded")
        _arrow(ax, (1.3, y), (2.45, y))
        _arrow(ax, (3.95, y), (5.3, 2.6 + 0.12 * (1 if name == "q" else -1)))
    _box(ax, 6.8, 2.6, "$x_i^\\top\\, Q(W_q)^\\top Q(W_k)\\, x_j$", width=2.9, fill="result")
    for y, name in ((1.05, "q"), (0.35, "k")):
        _box(ax, 0.7, y, f"$W_{name}$", fill="latent")
        _arrow(ax, (1.3, y), (2.0, 0.7 + 0.12 * (1 if name == "q" else -1)))
    _box(ax, 2.65, 0.7, "$W_q^\\top W_k$", width=1.2, fill="latent")
    _arrow(ax, (3.3, 0.7), (3.75, 0.7))
    _box(ax, 4.55, 0.7, "$Q(W_q^\\top W_k)$", width=1.55, fill="rounded")
    _arrow(ax, (5.37, 0.7), (5.85, 0.7))
    _box(ax, 7.15, 0.7, "$x_i^\\top\\, Q(W_q^\\top W_k)\\, x_j$", width=2.5, fill="result")
    return figure


def annealing_zones() -> Figure:
    """The zones of confidence-guided annealing on the axis of a latent, at two bits; BR is drawn much too wide."""
    figure, ax = _canvas(9, 2.3)
    left, unit, y, reach = 4.5, 2.0, 0.95, 0.3
    ax.plot([0.3, 8.7], [y, y], color=plotting.INK, linewidth=1.2)
    for k in (-1, 0, 1):
        x = left + unit * k
        ax.add_patch(
            Rectangle((x - reach, y - 0.22), 2 * reach, 0.44, facecolor=plotting.look("statsq").color, alpha=0.35)
        )
        ax.plot([x, x], [y - 0.3, y + 0.3], color=plotting.INK, linestyle="--", linewidth=1.2)
        ax.text(x, y - 0.42, f"$y = {k}$", ha="center", va="top", size=12)
        ax.text(x, y + 0.38, "may move", ha="center", va="bottom", size=11)
    for place, level in zip((-1.5, -0.5, 0.5, 1.5), ("−3", "−1", "+1", "+3"), strict=True):
        x = left + unit * place
        ax.plot(x, y, "o", color=plotting.LEVELS, markersize=8)
        ax.text(x, y + 0.15, "held", ha="center", va="bottom", size=11)
        ax.text(x, y - 0.15, f"level {level}", ha="center", va="top", size=11)
    ax.annotate("", (left - reach, 1.75), (left + reach, 1.75), arrowprops={"arrowstyle": "<->", "color": plotting.INK})
    ax.text(left, 1.85, "2 BR", ha="center", va="bottom", size=12)
    return figure


def packed_layout() -> Figure:
    """The layout N16K4 at two bits, from the matrix of codes to a byte."""
    figure, ax = _canvas(9, 3.1)
    ax.add_patch(Rectangle((0.7, 0.5), 2.0, 2.0, facecolor=plotting.PAPER, edgecolor=plotting.INK, linewidth=1.2))
    for row in range(4):  # four neighboring tiles make four rows
        own = Rectangle((0.7 + 0.25 * row, 1.5), 0.25, 1.0, facecolor=plotting.PARTS[row], edgecolor=plotting.PAPER)
        ax.add_patch(own)
        ax.add_patch(
            Rectangle((3.9, 2.15 - 0.42 * row), 2.0, 0.3, facecolor=plotting.PARTS[row], edgecolor=plotting.INK)
        )
        ax.text(3.8, 2.3 - 0.42 * row, f"row {row}", ha="right", va="center", size=11)
        left = 8.35 - 0.55 * row  # bits 0 and 1 stand at the right
        ax.add_patch(Rectangle((left, 1.35), 0.55, 0.5, facecolor=plotting.PARTS[row], edgecolor=plotting.INK))
        ax.text(left + 0.275, 1.6, f"{2 * row + 1} {2 * row}", ha="center", va="center", size=11, color=plotting.PAPER)
    ax.text(1.7, 2.6, "inputs K, 4 to a tile", ha="center", va="bottom", size=11)
    ax.text(0.55, 1.5, "outputs N, 16 to a tile", ha="right", va="center", size=11, rotation=90)
    ax.text(4.9, 2.6, "64 codes a row", ha="center", va="bottom", size=11)
    ax.text(7.8, 1.95, "byte: 2 bits of each row", ha="center", va="bottom", size=11)
    ax.text(7.8, 1.25, "one of 64", ha="center", va="top", size=11)
    _arrow(ax, (2.8, 1.6), (3.2, 1.6))
    _arrow(ax, (6.0, 1.6), (6.6, 1.6))
    return figure


def suite() -> Figure:
    """What uses what in the project, and the way of a number from a training to a verdict."""
    figure, ax = _canvas(9, 3.3)
    _box(ax, 1.2, 2.7, "notebooks/\nthe course", width=1.9)
    _box(ax, 1.2, 1.6, "study.yaml\nlong trainings", width=1.9)
    _box(ax, 4.0, 2.15, "lowbit_suite\nruns, records", width=1.9, fill="rounded")
    _box(ax, 6.4, 2.15, "results/\nnumbers, tables,\njournals", width=2.1, fill="result")
    _box(ax, 6.4, 0.55, "claims.yaml\nconditions", width=1.9)
    _box(ax, 8.2, 0.55, "verdicts", width=1.2, fill="result")
    _box(ax, 2.6, 0.45, "lowbit, the library", width=2.6, fill="latent")
    _arrow(ax, (2.2, 2.65), (3.0, 2.3))
    _arrow(ax, (2.2, 1.65), (3.0, 2.0))
    _arrow(ax, (5.0, 2.15), (5.3, 2.15))
    _arrow(ax, (7.2, 1.67), (8.0, 0.85))
    _arrow(ax, (7.4, 0.55), (7.58, 0.55))
    _arrow(ax, (1.2, 1.2), (1.7, 0.75), dashed=True)
    _arrow(ax, (4.0, 1.75), (3.2, 0.75), dashed=True)
    ax.text(3.85, 1.2, "uses", va="center", size=11)
    return figure


DRAWINGS: dict[str, Callable[[], Figure]] = {
    one.__name__: one for one in (sign_scale, query_key, annealing_zones, packed_layout, suite)
}
"""All drawings by name."""


def show(name: str, file: str) -> None:
    """Show a drawing in a notebook and save it as ``file``, with its alternative text."""
    plotting.save(DRAWINGS[name](), file, alt=ALT[name])


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "lowbit"  # the same names of elements in every file
    for name, draw in DRAWINGS.items():
        figure = draw()
        figure.savefig(Path(sys.argv[1]) / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
