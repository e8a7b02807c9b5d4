"""Rounds of timing: every engine takes part in every round, in turns, for as long as was asked."""

from itertools import islice

import numpy as np
import pytest

from lowbit_suite.chapters import timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when an engine spends time."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def engine(seconds, calls, name):
        def call():
            calls.append(name)
            now[0] += seconds

        return call

    return engine


def test_calls_go_on_until_the_time_is_spent_but_slow_ones_are_not_repeated_five_times(clock):
    assert len(timing.durations(clock(0.1, [], "quick"), 1.0)) in (10, 11)
    assert len(timing.durations(clock(0.5, [], "medium"), 1.0)) == 5
    assert timing.durations(clock(7.0, [], "slow"), 1.0) == [7.0]


def test_rounds_give_the_median_of_each_engine_and_begin_with_another_each_time(clock):
    calls = []
    engines = {name: clock(seconds, calls, name) for name, seconds in (("a", 5.0), ("b", 10.0), ("c", 20.0))}
    found = timing.rounds(engines, 3, 1.0)
    assert list(found.columns) == ["a", "b", "c"] and found.index.name == "repeat"
    assert np.allclose(found, [[5, 10, 20]] * 3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


@pytest.mark.parametrize(("total", "number"), [(0, 1), (100, 1), (101, 2), (1000, 10)])
def test_there_are_enough_copies_to_fill_the_memory_asked_for(total, number):
    made = []
    endless = timing.copies(lambda: made.append(None) or len(made), 100, total)
    assert list(islice(endless, 2 * number)) == [*range(1, number + 1)] * 2


def test_ceilings_are_measured_for_every_block_and_both_kinds_of_product(monkeypatch):
    monkeypatch.setattr(timing, "durations", lambda call, least: [1.0, 0.5])
    found = timing.reading_speeds(2**19)
    assert found.bytes.tolist() == [2**17, 2**18, 2**19] and np.allclose(found["GB/s"], found.bytes / 0.5e9)
    assert timing.peaks() == pytest.approx(dict.fromkeys(("float32", "8 bits"), 2 * 1024**3 / 0.5e9))
