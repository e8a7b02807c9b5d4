"""Activation quantizers before, at and after their first batch, over the registry."""

import copy
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lowbit.errors import CheckpointError, LowbitError
from lowbit.nn import QuantConfig, calibrate, quantize_
from lowbit.quantizers import LSQ, PACT, LSQPlus, StatsQ, get, names

# Every method of inputs with its defaults, and those whose first batch decides more.
METHODS = [get(name)() for name in names("activation")]
METHODS += [LSQ(granularity="channel"), LSQ(bias=True), LSQ(granularity="channel", bias=True, signed=True)]
METHODS += [LSQ(signed=False), PACT(alpha=None), LSQPlus(init="minmax", signed=True)]
DECIDED_BY_A_BATCH = [method for method in METHODS if not method.activation().calibrated]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)
each_undecided = pytest.mark.parametrize("method", DECIDED_BY_A_BATCH, ids=repr)


def model(method, start: int = 0) -> nn.Sequential:
    torch.manual_seed(start)
    layers = (
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.Linear(8, 3),
    )
    config = QuantConfig(weight=StatsQ(bits=3), activation=method, first_last="same")
    return quantize_(nn.Sequential(*layers), config)


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def test_the_list_reaches_every_kind_of_start():
    assert {type(method) for method in DECIDED_BY_A_BATCH} == {LSQ, LSQPlus, PACT}


@every_method
def test_no_parameter_changes_its_shape_or_object_with_the_first_batch(method):
    quantized = model(method)
    before = {name: (p, p.shape, p.dtype) for name, p in quantized.named_parameters()}
    optimizer = torch.optim.AdamW(quantized.parameters(), lr=0.01)
    quantized(images()).square().sum().backward()
    optimizer.step()
    assert all(p is before[name][0] for name, p in quantized.named_parameters())
    assert all((p.shape, p.dtype) == before[name][1:] for name, p in quantized.named_parameters())
    assert all(p.numel() and torch.isfinite(p).all() for p in quantized.parameters())


@pytest.mark.parametrize(
    ("method", "conv", "linear"),
    [
        (LSQ(), (), ()),
        (LSQ(granularity="channel"), (1, 4, 1, 1), (64,)),
        (LSQ(granularity="channel", bias=True), (1, 4, 1, 1), (64,)),
        (PACT(alpha=None), (), ()),
        (LSQPlus(), (), ()),
    ],
    ids=repr,
)
def test_shapes_follow_from_the_layer(method, conv, linear):
    quantized = model(method)
    for layer, shape in ((quantized[2], conv), (quantized[4], linear)):
        assert {tuple(p.shape) for p in layer.input_quantizer.parameters()} == {shape}
    alone = LSQ(granularity="channel").activation()
    assert alone.step.shape == (0,)  # a quantizer without a layer knows no channels
    alone.expect_((None, None, 5))
    assert alone.step.shape == (1, 1, 5)


@every_method
def test_the_first_batch_starts_as_it_did_without_a_known_shape(method):
    x = images()
    for shape, channel_dim in (((None, 2, None, None), 1), ((4,), -1)):
        told, alone = method.activation(channel_dim), method.activation(channel_dim)
        told.expect_(shape)
        assert torch.equal(told(x), alone(x))
        for name, p in alone.named_parameters():
            assert torch.equal(getattr(told, name).flatten(), p.flatten())


@each_undecided
def test_before_the_first_batch_questions_about_codes_are_refused(method):
    quantizer = method.activation(1)
    for question in (lambda: quantizer.codes(images()), quantizer.integer):
        with pytest.raises(LowbitError, match="calibrate"):
            question()


@every_method
def test_state_dict_and_deepcopy_before_and_after_the_first_batch(method):
    first, x = model(method), images()
    early, fresh = copy.deepcopy(first), model(method, start=1)
    fresh.load_state_dict(first.state_dict())
    undecided = method in DECIDED_BY_A_BATCH
    for each in (first, early, fresh):
        assert each[2].input_quantizer.calibrated is not undecided
        each.eval()
    y = first(x)
    assert torch.equal(early(x), y) and torch.equal(fresh(x), y)
    late = model(method, start=2).eval()
    late.load_state_dict(first.state_dict())
    assert late[2].input_quantizer.calibrated and torch.equal(late(x), y)
    late.load_state_dict(model(method).state_dict())  # and back to one that has seen nothing
    assert late[2].input_quantizer.calibrated is not undecided


@every_method
def test_an_averaged_copy_made_before_the_first_batch_follows(method):
    quantized, x = model(method), images()
    average = AveragedModel(quantized)
    calibrate(quantized, x)
    average.update_parameters(quantized)
    with torch.no_grad():
        for p in quantized.parameters():
            p.mul_(1.5)
    average.update_parameters(quantized)
    for own, other in zip(average.module.parameters(), quantized.parameters(), strict=True):
        assert torch.allclose(own, other * (1.25 / 1.5))
    kept = [p.clone() for p in average.module.parameters()]
    average(10 * x)  # nothing is taken from this batch
    assert all(torch.equal(a, b) for a, b in zip(kept, average.module.parameters(), strict=True))
    for own, other in ((average.module[2], quantized[2]), (average.module[4], quantized[4])):
        assert own.input_quantizer.levels.shape == other.input_quantizer.levels.shape
        if isinstance(method, LSQ):
            assert own.input_quantizer.signed == other.input_quantizer.signed


