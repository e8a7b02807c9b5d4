"""Trainings of the study: what they measure, and that being cut off changes nothing."""

import copy
import json
import math
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
from PIL import Image
from study_plans import DETECTION, TRANSFER
from typer.testing import CliRunner

import lowbit
from lowbit_suite.app import app
from lowbit_suite.claims import text
from lowbit_suite.study import collected, plan, queue, trainer, training

SHARED = {"arm", "bits", "epochs", "steps", "seed", "accuracy, %", "test loss", "train loss", "seconds"}
MOTION = {"oscillating, %", "frequency", "memory", "frozen, %", "sign frozen, %", "flip rate, %", "changed level, %"}


def pick(held, *key):
    return next(t for t in plan.trainings(held) if t.key == key)


def same(result):
    """What of a result does not depend on the clock."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result["rows"]]


def test_a_vision_transformer_with_its_phases(planned, tmp_path):
    held = planned()
    result = training.run(pick(held, "ofq", "StatsQ + QKR", 2, 2, 0), tmp_path / "one")
    main, annealed, control = result["rows"]
    assert [row["arm"] for row in result["rows"]] == ["StatsQ + QKR", "CGA", "no mask"]
    more = {"distillation loss", "reach", "boundary density, %", "oscillating per density"}
    assert set(main) == SHARED | MOTION | more | {"oscillating qk, %", "misestimation, %"}
    assert main["steps"] == annealed["steps"] == 2 * 4 and main["memory"] == 100 / 8
    assert 0 < annealed["lr of the phase"] == control["lr of the phase"] <= 1e-5
    assert annealed["changed level, %"] <= control["changed level, %"] < main["changed level, %"]
    # Σ of a cosine from 5e-4 over 8 steps is 4.5 of them; the spacing is of the size of the weights, some hundredths
    assert main["reach"] == pytest.approx(4.5 * 5e-4 / 0.016, rel=0.5)
    assert all(math.isfinite(value) for row in result["rows"] for value in row.values() if isinstance(value, float))
    assert len(result["epochs_by_arm"]["StatsQ + QKR"]["train_loss"]) == 2


def test_the_rate_of_the_phases_follows_the_rule(planned, tmp_path):
    def steeper(tree):
        for phase in tree["ofq"]["arms"]["StatsQ + QKR"]["phases"]:
            phase["lr"] = 1.0

    result = training.run(pick(planned(steeper), "ofq", "StatsQ + QKR", 2, 2, 0), tmp_path / "one")
    rates = {row["lr of the phase"] for row in result["rows"][1:]}
    assert len(rates) == 1 and 0 < rates.pop() < 0.1 * 0.05 * 0.1


def test_a_full_precision_twin_is_tracked_through_the_grid_of_its_table(planned, tmp_path):
    held = planned()
    (row,) = training.run(pick(held, "shift", "full precision", 32, 2, 0), tmp_path / "twin")["rows"]
    assert set(row) == SHARED | MOTION and 0 < row["frozen, %"] < 100
    (row,) = training.run(pick(held, "ofq", "full precision", 32, 1, 0), tmp_path / "other")["rows"]
    assert set(row) == SHARED | {"distillation loss"}  # no grid there


def test_the_same_training_gives_the_same_numbers_wherever_it_was_cut_off(planned, tmp_path, monkeypatch):
    one = pick(planned(), "ofq", "StatsQ + QKR", 2, 2, 1)
    whole = training.run(one, tmp_path / "whole")

    class Cut(Exception):
        pass

    def train_until(stop):
        calls = [0]
        real = lowbit.training.checkpoint.save

        def save(path, **contents):
            real(path, **contents)
            calls[0] += 1
            if calls[0] == stop:
                raise Cut

        return save

    for stop in (1, 3):  # in the middle of the training, and after the first of its phases
        with monkeypatch.context() as patch:
            patch.setattr(lowbit.training.checkpoint, "save", train_until(stop))
            with pytest.raises(Cut):
                training.run(one, tmp_path / f"cut{stop}")
        again = same(training.run(one, tmp_path / f"cut{stop}"))
        differ = {
            (row["arm"], name): (row[name], other[name])
            for row, other in zip(same(whole), again, strict=True)
            for name in row
            if row[name] != other[name]
        }
        assert not differ, stop


def test_a_source_task_goes_before_with_the_same_weights_and_another_head(planned, tmp_path):
    held = planned(lambda tree: tree.update(transfer=copy.deepcopy(TRANSFER)))
    one = pick(held, "transfer", "DenseShift", 3, 1, 1)
    assert one.length == 2 and one.columns == {"seed": 9} and one.run["data"]["subset"]["seed"] == 9
    (row,) = training.run(one, tmp_path / "one")["rows"]
    assert {"target, %", "source, %", "source seconds"} <= set(row) and "accuracy, %" not in row
    assert row["source, %"] > 25 and trainer.epochs_done(tmp_path / "one") == 2
    (again,) = training.run(one, tmp_path / "one")["rows"]  # all epochs are there
    assert again == row


def test_what_is_frozen_after_the_source_task_is_measured_where_the_plan_asks(planned, tmp_path):
    def add(tree, **more):
        tree["transfer"] = copy.deepcopy(TRANSFER) | more

    one = pick(planned(lambda tree: add(tree, track_source=True)), "transfer", "DenseShift", 3, 1, 1)
    other = pick(planned(add), "transfer", "DenseShift", 3, 1, 1)
    assert one.digest == other.digest  # a measurement, and no other training
    (row,), (plain,) = (same(training.run(each, tmp_path / str(i))) for i, each in enumerate((one, other)))
    frozen = row.pop("source frozen, %")
    last = (tmp_path / "0" / "source" / "history.jsonl").read_text().splitlines()[-1]
    assert 0 < frozen < 100 and frozen == 100 * json.loads(last)["frozen_epoch"]
    assert {name: row[name] for name in plain if "seconds" not in name} == {
        name: value for name, value in plain.items() if "seconds" not in name
    }
    (again,) = training.run(one, tmp_path / "0")["rows"]
    assert again["source frozen, %"] == frozen


def test_correlations_are_of_ranks_over_the_arms_of_whole_seeds():
    values = {  # frozen and target, of four arms: by hand 1 - 6 * 18 / (4 * 15)
        0: ((0.2, 61), (0.5, 60), (0.6, 52), (0.9, 55)),
        1: ((0.2, 61), (0.5, 60), (0.6, 52)),
        2: ((0.2, 61), (0.5, 62), (0.6, 63), (0.9, 99)),
        3: ((0.2, 61), (0.5, 61), (0.6, 61), (0.9, 61)),
        4: ((0.2, 61), (0.5, 60), (0.6, math.nan), (0.9, 55)),
    }
    rows = [
        {"arm": arm, "epochs": 20, "seed": seed, "frozen": frozen, "target": target}
        for seed, pairs in values.items()
        for arm, (frozen, target) in enumerate(pairs)
    ]
    wanted = plan.Correlation(table="by_seed", column="rank", of=("frozen", "target"))
    found = collected.correlations(pd.DataFrame(rows), wanted, arms=4)
    assert found.columns.tolist() == ["epochs", "seed", "arms", "rank"] and found.seed.tolist() == [0, 2, 3]
    assert found["rank"].tolist() == [pytest.approx(-0.8), pytest.approx(1), pytest.approx(math.nan, nan_ok=True)]
    with pytest.raises(
        lowbit.LowbitError, match=r"study\.yaml: by_seed: no row has a column 'froze'; arm, .* are there"
    ):
        collected.correlations(pd.DataFrame(rows), wanted.model_copy(update={"of": ("froze", "target")}), arms=4)


def test_a_table_of_correlations_is_written_beside_its_rows(planned):
    def small(tree):
        del tree["ofq"]
        tree["shift"] |= {"epochs": [1], "correlation": {"table": "by_seed", "column": "rank", "of": ["x", "y"]}}
        tree["shift"]["arms"] = {name: tree["shift"]["arms"][name] for name in ("full precision", "DenseShift")}

    def note(one, x):
        row = {"arm": one.arm, "epochs": one.epochs, "seed": one.seed, "accuracy, %": 1.0, "x": x, "y": -x}
        queue.note(one, {"rows": [row], "epochs_by_arm": {}}, 1.0)

    *first, last = plan.trainings(planned(small))
    for place, one in enumerate(first):
        note(one, place)
    assert [path.name for path in collected.write()] == ["shift.csv", "shift.json", "by_seed.csv", "by_seed.json"]
    assert pd.read_csv(collected.folder() / "by_seed.csv").to_dict("list") == {
        "epochs": [1], "seed": [0], "arms": [3], "rank": [-1.0]
    }  # fmt: skip
    note(last, 0)
    collected.write()
    assert pd.read_csv(collected.folder() / "by_seed.csv").seed.tolist() == [0, 1]
    card = json.loads((collected.folder() / "by_seed.json").read_text())
    assert (card["table"], card["rows"], card["command"]) == ("by_seed", 2, "lowbit study run --table shift")


def test_a_network_trained_in_full_precision_first_is_quantized_with_its_head(planned, tmp_path):
    def add(tree):
        arm = {"bits": [3], "quant": {"weight": {"method": "inq"}}, "first": {}, "train": {"lr": 0.01}}
        tree["shift"]["arms"]["INQ"] = arm

    held = planned(add)
    (row,) = training.run(pick(held, "shift", "INQ", 3, 2, 0), tmp_path / "one")["rows"]
    (twin,) = training.run(pick(held, "shift", "full precision", 32, 2, 0), tmp_path / "twin")["rows"]
    assert row["source, %"] == twin["accuracy, %"] and {"accuracy, %", "frozen, %"} <= set(row)
    assert "target, %" not in row and row["steps"] == twin["steps"] == 8
    assert trainer.epochs_done(tmp_path / "one") == 4
    end = lowbit.training.checkpoint.load(tmp_path / "one" / "main" / "checkpoint.pt")["model"]
    held_codes = [value for name, value in end.items() if name.endswith(".held")]
    assert held_codes and all((codes >= 0).all() for codes in held_codes)  # in the last quarter all weights are frozen


def test_a_detector_grows_on_what_the_source_task_left(planned, project, tmp_path):
    for split, count in (("train", 16), ("val", 4)):
        for name in ("dark", "bright"):
            folder = project.folder / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (15 * i if name == "bright" else 0,) * 3).save(folder / f"{i}.png")

    def add(tree):
        tree["detection"] = copy.deepcopy(DETECTION)
        pictures = {"name": "image-folder", "path": str(project.folder / "pictures"), "img_size": 32}
        tree["detection"]["source"]["data"] = pictures

    one = pick(planned(add), "detection", "DenseShift", 3, 1, 0)
    (row,) = training.run(one, tmp_path / "one")["rows"]
    assert {"mAP, %", "mAP50, %", "source, %", "frozen, %"} <= set(row) and "accuracy, %" not in row
    assert 0 <= row["mAP, %"] <= row["mAP50, %"] <= 100 and row["changed level, %"] < 100


def test_the_queue_is_worked_off_and_becomes_tables(planned):
    def small(tree):
        del tree["ofq"]
        tree["shift"] |= {"seeds": [0], "epochs": [1]}
        tree["shift"]["arms"].pop("S3")

    held = planned(small)
    assert trainer.work() == 3 and trainer.work() == 0
    assert len(queue.done(["shift"])) == 3 and not list(queue.scratch().glob("*/main"))
    table, card = collected.write()
    frame = pd.read_csv(table)
    assert frame.arm.tolist() == ["full precision", "DenseShift", "DenseShift"] and set(frame.kind) == {queue.kind()}
    assert '"trainings": "3 of 3"' in card.read_text() and "lowbit study run --table shift" in card.read_text()
    assert collected.write() == [table, card] and held
    hours = sum(line.seconds for line in queue.done(held)) / 3600
    assert json.loads(card.read_text())["core_hours"] == pytest.approx(hours, abs=0.01)
    (row,) = [line for line in text.study_costs() if line.startswith("| shift |")]
    assert row == f"| shift | 3 of 3 | {hours:.1f} | 3 on {queue.kind()} |"


def test_a_named_table_is_finished_here_while_others_still_wait(planned):
    """Blocks that began elsewhere come up when nothing else is left, of this table."""

    def small(tree):
        tree["shift"] |= {"seeds": [0], "epochs": [1]}
        tree["shift"]["arms"].pop("S3")

    held = planned(small)
    one = next(t for t in plan.trainings(held) if t.table == "shift" and t.bits == 32)
    queue.note(one, {"rows": [], "epochs_by_arm": {}}, 1.0)
    path = queue.journals() / "shift.jsonl"
    path.write_text(path.read_text().replace(f'"kind": "{queue.kind()}"', '"kind": "of another machine"'))
    assert trainer.work(tables=["shift"]) == 3  # the twin too: a pair is of one kind


def test_what_would_not_end_in_time_does_not_begin(planned):
    held = planned()
    trainings = list(plan.trainings(held))
    for one in trainings:
        if one.epochs == 1 and one.seed == 0:
            courses = {one.arm: {"train_loss": [1.0]}}
            queue.note(one, {"rows": [], "epochs_by_arm": courses}, 3600.0)  # an hour an epoch
    assert trainer.work(time.time() + 1800) == 0
    assert trainer.work(time.time() - 1) == 0
    assert "begun here" not in study("status").output  # each was looked at and left


def test_the_command_runs_pauses_and_loses_no_whole_epoch(planned, project):
    """Two runs are started, paused, killed and started again; every training ends once."""

    def small(tree):
        tree["shift"] |= {"seeds": [0], "epochs": [1, 2]}
        tree["shift"]["arms"].pop("S3")
        del tree["ofq"]

    held = planned(small)
    run = [sys.executable, "-m", "lowbit", "study", "run", "-j", "1", "--nice", "0"]
    runs = [subprocess.Popen(run) for _ in range(2)]
    pids = [queue.scratch() / f"{each.pid}.pids.json" for each in runs]
    wait(lambda: all(each.exists() for each in pids) and list(queue.scratch().glob("*/main/history.jsonl")))
    workers = [psutil.Process(pid) for each in pids for pid in json.loads(each.read_text())]
    assert len(workers) == 2
    other = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    # what a killed run left, whose worker's number another process has now
    (queue.scratch() / "1.pids.json").write_text(json.dumps([other.pid]))
    assert study("pause").exit_code == 0
    wait(lambda: all(worker.status() == "stopped" for worker in workers))
    assert other.status() != "stopped"
    other.kill()
    other.wait()
    held_still = len(queue.done(held))
    time.sleep(1)
    assert len(queue.done(held)) == held_still
    assert study("resume").exit_code == 0
    for started, path in zip(runs, pids, strict=True):
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 143 and not path.exists()
    trainer.work()
    keys = [done.key for done in queue.done(held)]
    assert len(keys) == len(set(keys)) == 6
    shown = study("status").output
    assert "6 of 6" in shown and "begun here" not in shown
    refused = study("pause")
    assert refused.exit_code == 2 and "no study runs here" in refused.stderr
    planned(lambda tree: tree["ofq"]["arms"]["StatsQ + QKR"]["quant"]["weight"].update(method="nothing"))
    refused = study("run", "--table", "shift")  # another table is wrong: nothing starts
    assert refused.exit_code == 2 and "nothing" in refused.stderr
    planned(small)
    refused = study("run", "--table", "shfit")
    assert refused.exit_code == 2 and "no table 'shfit'; it has shift" in refused.stderr


def study(*words):
    return CliRunner().invoke(app, ["study", *words])


def wait(holds, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
