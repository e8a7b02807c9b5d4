"""Weight freezing: which weights of a model still change their discrete value, and how often.

DenseShift (arXiv 2208.09708, first version) announces such a metric without a formula; these definitions are ours. A
weight's discrete value is its level; the level has a sign (0 for the level zero) and a size (its magnitude, for
power-of-two sets the exponent).

- flip rate r(t, Δ): the fraction of weights whose discrete value, sign or size at t differs from that at t-Δ;
- frozen fraction F(t0, t1): the fraction whose value, sign or size never changed in [t0, t1].

The moving average of oscillations is that of `lowbit.metrics.oscillation`, so both papers are measured alike.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.metrics.oscillation import OscillationTracker

if TYPE_CHECKING:
    import pandas

Since = Literal["mark", "start"]

KINDS = ("", "sign_", "size_")  # prefixes of the columns: the whole value, its sign, its size
BITS = (1, 2, 4)  # their bits in the masks of changed weights
FULL = 255  # readings that a uint8 can count


class FreezingTracker(OscillationTracker):
    """A tracker of flips, frozen weights and oscillation of every weight of a model in training.

    Call `update` after each optimizer step and `mark` where a new window [t0, ...] begins. As a callback of
    `lowbit.train` it does both, with one window per epoch, and adds to the history: ``flip_rate``, ``sign_flip_rate``,
    ``size_flip_rate`` of the epoch; ``frozen``, ``sign_frozen``, ``size_frozen`` since the start of the run, and the
    same names with ``_epoch`` within the epoch; ``frequency`` and ``oscillating``.

    It holds 14 bytes per weight, 9 of which are `OscillationTracker`'s.

    Args:
        model: a quantized model; or one in full precision, with ``grid``.
        every: Δ in steps; a change that is undone between two readings goes unseen.
        momentum, threshold, grid, layers: as in `OscillationTracker`. Give a full-precision twin the ``grid`` of the
            method that it is compared with.
    """

    def reset(self) -> None:
        """Start again from the current weights."""
        super().reset()
        size, device, layers = self.codes.size, self.codes.device, len(self.codes.layers)
        self._counts = torch.zeros(3, size, dtype=torch.uint8, device=device)  # flips since the last _collect
        self._counted = 0
        # Since the mark, and from the start to the mark: the changed weights, the flips of each layer, the readings.
        self._changed = torch.zeros(2, size, dtype=torch.uint8, device=device)
        self._flips = torch.zeros(2, 3, layers, dtype=torch.int64)
        self._looks = [0, 0]
        self._mark_due = False

    def mark(self) -> None:
        """Begin a new window at the latest reading."""
        self._collect()
        self._changed[1] |= self._changed[0]
        self._flips[1] += self._flips[0]
        self._looks[1] += self._looks[0]
        self._changed[0], self._flips[0], self._looks[0] = 0, 0, 0
        self._mark_due = False

    def summary(self, total: bool = False, since: Since = "mark") -> "pandas.DataFrame":
        """One row per layer, over the window since the last mark or since the start.

        Columns: layer, weights; flip_rate, sign_flip_rate, size_flip_rate (means over the readings in the window, NaN
        if there are none); frozen, sign_frozen, size_frozen; frequency, oscillating (as in `OscillationTracker`).

        Args:
            total: whether to add a row "(all)" for all weights of all layers.
            since: beginning of the window: "mark", the last `mark` (in `lowbit.train` the beginning of the epoch), or
                "start", the last `reset`.

        Raises:
            LowbitError: another ``since``.
        """
        return self._frame(self._rates(since) | self._frozen(since) | self._sums(), total)

    def changed(self, layer: str, since: Since = "mark") -> Tensor:
        """Mask of the weights of ``layer`` that changed their value: bool, of the weight's shape, on the CPU.

        Args:
            layer: name of the layer in the model.
            since: beginning of the window: "mark", the last `mark`, or "start", the last `reset`.

        Raises:
            LowbitError: another ``since``, or no tracked layer has this name.
        """
        return self._of(layer, self._masks(since) & 1 > 0)

    def update(self) -> None:
        """Read the weights; call this after each optimizer step."""
        if self._mark_due:
            self.mark()
        super().update()

    def on_epoch(self, state: Any) -> dict[str, float | None]:
        """Callback of `lowbit.train`: means over all weights for the history, see the class."""
        within = {f"{key}_epoch": value for key, value in self._frozen("mark").items()}
        metrics = self._overall(self._rates("mark") | self._frozen("start") | within | self._sums())
        self._mark_due = True  # at the next update, so that a summary after training still shows the last epoch
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The complete state of the tracker: tensors, numbers and strings."""
        self._collect()
        return super().state_dict() | {
            "changed": self._changed,
            "flips": self._flips,
            "looks": list(self._looks),
            "mark_due": self._mark_due,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state)
        self._counts.zero_()
        self._counted = 0
        self._changed.copy_(state["changed"])
        self._flips.copy_(state["flips"])
        self._looks = list(state["looks"])
        self._mark_due = state["mark_due"]

    def _look(self, codes: Tensor) -> None:
        before = self._state.codes
        self._counts[0] += codes != before
        self._counts[1] += codes.sign() != before.sign()
        self._counts[2] += codes.abs() != before.abs()
        self._counted += 1
        if self._counted == FULL:
            self._collect()
        super()._look(codes)

    def _collect(self) -> None:
        """Add the counts of single weights to the sums of the layers; done rarely, since such sums are slow."""
        if self._counted:
            for counts, bit in zip(self._counts, BITS, strict=True):
                self._changed[0] |= (counts > 0).to(torch.uint8) * bit
            self._flips[0] += self.codes.sums(self._counts)
            self._looks[0] += self._counted
            self._counts.zero_()
            self._counted = 0

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self._counts, self._changed = self._counts.to(device), self._changed.to(device)

    def _masks(self, since: Since) -> Tensor:
        _check_since(since)
        self._collect()
        return self._changed[0] if since == "mark" else self._changed[0] | self._changed[1]

    def _frozen(self, since: Since) -> dict[str, Tensor]:
        masks = self._masks(since)
        return {
            f"{kind}frozen": self.codes.sums(masks & bit == 0).double() for kind, bit in zip(KINDS, BITS, strict=True)
        }

    def _rates(self, since: Since) -> dict[str, Tensor]:
        _check_since(since)
        self._collect()
        flips, looks = (self._flips[0], self._looks[0]) if since == "mark" else (self._flips.sum(0), sum(self._looks))
        return {f"{kind}flip_rate": flips[i].double() / looks for i, kind in enumerate(KINDS)}


