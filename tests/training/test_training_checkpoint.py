import os

import pytest
import torch
from torch import nn

from lowbit.errors import CheckpointError
from lowbit.training import checkpoint, train


@pytest.fixture
def saved(few, mlp, quick, tmp_path):
    train(mlp(), few, quick(out=str(tmp_path)), device="cpu")
    return tmp_path / "checkpoint.pt"


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, -1])
def test_truncated_files_are_refused(saved, keep, few, mlp, quick):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt .*start afresh"):
        train(mlp(), few, quick(out=str(saved.parent)), device="cpu")


def test_an_altered_tensor_is_refused(saved):
    contents = bytearray(saved.read_bytes())
    weight = torch.load(saved, weights_only=True)["model"]["1.weight"].numpy().tobytes()
    place = bytes(contents).index(weight)
    contents[place + 5] ^= 1
    saved.write_bytes(contents)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(saved)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("this is no checkpoint")
    with pytest.raises(CheckpointError, match=r"no checkpoint \(File is not a zip file\)"):
        checkpoint.load(path)
    torch.save({"model": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not written by lowbit"):
        checkpoint.load(path)


def test_another_model_is_refused_with_the_first_two_differences(tmp_path):
    state = nn.Linear(2, 3).state_dict()
    with pytest.raises(CheckpointError, match=r"another model \(size mismatch for weight.*size mismatch for bias"):
        checkpoint.load_model(nn.Linear(2, 4), state, tmp_path)


def test_newer_schemas_are_refused(saved):
    contents = checkpoint.load(saved)
    torch.save({**contents, "schema": 99}, saved)
    with pytest.raises(CheckpointError, match="schema 99"):
        checkpoint.load(saved)


class Dangerous:
    def __reduce__(self):
        return os.system, ("exit 3",)


def test_code_in_a_checkpoint_is_not_run(saved, monkeypatch):
    contents = checkpoint.load(saved)
    torch.save({**contents, "history": [Dangerous()]}, saved)
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("it ran"))
    with pytest.raises(CheckpointError):
        checkpoint.load(saved)


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    contents = {k: v for k, v in checkpoint.load(saved).items() if k not in ("kind", "schema")}

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(saved, **contents)
    assert saved.read_bytes() == before
