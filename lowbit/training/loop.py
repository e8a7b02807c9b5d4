"""The training loop: :func:`train`."""

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar

import torch
from torch import nn

from lowbit.data import Data
from lowbit.errors import DivergedError, LowbitError
from lowbit.extras import extra
from lowbit.training import checkpoint, distillation, optim, run_card, seeds
from lowbit.training.annealing import annealing_phase
from lowbit.training.answers import stored_answers
from lowbit.training.batches import Batches
from lowbit.training.config import TrainConfig, differences
from lowbit.training.distributed import Processes, processes
from lowbit.training.hooks import QuantizerHooks, State, call
from lowbit.training.memory import keep_freed_memory

if TYPE_CHECKING:
    from tqdm.auto import tqdm

LOOK_EVERY = 20  # steps between checks of the loss on a GPU, where each check waits for the device


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    teacher: nn.Module | None = None,
    callbacks: Sequence[object] = (),
    device: str | torch.device | None = None,
    *,
    fresh: bool = False,
) -> run_card.RunRecord:
    """Train ``model`` in place on ``data`` and return the record; the model is left in evaluation mode.

    With ``config.out`` the run is resumable: the same call resumes from the last checkpoint, or returns at once if the
    run is finished. On the CPU it ends with the same bits as a run that was never interrupted. The caller's random
    generators and torch settings are left as they were.

    Args:
        model: maps float32 [N,C,H,W] (or [N,T]) to logits [N,K], or to two of them (distillation head) in training;
            for detection a model of :func:`lowbit.models.detector`.
        data: a :class:`lowbit.data.Data`; for a "detection" set the history has test_map and test_map50 in place of
            test_loss and the accuracies (see `lowbit.training.detection`).
        config: the settings.
        teacher: a model to distill from, without gradients, in the mode of ``config.teacher_mode``.
        callbacks: objects with some of the methods that :class:`State` lists, called in this order.
        device: e.g. "cpu"; ``None`` takes a GPU if there is one.
        fresh: delete the checkpoint in ``config.out`` instead of resuming.

    Raises:
        LowbitError: the settings do not fit the model, the data or the checkpoint.
        DivergedError: the loss is not finite.
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    _check(config, teacher)
    task = _task(model, data, config, teacher)
    with ExitStack() as stack:
        here = stack.enter_context(processes(device))
        stack.enter_context(seeds.preserved())
        stack.enter_context(_torch_settings(config, here))
        _warn_of_emulated_bf16(config, here)
        if here.device.type == "cpu":
            keep_freed_memory()
        seeds.seed_everything(config.seed, here.rank)
        model.to(here.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form
        if teacher is not None:
            distillation.prepare_teacher(teacher.to(here.device), config.teacher_mode)
        if teacher is not None:
            stack.enter_context(distillation.separate_heads(model))
        stack.enter_context(_fused_attention(config.fused_attention, here, model, teacher))
        return _run(model, data, config, task, tuple(callbacks), here, fresh)


class TaskBatches(Protocol):
    """The batches that `train` reads; each `Task` has a class of its own for them."""

    steps: int

    def first(self) -> torch.Tensor:
        """The inputs of the first global batch, without augmentation."""

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, Any]]:
        """This process's share of each global batch ``(x, y)`` of one epoch; y is what the task's ``loss`` takes."""


B = TypeVar("B", bound=TaskBatches)


class Task(Protocol[B]):
    """The parts of a training that differ between tasks: `Classification`, or `lowbit.training.detection.Detection`.

    Attributes:
        metrics: the columns of the history that ``evaluate`` fills; the progress bar shows the last.
        teacher: the model to distill from, or None.
    """

    metrics: tuple[str, ...]
    teacher: nn.Module | None

    @property
    def batches(self) -> Callable[[Data, TrainConfig, Processes], B]:
        """Make the batches ``(x, y)`` of a data set."""

    @property
    def record(self) -> type[run_card.RunRecord]:
        """The class of the record that `train` returns."""

    def check(self, model: nn.Module, x: torch.Tensor, here: Processes) -> None:
        """Refuse a model or a teacher that does not fit the data; ``x`` is the first batch."""

    def prepare(self, batches: B) -> None:
        """Complete the batches before the first epoch."""

    def loss(
        self, forward: Callable[..., Any], x: torch.Tensor, y: Any, here: Processes
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one batch, and sums over its items of the values whose means go into the history."""

    def evaluate(self, model: nn.Module, batches: B, here: Processes) -> dict[str, float]:
        """The ``metrics`` on the test split, over all processes; leaves evaluation mode on."""


