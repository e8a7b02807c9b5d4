"""Engines timed against each other, each in a process of its own, so that their thread pools never meet.

All processes live while a case is measured, and all but one wait, blocked on a pipe. Round by round the parent asks
each in turn for one burst of calls; ratios are taken within a round, so that what slows the whole machine down cancels
out. An engine that cannot be built, or that dies, is reported with its reason and the others go on.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from benchmarks.report import Result

BUILD_SECONDS, BURST_SECONDS = 900, 300  # how long the parent waits for an answer
BURST = 0.05  # seconds that a burst should last
WARM = 0.005  # seconds of calls before its clock starts, for caches that the other engines emptied
SETTLE = 0.05  # seconds between two turns of engines with several threads: pools spin for a while after their last call
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Built:
    """An engine made ready in its own process.

    Args:
        step: what is timed.
        calls: how many calls of the thing compared one ``step`` makes.
        facts: what else there is to say: sizes, errors found; anything that pickles.
    """

    step: Callable[[], Any]
    calls: int = 1
    facts: dict[str, Any] = field(default_factory=dict)


Make = Callable[[], Built]
"""Builds an engine in its process; it has to pickle: a function of a module, or a `functools.partial` of one."""


class EngineError(Exception):
    """An engine that gives no times; the message says why."""


@dataclass
class Race:
    """What was measured of one case: results, facts of each engine, and why the others have none."""

    results: "list[Result]"
    facts: dict[str, dict[str, Any]]
    skipped: dict[str, str]


class Worker:
    """One process, started when first asked for something; it keeps what it built last.

    Args:
        threads: of the libraries that follow ``OMP_NUM_THREADS`` and its like; others are told by who builds them.
    """

    def __init__(self, threads: int = 1):
        self.threads = threads
        self._process: multiprocessing.process.BaseProcess | None = None

    def build(self, make: Make, burst: float = BURST, timeout: float = BUILD_SECONDS) -> dict[str, Any]:
        """Builds and warms up an engine in place of the previous one; returns its facts.

        Raises:
            EngineError: it cannot be built.
        """
        return self._ask("build", make, burst, timeout=timeout)

    def burst(self, timeout: float = BURST_SECONDS) -> float:
        """Seconds a call, of one burst.

        Raises:
            EngineError: it failed or died.
        """
        return self._ask("burst", timeout=timeout)

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._connection.send(("stop",))
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()
        self._process = None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        # A spawned process imports the main module first, perhaps torch with it: threads have to be set before it is.
        with _environment({name: str(self.threads) for name in THREADS} | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}):
            self._process.start()
        theirs.close()

    def _ask(self, *message: Any, timeout: float) -> Any:
        if self._process is None:
            self._start()
        try:
            self._connection.send(message)
            if not self._connection.poll(timeout):
                self._process.kill()
                self.close()
                raise EngineError(f"no answer within {timeout:.0f} s")
            failed, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.close()
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
            raise EngineError(f"its process died ({how})") from None
        if failed:
            raise EngineError(answer)
        return answer


class Workers:
    """A `Worker` for each engine's name, kept from case to case; ``with Workers(threads=1) as workers: ...``."""

    def __init__(self, threads: int = 1, burst: float = BURST):
        self.threads, self._burst = threads, burst
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def race(
        self,
        case: str,
        makes: dict[str, Make],
        baseline: str,
        repeats: int,
        unit: str = "ms",
        timeout: float = BUILD_SECONDS,
    ) -> Race:
        """Builds all engines of ``makes``, one after the other, and times them for ``repeats`` rounds.

        Raises:
            LowbitError: the baseline gives no times.
        """
        from tqdm.auto import tqdm

        from benchmarks.report import summarize

        race = Race([], {}, {})
        seconds: dict[str, list[float]] = {}

        def give_up(name: str, error: EngineError, when: str = "") -> None:
            if name == baseline:
                raise LowbitError(f"{case}: the baseline {baseline!r} gives no times: {error}") from None
            race.skipped[name] = f"{when}{error}"
            seconds.pop(name, None)

        for name in tqdm(makes, desc=f"{case}: build", leave=False):
            worker = self._workers.setdefault(name, Worker(self.threads))
            try:
                race.facts[name] = worker.build(makes[name], self._burst, timeout)
                seconds[name] = []
            except EngineError as error:
                give_up(name, error)
        for turn in tqdm(range(repeats), desc=f"{case}: rounds", leave=False):
            for name in list(seconds):
                if self.threads > 1:
                    time.sleep(SETTLE)
                try:
                    seconds[name].append(self._workers[name].burst())
                except EngineError as error:
                    give_up(name, error, f"in round {turn + 1}: ")
        race.results = summarize(case, seconds, baseline, threads=self.threads, unit=unit)
        return race


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- in the engine's process ----


def reason(error: Exception) -> str:
    """One line that says why an engine is not there."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name.partition('.')[0]} is not installed: pip install 'lowbit[bench]'"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return said if isinstance(error, LowbitError) else f"{type(error).__name__}: {said[:300]}".removesuffix(": ")


def _serve(connection: Any) -> None:
    from lowbit.training.memory import keep_freed_memory

    keep_freed_memory()  # else engines that allocate their outputs pay page faults for them at every call
    built, calls = None, 1
    while True:
        try:
            what, *rest = connection.recv()
        except EOFError:  # the parent is gone
            return
        if what == "stop":
            return
        try:
            if what == "build":
                make, burst = rest
                built = None
                gc.collect()
                built = make()
                _trim()
                calls = _pace(built.step, burst)
                answer = built.facts
            else:
                answer = _time(built.step, calls) / built.calls
            failed = False
        except Exception as error:  # whatever it is, it is this engine's affair
            failed, answer = True, reason(error)
        connection.send((failed, answer))


def _trim() -> None:
    """Gives back what only building took: many processes wait at once, and each has copied its weights about."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _pace(step: Callable[[], Any], burst: float) -> int:
    """Warms up; how many steps make a burst."""
    step()
    start, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - start < burst:
        step()
        steps += 1
    return max(1, round(burst * steps / (time.perf_counter() - start)))


def _time(step: Callable[[], Any], calls: int) -> float:
    start, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - start < WARM:
        step()
        steps += 1
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls
