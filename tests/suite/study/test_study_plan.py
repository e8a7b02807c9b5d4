"""The plan of the study, spelled out into single trainings."""

import dataclasses

import pytest

from lowbit import LowbitError
from lowbit_suite.study import plan


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
        (lambda t: t["shift"].update(title="x", claims=[]), set()),
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
        (lambda t: t["shift"]["arms"]["S3"].update(bits=[]), "study.yaml: arms.S3.bits"),
        (lambda t: t["shift"]["run"]["train"].update(lr=-1), "study.yaml: shift: full precision.*lr"),
        (lambda t: t["shift"]["arms"]["S3"]["quant"]["weight"].update(method="s4"), "study.yaml: shift: S3.*'s4'"),
        (lambda t: t["shift"]["arms"]["S3"].update(bits=[7]), "study.yaml: shift: S3, 7 bits.*bits"),
    ],
)
def test_a_plan_that_is_wrong_is_refused_with_its_place(planned, change, message):
    with pytest.raises(LowbitError, match=message):
        list(plan.trainings(planned(change)))


def test_the_plan_of_the_project_is_valid_and_names_every_training_once(monkeypatch):
    trainings = list(plan.trainings(plan.load()))
    assert len({t.key for t in trainings}) == len(trainings) > 100
    assert len({t.digest for t in trainings}) == len(trainings)


def test_no_plan(project):
    with pytest.raises(LowbitError, match=r"cannot read the study's plan study\.yaml"):
        plan.load()
