"""A training that goes on with another's moments takes the steps that the other would have taken."""

import copy

import pytest
import torch

import lowbit
from lowbit import TrainConfig
from lowbit.errors import LowbitError
from lowbit.training import Moments


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_going_on_equals_one_long_training(mlp, few, optimizer):
    """At a constant rate and with all samples in one batch, two trainings of one epoch are one of two."""
    common = {"optimizer": optimizer, "schedule": "constant", "lr": 0.01, "batch_size": 30, "progress": False}
    start = mlp(dropout=0.0)
    whole, first = copy.deepcopy(start), copy.deepcopy(start)
    lowbit.train(whole, few, TrainConfig(epochs=2, **common))
    moments = Moments()
    lowbit.train(first, few, TrainConfig(epochs=1, **common), callbacks=[moments])
    second, alone = copy.deepcopy(first), copy.deepcopy(first)
    lowbit.train(second, few, TrainConfig(epochs=1, **common), callbacks=[moments.handed_on()])
    lowbit.train(alone, few, TrainConfig(epochs=1, **common))

    def distance(model):
        pairs = zip(whole.parameters(), model.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    assert distance(second) < 1e-6 and distance(alone) > 1e-4


def test_trainings_do_not_share_what_is_handed_on(mlp, few):
    moments, config = Moments(), TrainConfig(epochs=1, batch_size=10, progress=False)
    model = mlp()
    lowbit.train(model, few, config, callbacks=[moments])
    before = copy.deepcopy(moments.held)
    lowbit.train(copy.deepcopy(model), few, config, callbacks=[moments.handed_on()])
    assert moments.held.keys() == before.keys()
    for key, kept in moments.held.items():
        assert all(torch.equal(torch.as_tensor(kept[name]), torch.as_tensor(before[key][name])) for name in kept)


def test_moments_that_are_not_there_or_do_not_fit_are_refused(mlp, few):
    with pytest.raises(LowbitError, match="no moments yet"):
        Moments().handed_on()
    moments, config = Moments(), TrainConfig(epochs=1, batch_size=10, progress=False)
    lowbit.train(mlp(), few, config, callbacks=[moments])
    larger = torch.nn.Sequential(*mlp(), torch.nn.Linear(3, 3))
    with pytest.raises(LowbitError, match="do not fit"):
        lowbit.train(larger, few, config, callbacks=[moments.handed_on()])
