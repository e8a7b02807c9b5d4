"""Really executes notebooks, and really kills them."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from lowbit.errors import LowbitError
from lowbit_suite.profiles import Profile
from lowbit_suite.running import run_json, runner
from lowbit_suite.running.run_json import Entry, Run

KILLED = """
import os, signal, subprocess
from pathlib import Path
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
Path("pids").write_text(f"{os.getpid()} {child.pid}")
"""


@pytest.fixture(scope="module")
def ended(make_project, tmp_path_factory):
    """One run of notebooks that end in every way but the slow ones."""
    with pytest.MonkeyPatch.context() as patch:
        project = make_project(tmp_path_factory.mktemp("project {x}"), patch)
        project.add(
            "00_good",
            """
            import os, sys, lowbit
            lowbit.record("count", count, better="higher")
            lowbit.record("same_python", sys.executable == python and profile == "smoke")
            lowbit.record("threads", int(os.environ["OMP_NUM_THREADS"]))
            from pathlib import Path
            from lowbit_suite.records.context import current
            Path(current().figures, "dot.png").write_bytes(b"dot")
            """,
            parameters=f"profile = 'none'\npython = {sys.executable!r}\ncount = 1",
        )
        project.add("01_bad", "import lowbit; lowbit.record('kept', 1)", "1 / 0", "lowbit.record('never', 1)")
        project.add("02_killed", KILLED, "os.kill(os.getpid(), signal.SIGKILL)", "2")
        project.add("03_after", "1", after=["01_bad"])
        project.add("04_twice", "import lowbit; lowbit.record('a', 1); lowbit.record('a', 1)")
        project.add("05_leaves", "import sys", "sys.exit(0)", "3")
        project.add("06_memory", "raise MemoryError('<script>alert(1)</script>')")
        project.add(
            "07_worker", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "import time; time.sleep(60)"
        )
        result = runner.execute(runner.plan(assignments=["00_good:count=3"], jobs=2))
        yield project, result, project.results / "runs" / "smoke"


def test_every_status_is_what_happened(ended):
    _, result, folder = ended
    assert {entry.name: entry.status for entry in result.notebooks} == {
        "00_good": "passed",
        "01_bad": "failed",
        "02_killed": "killed",
        "03_after": "not_run",
        "04_twice": "failed",
        "05_leaves": "failed",
        "06_memory": "oom",
        "07_worker": "killed",
    }
    assert not result.passed
    assert run_json.load(folder) == result


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("00_good", ""),
        ("01_bad", "ZeroDivisionError: division by zero (code cell 2: 1 / 0)"),
        ("02_killed", "the kernel died (SIGKILL) in code cell 2: os.kill(os.getpid(), signal.SIGKILL)"),
        ("03_after", "it comes after 01_bad, which is failed"),
        ("04_twice", "'a' was recorded twice"),
        ("05_leaves", "ended by SystemExit: 0 in code cell 2 of 3: sys.exit(0)"),
        ("07_worker", "the process that executes the notebook was ended by SIGKILL"),
    ],
)
def test_reasons_say_what_and_where(ended, name, reason):
    assert ended[1].entry(name).reason == reason


def test_numbers_parameters_and_costs_are_kept(ended):
    _, result, _ = ended
    good = result.entry("00_good")
    assert {name: metric.value for name, metric in good.metrics.items()} == {"count": 3, "same_python": 1, "threads": 1}
    assert good.metrics["count"].better == "higher"
    assert good.parameters == {"profile": "smoke", "python": sys.executable, "count": 3}
    assert good.seconds > 0
    assert good.peak_mb > 20
    assert list(result.entry("01_bad").metrics) == ["kept"]


def test_run_json_has_the_promised_form(ended):
    tree = json.loads((ended[2] / "run.json").read_text())
    assert list(tree) == ["schema", "profile", "started", "environment", "notebooks"]
    keys = ["name", "status", "reason", "cached", "why", "seconds", "peak_mb", "parameters", "metrics", "output"]
    assert all(list(entry) == keys for entry in tree["notebooks"])
    assert tree["notebooks"][0]["metrics"]["count"] == {"value": 3, "unit": "", "better": "higher"}


def test_executed_copies_are_kept_and_the_sources_untouched(ended):
    project, result, folder = ended
    copy = nbformat.read(folder / result.entry("00_good").output, as_version=4)
    assert "count = 3" in copy.cells[-1].outputs[0].text
    assert str(project.folder) not in json.dumps(copy.metadata)
    assert "<html" in (folder / "00_good.html").read_text()
    assert (folder / "figures" / "00_good" / "dot.png").read_bytes() == b"dot"
    assert not nbformat.read(project.notebooks / "00_good.ipynb", as_version=4).cells[-1].outputs


def test_the_report_says_so_and_escapes(ended):
    page = (ended[2] / "report.html").read_text()
    assert "1 of 8 notebooks passed" in page
    assert "☠ killed" in page
    assert "the kernel died (SIGKILL)" in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_what_a_killed_kernel_left_behind_is_ended(ended, gone):
    pids = (ended[0].notebooks / "pids").read_text().split()
    assert len(pids) == 2
    assert all(gone(int(pid)) for pid in pids)


@pytest.mark.slow
def test_a_timeout_ends_the_notebook_and_its_children(project, gone):
    project.add("slow", KILLED, "import time; time.sleep(600)")
    result = runner.execute(runner.plan(timeout_minutes=0.1))
    assert [(entry.status, entry.seconds < 60) for entry in result.notebooks] == [("timeout", True)]
    assert "no end after 6 s" in result.notebooks[0].reason
    if (pids := project.notebooks / "pids").exists():  # on a very slow machine the kernel has not come so far
        assert all(gone(int(pid)) for pid in pids.read_text().split())


@pytest.mark.slow
def test_only_what_changed_or_did_not_pass_runs_again(project):
    project.add("a", "import lowbit; lowbit.record('x', 1)")
    project.add("b", "from pathlib import Path; assert Path('now').exists()")
    first = runner.execute(runner.plan(jobs=2))
    assert [entry.status for entry in first.notebooks] == ["passed", "failed"]
    (project.notebooks / "now").touch()
    second = runner.execute(runner.plan())
    a, b = second.notebooks
    assert (a.status, a.cached, a.metrics) == ("passed", True, first.notebooks[0].metrics)
    assert (b.status, b.cached, b.why) == ("passed", False, "its last run ended as failed")
    project.add("a", "import lowbit; lowbit.record('x', 2)")
    third = runner.execute(runner.plan())
    a, b = third.notebooks
    assert (a.cached, a.why, a.metrics["x"].value) == (False, "the notebook's code changed", 2)
    assert b.cached


@pytest.mark.slow
def test_a_result_whose_notebook_was_edited_meanwhile_is_not_kept(project):
    edit = """
        from pathlib import Path
        here = Path("a.ipynb")
        here.write_text(here.read_text().replace("bef" + "ore", "after"))
        """
    project.add("a", "1  # before", edit)
    (first,) = runner.execute(runner.plan()).notebooks
    assert first.status == "passed"
    assert "the notebook's code changed while it ran" in first.why
    project.add("a", "1  # before", edit)
    (second,) = runner.execute(runner.plan()).notebooks
    assert (second.cached, second.why.split(";")[0]) == (False, "no earlier result is kept")


@pytest.mark.slow
def test_what_comes_after_a_notebook_that_ran_again_runs_again(project):
    project.add("a", "1", parameters="seed = 0")
    project.add("b", "1", after=["a"])
    assert runner.execute(runner.plan()).passed
    a, b = runner.execute(runner.plan(assignments=["a:seed=1"])).notebooks
    assert (a.cached, a.why) == (False, "the parameters (seed) changed")
    assert (b.cached, b.why) == (False, "the notebooks before it (a) changed")
    a, b = runner.execute(runner.plan(assignments=["a:seed=1"])).notebooks
    assert a.cached and b.cached


def test_a_profile_that_needs_a_gpu_is_skipped_without_one(project, monkeypatch):
    project.add("a", "1")
    monkeypatch.setattr("lowbit.environment._torch_sees", lambda: (None, 1))
    result = runner.execute(runner.plan(profile="gpu"))
    assert [(entry.status, entry.reason) for entry in result.notebooks] == [
        ("skipped", "profile gpu needs a CUDA GPU, and torch sees none")
    ]
    assert not result.passed


@pytest.mark.slow
def test_results_that_cannot_be_written_stop_the_run_and_spoil_nothing(project, monkeypatch):
    project.add("a", "import lowbit; lowbit.record('x', 1)")
    project.add("b", "1")
    folder = project.results / "runs" / "smoke"
    synced = os.fsync

    def full(file):
        if (folder / "b.ipynb").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LowbitError, match=r"No space left on device.*--resume"):
        runner.execute(runner.plan())
    a, b = run_json.load(folder).notebooks
    assert (a.status, a.metrics["x"].value, b.status) == ("passed", 1, "not_run")
    assert [path.name for path in folder.glob(".*")] == [".lock"], "no half-written file is left"


@pytest.mark.parametrize("status", run_json.STATUSES)
def test_only_passed_notebooks_and_permitted_skips_fulfil_a_run(status):
    profile = Profile(description="x", timeout_minutes=1, may_skip=["b*"])

    def fulfills(**statuses):
        entries = [Entry(name, said) for name, said in statuses.items()]
        return Run("smoke", "", {}, entries).fulfills(profile)

    assert fulfills(a="passed", c=status) is (status == "passed")
    assert fulfills(a="passed", b1=status) is (status in ("passed", "skipped"))
    assert fulfills(b1=status) is (status == "passed")
    assert not fulfills()


def _start(project):
    project.add("a", KILLED, "import time; time.sleep(600)")
    project.add("b", "1")
    code = "import sys, typer; from lowbit_suite.cli import run; typer.run(run)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = project.notebooks / "pids"
    until = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2) and time.monotonic() < until:
        time.sleep(0.05)
    return process, [int(pid) for pid in pids.read_text().split()]


def _wait(condition):
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)
    return condition()


@pytest.mark.slow
def test_ctrl_c_ends_everything_and_says_what_was_left(project, gone):
    process, pids = _start(project)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "stopped by SIGINT" in " ".join(out.split())
    result = run_json.load(project.results / "runs" / "smoke")
    assert [entry.status for entry in result.notebooks] == ["not_run", "not_run"]
    assert all(gone(pid) for pid in pids)


@pytest.mark.slow
def test_a_killed_runner_leaves_no_kernel_and_no_claim(project, gone):
    process, pids = _start(project)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert _wait(lambda: all(gone(pid) for pid in pids))
    result = run_json.load(project.results / "runs" / "smoke")
    assert [(entry.status, entry.reason) for entry in result.notebooks] == [("not_run", "not started yet")] * 2
