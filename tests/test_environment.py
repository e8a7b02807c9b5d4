import json
import platform
import shutil
import subprocess

import pytest
import torch

from lowbit import environment, paths


def test_describe_is_json_and_true():
    here = environment.describe()
    assert json.loads(json.dumps(here)) == here
    assert here["python"] == platform.python_version()
    assert here["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert here["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert here["threads"] == torch.get_num_threads()
    assert set(here["isa"]) <= set(environment.ISA)


def test_describe_names_no_path_of_this_machine():
    text = json.dumps(environment.describe())
    assert "/home" not in text
    assert str(paths.project()) not in text


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_and_dirt_are_those_of_the_tree(tmp_path, monkeypatch):
    (tmp_path / "lowbit").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "lowbit" / "environment.py"))
    assert environment._git() == (None, None)

    def git(*words):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *names, *words], capture_output=True, text=True, check=True
        ).stdout

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    assert environment._git() == (git("rev-parse", "HEAD").strip(), False)
    (tmp_path / "file").write_text("2")
    assert environment._git()[1] is True
