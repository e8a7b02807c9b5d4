"""Files are whole or not there, whoever writes them."""

import ast
from pathlib import Path

import pytest

import lowbit
from lowbit.files import remove_parts, replacing, write_atomically, write_text


def test_a_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one\n")
    write_text(path, "zwei ½\n")
    assert path.read_bytes() == "zwei ½\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_file_has_the_rights_of_any_new_file(tmp_path):
    write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("when", ["write", "os.fsync", "os.replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(when, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    path = tmp_path / "a"
    write_text(path, "old")
    if when != "write":
        monkeypatch.setattr(when, full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, full if when == "write" else lambda file: file.write(b"new"))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_nobody_sees_half_a_file_and_parts_of_the_killed_go(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as beside:
        beside.write_text("half")
        assert not path.exists() and beside.parent == tmp_path and beside.name.startswith(".a.")
        remove_parts(tmp_path)
        assert not beside.exists()
        beside.write_text("whole")
    assert path.read_text() == "whole"


def test_there_is_one_atomic_writer():
    """`lowbit.kernels.build` is run by setup.py, without the package, and downloads go on where they ended."""
    package = Path(lowbit.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.replace", "os.rename", "tempfile.mkstemp"):
                found.add(file.relative_to(package).as_posix())
    assert found == {"files.py", "kernels/build.py"}
