"""Really kills the runner, at moments that hurt, and goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lowbit.errors import LowbitError
from lowbit_suite.running import cache, run_json, runner

CELLS = """
import os, time, lowbit
from pathlib import Path
from lowbit_suite.records.context import current
def note(what):
    with open("ran", "a") as file:
        file.write(f"{what} {current().notebook}\\n")
note("began")
lowbit.record("first", number)
Path(current().figures, "dot.png").write_bytes(b"half")
"""
ENDS = """
while Path("hold").exists() and current().notebook == "c": time.sleep(0.05)
lowbit.record("second", 2 * number)
Path(current().figures, "dot.png").write_bytes(b"whole")
note("ended")
"""
RUNNER = """
import os, signal, sys, typer
from lowbit_suite import cli
from lowbit_suite.running import run_json
from lowbit_suite.running.cache import Cache
moment, count = sys.argv.pop(1), 0
def second_time():
    global count
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
keep, fsync = Cache.keep, os.fsync
def dying_keep(*args):
    if moment == "before it is kept": second_time()
    keep(*args)
    if moment == "after it is kept": second_time()
def dying_fsync(handle):
    if moment == "while run.json is written" and "run.json" in os.readlink(f"/proc/self/fd/{handle}"): second_time()
    if moment == "while the cache is written" and "cache.json" in os.readlink(f"/proc/self/fd/{handle}"): second_time()
    fsync(handle)
Cache.keep, os.fsync = dying_keep, dying_fsync
typer.run(cli.run)
"""


@pytest.fixture
def course(project):
    for number, name in enumerate("abc"):
        project.add(name, CELLS, ENDS, parameters=f"number = {number}")
    return project


def ran(project):
    return (project.notebooks / "ran").read_text().splitlines()


def start(moment, *options):
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, moment, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_whole(project, result, folder):
    """Everything as in a run that nobody disturbed: numbers, files, nothing half or left over."""
    assert {entry.name: entry.status for entry in result.notebooks} == dict.fromkeys("abc", "passed")
    assert run_json.load(folder) == result
    for number, entry in enumerate(result.notebooks):
        assert {k: m.value for k, m in entry.metrics.items()} == {"first": number, "second": 2 * number}
        assert (folder / "figures" / entry.name / "dot.png").read_bytes() == b"whole"
        assert (folder / entry.output).with_suffix(".html").is_file()
    assert not list(folder.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the moments are found through /proc")
@pytest.mark.parametrize(
    ("moment", "finished", "left_over"),
    [
        ("before it is kept", "a", ""),
        ("after it is kept", "ab", ""),
        ("while run.json is written", "a", "run.json"),
        ("while the cache is written", "a", "cache.json"),
    ],
)
def test_a_killed_run_goes_on_with_what_is_left(course, moment, finished, left_over):
    process = start(moment, "--fresh")
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    folder = course.results / "runs" / "smoke"
    assert [path.name.split(".")[1] for path in folder.glob(".*.part")] == ([left_over[:-5]] if left_over else [])
    before = ran(course)
    result = runner.execute(runner.plan(resume=True))
    assert_whole(course, result, folder)
    assert {entry.name for entry in result.notebooks if entry.cached} == set(finished)
    assert ran(course)[len(before) :] == [
        f"{what} {name}" for name in "abc" if name not in finished for what in ("began", "ended")
    ]
    for name in finished:
        assert before.count(f"ended {name}") == 1


@pytest.mark.slow
def test_a_notebook_that_was_at_work_does_not_write_into_its_second_execution(course):
    (course.notebooks / "hold").touch()
    process = start("none", "-j", "3")
    until = time.monotonic() + 120
    folder = course.results / "runs" / "smoke"
    while len(cache.Cache(folder).kept) < 2 or "began c" not in ran(course):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (course.notebooks / "hold").unlink()  # what is left of c would go on at once
    result = runner.execute(runner.plan(resume=True))
    assert_whole(course, result, folder)
    assert [entry.cached for entry in result.notebooks] == [True, True, False]
    assert ran(course).count("ended c") in (1, 2)  # the first may have come to its end before it was ended


@pytest.mark.slow
def test_a_fresh_run_that_was_interrupted_does_not_fall_back_on_older_results(course):
    assert runner.execute(runner.plan()).passed
    process = start("after it is kept", "--fresh")
    process.communicate(timeout=120)
    result = runner.execute(runner.plan(resume=True))
    assert [entry.cached for entry in result.notebooks] == [True, True, False]
    assert result.entry("c").why == "no earlier result is kept"
    assert [ran(course).count(f"ended {name}") for name in "abc"] == [2, 2, 2]


def test_what_cannot_be_gone_on_with_is_refused(course):
    folder = course.results / "runs" / "smoke"
    run_json.Run("smoke", "now", {}, []).save(folder)
    with pytest.raises(LowbitError, match=r"has profile 'smoke', not 'desk'; give --profile smoke .* or .* --out"):
        runner.plan(profile="desk", resume=True, out=folder)
    with pytest.raises(LowbitError, match="--fresh and --resume contradict each other"):
        runner.plan(fresh=True, resume=True)


def test_two_runners_do_not_share_a_folder(course):
    folder = course.results / "runs" / "smoke"
    with runner._alone(folder), pytest.raises(LowbitError, match=r"another run uses .*--out"):
        runner.execute(runner.plan())
