"""The cells that check a reader's answers: right ones pass, wrong ones do not, missing ones are asked for."""

import nbformat
import numpy as np
import pytest
import torch

import lowbit.functional as F
from lowbit import paths


def checking_cell(notebook: str) -> str:
    cells = nbformat.read(paths.notebooks() / f"{notebook}.ipynb", as_version=4).cells
    return next(c.source for c in reversed(cells) if c.cell_type == "code" and "both right" in c.source)


def power(x):
    low = 2.0 ** np.floor(np.log2(x))
    return low if x - low <= 2 * low - x else 2 * low


RIGHT = {
    "00_start_here": {"values": lambda b: 2**b, "largest_level": lambda b: (2**b - 1) / 2**b},
    "01_quantisation_basics": {"nearest_power": power, "lsq_thresholds": [-1.5, -0.5, 0.5]},
}
WRONG = [
    ("00_start_here", {"values": lambda b: 2 * b}),
    ("00_start_here", {"largest_level": lambda b: 1.0}),
    ("01_quantisation_basics", {"nearest_power": lambda x: 2.0 ** np.round(np.log2(x))}),
    ("01_quantisation_basics", {"lsq_thresholds": [-0.5, 0.5, 1.5]}),
    ("01_quantisation_basics", {"lsq_thresholds": [-0.5, 0.5]}),
]


def run(notebook, answers):
    exec(checking_cell(notebook), {"np": np, "torch": torch, "F": F, **answers})


@pytest.mark.parametrize("notebook", RIGHT)
def test_right_answers_pass(notebook, capsys):
    run(notebook, RIGHT[notebook])
    assert capsys.readouterr().out == "both right\n"


@pytest.mark.parametrize(("notebook", "wrong"), WRONG)
def test_wrong_answers_do_not(notebook, wrong):
    with pytest.raises(AssertionError, match="not yet"):
        run(notebook, RIGHT[notebook] | wrong)


@pytest.mark.parametrize("notebook", RIGHT)
def test_missing_answers_are_asked_for(notebook, capsys):
    name = next(iter(RIGHT[notebook]))
    run(notebook, RIGHT[notebook] | {name: lambda _: ...})
    assert "write your answers" in capsys.readouterr().out
