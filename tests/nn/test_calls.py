"""Helpers around the calls of modules."""

import threading

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn.calls import call, size_of, with_first
from lowbit.quantizers import StatsQ


class Other(nn.Module):
    """A module whose first argument has a name of its own."""

    def forward(self, hidden_states, mask=None):
        return hidden_states if mask is None else hidden_states + mask


@pytest.mark.parametrize(
    ("module", "args", "kwargs", "expected"),
    [
        (Other(), (1, 5), {}, ((2, 5), {})),
        (Other(), (), {"hidden_states": 1, "mask": 5}, ((), {"hidden_states": 2, "mask": 5})),
        (nn.Linear(1, 1), (), {"input": 1}, ((), {"input": 2})),
        (Other(), (), {"input": 1, "mask": 5}, ((), {"input": 2, "mask": 5})),
        (Other(), (), {"mask": 5}, ((), {"mask": 5})),
    ],
)
def test_the_first_argument_is_changed_by_place_or_name(module, args, kwargs, expected):
    assert with_first(module, args, kwargs, lambda value: 2 * value) == expected


def test_a_batch_is_one_tensor_or_several_arguments():
    x, mask = torch.ones(3, 2), torch.full((3, 2), 4.0)
    assert torch.equal(call(Other(), x), x)
    for batch in ((x, mask), [x, mask], {"hidden_states": x, "mask": mask}):
        assert torch.equal(call(Other(), batch), x + mask) and size_of(batch) == 3
    with pytest.raises(LowbitError, match="not int"):
        size_of(5)


class Keeps(nn.Sequential):
    """Keeps what it has computed, as models do that show their features or add them to a loss."""

    def forward(self, x):
        self.features = super().forward(x)
        return self.features


def test_what_cannot_be_copied_is_named(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(4, 4), Keeps(nn.Linear(4, 4)), nn.Linear(4, 2))

    x = torch.ones(2, 4)
    model = lowbit.quantize_(make(), lowbit.QuantConfig(StatsQ(bits=3)))
    model(x).sum().backward()
    with pytest.raises(LowbitError, match=r"cannot be copied \(RuntimeError: .*because of '1.features': delete"):
        lowbit.pack(model)
    del model[1].features
    path = lowbit.save(lowbit.pack(model), tmp_path / "m.safetensors")
    other = make()
    other[0].lock = threading.Lock()
    with pytest.raises(LowbitError, match=r"TypeError: .*because of '0.lock': delete"):
        lowbit.load_into(other, path)
    assert type(other[1][0]) is nn.Linear
