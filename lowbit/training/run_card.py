"""The record of a run: :class:`RunRecord`, its run card and its history file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.extras import extra
from lowbit.files import cannot_write, write_atomically

if TYPE_CHECKING:
    import pandas

SCHEMA = 1


@dataclass
class RunRecord:
    """One finished training run.

    Attributes:
        history: one dictionary an epoch: epoch (from 1), lr (of its last step), train_loss, train_acc, test_loss,
            test_acc (None where not evaluated), seconds, images_per_s, and the metrics that callbacks returned.
        config: the settings as plain values.
        final: the last epoch's metrics, and the best test accuracy (``best_test_acc``, ``best_epoch``).
        seconds: wall-clock time of all epochs, including those before a resume.
        environment: versions, device, threads (:func:`lowbit.environment.describe`).
        identity: model, parameters, data, teacher and number of processes.
        path: the folder written to, or None.
    """

    history: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def frame(self) -> "pandas.DataFrame":
        """The history as a pandas frame, one row an epoch."""
        with extra("train", "the table of a training"):
            import pandas

        return pandas.DataFrame(self.history)

    @property
    def final(self) -> dict[str, Any]:
        """The last epoch's metrics with the best test accuracy and its epoch."""
        evaluated = [row for row in self.history if row["test_acc"] is not None]
        best = max(evaluated, key=lambda row: row["test_acc"])  # ties go to the first
        return {**self.history[-1], "best_test_acc": best["test_acc"], "best_epoch": best["epoch"]}

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all epochs."""
        return sum(row["seconds"] for row in self.history)

    def to_json(self, path: str | Path | None = None, **more: Any) -> dict[str, Any]:
        """The run card as a dictionary, with ``more`` entries added; written atomically where a path is given."""
        card = {
            "schema": SCHEMA,
            "kind": "training",
            **more,
            **self.identity,
            "train": self.config,
            "final": self.final,
            "seconds": self.seconds,
            "history": self.history,
            "environment": self.environment,
        }
        if path is not None:
            text = json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False)
            write_atomically(Path(path), lambda file: file.write(text.encode() + b"\n"))
        return card


def write_history(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Replace the JSONL file with ``history``; on a resume this drops the rows after the checkpoint."""
    text = "".join(json.dumps(row) + "\n" for row in history)
    write_atomically(path, lambda file: file.write(text.encode()))


def append_history(path: Path, row: Mapping[str, Any]) -> None:
    """Add one epoch to the JSONL file."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error
