"""The definition itself, against values by hand and against PyTorch's layers."""

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import randn, random_weight

from lowbit.functional import denseshift_levels, lsq
from lowbit.kernels import pack_weight, reference


def test_linear_by_hand():
    weight = pack_weight(torch.tensor([[0, 3], [2, 1]]), denseshift_levels(2), torch.tensor([0.5, 2.0]))  # -2 2 / 1 -1
    x = torch.tensor([[1, -3]], dtype=torch.int8)
    y = reference.linear(x, weight, torch.tensor([1.0, -20.0]), torch.tensor(0.25))
    assert y.tolist() == [[-8 * 0.25 * 0.5 + 1, 4 * 0.25 * 2 - 20]]
    y = reference.linear(x, weight, torch.tensor([1.25, -20.0]), torch.tensor(0.25), out_scale=0.5)
    assert y.dtype == torch.int8 and y.tolist() == [[0, -36]]  # 0.25/0.5 rounds half to even
    y = reference.linear(x, weight, torch.tensor([1.75, -20.0]), torch.tensor(0.25), relu=True, out_scale=0.5)
    assert y.tolist() == [[2, 0]]  # 1.5 rounds to 2


def test_a_residual_by_hand():
    weight = pack_weight(torch.tensor([[0, 255], [128, 129]]), torch.arange(-128.0, 128.0))  # -128 127 / 0 1
    x, one = torch.tensor([[1, -1], [-128, 127]], dtype=torch.int8), torch.tensor(1.0)
    assert weight.bits == 8
    assert reference.linear(x, weight, x_scale=one).tolist() == [[-255, -1], [32513, 127]]
    add = torch.tensor([[1.5, -2.0], [0.0, 4.0]])
    bias = torch.tensor([0.0, 1.0])
    y = reference.linear(x, weight, bias, one, add=add)
    assert y.tolist() == [[-253.5, -2], [32513, 132]]
    assert reference.linear(x, weight, bias, one, add=add, relu=True).tolist() == [[0, 0], [32513, 132]]
    y = reference.linear(x, weight, bias, one, add=torch.tensor([[255, 3], [0, 200]], dtype=torch.uint8), add_scale=0.5)
    assert y.tolist() == [[-127.5, 1.5], [32513, 228]]
    y = reference.linear(x, weight, bias, one, add=add.to(torch.int8), add_scale=2.0, relu=True, out_scale=2.0)
    assert y.dtype == torch.int8 and y.tolist() == [[0, 0], [127, 68]]  # after the residual: ReLU, then rounding
    image, kernel = x.reshape(1, 2, 2, 1).float(), pack_weight(torch.full((1, 2, 1, 1), 1), torch.tensor([-1.0, 1.0]))
    y = reference.conv2d(image, kernel, x_scale=one, add=torch.tensor([[[[10.0], [20.0]]]]))
    assert y.tolist() == [[[[1 - 127 + 10.0], [-1 + 127 + 20.0]]]]  # float -128 is beyond low=-127


def test_rows_are_quantized_by_their_largest_value():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-44, 0.0, 0.0]])
    scale = reference.dynamic_scale(x, 127)
    assert scale.flatten().tolist() == [
        torch.tensor(2 / 127).item(),
        reference.SMALLEST_SCALE,
        reference.SMALLEST_SCALE,
    ]
    assert reference.quantize(x, scale, -127, 127).tolist() == [[64, -127, 32], [0, 0, 0], [0, 0, 0]]


def test_quantizing_is_that_of_lsq():
    x, step = 3 * randn(4, 100), torch.tensor(0.3)
    for bits, signed, low, high in ((3, True, -4, 3), (4, False, 0, 15), (8, False, 0, 255)):
        assert torch.equal(reference.quantize(x, step, low, high) * step, lsq(x, step, bits, signed))


def test_what_is_no_number():
    weight = random_weight("denseshift3", (4, 3))
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0], [1.0, 1.0, 1.0]])
    assert reference.linear(x, weight).isnan().all(dim=1).tolist() == [True, True, False]  # the scale is no number
    fixed = reference.linear(x, weight, x_scale=torch.tensor(0.1))
    same = torch.tensor([[1.0, 0.0, 2.0], [1.0, 12.7, 2.0], [1.0, 1.0, 1.0]])
    expected = reference.linear(same, weight, x_scale=torch.tensor(0.1))
    assert torch.equal(fixed, expected)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (1, 2)])
def test_convolution_is_pytorchs(stride, dilation):
    weight = random_weight("statsq3", (6, 5, 3, 2))
    x = torch.randint(-128, 128, (2, 5, 9, 8), dtype=torch.int8)
    y = reference.conv2d(x, weight, None, torch.tensor(0.5), stride=stride, padding=(1, 2), dilation=dilation)
    kernel = weight.integers().double()
    expected = (
        F.conv2d(x.double(), kernel, None, stride, (1, 2), dilation).float() * 0.5 * weight.scale.reshape(-1, 1, 1)
    )
    assert torch.equal(y, expected)


def test_linear_is_close_to_the_float_layer():
    weight = random_weight("statsq4", (30, 200))
    x = randn(7, 200)
    y, expected = reference.linear(x, weight), F.linear(x, weight.dequantize())
    assert (y - expected).norm() < 0.01 * expected.norm()
