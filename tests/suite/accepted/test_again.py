"""`lowbit again`: single rows of a table once more, the others from the journal, and every difference told."""

import json
import math
import shlex

import pytest
from typer.testing import CliRunner

from lowbit.errors import LowbitError
from lowbit_suite.accepted import again
from lowbit_suite.app import app
from lowbit_suite.records import journal
from lowbit_suite.running import runner

SWEEP = """
import lowbit
import lowbit_suite
from pathlib import Path
def run(bits, seed):
    with open("ran", "a") as file:
        file.write(f"{bits}/{seed} ")
    return {"y": bits + seed / 3 + float(Path("offset").read_text() if Path("offset").exists() else 0)}
table = lowbit_suite.sweep(run, [{"bits": b} for b in bits_tried], seeds, workers=1, description="trainings")
lowbit.save_table(table, "05_y")
lowbit.record("y", table.y.sum())
"""
NAME = "05_sweep"


@pytest.fixture
def measured(project):
    project.add(NAME, SWEEP, parameters="bits_tried = [2, 3]\nseeds = [0, 1]")
    done = runner.execute(runner.plan([NAME], "desk"))
    assert done.notebooks[0].status == "passed", done.notebooks[0].reason
    accepted = CliRunner().invoke(app, ["accept", "--profile", "desk", "--yes"])
    assert accepted.exit_code == 0 and "3 files of tables, trainings and figures" in accepted.output
    project.ran = project.notebooks / "ran"
    project.ran.unlink()
    return project


def call(*words):
    return CliRunner().invoke(app, ["again", NAME, *words])


@pytest.mark.slow
def test_only_the_rows_asked_for_are_trained_and_the_table_is_whole(measured):
    result = call("bits=3", "seed=1")
    assert result.exit_code == 0, result.output
    assert "1 of 4 trainings will run again" in result.output and "1 of 1 exactly the same" in result.output
    assert measured.ran.read_text() == "3/1 "
    there, here = (measured.results / "runs" / run / "tables" / NAME / "05_y.csv" for run in ("desk", "again"))
    assert there.read_bytes() == here.read_bytes()
    words = shlex.split(result.output.split("accepted ones: lowbit ")[1])
    checked = CliRunner().invoke(app, words)
    assert checked.exit_code == 0 and "all 1 agree" in checked.output, checked.output


@pytest.mark.slow
def test_a_number_that_has_changed_is_told_with_both_values(measured):
    (measured.notebooks / "offset").write_text("0.5")
    result = call("--random", "2", "--draw", "1")
    assert result.exit_code == 1
    assert "0 of 2 exactly the same" in result.output and "differs" in result.output
    assert "machine" not in result.output and "processor" not in result.output  # it is the same one
    assert len(measured.ran.read_text().split()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({}, "its journal does not say on which processor"),
        ({"cpu": "Z80", "isa": ["avx2", "amx_int8"], "torch": "0.1"}, "another machine: cpu Z80, here "),
    ],
)
def test_a_difference_comes_with_the_machine_of_the_journal(measured, machine, said):
    (measured.notebooks / "offset").write_text("0.5")
    file = journal.kept("desk", NAME)
    head, *rest = file.read_text().splitlines(keepends=True)
    file.write_text(json.dumps(json.loads(head) | {"machine": machine}) + "\n" + "".join(rest))
    assert said in call("bits=2", "seed=0").output


@pytest.mark.slow
def test_rows_are_drawn_from_all_notebooks_that_have_a_journal(measured):
    other = "06_other"
    measured.add(other, SWEEP.replace("05_y", "06_y"), parameters="bits_tried = [4]\nseeds = [0, 1]")
    measured.add("07_without_journal", "raise SystemError('it was not asked for')")
    done = runner.execute(runner.plan([other], "desk"))
    assert CliRunner().invoke(app, ["accept", "--profile", "desk", "--yes"]).exit_code == 0
    assert done.notebooks[0].status == "passed"
    measured.ran.unlink()
    (measured.notebooks / "offset").write_text("0.5")
    result = CliRunner().invoke(app, ["again", "*", "seed=0"])
    assert result.exit_code == 1 and "3 of 6 trainings will run again" in result.output
    assert "0 of 3 exactly the same" in result.output and other in result.output and NAME in result.output
    assert sorted(measured.ran.read_text().split()) == ["2/0", "3/0", "4/0"]
    measured.ran.unlink()
    (measured.notebooks / "offset").unlink()
    result = CliRunner().invoke(app, ["again", "*", "bits=4", "--random", "1"])
    assert result.exit_code == 0 and "1 of 1 exactly the same" in result.output and NAME not in result.output
    assert len(measured.ran.read_text().split()) == 1


@pytest.mark.slow
def test_a_notebook_that_fails_has_not_been_compared(measured):
    (measured.notebooks / "offset").write_text("none")
    result = call("seed=0")
    assert result.exit_code == 1 and "failed" in result.output and "the same" not in result.output


