"""`lowbit course`: a folder of one's own, and what commands say outside of any."""

import pytest
from typer.testing import CliRunner

from lowbit import LowbitError, paths
from lowbit_suite import course
from lowbit_suite.app import app


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """As if lowbit were installed from a wheel: there is no source tree around it."""
    source = paths.SOURCES
    monkeypatch.setattr(paths, "SOURCES", tmp_path / "site-packages")
    for name in ("LOWBIT_PROJECT", "LOWBIT_RESULTS", "LOWBIT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return source


def test_a_course_is_a_project(installed, tmp_path, monkeypatch):
    course.copy_parts(installed, folder := tmp_path / "my course ü")
    assert (folder / "notebooks" / "00_start_here.ipynb").is_file() and (folder / "results" / "claims.json").is_file()
    assert not (folder / "results" / "scratch").exists()
    monkeypatch.chdir(folder / "notebooks")
    assert paths.project() == folder.resolve()
    assert CliRunner().invoke(app, ["claims"]).exit_code == 0


@pytest.mark.parametrize(
    "command",
    [["claims"], ["run", "00_start_here"], ["check"], ["accept"], ["again", "02", "seed=0"], ["study", "run"],
     ["study", "status"], ["study", "tables"], ["new", "notebook", "50_x"], ["new", "quantizer", "x"]],
)  # fmt: skip
def test_outside_a_course_a_command_refuses_and_writes_nothing(installed, tmp_path, command):
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("lowbit: there is no course in") and "lowbit course DIR" in result.stderr
    assert not list(tmp_path.rglob("*"))


def test_what_the_library_does_needs_no_course(installed):
    assert paths.archives() == [] and paths.cache()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LowbitError, match="not an empty folder"):
        course.unpack(tmp_path)
    with pytest.raises(LowbitError, match="not an empty folder"):
        course.unpack(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LowbitError, match=r"file.sub cannot be written: Not a directory"):
        course.unpack(tmp_path / "file" / "sub")
