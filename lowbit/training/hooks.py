"""What a training loop calls: callbacks with the `State` of the run, and the hooks of quantization methods."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.nn import QuantizedLayer, quantized_layers
from lowbit.quantizers import WeightQuantizer
from lowbit.training.config import TrainConfig


@dataclass
class State:
    """The state of a run, as callbacks see it.

    A callback is any object with some of the methods ``before_forward(state)``, ``on_gradients(state)`` (after
    backward, before the step), ``on_step(state)`` (after it), ``on_epoch(state)`` (after evaluation; may return
    metrics for the history), ``state_dict()`` and ``load_state_dict(d)`` (saved in, and restored from, the checkpoint).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    steps_per_epoch: int
    epoch: int = 0  # from 0
    step: int = 0  # optimization steps begun before this one, over all epochs
    lr: float = 0.0
    loss: torch.Tensor | None = None  # detached scalar of the last step, over this process's share
    row: dict[str, Any] = field(default_factory=dict)  # the epoch's metrics, for on_epoch


def call(callbacks: Sequence[object], method: str, state: State) -> Iterator[Any]:
    """Call ``method`` of every callback that has it, and yield what each returns."""
    for callback in callbacks:
        if hasattr(callback, method):
            yield getattr(callback, method)(state)


class QuantizerHooks:
    """The weight quantizers of ``model`` that override `WeightQuantizer.penalty` or `WeightQuantizer.before_step_`."""

    def __init__(self, model: nn.Module):
        pairs = quantized_weights(model)
        self._penalized = [(layer, quantizer) for layer, quantizer in pairs if _overrides(quantizer, "penalty")]
        self._scheduled = [(layer, quantizer) for layer, quantizer in pairs if _overrides(quantizer, "before_step_")]

    def before_step(self, progress: float) -> None:
        """Tell each quantizer which share of the training is done (0 at the first step, below 1 at the last)."""
        for layer, quantizer in self._scheduled:
            quantizer.before_step_(progress, *layer.latents)

    def add_penalty(self, loss: Tensor) -> Tensor:
        """``loss`` plus the penalties of all layers."""
        for layer, quantizer in self._penalized:
            loss = loss + quantizer.penalty(*layer.latents)
        return loss


def quantized_weights(model: nn.Module) -> list[tuple[QuantizedLayer, WeightQuantizer]]:
    """Each layer of ``model`` with a quantized weight, and the quantizer of that weight."""
    return [(layer, layer.weight) for layer in quantized_layers(model) if layer.weight is not None]


def _overrides(quantizer: WeightQuantizer, name: str) -> bool:
    return getattr(type(quantizer), name) is not getattr(WeightQuantizer, name)
