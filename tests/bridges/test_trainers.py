"""Callbacks and methods in other trainers: each ends with the weights of a plain loop, and callbacks see its steps."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowbit
from lowbit.errors import LowbitError
from lowbit.metrics import FreezingTracker, OscillationTracker
from lowbit.quantizers import LSQ, S3, DeepShiftQ, StatsQ
from lowbit.training import ConfidenceGuidedAnnealing, Hooks, Log, tensorboard

EPOCHS, BATCHES, RATE = 2, 4, 0.05


def network(weight=None, activation=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    lowbit.quantize_(model, lowbit.QuantConfig(weight or StatsQ(bits=2), activation, first_last="same"))
    return model


def batches():
    torch.manual_seed(1)
    return [(torch.randn(5, 6), torch.randint(3, (5,))) for _ in range(BATCHES)]


class Recorder:
    """A callback that writes down what it is told."""

    def __init__(self):
        self.calls = []

    def before_forward(self, state):
        self.calls.append(("before", state.step, state.epoch))

    def on_gradients(self, state):
        self.calls.append(("gradients", state.step, state.lr))

    def on_step(self, state):
        self.calls.append(("step", state.step, state.epoch))

    def on_epoch(self, state):
        self.calls.append(("epoch", state.step, state.epoch))
        return {"steps": state.step + 1}


def plain(model, callbacks, accumulate=1):
    """The loop of the docstring of `Hooks`."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    hooks = Hooks(model, optimizer, callbacks, epochs=EPOCHS, steps_per_epoch=BATCHES // accumulate)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(batches()):
            if i % accumulate == 0:
                hooks.before_forward()
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                hooks.before_step()
                optimizer.step()
                optimizer.zero_grad()
                hooks.after_step()
        hooks.after_epoch()
    return hooks


def test_callbacks_are_called_in_order():
    recorder = Recorder()
    hooks = plain(network(), [recorder])
    assert hooks.done == EPOCHS * BATCHES and hooks.state.row == {"steps": 8}
    first, last = recorder.calls[:3], recorder.calls[-4:]
    assert first == [("before", 0, 0), ("gradients", 0, RATE), ("step", 0, 0)]
    assert last == [("before", 7, 1), ("gradients", 7, RATE), ("step", 7, 1), ("epoch", 7, 1)]


def test_penalties_of_methods_reach_the_gradients():
    model, (x, y) = network(S3(sparse_penalty=0.1)), batches()[0]
    other = copy.deepcopy(model)
    hooks = Hooks(model, torch.optim.SGD(model.parameters(), RATE), epochs=1, steps_per_epoch=1)
    hooks.before_forward()
    nn.functional.cross_entropy(model(x), y).backward()
    without = [parameter.grad.clone() for parameter in model.parameters()]
    hooks.before_step()
    loss = nn.functional.cross_entropy(other(x), y)
    for found in lowbit.nn.quantized_layers(other):
        loss = loss + found.weight.penalty(*found.latents)
    loss.backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert any(not torch.equal(a, b.grad) for a, b in zip(without, model.parameters(), strict=True))


def test_methods_change_their_latents_before_a_step():
    model = network(DeepShiftQ(bits=3, clamp="latent"))
    for found in lowbit.nn.quantized_layers(model):
        nn.init.constant_(found.latents[0], 7.0)
    Hooks(model, torch.optim.SGD(model.parameters(), RATE), epochs=1, steps_per_epoch=1).before_forward()
    assert all(found.latents[0].max() == 1 for found in lowbit.nn.quantized_layers(model))


def test_a_run_resumes():
    whole, first = network(), network()
    trackers = OscillationTracker(whole), OscillationTracker(first)
    plain(whole, [trackers[0]])
    optimizer = torch.optim.SGD(first.parameters(), RATE)
    hooks = Hooks(first, optimizer, [trackers[1]], epochs=EPOCHS, steps_per_epoch=BATCHES)
    for epoch in range(EPOCHS):
        for x, y in batches():
            hooks.before_forward()
            nn.functional.cross_entropy(first(x), y).backward()
            hooks.before_step()
            optimizer.step()
            optimizer.zero_grad()
            hooks.after_step()
        if epoch == 0:
            saved = copy.deepcopy((first.state_dict(), hooks.state_dict()))
            first = network()
            first.load_state_dict(saved[0])
            optimizer = torch.optim.SGD(first.parameters(), RATE)
            tracker = OscillationTracker(first)
            hooks = Hooks(first, optimizer, [tracker], epochs=EPOCHS, steps_per_epoch=BATCHES)
            hooks.load_state_dict(saved[1])
    assert tracker.summary().equals(trackers[0].summary())
    with pytest.raises(LowbitError, match="of 1 callbacks; there are 0 here"):
        Hooks(first, optimizer, epochs=1, steps_per_epoch=1).load_state_dict(saved[1])


