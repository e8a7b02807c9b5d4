"""`lowbit claims`: verdicts follow from the rows and from nothing else."""

import functools
import json
import math
import re
import shlex

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit_suite import claims
from lowbit_suite.accepted import again
from lowbit_suite.app import app
from lowbit_suite.claims import conditions, measuring
from lowbit_suite.records import journal
from lowbit_suite.study import plan

STATEMENT = {
    "says": "a beats b at {bits} bits",
    "role": "primary",
    "table": "made",
    "each": {"bits": [2, 3]},
    "a": "arm == 'a' and bits == {bits}",
    "b": "arm == 'b' and bits == {bits}",
    "value": "accuracy, %",
    "expected": "positive",
    "unit": "points",
}


LEARNED = {
    "says": "the twin reaches {found} %",
    "rows": "arm == 'twin'",
    "value": "accuracy, %",
    "reduce": "mean",
    "at_least": 80,
}


def written(file, *statements, **more):
    """A file with one claim."""
    held = {"id": "X1", "paper": "ours", "claim": "it helps", "statements": list(statements or (STATEMENT,))}
    file.write_text(yaml.safe_dump({"conditions": {"learned": LEARNED}, "claims": [held | more]}))
    return file


@pytest.fixture
def judged(tmp_path):
    """Judges one claim of the given statement(s) by a table of the study with the given rows."""

    def judge(rows, *statements, card=True, profile=claims.MAIN, **more):
        file = written(tmp_path / "claims.yaml", *statements, **more)
        if rows is not None:
            (tmp_path / profile).mkdir(exist_ok=True)
            pd.DataFrame(rows).to_csv(tmp_path / profile / "made.csv", index=False)
            if card:
                text = json.dumps({"settings": {"dataset": "cifar"}, "command": "lowbit run made"})
                (tmp_path / profile / "made.json").write_text(text)
        (found,) = claims.judge(profile, tmp_path, file)
        return found

    return judge


def rows(gains, seeds=5, **more):
    """Arm a is better than b by ``gains[bits]`` and a little noise that is the same in each pair but for 0.1."""
    return [
        {
            "arm": arm,
            "bits": bits,
            "seed": seed,
            "accuracy, %": 50 + 3 * seed + (gain + 0.1 * (seed % 2)) * (arm == "a"),
        }
        | more
        for bits, gain in gains.items()
        for arm in "ab"
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ({2: 1.0, 3: 1.0}, "reproduced"),
        ({2: 1.0, 3: -1.0}, "not reproduced"),
        ({2: 1.0, 3: -0.04}, "inconclusive"),
        ({2: 1.0}, "not tested"),  # no row at 3 bits yet
    ],
)
def test_a_claim_holds_if_all_its_statements_do(judged, gains, verdict):
    found = judged(rows(gains))
    assert found.verdict == verdict and len(found.statements) == 2
    assert found.effect == pytest.approx(1.04) and found.interval[0] < 1.04 < found.interval[1]
    assert (found.dataset, found.command, found.runs) == ("cifar", "lowbit run made", ["made.csv"])


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "not reproduced", "not tested"], "not reproduced"),
        (["reproduced", "inconclusive"], "inconclusive"),
        (["reproduced", "inconclusive", "not tested"], "not tested"),
        (["not tested"], "not tested"),
        (["reproduced", "no evidence"], "inconclusive"),
        (["no evidence"], "no evidence"),
    ],
)
def test_the_verdicts_on_statements_make_that_on_the_claim(verdicts, verdict):
    assert claims.combine(verdicts) == verdict


YES, NO, OPEN = "reproduced", "not reproduced", "inconclusive"


@pytest.mark.parametrize(
    ("verdicts", "p_values", "corrected"),
    [
        ([NO, NO, OPEN], [0.01, 0.02, 1.0], [NO, NO, OPEN]),  # Holm: 0.02 <= 0.05/2; Bonferroni would want 0.05/3
        ([NO, NO, OPEN], [0.01, 0.03, 1.0], [NO, OPEN, OPEN]),
        ([NO, NO, OPEN], [0.02, 0.02, 1.0], [OPEN, OPEN, OPEN]),  # the smallest has to be at most 0.05/3
        ([NO, YES], [0.03, 1.0], [OPEN, YES]),
        ([NO], [0.04], [NO]),
        ([NO, YES, YES], [None, 1.0, 1.0], [NO, YES, YES]),  # a check that fails is no matter of chance
        ([NO, "not tested"], [0.04, None], [NO, "not tested"]),  # what is not measured is not among the tests
    ],
)
def test_only_what_speaks_against_a_claim_is_corrected_and_by_holms_test(verdicts, p_values, corrected):
    assert claims.correct(verdicts, p_values) == corrected


