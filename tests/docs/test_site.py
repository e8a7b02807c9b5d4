"""The web site: its tables are whole, its generated parts follow their sources, and it builds without a warning."""

import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import PIL.Image
import pytest
import yaml
from bs4 import BeautifulSoup
from PIL.PngImagePlugin import PngInfo

import lowbit
from lowbit_suite import plotting

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
sys.path.insert(0, str(DOCS))  # as Sphinx has it
import assemble  # noqa: E402
import check  # noqa: E402
import launch  # noqa: E402
import public  # noqa: E402

PAGES = ["lowbit", "lowbit.functional", *(f"lowbit.{name}" for name in (*public.PACKAGES, *public.MODULES))]

NEEDED = (
    "sphinx",
    "myst_nb",
    "autoapi",
    "sphinx_book_theme",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
)


def missing() -> list[str]:
    """What `lowbit[site]` brings and this environment lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site, warnings being errors, as in a fork ``someone/lowbit`` on GitHub."""
    if lacks := missing():
        pytest.skip(f"the site was not built: {', '.join(lacks)} missing; pip install 'lowbit[site]'")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"GITHUB_REPOSITORY": "someone/lowbit", "GITHUB_SERVER_URL": "https://github.com"}
    assemble = [sys.executable, str(DOCS / "assemble.py"), str(folder / "source")]
    # A module that is None cannot be imported: the build must not need torch or lowbit.
    start = "import sys; sys.modules['torch'] = sys.modules['lowbit'] = None; from sphinx.__main__ import main; "
    options = ["--nitpicky", "--fail-on-warning", "--keep-going", "--quiet", "-c", str(DOCS)]
    build = [
        sys.executable,
        "-c",
        start + "sys.exit(main(sys.argv[1:]))",
        *options,
        str(folder / "source"),
        str(folder / "html"),
    ]
    for command in (assemble, build):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_notebook_is_in_the_table_of_the_course_once():
    entries = [entry for part in assemble.course() for entry in part["notebooks"]]
    assert [entry["name"] for entry in entries] == sorted(p.stem for p in (PROJECT / "notebooks").glob("*.ipynb"))
    numbers = [assemble.number(entry["name"]) for entry in entries]
    for entry in entries:
        assert set(entry) == {"name", "level", "run", "read", "needs", "learn"}
        assert entry["level"] in ("beginner", "intermediate", "advanced")
        assert all(n in numbers and n < assemble.number(entry["name"]) for n in entry["needs"]), entry["name"]


@pytest.mark.parametrize("module", PAGES)
def test_every_public_name_is_found_and_is_what_the_source_says(module):
    there, told = importlib.import_module(module), public.names(PROJECT, module)
    if hasattr(there, "__all__"):
        assert sorted(told) == sorted(there.__all__)
    for name, origin in told.items():
        home, _, attribute = origin.rpartition(".")
        kind = public.kind(PROJECT, origin)
        defined = (
            importlib.import_module(origin) if kind == "module" else getattr(importlib.import_module(home), attribute)
        )
        assert getattr(there, name) is defined or type(getattr(there, name)) is type(defined), f"{module}.{name}"
        assert kind in ("module", "class", "function", "data")


def test_every_public_package_has_a_page():
    modules = {name for name in lowbit.__all__ if public.kind(PROJECT, f"lowbit.{name}") == "module"}
    assert {f"lowbit.{name}" for name in modules} <= set(PAGES)


def test_every_name_is_described_on_exactly_one_page():
    pages = assemble.api_names()
    described = [re.findall(r"^\.\. autoapi\w+:: (\S+)", assemble.api_page(module, pages), re.M) for module in pages]
    flat = [origin for page in described for origin in page]
    wanted = {o for names in pages.values() for o in names.values() if public.kind(PROJECT, o) != "module"}
    assert len(flat) == len(set(flat)) and set(flat) == wanted


def test_the_table_of_what_was_found_is_that_of_the_claims():
    claims = [claim for claim in json.loads((PROJECT / "results/claims.json").read_text()) if not claim["look"]]
    rows = re.findall(r"^\| (\w\d) \| (.*?) \| (.*?) \| (.*?) \|$", assemble.found_table(), re.M)
    assert [(row[0], row[1]) for row in rows] == [(claim["id"], claim["claim"]) for claim in claims]
    for row, claim in zip(rows, claims, strict=True):
        assert claim["verdict"] in row[2] and ("reproduced" in row[2]) == ("reproduced" in claim["verdict"])


