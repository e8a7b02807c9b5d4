"""`compare`: where a packed model's integers part from the fake-quantized model's, and by how much."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn.agreement import compare
from lowbit.nn.packed import PackedLayer
from lowbit.quantizers import LSQ, DenseShift


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    x = torch.randn(24, 3, 16, 16)
    model = lowbit.models.create("resnet8", 10)
    lowbit.quantize_(model, lowbit.QuantConfig(weight=DenseShift(bits=3), activation=LSQ(bits=8), first_last=8))
    lowbit.calibrate(model, x)
    with torch.no_grad():
        model.train()(x)
    model.eval()
    return model, lowbit.pack(model, x[:1]), x


def test_rows_and_what_explains_differences(pair):
    model, packed, x = pair
    rows = compare(model, packed, x)
    assert rows.layer.tolist() == [n for n, m in packed.named_modules() if isinstance(m, PackedLayer)]
    assert rows.numbers[0] == x.numel() and rows.values_differ[0] == rows.steps_differ[0] == 0  # the same input
    assert rows.values_differ.sum() > 0 and (rows.steps_differ <= rows.numbers).all()
    assert rows["first"].sum() <= len(x)
    assert (rows.first_step <= 1).all() and (rows.from_border < 1e-3).all()


def test_by_hand():
    layer = nn.Linear(2, 2, bias=False)
    config = lowbit.QuantConfig(weight=DenseShift(bits=2), activation=LSQ(bits=8), first_last="same")
    model = lowbit.quantize_(nn.Sequential(layer), config).eval()
    lowbit.calibrate(model, torch.tensor([[1.0, 2.0]]))
    packed = lowbit.pack(model)
    with torch.no_grad():
        packed[0].x_scale.fill_(1.0)
    shifted = nn.Sequential(packed[0])
    x = torch.tensor([[0.25, 3.0], [0.25, -2.0]])

    class Moved(nn.Sequential):
        def forward(self, x):
            return super().forward(x + torch.tensor([0.5, 0.0]))

    rows = compare(Moved(packed[0]), shifted, x)  # 0.75 becomes 1, 0.25 becomes 0; the border is 0.5
    assert rows.iloc[0][["numbers", "values_differ", "steps_differ", "first", "first_step"]].tolist() == [4, 2, 2, 2, 1]
    assert rows.from_border[0] == 0.25


def test_a_wrong_layer_is_not_explained_by_borders(pair):
    model, _, x = pair
    packed = lowbit.pack(model, x[:1])
    layers = [m for m in packed.modules() if isinstance(m, PackedLayer)]
    layers[1].scale[0] *= 1.5
    rows = compare(model, packed, x)
    assert rows["first"].sum() == len(x) and rows.from_border.max() > 0.1
