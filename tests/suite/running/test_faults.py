"""Really does every fault of the table, through the command, and reads what the suite says about it."""

import re

import pytest
from fault_table import NOTEBOOKS, SCENARIOS, CannotBeDone, right, run_notebooks

from lowbit import paths

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("group", NOTEBOOKS)
def test_notebooks_that_must_not_pass(group, tmp_path):
    seen = run_notebooks(NOTEBOOKS[group], tmp_path / "project")
    assert [(fault, what) for fault, what in zip(NOTEBOOKS[group], seen, strict=True) if not right(fault, what)] == []


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda function: function.__name__)
def test_faults_around_them(scenario, tmp_path):
    try:
        seen = scenario(tmp_path / "project")
    except CannotBeDone as error:
        pytest.skip(str(error))
    faults = SCENARIOS[scenario]
    assert [(fault, what) for fault, what in zip(faults, seen, strict=True) if not right(fault, what)] == []


def test_the_committed_table_shows_these_faults_and_outcomes():
    rows = re.findall(
        r"^\| (.+?) \| (.*?) \| .* \| (-?\d+) \|$", (paths.project() / "results/faults.md").read_text(), re.M
    )
    faults = [fault for group in (*NOTEBOOKS.values(), *SCENARIOS.values()) for fault in group]
    assert rows == [(fault.done, fault.status.replace("_", " "), str(fault.code)) for fault in faults]
