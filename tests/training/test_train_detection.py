"""Detection through lowbit.train: boxes follow their images, mAP is COCO's, runs repeat and resume."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_helpers import make_data

import lowbit
from lowbit.data import DetectionDataset
from lowbit.errors import LowbitError
from lowbit.models.detection import detector
from lowbit.models.resnet import SmallResNet
from lowbit.nn import quantized_layers
from lowbit.quantizers import DenseShift
from lowbit.training import augment
from lowbit.training.detection import DetectionBatches, average_precision, evaluate_detector, move_boxes
from lowbit.training.distributed import Processes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes():
    return lowbit.data.load("shapes", size=32, n_train=16, n_test=10)


@pytest.fixture
def small():
    """Makes a small detector, always with the same weights."""

    def make(quantized=False, classes=3, **options):
        torch.manual_seed(0)
        model = SmallResNet(1, width=8)
        if quantized:
            lowbit.quantize_(model, lowbit.QuantConfig(weight=DenseShift(bits=3, scale="statistical")))
        return detector(model, classes, **{"channels": 32, "head_convs": 1, **options})

    return make


@pytest.fixture
def brief():
    def make(**changes):
        settings = {"epochs": 2, "batch_size": 8, "lr": 2e-3, "augment": "crop_flip", "progress": False, **changes}
        return lowbit.TrainConfig(**settings)

    return make


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Boxes that move


def test_boxes_are_shifted_mirrored_clipped_and_dropped():
    boxes = torch.tensor([[2.0, 1.0, 6.0, 5.0], [0.0, 6.0, 4.0, 9.0], [8.0, 0.0, 12.0, 4.0]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 1, 2])}
    shape = (3, 10, 12)
    assert move_boxes(target, shape)["boxes"].equal(boxes)
    moved = move_boxes(target, shape, torch.tensor([1, -3]))  # 1 down, 3 left: the second one's center leaves
    assert moved["boxes"].tolist() == [[0, 2, 3, 6], [5, 1, 9, 5]] and moved["labels"].tolist() == [0, 2]
    both = move_boxes(target, shape, torch.tensor([1, -3]), torch.tensor(True))
    assert both["boxes"].tolist() == [[9, 2, 12, 6], [3, 1, 7, 5]]
    assert target["boxes"].equal(boxes)
    empty = move_boxes({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}, shape, flip=True)
    assert empty["boxes"].shape == (0, 4)


def extent(mask):
    """The box around the pixels of a mask ``[H, W]``."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@given(st.data())
def test_a_box_goes_where_its_pixels_go(data):
    """The image moved by `augment.apply` shows the rectangle where `move_boxes` puts its box."""
    height, width = 16, 24
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    image = torch.zeros(1, 1, height, width, dtype=torch.uint8)
    image[..., y1:y2, x1:x2] = 255
    offset = torch.tensor([[data.draw(st.integers(-2, 2)), data.draw(st.integers(-3, 3))]])
    flip = torch.tensor([data.draw(st.booleans())])
    shown = augment.apply(image, {"offsets": offset, "flips": flip})[0, 0]
    target = {"boxes": torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32), "labels": torch.tensor([4])}
    moved = move_boxes(target, (1, height, width), offset[0], flip[0])
    if len(moved["boxes"]):
        assert moved["boxes"].tolist() == [extent(shown > 0)]
    else:  # at most half of it is left
        assert (shown > 0).sum() <= (x2 - x1) * (y2 - y1) / 2


def rectangles(n=12, size=32):
    """Black images with one white rectangle; the size of the rectangle is different in each."""
    x = torch.zeros(n, 3, size, size, dtype=torch.uint8)
    boxes = [torch.tensor([[8.0, 9.0, 12.0 + i, 20.0]]) for i in range(n)]
    for image, box in zip(x, boxes, strict=True):
        x1, y1, x2, y2 = box[0].int().tolist()
        image[:, y1:y2, x1:x2] = 255
    split = DetectionDataset(x, tuple(boxes), tuple(torch.tensor([i]) for i in range(n)))
    names = tuple(str(i) for i in range(n))
    return lowbit.data.Data("made", "detection", names, split, split, (3, size, size), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("kind", ["none", "shift", "crop_flip"])
def test_batches_pair_images_with_their_boxes(brief, kind):
    data = rectangles()
    config = brief(augment=kind, batch_size=4)
    batches = DetectionBatches(data, config, Processes(0, 1, CPU))
    seen, places = [], set()
    for epoch in (0, 1):
        for x, targets in batches.epoch(epoch):
            for image, target in zip(x, targets, strict=True):
                assert target["boxes"].tolist() == [extent(image[0] > 0)]
                seen.append(target["labels"].item())
                places.add(tuple(target["boxes"][0, :2].tolist()))
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]
    assert (len(places) == 1) == (kind == "none")
    for x, targets in batches.test():
        assert [t["boxes"].tolist() for t in targets] == [[extent(image[0] > 0)] for image in x]


