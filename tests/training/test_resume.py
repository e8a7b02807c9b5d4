import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


def run(out, step):
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(out), str(step)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run(whole, -1)
    assert done.returncode == 0, done.stderr
    killed = run(cut, 12)  # 5 steps an epoch: the third step of epoch 3
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (cut / "final.pt").exists()
    assert torch.load(cut / "checkpoint.pt", weights_only=True)["epoch"] == 2
    done = run(cut, -1)
    assert done.returncode == 0, done.stderr
    expected, got = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, cut))
    assert expected["loss"] == got["loss"]
    assert expected["model"].keys() == got["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(value, got["model"][name]), name
    assert (whole / "history.jsonl").read_text().count("\n") == (cut / "history.jsonl").read_text().count("\n") == 4