@pytest.mark.slow
def test_an_interrupted_notebook_goes_on_after_its_last_training(project):
    cell = SWEEP.replace(
        "    return", "    if Path('hold').exists() and seed: raise SystemError('cut off')\n    return"
    )
    project.add(NAME, cell, parameters="bits_tried = [2, 3]\nseeds = [0, 1]")
    ran, hold = project.notebooks / "ran", project.notebooks / "hold"
    hold.touch()
    assert runner.execute(runner.plan([NAME], "desk")).notebooks[0].status == "failed"
    hold.unlink()
    assert runner.execute(runner.plan([NAME], "desk")).notebooks[0].status == "passed"
    assert ran.read_text() == "2/0 2/1 2/1 3/0 3/1 "
    ran.unlink()
    project.add(NAME, cell + "\npass", parameters="bits_tried = [2, 3]\nseeds = [0, 1]")
    assert runner.execute(runner.plan([NAME], "desk")).notebooks[0].status == "passed"
    assert ran.read_text() == "2/0 2/1 3/0 3/1 "  # the code is another one, so nothing stands
    ran.unlink()
    assert runner.execute(runner.plan([NAME], "desk", fresh=True)).notebooks[0].status == "passed"
    assert ran.read_text() == "2/0 2/1 3/0 3/1 "


def lines():
    made = [
        {"sweep": "1 learning rates", "arm": {"bits": b, "lr_factor": f}, "seed": 1000}
        for b in (2, 3)
        for f in (1.0, 3.0)
    ]
    made += [{"sweep": "2 trainings", "arm": {"bits": b, "lr_factor": 3.0}, "seed": s} for b in (2, 3) for s in (0, 1)]
    return [{**line, "result": {"y": number / 3}} for number, line in enumerate(made)]


def test_trials_are_only_picked_when_asked_for():
    assert [line["sweep"] for line in again.pick(lines(), [])] == ["2 trainings"] * 4
    assert len(again.pick(lines(), ["sweep=1 learning rates", "lr_factor=3"])) == 2
    assert [(line["arm"]["bits"], line["seed"]) for line in again.pick(lines(), ["bits=3"])] == [(3, 0), (3, 1)]


def test_a_random_choice_is_repeatable_and_of_the_size_asked_for():
    chosen = [again.pick(lines(), [], 2, draw) for draw in range(8)]
    assert all(len(some) == 2 for some in chosen) and chosen == [again.pick(lines(), [], 2, draw) for draw in range(8)]
    assert len({json.dumps(some) for some in chosen}) > 1
    assert again.pick(lines(), [], 9) == again.pick(lines(), [])


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("width=2", r"'width=2'.*names sweep, seed, bits, lr_factor"),
        ("bits", "does not have the form"),
        ("bits=7", "no training has bits=7; there are 2, 3"),
    ],
)
def test_what_cannot_be_picked_is_refused(wanted, said):
    with pytest.raises(LowbitError, match=said):
        again.pick(lines(), [wanted])


def test_differences_are_exact_and_nan_equals_nan():
    line = {"sweep": "s", "arm": {}, "seed": 0, "result": [{"a": 0.1, "n": math.nan, "c": [1, 2]}]}
    assert not again.Row(line, [{"a": 0.1, "n": math.nan, "c": [1, 2]}]).differing
    found = again.Row(line, [{"a": 0.1 + 2**-56, "n": 0.0, "c": [1, 3], "d": 1}]).differing
    assert [name for name, _, _ in found] == ["[0], a", "[0], n", "[0], c [1]", "[0], d"]


def test_a_training_that_the_notebook_has_no_more_is_named():
    with pytest.raises(LowbitError, match=r"no longer trains 2 trainings: bits=3, lr_factor=3\.0, seed=1"):
        again.compare(lines()[-1:], lines()[:-1])


def test_no_journal_and_one_of_something_else_are_refused(project):
    project.add(NAME, SWEEP, parameters="bits_tried = [2]\nseeds = [0]")
    project.add("06_other", "pass")
    with pytest.raises(LowbitError, match=r"holds no training.*results/journals"):
        again.plan(NAME, "desk", None, [])
    file = project.folder / "other.jsonl"
    journal.begin(file, {}, NAME, {"seeds": [7], "profile": "desk"}, lines())
    assert again.plan(NAME, "desk", file, []).run.parameters == {NAME: {"seeds": [7], "profile": "desk"}}
    with pytest.raises(LowbitError, match="belongs to 05_sweep at desk, not to 06_other at desk"):
        again.plan("06_other", "desk", file, [])
    with pytest.raises(LowbitError, match="belongs to 05_sweep at desk, not to 05_sweep at smoke"):
        again.plan(NAME, "smoke", file, [])
    with pytest.raises(LowbitError, match=r"'\*' matches 2 notebooks, but a journal belongs to one"):
        again.plan("*", "desk", file, [])
    with pytest.raises(LowbitError, match="holds no training"):
        again.plan("*", "desk", None, [])
    journal.begin(file, {}, NAME, {"sedes": [7]}, lines())
    with pytest.raises(LowbitError, match="'sedes', which 05_sweep no longer has"):
        again.plan(NAME, "desk", file, [])
