"""Weight oscillation: how often a discrete weight reverses its last move.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv 2203.11086, section 2.3.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.metrics.tracking import FlatCodes, Trajectories, tracked_layers
from lowbit.quantizers import Method

if TYPE_CHECKING:
    import pandas

THRESHOLD = 0.005
"""A weight oscillates when its frequency is above this, as in the paper's analysis."""


class OscillationState(NamedTuple):
    """The state that `oscillation_step` keeps for every weight.

    Attributes:
        codes: the latest codes, integer, any shape.
        direction: int8, the sign of the last switch, ``sign(k_(t-1) - k_t)``; 0 before the first one.
        frequency: float32, the moving average f of oscillations per step.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor


def oscillation_step(codes: Tensor, state: OscillationState | None = None, momentum: float = 0.01) -> OscillationState:
    """One step of the oscillation frequency: ``f_t = m·o_t + (1-m)·f_(t-1)``, f_0 = 0 (equation 5).

    A switch is a change of the code; its direction is ``sign(k_(t-1) - k_t)``. ``o_t`` is 1 where there is a switch
    in the direction opposite to that of the weight's previous switch, no matter how long ago; else 0.

    Args:
        codes: integers, any shape; a larger code stands for a larger value.
        state: the state that the previous call returned; None at the start.
        momentum: m, 0 < m <= 1.

    Returns:
        The new state; ``state`` itself is not changed.

    Raises:
        LowbitError: codes that are not integers or of another shape than in ``state``; momentum out of range.
    """
    check_momentum(momentum)
    codes = torch.as_tensor(codes).detach()
    if codes.is_floating_point() and not torch.equal(codes, codes.round()):
        raise LowbitError("codes are not integers; give the integer codes, not the quantized or latent weights")
    if state is None:
        direction = torch.zeros(codes.shape, dtype=torch.int8, device=codes.device)
        return OscillationState(codes.clone(), direction, torch.zeros_like(direction, dtype=torch.float32))
    if codes.shape != state.codes.shape:
        raise LowbitError(
            f"codes of shape {list(codes.shape)} do not match the state's, of shape {list(state.codes.shape)}; "
            "give the codes of the same weights"
        )
    new = OscillationState(*(t.clone() for t in state))
    oscillation_step_(codes, new, momentum)
    return new


def oscillation_step_(codes: Tensor, state: OscillationState, momentum: float) -> None:
    """`oscillation_step` without its checks, changing ``state`` in place."""
    switch = (state.codes > codes).to(torch.int8) - (state.codes < codes).to(torch.int8)
    oscillates = switch * state.direction == -1
    state.frequency.mul_(1 - momentum).add_(oscillates, alpha=momentum)
    torch.where(switch == 0, state.direction, switch, out=state.direction)
    state.codes.copy_(codes)


def check_momentum(momentum: float) -> None:
    """Raise LowbitError if ``momentum`` is not in (0, 1]."""
    if not 0 < momentum <= 1:
        raise LowbitError(f"momentum={momentum!r} is not allowed; numbers above 0 and up to 1 are (0.01 in the paper)")


class OscillationTracker:
    """A tracker of the oscillation of every weight of a model in training.

    Call `update` after each optimizer step, or pass the tracker to `lowbit.train` as a callback; it then adds
    ``frequency`` and ``oscillating`` to the history and is saved and restored with the run. In a run with several
    processes, each tracks the same weights and gets the same numbers, without communication.

    It holds 9 bytes per weight: current and new codes (int16 each), direction (int8), frequency (float32).

    Args:
        model: a quantized model; or one in full precision, with ``grid``.
        every: read the weights at every k-th `update`. Changes between two readings go unseen, and frequencies are per
            reading; 1 is the published definition.
        momentum: momentum of the moving average, 0 < momentum <= 1.
        threshold: a weight oscillates when its frequency is above this.
        grid: a weight method with a scale, e.g. ``PoT(bits=3)``, to track full-precision layers too (those that
            `quantize_` would take), as if rounded to its levels at the scale that it gives to their current weights.
            That scale stays fixed, so the numbers describe the motion of the weights alone.
        layers: names of the layers to track, or patterns (``"blocks.*"``); None tracks all.

    Raises:
        LowbitError: nothing to track, or a setting out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        momentum: float = 0.01,
        threshold: float = THRESHOLD,
        grid: Method | None = None,
        layers: Sequence[str] | None = None,
    ):
        check_momentum(momentum)
        if not (isinstance(every, int) and every >= 1):
            raise LowbitError(f"every={every!r} is not allowed; integers from 1 are")
        if not 0 <= threshold < 1:
            raise LowbitError(f"threshold={threshold!r} is not allowed; frequencies from 0 to below 1 are")
        self.every, self.momentum, self.threshold = every, momentum, threshold
        self.codes = FlatCodes(tracked_layers(model, grid, layers))
        self.reset()

    def reset(self) -> None:
        """Start again from the current weights, with no updates and no watched weights."""
        self.steps = 0
        self.trajectory = Trajectories()
        device, size = self.codes.device, self.codes.size
        self._next = torch.empty(size, dtype=torch.int16, device=device)
        self._state = OscillationState(
            self.codes.read(torch.empty_like(self._next)),
            torch.zeros(size, dtype=torch.int8, device=device),
            torch.zeros(size, dtype=torch.float32, device=device),
        )

    @torch.no_grad()
    def update(self) -> None:
        """Read the weights; call this after each optimizer step."""
        self.steps += 1
        if self.steps % self.every:
            return
        if self._next.device != self.codes.device:
            self._move(self.codes.device)
        self._look(self.codes.read(self._next))
        self.trajectory.record(self.steps, self.codes.layers)

    def summary(self, total: bool = False) -> "pandas.DataFrame":
        """One row per layer: layer, weights, frequency (mean of its weights), oscillating (share above the threshold).

        Args:
            total: whether to add a row "(all)" for all weights of all layers.
        """
        return self._frame(self._sums(), total)

    def frequency(self, layer: str) -> Tensor:
        """The frequency of each weight of ``layer``: float32, of the weight's shape, on the CPU."""
        return self._of(layer, self._state.frequency)

    def watch(self, layer: str, indices: Sequence[int]) -> None:
        """Record the trajectories of single weights from now on, at every reading.

        Args:
            layer: name of the layer in the model.
            indices: indices into the flattened weight.

        Raises:
            LowbitError: no tracked layer has this name, or an index is out of range.
        """
        chosen = self.codes.layers[self.codes.index(layer)]
        self.trajectory.add(chosen, list(indices))
        self.trajectory.record(self.steps, [chosen])

    def trajectories(self) -> "pandas.DataFrame":
        """The weights chosen by `watch`: layer, weight (flat index), step, latent_0, latent_1, ..., value.

        ``step`` counts updates; ``value`` is scale times level. The columns of latents that a layer lacks are NaN.
        """
        return self.trajectory.frame()

    def on_step(self, state: Any) -> None:
        """Callback of `lowbit.train`: call `update`."""
        self.update()

    def on_epoch(self, state: Any) -> dict[str, float | None]:
        """Callback of `lowbit.train`: frequency and oscillating, over all weights, for the history."""
        return self._overall(self._sums())

    def state_dict(self) -> dict[str, Any]:
        """The complete state of the tracker: tensors, numbers and strings."""
        return {
            "settings": self._settings(),
            "layers": [[layer.name, layer.weights] for layer in self.codes.layers],
            "levels": [layer.levels for layer in self.codes.layers],
            "scales": [layer.fixed_scale for layer in self.codes.layers],
            "steps": self.steps,
            "codes": self._state.codes,
            "direction": self._state.direction,
            "frequency": self._state.frequency,
            "trajectories": self.trajectory.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            LowbitError: the state belongs to other layers or settings.
        """
        own = {"settings": self._settings(), "layers": [[la.name, la.weights] for la in self.codes.layers]}
        for key, mine in own.items():
            if state[key] != mine:
                raise LowbitError(
                    f"the saved state has the {key} {state[key]}, this tracker has {mine}; restore it into a tracker "
                    f"with the same {key}"
                )
        for layer, levels, scale in zip(self.codes.layers, state["levels"], state["scales"], strict=True):
            layer.levels = levels
            layer.fixed_scale = None if scale is None else scale.to(self.codes.device)
        self.codes.group()
        self.steps = state["steps"]
        for name, held in self._state._asdict().items():
            held.copy_(state[name])
        self.trajectory.load_state_dict(state["trajectories"])

    def _settings(self) -> dict[str, Any]:
        return {"every": self.every, "momentum": self.momentum, "threshold": self.threshold}

    def _look(self, codes: Tensor) -> None:
        oscillation_step_(codes, self._state, self.momentum)

    def _move(self, device: torch.device) -> None:
        """Follow a model that moved to another device after the tracker was created."""
        self._next = self._next.to(device)
        self._state = OscillationState(*(t.to(device) for t in self._state))

    def _of(self, layer: str, values: Tensor) -> Tensor:
        i = self.codes.index(layer)
        return values[self.codes.spans[i]].view(self.codes.layers[i].shape).cpu().clone()

    def _sums(self) -> dict[str, Tensor]:
        """Sums over the weights of each layer, float64 ``[layers]``; a summary turns them into means."""
        frequency = self._state.frequency
        return {
            "frequency": self.codes.sums(frequency),
            "oscillating": self.codes.sums(frequency > self.threshold).double(),
        }

    def _frame(self, sums: dict[str, Tensor], total: bool) -> "pandas.DataFrame":
        with extra("train", "the table of oscillations"):
            import pandas

        names = [layer.name for layer in self.codes.layers]
        weights = torch.tensor([layer.weights for layer in self.codes.layers])
        if total:
            names, weights = [*names, "(all)"], torch.cat([weights, weights.sum().view(1)])
            sums = {key: torch.cat([value, value.sum().view(1)]) for key, value in sums.items()}
        means = {key: (value / weights).numpy() for key, value in sums.items()}
        return pandas.DataFrame({"layer": names, "weights": weights.numpy(), **means})

    def _overall(self, sums: dict[str, Tensor]) -> dict[str, float | None]:
        """Means over all weights; None before the first reading, since JSON has no NaN."""
        means = {key: float(value.sum() / self.codes.size) for key, value in sums.items()}
        return {key: None if mean != mean else mean for key, mean in means.items()}