def as_older(name: str, value: torch.Tensor) -> torch.Tensor:
    """LSQ's steps and biases had as many dims as the first batch."""
    if "input_quantizer" not in name or not name.endswith(("step", "bias_in", "bias_out")) or value.ndim > 1:
        return value
    return value[None] if value.ndim else value.reshape((1, 1) if name[0] in "45" else (1, 1, 1, 1))


@every_method
def test_checkpoints_of_older_versions_load(method):
    quantized, x = model(method).eval(), images()
    y = quantized(x)
    old = quantized.state_dict()
    if isinstance(method, LSQ):
        old = {name: as_older(name, value) for name, value in old.items()}
    else:
        old = {name: value for name, value in old.items() if not name.endswith("_extra_state")}
    late = model(method, start=1).eval()
    late.load_state_dict(old)
    assert torch.equal(late(x), y)
    empty = {
        name: value.new_empty(0) if "input_quantizer" in name and value.is_floating_point() else value
        for name, value in model(method).state_dict().items()
        if isinstance(method, LSQ) or not name.endswith("_extra_state")
    }
    if method in DECIDED_BY_A_BATCH:
        empty = {name: torch.tensor(1) if name.endswith("_extra_state") else value for name, value in empty.items()}
        late.load_state_dict(empty)
        assert not late[2].input_quantizer.calibrated
        assert all(p.numel() for p in late.parameters())
        assert torch.equal(late(x), y)


def test_optimizer_state_of_older_versions_fits_the_step():
    from lowbit.training.checkpoint import load_optimizer

    quantized = model(LSQ())
    optimizer = torch.optim.AdamW(quantized.parameters(), lr=0.1)
    quantized(images()).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for held in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if held[name].ndim == 0:
                held[name] = held[name].reshape(1, 1, 1)
    twin = torch.optim.AdamW(quantized.parameters(), lr=0.1)
    load_optimizer(twin, copy.deepcopy(state))
    twin.step()
    assert all(twin.state[p]["exp_avg"].shape == p.shape for p in quantized.parameters())


def test_a_state_that_no_version_writes_is_refused():
    quantizer = LSQ().activation()
    for wrong in (torch.tensor(7), torch.tensor([0, 1])):
        with pytest.raises(CheckpointError, match="LSQActivation"):
            quantizer.load_state_dict({**quantizer.state_dict(), "_extra_state": wrong})
    assert not quantizer.calibrated


def test_a_first_batch_that_does_not_fit_the_layer_changes_nothing():
    quantized = model(LSQ(granularity="channel"))
    with pytest.raises(LowbitError, match=r"65 numbers.*64 input channels"):
        quantized[4](torch.randn(2, 65))
    assert not quantized[4].input_quantizer.calibrated
    quantized[4](torch.randn(2, 64))
    assert quantized[4].input_quantizer.step.shape == (64,)


@each_undecided
def test_an_empty_batch_decides_nothing(method):
    quantized = model(method)
    assert quantized(images(0)).shape == (0, 3)
    assert not quantized[2].input_quantizer.calibrated
    with pytest.raises(LowbitError, match="batch with items"):
        calibrate(quantized, images(0))
    calibrate(quantized, images())
    assert quantized[2].input_quantizer.calibrated


@each_undecided
def test_export_before_the_first_batch_says_to_calibrate(method):
    with pytest.raises(LowbitError, match="calibrate"):
        torch.export.export(model(method).eval(), (images(),))


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_method
def test_ddp_made_before_the_first_batch_trains(alone, method):
    quantized = model(method)
    wrapped = nn.parallel.DistributedDataParallel(quantized)
    for _ in range(2):
        wrapped(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in quantized.parameters())


def test_ddp_made_before_a_step_for_each_token_says_to_calibrate(alone):
    def tokens():
        config = QuantConfig(activation=LSQ(granularity="token"), first_last="same")
        return quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)

    quantized, x = tokens(), torch.randn(2, 5, 4)
    wrapped = nn.parallel.DistributedDataParallel(quantized)
    with pytest.raises(LowbitError, match=r"calibrate\(model, x\) before wrapping"):
        wrapped(x)
    assert not quantized[0].input_quantizer.calibrated
    wrapped = nn.parallel.DistributedDataParallel(calibrate(tokens(), x))
    wrapped(x).sum().backward()


@pytest.mark.slow
def test_two_processes_start_from_the_first_ones_batch(tmp_path):
    script = textwrap.dedent(f"""
        import sys, torch
        from torch import nn
        from lowbit.nn import QuantConfig, quantize_
        from lowbit.quantizers import LSQ
        rank = int(sys.argv[1])
        torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/two", rank=rank, world_size=2)
        torch.manual_seed(0)
        layers = nn.Linear(4, 4), nn.Linear(4, 4)
        model = quantize_(nn.Sequential(*layers), QuantConfig(activation=LSQ(bits=2, bias=True), first_last="same"))
        wrapped = nn.parallel.DistributedDataParallel(model)
        x = torch.rand(8, 4) if rank == 0 else -5 * torch.rand(8, 4)  # of another size and sign
        wrapped(x).sum().backward()
        torch.save([model[0].input_quantizer.step.data, model[0].input_quantizer.signed], "{tmp_path}/" + sys.argv[1])
        torch.distributed.destroy_process_group()
    """)
    started = [subprocess.Popen([sys.executable, "-c", script, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    (step, signed), (other, other_signed) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert torch.equal(step, other) and signed is other_signed is False
    assert 0 < step < 4 / math.sqrt(3)
