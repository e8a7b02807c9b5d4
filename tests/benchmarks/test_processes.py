"""The harness that times engines in processes of their own, with engines that do nothing or go wrong."""

import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks.processes import Worker, Workers, reason
from lowbit.errors import LowbitError


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Spawned processes get the parent's search path, so that they find trivial_engines.py."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


def test_engines_that_cannot_be_built_or_die_are_reported_and_the_others_go_on():
    import trivial_engines as engines

    makes = {
        "base": engines.working,
        "slow": partial(engines.working, 0.004),
        "missing": engines.unbuildable,
        "dies": engines.dying,
    }
    with Workers(threads=2, burst=0.0) as workers:
        race = workers.race("case", makes, "base", repeats=3)
        workers.race("another case", {"base": engines.working}, "base", repeats=1)  # by the same process
        processes = [worker._process for worker in workers._workers.values()]
    assert [result["engine"] for result in race.results] == ["base", "slow"]
    base, slow = race.results
    assert base["threads"] == 2 and base["repeats"] == 3 and base["ratio"] == 1
    assert base["median"] >= 0.5 and slow["median"] >= 2  # two calls a step, and no sleep is shorter than asked for
    assert race.facts["base"] == {"threads": "2"}
    assert race.skipped["missing"].startswith("the package a_package_that_nobody_has is not installed")
    assert race.skipped["dies"].endswith("its process died (SIGKILL)")
    assert all(process is None or not process.is_alive() for process in processes)


def test_a_worker_tells_what_went_wrong_and_can_be_used_again():
    import trivial_engines as engines

    from benchmarks.processes import EngineError

    worker = Worker()
    try:
        worker.build(engines.failing, burst=0.0)
        with pytest.raises(EngineError, match="ValueError: enough"):
            for _ in range(3):
                worker.burst()
        with pytest.raises(EngineError, match="no answer within"):
            worker.build(engines.hanging, timeout=0.2)
        assert worker.build(engines.working, burst=0.0) == {"threads": "1"}  # by a new process
    finally:
        worker.close()


def test_without_the_baseline_there_are_no_ratios():
    import trivial_engines as engines

    with Workers() as workers, pytest.raises(LowbitError, match="baseline 'base' gives no times"):
        workers.race("case", {"base": engines.unbuildable}, "base", repeats=1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'openvino.x'", name="openvino.x"), "the package openvino is not"),
        (LowbitError("K=5 is too small"), "K=5 is too small"),
        (RuntimeError("\n could not create a primitive\nat ..."), "RuntimeError: could not create a primitive"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_reasons_fit_on_one_line(error, said):
    assert reason(error).startswith(said) and "\n" not in reason(error)
