"""lowbit's callbacks and methods in other loops: a loop of your own, accelerate, Lightning, transformers' Trainer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.files import write_atomically
from lowbit.training import checkpoint
from lowbit.training.config import TrainConfig
from lowbit.training.hooks import QuantizerHooks, State, call

if TYPE_CHECKING:
    import lightning
    import transformers


class Hooks:
    """The calls that `lowbit.train` makes around every step, for another loop.

    Example::

        hooks = lowbit.training.Hooks(model, optimizer, callbacks, epochs=3, steps_per_epoch=len(loader))
        for images, labels in loader:
            hooks.before_forward()
            criterion(model(images), labels).backward()
            hooks.before_step()
            optimizer.step()
            optimizer.zero_grad()
            hooks.after_step()

    They run the callbacks, and what methods need of a loop: penalties on their latents (S3), changes of the latents
    before a step (DeepShift, INQ). The gradients of penalties are added by `before_step`, after those of your loss;
    clip gradients after it. If gradients are accumulated over several batches, the three calls surround them all.

    Args:
        model: the quantized model, without wrappers for several processes (``model.module``).
        optimizer: the optimizer; the learning rate of its first group is the one that callbacks see.
        callbacks: callbacks of `lowbit.train`: `lowbit.metrics.OscillationTracker`, `ConfidenceGuidedAnnealing`, ...
        epochs: length of the training; some callbacks follow schedules.
        steps_per_epoch: steps of the optimizer in an epoch.

    Attributes:
        state: the `State` that the callbacks get.
        done: number of finished steps.

    Raises:
        LowbitError: ``epochs`` or ``steps_per_epoch`` is not positive, or the model is sharded (FSDP), so that no
            process has whole latents.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        callbacks: Sequence[object] = (),
        *,
        epochs: int,
        steps_per_epoch: int,
    ):
        if steps_per_epoch < 1:
            raise LowbitError(f"steps_per_epoch={steps_per_epoch!r} is not allowed; use a number from 1")
        if sharded := next((name for name, each in model.named_parameters() if _is_sharded(each)), None):
            raise LowbitError(
                f"{sharded!r} is divided among processes (FSDP); callbacks look at whole weights, so keep the model on "
                "each process (DistributedDataParallel) or train without them"
            )
        self.state = State(model, optimizer, TrainConfig(epochs=epochs), steps_per_epoch)
        self.callbacks, self.done = tuple(callbacks), 0
        self._methods = QuantizerHooks(model)

    def before_forward(self) -> None:
        """Call it before the forward pass of a step."""
        state = self.state
        state.step, state.epoch = self.done, self.done // state.steps_per_epoch
        state.lr = float(state.optimizer.param_groups[0]["lr"])
        list(call(self.callbacks, "before_forward", state))
        self._methods.before_step(min(1.0, self.done / (state.config.epochs * state.steps_per_epoch)))

    def before_step(self) -> None:
        """Call it after the backward pass, before gradients are clipped and the optimizer steps."""
        penalty = self._methods.add_penalty(torch.zeros(()))
        if penalty.requires_grad:
            penalty.backward()
        list(call(self.callbacks, "on_gradients", self.state))

    def after_step(self, loss: torch.Tensor | None = None) -> None:
        """Call it after the optimizer's step; ``loss`` is what callbacks find in ``state.loss``."""
        self.state.loss = None if loss is None else loss.detach()
        list(call(self.callbacks, "on_step", self.state))
        self.done += 1

    def after_epoch(self, **row: Any) -> dict[str, Any]:
        """Call it after an epoch; returns ``row``, your own metrics, with those of the callbacks."""
        self.state.row = dict(row)
        for metrics in call(self.callbacks, "on_epoch", self.state):
            self.state.row |= metrics or {}
        return self.state.row

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to resume: the step, and the state of each callback that has one."""
        states = [callback.state_dict() if hasattr(callback, "state_dict") else None for callback in self.callbacks]
        return {"done": self.done, "callbacks": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`.

        Raises:
            LowbitError: it has another number of callbacks.
        """
        states = state["callbacks"]
        if len(states) != len(self.callbacks):
            raise LowbitError(f"the state is of {len(states)} callbacks; there are {len(self.callbacks)} here")
        self.done = state["done"]
        for callback, saved in zip(self.callbacks, states, strict=True):
            if hasattr(callback, "load_state_dict"):
                callback.load_state_dict(saved)


