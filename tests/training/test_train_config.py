import dataclasses

import pytest

from lowbit.errors import LowbitError
from lowbit.training import TrainConfig
from lowbit.training.config import differences


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epochs": 0}, ["epochs=0", "1"]),
        ({"epochs": "3"}, ["epochs='3'", "integer"]),
        ({"epochs": True}, ["epochs=True", "integer"]),
        ({"batch_size": 2.0}, ["batch_size=2.0", "integer"]),
        ({"lr": -1.0}, ["lr=-1.0", "greater than 0"]),
        ({"lr": float("nan")}, ["lr=nan"]),
        ({"lr": float("inf")}, ["lr=inf"]),
        ({"optimizer": "adam"}, ["optimizer='adam'", "adamw", "sgd", "radam"]),
        ({"decay": "none"}, ["decay='none'", "all", "weights"]),
        ({"schedule": "step"}, ["schedule='step'", "cosine", "constant"]),
        ({"augment": "mixup"}, ["augment='mixup'", "randaugment"]),
        ({"amp": "fp16"}, ["amp='fp16'", "bf16"]),
        ({"label_smoothing": 1.0}, ["label_smoothing=1.0", "less than 1"]),
        ({"distill_weight": 1.5}, ["distill_weight=1.5"]),
        ({"clip_grad": 0.0}, ["clip_grad=0.0"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"warmup_epochs": 6}, ["warmup_epochs", "6", "epochs=5"]),
        ({"lr": 0.1, "min_lr": 0.2}, ["min_lr", "0.2", "lr=0.1"]),
        ({"learning_rate": 0.1}, ["learning_rate", "lr, min_lr"]),
        ({"warmup_epoch": 1}, ["warmup_epoch", "did you mean 'warmup_epochs'"]),
    ],
)
def test_wrong_values_are_refused_by_name(wrong, told):
    with pytest.raises(LowbitError) as refused:
        TrainConfig(**{"epochs": 5, **wrong})
    for words in told:
        assert words in str(refused.value)


def test_epochs_are_needed():
    with pytest.raises(LowbitError, match="epochs"):
        TrainConfig()


def test_frozen_and_round_trip():
    config = TrainConfig(epochs=5, lr=1, out="somewhere")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 2.0
    assert TrainConfig(**config.to_dict()) == config
    with pytest.raises(LowbitError, match="epochs=0"):
        dataclasses.replace(config, epochs=0)


def test_differences_name_the_fields():
    old, new = TrainConfig(epochs=5, out="a").to_dict(), TrainConfig(epochs=6, lr=0.5, out="b").to_dict()
    assert differences(old, new) == ["epochs: 5 → 6", "lr: 0.001 → 0.5"]
    assert differences(old, {**old, "more": 1}) == ["more: '(absent)' → 1"]
