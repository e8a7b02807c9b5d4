"""Faults that are really done to the suite, and what it has to say: ``python tests/suite/running/fault_table.py``.

Each goes through the ``lowbit`` command in a process of its own. As a script this writes results/faults.md, with one
run for each fault; test_faults.py does the same faults, several in one run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lowbit import paths
from lowbit.files import write_text

PROFILES = """
smoke: {description: small, timeout_minutes: 3, threads: 1, may_skip: [skippable]}
gpu: {description: GPU, timeout_minutes: 3, requires: cuda}
"""
RECORD = "import lowbit; lowbit.record('x', 1.5)"
SLEEPS = "import os; open('pid', 'w').write(str(os.getpid()))\nimport time; time.sleep(600)"


class CannotBeDone(Exception):
    """This machine does not allow the fault."""


@dataclass(frozen=True)
class Fault:
    """What is done, and what the suite has to make of it; ``reason`` is a part of what it says."""

    done: str
    cells: tuple[str, ...] = ()
    status: str = "failed"
    reason: str = ""
    code: int = 1
    tag: str = ""  # of the last cell


@dataclass(frozen=True)
class Seen:
    """What the suite said; no status where the command only refused."""

    status: str
    reason: str
    code: int


def limited(module: str, gib: int, then: str) -> tuple[str, str]:
    return f"import {module}, resource as r; r.setrlimit(r.RLIMIT_AS, ({gib} << 30, {gib} << 30))", then


def leaves_behind(statement: str) -> tuple[str, ...]:
    """A cell that starts a process which does something to the executed copy, again and again."""
    code = f"import sys, time\nwhile time.sleep(.001) is None: {statement}"
    return (
        f"""
        import os, subprocess, sys
        from lowbit_suite.records.context import current
        copy = os.path.dirname(os.path.dirname(current().records)) + "/" + current().notebook
        child = subprocess.Popen([sys.executable, "-c", {code!r}, copy + ".ipynb"], start_new_session=True)
        """,
    )


def appends(data: bytes) -> str:
    return f"from lowbit_suite.records.context import current; open(current().records, 'ab').write({data!r})"


NOTEBOOKS = {
    "nothing ran": [
        Fault("a notebook without code cells", reason="nothing ran"),
        Fault("all code cells are empty", ("", "   "), reason="nothing ran"),
        Fault("only a parameters cell", ("seed = 0",), reason="nothing ran", tag="parameters"),
        Fault("only comments", ("# x = 1",), reason="nothing ran"),
        Fault("`sys.exit(0)` in the first cell", ("import sys; sys.exit(0)", RECORD), reason="ended by SystemExit: 0"),
        Fault("`sys.exit(0)` inside the last cell", (RECORD, "import sys; sys.exit(0); 1 / 0"), reason="ended by Sys"),
    ],
    "errors that Jupyter lets pass": [
        Fault(
            "an error in a cell tagged `raises-exception`",
            (RECORD, "1 / 0"),
            reason="ZeroDivisionError: division by zero (code cell 2: 1 / 0)",
            tag="raises-exception",
        ),
        Fault("an error under `%%capture`", (RECORD, "%%capture\n1 / 0", "1"), reason="ZeroDivisionError"),
        Fault(
            "`%%script false --no-raise-error`",
            (RECORD, "%%script false --no-raise-error\n1 / 0"),
            reason="cannot fail in code cell 2 of 2",
        ),
        Fault("a shell command fails", ("!exit 3", RECORD), reason="a shell command left with exit code 3"),
        Fault(
            "a thread dies",
            ("import threading; t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",),
            reason="ZeroDivisionError: division by zero ended Thread",
        ),
        Fault(
            "a notebook without leave asks to be skipped",
            ("import lowbit; lowbit.skip('no data')",),
            reason="it asked to be skipped (no data), and profiles.yaml does not allow that",
        ),
    ],
    "the kernel dies": [
        Fault(
            "`kill -9` the kernel", ("import os; os.kill(os.getpid(), 9)", "1"), "killed", "the kernel died (SIGKILL)"
        ),
        Fault("`os._exit(0)` in the last cell", (RECORD, "import os; os._exit(0)"), "killed", "left with exit code 0"),
        Fault("a segmentation fault", ("import ctypes; ctypes.string_at(0)", "1"), "killed", "SIGSEGV"),
        Fault(
            "`kill -9` the process that executes the notebook",
            ("import os, time; os.kill(os.getppid(), 9); time.sleep(60)",),
            "killed",
            "was ended by SIGKILL",
        ),
        Fault(
            "the kernel shuts down in the middle",
            ("get_ipython().kernel.do_shutdown(True)", "import time; time.sleep(20)", "1"),
            "killed",
            "the kernel died",
        ),
    ],
    "memory": [
        Fault("Python gets no memory under a limit", limited("os", 2, "x = bytearray(1 << 33)"), "oom", "MemoryError"),
        Fault(
            "numpy gets none", limited("numpy", 2, "x = numpy.ones(1 << 30)"), "oom", "MemoryError: Unable to allocate"
        ),
        Fault("torch gets none", limited("torch", 16, "x = torch.ones(1 << 33)"), "oom", "DefaultCPUAllocator"),
        Fault("the system gives none", limited("mmap", 2, "x = mmap.mmap(-1, 1 << 33)"), "oom", "Cannot allocate"),
        Fault("another error that speaks of a MemoryError", ("raise ValueError('MemoryError: x')",), reason="ValueErr"),
    ],
    "records": [
        Fault("a number recorded twice", (RECORD, RECORD), reason="'x' was recorded twice"),
        Fault("half a line in the record of numbers", (RECORD, appends(b'{"name": "y", "val')), reason="broken line"),
        Fault(
            "a record without a value",
            (appends(b'{"name": "y", "value": null, "unit": "", "better": "equal"}\n'),),
            reason="broken line",
        ),
        Fault("bytes that are no text in the record", (RECORD, appends(b"\xff\xfe\n")), reason="broken line"),
        Fault(
            "a folder lies where the record should",
            ("from lowbit_suite.records.context import current; current().records.mkdir()",),
            reason="cannot be read",
        ),
    ],
    "the executed copy": [
        Fault(
            "a process left behind cuts the executed copy short",
            leaves_behind("open(sys.argv[1], 'w').write('{')"),
            reason="its executed copy ",
        ),
        Fault(
            "a process left behind adds to the executed copy",
            leaves_behind("open(sys.argv[1], 'a').write(' ')"),
            reason="its executed copy ",
        ),
    ],
    "no end": [
        Fault("sleeps past the timeout", ("import time; time.sleep(600)",), "timeout", "no end after 30 s"),
        Fault(
            "the kernel starts afresh in the middle of a cell",
            (
                """
             import os, sys, ipykernel.connect as at
             os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", "-f", at.get_connection_file()])
             """,
                "1",
            ),
            "timeout",
            "no end after 30 s",
        ),
    ],
}
"""Faults that are notebooks, by what goes wrong."""


class Project:
    """A small project in a folder of its own, and the ``lowbit`` command for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notebooks = folder, folder / "notebooks"
        self.run_folder = folder / "results" / "runs" / "smoke"
        self.notebooks.mkdir(parents=True)
        (self.notebooks / "profiles.yaml").write_text(PROFILES)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("LOWBIT_")} | {
            "LOWBIT_PROJECT": str(folder),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.project()), os.environ.get("PYTHONPATH")])),
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "250",
        }

    def add(self, name: str, *cells: str, tag: str = "") -> Path:
        made = [new_code_cell(textwrap.dedent(cell).strip("\n")) for cell in cells]
        if tag:
            made[-1].metadata["tags"] = [tag]
        path = self.notebooks / f"{name}.ipynb"
        nbformat.write(new_notebook(cells=[new_markdown_cell("words"), *made]), path)
        return path

    def start(self, *words: str, before: Sequence[str] = ()) -> subprocess.Popen:
        command = [*before, sys.executable, "-m", "lowbit", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def call(self, *words: str, before: Sequence[str] = ()) -> subprocess.CompletedProcess:
        with self.start(*words, before=before) as process:
            try:
                out, err = process.communicate(timeout=400)
            finally:
                process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def ran(self, name: str, done: subprocess.CompletedProcess, folder: Path | None = None) -> Seen:
        """What run.json says about a notebook, with the exit code of the command."""
        tree = json.loads(((folder or self.run_folder) / "run.json").read_text())
        entry = next(entry for entry in tree["notebooks"] if entry["name"] == name)
        return Seen(entry["status"], entry["reason"], done.returncode)

    def told(self, done: subprocess.CompletedProcess, about: str = "") -> Seen:
        """The line of the output about something, or the line of refusal."""
        lines = (done.stdout if about else done.stderr).splitlines()
        line = next((line for line in reversed(lines) if about in line), "")
        return Seen("", " ".join(line.replace("│", " ").split()), done.returncode)


def run_notebooks(faults: Sequence[Fault], folder: Path) -> list[Seen]:
    """All these notebooks in one run."""
    project = Project(folder)
    names = [f"{i:02}_fault" for i in range(len(faults))]
    for name, fault in zip(names, faults, strict=True):
        project.add(name, *fault.cells, tag=fault.tag)
    limit = ("--timeout", "0.5") if any(fault.status == "timeout" for fault in faults) else ()
    done = project.call("run", "-j", "2", *limit)
    return [project.ran(name, done) for name in names]


SCENARIOS: dict[Callable[[Path], list[Seen]], list[Fault]] = {}
"""Faults that take more than a notebook: what does them, and what has to be seen, in order."""


def does(*faults: Fault) -> Callable:
    def keep(function):
        SCENARIOS[function] = list(faults)
        return function

    return keep


@does(
    Fault("a parameter that the notebook does not have", (), "", "has no parameter 'sed'", 2),
    Fault("a pattern that fits no notebook", (), "", "no notebook is called '7*'", 2),
    Fault("a notebook file of half a JSON", (), "", "cannot be read as a notebook", 2),
    Fault("a project without notebooks", (), "", "there are no notebooks", 2),
)
def mistakes(folder: Path) -> list[Seen]:
    project = Project(folder)
    path = project.add("00_a", "seed = 0", tag="parameters")
    seen = [project.told(project.call("run", "-p", "sed=1")), project.told(project.call("run", "7*"))]
    path.write_text(path.read_text()[:100])
    seen.append(project.told(project.call("run")))
    path.unlink()
    return [*seen, project.told(project.call("run"))]


@does(
    Fault("the profile needs a GPU and there is none", (), "skipped", "needs a CUDA GPU", 1),
    Fault("a notebook that may be skipped is skipped, and nothing else was asked for", (), "skipped", "no data", 1),
    Fault("a notebook that may be skipped is skipped, another passes", (), "skipped", "no data", 0),
    Fault("`lowbit check` after that", (), "", "skipped", 0),
)
def skips(folder: Path) -> list[Seen]:
    project = Project(folder)
    project.add("good", RECORD)
    project.add("skippable", RECORD)
    assert project.call("run", "-j", "2").returncode == 0
    assert project.call("accept", "--yes").returncode == 0
    project.add("skippable", "import lowbit; lowbit.skip('no data')")
    seen = [project.ran("good", project.call("run", "good", "--profile", "gpu"), project.run_folder.with_name("gpu"))]
    seen.append(project.ran("skippable", project.call("run", "skippable")))
    seen.append(project.ran("skippable", project.call("run", "-j", "2")))
    return [*seen, project.told(project.call("check"), "skippable")]


@does(
    Fault("`lowbit check`: a number is no longer recorded", (), "", "vanished", 1),
    Fault("`lowbit check`: NaN", (), "", "not a number", 1),
    Fault("`lowbit check`: a notebook fails that passed before, its old executed copy lies there", (), "", "failed", 1),
    Fault("`lowbit check`: only one of the notebooks was run", (), "", "missing", 1),
    Fault("`lowbit check`: half of run.json", (), "", "cannot be read as JSON", 2),
    Fault("`lowbit run --resume`: half of run.json", (), "failed", "ZeroDivisionError", 1),
    Fault("`lowbit run --resume`: a changed notebook whose date lies in the past", (), "failed", "ZeroDivision", 1),
)
def numbers(folder: Path) -> list[Seen]:
    project = Project(folder)
    for name in ("gone", "nan", "bad"):
        project.add(name, RECORD)
    assert project.call("run", "-j", "2").returncode == 0
    assert project.call("accept", "--yes").returncode == 0
    assert project.call("check").returncode == 0
    project.add("gone", "1")
    project.add("nan", "import lowbit; lowbit.record('x', float('nan'))")
    project.add("bad", "1 / 0", RECORD)
    project.call("run", "-j", "2")
    seen = [project.told(project.call("check", name), f"│ {name} ") for name in ("gone", "nan", "bad")]
    assert "1 / 0" in (project.run_folder / "bad.ipynb").read_text()
    assert project.call("run", "gone").returncode == 0
    seen.append(project.told(project.call("check"), "missing"))
    file = project.run_folder / "run.json"
    file.write_bytes(file.read_bytes()[:200])
    seen.append(project.told(project.call("check")))
    seen.append(project.ran("bad", project.call("run", "gone", "bad", "--resume", "-j", "2")))
    os.utime(project.add("gone", "1 / 0"), (0, 0))
    return [*seen, project.ran("gone", project.call("run", "gone", "--resume"))]


@does(
    Fault("`kill -9` the runner", (), "not_run", "not started yet", -signal.SIGKILL),
    Fault("`kill` the runner", (), "not_run", "stopped by SIGTERM while it ran", 143),
    Fault("Ctrl-C", (), "not_run", "stopped by SIGINT while it ran", 130),
)
def ended_from_outside(folder: Path) -> list[Seen]:
    seen = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        project = Project(folder / number.name)
        project.add("a", SLEEPS)
        process = project.start("run")
        at_work = project.notebooks / "pid"
        wait_for(lambda file=at_work: file.exists() and file.read_text())
        process.send_signal(number)
        process.communicate(timeout=60)
        wait_for(lambda pid=at_work.read_text(): not Path(f"/proc/{pid}").exists())
        seen.append(project.ran("a", process))
    return seen


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("it did not come to pass")
        time.sleep(0.1)


FILLS = """
import os
from lowbit_suite.records.context import current
try:
    with open(os.path.join(current().figures, "large"), "wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
except OSError:
    pass
"""


@does(
    Fault("a notebook fills the disk of the results", (), "not_run", "not started yet", 2),
    Fault("the one that had passed before it", (), "passed", "", 2),
    Fault("`lowbit run --resume` when there is room again", (), "passed", "", 0),
)
def full_disk(folder: Path) -> list[Seen]:
    project = Project(folder)
    project.add("00_good", RECORD)
    project.add("01_fills", FILLS)
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        raise CannotBeDone("a small file system cannot be mounted here")
    try:
        out = disk / "run"
        done = project.call("run", "--out", str(out))
        assert "No space left on device" in done.stderr.splitlines()[-1], done.stderr
        seen = [project.ran(name, done, out) for name in ("01_fills", "00_good")]
        shutil.rmtree(out / "figures")
        project.add("01_fills", RECORD)
        return [*seen, project.ran("01_fills", project.call("run", "--out", str(out), "--resume"), out)]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@does(
    Fault("Linux ends the kernel, which needs more than its control group may", (), "oom", "because memory ran out", 1)
)
def control_group(folder: Path) -> list[Seen]:
    project = Project(folder)
    project.add("a", "x = [bytearray(b'1' * 2**20) for _ in range(2**12)]", "1")
    with new_group(1 << 30) as group:
        into = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        return [project.ran("a", project.call("run", before=into))]


class new_group:
    """A control group of so many bytes, of either version."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> Path:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        root = Path("/sys/fs/cgroup")
        own = {name: group for _, names, group in lines for name in names.split(",")}
        one = root / "memory" / own.get("memory", "/").lstrip("/"), "memory.limit_in_bytes"
        two = root / own.get("", "/").lstrip("/"), "memory.max"
        for parent, limit in (one, two):
            self.folder = parent / f"lowbit-fault-{os.getpid()}"
            try:
                self.folder.mkdir()
                (self.folder / limit).write_text(str(self.size))
                return self.folder
            except OSError:
                if self.folder.exists():
                    self.folder.rmdir()
        raise CannotBeDone("no control group with a limit of memory can be made here")

    def __exit__(self, *error) -> None:
        wait_for(lambda: not (self.folder / "cgroup.procs").read_text())
        self.folder.rmdir()


def right(fault: Fault, seen: Seen) -> bool:
    return (fault.status, fault.code) == (seen.status, seen.code) and fault.reason in seen.reason


def main() -> int:
    """Does every fault, each in a run of its own, and writes the table."""
    with tempfile.TemporaryDirectory(prefix="lowbit-faults-") as scratch:

        def alone(job) -> list[tuple[Fault, Seen | str]]:
            number, function, faults = job
            try:
                return list(zip(faults, function(Path(scratch, str(number))), strict=True))
            except CannotBeDone as error:
                return [(fault, str(error)) for fault in faults]
            except Exception as error:  # one that goes wrong must not take the others with it
                return [(fault, Seen("", f"{type(error).__name__}: {error}", -1)) for fault in faults]

        single = [fault for group in NOTEBOOKS.values() for fault in group]
        jobs = [(lambda folder, fault=fault: run_notebooks([fault], folder), [fault]) for fault in single]
        jobs += list(SCENARIOS.items())
        with ThreadPoolExecutor(2) as pool:
            rows = [row for rows in pool.map(alone, [(i, *job) for i, job in enumerate(jobs)]) for row in rows]
    lines = [
        "# What was done to the suite, and what it said",
        "",
        "Written by `python tests/suite/running/fault_table.py`, which really does each of these to small notebooks,",
        "through the `lowbit` command. No status: the command refused, or it is `lowbit check`. A shell shows -9 as",
        "137.",
        "",
        "| fault | status | reason | exit code |",
        "|---|---|---|---|",
    ]
    wrong = 0
    for fault, seen in rows:
        if isinstance(seen, str):
            lines.append(f"| {fault.done} | not done: {seen} | | |")
            continue
        reason = re.sub(rf"{re.escape(scratch)}/\d+", "PROJECT", seen.reason).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {fault.done} | {seen.status.replace('_', ' ')} | {reason} | {seen.code} |")
        if not right(fault, seen):
            wrong += 1
            print(f"WRONG: {fault.done}: expected {fault.status} {fault.code} {fault.reason!r}, saw {seen}")
    write_text(paths.results() / "faults.md", "\n".join(lines) + "\n")
    print(f"{len(rows)} faults, {wrong} not told as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
