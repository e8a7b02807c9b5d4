"""Each training of a notebook as one line of JSON, written when it ends: what `lowbit_suite.sweep` goes on from.

The file is ``journals/<notebook>.jsonl`` in the folder of the run. Its first line says what the results depend on, and
on which processor they were made; the others hold one training each: ``sweep`` (a number and a description), ``arm``,
``seed``, ``seconds``, ``ended`` and ``result``. A run that was cut off goes on after the last whole line; once anything
has changed, it starts anew.
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
"""The name in JSON under which an array's bytes stand, compressed and in base 85, beside its dtype and shape."""

TRIALS = "learning rates"
"""How `lowbit_suite.choose_rates` describes its sweep."""


def place(notebook: str) -> str:
    """Where the journal of a notebook is, from the folder of the run."""
    return f"journals/{notebook}.jsonl"


def kept(profile: str, notebook: str) -> Path:
    """Where the project keeps the journal of a run that its tables are from."""
    return paths.results() / "journals" / profile / f"{notebook}.jsonl"


def begin(
    path: Path,
    of: dict[str, Any],
    notebook: str,
    parameters: dict[str, Any],
    trainings: list[dict[str, Any]] | None = None,
) -> None:
    """Makes ``path`` ready for a notebook: what it holds stays if it depends on the same, and is dropped otherwise.

    Nor does it stay on another processor: the trainings of one table would differ in more than their arms.

    Args:
        path: the journal.
        of: the parts of the fingerprint (`lowbit_suite.running.fingerprint`); empty: nothing stays.
        notebook: its name, and
        parameters: what is handed to it; both for the first line.
        trainings: lines to begin with, whatever they and the file there depend on.
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
    """What the last bits of a training's numbers depend on beside its code: processor, instruction sets and torch."""
    return {**environment.processor(), "torch": environment.version("torch")}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that is not whole: whatever ended the run may have cut it short.

    None where there is no such file.
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
    """What tells a training from all others of its notebook."""
    return json.dumps([line["sweep"], line["arm"], line["seed"]], sort_keys=True, default=repr)


def is_trial(line: dict[str, Any]) -> bool:
    """Whether it is a trial of a learning rate, and not a training that is judged."""
    return line["sweep"].endswith(TRIALS)


class Journal:
    """The journal of the notebook that runs, as its `Context` says; outside a run nothing is found or kept."""

    def __init__(self) -> None:
        self.path = current().journal
        self.found = {key(line): _decoded(line["result"]) for line in read(self.path)[1:]} if self.path else {}

    def get(self, sweep: str, arm: dict[str, Any], seed: int) -> Any:
        """What this training returned, or None."""
        return self.found.get(key({"sweep": sweep, "arm": arm, "seed": seed}))

    def add(self, sweep: str, arm: dict[str, Any], seed: int, seconds: float, result: Any) -> None:
        """Writes one training down, at once."""
        if self.path is None:
            return
        line = {"sweep": sweep, "arm": arm, "seed": seed, "seconds": round(seconds, 2)}
        line |= {"ended": datetime.now(UTC).isoformat(timespec="seconds"), "result": result}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(line))


def plain(result: Any) -> Any:
    """``result`` as it would come back from a journal, exactly: tensors become arrays, and tuples lists.

    Raises:
        TypeError: it holds something that a journal has no form for.
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
        f"it returned a {type(value).__name__}; numbers, texts, arrays, and lists and dicts of them are allowed"
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
