"""Detection as a task of `lowbit.train`, and mean average precision.

`lowbit.train(model, data, config)` works for a model of `lowbit.models.detector` and a detection set as it does for
classification: batches, seeds, augmentation, quantizers, callbacks, checkpoints and several processes are the same.
Of the settings, ``augment="none"``, ``"shift"`` and ``"crop_flip"`` move the boxes with the images; a teacher, label
smoothing and ``compile="model"`` are refused.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.data import ArrayDataset, Data
from lowbit.data.base import Split
from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.training import augment, seeds
from lowbit.training.batches import Batches, check_labels
from lowbit.training.config import TrainConfig
from lowbit.training.distributed import Processes, processes
from lowbit.training.run_card import RunRecord

Target = dict[str, Tensor]  # boxes float32 [n, 4] (x1, y1, x2, y2 in pixels), labels int64 [n]
MOST = 100  # detections of an image that count, as in COCO


def move_boxes(
    target: Target, shape: tuple[int, ...], offset: Tensor | None = None, flip: Tensor | bool = False
) -> Target:
    """The boxes of an image that `augment.apply` shifts, then mirrors.

    Boxes are clipped to the image. Boxes whose center has left it are dropped, as SSD's cropping does (Liu et al. 2016,
    arXiv 1512.02325, section 2.2), so that every remaining box has an area.

    Args:
        target: boxes and labels of the image.
        shape: ``(C, H, W)`` of the image.
        offset: int64 ``[2]``, rows down and columns right, or None.
        flip: whether the image is mirrored left-right.
    """
    height, width = shape[-2:]
    boxes, labels = target["boxes"], target["labels"]
    if offset is not None:
        down, right = offset.tolist()
        boxes = boxes + boxes.new_tensor([right, down, right, down])
    if flip:
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    limit = boxes.new_tensor([width, height])
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((center > 0) & (center < limit)).all(1)
    return {"boxes": boxes[inside].clamp_min(0).minimum(limit.repeat(2)), "labels": labels[inside]}


class DetectionBatches:
    """Training and test batches like those of `Batches`, except that y is a list with a target for each image."""

    def __init__(self, data: Data, config: TrainConfig, here: Processes):
        if config.augment == "randaugment":
            raise LowbitError("augment='randaugment' does not move boxes; for detection use none, shift or crop_flip")
        (x, self.targets), (test_x, self.test_targets) = (
            _whole(split, data.name, data.num_classes) for split in (data.train, data.test)
        )
        # The "label" of an image is its index, by which its target is found in each batch.
        train, test = (ArrayDataset(images, torch.arange(len(images))) for images in (x, test_x))
        numbered = dataclasses.replace(data, train=train, test=test)
        self.data, self.config, self.here = data, config, here
        self._numbered = Batches(numbered, config, here, has_labels=False)
        self.steps = self._numbered.steps

    def first(self) -> Tensor:
        """The images of the whole first global batch, without augmentation."""
        return self._numbered.first()

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, list[Target]]]:
        """This process's share of each global batch of one epoch, augmented."""
        config, shape = self.config, tuple(self.data.input_shape)
        share = self.here.share(config.batch_size)
        for step, (x, numbers) in enumerate(self._numbered.epoch(epoch)):
            assert isinstance(numbers, Tensor)  # only config.crops adds a teacher's answers, and Detection refuses it
            # Draw the same numbers as `Batches` did for the images: a function of seed, epoch and step.
            random = seeds.generator(config.seed, seeds.AUGMENT, epoch, step)
            drawn = augment.draw(config.augment, config.batch_size, shape, random)
            mine = {name: values[self.here.rank * share :] for name, values in drawn.items()}
            targets = [
                move_boxes(
                    self.targets[number],
                    shape,
                    mine["offsets"][i] if "offsets" in mine else None,
                    mine["flips"][i] if "flips" in mine else False,
                )
                for i, number in enumerate(numbers.tolist())
            ]
            yield x, [_to(target, self.here.device) for target in targets]

    def test(self) -> Iterator[tuple[Tensor, list[Target]]]:
        """This process's share of the test split: every ``count``-th item, in order; none is dropped."""
        size = self.here.share(self.config.batch_size)  # 256 at once, as in `Batches`, are too many large images
        for x, numbers in self._numbered.test():
            for images, chosen in zip(x.split(size), numbers.split(size), strict=True):
                yield images, [self.test_targets[number] for number in chosen.tolist()]