def _check_since(since: Since) -> None:
    if since not in ("mark", "start"):
        raise LowbitError(f"since={since!r} is not allowed; 'mark' and 'start' are")


class FrozenFrom:
    """A callback of `lowbit.train` that finds the weights that never change from a given step to the end.

    It reads the codes of a tracker, which must come before it in the list of callbacks.

    Args:
        tracker: the tracker of the weights to follow; its ``every`` applies here too.
        step: number of steps before the first reading, e.g. a quarter of all steps.
    """

    def __init__(self, tracker: OscillationTracker, step: int):
        if not (isinstance(step, int) and step >= 1):
            raise LowbitError(f"step={step!r} is not allowed; integers from 1 are")
        self.tracker, self.step = tracker, step
        self._start: Tensor | None = None
        self._changed: Tensor | None = None

    @torch.no_grad()
    def on_step(self, state: Any) -> None:
        """Callback of `lowbit.train`: compare the codes with those at ``step``."""
        codes = self.tracker._state.codes
        if state.step + 1 == self.step:
            self._start, self._changed = (
                codes.clone(),
                torch.zeros(2, len(codes), dtype=torch.bool, device=codes.device),
            )
        elif self._start is not None and self._changed is not None:
            self._changed[0] |= codes != self._start
            self._changed[1] |= codes.sign() != self._start.sign()

    def frozen(self) -> dict[str, float]:
        """Shares of all weights, 0 to 1: ``frozen`` (the discrete value never changed) and ``sign_frozen``.

        Raises:
            LowbitError: the training has not reached ``step``.
        """
        if self._changed is None:
            raise LowbitError(f"the training did not reach step {self.step}; choose a step below its length")
        shares = 1 - self._changed.double().mean(1)
        return {"frozen": float(shares[0]), "sign_frozen": float(shares[1])}

    def state_dict(self) -> dict[str, Any]:
        """The complete state: the step, the codes at that step, and the masks of changed weights."""
        return {"step": self.step, "start": self._start, "changed": self._changed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        if state["step"] != self.step:
            raise LowbitError(
                f"the saved step {state['step']} differs from this callback's, {self.step}; give it the same step"
            )
        self._start, self._changed = state["start"], state["changed"]
