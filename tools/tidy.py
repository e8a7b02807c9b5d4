"""Execute notebooks with their default parameters and clean their outputs: ``python -m tools.tidy NB...``.

It removes progress bars, widget state and time stamps, which change with every run.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from lowbit_suite.command import plain_errors

WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_TIMEOUT = 600  # s


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove from an executed notebook, in place, the parts that should not be committed.

    The alternative text of a cell's first picture is put into its metadata too, where MyST-NB looks for it.
    """
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "lowbit") if key in notebook.metadata}
    for cell in notebook.cells:
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if shows_something(output)]
            about = [o.metadata.get("image/png", {}) for o in cell.outputs if "image/png" in o.get("data", {})]
            if alts := [own["alt"] for own in about if "alt" in own]:
                cell.metadata["mystnb"] = {"image": {"alt": alts[0]}}
    return notebook


def shows_something(output: nbformat.NotebookNode) -> bool:
    """Whether an output is worth keeping; a widget's view goes, and HTML that came with it stays."""
    data = output.get("data", {})
    widget = data.pop(WIDGET, None)
    return output.get("name") != "stderr" and (widget is None or "text/html" in data)


def execute(path: Path) -> None:
    """Run the notebook at ``path`` in its own folder and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    nbformat.write(tidy(notebook), path)


if __name__ == "__main__":
    with plain_errors():
        for given in sys.argv[1:]:
            execute(Path(given))
            print(f"{given}: executed")