class Classification:
    """The `Task` with one label per item."""

    batches = Batches
    record = run_card.RunRecord
    metrics: tuple[str, ...] = ("test_loss", "test_acc")

    def __init__(self, data: Data, config: TrainConfig, teacher: nn.Module | None = None):
        self.data, self.config = data, config
        self.teacher = teacher
        self.weight = 0.0 if teacher is None else 0.5 if config.distill_weight is None else config.distill_weight

    def loss(
        self, forward: Callable[..., Any], x: torch.Tensor, y: torch.Tensor | distillation.Taught, here: Processes
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one batch, and sums over its items of the values whose means go into the history."""
        with _autocast(self.config, here):
            output = forward(x)
            labels, target = y if isinstance(y, distillation.Taught) else (y, self._ask_teacher(x))
        for who, answer in (("the model", output), ("the teacher", target)):
            if answer is not None:
                distillation.check_outputs(answer, len(labels), self.data.num_classes, self.data.name, who)
        smoothing, temperature = self.config.label_smoothing, self.config.temperature
        loss = distillation.loss(output, labels, smoothing, target, self.weight, temperature)
        label = labels if labels.ndim == 1 else labels.argmax(1)  # in a mixture, the label with the larger share
        return loss, {"train_acc": (distillation.merge(output).detach().argmax(1) == label).sum()}

    @torch.no_grad()
    def _ask_teacher(self, x: torch.Tensor) -> torch.Tensor | None:
        return distillation.target(self.teacher, x) if self.teacher is not None and self.weight else None

    def prepare(self, batches: Batches) -> None:
        """Let the teacher answer each fixed augmentation (``config.crops``) once, before the training."""
        if self.config.crops and self.teacher is not None and self.weight:
            batches.answers = stored_answers(self.teacher, batches)

    @torch.no_grad()
    def check(self, model: nn.Module, x: torch.Tensor, here: Processes) -> None:
        """Refuse a model or a teacher whose outputs do not fit the data, before anything is trained or written.

        Args:
            x: the first batch.
        """
        teacher = self.teacher if self.weight else None
        for who, network in (("the model", model), ("the teacher", teacher)):
            if network is not None:
                with seeds.preserved(), _evaluation_mode(network), _autocast(self.config, here):
                    output = network(x[:1])
                distillation.check_outputs(output, 1, self.data.num_classes, self.data.name, who)

    def evaluate(self, model: nn.Module, batches: Batches, here: Processes) -> dict[str, float]:
        """The ``metrics`` on the test split, over all processes; leaves evaluation mode on."""
        return dict(zip(self.metrics, evaluate(model, batches, self.config, here), strict=True))


def _task(model: nn.Module, data: Data, config: TrainConfig, teacher: nn.Module | None) -> Task[Any]:
    if data.task != "detection":
        return Classification(data, config, teacher)
    from lowbit.training.detection import Detection

    return Detection(model, data, config, teacher)


def _run(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    task: Task[B],
    callbacks: tuple[object, ...],
    here: Processes,
    fresh: bool,
) -> run_card.RunRecord:
    import lowbit.nn
    from lowbit import environment

    batches = task.batches(data, config, here)
    first = batches.first()
    with _fitting(model, data):
        lowbit.nn.calibrate(model, first)
        task.check(model, first, here)
    task.prepare(batches)
    optimizer = optim.build_optimizer(model, config)
    callbacks = (*annealing_phase(model, optimizer, config, batches.steps), *callbacks)
    state = State(model, optimizer, config, batches.steps)
    identity = describe(model, data, task.teacher, here)
    out = Path(config.out) if config.out is not None else None
    history = _resume(out, state, identity, callbacks, here, fresh)
    done = task.record(history, config.to_dict(), environment.describe(), identity, out)
    if len(history) == config.all_epochs:
        model.eval()
        return done

    hooks = QuantizerHooks(model)
    forward: Callable[..., Any] = here.wrap(model)
    if config.compile == "quantizers":
        lowbit.nn.compile_quantizers(model)
    elif config.compile == "model":
        forward = torch.compile(forward)
    with _progress(config, here, batches.steps, len(history)) as bar:
        for epoch in range(len(history), config.all_epochs):
            state.epoch = epoch
            started = time.perf_counter()
            row = _one_epoch(state, forward, hooks, task, batches, callbacks, here, bar)
            last = epoch + 1 == config.all_epochs
            row |= dict.fromkeys(task.metrics)
            if last or (epoch + 1) % config.eval_every == 0:
                row |= task.evaluate(model, batches, here)
                for name in task.metrics:
                    if not math.isfinite(row[name]):
                        raise _not_finite(name.replace("_", " "), row[name], state, out)
            state.row = row
            for metrics in call(callbacks, "on_epoch", state):
                row |= metrics or {}
            row["seconds"] = time.perf_counter() - started
            history.append(row)
            if out is not None:
                due = last or (epoch + 1) % config.checkpoint_every == 0
                _save(out, state, identity, callbacks, history, here, with_checkpoint=due)
            bar.set_postfix(loss=row["train_loss"], test=row[task.metrics[-1]], refresh=False)
    model.eval()
    return done


def _one_epoch(
    state: State,
    forward: Callable[..., Any],
    hooks: QuantizerHooks,
    task: Task[B],
    batches: B,
    callbacks: Sequence[object],
    here: Processes,
    bar: "tqdm",
) -> dict[str, Any]:
    config, model = state.config, state.model
    look = 1 if here.device.type == "cpu" else LOOK_EVERY
    losses = torch.zeros(batches.steps, device=here.device)
    sums: dict[str, torch.Tensor] = {}
    started = time.perf_counter()
    model.train()
    for index, (x, y) in enumerate(batches.epoch(state.epoch)):
        state.step = state.epoch * batches.steps + index
        state.lr = optim.learning_rate(state.step, batches.steps, config)
        optim.set_learning_rate(state.optimizer, state.lr)
        list(call(callbacks, "before_forward", state))
        hooks.before_step(state.step / (config.all_epochs * batches.steps))
        state.optimizer.zero_grad()
        loss, parts = task.loss(forward, x, y, here)
        loss = hooks.add_penalty(loss)
        loss.backward()
        list(call(callbacks, "on_gradients", state))
        if config.clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        state.optimizer.step()
        state.loss = losses[index] = loss.detach()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value
        list(call(callbacks, "on_step", state))
        if (index + 1) % look == 0 or index + 1 == batches.steps:
            bad = (~losses[: index + 1].isfinite()).nonzero()
            if len(bad):
                state.step = state.epoch * batches.steps + int(bad[0])
                state.lr = optim.learning_rate(state.step, batches.steps, config)
                raise _not_finite("loss", float(losses[bad[0]]), state, config.out)
            bar.update(index + 1 - (bar.n - state.epoch * batches.steps))
    seen = batches.steps * config.batch_size
    return {
        "epoch": state.epoch + 1,
        "lr": state.lr,
        "train_loss": float(here.total(losses.double().mean())) / here.count,
        **{name: float(here.total(value)) / seen for name, value in sums.items()},
        "images_per_s": seen / (time.perf_counter() - started),
    }


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, config: TrainConfig, here: Processes) -> tuple[float, float]:
    """Mean cross-entropy and top-1 accuracy on the test split, over all processes; leaves evaluation mode on."""
    here.same_buffers(model)
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=here.device)
    for x, y in batches.test():
        with _autocast(config, here):
            output = model(x)
        distillation.check_outputs(output, len(y), batches.data.num_classes, batches.data.name, "the model")
        logits = distillation.merge(output).float()
        totals[0] += nn.functional.cross_entropy(logits, y, reduction="sum")
        totals[1] += (logits.argmax(1) == y).sum()
        totals[2] += len(y)
    loss, correct, count = here.total(totals).tolist()
    return loss / count, correct / count


def describe(model: nn.Module, data: Data, teacher: nn.Module | None, here: Processes) -> dict[str, Any]:
    """The model, data, teacher and processes of a run, as plain values: what ``config`` does not hold."""
    from lowbit.nn import quantized_layers

    methods = Counter(
        " ".join(
            f"{kind} {quantizer.config}" for kind, quantizer in (("w", q.weight), ("a", q.activation)) if quantizer
        )
        for q in quantized_layers(model)
    )
    return {
        "model": _spec(model),
        "quantizers": dict(methods),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": {
            "name": data.name,
            "train": len(data.train),
            "test": len(data.test),
            "classes": len(data.classes),
            "input_shape": list(data.input_shape),
        },
        "teacher": None if teacher is None else _spec(teacher),
        "processes": here.count,
    }


def _spec(model: nn.Module) -> dict[str, Any]:
    return plain(getattr(model, "spec", None)) or {"name": type(model).__name__}


def plain(value: Any) -> Any:
    """``value`` with tuples as lists and anything unusual as text, so that JSON and checkpoints can hold it."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode within the block; afterwards every layer has its own mode again."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _fitting(model: nn.Module, data: Data) -> Iterator[None]:
    """Raise LowbitError for a model that cannot compute the data's items, before the training starts."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise LowbitError(
            f"{type(model).__name__} cannot compute a batch of {data.name}, whose items are {list(data.input_shape)} "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}): create it for "
            "this shape"
        ) from error


def _warn_of_emulated_bf16(config: TrainConfig, here: Processes) -> None:
    if config.amp == "bf16" and here.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        warnings.warn(
            "amp='bf16' is emulated on this processor, which lacks AVX512-BF16: correct, but several times slower than "
            "amp='none'",
            stacklevel=3,
        )


def _check(config: TrainConfig, teacher: nn.Module | None) -> None:
    if teacher is None and config.distill_weight is not None:
        raise LowbitError(f"distill_weight={config.distill_weight:g} needs a teacher; pass teacher=, or leave it None")


def _not_finite(what: str, value: float, state: State, out: str | Path | None) -> DivergedError:
    kept = f"; the last good epoch is in {Path(out) / 'checkpoint.pt'}" if out is not None and state.epoch else ""
    return DivergedError(
        f"the {what} became {value} in epoch {state.epoch + 1}, step {state.step % state.steps_per_epoch + 1} of "
        f"{state.steps_per_epoch}, at learning rate {state.lr:.3g}; lower lr, warm up longer or set clip_grad{kept}"
    )


def _autocast(config: TrainConfig, here: Processes) -> torch.autocast:
    return torch.autocast(here.device.type, torch.bfloat16, enabled=config.amp == "bf16")


def _progress(config: TrainConfig, here: Processes, steps: int, epochs_done: int) -> "tqdm":
    with extra("train", "lowbit.train"):
        from tqdm.auto import tqdm

    total, initial = config.all_epochs * steps, epochs_done * steps
    hidden = {} if config.progress and here.first else {"disable": True}  # otherwise TQDM_DISABLE decides
    return tqdm(total=total, initial=initial, unit="step", mininterval=1.0, **hidden)


def _save(
    out: Path,
    state: State,
    identity: dict[str, Any],
    callbacks: Sequence[object],
    history: list[dict[str, Any]],
    here: Processes,
    with_checkpoint: bool,
) -> None:
    if with_checkpoint:
        generators = here.gather(seeds.get_state())
        own = [
            checkpoint.require_plain(callback.state_dict(), f"{type(callback).__name__}.state_dict()")
            if hasattr(callback, "state_dict")
            else None
            for callback in callbacks
        ]
        if here.first:
            checkpoint.save(
                out / "checkpoint.pt",
                config=state.config.to_dict(),
                identity=identity,
                epoch=len(history),
                model=state.model.state_dict(),
                optimizer=state.optimizer.state_dict(),
                rng=generators,
                callbacks=[[type(callback).__name__, own[i]] for i, callback in enumerate(callbacks)],
                history=history,
            )
    if here.first:
        run_card.append_history(out / "history.jsonl", history[-1])
    here.wait()


def _resume(
    out: Path | None,
    state: State,
    identity: dict[str, Any],
    callbacks: Sequence[object],
    here: Processes,
    fresh: bool,
) -> list[dict[str, Any]]:
    """Restore everything from ``out``'s checkpoint, if there is one; returns the history so far."""
    history: list[dict[str, Any]] = []
    if out is None:
        return history
    path = out / "checkpoint.pt"
    if fresh and here.first:
        path.unlink(missing_ok=True)
    here.wait()
    if path.exists():
        saved = checkpoint.load(path)
        changed = differences(saved["config"], state.config.to_dict()) + differences(saved["identity"], identity, ())
        now = [type(callback).__name__ for callback in callbacks]
        if [name for name, _ in saved["callbacks"]] != now:
            changed.append(f"callbacks: {[name for name, _ in saved['callbacks']]} → {now}")
        if changed:
            raise LowbitError(
                f"{path} belongs to a run with other settings ({'; '.join(changed)}); use another out folder, the old "
                "settings, or start afresh (--fresh, or fresh=True)"
            )
        checkpoint.load_model(state.model, saved["model"], path)
        checkpoint.load_optimizer(state.optimizer, saved["optimizer"])
        seeds.set_state(saved["rng"][here.rank])
        for callback, (_, own) in zip(callbacks, saved["callbacks"], strict=True):
            if own is not None and hasattr(callback, "load_state_dict"):
                callback.load_state_dict(own)
        history = saved["history"]
    if here.first:
        run_card.write_history(out / "history.jsonl", history)
    return history


@contextmanager
def _torch_settings(config: TrainConfig, here: Processes) -> Iterator[None]:
    """Deterministic algorithms for the run, if asked; the process's own settings afterwards."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # torch puts the setting into this module at run time
    fill, benchmark = deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    try:
        if config.deterministic:
            if here.device.type == "cuda":
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
            torch.backends.cudnn.benchmark = False
        else:
            torch.backends.cudnn.benchmark = True
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


class _Switched(Protocol):
    """An attention layer of timm."""

    fused_attn: bool


def _has_switch(layer: nn.Module) -> TypeGuard[_Switched]:
    return hasattr(layer, "fused_attn")


@contextmanager
def _fused_attention(wanted: bool | None, here: Processes, *models: nn.Module | None) -> Iterator[None]:
    """Set timm's ``fused_attn`` switch on every attention layer for the run."""
    if wanted is None and here.device.type == "cpu":
        wanted = False
    layers = [m for model in models if model is not None for m in model.modules() if _has_switch(m)]
    before = [layer.fused_attn for layer in layers]
    try:
        if wanted is not None:
            for layer in layers:
                layer.fused_attn = wanted
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.fused_attn = value
