"""`sweep`: every arm with every seed, the same numbers in one process and in several, failures by name."""

import json

import pandas as pd
import pytest
import torch

from lowbit.errors import LowbitError
from lowbit_suite import sweep


def dot(scale, seed):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    return {"value": float(scale * (x @ x)), "threads": torch.get_num_threads()}


def test_every_arm_runs_with_every_seed_in_order():
    table = sweep(dot, [{"scale": 1.0}, {"scale": 2.0}], [3, 4], workers=1)
    assert table[["scale", "seed"]].values.tolist() == [[1, 3], [1, 4], [2, 3], [2, 4]]
    assert (table.value[2:].values == 2 * table.value[:2].values).all()
    assert set(table.threads) == {1}


def test_several_rows_from_one_run():
    def run(arm, seed):
        return [{"epoch": epoch, "loss": arm / epoch} for epoch in (1, 2)]

    table = sweep(run, [{"arm": 6.0}], [0, 1], workers=1)
    assert table.loss.tolist() == [6, 3, 6, 3] and table.seed.tolist() == [0, 0, 1, 1]


@pytest.mark.slow
def test_two_processes_give_the_same_table_also_for_a_function_that_is_local():
    factor = 3.0

    def run(scale, seed):
        return dot(factor * scale, seed)

    arms = [{"scale": float(k)} for k in range(3)]
    here, there = (sweep(run, arms, [0, 1], workers=workers) for workers in (1, 2))
    assert here.equals(there)


def test_one_worker_needs_no_semaphores_and_two_say_that_they_do(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    for where in ("Semaphore", "BoundedSemaphore", "Lock", "RLock", "Process", "Queue"):
        monkeypatch.setattr("multiprocessing." + where, refuse)
    monkeypatch.setattr("joblib.Parallel", refuse)
    monkeypatch.setattr("joblib.parallel_config", refuse)
    assert len(sweep(dot, [{"scale": 1.0}], [0, 1], workers=1)) == 2
    assert len(sweep(dot, [{"scale": 1.0}], [0, 1])) == 2
    with pytest.raises(LowbitError, match=r"workers=2 needs semaphores.*Permission denied"):
        sweep(dot, [{"scale": 1.0}], [0, 1], workers=2)


def test_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    sweep(dot, [{"scale": 1.0}], [0], workers=1)
    assert torch.get_num_threads() == before


def test_a_failed_run_is_named():
    def run(lr, seed):
        raise ValueError("too large")

    with pytest.raises(LowbitError, match=r"lr=3, seed=7 failed: ValueError: too large"):
        sweep(run, [{"lr": 3}], [7], workers=1)


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CONTEXT", json.dumps({"tables": str(tmp_path)}))

    def run(lr, seed):
        if lr > 2:
            raise ValueError("too large")
        return {"loss": lr}

    with pytest.raises(LowbitError, match=r"lr=3.*2 rows measured before it are in .*unfinished_the_runs\.csv"):
        sweep(run, [{"lr": 1}, {"lr": 3}], [0, 1], workers=1, description="the runs")
    assert pd.read_csv(tmp_path / "unfinished_the_runs.csv").values.tolist() == [[1, 0, 1], [1, 1, 1]]


def test_nothing_to_run_is_refused():
    with pytest.raises(LowbitError, match="1 arms and 0 seeds"):
        sweep(dot, [{"scale": 1.0}], [])
    with pytest.raises(LowbitError, match="workers=0"):
        sweep(dot, [{"scale": 1.0}], [0], workers=0)
