"""Tuned rates: trials on validation, a choice that follows from the journals alone, trainings that wait for it."""

import copy
import json
import math

import pandas as pd
import pytest
import torch
from study_plans import PLAN, TUNE
from typer.testing import CliRunner

from lowbit import LowbitError
from lowbit.data import load
from lowbit.data.base import labels
from lowbit_suite.app import app
from lowbit_suite.study import collected, plan, queue, trainer, training, tuning

NAN = math.nan


@pytest.fixture
def tuned(planned):
    """The plan with a `tune` in the table of shift networks alone, changed by keywords; returns its tables."""

    def write(change=lambda tree: None, **changes):
        def tune(tree):
            del tree["ofq"]
            tree["shift"]["tune"] = {**copy.deepcopy(TUNE), **changes}
            change(tree)

        return planned(tune)

    return write


def line(of, accuracy=50.0, kind="avx2", seconds=10.0):
    row = {"arm": of.arm, "seed": of.seed, **of.columns, "accuracy, %": accuracy}
    more = {"commit": "c", "torch": "2", "length": of.length, "rows": [row]}
    return queue.Done(of.key, of.digest, kind, seconds, more)


def scored(held, scores, kind="avx2", arm="S3", lines=()):
    """``lines``, and one for each trial of ``arm`` that has a score, by its factor or by factor and seed."""
    lines = list(lines)
    for trial in tuning.trainings(held, lines):
        if trial.trial and trial.arm == arm and not any(d.key == trial.key and d.kind == kind for d in lines):
            found = scores.get((trial.factor, trial.seed), scores.get(trial.factor))
            lines += [] if found is None else [line(trial, found, kind)]
    return lines


def grown(held, scores, **more):
    """`scored`, until no further trial asks for a score."""
    lines = []
    while (longer := scored(held, scores, lines=lines, **more)) != lines:
        lines = longer
    return lines


def test_it_adds_two_tables_that_come_last_and_changes_no_other_training(tuned, planned):
    before = {t.key: t.digest for t in plan.trainings(planned(lambda tree: tree.pop("ofq")))}
    held = tuned()
    assert [*held] == ["shift", "shift_rates", "shift_tuned"] and held["shift_tuned"].claims == ["D3"]
    everything = tuning.trainings(held, [])
    assert {t.key: t.digest for t in everything if t.table == "shift"} == before
    trials = [t for t in everything if t.table == "shift_rates"]
    assert [t.key for t in trials] == [("shift_rates", "S3", 3, 1, 1000, factor) for factor in (0.5, 1.0, 2.0)]
    assert [(t.key, t.waits) for t in everything if t.table == "shift_tuned"] == [
        (("shift_tuned", "S3", 3, 2, seed), True) for seed in (0, 1)
    ]
    assert len({t.key for t in everything}) == len({t.digest for t in everything}) == len(everything)
    assert [t.table for t in queue.waiting(everything, [], "avx2")][-4:] == ["shift", *["shift_rates"] * 3]


def test_a_trial_trains_and_is_scored_on_parts_of_the_training_split(tuned):
    def own_rate(tree):
        tree["shift"]["arms"]["S3"]["train"] = {"lr": 0.01, "optimizer": "radam"}
        del tree["shift"]["run"]["data"]["subset"]

    trials = [t for t in tuning.trainings(tuned(own_rate), []) if t.trial]
    assert [t.config().train.lr for t in trials] == pytest.approx([0.005, 0.01, 0.02])
    assert [t.columns for t in trials] == [{"lr_factor": f, "lr": 0.01 * f} for f in (0.5, 1, 2)]
    whole, held_out = load("digits"), trials[0].config().load_data()
    parts = torch.cat([held_out.train.x, held_out.test.x])
    assert len(held_out.test) == round(0.25 * len(whole.train))
    order = [torch.unique(x.flatten(1), dim=0) for x in (parts, whole.train.x)]
    assert len(parts) == len(whole.train) and torch.equal(*order)
    assert len(labels(held_out.train)) + len(labels(held_out.test)) == len(whole.train)