@pytest.mark.parametrize(
    ("widths", "corrected"), [([2], "not reproduced"), ([2, 3], "not reproduced"), ([2, 3, 4, 5, 6, 7], "inconclusive")]
)
def test_one_statement_that_fails_counts_less_among_many(judged, widths, corrected):
    # At 2 bits the mean of five seeds is -1 and its error 0.25; Student's t of 4 degrees of freedom has the quantiles
    # 2.78, 3.50 and 4.85 for one, two and six statements. At the other widths a is better without doubt.
    noise = [0.25 * 2**0.5 * step for step in (-2, -1, 0, 1, 2)]
    table = [
        {"arm": arm, "bits": bits, "seed": seed, "accuracy, %": 50 + (gain + noise[seed]) * (arm == "a")}
        for bits in widths
        for gain in [-1.0 if bits == 2 else 9.0]
        for arm in "ab"
        for seed in range(5)
    ]
    found = judged(table, STATEMENT | {"each": {"bits": widths}})
    assert found.verdict == "not reproduced" and found.corrected == corrected
    other = "" if corrected == "not reproduced" else " (corrected: inconclusive)"
    assert claims.judgment(found) == "**not reproduced**" + other
    assert claims.outcome(found.statements[0]) == "not reproduced" + other
    assert claims.judgment(found) in claims.markdown([found])


def test_primary_statements_alone_decide(judged):
    primary = STATEMENT | {"each": {"bits": [2]}}
    secondary = STATEMENT | {"each": {"bits": [3]}, "role": "secondary"}
    described = {key: value for key, value in secondary.items() if key != "expected"} | {"descriptive": True}
    found = judged(rows({2: 1.0, 3: -1.0}), secondary, primary, described)
    assert found.verdict == "reproduced" and found.effect == pytest.approx(1.04)
    assert [one.verdict for one in found.statements] == ["not reproduced", "reproduced", "descriptive"]
    assert judged(rows({2: -1.0, 3: 1.0}), secondary, primary, described).verdict == "not reproduced"
    assert found.statements[2].effect == pytest.approx(-0.96)


def twin(accuracy):
    return [{"arm": "twin", "bits": 32, "seed": seed, "accuracy, %": accuracy} for seed in range(5)]


def test_a_condition_names_the_statements_that_it_concerns_if_not_all(judged):
    two, three = (STATEMENT | {"each": {"bits": [bits]}} for bits in (2, 3))
    table = rows({2: 1.0, 3: 1.0}) + twin(79.0)
    failed = "**not met**: the twin reaches 79 %; allowed: at least 80"
    found = claims.markdown([judged(table, two, three | {"conditions": ["learned"]})])
    (says,) = [one.says for one in judged(table, three).statements]
    assert f"- {failed}. For *{says}*\n" in found
    assert f"- {failed}\n" in claims.markdown([judged(table, two, three, conditions=["learned"])])


@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_a_statement_whose_condition_fails_is_not_tested_whatever_its_numbers(judged, gain):
    table = rows({2: gain, 3: gain}) + twin(79.0)
    found = judged(table, conditions=["learned"])
    assert {one.verdict for one in (found, *found.statements)} == {"not tested"}
    assert found.effect == pytest.approx(gain + 0.04)  # shown all the same
    assert "the twin reaches 79 %; allowed: at least 80" in found.statements[0].note
    assert "**not met**: the twin reaches 79 %; allowed: at least 80" in claims.markdown([found])
    without = judged(table)
    assert without.verdict == ("reproduced" if gain > 0 else "not reproduced")
    learned = judged(rows({2: gain, 3: gain}) + twin(81.0), conditions=["learned"])
    assert learned.verdict == without.verdict and all(check.met for check in learned.conditions)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rows": "arm == 'nobody'"}, r"\? %; allowed: at least 80 \(no row of made fits arm == 'nobody'\)"),
        ({"table": "gone"}, r"there is no table gone"),
        ({"value": "mAP, %"}, r"made has no column 'mAP, %'"),
        ({"minus": "arm == 'nobody'"}, r"no row of made fits arm == 'nobody'"),
        ({"value": "hole"}, r"1 of 5 rows of made have no number in 'hole'"),
    ],
)
def test_a_condition_without_its_rows_is_not_met(judged, change, why):
    table = [row | {"hole": float("nan") if row["seed"] == 3 else 99.0} for row in rows({2: 1.0, 3: 1.0}) + twin(99.0)]
    assert judged(table, conditions=[LEARNED]).verdict == "reproduced"
    found = judged(table, conditions=[LEARNED | change])
    assert found.verdict == "not tested"
    assert re.search(why, found.statements[0].note)


