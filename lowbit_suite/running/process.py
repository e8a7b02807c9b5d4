"""Runs one notebook in its own process: starts, watches and measures it, and ends it with all its child processes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lowbit import paths
from lowbit_suite.notebooks import Notebook
from lowbit_suite.records import journal
from lowbit_suite.records.context import Context, current
from lowbit_suite.records.record import DIRECTIONS, NAME, decode
from lowbit_suite.running.outputs import flaw
from lowbit_suite.running.run_json import Metric
from lowbit_suite.running.worker import EXIT

GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL."""

SAMPLE = 0.25
"""Seconds between two measurements of the memory."""

PRIVATE = "lowbit-"


@dataclass(frozen=True)
class Outcome:
    """How one notebook ended: fields as in `lowbit_suite.running.run_json.Entry`."""

    status: str
    reason: str
    seconds: float
    peak_mb: float
    metrics: dict[str, Metric]
    note: str = ""
    """A remark on how the outcome came about, for people."""


class Execution:
    """A running notebook. The runner calls `poll` repeatedly until it returns an `Outcome`.

    Kernels get a session of their own from Jupyter, so killing the worker's process group does not reach them:
    all descendants are recorded, and an environment variable marks those that detach themselves.
    """

    def __init__(
        self,
        notebook: Notebook,
        parameters: dict[str, Any],
        folder: Path,
        *,
        timeout: float,
        threads: int | None,
        of: dict[str, Any] | None = None,
    ) -> None:
        """Start it. ``of`` is its fingerprint: finished trainings of an execution with the same one are kept."""
        self.notebook, self.timeout = notebook, timeout
        self.output = folder / f"{notebook.name}.ipynb"
        self.records = folder / "records" / f"{notebook.name}.jsonl"
        self.log = folder / "logs" / f"{notebook.name}.log"
        self.figures, self.tables = (folder / kind / notebook.name for kind in ("figures", "tables"))
        self.journal = folder / journal.place(notebook.name)
        clear(folder, notebook.name)
        journal.begin(self.journal, of or {}, notebook.name, parameters)
        for place in (self.records.parent, self.log.parent, self.figures):
            place.mkdir(parents=True, exist_ok=True)
        self.mark = uuid.uuid4().hex
        self.private = Path(tempfile.mkdtemp(prefix=PRIVATE, dir=_short_temporary()))
        self.progress, self.why = self.private / "progress.json", self.private / "reason.json"
        job = {
            "input": str(notebook.path.resolve()),
            "output": str(self.output.resolve()),
            "parameters": parameters,
            "cwd": str(notebook.path.resolve().parent),
            "progress": str(self.progress),
            "reason": str(self.why),
            "parent": os.getpid(),
        }
        (self.private / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self.oom_before = _oom_kills()
        self.seen: dict[int, psutil.Process] = {}
        self.peak = self.sampled = 0.0
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lowbit_suite.running.worker", str(self.private / "job.json")],
                env=self._environment(threads),
                cwd=self.private,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # when memory is short, Linux ends a notebook rather than the runner
            Path(f"/proc/{self.process.pid}/oom_score_adj").write_text("500")

    def _environment(self, threads: int | None) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # the kernel chooses: figures go inline
        env |= {
            **Context(
                execution=self.mark,
                notebook=self.notebook.name,
                records=self.records.resolve(),
                journal=self.journal.resolve(),
                figures=self.figures.resolve(),
                tables=self.tables.resolve(),
            ).variable(),
            # The user's own Jupyter and IPython start-up files must not change what a notebook does.
            "JUPYTER_RUNTIME_DIR": str(self.private),
            "IPYTHONDIR": str(self.private / "ipython"),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        if threads is not None:
            env |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        env["LOWBIT_PROJECT"] = str(paths.project())
        for name in ("LOWBIT_RESULTS", "LOWBIT_CACHE", "LOWBIT_DATA"):
            if given := env.get(name):  # the notebook has another working folder
                env[name] = str(Path(given).expanduser().resolve())
        source = Path(__file__).resolve().parents[2]
        if (source / "pyproject.toml").exists():  # the notebooks of a source tree use it, installed or not
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), env.get("PYTHONPATH")]))
        return env

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self.started

    def place(self) -> str:
        """Where it is, for people: ``"cell 3/12"``; empty before the first cell."""
        at = _read(self.progress)
        return f"cell {at['cell']}/{at['of']}" if at else ""

    def poll(self) -> Outcome | None:
        """None while it runs; then its outcome, also after a timeout."""
        self._sample()
        code = self.process.poll()
        if code is None and self.seconds < self.timeout:
            return None
        seconds = self.seconds
        if code is None:
            at = _read(self.progress)
            where = f", was in code cell {at['cell']}: {at['line']}" if at else ""
            status, reason = "timeout", f"no end after {_minutes(self.timeout)}{where}"
        else:
            status, reason = self._judge(code)
        digest = _read(self.why).get("digest", "")
        self.close()  # before reading its files, so that nothing can change them
        metrics, wrong = read_records(self.records)
        if status == "passed" and (wrong := wrong or flaw(self.output, digest)):
            status, reason = "failed", wrong
        return Outcome(status, reason, round(seconds, 2), round(self.peak / 1e6, 1), metrics)

    def _judge(self, code: int) -> tuple[str, str]:
        status = next((name for name, number in EXIT.items() if number == code), None)
        said = _read(self.why)
        reason, killer = said.get("reason", ""), said.get("signal")
        if status is None and code < 0:
            status, reason = "killed", f"the process that executes the notebook was ended by {_signal(-code)}"
            killer = -code
        elif status is None:
            last = (_tail(self.log) or "no message").splitlines()[-1]
            status, reason = "failed", f"the notebook could not be executed (exit code {code}): {last}"
        if status == "killed" and killer == signal.SIGKILL and _oom_kills() > self.oom_before:
            status, reason = "oom", f"the system ended a process because memory ran out; {reason}"
        return status, reason

    def close(self) -> None:
        """End every process of this notebook, by SIGTERM and then SIGKILL, and remove the temporary files."""
        self._look()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGTERM)
        for last in (False, True):
            alive = [process for process in self.seen.values() if process.is_running()] + self._marked()
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.kill() if last else process.terminate()
            psutil.wait_procs(alive, timeout=GRACE)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=GRACE)
        shutil.rmtree(self.private, ignore_errors=True)

    def _sample(self) -> None:
        if time.monotonic() - self.sampled < SAMPLE:
            return
        self.sampled = time.monotonic()
        total = 0
        for process in self._look():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        self.peak = max(self.peak, total)

    def _look(self) -> list[psutil.Process]:
        try:
            worker = psutil.Process(self.process.pid)
            tree = [worker, *worker.children(recursive=True)]
        except psutil.Error:
            return []
        self.seen |= {process.pid: process for process in tree}
        return tree

    def _marked(self) -> list[psutil.Process]:
        """Processes that inherited our mark, including those whose parents have ended."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                if current(process.environ()).execution == self.mark and process.pid not in self.seen:
                    found.append(process)
        return found


def end_strays(folder: Path) -> None:
    """End the processes that a killed runner left running in ``folder``, and remove their temporary files.

    They would end by themselves after a moment, but go on writing until then. No other runner may use the folder.
    """
    records, found, private = (folder / "records").resolve(), [], set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            env = process.environ()
            if (path := current(env).records) and path.parent == records:
                found.append(process)
                private.add(env.get("JUPYTER_RUNTIME_DIR", ""))
                process.kill()
    psutil.wait_procs(found, timeout=GRACE)
    for place in private:
        if Path(place).name.startswith(PRIVATE):
            shutil.rmtree(place, ignore_errors=True)


def read_records(path: Path) -> tuple[dict[str, Metric], str]:
    """The metrics in a file that `lowbit.record` wrote, and the fault of that file (empty if there is none)."""
    metrics: dict[str, Metric] = {}
    wrong = ""
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        return {}, f"the record of its numbers cannot be read: {error.strerror}"
    for line in text.splitlines():
        try:
            item = json.loads(line)
            if "complaint" in item:
                wrong = wrong or str(item["complaint"])
                continue
            name, metric = item["name"], Metric(_number(item["value"]), item["unit"], item["better"])
            if not (NAME.fullmatch(name) and isinstance(metric.unit, str) and metric.better in DIRECTIONS):
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError):
            wrong = wrong or f"the record of its numbers holds a broken line: {line[:80]}"
            continue
        if name in metrics:
            wrong = wrong or f"{name!r} was recorded twice"
        metrics[name] = metric
    return metrics, wrong


def _number(value: object) -> float | int:
    number = decode(value) if isinstance(value, str) else value
    if type(number) not in (int, float):
        raise TypeError
    float(number)  # refuse integers too large for a float, which are no measurements
    return number


def clear(folder: Path, name: str) -> None:
    """Remove the files of an earlier execution, so that they cannot pass for those of this one."""
    for file in (f"{name}.ipynb", f"{name}.html", f"records/{name}.jsonl", f"logs/{name}.log"):
        (folder / file).unlink(missing_ok=True)
    for kind in ("figures", "tables"):
        if (folder / kind / name).exists():
            shutil.rmtree(folder / kind / name)


def _short_temporary() -> str | None:
    """A short temporary folder if TMPDIR is too long: paths of Unix sockets are limited to about 100 characters."""
    return "/tmp" if os.name == "posix" and len(tempfile.gettempdir()) > 60 else None


def _oom_kills() -> int:
    """Number of out-of-memory kills by Linux in this control group, else on the machine; 0 if unknown."""
    groups = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            groups |= {name: group.lstrip("/") for name in controllers.split(",")}
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # the two versions of control groups
    for counts in (
        one / groups.get("memory", "") / "memory.oom_control",
        one / "memory.oom_control",  # in a container the group's own folder is the root
        two / groups.get("", "") / "memory.events",
        two / "memory.events",
        Path("/proc/vmstat"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(dict(line.split() for line in counts.read_text().splitlines())["oom_kill"])
    return 0


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _tail(path: Path, size: int = 2000) -> str:
    try:
        return path.read_bytes()[-size:].decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:.3g} s"
