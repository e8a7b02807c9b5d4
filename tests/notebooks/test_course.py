"""What every notebook of the course promises its reader."""

import ast
import re

import nbformat
import pytest

from lowbit import paths
from lowbit_suite import claims
from tools import shown

NOTEBOOKS = sorted(paths.notebooks().glob("[0-9][0-9]_*.ipynb"))


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


def test_it_teaches(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    source = "\n".join(cell.source for cell in code(notebook))
    assert len(prose) >= 0.5 * len(source) and len(prose) > 3000
    for heading in ("What you will be able to do", "How long", "What surprised", "Exercises", "References"):
        assert heading in prose, f"no {heading!r}"
    assert "lowbit.record(" in source
    assert [o for cell in code(notebook) for o in cell.outputs if "image/png" in o.get("data", {})], "no figure stored"


def paragraphs(text):
    """The paragraphs and list items of a Markdown cell, without code, formulas, comments, tables and headings."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<!--.*?-->|^ *(\||#).*?$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    return [part for part in re.split(r"\n\s*(?:\n|(?:[-*]|\d+\\?\.) )", text) if part.strip()]


def test_its_paragraphs_are_short(notebook):
    """At most 120 words."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    counted = [(cell.id, len(part.split()), part.strip()[:60]) for cell in cells for part in paragraphs(cell.source)]
    assert [one for one in counted if one[1] > 120] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a b\nc\n\nd", [3, 1]),
        ("# a heading\na b\n\n| a | b |\n|---|---|\n| 1 | 2 |", [2]),
        ("a:\n\n```python\nx = 1\n\ny = 2\n```\nb c <!-- written for\n\nD1 -->", [1, 2]),
        ("a b $$\nx = 1\n$$\nc", [2, 1]),
        ("a:\n- b c\n  d\n- *e* f\n\n1. g\n2\\. h i", [1, 3, 2, 1, 2]),
    ],
)
def test_paragraphs_worked_by_hand(text, words):
    assert [len(part.split()) for part in paragraphs(text)] == words


def test_its_error_bars_are_the_intervals_that_verdicts_go_by(notebook):
    for call in (call for cell in code(notebook) for call in seaborn_estimates(cell.source)):
        bars = {k.arg: ast.unparse(k.value) for k in call.keywords}.get("errorbar", "seaborn's bootstrap")
        assert bars in ("plotting.interval", "None"), f"{ast.unparse(call.func)} draws {bars}"


def seaborn_estimates(source):
    """The calls that draw an estimate over several rows, with or without bars."""
    tree = ast.parse("".join("\n" if line.startswith("%") else line for line in source.splitlines(True)))
    names = ("sns.barplot", "sns.pointplot", "sns.lineplot", "sns.relplot", "sns.catplot")
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


def test_what_it_says_of_its_claims_was_written_for_the_verdicts_and_looks_of_today(notebook):
    """The reasons under a table are prose, and prose goes stale: a comment under them says what their author saw."""
    everything = claims.read(paths.results())
    for place, ids in shown.cells(notebook):
        prose = notebook.cells[place + 1].source
        line = f"<!-- written for {' | '.join(seen(id, everything) for id in ids)} -->"
        assert line in prose, f"read the text that begins {prose[:60]!r} again, correct it, and end it with\n{line}"


def seen(id, everything):
    """The verdict on a claim, and the outcome of each statement where it was seen: at desk, or else at another size."""
    judged = claims.judged(everything)[id]
    sizes = [*claims.looks(everything, id), judged]
    size = next((one for one in sizes if one.profile == "desk"), sizes[0])
    outcomes = ", ".join(claims.outcome(statement) for statement in size.statements)
    return f"{id}: {claims.judgment(judged, mark='')}; at {size.profile}: {outcomes}"


def test_what_it_shows_of_its_claims_is_what_is_recorded(notebook):
    assert not shown.refresh(notebook), "bring it up to date: python -m tools.shown notebooks/*.ipynb"


def test_a_changed_output_is_noticed_and_mended():
    path = next(path for path in NOTEBOOKS if path.stem.startswith("05"))
    changed = nbformat.read(path, as_version=4)
    places = dict(shown.cells(changed))
    assert list(places.values()) == [["D4"], ["D6"]]
    for cell in (changed.cells[place] for place in places):
        before, cell.outputs[0].data["text/markdown"] = cell.outputs[0].data["text/markdown"], "old"
        assert shown.refresh(changed) and cell.outputs[0].data["text/markdown"] == before


def test_a_look_at_short_trainings_passes_no_verdict(notebook):
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    start = next((i for i, text in enumerate(cells) if text.startswith(("## At desk size", "## At larger sizes"))), None)
    if start is None or cells[0].startswith("# 15"):  # D8 trains no network: it is judged at desk
        return
    section = cells[start : next(i for i, text in enumerate(cells) if text.startswith("## What surprised"))]
    assert "This is a look at short trainings" in section[0]
    prose = re.sub(r"<!--.*?-->", "", "\n".join(section), flags=re.DOTALL)
    assert not re.search(r"\breproduced\b", prose)
