"""Figures of notebooks 11 to 14: parts of a block, flips over time, scales, rungs of a ladder, and pairs of arms."""

from collections.abc import Mapping, Sequence

import numpy as np

from lowbit.extras import extra

with extra("course", "lowbit_suite.chapters.transformer_figures"):
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns
    from matplotlib.figure import Figure

from lowbit import metrics
from lowbit_suite import plotting

_TWIN = {"color": plotting.INK, "linestyle": ":", "label": "full precision"}
_ASIDE = {"fontsize": "small", "loc": "center left", "bbox_to_anchor": (1.01, 0.5)}


def restless_parts(results: pd.DataFrame, parts: Sequence[str], bits: int) -> Figure:
    """Draw the share of oscillating weights in each part of the blocks, a panel for weights alone and with activations.

    Args:
        results: one row a training: ``quantized``, ``attention``, ``seed`` and ``oscillating <part>, %`` of each part.
        parts: the parts, in the order of their bars.
        bits: bits a weight, for the titles.
    """
    by = ["quantized", "attention", "seed"]
    shares = results.melt(by, [f"oscillating {part}, %" for part in parts], "part", "share").dropna()
    shares["part"] = shares.part.str.extract(r"oscillating (\w+),", expand=False)
    looks = plotting.looks(["without QKR", "with QKR"])
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4), sharey=True)
    for ax, quantized in zip(axes, ("weights only", "weights and activations"), strict=True):
        sns.barplot(
            shares[shares.quantized == quantized], x="part", y="share", hue="attention", order=parts,
            hue_order=list(looks), palette={name: look.color for name, look in looks.items()},
            errorbar=plotting.interval, ax=ax, legend=ax is axes[0],
        )  # fmt: skip
        ax.set(title=f"{quantized}, {bits} bits", xlabel="part of the block", ylabel="oscillating, %")
    axes[0].set_ylim(0, 1.3 * axes[0].get_ylim()[1])
    axes[0].legend(title=None, loc="upper left", ncols=2)
    return figure


