"""Checks an executed copy before its notebook may count as passed.

The copy alone never proves a pass, since papermill marks crashed notebooks as completed.
"""

import hashlib
import json
from pathlib import Path

PARAMETERS = {"parameters", "injected-parameters"}
"""Tags of the cells that only hold parameters."""


def flaw(path: Path, digest: str) -> str:
    """The fault of the executed copy at ``path``, in words; empty if every cell ran and none hid an error.

    Args:
        path: The executed notebook.
        digest: `digest` of the file when the process that wrote it ended.
    """
    try:
        tree = json.loads(path.read_bytes())
        cells = [cell for cell in tree["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
        found = _first_flaw(cells)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its executed copy is broken: {type(error).__name__} {error}"
    if found:
        return found
    return "" if digest_of(path) == digest else "its executed copy was altered after the notebook had ended"


def digest_of(path: Path) -> str:
    """SHA-256 of a file; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _first_flaw(cells: list[dict]) -> str:
    ran = False
    for number, cell in enumerate(cells, 1):
        source = "".join(cell["source"])
        first = source.strip().splitlines()[0]
        where = f"code cell {number} of {len(cells)}: {first[:80]}"
        if error := next((o for o in cell["outputs"] if o["output_type"] == "error"), None):
            # sys.exit(0) ends a notebook, and papermill lets that pass; so do cells tagged raises-exception
            said = ": ".join(filter(None, (error["ename"], error["evalue"])))
            return f"ended by {said} in {where}" if error["ename"] == "SystemExit" else f"hides {said} in {where}"
        if cell["execution_count"] is None:
            return f"did not run to its end: no execution count in {where}"
        if first.startswith("%%") and "--no-raise-error" in first:
            return f"cannot fail in {where}"
        only_values = PARAMETERS & set(cell["metadata"].get("tags", []))
        ran |= not only_values and any(line.strip() and line.strip()[0] != "#" for line in source.splitlines())
    return "" if ran else "nothing ran: it has no code besides comments and parameters"
