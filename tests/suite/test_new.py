"""`lowbit new`: what it writes passes the tests, what it refuses leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lowbit.errors import LowbitError
from lowbit_suite import new
from tools import mutation

SOURCES = Path(__file__).parents[2]
METHOD, NOTEBOOK = "a_method_of_twenty4_chars", "99_a_topic_of_24_characters_"
METHOD = METHOD[: new.LONGEST]  # the longest names: no line of the skeletons may become too long
NOTEBOOK = NOTEBOOK[: 3 + new.LONGEST]


@pytest.fixture
def sources(project):
    for folder in ("lowbit/quantizers", "tests/quantizers", "tests/notebooks"):
        (project.folder / folder).mkdir(parents=True)
    project.add("00_first", "1")
    project.add("02_third", "1")
    return project.folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("topic", "a name is two digits, _ and a topic .* such as 03_my_topic"),
        ("3_topic", "two digits"),
        ("03", "two digits"),
        ("03_Topic", "lower-case"),
        ("03_a-b", "lower-case"),
        ("03_größe", "lower-case"),
        ("03_a\n", "lower-case"),
        ("03_" + 25 * "a", "at most 24"),
        ("../03_a", "two digits"),
        ("", "two digits"),
        ("00_other", "00_first already has this number; 03 is free"),
        ("02_third.ipynb", "02_third already has this number"),
    ],
)
def test_bad_names_of_notebooks_are_refused(sources, name, message):
    before = files(sources)
    with pytest.raises(LowbitError, match=message):
        new.notebook(name)
    assert files(sources) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("2bit", "starts with a letter"),
        ("MyMethod", "lower-case"),
        ("my-method", "lower-case"),
        ("_mine", "starts with a letter"),
        ("lambda", "not a Python keyword"),
        ("größe", "lower-case"),
        ("../evil", "lower-case"),
        (25 * "a", "at most 24"),
        ("", "at most 24"),
        ("statsq", r"'statsq': .*statsq.* already exists"),
        ("method", "Method, method already exists"),
        ("torch", "torch already exists"),
        ("field", "Field already exists"),
        ("nearest", "nearest already exists"),
        ("len", "len already exists"),
        ("lsqplus", "lsqplus.* already exists"),
        ("base", "base already exists"),
        ("value_error", "ValueError already exists"),
    ],
)
def test_bad_names_of_quantizers_are_refused(sources, name, message):
    before = files(sources)
    with pytest.raises(LowbitError, match=message):
        new.quantizer(name)
    assert files(sources) == before


@pytest.mark.parametrize("there", ["lowbit/quantizers/mine.py", "tests/quantizers/test_mine.py"])
def test_files_that_are_there_are_never_overwritten(sources, there):
    (sources / there).write_text("kept")
    before = files(sources)
    with pytest.raises(LowbitError, match=f"{there} already exists"):
        new.quantizer("mine")
    assert files(sources) == before and (sources / there).read_text() == "kept"


def test_outside_the_sources_it_says_where_to_go(project):
    with pytest.raises(
        LowbitError, match=r"there is no lowbit/quantizers/ in .*inside a copy of the project's sources"
    ):
        new.quantizer("mine")
    assert files(project.folder) == ["notebooks/claims.yaml", "notebooks/profiles.yaml"]


def test_a_notebook_has_prose_and_code_cells_in_the_order_of_the_skeleton(sources):
    made, test = new.notebook("03_my_topic", execute=False)
    assert [path.relative_to(sources).as_posix() for path in (made, test)] == [
        "notebooks/03_my_topic.ipynb",
        "tests/notebooks/test_03_my_topic.py",
    ]
    notebook = nbformat.read(made, as_version=4)
    nbformat.validate(notebook)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[:3] == ["markdown", "code", "code"] and kinds[-1] == "markdown"
    assert notebook.cells[0].source.startswith("# 03 · My topic: ")
    assert [cell.metadata.get("tags") for cell in notebook.cells if cell.cell_type == "code"][:2] == [
        ["parameters"],
        None,
    ]
    text = "".join(cell.source for cell in notebook.cells)
    assert "```" not in text and "{{" not in text


def test_a_skeleton_that_does_not_run_is_not_kept(sources, monkeypatch):
    before = files(sources)
    broken = "text\n\n```python\nraise OSError('no space')\n```\n\ntext\n"
    monkeypatch.setattr(new, "_render", lambda template, values: broken)
    with pytest.raises(LowbitError, match="does not run here and was removed: OSError: no space"):
        new.notebook("03_my_topic")
    assert files(sources) == before


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with a new notebook and a new quantizer in it, and a function that runs a command there."""
    folder = tmp_path_factory.mktemp("copy")
    mutation.copy_project(SOURCES, folder)
    given = os.environ | {"LOWBIT_PROJECT": str(folder), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    given["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*words):
        return subprocess.run([sys.executable, "-m", *words], cwd=folder, env=given, capture_output=True, text=True)

    for words in (("new", "quantizer", METHOD), ("new", "notebook", NOTEBOOK)):
        done = run("lowbit", *words)
        assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
def test_the_tests_pass_on_what_was_written(copy):
    """Its own, those over the registry and the course's: in one process, since each loads torch anew."""
    files = ("tests/quantizers", "tests/nn/test_convert.py", "tests/notebooks")
    chosen = f"{METHOD} or test_registry or {NOTEBOOK} or every_notebook_with_exercises"
    done = copy("pytest", "-q", "-p", "no:cacheprovider", "-rA", "-k", chosen, "-m", "not slow", *files)
    assert done.returncode == 0, done.stdout[-3000:]
    for test in (
        f"test_{METHOD}.py::test_values_by_hand",
        f"test_every_weight_is_its_scale_times_a_level[{METHOD}-4]",
        f"test_any_finite_latents_give_scale_times_a_level[{METHOD}-2]",
        f"test_{NOTEBOOK}.py::test_right_answers_pass",
        f"test_it_teaches[{NOTEBOOK}]",
    ):
        assert test in done.stdout, f"{test} was not among them"


@pytest.mark.slow
def test_its_stored_outputs_are_those_it_gives(copy):
    done = copy(
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-cell-timeout=120",
        f"notebooks/{NOTEBOOK}.ipynb",
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
def test_what_was_written_is_formatted(copy):
    written = (
        f"lowbit/quantizers/{METHOD}.py",
        f"tests/quantizers/test_{METHOD}.py",
        f"tests/notebooks/test_{NOTEBOOK}.py",
    )
    for words in (("check",), ("format", "--check")):
        done = copy("ruff", *words, *written)
        assert done.returncode == 0, done.stdout