@pytest.mark.parametrize(
    ("reduce", "bound", "met"),
    [
        ("mean", {"at_least": 2.0}, True),
        ("mean", {"at_least": 2.1}, False),
        ("min", {"at_most": 1.0}, True),
        ("min", {"at_most": 0.9}, False),
        ("max", {"below": 3.1}, True),
        ("max", {"below": 3.0}, False),
    ],
)
def test_conditions_reduce_and_compare(tmp_path, reduce, bound, met):
    pd.DataFrame({"arm": list("aaab"), "x": [1.0, 2.0, 3.0, 0.5]}).to_csv(tmp_path / "made.csv", index=False)
    one = {"says": "x is {found}", "rows": "arm == 'a'", "value": "x", "reduce": reduce, **bound}
    assert conditions.check(one, tmp_path, "made", 5).met == met
    (kind, limit), *_ = bound.items()
    less = one | {"minus": "arm == 'b'", kind: limit - 0.5}
    assert conditions.check(less, tmp_path, "made", 5).met == met


def test_a_statement_may_have_conditions_of_its_own(judged):
    first = STATEMENT | {"each": {"bits": [2]}}
    second = STATEMENT | {"each": {"bits": [3]}, "conditions": ["learned"]}
    found = judged(rows({2: 1.0, 3: 1.0}) + twin(1.0), first, second, conditions=[{"seeds": 5}])
    assert [one.verdict for one in found.statements] == ["reproduced", "not tested"]
    assert [len(one.conditions) for one in found.statements] == [1, 2]
    assert found.verdict == "not tested"


def test_a_budget_is_chosen_for_both_sides(judged):
    table = [row | {"epochs": 39} for row in rows({2: 1.0, 3: 1.0})]
    table += [row | {"epochs": 3} for row in rows({2: -9.0, 3: -9.0})]
    assert judged(table).verdict == "not reproduced"
    assert judged(table, STATEMENT | {"at": "epochs == 39"}).verdict == "reproduced"


TREND = STATEMENT | {"each": {"bits": [2]}, "slope": "steps"}


def budgets(slope, seeds=5, steps=(100, 200, 800), first=-7.0):
    """Arm a gains ``slope`` points on b with each doubling, and a tenth of its seed more."""
    return [
        {"arm": arm, "bits": 2, "seed": seed, "steps": n, "accuracy, %": 50 + 5 * seed + gain * (arm == "a")}
        for arm in "ab"
        for seed in range(seeds)
        for n in steps
        for gain in [first + (slope + 0.1 * seed) * math.log2(n)]
    ]


def test_slopes_by_hand():
    # Differences 0, 1, 5 at 0, 1, 3 doublings: the mean of x is 4/3, of y 2, so the slope is 8 / (14/3) = 12/7.
    assert measuring.slope(pd.Series([0.0, 1.0, 5.0], index=[100, 200, 800])) == pytest.approx(12 / 7)
    assert measuring.slope(pd.Series([0.0, 1.0], index=[100, 200])) is None


@pytest.mark.parametrize(("slope", "verdict"), [(0.5, "reproduced"), (-2.0, "not reproduced"), (-0.2, "inconclusive")])
def test_a_trend_is_judged_by_the_slopes_of_the_seeds(judged, slope, verdict):
    found = judged(budgets(slope), TREND)
    # The slopes are slope + 0, 0.1, ... 0.4; their s is 0.1 sqrt(2.5), and t of 4 degrees of freedom is 2.776.
    half = 2.776445 * 0.1 * math.sqrt(2.5 / 5)
    assert found.effect == pytest.approx(slope + 0.2)
    assert found.interval == pytest.approx((slope + 0.2 - half, slope + 0.2 + half), rel=1e-5)
    assert found.verdict == verdict and found.seeds == 5


def test_a_trend_takes_budgets_of_both_arms_and_needs_three(judged):
    table = [row for row in budgets(0.5) if (row["arm"], row["seed"], row["steps"]) != ("b", 4, 800)]
    (found,) = judged(table, TREND).statements
    assert found.seeds == 4 and found.effect == pytest.approx(0.65) and "seeds 4" in found.note
    (none,) = judged(budgets(0.5, steps=(100, 800)), TREND).statements
    assert none.verdict == "not tested" and none.effect is None and "3 budgets" in none.note


def test_the_study_pairs_what_is_there_and_names_the_rest(judged):
    table = rows({2: 1.0, 3: 1.0}, seeds=7)
    found = judged([row for row in table if (row["arm"], row["seed"]) != ("b", 6)])
    assert found.verdict == "reproduced" and found.seeds == 6
    assert "left out because their pair is missing: seeds 6" in found.statements[0].note
    alone = [row for row in table if (row["arm"] == "a") == (row["seed"] < 3)]
    assert judged(alone).verdict == "not tested"
    hole = [row | ({"accuracy, %": None} if (row["arm"], row["seed"]) == ("b", 2) else {}) for row in table]
    assert judged(hole).verdict == "not tested"