@pytest.mark.parametrize(
    ("scores", "tried", "factor", "at_edge"),
    [
        ({0.5: 1, 1: 3, 2: 2}, [0.5, 1, 2], 1, False),
        ({0.5: 1, 1: 3}, [0.5, 1, 2], None, False),  # one is missing
        ({0.5: 1, 1: 3, 2: 3}, [0.5, 1, 2], 1, False),  # of equal ones the smaller
        ({0.5: 1, 1: 2, 2: 3}, [0.5, 1, 2, 4], None, False),  # the next one beyond is to be tried
        ({0.5: 1, 1: 2, 2: 3, 4: 1}, [0.5, 1, 2, 4], 2, False),
        ({0.5: 1, 1: 2, 2: 3, 4: 3}, [0.5, 1, 2, 4], 2, False),
        ({0.5: 1, 1: 2, 2: 3, 4: 4, 8: 3}, [0.5, 1, 2, 4, 8], 4, False),
        ({0.5: 1, 1: 2, 2: 3, 4: 4, 8: 5, 16: 6}, [0.5, 1, 2, 4, 8], 8, True),  # two steps are allowed
        ({0.5: 3, 1: 2, 2: 1, 0.25: 2}, [0.25, 0.5, 1, 2], 0.5, False),
        ({0.5: 3, 1: 2, 2: 1, 0.25: 3, 0.125: 3}, [0.125, 0.25, 0.5, 1, 2], 0.125, True),
        ({0.5: 1, 1: 2, 2: NAN}, [0.5, 1, 2], 1, False),  # too large a rate is an answer
        ({0.5: 1, 1: 2, 2: 3, 4: NAN}, [0.5, 1, 2, 4], 2, False),
        ({0.5: NAN, 1: NAN, 2: NAN, 0.25: 4, 0.125: 3}, [0.125, 0.25, 0.5, 1, 2], 0.25, False),
        (dict.fromkeys((0.125, 0.25, 0.5, 1, 2), NAN), [0.125, 0.25, 0.5, 1, 2], None, True),
    ],
)
def test_the_best_rate_is_chosen_and_the_trials_widen_while_it_is_at_the_edge(tuned, scores, tried, factor, at_edge):
    held = tuned()
    lines = grown(held, scores)
    (choice,) = tuning.choices(held, lines).values()
    everything = tuning.trainings(held, lines)
    assert sorted(t.factor for t in everything if t.trial) == sorted(t.factor for t in choice.trials) == tried
    assert (choice.factor, choice.at_edge) == (factor, at_edge)
    own = [t for t in everything if t.table == "shift_tuned"]
    assert [t.waits for t in own] == [factor is None] * 2
    if factor is not None:
        assert {t.config().train.lr for t in own} == {0.1 * factor}
        assert {t.columns["lr_factor"] for t in own} == {factor}


def test_several_seeds_are_averaged_and_a_rate_that_failed_once_is_not_taken(tuned):
    held = tuned(seeds=[1000, 1001])
    one, other = (0.5, 1000), (0.5, 1001)
    missing = grown(held, {one: 1, other: 1, (1, 1000): 5, 2: 4})
    assert [c.factor for c in tuning.choices(held, missing).values()] == [None]
    (choice,) = tuning.choices(held, grown(held, {one: 1, other: 1, (1, 1000): 9, (1, 1001): 2, 2: 5})).values()
    assert choice.factor == 1  # 5.5 and not 5
    lines = grown(held, {one: 1, other: 1, (1, 1000): 9, (1, 1001): NAN, 2: 5, 4: 1})
    assert [c.factor for c in tuning.choices(held, lines).values()] == [2]


