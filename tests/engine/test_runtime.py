"""`Plan`: what it says of itself, what it takes, and the errors it raises, on plans of a few operations."""

import os
import re

import numpy as np
import pytest
import torch

import lowbit
from lowbit.engine import runtime
from lowbit.engine.format import MAP, Op, Tensor, write
from lowbit.engine.runtime import Plan
from lowbit.errors import LowbitError


def reversed_halves(threads=None) -> Plan:
    """A plan of one copy: the second half of 8 numbers, then the first."""
    x, y = Tensor(2, 2, 2), Tensor(1, 4, 2)
    pieces = np.array([[0, 0, 4, 4], [4, 0, 0, 4]], np.int64)
    return Plan(write([Op("copy", [x], y, data={0: pieces})], x, y), threads)


def multiplied() -> Plan:
    """A plan of a product with 8-bit weights of 1, and the copy of one number of it."""
    x, y, between = Tensor(1, 1, 64), Tensor(1, 1, 1), Tensor(1, 1, 16)
    image = Tensor(1, 1, 64, MAP, place=64, low=-128, high=127)
    data = {0: np.ones((16, 16, 4), np.int8), 1: np.ones(16, np.float32), 2: np.full(16, 64, np.int32)}
    data[4] = np.zeros(16, np.int16)
    ops = [
        Op("quantize", [x], None, image, n={0: 0, 1: 64, 2: 0, 3: 0}, f={0: 1.0}),
        Op("product", [image], between, n={2: 8, 3: 1, 4: 1, 5: 1, 6: 1, 9: 1, 10: 1}, f={0: 1.0}, data=data),
        Op("copy", [between], y, data={0: np.array([[0, 0, 15, 1]], np.int64)}),
    ]
    return Plan(write(ops, x, y), 1)


def test_a_plan_says_what_it_is():
    plan = reversed_halves()
    assert (plan.inputs, plan.outputs, plan.arena_bytes) == (8, 8, 0)
    assert (plan.input_shape, plan.output_shape) == ((2, 2, 2), (1, 4, 2))
    assert repr(plan) == "Plan(8 -> 8 floats, 1 operations, 0.00 MB)"
    plan = multiplied()
    assert (plan.inputs, plan.outputs, plan.input_shape) == (64, 1, (64, 1, 1))
    assert plan.arena_bytes == 192 + 64  # a map with its tail, 16 floats


def test_the_list_of_operations():
    quantize, product, copy = multiplied().operations()
    assert quantize == {
        "kind": "quantize", "inputs": [0], "outputs": [2], "height": 1, "width": 1, "channels": 64, "bits": None,
        "bytes": 0,
    }  # fmt: skip
    assert (product["inputs"], product["outputs"], product["channels"]) == ([2], [3], 16)
    assert (product["bits"], product["bytes"]) == (8, 1024 + 64 + 64 + 32)
    assert (copy["inputs"], copy["outputs"], copy["bits"], copy["bytes"]) == ([3], [1], None, 32)


def test_batches_of_both_libraries():
    plan, x = reversed_halves(), np.arange(24, dtype=np.float32).reshape(3, 8)
    expected = x[:, [4, 5, 6, 7, 0, 1, 2, 3]]
    np.testing.assert_array_equal(plan(x), expected)
    np.testing.assert_array_equal(plan(np.asfortranarray(x)), expected)
    np.testing.assert_array_equal(plan(x.reshape(3, 2, 2, 2)), expected)
    assert torch.equal(plan(torch.from_numpy(x)), torch.from_numpy(expected))
    assert torch.equal(
        plan(torch.from_numpy(x.copy()).t().contiguous().t().requires_grad_()), torch.from_numpy(expected)
    )
    assert plan(x[:0]).shape == (0, 8)


def test_a_batch_of_single_numbers():
    x, y = Tensor(1, 1, 1), Tensor(1, 1, 1)
    plan = Plan(write([Op("copy", [x], y, data={0: np.array([[0, 0, 0, 1]], np.int64)})], x, y))
    np.testing.assert_array_equal(plan(np.array([1, 2], np.float32)), [[1], [2]])
    assert plan(torch.tensor([1.0, 2.0])).tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("x", "given"),
    [
        (np.zeros((2, 7), np.float32), "float32 [2, 7]"),
        (np.zeros((1, 8)), "float64 [1, 8]"),
        (np.zeros((), np.float32), "float32 []"),
        (torch.zeros(2, 7), "torch.float32 [2, 7] on cpu"),
        (torch.zeros(1, 8).half(), "torch.float16 [1, 8] on cpu"),
        (torch.zeros(()), "torch.float32 [] on cpu"),
        (torch.zeros(1, 8, device="meta"), "torch.float32 [1, 8] on meta"),
        ([0.0], "a list"),
    ],
)
def test_other_inputs_are_refused(x, given):
    with pytest.raises(LowbitError, match=re.escape(f"x is {given}; this plan takes float32 [B, ...]")) as caught:
        reversed_halves()(x)
    assert "8 numbers for each item" in str(caught.value)


def test_times_of_operations():
    plan, x = multiplied(), np.ones((2, 64), np.float32)
    for repeats in (1, 3):
        seconds = plan.time(x, repeats)
        assert seconds.shape == (3,) and (seconds >= 0).all() and (seconds < 1).all()
    np.testing.assert_array_equal(plan(x), [[64], [64]])  # it runs as before


def test_timing_runs_one_item_on_one_thread():
    plan, calls = multiplied(), []
    own = plan._library

    class Recorder:
        def lb_plan_times(self, held, on):
            calls.append(("times", on))
            return own.lb_plan_times(held, on)

        def lb_plan_run(self, held, batch, x, y, threads):
            calls.append(("run", batch, threads))
            return own.lb_plan_run(held, 1, x, y, 1)

    plan._library = Recorder()
    plan.time(np.ones((2, 64), np.float32), 2)
    assert calls == [("times", 1), ("run", 1, 1), ("times", 1), ("run", 1, 1), ("times", 0)]


def test_threads(monkeypatch):
    assert reversed_halves(3).threads == 3
    assert reversed_halves().threads == runtime._cores()
    monkeypatch.setattr(os, "sched_getaffinity", {0: {3, 5, 9}}.__getitem__, raising=False)  # 0: this process
    assert runtime._cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert runtime._cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert runtime._cores() == 1


def test_what_the_c_library_answers():
    runtime._raise(0)
    with pytest.raises(MemoryError):
        runtime._raise(1)
    with pytest.raises(RuntimeError, match=r"\(2\)"):
        runtime._raise(2)
    with pytest.raises(LowbitError, match="not a plan that can be run: "):
        Plan(b"no plan")


def test_files(tmp_path):
    plan = reversed_halves()
    path = plan.save(tmp_path / "copy.lbp")
    assert path.read_bytes() == plan.content
    assert lowbit.load_plan(path, threads=2).threads == 2
    path.write_bytes(plan.content[:-1])
    with pytest.raises(LowbitError, match=r"copy\.lbp: this is not a plan"):
        lowbit.load_plan(path)
    with pytest.raises(LowbitError, match=r"none\.lbp cannot be read"):
        lowbit.load_plan(tmp_path / "none.lbp")