class DetectionRecord(RunRecord):
    """`RunRecord` of a detector, with test_map and test_map50 in place of test_loss and the accuracies."""

    @property
    def final(self) -> dict[str, Any]:
        """The last epoch's metrics with the best test mAP (``best_test_map``) and its epoch."""
        evaluated = [row for row in self.history if row["test_map"] is not None]
        best = max(evaluated, key=lambda row: row["test_map"])  # ties go to the first
        return {**self.history[-1], "best_test_map": best["test_map"], "best_epoch": best["epoch"]}


class Detection:
    """The task with boxes; see `lowbit.training.loop.Task`."""

    batches = DetectionBatches
    record = DetectionRecord
    metrics: tuple[str, ...] = ("test_map", "test_map50")
    teacher: nn.Module | None = None

    def __init__(self, model: nn.Module, data: Data, config: TrainConfig, teacher: nn.Module | None = None):
        _check_model(model, data)
        for name, allowed in (("label_smoothing", 0.0), ("distill_weight", None), ("crops", 0)):
            if getattr(config, name) != allowed:
                raise LowbitError(f"{name}={getattr(config, name)} is for classification; for detection use {allowed}")
        if teacher is not None:
            raise LowbitError("a teacher is for classification; leave teacher out for detection")
        if config.compile == "model":
            raise LowbitError("compile='model' does not suit detectors, whose shapes change with the number of boxes")
        self.config = config

    def check(self, model: nn.Module, x: Tensor, here: Processes) -> None:
        """Do nothing: `_check_model` has compared the classes already."""

    def prepare(self, batches: DetectionBatches) -> None:
        """Do nothing: there is no teacher."""

    def loss(
        self, forward: Callable[..., Any], x: Tensor, y: list[Target], here: Processes
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the detector's losses, a float32 scalar, and no further sums for the history."""
        with torch.autocast(here.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
            losses = forward(x, y)
        return torch.stack([loss.float() for loss in losses.values()]).sum(), {}

    def evaluate(self, model: nn.Module, batches: DetectionBatches, here: Processes) -> dict[str, float]:
        """mAP and mAP50 on the test split, over all processes; leaves evaluation mode on."""
        precision = average_precision(*_predict(model, batches, self.config, here))
        return {"test_map": precision["map"], "test_map50": precision["map50"]}


def evaluate_detector(
    model: nn.Module,
    data: Data,
    split: Literal["train", "test"] = "test",
    batch_size: int = 16,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Mean average precision of a detector, as `average_precision` returns it.

    Activation quantizers that have seen no batch yet are calibrated first, on ``batch_size`` training images. The
    score threshold and the number of detections are the model's own. The model is left in evaluation mode on
    ``device``.

    Args:
        model: a detector, from `lowbit.models.detector`.
        data: a detection set.
        split: the split to evaluate on.
        batch_size: number of images evaluated at a time.
        device: e.g. "cpu"; None takes a GPU if there is one.

    Raises:
        LowbitError: the model is no detector or has other classes, the data is no detection set, or the split has no
            box.
    """
    from lowbit.nn import calibrate

    if split not in ("train", "test"):
        raise LowbitError(f"split={split!r} is not allowed; use 'train' or 'test'")
    _check_model(model, data)
    config = TrainConfig(epochs=1, batch_size=max(1, min(batch_size, len(data.train))))
    with processes(device) as here:
        model.to(here.device)
        batches = DetectionBatches(dataclasses.replace(data, test=getattr(data, split)), config, here)
        calibrate(model, batches.first())
        return average_precision(*_predict(model, batches, config, here), classes=data.classes)


def average_precision(
    predictions: Sequence[Target], targets: Sequence[Target], classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """COCO's mean average precision, computed by torchmetrics and pycocotools, as fractions.

    In each class the detections of all images are ranked by score. Each one matches the free box of its image that it
    overlaps most, if the overlap reaches the threshold. AP is the mean over 101 recalls of the best precision at that
    recall or above. ``map`` averages over IoU thresholds of 0.50, 0.55 ... 0.95 and over the classes that have a box;
    ``map50`` takes the first threshold only. An image without boxes counts through its false positives. Only the 100
    best detections of an image count.

    Args:
        predictions: ``boxes``, ``labels``, ``scores`` of each image.
        targets: ``boxes``, ``labels`` of each image, in the same order.
        classes: class names in label order.

    Returns:
        ``map``, ``map50``, and with ``classes`` also ``per_class``: ``{name: {"map": ..., "map50": ...}}``, None for
        a class without a box in ``targets``.

    Raises:
        LowbitError: ``targets`` has no box.
    """
    with extra("detection", "mean average precision"):
        import pycocotools  # noqa: F401
        from torchmetrics.detection import MeanAveragePrecision

    present = torch.cat([target["labels"] for target in targets]).unique().tolist() if targets else []
    if not present:
        raise LowbitError(f"mean average precision needs boxes to find; none of the {len(targets)} images has one")
    metric = MeanAveragePrecision(max_detection_thresholds=[1, 10, MOST], extended_summary=True)
    metric.warn_on_many_detections = False
    metric.update(list(predictions), list(targets))
    computed = metric.compute()
    # [thresholds, recalls, classes present or predicted, object sizes (all first), detections (most last)]
    by_class = computed["precision"][:, :, :, 0, -1].double().mean(1)
    kinds = computed["classes"].reshape(-1).tolist()
    columns = {kind: by_class[:, kinds.index(kind)] for kind in present}
    each = {kind: {"map": ap.mean().item(), "map50": ap[0].item()} for kind, ap in columns.items()}
    result: dict[str, Any] = {key: sum(ap[key] for ap in each.values()) / len(each) for key in ("map", "map50")}
    if classes is not None:
        result["per_class"] = {name: each.get(kind, {"map": None, "map50": None}) for kind, name in enumerate(classes)}
    return result


@torch.no_grad()
def _predict(
    model: nn.Module, batches: DetectionBatches, config: TrainConfig, here: Processes
) -> tuple[list[Target], list[Target]]:
    """Predictions and targets of the whole test split, on the CPU, in every process, in order."""
    here.same_buffers(model)
    model.eval()
    pairs = []
    for x, targets in batches.test():
        with torch.autocast(here.device.type, torch.bfloat16, enabled=config.amp == "bf16"):
            detections = model(x)
        on_cpu = [{key: value.cpu() for key, value in detected.items()} for detected in detections]
        pairs += list(zip(on_cpu, targets, strict=True))
    # Each process has every count-th image, so interleaving the processes' lists restores the order.
    pairs = [pair for pair in chain(*zip_longest(*here.gather(pairs))) if pair is not None]
    return [prediction for prediction, _ in pairs], [target for _, target in pairs]


def _whole(split: Split, name: str, classes: int) -> tuple[Tensor, list[Target]]:
    """All images ``[N, 3, H, W]`` and targets of a split, a `Subset` included."""
    items = [split[i] for i in range(len(split))]
    if not items:
        raise LowbitError(f"{name} has an empty split; training and test split need at least one image each")
    if not all(isinstance(target, dict) and {"boxes", "labels"} <= set(target) for _, target in items):
        raise LowbitError(f"{name}: an item of a detection set is (image, {{'boxes': ..., 'labels': ...}})")
    x = split.x if hasattr(split, "x") else torch.stack([x for x, _ in items])
    targets = [target for _, target in items]
    for index, target in enumerate(targets):
        _check_target(target, (x.shape[-2], x.shape[-1]), classes, f"image {index} of {name}")
    return x, targets


def _check_target(target: Target, shape: tuple[int, int], classes: int, where: str) -> None:
    boxes, (height, width) = target["boxes"], shape
    if boxes.ndim != 2 or boxes.shape[1] != 4 or target["labels"].shape != boxes.shape[:1]:
        raise LowbitError(
            f"{where} has boxes {list(boxes.shape)} and labels {list(target['labels'].shape)}; they should be [n, 4] "
            "and [n]"
        )
    x1, y1, x2, y2 = boxes.unbind(1)
    if not ((x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2) & (x2 <= width) & (y2 <= height)).all():
        raise LowbitError(
            f"{where} has a box that is no part of its {width}x{height} pixels: boxes are x1, y1, x2, y2 with "
            "0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height"
        )
    check_labels(target["labels"], classes, where)


def _to(target: Target, device: torch.device) -> Target:
    return {key: value.to(device, non_blocking=True) for key, value in target.items()}


def _check_model(model: nn.Module, data: Data) -> None:
    build = f"build one with lowbit.models.detector(classifier, num_classes={data.num_classes})"
    if data.task != "detection":
        raise LowbitError(f"{data.name} is a {data.task} set; mean average precision is for detection sets")
    if "targets" not in inspect.signature(model.forward).parameters:
        raise LowbitError(f"{data.name} is a detection set and {type(model).__name__} is no detector: {build}")
    classes = getattr(model, "num_classes", data.num_classes)
    if classes != data.num_classes:
        raise LowbitError(f"the detector has {classes} classes, {data.name} has {data.num_classes}: {build}")
