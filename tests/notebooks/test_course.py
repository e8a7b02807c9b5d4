"""What every notebook of the course promises its reader, and that checking stored outputs can fail."""

import re
import subprocess
import sys

import nbformat
import pytest

from lowbit import paths

NOTEBOOKS = sorted(paths.notebooks().glob("[0-9][0-9]_*.ipynb"))
CHECKED = "# NBVAL_CHECK_OUTPUT"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def test_there_is_a_course():
    assert len(NOTEBOOKS) >= 2


def test_parameters_come_first(notebook):
    first, second = code(notebook)[:2]
    assert "parameters" in first.metadata.get("tags", [])
    assert "profile" in second.source, "the second code cell says which data and profile are in use"


def test_it_was_executed_from_top_to_bottom_without_an_error(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for cell in code(notebook) for o in cell.outputs if o.output_type == "error"]


def test_cells_whose_output_is_checked_have_one(notebook):
    """nbval passes over a cell without an execution count or a stored output: such a check could not fail."""
    checked = [cell for cell in code(notebook) if CHECKED in cell.source]
    assert len(checked) >= 2
    assert all(cell.outputs and cell.execution_count for cell in checked)


def test_it_teaches(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    source = "\n".join(cell.source for cell in code(notebook))
    assert len(prose) >= 0.5 * len(source) and len(prose) > 3000
    for heading in ("What you will be able to do", "How long", "What surprised", "Exercises", "References"):
        assert heading in prose, f"no {heading!r}"
    assert "lowbit.record(" in source
    assert [o for cell in code(notebook) for o in cell.outputs if "image/png" in o.get("data", {})], "no figure stored"


def test_numbers_in_prose_are_not_measured_ones(notebook):
    """An accuracy typed into the prose would part from the measurement; it has to come through a cell."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.findall(r"\d\d\.\d ?%", prose)


def small(tmp_path, stored: str):
    """A notebook of one checked cell that prints 4, with ``stored`` as its stored output."""
    cell = nbformat.v4.new_code_cell(f"{CHECKED}\nprint(2 + 2)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=stored)]
    made = nbformat.v4.new_notebook(cells=[cell])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "small.ipynb"
    nbformat.write(made, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "passes"), [("4\n", True), ("5\n", False)])
def test_a_tampered_output_turns_the_check_red(tmp_path, stored, passes):
    path = small(tmp_path, stored)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", "-q", str(path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode == 0) is passes, result.stdout
    assert ("1 passed" if passes else "1 failed") in result.stdout
