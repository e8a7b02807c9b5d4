"""INQ against values worked out by hand, and its schedule: what is frozen stays, whatever the optimizer does."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowbit.errors import LowbitError
from lowbit.functional import inq, inq_codes, inq_exponent, inq_levels, inq_partition
from lowbit.nn import QuantConfig, quantize_, quantized_layers
from lowbit.quantizers import INQ
from lowbit.training.hooks import QuantizerHooks

weights = st.one_of(st.sampled_from([0.0, -0.0, 1e-40, -1e-40, math.inf, -math.inf]), st.floats(-4, 4, width=32))


def test_levels_by_hand():
    assert inq_levels(2).tolist() == [-1, 0, 1]
    assert inq_levels(3).tolist() == [-1, -0.5, 0, 0.5, 1]
    assert inq_levels(4).tolist() == [-1, -0.5, -0.25, -0.125, 0, 0.125, 0.25, 0.5, 1]
    assert len(inq_levels(5)) == 17 and inq_levels(5)[9] == 2**-7


@pytest.mark.parametrize(
    ("largest", "n1"), [(0.75, 0), (0.7499999, -1), (1.0, 0), (1.49, 0), (1.5, 1), (0.1, -3), (100.0, 7), (1e-30, -100)]
)
def test_largest_exponent_by_hand(largest, n1):
    # 4/3·0.75 = 1, 4/3·1.5 = 2; 4/3·0.1 = 0.133 >= 2^-3; 4/3·100 = 133 >= 2^7; 2^-100 = 7.9e-31
    exponent = inq_exponent(torch.tensor([0.01 * largest, -largest]))
    assert exponent.item() == n1 and exponent.dtype == torch.int32


def test_values_by_hand():
    # 4 bits, n1 = 0: magnitudes 1/8 ... 1, midpoints 1/16, 3/16, 3/8, 3/4, each going up
    w = torch.tensor([1.2, 0.75, -0.74, 0.375, -0.37, 0.1875, 0.18, -0.0625, 0.06, -0.06, 0.0, -0.0])
    assert inq(w, bits=4).tolist() == [1, 1, -0.5, 0.5, -0.25, 0.25, 0.125, -0.125, 0, 0, 0, 0]
    assert inq_codes(w, bits=4).tolist() == [8, 8, 1, 7, 2, 6, 5, 3, 4, 4, 4, 4]


def test_two_bits_are_ternary_and_the_exponent_can_be_given():
    w = torch.tensor([0.1, -0.25, 0.3, -3.0])
    assert inq(w, bits=2, n1=torch.tensor(-1)).tolist() == [0, -0.5, 0.5, -0.5]


def test_gradient_is_the_identity_everywhere():
    w = torch.tensor([0.0, -0.3, 5.0], requires_grad=True)
    grad = torch.tensor([1.0, -2.0, 3.0])
    inq(w, bits=3).backward(grad)
    assert torch.equal(w.grad, grad)


@given(st.integers(2, 5), st.integers(-3, 3), st.lists(weights, min_size=1, max_size=8))
def test_values_are_always_in_the_set_and_agree_with_the_codes(bits, n1, values):
    w, n1 = torch.tensor(values, dtype=torch.float32), torch.tensor(n1)
    assert torch.equal(inq(w, bits, n1), 2.0**n1 * inq_levels(bits)[inq_codes(w, bits, n1).long()])


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20).filter(lambda v: max(map(abs, v)) > 1e-30))
def test_quantizing_twice_changes_nothing_and_the_largest_weight_gets_the_largest_level(values):
    w = torch.tensor(values)
    once = inq(w, bits=4)
    assert torch.equal(inq(once, bits=4), once)
    assert once.abs().max() == 2.0 ** inq_exponent(w).item()


def test_a_layer_of_zeros_stays_zero_and_nan_is_passed_on():
    assert inq(torch.zeros(3), bits=4).tolist() == [0, 0, 0]
    assert inq(torch.tensor([math.nan, 1.0]), bits=4, n1=torch.tensor(0)).isnan().tolist() == [True, False]


def test_partition_by_hand():
    w = torch.tensor([[0.1, -5.0, 0.3, 0.0], [2.0, -0.2, 0.4, 0.3]])
    half = inq_partition(w, 0.5)
    assert half.tolist() == [[False, True, True, False], [True, False, True, False]]  # of the two 0.3 the first
    moved = torch.where(half, 0.0, w)  # frozen ones keep their place whatever has become of them
    more = inq_partition(moved, 0.75, half)
    assert more.tolist() == [[False, True, True, False], [True, True, True, True]]
    assert inq_partition(w, 0.25, more).tolist() == more.tolist()
    assert inq_partition(w, 1.0).all() and not inq_partition(w, 0.0).any()


def quantizer_and_latent():
    torch.manual_seed(0)
    latent = nn.Parameter(torch.randn(10, 8))
    return INQ(bits=4).weight(latent.detach()), latent


def frozen_share(quantizer):
    return (quantizer.held >= 0).double().mean().item()


def test_schedule_freezes_the_largest_and_lets_the_others_through():
    quantizer, latent = quantizer_and_latent()
    start, projected = latent.detach().clone(), quantizer(latent).detach()
    assert torch.equal(projected, inq(start, 4))
    for progress, share in [
        (0.0, 0.5),
        (0.2, 0.5),
        (0.25, 0.75),
        (0.5, 0.875),
        (0.74, 0.875),
        (0.75, 1.0),
        (0.99, 1.0),
    ]:
        quantizer.before_step_(progress, latent)
        assert frozen_share(quantizer) == share
        frozen = quantizer.held >= 0
        assert frozen.all() or start[frozen].abs().min() >= start[~frozen].abs().max()
        assert torch.equal(quantizer(latent), torch.where(frozen, projected, start))
        assert torch.equal(latent, quantizer(latent))
    levels = quantizer.levels[quantizer.codes(latent).long()]
    assert torch.equal(quantizer(latent), quantizer.scale(latent) * levels)


def test_frozen_weights_get_no_gradient_and_the_others_all_of_it():
    quantizer, latent = quantizer_and_latent()
    quantizer.before_step_(0.0, latent)
    grad = torch.randn(10, 8)
    quantizer(latent).backward(grad)
    assert torch.equal(latent.grad, torch.where(quantizer.held >= 0, 0.0, grad))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    ],
    ids=["sgd", "adamw"],
)
def test_frozen_weights_do_not_move_with_momentum_and_decay(make):
    quantizer, latent = quantizer_and_latent()
    optimizer = make([latent])
    weight, was_frozen, drifted = None, torch.zeros(10, 8, dtype=torch.bool), False
    for step in range(40):
        quantizer.before_step_(step / 40, latent)
        frozen = quantizer.held >= 0
        if weight is not None:
            assert torch.equal(quantizer(latent)[was_frozen], weight[was_frozen])
            assert torch.equal(quantizer(latent)[~frozen], weight[~frozen])
        was_frozen = frozen
        optimizer.zero_grad()
        (quantizer(latent) - 3).square().sum().backward()
        optimizer.step()
        weight = quantizer(latent).detach()
        drifted |= not torch.equal(latent[frozen], weight[frozen])
        if frozen.all():
            assert torch.equal(weight, quantizer.scale(latent) * quantizer.levels[quantizer.codes(latent).long()])
    assert drifted and frozen.all()  # the optimizer did try
    # what trained longest was pulled toward 3, and so beyond the grid
    assert weight.mean() > inq(quantizer_and_latent()[1], 4).mean()


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    return quantize_(model, QuantConfig(weight=INQ(bits=3)))


def train(model, optimizer, steps, total=12):
    hooks = QuantizerHooks(model)
    for step in steps:
        hooks.before_step(step / total)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)


def test_a_run_resumed_from_its_state_is_the_same():
    whole, half, other = small(0), small(0), small(1)
    train(whole, sgd(whole), range(12))
    optimizer = sgd(half)
    train(half, optimizer, range(5))  # in the second stage
    copied = copy.deepcopy(half)
    other.load_state_dict(half.state_dict())
    for model in (other, copied):
        resumed = sgd(model)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, resumed, range(5, 12))
        for (name, a), b in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_loading_an_earlier_state_takes_the_schedule_back():
    model = small(0)
    before = copy.deepcopy(model.state_dict())
    train(model, sgd(model), range(1))
    model.load_state_dict(before)
    (found,) = quantized_layers(model)
    assert frozen_share(found.weight) == 0
    QuantizerHooks(model).before_step(0.0)
    assert frozen_share(found.weight) == 0.5


def test_assigning_a_weight_starts_afresh_with_a_new_scale():
    model = small(0)
    train(model, sgd(model), range(12))
    (found,) = quantized_layers(model)
    assert frozen_share(found.weight) == 1
    assigned = 100 * torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    found.layer.weight = assigned
    assert frozen_share(found.weight) == 0
    assert torch.equal(found.layer.weight, inq(assigned, 3))
    QuantizerHooks(model).before_step(0.99)
    assert torch.equal(found.layer.weight, inq(assigned, 3)) and frozen_share(found.weight) == 1


@pytest.mark.slow
def test_a_compiled_quantizer_follows_the_schedule():
    torch._dynamo.reset()
    quantizer, latent = quantizer_and_latent()
    compiled = torch.compile(quantizer, fullgraph=True, dynamic=False)
    for progress in (None, 0.0, 0.5, 0.75):
        if progress is not None:
            quantizer.before_step_(progress, latent)
        grads = [torch.autograd.grad(q(latent).sin().sum(), latent)[0] for q in (quantizer, compiled)]
        assert torch.equal(compiled(latent), quantizer(latent))
        assert torch.allclose(*grads)


@pytest.mark.parametrize("bits", [1, 6])
def test_wrong_bits_are_refused(bits):
    for refused in (lambda: inq(torch.ones(1), bits), lambda: INQ(bits=bits)):
        with pytest.raises(LowbitError, match="bits="):
            refused()
