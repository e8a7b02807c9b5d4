"""'make suite' compares with a baseline of the same parameters: a notebook that gets one more needs a new baseline."""

import pytest

from lowbit_suite.accepted import baselines
from lowbit_suite import notebooks, profiles

SELECTED = notebooks.select([])
ACCEPTED = baselines.load("smoke", "cpu").notebooks
COMPARED = [notebook for notebook in SELECTED if notebook.name in ACCEPTED]  # a new one is 'lowbit check's to name


@pytest.mark.parametrize("notebook", COMPARED, ids=lambda notebook: notebook.name)
def test_the_baseline_was_accepted_for_the_parameters_of_today(notebook):
    given = notebooks.resolve([notebook], "smoke", profiles.get("smoke"), {})[notebook.name]
    assert ACCEPTED[notebook.name].parameters == {**notebook.defaults, **given}, (
        f"lowbit run {notebook.name} --profile smoke --fresh; lowbit accept --seeds 5"
    )


def test_the_baseline_has_no_notebook_that_is_gone():
    assert set(ACCEPTED) <= {notebook.name for notebook in SELECTED}
