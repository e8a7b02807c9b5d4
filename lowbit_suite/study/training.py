"""Run one training of the study: from its entry in the plan to the rows of the tables."""

import copy
import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowbit
from lowbit.data import Data
from lowbit.errors import DivergedError
from lowbit.metrics import (
    FreezingTracker,
    FrozenFrom,
    boundary_density,
    query_key_misestimation,
    spacings,
)
from lowbit.models import detector, replace_head_
from lowbit.nn import quantized_layers
from lowbit.nn.attention import low_bit_attentions
from lowbit.quantizers import get
from lowbit.training import ConfidenceGuidedAnnealing, TrainConfig, checkpoint, distillation, optim
from lowbit.training.batches import normalize
from lowbit.training.moments import HandedOn
from lowbit_suite.study.plan import Phase, Training

SEEN = 2048
"""Number of test images on which the gradients of queries and keys are compared."""

MEMORY = 100
"""Steps that the oscillation tracker's moving average, with momentum 0.01, covers."""

SHOWN = ("train_loss", "train_acc", "oscillating", "frequency", "frozen_epoch", "flip_rate")
"""The values that are kept of every epoch."""

Rows = list[dict[str, Any]]


def run(training: Training, folder: Path, data: Data | None = None, amp: str = "none") -> dict[str, Any]:
    """Run a training, or resume it after the last epoch in ``folder``, and return the entry for the journal.

    Args:
        training: the training to run.
        folder: for checkpoints; may be removed once the result is in the journal.
        data: the data set, if it is loaded already.
        amp: "bf16" if the processor has it; a property of the machine, so it is not in the plan.

    Returns:
        ``rows``, one for the arm and one for each of its phases, with the columns of the table; and ``epochs_by_arm``,
        the course of each training epoch by epoch. If the loss of a learning-rate trial becomes infinite or NaN, its
        results are NaN: a rate that is too large is an answer, not a failure.
    """
    begun = time.monotonic()
    try:
        return _run(training, folder, data, amp)
    except DivergedError:
        if not training.trial:
            raise
        data = training.config().load_data() if data is None else data
        row = _place(training, training.arm, data) | _result(training, data, defaultdict(lambda: math.nan))
        return {"rows": [row | {"seconds": time.monotonic() - begun}], "epochs_by_arm": {}}


def _run(training: Training, folder: Path, data: Data | None, amp: str) -> dict[str, Any]:
    config = training.config()
    data = config.load_data() if data is None else data
    model, first = _model(training, data, folder, amp)
    teacher = config.build_teacher(data)
    settings = _quiet(config.train, amp)
    rows, courses = _trained(training, training.arm, model, teacher, data, settings, folder / "main")
    rows[0] |= first
    if training.phases:
        moments = checkpoint.load(folder / "main" / "checkpoint.pt")["optimizer"]["state"]
    rate = _rate(model, training.phases)
    for phase in training.phases:
        one = copy.deepcopy(model)
        after = dataclasses.replace(
            settings,
            epochs=phase.epochs,
            eval_every=phase.epochs,
            lr=rate,
            schedule="constant",
            warmup_epochs=0.0,
            min_lr=0.0,
            seed=settings.seed + 1000,
        )
        callbacks = [HandedOn(moments), *_annealing(one, phase)]
        more, course = _trained(training, phase.arm, one, teacher, data, after, folder / _name(phase), callbacks)
        rows, courses = rows + more, courses | course
    return {"rows": rows, "epochs_by_arm": courses}


def _quiet(train: TrainConfig, amp: str) -> TrainConfig:
    return dataclasses.replace(train, eval_every=train.epochs, progress=False, amp=amp)


def _model(training: Training, data: Data, folder: Path, amp: str) -> tuple[nn.Module, dict[str, float]]:
    """The model that the training starts from, and the source task's columns; the seed draws a new head."""
    config, source = training.config(), training.source_config()
    if source is None:
        return config.build_model(data), {}
    held, teacher = (source.load_data(), None) if training.moves else (data, source.build_teacher(data))
    model = source.build_model(held)
    settings = dataclasses.replace(_quiet(source.train, amp), out=str(folder / "source"))
    low = _low_bit_layers(model, training.bits) if training.track_source else []
    trackers = [FreezingTracker(model, layers=low)] if low else []
    record = lowbit.train(model, held, settings, teacher, callbacks=trackers, device=_device())
    found = {"source, %": 100 * record.final["test_acc"], "source seconds": record.seconds}
    if trackers:
        found["source frozen, %"] = 100 * record.history[-1]["frozen_epoch"]
    torch.manual_seed(config.train.seed)
    if training.detector is not None:
        model = detector(model, data.num_classes, **training.detector)
    elif training.moves:
        replace_head_(model, data.num_classes)
    if source.quant is None and (quant := config.quant_config()) is not None:
        lowbit.quantize_(model, quant)
    return model, found


def _device() -> str | None:
    return None if torch.cuda.is_available() else "cpu"


def _rate(model: nn.Module, phases: tuple[Phase, ...]) -> float:
    """The learning rate of all phases: the planned one, or a lower one if annealing's rule requires it."""
    allowed = [annealing.largest_rate() for phase in phases for annealing in _annealing(model, phase)]
    return min([phase.lr for phase in phases] + allowed, default=0.0)


def _name(phase: Phase) -> str:
    return "".join(c if c.isalnum() else "-" for c in phase.arm)


def _annealing(model: nn.Module, phase: Phase) -> list[ConfidenceGuidedAnnealing]:
    return [] if phase.boundary is None else [ConfidenceGuidedAnnealing(model, phase.boundary)]


