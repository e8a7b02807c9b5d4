"""The commands, from run to accept to check, with notebooks that really run."""

import json

import pytest
import typer
from typer.testing import CliRunner

from lowbit.errors import LowbitError
from lowbit_suite import cli
from lowbit_suite.accepted import baselines
from lowbit_suite.running import run_json


@pytest.fixture
def call(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    app = typer.Typer()
    for command in (cli.run, cli.check, cli.accept, cli.report, cli.doctor):
        app.command()(command)
    return lambda *words: CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def test_mistakes_are_told_before_anything_runs(project, call):
    project.add("00_a", "1", parameters="seed = 0")
    for words, message in [
        (["run", "00_a", "-p", "sed=1"], "no parameter 'sed'; it has seed; did you mean 'seed'"),
        (["run", "00_b"], "no notebook is called '00_b'"),
        (["run", "-j", "0"], "-j 0"),
        (["run", "--timeout", "0"], "more than 0 minutes"),
        (["run", "--profile", "big"], "no profile is called 'big'"),
        (["check"], "make one with 'lowbit run"),
        (["accept"], "make one with 'lowbit run"),
    ]:
        with pytest.raises(LowbitError, match=message):
            raise call(*words).exception
    assert not project.results.exists()


@pytest.mark.slow
def test_run_accept_check_and_a_regression(project, call):
    source = "import lowbit; lowbit.record('score', {} + seed % 3, better='higher'); lowbit.record('fact', 1)"
    project.add("00_a", source.format(90.0), parameters="seed = 0")
    done = call("run")
    assert (done.exit_code, "passed" in done.output) == (0, True)
    with pytest.raises(LowbitError, match="there is no baseline"):
        raise call("check").exception
    assert call("accept", "--seeds", "3", "--yes", "-j", "2").exit_code == 0
    accepted = baselines.load("smoke", "cpu").notebooks["00_a"].metrics
    assert accepted["score"].values == [90.0, 91.0, 92.0]
    assert accepted["fact"].tolerance == 0.0
    assert call("check").exit_code == 0

    folder = project.results / "runs" / "smoke"
    tree = json.loads((folder / "run.json").read_text())
    metrics = tree["notebooks"][0]["metrics"]
    metrics["score"]["value"] = 70.0
    del metrics["fact"]
    run_json.write_json(folder / "run.json", tree)
    worse = call("check")
    assert worse.exit_code == 1
    assert "worse" in worse.output
    assert "vanished" in worse.output
    assert call("check", "00_a", "--out", str(folder)).exit_code == 1


@pytest.mark.slow
def test_a_check_of_some_notebooks_says_how_to_leave_the_others_out(project, call):
    for name in ("00_a", "01_b"):
        project.add(name, "import lowbit; lowbit.record('x', 1.5)")
    assert call("run").exit_code == 0 and call("accept", "--yes").exit_code == 0
    assert call("run", "01_b").exit_code == 0
    checked = call("check")
    assert checked.exit_code == 1 and "1 of 2 differ" in checked.output
    assert "the run does not have 1 of them: 'lowbit check 01_b' leaves these out" in checked.output
    assert call("check", "01_b").exit_code == 0


@pytest.mark.slow
def test_a_nan_runs_but_fails_the_check_and_cannot_be_accepted(project, call):
    project.add("00_a", "import lowbit; lowbit.record('x', 1.5)")
    assert call("run").exit_code == 0
    assert call("accept", "--yes").exit_code == 0
    project.add("00_a", "import lowbit; lowbit.record('x', float('nan'))")
    assert call("run").exit_code == 0
    failed = call("check")
    assert failed.exit_code == 1
    assert "not a number" in failed.output
    with pytest.raises(LowbitError, match="only finite numbers"):
        raise call("accept", "--yes").exception
    page = (project.results / "runs" / "smoke" / "report.html").read_text()
    assert "✘ not a number" in page


@pytest.mark.slow
def test_a_list_of_seeds_is_measured_too(project, call):
    project.add("00_a", "import lowbit; lowbit.record('score', 10.0 + sum(seeds))", parameters="seeds = [0, 1]")
    assert call("run").exit_code == 0
    assert call("accept", "--seeds", "3", "--yes").exit_code == 0
    metric = baselines.load("smoke", "cpu").notebooks["00_a"].metrics["score"]
    assert metric.values == [11.0, 15.0, 19.0] and metric.tolerance > 0


def test_accepting_asks_and_refuses_seeds_of_other_code(project, call):
    project.add("00_a", "import lowbit; lowbit.record('x', seed)", parameters="seed = 0")
    assert call("run").exit_code == 0
    assert call("accept").exit_code == 1  # nobody answers
    assert not baselines.path("smoke", "cpu").exists()
    project.add("00_a", "import lowbit; lowbit.record('x', seed + 1)", parameters="seed = 0")
    with pytest.raises(LowbitError, match="the notebook's code changed since the run to accept"):
        raise call("accept", "--seeds", "2", "--yes").exception


def test_doctor_tells_what_is_here(call):
    done = call("doctor")
    assert done.exit_code == 0
    assert "torchvision" in done.output
    assert "free disk" in done.output


def test_the_report_can_be_written_anew_at_any_time(project, call):
    project.add("00_a", "import lowbit; lowbit.record('x', 1)")
    assert call("run").exit_code == 0 and call("accept", "--yes").exit_code == 0 and call("check").exit_code == 0
    folder = project.results / "runs" / "smoke"
    names = ("report.html", "junit.xml")
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    done = call("report")
    assert done.exit_code == 0 and "report.html" in done.output, done.output
    assert (folder / "junit.xml").read_bytes() == before["junit.xml"]
    assert "00_a" in (folder / "report.html").read_text()
    assert (folder / "junit-check.xml").is_file()  # of the run that is reported
    assert call("run").exit_code == 0
    assert not (folder / "junit-check.xml").exists()  # of the run before this one
