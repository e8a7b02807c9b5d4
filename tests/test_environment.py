import json
import platform
import subprocess

import pytest
import torch

from lowbit import environment


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
    assert str(environment.paths.project()) not in text


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


def test_a_missing_package_is_told_with_what_to_do(monkeypatch):
    real = environment.version
    monkeypatch.setattr(environment, "version", lambda name: None if name == "timm" else real(name))
    (finding,) = [item for item in environment.examine() if item.what == "timm"]
    assert (finding.state, finding.found) == ("missing", "not installed")
    assert finding.advice.startswith("pip install 'timm")


def test_an_unmatched_version_is_told(monkeypatch):
    real = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "0.19.0" if name == "torchvision" else real(name))
    (finding,) = [item for item in environment.examine() if item.what == "torchvision"]
    assert finding.state == "missing"
    assert "matched set" in finding.advice


def kernels_line():
    (found,) = (finding for finding in environment.examine() if finding.what == "compiled kernels")
    return found


@pytest.mark.parametrize(
    "name, value, state",
    [("LOWBIT_NATIVE", "0", "note"), ("LOWBIT_ISA", "mmx", "missing")],
)
def test_what_is_wrong_with_the_kernels_is_said(monkeypatch, name, value, state):
    from lowbit.kernels import native

    if name == "LOWBIT_ISA" and not native.available():
        pytest.skip("there are no compiled kernels here")
    monkeypatch.setenv(name, value)
    native._load.cache_clear()
    try:
        found = kernels_line()
        assert found.state == state and name in found.found + found.advice
    finally:
        native._load.cache_clear()
