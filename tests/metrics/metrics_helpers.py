"""A small model and small data for the trackers' tests; also used by the two-process script."""

from types import SimpleNamespace

import torch
from torch import nn

import lowbit


class Items(SimpleNamespace):
    def __len__(self):
        return len(self.x)


def make_data(train=64, test=16, classes=4):
    """Random gray images of 2 x 4 pixels, with the interface of lowbit.data's sets."""
    random = torch.Generator().manual_seed(1)

    def items(n):
        x = torch.randint(256, (n, 1, 2, 4), generator=random, dtype=torch.uint8)
        return Items(x=x, y=torch.randint(classes, (n,), generator=random))

    return SimpleNamespace(
        name="made",
        task="classification",
        classes=tuple(map(str, range(classes))),
        train=items(train),
        test=items(test),
        input_shape=(1, 2, 4),
        num_classes=classes,
        mean=(0.5,),
        std=(0.3,),
    )


def make_model(method=None):
    """Three linear layers, the middle one quantized (all three with first_last="same")."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.ReLU(), nn.Linear(12, 4)
    model = nn.Sequential(*layers)
    return model if method is None else lowbit.quantize_(model, lowbit.QuantConfig(weight=method, first_last="same"))


def make_config(**changes):
    settings = {"epochs": 4, "batch_size": 16, "lr": 0.05, "optimizer": "sgd", "progress": False, "seed": 3}
    return lowbit.TrainConfig(**{**settings, **changes})
