"""What cannot end well is refused at the first batch, and a full disk leaves what was there."""

import dataclasses
import errno
import os

import pytest
import torch
from torch import nn
from training_helpers import Items

import lowbit
from lowbit.errors import LowbitError, StorageError
from lowbit.training import checkpoint, train


class Steps:
    def __init__(self):
        self.count = 0

    def on_step(self, state):
        self.count += 1


def refused(model, data, config, message, **more):
    steps = Steps()
    with pytest.raises(LowbitError, match=message):
        train(model, data, config, callbacks=[steps], device="cpu", **more)
    assert steps.count == 0


@pytest.mark.parametrize("outputs", [2, 7])
def test_outputs_that_are_not_the_classes(few, mlp, quick, outputs):
    refused(mlp(classes=outputs), few, quick(eval_every=3), rf"the model returned \[1, {outputs}\].*num_classes=3")


def test_a_teachers_outputs_that_are_not_the_classes(few, mlp, quick):
    refused(mlp(), few, quick(), r"the teacher returned \[1, 5\]", teacher=mlp(classes=5))


def test_outputs_that_are_no_logits(few, quick):
    class Answers(nn.Flatten):
        def forward(self, x):
            return {"logits": super().forward(x)}

    refused(Answers(), few, quick(), "the model returned dict")


def test_a_model_for_another_shape(few, mlp, quick):
    refused(mlp(inputs=64), few, quick(), r"Sequential cannot compute a batch of made, whose items are \[1, 4, 4\]")


def test_a_wrong_model_costs_no_checkpoint(few, mlp, quick, tmp_path):
    config = quick(out=str(tmp_path / "run"))
    train(mlp(), few, config, device="cpu")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    refused(mlp(classes=5), few, config, "num_classes=3", fresh=True)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_the_first_look_leaves_modes_and_random_numbers_alone(few, mlp, quick):
    model = mlp()
    model[3].eval()
    seen = []
    watch = type("Watch", (), {"before_forward": lambda self, state: seen.append(model.training)})()
    train(model, few, quick(epochs=1), callbacks=[watch], device="cpu")
    assert all(seen)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(few, mlp, quick, split, label):
    items = getattr(few, split)
    wrong = items.y.clone()
    wrong[4] = label
    setattr(few, split, lowbit.data.ArrayDataset(items.x, wrong))
    refused(mlp(), few, quick(), rf"the label {label} is not among its 3 classes")


def test_labels_that_are_no_integers(few, mlp, quick):
    few.train = lowbit.data.ArrayDataset(few.train.x, few.train.y.float())
    refused(mlp(), few, quick(), "should be integers")


def test_labels_of_a_set_that_does_not_say_them_are_looked_at_batch_by_batch(few, mlp, quick):
    class Folder(torch.utils.data.Dataset):
        def __init__(self, items):
            self.items = items

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            image, label = self.items[index]
            return image, label + 1  # from 1, as some publishers count

    few.train, few.test = Folder(few.train), Folder(few.test)
    with pytest.raises(LowbitError, match="the label 3 is not among its 3 classes"):
        train(mlp(), few, quick(batch_size=30), device="cpu")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split(few, mlp, quick, split):
    items = getattr(few, split)
    setattr(few, split, Items(items.x[:0], items.y[:0]))
    refused(mlp(), few, quick(), f"made has no {split}")
    with pytest.raises(LowbitError, match=f"made has no {split}"):
        lowbit.training.evaluate(mlp(), few, device="cpu")


def test_a_batch_larger_than_the_data(few, mlp, quick):
    refused(mlp(), few, quick(batch_size=31), "batch_size=31 should be at most the 30 training items")


def test_items_of_another_shape_than_the_data_says(few, mlp, quick):
    few.input_shape = (1, 8, 8)
    refused(mlp(), few, quick(), "make them agree")


@pytest.mark.parametrize(
    ("box", "label", "message"),
    [
        ([0, 0, 200, 9], 0, "no part of its"),
        ([5, 5, 5, 9], 0, "no part of its"),
        ([0, 0, float("nan"), 9], 0, "no part of its"),
        ([0, 0, 9, 9], 3, "the label 3 is not among"),
        ([0, 0, 9, 9], -1, "the label -1 is not among"),
    ],
)
def test_annotations_that_cannot_be(quick, box, label, message):
    data = lowbit.data.load("shapes", n_train=10, n_test=10)
    boxes, labels = list(data.train.boxes), list(data.train.labels)
    boxes[3], labels[3] = torch.tensor([box], dtype=torch.float32), torch.tensor([label])
    wrong = dataclasses.replace(data.train, boxes=tuple(boxes), labels=tuple(labels))
    model = lowbit.models.detector(lowbit.models.create("resnet8", 10, in_chans=3), num_classes=data.num_classes)
    refused(model, dataclasses.replace(data, train=wrong), quick(batch_size=5), f"image 3 of shapes.*{message}")


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(few, mlp, quick, tmp_path, monkeypatch):
    config = quick(epochs=3, out=str(tmp_path / "run"))
    whole, save = {}, torch.save

    def full_in_the_second_epoch(contents, file, **options):
        if contents["epoch"] < 2:
            return save(contents, file, **options)
        whole["before"] = (tmp_path / "run" / "checkpoint.pt").read_bytes()
        file.write(b"half of it")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 40832 vs 40784") from error

    monkeypatch.setattr(torch, "save", full_in_the_second_epoch)
    with pytest.raises(StorageError, match=r"checkpoint\.pt could not be written \(No space left on device\)"):
        train(mlp(), few, config, device="cpu")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "history.jsonl"]
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == whole["before"]
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1
    assert len(train(mlp(), few, config, device="cpu").history) == 3


def test_a_history_that_cannot_be_written_is_named(few, mlp, quick, tmp_path):
    (tmp_path / "history.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"history\.jsonl could not be written"):
        train(mlp(), few, quick(out=str(tmp_path)), device="cpu")
