"""Intervals against scipy's own, verdicts against the table of the docstring, and what is refused."""

import math

import pandas
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from lowbit.errors import LowbitError
from lowbit.metrics import Effect, interval, paired_difference, summarize, verdict
from lowbit.metrics.statistics import EXPECTED, detectable, holm, p_against

numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))
seeds = st.lists(numbers, min_size=2, max_size=12)


def test_interval_worked_by_hand():
    """1 2 3 4 5: mean 3, s = sqrt(2.5), and t of 4 degrees of freedom is 2.776445 for 95 %."""
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - half, 3 + half), rel=1e-7)
    half = 2.1318468 * math.sqrt(2.5 / 5)  # t for 90 %
    assert interval([5, 1, 4, 2, 3], confidence=0.9) == pytest.approx((3, 3 - half, 3 + half), rel=1e-7)


def test_interval_of_few_or_equal_values():
    assert interval([2.0] * 5) == (2, 2, 2)
    mean, low, high = interval([2.0])
    assert mean == 2 and math.isnan(low) and math.isnan(high)


@given(seeds, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_is_scipys(values, confidence):
    assume(max(values) - min(values) > 1e-3)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    mean, low, high = interval(values, confidence)
    assert (low, high) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-9)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-9)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12), st.sampled_from([0.9, 0.95]))
def test_paired_difference_is_scipys_paired_t_interval(pairs, confidence):
    a, b = zip(*pairs, strict=True)
    differences = [x - y for x, y in pairs]
    assume(max(differences) - min(differences) > 1e-3)
    effect = paired_difference(a, b, confidence)
    expected = stats.ttest_rel(a, b).confidence_interval(confidence)
    assert (effect.low, effect.high) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-9)
    assert effect.n == len(pairs) and effect.confidence == confidence


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8), numbers)
def test_a_shift_of_both_changes_nothing_and_swapping_changes_the_sign(pairs, shift):
    a, b = zip(*pairs, strict=True)
    effect = paired_difference(a, b)
    shifted = paired_difference([x + shift for x in a], [x + shift for x in b])
    swapped = paired_difference(b, a)
    for other, sign, ends in ((shifted, 1, ("low", "high")), (swapped, -1, ("high", "low"))):
        assert other.mean == pytest.approx(sign * effect.mean, abs=1e-6)
        assert getattr(other, ends[0]) == pytest.approx(sign * effect.low, abs=1e-6)
        assert getattr(other, ends[1]) == pytest.approx(sign * effect.high, abs=1e-6)


@given(seeds, numbers)
def test_one_sided_shift_moves_the_effect(values, shift):
    effect = paired_difference([x + shift for x in values], values)
    assert effect.mean == pytest.approx(shift, abs=1e-6) and effect.high - effect.low == pytest.approx(0, abs=1e-6)


def test_pairs_go_by_seed_and_not_by_order():
    a, b = {3: 1.0, 1: 5.0, 2: 9.0}, {1: 4.0, 2: 8.0, 3: 0.0}
    assert paired_difference(a, b).mean == 1 and paired_difference(a, b).low == 1
    assert paired_difference(pandas.Series(a), pandas.Series(b)) == paired_difference(a, b)
    assert paired_difference(list(a.values()), list(b.values())).low < 0


@pytest.mark.parametrize(
    ("effect", "text"),
    [
        (Effect(0.8, -0.2, 1.8, 5), "+0.8 (95 % interval -0.2 ... +1.8, 5 seeds)"),
        (
            Effect(-0.8123, -0.8456, -0.779, 8, unit="points"),
            "-0.812 points (95 % interval -0.846 ... -0.779, 8 seeds)",
        ),
        (Effect(120.4, 80.1, 160.7, 5, 0.9), "+120 (90 % interval +80 ... +161, 5 seeds)"),
        (Effect(0.25, 0.25, 0.25, 5), "+0.25 (95 % interval +0.25 ... +0.25, 5 seeds)"),
        (Effect(0.8, math.nan, math.nan, 1, unit="points"), "+0.8 points (1 seed, no interval)"),
    ],
)
def test_an_effect_reads_well(effect, text):
    assert str(effect) == text


