"""Benchmark results: medians and ratios of one run, as a table and as JSON."""

import statistics
from typing import TypedDict

import torch


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


def summarize(case: str, seconds: dict[str, list[float]], baseline: str) -> list[Result]:
    """One `Result` an engine from its times round by round (seconds; the baseline among them)."""
    return [
        Result(
            case=case,
            engine=engine,
            threads=torch.get_num_threads(),
            median=1e3 * statistics.median(times),
            unit="ms",
            ratio=statistics.median(t / b for t, b in zip(times, seconds[baseline], strict=True)),
            baseline=baseline,
            repeats=len(times),
        )
        for engine, times in seconds.items()
    ]


def show(results: list[Result]) -> None:
    """Prints one table a case."""
    from rich.console import Console
    from rich.table import Table

    for case in dict.fromkeys(result["case"] for result in results):
        rows = [result for result in results if result["case"] == case]
        table = Table(title=f"{case}, {rows[0]['threads']} threads, median of {rows[0]['repeats']} rounds")
        for column, side in (
            ("engine", "left"),
            (rows[0]["unit"], "right"),
            (f"ratio to {rows[0]['baseline']}", "right"),
        ):
            table.add_column(column, justify=side)
        for row in rows:
            table.add_row(row["engine"], f"{row['median']:.1f}", f"{row['ratio']:.2f}")
        Console().print(table)
