"""A process that runs the study's trainings one by one: ``python -m lowbit_suite.study.trainer``."""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit_suite.study import plan, queue, tuning
from lowbit_suite.study.plan import Training


def work(deadline: float = math.inf, tables: Sequence[str] = ()) -> int:
    """Run waiting trainings on one thread until ``deadline``, and return the number of finished ones.

    A training starts only if it is expected to end in time, judging by earlier ones on this kind of processor. It also
    starts if there are none to judge by.

    Args:
        deadline: seconds since 1970.
        tables: names of the tables to work on; empty for all.
    """
    import torch

    torch.set_num_threads(1)
    data: dict[str, Any] = {}
    count = 0
    while time.time() < deadline and _one(deadline, tables, data):
        count += 1
    return count


def _one(deadline: float, tables: Sequence[str], data: dict[str, Any]) -> bool:
    """Run the first training that fits and that no other process has; False if there is none."""
    from lowbit_suite.study import training as trainer

    held, here = plan.load(), queue.kind()
    lines = queue.done(held)
    everything = tuning.trainings(held, lines)
    for training in everything:
        if queue.folder(training).is_dir() and not missing(training):
            _clear(training)  # its process died after it wrote the result and before it removed the checkpoints
    for training in queue.waiting([t for t in everything if not tables or t.table in tables], lines, here):
        with queue.claimed(training) as folder:
            if folder is None or not _fits(training, folder, lines, here, deadline) or not missing(training):
                continue
            _say(f"begins {training}" + (" again" * bool(epochs_done(folder))))
            folder.mkdir(exist_ok=True)
            source = str(training.run["data"])
            if source not in data:
                data[source] = training.config().load_data()
            result = trainer.run(training, folder, data[source], amp="bf16" if here == "bf16" else "none")
            queue.note(training, result, trainer.seconds(result))
            _say(f"ended  {training}: {_shown(result['rows'][0])}")
            shutil.rmtree(folder, ignore_errors=True)
            return True
    return False


def _shown(row: dict[str, Any]) -> str:
    return next(f"{row[name]:.2f} {name.partition(', ')[2]}" for name in tuning.VALUES if name in row)


def _clear(training: Training) -> None:
    with queue.claimed(training) as folder:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def missing(training: Training) -> bool:
    """Whether the journal still has no result of the training from this kind of processor."""
    lines = queue.current([training], queue.done([training.table])).get(training.key, [])
    return all(line.kind != queue.kind() for line in lines)


def epochs_done(folder: Path) -> int:
    """Number of epochs that an unfinished training has completed."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*/history.jsonl"))


def _fits(training: Training, folder: Path, lines: list[queue.Done], here: str, deadline: float) -> bool:
    each = queue.seconds_an_epoch(training, lines, here)
    return each is None or time.time() + each * (training.length - epochs_done(folder)) <= deadline


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--deadline", type=float, default=math.inf)
    parser.add_argument("--table", action="append", default=[])
    given = parser.parse_args()
    work(given.deadline, given.table)
    sys.exit(0)
