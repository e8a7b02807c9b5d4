"""A notebook asked for less than it compares by default (one method, one width) still runs to its end."""

import json
import os
import subprocess
import sys

import pytest

from lowbit import paths

ASKED = {
    "02_zero_free_shifting": {"methods": ["denseshift"], "bits_tried": [3], "epochs": 1, "train_size": 64},
    "03_weight_freezing": {"methods": ["denseshift"], "decays": [], "epochs": 2, "train_size": 64},
    "04_sign_scale_decomposition": {"methods": ["full precision", "nested sqrt"], "bits": 2, "epochs": 1, "train_size": 64},
    "08_shift_networks_compared": {"methods": ["lsq"], "bits_tried": [4], "epochs": 1, "train_size": 64},
    "17_what_a_bit_costs": {"methods": ["lsq"], "bits_tried": [3], "epochs": 1, "train_size": 64, "repeats": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("stem", ASKED)
def test_a_part_of_the_comparison_runs(stem, tmp_path):
    asked = [word for name, value in ASKED[stem].items() for word in ("-p", f"{name}={json.dumps(value)}")]
    command = [sys.executable, "-m", "lowbit", "run", stem, "--profile", "smoke", "--out", str(tmp_path), *asked]
    ran = subprocess.run(command, cwd=paths.project(), env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True)
    (notebook,) = json.loads((tmp_path / "run.json").read_text())["notebooks"]
    assert (ran.returncode, notebook["status"]) == (0, "passed"), ran.stdout[-3000:] + ran.stderr[-1000:]