def test_arms_are_chosen_by_themselves_at_each_width(tuned):
    held = tuned(arms=["DenseShift", "S3"])
    lines = scored(held, {0.5: 1, 1: 3, 2: 2})
    assert [c.factor for c in tuning.choices(held, lines).values()] == [None, None, 1]
    everything = tuning.trainings(held, lines)
    waits = {(t.arm, t.bits): t.waits for t in everything if t.table == "shift_tuned"}
    assert waits == {("DenseShift", 3): True, ("DenseShift", 2): True, ("S3", 3): False}
    assert not any(t.waits or t.same for t in queue.waiting(everything, lines, "avx2"))


def test_the_trials_of_an_arm_are_of_one_kind_of_processor_and_later_lines_change_no_choice(tuned):
    held = tuned()
    here = scored(held, {0.5: 1, 1: 3}, "avx2")
    mixed = here + scored(held, {2: 9}, "bf16")
    assert [c.factor for c in tuning.choices(held, mixed).values()] == [None]
    there = scored(held, {0.5: 1, 1: 2, 2: 2.5}, "bf16", lines=here)
    assert max(t.factor for t in tuning.trainings(held, there) if t.trial) == 4  # the first to end all of them
    first = scored(held, {2: 2}, "avx2", lines=here)
    for later in ({0.5: 9, 1: 1, 2: 1}, {0.5: 1, 1: 1, 2: 9}):
        (choice,) = tuning.choices(held, scored(held, later, "bf16", lines=first)).values()
        assert choice.factor == 1 and {d.kind for d in choice.lines} == {"avx2"}


def test_trials_of_an_arm_stay_on_the_kind_of_processor_where_they_began(tuned):
    held = tuned(arms=["DenseShift", "S3"])
    lines = scored(held, {1: 3}, "bf16")
    left = [t for t in queue.waiting(tuning.trainings(held, lines), lines, "avx2") if t.trial]
    assert {t.arm for t in left} == {"DenseShift"}


def test_a_line_of_another_plan_chooses_nothing(tuned):
    lines = scored(tuned(), {0.5: 1, 1: 3, 2: 2})
    held = tuned(hold_out=0.5)
    assert [c.factor for c in tuning.choices(held, lines).values()] == [None]
    assert not queue.current(tuning.trainings(held, lines), lines)


def phased(tree):
    """S3 with epochs after its training, which the tuned table does not have."""
    tree["shift"]["arms"]["S3"]["phases"] = [{"arm": "after", "epochs": 1, "lr": 1e-3}]
    tree["shift"]["arms"]["S3"]["rank"] = 0


def test_at_the_common_rate_it_is_the_training_of_the_common_table_and_has_its_rows(tuned):
    held = tuned(phased)
    lines = scored(held, {0.5: 1, 1: 3, 2: 2})
    everything = tuning.trainings(held, lines)
    common = next(t for t in everything if t.key == ("shift", "S3", 3, 2, 0))
    own = next(t for t in everything if t.table == "shift_tuned" and t.seed == 0)
    assert own.same == common and common in queue.waiting(everything, lines, "avx2")
    assert not any(t.table == "shift_tuned" for t in queue.waiting(everything, lines, "avx2"))
    done = line(common, 61.0)
    done.line["rows"].append({"arm": "after", "seed": 0, "accuracy, %": 99.0})
    ended = queue.current(everything, [*lines, done])
    assert ended[common.key] == [done] and len(ended[common.key][0].line["rows"]) == 2
    (shared,) = collected.choose([t for t in everything if t.table == "shift_tuned"], ended)
    (row,) = collected.frame([shared]).to_dict("records")
    assert row["arm"] == "S3" and row["accuracy, %"] == 61 and (row["lr_factor"], row["lr"]) == (1, 0.1)


def test_at_the_common_rate_without_such_a_training_it_is_trained(tuned):
    held = tuned(lambda tree: tree["shift"]["arms"]["S3"].update(epochs=[1]))
    lines = scored(held, {0.5: 1, 1: 3, 2: 2})
    left = queue.waiting(tuning.trainings(held, lines), lines, "avx2")
    assert [t.seed for t in left if t.table == "shift_tuned"] == [0, 1]


