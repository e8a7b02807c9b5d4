"""What the machine could do at most, measured in the same run, and lowbit's kernels drawn against it.

Nothing here is taken from a data sheet. Bandwidth is the best of torch's reductions over an array that no cache holds
(memory), or that L3 holds and L2 does not. The peaks are the best large products and convolutions of torch's own
libraries (MKL or OpenBLAS and oneDNN; for int8 oneDNN): what good libraries reach, not what the instructions could.
Kernels can come out above such a roof.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cases import Case
from benchmarks.kernels import Outcome, torch_float, torch_int8
from benchmarks.processes import Built, EngineError, Make, Worker
from benchmarks.report import caches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROUNDS = 5
MEMORY_BYTES = 512 * 2**20
PRODUCTS = {
    "product of 1024³": Case(1024, 1024, 1024),
    "product of 2048³": Case(2048, 2048, 2048),
    "3×3 convolution, 256 channels": Case(784, 256, 256, image=28),  # always by oneDNN, products in fp32 may not be
}
REDUCTIONS = {"sum": torch.sum, "amax": torch.amax}


def _read(threads: int, nbytes: int, reduction: str) -> Built:
    torch.set_num_threads(threads)
    x = torch.ones(nbytes // 4)
    return Built(partial(REDUCTIONS[reduction], x), facts={"work": nbytes})


def _multiply(threads: int, case: Case, kind: str) -> Built:
    built = (torch_int8 if kind == "int8" else torch_float)(case, threads)
    built.facts["work"] = case.operations
    return built


def l3_bytes(threads: int) -> int | None:
    """The size of an array that overflows the L2 of every thread's core and fits into L3; None if there is none."""
    have = caches()
    if "L3" not in have or "L2" not in have:
        return None
    nbytes = max(2 * have["L2"] * threads, have["L3"] // 4)
    return nbytes if nbytes <= have["L3"] // 2 else None


def measure(
    threads: int, memory_bytes: int = MEMORY_BYTES, products: dict[str, Case] = PRODUCTS
) -> list[dict[str, Any]]:
    """The roofs for so many threads: dicts of ``what``, ``threads``, ``value``, ``unit`` and ``how`` it was reached."""
    probes: dict[str, dict[str, Make]] = {
        "memory read": {f"torch.{name}": partial(_read, threads, memory_bytes, name) for name in REDUCTIONS}
    }
    if nbytes := l3_bytes(threads):
        probes["L3 read"] = {f"torch.{name}": partial(_read, threads, nbytes, name) for name in REDUCTIONS}
    for kind in ("fp32", "int8"):
        probes[f"{kind} best"] = {name: partial(_multiply, threads, case, kind) for name, case in products.items()}
    worker, roofs = Worker(threads), []
    try:
        for what, ways in probes.items():
            found: dict[str, float] = {}
            for how, make in ways.items():
                try:
                    work = worker.build(make)["work"]
                    found[how] = work / min(worker.burst() for _ in range(ROUNDS)) / 1e9
                except EngineError:  # a missing operator leaves a roof out
                    continue
            if found:
                how = max(found, key=found.__getitem__)
                unit = "GB/s" if "read" in what else "GOP/s"
                roofs.append({"what": what, "threads": threads, "value": found[how], "unit": unit, "how": how})
    finally:
        worker.close()
    return roofs


def attained(outcome: Outcome) -> list[dict[str, Any]]:
    """What each of lowbit's native engines reached: GB/s of packed weights where M = 1, else GOP/s (2·M·N·K a call)."""
    from benchmarks.report import UNITS

    facts = {(fact["case"], fact["threads"], fact["engine"]): fact for fact in outcome.facts}
    found = []
    for result in outcome.results:
        if not result["engine"].startswith("lowbit") or "compiled" in result["engine"]:
            continue
        fact = facts[result["case"], result["threads"], result["engine"]]
        seconds = result["median"] / UNITS[result["unit"]]
        reads = fact["m"] == 1
        value = fact["bytes" if reads else "operations"] / seconds / 1e9
        keys = {key: result[key] for key in ("case", "engine", "threads")}
        found.append({**keys, "value": value, "unit": "GB/s" if reads else "GOP/s"})
    return found


def draw(outcome: Outcome, roofs: list[dict[str, Any]]) -> "Figure":
    """One row of panels for each number of threads: bandwidth where M = 1, operations elsewhere."""
    import matplotlib.pyplot as plt

    from lowbit_suite import plotting

    plotting.use_style()
    points = attained(outcome)
    counts = list(dict.fromkeys(point["threads"] for point in points)) or [1]
    units = [unit for unit in ("GB/s", "GOP/s") if any(point["unit"] == unit for point in points)] or ["GB/s"]
    cases = {unit: list(dict.fromkeys(p["case"] for p in points if p["unit"] == unit)) for unit in units}
    width = [max(2.2, len(cases[unit])) for unit in units]
    figure, axes = plt.subplots(
        len(counts),
        len(units),
        figsize=(4 + 1.3 * sum(width), 0.8 + 4.6 * len(counts)),
        squeeze=False,
        width_ratios=width,
    )
    for row, threads in zip(axes, counts, strict=True):
        for ax, unit in zip(row, units, strict=True):
            here = [p for p in points if (p["threads"], p["unit"]) == (threads, unit)]
            _panel(ax, here, cases[unit], [r for r in roofs if (r["threads"], r["unit"]) == (threads, unit)])
            what = "packed weights read" if unit == "GB/s" else "additions and multiplications"
            ax.set(ylabel=unit, title=f"{what}, {threads} thread{'s' * (threads > 1)}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _panel(ax: "Axes", points: list[dict[str, Any]], cases: list[str], roofs: list[dict[str, Any]]) -> None:
    from lowbit_suite import plotting

    engines = list(dict.fromkeys(point["engine"] for point in points))
    colors = {
        "2-bit": plotting.BLUE,
        "3-bit": plotting.ORANGE,
        "4-bit": plotting.GREEN,
        "4-bit uniform": plotting.PURPLE,
    }
    marks = {"2-bit": "o", "3-bit": "s", "4-bit": "^", "4-bit uniform": "D"}
    for i, engine in enumerate(engines):
        kind = engine.removeprefix("lowbit ").removesuffix(", int8 in")
        filled = engine.endswith("int8 in")
        own = [point for point in points if point["engine"] == engine]
        ax.plot(
            [cases.index(point["case"]) + 0.8 * ((i + 0.5) / len(engines) - 0.5) for point in own],
            [point["value"] for point in own],
            marks.get(kind, "o"),
            color=colors.get(kind, plotting.GREY),
            markerfacecolor=colors.get(kind, plotting.GREY) if filled else "white",
            markeredgewidth=1.5,
            label=engine.removeprefix("lowbit ") + ("" if filled else ", float in"),
        )
    for i, roof in enumerate(sorted(roofs, key=lambda roof: roof["value"])):
        ax.axhline(roof["value"], color="black", linestyle=("--", ":", "-.")[i % 3], linewidth=1.2, zorder=1)
        text = f"{roof['what']}\n{roof['value']:.0f} {roof['unit']}"
        where = ("axes fraction", "data")
        ax.annotate(text, (1, roof["value"]), (4, 0), where, "offset points", ha="left", va="center", size=9)
    for i in range(0, len(cases), 2):  # bands tell which points belong together
        ax.axvspan(i - 0.5, i + 0.5, color="black", alpha=0.05, linewidth=0)
    wrapped = [case.replace(", cold", "\nfrom memory").replace(" (", "\n(").replace(", ", "\n") for case in cases]
    ax.set_xticks(range(len(cases)), wrapped, size=9)
    ax.set_xlim(-0.5, len(cases) - 0.5)
    ax.set_ylim(0, 1.12 * max([point["value"] for point in points + roofs], default=1))
    ax.grid(False, axis="x")


def save(figure: "Figure", path: Path) -> Path:
    """Writes the figure to ``path`` (its ending says the format)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
