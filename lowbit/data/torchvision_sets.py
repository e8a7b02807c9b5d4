"""CIFAR-10/100, FashionMNIST and image folders: read by torchvision, downloaded by `lowbit.data.download`."""

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowbit import paths
from lowbit.data import images
from lowbit.data.base import ArrayDataset, Data, dataset, pixel_statistics
from lowbit.data.download import fetch
from lowbit.errors import DataError
from lowbit.extras import extra

CIFAR = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # the publisher's; torchvision's mirror too
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}


def _in_memory(name: str, train: Any, test: Any) -> Data:
    """A `Data` from two torchvision sets that hold ``data`` and ``targets``."""

    def in_memory(split: Any) -> ArrayDataset:
        x = torch.as_tensor(split.data)
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
        return ArrayDataset(x, torch.as_tensor(split.targets, dtype=torch.int64))

    training, testing = in_memory(train), in_memory(test)
    shape, statistics = tuple(training.x.shape[1:]), pixel_statistics(training.x)
    return Data(name, "classification", tuple(train.classes), training, testing, shape, *statistics)


def _cifar(name: str, archive: Path, kind: type) -> Data:
    """Unpack the archive into a temporary folder, and let torchvision read it there."""
    import tarfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
            return _in_memory(name, *(kind(folder, train=train) for train in (True, False)))
        except (tarfile.TarError, RuntimeError, EOFError, OSError) as error:
            raise DataError(f"{archive.name} could not be read ({error}); delete it and get it again") from None


@dataset(
    "cifar10",
    title="CIFAR-10 photographs, 32x32, the original",
    task="classification",
    kind="download",
    items="50,000 + 10,000",
    classes=10,
    license="none stated; free for research use",
    citation=CIFAR,
    source="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    files={"cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a"},
)
def cifar10() -> Data:
    """CIFAR-10 from the publisher's archive of Python pickles."""
    with extra("data", "the data set cifar10"):
        from torchvision.datasets import CIFAR10

    return _cifar("cifar10", fetch(CIFAR10.url, "md5:c58f30108f718f92721af3b95e74349a"), CIFAR10)


@dataset(
    "cifar100",
    title="CIFAR-100 photographs, 32x32",
    task="classification",
    kind="download",
    items="50,000 + 10,000",
    classes=100,
    license="none stated; free for research use",
    citation=CIFAR,
    source="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    files={"cifar-100-python.tar.gz": "md5:eb9058c3a382ffc7106e4002c42a8d85"},
)
def cifar100() -> Data:
    """CIFAR-100 from the publisher's archive of Python pickles."""
    with extra("data", "the data set cifar100"):
        from torchvision.datasets import CIFAR100

    return _cifar("cifar100", fetch(CIFAR100.url, "md5:eb9058c3a382ffc7106e4002c42a8d85"), CIFAR100)


@dataset(
    "fashion-mnist",
    title="pictures of clothes, 28x28, gray",
    task="classification",
    kind="download",
    items="60,000 + 10,000",
    classes=10,
    license="MIT",
    citation="Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, arXiv 1708.07747",
    source=FASHION,
    files=FASHION_FILES,
)
def fashion_mnist() -> Data:
    """FashionMNIST from its four files."""
    import gzip
    import shutil

    with extra("data", "the data set fashion-mnist"):
        from torchvision.datasets import FashionMNIST

    archives = [fetch(FASHION + file, expected) for file, expected in FASHION_FILES.items()]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for archive in archives:
            try:
                with gzip.open(archive) as packed, open(raw / archive.stem, "wb") as out:
                    shutil.copyfileobj(packed, out)
            except (OSError, EOFError) as error:
                raise DataError(f"{archive.name} could not be read ({error}); delete it and get it again") from None
        return _in_memory("fashion-mnist", *(FashionMNIST(folder, train=train) for train in (True, False)))


def _is_image(left_out: list[str], path: str) -> bool:
    """Whether the name of a file is that of an image; other visible files are added to ``left_out``."""
    name = Path(path).name
    if not name.startswith(".") and not name.lower().endswith(ENDINGS):
        left_out.append(path)
    return not name.startswith(".") and name.lower().endswith(ENDINGS)


def _folder(name: str, path: str | None, img_size: int) -> Data:
    with extra("data", "a folder of images"):
        from torchvision.datasets import ImageFolder

    if path is None:
        if name != "imagenet":
            raise DataError(f"{name} needs the option path=: a folder with train/<class>/ and val/<class>/")
        candidates = [folder / "imagenet" for folder in paths.archives()]
        path = next((str(c) for c in candidates if c.is_dir()), None)
        if path is None:
            raise DataError(
                "imagenet was not found: download ILSVRC2012 from https://image-net.org (it asks for an account), "
                "unpack it as train/<class>/*.JPEG and val/<class>/*.JPEG, and give the folder as path=, or put it as "
                "'imagenet' into the folder that LOWBIT_DATA names"
            )
    if not isinstance(img_size, int) or isinstance(img_size, bool) or img_size < 1:
        raise DataError(f"{name}: img_size={img_size!r} is not allowed; give the side in pixels, 1 or more")
    root = Path(path).expanduser()
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(f"{name}: {root} has no folder {split!r}; it needs train/<class>/ and val/<class>/")
    classes = {split: {p.name for p in (root / split).iterdir() if p.is_dir()} for split in ("train", "val")}
    for complete, lacking in (("train", "val"), ("val", "train")):
        if missing := sorted(classes[complete] - classes[lacking]):
            raise DataError(f"{name}: {root / lacking} lacks the class {missing[0]!r} that {complete!r} has")
    left_out: list[str] = []
    try:
        train, test = (
            ImageFolder(root / split, loader=images.read, is_valid_file=partial(_is_image, left_out))
            for split in ("train", "val")
        )
    except FileNotFoundError as error:
        raise DataError(f"{name}: {error}") from None
    if left_out:
        warnings.warn(
            f"{name}: {len(left_out)} files are left out, such as {left_out[0]}; images end in {', '.join(ENDINGS)}",
            stacklevel=4,
        )
    shape = (3, img_size, img_size)
    return Data(name, "classification", tuple(train.classes), train, test, shape, IMAGENET_MEAN, IMAGENET_STD)


@dataset(
    "image-folder",
    title="your own images in train/<class>/ and val/<class>/",
    task="classification",
    kind="folder",
    items="as many as there are",
    classes=0,
    license="yours",
    citation="",
    source="a folder of yours",
    note="option path=: the folder; img_size=: the side to crop them to",
)
def image_folder(path: str | None = None, img_size: int = 224) -> Data:
    """Images of any size, read one by one as `lowbit.data.images` says, and normalized like ImageNet."""
    return _folder("image-folder", path, img_size)


@dataset(
    "imagenet",
    title="ImageNet (ILSVRC 2012)",
    task="classification",
    kind="folder",
    items="1,281,167 + 50,000",
    classes=1000,
    license="non-commercial research, on registration",
    citation="Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015, arXiv 1409.0575",
    source="https://image-net.org",
    note="option path=: a folder with train/<class>/ and val/<class>/; default: 'imagenet' under LOWBIT_DATA",
)
def imagenet(path: str | None = None, img_size: int = 224) -> Data:
    """ImageNet from an unpacked folder."""
    return _folder("imagenet", path, img_size)