def test_pairs_of_the_tuned_table_stay_on_one_kind_also_where_one_is_of_the_common_table(tuned):
    held = tuned(arms=["DenseShift", "S3"])
    lines = scored(held, {0.5: 1, 1: 3, 2: 2})
    for scores in ({0.5: 1, 1: 2, 2: 3}, {4: 1}):  # both widths at twice the rate
        lines = scored(held, scores, arm="DenseShift", lines=lines)
    common = next(t for t in tuning.trainings(held, lines) if t.key == ("shift", "S3", 3, 2, 0))
    lines.append(line(common, kind="bf16"))
    left = queue.waiting(tuning.trainings(held, lines), lines, "avx2")
    assert {t.seed for t in left if t.table == "shift_tuned"} == {1}
    there = queue.waiting(tuning.trainings(held, lines), lines, "bf16")
    assert {(t.arm, t.seed) for t in there if t.table == "shift_tuned"} == {("DenseShift", 0), ("DenseShift", 1)}


def test_the_time_of_an_epoch_is_that_of_the_common_table_until_there_is_more(tuned):
    held = tuned(arms=["DenseShift", "S3"])
    everything = tuning.trainings(held, [])
    common = next(t for t in everything if t.key == ("shift", "S3", 3, 2, 0))
    trial = next(t for t in everything if t.trial and t.arm == "S3")
    other = next(t for t in everything if t.trial and t.arm == "DenseShift")
    lines = [line(common, seconds=10)]
    assert queue.seconds_an_epoch(trial, lines, "avx2") == queue.seconds_an_epoch(other, lines, "avx2") == 5
    lines.append(line(trial, seconds=3))
    assert [queue.seconds_an_epoch(t, lines, "avx2") for t in (trial, other, common)] == [3, 3, 5]


def small(tree):
    """One step an epoch, one seed, and only the arm that is tuned."""
    tree["shift"] |= {"seeds": [0], "epochs": [1], "grid": None}
    tree["shift"]["arms"] = {"S3": {"bits": [3], "quant": {"weight": {"method": "s3"}}}}
    tree["shift"]["run"]["data"]["subset"] = {"train": 64, "test": 32}


def test_the_queue_goes_from_the_trials_to_the_tuned_trainings_and_becomes_tables(tuned, project):
    held = tuned(small, further=1)
    shown = study("status").output
    assert "shift_tuned waits for the rates of S3" in shown
    trainer.work(tables=["shift_tuned"])
    assert not queue.done(held)  # nothing is ready
    trainer.work(tables=["shift_rates"])
    trials = queue.done(["shift_rates"])
    assert len(trials) in (3, 4) and {d.key[:5] for d in trials} == {("shift_rates", "S3", 3, 1, 1000)}
    trainer.work()
    assert [path.name for path in collected.write(["shift_rates"])] == ["shift_rates.csv", "shift_rates.json"]
    with pytest.raises(LowbitError, match="the study has no table 'shfit'; it has shift"):
        collected.write(["shfit"])
    names = [path.name for path in collected.write() if path.suffix == ".csv"]
    assert names == ["shift.csv", "shift_rates.csv", "shift_tuned.csv"]
    common, tried, own = (pd.read_csv(collected.folder() / name) for name in names)
    assert tried.columns[:7].tolist() == ["arm", "bits", "epochs", "steps", "seed", "lr_factor", "lr"]
    assert tried.chosen.sum() == 1 and len(tried) == len(trials)
    best = tried.sort_values(["accuracy, %", "lr_factor"], ascending=[False, True]).iloc[0]
    assert best.chosen and own.lr_factor.tolist() == [best.lr_factor] and own.lr.tolist() == [best.lr]
    assert best.at_edge == (best.lr_factor in (tried.lr_factor.min(), tried.lr_factor.max()))
    assert len(queue.done(["shift_tuned"])) == (best.lr_factor != 1)
    assert best.lr_factor != 1 or own["accuracy, %"].tolist() == common["accuracy, %"].tolist()
    card = json.loads((collected.folder() / "shift_tuned.json").read_text())
    assert card["command"] == "lowbit study run --table shift --table shift_rates --table shift_tuned"
    assert card["settings"]["trainings"] == "1 of 1"
    shown = study("status").output
    assert "waits for" not in shown and "earlier plan" not in shown and trainer.work() == 0


