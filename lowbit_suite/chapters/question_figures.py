"""Figures of notebook 18: masks against controls, the effects of a factorial, and freezing against transfer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.extras import extra

with extra("course", "lowbit_suite.chapters.question_figures"):
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from lowbit import metrics
from lowbit_suite import plotting

_CONTROL = plotting.Look(plotting.GREY, "s")
_TWIN = {"color": plotting.INK, "linestyle": ":", "linewidth": 1, "label": "full precision"}
_BELOW = {"fontsize": "small", "loc": "upper center", "frameon": False}


def masks(phases: pd.DataFrame, title: str) -> Figure:
    """Draw accuracy and oscillation after a last phase, one row a mask; the first and the last mask are controls.

    Args:
        phases: one row a mask and seed: ``mask``, ``may move, %``, ``before, %``, ``accuracy, %``, ``oscillating, %``.
        title: title of the left panel.
    """
    groups, share = dict(list(phases.groupby("mask", sort=False))), phases.groupby("mask")["may move, %"].mean()
    names = {m: m if pd.isna(share[m]) else f"{m} ({share[m]:.2g} % may move)" for m in groups}
    first, *_, last = names.values()
    looks = {name: _CONTROL if name in (first, last) else plotting.look("denseshift") for name in names.values()}
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.5), sharey=True)
    for ax, column in zip(axes, ("accuracy, %", "oscillating, %"), strict=True):
        plotting.dots(ax, {names[m]: group[column] for m, group in groups.items()}, looks)
    before = {"color": plotting.INK, "linestyle": "--", "linewidth": 1, "label": "before the phase"}
    axes[0].axvline(phases["before, %"].mean(), **before)
    axes[0].legend(**_BELOW, bbox_to_anchor=(0.5, -0.22))
    axes[0].set(title=title, xlabel="test accuracy after the phase, %")
    axes[1].set(title="squares: controls; dots: masks; strokes: seeds", xlabel="oscillating weights in the phase, %")
    axes[1].locator_params(axis="x", nbins=4)
    return figure


def grids(weights: Tensor, rounded: Mapping[str, Tensor]) -> Figure:
    """Draw a histogram of weights for each grid, with its levels and thresholds; titles give the rounding error.

    Args:
        weights: float, any shape, with a standard deviation of 1.
        rounded: the same weights on each grid, by the grid's name.
    """
    figure, axes = plt.subplots(1, len(rounded), figsize=(5.5 * len(rounded), 3.6), sharey=True)
    for ax, (name, values) in zip(axes, rounded.items(), strict=True):
        levels = values.unique()
        thresholds = (levels[1:] + levels[:-1]) / 2
        near = ((weights.flatten()[:, None] - thresholds).abs() < 0.02).any(1).double().mean().item()
        quality = sqnr(weights, values)
        title = f"{name}: SQNR {quality:.1f} dB,\n{100 * near:.1f} % of weights within 0.02 of a threshold"
        plotting.weights_on_grid(ax, weights, values, title)
        ax.set_xlabel("weight, standard deviations")
    shares = figure.axes[len(rounded) :]  # the axes at the right edges
    for share in shares:
        share.set_ylim(0, max(other.get_ylim()[1] for other in shares))
    return figure


def sqnr(weights: Tensor, rounded: Tensor) -> float:
    """The signal-to-quantization-noise ratio in dB: mean square of the weights over that of the rounding error."""
    return -10 * torch.log10((rounded - weights).square().mean() / weights.square().mean()).item()


def factorial(results: pd.DataFrame, effects: Mapping[str, pd.Series], alike: float, title: str) -> Figure:
    """Draw the cells of a factorial of grid and scale, and its effects by seed.

    Args:
        results: one row an arm and seed: ``arm``, ``grid``, ``scale``, ``gradient`` and ``accuracy, %``; the arms
            include "full precision" and "mid-tread, fixed, masked".
        effects: differences in points, one for each seed, by the effect's name.
        alike: differences within this many points count as none.
        title: title of the right panel.
    """
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 3.9), width_ratios=[1, 1.25])
    names = ["mid-rise", "mid-tread"]
    chosen = [plotting.look(name) for name in names]
    sns.pointplot(
        results[results.gradient == "identity"], x="scale", y="accuracy, %", hue="grid", order=["follows", "fixed"],
        hue_order=names, dodge=0.08, palette=[own.color for own in chosen], markers=[own.marker for own in chosen],
        errorbar=plotting.interval, capsize=0.04, linewidth=1.5, markersize=7, ax=axes[0],
    )  # fmt: skip
    accuracy = results.groupby("arm")["accuracy, %"]
    mean, low, high = metrics.interval(accuracy.get_group("mid-tread, fixed, masked").tolist())
    hollow = chosen[1].points | {"markerfacecolor": "none", "markersize": 8, "capsize": 3}
    axes[0].errorbar(1.16, mean, yerr=[[mean - low], [high - mean]], **hollow, label="mid-tread, gradient masked")
    axes[0].axhline(accuracy.mean()["full precision"], **_TWIN)
    axes[0].set(xlabel="scale", ylabel="test accuracy, %", title="the cells; parallel lines: no interaction")
    axes[0].legend(**_BELOW, bbox_to_anchor=(0.5, -0.18), ncols=2)
    plotting.dots(axes[1], effects)
    axes[1].axvspan(-alike, alike, color=plotting.GREY, alpha=0.2, label=f"alike: within ±{alike:g} points")
    axes[1].axvline(0, color=plotting.INK, linewidth=0.9)
    axes[1].set(xlabel="effect on test accuracy, points", title=title)
    axes[1].legend(**_BELOW, bbox_to_anchor=(0.5, -0.18))
    return figure


def freezing(transfers: pd.DataFrame, correlations: Mapping[str, pd.Series], title: str) -> Figure:
    """Draw the accuracy on a target task against the weights that still moved on the source, and rank correlations.

    Args:
        transfers: one row a quantized arm and seed: ``arm``, ``frozen, %`` and ``target - twin, points``.
        correlations: one for each seed, by name; the first two are judged and drawn as dots, the others as squares.
        title: title of the left panel.
    """
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=[1.2, 1])
    looks = plotting.looks(transfers.arm)
    for arm, group in transfers.groupby("arm", sort=False):
        points = looks[arm].points | {"markersize": 8, "alpha": 0.8, "label": arm}
        axes[0].plot((100 - group["frozen, %"]).clip(lower=1e-3), group["target - twin, points"], **points)
    axes[0].axhline(0, **_TWIN)
    axes[0].set(xscale="log", title=title, ylabel="target accuracy − full precision, points")
    axes[0].set_xlabel("not frozen: weights that changed level in the last epoch on the source, %")
    axes[0].xaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(),
        major_formatter=StrMethodFormatter("{x:g}"),
    )  # fmt: skip
    axes[0].legend(**_BELOW, bbox_to_anchor=(0.5, -0.16), ncols=4)
    plotting.dots(axes[1], correlations, dict.fromkeys([*correlations][2:], _CONTROL))
    axes[1].axvline(0, color=plotting.INK, linewidth=0.9)
    axes[1].set(
        xlim=(-1.08, 1.08), xticks=[-1, -0.5, 0, 0.5, 1], xlabel="rank correlation over the arms (strokes: seeds)"
    )
    axes[1].set_title("dots are judged; squares are there to compare")
    return figure
