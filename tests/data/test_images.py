"""One image in, 8-bit RGB out: every kind is scaled, converted as documented, or refused by name."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from small_archives import jpeg, tar, zipped

from lowbit.data import bccd, cifar_jpeg, images, load
from lowbit.errors import DataError

EIGHT = np.array([[0, 1, 128, 255]], dtype=np.uint8)


def saved(image, path, **options):
    image.save(path, **options)
    return np.asarray(images.read(path))


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    found = saved(Image.fromarray(EIGHT.astype(np.uint16) * 257), tmp_path / f"a.{ending}")
    assert found.dtype == np.uint8 and found[0, :, 0].tolist() == EIGHT[0].tolist() and found.shape == (1, 4, 3)


def test_twelve_bits_and_white_as_zero_are_scaled_by_what_the_tiff_says(tmp_path):
    image = Image.fromarray(EIGHT.astype(np.uint16) * 257)
    assert saved(image, tmp_path / "white.tif", tiffinfo={262: 0})[0, :, 0].tolist() == [255, 254, 127, 0]
    entries = [
        (256, 2),
        (257, 1),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 110),
        (278, 1),
        (279, 3),
    ]  # two pixels of 12 bits
    content = b"II*\0" + struct.pack("<IH", 8, len(entries))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    (tmp_path / "twelve.tif").write_bytes(content + bytes(4) + b"\xff\xf8\x00")
    assert np.asarray(images.read(tmp_path / "twelve.tif"))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize("values", [np.float32([[0, 0.5]]), np.int32([[0, 70000]])])
def test_values_of_no_known_range_are_refused_by_name(tmp_path, values):
    with pytest.raises(DataError, match=r"odd\.tif has pixels of the kind .* 8 or 16 bits"):
        saved(Image.fromarray(values), tmp_path / "odd.tif")


def test_palettes_gray_and_black_and_white_show_their_colors(tmp_path):
    color = Image.new("RGB", (2, 1), (10, 200, 30))
    assert (
        saved(color.convert("P"), tmp_path / "palette.png").tolist()
        == np.asarray(color.convert("P").convert("RGB")).tolist()
    )
    assert saved(Image.fromarray(EIGHT), tmp_path / "gray.png")[0, :, 1].tolist() == EIGHT[0].tolist()
    assert saved(Image.new("1", (1, 1), 1), tmp_path / "one.png").tolist() == [[[255, 255, 255]]]
    assert saved(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), tmp_path / "cmyk.tif").tolist() == [[[255, 0, 0]]]


def test_transparency_is_shown_over_white(tmp_path):
    alpha = Image.fromarray(np.uint8([[[9, 9, 9, 0], [9, 9, 9, 255]]]))
    assert saved(alpha, tmp_path / "alpha.png")[0].tolist() == [[255, 255, 255], [9, 9, 9]]
    palette = Image.fromarray(np.uint8([[0, 1]])).convert("P")
    palette.putpalette([9, 9, 9, 7, 7, 7])
    assert saved(palette, tmp_path / "palette.png", transparency=0)[0].tolist() == [[255, 255, 255], [7, 7, 7]]


def test_a_picture_is_turned_as_its_camera_says_and_an_animation_gives_its_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    assert saved(Image.new("RGB", (4, 2)), tmp_path / "turned.jpg", exif=exif).shape == (4, 2, 3)
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    assert saved(frames[0], tmp_path / "moves.gif", save_all=True, append_images=frames[1:])[0, 0].tolist() == [
        255,
        0,
        0,
    ]


@pytest.mark.parametrize("content", [b"", b"no image", jpeg((1, 2, 3), (80, 80))[:-200]], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_whole_image_is_refused_by_name(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.jpg cannot be read as an image"):
        images.read(tmp_path / "bad.jpg")


def folder(root, name="1.png", **options):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True, exist_ok=True)
            for i in range(4):
                Image.fromarray(np.full((40, 40), 60 * i, np.uint8)).save(root / split / label / f"{i}.png")
    return load("image-folder", path=str(root), img_size=32, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_ends_with_the_name_of_the_image_alone(tmp_path, workers):
    from lowbit.training import TrainConfig, train

    data = folder(tmp_path)
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"")
    config = TrainConfig(epochs=1, batch_size=8, workers=workers, progress=False)
    with pytest.raises(DataError) as refused:
        train(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2)), data, config, device="cpu")
    assert str(refused.value).startswith(str(tmp_path / "train" / "dog" / "2.png cannot be read"))
    assert "Traceback" not in str(refused.value)


def test_files_that_are_left_out_are_told_and_hidden_ones_are_not(tmp_path):
    folder(tmp_path)
    (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / "cat" / "a.heic").write_bytes(b"x")
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "cat" / "b.gif")
    with pytest.warns(UserWarning, match=r"1 files are left out, such as .*a\.heic"):
        assert len(folder(tmp_path).train) == 9


@pytest.mark.parametrize("size", [0, -3, 1.5, "224"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(DataError, match="img_size="):
        load("image-folder", path=str(tmp_path), img_size=size)


def test_a_damaged_image_of_an_archive_is_refused_by_its_own_name(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar\.xz: train/cat/1\.jpg cannot be read"):
        cifar_jpeg.decode(tar(tmp_path / "a.tar.xz", {"train/cat/1.jpg": jpeg((1, 2, 3))[:-90]}))


@pytest.mark.parametrize(
    ("xml", "message"),
    [("<annotation", "1.xml is no XML"),
     ("<a><object><name>RBC</name><bndbox><xmin>1</xmin></bndbox></object></a>", "1.xml has a box with the sides"),
     ("<a><object><name>RBC</name><bndbox><xmin>nan</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></a>",
      "four finite numbers are needed")],
)  # fmt: skip
def test_a_damaged_annotation_is_refused_by_name(tmp_path, xml, message):
    files = {f"BCCD/ImageSets/Main/{split}.txt": b"1" for split in ("trainval", "test")}
    files |= {"BCCD/JPEGImages/1.jpg": jpeg((9, 9, 9), (640, 480)), "BCCD/Annotations/1.xml": xml.encode()}
    with pytest.raises(DataError, match=message):
        bccd.decode(zipped(tmp_path / "b.zip", files))


def test_an_open_file_is_read_under_the_given_name():
    with pytest.raises(DataError, match=r"^inside the archive cannot be read"):
        images.read(io.BytesIO(b"GIF89a"), "inside the archive")