def test_a_run_is_looked_at_by_its_own_tables_and_nothing_is_written(tmp_path, project):
    folder = project.results / "runs" / "desk" / "tables" / "02_zero_free_shifting"
    folder.mkdir(parents=True)
    made = [
        {"method": m, "bits": bits, "seed": seed, "accuracy, %": 50 + seed + gain + 0.01 * (seed % 2) * gain}
        for m, gain in (("denseshift", 0), ("s3", -3), ("s3_low_variance", 3))
        for bits in (2, 3, 4)
        for seed in range(5)
    ]
    pd.DataFrame(made).to_csv(folder / "02_accuracy.csv", index=False)
    (folder.parents[1] / "run.json").write_text(
        json.dumps({"schema": 1, "profile": "desk", "started": "2030", "environment": {}, "notebooks": []})
    )
    result = CliRunner().invoke(app, ["claims", "--out", str(folder.parents[1])])
    assert result.exit_code == 0, result.output
    assert result.output.count("D1") == 6 and "D2" not in result.output
    assert result.output.count("points against it") == 3 and "reproduced" not in result.output
    assert not (project.results / "claims.md").exists()
    (folder / "02_accuracy.csv").unlink()
    result = CliRunner().invoke(app, ["claims", "--out", str(folder.parents[1])])
    assert result.exit_code != 0 and "has no table that a claim uses" in result.output


def test_four_seeds_decide_nothing(judged):
    found = judged(rows({2: 1.0, 3: 1.0}, seeds=4), conditions=[{"seeds": 5}])
    assert found.verdict == "not tested" and found.seeds == 4
    assert "4 pairs were measured; needed: at least 5" in found.statements[0].note


def test_without_a_table_nothing_is_tested(judged):
    found = judged(None)
    assert found.verdict == "not tested" and found.effect is None and found.runs == []
    assert "no training of the study yet: there is no table made" in found.statements[0].note
    assert found.command == "lowbit study run"


def test_a_claim_that_trains_no_network_is_judged_where_it_was_measured(judged, tmp_path):
    (tmp_path / "desk").mkdir()
    pd.DataFrame(rows({2: 1.0, 3: 1.0})).to_csv(tmp_path / "desk" / "made.csv", index=False)
    file = written(tmp_path / "claims.yaml", profile="desk")
    (found,) = claims.judge(folder=tmp_path, file=file)
    assert (found.verdict, found.profile, found.look) == ("reproduced", "desk", False)
    assert claims.judge("desk", tmp_path, file) == []  # it is not looked at where it is judged
    (tmp_path / "desk" / "made.csv").rename(tmp_path / "made.csv")
    (found,) = claims.judge(folder=tmp_path, file=file)
    assert found.verdict == "no evidence"


def test_rows_of_a_seed_are_averaged_and_scaled(judged):
    statement = {**STATEMENT, "each": {"bits": [2]}, "times": 10}
    doubled = [row | {"accuracy, %": row["accuracy, %"] + extra} for row in rows({2: 1.0}) for extra in (-5, 5)]
    assert judged(doubled, statement).effect == pytest.approx(10.4)


def test_two_columns_of_the_same_rows_can_be_compared(judged):
    statement = {**STATEMENT, "each": {"bits": [2]}, "b_value": ["x", "y"]}
    del statement["b"]
    found = judged(rows({2: 1.0}, x=40.0, y=44.0), statement)
    assert found.effect == pytest.approx(50 + 6 + 1.04 - 42)


@pytest.mark.parametrize(("holds", "verdict"), [([1, 1], "reproduced"), ([1, 0], "not reproduced")])
def test_checks_hold_or_do_not(judged, holds, verdict):
    found = judged(
        [{"check": str(i), "holds": h} for i, h in enumerate(holds)],
        {"says": "all hold", "role": "primary", "table": "made", "all": "holds"},
    )
    assert found.verdict == verdict and found.effect is None


def test_some_checks_can_be_asked_alone(judged):
    checks = [{"check": "1: a", "holds": 1}, {"check": "2: b", "holds": 0}]
    one = {"says": "the first", "role": "primary", "table": "made", "all": "holds", "a": "check.str.startswith('1')"}
    assert judged(checks, one).verdict == "reproduced"
    assert judged(checks, one | {"a": "check.str.startswith('3')"}).verdict == "not reproduced"  # none is not all


def test_ratios_are_compared_by_their_logarithms(judged):
    statement = {**STATEMENT, "each": {"bits": [2]}, "log": True, "pair": "repeat", "value": "us", "unit": ""}
    times = [
        {"arm": a, "bits": 2, "repeat": r, "us": t * (1 + r / 9)} for a, t in (("a", 8.0), ("b", 2.0)) for r in range(5)
    ]
    assert judged(times, statement).effect == pytest.approx(1.386294)  # ln 4


