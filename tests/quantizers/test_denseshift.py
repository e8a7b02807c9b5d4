"""DenseShift against values and gradients worked out by hand, and the recursion composed of torch operations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.functional import denseshift, denseshift_exponent, denseshift_latents, denseshift_levels
from lowbit.quantizers import DenseShift

BITS = {2: 1, 3: 3, 4: 7}
latent_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, float("inf"), float("-inf"), 0.3, -0.3])


def test_exponent_is_the_trailing_run_of_open_gates():
    t1, t2, t3 = (torch.tensor(row) for row in ([1.0, 1, 1, -1, 1], [1.0, -1, 1, 1, 1], [1.0, 1, -1, 1, 0.0]))
    assert denseshift_exponent(t1, t2, t3).tolist() == [3, 1, 0, 2, 0]


def test_values_by_hand():
    sign = torch.tensor([1.0, -1.0, 0.0, -0.0])
    t = torch.tensor([1.0, 1.0, 0.0, -1.0])
    assert denseshift(sign, t).tolist() == [2, -2, 1, 1]


def test_gradient_of_the_surrogate_by_hand():
    # 3 bits, gates closed-open-open: S1 = 0, S2 = 1, S3 = 2; sign negative: W = -4. G = 1.
    sign, t1, t2, t3 = (torch.tensor([v], requires_grad=True) for v in (-1.0, -1.0, 1.0, 1.0))
    weight = denseshift(sign, t1, t2, t3)
    assert weight.item() == -4
    weight.backward()
    d_s3 = -1 / (2 * math.sqrt(3))  # sgn / (2·sqrt(S3+1))
    assert sign.grad.item() == pytest.approx(math.sqrt(3))
    assert t3.grad.item() == pytest.approx(d_s3 * 2)  # S2 + 1
    assert t2.grad.item() == pytest.approx(d_s3 * 1 * 1)  # [t3 > 0]·(S1 + 1)
    assert t1.grad.item() == pytest.approx(d_s3 * 1 * 1)  # [t3 > 0]·[t2 > 0]·(0 + 1)


def test_a_closed_gate_stops_the_gradient_of_those_before_it():
    sign, t1, t2, t3 = (torch.tensor([v], requires_grad=True) for v in (1.0, 1.0, 1.0, -1.0))
    denseshift(sign, t1, t2, t3).backward()
    assert t1.grad.item() == 0 and t2.grad.item() == 0
    assert t3.grad.item() == pytest.approx(0.5 * 3)  # S3 = 0: 1/(2·1), times S2 + 1


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_gate_at_zero_is_closed_for_the_gradient_too(zero):
    latents = [torch.tensor([value], requires_grad=True) for value in (1.0, 1.0, 1.0, zero)]
    denseshift(*latents).sum().backward()
    assert [t.grad.item() for t in latents] == [1, 0, 0, 0.5 * 3]  # S_3 = 0, S_2 = 2: only the last gate hears of it


def test_identity_surrogate_is_the_gradient_of_the_true_power():
    sign, t = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    denseshift(sign, t, surrogate="identity").backward()
    assert sign.grad.item() == 2
    assert t.grad.item() == pytest.approx(2 * math.log(2))


def test_the_sum_counts_open_gates_and_every_gate_gets_the_same_gradient():
    t1, t2, t3 = (torch.tensor(row) for row in ([1.0, 1, 1, -1, 1], [1.0, -1, 1, 1, 1], [1.0, 1, -1, 1, 0.0]))
    assert denseshift_exponent(t1, t2, t3, recursion="sum").tolist() == [3, 2, 2, 2, 2]
    sign, t1, t2, t3 = (torch.tensor([v], requires_grad=True) for v in (-1.0, 1.0, -1.0, 1.0))
    weight = denseshift(sign, t1, t2, t3, recursion="sum")
    weight.backward()
    assert weight.item() == -4 and sign.grad.item() == pytest.approx(math.sqrt(3))
    assert [t.grad.item() for t in (t1, t2, t3)] == pytest.approx([-1 / (2 * math.sqrt(3))] * 3)


@pytest.mark.parametrize("recursion", ["nested", "sum"])
@pytest.mark.parametrize("surrogate", ["sqrt", "identity"])
@pytest.mark.parametrize("gates", BITS.values())
def test_gradient_equals_the_composed_recursion(gates, surrogate, recursion):
    """The same graph from torch's own operations: straight-through gates, then sgn·sqrt(S+1) or sgn·2^S."""
    torch.manual_seed(gates)
    latents = [torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(gates + 1)]
    grad = torch.randn(50, dtype=torch.float64)

    def through(value, t):
        return value + t - t.detach()

    exponent = torch.zeros(50, dtype=torch.float64)
    for t in latents[1:]:
        gate = through((t > 0).double(), t)
        exponent = (exponent + 1) * gate if recursion == "nested" else exponent + gate
    sign = through(torch.where(latents[0] >= 0, 1.0, -1.0).double(), latents[0])
    size = torch.sqrt(exponent + 1) if surrogate == "sqrt" else torch.exp2(exponent)
    expected = torch.autograd.grad(sign * size, latents, grad)
    actual = torch.autograd.grad(denseshift(*latents, surrogate=surrogate, recursion=recursion), latents, grad)
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, atol=1e-12)


