"""The embedded and generated sets, torchvision's, image folders, and the commands."""

import gzip
import hashlib
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from small_archives import jpeg, sha256, tar
from torchvision.datasets import CIFAR10
from typer.testing import CliRunner

from lowbit import paths
from lowbit.data import load, names, spoken_words, torchvision_sets
from lowbit.errors import DataError
from lowbit_suite.app import app


def test_digits_are_what_the_card_says():
    data = load("digits")
    assert data.train.x.shape == (1437, 1, 8, 8) and data.test.x.shape == (360, 1, 8, 8)
    assert data.train.x.dtype == torch.uint8 and data.train.x.max() == 255 and data.train.x.unique().numel() == 17
    assert all(35 <= count <= 37 for count in data.test.y.bincount().tolist())
    assert torch.equal(load("digits").test.x, data.test.x)


def test_spoken_words_are_what_the_card_says():
    data = load("spoken-words")
    both = [*data.train.meta.word, *data.test.meta.word]
    assert len(both) >= 600 and set(both) == set(data.classes) and len(data.classes) == 10
    assert data.train.x.shape[1:] == (8000,) and data.train.x.dtype == torch.int16
    assert not set(data.train.meta.voice) & set(data.test.meta.voice)
    assert [data.classes[i] for i in data.test.y] == data.test.meta.word.tolist()
    for split in (data.train, data.test):
        loud = split.x.float().square().mean(1).sqrt()
        assert loud.min() > 200 and split.x.abs().max() < 32767
    assert sum(file.stat().st_size for file in spoken_words.folder().iterdir()) <= 3e6


@pytest.mark.parametrize("damage", ["alter", "remove"])
def test_a_damaged_word_is_refused_by_name(tmp_path, monkeypatch, damage):
    shutil.copytree(paths.embedded_data(), tmp_path / "data")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path))
    file = tmp_path / "data" / "spoken_words" / "left.flac"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"left\.flac"):
        load("spoken-words")


def test_shapes_follow_their_seed_and_lie_in_the_image():
    data, again, other = (load("shapes", n_train=40, n_test=40, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(data.train.x, again.train.x) and not torch.equal(data.train.x, other.train.x)
    assert not any(torch.equal(a, b) for a in data.train.x for b in data.test.x)
    for image, target in (data.train[i] for i in range(40)):
        boxes, labels = target["boxes"], target["labels"]
        assert image.shape == (3, 64, 64) and 1 <= len(boxes) == len(labels) <= 5
        assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 64
        assert set(labels.tolist()) <= {0, 1, 2}
    with pytest.raises(DataError, match="size=8"):
        load("shapes", size=8)


def test_a_shape_differs_from_its_ground_inside_its_box():
    """The middle of every box is drawn over: without the shape the image would be another."""
    data = load("shapes", n_train=20, n_test=1)
    for image, target in (data.train[i] for i in range(20)):
        for x1, y1, x2, y2 in target["boxes"].tolist():
            inside = image[:, int(y1 + (y2 - y1) * 0.7), int((x1 + x2) / 2)].float()
            ring = image[:, max(int(y1) - 1, 0), :].float().mean(1)
            assert (inside - ring).abs().max() > 5


def cifar_archive(path):
    rng = np.random.default_rng(0)
    files = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps({"data": pixels, "labels": list(range(10))})
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    return tar(path, files, "w:gz"), files


def test_cifar10_is_read_from_the_publishers_archive(folders, monkeypatch):
    path, files = cifar_archive(folders / "cifar-10-python.tar.gz")
    md5 = {name.split("/")[1]: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    data = torchvision_sets._cifar("cifar10", path, CIFAR10)
    assert data.train.x.shape == (50, 3, 32, 32) and data.test.y.tolist() == list(range(10))
    first = pickle.loads(files["cifar-10-batches-py/test_batch"])["data"][0].reshape(3, 32, 32)
    assert np.array_equal(data.test.x[0].numpy(), first)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
        torchvision_sets._cifar("cifar10", path, CIFAR10)


def test_fashion_mnist_is_read_from_its_four_files(folders, monkeypatch):
    expected = {}
    for split, count in (("train", 6), ("t10k", 4)):
        pixels = bytes(range(256)) * 4 * count
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels[: 784 * count]
        for kind, content in (
            ("images-idx3", images),
            ("labels-idx1", struct.pack(">II", 2049, count) + bytes(range(count))),
        ):
            path = folders / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(content))
            expected[path.name] = sha256(path)
    monkeypatch.setattr(torchvision_sets, "FASHION_FILES", expected)
    data = load("fashion-mnist")
    assert data.train.x.shape == (6, 1, 28, 28) and data.test.y.tolist() == [0, 1, 2, 3]
    assert data.train.x[0, 0, 0, :4].tolist() == [0, 1, 2, 3]


def image_folder(root, train=("cat", "dog"), val=("cat", "dog")):
    for split, classes in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1.jpg").write_bytes(jpeg((9, 9, 9), (40, 30)))
    return root


def test_an_image_folder(tmp_path):
    data = load("image-folder", path=str(image_folder(tmp_path)), img_size=96)
    image, label = data.train[1]
    assert data.classes == ("cat", "dog") and data.input_shape == (3, 96, 96) and label == 1 and image.size == (40, 30)


@pytest.mark.parametrize(
    ("layout", "message"),
    [({"val": ("cat",)}, "val lacks the class 'dog'"), ({"train": ("dog",)}, "train lacks the class 'cat'"),
     ({"val": ()}, "no folder 'val'")],
)  # fmt: skip
def test_an_incomplete_image_folder_is_refused_by_name(tmp_path, layout, message):
    with pytest.raises(DataError, match=message):
        load("image-folder", path=str(image_folder(tmp_path, **layout)))


def test_imagenet_says_what_to_put_where(folders):
    with pytest.raises(DataError, match=r"(?s)image-net\.org.*LOWBIT_DATA"):
        load("imagenet")
    image_folder(folders / "imagenet")
    assert load("imagenet").num_classes == 2
    with pytest.raises(DataError, match="path="):
        load("image-folder")


def test_list_names_every_set(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    result = CliRunner().invoke(app, ["data", "list"])
    assert result.exit_code == 0 and all(name in result.stdout for name in names())


def test_verify_names_an_altered_archive(folders, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert CliRunner().invoke(app, ["data", "verify"]).exit_code == 0  # nothing there is nothing wrong
    assert CliRunner().invoke(app, ["data", "verify", "fsdd"]).exit_code == 1  # unless it was asked for
    (folders / "fsdd.zip").write_bytes(b"altered")
    result = CliRunner().invoke(app, ["data", "verify"])
    assert result.exit_code == 1 and "wrong" in result.stdout and "fsdd.zip" in result.stdout
    assert CliRunner().invoke(app, ["data", "verify", "digits", "spoken-words"]).exit_code == 0


def test_fetch_without_a_network(folders, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    result = CliRunner().invoke(app, ["data", "fetch", "cifar10"])
    assert result.exit_code == 2 and "LOWBIT_DATA" in result.stderr
    assert CliRunner().invoke(app, ["data", "fetch", "digits"]).exit_code == 0