def flips(series: Mapping[str, np.ndarray], restless: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draw the flips of each part over the steps, and those of q against those of k and of fc1.

    Args:
        series: by part, the number of flips in each step, ``[steps]``.
        restless: of ``q``, ``k`` and ``fc1`` the square roots of these numbers, less their moving average, ``[steps]``.
        title: title of the left panel.
    """
    looks = plotting.looks(series)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for part, values in series.items():
        style = looks[part].line | {"markevery": max(1, len(values) // 8)}
        axes[0].plot(1 + np.arange(len(values)), values, **style, label=part, linewidth=1.2, markersize=5)
    axes[0].set(title=title, xlabel="training step", ylabel="flips in this step", yscale="symlog", ylim=(0, None))
    axes[0].legend(fontsize="small", ncols=2)
    for ax, part in zip(axes[1:], ("k", "fc1"), strict=True):
        x, y = restless["q"], restless[part]
        ax.plot(x, y, **looks[part].points, markersize=4, alpha=0.6)
        ax.set(title=f"q and {part}: correlation {np.corrcoef(x, y)[0, 1]:.2f}")
        ax.set(xlabel="√flips in q, less the average around", ylabel=f"√flips in {part}, less the average around")
    return figure


def scales(before: np.ndarray, after: Mapping[str, np.ndarray]) -> Figure:
    """Draw the scales of some rows over the steps of the ordinary training and of two ways to go on.

    Args:
        before: the scales in the ordinary training, ``[steps, rows]``.
        after: by arm, without a mask and with one, the scales in the phase after it, ``[steps, rows]`` each.
    """
    styles = {"color": plotting.LATENTS}, {"color": plotting.LEVELS, "ls": "--"}
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4))
    axes[0].plot(before / before[0], color=plotting.INK, linewidth=1.2)
    end = len(before) - 1
    for (arm, then), style in zip(after.items(), styles, strict=True):
        axes[0].plot(end + np.arange(len(then)), then / before[0], **style)
        lines = axes[1].plot(end + np.arange(len(then)), 100 * (then / then[0] - 1), **style)
        lines[0].set_label(arm)
    axes[0].axvline(end, color=plotting.GREY, linestyle=":")
    axes[0].text(end, axes[0].get_ylim()[0], " extra phase", va="bottom")
    axes[0].set(title=f"scale of {before.shape[1]} rows, both phases", ylabel="scale, relative to the start")
    axes[1].set(title="the extra phase", ylabel="change since the phase began, %")
    axes[1].legend(title=None)
    figure.supxlabel("training step", size="medium")
    return figure


def ladder(table: pd.DataFrame, rungs: Sequence[str], labels: Sequence[str], twin: float, data: str) -> Figure:
    """Draw the accuracy of each rung of a ladder, one panel a width; the last rung stands apart from the others.

    Args:
        table: one row a run: ``rung``, ``bits``, ``seed`` and ``accuracy, %``.
        rungs: names of the rungs from the lowest to the highest, then that of the one off the ladder.
        labels: what to write below each of them.
        twin: accuracy of the full-precision twin, in percent.
        data: name of the data, for the titles.
    """
    widths, on = list(dict.fromkeys(table.bits)), len(rungs) - 1
    size = (6 if len(widths) == 1 else 4.4 * len(widths), 4.4)
    figure, axes = plt.subplots(1, len(widths), figsize=size, sharey=True, squeeze=False)
    for ax, bits in zip(axes[0], widths, strict=True):
        runs = table[table.bits == bits].pivot(index="rung", columns="seed", values="accuracy, %").loc[list(rungs)]
        ax.plot(range(on), runs[:on], color=plotting.GREY, linewidth=0.8, alpha=0.7)
        for x, (rung, look) in enumerate(plotting.looks(rungs).items()):
            mean, low, high = metrics.interval(runs.loc[rung].tolist())
            bars = None if np.isnan(low) else [[mean - low], [high - mean]]
            ax.errorbar(x, mean, yerr=bars, **look.points, markersize=8, capsize=4)
        ax.axhline(twin, **_TWIN)
        ax.axvline(on - 0.5, color=plotting.GREY, linestyle="--", linewidth=0.8)
        ax.set_xticks(range(len(rungs)), labels)
        ax.set(title=f"{data}, W{bits}A{bits}", xlim=(-0.4, on + 0.4))
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[0, 0].legend(fontsize="small")
    return figure


def prices(points: pd.DataFrame, twin: float, twin_kb: float, title: str) -> Figure:
    """Draw accuracy against size, one line a rung.

    Args:
        points: one row a rung and width: ``rung``, ``kB`` and ``accuracy, %``.
        twin: accuracy of the full-precision twin, in percent.
        twin_kb: its size in kB.
        title: title of the figure.
    """
    figure, ax = plt.subplots(figsize=(8.5, 4.4))
    for rung, look in plotting.looks(points.rung).items():
        own = points[points.rung == rung]
        ax.plot(own.kB, own["accuracy, %"], **(look.line if len(own) > 1 else look.points), linewidth=1, label=rung)
    ax.axhline(twin, **_TWIN | {"linewidth": 1, "label": f"full precision, {twin_kb:,.0f} kB"})
    ax.set(xlabel="size as shipped, kB", ylabel="test accuracy, %", title=title)
    ax.legend(**_ASIDE)
    return figure


def pairs(differences: Mapping[str, pd.Series], kinds: Mapping[str, int], alike: float, title: str) -> Figure:
    """Draw the differences of pairs of arms by seed, their intervals, and a band of differences that count as none.

    Args:
        differences: by statement, the differences in points, one for each seed.
        kinds: by what the pairs differ in, how many of them do; they come in this order.
        alike: half the width of the band, in points, around the only pair of its kind.
        title: title of the figure.
    """
    figure, ax = plt.subplots(figsize=(9.5, 3.8))
    looks, kind = plotting.looks(kinds), [kind for kind, count in kinds.items() for _ in range(count)]
    for y, values in enumerate(differences.values()):
        look, first = looks[kind[y]], kind.index(kind[y]) == y
        if kinds[kind[y]] == 1:
            within = f"alike: within {alike:g} point{'s' * (alike != 1)}"
            ax.barh(y, 2 * alike, left=-alike, height=0.7, color=plotting.GREY, alpha=0.2, label=within)
        mean, low, high = metrics.interval(values.tolist())
        bars = None if np.isnan(low) else [[mean - low], [high - mean]]
        ax.plot(values, np.full(len(values), y), "|", color=look.color, markersize=12)
        ax.errorbar(mean, y, xerr=bars, **look.points, capsize=3, label=kind[y] if first else None)
    ax.axvline(0, color=plotting.INK, linewidth=0.9)
    ax.set_yticks(range(len(differences)), list(differences))
    ax.invert_yaxis()
    ax.set(title=title, xlabel="difference in test accuracy by seed, points")
    ax.legend(**_ASIDE)
    return figure