def test_processes_share_the_batches_of_one(brief):
    data, config = rectangles(), brief(batch_size=4)
    whole, *parts = (DetectionBatches(data, config, Processes(r, n, CPU)) for r, n in ((0, 1), (0, 2), (1, 2)))
    for (x, y), *shares in zip(whole.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        assert torch.equal(x, torch.cat([share[0] for share in shares]))
        assert [t["boxes"].tolist() for t in y] == [t["boxes"].tolist() for share in shares for t in share[1]]


def test_a_part_of_a_set_works_too(shapes, brief):
    part = shapes.subset(train=9, test=3)
    batches = DetectionBatches(part, brief(augment="none"), Processes(0, 1, CPU))
    (x, targets), *more = batches.test()
    assert not more and x.shape == (3, 3, 32, 32)
    assert torch.equal(targets[2]["boxes"], part.test[2][1]["boxes"])


# Mean average precision


def found(*boxes, labels=None, scores=None):
    n = len(boxes)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([0] * n if labels is None else labels, dtype=torch.int64),
        "scores": torch.tensor([0.9 - 0.1 * i for i in range(n)] if scores is None else scores),
    }


def there(*boxes, labels=None):
    return {key: value for key, value in found(*boxes, labels=labels).items() if key != "scores"}


A, B, C = [0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 6.2]  # IoU of A and C is 0.62
HALF = 51 / 101  # recall 0.5 is reached at 51 of the 101 recalls

BY_HAND = [
    ("all found", [found(A, B)], [there(A, B)], 1.0, 1.0),
    ("nothing found", [found()], [there(A, B)], 0.0, 0.0),
    ("half of them", [found(A)], [there(A, B)], HALF, HALF),
    ("wrong class", [found(A, labels=[1])], [there(A)], 0.0, 0.0),
    ("loose box: three of ten thresholds", [found(C)], [there(A)], 0.3, 1.0),
    ("found twice: the second is wrong, but comes after", [found(A, A)], [there(A)], 1.0, 1.0),
    ("better-scored mistake: precision 1/2", [found(B, A)], [there(A)], 0.5, 0.5),
    ("mistake in an image without boxes", [found(B), found(A, scores=[0.5])], [there(), there(A)], 0.5, 0.5),
    ("image without boxes and without mistakes", [found(), found(A)], [there(), there(A)], 1.0, 1.0),
    ("mean over classes", [found(A, labels=[1])], [there(A, B, labels=[1, 0])], 0.5, 0.5),
    ("a class that is not there counts nothing", [found(A, B, labels=[1, 0])], [there(A, labels=[1])], 1.0, 1.0),
]


@pytest.mark.parametrize(("predictions", "targets", "over_all", "at_half"), [case[1:] for case in BY_HAND])
def test_average_precision_by_hand(predictions, targets, over_all, at_half):
    result = average_precision(predictions, targets)
    assert result == {"map": pytest.approx(over_all, abs=1e-6), "map50": pytest.approx(at_half, abs=1e-6)}


def test_average_precision_of_each_class():
    predictions = [found(A, C, labels=[0, 2])]
    result = average_precision(predictions, [there(A, A, B, labels=[0, 2, 2])], classes=("a", "b", "c"))
    assert result["per_class"]["a"] == {"map": pytest.approx(1), "map50": pytest.approx(1)}
    assert result["per_class"]["b"] == {"map": None, "map50": None}
    assert result["per_class"]["c"] == {"map": pytest.approx(0.3 * HALF), "map50": pytest.approx(HALF)}
    assert result["map"] == pytest.approx((1 + 0.3 * HALF) / 2)


def test_average_precision_agrees_with_torchmetrics():
    from torchmetrics.detection import MeanAveragePrecision

    random = torch.Generator().manual_seed(0)
    targets, predictions = [], []
    for _ in range(12):
        corner = torch.rand(4, 2, generator=random) * 40
        boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(4, 2, generator=random)], 1)
        labels = torch.randint(0, 3, (4,), generator=random)
        targets.append({"boxes": boxes, "labels": labels})
        moved = boxes + 2 * torch.randn(4, 4, generator=random)
        predictions.append({"boxes": moved, "labels": labels, "scores": torch.rand(4, generator=random)})
    metric = MeanAveragePrecision()
    metric.update(predictions, targets)
    expected = metric.compute()
    result = average_precision(predictions, targets)
    assert 0.1 < result["map"] < result["map50"] < 0.99
    assert result == {"map": pytest.approx(expected["map"].item()), "map50": pytest.approx(expected["map_50"].item())}


