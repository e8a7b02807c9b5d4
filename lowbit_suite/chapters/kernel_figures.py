"""Figures of notebook 15: the bits of packed weights and of floats, and kernels under the roofs of their machine."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lowbit.extras import extra

with extra("course", "lowbit_suite.chapters.kernel_figures"):
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

from lowbit_suite import plotting

_ROWS: dict[str, Any] = {"cmap": ListedColormap(plotting.PARTS), "vmin": -0.5, "vmax": 7.5, "aspect": "auto"}


def layout(places: pd.DataFrame) -> Figure:
    """Draw where the bits of 16 by 32 3-bit codes lie: a column is a byte, a color is four neighboring inputs.

    Args:
        places: one row a bit of a code: ``n``, ``k``, ``code_bit``, and its place, ``byte`` (0 to 191) and ``bit``.
    """
    grid = np.full((24, 64), np.nan)  # three registers of 64 bytes, eight bits each
    grid[8 * (places.byte // 64) + places.bit, places.byte % 64] = places.k // 4
    figure, ax = plt.subplots(figsize=(13, 5.2))
    image = ax.imshow(grid, **_ROWS)
    for x in range(4, 64, 4):
        ax.axvline(x - 0.5, color=plotting.PAPER, linewidth=1.2)
    for y in range(1, 24):
        ax.axhline(y - 0.5, color=plotting.PAPER, linewidth=2.5 if y % 8 == 0 else 0.3)
    ax.set_xticks(np.arange(1.5, 64, 4), [f"n={n}" for n in range(16)])
    ax.set_yticks([0, 7, 8, 15, 16, 23], ["bit 0", "bit 7"] * 3)
    for i, text in enumerate(("bytes 0-63\nlow two bits", "bytes 64-127\nlow two bits", "bytes 128-191\ntop bit")):
        ax.text(-5.2, 8 * i + 3.5, text, ha="right", va="center", fontsize="small")
    ax.set_title("Where the bits of 16 × 32 codes lie: a column is a byte, and four bytes belong to one output n")
    ax.grid(False)
    bar = figure.colorbar(image, ax=ax, ticks=range(8), pad=0.01)
    bar.ax.set_yticklabels([f"k = {4 * r}-{4 * r + 3}" for r in range(8)], fontsize="small")
    return figure


def layout_zoom(places: pd.DataFrame) -> Figure:
    """Draw the first four bytes of each register, bit by bit, each with the input and the value of its code bit.

    Args:
        places: as for `layout`.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    for register, ax in enumerate(axes):
        part = np.full((8, 4), np.nan)
        for at in places[(places.byte // 64 == register) & (places.byte % 64 < 4)].itertuples():
            x = at.byte % 64
            part[at.bit, x] = at.k // 4
            text, look = f"k={at.k}: {1 << at.code_bit}", {"color": plotting.PAPER, "weight": "bold"}
            ax.text(x, at.bit, text, ha="center", va="center", size=10, **look)
        ax.imshow(part, **_ROWS)
        ax.set(title=f"register {register}", xticks=range(4), yticks=range(8))
        ax.set_xticklabels([f"byte {64 * register + i}" for i in range(4)])
        ax.set_yticklabels([f"bit {i}" for i in range(8)])
        ax.grid(False)
    return figure


def half_additions(examples: Mapping[str, tuple[float, float]], addend: int) -> Figure:
    """Draw the bits of float16 numbers, of the integer added to them, and of the result.

    Args:
        examples: title of each panel, with the number and the product that the addition should give.
        addend: the integer, at most 16 bits.
    """
    figure, axes = plt.subplots(2, 2, figsize=(14, 5.2))
    for ax, (title, (value, product)) in zip(axes.flat, examples.items(), strict=True):
        before = np.array([value], np.float16).view(np.uint16)
        after = before + np.uint16(addend)
        got = float(after.view(np.float16)[0])
        _bits(ax, int(before[0]), 2, f"x = {float(before.view(np.float16)[0]):.6g}")
        _bits(ax, addend, 1, f"+ ({addend >> 10} ≪ 10)")
        _bits(ax, int(after[0]), 0, f"= {got:.6g}")
        right = got == product
        heading = f"{title}: 8·x = {product:.6g}, {'right' if right else 'WRONG'}"
        ax.set_title(heading, loc="left", color=plotting.INK if right else plotting.PARTS[1])
        ax.set(xlim=(-0.2, 23), ylim=(-0.1, 2.9))
        ax.axis("off")
    figure.suptitle("from the left: sign (1 bit), exponent (5), fraction (10)", fontsize="medium")
    return figure


def _bits(ax: Axes, value: int, y: float, label: str) -> None:
    fields = [part for part, bits in zip(plotting.PARTS, (1, 5, 10), strict=False) for _ in range(bits)]
    for i, bit in enumerate(format(value, "016b")):
        one = bit == "1"
        ax.add_patch(Rectangle((i, y), 0.94, 0.8, facecolor=fields[i], alpha=0.95 if one else 0.22))
        color = plotting.PAPER if one else plotting.INK
        ax.text(i + 0.47, y + 0.4, bit, ha="center", va="center", size=9, color=color)
    ax.text(16.3, y + 0.4, label, va="center", size=10)


def half_products(x: Tensor, got: Tensor, true: Tensor) -> Figure:
    """Draw what an exponent-add gives for positive float16 numbers, against the exact products.

    Args:
        x: float16 ``[n]``, positive and finite.
        got, true: ``[n]``: the results of the addition, and the products.
    """
    right = got.double() == true
    small, flipped, lost = ~right & (x < 2.0**-14), ~right & got.isfinite() & (x > 1), x[got.isnan()]
    figure, ax = plt.subplots(figsize=(10, 4.6))
    ax.plot(x, true, color=plotting.GREY, linewidth=5, alpha=0.4, label="8·x")
    ax.plot(x[right], got[right], ".", color=plotting.PARTS[0], markersize=3, label="exponent-add, right")
    label = "exponent-add of subnormal numbers"
    ax.plot(x[small], got[small], ".", color=plotting.PARTS[1], markersize=5, label=label)
    label = "sign flipped (magnitude drawn)"
    ax.plot(x[flipped], got[flipped].abs(), "x", color=plotting.PARTS[4], markersize=3, label=label)
    ends = lost.min().item(), lost.max().item()
    ax.axvspan(*ends, color=plotting.PARTS[3], alpha=0.35, label="NaN instead of infinity")
    title = "The published exponent-add on every positive float16 number, w = 8"
    ax.set(xscale="log", yscale="log", xlabel="x, float16", ylabel="result", title=title)
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), markerscale=2)
    return figure


