"""The course's figures: one style, colors that color-blind readers can tell apart, tensors drawn as tensors."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lowbit import metrics, paths
from lowbit.extras import extra

with extra("course", "lowbit_suite.plotting"):
    import matplotlib.pyplot as plt
    import pandas as pd
    import PIL.Image
    import seaborn as sns
    from IPython.core.getipython import get_ipython
    from IPython.core.pylabtools import print_figure
    from IPython.display import Image, Markdown, display
    from matplotlib.axes import Axes
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from lowbit_suite.records.context import current

PALETTE = sns.color_palette("colorblind")
BLUE, ORANGE, GREEN, RED, PURPLE = (PALETTE[i] for i in (0, 1, 2, 3, 4))
DIVERGING = "PuOr"  # for signed values: distinguishable with any color vision, white at zero
SEQUENTIAL = "cividis"  # for values of one sign: light means more, with any color vision
GREY = "0.45"  # for what is there to compare with
INK, PAPER = "black", "white"

# Seven hues that people with any color vision can tell apart, each at least 3:1 against white (a test computes both).
_BLUE, _VERMILION, _GREEN, _PINK = "#0072B2", "#D55E00", "#009E73", "#CC5A9E"
_INDIGO, _BROWN, _WINE = "#332288", "#7A4E00", "#882255"
PARTS = [_BLUE, _VERMILION, _GREEN, _PINK, _INDIGO, _BROWN, _WINE, "#767676"]
"""For the parts of one drawing that shows no methods: classes, bit fields, speakers, pieces of a file."""


LEVELS, LATENTS = _BLUE, _VERMILION  # the two values of one weight


class Look(NamedTuple):
    """How a line and its points are drawn, as matplotlib takes it."""

    color: str
    marker: Any
    dashes: tuple[float, ...] | str = ""  # of seaborn: "" is a solid line

    @property
    def line(self) -> dict[str, Any]:
        """Keywords for ``Axes.plot`` and ``Axes.errorbar``: color, marker and line style."""
        return {"color": self.color, "marker": self.marker, "linestyle": (0, self.dashes) if self.dashes else "-"}

    @property
    def points(self) -> dict[str, Any]:
        """The same without a line."""
        return self.line | {"linestyle": "none"}


_DASHED, _DOTTED = (4, 1.5), (1, 1.5)
METHODS = {
    "full precision": Look(INK, "*", _DOTTED),
    "denseshift": Look(_BLUE, "o"),
    "statsq": Look(_GREEN, "s"),
    "lsq": Look(_VERMILION, "D"),
    "s3": Look(_PINK, "^"),
    "pot": Look(_INDIGO, "v"),
    "apot": Look(_BROWN, "P"),
    "inq": Look(_WINE, "X"),
    "deepshift_q": Look(_BLUE, "<", _DASHED),
    "deepshift_ps": Look(_VERMILION, ">", _DASHED),
    "dorefa": Look(_GREEN, "p", _DASHED),
    "s3_low_variance": Look(_WINE, (3, 1, 0), _DASHED),
    "pact": Look(_INDIGO, "h", _DASHED),
    "uniform": Look(_BROWN, (4, 1, 0), _DASHED),
    "ewgs": Look(_WINE, "d", _DASHED),
    "ternary": Look(_PINK, (4, 1, 45), _DOTTED),
    "ttq": Look(_BROWN, (3, 1, 180), _DOTTED),
    "binary": Look(_INDIGO, (6, 1, 0), _DOTTED),
    "lsqplus": Look(_VERMILION, (8, 1, 0), _DOTTED),
    # the grids of notebook 18: StatsQ's, without a zero, and its twin with one
    "mid-rise": Look(_GREEN, "s"),
    "mid-tread": Look(_VERMILION, "D"),
}
"""The look of each method in every figure, by its name in the registry; a method of your own adds a line."""

_OTHERS: tuple[Any, ...] = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "d")


LEARNING_RATES = (
    "Validation result against the learning rate, on a logarithmic axis, one line for each arm; "
    "a ring marks the rate chosen for each."
)
"""What `learning_rates` draws, for the alternative text of any trials."""


def look(name: Any) -> Look:
    """The look of a method.

    Args:
        name: name in the registry or of the class, in any case, also followed by its bits or levels
            (``"S3, 2 bits"``, ``"StatsQ {±1, ±3}"``); the number 32 (bits) stands for full precision.

    Raises:
        KeyError: the method has no look in `METHODS`.
    """
    found = _found(name)
    if found is None:
        raise KeyError(f"no look for {name!r}; plotting.METHODS has {', '.join(METHODS)}; add a line there")
    return found


def part(index: int) -> Look:
    """The look of one part of a drawing, such as a class: a color of `PARTS`, and a marker that no other part has."""
    return Look(PARTS[index], _OTHERS[index])


def looks(names: Iterable[Any]) -> dict[Any, Look]:
    """A look for each name: of methods their own, of all others (widths, settings) shades from dark to light."""
    names = list(dict.fromkeys(names))
    others = [name for name in names if _found(name) is None]
    # Up to 0.55 the shades of this map have a contrast of at least 3:1 against white.
    shades = plt.get_cmap(SEQUENTIAL)(np.linspace(0, 0.55, len(others)))
    dashes = ("", _DASHED, _DOTTED)
    free = {
        name: Look(to_hex(shade), _OTHERS[i % len(_OTHERS)], dashes[i % len(dashes)])
        for i, (name, shade) in enumerate(zip(others, shades, strict=True))
    }
    return {name: free.get(name) or look(name) for name in names}


def styles(names: Iterable[Any]) -> dict[str, dict[Any, Any]]:
    """`looks` as seaborn takes them: ``sns.lineplot(..., hue=x, style=x, **plotting.styles(names))``."""
    chosen = looks(names)
    return {
        "palette": {name: own.color for name, own in chosen.items()},
        "markers": {name: own.marker for name, own in chosen.items()},
        "dashes": {name: own.dashes for name, own in chosen.items()},
    }


def _found(name: Any) -> Look | None:
    if isinstance(name, str):
        return METHODS.get(re.sub(r",? \d+ bits?$| \{.*\}$", "", name.lower()))
    return METHODS["full precision"] if name == 32 else None


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


def save(figure: Figure, name: str, alt: str | None = None) -> None:
    """Write ``figure`` as ``<name>.png`` to the run's figures folder (``results/scratch/figures`` outside a run).

    With ``alt``, a notebook also shows the figure here and closes it, so that ``plt.show()`` is not needed: only then
    does the stored output carry the text. nbconvert's classic template renders it, and MyST-NB does from the cell,
    where ``tools.tidy`` copies it; JupyterLab does not yet.

    Args:
        figure: the figure.
        name: name of the file, ``NN_name``.
        alt: what the figure shows to those who cannot see it: the axes and what to see, in one or two sentences.
    """
    folder = current().figures or paths.results() / "scratch" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, metadata={"Description": alt} if alt else None)
    if alt and get_ipython() is not None:
        display(Image(print_figure(figure, bbox_inches="tight"), alt=alt))
        plt.close(figure)


def alt_text(path: Path) -> str | None:
    """The alternative text that `save` wrote into a picture; None if it has none or is no picture."""
    try:
        with PIL.Image.open(path) as picture:
            return picture.info.get("Description")
    except PIL.UnidentifiedImageError:
        return None


def recorded(profile: str, name: str, table: str, alt: str | None = None) -> None:
    """Show a figure of a recorded run, with a caption of the facts in the table it was drawn from.

    Args:
        profile: profile of the run, ``"desk"`` or another folder of ``results/figures``.
        name: name of the figure, as given to `save`.
        table: name of the table, as given to `lowbit.save_table`.
        alt: alternative text, for pictures that were stored without one; else the caption stands for it.
    """
    path = paths.results() / "figures" / profile / f"{name}.png"
    facts = paths.results() / "tables" / profile / f"{table}.json"
    if not (path.exists() and facts.exists()):
        print(f"The recorded figure {name} is not here: results/figures and results/tables come with the source tree.")
        return
    caption = _caption(json.loads(facts.read_text()), pd.read_csv(facts.with_suffix(".csv")))
    display(Image(path.read_bytes(), width=860, alt=alt_text(path) or alt or caption), Markdown(f"*{caption}*"))


def _caption(about: dict[str, Any], rows: pd.DataFrame) -> str:
    """Data, network, epochs and seeds of a table, and the full-precision twin's accuracy at the end, if there."""
    settings = about["settings"]
    parts = [str(settings[key]) for key in ("dataset", "model_name") if key in settings]
    parts += [", ".join(settings["models"])] if "models" in settings else []
    parts += [f"{settings['epochs']} epochs"] if "epochs" in settings else []
    parts += [f"{len(settings['seeds'])} seeds"] if "seeds" in settings else []
    arm = next((column for column in ("method", "sigma", "bits", "arm", "cell") if column in rows), None)
    value = next((column for column in ("accuracy, %", "target, %", "mAP, %") if column in rows), None)
    rows = rows[rows.epoch == rows.epoch.max()] if "epoch" in rows else rows
    twin = rows[rows[arm].isin(["full precision", 32])] if arm and value else rows[:0]
    if len(twin):
        parts.append(f"full-precision twin {twin[value].mean():.1f} % ({value.removesuffix(', %')})")
    parts += [f"{settings['threads']} thread{'s' * (settings['threads'] > 1)}"] if "threads" in settings else []
    return f"Recorded at {settings['profile']} size: {', '.join(parts)}. Command: {about['command']}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The ends of `lowbit.metrics.interval`: seaborn draws it with ``errorbar=plotting.interval``."""
    return metrics.interval(values)[1:]