@pytest.mark.parametrize(("speakers", "of", "count"), [(3, "speakers", 3), (1, "seeds", 6)])
def test_of_several_columns_the_first_that_varies_makes_the_pairs(judged, speakers, of, count):
    table = [row | {"speaker": row["seed"] % speakers} for row in rows({2: 1.0, 3: 1.0}, seeds=6)]
    found = judged(table, STATEMENT | {"pair": ["speaker", "seed"]}, conditions=[{"seeds": 5}])
    assert {(statement.of, statement.seeds) for statement in found.statements} == {(of, count)}
    assert found.verdict == ("reproduced" if count >= 5 else "not tested")
    assert f"{count} {of}" in claims.effect(found.statements[0])


def test_seeds_without_their_pair_are_refused_of_a_finished_run(judged):
    with pytest.raises(LowbitError, match="pair"):
        judged(rows({2: 1.0, 3: 1.0})[1:], profile="desk", looks=[STATEMENT])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unti": "points"}, "unti"),
        ({"expected": "larger"}, "larger"),
        ({"role": "main"}, "role 'main' is not allowed; give one of primary, secondary"),
        ({"role": "secondary"}, "no primary statement"),
        ({"descriptive": True}, "contradicts itself"),
        ({"slope": "seed", "at": "bits == 2"}, "contradicts itself"),
        ({"conditions": ["trained"]}, "no condition is called 'trained'; there are learned"),
        ({"conditions": [LEARNED | {"at_most": 90}]}, "needs says, rows, value, reduce"),
        ({"conditions": [LEARNED | {"reduce": "median"}]}, "needs says, rows, value, reduce"),
        ({"conditions": [{"says": "x", "at_most": 90}]}, "rows, value"),
    ],
)
def test_a_wrong_statement_is_refused(judged, change, message):
    with pytest.raises(LowbitError, match=message):
        judged(rows({2: 1.0, 3: 1.0}), STATEMENT | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"value": "mAP"}, "no column 'mAP'"), ({"a": "arm === 'a'"}, "fails")],
)
def test_a_wrong_name_is_refused_of_a_finished_run_and_waited_for_in_the_study(judged, change, message):
    with pytest.raises(LowbitError, match=message):
        judged(rows({2: 1.0, 3: 1.0}), profile="desk", looks=[STATEMENT | change])
    found = judged(rows({2: 1.0, 3: 1.0}), STATEMENT | change)
    assert found.verdict == "not tested" and message in found.statements[0].note


def test_every_claim_of_both_papers_is_there():
    ids = [claim["id"] for claim in claims.load()]
    assert ids == [*(f"D{i}" for i in range(1, 9)), *(f"O{i}" for i in range(1, 6)), "B1", "X1", "X2", "X3"]


OFQ = (
    "arm bits epochs steps seed|accuracy, %|test loss|oscillating, %|boundary density, %|oscillating per density|reach"
    "|memory|changed level, %|misestimation, %|oscillating qk, %"
)
SHIFT = "arm bits epochs steps seed|accuracy, %|test loss|frozen, %|sign frozen, %|flip rate, %|oscillating, %"
RATES = "arm bits epochs seed lr_factor chosen at_edge|accuracy, %"
STUDY = {  # the tables of the study and their columns, those that say which row it is first
    "ofq": OFQ,
    "ofq_tuned": OFQ,
    "ofq_rates": RATES,
    "shift": SHIFT,
    "shift_tuned": SHIFT,
    "shift_rates": RATES,
    "grid_and_scale": "arm bits epochs steps seed grid scale gradient|accuracy, %|reach|memory",
    "shelf": "arm bits epochs seed|accuracy, %",
    "freezing_correlation": "arm epochs seed|freezing_target",
    "transfer": "arm epochs seed|source, %|target, %",
    "transfer_faster": "arm epochs seed|target, %",
    "detection": "arm epochs seed|mAP, %",
    "speech": "arm bits epochs speaker seed|accuracy, %",
}


@functools.cache
def planned():
    return list(plan.trainings(plan.load()))


def trained(table):
    """Every training that the table will have, with the name of each of its rows."""
    found = [one for one in planned() if one.table == table.removesuffix("_correlation")]
    return [(one, arm) for one in found for arm in (one.arm, *(phase.arm for phase in one.phases))]


