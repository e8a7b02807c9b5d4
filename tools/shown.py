"""Update the claims that notebooks show without executing the notebooks: ``python -m tools.shown NB...``.

A cell that ends with ``claims.show("D1")`` displays what ``lowbit claims`` and ``lowbit study tables`` wrote, so its
outputs can be replaced alone.
A test fails while a stored output differs from the record.
"""

import ast
import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_output

from lowbit_suite import claims
from lowbit_suite.command import plain_errors
from tools.tidy import tidy

SHOW = re.compile(r"^claims\.show\((.+)\)$", re.MULTILINE)


def cells(notebook: nbformat.NotebookNode) -> Iterator[tuple[int, list[str]]]:
    """Indices of the cells that show claims, with the claims' ids."""
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and (found := SHOW.search(cell.source)):
            yield place, ast.literal_eval(f"[{found[1]}]")


def refresh(notebook: nbformat.NotebookNode) -> bool:
    """Replace the outputs of these cells in place, and return whether any has changed."""
    before = copy.deepcopy(notebook.cells)
    for place, ids in cells(notebook):
        formatted = (DisplayFormatter().format(output) for output in claims.outputs(*ids))
        notebook.cells[place].outputs = [new_output("display_data", data, metadata=about) for data, about in formatted]
        notebook.cells[place].execution_count = before[place].execution_count
    tidy(notebook)
    return notebook.cells != before


if __name__ == "__main__":
    with plain_errors():
        for given in sys.argv[1:]:
            read = nbformat.read(given, as_version=4)
            if refresh(read):
                nbformat.write(read, Path(given))
                print(f"{given}: shows the claims as they are recorded now")
