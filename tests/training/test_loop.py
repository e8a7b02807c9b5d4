import json

import pytest
import torch
from torch import nn
from training_helpers import make_data

import lowbit
from lowbit.errors import CheckpointError, DivergedError, LowbitError
from lowbit.training import TrainConfig, train


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_mlp_learns_digits(digits, mlp):
    model = mlp(64, 10)
    record = train(model, digits, TrainConfig(epochs=6, batch_size=64, lr=0.01, progress=False), device="cpu")
    assert record.final["test_acc"] > 0.9  # chance is 0.1
    assert record.frame["train_loss"].is_monotonic_decreasing
    assert 0.9 < record.final["train_acc"] <= 1
    assert list(record.frame["epoch"]) == [1, 2, 3, 4, 5, 6]
    # What the record says is what the model does.
    x = (digits.test.x / 255 - digits.mean[0]) / digits.std[0]
    assert not model.training
    accuracy = (model(x).argmax(1) == digits.test.y).double().mean().item()
    assert record.final["test_acc"] == pytest.approx(accuracy, abs=1e-9)


def test_a_quantized_vit_learns_digits(digits):
    torch.manual_seed(0)
    model = lowbit.models.create("vit_nano", in_chans=1, img_size=8, patch_size=2, embed_dim=64, depth=2)
    lsq = {"method": "lsq", "bits": 4}
    lowbit.quantize_(model, lowbit.QuantConfig(weight=lsq, activation=lsq))
    config = TrainConfig(epochs=4, batch_size=32, lr=3e-3, warmup_epochs=0.5, weight_decay=0.0, progress=False)
    record = train(model, digits, config, device="cpu")
    assert record.final["test_acc"] > 0.5
    assert sum(record.identity["quantizers"].values()) == 8


def test_runs_repeat_and_leave_the_callers_random_numbers_alone(few, mlp, quick):
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        model = mlp()
        train(model, few, quick(augment="shift"), device="cpu")
        assert torch.equal(torch.get_rng_state(), state)
        results.append(weights(model))
    assert same(*results)
    other = mlp()
    train(other, few, quick(augment="shift", seed=1), device="cpu")
    assert not same(results[0], weights(other))


def test_torch_settings_are_put_back(few, mlp, quick):
    seen = []

    class Look:
        def on_step(self, state):
            seen.append(torch.are_deterministic_algorithms_enabled())

    train(mlp(), few, quick(epochs=1), callbacks=[Look()], device="cpu")
    assert seen == [True] * 3 and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_history_files_and_run_card(few, mlp, quick, tmp_path):
    record = train(mlp(), few, quick(out=str(tmp_path), eval_every=2), device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == record.history and len(rows) == 3
    assert rows[0]["test_acc"] is None and rows[1]["test_acc"] is not None and rows[2]["test_acc"] is not None
    record.to_json(tmp_path / "run.json", name="a run")
    card = json.loads((tmp_path / "run.json").read_text())
    assert card["schema"] == 1 and card["name"] == "a run" and card["history"] == rows
    assert card["train"]["lr"] == 0.01 and card["final"]["epoch"] == 3 and card["data"]["train"] == 30
    assert card["environment"]["versions"] if "versions" in card["environment"] else card["environment"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_finished_run_returns_at_once_with_its_weights(few, mlp, quick, tmp_path):
    first, config = mlp(), quick(out=str(tmp_path))
    record = train(first, few, config, device="cpu")
    second, steps = mlp(), []

    class Count:
        def on_step(self, state):
            steps.append(state.step)

    class Count2(Count):
        pass

    with pytest.raises(LowbitError, match="callbacks"):
        train(mlp(), few, config, callbacks=[Count()], device="cpu")
    again = train(second, few, config, device="cpu")
    assert again.history == record.history and not steps
    assert same(weights(first), weights(second))


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"epochs": 4}, "epochs: 3 → 4"), ({"lr": 0.02}, "lr: 0.01 → 0.02"), ({"augment": "shift"}, "augment: 'none'")],
)
def test_other_settings_are_refused_by_name(few, mlp, quick, tmp_path, changes, told):
    train(mlp(), few, quick(out=str(tmp_path)), device="cpu")
    with pytest.raises(LowbitError, match=told):
        train(mlp(), few, quick(out=str(tmp_path), **changes), device="cpu")
    record = train(mlp(), few, quick(out=str(tmp_path), **changes), device="cpu", fresh=True)
    assert len(record.history) == record.config["epochs"]


def test_other_data_and_other_models_are_refused(few, mlp, quick, tmp_path):
    config = quick(out=str(tmp_path))
    train(mlp(), few, config, device="cpu")
    fewer = make_data(few.train.x[:20], few.train.y[:20], few.test.x, few.test.y, 3)
    with pytest.raises(LowbitError, match="data: "):
        train(mlp(), fewer, config, device="cpu")
    renamed = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 3))
    with pytest.raises(CheckpointError, match="another model"):
        train(renamed, few, config, device="cpu")


class Weighted:
    """A callback with state: sums the losses it sees."""

    def __init__(self):
        self.total = torch.zeros(())

    def on_step(self, state):
        self.total = self.total + state.loss

    def on_epoch(self, state):
        return {"total": self.total.item()}

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, saved):
        self.total = saved["total"]


class StopAt:
    """Raises in the middle of an epoch, as an interruption would; has no state."""

    def __init__(self, step=None):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("every", [1, 2])
