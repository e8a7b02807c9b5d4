"""Which kept results may stand."""

import json

import pytest

from lowbit_suite.running.cache import FILE, Cache
from lowbit_suite.running.run_json import Entry

PARTS = {"code": "1", "parameters": {"seed": "0"}}


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of one notebook that has passed, and its result kept."""
    for name in ("a.ipynb", "records/a.jsonl", "figures/a/dot.png", "tables/a/rows.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    Cache(tmp_path).keep(Entry("a", "passed", seconds=2.0, peak_mb=3.0), PARTS)
    return tmp_path


def test_what_is_untouched_stands(folder):
    assert Cache(folder).why_not("a", PARTS) == ""
    assert Cache(folder).seconds() == {"a": 2.0}


def test_what_differs_is_said(folder):
    assert Cache(folder).why_not("a", {**PARTS, "code": "2"}) == "the notebook's code changed"
    assert Cache(folder).why_not("b", PARTS) == "no earlier result is kept"


@pytest.mark.parametrize("file", ["a.ipynb", "records/a.jsonl", "figures/a/dot.png", "tables/a/rows.csv"])
def test_a_file_that_is_gone_or_altered_refuses_the_result(folder, file):
    (folder / file).write_text("other")
    assert Cache(folder).why_not("a", PARTS) == f"{file} was altered"
    (folder / file).unlink()
    said = "its executed copy is gone" if file == "a.ipynb" else f"{file} is gone"
    assert Cache(folder).why_not("a", PARTS) == said


def test_a_file_that_came_later_refuses_the_result(folder):
    (folder / "figures" / "a" / "more.png").touch()
    assert Cache(folder).why_not("a", PARTS) == "figures/a/more.png is new"


@pytest.mark.parametrize("status", ["failed", "timeout", "killed", "oom", "skipped", "not_run", None])
def test_only_a_passed_result_stands(folder, status):
    tree = json.loads((folder / FILE).read_text())
    tree["kept"]["a"]["status"] = status
    (folder / FILE).write_text(json.dumps(tree))
    assert Cache(folder).why_not("a", PARTS) == f"the kept result has status {status!r}"


def test_a_forgotten_result_is_gone_for_good(folder):
    Cache(folder).keep(Entry("b", "passed"), PARTS)
    Cache(folder).forget("a", "b", "c")
    assert [Cache(folder).why_not(name, PARTS) for name in "ab"] == ["no earlier result is kept"] * 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2, "kept": {"a": {}}}'])
def test_a_broken_file_is_an_empty_cache(folder, text):
    (folder / FILE).write_text(text)
    assert Cache(folder).why_not("a", PARTS) == "no earlier result is kept"


def test_the_stamp_is_another_one_after_every_execution(folder):
    first = Cache(folder).stamp("a")
    (folder / "a.ipynb").write_text("executed again")
    cache = Cache(folder)
    cache.keep(Entry("a", "passed"), PARTS)
    assert len({first, cache.stamp("a"), cache.stamp("b"), ""}) == 3