def roofline(points: pd.DataFrame, reading: pd.DataFrame, peak: Mapping[str, float]) -> Figure:
    """Draw timed layers under the roofs of their machine: reading at the left, arithmetic at the right.

    Args:
        points: one row a layer and width: ``size``, ``rows``, ``weights`` (``"in cache"`` or ``"from memory"``),
            ``bits`` (32 for float32), ``read MiB`` (bytes gone through until the same come again), ``GB/s`` and
            ``GOP/s``.
        reading: `lowbit_suite.chapters.timing.reading_speeds`.
        peak: `lowbit_suite.chapters.timing.peaks`.
    """
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.8))
    looks = plotting.looks(points.bits)
    cases = list(dict.fromkeys(zip(points.rows, points.weights, strict=True)))
    marks = dict(zip(cases, "oXDv^sP", strict=False))
    first, last = points.rows.iloc[0], points["size"].iloc[-1]
    axes[0].plot(reading.bytes / 2**20, reading["GB/s"], color=plotting.GREY, label="reading, by torch.sum")
    _roofs(axes[1], reading, peak, 2 * (16 * points.rows / points.bits).max())
    for row in points.to_dict("records"):
        mark, color = marks[row["rows"], row["weights"]], looks[row["bits"]].color
        label = f"M = {row['rows']}{', ' + row['weights'] if row['rows'] == 1 else ''}, " + (
            "float32" if row["bits"] == 32 else f"{row['bits']} bits"
        )
        if row["rows"] == first:
            axes[0].plot(row["read MiB"], row["GB/s"], mark, color=color, markersize=8)
        if row["size"] == last:
            intensity = 16 * row["rows"] / row["bits"]
            axes[1].plot(intensity, row["GOP/s"], mark, color=color, markersize=8, label=label)
    axes[0].set(
        xscale="log", xlabel="bytes gone through until the same come again, MiB", ylabel="bytes of weights read, GB/s",
        title=f"how fast the weights come in, M = {first}", ylim=(0, 1.2 * reading["GB/s"].max()),
    )  # fmt: skip
    axes[0].legend(fontsize="small", loc="upper right")
    title = f"roofline, K = N = {last}"
    axes[1].set(xscale="log", yscale="log", xlabel="operations for each byte of weights", title=title)
    axes[1].set_ylabel("operations, GOP/s")
    axes[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _roofs(ax: Axes, reading: pd.DataFrame, peak: Mapping[str, float], most: float) -> None:
    intensity = np.geomspace(0.2, most, 100)
    slow, quick = reading["GB/s"].iloc[-1], reading["GB/s"].max()
    for kind, style in (("float32", ":"), ("8 bits", "--")):
        label = f"roof, {kind}: {peak[kind]:,.0f} GOP/s, cache {quick:.0f} GB/s"
        roof = np.minimum(peak[kind], quick * intensity)
        ax.plot(intensity, roof, style, color=plotting.GREY, linewidth=2, label=label)
    below = intensity[slow * intensity < peak["8 bits"]]
    ax.plot(below, slow * below, color=plotting.GREY, linewidth=1, label=f"from memory, {slow:.0f} GB/s")