def _trained(
    training: Training,
    arm: str,
    model: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    settings: Any,
    out: Path,
    callbacks: list[Any] | None = None,
) -> tuple[Rows, dict[str, Any]]:
    steps = settings.epochs * (len(data.train) // settings.batch_size)
    low = _low_bit_layers(model, training.bits)
    grid = None if training.grid is None or low else get(training.grid["method"])(**_without(training.grid, "method"))
    trackers: list[Any] = []
    if low or grid is not None:
        tracker = FreezingTracker(model, grid=grid, layers=low or None)
        trackers = [tracker, FrozenFrom(tracker, max(1, steps // 4))]
    start = _Start(trackers[0]) if trackers else None
    record = lowbit.train(
        model,
        data,
        dataclasses.replace(settings, out=str(out)),
        teacher,
        callbacks=[*(callbacks or []), *trackers, *([start] if start else [])],
        device=_device(),
    )
    row = _place(training, arm, data) | _result(training, data, record.final)
    row |= {"train loss": record.final["train_loss"], "seconds": record.seconds}
    if settings.schedule == "constant":
        row["lr of the phase"] = settings.lr
    if teacher is not None:
        row["distillation loss"] = _distillation(model, teacher, data)
    if trackers:
        row |= _motion(trackers, start, steps)
    if low:
        rates = sum(optim.learning_rate(step, steps // settings.epochs, settings) for step in range(steps))
        row |= _thresholds(model, training.bits, row, rates)
        row |= _attention(model, trackers[0], data)
    course = {name: [row.get(name) for row in record.history] for name in SHOWN if name in record.history[-1]}
    return [row], {arm: {name: [_short(value) for value in values] for name, values in course.items()}}


def _place(training: Training, arm: str, data: Data) -> dict[str, Any]:
    """The columns that identify a row."""
    steps = training.epochs * (len(data.train) // training.config().train.batch_size)
    row = {"arm": arm, "bits": training.bits, "epochs": training.epochs, "steps": steps, "seed": training.seed}
    return row | training.columns


def _result(training: Training, data: Data, final: dict[str, Any]) -> dict[str, float]:
    if data.task == "detection":
        return {"mAP, %": 100 * final["test_map"], "mAP50, %": 100 * final["test_map50"]}
    name = "target, %" if training.moves else "accuracy, %"
    return {name: 100 * final["test_acc"], "test loss": final["test_loss"]}


def seconds(result: dict[str, Any]) -> float:
    """Seconds that a training took, including its phases and its source task."""
    return sum(row["seconds"] + row.get("source seconds", 0.0) for row in result["rows"])


class _Start:
    """A callback that keeps the codes before the first step, to compute the share of changed weights at the end."""

    def __init__(self, tracker: FreezingTracker):
        self.tracker, self.codes = tracker, tracker._state.codes.clone()

    def changed(self) -> float:
        return float((self.tracker._state.codes != self.codes).double().mean())

    def state_dict(self) -> dict[str, Any]:
        return {"codes": self.codes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.codes = state["codes"]


def _low_bit_layers(model: nn.Module, bits: int) -> list[str]:
    """Names of the layers whose weights have ``bits`` bits, without the 8-bit first and last layers."""
    return [
        layer.name
        for layer in quantized_layers(model)
        if layer.weight is not None and getattr(layer.weight.config, "bits", None) == bits
    ]


def _motion(trackers: list[Any], start: _Start, steps: int) -> dict[str, float]:
    tracker, frozen = trackers
    total = tracker.summary(total=True, since="start").iloc[-1]
    shares = {name: 100 * value for name, value in frozen.frozen().items()}
    return {
        "oscillating, %": 100 * total.oscillating,
        "frequency": total.frequency,
        "memory": MEMORY / steps,
        "frozen, %": shares["frozen"],
        "sign frozen, %": shares["sign_frozen"],
        "flip rate, %": 100 * total.flip_rate,
        "changed level, %": 100 * start.changed(),
    }


def _thresholds(model: nn.Module, bits: int, row: dict[str, Any], rates: float) -> dict[str, float]:
    """Reach and boundary density, for methods with one latent and evenly spaced levels; empty for others."""
    try:
        density, spacing = 100 * boundary_density(model, bits), float(spacings(model, bits).median())
    except lowbit.LowbitError:
        return {}
    found = {"reach": rates / spacing, "boundary density, %": density}
    return found | {"oscillating per density": row["oscillating, %"] / density if density else math.nan}


def _attention(model: nn.Module, tracker: FreezingTracker, data: Data) -> dict[str, float]:
    attentions = low_bit_attentions(model)
    if not attentions:
        return {}
    oscillating = total = 0
    for name, attention in attentions.items():
        product = hasattr(attention, "qk")
        frequency = tracker.frequency(f"{name}.qk" if product else f"{name}.qkv")
        rows = len(frequency) if product else len(frequency) * 2 // 3  # values are the last third
        oscillating += int((frequency[:rows] > tracker.threshold).sum())
        total += frequency[:rows].numel()
    x, y = _test(data, SEEN)
    error = query_key_misestimation(model.eval(), list(zip(x.split(256), y.split(256), strict=True)))
    found = {"oscillating qk, %": 100 * oscillating / total}
    return found | ({"misestimation, %": 100 * error} if math.isfinite(error) else {})


def _test(data: Data, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    part = data.test if count is None else data.subset(test=min(count, len(data.test))).test
    return normalize(part.x, data.mean, data.std), part.y


@torch.no_grad()
def _distillation(model: nn.Module, teacher: nn.Module, data: Data) -> float:
    """The soft cross-entropy between model and teacher on the test split."""
    x, _ = _test(data)
    ask: Callable = distillation.soft_cross_entropy
    losses = [float(ask(distillation.merge(model(part)), teacher.eval()(part))) * len(part) for part in x.split(256)]
    return sum(losses) / len(x)


def _without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
