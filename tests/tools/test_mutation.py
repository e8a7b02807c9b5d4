"""`lowbit mutate`: the list fits the sources, a fault that is seen is caught, one that is not survives."""

import textwrap

import pytest
import yaml
from typer.testing import CliRunner

from lowbit.errors import LowbitError
from lowbit_suite.app import app
from tools import mutation

ENTRY = {"name": "adds", "file": "lowbit/sum.py", "old": "a + b", "new": "a - b", "tests": "tests/test_sum.py"}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A project of one function and one test; gives a function that writes its list of faults."""

    def write(*entries):
        (tmp_path / mutation.FILE).write_text(yaml.safe_dump([{**ENTRY, **entry} for entry in entries]))

    files = {
        "lowbit/sum.py": "def plus(a, b):\n    return a + b  # unused text\n",
        "tests/test_sum.py": """
            import sys
            sys.path.insert(0, __file__.rsplit("/", 2)[0] + "/lowbit")
            from sum import plus
            def test_plus(): assert plus(2, 2) == 4
            """,
        "pyproject.toml": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path))
    return write


def test_the_projects_list_fits_its_sources():
    found = mutation.load()
    assert len(found) >= 20 and len({m.name for m in found}) == len(found)


def test_caught_survived_and_the_sources_stay(small, tmp_path):
    small({}, {"name": "comments", "old": "unused", "new": "useless"}, {"name": "breaks", "new": "a +"})
    before = (tmp_path / "lowbit/sum.py").read_text()
    caught, survived, broken = mutation.run(mutation.load())
    assert (caught.status, caught.noticed_by) == ("caught", "tests/test_sum.py::test_plus")
    assert survived.status == "survived" and broken.status == "caught"
    assert (tmp_path / "lowbit/sum.py").read_text() == before


def test_the_copy_has_every_folder_of_the_project_but_what_is_made(small, tmp_path, tmp_path_factory):
    small({})
    for name in ("examples/a.c", "results/baselines/b.json", "results/table.csv", "build/c", ".venv/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    copy = tmp_path_factory.mktemp("copy")
    mutation.copy_project(tmp_path, copy)
    assert (copy / "examples/a.c").exists() and (copy / "results/baselines/b.json").exists()
    assert sorted(path.name for path in copy.iterdir()) == [
        "examples", "lowbit", "notebooks", "pyproject.toml", "results", "tests",
    ]  # fmt: skip
    assert [path.name for path in (copy / "results").iterdir()] == ["baselines"]


@pytest.mark.parametrize("file", ["lowbit/sum.py", "lowbit/sum.c"])
def test_compiled_kernels_go_along_unless_their_sources_are_changed(small, tmp_path, file):
    (tmp_path / "lowbit/sum.c").write_text("a + b")
    (tmp_path / "lowbit/sum.so").write_text("compiled")
    test = tmp_path / "tests/test_sum.py"
    there = file.endswith(".py")
    test.write_text(f"from pathlib import Path\ndef test_so(): assert Path('lowbit/sum.so').exists() == {there}\n")
    small({"file": file})
    (outcome,) = mutation.run(mutation.load())
    assert outcome.status == "survived"


def test_tests_that_fail_without_the_fault_catch_nothing(small, tmp_path):
    small({})
    test = tmp_path / "tests/test_sum.py"
    test.write_text(test.read_text().replace("== 4", "== 5"))
    (outcome,) = mutation.run(mutation.load())
    assert outcome.status == "error" and "without the fault: tests/test_sum.py::test_plus" in outcome.noticed_by


def test_the_table_is_written_for_the_whole_list_only(small, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_RESULTS", str(tmp_path / "results"))
    small({}, {"name": "comments", "old": "unused", "new": "useless"})
    assert CliRunner().invoke(app, ["mutate", "--write", "adds"]).exit_code == 2
    assert CliRunner().invoke(app, ["mutate", "--write"]).exit_code == 1
    text = (tmp_path / "results/mutations.md").read_text()
    assert "1 of 2 caught" in text
    assert "| adds | lowbit/sum.py | caught | tests/test_sum.py::test_plus |" in text
    assert "| comments | lowbit/sum.py | survived |  |" in text


@pytest.mark.parametrize("new, code, said", [("a - b", 0, "1 of 1"), ("b + a", 1, "0 of 1")])
def test_the_command_fails_if_a_fault_survives(small, new, code, said):
    small({"new": new})
    result = CliRunner().invoke(app, ["mutate", "ADDS"])
    assert result.exit_code == code and said in result.stdout


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"old": "gone"}, "occurs 0 times"),
        ({"file": "lowbit/none.py"}, "occurs 0 times"),
        ({"tests": "tests/test_none.py"}, "does not exist"),
        ({"why": "x"}, "just the keys"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(small, entry, message):
    small(entry)
    with pytest.raises(LowbitError, match=message):
        mutation.load()


def test_two_faults_of_one_name_and_unknown_names_are_refused(small):
    small({}, {})
    with pytest.raises(LowbitError, match="two faults"):
        mutation.load()
    small({})
    with pytest.raises(LowbitError, match=r"'divides'.*there are: adds"):
        mutation.pick(mutation.load(), ["divides"])
