"""What is done, what comes next, and that pairs stay on one kind of processor."""

import json

import pytest

from lowbit_suite.study import collected, plan, queue


@pytest.fixture
def trainings(planned):
    return list(plan.trainings(planned()))


def ended(training, kind="avx2", seconds=10.0, digest=None, accuracy=50.0):
    line = {"commit": "c", "torch": "2", "length": training.length}
    line["rows"] = [{"arm": training.arm, "seed": training.seed, "accuracy, %": accuracy}]
    return queue.Done(training.key, digest or training.digest, kind, seconds, line)


def test_finished_trainings_do_not_come_again(trainings):
    first, *rest = queue.waiting(trainings, [], "avx2")
    assert len(rest) + 1 == len(trainings)
    assert queue.waiting(trainings, [ended(first)], "avx2") == rest or first not in queue.waiting(
        trainings, [ended(first)], "avx2"
    )
    assert queue.waiting(trainings, [ended(t) for t in trainings], "avx2") == []


def test_a_line_of_an_earlier_plan_counts_for_nothing(trainings):
    first = trainings[0]
    assert first in queue.waiting(trainings, [ended(first, digest="of another plan")], "avx2")


def test_tables_take_turns_by_what_is_done(trainings):
    order = queue.waiting(trainings, [], "avx2")
    assert {t.table for t in order[:2]} == {"ofq", "shift"}
    assert [t.rank for t in order] == sorted(t.rank for t in order)
    shift = [ended(t) for t in trainings if t.table == "shift" and t.seed == 0]
    assert {t.table for t in queue.waiting(trainings, shift, "avx2")[:3]} == {"ofq"}


def test_secondary_arms_wait_for_the_primary_ones(trainings):
    order = [t for t in queue.waiting(trainings, [], "avx2") if t.table == "shift"]
    assert [t.arm for t in order[-2:]] == ["S3", "S3"]
    assert [t.seed for t in order[:-2]] == sorted(t.seed for t in order[:-2])


def test_the_twins_of_a_seed_come_before_its_other_arms(trainings):
    order = [t for t in queue.waiting(trainings, [], "avx2") if t.table == "shift" and t.rank == 0 and t.seed == 0]
    twins = [t for t in order if t.bits == 32]
    assert order[: len(twins)] == twins and len({t.epochs for t in twins}) > 1
    assert [t.epochs for t in order[len(twins) :]] == sorted(t.epochs for t in order[len(twins) :])


def test_budgets_that_only_show_the_course_come_after_the_judged_one(planned):
    held = planned(lambda tree: tree["shift"].update(later=[1]))
    order = [t for t in queue.waiting(list(plan.trainings(held)), [], "avx2") if t.table == "shift" and t.arm != "S3"]
    assert [t.epochs for t in order] == [2] * 6 + [1] * 6
    assert [t.seed for t in order] == [0, 0, 0, 1, 1, 1] * 2


def test_a_table_may_wait_for_a_kind_of_processor(planned):
    held = planned(lambda tree: tree["shift"].update(only="cuda"))
    trainings = list(plan.trainings(held))
    assert {t.table for t in queue.waiting(trainings, [], "avx2")} == {"ofq"}
    assert {t.table for t in queue.waiting(trainings, [], "cuda")} == {"ofq", "shift"}


def test_a_block_stays_on_the_kind_of_processor_where_it_began(trainings):
    first = next(t for t in trainings if t.block == ("shift", 1, 0))
    order = queue.waiting(trainings, [ended(first, "bf16")], "avx2")
    assert not any(t.block == first.block for t in order)
    assert any(t.block == ("shift", 1, 1) for t in order)
    there = queue.waiting(trainings, [ended(first, "bf16")], "bf16")
    assert sum(t.block == first.block for t in there) == 2  # the two other arms of the block


def test_blocks_of_others_are_taken_up_when_nothing_else_is_left(trainings):
    block = [t for t in trainings if t.block == ("shift", 1, 0)]
    lines = [ended(t) for t in trainings if t not in block] + [ended(block[0], "bf16")]
    assert queue.waiting(trainings, lines, "avx2") == block[1:]


def test_a_table_has_one_kind_of_processor_in_a_block(trainings):
    block = [t for t in trainings if t.block == ("shift", 1, 0)]
    lines = [ended(block[0], "bf16", accuracy=1), *(ended(t, "avx2", accuracy=2) for t in block[:2])]
    chosen = collected.choose(trainings, queue.current(trainings, lines))
    assert [(line.key, line.kind) for line in chosen] == [(t.key, "avx2") for t in block[:2]]
    assert collected.frame(chosen)["accuracy, %"].tolist() == [2, 2]


def test_the_time_of_an_epoch_is_that_of_the_arm_or_else_of_the_table(trainings):
    one, other = (next(t for t in trainings if t.key == ("shift", arm, 3, 2, 0)) for arm in ("DenseShift", "S3"))
    lines = [ended(one, seconds=10), ended(one, seconds=30), ended(one, seconds=20), ended(one, "bf16", seconds=2)]
    assert queue.seconds_an_epoch(one, lines, "avx2") == 10  # two epochs
    assert queue.seconds_an_epoch(other, lines, "avx2") == 10
    assert queue.seconds_an_epoch(other, lines, "bf16") == 1
    assert queue.seconds_an_epoch(trainings[0], lines, "avx2") is None


@pytest.mark.parametrize(
    ("machine", "kind"),
    [
        ({"isa": ["avx2"]}, "avx2"),
        ({"isa": ["avx2", "avx512f", "avx512_vnni"]}, "avx512"),
        ({"isa": ["avx2", "avx512f", "avx512_bf16", "amx_int8"]}, "bf16"),
        ({"isa": ["neon"]}, "other"),
    ],
)
def test_kinds(machine, kind):
    assert queue.kind(machine) == kind


def test_a_training_that_somebody_has_is_not_given_twice(trainings):
    with queue.claimed(trainings[0]) as mine:
        assert mine == queue.folder(trainings[0]) and not mine.exists()  # the training makes it
        with queue.claimed(trainings[0]) as theirs, queue.claimed(trainings[1]) as other:
            assert theirs is None and other != mine
    with queue.claimed(trainings[0]) as again:
        assert again == mine


def test_a_line_says_where_it_was_made_and_survives_a_torn_one(trainings):
    training = trainings[0]
    result = {
        "rows": [{"arm": training.arm, "accuracy, %": 12.5}],
        "epochs_by_arm": {training.arm: {"train_loss": [1]}},
    }
    queue.note(training, result, 3.21)
    path = queue.journals() / f"{training.table}.jsonl"
    (line,) = [json.loads(text) for text in path.read_text().splitlines()]
    assert {"cpu", "isa", "torch", "commit", "kind", "digest", "ended"} <= set(line) and line["seconds"] == 3.2
    with path.open("a") as file:
        file.write('{"arm": "torn')
    (done,) = queue.done([training.table])
    assert done.key == training.key and done.line["rows"] == result["rows"]