@given(st.sampled_from([1, 3, 7]).flatmap(lambda n: st.lists(latent_values, min_size=n + 1, max_size=n + 1)))
def test_values_are_always_in_the_set_and_never_zero(values):
    bits = {1: 2, 3: 3, 7: 4}[len(values) - 1]
    weight = denseshift(*(torch.tensor([v]) for v in values))
    assert weight.item() in denseshift_levels(bits).tolist()
    assert weight.item() != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gates", BITS.values())
def test_no_latent_at_the_edge_of_its_type_gives_a_zero(gates, dtype):
    """Both zeros, the smallest denormal and infinity: closed gates at the zeros, open ones for whatever is above."""
    smallest = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype) * torch.finfo(dtype).eps
    edges = [0.0, -0.0, smallest.item(), -smallest.item(), math.inf, -math.inf]
    assert 0 < edges[2] < torch.finfo(dtype).smallest_normal
    t = torch.tensor(edges, dtype=dtype)
    size = 2.0**gates
    assert denseshift(t, *(t for _ in range(gates))).tolist() == [1, 1, size, -1, size, -1]


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("bits", BITS)
def test_starting_distribution_does_not_depend_on_sigma(bits, sigma):
    """P(S = k) = 2^-(k+1) below the top and 2^-N at it, since each gate is open with probability ½."""
    torch.manual_seed(0)
    size = 20_000
    gates = BITS[bits]
    exponent = denseshift_exponent(*(sigma * torch.randn(size) for _ in range(gates)))
    for k in range(gates + 1):
        p = 0.5 ** min(k + 1, gates)
        share = (exponent == k).double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / size)


@pytest.mark.parametrize("recursion", ["nested", "sum"])
@pytest.mark.parametrize("bits", BITS)
def test_latents_are_the_inverse(bits, recursion):
    codes = torch.arange(2**bits)
    latents = denseshift_latents(codes, bits)
    assert torch.equal(denseshift(*latents, recursion=recursion), denseshift_levels(bits)[codes])


@pytest.mark.parametrize("scale", ["none", "statistical"])
def test_the_sum_as_a_module_keeps_to_its_codes(scale):
    torch.manual_seed(0)
    quantizer = DenseShift(bits=3, recursion="sum", scale=scale).weight(torch.randn(4, 16))
    latents = [torch.randn(4, 16) for _ in range(4)]
    weight = quantizer(*latents)
    assert torch.equal(weight, quantizer.levels[quantizer.codes(*latents).long()] * quantizer.scale(*latents))
    nested = DenseShift(bits=3, scale=scale).weight(torch.ones(4, 16))
    assert not torch.equal(nested.codes(*latents), quantizer.codes(*latents))


