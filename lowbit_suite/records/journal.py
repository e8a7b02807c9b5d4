"""Journals: each finished training of a notebook as one line of JSON, from which `lowbit_suite.sweep` can resume.

The file is ``journals/<notebook>.jsonl`` in the folder of the run. Its first line holds the dependencies of the results
and the processor that computed them. Each other line holds one training: ``sweep`` (a number and a description),
``arm``, ``seed``, ``seconds``, ``ended`` and ``result``. An interrupted run continues after the last complete line; if
a dependency has changed, it starts again.
"""

import base64
import hashlib
import json
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit import environment, paths
from lowbit.files import write_text
from lowbit_suite.records.context import current

ARRAY = "array"
"""The JSON key of an array's bytes, compressed and in base 85; its dtype and shape are beside it."""

TRIALS = "learning rates"
"""The description of the sweep of `lowbit_suite.choose_rates`."""


def place(notebook: str) -> str:
    """Path of a notebook's journal, relative to the folder of the run."""
    return f"journals/{notebook}.jsonl"


def kept(profile: str, notebook: str) -> Path:
    """Path of the journal in ``results/`` that belongs to the accepted tables."""
    return paths.results() / "journals" / profile / f"{notebook}.jsonl"


def begin(
    path: Path,
    of: dict[str, Any],
    notebook: str,
    parameters: dict[str, Any],
    trainings: list[dict[str, Any]] | None = None,
) -> None:
    """Prepare the journal at ``path`` for a notebook; its lines are kept only if their dependencies are unchanged.

    They are dropped on another processor too: the trainings of one table would differ in more than their arms.

    Args:
        path: path of the journal.
        of: parts of the fingerprint (`lowbit_suite.running.fingerprint`); if empty, no line is kept.
        notebook: name of the notebook, for the first line.
        parameters: parameters of the notebook, for the first line.
        trainings: lines to start with, whatever their dependencies are.
    """
    digest = hashlib.sha256(json.dumps(of, sort_keys=True, default=repr).encode()).hexdigest() if of else ""
    lines, head = read(path), {"of": digest, "notebook": notebook, "parameters": parameters, "machine": machine()}
    if trainings is not None:
        kept = [head, *trainings]
    else:
        same = digest and lines and all(lines[0].get(part) == head[part] for part in ("of", "machine"))
        kept = lines if same else [head]
    write_text(path, "".join(_line(line) for line in kept))


def machine() -> dict[str, Any]:
    """Processor, instruction sets and torch: the last bits of a training's numbers depend on these and on its code."""
    return {**environment.processor(), "torch": environment.version("torch")}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first incomplete one, which an interrupted run may leave.

    Empty if there is no such file.
    """
    lines = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.split("\n")[:-1]:
        try:
            tree = json.loads(line)
        except ValueError:
            tree = None
        if not isinstance(tree, dict):
            break
        lines.append(tree)
    return lines


def key(line: dict[str, Any]) -> str:
    """A string that identifies a training within its notebook."""
    return json.dumps([line["sweep"], line["arm"], line["seed"]], sort_keys=True, default=repr)


def is_trial(line: dict[str, Any]) -> bool:
    """Whether a line is a trial of a learning rate and not a judged training."""
    return line["sweep"].endswith(TRIALS)


class Journal:
    """The journal of the running notebook, as given by its `Context`; outside a run it is always empty."""

    def __init__(self) -> None:
        self.path = current().journal
        self.found = {key(line): _decoded(line["result"]) for line in read(self.path)[1:]} if self.path else {}

    def get(self, sweep: str, arm: dict[str, Any], seed: int) -> Any:
        """The result of this training, or None if it is not in the journal."""
        return self.found.get(key({"sweep": sweep, "arm": arm, "seed": seed}))

    def add(self, sweep: str, arm: dict[str, Any], seed: int, seconds: float, result: Any) -> None:
        """Append one training to the journal immediately."""
        if self.path is None:
            return
        line = {"sweep": sweep, "arm": arm, "seed": seed, "seconds": round(seconds, 2)}
        line |= {"ended": datetime.now(UTC).isoformat(timespec="seconds"), "result": result}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(line))


def plain(result: Any) -> Any:
    """``result`` exactly as a journal returns it: tensors become arrays, and tuples become lists.

    Raises:
        TypeError: the result holds a value that a journal cannot store.
    """
    return _decoded(json.loads(json.dumps(result, default=_plain)))


def _plain(value: Any) -> Any:
    import numpy as np

    if hasattr(value, "numpy"):  # a tensor
        value = value.detach().cpu().numpy()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        packed = base64.b85encode(zlib.compress(np.ascontiguousarray(value).tobytes())).decode()
        return {ARRAY: packed, "dtype": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(
        f"it returned a {type(value).__name__}; return numbers, strings, arrays, or lists and dicts of them"
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {ARRAY, "dtype", "shape"}:
        import numpy as np

        data = zlib.decompress(base64.b85decode(value[ARRAY]))
        return np.frombuffer(bytearray(data), value["dtype"]).reshape(value["shape"])
    return {name: _decoded(item) for name, item in value.items()}


def _line(tree: dict[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, default=_plain) + "\n"