def test_an_interrupted_run_ends_as_if_never_interrupted(few, mlp, quick, tmp_path, every):
    config = {"epochs": 5, "augment": "shift", "checkpoint_every": every, "clip_grad": 1.0, "warmup_epochs": 1.5}
    reference, through = mlp(), Weighted()
    expected = train(
        reference, few, quick(out=str(tmp_path / "a"), **config), callbacks=[through, StopAt()], device="cpu"
    )
    interrupted = quick(out=str(tmp_path / "b"), **config)
    with pytest.raises(KeyboardInterrupt):
        train(mlp(), few, interrupted, callbacks=[Weighted(), StopAt(step=10)], device="cpu")  # epoch 4, step 2
    assert len((tmp_path / "b" / "history.jsonl").read_text().splitlines()) == 3
    resumed, tracker, steps = mlp(), Weighted(), []
    stop = StopAt()
    stop.on_gradients = lambda state: steps.append(state.step)
    record = train(resumed, few, interrupted, callbacks=[tracker, stop], device="cpu")
    assert steps[0] == (9 if every == 1 else 6)
    assert same(weights(reference), weights(resumed))
    assert torch.equal(tracker.total, through.total)
    measured = ["epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "total"]
    assert record.frame[measured].equals(expected.frame[measured])
    rows = [json.loads(line) for line in (tmp_path / "b" / "history.jsonl").read_text().splitlines()]
    assert rows == record.history


def test_callbacks_may_only_keep_what_a_checkpoint_can_hold(few, mlp, quick, tmp_path):
    class Odd:
        def state_dict(self):
            return {"frames": [object()]}

    with pytest.raises(LowbitError, match=r"Odd\.state_dict\(\)\['frames'\]\[0\] is a object"):
        train(mlp(), few, quick(out=str(tmp_path)), callbacks=[Odd()], device="cpu")


def test_gradients_can_be_masked_and_are_clipped_after(few, mlp, quick):
    norms = []

    class Mask:
        def on_gradients(self, state):
            state.model[1].weight.grad.zero_()

        def on_step(self, state):
            grads = [p.grad for p in state.model.parameters()]
            norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item())

    model = mlp()
    before = weights(model)
    train(model, few, quick(clip_grad=1e-3, weight_decay=0.0), callbacks=[Mask()], device="cpu")
    assert torch.equal(before["1.weight"], model[1].weight) and not torch.equal(before["4.weight"], model[4].weight)
    assert max(norms) <= 1.001e-3


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(few, mlp, quick, tmp_path):
    class Spoil:
        def on_step(self, state):
            if state.step == 4:
                with torch.no_grad():
                    state.model[4].weight.fill_(float("nan"))

    with pytest.raises(DivergedError, match=r"loss became nan in epoch 2, step 3 of 3, at learning rate .*checkpoint"):
        train(mlp(), few, quick(out=str(tmp_path)), callbacks=[Spoil()], device="cpu")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 1 and all(value.isfinite().all() for value in saved["model"].values())


def test_a_teacher_teaches(few, mlp, quick):
    teacher, student = mlp(dropout=0.0), mlp(dropout=0.0)
    with torch.no_grad():
        teacher[4].bias.add_(torch.tensor([0.0, 0.0, 9.0]))  # a teacher who always says 2
    before = weights(teacher)
    config = quick(epochs=20, distill_weight=1.0)
    train(student, few, config, teacher=teacher, device="cpu")
    x = (few.test.x / 255 - few.mean[0]) / few.std[0]
    assert (student(x).argmax(1) == 2).all()
    assert same(before, weights(teacher)) and not teacher.training


def test_refusals(few, mlp, quick):
    with pytest.raises(LowbitError, match=r"distill_weight=0\.5 needs a teacher"):
        train(mlp(), few, quick(distill_weight=0.5))
    with pytest.raises(LowbitError, match="detection"):
        train(mlp(), make_data(few.train.x, few.train.y, few.test.x, few.test.y, 3, task="detection"), quick())
    with pytest.raises(LowbitError, match="create it with num_classes=3"):
        train(mlp(classes=5), few, quick(epochs=1), device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(LowbitError, match="no GPU"):
            train(mlp(), few, quick(), device="cuda")


def test_bfloat16_autocast_keeps_float_parameters(few, mlp, quick):
    seen = set()
    model = mlp()
    model[1].register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    train(model, few, quick(epochs=1, amp="bf16"), device="cpu")
    assert seen == {torch.bfloat16} and model[1].weight.dtype == torch.float32


def test_fused_attention_is_off_on_the_cpu_during_the_run_only(digits, quick):
    model = lowbit.models.create("vit_nano", in_chans=1, img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=1)
    attention = model.blocks[0].attn
    before, seen = attention.fused_attn, []

    class Look:
        def on_step(self, state):
            seen.append(attention.fused_attn)

    small = make_data(digits.train.x[:20], digits.train.y[:20], digits.test.x[:20], digits.test.y[:20], 10)
    train(model, small, quick(epochs=1), callbacks=[Look()], device="cpu")
    train(model, small, quick(epochs=1, fused_attention=True), callbacks=[Look()], device="cpu")
    assert seen == [False, False, True, True] and attention.fused_attn == before


def test_sounds_train(mlp, quick):
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-30000, 30000, (30, 16), generator=random, dtype=torch.int16)
    data = make_data(x, torch.arange(30) % 3, x, torch.arange(30) % 3, 3, task="speech")
    record = train(mlp(), data, quick(augment="shift"), device="cpu")
    assert len(record.history) == 3
