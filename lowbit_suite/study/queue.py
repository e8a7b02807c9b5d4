"""The study's queue: finished trainings, the order of the others, and how long they will take."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from filelock import FileLock, Timeout

from lowbit import environment, paths
from lowbit_suite.records import journal
from lowbit_suite.study.plan import Training

Key = tuple[str | int | float, ...]


def journals() -> Path:
    """The folder of the study's journals, one file per table; it is committed."""
    return paths.results() / "journals" / "study"


def scratch() -> Path:
    """The folder of unfinished trainings on this machine; it is not committed."""
    return paths.results() / "scratch" / "study"


def kind(machine: dict[str, Any] | None = None) -> str:
    """The kind of processor. Trainings that are compared with each other run on the same kind.

    ``"bf16"`` where bfloat16 is fast (the study then uses it), else ``"avx512"``, ``"avx2"`` or ``"other"``, with
    float32; ``"cuda"`` on a GPU.

    Args:
        machine: the description in a journal's line; None for this machine.
    """
    machine = machine or environment.processor()
    isa = machine["isa"]
    if machine.get("device") == "cuda":
        return "cuda"
    return next((name for flag, name in KINDS.items() if flag in isa), "other")


KINDS = {"avx512_bf16": "bf16", "avx512f": "avx512", "avx2": "avx2"}


@dataclass(frozen=True)
class Done:
    """One line of a journal: a finished training.

    Attributes:
        key: the key of the training.
        digest: the digest of its settings; if it differs from the plan's, the plan has changed since.
        kind: the kind of processor.
        seconds: how long the training took.
        line: the complete line.
    """

    key: Key
    digest: str
    kind: str
    seconds: float
    line: dict[str, Any] = field(repr=False, compare=False)


def done(tables: Iterable[str]) -> list[Done]:
    """The finished trainings in the journals of ``tables``, in the order in which they ended."""
    found = []
    for table in tables:
        for line in journal.read(journals() / f"{table}.jsonl"):
            key: Key = (table, line["arm"], line["bits"], line["epochs"], line["seed"])
            key += (line["lr_factor"],) if "lr_factor" in line else ()
            found.append(Done(key, line["digest"], line["kind"], line["seconds"], line))
    return found


def note(training: Training, result: dict[str, Any], seconds: float) -> None:
    """Append the line of a finished training to its table's journal and flush it to disk."""
    environment_ = environment.describe()
    line = {"arm": training.arm, "bits": training.bits, "epochs": training.epochs, "seed": training.seed}
    line |= {} if training.factor is None else {"lr_factor": training.factor}
    line |= {"digest": training.digest, "kind": kind(), "seconds": round(seconds, 1), "length": training.length}
    line |= {"ended": datetime.now(UTC).isoformat(timespec="seconds")}
    line |= {name: environment_[name] for name in ("cpu", "isa", "torch", "commit", "dirty")} | result
    path = journals() / f"{training.table}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(scratch() / f"{training.table}.lock"), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def current(trainings: Iterable[Training], lines: Iterable[Done]) -> dict[Key, list[Done]]:
    """The journal lines that match the current plan, by training; a training may have lines of several kinds.

    A training that stands in two tables (`Training.same`) has its line in both.
    """
    wanted: dict[tuple[Key, str], list[Training]] = {}
    for training in trainings:
        if not training.waits:
            run = training.same or training
            wanted.setdefault((run.key, run.digest), []).append(training)
    found: dict[Key, list[Done]] = {}
    for line in lines:
        for training in wanted.get((line.key, line.digest), ()):
            own = line if training.same is None else _shared(line, training)
            found.setdefault(training.key, []).append(own)
    return found


def _shared(line: Done, training: Training) -> Done:
    """The line of the same training in another table, made a line of ``training``: without the rows of its phases."""
    rows = [row | training.columns for row in line.line["rows"] if row["arm"] == training.arm]
    return replace(line, key=training.key, digest=training.digest, line=line.line | {"rows": rows})


def waiting(trainings: list[Training], lines: list[Done], here: str) -> list[Training]:
    """The unfinished trainings for a machine of the kind ``here``, in the order in which to run them.

    A block (same table, budget and seed) stays on the kind of processor on which it began. Blocks of another kind come
    up only when nothing else is left. Lower ranks come first. Then tables take turns: the table with the smallest
    finished share comes first. Within a table lower seeds come first, then short budgets. The full-precision twins of a
    seed come before its other arms, at all budgets: they tell whether a budget is long enough, and so whether the other
    arms are worth their hours. Trainings that wait for a learning rate or for another kind of processor, or that equal
    a training of another table, are left out.
    """
    ended = current(trainings, lines)
    begun: dict[tuple, set[str]] = {}
    for training in trainings:
        for line in ended.get(training.key, []):
            begun.setdefault(training.block, set()).add(line.kind)
    own_runs = [t for t in trainings if not t.waits and t.same is None and t.only in (None, here)]
    left = [t for t in own_runs if not any(line.kind == here for line in ended.get(t.key, []))]
    own = [t for t in left if here in begun.get(t.block, {here})]
    others = [t for t in left if here not in begun.get(t.block, {here}) and t.key not in ended]
    return _in_turns(own, trainings, ended) or _in_turns(others, trainings, ended)


def _in_turns(left: list[Training], trainings: list[Training], ended: dict[Key, Any]) -> list[Training]:
    """``left`` sorted by rank; within a rank tables take turns by their share of finished and already listed epochs."""
    total: dict[str, float] = {}
    finished: dict[str, float] = {}
    for training in trainings:
        total[training.table] = total.get(training.table, 0) + training.length
        finished[training.table] = finished.get(training.table, 0) + training.length * (training.key in ended)
    queues: dict[str, list[Training]] = {}
    ordered: list[Training] = []
    for rank in sorted({training.rank for training in left}):
        for training in sorted(left, key=lambda t: (t.seed, t.bits < 32, t.epochs)):
            if training.rank == rank:
                queues.setdefault(training.table, []).append(training)
        while queues:
            table = min(queues, key=lambda name: finished[name] / total[name])
            ordered.append(queues[table].pop(0))
            finished[table] += ordered[-1].length
            if not queues[table]:
                del queues[table]
    return ordered


def seconds_an_epoch(training: Training, lines: list[Done], here: str) -> float | None:
    """Expected seconds per epoch of ``training`` on a machine of the kind ``here``: a median over the journals.

    The median is over the last 5 trainings of the same arm, or else of any arm; of its own table, or else of the common
    table. None if the journals have none of that kind.
    """
    places = (training.table, training.common)
    arms = [(place, training.arm, training.bits) for place in places]
    for known_by in (*arms, *((place,) for place in places)):
        known = [d.seconds / d.line["length"] for d in lines if d.kind == here and d.key[: len(known_by)] == known_by]
        if known:
            return median(known[-5:])
    return None


def folder(training: Training) -> Path:
    """The folder of an unfinished training's checkpoints."""
    name = "".join(c if c.isalnum() else "-" for c in str(training))
    return scratch() / f"{name}-{training.digest}"


@contextmanager
def claimed(training: Training) -> Iterator[Path | None]:
    """Lock a training for this process and give its folder, or None if another process has it.

    The folder is made by the training itself: one that is looked at and left has none.
    """
    path = folder(training)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield None
        return
    try:
        yield path
    finally:
        lock.release()
