"""S3 against values and gradients worked out by hand, and the formula composed of torch operations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.functional import s3, s3_codes, s3_latents, s3_levels
from lowbit.nn.convert import attach_
from lowbit.quantizers import S3

SHIFTS = {2: 0, 3: 2, 4: 6}
latent_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, math.inf, -math.inf, 0.3, -0.3])


def test_levels_by_hand():
    assert s3_levels(2).tolist() == [-1, 0, 1]
    assert s3_levels(3).tolist() == [-4, -2, -1, 0, 1, 2, 4]
    assert s3_levels(4).tolist() == [-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64]


def test_values_by_hand_with_the_first_shift_latent_as_master_gate():
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, -0.0, -1.0])
    sparse = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    t1 = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0, 1.0])
    t2 = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0, 1.0])
    weight = s3(sign, sparse, t1, t2)
    assert weight.tolist() == [4, -2, 1, -1, 1, 2, 0]
    assert not weight.signbit()[-1]  # zero is +0.0 whatever the sign latent
    assert s3_codes(sign, sparse, t1, t2).tolist() == [6, 1, 4, 2, 4, 5, 3]


def test_six_gates_count_the_leading_run():
    rows = [[1, 1, 1, 1, 1, 1], [1, 1, 1, -1, 1, 1], [1, -1, 1, 1, 1, 1], [-1, 1, 1, 1, 1, 1]]
    w_t = torch.tensor(rows, dtype=torch.float32).unbind(1)
    assert s3(torch.ones(4), torch.ones(4), *w_t).tolist() == [64, 8, 2, 1]


def test_gradient_by_hand():
    # Both gates open, sign negative: W = -4, G = 3.
    latents = [torch.tensor([v], requires_grad=True) for v in (-1.0, 0.5, 1.0, 1.0)]
    weight = s3(*latents)
    assert weight.item() == -4
    weight.backward(torch.tensor([3.0]))
    sign, sparse, t1, t2 = (t.grad.item() for t in latents)
    assert sign == 3 * 4 and sparse == 3 * -1 * 4
    d_s = 3 * -4 * math.log(2)
    assert t1 == pytest.approx(d_s * 2)  # [t2 > 0] + 1
    assert t2 == pytest.approx(d_s * 1)  # [t1 > 0]


def test_a_zero_moves_its_sparsity_latent_only():
    latents = [torch.tensor([v], requires_grad=True) for v in (-1.0, -0.5, 1.0, -1.0)]
    s3(*latents).backward()
    assert [t.grad.item() for t in latents] == [0, -2, 0, 0]


def test_a_closed_master_gate_stops_the_gradient_of_the_next():
    latents = [torch.tensor([v], requires_grad=True) for v in (1.0, 1.0, -1.0, 1.0)]
    s3(*latents).backward()
    assert latents[2].grad.item() == pytest.approx(math.log(2) * 2)
    assert latents[3].grad.item() == 0


@pytest.mark.parametrize("shifts", SHIFTS.values())
def test_gradient_equals_the_composed_expression(shifts):
    """The same graph from torch's own operations with straight-through binarizations."""
    torch.manual_seed(shifts)
    latents = [torch.randn(200, dtype=torch.float64) for _ in range(shifts + 2)]
    for t in latents[2:-2]:
        t.abs_()  # or hardly any long run would be met
    for t in latents:
        t.requires_grad_()
    grad = torch.randn(200, dtype=torch.float64)

    def through(value, t):
        return value + t - t.detach()

    def gate(t):
        return through((t > 0).double(), t)

    w_sign, w_sparse, *w_t = latents
    exponent = torch.zeros(200, dtype=torch.float64)
    for t in reversed(w_t):
        exponent = gate(t) * (exponent + 1)
    value = through(torch.where(w_sign >= 0, 1.0, -1.0).double(), w_sign) * gate(w_sparse) * 2**exponent
    expected = torch.autograd.grad(value, latents, grad, allow_unused=True)
    actual = torch.autograd.grad(s3(*latents), latents, grad)
    assert torch.allclose(s3(*latents), value)
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-10, atol=1e-12)


@given(st.sampled_from([0, 2, 6]).flatmap(lambda n: st.lists(latent_values, min_size=n + 2, max_size=n + 2)))
def test_values_are_always_in_the_set_and_agree_with_the_codes(values):
    bits = {0: 2, 2: 3, 6: 4}[len(values) - 2]
    latents = [torch.tensor([v]) for v in values]
    assert torch.equal(s3(*latents), s3_levels(bits)[s3_codes(*latents).long()])


@pytest.mark.parametrize("bits", SHIFTS)
def test_latents_are_the_inverse(bits):
    codes = torch.arange(2**bits - 1)
    latents = s3_latents(codes, bits, 0.25)
    assert len(latents) == SHIFTS[bits] + 2
    assert all((t.abs() == 0.25).all() for t in latents)
    assert torch.equal(s3(*latents), s3_levels(bits)[codes])
    assert torch.equal(s3_codes(*latents), codes.short())


