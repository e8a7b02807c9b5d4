"""Iterative weight freezing: a weight that oscillates too often is frozen at its average code.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv 2203.11086, section 4.3.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.metrics.oscillation import OscillationState, check_momentum, oscillation_step_
from lowbit.nn import QuantizedLayer
from lowbit.quantizers import WeightQuantizer
from lowbit.training.dampening import check_start, cosine, one_latent_layers

if TYPE_CHECKING:
    from lowbit.training.hooks import State


def freezing_step_(
    codes: Tensor, state: OscillationState, average: Tensor, frozen: Tensor, threshold: float, momentum: float
) -> None:
    """One step of Algorithm 1 on one tensor of codes: changes ``state``, ``average`` and ``frozen`` in place.

    The oscillation frequency takes one step (`lowbit.functional.oscillation_step`), the average code becomes
    ``m·k + (1-m)·average``, and a weight whose frequency is then above the threshold is frozen at the integer
    nearest to its average. A frozen weight stays frozen.

    Args:
        codes: the codes k after the optimizer's step, int16, any shape.
        state: the state of the oscillation frequency.
        average: float32, the moving average of the codes, which starts at the first codes.
        frozen: int16, the code that a weight is held at; -1 where it is free.
        threshold: f_th, the oscillation frequency above which a weight is frozen.
        momentum: m of the frequency and of the average, 0 < m <= 1.
    """
    oscillation_step_(codes, state, momentum)
    average.mul_(1 - momentum).add_(codes, alpha=momentum)
    due = (frozen < 0) & (state.frequency > threshold)
    torch.where(due, average.round().to(frozen.dtype), frozen, out=frozen)


class IterativeFreezing:
    """Callback of `lowbit.train` that freezes oscillating weights after each optimizer step.

    After every step the latent of a frozen weight is overwritten with the current scale times its level, so that
    momentum, weight decay and a changing scale cannot change its code. The threshold is ``threshold`` until ``start``
    and then goes to ``end`` by a cosine. Pass this callback before trackers, so that they see the restored weights.
    Processes that train together freeze the same weights.

    It needs 13 bytes per weight. `on_epoch` adds ``iteratively_frozen``, the share of frozen weights, to the history.

    Args:
        model: a quantized model whose weights have one latent each and a scale that does not follow it: LSQ, EWGS.
        threshold: oscillation frequency above which a weight is frozen, until ``start``.
        end: the threshold at the end of the training.
        start: share of the optimization steps during which the threshold stays at ``threshold``.
        momentum: m of the frequency and of the average code.

    Raises:
        LowbitError: the model has other weights, or a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = 0.1,
        end: float = 0.01,
        start: float = 0.25,
        momentum: float = 0.01,
    ):
        for name, value in (("threshold", threshold), ("end", end)):
            if not 0 <= value <= 1:
                raise LowbitError(f"{name}={value!r} is not allowed; use an oscillation frequency from 0 to 1")
        check_start(start)
        check_momentum(momentum)
        self.threshold, self.end, self.start, self.momentum = threshold, end, start, momentum
        self._layers = one_latent_layers(model, "iterative freezing")
        for layer, quantizer in self._layers:
            _check_fixed_scale(layer, quantizer)
        self._held = [_begin(layer.codes()) for layer, _ in self._layers]

    def threshold_of(self, progress: float) -> float:
        """The threshold when the share ``progress`` of the steps is done."""
        return cosine(progress, self.start, self.threshold, self.end)

    @torch.no_grad()
    def update(self, threshold: float) -> None:
        """Restore frozen weights, then freeze those above ``threshold``; call it after each optimizer step."""
        for i, (layer, quantizer) in enumerate(self._layers):
            (latent,) = layer.latents
            if self._held[i]["frozen"].device != latent.device:
                self._held[i] = {name: held.to(latent.device) for name, held in self._held[i].items()}
            held = self._held[i]
            _put_back(quantizer, latent, held["frozen"])
            state = OscillationState(held["codes"], held["direction"], held["frequency"])
            freezing_step_(layer.codes(), state, held["average"], held["frozen"], threshold, self.momentum)
            _put_back(quantizer, latent, held["frozen"])

    def frozen(self, layer: str) -> Tensor:
        """The code at which each weight of ``layer`` is held, -1 for a free one: int16, of its shape, on the CPU."""
        names = [quantized.name for quantized, _ in self._layers]
        for name, held in zip(names, self._held, strict=True):
            if name == layer:
                return held["frozen"].cpu().clone()
        raise LowbitError(f"no layer is called {layer!r}; there are {', '.join(names)}")

    def share(self) -> float:
        """The share of all weights that is frozen."""
        frozen = sum(int((held["frozen"] >= 0).sum()) for held in self._held)
        return frozen / sum(held["frozen"].numel() for held in self._held)

    def on_step(self, state: "State") -> None:
        """Callback of `lowbit.train`: update with the threshold of this step."""
        self.update(self.threshold_of(state.step / (state.config.epochs * state.steps_per_epoch)))

    def on_epoch(self, state: "State") -> dict[str, float]:
        """Callback of `lowbit.train`: the share of frozen weights, for the history."""
        return {"iteratively_frozen": self.share()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to resume: tensors, numbers and strings."""
        return {**self._identity(), "held": [dict(held) for held in self._held]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        Raises:
            LowbitError: the state belongs to other layers or settings.
        """
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise LowbitError(
                    f"the saved {key} of iterative freezing are {state[key]}, but the current {key} are {mine}; use "
                    "the saved ones, or start afresh"
                )
        for held, saved in zip(self._held, state["held"], strict=True):
            for name, tensor in held.items():
                tensor.copy_(saved[name])

    def _identity(self) -> dict[str, Any]:
        names = ("threshold", "end", "start", "momentum")
        return {
            "settings": {name: getattr(self, name) for name in names},
            "layers": [[layer.name, list(layer.latents[0].shape)] for layer, _ in self._layers],
        }


def _begin(codes: Tensor) -> dict[str, Tensor]:
    return {
        "codes": codes.clone(),
        "direction": torch.zeros_like(codes, dtype=torch.int8),
        "frequency": torch.zeros_like(codes, dtype=torch.float32),
        "average": codes.float(),
        "frozen": torch.full_like(codes, -1),
    }


def _put_back(quantizer: WeightQuantizer, latent: Tensor, frozen: Tensor) -> None:
    """Overwrite the latents of frozen weights with the current scale times their level."""
    levels = quantizer.levels.to(latent.device)
    values = (quantizer.scale(latent) * levels[frozen.clamp_min(0).long()]).to(latent.dtype)
    torch.where(frozen >= 0, values, latent, out=latent)


@torch.no_grad()
def _check_fixed_scale(layer: QuantizedLayer, quantizer: WeightQuantizer) -> None:
    """Refuse a scale that depends on the latents, or levels that do not round to themselves: no code could be held."""
    (latent,) = layer.latents
    scale = quantizer.scale(latent)
    holds = torch.equal(quantizer.scale(2 * latent), scale) and all(
        (quantizer.codes((scale * level).expand_as(latent)) == code).all()
        for code, level in enumerate(quantizer.levels.tolist())
    )
    if not holds:
        raise LowbitError(
            "iterative freezing takes weights whose scale does not follow the latents, such as those of LSQ and EWGS; "
            f"it cannot hold those of layer {layer.name!r} ({quantizer.config!r}) at a code"
        )
