"""Fixed versions of the training images, and a teacher's stored answers to them."""

import copy

import pytest
import torch

import lowbit
from lowbit import LowbitError
from lowbit.training import augment, distillation
from lowbit.training.answers import stored_answers
from lowbit.training.batches import Batches
from lowbit.training.distributed import processes


@pytest.fixture
def teacher(mlp):
    return mlp(dropout=0.0).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    return tmp_path / "answers"


def batches(data, config):
    with processes("cpu") as here:
        return Batches(data, config, here)


def versions(data, crops):
    """Every version of every image, as what `augment.apply` makes of the fixed draw: uint8 [n, crops, C, H, W]."""
    n, shape = len(data.train), tuple(data.input_shape)
    drawn = augment.fixed("shift", n, crops, shape)
    one = [augment.apply(data.train.x, {name: v[:, k] for name, v in drawn.items()}) for k in range(crops)]
    return torch.stack(one, 1)


def test_fixed_versions_do_not_depend_on_the_run():
    torch.manual_seed(1)
    first = augment.fixed("crop_flip", 50, 3, (3, 32, 32))
    torch.manual_seed(2)
    second = augment.fixed("crop_flip", 50, 3, (3, 32, 32))
    assert {name: tuple(v.shape) for name, v in first.items()} == {"offsets": (50, 3, 2), "flips": (50, 3)}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(first["offsets"].flatten(0, 1).unique(dim=0)) > 50  # 81 places


def test_every_epoch_shows_versions_of_the_fixed_set_and_seeds_choose_others(digits, quick):
    made = versions(digits, 2).flatten(2)
    shown = {}
    for seed in (0, 1):
        config = quick(augment="shift", crops=2, batch_size=479, seed=seed)
        held = batches(digits, config)
        for epoch in (0, 1):
            order = lowbit.training.batches.order(1437, 479, seed, epoch)
            for items, (x, y) in zip(order, held.epoch(epoch), strict=True):
                raw = (x * 255 * 0.4 + 255 * 0.3).round().to(torch.uint8).flatten(1)
                same = (made[items] == raw[:, None]).all(2)
                assert same.any(1).all() and torch.equal(y, digits.train.y[items])
                shown.setdefault((seed, epoch), []).append(same[:, 0].float().mean().item())
    assert all(0.3 < sum(share) / 3 < 0.8 for share in shown.values())  # both versions come
    assert shown[0, 0] != shown[0, 1] != shown[1, 0]


def test_answers_are_those_of_the_version_that_is_shown(digits, quick, teacher, mlp):
    teacher = mlp(64, 10, 0.0).eval()
    held = batches(digits, quick(augment="shift", crops=3, batch_size=100))
    held.answers = stored_answers(teacher, held)
    assert held.answers.shape == (1437, 3, 10) and held.answers.dtype == torch.float16
    for x, y in held.epoch(1):
        assert isinstance(y, distillation.Taught)
        assert torch.allclose(y.answers, teacher(x), atol=5e-3)


def test_the_loss_is_that_of_a_teacher_that_answers_live(digits, quick, mlp):
    """One epoch with stored answers against a loop of our own that asks the teacher for each batch."""
    teacher, model = mlp(64, 10, 0.0), mlp(64, 10, 0.0)
    config = quick(epochs=1, augment="shift", crops=3, batch_size=100, optimizer="sgd", lr=1e-9)
    record = lowbit.train(copy.deepcopy(model), digits, config, teacher, device="cpu")
    losses = [
        distillation.loss(model(x), y, teacher=teacher.eval()(x), weight=0.5)
        for x, y in batches(digits, config).epoch(0)
    ]
    expected = torch.stack(losses).mean().item()
    assert record.final["train_loss"] == pytest.approx(expected, abs=1e-4)


def test_a_teacher_answers_once_for_all_runs(digits, quick, mlp, cache, monkeypatch):
    teacher = mlp(64, 10, 0.0)
    for seed in (0, 1):
        lowbit.train(mlp(64, 10), digits, quick(epochs=1, augment="shift", crops=2, seed=seed), teacher, device="cpu")
        assert len(list(cache.glob("*.safetensors"))) == 1
        monkeypatch.setattr(distillation, "target", None)  # nobody asks the teacher again
    with torch.no_grad():
        teacher[1].weight[0, 0] += 1
    with pytest.raises(TypeError):  # another teacher has other answers
        lowbit.train(mlp(64, 10), digits, quick(epochs=1, augment="shift", crops=2), teacher, device="cpu")


def test_other_versions_or_data_are_asked_anew(digits, few, quick, mlp, cache):
    for data, crops, inputs, classes in ((digits, 2, 64, 10), (digits, 3, 64, 10), (few, 2, 16, 3)):
        held = batches(data, quick(augment="shift", crops=crops))
        stored_answers(mlp(inputs, classes, 0.0).eval(), held)
    assert len(list(cache.glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "none"}, "crops=2 needs augment='shift' or 'crop_flip', not 'none'"),
        ({"augment": "shift", "mixup": 0.1}, "crops=2.*mixup and cutmix have to be 0"),
        ({"augment": "shift", "crops": -1}, "crops"),
    ],
)
def test_what_does_not_go_together_is_refused(quick, changes, message):
    with pytest.raises(LowbitError, match=message):
        quick(**{"crops": 2, **changes})