def test_the_repository_is_that_of_pyproject_or_of_the_fork_that_builds(monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/lowbit")
    assert assemble.repository() == "https://github.com/someone/lowbit"
    monkeypatch.delenv("GITHUB_REPOSITORY")
    monkeypatch.setattr(assemble, "ROOT", tmp_path)
    for urls, address in (('Repository = "https://example.org/a/b/"', "https://example.org/a/b"), ("", "")):
        (tmp_path / "pyproject.toml").write_text(f"[project]\n[project.urls]\n{urls}\n")
        assert assemble.repository() == address


def test_links_to_files_that_the_site_does_not_hold_lead_to_the_repository(monkeypatch):
    text = "[a](tables/a.csv) [b](figures/b.png) [c](https://c.org) [d](claims.md)"
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/lowbit")
    there = "[a](https://github.com/someone/lowbit/blob/main/results/tables/a.csv)"
    assert assemble.linked(text, "results/") == text.replace("[a](tables/a.csv)", there)
    monkeypatch.setattr(assemble, "repository", lambda: "")
    assert assemble.linked(text, "results/") == text.replace("[a](tables/a.csv)", "`a`")


def test_bars_in_docstrings_are_no_substitutions():
    assert assemble.escape_bars("mean|w| and ``a|b`` and \\|c\\|") == "mean\\|w\\| and ``a|b`` and \\|c\\|"


def test_the_picture_is_what_its_script_draws():
    draw = runpy.run_path(str(DOCS / "pictures" / "draw.py"))["draw"]
    for name, moving in (("learning", True), ("learning_still", False)):
        drawn, stored = draw(moving), (DOCS / "pictures" / f"{name}.svg").read_text()
        numbers = [[float(n) for n in re.findall(r"-?\d+\.?\d*", text)] for text in (drawn, stored)]
        assert re.sub(r"-?\d+\.?\d*", "#", drawn) == re.sub(r"-?\d+\.?\d*", "#", stored)
        assert numbers[0] == pytest.approx(numbers[1], abs=0.11)  # the last digit, on another processor


def test_the_glossary_s_drawings_are_described_as_in_the_notebooks():
    from lowbit_suite.chapters.drawings import ALT

    page = (DOCS / "glossary.md").read_text()
    shown = dict(re.findall(r'<img src="_static/(\w+)\.svg" alt="([^"]+)"', page))
    assert len(shown) == 4 and shown == {name: ALT[name] for name in shown}
    assert all((DOCS / "pictures" / f"{name}.svg").is_file() for name in shown)


def test_each_explorable_is_on_the_explore_page_and_its_modules_beside_it(site):
    page = BeautifulSoup((site / "explore" / "index.html").read_text(), "html.parser")
    named = [place["data-explorable"] for place in page.find_all(attrs={"data-explorable": True})]
    assert named == ["denseshift", "oscillation", "query_key", "annealing"]
    assert all(len(image["alt"]) > 50 for image in page.select("[data-explorable] img"))
    (script,) = [tag for tag in page.find_all("script", type="module") if "explorables" in tag["src"]]
    embed = site / "explore" / script["src"].partition("?")[0]
    assert embed.is_file() and all((embed.parent / f"{name}.js").is_file() for name in named)


def test_an_explorable_without_a_place_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "_explore.md").write_text("# Explore\n\n<!-- denseshift -->\n")
    monkeypatch.setattr(assemble, "DOCS", tmp_path)
    with pytest.raises(AssertionError, match="no place for oscillation"):
        assemble.explore_page(tmp_path, tmp_path / "modules")


def test_the_conf_can_be_loaded():
    if "sphinx" in missing():
        pytest.skip("conf.py was not loaded: sphinx is missing; pip install 'lowbit[site]'")
    conf = runpy.run_path(str(DOCS / "conf.py"))
    assert (
        conf["nb_execution_mode"] == "off"
        and len(conf["nitpick_ignore_regex"]) <= 5
        and len(conf["suppress_warnings"]) == 1
    )
    assert not any(re.fullmatch(pattern, "lowbit.nn.quantize_") for _, pattern in conf["nitpick_ignore_regex"])


