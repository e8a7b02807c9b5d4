"""PACT against values and gradients worked out by hand."""

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.functional import dorefa_activation, pact, pact_codes
from lowbit.nn import QuantConfig, calibrate, quantize_
from lowbit.quantizers import PACT


def test_values_and_gradients_by_hand():
    # α = 6, 2 bits: step 2
    x = torch.tensor([-1.0, 0.0, 0.9, 1.1, 5.5, 6.0, 8.0], requires_grad=True)
    alpha = torch.tensor(6.0, requires_grad=True)
    y = pact(x, alpha, bits=2)
    assert torch.allclose(y, torch.tensor([0.0, 0, 0, 2, 6, 6, 6]))
    assert pact_codes(x, alpha, 2).tolist() == [0, 0, 0, 1, 3, 3, 3]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0, 0]  # passes in [0, α)
    assert alpha.grad.item() == 6 + 7  # where x >= α, with no share of the rounding


def test_at_threshold_one_it_is_dorefa():
    x = torch.linspace(-0.5, 1.5, 201)
    assert torch.equal(pact(x, torch.tensor(1.0), 3), dorefa_activation(x, 3))


def test_the_threshold_starts_as_configured_and_is_a_parameter():
    quantizer = PACT(bits=4, alpha=8.0).activation()
    assert quantizer.calibrated and quantizer.alpha.item() == 8.0
    quantizer(torch.full((3,), 9.0)).sum().backward()
    assert quantizer.alpha.grad.item() == 3
    assert PACT().activation().alpha.item() == 10.0


def test_a_threshold_from_the_first_batch():
    quantizer = PACT(alpha=None).activation()
    parameter = quantizer.alpha
    assert not quantizer.calibrated
    quantizer(torch.tensor([[-7.0, 3.5], [2.0, 0.0]]))
    assert quantizer.calibrated and quantizer.alpha is parameter and quantizer.alpha.item() == 3.5
    quantizer(torch.full((2, 2), 100.0))
    assert quantizer.alpha.item() == 3.5
    other = PACT(alpha=None).activation()
    other.load_state_dict(quantizer.state_dict())
    assert other.alpha.item() == 3.5


def test_calibrate_sets_it_and_keeps_given_ones():
    layers = torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)
    x = torch.ones(3, 4)
    model = quantize_(torch.nn.Sequential(*layers), QuantConfig(activation=PACT(alpha=None), first_last="same"))
    calibrate(model, x)
    assert model[0].input_quantizer.alpha.item() == 1.0 and model[2].input_quantizer.calibrated


def test_a_threshold_driven_below_zero_is_used_as_positive_and_still_learns():
    quantizer = PACT().activation()
    quantizer.alpha.data.fill_(-0.5)
    y = quantizer(torch.tensor([-1.0, 1.0]))
    assert torch.isfinite(y).all() and (y >= 0).all()
    y.sum().backward()
    assert quantizer.alpha.grad.item() == 1


def test_half_precision_is_computed_in_full_precision():
    x = torch.linspace(-1, 2, 101).bfloat16()
    alpha = torch.tensor(1.7)
    assert pact(x, alpha, 4).dtype == torch.bfloat16
    assert torch.equal(pact(x, alpha, 4), pact(x.float(), alpha, 4).bfloat16())


@pytest.mark.slow
def test_compiled_gradients_agree_with_eager():
    torch._dynamo.reset()
    quantizer = PACT(bits=3, alpha=1.0).activation()
    x = torch.linspace(-1, 2, 40)
    results = []
    for forward in (quantizer.forward, torch.compile(quantizer.forward, fullgraph=True)):
        given = x.clone().requires_grad_()
        y = forward(given)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (given, quantizer.alpha))))
    for eager, compiled in zip(*results, strict=True):
        assert eager.abs().sum() > 0 and torch.allclose(eager, compiled, atol=1e-6)


def test_wrong_options_are_refused():
    with pytest.raises(LowbitError, match="bits=9"):
        pact(torch.ones(1), torch.tensor(1.0), 9)
    with pytest.raises(LowbitError, match=r"alpha=0\.0"):
        PACT(alpha=0.0)
    with pytest.raises(LowbitError, match="alpha=inf"):
        PACT(alpha=float("inf"))
    with pytest.raises(LowbitError, match="does not quantize weights"):
        PACT().weight(torch.ones(1))
