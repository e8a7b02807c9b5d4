"""`choose_rates`: the same trials for every arm, on validation, with seeds of their own; the rule, worked by hand."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import DivergedError, LowbitError
from lowbit_suite import best_rates, choose_rates

VALUE = "accuracy, %"
BEST = {"a": 1.0, "b": 0.3, "c": 3.0}


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CONTEXT", json.dumps({"tables": str(tmp_path)}))
    return tmp_path


def run(method, seed, lr_factor=1.0, validation=False):
    assert validation and seed == 1000
    return {VALUE: 50 - abs(np.log(lr_factor / BEST[method])), "lr": 0.1 * lr_factor}


ARMS = [{"method": method} for method in BEST]


def trials(table, seeds=1):
    rows = [
        {"method": method, "lr_factor": factor, "seed": seed, VALUE: value[seed] if seeds > 1 else value}
        for method, values in table.items()
        for factor, value in values.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def chosen(rates):
    return dict(rates[rates.chosen][["method", "lr_factor"]].drop_duplicates().itertuples(index=False, name=None))


def test_each_arm_gets_its_best_rate_and_one_at_the_edge_is_flagged(tables):
    arms, rates = choose_rates(run, ARMS, [3.0, 0.3, 1.0], [0, 1], "02_learning_rates", workers=1, epochs=5)
    assert arms == [{"method": method, "lr_factor": factor} for method, factor in BEST.items()]
    assert chosen(rates) == BEST and len(rates) == 9
    assert rates[rates.chosen].at_edge.tolist() == [False, True, True] and rates.at_edge.sum() == 2
    assert rates[rates.method == "b"].lr.tolist() == pytest.approx([0.3, 0.03, 0.1])
    kept = pd.read_csv(tables / "02_learning_rates.csv")
    assert kept.columns.tolist() == ["method", "lr_factor", "seed", VALUE, "lr", "chosen", "at_edge"]
    assert kept.chosen.tolist() == rates.chosen.tolist()
    card = json.loads((tables / "02_learning_rates.json").read_text())["settings"]
    assert card == {"lr_factors": [3.0, 0.3, 1.0], "trial_seeds": [1000], "judged_seeds": [0, 1], "epochs": 5}


def test_one_rate_is_taken_without_a_run(tables):
    def never(**_):
        raise AssertionError

    arms, rates = choose_rates(never, ARMS, [1.0], [0], "none")
    assert arms == [{"method": method, "lr_factor": 1.0} for method in BEST]
    assert chosen(rates) == dict.fromkeys(BEST, 1.0) and not rates.at_edge.any() and rates[VALUE].isna().all()
    assert not list(tables.iterdir())


def test_arms_may_have_different_settings():
    def two(method, seed, lr_factor, validation, bits=32):
        return {VALUE: lr_factor if bits == 2 else -lr_factor}

    arms, _ = choose_rates(two, [{"method": "a"}, {"method": "a", "bits": 2}], [0.3, 1.0], [0], "t", workers=1)
    assert [arm["lr_factor"] for arm in arms] == [0.3, 1.0]


def test_a_rate_that_diverges_is_tried_and_not_chosen():
    def diverges(method, seed, lr_factor, validation):
        if lr_factor > 0.5:
            raise DivergedError("the loss became nan")
        return {VALUE: 10.0}

    arms, rates = choose_rates(diverges, ARMS, [0.3, 1.0], [0], "t", workers=1)
    assert {arm["lr_factor"] for arm in arms} == {0.3}
    assert rates[VALUE].isna().tolist() == [False, True] * 3


def test_trials_are_kept_if_no_rate_works(tables):
    def diverges(method, seed, lr_factor, validation):
        if method == "c":
            raise DivergedError("the loss became nan")
        return {VALUE: 10.0}

    with pytest.raises(LowbitError, match="every rate failed for the arm method='c'"):
        choose_rates(diverges, ARMS, [0.3, 1.0], [0], "t", workers=1)
    assert len(pd.read_csv(tables / "t.csv")) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": []}, r"factors=\[\]"),
        ({"factors": [1.0, 0.0]}, r"0\.0\] are not allowed"),
        ({"factors": [1.0, float("nan")]}, "not allowed"),
        ({"factors": [1.0, 1.0]}, "give each once"),
        ({"judged": [0, 1000]}, "seed 1000 is also judged"),
        ({"seeds": (3, 4), "judged": [4]}, "seed 4 is also judged"),
        ({"arms": []}, "nothing to run"),
        ({"value": "loss"}, "has to return one mapping with 'loss'"),
    ],
)
def test_what_would_not_be_fair_is_refused(changes, message):
    given = {"arms": ARMS, "factors": [0.3, 1.0], "judged": [0], "name": "t", "workers": 1} | changes
    with pytest.raises(LowbitError, match=message):
        choose_rates(run, **given)


def test_an_ordinary_failure_is_not_a_rate_that_does_not_work():
    def fails(**_):
        raise LowbitError("no such data set")

    with pytest.raises(LowbitError, match=r"lr_factor=0\.3, seed=1000 failed: LowbitError: no such data set"):
        choose_rates(fails, ARMS, [0.3, 1.0], [0], "t", workers=1)


def test_of_equal_rates_the_smaller_is_chosen_whatever_the_order():
    rates = best_rates(trials({"a": {3.0: 70.0, 1.0: 70.0, 0.3: 60.0}}), ["method"])
    assert chosen(rates) == {"a": 1.0} and not rates.at_edge.any()


def test_means_over_seeds_are_compared_and_a_failed_seed_rules_a_rate_out():
    table = {"a": {0.3: (60, 62), 1.0: (70, 50), 3.0: (99, np.nan)}}  # means 61, 60, none
    rates = best_rates(trials(table, seeds=2), ["method"])
    assert chosen(rates) == {"a": 0.3} and rates.chosen.tolist() == rates.at_edge.tolist() == [True] * 2 + [False] * 4


def test_the_largest_rate_that_works_is_not_at_the_edge_if_a_larger_one_failed():
    rates = best_rates(trials({"a": {0.3: 60.0, 1.0: 70.0, 3.0: np.nan}}), ["method"])
    assert chosen(rates) == {"a": 1.0} and not rates.at_edge.any()


@pytest.mark.parametrize("other", [{0.3: 60.0}, {0.3: 60.0, 3.0: 60.0}])
def test_arms_tried_at_other_rates_are_refused(other):
    with pytest.raises(LowbitError, match=r"method='b' was tried at the rates .*the same trials"):
        best_rates(trials({"a": {0.3: 60.0, 1.0: 60.0}, "b": other}), ["method"])


accuracies = st.lists(st.one_of(st.integers(0, 5), st.just(np.nan)), min_size=4, max_size=4)


@given(table=st.lists(accuracies, min_size=1, max_size=3), order=st.permutations(range(4)))
def test_the_choice_is_the_plain_definition_in_any_order_of_rows(table, order):
    factors = [0.1, 0.3, 1.0, 3.0]
    frame = trials({f"m{i}": {factors[k]: values[k] for k in order} for i, values in enumerate(table)})
    if any(np.isnan(values).all() for values in table):
        with pytest.raises(LowbitError, match="every rate failed"):
            best_rates(frame, ["method"])
        return
    expected = {f"m{i}": factors[values.index(np.nanmax(values))] for i, values in enumerate(table)}
    rates = best_rates(frame, ["method"])
    assert chosen(rates) == expected
    assert chosen(rates[rates.at_edge]) == {m: f for m, f in expected.items() if f in (0.1, 3.0)}