@pytest.mark.parametrize(
    ("low", "high", "expected", "margin", "answer"),
    [
        (0.1, 2, "positive", 0, "reproduced"),
        (-0.1, 2, "positive", 0, "inconclusive"),
        (-2, -0.1, "positive", 0, "not reproduced"),
        (0, 0, "positive", 0, "not reproduced"),  # exactly equal is not greater
        (0.1, 2, "positive", 0.5, "inconclusive"),
        (0.6, 2, "positive", 0.5, "reproduced"),
        (0.1, 0.4, "positive", 0.5, "not reproduced"),
        (-2, -0.1, "negative", 0, "reproduced"),
        (-2, 0.1, "negative", 0, "inconclusive"),
        (0.1, 2, "negative", 0, "not reproduced"),
        (-2, -0.1, "negative", 0.5, "inconclusive"),
        (-0.4, -0.1, "negative", 0.5, "not reproduced"),
        (-0.4, 3, "not worse", 0.5, "reproduced"),
        (-0.6, 3, "not worse", 0.5, "inconclusive"),
        (-0.9, -0.6, "not worse", 0.5, "not reproduced"),
        (0, 0, "not worse", 0, "reproduced"),
        (-0.4, 0.4, "equal", 0.5, "reproduced"),
        (-0.6, 0.4, "equal", 0.5, "inconclusive"),
        (-0.4, 0.6, "equal", 0.5, "inconclusive"),
        (-2, 2, "equal", 0.5, "inconclusive"),
        (0.6, 2, "equal", 0.5, "not reproduced"),
        (-2, -0.6, "equal", 0.5, "not reproduced"),
    ],
)
def test_verdicts(low, high, expected, margin, answer):
    assert verdict(Effect((low + high) / 2, low, high, 5), expected, margin) == answer
    assert verdict(Effect((low + high) / 2, low, high, 4), expected, margin) == "inconclusive"


@given(numbers, st.floats(0, 10), st.floats(0, 5))
def test_positive_and_negative_mirror_each_other(mean, half, margin):
    effect, mirrored = (Effect(m, m - half, m + half, 9) for m in (mean, -mean))
    assert verdict(effect, "positive", margin) == verdict(mirrored, "negative", margin)
    opposite = {"reproduced": "not reproduced", "not reproduced": "reproduced", "inconclusive": "inconclusive"}
    # "not better than margin" is the mirror image of "not worse": each claim is the other's negation.
    assert verdict(mirrored, "not worse", margin) == opposite[verdict(effect, "positive", margin)]


def test_one_seed_says_nothing():
    assert verdict(paired_difference([2.0], [1.0]), "positive") == "inconclusive"


def test_the_detectable_effect_by_hand():
    """1 2 3 4 5: s/√n = sqrt(0.5); t of 4 degrees of freedom is 2.776445 at 0.975 and 0.940965 at 0.8."""
    expected = (2.776445 + 0.940965) * math.sqrt(0.5)
    assert detectable(Effect(*interval([1, 2, 3, 4, 5]), n=5)) == pytest.approx(expected, rel=1e-6)
    wide = Effect(*interval([1, 2, 3, 4, 5], 0.99), n=5, confidence=0.99)
    assert detectable(wide) == pytest.approx(expected, rel=1e-6)  # the design's, whatever interval is drawn
    assert detectable(Effect(*interval([2.0] * 5), n=5)) == 0
    assert math.isnan(detectable(paired_difference([2.0], [1.0])))


def test_the_p_value_against_a_claim_is_that_of_a_t_test():
    values = [-1.5, -0.2, -2.0, 0.1, -0.9, -1.1]
    effect = Effect(*interval(values), n=6)
    assert p_against(effect, "positive") == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert p_against(effect, "not worse", 0.25) == pytest.approx(stats.ttest_1samp(values, -0.25).pvalue)
    assert p_against(effect, "equal", 0.25) == pytest.approx(stats.ttest_1samp(values, -0.25).pvalue)
    assert p_against(effect, "negative") == 1  # the mean lies on the claim's side


@given(seeds, st.sampled_from(EXPECTED), st.floats(0.01, 5))
def test_the_p_value_agrees_with_the_verdict(values, expected, margin):
    assume(len(values) >= 5 and max(values) - min(values) > 1e-3)
    effect = Effect(*interval(values), n=len(values))
    p = p_against(effect, expected, margin)
    assume(abs(p - 0.05) > 1e-9)
    assert (p < 0.05) == (verdict(effect, expected, margin) == "not reproduced")


