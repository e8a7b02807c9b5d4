"""What the figures of all notebooks have in common: looks by name, alternative text, and code that fits a page."""

import ast
import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import is_color_like
from nbconvert import HTMLExporter

from lowbit import paths
from lowbit_suite import plotting

NOTEBOOKS = sorted(paths.notebooks().glob("[0-9][0-9]_*.ipynb"))
BY_NUMBER = {f"plotting.{name}" for name in ("PALETTE", "BLUE", "ORANGE", "GREEN", "RED", "PURPLE")}
BY_NUMBER |= {"sns.color_palette", "plt.cm"}
ARE_COLORS = ("color", "c", "colors", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor", "palette", "cmap")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def trees(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines(True)
            yield cell, ast.parse("".join("\n" if line.startswith("%") else line for line in lines))


def values(node):
    """The strings that an expression may come to: not the keys and comparisons inside."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif not isinstance(node, ast.Subscript | ast.Compare):
        for inner in ast.iter_child_nodes(node):
            yield from values(inner)


def colors_by_hand(tree):
    """The places in code that name a color, a palette or a map of colors themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if (name := ast.unparse(node)) in BY_NUMBER:
                yield name
        elif isinstance(node, ast.keyword) and node.arg in ARE_COLORS:
            for value in values(node.value):
                if node.arg in ("palette", "cmap") or (is_color_like(value) and value != "none"):
                    yield f"{node.arg}={value!r}"


def test_no_color_is_named_by_hand(notebook):
    found = [place for _, tree in trees(notebook) for place in colors_by_hand(tree)]
    assert not found, f"take them from plotting.look(s), PARTS, INK, PAPER, GREY or SEQUENTIAL: {found}"


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("ax.plot(x, color='black')", 1),
        ("ax.plot(x, color='C0' if a else plotting.RED)", 2),
        ("sns.barplot(t, palette='colorblind')", 1),
        ("sns.color_palette('colorblind')", 1),
        ("ax.imshow(x, cmap='viridis')", 1),
        ("ax.plot(x, **plotting.look('lsq').line, markerfacecolor='none')", 0),
        ("ax.barh(0, 1, color=plotting.PARTS[0], label='black')", 0),
    ],
)
def test_colors_by_hand_are_noticed(source, number):
    assert len(list(colors_by_hand(ast.parse(source)))) == number


def saves(tree):
    """The calls of plotting.save, with their alternative text as code; "" for none."""
    assigns = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    named = {ast.unparse(target): node.value for node in assigns for target in node.targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "plotting.save":
            alts = [keyword.value for keyword in node.keywords if keyword.arg == "alt"]
            shared = [getattr(plotting, alt.attr) for alt in alts if isinstance(alt, ast.Attribute)]
            yield "".join([*shared, *(value for alt in alts for value in values(named.get(ast.unparse(alt), alt)))])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("plotting.save(figure, 'name')", ""),
        ("plotting.save(figure, 'name', alt='what it shows')", "what it shows"),
        ("alt = 'what it ' + 'shows'\nplotting.save(figure, 'name', alt=alt)", "what it shows"),
        ("plotting.save(figure, 'name', alt=plotting.LEARNING_RATES)", plotting.LEARNING_RATES),
        ("plotting.save(figure, 'name', alt=alt)", ""),
    ],
)
def test_alternative_text_is_found_in_code(source, text):
    assert list(saves(ast.parse(source))) == [text]


def test_every_figure_has_alternative_text_and_its_stored_output_carries_it(notebook):
    for cell, tree in trees(notebook):
        texts = list(saves(tree))
        assert all(len(text) >= 40 for text in texts), f"say what the figure shows: {cell.source[-200:]}"
        pictures = [
            output.metadata.get("image/png", {}) for output in cell.outputs if "image/png" in output.get("data", {})
        ]
        assert all(picture.get("alt") for picture in pictures), f"an output without it in cell {cell.id}"
        if pictures:
            assert cell.metadata["mystnb"]["image"]["alt"] == pictures[0]["alt"], "python -m tools.tidy puts it there"
        if texts and pictures:  # some figures are drawn only at other sizes
            assert len(pictures) >= len(texts)


def test_a_recorded_figure_is_described_by_the_text_in_its_file(notebook):
    """So that it does not share the text of the page's own figure, which comes from a smaller run."""
    for cell, _ in trees(notebook):
        shown = re.findall(r'plotting\.recorded\(\s*"(\w+)", "(\w+)"', cell.source)
        files = [paths.project() / "results" / "figures" / profile / f"{name}.png" for profile, name in shown]
        pictures = [output.metadata["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        assert not files or [picture["alt"] for picture in pictures] == [plotting.alt_text(path) for path in files]


def test_the_text_reaches_a_page_in_html(notebook):
    """By nbconvert's classic template; its lab template and JupyterLab leave it out, MyST-NB reads the cell's."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and "plotting.save" in cell.source]
    cell = next(cell for cell in cells if any("image/png" in o.get("data", {}) for o in cell.outputs))
    page, _ = HTMLExporter(template_name="classic").from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    (shown, *_) = [o.metadata["image/png"]["alt"] for o in cell.outputs if "image/png" in o.get("data", {})]
    assert shown in {image.get("alt") for image in BeautifulSoup(page, "html.parser").find_all("img")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_fits_a_page(path):
    """At most 100 columns."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [line for cell in cells for line in cell.source.splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_cells_are_short(path):
    """At most 25 lines; the parameters have one each."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    cells = [cell for cell in cells if "parameters" not in cell.metadata.get("tags", ())]
    assert {cell.id: lines for cell in cells if (lines := len(cell.source.splitlines())) > 25} == {}
