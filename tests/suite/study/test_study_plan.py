"""The plan of the study, spelled out into single trainings."""

import dataclasses
import hashlib

import pytest

from lowbit import LowbitError
from lowbit_suite.study import plan, queue, tuning

CORRELATION = {"table": "by_seed", "column": "rank", "of": ["a", "b"]}
SOURCE = {"data": {"name": "digits"}, "train": {"epochs": 1}}


def test_every_arm_width_budget_and_seed_is_one_training(planned):
    trainings = list(plan.trainings(planned()))
    shift = [t.key[1:] for t in trainings if t.table == "shift"]
    assert shift[:3] == [("full precision", 32, 1, 0), ("DenseShift", 3, 1, 0), ("DenseShift", 2, 1, 0)]
    assert len(shift) == len(set(shift)) == 2 * (3 + 4) and len(trainings) == 14 + 8
    assert [key for key in shift if key[0] == "S3"] == [("S3", 3, 2, 0), ("S3", 3, 2, 1)]


def test_bits_budget_and_seed_are_filled_in(planned):
    found = {t.key: t for t in plan.trainings(planned())}
    run = found["ofq", "StatsQ + QKR", 2, 2, 1].config()
    assert (run.train.epochs, run.train.seed, run.train.lr) == (2, 1, 5e-4)
    assert (run.quant_config().weight.bits, run.quant_config().activation.bits) == (2, 2)
    assert found["shift", "DenseShift", 2, 1, 0].config().quant_config().weight.bits == 2
    assert found["shift", "full precision", 32, 1, 0].config().quant is None


def test_phases_follow_the_longest_budget_only(planned):
    found = {t.key: t for t in plan.trainings(planned())}
    assert found["ofq", "StatsQ + QKR", 2, 1, 0].phases == ()
    longest = found["ofq", "StatsQ + QKR", 2, 2, 0]
    assert [phase.arm for phase in longest.phases] == ["CGA", "no mask"] and longest.length == 4


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda t: t["shift"]["run"]["train"].update(lr=0.2), {"full precision", "DenseShift", "S3"}),
        (lambda t: t["shift"]["arms"]["S3"].update(train={"lr": 0.2}), {"S3"}),
        (lambda t: t["shift"]["arms"]["S3"].update(rank=0), set()),
        (lambda t: t["shift"].update(title="x", claims=[], later=[1]), set()),
        (lambda t: t["shift"].update(grid=None), {"full precision", "DenseShift", "S3"}),
    ],
)
def test_the_digest_changes_with_what_is_trained_and_with_nothing_else(planned, change, changed):
    before = {t.key: t.digest for t in plan.trainings(planned())}
    after = {t.key: t.digest for t in plan.trainings(planned(change))}
    assert {key[1] for key in before if before[key] != after[key]} == changed


def test_a_phase_is_part_of_the_digest(planned):
    *_, training = (t for t in plan.trainings(planned()) if t.phases)
    phases = (dataclasses.replace(training, phases=()), training)
    assert phases[0].digest != phases[1].digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["shift"].update(epoch=[1]), "study.yaml: epoch: Extra inputs are not permitted"),
        (lambda t: t["shift"].update(epochs=[2, 1]), r"study.yaml: epochs: .*budgets should ascend"),
        (lambda t: t["shift"].update(later=[9]), "study.yaml: later: .*no budget of 9 epochs; it has 1, 2"),
        (lambda t: t["shift"]["arms"]["S3"].update(bits=[]), "study.yaml: arms.S3.bits"),
        (lambda t: t["shift"]["run"]["train"].update(lr=-1), "study.yaml: shift: full precision.*lr"),
        (lambda t: t["shift"]["arms"]["S3"]["quant"]["weight"].update(method="s4"), "study.yaml: shift: S3.*'s4'"),
        (lambda t: t["shift"]["arms"]["S3"].update(bits=[7]), "study.yaml: shift: S3, 7 bits.*bits"),
        (lambda t: t["shift"]["arms"]["S3"].update(first={"lr": -1}), "study.yaml: shift: S3.*lr"),
        (lambda t: t["shift"].update(source={"data": {}}), "study.yaml: source: .*it needs 'data' and 'train'"),
        (
            lambda t: t["shift"].update(source=SOURCE | {"quant": {}}),
            "study.yaml: source: .*nothing else, not data, .*qua",
        ),
    ],
)
def test_a_plan_that_is_wrong_is_refused_with_its_place(planned, change, message):
    with pytest.raises(LowbitError, match=message):
        list(plan.trainings(planned(change)))


