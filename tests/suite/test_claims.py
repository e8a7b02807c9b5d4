"""`lowbit claims`: verdicts follow from the rows and from nothing else."""

import json
import shlex

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.suite import again, claims, journal

STATEMENT = {
    "says": "a beats b at {bits} bits",
    "table": "made",
    "each": {"bits": [2, 3]},
    "a": "arm == 'a' and bits == {bits}",
    "b": "arm == 'b' and bits == {bits}",
    "value": "accuracy, %",
    "expected": "positive",
    "unit": "points",
}


@pytest.fixture
def judged(tmp_path):
    """Judges one claim of the given statement(s) by a table of the given rows."""

    def judge(rows, *statements, card=True):
        file = tmp_path / "claims.yaml"
        held = {"id": "X1", "paper": "ours", "claim": "it helps", "statements": list(statements or (STATEMENT,))}
        file.write_text(yaml.safe_dump([held]))
        if rows is not None:
            (tmp_path / "desk").mkdir(exist_ok=True)
            pd.DataFrame(rows).to_csv(tmp_path / "desk" / "made.csv", index=False)
            if card:
                text = json.dumps({"settings": {"dataset": "cifar"}, "command": "lowbit run made"})
                (tmp_path / "desk" / "made.json").write_text(text)
        (found,) = claims.judge("desk", tmp_path, file)
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
        ({2: 1.0}, "inconclusive"),  # no row at 3 bits
    ],
)
def test_a_claim_holds_if_all_its_statements_do(judged, gains, verdict):
    found = judged(rows(gains))
    assert found.verdict == verdict and len(found.statements) == 2
    assert found.effect == pytest.approx(1.04) and found.interval[0] < 1.04 < found.interval[1]
    assert (found.dataset, found.command, found.runs) == ("cifar", "lowbit run made", ["made.csv"])


@pytest.mark.parametrize(
    ("verdicts", "strict", "corrected"),
    [
        (["reproduced", "not reproduced"], ["reproduced", "not reproduced"], "not reproduced"),
        (["reproduced", "not reproduced"], ["reproduced", "inconclusive"], "inconclusive"),
        (["reproduced", "reproduced"], ["reproduced", "inconclusive"], "reproduced"),  # all of them need no correction
        (["reproduced", "no evidence"], ["reproduced", "no evidence"], "inconclusive"),
        (["no evidence"], ["no evidence"], "no evidence"),
    ],
)
def test_only_what_speaks_against_a_claim_is_corrected(verdicts, strict, corrected):
    assert claims.correct(verdicts, strict) == corrected


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
    assert claims.judgement(found) == "**not reproduced**" + other
    assert claims.judgement(found) in claims.markdown([found])


def test_a_run_is_judged_by_its_own_tables_and_nothing_is_written(tmp_path, project):
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
    assert result.output.count("not reproduced") == 3 and "expected" not in result.output
    assert not (project.results / "claims.md").exists()
    (folder / "02_accuracy.csv").unlink()
    result = CliRunner().invoke(app, ["claims", "--out", str(folder.parents[1])])
    assert result.exit_code != 0 and "no table of the run" in result.output


def test_four_seeds_decide_nothing(judged):
    found = judged(rows({2: 1.0, 3: 1.0}, seeds=4))
    assert found.verdict == "inconclusive" and found.seeds == 4


def test_without_a_table_there_is_no_evidence(judged):
    found = judged(None)
    assert found.verdict == "no evidence" and found.effect is None and found.runs == []
    assert "no table made" in found.statements[0].note


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
        {"says": "all hold", "table": "made", "all": "holds"},
    )
    assert found.verdict == verdict and found.effect is None


def test_some_checks_can_be_asked_alone(judged):
    checks = [{"check": "1: a", "holds": 1}, {"check": "2: b", "holds": 0}]
    one = {"says": "the first", "table": "made", "all": "holds", "a": "check.str.startswith('1')"}
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
    found = judged(table, STATEMENT | {"pair": ["speaker", "seed"]})
    assert {(statement.of, statement.seeds) for statement in found.statements} == {(of, count)}
    assert found.verdict == ("reproduced" if count >= 5 else "inconclusive")
    assert f"{count} {of}" in claims.effect(found.statements[0])


def test_seeds_without_their_pair_are_refused(judged):
    with pytest.raises(LowbitError, match="pair"):
        judged(rows({2: 1.0, 3: 1.0})[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "mAP"}, "no column 'mAP'"),
        ({"a": "arm === 'a'"}, "cannot be asked"),
        ({"unti": "points"}, "unti"),
        ({"expected": "larger"}, "larger"),
    ],
)
def test_a_wrong_statement_is_refused(judged, change, message):
    with pytest.raises(LowbitError, match=message):
        judged(rows({2: 1.0, 3: 1.0}), STATEMENT | change)


def test_every_claim_of_both_papers_is_there():
    ids = [claim["id"] for claim in claims.load()]
    assert ids == [*(f"D{i}" for i in range(1, 9)), *(f"O{i}" for i in range(1, 6)), "B1", "X1", "X2", "X3"]


