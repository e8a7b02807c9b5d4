"""Runs notebooks, some at once, each in a process of its own, and writes down what it saw."""

import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit import environment, paths
from lowbit.errors import LowbitError
from lowbit.suite import fingerprint, notebooks, profiles, report, runfile
from lowbit.suite.execution import Execution
from lowbit.suite.progress import Progress
from lowbit.suite.runfile import Entry, Run

TICK = 0.1
"""Seconds between two looks at the running notebooks."""


@dataclass(frozen=True)
class Plan:
    """Everything decided before anything runs. ``parameters`` holds what is handed to each notebook."""

    profile_name: str
    profile: profiles.Profile
    notebooks: list[notebooks.Notebook]
    parameters: dict[str, dict[str, Any]]
    folder: Path
    jobs: int = 1
    resume: bool = False
    timeout: float = field(default=0.0)
    """Seconds a notebook may take."""


class Interrupted(Exception):
    """The run was stopped by Ctrl-C or SIGTERM; ``run`` is what it had until then."""

    def __init__(self, run: Run, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.run, self.signum = run, signum


def plan(
    names: Sequence[str] = (),
    profile: str = "smoke",
    *,
    assignments: Sequence[str] = (),
    jobs: int = 1,
    resume: bool = False,
    timeout_minutes: float | None = None,
    out: Path | None = None,
) -> Plan:
    """Checks all that was asked for; anything unknown or malformed is a `LowbitError` and nothing has run."""
    if jobs < 1:
        raise LowbitError(f"-j {jobs}: at least one notebook has to run at a time")
    if timeout_minutes is not None and not timeout_minutes > 0:
        raise LowbitError(f"--timeout {timeout_minutes}: it has to be more than 0 minutes")
    chosen = profiles.get(profile)
    selected = notebooks.select(names)
    given = notebooks.parse_assignments(assignments, selected)
    parameters = notebooks.resolve(selected, profile, chosen, given)
    folder = out or run_folder(profile)
    minutes = timeout_minutes if timeout_minutes is not None else chosen.timeout_minutes
    return Plan(profile, chosen, selected, parameters, folder, jobs, resume, minutes * 60)


def run_folder(profile: str) -> Path:
    """Where the runs of a profile are kept: ``results/runs/<profile>``."""
    return paths.results() / "runs" / profile


def execute(plan: Plan, *, progress: Progress | None = None) -> Run:
    """Runs the plan and writes run.json after every notebook, executed copies, HTML and report.html.

    A notebook starts once those it comes after have passed; if one of them did not, it stays ``not_run``.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; running notebooks have been ended and what is left is ``not_run``.
        LowbitError: The results cannot be written, for instance because the disk is full; running notebooks have
            been ended, and run.json is as it was after the last one that could be written.
    """
    try:
        return _Suite(plan, progress or Progress.silent()).run()
    except OSError as error:
        raise LowbitError(
            f"the run stopped: {error.strerror or error} (its results go to {runfile.show_path(plan.folder)}). "
            "What was written before is kept: mend that, then run again with --resume"
        ) from error


class _Suite:
    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress = plan, progress
        plan.folder.mkdir(parents=True, exist_ok=True)
        self.earlier = self._earlier()
        self.result = Run(plan.profile_name, _now(), environment.describe())
        self.result.notebooks = [
            Entry(
                item.name, reason=report.NOT_STARTED, parameters=_plain({**item.defaults, **plan.parameters[item.name]})
            )
            for item in plan.notebooks
        ]
        library = fingerprint.library_hash()
        self.prints = {
            item.name: fingerprint.fingerprint(
                item, plan.parameters[item.name], library, self.result.environment, plan.profile.threads
            )
            for item in plan.notebooks
        }
        self.running: dict[str, Execution] = {}
        self.waiting = list(plan.notebooks)
        self.signum = 0

    def _earlier(self) -> Run | None:
        try:
            return runfile.load(self.plan.folder)
        except LowbitError:
            return None

    def run(self) -> Run:
        seconds = {e.name: e.seconds for e in self.earlier.notebooks if e.status == "passed"} if self.earlier else {}
        self._save()
        before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.progress.showing([item.name for item in self.plan.notebooks], seconds):
                while (self.waiting or self.running) and not self.signum:
                    self._start()
                    self._look()
                    time.sleep(TICK if self.running else 0)
                if self.signum:
                    self._interrupt()
        finally:
            for execution in self.running.values():
                execution.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signum:
            raise Interrupted(self.result, self.signum)
        return self.result

    def _stop(self, signum: int, frame: object) -> None:
        self.signum = signum

    def _start(self) -> None:
        reason = self._missing()
        for item in list(self.waiting):
            entry = self.result.entry(item.name)
            before = [found for name in item.after if (found := self.result.entry(name))]
            bad = next((e for e in before if e.status != "passed" and not self._open(e.name)), None)
            if reason:
                self._settle(item, status="skipped", reason=reason)
            elif bad:
                self._settle(item, status="not_run", reason=f"it comes after {bad.name}, which is {bad.status}")
            elif any(self._open(e.name) for e in before):
                continue
            elif self.plan.resume and self._reuse(item, entry):
                self._settle(item)
            elif len(self.running) < self.plan.jobs:
                self.waiting.remove(item)
                fingerprint.forget(self.plan.folder, item.name)
                self.running[item.name] = Execution(
                    item,
                    self.plan.parameters[item.name],
                    self.plan.folder,
                    timeout=self.plan.timeout,
                    threads=self.plan.profile.threads,
                )
                self.progress.started(item.name)

    def _open(self, name: str) -> bool:
        return name in self.running or any(item.name == name for item in self.waiting)

    def _missing(self) -> str:
        if self.plan.profile.requires == "cuda" and self.result.device != "cuda":
            return f"profile {self.plan.profile_name} needs a CUDA GPU, and torch sees none"
        return ""

    def _reuse(self, item: notebooks.Notebook, entry: Entry) -> bool:
        """Takes over the earlier outcome if nothing that it depends on has changed; says why or why not."""
        old = self.earlier.entry(item.name) if self.earlier else None
        if old is None or old.status != "passed":
            entry.why = f"it had {old.status.replace('_', ' ')}" if old else "no earlier result is kept"
            return False
        entry.why = fingerprint.changed(self.plan.folder, item.name, self.prints[item.name])
        if not entry.why and not (self.plan.folder / old.output).is_file():
            entry.why = "its executed copy is gone"
        if entry.why:
            return False
        entry.status, entry.reason, entry.cached = "passed", "", True
        entry.why = "code, parameters, library, versions and device are as when it passed; data was not compared"
        entry.seconds, entry.peak_mb, entry.metrics, entry.output = old.seconds, old.peak_mb, old.metrics, old.output
        return True

    def _look(self) -> None:
        for name, execution in list(self.running.items()):
            outcome = execution.poll()
            if outcome is None:
                self.progress.at(name, execution.place())
                continue
            del self.running[name]
            entry = self.result.entry(name)
            entry.status, entry.reason, entry.metrics = outcome.status, outcome.reason, outcome.metrics
            entry.seconds, entry.peak_mb = outcome.seconds, outcome.peak_mb
            if entry.status == "skipped" and not self.plan.profile.lets_skip(name):
                entry.status = "failed"
                entry.reason = f"it asked to be skipped ({entry.reason}), and {profiles.FILE} has no leave for that"
            if execution.output.is_file():
                entry.output = execution.output.name
                report.notebook_html(execution.output)
            if entry.status == "passed":
                fingerprint.keep(self.plan.folder, name, self.prints[name])
            self._save()
            self.progress.ended(entry)

    def _settle(self, item: notebooks.Notebook, **fields: str) -> None:
        """A notebook that needs no process."""
        self.waiting.remove(item)
        entry = self.result.entry(item.name)
        for key, value in fields.items():
            setattr(entry, key, value)
        self._save()
        self.progress.ended(entry)

    def _interrupt(self) -> None:
        said = f"the run was stopped by {signal.Signals(self.signum).name}"
        for name, execution in self.running.items():
            entry = self.result.entry(name)
            entry.reason, entry.seconds = f"{said} while it was at work", round(execution.seconds, 2)
            execution.close()
        for item in self.waiting:
            self.result.entry(item.name).reason = said
        self.running, self.waiting = {}, []
        self._save()

    def _save(self) -> None:
        self.result.save(self.plan.folder)
        report.write(self.result, self.plan.folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters as strict JSON can hold them."""
    return {k: v if isinstance(v, str | int | float | bool | list | None) else repr(v) for k, v in parameters.items()}
