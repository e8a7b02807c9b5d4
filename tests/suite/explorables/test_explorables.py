"""The explorables compute what `lowbit.functional` does, and show their PNG twin where they cannot be dragged."""

import fnmatch
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from golden import GOLDEN, cases
from nbformat.v4 import new_code_cell, new_notebook, new_output

from lowbit.errors import LowbitError
from lowbit_suite import explorables, report
from lowbit_suite.explorables import reference
from tools.tidy import WIDGET, tidy

PROJECT = Path(__file__).parents[3]
MATHS = Path(__file__).with_name("maths.test.mjs")
NAMES = list(explorables.ALT)
PNG = b"\x89PNG\r\n\x1a\n"
ANGLES = ("apartAngle", "oneAngle")


def same(found, expected) -> bool:
    """Whether two nests of lists and dicts have the same shape and numbers, to a relative 1e-12."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-12)
    return found == expected


def test_the_stored_golden_values_are_those_of_the_library():
    stored = json.loads(GOLDEN.read_text())
    assert all(len(found) > 5 for found in stored.values())
    made = json.loads(json.dumps(cases()))
    for name in made | stored:
        for now, then in zip(made[name], stored[name], strict=True):
            angles = [now["expected"].pop(key) - then["expected"].pop(key) for key in ANGLES if name == "queryKey"]
            assert all(abs(difference) < 1e-5 for difference in angles)  # an arc cosine is steep at 1
            assert same(now, then), f"{name}{now['given']}: python {GOLDEN.parent.name}/golden.py writes {GOLDEN.name}"


def test_the_stored_weights_are_those_of_the_checkpoint():
    stored = json.loads((explorables.FOLDER / "latents.js").read_text().partition("LATENTS = ")[2].rstrip(";\n"))
    now = reference.latents(reference.network())
    assert sum(stored["counts"]) == sum(now["counts"]) == 786_432
    # The scale is a mean in float32, whose last bit depends on the order of summation: a few weights lie on an edge.
    for key in ("counts", "within"):
        assert max(abs(a - b) for a, b in zip(now[key], stored[key], strict=True)) <= 8


def test_the_javascript_has_the_golden_values():
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the explorables' JavaScript is not tested")
    done = subprocess.run([node, "--test", MATHS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"pass [1-9]", done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_is_a_small_png_with_an_alternative_text(name):
    png = (explorables.FOLDER / "twins" / f"{name}.png").read_bytes()
    assert png.startswith(PNG) and 4_000 < len(png) < 60_000
    assert {path.stem for path in (explorables.FOLDER / "twins").iterdir()} == set(NAMES)
    (place,) = BeautifulSoup(explorables.figure(name), "html.parser").find_all(attrs={"data-explorable": name})
    assert place.img["alt"] == explorables.ALT[name] and len(place.img["alt"]) > 100
    assert place.img["src"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize("name", NAMES)
def test_a_module_as_one_file_imports_nothing_and_declares_nothing_twice(name):
    text = explorables.source(name)
    assert "import " not in re.sub(r"//.*", "", text) and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"^export (.*?)[ ({]", text, re.M) == ["function", "default"]
    assert not re.search("animat|transition:|setInterval|requestAnimationFrame", text), "nothing moves by itself"
    declared = re.findall(r"^(?:function|const|let) (\w+)", text, re.M)
    assert len(declared) == len(set(declared)) > 10


def test_an_unknown_name_is_refused():
    for function in (explorables.explorable, explorables.source, explorables.figure):
        with pytest.raises(LowbitError, match="there is no explorable 'dense'; there are denseshift, oscillation"):
            function("dense")


def test_without_anywidget_the_twin_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    bundle = explorables.explorable("denseshift")._repr_mimebundle_()
    assert bundle == {"text/html": explorables.figure("denseshift"), "text/plain": explorables.ALT["denseshift"]}


@pytest.mark.parametrize("name", NAMES)
def test_with_anywidget_it_is_live_and_carries_the_twin(name):
    pytest.importorskip("anywidget")
    widget = explorables.explorable(name)
    assert widget._esm == explorables.source(name)
    data, _ = widget._repr_mimebundle_()
    assert data[WIDGET]["model_id"] == widget.model_id
    assert data["text/html"] == explorables.figure(name)


def test_a_stored_output_keeps_the_twin_and_loses_the_widget():
    live = {WIDGET: {"model_id": "x"}, "text/html": explorables.figure("denseshift"), "text/plain": "alt"}
    bar = {WIDGET: {"model_id": "y"}, "text/plain": "a progress bar"}
    outputs = [new_output("display_data", data) for data in (live, bar)]
    (cell,) = tidy(new_notebook(cells=[new_code_cell("x", outputs=outputs)])).cells
    (kept,) = cell.outputs
    assert set(kept.data) == {"text/html", "text/plain"}


def test_the_page_of_an_executed_notebook_shows_the_twin(tmp_path):
    """nbclient stores the widgets' state, with which nbconvert would show their views, from the network."""
    live = {WIDGET: {"model_id": "x"}, "text/html": explorables.figure("denseshift"), "text/plain": "alt"}
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[new_output("display_data", live)])])
    state = {"x": {"model_name": "AnyModel", "model_module": "anywidget", "model_module_version": "0", "state": {}}}
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": state}}
    nbformat.write(notebook, tmp_path / "x.ipynb")
    page = BeautifulSoup(report.notebook_html(tmp_path / "x.ipynb").read_text(), "html.parser")
    assert page.find("img", alt=explorables.ALT["denseshift"])
    assert not page.find_all(type=re.compile("jupyter.widget"))


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colors_reach_the_contrast_of_wcag_aa(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    (line,) = re.findall(rf"^  {theme}: {{(.*)}},$", (explorables.FOLDER / "kit.js").read_text(), re.M)
    colors = dict(re.findall(r'(\w+): "(#[0-9a-f]{6})"', line))
    ground = colors.pop("ground")
    assert {"ink", "quiet"} < set(colors)
    for name, color in colors.items():
        assert contrast(color, ground) >= (4.5 if name in ("ink", "quiet") else 3), name


def test_a_wheel_gets_every_file_that_is_needed():
    data = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["lowbit_suite"]
    for path in explorables.FOLDER.rglob("*.*"):
        place = path.relative_to(explorables.FOLDER.parent).as_posix()
        assert path.suffix in (".py", ".pyc") or any(fnmatch.fnmatch(place, pattern) for pattern in data), place