@pytest.mark.parametrize("targets", [[], [there()]])
def test_average_precision_needs_a_box(targets):
    with pytest.raises(LowbitError, match=r"needs boxes to find; none of the \d images"):
        average_precision([found(A)] * len(targets), targets)


class Finder(torch.nn.Module):
    """Finds every one of `rectangles`, and knows its class by its width."""

    def forward(self, images, targets=None):
        boxes = [extent(image[0] > 0) for image in images]
        return [found(box, labels=[box[2] - box[0] - 4]) for box in boxes]


def test_a_split_is_evaluated_whole_and_in_order():
    data = rectangles()
    wrong = DetectionDataset(data.test.x, data.test.boxes, data.test.labels[1:] + data.test.labels[:1])
    data = dataclasses.replace(data, train=wrong)
    result = evaluate_detector(Finder(), data, batch_size=5, device="cpu")
    assert result["map"] == pytest.approx(1) and result["map50"] == pytest.approx(1)
    assert list(result["per_class"]) == list(data.classes)
    assert evaluate_detector(Finder(), data, "train", device="cpu")["map50"] == 0


# Training


@pytest.mark.slow
def test_a_detector_learns_to_find_shapes():
    """Measured: mAP50 0.83, 0.77, 0.89 and 0.68 for four seeds; 0.0 before training."""
    data = lowbit.data.load("shapes", n_train=160, n_test=40)
    torch.manual_seed(0)
    model = detector(lowbit.models.create("resnet20", pretrained="cifar10-jpeg"), 3, channels=32)
    before = evaluate_detector(model, data)["map50"]
    config = lowbit.TrainConfig(
        epochs=5, batch_size=8, lr=4e-3, weight_decay=1e-4, warmup_epochs=0.5, eval_every=5, progress=False
    )
    record = lowbit.train(model, data, config, device="cpu")
    assert before < 0.05 and record.final["test_map50"] > 0.5


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_the_history_has_map_and_says_what_the_model_does(shapes, small, brief, head, tmp_path):
    model = small(head=head)
    config = brief(epochs=3, eval_every=2, out=str(tmp_path))
    record = lowbit.train(model, shapes, config, device="cpu")
    rows = record.history
    columns = {"epoch", "lr", "train_loss", "test_map", "test_map50", "seconds", "images_per_s"}
    assert all(set(row) == columns for row in rows)
    assert [row["test_map"] is None for row in rows] == [True, False, False]
    assert rows[2]["train_loss"] < rows[0]["train_loss"]
    card = record.to_json(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["final"] == card["final"]
    assert card["final"]["best_test_map"] == max(row["test_map"] for row in rows[1:])
    assert not model.training
    again = evaluate_detector(model, shapes, device="cpu")
    assert {"test_map": again["map"], "test_map50": again["map50"]}.items() <= rows[2].items()
    assert list(again["per_class"]) == ["circle", "square", "triangle"]


def test_a_denseshift_trunk_is_fine_tuned_on_its_grid(shapes, small, brief):
    model = small(quantized=True)
    names = [layer.name for layer in quantized_layers(model)]
    codes = [layer.codes().clone() for layer in quantized_layers(model)]
    record = lowbit.train(model, shapes, brief(), device="cpu")
    layers = list(quantized_layers(model))
    assert [layer.name for layer in layers] == names and len(names) == 8
    for layer in layers:
        exponent = torch.log2((layer.layer.weight / layer.weight.scale(*layer.latents)).abs())
        assert ((exponent - exponent.round()).abs() < 1e-5).all()
        assert exponent.min() > -0.5 and exponent.max() < 3.5
    assert any(not torch.equal(layer.codes(), before) for layer, before in zip(layers, codes, strict=True))
    assert list(record.identity["quantizers"].values()) == [8]


def test_runs_repeat(shapes, small, brief):
    models = [small(), small(), small()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        lowbit.train(model, shapes, brief(epochs=1, seed=seed), device="cpu")
    one, again, other = map(weights, models)
    assert same(one, again) and not same(one, other)


class StopAt:
    """Raises in the middle of an epoch, as an interruption would."""

    def __init__(self, step=None):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_as_if_never_interrupted(shapes, small, brief, tmp_path):
    reference = small(quantized=True)
    whole = brief(epochs=3, out=str(tmp_path / "a"), clip_grad=1.0)
    expected = lowbit.train(reference, shapes, whole, callbacks=[StopAt()], device="cpu")
    cut = dataclasses.replace(whole, out=str(tmp_path / "b"))
    with pytest.raises(KeyboardInterrupt):
        lowbit.train(small(quantized=True), shapes, cut, callbacks=[StopAt(4)], device="cpu")  # epoch 3 of 3
    resumed = small(quantized=True)
    record = lowbit.train(resumed, shapes, cut, callbacks=[StopAt()], device="cpu")
    assert same(weights(reference), weights(resumed))
    measured = ["epoch", "train_loss", "test_map", "test_map50"]
    assert record.frame[measured].equals(expected.frame[measured])


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_images_without_boxes_are_trained_on(shapes, small, brief, head):
    none, no = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    x = shapes.train.x[:8]
    empty = DetectionDataset(x, (none,) * 8, (no,) * 8)
    data = dataclasses.replace(shapes, train=empty)
    record = lowbit.train(small(head=head), data, brief(epochs=1), device="cpu")
    assert 0 < record.final["train_loss"] < 10


def test_bfloat16_autocast(shapes, small, brief):
    model, seen = small(), set()
    model.backbone.body.conv1.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    record = lowbit.train(model, shapes, brief(epochs=1, amp="bf16"), device="cpu")
    assert seen == {torch.bfloat16} and record.final["train_loss"] > 0


def test_a_classifiers_hits_are_summed_over_all_batches(few, mlp, quick):
    """The loop adds up what a task counts: with weights that stay, the share of all 30 items that are right."""
    model = mlp(dropout=0.0)
    record = lowbit.train(model, few, quick(epochs=1, lr=1e-12), device="cpu")
    x = (few.train.x / 255 - few.mean[0]) / few.std[0]
    right = (model(x).argmax(1) == few.train.y).sum().item()
    assert record.final["train_acc"] == right / 30 and right > 10  # one batch has 10


def test_refusals(shapes, small, brief, few):
    cases = [
        (brief(label_smoothing=0.1), {}, "label_smoothing=0.1"),
        (brief(augment="randaugment"), {}, "randaugment.*(boxes|64)"),
        (brief(compile="model"), {}, "compile='model'"),
        (brief(), {"teacher": small()}, "teacher"),
        (brief(distill_weight=0.5), {"teacher": small()}, "distill_weight=0.5"),
        (brief(batch_size=17), {}, "batch_size=17"),
    ]
    for config, more, message in cases:
        with pytest.raises(LowbitError, match=message):
            lowbit.train(small(), shapes, config, device="cpu", **more)
    with pytest.raises(LowbitError, match=r"SmallResNet is no detector: build one with .*num_classes=3"):
        lowbit.train(SmallResNet(1), shapes, brief())
    with pytest.raises(LowbitError, match="the detector has 2 classes, shapes has 3"):
        lowbit.train(small(classes=2), shapes, brief())
    with pytest.raises(LowbitError, match="made is a classification set"):
        evaluate_detector(small(), few)
    with pytest.raises(LowbitError, match="split='val'"):
        evaluate_detector(small(), shapes, "val")
    odd = make_data(shapes.train.x, torch.zeros(16), shapes.test.x, torch.zeros(10), 3, task="detection")
    with pytest.raises(LowbitError, match="an item of a detection set is"):
        lowbit.train(small(), odd, brief())


SCRIPT = """
import os, sys, torch, lowbit
from lowbit.models.detection import detector

data = lowbit.data.load("shapes", n_train=48, n_test=15)
torch.manual_seed(0)
model = detector(lowbit.models.create("resnet20", pretrained="cifar10-jpeg"), 3, channels=32)
config = lowbit.TrainConfig(epochs=5, batch_size=8, lr=4e-3, eval_every=5, out=sys.argv[1], progress=False)
record = lowbit.train(model, data, config, device="cpu")
if os.environ["RANK"] == "0":
    record.to_json(sys.argv[1] + "/run.json")
"""


@pytest.mark.slow
def test_two_processes_evaluate_together_what_one_finds(tmp_path):
    """The predictions of both are joined: their mAP is that of the saved model, evaluated by one process."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "run.json").read_text())
    assert card["processes"] == 2
    model = detector(lowbit.models.create("resnet20"), 3, channels=32)
    model.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    data = lowbit.data.load("shapes", n_train=48, n_test=15)
    alone = evaluate_detector(model, data, batch_size=4, device="cpu")
    assert card["final"]["test_map50"] == pytest.approx(alone["map50"], abs=1e-6) and alone["map50"] > 0.1
