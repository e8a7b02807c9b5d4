import dataclasses
import json
import math

import numpy as np
import pytest

from lowbit.errors import LowbitError
from lowbit_suite.accepted import baselines
from lowbit_suite.profiles import Profile
from lowbit_suite.running.run_json import Entry, Metric, Run


def make_run(metrics, *, name="00_a", status="passed", parameters=None):
    return Run("smoke", "2026-01-01T00:00:00+00:00", {"device": "cpu", "commit": None}, [
        Entry(name, status, reason="why", parameters=parameters or {}, metrics=metrics)
    ])  # fmt: skip


@pytest.fixture
def baseline(project):
    project.add("00_a", "1")
    run = make_run({"exact": Metric(3), "accuracy": Metric(90.0, "%", "higher"), "loss": Metric(0.5, "", "lower")})
    found = baselines.propose(run, None)
    metrics = found.notebooks["00_a"].metrics
    metrics["accuracy"] = dataclasses.replace(metrics["accuracy"], tolerance=2.0)
    metrics["loss"] = dataclasses.replace(metrics["loss"], tolerance=0.1)
    return found


def verdicts(baseline, **changes):
    now = {"exact": Metric(3), "accuracy": Metric(90.0, "%", "higher"), "loss": Metric(0.5, "", "lower")} | changes
    rows = baselines.compare(make_run({k: m for k, m in now.items() if m}), baseline)
    return {row.metric: (row.verdict, row.ok) for row in rows if row.verdict != "same"}


def test_the_same_numbers_agree(baseline):
    assert verdicts(baseline) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"accuracy": Metric(88.0, "%", "higher")}, {}),
        ({"accuracy": Metric(87.9, "%", "higher")}, {"accuracy": ("worse", False)}),
        ({"accuracy": Metric(92.1, "%", "higher")}, {"accuracy": ("improved", True)}),
        ({"loss": Metric(0.61, "", "lower")}, {"loss": ("worse", False)}),
        ({"loss": Metric(0.39, "", "lower")}, {"loss": ("improved", True)}),
        ({"exact": Metric(4)}, {"exact": ("changed", False)}),
        ({"exact": Metric(2)}, {"exact": ("changed", False)}),
        ({"exact": None}, {"exact": ("vanished", False)}),
        ({"more": Metric(1)}, {"more": ("new", False)}),
        ({"accuracy": Metric(math.nan, "%", "higher")}, {"accuracy": ("not a number", False)}),
        ({"loss": Metric(-math.inf, "", "lower")}, {"loss": ("not a number", False)}),
        ({"more": Metric(math.nan)}, {"more": ("not a number", False)}),
        ({"accuracy": Metric(90.0, "", "higher")}, {"accuracy": ("other unit or direction", False)}),
        ({"accuracy": Metric(90.0, "%", "lower")}, {"accuracy": ("other unit or direction", False)}),
    ],
)
def test_each_kind_of_difference(baseline, changes, expected):
    assert verdicts(baseline, **changes) == expected


@pytest.mark.parametrize("status", ["failed", "timeout", "killed", "oom", "skipped", "not_run"])
def test_a_notebook_that_has_not_passed_is_a_difference(baseline, status):
    run = make_run({"exact": Metric(3)}, status=status)
    assert [(row.verdict, row.ok) for row in baselines.compare(run, baseline)] == [(status.replace("_", " "), False)]


def test_a_skip_is_no_difference_only_with_leave(baseline):
    run = make_run({}, status="skipped")
    run.notebooks.append(Entry("01_b", "passed"))
    leave = Profile(description="x", timeout_minutes=1, may_skip=["00_a"])
    assert [row.ok for row in baselines.compare(run, baseline, profile=leave)] == [True, False]
    assert not baselines.compare(run, baseline, profile=Profile(description="x", timeout_minutes=1))[0].ok


def test_comparing_nothing_is_a_difference(baseline):
    leave = Profile(description="x", timeout_minutes=1, may_skip=["*"])
    for run, accepted in [
        (make_run({}, status="skipped"), baseline),
        (Run("smoke", "", {}), dataclasses.replace(baseline, notebooks={})),
    ]:
        row = baselines.compare(run, accepted, profile=leave)[-1]
        assert (row.verdict, row.ok) == ("nothing compared", False)


def test_missing_and_new_notebooks_and_other_parameters_are_differences(baseline):
    rows = baselines.compare(make_run({}, name="01_b"), baseline)
    assert [(row.notebook, row.verdict, row.ok) for row in rows] == [
        ("01_b", "new notebook", False),
        ("00_a", "missing", False),
    ]
    (row,) = baselines.compare(make_run({}, parameters={"epochs": 1}), baseline)
    assert (row.verdict, row.ok) == ("other parameters", False)


def test_unmeasured_numbers_may_differ_by_rounding_only():
    accepted = baselines.Accepted(0.5, 0.0, "", "equal", baselines.EXACT)
    assert baselines.slack(accepted) == 0.5e-6
    assert baselines.slack(dataclasses.replace(accepted, value=12)) == 0
    assert baselines.slack(dataclasses.replace(accepted, value=12.0)) == 0


