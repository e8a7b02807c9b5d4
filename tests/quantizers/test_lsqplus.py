"""LSQ+ against values and gradients worked out by hand."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.functional import lsq, lsqplus, lsqplus_codes, lsqplus_start
from lowbit.nn import QuantConfig, calibrate, quantize_
from lowbit.quantizers import LSQPlus


def test_values_and_gradients_by_hand():
    # 2 bits unsigned: codes 0 ... 3, step ½, offset -½: levels -½, 0, ½, 1. v = -1, 0.4, 1.2, 2.6, 5
    x = torch.tensor([-1.0, -0.3, 0.1, 0.8, 2.0], requires_grad=True)
    step, offset = torch.tensor(0.5, requires_grad=True), torch.tensor(-0.5, requires_grad=True)
    y = lsqplus(x, step, offset, bits=2, grad_scale=1.0)
    assert y.tolist() == [-0.5, -0.5, 0.0, 1.0, 1.0]
    assert lsqplus_codes(x, step, offset, 2).tolist() == [0, 0, 1, 3, 3]
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    y.backward(grad)
    assert x.grad.tolist() == [0, 2, 3, 4, 0]
    slope = [0, 0 - 0.4, 1 - 1.2, 3 - 2.6, 3]  # n outside below, round(v) - v inside, p outside above
    assert step.grad.item() == pytest.approx(sum(g * s for g, s in zip(grad.tolist(), slope, strict=True)), abs=1e-5)
    assert offset.grad.item() == 1 + 5  # where clipped


def test_signed_codes_reach_the_same_grid_with_another_offset():
    x = torch.linspace(-2, 2, 41)
    step = torch.tensor(0.5)
    unsigned = lsqplus(x, step, torch.tensor(-0.5), bits=2)
    signed = lsqplus(x, step, torch.tensor(0.5), bits=2, signed=True)  # the value of code 0, not of code -2
    assert torch.equal(unsigned, signed) and signed.unique().tolist() == [-0.5, 0.0, 0.5, 1.0]


@given(bits=st.integers(2, 8), signed=st.booleans(), seed=st.integers(0, 999))
def test_without_an_offset_it_is_lsq(bits, signed, seed):
    random = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(40, generator=random).double(), torch.randn(40, generator=random).double()
    results = []
    for function in (lambda x, s: lsqplus(x, s, torch.zeros(()), bits, signed), lambda x, s: lsq(x, s, bits, signed)):
        inputs = x.clone().requires_grad_(), torch.full((1,), 0.21, dtype=torch.float64).requires_grad_()
        y = function(*inputs)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert torch.allclose(results[0][2], results[1][2], rtol=1e-10)


def test_default_gradient_scale_counts_the_elements_that_share_a_step():
    x = torch.full((2, 8), 9.0)  # far outside: each element gives p = 3 and 1
    step, offset = torch.ones(2, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    lsqplus(x, step, offset, bits=2).sum().backward()
    assert torch.allclose(step.grad, torch.full((2, 1), 8 * 3 / math.sqrt(8 * 3)))
    assert torch.allclose(offset.grad, torch.full((2, 1), 8 / math.sqrt(8 * 3)))


def test_start_from_smallest_and_largest_value_by_hand():
    x = torch.tensor([[-1.0, 0.0], [0.3, 5.0]])
    assert [t.item() for t in lsqplus_start(x, bits=2, init="minmax")] == [2.0, -1.0]
    step, offset = lsqplus_start(x, bits=2, signed=True, init="minmax")
    assert step.item() == 2.0 and offset.item() == 3.0  # n = -2 stands for -1


def test_start_by_least_squares_by_hand():
    # 1 bit, from min and max: step 6, offset 0, codes 0 0 0 1. The best values for those are the means 1 and 6.
    step, offset = lsqplus_start(torch.tensor([0.0, 1.0, 2.0, 6.0]), bits=1)
    assert offset.item() == pytest.approx(1.0) and step.item() == pytest.approx(5.0)


@given(bits=st.integers(1, 8), seed=st.integers(0, 99), skew=st.floats(-3, 3), rounds=st.integers(1, 20))
def test_more_rounds_never_make_the_starting_error_larger(bits, seed, skew, rounds):
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)).mul(0.7).add(skew).exp()

    def error(start):
        return (lsqplus(x, *start, bits) - x).square().mean().item()

    errors = [error(lsqplus_start(x, bits, init="minmax"))]
    errors += [error(lsqplus_start(x, bits, rounds=n)) for n in (rounds, rounds + 1)]
    assert errors[0] * (1 + 1e-4) >= errors[1] >= errors[2] * (1 - 1e-4)


@pytest.mark.parametrize("value", [0.0, 3.0, -7.0])
@pytest.mark.parametrize("init", ["mse", "minmax"])
def test_a_constant_first_batch_still_gives_a_grid_that_holds_it(value, init):
    quantizer = LSQPlus(bits=8, init=init).activation()
    x = torch.full((2, 3), value)
    assert torch.allclose(quantizer(x), x) and (quantizer.levels.diff() > 0).all()


def test_a_large_batch_is_sampled_without_touching_the_random_state():
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    step, offset = lsqplus_start(x, bits=2)
    assert torch.equal(torch.get_rng_state(), before)
    # the best uniform 4 levels of a Gaussian lie 0.996 apart, symmetric about zero
    assert step.item() == pytest.approx(0.996, abs=0.03) and offset.item() == pytest.approx(-1.5 * 0.996, abs=0.06)


@pytest.mark.parametrize("config", [LSQPlus(bits=3), LSQPlus(bits=3, signed=True), LSQPlus(bits=3, init="minmax")])
def test_the_first_batch_alone_sets_step_and_offset_and_the_output_is_the_step_times_a_level(config):
    quantizer = config.activation()
    parameters = quantizer.step, quantizer.offset
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).exp() - 0.5
    fresh = config.activation()
    fresh.load_state_dict(copy.deepcopy(quantizer).state_dict())
    assert not quantizer.calibrated and not fresh.calibrated
    y = quantizer(x)
    assert quantizer.calibrated and parameters == (quantizer.step, quantizer.offset)
    assert torch.equal(y, quantizer.levels[quantizer.codes(x).long()] * quantizer.step)
    start = [p.detach().clone() for p in parameters]
    quantizer(100 * x)
    assert all(torch.equal(a, b) for a, b in zip(start, parameters, strict=True))
    for p in parameters:
        p.data.add_(0.1)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x)) and torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))


def test_activation_gradient_scale_does_not_depend_on_the_batch_size():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    gradients = []
    for batch in (x, torch.cat([x, x])):
        quantizer = LSQPlus(bits=2).activation()
        quantizer(x)
        quantizer(batch).mean().backward()
        gradients.append(torch.stack([quantizer.step.grad, quantizer.offset.grad]))
    assert torch.allclose(*gradients) and gradients[0].abs().min() > 0


def test_a_step_driven_below_zero_is_used_as_positive_and_still_learns():
    quantizer = LSQPlus(bits=2).activation()
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    quantizer(x)
    quantizer.step.data.fill_(-0.5)
    y = quantizer(x)
    y.square().sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(quantizer.step.grad) and quantizer.step.grad != 0


def test_learning_follows_inputs_that_move_below_zero():
    quantizer = LSQPlus(bits=4).activation()
    x = torch.rand(256, 4, generator=torch.Generator().manual_seed(0))
    quantizer(x)
    moved = x - 0.3

    def error():
        return (quantizer(moved) - moved).square().mean()

    before = error().item()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.1 * before and quantizer.offset.item() < -0.2


def test_half_precision_is_computed_in_full_precision():
    x = torch.linspace(-1, 2, 101).bfloat16()
    step, offset = torch.tensor(0.13), torch.tensor(-0.4)
    assert lsqplus(x, step, offset, 4).dtype == torch.bfloat16
    assert torch.equal(lsqplus(x, step, offset, 4), lsqplus(x.float(), step, offset, 4).bfloat16())


def test_in_a_model_it_is_calibrated_like_the_others():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU(), torch.nn.Conv2d(4, 4, 3))
    quantize_(model, QuantConfig(activation=LSQPlus(bits=2), first_last="same"))
    calibrate(model, torch.randn(2, 3, 8, 8))
    assert model[2].input_quantizer.calibrated
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_compiled_gradients_agree_with_eager():
    torch._dynamo.reset()
    quantizer = LSQPlus(bits=3).activation()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    quantizer(x)
    results = []
    for forward in (quantizer.forward, torch.compile(quantizer.forward, fullgraph=True)):
        given_x = (1.5 * x).requires_grad_()
        y = forward(given_x)
        learned = (given_x, quantizer.step, quantizer.offset)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), learned)))
    for eager, compiled in zip(*results, strict=True):
        assert eager.abs().sum() > 0 and torch.allclose(eager, compiled, atol=1e-5)


def test_wrong_settings_are_refused():
    with pytest.raises(LowbitError, match="bits=17"):
        lsqplus(torch.ones(1), torch.ones(1), torch.zeros(1), 17)
    with pytest.raises(LowbitError, match="init='max'"):
        lsqplus_start(torch.ones(1), 2, init="max")
    with pytest.raises(LowbitError, match="init='max'"):
        LSQPlus(init="max")
    with pytest.raises(LowbitError, match="bits=1 is not allowed with signed=True"):
        LSQPlus(bits=1, signed=True)
    with pytest.raises(LowbitError, match="does not quantize weights"):
        LSQPlus().weight(torch.ones(1))