def table(frame: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """Return a table as readers should see it: rounded, without empty columns, and a dash in each empty cell.

    A single seed, for example, gives no interval, so its columns are left out.
    """
    shown = frame.dropna(axis="columns", how="all").round(digits)
    return shown.astype(dict.fromkeys(shown.columns[shown.isna().any()], object)).where(shown.notna(), "–")


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
    share.vlines(levels, 0, 100 * counts / counts.sum(), color=LEVELS, linewidth=3)
    share.plot(levels, 100 * counts / counts.sum(), "o", color=LEVELS)
    share.set_ylabel("weights on the level, %", color=LEVELS)
    share.set_ylim(bottom=0)
    share.grid(False)
    share.spines["right"].set_visible(True)


def number_line(ax: Axes, rows: dict[str, torch.Tensor]) -> None:
    """Draw sets of values on parallel number lines, one set per row in the look of its name, with zero marked."""
    for height, (levels, own) in enumerate(zip(reversed(rows.values()), reversed(looks(rows).values()), strict=True)):
        values = torch.as_tensor(levels).float().numpy()
        ax.axhline(height, color=GREY, linewidth=0.8, zorder=1)
        ax.plot(values, np.full(len(values), height), **own.points, zorder=2)
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
    ax.step(steps, values, where="post", color=LEVELS, label="level in use")
    ax.plot(steps, latents, color=LATENTS, label="latent weight")
    ax.set(title=title, xlabel="training step", ylabel="weight / scale", ylim=(low - margin, high + margin))


def boxes(
    ax: Axes,
    image: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    scores: torch.Tensor | None = None,
    title: str = "",
) -> None:
    """Draw a picture with boxes around its objects: each class has its color, and its mark at the lower right corner.

    Args:
        ax: axes to draw on.
        image: ``[3, height, width]``, uint8, or float from 0 to 1.
        boxes: float ``[n, 4]``: left, top, right and bottom edge in pixels.
        labels: int64 ``[n]``: class of each box.
        scores: float ``[n]`` of predicted boxes, which are dashed and carry their scores; None for true boxes.
        title: title of the axes.
    """
    height, width = image.shape[1:]
    ax.imshow(image.permute(1, 2, 0).cpu().numpy(), extent=(0, width, height, 0))  # box edges lie between pixels
    for i, ((left, top, right, bottom), label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        own, style = part(label), "-" if scores is None else "--"
        frame = {"edgecolor": own.color, "linestyle": style, "linewidth": 2, "fill": False}
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, **frame))
        ax.plot(right, bottom, **own.points, markersize=7, markeredgecolor=PAPER, clip_on=False)
        if scores is not None:
            ground = {"facecolor": PAPER, "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
            text = f"{scores[i]:.2f}"
            ax.text(left, top - 1, text, color=own.color, fontsize=8, weight="bold", bbox=ground)
    ax.set(title=title, xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    ax.grid(False)


def dots(ax: Axes, groups: Mapping[str, Sequence[float]], looks: Mapping[str, Look] | None = None) -> None:
    """Draw one row for each group, the first at the top: a stroke for each value, their mean and its interval.

    Args:
        ax: axes to draw on; the rows get the groups' names.
        groups: numbers by name, one for each seed; NaN is left out, and a group without numbers stays an empty row.
        looks: the look of groups by name; all others are black dots.
    """
    for y, (name, values) in enumerate(groups.items()):
        own = (looks or {}).get(name, Look(INK, "o"))
        shown = np.asarray(values, dtype=float)
        shown = shown[np.isfinite(shown)]
        if len(shown):
            mean, low, high = metrics.interval(shown)
            ax.plot(shown, np.full(len(shown), y), "|", color=own.color, alpha=0.6, markersize=12)
            ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], **own.points, capsize=3)
    ax.set_yticks(range(len(groups)), list(groups))
    ax.set_ylim(len(groups) - 0.5, -0.5)


