"""EWGS against values and gradients worked out by hand (paper's equation 4)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.functional import ewgs, lsq
from lowbit.nn import QuantConfig, quantize_
from lowbit.quantizers import EWGS, LSQ


def test_values_and_gradients_by_hand():
    # 2 bits signed: codes -2 ... 1, step ½. x/step = -3, -1.8, -0.6, 0.4, 0.9, 4
    x = torch.tensor([-1.5, -0.9, -0.3, 0.2, 0.45, 2.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    y = ewgs(x, step, bits=2, delta=0.5, grad_scale=1.0)
    assert y.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 0.5]
    grad = torch.tensor([1.0, 2.0, -3.0, -4.0, 5.0, 6.0])
    y.backward(grad)
    # errors v - round(v) inside: 0.2, 0.4, 0.4, -0.1
    expected = [0, 2 * (1 + 0.5 * 0.2), -3 * (1 - 0.5 * 0.4), -4 * (1 - 0.5 * 0.4), 5 * (1 - 0.5 * 0.1), 0]
    assert x.grad.tolist() == pytest.approx(expected, abs=1e-5)
    slope = [-2, -2 + 1.8, -1 + 0.6, 0 - 0.4, 1 - 0.9, 1]  # the step learns as in LSQ
    assert step.grad.item() == pytest.approx(sum(g * s for g, s in zip(grad.tolist(), slope, strict=True)), abs=1e-5)


def test_the_default_delta_is_a_fifth():
    x = torch.tensor([0.25], requires_grad=True)
    ewgs(x, torch.ones(1), bits=3).backward()
    assert x.grad.item() == pytest.approx(1 + 0.2 * 0.25)


def test_descent_towards_the_level_is_faster_than_away_from_it():
    # Both values lie ±0.3 steps off the level 1; with g > 0 descent lowers them, with g < 0 it raises them.
    for g in (1.0, -1.0):
        x = torch.tensor([0.7, 1.3], requires_grad=True)
        ewgs(x, torch.ones(1), bits=4, delta=0.2).backward(torch.tensor([g, g]))
        toward, away = (1, 0) if g > 0 else (0, 1)
        assert abs(x.grad[toward]) == pytest.approx(1.06) and abs(x.grad[away]) == pytest.approx(0.94)


@given(bits=st.integers(2, 8), signed=st.booleans(), seed=st.integers(0, 999), shape=st.sampled_from([(1, 1), (3, 1)]))
def test_without_delta_it_is_lsq_to_the_bit(bits, signed, seed, shape):
    random = torch.Generator().manual_seed(seed)
    x, grad = 3 * torch.randn(3, 20, generator=random), torch.randn(3, 20, generator=random)
    step = 0.01 + torch.rand(shape, generator=random)
    results = []
    for function in (lambda x, s: ewgs(x, s, bits, 0, signed), lambda x, s: lsq(x, s, bits, signed)):
        inputs = x.clone().requires_grad_(), step.clone().requires_grad_()
        y = function(*inputs)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_value_and_step_gradient_are_those_of_lsq_whatever_delta():
    torch.manual_seed(0)
    x, grad = torch.randn(4, 6), torch.randn(4, 6)
    results = []
    for function in (lambda s: ewgs(x, s, 3, delta=0.7), lambda s: lsq(x, s, 3)):
        step = torch.full((4, 1), 0.3, requires_grad=True)
        y = function(step)
        results.append((y.detach(), *torch.autograd.grad(y, step, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_half_precision_is_computed_in_full_precision():
    x = torch.linspace(-1, 1, 101).bfloat16().requires_grad_()
    y = ewgs(x, torch.tensor(0.1), bits=4)
    assert y.dtype == torch.bfloat16 and torch.equal(y, ewgs(x.float(), torch.tensor(0.1), bits=4).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_a_weight_starts_and_is_stored_as_with_lsq():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for granularity in ("tensor", "channel"):
        quantizer = EWGS(bits=3, granularity=granularity).weight(weight)
        twin = LSQ(bits=3, granularity=granularity).weight(weight)
        assert torch.equal(quantizer(weight), twin(weight))
        twin.load_state_dict(quantizer.state_dict())
        assert torch.equal(quantizer.levels, twin.levels) and torch.equal(quantizer.codes(weight), twin.codes(weight))


def test_training_goes_another_way_than_with_lsq():
    ends = []
    for config in (EWGS(bits=2, delta=0.0), EWGS(bits=2, delta=0.5), LSQ(bits=2)):
        torch.manual_seed(0)
        model = quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), QuantConfig(weight=config, first_last="same"))
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.05), torch.randn(16, 8)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        ends.append(model[0].parametrizations.weight.original.detach())
    assert torch.equal(ends[0], ends[2]) and not torch.equal(ends[1], ends[2])


@pytest.mark.slow
def test_compiled_gradients_agree_with_eager():
    torch._dynamo.reset()
    latent = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    quantizer = EWGS(bits=3, granularity="channel", delta=0.4).weight(latent)
    results = []
    for forward in (quantizer.forward, torch.compile(quantizer.forward, fullgraph=True)):
        given_latent = latent.clone().requires_grad_()
        y = forward(given_latent)
        loss = (y * torch.linspace(-1, 1, 30).view(6, 5)).sum()
        results.append((y.detach(), *torch.autograd.grad(loss, (given_latent, quantizer.step))))
    for eager, compiled in zip(*results, strict=True):
        assert eager.abs().sum() > 0 and torch.allclose(eager, compiled, atol=1e-6)


def test_wrong_settings_are_refused():
    for delta in (-0.1, math.inf, math.nan):
        with pytest.raises(LowbitError, match="delta="):
            ewgs(torch.ones(1), torch.ones(1), 2, delta)
        with pytest.raises(LowbitError, match="delta="):
            EWGS(delta=delta)
    with pytest.raises(LowbitError, match="bits=1"):
        ewgs(torch.ones(1), torch.ones(1), 1)
    with pytest.raises(LowbitError, match="granularity='token'"):
        EWGS(granularity="token")
    with pytest.raises(LowbitError, match="does not quantize activations"):
        EWGS().activation()
