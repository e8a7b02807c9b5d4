"""The PNG twins of the explorables: ``python -m lowbit_suite.explorables.twins`` draws them into ``twins/``."""

import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lowbit_suite import plotting
from lowbit_suite.explorables import FOLDER, reference

WIDTH = 9.0  # inches


def denseshift() -> Figure:
    """Three settings of four latents: gates, weight, gradients."""
    settings = ([-0.7, -0.4, 0.3, 0.6], [0.1, 0.2, 0.7, -0.3], [0.4, 0.5, 0.2, 0.1])
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.9), sharey=True)
    for ax, latents in zip(axes, settings, strict=True):
        found = reference.denseshift(latents, 1.0, "sqrt")
        gradients = [found["signGradient"], *found["gateGradients"]]
        run = found["exponent"]
        in_run = [False, *(k >= 3 - run for k in range(3))]
        bars = ax.bar(range(4), gradients, color=[plotting.BLUE if inside else plotting.GREY for inside in in_run])
        for bar, inside in zip(bars, in_run, strict=True):
            bar.set_hatch("//" if inside else "")
        labels = [f"{value + 0.0:.2f}".replace("-", "−") for value in gradients]
        ax.bar_label(bars, labels, fontsize=9, padding=2)
        states = ["+" if latents[0] >= 0 else "−", *("open" if t > 0 else "closed" for t in latents[1:])]
        names = ("sign", "$t_1$", "$t_2$", "$t_3$")
        ax.set_xticks(range(4), [f"{name}\n{state}" for name, state in zip(names, states, strict=True)])
        ax.set(title=f"weight {found['weight']:+.0f}".replace("-", "−") + f", run of {run} open gates", ylim=(-1.3, 3))
        ax.axhline(0, color="black", linewidth=0.8)
        ax.grid(False, axis="x")
    axes[0].set_ylabel("gradient, G = 1")
    figure.supxlabel("hatched: gates of the run", fontsize=9)
    return figure


def oscillation() -> Figure:
    """A path, and the frequency over the optimum."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    path = reference.train(0.3, 0.1, False, 1060)
    latents, codes = path["latents"][-60:], path["codes"][-60:]
    plotting.trajectory(axes[0], latents, codes, [0.5], "optimum 0.3, learning rate 0.1, fixed scale")
    axes[0].axhline(0.3, color=plotting.GREEN, linestyle=":", label="optimum")
    axes[0].set_ylim(-0.15, 1.9)
    axes[0].legend(fontsize="small", loc="upper center", ncols=2)
    optima = np.linspace(0.1, 1.9, 19)
    for rate, learned, marker, color in (
        (0.1, False, "o", plotting.BLUE),
        (0.03, False, "x", "black"),
        (0.1, True, "s", plotting.ORANGE),
    ):
        measured, scales = [], []
        for optimum in optima:
            path = reference.train(float(optimum), rate, learned, 1500)
            measured.append(np.mean(reference.reversals(path["codes"])[-1000:]))
            scales.append(np.mean(path["scales"][-1000:]))
        label = f"measured, {'learned' if learned else 'fixed'} scale, rate {rate:g}"
        fill = {} if marker == "x" else {"markerfacecolor": "none"}
        axes[1].plot(optima, measured, marker, color=color, label=label, markersize=6, **fill)
        if rate == 0.1:
            x = np.linspace(0, 2, 401)
            d = x / np.mean(scales) % 1
            axes[1].plot(x, 2 * np.minimum(d, 1 - d), "--" if learned else "-", color=color, linewidth=1)
    axes[1].set(xlabel="optimum t", ylabel="reversals a step", title="lines: 2 · min(d, 1 − d)", ylim=(0, 1.6))
    axes[1].legend(fontsize="small", loc="upper center")
    return figure


def query_key() -> Figure:
    """Both angles over the turn, for the given S and for that of a loss."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharey=True)
    degrees = np.arange(-90, 90.5, 0.5)
    for ax, loss, title in zip(axes, (False, True), ("S given", "S of a squared loss"), strict=True):
        found = [reference.query_key(float(turn), 2, loss) for turn in degrees]
        ax.plot(degrees, [one["apartAngle"] for one in found], color=plotting.ORANGE, label="rounded apart")
        ax.plot(degrees, [one["oneAngle"] for one in found], color=plotting.BLUE, linestyle="--", label="one matrix")
        ax.set(title=f"{title}, 2 bits", xlabel="turn of $W_q$, degrees", xticks=range(-90, 91, 45))
    axes[0].set_ylabel("error of direction, degrees")
    axes[0].legend()
    return figure


def annealing() -> Figure:
    """The latent weights around the thresholds, and the shares over the boundary range."""
    found = reference.latents(reference.network())
    counts, within = (np.array(found[key]) for key in ("counts", "within"))
    share, total = 100 * counts / counts.sum(), counts.sum()
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.3))
    edges = np.linspace(-2, 2, len(share) + 1)
    axes[0].stairs(share, edges, color=plotting.GREY, label="held")
    y = np.linspace(-2, 2, 8001)
    height = share[np.clip(np.searchsorted(edges, y, side="right") - 1, 0, len(share) - 1)]
    for k in (-1, 0, 1):
        zone = np.abs(y - k) <= 0.02
        label = "may move, boundary range 0.02" if k == 0 else None
        axes[0].fill_between(y, 0, height, where=zone, color=plotting.ORANGE, label=label)
        axes[0].axvline(k, color="black", linestyle="--", linewidth=0.8, zorder=0)
    axes[0].set(xlabel="y = 2 · weight / scale", ylabel="weights in a bin of 0.025, %", ylim=(0, 1.25))
    axes[0].legend(fontsize="small", loc="upper center")
    boundary = np.arange(1, 501) / 1000
    reach = 0.05
    axes[1].loglog(boundary, 100 * within[1:] / total, color=plotting.ORANGE, label="may move")
    reached = 100 * within[np.minimum(np.arange(1, 501), round(1000 * reach))] / total
    label = f"may reach a threshold, reach {reach:g}"
    axes[1].loglog(boundary, reached, color=plotting.BLUE, linestyle="--", label=label)
    axes[1].set(xlabel="boundary range", ylabel="weights, %")
    axes[1].legend(fontsize="small", loc="upper left")
    return figure


DRAWINGS = {"denseshift": denseshift, "oscillation": oscillation, "query_key": query_key, "annealing": annealing}


def write(name: str) -> None:
    """Draw one twin; 128 colors keep it small, since notebooks hold it."""
    drawn = io.BytesIO()
    figure = DRAWINGS[name]()
    figure.savefig(drawn, dpi=96)
    plt.close(figure)
    image = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(FOLDER / "twins" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    plotting.use_style()
    (FOLDER / "twins").mkdir(exist_ok=True)
    for twin in DRAWINGS:
        write(twin)
