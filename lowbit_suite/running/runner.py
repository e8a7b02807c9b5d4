"""Runs notebooks, several at a time, each in its own process, and records the results."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit.files import remove_parts
from lowbit_suite import notebooks, profiles, report
from lowbit_suite.records import journal
from lowbit_suite.running import executors, fingerprint, junit, run_json
from lowbit_suite.running.cache import Cache
from lowbit_suite.running.process import end_strays, read_records
from lowbit_suite.running.progress import Progress
from lowbit_suite.running.run_json import Entry, Run

TICK = 0.1
"""Seconds between two polls of the running notebooks."""


@dataclass(frozen=True)
class Plan:
    """All decisions before the run. ``parameters`` holds the parameters of each notebook."""

    profile_name: str
    profile: profiles.Profile
    notebooks: list[notebooks.Notebook]
    parameters: dict[str, dict[str, Any]]
    folder: Path
    jobs: int = 1
    fresh: bool = False
    """Whether to drop earlier results before the run."""
    timeout: float = field(default=0.0)
    """Seconds a notebook may take."""
    executor: str = "local"
    """Where notebooks are executed: ``local`` or ``dask://HOST:PORT``."""
    trainings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By notebook, journal lines to keep whatever has changed (`lowbit_suite.accepted.again`)."""


class Interrupted(Exception):
    """The run was stopped by Ctrl-C or SIGTERM; ``run`` holds the results until then."""

    def __init__(self, run: Run, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.run, self.signum = run, signum


def plan(
    names: Sequence[str] = (),
    profile: str = "smoke",
    *,
    assignments: Sequence[str] = (),
    jobs: int = 1,
    fresh: bool = False,
    resume: bool = False,
    timeout_minutes: float | None = None,
    executor: str = "local",
    out: Path | None = None,
) -> Plan:
    """Check all arguments before anything runs; unknown or malformed ones raise `LowbitError`.

    An earlier result is always reused if its dependencies are unchanged, so ``resume`` only adds the check that the
    folder holds a run of this profile. ``fresh`` drops all results first. If such a run ends early, the next one finds
    only the results of this one.
    """
    if jobs < 1:
        raise LowbitError(f"-j {jobs}: give at least 1")
    if fresh and resume:
        raise LowbitError(
            "--fresh and --resume contradict each other: an interrupted --fresh run goes on with --resume alone"
        )
    if timeout_minutes is not None and not timeout_minutes > 0:
        raise LowbitError(f"--timeout {timeout_minutes}: give more than 0 minutes")
    executors.check(executor)
    chosen = profiles.get(profile)
    selected = notebooks.select(names)
    given = notebooks.parse_assignments(assignments, selected)
    parameters = notebooks.resolve(selected, profile, chosen, given)
    folder = out or run_folder(profile)
    if resume and (earlier := _earlier(folder)) and earlier.profile != profile:
        raise LowbitError(
            f"--resume: the run in {run_json.show_path(folder)} has profile {earlier.profile!r}, not {profile!r}; give "
            f"--profile {earlier.profile} to continue it, or another folder with --out"
        )
    minutes = timeout_minutes if timeout_minutes is not None else chosen.timeout_minutes
    return Plan(profile, chosen, selected, parameters, folder, jobs, fresh, minutes * 60, executor)


def run_folder(profile: str) -> Path:
    """The default folder for runs of a profile: ``results/runs/<profile>``."""
    return paths.results() / "runs" / profile


def execute(plan: Plan, *, progress: Progress | None = None) -> Run:
    """Run the plan; write run.json and an executed copy after every notebook, and report.html at the end.

    A notebook starts once those before it have passed; if one of them did not, it stays ``not_run``.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; running notebooks have been ended and the rest is ``not_run``.
        LowbitError: another run uses the folder, or the executor cannot be reached: nothing has run. Or the results
            cannot be written, for instance because the disk is full: running notebooks have been ended, and run.json
            is as it was at the last successful write.
    """
    gpu = plan.profile.requires == "cuda"
    try:
        with _alone(plan.folder):
            executor = executors.connect(
                plan.executor, plan.folder, timeout=plan.timeout, threads=plan.profile.threads, gpu=gpu
            )
            with contextlib.closing(executor):
                return _Suite(plan, executor, progress or Progress.silent()).run()
    except OSError as error:
        raise LowbitError(
            f"the run stopped: {error.strerror or error} (its results go to {run_json.show_path(plan.folder)}). "
            "Earlier results are kept: solve the problem, then run again with --resume"
        ) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runners out of the folder, and remove the processes and files that a killed one left."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LowbitError(
            f"another run uses {run_json.show_path(folder)}: wait for it, or give another folder with --out"
        ) from None
    except NotImplementedError:
        pass  # some network file systems have no locks
    try:
        end_strays(folder)
        remove_parts(folder)
        yield
    finally:
        lock.release()


def _earlier(folder: Path) -> Run | None:
    try:
        return run_json.load(folder)
    except LowbitError:
        return None


class _Suite:
    def __init__(self, plan: Plan, executor: executors.Executor, progress: Progress) -> None:
        self.plan, self.executor, self.progress = plan, executor, progress
        self.earlier, self.cache = _earlier(plan.folder), Cache(plan.folder)
        self.seconds_before = self.cache.seconds()
        if plan.fresh:
            self.cache.forget(*(item.name for item in plan.notebooks))
            for item in plan.notebooks:
                (plan.folder / journal.place(item.name)).unlink(missing_ok=True)
        self.result = Run(plan.profile_name, _now(), executor.environment)
        self.result.notebooks = [
            Entry(
                item.name, reason=report.NOT_STARTED, parameters=_plain({**item.defaults, **plan.parameters[item.name]})
            )
            for item in plan.notebooks
        ]
        self.library = fingerprint.library()
        self.prints: dict[str, dict[str, Any]] = {}
        self.running: dict[str, executors.Task] = {}
        self.waiting = list(plan.notebooks)
        self.signum = 0

    def run(self) -> Run:
        self._save()
        for stale in (report.FILE, junit.RUN, junit.CHECK):  # from an earlier run; this run writes its own at the end
            (self.plan.folder / stale).unlink(missing_ok=True)
        before = {}
        if threading.current_thread() is threading.main_thread():  # only the main thread may handle signals
            before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.progress.showing([item.name for item in self.plan.notebooks], self.seconds_before):
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
        junit.write_run(self.result, self.plan.folder)
        report.write(self.result, self.plan.folder)
        if self.signum:
            raise Interrupted(self.result, self.signum)
        return self.result

    def _stop(self, signum: int, frame: object) -> None:
        self.signum = signum

    def _start(self) -> None:
        reason, settled = self._missing(), False
        for item in list(self.waiting):
            entry = self.result.entry(item.name)
            before = [found for name in item.after if (found := self.result.entry(name))]
            bad = next((e for e in before if e.status != "passed" and not self._open(e.name)), None)
            if reason:
                self._settle(entry, status="skipped", reason=reason)
            elif bad:
                self._settle(entry, status="not_run", reason=f"it comes after {bad.name}, which is {bad.status}")
            elif any(self._open(e.name) for e in before):
                continue
            elif self._reuse(item, entry):
                self._settle(entry, status="passed", reason="")
            else:
                if len(self.running) < self.plan.jobs:
                    self._launch(item)
                continue
            settled = True
        if settled:
            self._save()

    def _launch(self, item: notebooks.Notebook) -> None:
        self.waiting.remove(item)
        self.cache.forget(item.name)
        given, of = self.plan.parameters[item.name], self.prints[item.name]
        if (lines := self.plan.trainings.get(item.name)) is not None:
            journal.begin(self.plan.folder / journal.place(item.name), of, item.name, given, lines)
        self.running[item.name] = self.executor.start(item, given, of)
        self.progress.started(item.name, self.result.entry(item.name).why)

    def _open(self, name: str) -> bool:
        return name in self.running or any(item.name == name for item in self.waiting)

    def _missing(self) -> str:
        if self.plan.profile.requires == "cuda" and self.result.device != "cuda":
            return f"profile {self.plan.profile_name} needs a CUDA GPU, and torch sees none"
        return ""

    def _reuse(self, item: notebooks.Notebook, entry: Entry) -> bool:
        """Reuse the earlier outcome if its dependencies are unchanged; note the reason either way."""
        if item.name in self.prints:
            return False  # it has been checked and waits for its turn
        before = {name: self.cache.stamp(name) for name in item.after}
        self.prints[item.name] = fingerprint.fingerprint(
            item, self.plan.parameters[item.name], self.executor.facts, self.plan.profile.threads, before
        )
        old = self.earlier.entry(item.name) if self.earlier else None
        if self.plan.fresh:
            entry.why = "--fresh executes every notebook"
        elif old and old.status in ("failed", "timeout", "killed", "oom"):
            entry.why = f"its last run ended as {old.status}"
        else:
            entry.why = self.cache.why_not(item.name, self.prints[item.name])
        if entry.why:
            return False
        kept = self.cache.kept[item.name]
        entry.why = "its code, parameters, data, device, lowbit/ and versions are unchanged since it passed"
        entry.cached, entry.seconds, entry.peak_mb = True, kept["seconds"], kept["peak_mb"]
        entry.metrics, _ = read_records(self.plan.folder / "records" / f"{item.name}.jsonl")
        self._show(entry)
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
            entry.why = "; ".join(filter(None, (entry.why, outcome.note)))
            if entry.status == "skipped" and not self.plan.profile.lets_skip(name):
                entry.status = "failed"
                entry.reason = f"it asked to be skipped ({entry.reason}), and {profiles.FILE} does not allow that"
            if entry.status == "passed":
                self._keep(entry)
            self._show(entry)
            self._save()
            self.progress.ended(entry)

    def _keep(self, entry: Entry) -> None:
        """Keep the result for later runs, unless its dependencies changed while it ran."""
        then = {"code": self.prints[entry.name]["code"], "library": self.library}
        now = {"code": "", "library": fingerprint.library()}
        with contextlib.suppress(LowbitError):  # it may have been moved away or be only partly written
            now["code"] = notebooks.read(next(n for n in self.plan.notebooks if n.name == entry.name).path).code_hash
        if changed := fingerprint.differing(then, now, now):
            entry.why += f"; {changed} changed while it ran, so the next run executes it again"
        else:
            self.cache.keep(entry, self.prints[entry.name])

    def _show(self, entry: Entry) -> None:
        """Set the path of the executed copy, and render it as HTML."""
        path = self.plan.folder / f"{entry.name}.ipynb"
        if path.is_file():
            entry.output = path.name
            if not (entry.cached and path.with_suffix(".html").is_file()):
                report.notebook_html(path)

    def _settle(self, entry: Entry, **fields: str) -> None:
        """Set the result of a notebook that needs no process."""
        self.waiting = [item for item in self.waiting if item.name != entry.name]
        for key, value in fields.items():
            setattr(entry, key, value)
        self.progress.ended(entry)

    def _interrupt(self) -> None:
        said = f"the run was stopped by {signal.Signals(self.signum).name}"
        for name, execution in self.running.items():
            entry = self.result.entry(name)
            entry.reason, entry.seconds = f"{said} while it ran", round(execution.seconds, 2)
            execution.close()
        for item in self.waiting:
            self.result.entry(item.name).reason = said
        self.running, self.waiting = {}, []
        self._save()

    def _save(self) -> None:
        self.result.save(self.plan.folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters as strict JSON can hold them."""
    return {k: v if isinstance(v, str | int | float | bool | list | None) else repr(v) for k, v in parameters.items()}
