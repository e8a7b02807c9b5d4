"""Conclusions from a handful of seeds: intervals, paired effects and verdicts.

Means of n seeds with Student's t interval, n-1 degrees of freedom: mean ± t·s/√n. This assumes that seeds
are independent and their scatter is about normal.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from lowbit.errors import LowbitError
from lowbit.extras import extra

if TYPE_CHECKING:
    import pandas

LEAST_SEEDS = 5
"""Fewer seeds never decide a claim."""

Expected = Literal["positive", "negative", "not worse", "equal"]
EXPECTED: tuple[Expected, ...] = ("positive", "negative", "not worse", "equal")


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and confidence interval ``(mean, low, high)`` over seeds; one value alone has the interval (NaN, NaN).

    Args:
        values: one number per seed.
        confidence: coverage, between 0 and 1.

    Raises:
        LowbitError: no value, one that is not finite, or a confidence out of range.
    """
    with extra("train", "a confidence interval"):
        from scipy import stats

    if not 0 < confidence < 1:
        raise LowbitError(f"confidence={confidence!r} is not allowed; numbers between 0 and 1 are, e.g. 0.95")
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise LowbitError(f"values of shape {list(array.shape)} are not allowed; give one number per seed")
    if not np.isfinite(array).all():
        raise LowbitError(
            f"{values!r} has a value that is not finite; repair that run, or leave its seed out and say so"
        )
    mean = float(array.mean())
    if len(array) == 1:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + confidence) / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Effect:
    """A measured difference with its interval: ``+0.8 points (95 % interval -0.2 ... +1.8, 5 seeds)``.

    Attributes:
        mean: the estimate, in ``unit``.
        low, high: its confidence interval; NaN for one seed.
        n: seeds, or pairs of seeds.
        confidence: coverage of the interval.
        unit: what is counted, e.g. "points"; may be empty.
        of: name of the things that ``n`` counts, "seeds" by default.
    """

    mean: float
    low: float
    high: float
    n: int
    confidence: float = 0.95
    unit: str = ""
    of: str = "seeds"

    def __post_init__(self) -> None:
        if not (self.n == 1 and math.isfinite(self.mean)) and not self.low <= self.mean <= self.high:
            raise LowbitError(
                f"the mean {self.mean} with the interval {self.low} ... {self.high} is no effect; it has to lie inside"
            )

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        # Two significant digits of the uncertainty determine how many decimals are meaningful.
        # An interval as narrow as rounding error, from equal differences, does not determine them.
        wide = half > 1e-9 * max(1, abs(self.mean))
        decimals = max(0, 1 - math.floor(math.log10(half))) if wide else None
        mean, low, high = (
            f"{value:+.3g}" if decimals is None else f"{value:+.{decimals}f}"
            for value in (self.mean, self.low, self.high)
        )
        unit = f" {self.unit}" if self.unit else ""
        if self.n == 1:
            return f"{mean}{unit} (1 seed, no interval)"
        return f"{mean}{unit} ({100 * self.confidence:g} % interval {low} ... {high}, {self.n} {self.of})"


@runtime_checkable
class Keyed(Protocol):
    """Numbers by seed: a mapping, or a pandas Series."""

    def keys(self) -> Iterable[Any]:
        """The seeds."""

    def __getitem__(self, seed: Any, /) -> float: ...


Scores = Sequence[float] | Keyed


def paired_difference(a: Scores, b: Scores, confidence: float = 0.95, unit: str = "", of: str = "seeds") -> Effect:
    """The mean of ``a - b`` over seeds that both have: the paired t interval, as in ``scipy.stats.ttest_rel``.

    A pair shares a seed, thus data order and initialization, whose scatter cancels.

    Args:
        a, b: one number per seed: two sequences in the same order of seeds, or two mappings (or pandas Series) from
            seed to number, in any order.
        confidence: coverage of the interval.
        unit: unit of the numbers, e.g. "points".
        of: name of the paired things, if they are not seeds.

    Raises:
        LowbitError: different seeds, no seed, or a number that is not finite.
    """
    if isinstance(a, Keyed) and isinstance(b, Keyed):
        seeds = list(a.keys())
        if len(set(seeds)) != len(seeds) or sorted(map(str, seeds)) != sorted(map(str, b.keys())):
            raise LowbitError(f"a has the seeds {seeds}, b {list(b.keys())}: a pair needs the same seeds, each once")
        a, b = [a[seed] for seed in seeds], [b[seed] for seed in seeds]
    elif isinstance(a, Keyed) or isinstance(b, Keyed):
        raise LowbitError("a and b are not alike: give two sequences, or two mappings from seed to number")
    if len(a) != len(b):
        raise LowbitError(f"a has {len(a)} values, b has {len(b)}: a pair needs one of each for every seed")
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return Effect(*interval(differences, confidence), n=len(differences), confidence=confidence, unit=unit, of=of)


