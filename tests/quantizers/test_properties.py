"""What every registered method must hold to, whatever the latents: drawn by hypothesis, over the registry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.nn import QuantConfig, quantize_
from lowbit.quantizers import LSQ, WeightQuantizer, get, names

SHAPE = (3, 4)
ZERO_FREE = {"denseshift", "statsq", "deepshift_q", "binary", "dorefa"}
SIGN_AND_GATES = [name for name in ("denseshift", "s3") if name in names("weight")]  # latents enter by their sign alone


def with_bits(kind: str) -> list[tuple[str, int]]:
    """Every registered method of a kind with each bit width that it accepts."""
    found = []
    for name in names(kind):
        for bits in range(1, 9):
            try:
                get(name)(bits=bits)
            except LowbitError:
                continue
            found.append((name, bits))
    return found


special = st.sampled_from([0.0, -0.0, 1e-40, -1e-40, 1e-8, 0.5, -0.5, 1.0, -1.0, 1e30, -1e30])
finite = special | st.floats(-4, 4, width=32)
SIZE = SHAPE[0] * SHAPE[1]


def tensors(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """Tensors of `SHAPE`: each element its own draw, or one value throughout."""
    mixed = st.lists(elements, min_size=SIZE, max_size=SIZE)
    alike = elements.map(lambda value: [value] * SIZE)
    return (mixed | alike).map(lambda values: torch.tensor(values).reshape(SHAPE))


def start() -> Tensor:
    """An ordinary weight for a quantizer to start from."""
    return 0.1 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def draw_latents(data: st.DataObject, quantizer: WeightQuantizer, elements: st.SearchStrategy[float]) -> list[Tensor]:
    """As many latents as the method has, each drawn by itself."""
    given_back = quantizer.right_inverse(start())
    count = 1 if isinstance(given_back, Tensor) else len(given_back)
    return [data.draw(tensors(elements)) for _ in range(count)]


def check_weight(quantizer: WeightQuantizer, latents: list[Tensor], bits: int) -> Tensor:
    """The registry's contract; returns the weight."""
    weight, codes, levels = quantizer(*latents), quantizer.codes(*latents), quantizer.levels
    scale = quantizer.scale(*latents)
    assert quantizer.has_scale or (scale == 1).all()
    assert levels.dtype == torch.float32 and len(levels) <= 2**bits and (levels.diff() > 0).all()
    assert codes.dtype == torch.int16 and codes.shape == weight.shape == SHAPE
    assert codes.min() >= 0 and codes.max() < len(levels)
    assert torch.isfinite(scale).all() and (scale > 0).all() and not scale.requires_grad
    assert torch.equal(weight, levels[codes.long()] * scale)
    return weight.detach()


@pytest.mark.parametrize(("name", "bits"), with_bits("weight"))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_finite_latents_give_scale_times_a_level(name, bits, data):
    quantizer = get(name)(bits=bits).weight(start())
    weight = check_weight(quantizer, draw_latents(data, quantizer, finite), bits)
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize(("name", "bits"), with_bits("weight"))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_finite_latents_have_finite_gradients(name, bits, data):
    quantizer = get(name)(bits=bits).weight(start())
    latents = [t.requires_grad_() for t in draw_latents(data, quantizer, finite)]
    quantizer(*latents).backward(torch.linspace(-1, 1, SIZE).reshape(SHAPE))
    for t in (*latents, *quantizer.parameters()):
        assert t.grad is not None and torch.isfinite(t.grad).all()


@pytest.mark.parametrize(("name", "bits"), [(n, b) for n, b in with_bits("weight") if n in ZERO_FREE])
def test_zero_is_not_among_the_levels_of_zero_free_methods(name, bits):
    assert (get(name)(bits=bits).weight(start()).levels != 0).all()


@pytest.mark.parametrize(("name", "bits"), [(n, b) for n, b in with_bits("weight") if n in SIGN_AND_GATES])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_infinite_latents_of_signs_and_gates_are_like_any_other(name, bits, data):
    infinite = st.sampled_from([float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0])
    quantizer = get(name)(bits=bits).weight(start())
    weight = check_weight(quantizer, draw_latents(data, quantizer, infinite), bits)
    if name == "denseshift":
        assert (weight != 0).all()


@pytest.mark.parametrize(("name", "bits"), with_bits("activation"))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_activations_lie_on_their_levels(name, bits, data):
    quantizer = get(name)(bits=bits).activation()
    quantizer(start())  # the batch that calibrates
    x = data.draw(tensors(finite | st.floats(0, 20, width=32)))
    y, codes, levels = quantizer(x).detach(), quantizer.codes(x), quantizer.levels
    assert len(levels) <= 2**bits and (levels.diff() > 0).all()
    assert codes.dtype == torch.int16 and codes.shape == y.shape == x.shape and y.dtype == x.dtype
    assert codes.min() >= 0 and codes.max() < len(levels)
    # One step for the whole tensor: the value of any level that is not zero gives it.
    level = levels[codes.long()]
    step = (y / level)[level != 0]
    assert (y[level == 0] == 0).all()
    if len(step):
        assert step[0] > 0 and torch.allclose(y, step[0] * level, rtol=1e-6, atol=0)


def linear_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in ("first", "middle", "last"):
        model.add_module(name, nn.Linear(4, 4))
    return model


@pytest.mark.parametrize("name", names("weight"))
def test_nan_in_a_weight_is_refused_when_it_is_quantized(name):
    model = linear_model()
    model.middle.weight.data[1, 2] = float("nan")
    with pytest.raises(LowbitError, match="NaN") as caught:
        quantize_(model, QuantConfig(weight=get(name)()))
    assert "middle" in str(caught.value)  # says which layer
    assert not any("parametrizations" in key for key in model.state_dict())  # and the model is as it was


@pytest.mark.parametrize("name", names("weight"))
def test_nan_in_an_assigned_weight_is_refused(name):
    model = quantize_(linear_model(), QuantConfig(weight=get(name)()))
    before = model.middle.weight.detach().clone()
    bad = torch.zeros(4, 4)
    bad[1, 2] = float("nan")
    with pytest.raises(LowbitError, match="NaN"):
        model.middle.weight = bad
    assert torch.equal(model.middle.weight, before)


@pytest.mark.parametrize(("name", "bits"), with_bits("activation"))
def test_integer_form_is_the_quantizer(name, bits):
    x = 2 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    quantizer = get(name)(bits=bits).activation()
    y = quantizer(x).detach()
    form = quantizer.integer()
    assert form.scale.shape in ((), (1, 1)) and not form.scale.requires_grad
    q = ((x + (0 if form.before is None else form.before)) / form.scale).round().clamp(form.low, form.high)
    assert len(q.unique()) <= 2**bits
    torch.testing.assert_close(q * form.scale + (0 if form.after is None else form.after), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
def test_integer_form_of_lsq_with_biases(granularity):
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
    quantizer = LSQ(bits=3, granularity=granularity, bias=True).activation()
    quantizer(x)
    with torch.no_grad():
        for bias in (quantizer.bias_in, quantizer.bias_out):
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)))
    form = quantizer.integer()
    q = ((x + form.before) / form.scale).round().clamp(form.low, form.high)
    torch.testing.assert_close(q * form.scale + form.after, quantizer(x).detach(), rtol=1e-6, atol=1e-6)