def front(ax: Axes, cost: Sequence[float], quality: Sequence[float]) -> None:
    """Draw a Pareto front as steps up to the right edge of a logarithmic axis, whose ticks become plain numbers.

    Args:
        ax: axes to draw on, with the limits of the cost already set.
        cost: costs of the points on the front, lower is better.
        quality: their qualities, higher is better.
    """
    order, (low, high) = np.lexsort((quality, cost)), ax.get_xlim()
    x, y = [*np.asarray(cost)[order], high], [*np.asarray(quality)[order], np.max(quality)]
    ax.step(x, y, where="post", color=INK, linewidth=1.2, zorder=1)
    decades = 10.0 ** np.arange(-4, 7)[:, None]
    inside = (
        [tick for tick in (decades * steps).ravel() if low <= tick <= high]
        for steps in ([1, 2, 3, 5], np.arange(1, 10, 0.5), np.arange(1, 10, 0.1))
    )
    ticks = next((found for found in inside if len(found) >= 4), [low, high])
    ax.xaxis.set(
        major_locator=FixedLocator(ticks), minor_locator=NullLocator(), major_formatter=StrMethodFormatter("{x:g}")
    )


def named_front(ax: Axes, table: pd.DataFrame, cost: str, on_front: str) -> None:
    """Draw all networks in gray, and those on a front in the looks of their methods, named in a column at the left.

    Full precision is drawn and named even if it is not on the front.

    Args:
        ax: axes to draw on; they become logarithmic in the cost.
        table: one row an arm with ``method``, ``bits`` (32 for full precision), ``mean`` and the two columns below.
        cost: column of the costs.
        on_front: column of booleans: the rows on the front.
    """
    height = np.ptp(table["mean"]) or 1
    low, high = table[cost].min(), table[cost].max()
    ax.set(xscale="log", ylim=(table["mean"].min() - 0.08 * height, table["mean"].max() + 0.3 * height))
    ax.set_xlim(low * (low / high) ** 0.55, high * (high / low) ** 0.4)
    ax.plot(table[cost], table["mean"], "o", color=GREY, alpha=0.35, markersize=5)
    kept = table[table[on_front]].sort_values("mean")
    front(ax, kept[cost], kept["mean"])
    ticks = [tick for tick in ax.get_xticks() if tick >= 0.95 * low]  # none below the names
    ax.set_xticks(ticks[:: 1 + len(ticks) // 8])
    places = apart(kept["mean"], 0.085 * height)
    if len(kept):  # no name below its point, so the lines to them do not cross
        places += (kept["mean"] - places).max()
    chosen, left = looks(table.method), low * (low / high) ** 0.15
    for (_, row), y in zip(kept.iterrows(), places, strict=True):
        own, name = chosen[row.method], row.method if row.bits == 32 else f"{row.method} {row.bits}"
        ax.plot(row[cost], row["mean"], **own.points, markersize=11)
        ax.plot([left, row[cost]], [y, row["mean"]], color=own.color, linewidth=0.8)
        ax.text(left, y, f"{name} ", ha="right", va="center", size=10, weight="bold")
    for _, row in table[(table.bits == 32) & ~table[on_front]].iterrows():
        ax.plot(row[cost], row["mean"], **chosen[row.method].points, markersize=11)
        ax.annotate(row.method, (row[cost], row["mean"]), (9, -4), textcoords="offset points", size=10)


def methods_at_each_width(table: pd.DataFrame, hollow: Iterable[Any] = ()) -> Figure:
    """Draw the accuracy of methods, one row a method and one panel a width, beside their full-precision twin.

    Args:
        table: one row an arm with ``method``, ``bits``, ``mean``, ``low`` and ``high`` in percent; the twin has 32
            bits, and one bit is drawn with two, since files store it so.
        hollow: pairs ``(method, bits)`` whose marker stays empty.
    """
    twin = table[table.bits == 32].iloc[0]
    low_bit = table[table.bits < 32].assign(width=table.bits.clip(lower=2))
    order = low_bit.groupby("method")["mean"].mean().sort_values().index
    chosen, widths, empty = looks(order), sorted(low_bit.width.unique()), {*hollow}
    size = (12.5 if len(widths) > 1 else 7, 1.5 + 0.3 * len(order))
    figure, axes = plt.subplots(1, len(widths), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, width in zip(axes[0], widths, strict=True):
        ax.axvspan(twin.low, twin.high, color=GREY, alpha=0.15, linewidth=0)
        ax.axvline(twin["mean"], color=INK, linestyle=":", label="full precision")
        for row in low_bit[low_bit.width == width].itertuples():
            own, y = chosen[row.method], order.get_loc(row.method)
            ax.plot([row.low, row.high], [y, y], color=own.color, linewidth=1.5)
            fill = "none" if (row.method, row.bits) in empty else "full"
            ax.plot(row.mean, y, **own.points, markersize=9, fillstyle=fill)
        ax.set(title=f"{width} bits", xlabel="accuracy, %")
    axes[0, 0].set_yticks(range(len(order)), order)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize="small", loc="outside lower center")
    return figure


METHODS_AT_EACH_WIDTH = (
    "Accuracy of each method with its interval over seeds, one row a method and one panel a width; a dotted line "
    "and a gray band show the full-precision twin."
)
"""Alternative text for `methods_at_each_width`."""


def learning_rates(rates, arm: str, panel: str | None = None, value: str = "accuracy, %") -> Figure:
    """Draw the validation result of each learning rate, one line per arm; rings mark the chosen rates.

    Args:
        rates: the trials of `lowbit_suite.choose_rates`. A trial that failed (NaN) has no point.
        arm: the column that names the arms, one line each.
        panel: a column whose values get one panel each, or None.
        value: the column to draw, means over the seeds.
    """
    factors = sorted(rates.lr_factor.unique())
    arms = rates[arm].nunique()
    with plt.rc_context({"figure.constrained_layout.use": False}):  # seaborn's grids have a layout of their own
        grid = sns.relplot(
            rates, x="lr_factor", y=value, hue=arm, style=arm, col=panel, kind="line", errorbar=None,
            height=max(3.2, 0.3 * arms), aspect=1 if panel else 1.6, **styles(rates[arm]),
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


def describe_trials(rates: pd.DataFrame, arm: str, panel: str | None = None, value: str = "accuracy, %") -> str:
    """Alternative text for `learning_rates` with the same arguments: what it draws, the results, the chosen rates."""
    by = [arm] if panel is None else [panel, arm]
    means = rates.groupby([*by, "lr_factor"], dropna=False)[value].mean()
    chosen = rates[rates.chosen].drop_duplicates(by).lr_factor.value_counts().sort_index()
    multiples = ", ".join(f"{factor:g} ({count} arm{'s' * (count > 1)})" for factor, count in chosen.items())
    return (
        f"{LEARNING_RATES} Results lie between {means.min():.1f} and {means.max():.1f} ({value}). "
        f"Chosen multiples of the default rate: {multiples}."
    )


def show_trials(rates: pd.DataFrame, name: str, arm: str, panel: str | None = None, value: str = "accuracy, %") -> None:
    """Show and save the trials of `lowbit_suite.choose_rates`, or say that there were none.

    Args:
        rates: the trials; with a single learning rate there is nothing to draw.
        name: name of the figure, as for `save`.
        arm, panel, value: columns of ``rates``, as for `learning_rates`.
    """
    factors = rates.lr_factor.unique()
    if len(factors) == 1:
        print(f"no trials: every arm trains at {factors[0]:g} of its own rate")
        return
    save(learning_rates(rates, arm, panel, value), name, alt=describe_trials(rates, arm, panel, value))
    display(rates[rates.chosen].round(4))


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


def speeds(panels: Mapping[str, pd.DataFrame], ylabel: str, colors: Sequence[str] = PARTS) -> Figure:
    """Draw how many times as fast as a baseline engines are: a bar for the median, a dot for each round.

    The axis is logarithmic and bars begin at 1, since ratios multiply.

    Args:
        panels: title of each panel and its ratios, one row a round and one column an engine. The first level of the
            index names the group of bars.
        ylabel: what the ratios are relative to.
        colors: a color for each engine.
    """
    width = max(7.5, 1 + 0.9 * max(ratios.index.get_level_values(0).nunique() for ratios in panels.values()))
    figure, axes = plt.subplots(1, len(panels), figsize=(width * len(panels), 4.2), squeeze=False)
    for ax, (title, ratios) in zip(axes[0], panels.items(), strict=True):
        groups, engines = list(dict.fromkeys(ratios.index.get_level_values(0))), list(ratios.columns)
        for i, engine in enumerate(engines):
            for j, group in enumerate(groups):
                values, x = ratios.loc[group, engine], j + 0.8 * (i - (len(engines) - 1) / 2) / len(engines)
                label = engine if j == 0 else None
                height, look = values.median() - 1, {"color": colors[i], "alpha": 0.75, "label": label}
                ax.bar(x, height, bottom=1, width=0.7 / len(engines), **look)
                ax.plot(np.full(len(values), x), values, ".", color=INK, markersize=4, alpha=0.6)
        ax.axhline(1, color=INK, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(groups)), groups, fontsize="small")
        ax.set(title=title, yscale="log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.grid(False, axis="x")
    axes[0, 0].set_ylabel(ylabel)
    axes[0, -1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
