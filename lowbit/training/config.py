"""The settings of a training run: :class:`TrainConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Ge, Gt, Lt

from lowbit.settings import settings

NonNegative = Annotated[float, Ge(0), pydantic.AllowInfNan(False)]
Positive = Annotated[float, Gt(0), pydantic.AllowInfNan(False)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Weight = Annotated[float, Ge(0), pydantic.Field(le=1)]
Count = Annotated[int, Ge(1)]

# Fields that a resumed run may change: where it writes, what it shows and how many workers read.
NOT_COMPARED = ("out", "progress", "workers", "checkpoint_every")


@settings
class TrainConfig:
    """The settings of one training run; wrong or contradictory values raise ``LowbitError`` at construction.

    Args:
        epochs: passes over the training split.
        batch_size: items in each step over **all** processes; the incomplete last batch of an epoch is dropped.
        optimizer: ``"adamw"`` (decoupled decay), ``"sgd"`` (momentum, L2 decay) or ``"radam"`` (L2 decay).
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine schedule.
        momentum: momentum of SGD; the Adam family always has the betas (0.9, 0.999).
        weight_decay: strength of the decay of the parameters that ``decay`` selects.
        decay: ``"all"`` decays every parameter, as the ImageNet recipe of the shift papers does. ``"weights"`` leaves
            out vectors and scalars (biases, norms), quantizer steps, and what the model lists in ``no_weight_decay()``.
        warmup_epochs: epochs of linear warm-up, by step; may be a fraction.
        schedule: ``"cosine"`` from ``lr`` to ``min_lr``, by step, or ``"constant"``.
        label_smoothing: label smoothing of the cross-entropy, in [0, 1).
        augment: ``"none"``; ``"shift"`` (random shift by up to 1/8 of a side; of a sound: 1/10 of its length);
            ``"crop_flip"`` (shift and left-right flip, for photographs; random-resized crop and flip for image
            folders); ``"randaugment"`` (crop_flip and RandAugment 2×9; images of at least 64 pixels); ``"deit"``
            (image folders: crop_flip, timm's RandAugment m9-mstd0.5-inc1, erasing with probability 0.25).
        mixup, cutmix: α of these mixtures within each process's share of a batch; 0 turns one off.
        repeats: augmented copies of each image in an epoch of unchanged length (repeated augmentation).
        crops: 0 draws a new augmentation each time. k > 0 gives every training image k fixed augmented versions, the
            same for all runs and seeds; each epoch shows one of them. A teacher then answers each version once, and
            the cache folder keeps its answers for all runs that share teacher, data and ``augment`` (the fixed crops
            of Shen and Xing's FKD, arXiv 2112.01528). For images in memory only, without mixup and cutmix.
        amp: ``"bf16"`` runs the forward pass under bfloat16 autocast; parameters stay float32.
        compile: ``"quantizers"`` compiles the quantizers only, ``"model"`` the whole training step's forward pass.
        channels_last: store images and convolution weights in channels-last memory format.
        fused_attention: ``False`` turns timm's ``fused_attn`` off for the run, ``True`` turns it on. ``None`` turns it
            off on the CPU, where its backward pass is slow, and elsewhere leaves the model as it is.
        clip_grad: largest norm of the gradient, or ``None``.
        cga_epochs: epochs of confidence-guided annealing (OFQ) after ``epochs``, with the same optimizer, for models
            with StatsQ weights (`lowbit.training.ConfidenceGuidedAnnealing`).
        cga_lr: constant learning rate of the annealing.
        cga_boundary: half width, in steps, of the zone around a decision boundary in which annealed weights may move.
        cga_layers: names or patterns of the layers to anneal; ``None`` takes all with StatsQ weights.
        cga_query_key: how to anneal query-key products: ``"effective"`` masks their gradient, ``"as_published"`` does
            not.
        distill_weight: w in (1-w)·CE + w·T²·soft-CE against the teacher; ``None`` is 0.5 if there is a teacher.
        temperature: temperature T of the distillation.
        teacher_mode: "eval" distills from the teacher as it predicts; "as_published" keeps it in training mode, as the
            code released with OFQ does, where only the class head of a distilled DeiT teaches.
        seed: random seed of batch order, augmentation and dropout.
        deterministic: ask torch for deterministic algorithms during the run.
        eval_every: epochs between evaluations on the test split; the last epoch is always evaluated.
        checkpoint_every: epochs between checkpoints; the last epoch always has one.
        workers: DataLoader processes for sets that are not in memory; results do not depend on it.
        out: folder for ``checkpoint.pt`` and ``history.jsonl``, or ``None`` to keep nothing.
        progress: show a progress bar (``TQDM_DISABLE=1`` in the environment turns it off as well).
    """

    epochs: Count
    batch_size: Count = 128
    optimizer: Literal["adamw", "sgd", "radam"] = "adamw"
    lr: Positive = 1e-3
    min_lr: NonNegative = 0.0
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 0.05
    decay: Literal["all", "weights"] = "weights"
    warmup_epochs: NonNegative = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    label_smoothing: Fraction = 0.0
    augment: Literal["none", "shift", "crop_flip", "randaugment", "deit"] = "none"
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    repeats: Count = 1
    crops: Annotated[int, Ge(0)] = 0
    amp: Literal["none", "bf16"] = "none"
    compile: Literal["none", "quantizers", "model"] = "none"
    channels_last: bool = False
    fused_attention: bool | None = None
    clip_grad: Positive | None = None
    cga_epochs: Annotated[int, Ge(0)] = 0
    cga_lr: Positive = 1e-5
    cga_boundary: Annotated[float, Ge(0), pydantic.Field(le=0.5)] = 0.005
    cga_layers: tuple[str, ...] | None = None
    cga_query_key: Literal["effective", "as_published"] = "effective"
    distill_weight: Weight | None = None
    temperature: Positive = 1.0
    teacher_mode: Literal["eval", "as_published"] = "eval"
    seed: Annotated[int, Ge(0)] = 0
    deterministic: bool = True
    eval_every: Count = 1
    checkpoint_every: Count = 1
    workers: Annotated[int, Ge(0)] = 0
    out: str | None = None
    progress: bool = True

    @pydantic.field_validator("cga_layers", mode="before")
    @classmethod
    def _cga_layers(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @pydantic.model_validator(mode="after")
    def _agree(self) -> "TrainConfig":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} should be at most epochs={self.epochs}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g} should be at most lr={self.lr:g}")
        if self.crops and self.augment not in ("shift", "crop_flip"):
            raise ValueError(f"crops={self.crops} needs augment='shift' or 'crop_flip', not {self.augment!r}")
        if self.crops and (self.mixup or self.cutmix):
            raise ValueError(f"crops={self.crops} fixes what a teacher sees; mixup and cutmix have to be 0")
        return self

    @property
    def all_epochs(self) -> int:
        """Epochs of the whole run, including those of the annealing."""
        return self.epochs + self.cga_epochs

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a run card or a checkpoint."""
        fields = dataclasses.asdict(self)
        return fields | {"cga_layers": None if self.cga_layers is None else list(self.cga_layers)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: tuple[str, ...] = NOT_COMPARED) -> list[str]:
    """``field: old → new`` for every entry in which two plain dictionaries differ."""
    fields = [key for key in dict.fromkeys([*old, *new]) if key not in ignore]
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)!r} → {new.get(key, absent)!r}"
        for key in fields
        if old.get(key, absent) != new.get(key, absent)
    ]
