"""One linear layer or convolution at a time: lowbit's kernels against torch and the peers installed.

Two sorts of engines must not be mixed up: those "int8 in" get activations of 8 bits (as between layers that hand on
integers), all others get float32 and, if they calculate with integers, quantize inside the time measured.
All give float32 (torch's bf16: bf16).
"""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import runtimes
from benchmarks.cases import (
    CASES,
    W_SCALE,
    X_SCALE,
    Case,
    check_close,
    check_equal,
    exact,
    rotate,
)
from benchmarks.processes import BURST, Built, Workers
from benchmarks.report import Result
from lowbit import kernels
from lowbit.errors import LowbitError
from lowbit.kernels import PackedWeight, compiled, native

BASELINE = "torch fp32"
Builder = Callable[[Case, int], Built]
"""Makes an engine for a case and a number of threads, in the engine's process."""


# ---- torch ----


def torch_float(case: Case, threads: int, dtype: torch.dtype = torch.float32, compile: bool = False) -> Built:
    """``F.linear`` or ``F.conv2d`` as it is, or under torch.compile."""
    torch.set_num_threads(threads)
    weight = case.integers(8).float() * W_SCALE
    x, expected = case.input(), case.product(case.input(), weight)
    x = x.to(dtype)
    weight = weight.to(dtype, memory_format=torch.channels_last if case.image else torch.preserve_format)
    run = torch.compile(case.product) if compile else case.product
    copies = [weight.clone() for _ in range(case.copies(weight.nbytes))]
    error = check_close(run(x, weight), expected, 0.02)
    return Built(rotate([partial(run, x, copy) for copy in copies]), facts={"bytes": weight.nbytes, "error": error})


def torch_int8(case: Case, threads: int) -> Built:
    """oneDNN's int8 product or convolution, unsigned activations given, weights packed beforehand, float32 out."""
    torch.set_num_threads(threads)
    ops = torch.ops.onednn
    weight = case.integers(8)
    steps = (case.input() / X_SCALE).round().clamp(0, 255).to(torch.uint8)  # as after ReLU; unsigned is VNNI's own way
    expected = case.product(steps.float() * X_SCALE, weight.float() * W_SCALE)
    scale, zero = torch.full((case.n,), W_SCALE), torch.zeros(case.n, dtype=torch.int64)
    common = (scale, zero, None)
    if case.image:
        geometry = ([1, 1], [1, 1], [1, 1], 1)

        def prepack() -> Tensor:
            return ops.qconv_prepack(weight, scale, X_SCALE, 0, *geometry, list(steps.shape))

        def run(w: Tensor) -> Tensor:
            end = (1.0, 0, torch.float32, "none", [], "")
            return ops.qconv2d_pointwise(steps, X_SCALE, 0, w, *common, *geometry, *end)

    else:

        def prepack() -> Tensor:
            return ops.qlinear_prepack(weight, list(steps.shape))

        def run(w: Tensor) -> Tensor:
            return ops.qlinear_pointwise(steps, X_SCALE, 0, w, *common, 1.0, 0, torch.float32, "none", [], "")

    copies = [prepack() for _ in range(case.copies(weight.nbytes))]
    error = check_close(run(copies[0]), expected, 0.01)
    return Built(rotate([partial(run, copy) for copy in copies]), facts={"bytes": weight.nbytes, "error": error})


# ---- lowbit ----


def _copies(case: Case, weight: PackedWeight) -> list[PackedWeight]:
    return [replace(weight, data=weight.data.clone()) for _ in range(case.copies(weight.nbytes))]


def _given(case: Case, given: bool) -> tuple[Tensor, Tensor | None]:
    """Activations and their scale: 8 bits, or float32 without."""
    x = case.input()
    if not given:
        return x, None
    return (x / X_SCALE).round().clamp(-127, 127).to(torch.int8), torch.tensor([X_SCALE])


def lowbit_native(case: Case, threads: int, bits: int, levels: str = "denseshift", given: bool = False) -> Built:
    """The native kernels by `lowbit.kernels.shift_linear` or ``shift_conv2d``; ``given``: int8 activations."""
    torch.set_num_threads(threads)
    if not native.available():
        raise LowbitError(native.why_not())
    weight = case.packed(bits, levels)
    x, scale = _given(case, given)
    run = partial(kernels.shift_conv2d, padding=1) if case.image else kernels.shift_linear
    check_equal(run(x, weight, x_scale=scale), exact(case, x, weight))
    steps = [partial(run, x, copy, x_scale=scale) for copy in _copies(case, weight)]
    return Built(rotate(steps), facts={"bytes": weight.nbytes, "isa": native.isa()})


def lowbit_compiled(case: Case, threads: int, bits: int, given: bool = False) -> Built:
    """The PyTorch form of the kernels under torch.compile."""
    torch.set_num_threads(threads)
    weight = case.packed(bits)
    x, scale = _given(case, given)
    padded = kernels.packing.padded_channels(case.k, (3, 3))

    def run(x: Tensor, data: Tensor, row_scale: Tensor, sums: Tensor, x_scale: Tensor | None) -> Tensor:
        common = (x, data, weight.levels, row_scale, sums, None, x_scale, bits)
        return compiled.conv2d(*common, (3, 3), padded, padding=(1, 1)) if case.image else compiled.linear(*common)

    run = torch.compile(run)
    check_equal(run(x, weight.data, weight.scale, weight.sums, scale), exact(case, x, weight))
    steps = [partial(run, x, copy.data, copy.scale, copy.sums, scale) for copy in _copies(case, weight)]
    return Built(rotate(steps), facts={"bytes": weight.nbytes})


