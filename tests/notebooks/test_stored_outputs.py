"""`make test` executes the notebooks again and compares marked cells with their stored outputs (nbval): can it fail?"""

import re
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from nbval.plugin import find_comment_markers, find_metadata_tags
from pandas.io.formats.style import Styler

from lowbit import paths

NOTEBOOKS = sorted(paths.notebooks().glob("[0-9][0-9]_*.ipynb"))
CHECKED = "# NBVAL_CHECK_OUTPUT"


def compared(cell):
    """Whether nbval, as `make test` calls it, compares this cell: it passes over cells without an execution count,
    and over pictures; a cell without any text could then not fail."""
    if cell.cell_type != "code" or not cell.execution_count:
        return False
    options = {**dict(find_comment_markers(cell.source)), **dict(find_metadata_tags(cell.metadata))}
    text = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in cell.outputs)
    return bool(options.get("check") and not options.get("skip") and text.strip())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_two_cells_or_more_are_compared(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert sum(map(compared, cells)) >= 2
    assert all(compared(cell) for cell in cells if "NBVAL_CHECK_OUTPUT" in cell.source), "a mark without effect"


MACHINE_PATH = re.compile(r"(?:Posix|Windows)Path\(|(?<![\w./:])/(?:home|root|work|tmp|mnt|opt|private|Users)/\w|[A-Z]:\\\\")


def written(output):
    """All text that an output shows, without pictures inside HTML."""
    texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", "\n".join(texts))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_names_a_place_on_a_machine(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [text for cell in cells for text in map(written, cell.outputs) if MACHINE_PATH.search(text)] == []


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("PosixPath('figures/a.png')", True),
        ("written: /home/someone/a.png", True),
        ("(/tmp/x)", True),
        ("https://example.org/home/x", False),
        ("results/tmp/a.png", False),
        ("and/or 1/2", False),
    ],
)
def test_places_on_machines_are_noticed(text, is_one):
    assert bool(MACHINE_PATH.search(text)) == is_one


EMPTY = re.compile(r"<td[^>]*>\s*(?:nan|NaN|NaT|None|&lt;NA&gt;)\s*</td>")


def holes(output):
    """Cells of a table, or words of its plain twin, that show how pandas writes a missing value."""
    data = output.get("data", {})
    return EMPTY.findall(data["text/html"]) + re.findall(r"\bNaN\b", data["text/plain"]) if "text/html" in data else []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_table_shows_nan_for_an_empty_cell(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    found = [cell.source for cell in cells if any(map(holes, cell.outputs))]
    assert found == [], "show it by plotting.table, or a Styler by format(na_rep='–')"


@pytest.mark.parametrize("show", [lambda table: table, lambda table: table.style.format(precision=1)])
def test_an_empty_cell_is_noticed(show):
    shown = show(pd.DataFrame({"low": [float("nan")], "about": ["NaN is named in a text"]}))
    data = {"text/html": shown._repr_html_(), "text/plain": "" if isinstance(shown, Styler) else str(shown)}
    assert holes({"data": data}) and not holes({"data": data | {"text/html": "<td>a NaN here</td>", "text/plain": ""}})


def test_make_test_compares_every_notebook_within_a_limit():
    (line,) = [line for line in (paths.project() / "Makefile").read_text().splitlines() if "--nbval" in line]
    assert " notebooks " in line
    assert int(re.search(r"--nbval-cell-timeout=(\d+)", line)[1]) <= 300, "without it a dead kernel takes 2,000 s"


def check(folder, *cells, stored="4\n", timeout=60):
    """What nbval makes of a notebook with these cells, each stored with that output."""
    made = nbformat.v4.new_notebook()
    for count, source in enumerate(cells, 1):
        output = nbformat.v4.new_output("stream", name="stdout", text=stored)
        made.cells.append(nbformat.v4.new_code_cell(f"{CHECKED}\n{source}", execution_count=count, outputs=[output]))
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, folder / "small.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        f"--nbval-cell-timeout={timeout}",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run([*command, "-q", "small.ipynb"], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "passes"), [("4\n", True), ("5\n", False)])
def test_a_tampered_output_turns_the_check_red(tmp_path, stored, passes):
    result = check(tmp_path, "print(2 + 2)", stored=stored)
    assert (result.returncode == 0) is passes, result.stdout
    assert ("1 passed" if passes else "1 failed") in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ("while True: pass", "Timeout of 3 seconds exceeded"),
        (
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {2})\nwhile True: pass",
            "Timeout of 3 seconds exceeded",
        ),
        ("import os; os.kill(os.getpid(), 9)", "Timeout of 3 seconds exceeded"),
    ],
    ids=["endless", "endless, cannot be interrupted", "dead kernel"],
)
def test_an_endless_cell_and_a_dead_kernel_end_at_the_limit(tmp_path, ends, says):
    result = check(tmp_path, "print(2 + 2)", ends, "print(2 + 2)", timeout=3)
    assert result.returncode == 1
    assert says in result.stdout
    assert "1 passed" in result.stdout and "1 failed" in result.stdout, result.stdout
