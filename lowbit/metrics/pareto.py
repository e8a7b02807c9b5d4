"""The Pareto front: the models that no other model beats in two measures at once."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbit.errors import LowbitError


def pareto_front(cost: ArrayLike, quality: ArrayLike) -> NDArray[np.bool_]:
    """Mask of the points that no other point dominates: the Pareto front of low ``cost`` and high ``quality``.

    j dominates i if it costs no more and is at least as good, and in one of the two strictly better:
    ``cost[j] <= cost[i]``, ``quality[j] >= quality[i]``, and not both equal.

    Ties: among points of equal cost only the best stay, and among points of equal quality only the cheapest. Points
    equal in both do not dominate each other, so they stay or go together. Only the order of the numbers matters,
    neither their units nor whether an axis is logarithmic. Differences below the measurement error are not ties; round
    such values first.

    Args:
        cost: ``[n]``, lower is better; may be infinite.
        quality: ``[n]``, higher is better.

    Returns:
        bool ``[n]``: True on the front; empty if n = 0.

    Raises:
        LowbitError: not one number each for every point, or a NaN, which cannot be compared.
    """
    costs, qualities = (np.asarray(values, dtype=float) for values in (cost, quality))
    if costs.ndim != 1 or costs.shape != qualities.shape:
        raise LowbitError(
            f"cost has the shape {list(costs.shape)}, quality {list(qualities.shape)}; give one number each for every "
            "point"
        )
    for name, values in (("cost", costs), ("quality", qualities)):
        if np.isnan(values).any():
            where = np.flatnonzero(np.isnan(values)).tolist()
            raise LowbitError(f"{name} is NaN at {where}; leave out the points that were not measured, and say so")
    # [i, j]: how j compares with i. Some dozens of points, so n² comparisons that can be read as the definition.
    no_dearer, no_worse = costs <= costs[:, None], qualities >= qualities[:, None]
    better = (costs < costs[:, None]) | (qualities > qualities[:, None])
    dominated: NDArray[np.bool_] = np.any(no_dearer & no_worse & better, axis=1)
    return ~dominated
