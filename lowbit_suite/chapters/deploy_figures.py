"""Figures of notebook 16: sizes of files, agreement of two models, plans, and other engines' recorded benchmarks."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lowbit import paths
from lowbit.engine import format as file_format
from lowbit.engine.runtime import Plan
from lowbit.extras import extra
from lowbit.nn.packed import PackedLayer

with extra("course", "lowbit_suite.chapters.deploy_figures"):
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

from lowbit_suite import plotting


def sizes(files: pd.DataFrame, parts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Draw the sizes of files, and what the packed ones consist of.

    Args:
        files: columns ``model``, ``file`` and ``bytes``.
        parts: for each model, the bytes of each part of its packed file.
    """
    size = (13.5, 1.2 + 0.45 * len(files))
    figure, axes = plt.subplots(1, 2, figsize=size, width_ratios=[1, 1.25])
    kinds = list(dict.fromkeys(files.file))
    colors = [
        plotting.METHODS[kind].color if kind in plotting.METHODS else plotting.PARTS[i] for i, kind in enumerate(kinds)
    ]
    for y, row in enumerate(files.itertuples()):
        axes[0].barh(y, row.bytes / 1000, color=colors[kinds.index(row.file)])
        axes[0].text(row.bytes / 1000, y, f" {row.bytes / 1000:,.0f} kB", va="center", size=10)
    axes[0].set_yticks(range(len(files)), files.model + ", " + files.file)
    axes[0].set(xlabel="size of the file, kB", xlim=(0, 1.2 * files.bytes.max() / 1000))
    for y, own in enumerate(parts.values()):
        left = np.cumsum([0, *own.values()]) / 1000
        for i, (part, nbytes) in enumerate(own.items()):
            label = part if y == 0 else None
            axes[1].barh(y, nbytes / 1000, left=left[i], color=plotting.PARTS[2 + i], label=label)
    axes[1].set_yticks(range(len(parts)), list(parts))
    axes[1].set(xlabel="kB", title="parts of the packed file")
    for ax in axes:
        ax.invert_yaxis()
        ax.grid(False, axis="y")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def folded(trained: Tensor, layer: PackedLayer) -> Figure:
    """Draw a corner of one layer: its weight as trained, the packed integers, the scales, and their product.

    Args:
        trained: the weight of the quantized layer, ``[N, K]`` or ``[N, C, 3, 3]``.
        layer: the packed layer.
    """
    weights = trained, layer.weight.integers().float(), layer.weight.dequantize()
    corner = [w[:8, :8, 1, 1] if w.ndim == 4 else w[:8, :8] for w in weights]
    figure, axes = plt.subplots(1, 4, figsize=(14.5, 3.9), width_ratios=[8, 8, 1.3, 8])
    plotting.matrix(axes[0], corner[0], "as trained", digits=2, size=9)
    plotting.matrix(axes[1], corner[1], "packed: integers", digits=0, size=9)
    plotting.matrix(axes[2], 1000 * layer.scale[:8, None], "1000 × scale", digits=1, size=9)
    plotting.matrix(axes[3], 1000 * corner[2], "1000 × scale × integers", digits=0, size=9)
    for ax in axes[[0, 1, 3]]:
        ax.set_xlabel("input channel")
    axes[0].set_ylabel("output channel")
    return figure


