"""Writes golden values for the explorables' JavaScript, from `lowbit.functional`: run this file.

Each case is the arguments of a function of ``maths.js`` and what it has to return.
"""

import itertools
import json
from pathlib import Path

from lowbit_suite.explorables import reference

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 120
DENSESHIFT = [
    ([-0.7, -0.4, 0.3, 0.6], 1.0),  # the weight that notebook 04 works out by hand
    ([0.4, 0.5, 0.2, 0.1], -1.5),
    ([0.1, 0.2, 0.7, -0.3], 0.5),
    ([0.0, 0.0], 2.0),
    ([-0.2, 0.3], 1.0),
    ([0.6, 0.1, -0.2, 0.3, -0.4, 0.5, 0.6, 0.7], 1.0),
    ([-0.6, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], -0.3),
]


def cases() -> dict[str, list[dict]]:
    """The golden values: function's name to a list of ``{"given": arguments, "expected": result}``."""
    denseshift = [
        {"given": [t[0], t[1:], g, surrogate], "expected": reference.denseshift(t, g, surrogate)}
        for t, g in DENSESHIFT
        for surrogate in ("sqrt", "identity")
    ]
    rows = [
        [optimum, rate, learned, STEPS]
        for optimum in (0.3, 0.5, 1.3)
        for rate in (0.1, 0.03)
        for learned in (False, True)
    ]
    trained = [{"given": given, "expected": reference.train(*given)} for given in rows]
    codes = [case["expected"]["codes"] for case in trained] + [[0, 1, 1, 2, 1, 1, 0, 1]]
    turns = [
        {"given": given, "expected": reference.query_key(*given)}
        for given in itertools.product((-90, -31.5, -0.5, 0, 2, 45, 77), (2, 3, 4), (False, True))
    ]
    return {
        "denseshift": denseshift,
        "train": trained,
        "reversals": [{"given": [given], "expected": reference.reversals(given)} for given in codes],
        "queryKey": turns,
    }


if __name__ == "__main__":
    lines = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in found) + "\n]"
        for name, found in cases().items()
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
