import pytest

from lowbit.errors import LowbitError
from lowbit_suite import notebooks
from lowbit_suite.running import runner

PARAMETERS = """
"The parameters."
profile = "smoke"
epochs: int = 2
rate = 0.1   # per step
bits = [2, 3]
"""


@pytest.fixture
def course(project):
    for name in ("00_start", "01_basics", "02_more"):
        project.add(name, "1", parameters=PARAMETERS)
    return project


def names(found):
    return [item.name for item in found]


def test_names_globs_and_paths_select(course, tmp_path):
    assert names(notebooks.select([])) == ["00_start", "01_basics", "02_more"]
    assert names(notebooks.select(["02*", "00_start.ipynb"])) == ["00_start", "02_more"]
    other = course.add("other", "1").rename(tmp_path / "other.ipynb")
    assert names(notebooks.select([str(other)])) == ["other"]


def test_unknown_notebook_is_refused_with_those_there_are(course):
    with pytest.raises(LowbitError, match=r"'01_basic'; there are 00_start, .*did you mean '01_basics'"):
        runner.plan(["01_basic"])


def test_another_notebook_of_the_same_name_is_refused(course, tmp_path):
    path = tmp_path / "00_start.ipynb"
    path.write_bytes((course.notebooks / "00_start.ipynb").read_bytes())
    with pytest.raises(LowbitError, match="already has a notebook called '00_start'"):
        notebooks.select([str(path)])


def test_order_follows_metadata_then_numbers(project):
    project.add("00_a", "1", after=["02_c.ipynb"])
    project.add("01_b", "1")
    project.add("02_c", "1")
    assert names(notebooks.select([])) == ["01_b", "02_c", "00_a"]


def test_circles_and_unknown_predecessors_are_refused(project):
    project.add("a", "1", after=["b"])
    with pytest.raises(LowbitError, match="a comes after 'b', which is not a notebook"):
        notebooks.select([])
    project.add("b", "1", after=["a"])
    with pytest.raises(LowbitError, match="wait for each other"):
        notebooks.select([])


def test_parameters_reach_their_notebooks(course):
    course.profiles("smoke: {description: x, timeout_minutes: 1, notebooks: {00_start: {epochs: 5, rate: 1}}}")
    plan = runner.plan(assignments=["rate=1e-3", "01_basics:bits=[4, 5]", "00_start.ipynb:epochs=7"])
    assert plan.parameters == {
        "00_start": {"profile": "smoke", "rate": 0.001, "epochs": 7},
        "01_basics": {"profile": "smoke", "rate": 0.001, "bits": [4, 5]},
        "02_more": {"profile": "smoke", "rate": 0.001},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch=3", "has no parameter 'epoch'; it has profile, epochs, rate, bits; did you mean 'epochs'"),
        ("00_star:epochs=3", "'00_star' is not among the notebooks to run.*did you mean '00_start'"),
        ("epochs", "not of the form name=value"),
        ("=3", "not of the form"),
        ("epochs=two", "epochs='two' has type str; it has to be int"),
        ("epochs=1.5", "has type float; it has to be int"),
        ("epochs=true", "has type bool; it has to be int"),
        ("rate={a: 1}", "has to be a number, a string, true/false or a list"),
        ("rate=[", "not a YAML scalar"),
        ("profile=desk", "choose the profile with --profile"),
    ],
)
def test_wrong_assignments_are_refused_before_anything_runs(course, text, message):
    with pytest.raises(LowbitError, match=message):
        runner.plan(assignments=[text])
    assert not course.results.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [("{00_star: {epochs: 1}}", "no notebook is called '00_star'"), ("{00_start: {epoch: 1}}", "no parameter 'epoch'")],
)
def test_wrong_overrides_in_the_profile_are_refused(course, overrides, message):
    course.profiles(f"smoke: {{description: x, timeout_minutes: 1, notebooks: {overrides}}}")
    with pytest.raises(LowbitError, match=message):
        runner.plan()


@pytest.mark.parametrize("cell", ["a = 1\nb = a + 1", "import os", "a, b = 1, 2", "a = [", "%time"])
def test_a_parameters_cell_holds_flat_literals_only(project, cell):
    project.add("a", "1", parameters=cell)
    with pytest.raises(LowbitError, match="parameters cell"):
        notebooks.select([])


def test_a_broken_notebook_is_refused(project):
    (project.notebooks / "a.ipynb").write_text('{"cells": 3')
    with pytest.raises(LowbitError, match=r"a\.ipynb cannot be read as a notebook"):
        notebooks.select([])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("1e-3", 1e-3),
        ("", ""),
        ("null", None),
        ("yes", "yes"),
        ("[1, 2.5, a]", [1, 2.5, "a"]),
    ],
)
def test_values_are_read_as_they_look(text, value):
    assert notebooks.parse_value(f"x={text}", text) == value