# ---- all of them ----

ENGINES: dict[str, Builder] = {
    BASELINE: torch_float,
    "torch bf16": partial(torch_float, dtype=torch.bfloat16),
    "torch fp32 compiled": partial(torch_float, compile=True),
    "torch int8, int8 in": torch_int8,
    **{f"lowbit {bits}-bit, int8 in": partial(lowbit_native, bits=bits, given=True) for bits in (2, 3, 4)},
    "lowbit 4-bit as trained, int8 in": partial(lowbit_native, bits=4, levels="trained", given=True),
    "lowbit 4-bit uniform, int8 in": partial(lowbit_native, bits=4, levels="uniform", given=True),
    **{f"lowbit {bits}-bit": partial(lowbit_native, bits=bits) for bits in (2, 3, 4)},
    "lowbit 4-bit as trained": partial(lowbit_native, bits=4, levels="trained"),
    "lowbit 4-bit uniform": partial(lowbit_native, bits=4, levels="uniform"),
    **{f"lowbit {bits}-bit compiled": partial(lowbit_compiled, bits=bits) for bits in (2, 3, 4)},
    "onnxruntime 2-bit weights": partial(runtimes.onnxruntime_nbits, bits=2),
    "onnxruntime 4-bit weights": partial(runtimes.onnxruntime_nbits, bits=4),
    "onnxruntime int8": runtimes.onnxruntime_int8,
    "openvino int4 weights": partial(runtimes.openvino_weights, bits=4),
    "openvino int8 weights": partial(runtimes.openvino_weights, bits=8),
    "openvino int8": runtimes.openvino_int8,
    "torchao int4 weights": runtimes.torchao_int4,
    "torchao int8 dynamic, compiled": runtimes.torchao_int8,
}
"""DenseShift's 4-bit levels reach +128, which int8 does not hold; the "uniform" ones do. All codes are evenly spread
but those "as trained" (`TRAINED_4_BITS`)."""

SLOW = frozenset(f"lowbit {bits}-bit compiled" for bits in (2, 3, 4))
"""Only run when asked for by name: each case takes a compilation of a minute or so."""


def select(
    given: Sequence[str] | None, known: Sequence[str], option: str, leave_out: frozenset[str] = frozenset()
) -> list[str]:
    """The known names that ``given`` names or patterns (``"lowbit*"``) mean; None: all.

    Those in ``leave_out`` only take part when written out.

    Raises:
        LowbitError: one that means nothing; the message lists what is known.
    """
    usual = [name for name in known if name not in leave_out]
    if not given:
        return usual
    chosen: set[str] = set()
    for pattern in given:
        found = [pattern] if pattern in known else fnmatch.filter(usual, pattern)
        if not found:
            raise LowbitError(f"{option} {pattern!r} is not known; allowed: {'; '.join(known)}")
        chosen.update(found)
    return [name for name in known if name in chosen]


@dataclass
class Outcome:
    """What a benchmark gave: results as JSON holds them, and what else there is to tell."""

    results: list[Result] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)

    def add(self, race: Any, case: str, threads: int) -> None:
        """Takes over what a `benchmarks.processes.Race` gave for ``case``."""
        self.results += race.results
        where = {"case": case, "threads": threads}
        self.skipped += [{**where, "engine": name, "reason": why} for name, why in race.skipped.items()]
        self.facts += [{**where, "engine": name, **facts} for name, facts in race.facts.items()]


def run(
    shapes: Sequence[str] | None = None,
    engines: Sequence[str] | None = None,
    threads: Sequence[int] = (1,),
    repeats: int = 15,
    burst: float = BURST,
    cases: dict[str, Case] = CASES,
) -> Outcome:
    """Times every engine on every case, for each number of threads.

    Args:
        shapes: names or patterns of `CASES`; None takes all.
        engines: names or patterns of `ENGINES`; None takes all but `SLOW`. The baseline always takes part.
        threads: numbers of threads.
        repeats: rounds counted.
        burst: seconds an engine calculates in each round.
        cases: what ``shapes`` names.

    Raises:
        LowbitError: an unknown name.
    """
    chosen = select(shapes, list(cases), "--shape")
    names = select(engines, list(ENGINES), "--engine", SLOW)
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    outcome = Outcome()
    for count in threads:
        with Workers(count, burst) as workers:
            for case in (cases[shape] for shape in chosen):
                makes = {name: partial(ENGINES[name], case, count) for name in names}
                race = workers.race(case.title, makes, BASELINE, repeats, unit="µs")
                for name in race.facts:
                    race.facts[name] |= {"operations": case.operations, "m": case.m, "cold": case.cold}
                outcome.add(race, case.title, count)
    return outcome