def _is_sharded(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "placements") and any(place.is_shard() for place in parameter.placements)


def lightning_callback(model: nn.Module, callbacks: Sequence[object] = ()) -> "lightning.Callback":
    """A callback of Lightning's Trainer that makes the calls of `Hooks`.

    The metrics of ``callbacks`` are logged at the end of each epoch.

    Args:
        model: the quantized model, an attribute of the LightningModule or that module itself.
        callbacks: callbacks of `lowbit.train`.
    """
    with extra("trainers", "a callback of Lightning"):
        import lightning

    class LowbitCallback(lightning.Callback):
        hooks: Hooks | None = None
        _saved: dict[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.max_epochs is None or trainer.max_epochs < 1:
                raise LowbitError("lowbit's callbacks need the length of the training: Trainer(max_epochs=...)")
            steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            self.hooks = Hooks(
                model, trainer.optimizers[0], callbacks, epochs=trainer.max_epochs, steps_per_epoch=steps
            )
            if self._saved is not None:
                self.hooks.load_state_dict(self._saved)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % trainer.accumulate_grad_batches == 0:
                _of(self).before_forward()

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            _of(self).before_step()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step > _of(self).done:
                _of(self).after_step()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            metrics = _of(self).after_epoch()
            pl_module.log_dict({name: float(value) for name, value in metrics.items() if value is not None})

        def state_dict(self) -> dict[str, Any]:
            return {} if self.hooks is None else self.hooks.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._saved = state_dict or None

    return LowbitCallback()


def transformers_callback(callbacks: Sequence[object] = ()) -> "transformers.TrainerCallback":
    """A callback of transformers' Trainer that makes the calls of `Hooks`, for the model that the Trainer trains.

    The metrics of ``callbacks`` are appended to ``trainer.state.log_history`` after each epoch. The Trainer clips
    gradients before callbacks see them. Their states are saved as ``lowbit.pt`` in the Trainer's checkpoints; a run
    that resumes reads that of the same step in ``output_dir``.

    Args:
        callbacks: callbacks of `lowbit.train`.

    Raises:
        LowbitError: when the training begins: it resumes, callbacks have states, and there is no such file, or it is
            damaged.
    """
    with extra("huggingface", "a callback of transformers"):
        import transformers

    class LowbitCallback(transformers.TrainerCallback):
        hooks: Hooks | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            epochs = max(1, math.ceil(state.num_train_epochs))
            steps = max(1, math.ceil(state.max_steps / epochs))
            self.hooks = Hooks(given["model"], given["optimizer"], callbacks, epochs=epochs, steps_per_epoch=steps)
            if state.global_step:
                _resume(self.hooks, _states(args, state), state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.is_world_process_zero:
                held = checkpoint.require_plain(_of(self).state_dict(), "the callbacks' state")
                write_atomically(_states(args, state), lambda file: torch.save(held, file))

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            _of(self).before_forward()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            _of(self).before_step()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            _of(self).after_step()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            state.log_history.append({"epoch": state.epoch, "step": state.global_step, **_of(self).after_epoch()})

    return LowbitCallback()


def _states(args: Any, state: Any) -> Path:
    """The file with the callbacks' states beside a checkpoint of transformers' Trainer."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "lowbit.pt"


def _resume(hooks: Hooks, file: Path, step: int) -> None:
    hooks.done = step
    if file.exists():
        hooks.load_state_dict(checkpoint.read(file, "resume from another checkpoint, or start afresh"))
    elif any(hasattr(callback, "load_state_dict") for callback in hooks.callbacks):
        raise LowbitError(
            f"{file} is missing: the training resumes at step {step}, and the callbacks' states of then are not there; "
            "resume from a checkpoint in output_dir that was saved with this callback, or start afresh"
        )


def _of(callback: Any) -> Hooks:
    hooks = callback.hooks
    assert isinstance(hooks, Hooks)
    return hooks