def study_rows(table):
    """Rows as the study makes them: full precision is worst by a little, and everything is alive and steady.

    Of each arm's learning rates the common one is chosen.
    """
    keys, *names = STUDY[table].split("|")
    level = {"reach": 50.0, "memory": 0.01}
    made = []
    for one, arm in trained(table):
        facts = {"arm": arm, "bits": one.bits, "epochs": one.epochs, "steps": one.epochs * 781}
        facts |= {"seed": one.seed, "chosen": one.factor == 1, "at_edge": False} | one.columns
        noise = 0.01 * ((7 * one.seed + len(arm)) % 5)
        made.append({k: facts[k] for k in keys.split()} | {n: level.get(n, 90 + noise) for n in names})
    return made


def test_every_statement_and_condition_of_the_project_is_answered_by_the_tables_that_the_study_makes(tmp_path):
    """A wrong name in claims.yaml is found now, and not when the trainings are done."""
    (tmp_path / claims.MAIN).mkdir()
    for table in STUDY:
        pd.DataFrame(study_rows(table)).to_csv(tmp_path / claims.MAIN / f"{table}.csv", index=False)
    unplanned = {"X1"}
    asked = [claim for claim in claims.judge(folder=tmp_path) if claim.profile == claims.MAIN]
    for claim in asked:
        for one in claim.statements:
            if claim.id in unplanned:
                assert one.verdict == "not tested", (claim.id, one)
            else:
                assert one.verdict != "not tested", (claim.id, one)
                assert one.conditions and all(check.met for check in one.conditions), (claim.id, one)
    assert len(asked) == 16
    items = [item for claim in claims.load() if claim["id"] not in unplanned for item in claim["statements"]]
    named = {one["table"] for item in items for one in (item, *item["conditions"]) if "table" in one}
    assert named - {"15_exactness", "15_times"} == {*STUDY}


def test_a_twin_that_has_not_learned_tests_no_claim(tmp_path):
    """The same tables with a twin at chance: none of the claims about networks has a verdict."""
    (tmp_path / claims.MAIN).mkdir()
    for table in STUDY:
        frame = pd.DataFrame(study_rows(table))
        for column in {"accuracy, %", "target, %", "mAP, %"} & {*frame.columns}:
            # far below the least accuracy, and still learning in the last epochs
            frame.loc[frame.arm == "full precision", column] = 10.0 + frame["epochs"]
        frame.to_csv(tmp_path / claims.MAIN / f"{table}.csv", index=False)
    found = [claim for claim in claims.judge(folder=tmp_path) if claim.profile == claims.MAIN]
    assert {one.verdict for claim in found for one in (claim, *claim.statements)} == {"not tested"}


@pytest.fixture
def asked(tmp_path):
    """Judges the statements of the project that read a given table, by the study's rows with changes to these."""
    tree = yaml.safe_load((paths.notebooks() / claims.FILE).read_text())
    (tmp_path / claims.MAIN).mkdir()

    def ask(table, change=lambda frames: None):
        common = "ofq" if table in ("ofq_tuned", "grid_and_scale") else "shift"
        frames = {name: pd.DataFrame(study_rows(name)) for name in (common, f"{common}_rates", table)}
        change(frames)
        for name, frame in frames.items():
            frame.to_csv(tmp_path / claims.MAIN / f"{name}.csv", index=False)
        those = [one for one in tree["claims"] if any(item["table"] == table for item in one["statements"])]
        file = tmp_path / "claims.yaml"
        file.write_text(yaml.safe_dump(tree | {"claims": those}))
        judged = [one for claim in claims.judge(folder=tmp_path, file=file) for one in claim.statements]
        return [one for one in judged if one.table and one.table.endswith(f"{table}.csv")]

    return ask


COMPARED = [  # table, the better side of what is asked of it, what is expected
    ("ofq_tuned", "arm == 'StatsQ'", "reproduced"),
    ("shift_tuned", "arm == 'DenseShift'", "reproduced"),
    ("grid_and_scale", "grid == 'mid-tread'", "reproduced"),
]


@pytest.mark.parametrize(("table", "better", "verdict"), COMPARED)
def test_statements_on_tuned_rates_and_cells_go_both_ways(asked, table, better, verdict):
    def by(points):
        def change(frames):
            frame = frames[table]
            frame.loc[frame.query(better).index, "accuracy, %"] += points

        return change

    ahead, behind = asked(table, by(5)), asked(table, by(-5))
    assert {one.verdict for one in ahead} == {verdict} and {one.verdict for one in behind} == {"not reproduced"}
    for one, other in zip(ahead, behind, strict=True):
        assert one.seeds == other.seeds == 5 and one.effect == pytest.approx(-other.effect, abs=0.2)


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "reproduced"), (1, "not reproduced")])
def test_the_correlation_with_freezing_goes_both_ways_and_leaves_out_seeds_without_one(asked, sign, verdict):
    def change(frames):
        frame = frames["freezing_correlation"].drop_duplicates("seed")
        frames["freezing_correlation"] = frame.assign(
            freezing_target=[sign * (0.5 + 0.01 * seed) for seed in frame.seed]
        )

    (one,) = asked("freezing_correlation", change)
    assert one.verdict == verdict and one.effect == pytest.approx(sign * 0.52) and one.seeds == 5

    def hole(frames):
        change(frames)
        frames["freezing_correlation"].loc[0, "freezing_target"] = math.nan

    (one,) = asked("freezing_correlation", hole)
    assert one.verdict == "not tested" and one.seeds == 4  # five are needed