def test_the_workflow_runs_targets_that_exist_and_writes_only_what_it_must():
    flow = yaml.safe_load((PROJECT / ".github/workflows/site.yml").read_text())
    targets = set(re.findall(r"^([a-z]+):(?!=)", (PROJECT / "Makefile").read_text(), re.M))
    asked = {
        m
        for job in flow["jobs"].values()
        for step in job["steps"]
        for m in re.findall(r"make (\w+)", step.get("run", ""))
    }
    assert asked == {"site", "links", "launch"} <= targets
    assert flow["permissions"] == {"contents": "read"}
    granted = {name: job.get("permissions", {}) for name, job in flow["jobs"].items()}
    assert granted == {"build": {}, "deploy": {"pages": "write", "id-token": "write"}, "launch": {"contents": "write"}}


def test_a_broken_site_is_noticed(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x">b</a><a href="c.html">c</a><script src="https://cdn.org/x.js"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="y"></p><a href="a.html">a</a><a href="https://fine.org">fine</a>')
    (tmp_path / "s.css").write_text("@font-face { src: url('//fonts.org/f.woff') }")
    assert [line.split(",")[0] for line in check.problems(tmp_path)] == [
        "a.html links to b.html#x", "a.html links to c.html", "a.html loads https://cdn.org/x.js",
        "s.css loads //fonts.org/f.woff",
    ]  # fmt: skip


PICTURE = '<img src="a.png" alt="Accuracy in percent against the number of bits, one line a method.">'


def table(*rows: str) -> str:
    """A table in HTML; cells are separated by bars, and those of headers begin with a star."""
    tags = [[("th", cell[1:]) if cell[:1] == "*" else ("td", cell) for cell in row.split("|")] for row in rows]
    lines = ["".join(f"<{tag}>{text}</{tag}>" for tag, text in cells) for cells in tags]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (PICTURE + PICTURE, None),
        ('<img src="a.png">', "shows a.png with too short an alternative text: ''"),
        ('<img src="a.png" alt="Figure 2">', "shows a.png with too short an alternative text: 'Figure 2'"),
        (PICTURE + PICTURE.replace("a.png", "b.png"), "shows b.png with the alternative text of a.png"),
        (table("*bits|*mean", "2|61", "|4"), None),
        (table("*|*mean", "*lsq|61", "|4"), None),
        (table("*lsq|61", "*pot|60"), None),
        (table("*|*mean", "lsq|61"), "has a table with a cell that no header names: mean lsq 61"),
        (table("lsq|61", "pot|60"), "has a table with a cell that no header names: lsq 61 pot 60"),
        (table("*range", "1|2").replace("<th>", '<th colspan="2">'), None),
        (table("*range", "1|2"), "has a table with a cell that no header names: range 1 2"),
    ],
)
def test_an_undescribed_picture_or_table_is_noticed(tmp_path, page, problem):
    (tmp_path / "page.html").write_text(f"<article>{page}</article>")
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    assert check.problems(tmp_path) == ([f"page.html {problem}"] if problem else [])


def test_every_table_of_the_written_pages_names_its_columns():
    pages = [*DOCS.rglob("*.md"), *(PROJECT / "results").glob("*.md")]
    texts = {path.name: path.read_text() for path in pages} | {"found": assemble.found_table()}
    table = re.compile(r"^\|(.*)\|\n\|[-:| ]+\|$", re.M)
    heads = [(name, head) for name, text in texts.items() for head in table.findall(text)]
    assert [(name, head) for name, head in heads if not all(cell.strip() for cell in head.split("|"))] == []
    assert {"found", "claims.md", "open_questions.md"} <= {name for name, _ in heads}


def test_the_figures_page_describes_every_figure_in_words_of_its_own():
    shown = re.findall(r"^!\[(.*)\]\((.*)\)$", assemble.figures_page(), re.M)
    folders = [PROJECT / "results" / "figures" / profile for profile in ("study", "desk")]
    files = [path for folder in folders for path in sorted(folder.glob("*.png"))]
    assert shown == [(plotting.alt_text(path), path.relative_to(PROJECT / "results").as_posix()) for path in files]
    assert len({text for text, _ in shown}) == len(shown) and min(len(text) for text, _ in shown) >= 40


@pytest.mark.parametrize("text", ["Accuracy against bits.", "α < β: “so”, %"])
def test_alternative_text_is_read_without_a_library(tmp_path, text):
    about = PngInfo()
    about.add_text("Software", "x")
    about.add_text("Description", text)  # as iTXt if it does not fit Latin-1
    PIL.Image.new("L", (9, 9)).save(tmp_path / "a.png", pnginfo=about)
    PIL.Image.new("L", (9, 9)).save(tmp_path / "b.png")
    assert assemble.alt_text(tmp_path / "a.png") == text
    with pytest.raises(ValueError, match=r"b\.png has no alternative text"):
        assemble.alt_text(tmp_path / "b.png")


