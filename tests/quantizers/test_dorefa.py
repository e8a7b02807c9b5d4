"""DoReFa against values and gradients worked out by hand."""

import math

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.functional import dorefa, dorefa_activation, dorefa_activation_codes, dorefa_codes, dorefa_scale
from lowbit.quantizers import DoReFa

# tanh w = 0.8, -0.4, 0.2, -0.1
T = torch.tensor([[0.8, -0.4], [0.2, -0.1]], dtype=torch.float64)
W = torch.atanh(T)


def test_weight_values_by_hand():
    # tanh/max = 1, -½, ¼, -⅛; on 0 ... 3: 3, 0.75, 1.875, 1.3125
    assert dorefa_codes(W, 2).tolist() == [[3, 1], [2, 1]]
    assert torch.allclose(dorefa(W, 2), torch.tensor([[1, -1 / 3], [1 / 3, -1 / 3]], dtype=torch.float64))
    # on 0 ... 7: 7, 1.75, 4.375, 3.0625
    assert dorefa_codes(W, 3).tolist() == [[7, 2], [4, 3]]
    assert torch.allclose(7 * dorefa(W, 3), torch.tensor([[7, -3], [1, -1]], dtype=torch.float64))


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_odd_multiples_without_zero(bits):
    levels = DoReFa(bits=bits).weight(W).levels * (2**bits - 1)
    assert levels.round().tolist() == list(range(1 - 2**bits, 2**bits, 2)) and torch.allclose(levels, levels.round())


def test_weight_gradient_by_hand_through_tanh_and_maximum():
    w = W.clone().requires_grad_()
    g = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    dorefa(w, 2).backward(g)
    # ŵ counts as t/M, M = 0.8 = t[0, 0]: G/M for each t, and -Σ G·t/M² more for the largest
    expected = g / 0.8
    expected[0, 0] -= (g * T).sum() / 0.64
    assert torch.allclose(w.grad, expected * (1 - T**2))


def test_one_bit_by_hand():
    w = torch.tensor([[0.5, -1.0], [0.0, -2.5]], requires_grad=True)  # mean|w| = 1, over the layer
    y = dorefa(w, 1)
    assert y.tolist() == [[1, -1], [1, -1]]
    assert dorefa_codes(w, 1).tolist() == [[1, 0], [1, 0]]
    assert dorefa(w.detach() * 3, 1).tolist() == [[3, -3], [3, -3]] and dorefa_scale(3 * w, 1).tolist() == [[3.0]]
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    y.backward(grad)
    assert torch.equal(w.grad, grad)


def test_activation_values_and_gradient_by_hand():
    x = torch.tensor([-0.1, 0.0, 0.1, 0.2, 0.8, 1.0, 1.1], requires_grad=True)
    y = dorefa_activation(x, 2)
    assert torch.equal(y, torch.tensor([0, 0, 0, 1, 2, 3, 3]) / 3)
    assert dorefa_activation_codes(x, 2).tolist() == [0, 0, 0, 1, 2, 3, 3]
    grad = torch.arange(1.0, 8.0)
    y.backward(grad)
    assert torch.allclose(x.grad, torch.tensor([0, 2, 3, 4, 5, 6, 0.0]))


def test_one_bit_activation_by_hand():
    assert dorefa_activation(torch.tensor([-1.0, 0.4, 0.6, 7.0]), 1).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_layer_of_zeros_has_finite_values_and_gradients(bits):
    w = torch.zeros(2, 3, requires_grad=True)
    y = dorefa(w, bits)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(w.grad).all()


def test_both_kinds_from_one_configuration():
    config = DoReFa(bits=3)
    assert config.quantizes("weight") and config.quantizes("activation")
    x = torch.rand(2, 5)
    activation = config.activation()
    assert activation.calibrated and not list(activation.parameters())
    assert torch.equal(activation(x), activation.levels[activation.codes(x).long()])


def test_half_precision_is_computed_in_full_precision():
    x = torch.linspace(-1, 2, 101).bfloat16()
    for function in (dorefa, dorefa_activation):
        assert function(x, 4).dtype == torch.bfloat16
        assert torch.equal(function(x, 4), function(x.float(), 4).bfloat16())


@pytest.mark.parametrize("bits", [0, 9, 2.0])
def test_wrong_bits_are_refused(bits):
    for function in (dorefa, dorefa_codes, dorefa_activation, dorefa_activation_codes):
        with pytest.raises(LowbitError, match="bits="):
            function(torch.ones(1, 1), bits)


def test_the_largest_weight_alone_has_no_gradient():
    """t/max|t| of the largest weight is ±1 whatever it is, when nothing else depends on it."""
    w = torch.tensor([[math.atanh(0.5), 0.0]], requires_grad=True)
    dorefa(w, 4)[0, 0].backward()
    assert w.grad[0, 0].item() == pytest.approx(0, abs=1e-6)