def rounding(watched: pd.DataFrame) -> Figure:
    """Draw how many inputs of each layer differ between two models, before and after rounding to integers.

    Args:
        watched: columns ``model``, ``index`` (position of the layer), ``numbers``, ``values that differ, %`` and
            ``integers that differ, %``.
    """
    models = list(dict.fromkeys(watched.model))
    size, least = (7.5 * len(models), 3.6), 100 / watched.numbers.max() / 3
    figure, axes = plt.subplots(1, len(models), figsize=size, sharey=True, squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        own = watched[watched.model == model]
        for what, color, marker in (("values", plotting.PARTS[1], "s"), ("integers", plotting.PARTS[0], "o")):
            share = own[f"{what} that differ, %"].clip(lower=least)
            ax.plot(own["index"], share, marker=marker, color=color, label=f"{what} that differ")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(yscale="log", xlabel="packed layer, in the order of execution", title=model, ylim=(least / 2, 200))
    axes[0, 0].set_ylabel("share at the layer's input, %\n(the lowest line is: none)")
    axes[0, -1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def plan(plan: Plan, seconds: np.ndarray) -> Figure:
    """Draw a plan: its operations and what each one reads, where values lie in memory, and how long each takes.

    Args:
        plan: the plan.
        seconds: `Plan.time` of it, ``[operations]``.
    """
    rows = plan.operations()
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    color = {kind: plotting.PARTS[i % len(plotting.PARTS)] for i, kind in enumerate(kinds)}
    hatch = {kind: ("", "///", "...")[i // len(plotting.PARTS)] for i, kind in enumerate(kinds)}
    looks = [{"facecolor": color[row["kind"]], "hatch": hatch[row["kind"]]} for row in rows]
    size = (max(10.0, 0.36 * len(rows)), 7.6)
    figure, axes = plt.subplots(3, 1, figsize=size, sharex=True, height_ratios=[1.25, 1, 1])
    _flow(axes[0], rows, looks)
    _memory(axes[1], plan, rows)
    for at, (look, spent) in enumerate(zip(looks, seconds, strict=True)):
        axes[2].bar(at, 1e6 * spent, width=0.85, edgecolor=plotting.PAPER, **look)
    total = f"one image takes {1e6 * sum(seconds):.0f} µs"
    axes[2].set(title=total, xlabel="operation, in order", ylabel="microseconds", xlim=(-0.8, len(rows) - 0.2))
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[2].grid(False, axis="x")
    handles = [Rectangle((0, 0), 1, 1, facecolor=color[kind], hatch=hatch[kind]) for kind in kinds]
    axes[0].legend(handles, kinds, fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _flow(ax: Axes, rows: list[dict[str, Any]], looks: list[dict[str, Any]]) -> None:
    """Boxes for operations; a line to the next, and an arc to a later one, that reads what a box wrote."""
    writer = {tensor: at for at, row in enumerate(rows) for tensor in row["outputs"]}
    edges = {(writer[tensor], at) for at, row in enumerate(rows) for tensor in row["inputs"] if tensor in writer}
    farthest = max((end - start for start, end in edges), default=1)
    for start, end in edges:
        if end - start == 1:
            ax.plot([start, end], [0, 0], color=plotting.INK, linewidth=1.2, zorder=1)
            continue
        angle = np.linspace(0, np.pi, 40)
        x, y = (start + end) / 2 - (end - start) / 2 * np.cos(angle), 0.28 + 0.28 * (end - start) * np.sin(angle)
        ax.plot(x, y, color=plotting.INK, linewidth=1.2, zorder=1)
    for at, (row, look) in enumerate(zip(rows, looks, strict=True)):
        ax.add_patch(Rectangle((at - 0.4, -0.3), 0.8, 0.6, edgecolor=plotting.PAPER, zorder=2, **look))
        bits = "" if row["bits"] is None else str(row["bits"])
        ax.text(at, 0, bits, ha="center", va="center", size=10, weight="bold", color=plotting.PAPER, zorder=3)
        shape = f"{row['height']}×{row['width']}×{row['channels']}"
        ax.text(at, -0.45, shape, ha="center", va="top", size=8, rotation=90)
    ax.set(
        title="operations; numbers are bits of weights, below is the output's size", ylim=(-2.1, 0.6 + 0.28 * farthest)
    )
    ax.axis("off")


def _memory(ax: Axes, plan: Plan, rows: list[dict[str, Any]]) -> None:
    """A rectangle for each value: from the operation that writes it to the last that reads it, at its addresses."""
    header = np.frombuffer(plan.content, file_format.HEADER, 1)[0]
    tensors = np.frombuffer(plan.content, file_format.TENSOR, int(header["tensors"]), file_format.HEADER.itemsize)
    used: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        for tensor in (*row["inputs"], *row["outputs"]):
            used.setdefault(tensor, []).append(at)
    labels = {file_format.FLOATS: "floats", file_format.MAP: "integers"}
    for number, times in used.items():
        if number in (header["input"], header["output"]):
            continue  # these two lie outside
        one = tensors[number]
        shape = (int(one[name]) for name in ("height", "width", "channels", "kind"))
        border = int(one["border_y"]), int(one["border_x"])
        size = file_format.Tensor(*shape, border=border, place=int(one["place"])).nbytes
        ax.add_patch(
            Rectangle(
                (min(times) - 0.4, int(one["offset"]) / 1000), max(times) - min(times) + 0.8, size / 1000,
                facecolor=plotting.PARTS[1 if one["kind"] == file_format.FLOATS else 0], edgecolor=plotting.PAPER,
                alpha=0.75, label=labels.pop(int(one["kind"]), None),
            )
        )  # fmt: skip
    kilobytes = plan.arena_bytes / 1000
    ax.set(title=f"values between operations: {kilobytes:.0f} kB in all", ylabel="address, kB", ylim=(0, kilobytes))
    ax.grid(False, axis="x")
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))


FAMILIES = ("torch .*", "onnxruntime .*", "openvino .*", "lowbit 3-bit plan", "lowbit 3-bit runner")
"""Patterns of the engines that `peers` shows: of each, the variant that took the least time."""
NETWORKS = ("resnet20, 32 px", "resnet18, 224 px", "deit_tiny_patch16_224, 224 px")


def peers() -> Figure | None:
    """Draw recorded benchmarks (``results/bench``): latency of three networks, and process start to first answer.

    Returns:
        The figure; None where the records are missing, after a line that says so.
    """
    records = [paths.recorded(f"bench/{name}.json") for name in ("models", "start")]
    if not all(path.exists() for path in records):
        print("The recorded benchmarks are not here: results/bench comes with the source tree.")
        return None
    table = pd.concat(pd.DataFrame(json.loads(path.read_text())) for path in records)
    cases = [f"{network}, batch 1" for network in NETWORKS]
    figure, axes = plt.subplots(2, 2, figsize=(13, 5.2))
    for ax, case in zip(axes.flat, [*cases, f"{cases[0]}: process start to first answer"], strict=True):
        own = table[table.case == case].set_index("engine")["median"]
        families = [own[own.index.str.fullmatch(pattern)] for pattern in FAMILIES]
        times = pd.concat(family.nsmallest(1) for family in families)
        colors = [plotting.PARTS[0] if engine.startswith("lowbit") else plotting.GREY for engine in times.index]
        ax.barh(times.index, times, color=colors)
        for y, spent in enumerate(times):
            ax.text(spent, y, f" {spent:,.0f}" if spent >= 100 else f" {spent:.3g}", va="center", size=10)
        ax.set(title=case.replace(", batch 1", ""), xlabel="one image, ms")
        ax.margins(x=0.12)
        ax.invert_yaxis()
        ax.grid(False, axis="y")
    axes[1, 1].set(xscale="log", xlabel="ms, logarithmic axis", xlim=(1, 20_000))
    return figure


def peers_caption() -> str:
    """One line that says where, when and with which versions `peers` was measured; empty where it is missing."""
    path = paths.recorded("bench/models.machine.json")
    if not path.exists():
        return ""
    machine = json.loads(path.read_text())["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["peers"].items() if version)
    return (
        f"Recorded {machine['date'][:10]} on {machine['cpu']}, {', '.join(machine['isa'])}, one thread: torch "
        f"{machine['torch']}, {versions}. Commands: lowbit bench models; lowbit bench start"
    )
