"""Data for the training tests with the interface of lowbit.data, made of given tensors."""

import dataclasses
from types import SimpleNamespace

import torch


@dataclasses.dataclass(frozen=True)
class Items(torch.utils.data.Dataset):
    x: torch.Tensor
    y: torch.Tensor

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


def make_data(x, y, test_x, test_y, classes, **more):
    means = (
        {"mean": (0.3,) * x.shape[1], "std": (0.4,) * x.shape[1]} if x.dtype == torch.uint8 else {"mean": (), "std": ()}
    )
    given = {
        "name": "made",
        "task": "classification",
        "classes": tuple(str(i) for i in range(classes)),
        "train": Items(x, y),
        "test": Items(test_x, test_y),
        "input_shape": tuple(x.shape[1:]),
        "num_classes": classes,
        **means,
        **more,
    }
    return SimpleNamespace(**given)