@pytest.mark.parametrize("scale", ["none", "statistical", "pow2"])
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_on_the_grid_survives_right_inverse(bits, scale):
    torch.manual_seed(1)
    start = 0.05 * torch.randn(6, 40)
    quantizer = DenseShift(bits=bits, scale=scale).weight(start)
    latents = [1e-3 * torch.randn(6, 40) for _ in range(BITS[bits] + 1)]
    weight = quantizer(*latents)
    again = quantizer(*quantizer.right_inverse(weight))
    if scale == "pow2":  # the stored rms is that of the rounded scale: one more rounding changes nothing
        assert torch.equal(again, weight)
    else:
        assert torch.allclose(again, weight, rtol=1e-6)


def test_statistical_scale_keeps_each_row_at_its_root_mean_square():
    torch.manual_seed(0)
    start = torch.randn(4, 64) * torch.tensor([[0.01], [0.1], [1.0], [10.0]])
    quantizer = DenseShift(bits=3, scale="statistical").weight(start)
    weight = quantizer(*(torch.randn(4, 64) for _ in range(4)))
    assert torch.allclose(weight.square().mean(1), start.square().mean(1), rtol=1e-5)


def test_pow2_scale_is_a_power_of_two():
    quantizer = DenseShift(bits=3, scale="pow2").weight(torch.randn(5, 16))
    exponent = torch.log2(quantizer.scale(*(torch.randn(5, 16) for _ in range(4))))
    assert torch.equal(exponent, exponent.round())


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_latents_is_refused(count):
    with pytest.raises(LowbitError, match="gate latents"):
        denseshift(torch.ones(1), *(torch.ones(1) for _ in range(count)))


def test_an_unknown_surrogate_is_refused():
    with pytest.raises(LowbitError, match="surrogate"):
        denseshift(torch.ones(1), torch.ones(1), surrogate="tanh")


def test_an_unknown_recursion_is_refused():
    with pytest.raises(LowbitError, match="recursion"):
        denseshift(torch.ones(1), torch.ones(1), recursion="max")
    with pytest.raises(LowbitError, match=r"recursion='max'.*'nested' and 'sum'"):
        denseshift_exponent(torch.ones(1), torch.ones(1), torch.ones(1), recursion="max")


@pytest.mark.parametrize("call", [denseshift_levels, lambda bits: denseshift_latents(torch.ones(1), bits)])
def test_wrong_bits_are_refused(call):
    with pytest.raises(LowbitError, match="bits=5"):
        call(5)


@pytest.mark.parametrize("place", range(4))
def test_nan_in_any_latent_is_refused(place):
    latents = [torch.randn(5) for _ in range(4)]
    latents[place][2] = float("nan")
    with pytest.raises(LowbitError, match="denseshift holds NaN"):
        denseshift(*latents)


@pytest.mark.parametrize(
    ("options", "std"),
    [({}, 1e-3), ({"sigma": 0.02}, 0.02), ({"init": "kaiming"}, math.sqrt(2 / (9 * 32)))],
    ids=["published", "sigma", "kaiming"],
)
def test_latents_start_with_the_deviation_that_init_names(options, std):
    torch.manual_seed(0)
    latents = [torch.empty(32, 16, 3, 3) for _ in range(4)]
    DenseShift(bits=3, **options).weight(latents[0]).initialize_(*latents)
    for t in latents:
        assert t.std().item() == pytest.approx(std, rel=0.05)
    assert not torch.equal(latents[0], latents[1])


def test_latents_of_a_given_weight_lie_sigma_from_their_thresholds():
    quantizer = DenseShift(bits=3, init="project", sigma=0.02).weight(torch.ones(2, 3))
    for t in quantizer.right_inverse(torch.tensor([[1.0, -2.0, 4.0], [-8.0, 0.1, 3.0]])):
        assert torch.equal(t.abs(), torch.full((2, 3), 0.02))
