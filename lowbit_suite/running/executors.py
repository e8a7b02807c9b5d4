"""Where notebooks are executed: in processes of this machine, or by the workers of a Dask cluster.

The runner asks an `Executor` to start a notebook and then polls the returned `Task`, like a future.
"""

import contextlib
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from lowbit import environment
from lowbit.errors import LowbitError
from lowbit_suite.notebooks import Notebook, read
from lowbit_suite.running import fingerprint
from lowbit_suite.running.process import Execution, Outcome, clear

TICK = 0.1
"""Seconds between two polls of a notebook on a Dask worker."""

LOOK = 2.0
"""Seconds between two checks for a cluster's workers."""

WAIT = 60.0
"""Seconds that a run waits without any worker; Dask's setting ``lowbit.wait`` (``DASK_LOWBIT__WAIT``) changes it."""

CONNECT = 10
"""Timeout for connecting to a scheduler, in seconds."""


class Task(Protocol):
    """A submitted notebook; `lowbit_suite.running.process.Execution` is one."""

    @property
    def seconds(self) -> float:
        """Wall time since submission."""

    def poll(self) -> Outcome | None:
        """None until it has ended; then the outcome, with its files in the run's folder."""

    def place(self) -> str:
        """Where it is, for people."""

    def close(self) -> None:
        """End it, whether it has finished or not."""


class Executor(Protocol):
    """Executes notebooks for one run. ``environment`` and ``facts`` describe the machine that does it."""

    environment: dict
    facts: dict[str, dict[str, Any]]

    def start(self, notebook: Notebook, parameters: dict[str, Any], of: dict[str, Any]) -> Task:
        """Start a notebook, after removing the files of an earlier execution from the run's folder.

        Trainings in its journal are kept if they were made with the same fingerprint ``of``.
        """

    def close(self) -> None:
        """Release all resources."""


def check(where: str) -> None:
    """Refuse all but ``local`` and ``dask://HOST:PORT``, and the latter if Dask is not installed."""
    if where == "local":
        return
    host, _, port = where.removeprefix("dask://").rpartition(":")
    if not where.startswith("dask://") or not host or not port.isdecimal():
        raise LowbitError(f"--executor {where!r} is not allowed; give 'local' or 'dask://HOST:PORT'")
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise LowbitError(f"--executor {where}: Dask is not installed; pip install 'lowbit[dask]'") from None


def connect(where: str, folder: Path, *, timeout: float, threads: int | None, gpu: bool) -> Executor:
    """The executor that ``where`` names, ready to start notebooks.

    Args:
        where: ``local`` or ``dask://HOST:PORT``.
        folder: folder of the run; results arrive here, and workers need no access to it.
        timeout: seconds a notebook may take once it has begun.
        threads: OpenMP/MKL threads of each notebook; None leaves it to the libraries.
        gpu: whether a notebook needs a GPU; it then takes one of a worker's ``GPU`` resources.

    Raises:
        LowbitError: no scheduler or worker can be reached, or the workers have another version of ``lowbit/``.
    """
    if where == "local":
        return Local(folder, timeout, threads)
    return Dask("tcp://" + where.removeprefix("dask://"), folder, timeout, threads, gpu)


class Local:
    """Each notebook in a process of its own on this machine."""

    def __init__(self, folder: Path, timeout: float, threads: int | None) -> None:
        self.folder, self.timeout, self.threads = folder, timeout, threads
        self.environment = environment.describe()
        self.facts = fingerprint.facts(self.environment)

    def start(self, notebook: Notebook, parameters: dict[str, Any], of: dict[str, Any]) -> Execution:
        """Start the process."""
        return Execution(notebook, parameters, self.folder, timeout=self.timeout, threads=self.threads, of=of)

    def close(self) -> None:
        """Do nothing; no resources are held."""