@pytest.mark.parametrize("scale", ["none", "statistical", "pow2"])
@pytest.mark.parametrize("bits", SHIFTS)
def test_a_weight_on_the_grid_survives_right_inverse(bits, scale):
    torch.manual_seed(1)
    quantizer = S3(bits=bits, scale=scale).weight(0.05 * torch.randn(6, 40))
    weight = quantizer(*(torch.randn(6, 40) for _ in range(SHIFTS[bits] + 2)))
    assert (weight == 0).any() and (weight != 0).any()
    again = quantizer(*quantizer.right_inverse(weight))
    if scale == "statistical":
        assert torch.allclose(again, weight, rtol=1e-6)
    else:
        assert torch.equal(again, weight)


def test_raw_levels_without_a_one_keep_their_size():
    weight = torch.tensor([[2.0, -4.0, 0.0, 2.0]])
    quantizer = S3(bits=3).weight(weight)
    assert torch.equal(quantizer(*quantizer.right_inverse(weight)), weight)


@pytest.mark.parametrize("scale", ["statistical", "pow2"])
def test_a_row_of_zeros_stays_zero_and_does_not_spoil_its_neighbors(scale):
    start = torch.tensor([[50.0, 50.0], [3.0, 4.0], [0.0, 0.0]])
    quantizer = S3(bits=2, scale=scale).weight(start)
    sign = torch.ones(3, 2)
    sparse = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0]])
    weight = quantizer(sign, sparse)
    assert torch.isfinite(quantizer.scale(sign, sparse)).all()
    assert (weight[0] == 0).all() and (weight[2].abs() < 1e-30).all()
    if scale == "statistical":
        # rms of the start: sqrt(12.5), of [1, 0]: sqrt(0.5)
        assert weight[1].tolist() == pytest.approx([5.0, 0.0])
    else:
        assert weight[1].tolist() == [4.0, 0.0]  # 2^round(log2 5)
    assert torch.isfinite(quantizer(*quantizer.right_inverse(start))).all()


def drawn(shape, **options):
    torch.manual_seed(0)
    quantizer = S3(**options).weight(torch.ones(shape))
    latents = [torch.zeros(shape) for _ in range(SHIFTS[quantizer.config.bits] + 2)]
    quantizer.initialize_(*latents)
    return quantizer, latents


@pytest.mark.parametrize(("shape", "std"), [((64, 32, 3, 3), math.sqrt(2 / (9 * 64))), ((50, 400), math.sqrt(2 / 50))])
def test_kaiming_start_has_the_published_deviation(shape, std):
    _, latents = drawn(shape, bits=3)
    for t in latents:
        assert abs(t.std().item() / std - 1) < 5 / math.sqrt(2 * t.numel())
        assert abs(t.mean().item()) < 5 * std / math.sqrt(t.numel())


def test_dense_start_is_all_ones_with_the_same_deviation():
    quantizer, (sign, sparse, t1, t2) = drawn((64, 32, 3, 3), bits=3, init="dense")
    assert (quantizer(sign, sparse, t1, t2).abs() == 1).all()
    for t in (sparse, t1, t2):
        assert abs(t.square().mean().sqrt().item() / math.sqrt(2 / (9 * 64)) - 1) < 0.05
    assert (sign > 0).any() and (sign < 0).any()


def test_normal_start_uses_sigma():
    _, latents = drawn((100, 100), bits=2, init="normal", sigma=0.25)
    assert all(abs(t.std().item() / 0.25 - 1) < 0.05 for t in latents)


def test_project_start_keeps_the_given_weight():
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 10)
    start = layer.weight.detach().clone()
    attach_(layer, S3(bits=4, scale="statistical", init="project", sigma=0.5), None)
    assert torch.nn.functional.cosine_similarity(layer.weight.flatten(), start.flatten(), 0) > 0.95
    assert (layer.parametrizations.weight.original1.abs() == 0.5).all()


def test_penalty_by_hand():
    sparse = torch.tensor([[1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
    sign = torch.ones(2, 2, requires_grad=True)
    quantizer = S3(bits=2, sparse_penalty=0.1).weight(torch.ones(2, 2))
    penalty = quantizer.penalty(sign, sparse)
    assert penalty.item() == pytest.approx(0.25)
    penalty.backward()
    assert torch.allclose(sparse.grad, torch.tensor([[0.0, -0.1], [-0.1, 0.0]]))
    assert sign.grad is None
    assert S3().sparse_penalty == 1e-5
    assert S3(bits=2, sparse_penalty=0).weight(torch.ones(2, 2)).penalty(sign, sparse).item() == 0


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_wrong_number_of_latents_is_refused(count):
    with pytest.raises(LowbitError, match=f"{count} shift latents"):
        s3(torch.ones(1), torch.ones(1), *(torch.ones(1) for _ in range(count)))


@pytest.mark.parametrize("make", [lambda: S3(bits=5), lambda: s3_levels(5), lambda: s3_latents(torch.ones(1), 5)])
def test_wrong_bits_are_refused(make):
    with pytest.raises(LowbitError, match="bits=5"):
        make()
