"""APoT against values and gradients worked out by hand."""

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.functional import apot, apot_codes, apot_levels
from lowbit.quantizers import APoT

W = torch.tensor([[-1.0, 3.0, 1.0], [-1.0, 3.0, 1.0]])


def test_levels_by_hand():
    def positive(bits: int) -> list[float]:
        levels = apot_levels(bits)
        assert torch.equal(levels, -levels.flip(0))
        return levels[len(levels) // 2 :].tolist()

    assert positive(2) == [0, 1]
    assert positive(3) == [0, 0.25, 0.5, 1]  # three terms, one summand: plain powers of two
    assert positive(4) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1])  # {0,8,4,1}/16 + {0,2}/16, over 10/16
    # {0,32,8,2}/64 + {0,16,4,1}/64, over 48/64
    sums = [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48]
    assert positive(5) == pytest.approx([s / 48 for s in sums])
    assert [len(apot_levels(bits)) for bits in (2, 3, 4, 5)] == [3, 7, 15, 31]


def test_values_and_codes_by_hand():
    # mean 1, squares of the deviations 4·4 = 16 over 6 - 1: std = 1.7889, w̃ = ∓1.1180 and 0
    alpha = torch.tensor(2.0)  # x = ∓0.5590 and 0: nearest of 0, ¼, ½, 1 is ½
    assert apot(W, alpha, bits=3).tolist() == [[-1, 1, 0], [-1, 1, 0]]
    assert apot_codes(W, alpha, bits=3).tolist() == [[1, 5, 3], [1, 5, 3]]
    assert apot(W, alpha, bits=2).tolist() == [[-2, 2, 0], [-2, 2, 0]]  # 0.559 is nearer to 1 than to 0
    assert apot(W, torch.tensor(0.5), bits=3).tolist() == [[-0.5, 0.5, 0], [-0.5, 0.5, 0]]  # clipped


def test_shift_and_size_of_the_weights_do_not_matter():
    alpha = torch.tensor(3.0)
    w = torch.randn(8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(apot(w, alpha, 4), apot(100 * w + 7, alpha, 4))


@pytest.mark.parametrize("alpha", [2.0, 1.0], ids=["inside", "clipped"])
def test_gradients_by_hand(alpha):
    w = W.clone().requires_grad_()
    threshold = torch.tensor(alpha, requires_grad=True)
    grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    apot(w, threshold, bits=3).backward(grad)
    std = (16 / 5) ** 0.5
    assert torch.allclose(w.grad, grad / std)  # not masked where clipped; mean and deviation are constants
    # x = ∓2/(std·α) on the first two columns: 0.559 inside (level ½), 1.118 outside (sign); the third is 0 exactly
    x = 2 / (std * alpha)
    slope = 1.0 if x > 1 else 0.5 - x
    assert threshold.grad.item() == pytest.approx((-1 - 4 + 2 + 5) * slope, rel=1e-5)


def test_the_learnt_threshold_is_a_parameter_and_the_scale():
    quantizer = APoT(bits=4).weight(W)
    assert dict(quantizer.named_parameters()).keys() == {"alpha"} and quantizer.alpha.item() == 3.0
    assert quantizer.scale(W).tolist() == [[3.0]]
    quantizer(W).sum().backward()
    assert quantizer.alpha.grad is not None


def test_a_threshold_driven_below_zero_is_used_as_positive_and_still_learns():
    quantizer = APoT().weight(W)
    quantizer.alpha.data.fill_(-1.0)
    value = quantizer(W)
    assert torch.isfinite(value).all() and (quantizer.scale(W) > 0).all()
    value.backward(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert quantizer.alpha.grad.item() == -1 - 4 + 2 + 5


def test_a_layer_without_spread_gives_zeros_and_finite_gradients():
    for w in (torch.full((2, 3), 0.3), torch.tensor([[0.3]])):
        w.requires_grad_()
        value = apot(w, torch.tensor(3.0), bits=4)
        assert (value == 0).all()
        value.sum().backward()
        assert torch.isfinite(w.grad).all()


def test_half_precision_is_computed_in_full_precision():
    w = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    alpha = torch.tensor(3.0)
    assert apot(w, alpha, 4).dtype == torch.bfloat16
    assert torch.equal(apot(w, alpha, 4), apot(w.float(), alpha, 4).bfloat16())


@pytest.mark.parametrize("bits", [1, 6])
def test_wrong_bits_are_refused(bits):
    with pytest.raises(LowbitError, match="bits="):
        apot(torch.ones(1, 2), torch.tensor(3.0), bits)
    with pytest.raises(LowbitError, match="bits="):
        APoT(bits=bits)
