"""A real Dask cluster on this machine: a scheduler and workers as processes, and workers that are lost."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from lowbit.errors import LowbitError
from lowbit_suite.running import executors, run_json, runner

KilledWorker = pytest.importorskip("distributed.scheduler").KilledWorker

QUICK = """
import os, lowbit
from pathlib import Path
from lowbit_suite.records.context import current
with open(Path(shared, "ran"), "a") as file: file.write(current().notebook)
lowbit.record("x", 1)
Path(current().figures, "dot.png").write_bytes(b"dot")
"""
HOLDS = """
import os, psutil, time
from pathlib import Path
here = Path(shared)
if not (here / "pids").exists():  # the first attempt
    (here / "pids.part").write_text(f"{os.getpid()} {psutil.Process().parents()[1].pid}")
    (here / "pids.part").rename(here / "pids")
    time.sleep(600)
"""


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture
def cluster(project, tmp_path):
    """Starts a scheduler; gives its address, a function that starts a worker, and the scheduler's process."""
    with contextlib.ExitStack() as stack:

        def start(kind, *options):
            command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard", *options]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=tmp_path)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        file = tmp_path / "scheduler.json"
        scheduler = start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        wait_for(file.exists)
        address = json.loads(file.read_text())["address"]

        def worker():
            scratch = str(tmp_path / "scratch")
            return start("worker", address, "--nthreads", "1", "--no-nanny", "--local-directory", scratch)

        yield address.replace("tcp", "dask"), worker, scheduler


@pytest.fixture
def course(project, tmp_path):
    def make(*holding):
        for name in ("a", "b", "c"):
            cells = [HOLDS, QUICK] if name in holding else [QUICK]
            project.add(name, *cells, parameters=f"shared = {str(tmp_path)!r}")
        return project

    return make


def pids(tmp_path):
    wait_for((tmp_path / "pids").exists)
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


@pytest.mark.slow
def test_a_lost_workers_notebook_runs_again_and_nothing_is_lost(course, cluster, tmp_path):
    where, worker, _ = cluster
    course("b")
    processes = [worker(), worker()]

    def lose():
        for pid in reversed(pids(tmp_path)):
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=lose)
    thread.start()
    result = runner.execute(runner.plan(jobs=3, executor=where))
    thread.join()
    assert [process.poll() is None for process in processes].count(False) == 1
    assert {entry.name: (entry.status, entry.reason) for entry in result.notebooks} == dict.fromkeys(
        "abc", ("passed", "")
    )
    assert "attempt 2: the worker was lost that had it before" in result.entry("b").why
    assert "attempt" not in result.entry("a").why + result.entry("c").why
    assert sorted((tmp_path / "ran").read_text()) == ["a", "b", "c"]
    folder = runner.run_folder("smoke")
    assert run_json.load(folder) == result
    for entry in result.notebooks:
        assert entry.metrics["x"].value == 1 and entry.seconds > 0 and entry.peak_mb > 20
        assert (folder / entry.output).is_file() and (folder / entry.output).with_suffix(".html").is_file()
        assert (folder / "figures" / entry.name / "dot.png").read_bytes() == b"dot"
    again = runner.execute(runner.plan(executor=where))
    assert all(entry.cached for entry in again.notebooks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "reason"), [("worker", "the cluster had no worker for 1 s"), ("scheduler", "the scheduler at .* was lost")]
)
def test_without_workers_or_scheduler_the_run_ends_and_says_so(course, cluster, tmp_path, monkeypatch, what, reason):
    where, worker, scheduler = cluster
    course("a")
    lost = {"worker": worker(), "scheduler": scheduler}[what]
    thread = threading.Thread(target=lambda: pids(tmp_path) and lost.kill())
    thread.start()
    plan = runner.plan(executor=where)
    connect = executors.connect

    def impatient(*args, **kwargs):
        made = connect(*args, **kwargs)
        made.wait = 1.0  # once there has been a worker
        return made

    monkeypatch.setattr(executors, "connect", impatient)
    result = runner.execute(plan)
    thread.join()
    assert [entry.status for entry in result.notebooks] == ["killed", "not_run", "not_run"]
    assert all(re.fullmatch(f"{reason}.*", entry.reason) for entry in result.notebooks)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_runner_leaves_nothing_at_work_on_the_workers(course, cluster, tmp_path, gone, number):
    where, worker, _ = cluster
    course("a")
    worker()
    code = "import typer; from lowbit_suite.cli import run; typer.run(run)"
    process = subprocess.Popen([sys.executable, "-c", code, "a", "--executor", where], stderr=subprocess.DEVNULL)
    kernel, busy = pids(tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=60) == (130 if number == signal.SIGINT else -number)
    wait_for(lambda: gone(kernel), 30)
    assert not gone(busy)
    assert [entry.status for entry in run_json.load(runner.run_folder("smoke")).notebooks] == ["not_run"]


@pytest.mark.slow
def test_workers_that_cannot_do_it_are_refused(course, cluster, monkeypatch):
    where, worker, _ = cluster
    course()
    monkeypatch.setattr(executors, "WAIT", 0.5)
    with pytest.raises(LowbitError, match=r"no free worker for 0.5 s; start one: dask worker tcp://"):
        runner.execute(runner.plan(executor=where))
    with pytest.raises(LowbitError, match=r"no free worker with the resource GPU .*--resources GPU=1"):
        runner.execute(runner.plan(profile="gpu", executor=where))
    monkeypatch.setattr(executors, "WAIT", 60.0)
    worker()
    found = executors.fingerprint.library()
    monkeypatch.setattr(
        executors.fingerprint, "library", lambda: {**found, "errors.py": "other", "x/_native.so": "other"}
    )
    with pytest.raises(
        LowbitError, match=r"another lowbit than this machine: the library or the suite \(errors.py\) differ"
    ):
        runner.execute(runner.plan(executor=where))


def test_a_scheduler_that_is_not_there_is_told_before_anything_runs(course, monkeypatch):
    course()
    monkeypatch.setattr(executors, "CONNECT", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(LowbitError, match=f"no Dask scheduler answers at tcp://127.0.0.1:{port}"):
        runner.execute(runner.plan(executor=f"dask://127.0.0.1:{port}"))
    assert not (runner.run_folder("smoke") / "run.json").exists()


@pytest.mark.parametrize(
    "where", ["", "dask", "dask://", "dask://host", "dask://host:", "dask://:1", "tcp://host:1", "lokal"]
)
def test_an_unknown_executor_is_refused(course, where):
    course()
    with pytest.raises(LowbitError, match="give 'local' or 'dask://HOST:PORT'"):
        runner.plan(executor=where)


def test_machines_may_differ_in_data_and_compiled_kernels_only():
    facts = {"library": {"a.py": "1", "k/_native.so": "2"}, "data": {"": {}}, "versions": {"numpy": "2"}, "device": {}}
    assert executors.comparable(facts) == {"library": {"a.py": "1"}, "versions": {"numpy": "2"}, "device": {}}


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KilledWorker("x", None, 3), "killed", "one worker after another was lost while it ran (attempt 4)"),
        (OSError("disk full"), "failed", "the worker could not execute it: OSError: disk full"),
    ],
)
def test_what_dask_gives_up_ends_as_what_it_is(error, status, reason):
    future = SimpleNamespace(status="error", exception=lambda: error, cancel=lambda: None)
    outcome = executors.Submitted(SimpleNamespace(said={"a": [executors.BEGAN] * 4}), "a", future).poll()
    assert (outcome.status, outcome.reason) == (status, reason)