def test_the_time_left_counts_what_waits_and_nothing_twice(tuned):
    def left(rank=None):
        rows = [text.split("│") for text in study("status").output.splitlines() if "│" in text]
        return {row[1].strip(): row[-2 if rank is None else -3].strip() for row in rows if row[1].strip()}

    held = tuned(small)
    common, *trials, _ = tuning.trainings(held, [])

    def note(one, seconds, accuracy):
        rows = [{"arm": one.arm, **one.columns, "accuracy, %": accuracy}]
        queue.note(one, {"rows": rows, "epochs_by_arm": {}}, seconds)

    assert left() == dict.fromkeys(held, "unknown") and left(rank=0)["shift_rates"] == "0.0"
    note(trials[0], 3600.0, 1)
    assert left() == {"shift": "unknown", "shift_rates": "2.0", "shift_tuned": "unknown"}
    note(common, 7200.0, 1)
    assert left() == {"shift": "0.0", "shift_rates": "2.0", "shift_tuned": "2.0"}
    for trial, accuracy in zip(trials[1:], (3, 2), strict=True):
        note(trial, 3600.0, accuracy)
    assert left() == {"shift": "0.0", "shift_rates": "0.0", "shift_tuned": "0.0"}


def test_a_trial_whose_loss_leaves_the_finite_numbers_ends_with_a_row(tuned, tmp_path):
    held = tuned(small, factors=[1, 1e15, 1e30])
    trial = next(t for t in tuning.trainings(held, []) if t.factor == 1e30)
    result = training.run(trial, tmp_path / "one")
    queue.note(trial, result, training.seconds(result))
    (done,) = queue.done(held)
    assert done.key == trial.key and math.isnan(done.line["rows"][0]["accuracy, %"])
    assert (done.line["rows"][0]["steps"], done.line["rows"][0]["lr_factor"]) == (1, 1e30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["S4"]}, "study.yaml: tune: .*the table has no arm 'S4'; it has full precision, DenseShift, S3"),
        ({"arms": []}, "study.yaml: tune.arms"),
        ({"seeds": [1000, 1]}, "study.yaml: tune: .*seed 1 is also judged"),
        ({"seeds": []}, "study.yaml: tune.seeds"),
        ({"factors": [1, 0.5, 2]}, "study.yaml: tune.factors: .*should ascend"),
        ({"factors": [1, 2, 2]}, "study.yaml: tune.factors: .*each once"),
        ({"factors": [0.5, 2, 4]}, "study.yaml: tune.factors: .*the common rate, 1, among them"),
        ({"factors": [0.5, 1]}, "study.yaml: tune.factors"),
        ({"factors": [0, 1, 2]}, "study.yaml: tune.factors.0"),
        ({"factors": [0.5, 1, math.inf]}, "study.yaml: shift_rates: S3.*inf times the common rate: .*lr"),
        ({"hold_out": 1}, "study.yaml: tune.hold_out"),
        ({"epochs": 0}, "study.yaml: tune.epochs"),
        ({"further": -1}, "study.yaml: tune.further"),
        ({"budget": 1}, "study.yaml: tune.budget: Extra inputs"),
    ],
)
def test_a_wrong_tune_is_refused_with_its_place(tuned, change, message):
    with pytest.raises(LowbitError, match=message):
        tuning.trainings(tuned(**change), [])


def test_a_table_may_not_have_the_name_that_is_added(tuned):
    with pytest.raises(LowbitError, match=r"study\.yaml: 'tune' or 'correlation' adds a table 'shift_tuned' to one of"):
        tuned(lambda tree: tree.update(shift_tuned=copy.deepcopy(PLAN["shift"])))


def study(*words):
    return CliRunner().invoke(app, ["study", *words])