def test_the_length_must_be_positive():
    with pytest.raises(LowbitError, match="steps_per_epoch=0 is not allowed"):
        Hooks(network(), None, epochs=1, steps_per_epoch=0)


def lightning_module(model):
    """A LightningModule that trains ``model`` as `plain` does, and its data."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), RATE)

    return Module(), DataLoader(TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), 5)


def lightning_trainer(model, callbacks, folder, epochs=EPOCHS, accumulate=1):
    lightning = pytest.importorskip("lightning")
    return lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=accumulate, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[lowbit.training.lightning_callback(model, callbacks)],
    )  # fmt: skip


def in_lightning(model, callbacks, accumulate, folder):
    trainer = lightning_trainer(model, callbacks, folder, accumulate=accumulate)
    trainer.fit(*lightning_module(model))
    return {name: float(value) for name, value in trainer.logged_metrics.items()}


def in_accelerate(model, callbacks, accumulate, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    hooks = Hooks(model, optimizer, callbacks, epochs=EPOCHS, steps_per_epoch=BATCHES // accumulate)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(batches()):
            if i % accumulate == 0:
                hooks.before_forward()
            with accelerator.accumulate(prepared):
                accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
                if accelerator.sync_gradients:
                    hooks.before_step()
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    hooks.after_step()
        row = hooks.after_epoch()
    return row


class Classifier(nn.Module):
    """What transformers' Trainer expects: the loss among the results."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels):
        logits = self.model(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def transformers_trainer(model, callbacks, folder, accumulate=1, epochs=EPOCHS, **more):
    transformers = pytest.importorskip("transformers")
    items = [{"x": x, "labels": y} for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=5, gradient_accumulation_steps=accumulate,
        learning_rate=RATE, max_grad_norm=0, lr_scheduler_type="constant", optim="sgd", use_cpu=True, report_to=[],
        disable_tqdm=True, train_sampling_strategy="sequential", **{"save_strategy": "no"} | more,
    )  # fmt: skip
    return transformers.Trainer(
        Classifier(model), arguments, train_dataset=items,
        callbacks=[lowbit.training.transformers_callback(callbacks)],
    )  # fmt: skip


def in_transformers(model, callbacks, accumulate, folder):
    trainer = transformers_trainer(model, callbacks, folder, accumulate)
    trainer.train()
    return next(row for row in reversed(trainer.state.log_history) if "steps" in row)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("trainer", [in_lightning, in_accelerate, in_transformers])
def test_a_trainer_ends_with_the_weights_of_the_plain_loop(trainer, accumulate, tmp_path):
    model, expected = network(S3(sparse_penalty=0.1)), network(S3(sparse_penalty=0.1))
    recorders = Recorder(), Recorder()
    frozen = FreezingTracker(model), FreezingTracker(expected)
    plain(expected, [recorders[1], frozen[1]], accumulate)
    row = trainer(model, [recorders[0], frozen[0]], accumulate, tmp_path)
    assert recorders[0].calls == recorders[1].calls and len(recorders[0].calls) == EPOCHS * (12 // accumulate + 1)
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert frozen[0].summary(total=True).equals(frozen[1].summary(total=True))
    assert row["steps"] == EPOCHS * BATCHES / accumulate


@pytest.mark.parametrize("trainer", [in_lightning, in_accelerate, in_transformers])
def test_annealing_holds_confident_weights(trainer, tmp_path):
    model = network()
    annealing = ConfidenceGuidedAnnealing(model, boundary=0.02)
    before = [found.latents[0].clone() for found in lowbit.nn.quantized_layers(model)]
    trainer(model, [annealing, Recorder()], 1, tmp_path)
    after = [found.latents[0] for found in lowbit.nn.quantized_layers(model)]
    moved = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    assert 0 < moved < sum(latent.numel() for latent in before) / 4


def test_lightning_s_checkpoint_resumes_the_callbacks(tmp_path):
    whole, first, second = network(), network(), network()
    trackers = [OscillationTracker(model) for model in (whole, first, second)]
    lightning_trainer(whole, trackers[:1], tmp_path).fit(*lightning_module(whole))
    half = lightning_trainer(first, trackers[1:2], tmp_path, epochs=1)
    half.fit(*lightning_module(first))
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = lightning_trainer(second, trackers[2:], tmp_path)
    rest.fit(*lightning_module(second), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert trackers[2].summary().equals(trackers[0].summary())


def test_a_checkpoint_of_transformers_resumes_the_callbacks(tmp_path):
    whole, first, second = network(), network(), network()
    trackers = [OscillationTracker(model) for model in (whole, first, second)]
    transformers_trainer(whole, trackers[:1], tmp_path / "whole").train()
    transformers_trainer(first, trackers[1:2], tmp_path / "half", epochs=1, save_strategy="epoch").train()
    rest = transformers_trainer(second, trackers[2:], tmp_path / "half")
    rest.train(resume_from_checkpoint=True)
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert trackers[2].summary().equals(trackers[0].summary())
    file = min((tmp_path / "half").glob("checkpoint-*/lowbit.pt"))
    for said in ("lowbit.pt is truncated, damaged", "lowbit.pt is missing: the training resumes at step"):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(file.parent, tmp_path / "broken" / file.parent.name)
        broken = tmp_path / "broken" / file.parent.name / file.name
        broken.write_bytes(file.read_bytes()[:100])
        if "missing" in said:
            broken.unlink()
        model = network()
        with pytest.raises(LowbitError, match=said):
            transformers_trainer(model, [OscillationTracker(model)], tmp_path / "broken").train(
                resume_from_checkpoint=True
            )


def test_numbers_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from lowbit.data import load
    from lowbit.training import TrainConfig

    data = load("digits").subset(train=128, test=40)
    model = digits_model(data)
    with SummaryWriter(tmp_path) as writer:
        log = Log(tensorboard(writer), every=2)
        record = lowbit.train(
            model, data, TrainConfig(epochs=2, batch_size=32), callbacks=[OscillationTracker(model), log]
        )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    for name in ("test_acc", "train_loss", "oscillating"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(4 * (i + 1), row[name]) for i, row in enumerate(record.history)]
        assert [step for step, _ in logged] == [step for step, _ in wanted]
        assert [value for _, value in logged] == pytest.approx([value for _, value in wanted])


def digits_model(data):
    torch.manual_seed(0)
    size = data.input_shape[0] * data.input_shape[1] * data.input_shape[2]
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    return lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(bits=2), first_last="same"))


def test_a_logger_is_called_as_weights_and_biases_is():
    written = []
    log = Log(lambda numbers, step: written.append((numbers, step)))
    plain(network(), [Recorder(), log])
    assert written == [({"steps": 4}, 4), ({"steps": 8}, 8)]
    with pytest.raises(LowbitError, match="every=-1"):
        Log(log.write, every=-1)


@pytest.mark.parametrize("again", [False, True], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(again):
    from torch.utils.checkpoint import checkpoint

    model, (x, y) = network(StatsQ(bits=2), LSQ(bits=4)), batches()[0]
    lowbit.calibrate(model, x)
    other = copy.deepcopy(model)
    x.requires_grad_()
    nn.functional.cross_entropy(model(x), y).backward()
    nn.functional.cross_entropy(checkpoint(other, x, use_reentrant=again), y).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_transformers_own_gradient_checkpointing():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=16, patch_size=8))
    x = torch.randn(2, 3, 16, 16)
    config = lowbit.QuantConfig(StatsQ(bits=2), LSQ(bits=4), attention=True, qkr=True)
    lowbit.calibrate(lowbit.quantize_(model, config), x)
    other = copy.deepcopy(model).train()
    other.gradient_checkpointing_enable()
    for each in (model.train(), other):
        each(x).logits.square().sum().backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


@pytest.fixture
def processes(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("activation", [None, LSQ(bits=4, granularity="channel")], ids=["weights", "inputs too"])
def test_a_sharded_model_trains_and_callbacks_refuse_it(activation, processes):
    from torch.distributed.fsdp import fully_shard

    model, (x, y) = network(StatsQ(bits=2), activation), batches()[0]
    lowbit.calibrate(model, x)
    other = copy.deepcopy(model)
    fully_shard(model, mesh=processes)
    for each in (model, other):
        nn.functional.cross_entropy(each(x), y).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)
    with pytest.raises(LowbitError, match=r"'0\..*' is divided among processes"):
        Hooks(model, torch.optim.SGD(model.parameters(), RATE), epochs=1, steps_per_epoch=1)


def test_a_step_for_a_whole_tensor_cannot_be_sharded(processes):
    """A limit of torch's; the day it is gone, the how-to page need not name it."""
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ValueError, match="scalar parameters"):
        fully_shard(network(StatsQ(bits=2), LSQ(bits=4)), mesh=processes)
