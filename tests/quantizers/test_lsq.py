"""LSQ against values and gradients worked out by hand (paper's equations 1-3)."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.functional import lsq, lsq_codes, lsq_step
from lowbit.nn import QuantConfig, calibrate, quantize_
from lowbit.quantizers import LSQ
from lowbit.quantizers import lsq as lsq_file


def test_values_and_gradients_by_hand_signed():
    # 2 bits signed: codes -2 ... 1, step ½. x/step = -3, -1.8, -0.6, 0.4, 0.9, 4
    x = torch.tensor([-1.5, -0.9, -0.3, 0.2, 0.45, 2.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    y = lsq(x, step, bits=2, grad_scale=1.0)
    assert y.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 0.5]
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    y.backward(grad)
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]  # zero where clipped
    # per element: -Qn, round(v)-v inside, Qp
    slope = [-2, -2 + 1.8, -1 + 0.6, 0 - 0.4, 1 - 0.9, 1]
    assert step.grad.item() == pytest.approx(sum(g * s for g, s in zip(grad.tolist(), slope, strict=True)), abs=1e-5)


def test_values_and_gradients_by_hand_unsigned():
    # 2 bits unsigned: codes 0 ... 3, step 1
    x = torch.tensor([-1.0, 0.4, 1.6, 2.7, 5.0], requires_grad=True)
    step = torch.tensor(1.0, requires_grad=True)
    y = lsq(x, step, bits=2, signed=False, grad_scale=1.0)
    assert y.tolist() == [0, 0, 2, 3, 3]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert step.grad.item() == pytest.approx(0 - 0.4 + 0.4 + 0.3 + 3, abs=1e-5)


@pytest.mark.parametrize("form", [lsq_file._LSQ.apply, lsq_file._lsq_composed], ids=["one node", "composed"])
@pytest.mark.parametrize("shape", [(), (2,)], ids=["shared step", "own steps"])
def test_the_clip_bounds_themselves_count_as_outside(form, shape):
    x = torch.tensor([-1.0, 0.5], requires_grad=True)  # exactly -Qn·s and Qp·s
    step = torch.full(shape, 0.5, requires_grad=True)
    form(x, step, -2, 1, 1.0).sum().backward()
    assert x.grad.tolist() == [0, 0]
    assert step.grad.sum() == -2 + 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5)])
def test_the_composed_form_for_compilers_is_the_same_function(shape):
    torch.manual_seed(0)
    x, grad = 3 * torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    step = 0.2 + torch.rand(shape, dtype=torch.float64)
    results = []
    for form in (lsq_file._LSQ.apply, lsq_file._lsq_composed):
        inputs = x.clone().requires_grad_(), step.clone().requires_grad_()
        y = form(*inputs, -4, 3, 0.7)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    assert torch.equal(results[0][0], results[1][0])  # values to the bit
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*results, strict=True))


def test_default_gradient_scale_counts_the_elements_that_share_a_step():
    x = torch.full((2, 8), 9.0)  # far outside: each element gives Qp = 1
    step = torch.ones(2, 1, requires_grad=True)
    lsq(x, step, bits=2).sum().backward()
    assert torch.allclose(step.grad, torch.full((2, 1), 8 / math.sqrt(8 * 1)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5)])
def test_step_gradient_equals_the_elementwise_formula(shape):
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    step = (0.2 + torch.rand(shape, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(3, 5, dtype=torch.float64)
    lsq(x, step, bits=3, grad_scale=1.0).backward(grad)
    v = (x / step).detach()
    inside = (v > -4) & (v < 3)
    expected = (grad * torch.where(inside, v.round() - v, v.clamp(-4, 3))).sum_to_size(shape)
    assert torch.allclose(step.grad, expected, atol=1e-12)
    assert torch.equal(x.grad, torch.where(inside, grad, 0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_does_not_change_values_or_gradients(layout):
    torch.manual_seed(0)
    x, grad = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    results = []
    for memory in (torch.contiguous_format, layout):
        given = x.clone(memory_format=memory).requires_grad_()
        step = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64, requires_grad=True)
        y = lsq(given, step, bits=3)
        y.backward(grad)
        results.append((y.detach(), given.grad, step.grad))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*results, strict=True))


@given(bits=st.integers(2, 8), signed=st.booleans(), seed=st.integers(0, 999))
def test_every_value_is_a_code_times_the_step(bits, signed, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(64, generator=generator)
    step = 0.01 + torch.rand(1, generator=generator)
    codes = lsq_codes(x, step, bits, signed)
    assert torch.equal(lsq(x, step, bits, signed), codes * step)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    assert codes.min() >= low and codes.max() <= high


def test_starting_step_by_hand():
    x = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    assert lsq_step(x, (1, 1), bits=2).item() == 2 * 2.0 / 1
    assert lsq_step(x, (2, 1), bits=3).flatten().tolist() == pytest.approx([2 * 2 / math.sqrt(3)] * 2)
    assert lsq_step(x.abs(), (1, 1), bits=2, signed=False).item() == pytest.approx(4 * 2 / math.sqrt(3))


def test_half_precision_input_is_computed_in_full_precision():
    x = torch.linspace(-1, 1, 101).bfloat16()
    step = torch.tensor(0.1)
    y = lsq(x, step, bits=4)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, lsq(x.float(), step, bits=4).bfloat16())


@pytest.mark.parametrize(("bits", "signed"), [(1, True), (0, False), (17, True), (2.0, True)])
def test_wrong_bits_are_refused(bits, signed):
    with pytest.raises(LowbitError, match="bits="):
        lsq(torch.ones(1), torch.ones(1), bits, signed)


@pytest.mark.parametrize(
    ("config", "shape"), [(LSQ(granularity="tensor"), ()), (LSQ(granularity="channel"), (1, 1, 6)),
                          (LSQ(granularity="token"), (1, 5, 1))]
)  # fmt: skip
def test_activation_step_takes_its_shape_from_the_first_batch(config, shape):
    quantizer = config.activation()
    parameter = quantizer.step
    assert not quantizer.calibrated
    x = torch.randn(4, 5, 6)
    quantizer(x)
    assert quantizer.calibrated and tuple(quantizer.step.shape) == shape
    assert quantizer.step is parameter  # an optimizer built before the first batch keeps it


@pytest.mark.parametrize(("signed", "batch", "expected"), [
    (None, torch.tensor([[-1.0, 2.0]]), True), (None, torch.tensor([[0.0, 2.0]]), False),
    (True, torch.tensor([[0.0, 2.0]]), True), (False, torch.tensor([[-1.0, 2.0]]), False),
])  # fmt: skip
def test_signedness_follows_the_first_batch_unless_told(signed, batch, expected):
    quantizer = LSQ(bits=2, signed=signed).activation()
    quantizer(batch)
    assert quantizer.signed is expected
    other = LSQ(bits=2, signed=None).activation()
    other.load_state_dict(quantizer.state_dict())
    assert other.signed is expected and torch.equal(other.step, quantizer.step)


def test_only_the_first_batch_sets_the_step():
    quantizer = LSQ(bits=2).activation()
    quantizer(torch.randn(8, 8))
    step = quantizer.step.detach().clone()
    quantizer(100 * torch.randn(8, 8))
    assert torch.equal(quantizer.step, step)


def test_activation_gradient_scale_does_not_depend_on_the_batch_size():
    x = torch.randn(4, 6)
    gradients = []
    for batch in (x, torch.cat([x, x])):
        quantizer = LSQ(bits=2).activation()
        quantizer(x)
        quantizer.step.grad = None
        quantizer(batch).mean().backward()
        gradients.append(quantizer.step.grad)
    assert torch.allclose(*gradients)


def test_a_step_driven_below_zero_is_used_as_positive_and_still_learns():
    quantizer = LSQ(bits=2).activation()
    x = torch.randn(8, 8)
    quantizer(x)
    quantizer.step.data.fill_(-0.5)
    y = quantizer(x)
    assert torch.isfinite(y).all()
    y.square().sum().backward()
    assert torch.isfinite(quantizer.step.grad).all() and quantizer.step.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("granularity", "channel_dim", "shape"),
    [("channel", 1, (1, 6, 1, 1)), ("channel", -1, (1, 1, 1, 8)), ("token", -1, (1, 6, 7, 1))],
)
def test_four_dimensional_inputs_of_convolutions_and_linear_layers(granularity, channel_dim, shape):
    quantizer = LSQ(granularity=granularity).activation(channel_dim)
    quantizer(torch.randn(4, 6, 7, 8))
    assert tuple(quantizer.step.shape) == shape


def test_token_granularity_refuses_convolutions_and_weights():
    with pytest.raises(LowbitError, match="convolution"):
        quantize_(
            torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)),
            QuantConfig(activation=LSQ(granularity="token"), first_last="same"),
        )
    with pytest.raises(LowbitError, match="weights"):
        quantize_(
            torch.nn.Sequential(torch.nn.Linear(2, 2)), QuantConfig(weight=LSQ(granularity="token"), first_last="same")
        )


def test_calibrate_keeps_mode_and_running_statistics():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3))
    quantize_(model, QuantConfig(activation=LSQ(), first_last="same"))
    model[1].eval()
    before = model[1].running_mean.clone()
    calibrate(model, torch.randn(2, 3, 8, 8))
    assert model.training and not model[1].training
    assert torch.equal(model[1].running_mean, before)
    assert model[2].input_quantizer.calibrated


def test_a_weight_step_that_is_not_learnt_stays_through_training():
    model = quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4)), QuantConfig(LSQ(learn_step=False), first_last="same"))
    step = model[0].parametrizations.weight[0].step
    before = step.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        assert step.grad is None and model[0].parametrizations.weight.original.grad.abs().sum() > 0
        optimizer.step()
    assert torch.equal(step, before)


def test_an_activation_step_that_is_not_learnt_is_set_by_the_first_batch_alone():
    quantizer = LSQ(bits=2, learn_step=False).activation()
    x = torch.tensor([[1.0, -3.0], [2.0, 2.0]], requires_grad=True)
    quantizer(x).sum().backward()
    assert quantizer.step.item() == 4.0 and quantizer.step.grad is None
    assert x.grad.tolist() == [[1, 1], [1, 1]]
    other = LSQ(bits=2, learn_step=False).activation()
    other.load_state_dict(quantizer.state_dict())
    assert other.step.item() == 4.0 and not other.step.requires_grad
    assert copy.deepcopy(quantizer).step.requires_grad is False


def test_steps_that_are_not_learnt_are_left_to_no_optimizer():
    from lowbit.training.optim import param_groups

    config = QuantConfig(LSQ(learn_step=False), LSQ(learn_step=False), first_last="same")
    model = quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)), config)
    (group,) = param_groups(model, 0.1, "weights")
    assert [id(p) for p in group["params"]] == [id(model[0].parametrizations.weight.original)]


def biased(bits: int = 2, signed: bool | None = None, granularity: str = "tensor", channel_dim: int = -1):
    return LSQ(bits=bits, signed=signed, granularity=granularity, bias=True).activation(channel_dim)


def test_biases_by_hand():
    quantizer = biased()
    quantizer(torch.tensor([[1.0, -3.0], [2.0, 2.0]]))  # step 2·2/1 = 4
    quantizer.step.data.fill_(1.0)
    quantizer.bias_in.data = torch.tensor([[0.5, -0.25]])
    quantizer.bias_out.data = torch.tensor([[10.0, 20.0]])
    # x + b1 = 0.7, -1.45 and 3.5, -0.25; 2 bits signed: codes 1, -1 and 1 (clipped), -0
    x = torch.tensor([[0.2, -1.2], [3.0, 0.0]], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [[11.0, 19.0], [11.0, 20.0]]
    assert quantizer.codes(x).tolist() == [[3, 1], [3, 2]]  # levels -2 ... 1 of lsq(x + b1), without b2
    y.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert x.grad.tolist() == [[1, 2], [0, 4]]
    assert quantizer.bias_in.grad.tolist() == [[1, 6]]  # as x, summed over the batch: none where clipped
    assert quantizer.bias_out.grad.tolist() == [[4, 6]]  # all of it
    slope = 1 * (1 - 0.7) + 2 * (-1 + 1.45) + 3 * 1 + 4 * (0 + 0.25)
    assert quantizer.step.grad.item() == pytest.approx(slope / math.sqrt(2), abs=1e-5)  # Qp = 1, two elements a sample


@pytest.mark.parametrize(("channel_dim", "shape"), [(1, (1, 6, 1, 1)), (-1, (1, 1, 1, 8))])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_biases_are_one_number_a_channel_and_start_at_zero(granularity, channel_dim, shape):
    quantizer, plain = biased(4, None, granularity, channel_dim), LSQ(granularity=granularity).activation(channel_dim)
    parameters = quantizer.bias_in, quantizer.bias_out
    x = torch.randn(4, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer(x), plain(x))
    assert parameters == (quantizer.bias_in, quantizer.bias_out)  # an optimizer built before the first batch keeps them
    assert all(tuple(p.shape) == shape and not p.any() and p.requires_grad for p in parameters)


def test_signedness_is_decided_without_the_bias():
    quantizer = biased()
    quantizer(torch.tensor([[0.0, 2.0]]))
    assert quantizer.signed is False
    quantizer.bias_in.data.fill_(-5.0)
    assert quantizer(torch.tensor([[0.0, 2.0]])).tolist() == [[0.0, 0.0]] and quantizer.signed is False


def test_biases_survive_state_dict_and_deepcopy_before_and_after_the_first_batch():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    early, fresh = biased(), biased()
    fresh.load_state_dict(early.state_dict())
    assert not fresh.calibrated and not copy.deepcopy(early).calibrated
    assert torch.equal(fresh(x), early(x))
    for p in early.parameters():
        p.data.add_(0.3)
    late = biased()
    late.load_state_dict(early.state_dict())
    twin = copy.deepcopy(early)
    assert {"bias_in", "bias_out"} < set(early.state_dict())
    assert torch.equal(late(x), early(x)) and torch.equal(twin(x), early(x))
    twin.bias_in.data.add_(1)
    assert torch.equal(late(x), early(x))
    assert not any("bias" in key for key in LSQ().activation().state_dict())


def test_biases_are_added_in_float32_and_the_input_dtype_comes_out():
    quantizer = biased(8)
    x = torch.linspace(-1, 1, 101)[:, None].bfloat16()
    quantizer(x)
    quantizer.bias_in.data.fill_(1e-3)  # lost in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = quantizer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(y, quantizer(x.float()).bfloat16())
    assert all(p.grad.dtype == torch.float32 for p in quantizer.parameters())


def test_a_bias_is_refused_for_weights():
    with pytest.raises(LowbitError, match="bias=True is not allowed for weights"):
        LSQ(bias=True).weight(torch.ones(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("config", [LSQ(bits=3, bias=True), LSQ(bits=3, learn_step=False), LSQ(bits=3)])
def test_compiled_activations_agree_with_eager(config):
    torch._dynamo.reset()
    quantizer = config.activation()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    quantizer(x)
    for name in ("bias_in", "bias_out") if config.bias else ():
        getattr(quantizer, name).data.uniform_(-0.3, 0.3)
    learned = [p for p in quantizer.parameters() if p.requires_grad]
    results = []
    for forward in (quantizer.forward, torch.compile(quantizer.forward, fullgraph=True)):
        given = x.clone().requires_grad_()
        y = forward(given)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (given, *learned))))
    for eager, compiled in zip(*results, strict=True):
        assert eager.abs().sum() > 0 and torch.allclose(eager, compiled, atol=1e-5)


@pytest.mark.parametrize("form", [lsq_file._LSQ.apply, lsq_file._lsq_composed], ids=["one node", "composed"])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["shared step", "own steps"])
def test_the_clip_bounds_count_as_inside_in_the_form_of_ofq(form, shape):
    x = torch.tensor([-1.0, 0.5, 0.75], requires_grad=True)  # exactly -Qn·s and Qp·s, and beyond
    step = torch.full(shape, 0.5, requires_grad=True)
    y = form(x, step, -2, 1, 1.0, True)
    y.sum().backward()
    assert y.tolist() == [-1.0, 0.5, 0.5]
    assert x.grad.tolist() == [1, 1, 0]
    assert step.grad.sum() == 0 + 0 + 1  # round(v) - v = 0 at the bounds, Qp beyond


@pytest.mark.parametrize("make", [lambda config: config.weight(torch.ones(1, 3)), lambda config: config.activation()])
def test_bounds_and_floor_reach_weights_and_activations(make):
    x = torch.tensor([[-1.0, 0.5, 0.75]])
    grads = []
    for bounds in ("outside", "inside"):
        quantizer = make(LSQ(bits=2, signed=True, smallest_step=1e-5, bounds=bounds))
        quantizer(x)
        given = x.clone().requires_grad_()
        quantizer.step.data.fill_(0.5)
        quantizer(given).sum().backward()
        grads.append(given.grad.tolist())
        quantizer.step.data.fill_(-1.0)
        assert quantizer.positive_step().item() == pytest.approx(1e-5)
    assert grads == [[[0, 0, 0]], [[1, 1, 0]]]


def test_the_floor_is_where_a_step_starts_at_least():
    for smallest in (1e-8, 1e-5):
        config = LSQ(bits=2, smallest_step=smallest)
        activation = config.activation()
        activation(torch.zeros(2, 3))
        assert activation.step.item() == config.weight(torch.zeros(2, 3)).step.item() == pytest.approx(smallest)


def test_biases_for_each_place_by_hand():
    quantizer = LSQ(bits=2, bias="place", signed=True).activation(1)
    x = torch.tensor([[[[0.2, -1.2]], [[3.0, 0.0]]]])  # 1 image, 2 channels, 1 x 2 places
    quantizer(x)
    assert quantizer.bias_in.shape == quantizer.bias_out.shape == (1, 1, 1, 2) and quantizer.step.shape == ()
    quantizer.step.data.fill_(1.0)
    quantizer.bias_in.data = torch.tensor([[[[0.5, -0.25]]]])
    quantizer.bias_out.data = torch.tensor([[[[10.0, 20.0]]]])
    # x + b1 = 0.7, -1.45 and 3.5, -0.25: codes 1, -1 and 1 (clipped), -0
    y = quantizer(x)
    assert y.tolist() == [[[[11.0, 19.0]], [[11.0, 20.0]]]]
    y.backward(torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]))
    assert quantizer.bias_in.grad.tolist() == [[[[1, 6]]]]  # none where clipped
    assert quantizer.bias_out.grad.tolist() == [[[[4, 6]]]]


def test_biases_for_each_place_are_for_images():
    with pytest.raises(LowbitError, match="bias='place' is not allowed for the input of a linear layer"):
        LSQ(bias="place").activation()
    with pytest.raises(LowbitError, match="bias='place' is not allowed for weights"):
        LSQ(bias="place").weight(torch.ones(2, 2))
    sound = LSQ(bias="place").activation(1)
    sound(torch.randn(4, 3, 7))
    assert sound.bias_in.shape == (1, 1, 7)


@pytest.mark.parametrize(("bias", "shape"), [("place", (3, 7)), ("place", (7,)), (True, (7,))])
def test_an_input_with_too_few_dimensions_for_its_biases_is_refused(bias, shape):
    quantizer = LSQ(bias=bias).activation(1)
    with pytest.raises(LowbitError, match=f"bias={bias!r} does not fit an input of shape .{shape[0]}.*give a batch"):
        quantizer(torch.ones(shape))
    assert not quantizer.calibrated and quantizer.bias_in.numel() == 0


def test_newer_options_at_their_defaults_do_not_change_what_checkpoints_say():
    assert repr(LSQ(bits=2)) == "LSQ(bits=2, granularity='tensor', signed=None, learn_step=True, bias=False)"
    assert "bounds='inside'" in repr(LSQ(bounds="inside")) and "smallest_step=1e-05" in repr(LSQ(smallest_step=1e-5))
    for wrong in ({"bounds": "on"}, {"smallest_step": 0.0}, {"bias": "token"}):
        with pytest.raises(LowbitError, match=next(iter(wrong))):
            LSQ(**wrong)
    with pytest.raises(LowbitError, match="bounds='on'"):
        lsq(torch.ones(1), torch.ones(1), 2, bounds="on")
