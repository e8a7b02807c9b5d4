"""One figure per claim: its effects against the length of training, with intervals and the line of no effect."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lowbit import paths
from lowbit_suite import claims, plotting
from lowbit_suite.claims import measuring, text
from lowbit_suite.study import collected

LEAST = 3
"""Smallest number of seeds whose interval is drawn: that of two is some thirteen times as wide as their distance."""

ANCHOR = "the paper's length, one seed, on a GPU"
"""What a star stands for: a point of the table ``<table>_anchor``."""


def picture(id: str) -> Path:
    """The path of a claim's figure, whether the file exists or not."""
    return paths.results() / text.figure(id)


def write() -> list[Path]:
    """Draw every claim that the study's tables have effects for, and return the files."""
    written = []
    for claim in claims.load():
        figure = draw(claim, collected.folder())
        if figure is not None:
            picture(claim["id"]).parent.mkdir(parents=True, exist_ok=True)
            about = {"Software": None, "Description": alt(claim, collected.folder())}  # the same bytes with any version
            figure.savefig(picture(claim["id"]), metadata=about)
            plt.close(figure)
            written.append(picture(claim["id"]))
    return written


def draw(claim: dict[str, Any], where: Path) -> Figure | None:
    """Draw the effects of the primary statements, one panel per unit; None if the tables have none.

    Args:
        claim: as `lowbit_suite.claims.load` returns it.
        where: the folder of the study's tables.
    """
    found = _measured(claim, where)
    if not found:
        return None
    plotting.use_style()
    units = list(dict.fromkeys((item["value"], item["unit"]) for item, _ in found))
    looks = plotting.looks(item["says"] for item, _ in found)
    labels = {item["says"]: f"{item['says']}{_trend(item, where)}" for item, _ in found}
    legend = 0.19 * sum(1.3 + text.count("\n") for text in labels.values())  # its height in inches
    figure, axes = plt.subplots(1, len(units), figsize=(6.5 * len(units), 3.7 + legend), squeeze=False)
    handles, anchors = [], []
    for ax, (value, unit) in zip(axes[0], units, strict=True):
        own = [(item, frame) for item, frame in found if (item["value"], item["unit"]) == (value, unit)]
        for number, (item, frame) in enumerate(own):
            place = number - (len(own) - 1) / 2
            handles.append(_line(ax, place, looks[item["says"]], labels[item["says"]], frame))
            end = effects({**item, "table": f"{item['table']}_anchor"}, where)
            star = {"marker": "*", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
            (drawn,) = ax.plot(end.steps, end["mean"], **star, color=looks[item["says"]].color, label=ANCHOR)
            anchors += [drawn] if len(end) else []
        ax.axhline(0, color=plotting.INK, linewidth=1)
        for margin in {item.get("margin", 0) for item, _ in own} - {0}:
            ax.axhline(-margin, color=plotting.GREY, linewidth=1, linestyle=":")
        ax.set_xscale("log", base=2)
        ticks = sorted({steps for _, frame in own for steps in frame.steps})
        ax.set_xticks(ticks, [f"{steps:,}" for steps in ticks])
        ax.minorticks_off()
        ax.margins(x=0.12)
        if len(ticks) == 1:
            ax.set_xlim(ticks[0] / 2, ticks[0] * 2)
        ax.set(xlabel="training steps", ylabel=f"difference in {value.partition(',')[0]}, {unit or 'no unit'}")
    figure.legend(handles=handles + anchors[:1], loc="outside lower left", fontsize="small", frameon=False)
    title = textwrap.fill(f"{claim['id']}: {claim['claim']}", 66 * len(units))
    figure.suptitle(title, fontsize="medium")
    return figure


def alt(claim: dict[str, Any], where: Path) -> str:
    """The figure's text for those who cannot see it: each primary statement's effect at its longest training."""
    last = [(item["says"], frame.iloc[-1]) for item, frame in _measured(claim, where)]
    said = [f"{says}: {row.effect} after {row.steps:,} steps" for says, row in last]
    return f"Effects of {claim['id']} against training steps. {'; '.join(said)}."


def _measured(claim: dict[str, Any], where: Path) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """The primary statements that have effects, with them."""
    primary = [item for item in claim["statements"] if item.get("role") == "primary" and "at" in item]
    return [(item, frame) for item in primary if len(frame := effects(item, where))]


def effects(item: dict[str, Any], where: Path) -> pd.DataFrame:
    """The effect of a statement at each length of training; with a single seed its bounds are NaN.

    Args:
        item: a statement with ``at``, whose budget is replaced by each budget of its table.
        where: the folder of the study's tables.

    Returns:
        The columns ``steps``, ``mean``, ``low``, ``high``, ``n``, the number of seeds, ``pairs``, the difference of
        each, and ``effect``, the whole as text.
    """
    frame = measuring.read(where, item["table"])
    budgets = [] if frame is None or "steps" not in frame else sorted(frame.steps.dropna().unique())
    rows = []
    for steps in budgets:
        measured = measuring.measure({**item, "at": f"steps == {steps}"}, where, growing=True)
        if measured.effect is not None:
            effect = measured.effect
            rows.append((int(steps), effect.mean, effect.low, effect.high, effect.n, measured.pairs, str(effect)))
    return pd.DataFrame(rows, columns=["steps", "mean", "low", "high", "n", "pairs", "effect"])


def _trend(item: dict[str, Any], where: Path) -> str:
    """The slope over all lengths of training, as text; empty if it cannot be measured."""
    without = {key: value for key, value in item.items() if key != "at"}
    effect = measuring.measure({**without, "slope": "steps", "unit": ""}, where, growing=True).effect
    return "" if effect is None else f"\nslope for each doubling: {effect}"


def _line(ax: plt.Axes, place: float, look: plotting.Look, label: str, frame: pd.DataFrame) -> Any:
    """Draw one statement, shifted a little by its place, over a dot for each seed; returns its handle for a legend.

    Lengths with fewer than five seeds get hollow markers; with fewer than `LEAST`, no interval.
    """
    steps = frame.steps * 2 ** (0.06 * place)
    for at, pairs in zip(steps, frame.pairs, strict=True):
        ax.plot([at] * len(pairs), pairs, ".", color=look.color, markersize=4, alpha=0.4)
    known = frame.n >= LEAST
    bars = [(frame["mean"] - frame.low).where(known), (frame.high - frame["mean"]).where(known)]
    style = look.line | {"marker": None}
    handle = ax.errorbar(steps, frame["mean"], bars, **style, capsize=3, linewidth=1.2, label=label)
    for few in (False, True):
        chosen = frame[(frame.n < 5) == few]
        face = plotting.PAPER if few else look.color
        ax.plot(steps[chosen.index], chosen["mean"], **look.points, markerfacecolor=face)
    return handle
