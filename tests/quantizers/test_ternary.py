"""TWN and TTQ against values and gradients worked out by hand."""

import copy

import pytest
import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.functional import ternary, ternary_codes, ternary_scale, ttq, ttq_codes, ttq_levels
from lowbit.nn import QuantConfig, quantize_, quantized_layers
from lowbit.quantizers import Ternary

W = torch.tensor([[2.0, -1.0, 0.6, 0.0], [1.5, -2.5, 1.0, 0.0]])


def test_twn_by_hand_per_layer():
    # mean|w| = 1: kept is what exceeds 0.7
    w = torch.tensor([[2.0, -1.0, 0.72, 0.0], [1.4, -2.2, 0.68, 0.0]])
    assert ternary_codes(w).tolist() == [[2, 0, 2, 1], [2, 0, 1, 1]]
    scale = 7.32 / 5
    assert ternary_scale(w).flatten().tolist() == pytest.approx([scale])
    assert torch.allclose(ternary(w), scale * torch.tensor([[1.0, -1, 1, 0], [1, -1, 0, 0]]))


def test_twn_by_hand_per_channel():
    w = torch.tensor([[2.0, -1.0, 0.6, 0.0], [0.02, -0.01, 0.006, 0.0]])  # per layer the second row would vanish
    assert ternary_codes(w, "channel").tolist() == [[2, 0, 1, 1], [2, 0, 1, 1]]
    assert ternary_scale(w, "channel").flatten().tolist() == pytest.approx([1.5, 0.015])
    assert ternary_codes(w).tolist() == [[2, 0, 2, 1], [1, 1, 1, 1]]  # threshold 0.7·3.636/8 = 0.318


def test_twn_gradient_is_the_identity():
    w = W.clone().requires_grad_()
    grad = torch.arange(8.0).reshape(2, 4)
    ternary(w).backward(grad)
    assert torch.equal(w.grad, grad)


def test_twn_scale_is_the_least_squares_best():
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    error = (ternary(w) - w).square().sum()
    for factor in (0.99, 1.01):
        assert (factor * ternary(w) - w).square().sum() > error


def test_convolution_rows_are_output_channels():
    w = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ternary(w, "channel"), ternary(w.reshape(3, -1), "channel").reshape(w.shape))


def test_ttq_by_hand():
    # max|w| = 2.5, t = 0.4: threshold 1; a weight exactly at it, on either side, is zero
    w_p, w_n = torch.tensor(2.0), torch.tensor(0.5)
    assert ttq_codes(W, 0.4).tolist() == [[2, 1, 1, 1], [2, 0, 1, 1]]
    assert ttq(W, w_p, w_n, 0.4).tolist() == [[2, 0, 0, 0], [2, -0.5, 0, 0]]
    assert ttq_levels(w_p, w_n).tolist() == [-0.25, 0, 1]
    assert ttq_codes(W).tolist() == [[2, 0, 2, 1], [2, 0, 2, 1]]  # the default t = 0.05: threshold 0.125


def test_ttq_gradients_by_hand():
    w = W.clone().requires_grad_()
    w_p, w_n = torch.tensor(2.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    ttq(w, w_p, w_n, 0.4).backward(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    assert w.grad.tolist() == [[2, 2, 3, 4], [10, 3, 7, 8]]
    assert w_p.grad.item() == 1 + 5 and w_n.grad.item() == -6


def test_ttq_scales_start_at_one_or_at_the_mean():
    one, mean = (Ternary(variant="ttq", threshold=0.4, init=init).weight(W) for init in ("one", "mean"))
    assert (one.w_p.item(), one.w_n.item()) == (1, 1)
    assert (mean.w_p.item(), mean.w_n.item()) == (1.75, 2.5)
    nothing_negative = Ternary(variant="ttq", init="mean").weight(W.abs())
    assert nothing_negative.w_n.item() == 1


def test_ttq_scales_driven_below_zero_are_used_as_positive_and_still_learn():
    quantizer = Ternary(variant="ttq").weight(W)
    quantizer.w_p.data.fill_(-1)
    quantizer.w_n.data.fill_(-1)
    value = quantizer(W)
    assert (quantizer.scale(W) > 0).all() and (quantizer.levels.diff() > 0).all() and torch.isfinite(value).all()
    value.sum().backward()
    assert quantizer.w_p.grad.item() == 4 and quantizer.w_n.grad.item() == -2


def test_ttq_in_a_model_keeps_the_contract_through_training_and_saving():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    other = copy.deepcopy(model)
    config = QuantConfig(weight=Ternary(variant="ttq", threshold=0.3))
    quantize_(model, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y = torch.randn(32, 4), torch.randint(2, (32,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    (found,) = quantized_layers(model)
    assert found.weight.w_p.item() != found.weight.w_n.item()  # the two scales part
    expected = found.weight.levels[found.codes().long()] * found.weight.scale(*found.latents)
    assert torch.equal(found.layer.weight, expected)
    quantize_(other, config).load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_wrong_options_are_refused():
    with pytest.raises(LowbitError, match=r"granularity='row'.*'tensor' and 'channel'"):
        ternary(W, "row")
    with pytest.raises(LowbitError, match=r"granularity='channel'.*'ttq'"):
        Ternary(variant="ttq", granularity="channel")
    with pytest.raises(LowbitError, match="bits=3"):
        Ternary(bits=3)
    with pytest.raises(LowbitError, match=r"threshold=1\.0"):
        Ternary(variant="ttq", threshold=1.0)