@pytest.mark.parametrize("table", ["ofq", "shift"])
def test_a_tuned_statement_is_tested_only_with_rates_inside_the_grid(asked, table):
    arm = "StatsQ" if table == "ofq" else "DenseShift"

    def mark(query, column="at_edge", value=True):
        def change(frames):
            frame = frames[f"{table}_rates"]
            frame.loc[frame.query(query).index, column] = value

        return change

    assert all(one.verdict != "not tested" for one in asked(f"{table}_tuned"))
    inside = asked(f"{table}_tuned", mark(f"arm == '{arm}' and not chosen"))
    assert all(one.verdict != "not tested" for one in inside)
    outside = asked(f"{table}_tuned", mark(f"arm == '{arm}' and chosen"))
    assert outside and all(one.verdict == "not tested" for one in outside)
    assert all("the edge of those tried is 1" in one.note for one in outside)
    waiting = asked(f"{table}_tuned", mark("chosen", "chosen", False))
    assert waiting and all(one.verdict == "not tested" for one in waiting)


def test_the_command_writes_both_files(project, tmp_path):
    result = CliRunner().invoke(app, ["claims"])
    assert result.exit_code == 0 and "not tested" in result.stdout
    held = json.loads((project.results / "claims.json").read_text())
    wanted = {
        "id",
        "claim",
        "verdict",
        "effect",
        "unit",
        "interval",
        "method",
        "dataset",
        "profile",
        "seeds",
        "runs",
        "command",
    }
    assert len(held) == 17 and wanted <= set(held[0])
    assert all(f"## {claim['id']}: " in (project.results / "claims.md").read_text() for claim in held)


def test_what_is_written_is_read_again(judged, tmp_path):
    claim = judged(rows({2: 3.0, 3: -3.0}) + twin(1.0), conditions=["learned"])
    claims.write([claim], tmp_path)
    (found,) = claims.read(tmp_path)
    assert found.statements[0].unmet == claim.statements[0].unmet != []
    assert found.statements[0].detectable == claim.statements[0].detectable > 0
    assert claims.markdown([found]) == claims.markdown([claim])


def test_a_notebook_shows_what_was_written(judged, tmp_path):
    claim = judged(rows({2: 3, 3: -3}) + twin(90.0), conditions=["learned"])
    claims.write([claim], tmp_path)
    (text,) = claims.outputs("X1", folder=tmp_path)
    shown = text.data
    assert "**X1: it helps.** At study: **not reproduced**." in shown
    for statement in claim.statements:
        assert f"| **{statement.says}** | {claims.effect(statement)} | {statement.verdict} |" in shown
    assert "again: `lowbit run made`" in shown
    assert "- met: the twin reaches 90 %; allowed: at least 80" in shown
    with pytest.raises(LowbitError, match=r"no claim 'D9' \(it has X1\); 'lowbit claims' writes it"):
        claims.outputs("D9", folder=tmp_path)
    with pytest.raises(LowbitError, match=r"it has none"):
        claims.outputs("X1", folder=tmp_path / "nowhere")


def test_the_study_s_figure_stands_between_its_table_and_the_look():
    table, figure, look = claims.outputs("D7")
    assert "At study" in table.data and "A look at" not in table.data
    assert figure.data.startswith(b"\x89PNG") and figure.alt
    assert look.data.startswith("*A look at desk")


