"""Spacing, reach and boundary density, on weights worked by hand."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit import LowbitError, QuantConfig
from lowbit.metrics import boundary_density, reach, spacings
from lowbit.quantizers import LSQ, DenseShift, StatsQ


def quantized(weight, method):
    weight = torch.tensor(weight)
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return lowbit.quantize_(model, QuantConfig(weight=method, first_last="same"))


def test_statsq_by_hand():
    """Rows with mean |w| of 1 and 2: at 2 bits s = 2·mean, thresholds at -s/2, 0, s/2, so s/2 apart."""
    model = quantized([[0.05, -1.95, 1.04, -0.96], [0.5, -3.5, 1.9, -2.1]], StatsQ(bits=2))
    assert spacings(model).tolist() == pytest.approx([1, 2])
    # in spacings: 0.05 | -1.95 (0.95 beyond the outermost) | 1.04 | -0.96 ; 0.25 | -1.75 | 0.95 | -1.05
    assert boundary_density(model, width=0.045) == pytest.approx(2 / 8)
    assert boundary_density(model, width=0.051) == pytest.approx(5 / 8)
    assert boundary_density(model, width=0.3) == pytest.approx(6 / 8)
    assert reach(3.0, model) == pytest.approx(3 / 1)  # torch's median is the lower of two


def test_lsq_by_hand():
    """The levels are -2, -1, 0, 1 steps, the thresholds at -1.5, -0.5 and 0.5."""
    model = quantized([[0.1, 0.1, 0.1, 0.1]], LSQ(bits=2))
    with torch.no_grad():
        held = model[0].parametrizations.weight
        held[0].step.fill_(2.0)
        held.original.copy_(torch.tensor([[1.04, 3.0, -0.9, -3.06]]))  # 0.52, 1.5, -0.45, -1.53 steps
    assert spacings(model).tolist() == [2]
    assert boundary_density(model, width=0.025) == 1 / 4
    assert boundary_density(model, width=0.035) == 2 / 4
    assert boundary_density(model, width=0.055) == 3 / 4
    assert boundary_density(model, width=0.49) == 3 / 4  # one step beyond the last threshold


@pytest.mark.parametrize("method", [LSQ(bits=3), StatsQ(bits=3)])
def test_density_counts_the_weights_that_a_small_push_moves(method):
    torch.manual_seed(0)
    model = quantized(torch.randn(16, 256).tolist(), method)
    layer = model[0].parametrizations.weight
    with torch.no_grad():
        scale, levels = layer[0].scale(layer.original), layer[0].levels
        push = 0.05 * scale * (levels[1] - levels[0])
        midpoints = (levels[1:] + levels[:-1]) / 2
        codes = [torch.bucketize((layer.original + sign * push) / scale, midpoints) for sign in (-1, 1)]
    moved = (codes[0] != codes[1]).double().mean().item()
    assert boundary_density(model) == pytest.approx(moved, abs=2 / 4096)


def test_only_layers_of_the_given_width_count():
    model = lowbit.models.create("vit_nano", img_size=8, in_chans=1, patch_size=4)
    lowbit.quantize_(model, QuantConfig(weight=StatsQ(bits=2), activation=LSQ(bits=2), first_last=8))
    assert len(spacings(model)) > len(spacings(model, 2)) == 4 * (3 * 128 + 128 + 512 + 128)
    assert len(spacings(model, 8)) == 128 + 10


def test_refusals():
    with pytest.raises(LowbitError, match="no weight quantizer of 3 bits"):
        spacings(quantized([[1.0, 2.0]], StatsQ(bits=2)), 3)
    with pytest.raises(LowbitError, match="no weight quantizer with one latent"):
        boundary_density(quantized([[1.0, 2.0]], DenseShift(bits=2)))
    with pytest.raises(LowbitError, match=r"width=0\.5"):
        boundary_density(quantized([[1.0, 2.0]], StatsQ(bits=2)), width=0.5)