def test_the_command_writes_both_files(project, tmp_path):
    result = CliRunner().invoke(app, ["claims"])
    assert result.exit_code == 0 and "no evidence" in result.stdout
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


def test_a_notebook_shows_what_was_written(judged, tmp_path):
    claim = judged(rows({2: 3, 3: -3}))
    claims.write([claim], tmp_path)
    shown = claims.show("X1", folder=tmp_path).data
    assert "**X1: it helps.** At desk: **not reproduced**." in shown
    for statement in claim.statements:
        assert f"| {statement.says} | {claims.effect(statement)} | {statement.verdict} |" in shown
    assert "again: `lowbit run made`" in shown
    with pytest.raises(LowbitError, match=r"no claim 'D9' \(it has X1\); 'lowbit claims' writes it"):
        claims.show("D9", folder=tmp_path)
    with pytest.raises(LowbitError, match=r"it has none"):
        claims.show("X1", folder=tmp_path / "nowhere")


def test_a_claim_leads_to_its_trainings_and_to_the_command_for_one_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path))
    monkeypatch.setenv("LOWBIT_RESULTS", str(tmp_path / "results"))
    file, folder = tmp_path / "claims.yaml", tmp_path / "results" / "tables" / "desk"
    file.write_text(yaml.safe_dump([{"id": "X1", "paper": "ours", "claim": "it helps", "statements": [STATEMENT]}]))
    folder.mkdir(parents=True)
    pd.DataFrame(rows({2: 1.0, 3: 1.0})).to_csv(folder / "made.csv", index=False)
    card = {"table": "made", "settings": {"dataset": "cifar"}, "command": "lowbit run 05_made --profile desk"}
    (folder / "made.json").write_text(json.dumps(card))
    (found,) = claims.judge("desk", file=file)
    assert found.again == {}  # no journal is kept
    path = journal.kept("desk", "05_made")
    journal.begin(path, {}, "05_made", {})
    with monkeypatch.context() as patch:
        patch.setenv("LOWBIT_JOURNAL", str(path))
        kept = journal.Journal()
        kept.add("1 learning rates", {"arm": "a", "lr_factor": 3.0}, 1000, 1.0, {"y": 1})
        kept.add("2 trainings", {"arm": "a b", "bits": 2, "lr_factor": 3.0}, 4, 1.0, {"accuracy, %": 1})
        kept.add("3 others", {"arm": "a b", "lr_factor": 3.0}, 5, 1.0, {"mAP, %": 1})  # not of this table
    (folder.parents[1] / "figures" / "desk").mkdir(parents=True)
    for name in ("mad_curves.png", "may_curves.png"):  # the table is called made
        (folder.parents[1] / "figures" / "desk" / name).touch()
    (found,) = claims.judge("desk", file=file)
    command = "lowbit again 05_made 'arm=a b' bits=2 seed=4"
    assert found.again == {"results/journals/desk/05_made.jsonl": command}
    text = claims.markdown([found])
    assert f"[results/journals/desk/05_made.jsonl](journals/desk/05_made.jsonl). One again: `{command}`" in text
    assert "| 05_made | 1 | 2 | 0 |" in text
    assert "Pictures: [mad_curves.png](figures/desk/mad_curves.png)\n" in text
    (chosen,) = again.pick(again.read(path)[1], shlex.split(command)[3:])
    assert (chosen["sweep"], chosen["seed"]) == ("2 trainings", 4)


def test_other_profiles_with_tables_give_a_second_judgement(project, tmp_path):
    file, folder = tmp_path / "claims.yaml", project.results / "tables"
    file.write_text(yaml.safe_dump([{"id": "X1", "paper": "ours", "claim": "it helps", "statements": [STATEMENT]}]))
    for profile, gain in (("desk", 1.0), ("embedded", -1.0)):
        (folder / profile).mkdir(parents=True)
        pd.DataFrame(rows({2: gain, 3: gain})).to_csv(folder / profile / "made.csv", index=False)
        card = {
            "table": "made",
            "settings": {"dataset": profile + "-data"},
            "command": f"lowbit run 05_made --profile {profile}",
        }
        (folder / profile / "made.json").write_text(json.dumps(card))
    (folder / "gpu").mkdir()  # a profile without tables says nothing
    found = claims.judge_all(file=file)
    assert {name: some[0].verdict for name, some in found.items()} == {
        "desk": "reproduced",
        "embedded": "not reproduced",
    }
    everything = [claim for some in found.values() for claim in some]
    text = claims.markdown(everything)
    assert "| at embedded |" in text and "### X1 at embedded" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| X1 |")]
    assert "**reproduced**" in row and row.endswith("| not reproduced |")
    claims.write(everything, project.results)
    shown = claims.show("X1").data
    assert "At desk: **reproduced**" in shown and "At embedded (embedded-data): **not reproduced**." in shown
