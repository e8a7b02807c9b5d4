"""Benchmark results: medians and ratios of one run, as a table and as JSON."""

import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from lowbit import environment

if TYPE_CHECKING:
    import pandas as pd

UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}
PEERS = ("brevitas", "torchao", "onnxruntime", "openvino")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Result(TypedDict):
    """One engine on one case; ``ratio`` is the median over rounds of its time over the baseline's in that round."""

    case: str
    engine: str
    threads: int
    median: float
    unit: str
    ratio: float
    baseline: str
    repeats: int


def summarize(
    case: str, seconds: dict[str, list[float]], baseline: str, threads: int | None = None, unit: str = "ms"
) -> list[Result]:
    """One `Result` an engine from its times round by round (seconds; the baseline among them).

    ``unit`` is that of the medians: s, ms or µs; ``threads=None`` takes the number that torch uses in this process.
    """
    return [
        Result(
            case=case,
            engine=engine,
            threads=threads or torch.get_num_threads(),
            median=UNITS[unit] * statistics.median(times),
            unit=unit,
            ratio=statistics.median(t / b for t, b in zip(times, seconds[baseline], strict=True)),
            baseline=baseline,
            repeats=len(times),
        )
        for engine, times in seconds.items()
    ]


def show(results: list[Result]) -> None:
    """Prints one table a case and number of threads; the speed-up is 1 / ratio."""
    from rich.console import Console
    from rich.table import Table

    for case, threads in dict.fromkeys((result["case"], result["threads"]) for result in results):
        rows = [result for result in results if (result["case"], result["threads"]) == (case, threads)]
        many = "thread" if threads == 1 else "threads"
        timed = rows[0]["unit"] in UNITS
        title = f"{case}, {threads} {many}, median of {rows[0]['repeats']} rounds" if timed else case
        table = Table(title=title)
        for column, side in (
            ("engine", "left"),
            (rows[0]["unit"], "right"),
            (f"ratio to {rows[0]['baseline']}", "right"),
            *([("times as fast", "right")] if timed else []),
        ):
            table.add_column(column, justify=side)
        for row in rows:
            ratio = row["ratio"]
            cells = [f"{row['median']:.{1 if row['median'] >= 10 else 2}f}", f"{ratio:.{2 if ratio >= 0.1 else 3}f}"]
            table.add_row(row["engine"], *cells, *([f"{1 / ratio:.1f}"] if timed else []))
        Console().print(table)


def show_skipped(skipped: list[dict[str, Any]]) -> None:
    """Prints which engines gave no times on which cases, and why; dicts of ``case``, ``engine``, ``reason``."""
    from rich.console import Console

    reasons: dict[tuple[str, str], list[str]] = {}
    for one in skipped:
        cases = reasons.setdefault((one["engine"], one["reason"]), [])
        if one["case"] not in cases:
            cases.append(one["case"])
    for (engine, why), cases in reasons.items():
        Console().print(f"skipped: {engine} ({'; '.join(cases)}): {why}", markup=False, highlight=False)


def machine() -> dict[str, Any]:
    """What a measurement depends on besides the code: `lowbit.environment.describe` and caches, peers, date, load."""
    from lowbit.kernels import native

    return {
        **environment.describe(),
        "caches": caches(),
        "native": native.isa(),
        "peers": {name: environment.version(name) for name in PEERS},
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def caches() -> dict[str, int]:
    """Bytes of one core's data caches by level, ``{"L1": 49152, ...}``, L3 shared; empty where Linux does not tell."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("K")) * 1024
    return found


def write(path: Path, results: list[Result], about: dict[str, Any]) -> list[Path]:
    """Writes the results, a list, and next to them ``<name>.machine.json`` with what they depend on; returns both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [path, _write_about(path, about)]


def write_table(path: Path, frame: "pd.DataFrame", about: dict[str, Any]) -> list[Path]:
    """The same for a table, written as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")
    return [path, _write_about(path, about)]


def _write_about(path: Path, about: dict[str, Any]) -> Path:
    beside = path.with_name(f"{path.stem}.machine.json")
    beside.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return beside
