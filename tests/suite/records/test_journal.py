"""The journal of trainings: what an interrupted notebook goes on from, and what it must not go on from."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit_suite import sweep
from lowbit_suite.records import journal

OF = {"code": "abc", "parameters": {"seeds": "[0]"}}


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / journal.place("02_some")
    monkeypatch.setenv("LOWBIT_CONTEXT", json.dumps({"journal": str(path)}))
    journal.begin(path, OF, "02_some", {"seeds": [0]})
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_training_is_found_again_by_sweep_arm_and_seed(file):
    journal.Journal().add("1 runs", {"bits": 2, "sigma": 0.1}, 3, 1.234, {"accuracy, %": 0.1 + 0.2})
    again = journal.Journal()
    assert again.get("1 runs", {"sigma": 0.1, "bits": 2}, 3) == {"accuracy, %": 0.1 + 0.2}
    assert again.get("2 runs", {"bits": 2, "sigma": 0.1}, 3) is None
    assert again.get("1 runs", {"bits": 2, "sigma": 0.2}, 3) is None
    assert again.get("1 runs", {"bits": 2, "sigma": 0.1}, 4) is None
    head, line = lines(file)
    assert (head["notebook"], head["parameters"]) == ("02_some", {"seeds": [0]}) and len(head["of"]) == 64
    assert list(line) == ["sweep", "arm", "seed", "seconds", "ended", "result"] and line["seconds"] == 1.23


@pytest.mark.parametrize("of", [{"code": "abd", "parameters": {"seeds": "[0]"}}, {}])
def test_what_depends_on_something_else_is_dropped(file, of):
    journal.Journal().add("1 runs", {}, 0, 1.0, 1.0)
    journal.begin(file, OF, "02_some", {"seeds": [0]})
    assert len(lines(file)) == 2  # the same: it stays
    journal.begin(file, of, "02_some", {})
    assert len(lines(file)) == 1
    journal.Journal().add("1 runs", {}, 0, 1.0, 1.0)
    journal.begin(file, {}, "02_some", {})  # without a fingerprint nothing ever stays
    assert len(lines(file)) == 1


def test_trainings_of_two_processors_are_not_put_into_one_journal(file, monkeypatch):
    assert set(lines(file)[0]["machine"]) == {"cpu", "isa", "torch"}
    journal.Journal().add("1 runs", {}, 0, 1.0, 1.0)
    monkeypatch.setattr(journal.environment, "processor", lambda: {"cpu": "another", "isa": ["neon"]})
    journal.begin(file, OF, "02_some", {"seeds": [0]})
    (head,) = lines(file)
    assert (head["machine"]["cpu"], head["machine"]["isa"]) == ("another", ["neon"])


@given(cut=st.integers(0, 400))
def test_a_line_cut_short_is_dropped_with_all_after_it(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("run") / "j.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_CONTEXT", json.dumps({"journal": str(path)}))
        journal.begin(path, OF, "02_some", {})
        for seed in range(3):
            journal.Journal().add("1 runs", {"arm": "µ"}, seed, 1.0, seed / 3)
        whole = path.read_bytes()
        path.write_bytes(whole[: max(0, len(whole) - cut)])
        there = path.read_bytes().count(b"\n")
        journal.begin(path, OF, "02_some", {})
        read = journal.Journal()
        found = [read.get("1 runs", {"arm": "µ"}, seed) for seed in range(3)]
        assert found == [seed / 3 if seed < there - 1 else None for seed in range(3)]
        read.add("1 runs", {"arm": "µ"}, 3, 1.0, 1.0)
        assert journal.Journal().get("1 runs", {"arm": "µ"}, 3) == 1.0


def test_a_name_that_means_arrays_in_the_file_is_also_just_a_name():
    assert journal.plain({"array": 3, "dtype": "x"}) == {"array": 3, "dtype": "x"}


@given(st.floats(allow_nan=False))
def test_numbers_come_back_exactly(value):
    assert journal.plain({"x": value, "y": [value]}) == {"x": value, "y": [value]}


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool", "uint8"])
@pytest.mark.parametrize("shape", [(0,), (), (5,), (2, 3), (3, 0, 2)])
def test_arrays_come_back_exactly_through_a_file(file, dtype, shape):
    array = (100 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    given = {"x": array, "nested": [{"y": array.T}]}
    journal.Journal().add("1 runs", {}, 0, 1.0, given)
    for found in (journal.plain(given), journal.Journal().get("1 runs", {}, 0)):
        if shape == ():
            assert found["x"] == array.item()
        else:
            assert found["x"].dtype == array.dtype and np.array_equal(found["x"], array) and found["x"].flags.writeable
            assert np.array_equal(found["nested"][0]["y"], array.T)


def test_scalars_become_numbers_tensors_arrays_and_nan_stays():
    found = journal.plain({"t": torch.eye(1), "n": np.float32(0.5), "i": np.int64(3), "b": np.bool_(True), "u": (1, 2)})
    assert isinstance(found["t"], np.ndarray) and found.pop("t").tolist() == [[1.0]]
    assert found == {"n": 0.5, "i": 3, "b": True, "u": [1, 2]} and type(found["i"]) is int
    assert math.isnan(journal.plain(math.nan)) and journal.plain(math.inf) == math.inf


def test_a_sweep_goes_on_where_it_was_cut_off_and_its_table_is_the_same(file):
    called, broken = [], True

    def run(x, seed):
        called.append((x, seed))
        if broken and (x, seed) == (2.0, 1):
            raise ValueError("cut off")
        return [{"epoch": e, "y": x * seed / 3, "curve": torch.tensor([x, e])} for e in (0, 1)]

    arms, seeds = [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}], [0, 1]
    with pytest.raises(LowbitError, match="cut off"):
        sweep(run, arms, seeds, workers=1)
    number = int(lines(file)[1]["sweep"].split()[0])
    assert called == [(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1)]
    called.clear()
    broken = False
    # A new process counts its sweeps from one again; here the number is put back.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit_suite.records.sweeps._NUMBERS", iter([number]))
        resumed = sweep(run, arms, seeds, workers=1)
    assert called == [(2.0, 1), (3.0, 0), (3.0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOWBIT_CONTEXT")
        called.clear()
        whole = sweep(run, arms, seeds, workers=1)
    assert whole.drop(columns="curve").equals(resumed.drop(columns="curve")) and len(called) == 6
    assert all(map(np.array_equal, whole.curve, resumed.curve))
    assert len(lines(file)) == 7


def test_two_sweeps_with_the_same_arms_do_not_share_results(file):
    first = sweep(lambda seed: {"y": 1}, [{}], [0], workers=1)
    second = sweep(lambda seed: {"y": 2}, [{}], [0], workers=1)
    assert (first.y[0], second.y[0]) == (1, 2)


def test_what_json_has_no_form_for_is_refused_with_the_run_named():
    with pytest.raises(LowbitError, match=r"seed=0 failed: TypeError: it returned a set; return numbers"):
        sweep(lambda seed: {"y": {1}}, [{}], [0], workers=1)