def test_a_claim_leads_to_its_trainings_and_to_the_command_for_one_of_them(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path))
    monkeypatch.setenv("LOWBIT_RESULTS", str(tmp_path / "results"))
    file, folder = tmp_path / "claims.yaml", tmp_path / "results" / "tables" / "desk"
    written(file, looks=[STATEMENT])
    folder.mkdir(parents=True)
    pd.DataFrame(rows({2: 1.0, 3: 1.0})).to_csv(folder / "made.csv", index=False)
    card = {"table": "made", "settings": {"dataset": "cifar"}, "command": "lowbit run 05_made --profile desk"}
    (folder / "made.json").write_text(json.dumps(card))
    (found,) = claims.judge("desk", file=file)
    assert found.again == {}  # no journal is kept
    path = journal.kept("desk", "05_made")
    journal.begin(path, {}, "05_made", {})
    with monkeypatch.context() as patch:
        patch.setenv("LOWBIT_CONTEXT", json.dumps({"journal": str(path)}))
        kept = journal.Journal()
        kept.add("1 learning rates", {"arm": "a", "lr_factor": 3.0}, 1000, 1.0, {"y": 1})
        kept.add("2 trainings", {"arm": "a b", "bits": 2, "lr_factor": 3.0}, 4, 1.0, {"accuracy, %": 1})
        kept.add("3 others", {"arm": "a b", "lr_factor": 3.0}, 5, 1.0, {"mAP, %": 1})  # not of this table
    (folder.parents[1] / "figures" / "desk").mkdir(parents=True)
    for name in ("mad_curves.png", "may_curves.png"):  # the table is called made
        (folder.parents[1] / "figures" / "desk" / name).touch()
    study, found = claims.judge_all(file=file)
    command = "lowbit again 05_made 'arm=a b' bits=2 seed=4"
    assert found.again == {"results/journals/desk/05_made.jsonl": command}
    text = claims.markdown([study, found])
    assert f"[results/journals/desk/05_made.jsonl](journals/desk/05_made.jsonl). One again: `{command}`" in text
    assert "| 05_made | 1 | 2 | 0 |" in text
    assert "Pictures: [mad_curves.png](figures/desk/mad_curves.png)\n" in text
    (chosen,) = again.pick(again.read(path)[1], shlex.split(command)[3:])
    assert (chosen["sweep"], chosen["seed"]) == ("2 trainings", 4)


def test_the_notebooks_own_trainings_are_looked_at_and_pass_no_verdict(project, tmp_path):
    file, folder = written(tmp_path / "claims.yaml", looks=[STATEMENT]), project.results / "tables"
    for profile, gains, seeds in (("desk", {2: 1.0, 3: 1.0}, 5), ("embedded", {2: -1.0, 3: -1.0}, 5), ("smoke", {}, 0)):
        (folder / profile).mkdir(parents=True)
        if seeds:
            pd.DataFrame(rows(gains, seeds)).to_csv(folder / profile / "made.csv", index=False)
            card = {
                "table": "made",
                "settings": {"dataset": profile + "-data"},
                "command": f"lowbit run 05_made --profile {profile}",
            }
            (folder / profile / "made.json").write_text(json.dumps(card))
    found = claims.judge_all(file=file)
    assert [(one.profile, one.verdict, one.direction) for one in found] == [
        ("study", "not tested", ""),
        ("desk", "look", "points to the claim"),
        ("embedded", "look", "points against it"),
    ]
    text = claims.markdown(found)
    assert "| look at desk | look at embedded |" in text and "### Look at X1 at embedded" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| X1 |")]
    assert row.endswith(
        "| **not tested** |  | points to the claim (2 to the claim) | points against it (2 against it) |"
    )
    claims.write(found, project.results)
    shown = claims.outputs("X1")[0].data
    assert "At study: **not tested**" in shown and "None of its 2 statements is tested yet" in shown
    assert "*A look at desk (desk-data):* points to the claim." in shown
    assert "*A look at embedded (embedded-data):* points against it (2 against it)." in shown
    for words in (text, shown):
        assert "reproduced" not in re.sub("(?s)^.*?(?=^\\|)", "", words, flags=re.MULTILINE)


def test_a_size_at_which_a_claim_was_not_run_has_no_look_at_it(project, tmp_path):
    file, folder = written(tmp_path / "claims.yaml", looks=[STATEMENT]), project.results / "tables"
    for profile, table in (("desk", "other"), ("embedded", "made")):
        (folder / profile).mkdir(parents=True)
        pd.DataFrame(rows({2: 1.0, 3: 1.0})).to_csv(folder / profile / f"{table}.csv", index=False)
    found = claims.judge_all(file=file)
    assert [(one.profile, one.verdict) for one in found] == [("study", "not tested"), ("embedded", "look")]
    assert "no evidence" not in claims.markdown(found)


@pytest.mark.parametrize(
    ("gains", "seeds", "direction"),
    [
        ({2: 1.0, 3: 1.0}, 5, "points to the claim"),
        ({2: 1.0, 3: -0.04}, 5, "open"),
        ({2: -1.0, 3: -0.04}, 5, "points against it"),
        ({2: 1.0, 3: -1.0}, 5, "mixed"),
        ({2: 1.0, 3: 1.0}, 4, "open"),
        ({2: 1.0}, 5, "points to the claim"),  # what has no rows points nowhere
    ],
)
def test_where_a_look_points(judged, gains, seeds, direction):
    found = judged(rows(gains, seeds), profile="desk", looks=[STATEMENT])
    assert (found.look, found.verdict, found.direction) == (True, "look", direction)
    assert judged(None, profile="embedded", looks=[STATEMENT]).verdict == "no evidence"
