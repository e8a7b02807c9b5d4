"""Timing for notebooks: rounds in which every engine takes part, so that ratios do not depend on other programs."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lowbit.extras import extra

with extra("course", "lowbit_suite.chapters.timing"):
    import pandas as pd


def durations(call: Callable[[], Any], least: float) -> list[float]:
    """Seconds of each call, for at least ``least`` seconds in all; five calls, or fewer if they take 5·``least``."""
    taken: list[float] = []
    while sum(taken) < least or (len(taken) < 5 and sum(taken) < 5 * least):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def rounds(engines: Mapping[str, Callable[[], Any]], repeats: int, least: float) -> pd.DataFrame:
    """Time all engines in turn, several times. The order changes from round to round; a first call is not counted.

    Args:
        engines: function to time for each name.
        repeats: number of rounds.
        least: seconds for which an engine is called in each round.

    Returns:
        Median seconds of a call, one row a round (the index ``repeat``) and one column an engine.
    """
    for call in engines.values():
        call()
    names, rows = list(engines), []
    for repeat in range(repeats):
        first = repeat % len(names)
        turned = names[first:] + names[:first]
        rows.append({name: np.median(durations(engines[name], least)) for name in turned})
    return pd.DataFrame(rows, columns=names).rename_axis("repeat")


def copies(make: Callable[[], Any], nbytes: int, total: int) -> Iterator[Any]:
    """Return an endless iterator over enough copies of an array to fill ``total`` bytes, at least one.

    Args:
        make: makes one copy.
        nbytes: bytes of one copy.
        total: bytes of all copies; more than the caches hold makes each use read from memory.
    """
    return itertools.cycle([make() for _ in range(max(1, math.ceil(total / nbytes)))])


def reading_speeds(largest: int) -> pd.DataFrame:
    """Measure how fast `torch.sum` reads a block of float32 numbers that is in use again and again.

    Args:
        largest: bytes of the largest block; the others are smaller powers of two, from 128 KiB on.

    Returns:
        Columns ``bytes`` and ``GB/s``, the fastest of many calls for each block.
    """
    rows = []
    for size in (2**i for i in range(17, largest.bit_length())):
        block = torch.ones(size // 4)
        rows.append({"bytes": size, "GB/s": size / min(durations(block.sum, 0.15)) / 1e9})
    return pd.DataFrame(rows)


def peaks() -> dict[str, float]:
    """Measure PyTorch's fastest product with a matrix of 1024 by 1024, GOP/s, for ``"float32"`` and ``"8 bits"``.

    If PyTorch's 8-bit product is the slower one, the float32 figure counts for both.
    """
    a, b = torch.randn(2, 1024, 1024).unbind()
    a8, b8 = torch.randint(-8, 8, (2, 1024, 1024), dtype=torch.int8).unbind()
    peak = {}
    for name, product, left, right in (("float32", torch.mm, a, b.T), ("8 bits", torch._int_mm, a8, b8.T)):
        peak[name] = max(
            2 * m * 1024**2 / min(durations(lambda: product(left[:m], right), 0.15)) / 1e9  # noqa: B023
            for m in (64, 256, 1024)
        )
    return peak | {"8 bits": max(peak.values())}
