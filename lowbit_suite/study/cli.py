"""``lowbit study``: run, pause and show the long trainings that the claims are judged by."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit_suite.study.plan import Training
    from lowbit_suite.study.queue import Done

app = typer.Typer(no_args_is_help=True)

TRAINER = "lowbit_suite.study.trainer"
PIDS = ".pids.json"
"""What follows a run's process number in the name of the file of its workers."""

TableOption = Annotated[list[str] | None, typer.Option("--table", help="Only this table of the plan; may be repeated.")]


@app.command()
def run(
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="Processes, each with one thread.")] = 2,
    hours: Annotated[float | None, typer.Option(help="Start only trainings that end within them.")] = None,
    nice: Annotated[int, typer.Option(min=0, max=19, help="Niceness of the processes.")] = 19,
    table: TableOption = None,
) -> None:
    """Run the study until nothing is left or the hours are over. Stop it at any time; the next call resumes it.

    An interrupted training resumes after its last complete epoch. Finished ones are lines in results/journals/study.
    """
    from lowbit_suite.study import plan, queue

    held = plan.load()
    plan.chosen(held, table or ())  # refuses unknown names
    list(plan.trainings(held))  # refuses an invalid plan before anything starts
    deadline = math.inf if hours is None else time.time() + 3600 * hours
    command = [sys.executable, "-m", TRAINER, "--deadline", str(deadline)]
    command += [word for name in table or () for word in ("--table", name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    workers = [subprocess.Popen(command, env=environment, preexec_fn=partial(os.nice, nice)) for _ in range(jobs)]
    pids = queue.scratch() / f"{os.getpid()}{PIDS}"
    pids.parent.mkdir(parents=True, exist_ok=True)
    pids.write_text(json.dumps([worker.pid for worker in workers]))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
                worker.send_signal(signal.SIGCONT)  # a paused one would not end
        pids.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, before)  # a signal during the exit does not stop the study
    if any(codes):
        raise typer.Exit(1)


@app.command()
def pause() -> None:
    """Pause all running processes at once, in the middle of a step."""
    _signal(signal.SIGSTOP)


@app.command()
def resume() -> None:
    """Resume all paused processes."""
    _signal(signal.SIGCONT)


def _signal(number: signal.Signals) -> None:
    from lowbit_suite.study import queue

    signaled = 0
    for path in queue.scratch().glob(f"*{PIDS}"):
        with contextlib.suppress(OSError, ValueError):  # of a run that ends just now
            for pid in json.loads(path.read_text()):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    worker = psutil.Process(pid)
                    if TRAINER in worker.cmdline():  # else a run was killed, and another process has its number
                        worker.send_signal(number)
                        signaled += 1
    if not signaled:
        raise LowbitError("no study runs here; 'lowbit study run' starts it")


@app.command()
def status() -> None:
    """Show how much of the study is done, what runs here, and how many hours are left on this kind of processor.

    The last column but one is what the arms of rank 0, which decide the primary statements, still need.
    """
    from rich.console import Console
    from rich.table import Table

    from lowbit_suite.study import plan, queue, trainer, tuning

    held, here = plan.load(), queue.kind()
    lines = queue.done(held)
    everything = tuning.trainings(held, lines)
    ended = queue.current(everything, lines)
    shown = Table(title=f"the study, on this kind of processor ({here})", title_justify="left")
    for column in ("table", "claims", "trainings", "core hours spent", "left, rank 0", "left, all"):
        shown.add_column(
            column, justify="left" if column in ("table", "claims") else "right", no_wrap=column == "table"
        )
    for name, table in held.items():
        own = [training for training in everything if training.table == name]
        finished = [training for training in own if training.key in ended]
        spent = sum(line.seconds for training in finished for line in ended[training.key]) / 3600
        left_to_run = [t for t in own if t.key not in ended and t.same is None]
        first = _hours([training for training in left_to_run if training.rank == 0], lines, here)
        hours = f"{spent:.1f}", first, _hours(left_to_run, lines, here)
        shown.add_row(name, ", ".join(table.claims), f"{len(finished)} of {len(own)}", *hours)
    console = Console()
    console.print(shown)
    for name, table in held.items():
        if table.only not in (None, here):
            console.print(f"{name} waits for a processor of the kind {table.only!r}", highlight=False)
        if arms := {training.arm: 1 for training in everything if training.table == name and training.waits}:
            console.print(f"{name} waits for the rates of {', '.join(arms)}", highlight=False)
    for training in everything:
        folder = queue.folder(training)
        if folder.is_dir() and training.key not in ended:
            console.print(
                f"begun here: {training}: {trainer.epochs_done(folder)} of {training.length} epochs", highlight=False
            )
    if stale := len({line.key for line in lines} - set(ended)):
        console.print(f"{stale} trainings in the journals are of an earlier plan; they are not used", highlight=False)


def _hours(trainings: list["Training"], lines: list["Done"], here: str) -> str:
    """Core hours that ``trainings`` need here, judging by finished ones."""
    from lowbit_suite.study.queue import seconds_an_epoch

    times = [(seconds_an_epoch(training, lines, here), training.length) for training in trainings]
    return "unknown" if any(each is None for each, _ in times) else f"{sum(e * n for e, n in times) / 3600:.1f}"


@app.command()
def tables(table: TableOption = None) -> None:
    """Write results/tables/study from the journals, for 'lowbit claims', and draw each claim's effect by budget."""
    from lowbit_suite.running.run_json import show_path
    from lowbit_suite.study import collected as made
    from lowbit_suite.study import figures

    for path in [*made.write(table or ()), *figures.write()]:
        print(show_path(path))
