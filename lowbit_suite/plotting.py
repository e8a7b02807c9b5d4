"""The course's figures: one style, colors that color-blind readers can tell apart, tensors drawn as tensors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lowbit import metrics, paths
from lowbit.extras import extra

with extra("course", "lowbit_suite.plotting"):
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from lowbit_suite.records.context import current

PALETTE = sns.color_palette("colorblind")
BLUE, ORANGE, GREEN, RED, PURPLE = (PALETTE[i] for i in (0, 1, 2, 3, 4))
DIVERGING = "PuOr"  # for signed values: distinguishable with any color vision, white at zero
GREY = "0.45"


def use_style() -> None:
    """Set the course's style for all later figures."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.dpi": 96,
            "savefig.dpi": 144,
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.4,
        }
    )


def save(figure: Figure, name: str) -> Path:
    """Write ``figure`` as ``<name>.png`` to the run's figures folder (``results/scratch/figures`` outside a run)."""
    folder = current().figures or paths.results() / "scratch" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path)
    return path


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The ends of `lowbit.metrics.interval`: seaborn draws it with ``errorbar=plotting.interval``."""
    return metrics.interval(values)[1:]


def matrix(
    ax: Axes, values: torch.Tensor, title: str = "", limit: float | None = None, digits: int = 2, size: int = 10
) -> None:
    """Draw a small matrix with its numbers written in the cells.

    Args:
        ax: axes to draw on.
        values: float ``[rows, columns]``.
        title: title of the axes.
        limit: colors run from -limit to limit; None takes the largest magnitude. Pass one limit to compare matrices.
        digits: decimals written.
        size: font size of the numbers, points.
    """
    array = torch.as_tensor(values).detach().cpu().float().numpy()
    limit = limit or float(np.abs(array).max()) or 1.0
    ax.imshow(array, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="equal")
    for (row, column), value in np.ndenumerate(array):
        dark = abs(value) > 0.65 * limit
        ax.text(
            column, row, f"{value:.{digits}f}", ha="center", va="center", size=size, color="white" if dark else "black"
        )
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def weights_on_grid(ax: Axes, latent: torch.Tensor, weight: torch.Tensor, title: str = "", bins: int = 61) -> None:
    """Draw a histogram of latent weights with the quantization levels, thresholds, and share of weights per level.

    Args:
        ax: axes to draw on.
        latent: float, any shape: the latent weights, in the units of ``weight`` (both divided by the scale).
        weight: same shape: the quantized weights.
        title: title of the axes.
        bins: number of bins of the histogram.
    """
    latent, weight = (t.detach().flatten().cpu().float().numpy() for t in (latent, weight))
    levels, counts = np.unique(weight.round(5), return_counts=True)  # dividing by the scale leaves rounding errors
    reach = 1.1 * max(np.abs(levels).max(), np.quantile(np.abs(latent), 0.998))
    ax.hist(np.clip(latent, -reach, reach), bins=np.linspace(-reach, reach, bins), color=GREY, alpha=0.45, density=True)
    ax.set(title=title, xlabel="weight / scale", ylabel="density of latent weights", xlim=(-reach, reach))
    for threshold in (levels[1:] + levels[:-1]) / 2:
        ax.axvline(threshold, color="black", linestyle="--", linewidth=0.8)
    share = ax.twinx()
    share.vlines(levels, 0, 100 * counts / counts.sum(), color=BLUE, linewidth=3)
    share.plot(levels, 100 * counts / counts.sum(), "o", color=BLUE)
    share.set_ylabel("weights on the level, %", color=BLUE)
    share.set_ylim(bottom=0)
    share.grid(False)
    share.spines["right"].set_visible(True)


def number_line(ax: Axes, rows: dict[str, torch.Tensor]) -> None:
    """Draw sets of values as dots on parallel number lines, one set per row, with zero marked."""
    for height, levels in enumerate(reversed(rows.values())):
        values = torch.as_tensor(levels).float().numpy()
        ax.axhline(height, color=GREY, linewidth=0.8, zorder=1)
        ax.plot(values, np.full(len(values), height), "o", color=PALETTE[height % len(PALETTE)], zorder=2)
    ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(rows)), list(reversed(rows)))
    ax.grid(False, axis="y")


def trajectory(
    ax: Axes, latents: Sequence[float], values: Sequence[float], thresholds: Sequence[float], title: str = ""
) -> None:
    """Draw the path of one weight over training steps: latent weight, level in use, and thresholds between levels."""
    steps = np.arange(len(latents))
    low, high = min(*latents, *values), max(*latents, *values)
    margin = 0.15 * (high - low) or 0.1
    for threshold in thresholds:
        if low - margin <= threshold <= high + margin:
            ax.axhline(threshold, color=GREY, linestyle="--", linewidth=1, zorder=1)
    ax.step(steps, values, where="post", color=BLUE, label="level in use")
    ax.plot(steps, latents, color=ORANGE, label="latent weight")
    ax.set(title=title, xlabel="training step", ylabel="weight / scale", ylim=(low - margin, high + margin))


def learning_rates(rates, arm: str, panel: str | None = None, value: str = "accuracy, %") -> Figure:
    """Draw the validation result of each learning rate, one line per arm; rings mark the chosen rates.

    Args:
        rates: the trials of `lowbit_suite.choose_rates`. A trial that failed (NaN) has no point.
        arm: the column that names the arms, one line each.
        panel: a column whose values get one panel each, or None.
        value: the column to draw, means over the seeds.
    """
    factors = sorted(rates.lr_factor.unique())
    arms, once = rates[arm].nunique(), [*PALETTE, "black"]
    colors = [*once, *once][:arms]
    dashes = [*[""] * len(once), *[(3, 1.5)] * len(once)][:arms]  # a color used twice is dashed the second time
    with plt.rc_context({"figure.constrained_layout.use": False}):  # seaborn's grids have a layout of their own
        grid = sns.relplot(
            rates, x="lr_factor", y=value, hue=arm, style=arm, col=panel, kind="line", markers=True, dashes=dashes,
            errorbar=None, height=max(3.2, 0.3 * arms), aspect=1 if panel else 1.6, palette=colors,
        )  # fmt: skip
    for shown, ax in grid.axes_dict.items() if panel else [(None, grid.ax)]:
        chosen = rates[rates.chosen & (True if panel is None else rates[panel] == shown)]
        best = chosen.groupby([arm, "lr_factor"], sort=False, dropna=False)[value].mean().reset_index()
        ax.plot(best.lr_factor, best[value], "o", markersize=13, markerfacecolor="none", markeredgecolor="black")
        ax.margins(x=0.12)  # room for rings at the edge
        ax.set(xscale="log", xlabel="learning rate / the arm's default", ylabel=f"validation {value}")
        ax.set_xticks(factors, [f"{factor:g}" for factor in factors])
        ax.minorticks_off()
    return grid.figure


def apart(values: Sequence[float], least: float) -> np.ndarray:
    """``values`` moved as little as possible (in the mean square) until neighbors are ``least`` apart; for labels.

    Args:
        values: ``[n]``, in any order, which is kept; of equal values the first gets the lowest position.
        least: distance between neighbors, at least 0.

    Returns:
        float ``[n]``; values that are already far enough from each other are unchanged.
    """
    with extra("course", "keeping labels apart"):
        from sklearn.isotonic import isotonic_regression

    array = np.asarray(values, dtype=float)
    if not len(array):
        return array
    order = np.argsort(array, kind="stable")
    # With ``least`` subtracted for each label below, "far enough apart" becomes "non-decreasing": isotonic regression.
    below = least * np.arange(len(array))
    placed = np.empty_like(array)
    placed[order] = isotonic_regression(array[order] - below) + below
    return placed