class Dask:
    """Each notebook is a task of a Dask cluster, and there a process of its own, watched by the worker.

    The notebook's text is sent to the worker, and all files of its result come back with the outcome, so no shared
    folder is needed. If a worker is lost, Dask gives its notebook to another one (as often as the scheduler's setting
    ``distributed.scheduler.allowed-failures`` allows).
    """

    def __init__(self, address: str, folder: Path, timeout: float, threads: int | None, gpu: bool) -> None:
        import dask
        import distributed

        self.folder, self.timeout, self.threads = folder, timeout, threads
        self.address, self.resources = address, {"GPU": 1} if gpu else {}
        self.wait = dask.utils.parse_timedelta(dask.config.get("lowbit.wait", WAIT))
        self.topic = f"lowbit-{uuid.uuid4().hex}"
        self.said: dict[str, list[str]] = {}
        self.lost, self.looked, self.alone = "", 0.0, None
        try:
            self.client = distributed.Client(address, timeout=CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise LowbitError(
                f"no Dask scheduler answers at {address} ({error}); start one with 'dask scheduler', or name another "
                "with --executor dask://HOST:PORT"
            ) from None
        try:
            self.environment, self.facts = self._ask()
        except BaseException:
            self.client.close()
            raise
        self.client.subscribe_topic(self.topic, self._hear)

    def _ask(self) -> tuple[dict, dict]:
        """A worker's description of itself. The request is a task, so an adaptive cluster starts a worker for it."""
        asked = self.client.submit(about, pure=False, resources=self.resources)
        try:
            described, facts = asked.result(timeout=self.wait)
        except TimeoutError:
            kind = " with the resource GPU" if self.resources else ""
            start = f"dask worker {self.address}{' --resources GPU=1' if self.resources else ''} --nthreads 1"
            raise LowbitError(
                f"{self.address} had no free worker{kind} for {self.wait:g} s; start one: {start}"
            ) from None
        except Exception as error:
            raise LowbitError(
                f"the workers of {self.address} cannot run lowbit: {type(error).__name__}: {error}"
            ) from None
        here = {"library": fingerprint.library()}
        if differs := fingerprint.differing(comparable(facts), comparable(here), here):
            raise LowbitError(
                f"the workers of {self.address} have another lowbit than this machine: {differs} differ; "
                "install the same commit on both"
            )
        return described, facts

    def start(self, notebook: Notebook, parameters: dict[str, Any], of: dict[str, Any]) -> "Submitted":
        """Submit it. A worker returns its journal only at the end, so an interrupted notebook starts again."""
        clear(self.folder, notebook.name)
        self.said[notebook.name] = []
        future = None
        if not self.lost:
            try:
                future = self.client.submit(
                    work,
                    notebook.name,
                    notebook.path.read_bytes(),
                    parameters,
                    self.timeout,
                    self.threads,
                    comparable(self.facts),
                    self.topic,
                    key=f"lowbit-{notebook.name}-{uuid.uuid4().hex}",
                    pure=False,
                    resources=self.resources,
                )
            except Exception as error:  # a client without a scheduler raises many types
                self.lost = f"the scheduler at {self.address} was lost ({error})"
        return Submitted(self, notebook.name, future)

    def close(self) -> None:
        """Disconnect; the scheduler then drops the remaining tasks of this run."""
        with contextlib.suppress(Exception):
            self.client.close(timeout=CONNECT)

    def gone(self) -> str:
        """The reason why no more results can arrive; empty while there are workers, or may soon be."""
        if self.lost or time.monotonic() - self.looked < LOOK:
            return self.lost
        self.looked = time.monotonic()
        try:
            workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        except Exception as error:  # as above
            self.lost = f"the scheduler at {self.address} was lost ({error})"
            return self.lost
        able = [w for w in workers if not self.resources or w.get("resources", {}).get("GPU", 0) >= 1]
        self.alone = None if able else self.alone or self.looked
        if self.alone and self.looked - self.alone >= self.wait:
            self.lost = f"the cluster had no worker for {self.wait:g} s"
        return self.lost

    def _hear(self, event: tuple[float, dict]) -> None:
        self.said.setdefault(event[1]["name"], []).append(event[1]["place"])


class Submitted:
    """A notebook submitted to a Dask cluster; a `Task`."""

    def __init__(self, cluster: Dask, name: str, future: Any) -> None:
        self.cluster, self.name, self.future = cluster, name, future
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time since it was submitted."""
        return time.monotonic() - self.started

    @property
    def attempts(self) -> int:
        """How many times a worker has started it."""
        return self.cluster.said[self.name].count(BEGAN)

    def place(self) -> str:
        """Where it is, for people."""
        again = f" (attempt {self.attempts})" if self.attempts > 1 else ""
        return (self.cluster.said[self.name] or ["waiting for a worker"])[-1] + again

    def poll(self) -> Outcome | None:
        """None while a worker may still finish it, then the outcome."""
        from distributed.scheduler import KilledWorker

        status = self.future.status if self.future else "lost"
        if status == "pending":
            return self._without(reason) if (reason := self.cluster.gone()) else None
        if status == "error":
            error = self.future.exception()
            if isinstance(error, KilledWorker):
                return self._without("one worker after another was lost while it ran")
            return Outcome("failed", f"the worker could not execute it: {type(error).__name__}: {error}", 0.0, 0.0, {})
        if status != "finished":
            return self._without(self.cluster.lost or f"the scheduler at {self.cluster.address} was lost")
        try:
            outcome, files = self.future.result(timeout=CONNECT)
        except TimeoutError:
            return None  # the worker with the result was lost, and the notebook runs again
        self.future.release()
        for file, content in files.items():
            (self.cluster.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.cluster.folder / file).write_bytes(content)
        again = f"attempt {self.attempts}: the worker was lost that had it before" if self.attempts > 1 else ""
        return replace(outcome, note="; ".join(filter(None, (again, outcome.note))))

    def _without(self, reason: str) -> Outcome:
        """The outcome of a notebook that was lost, or never started."""
        tries = f" (attempt {self.attempts})" if self.attempts > 1 else ""
        self.close()
        return Outcome("killed" if self.attempts else "not_run", reason + tries, round(self.seconds, 2), 0.0, {})

    def close(self) -> None:
        """Cancel it; the worker that runs it notices and ends its processes."""
        if self.future is not None:
            with contextlib.suppress(Exception):
                self.future.cancel()


BEGAN = "starting"


def about() -> tuple[dict, dict[str, dict[str, Any]]]:
    """Runs on a worker: its description, and the facts that a fingerprint needs."""
    described = environment.describe()
    return described, fingerprint.facts(described)


def comparable(facts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The facts in which all machines of a run have to agree.

    These exclude the data, since each machine may have other files of it (checksums are compared on loading), and the
    compiled kernels, since each machine compiles its own from the same sources.
    """
    facts = {part: value for part, value in facts.items() if part != "data"}
    return {**facts, "library": {k: v for k, v in facts["library"].items() if not k.endswith(".so")}}


def work(
    name: str,
    source: bytes,
    parameters: dict[str, Any],
    timeout: float,
    threads: int | None,
    expected: dict[str, dict[str, Any]],
    topic: str,
) -> tuple[Outcome, dict[str, bytes]]:
    """Runs on a worker: executes one notebook in its own process; returns the outcome and all files of the result."""
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()

    def say(place: str) -> None:
        worker.log_event(topic, {"name": name, "place": place})

    say(BEGAN)
    if differs := fingerprint.differing(expected, comparable(about()[1]), expected):
        reason = f"its worker differs from the first worker of the run: {differs}"
        return Outcome("not_run", reason, 0.0, 0.0, {}), {}
    with tempfile.TemporaryDirectory(dir=worker.local_directory) as scratch:
        path, folder = Path(scratch, "notebooks", f"{name}.ipynb"), Path(scratch, "run")
        path.parent.mkdir()
        path.write_bytes(source)
        folder.mkdir()
        execution = Execution(read(path), parameters, folder, timeout=timeout, threads=threads)
        place = ""
        while (outcome := execution.poll()) is None:
            task = worker.state.tasks.get(key)
            if task is None or task.state in ("cancelled", "resumed"):
                execution.close()
                raise RuntimeError(f"{name} was cancelled")  # nobody waits for this result
            if place != (place := execution.place()):
                say(place)
            time.sleep(TICK)
        made = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        return outcome, {file.relative_to(folder).as_posix(): file.read_bytes() for file in made}
