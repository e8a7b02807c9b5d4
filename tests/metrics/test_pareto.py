"""The Pareto front against its definition, point by point, and against what must not change it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.metrics import pareto_front

# Few different values, so that ties in one and in both measures are frequent.
few = st.integers(-3, 3).map(float)
anything = st.floats(allow_nan=False)
clouds = st.one_of(st.lists(st.tuples(few, few), max_size=12), st.lists(st.tuples(anything, anything), max_size=12))


def front(points):
    cost, quality = zip(*points, strict=True) if points else ((), ())
    return pareto_front(cost, quality).tolist()


def dominates(a, b):
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def test_five_points_worked_by_hand():
    """A loses to B (as small, better), D to C (smaller, as good); B, C and E are each beaten in one measure only."""
    assert front([(40, 60), (40, 64), (55, 66), (70, 66), (320, 71)]) == [False, True, True, False, True]


def test_points_equal_in_both_stay_or_go_together():
    assert front([(1, 5), (1, 5), (2, 5)]) == [True, True, False]
    assert front([(1, 5), (2, 4), (2, 4)]) == [True, False, False]


def test_infinities_are_numbers_and_no_points_are_no_front():
    assert front([(math.inf, 1), (1, 0), (math.inf, 0), (0, -math.inf)]) == [True, True, False, True]
    assert front([]) == []


@given(clouds)
def test_it_is_the_definition(points):
    kept = [p for p, stays in zip(points, front(points), strict=True) if stays]
    dropped = [p for p, stays in zip(points, front(points), strict=True) if not stays]
    assert not any(dominates(a, b) for a in points for b in kept)
    # By a kept one: whoever loses, loses to something that can be chosen.
    assert all(any(dominates(a, b) for a in kept) for b in dropped)
    assert bool(kept) == bool(points)


@given(clouds, st.randoms(use_true_random=False))
def test_order_of_the_points_is_no_matter(points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    expected = front(points)
    assert front([points[i] for i in order]) == [expected[i] for i in order]


@given(clouds, st.lists(anything, min_size=24, max_size=24, unique=True))
def test_only_the_order_of_the_values_matters(points, others):
    """Any strictly increasing change of either measure: its values, by rank, become other ascending ones."""
    costs, qualities = (sorted({p[k] for p in points}) for k in (0, 1))
    new = sorted(others)
    changed = [(new[costs.index(c)], new[qualities.index(q)]) for c, q in points]
    assert front(changed) == front(points)


@given(clouds)
def test_a_point_that_is_dominated_changes_nothing_and_one_that_dominates_all_is_alone(points):
    finite = [p for p in points if all(map(math.isfinite, p))]
    kept = front(finite)
    if True in kept:
        cost, quality = finite[kept.index(True)]
        worse = (np.nextafter(cost, math.inf), quality)
        assert front([*finite, worse]) == [*kept, False]
    assert front([*finite, (-math.inf, math.inf)]) == [*([False] * len(finite)), True]


@pytest.mark.parametrize(
    ("cost", "quality", "complaint"),
    [
        ([1, math.nan], [1, 2], r"cost is NaN at \[1\]"),
        ([1, 2], [math.nan, 2], r"quality is NaN at \[0\]"),
        ([1, 2], [1], r"cost has the shape \[2\], quality \[1\]"),
        ([[1, 2]], [[1, 2]], r"one number each"),
        (1.0, 2.0, "one number each"),
    ],
)
def test_what_has_no_front_is_refused(cost, quality, complaint):
    with pytest.raises(LowbitError, match=complaint):
        pareto_front(cost, quality)


def test_it_takes_columns_of_a_table():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"bytes": [3, 1, 2], "right": [5.0, 1.0, 1.0]}, index=[7, 8, 9])
    assert frame[pareto_front(frame["bytes"], frame.right)].index.tolist() == [7, 8]
