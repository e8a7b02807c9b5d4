"""Binary weights against values and gradients worked out by hand."""

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.functional import binary, binary_codes, binary_scale
from lowbit.quantizers import Binary

W = torch.tensor([[0.5, -1.0, 0.0, -2.5], [-0.0, 0.1, -0.2, 0.1]])  # mean|w| = 1 and 0.1


def test_values_by_hand_and_zeros_of_both_signs_are_positive():
    assert binary_scale(W).flatten().tolist() == pytest.approx([1.0, 0.1])
    assert binary_codes(W).tolist() == [[1, 0, 1, 0], [1, 1, 0, 1]]
    assert binary(W)[0].tolist() == [1, -1, 1, -1]
    assert torch.allclose(binary(W)[1], torch.tensor([0.1, 0.1, -0.1, 0.1]))


def test_published_gradient_by_hand():
    # 1/n = ¼ everywhere, plus the row's scale where |w| <= 1, the bound included
    w = W.clone().requires_grad_()
    binary(w).backward(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]))
    assert w.grad[0].tolist() == [1.25, 2.5, 3.75, 1.0]
    assert torch.allclose(w.grad[1], 0.35 * torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_straight_through_gradient_by_hand():
    w = W.clone().requires_grad_()
    binary(w, gradient="ste").backward(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]))
    assert w.grad.tolist() == [[1, 2, 3, 0], [1, 2, 3, 4]]


def test_the_option_reaches_the_gradient():
    grads = []
    for gradient in ("published", "ste"):
        w = W.clone().requires_grad_()
        Binary(gradient=gradient).weight(W)(w).sum().backward()
        grads.append(w.grad)
    assert not torch.equal(*grads)


def test_convolution_rows_are_output_channels():
    w = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    flat = w.detach().reshape(3, -1).requires_grad_()
    assert torch.equal(binary(w), binary(flat).reshape(w.shape))
    binary(w).sum().backward()
    binary(flat).sum().backward()
    assert torch.equal(w.grad, flat.grad.reshape(w.shape))


def test_half_precision_is_computed_in_full_precision():
    w = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert binary(w).dtype == torch.bfloat16
    assert torch.equal(binary(w), binary(w.float()).bfloat16())


def test_wrong_options_are_refused():
    with pytest.raises(LowbitError, match=r"gradient='exact'.*'published' and 'ste'"):
        binary(W, gradient="exact")
    with pytest.raises(LowbitError, match="gradient='exact'"):
        Binary(gradient="exact")
    with pytest.raises(LowbitError, match="bits=2"):
        Binary(bits=2)
