import pytest

from lowbit_suite.accepted.repeats import further


@pytest.mark.parametrize(
    ("parameters", "step", "expected"),
    [
        ({"seed": 3}, 2, {"seed": 5}),
        ({"seeds": [0]}, 1, {"seeds": [1]}),
        ({"seeds": [0, 1, 2]}, 2, {"seeds": [6, 7, 8]}),
        ({"seeds": [5, 2]}, 1, {"seeds": [9, 6]}),
        ({"seeds": []}, 1, {}),
        ({"seeds": ["a"]}, 1, {}),
        ({"seed": True}, 1, {}),
        ({"epochs": 3}, 1, {}),
    ],
)
def test_further_seeds_are_new_ones(parameters, step, expected):
    assert further(parameters, step) == expected