def test_spread_is_the_prediction_interval_of_students_t():
    # n = 3: t(0.995, 2) = 9.9248, s = 1, sqrt(1 + 1/3)
    mean, width = baselines.spread([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert width == pytest.approx(9.9248 * math.sqrt(4 / 3), rel=1e-4)
    with pytest.raises(LowbitError, match="at least 2 runs"):
        baselines.spread([1.0])


def test_the_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(4000, 6))
    inside = [abs(row[5] - mean) <= width for row in draws for mean, width in [baselines.spread(row[:5])]]
    assert np.mean(inside) == pytest.approx(baselines.LEVEL, abs=0.006)


def test_seeds_give_mean_and_tolerance_and_are_kept(project):
    project.add("00_a", "1")
    run = make_run({"x": Metric(1.0), "same": Metric(5)})
    repeats = [Entry("00_a", "passed", metrics={"x": Metric(v), "same": Metric(5)}) for v in (2.0, 3.0)]
    metrics = baselines.propose(run, None, {"00_a": repeats}).notebooks["00_a"].metrics
    assert metrics["x"].values == [1.0, 2.0, 3.0]
    assert (metrics["x"].value, metrics["x"].tolerance) == baselines.spread([1.0, 2.0, 3.0])
    assert (metrics["same"].value, metrics["same"].tolerance) == (5, 0.0)


def test_another_machine_widens_and_replaces_nothing(project):
    project.add("00_a", "1")
    names = ("x", "close", "count", "steady")
    first = make_run({**dict.fromkeys(names, Metric(1.0)), "count": Metric(5), "steady": Metric(0.25)})
    others = [
        Entry(
            "00_a", "passed", metrics={"x": Metric(v), "close": Metric(v), "count": Metric(5), "steady": Metric(0.25)}
        )
        for v in (2.0, 3.0)
    ]
    old = baselines.propose(first, None, {"00_a": others})
    there = make_run({"x": Metric(7.0), "close": Metric(1.0 + 1e-8), "count": Metric(6), "steady": Metric(0.5)})
    new = baselines.propose(there, old, pool=True).notebooks["00_a"].metrics
    before = old.notebooks["00_a"].metrics
    assert new["x"].values == [1.0, 2.0, 3.0, 7.0]
    assert (new["x"].value, new["x"].tolerance) == baselines.spread([1.0, 2.0, 3.0, 7.0])
    assert new["close"] == before["close"] and new["count"] == before["count"]
    assert new["steady"].values == [0.25, 0.25, 0.25, 0.5] and new["steady"].tolerance > 0.25
    with pytest.raises(LowbitError, match="leave out --pool"):
        baselines.propose(there, None, pool=True)


def test_without_seeds_an_earlier_tolerance_is_kept_and_a_new_one_is_exact(baseline):
    run = make_run({"accuracy": Metric(95.0, "%", "higher"), "more": Metric(0.25), "loss": Metric(0.4, "nat", "lower")})
    metrics = baselines.propose(run, baseline).notebooks["00_a"].metrics
    assert (metrics["accuracy"].value, metrics["accuracy"].tolerance) == (95.0, 2.0)
    assert (metrics["more"].tolerance, metrics["more"].method) == (0.0, baselines.EXACT)
    assert metrics["loss"].tolerance == 0.0  # another unit: the old tolerance means nothing
    assert [(row.metric, row.verdict) for row in baselines.changes(baseline, baselines.propose(run, baseline))] == [
        ("exact", "dropped"), ("accuracy", "changed"), ("loss", "changed"), ("more", "new")
    ]  # fmt: skip


def test_bad_runs_cannot_be_accepted(project):
    with pytest.raises(LowbitError, match="00_a is killed"):
        baselines.propose(make_run({}, status="killed"), None)
    with pytest.raises(LowbitError, match="only finite numbers"):
        baselines.propose(make_run({"x": Metric(math.nan)}), None)
    odd = [Entry("00_a", "passed", metrics={"y": Metric(1)})]
    with pytest.raises(LowbitError, match="records other metrics with another seed: x, y"):
        baselines.propose(make_run({"x": Metric(1)}), None, {"00_a": odd})


def test_files_survive_a_round_trip_and_broken_ones_are_refused(baseline):
    file = baselines.save(baseline)
    assert file.name == "smoke-cpu.json"
    assert baselines.load("smoke", "cpu") == baseline
    tree = json.loads(file.read_text())
    tree["notebooks"]["00_a"]["metrics"]["exact"]["tolerance"] = -1
    file.write_text(json.dumps(tree))
    with pytest.raises(LowbitError, match="no finite value or tolerance for exact"):
        baselines.load("smoke", "cpu")
    file.write_text("{")
    with pytest.raises(LowbitError, match="cannot be read as JSON"):
        baselines.load("smoke", "cpu")
    with pytest.raises(LowbitError, match=r"there is no baseline .*lowbit accept --profile desk"):
        baselines.load("desk", "cpu")


def test_names_and_globs_pick_from_the_run_and_the_baseline(baseline):
    run = make_run({}, name="01_b")
    assert baselines.pick([], run, baseline) is None
    assert baselines.pick(["0*"], run, baseline) == ["00_a", "01_b"]
    assert baselines.pick(["01_b.ipynb", "0?_b"], run, None) == ["01_b"]
    with pytest.raises(LowbitError, match=r"no notebook '2\*' here; there are 00_a, 01_b"):
        baselines.pick(["2*"], run, baseline)
