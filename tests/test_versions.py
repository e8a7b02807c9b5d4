"""The table that tools/versions.py keeps: one row for each set of versions, the newest result."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "versions.py"


@pytest.fixture
def versions(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("versions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TABLE", tmp_path / "versions.md")
    return module


def row(versions, /, **values):
    return dict.fromkeys(versions.COLUMNS, "1.0") | {"versions": "newest", "torch": "2.14.1", "failed": "0"} | values


def rows(versions):
    lines = [line for line in versions.TABLE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_row_takes_the_place_of_the_same_versions_and_rows_are_in_order(versions):
    versions.write(row(versions, torch="2.14.1", failed="3"))
    versions.write(row(versions, torch="2.9.0"))
    versions.write(row(versions, torch="2.14.1", failed="0"))
    versions.write(row(versions, torch="2.14.1", Python="3.9", versions="lowest"))
    torch, failed, python = (versions.COLUMNS.index(name) for name in ("torch", "failed", "Python"))
    assert [(r[torch], r[failed], r[python]) for r in rows(versions)] == [
        ("2.9.0", "0", "1.0"), ("2.14.1", "0", "1.0"), ("2.14.1", "0", "3.9"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("newest", []),
        ("lowest", ["--resolution", "lowest-direct"]),
        ("lock", ["--constraints", "constraints.txt"]),
        ("torch==2.14.1", ["torch==2.14.1"]),
    ],
)
def test_each_target_is_what_uv_is_asked_for(versions, target, wanted):
    assert versions.options(target) == wanted


def test_tests_are_counted_from_the_report(versions, tmp_path, monkeypatch):
    def run(command, **_):
        (report,) = [word.partition("=")[2] for word in map(str, command) if "--junitxml" in str(word)]
        cases = "<testcase/><testcase><skipped/></testcase><testcase><failure/></testcase><testcase><error/></testcase>"
        Path(report).write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")

    monkeypatch.setattr(versions.subprocess, "run", run)
    assert versions.test("python", {}, tmp_path) == {"passed": 1, "failed": 2, "skipped": 1}


def test_the_folders_to_test_are_there(versions):
    assert all((versions.ROOT / name).is_dir() for name in versions.TESTS)
