"""BCCD: blood cells under the microscope, with boxes. 364 real images, Pascal VOC annotations."""

import io
import math
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.data.archive import decoded
from lowbit.data.base import Data, DetectionDataset, dataset, pixel_statistics
from lowbit.errors import DataError
from lowbit.extras import extra

CLASSES = ("RBC", "WBC", "Platelets")
SOURCE = "github.com/Shenggan/BCCD_Dataset (zipped as BCCD/{JPEGImages,Annotations,ImageSets})"
FILES = {"bccd-voc.zip": "f9cbdcd1f2977437b3d0f5857989909979f3403f8e55d5db9c4febea631c2fbf"}
WIDTH, HEIGHT = 640, 480


def decode(path: Path) -> dict[str, Any]:
    """Images at half size, uint8 ``[N, 3, 240, 320]``, boxes in their pixels, labels and the two splits.

    Raises:
        DataError: a box has a class that BCCD lacks, a class has no box, an annotation is damaged, or an image is
            damaged or of another size.
    """
    with extra("data", "reading BCCD"):
        from tqdm.auto import tqdm

    from lowbit.data.images import read

    splits: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        for split in ("trainval", "test"):
            ids = archive.read(f"BCCD/ImageSets/Main/{split}.txt").decode().split()
            images, boxes, labels = [], [], []
            for name in tqdm(ids, desc=f"decoding {path.name}, {split}", unit=" images", leave=False):
                content = io.BytesIO(archive.read(f"BCCD/JPEGImages/{name}.jpg"))
                image = read(content, f"{path.name}: {name}.jpg")
                if image.size != (WIDTH, HEIGHT):
                    raise DataError(f"{path.name}: {name}.jpg is {image.size}, not {(WIDTH, HEIGHT)}")
                images.append(np.asarray(image.reduce(2)))
                corners, kinds = _annotation(archive.read(f"BCCD/Annotations/{name}.xml"), name, path.name)
                boxes.append(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4) / 2)
                labels.append(torch.tensor(kinds, dtype=torch.int64))
            x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
            splits[split] = {"x": x, "boxes": boxes, "labels": labels}
            present = set(torch.cat(labels).tolist())
            if missing := [name for i, name in enumerate(CLASSES) if i not in present]:
                raise DataError(f"{path.name}: the split {split} has no box of the class(es) {', '.join(missing)}")
    return splits


def _annotation(xml: bytes, name: str, archive: str) -> tuple[list[list[float]], list[int]]:
    """Boxes and labels of one annotation file; boxes without area (the set has a few) are left out."""
    boxes, labels = [], []
    try:
        tree = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise DataError(f"{archive}: {name}.xml is no XML ({error}); get the archive again") from None
    for item in tree.iter("object"):
        kind = item.findtext("name")
        if kind not in CLASSES:
            raise DataError(f"{archive}: {name}.xml has a box of the class {kind!r}; BCCD has {', '.join(CLASSES)}")
        sides = [item.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(side or "") for side in sides)
            if not all(map(math.isfinite, (x1, y1, x2, y2))):
                raise ValueError
        except ValueError:
            raise DataError(
                f"{archive}: {name}.xml has a box with the sides {sides}; four finite numbers are needed"
            ) from None
        x1, x2, y1, y2 = max(x1, 0), min(x2, WIDTH), max(y1, 0), min(y2, HEIGHT)
        if x2 > x1 and y2 > y1:
            boxes.append([x1, y1, x2, y2])
            labels.append(CLASSES.index(kind))
    return boxes, labels


@dataset(
    "bccd",
    title="blood cells, 320x240, with boxes",
    task="detection",
    kind="archive",
    items="292 + 72",
    classes=3,
    license="MIT",
    citation="Shenggan, BCCD Dataset, 2017",
    source=SOURCE,
    files=FILES,
    note="images and boxes at half the original 640x480",
)
def bccd() -> Data:
    """The cells: uint8 images ``[N, 3, 240, 320]`` with boxes of red and white blood cells and platelets."""
    (file, expected), *_ = FILES.items()
    splits = decoded(file, expected, SOURCE, decode)
    train, test = (
        DetectionDataset(part["x"], tuple(part["boxes"]), tuple(part["labels"]))
        for part in (splits["trainval"], splits["test"])
    )
    return Data("bccd", "detection", CLASSES, train, test, (3, 240, 320), *pixel_statistics(train.x))