def verdict(
    effect: Effect, expected: Expected, margin: float = 0.0
) -> Literal["reproduced", "not reproduced", "inconclusive"]:
    """Judge a claim by the whole interval of ``effect``; fewer than 5 seeds are inconclusive.

    ============  ========================  ======================  ==========================================
    expected      the claim                 reproduced              not reproduced
    ============  ========================  ======================  ==========================================
    "positive"    effect > margin           low > margin            high <= margin
    "negative"    effect < -margin          high < -margin          low >= -margin
    "not worse"   effect >= -margin         low >= -margin          high < -margin
    "equal"       \\|effect\\| <= margin      both bounds within it   the interval lies outside, on either side
    ============  ========================  ======================  ==========================================

    Everything else is inconclusive. "equal" is the equivalence test by two one-sided tests, each at half of the error
    that ``confidence`` leaves.

    Args:
        effect: a mean difference with its interval, as `paired_difference` returns it.
        expected: kind of the claim, from the table. If lower is better, swap the two sides of the difference for "not
            worse".
        margin: in the effect's unit, at least 0; above 0 for "equal".

    Raises:
        LowbitError: an unknown kind of claim, or a margin that its kind does not allow.
    """
    _check_expected(expected)
    if not (math.isfinite(margin) and margin >= 0) or (expected == "equal" and margin == 0):
        least = "above 0 (measured values never agree exactly)" if expected == "equal" else "from 0"
        raise LowbitError(f"margin={margin!r} is not allowed for expected={expected!r}; numbers {least} are")
    if effect.n < LEAST_SEEDS:
        return "inconclusive"
    low, high = effect.low, effect.high
    holds, fails = {
        "positive": (low > margin, high <= margin),
        "negative": (high < -margin, low >= -margin),
        "not worse": (low >= -margin, high < -margin),
        "equal": (-margin <= low and high <= margin, low > margin or high < -margin),
    }[expected]
    return "reproduced" if holds else "not reproduced" if fails else "inconclusive"


def _check_expected(expected: Expected) -> None:
    if expected not in EXPECTED:
        raise LowbitError(f"expected={expected!r} is not allowed; {', '.join(map(repr, EXPECTED))} are")


def standard_error(effect: Effect) -> float:
    """The standard error of the mean behind an interval: half its width over Student's quantile; NaN for one seed."""
    with extra("train", "a standard error"):
        from scipy import stats

    if effect.n == 1:
        return math.nan
    return (effect.high - effect.low) / 2 / float(stats.t.ppf((1 + effect.confidence) / 2, effect.n - 1))


def detectable(effect: Effect, power: float = 0.8, error: float = 0.05) -> float:
    """The smallest true effect that the design behind ``effect`` detects with probability ``power``.

    (t at 1 - error/2 + t at power) · s/√n with n - 1 degrees of freedom, in the effect's unit; NaN for one seed. The
    usual approximation, which takes the observed scatter s of the differences for the true scatter.

    Args:
        effect: a mean difference; only its scatter and n matter.
        power: the desired probability of detection.
        error: significance level of the two-sided test.
    """
    with extra("train", "a test over seeds"):
        from scipy import stats

    if effect.n == 1:
        return math.nan
    quantiles = stats.t.ppf([1 - error / 2, power], effect.n - 1)
    return float(quantiles.sum()) * standard_error(effect)


def p_against(effect: Effect, expected: Expected, margin: float = 0.0) -> float:
    """The p-value against a claim: the smallest error at which the interval speaks against it, as in `verdict`.

    With at least 5 seeds, `verdict` is "not reproduced" exactly if the p-value is at most 1 - ``effect.confidence``.

    Args:
        effect: a mean difference of at least two seeds, as `paired_difference` returns it.
        expected: kind of the claim: "positive", "negative", "not worse" or "equal".
        margin: in the effect's unit, as for `verdict`.

    Returns:
        A number from 0 to 1; 1 where the mean itself lies on the claim's side.

    Raises:
        LowbitError: an unknown kind of claim.
    """
    _check_expected(expected)
    with extra("train", "a test over seeds"):
        from scipy import stats

    mean, error = effect.mean, standard_error(effect)
    beyond = {  # how far the mean lies on the other side of the claim's boundary
        "positive": margin - mean,
        "negative": margin + mean,
        "not worse": -margin - mean,
        "equal": abs(mean) - margin,
    }[expected]
    if error > 0:
        return min(1.0, 2 * float(stats.t.sf(beyond / error, effect.n - 1)))
    strict = expected in ("not worse", "equal")  # there the boundary itself belongs to the claim
    return 0.0 if beyond > 0 or (beyond == 0 and not strict) else 1.0


def holm(p_values: Sequence[float], error: float = 0.05) -> list[bool]:
    """Holm's step-down test of several hypotheses: True for each one that is rejected.

    The smallest of m p-values is compared with error/m, the next with error/(m - 1), and so on; the first that is
    larger ends the test (Holm, 1979, "A simple sequentially rejective multiple test procedure"). The probability of any
    false rejection is at most ``error``.
    """
    rejected = [False] * len(p_values)
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > error / (len(p_values) - place):
            break
        rejected[index] = True
    return rejected


def summarize(
    frame: "pandas.DataFrame",
    by: str | Sequence[str],
    value: str = "accuracy",
    confidence: float = 0.95,
    seed: str = "seed",
) -> "pandas.DataFrame":
    """Mean and interval of ``value`` for each group of runs: the columns ``by``, mean, low, high, seeds.

    Args:
        frame: one row per run.
        by: the column(s) that define a group; groups keep the order of the frame.
        value: the column to average.
        confidence: coverage of the interval.
        seed: the column that names the seed, if there is one; no group may have a seed twice, since a repeated run
            would narrow the interval without adding information.

    Raises:
        LowbitError: a missing column, a value that is not finite, or a seed that occurs twice.
    """
    with extra("train", "a summary over seeds"):
        import pandas

    by = [by] if isinstance(by, str) else list(by)
    missing = [column for column in (*by, value) if column not in frame.columns]
    if missing or not by:
        raise LowbitError(f"there is no column {missing or by}; the frame has {list(frame.columns)}")
    rows = []
    for key, group in frame.groupby(by, sort=False, dropna=False):
        if seed in frame.columns and group[seed].duplicated().any():
            raise LowbitError(f"the group {dict(zip(by, key, strict=True))} has a seed twice: {group[seed].tolist()}")
        rows.append((*key, *interval(group[value].tolist(), confidence), len(group)))
    return pandas.DataFrame(rows, columns=[*by, "mean", "low", "high", "seeds"])