def test_the_plan_of_the_project_is_valid_and_names_every_training_once(monkeypatch):
    trainings = list(plan.trainings(plan.load()))
    assert len({t.key for t in trainings}) == len(trainings) > 100
    assert len({t.digest for t in trainings}) == len(trainings)


# A checksum of the keys and digests of each table, of the arms that were planned when the study began to run.
BEGUN = {
    "detection": "edebee459222",
    "ofq": "8cad7e0bc48f",
    "shelf": "7ce3aaa3fb03",
    "shift": "9f3fe1501b35",
    "speech": "ce525945c8e0",
    "transfer": "73c494979dbb",
}


@pytest.mark.parametrize("table", BEGUN)
def test_what_the_study_has_begun_to_train_stays_what_it_is(table):
    begun = [t for t in plan.trainings(plan.load()) if t.table == table and (table, t.arm) != ("shelf", "inq")]
    text = "\n".join(sorted(f"{t.key} {t.digest}" for t in begun))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == BEGUN[table]


def test_every_line_of_the_projects_journals_belongs_to_the_plan():
    held = plan.load()
    lines = queue.done(held)
    kept = queue.current(tuning.trainings(held, lines), lines)
    assert [line for line in lines if line not in kept.get(line.key, [])] == []


def test_the_tuned_tables_of_the_project_come_after_everything_else():
    held = plan.load()
    tuned = {name for name, table in held.items() if isinstance(table, plan.Derived)}
    assert tuned == {"ofq_rates", "ofq_tuned", "shift_rates", "shift_tuned"}
    trainings = list(plan.trainings(held))
    others = max(t.rank for t in trainings if t.table not in tuned)
    assert min(t.rank for t in trainings if t.table in tuned) > others
    assert min(t.seed for t in trainings if t.trial) >= 1000 and {t.seed for t in trainings if t.waits} == {*range(5)}


def test_an_arm_may_have_further_columns_and_a_first_training_in_full_precision(planned):
    def change(tree):
        tree["shift"]["arms"]["S3"] |= {"columns": {"zero": "yes"}, "first": {"lr": 0.2}, "train": {"lr": 0.01}}

    before = {t.key: t for t in plan.trainings(planned())}
    found = {t.key: t for t in plan.trainings(planned(change))}
    one = found["shift", "S3", 3, 2, 1]
    assert one.columns == {"zero": "yes"} and one.length == 4 and not one.moves
    first, then = one.source_config(), one.config()
    assert first.quant is None and (first.train.lr, then.train.lr) == (0.2, 0.01)
    assert (first.train.epochs, first.train.seed, first.data) == (2, 1, then.data)
    assert {key[1] for key in before if before[key].digest != found[key].digest} == {"S3"}


def test_an_arm_may_change_how_the_source_task_is_trained(planned):
    def change(tree, **first):
        tree["shift"] |= {"source": SOURCE}
        tree["shift"]["arms"]["S3"] |= first

    before = {t.key: t for t in plan.trainings(planned(change))}
    found = {t.key: t for t in plan.trainings(planned(lambda tree: change(tree, first={"lr": 0.2})))}
    one = found["shift", "S3", 3, 2, 1]
    assert one.source_config().train.lr == 0.2
    assert one.source_config().quant == one.config().quant == {"weight": {"method": "s3", "bits": 3}}
    assert one.source_config().train.epochs == 1 and one.moves
    assert {key[1] for key in before if before[key].digest != found[key].digest} == {"S3"}


def test_no_plan(project):
    with pytest.raises(LowbitError, match=r"cannot read the study's plan study\.yaml"):
        plan.load()