def test_no_page_of_prose_is_forgotten():
    text = "\n".join(path.read_text() for path in DOCS.glob("*.md"))
    for path in [*DOCS.glob("[a-z]*.md"), *DOCS.glob("howto/*.md")]:
        name = path.relative_to(DOCS).with_suffix("").as_posix()
        assert name == "index" or f"\n{name}\n" in text, f"{name} is in no table of contents"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_leads_nowhere_wrong(site):
    assert check.problems(site) == []
    assert {path.stem for path in (PROJECT / "notebooks").glob("*.ipynb")} <= {
        p.stem for p in (site / "course").glob("*.html")
    }


@pytest.mark.slow
def test_tables_that_notebooks_print_as_markdown_are_tables(site):
    raw = [
        f"{page.stem}: {paragraph.get_text()[:60]}"
        for page in sorted((site / "course").glob("*.html"))
        for paragraph in BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").find_all("p")
        if paragraph.get_text().lstrip().startswith("|")
    ]
    assert raw == []


def test_every_name_can_be_found_on_the_built_pages(site):
    for module in PAGES:
        soup = BeautifulSoup((site / "api" / f"{module}.html").read_text(), "html.parser")
        told = soup.find("article").get_text()
        assert all(re.search(rf"\b{re.escape(name)}\b", told) for name in public.names(PROJECT, module)), module


@pytest.mark.slow
def test_a_notebook_has_its_neighbors_its_facts_and_its_buttons(site):
    soup = BeautifulSoup((site / "course" / "09_weight_oscillation.html").read_text(), "html.parser")
    ends = [link["href"] for link in soup.select("a.left-prev, a.right-next")]
    assert ends == ["08_shift_networks_compared.html", "10_statsq.html"]
    assert soup.select_one(".facts").get_text(" ", strip=True).startswith("Level intermediate")
    links = [link["href"] for link in soup.find_all("a", href=True)]
    opened = [link for link in links if "colab" in link or "mybinder" in link]
    assert opened == [
        "https://mybinder.org/v2/gh/someone/lowbit/launch?urlpath=lab/tree/course/09_weight_oscillation.ipynb",
        "https://colab.research.google.com/github/someone/lowbit/blob/launch/course/09_weight_oscillation.ipynb",
    ]
    assert len(soup.select(".cell_output img")) >= 2 and all(image.get("alt") for image in soup.find_all("img"))


def test_the_notebooks_of_the_branch_launch_install_and_are_otherwise_the_same(tmp_path):
    launch.launch(tmp_path, "https://github.com/someone/lowbit")
    made = nbformat.read(tmp_path / "course" / "00_start_here.ipynb", as_version=4)
    nbformat.validate(made)
    assert "lowbit[course] @ git+https://github.com/someone/lowbit" in made.cells[1].source
    own = assemble.read("00_start_here")
    assert [cell.source for cell in made.cells if cell is not made.cells[1]] == [cell.source for cell in own.cells]
    assert len(list((tmp_path / "course").glob("*.ipynb"))) == len(list((PROJECT / "notebooks").glob("*.ipynb")))
    assert "lowbit[course]" in (tmp_path / "requirements.txt").read_text()


def test_code_that_pages_include_is_marked_where_they_say():
    included = 0
    for page in [DOCS / "index.md", *DOCS.glob("howto/*.md")]:
        for block in re.findall(r"```\{literalinclude\} (.*?)```", page.read_text(), re.S):
            name, *options = block.strip().splitlines()
            name = Path(name).name
            path = next(
                p
                for p in (DOCS / "howto" / name, *(PROJECT / q for q in assemble.QUOTED))
                if p.name == name and p.is_file()
            )
            text, options = path.read_text(), dict(re.findall(r":([\w-]+): \"?([^\"\n]+)", "\n".join(options)))
            for mark in (options.get("start-after"), options.get("end-before")):
                assert mark is None or text.count(mark) == 1, f"{page.name} asks {name} for {mark}"
            if "pyobject" in options:
                assert options["pyobject"] in {getattr(node, "name", None) for node in ast.parse(text).body}
            included += 1
    assert included >= 15
