"""Small data and models for the training tests, independent of the data registry."""

import pytest
import torch
from torch import nn
from training_helpers import make_data


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits as uint8 [N,1,8,8]: 1,437 to train on, 360 to test on."""
    from sklearn.datasets import load_digits

    held = load_digits()
    x = torch.from_numpy(held.images * 15).to(torch.uint8)[:, None]
    y = torch.from_numpy(held.target).long()
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = shuffled[:1437], shuffled[1437:]
    return make_data(x[train], y[train], x[test], y[test], 10, name="digits")


@pytest.fixture
def few():
    """Forty random 4×4 images of three classes, so that a run takes milliseconds."""
    random = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (40, 1, 4, 4), generator=random, dtype=torch.uint8)
    y = torch.randint(0, 3, (40,), generator=random)
    return make_data(x[:30], y[:30], x[30:], y[30:], 3)


@pytest.fixture
def mlp():
    """Makes a small network with dropout for n inputs and k classes, always with the same weights."""

    def make(inputs=16, classes=3, dropout=0.2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, classes)
            )

    return make


@pytest.fixture
def quick():
    """Makes a configuration for the small data sets."""
    from lowbit.training import TrainConfig

    def make(**changes):
        return TrainConfig(**{"epochs": 3, "batch_size": 10, "lr": 0.01, "progress": False, **changes})

    return make