@pytest.mark.parametrize(
    ("value", "expected", "p"), [(0.0, "positive", 0), (0.0, "not worse", 1), (-1.0, "not worse", 0)]
)
def test_the_p_value_of_equal_differences(value, expected, p):
    effect = Effect(*interval([value] * 5), n=5)
    assert p_against(effect, expected) == p
    assert (p == 0) == (verdict(effect, expected) == "not reproduced")


@pytest.mark.parametrize(
    ("p_values", "rejected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [True, False, False, True]),  # against 0.05/4, /3, then 0.03 > 0.05/2
        ([0.02, 0.01, 0.024], [True, True, True]),  # 0.01 <= 0.05/3, 0.02 <= 0.05/2, 0.024 <= 0.05: Bonferroni has one
        ([0.02, 0.03, 0.04], [False, False, False]),
        ([0.05], [True]),
        ([], []),
    ],
)
def test_holms_test_by_hand(p_values, rejected):
    assert holm(p_values) == rejected


def runs():
    return pandas.DataFrame(
        {
            "method": ["b", "a", "b", "a", "b", "c"],
            "bits": [2, 2, 2, 2, 2, 3],
            "seed": [0, 0, 1, 1, 2, 0],
            "accuracy": [0.5, 0.7, 0.6, 0.9, 0.7, 0.1],
        }
    )


def test_summary_of_groups():
    frame = summarize(runs(), by=["method", "bits"])
    assert frame.columns.tolist() == ["method", "bits", "mean", "low", "high", "seeds"]
    assert frame[["method", "bits", "seeds"]].to_numpy().tolist() == [["b", 2, 3], ["a", 2, 2], ["c", 3, 1]]
    assert frame["mean"].tolist() == pytest.approx([0.6, 0.8, 0.1])
    assert (frame.low[0], frame.high[0]) == pytest.approx(interval([0.5, 0.6, 0.7])[1:])
    assert math.isnan(frame.low[2])
    assert summarize(runs(), by="method").method.tolist() == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval([1, math.nan]), "not finite"),
        (lambda: interval([1, math.inf]), "not finite"),
        (lambda: interval([]), "one number per seed"),
        (lambda: interval([[1, 2]]), "one number per seed"),
        (lambda: interval([1, 2], confidence=95), "confidence=95"),
        (lambda: paired_difference([1, 2], [1]), "2 values, b has 1"),
        (lambda: paired_difference({1: 1.0}, {2: 1.0}), r"\[1\].*\[2\].*same seeds"),
        (lambda: paired_difference(pandas.Series([1.0, 2.0], [0, 0]), {0: 1.0}), "same seeds"),
        (lambda: paired_difference({1: 1.0}, [1.0]), "not alike"),
        (lambda: paired_difference([1, math.nan], [1, 2]), "not finite"),
        (lambda: Effect(math.nan, 0, 1, 5), "nan"),
        (lambda: Effect(0, math.nan, math.nan, 5), "nan"),
        (lambda: Effect(2, 0, 1, 5), "no effect"),
        (lambda: verdict(Effect(0, -1, 1, 5), "better"), "expected='better'.*'positive'"),
        (lambda: p_against(Effect(0, -1, 1, 5), "better"), "expected='better'.*'positive'"),
        (lambda: verdict(Effect(0, -1, 1, 5), "equal"), "margin=0.0.*above 0"),
        (lambda: verdict(Effect(0, -1, 1, 5), "positive", -1), "margin=-1"),
        (lambda: verdict(Effect(0, -1, 1, 5), "positive", math.nan), "margin=nan"),
        (lambda: summarize(runs(), by="width"), "width.*method"),
        (lambda: summarize(runs(), by="method", value="loss"), "loss"),
        (lambda: summarize(runs().assign(accuracy=math.nan), by="method"), "not finite"),
        (lambda: summarize(runs().assign(seed=0), by="method"), "seed twice"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(LowbitError, match=message):
        call()


def test_an_interval_of_rounding_error_does_not_ask_for_sixteen_decimals():
    effect = paired_difference([50.0 - 1 / 9, 60.0 - 1 / 9], [50.0, 60.0], unit="points")
    assert str(effect).startswith("-0.111 points")
