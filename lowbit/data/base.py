"""The types of data sets, and the registry of data sets."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lowbit.errors import DataError, LowbitError
from lowbit.extras import extra

Task = Literal["classification", "speech", "detection"]
Kind = Literal["embedded", "generated", "archive", "download", "folder"]


class Split(Protocol):
    """One part of a data set: any map-style ``Dataset`` of torch with a length; item i is ``(input, label)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class ArrayDataset(Dataset[tuple[Tensor, int]]):
    """A data set held in memory; item i is ``(x[i], int(y[i]))``.

    Args:
        x: uint8 ``[N, C, H, W]`` images or int16 ``[N, T]`` mono sound.
        y: int64 ``[N]`` class indices.
        meta: a pandas frame with one row per item (speaker, voice, ...), or None.
    """

    x: Tensor
    y: Tensor
    meta: Any = None

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{len(self.x)} items but {len(self.y)} labels")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.y[index])

    def take(self, indices: Tensor) -> "ArrayDataset":
        """The items at ``indices`` (int64), in that order."""
        meta = None if self.meta is None else self.meta.iloc[indices.numpy()].reset_index(drop=True)
        return ArrayDataset(self.x[indices], self.y[indices], meta)


@dataclass(frozen=True)
class DetectionDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images with boxes, in memory; item i is ``(x[i], {"boxes": boxes[i], "labels": labels[i]})``.

    Args:
        x: uint8 ``[N, 3, H, W]`` images.
        boxes: N tensors float32 ``[n, 4]``: x1, y1, x2, y2 in pixels, ``0 <= x1 < x2 <= W``.
        labels: N tensors int64 ``[n]``, class indices from 0.
    """

    x: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not len(self.x) == len(self.boxes) == len(self.labels):
            raise DataError(f"{len(self.x)} images, {len(self.boxes)} sets of boxes and {len(self.labels)} of labels")

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[index], {"boxes": self.boxes[index], "labels": self.labels[index]}


@dataclass(frozen=True)
class Data:
    """A task: two splits, and what a model needs to know about them.

    Args:
        name: the name given to `load`.
        task: "classification" (images), "speech" (sound clips) or "detection" (images with boxes).
        classes: class names in label order.
        train: training split.
        test: test split (or what `hold_out` put there).
        input_shape: ``(C, H, W)`` or ``(T,)``.
        mean: mean of pixel values / 255 in the training split, one per channel; empty for sound.
        std: standard deviation of the same values.
        sample_rate: samples per second of sound, else None.
    """

    name: str
    task: Task
    classes: tuple[str, ...]
    train: Split
    test: Split
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    sample_rate: int | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def subset(self, train: int | None = None, test: int | None = None, seed: int = 0) -> "Data":
        """The same task with fewer items: ``train`` and ``test`` items, drawn evenly over the classes by ``seed``."""
        return dataclasses.replace(
            self, train=_draw(self.train, train, seed, self.name), test=_draw(self.test, test, seed + 1, self.name)
        )

    def only(self, chosen: Sequence[str]) -> "Data":
        """The same task with only the classes ``chosen`` (names, in their new label order)."""
        if missing := [name for name in chosen if name not in self.classes]:
            raise DataError(f"{self.name} has no class {missing[0]!r}; it has {', '.join(self.classes)}")
        if len(set(chosen)) != len(chosen) or not chosen:
            raise LowbitError(f"only({list(chosen)}) of {self.name}: give one class or more, each once")
        train, test = self.train, self.test
        if not (isinstance(train, ArrayDataset) and isinstance(test, ArrayDataset)):
            kinds = f"{type(train).__name__} and {type(test).__name__}"
            raise LowbitError(f"only() of {self.name}: the splits are {kinds}; both should be an ArrayDataset")
        relabel = torch.full((len(self.classes),), -1)
        relabel[[self.classes.index(name) for name in chosen]] = torch.arange(len(chosen))

        def keep(split: ArrayDataset) -> ArrayDataset:
            part = split.take((relabel[split.y] >= 0).nonzero()[:, 0])
            return dataclasses.replace(part, y=relabel[part.y])

        return dataclasses.replace(self, classes=tuple(chosen), train=keep(train), test=keep(test))

    def hold_out(self, fraction: float = 0.1, seed: int = 0, by: str | None = None) -> "Data":
        """The same task without its test set: ``test`` becomes a ``fraction`` of the training split.

        Use it to choose settings without touching the test set. ``mean`` and ``std`` stay as they are.

        Args:
            fraction: fraction of the items to hold out, or with ``by`` of the groups; between 0 and 1. At least one is
                held out.
            seed: random seed of the draw.
            by: None for a draw that is stratified over the classes; or a column of the split's ``meta``, such as
                ``"speaker"``, to hold out whole groups with equal values. Use it if the test split has groups of its
                own, too.

        Raises:
            LowbitError: the fraction is out of range, the column does not exist, or it has fewer than two groups.
        """
        if not 0 < fraction < 1:
            raise LowbitError(f"fraction={fraction} is not allowed; use a fraction between 0 and 1")
        if by is None:
            order = _stratified_order(labels(self.train), seed)
            cut = max(1, round(fraction * len(order)))
            held, kept = order[:cut].sort().values, order[cut:].sort().values
        else:
            group = _column(self.train, by, self.name)
            order = torch.randperm(int(group.max()) + 1, generator=torch.Generator().manual_seed(seed))
            if len(order) < 2:
                raise LowbitError(f"{self.name}: all items have the same {by}; by={by!r} needs two or more")
            chosen = torch.isin(group, order[: min(max(1, round(fraction * len(order))), len(order) - 1)])
            held, kept = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
        return dataclasses.replace(self, train=_take(self.train, kept), test=_take(self.train, held))


def _column(split: Split, name: str, data: str) -> Tensor:
    """A column of the split's ``meta`` as group numbers from 0, int64 ``[N]``, in the order of the sorted values."""
    with extra("data", "grouping a data set by a column"):
        import pandas as pd

    meta = getattr(split, "meta", None)
    if meta is None or name not in meta.columns:
        columns = [] if meta is None else meta.columns
        raise LowbitError(f"{data} has no column {name!r} to hold out by; it has {', '.join(columns) or 'none'}")
    return torch.from_numpy(pd.factorize(meta[name], sort=True, use_na_sentinel=False)[0]).long()


def labels(split: Split | Dataset[Any]) -> Tensor:
    """The labels of a split, int64 ``[N]``, without reading its images.

    Raises:
        LowbitError: the split does not give its labels.
    """
    if isinstance(split, ArrayDataset):
        return split.y
    if isinstance(split, Subset):
        return labels(split.dataset)[torch.as_tensor(split.indices)]
    if isinstance(split, DetectionDataset):
        return torch.zeros(len(split), dtype=torch.int64)  # images have several classes each: nothing to balance
    if hasattr(split, "targets"):
        return torch.as_tensor(split.targets)
    raise LowbitError(f"a {type(split).__name__} does not give its labels; give it an attribute 'targets'")


def _stratified_order(y: Tensor, seed: int) -> Tensor:
    """A permutation in which every prefix is as balanced over classes as the whole."""
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(y), dtype=torch.float64)
    for label in y.unique():
        where = shuffled[y[shuffled] == label]
        rank[where] = (torch.arange(len(where), dtype=torch.float64) + 0.5) / len(where)
    tie = torch.empty(len(y), dtype=torch.float64)
    tie[shuffled] = torch.arange(len(y), dtype=torch.float64)
    return torch.argsort(rank + tie * (1e-9 / max(1, len(y))))


def _draw(split: Split, count: int | None, seed: int, name: str) -> Split:
    if count is None:
        return split
    if not 0 < count <= len(split):
        raise LowbitError(f"{count} items of {name!r} were asked for; use 1 to {len(split)} for this split")
    return _take(split, _stratified_order(labels(split), seed)[:count].sort().values)


def _take(split: Split, indices: Tensor) -> Split:
    if isinstance(split, ArrayDataset):
        return split.take(indices)
    return Subset(split, indices.tolist())  # type: ignore[arg-type]  # Subset only asks for items


def pixel_statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images ``[N, C, H, W]``, of values / 255."""
    counts = torch.stack([torch.bincount(x[:, c].reshape(-1).long(), minlength=256) for c in range(x.shape[1])])
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values.square() - mean.square()).clamp_min(0).sqrt()
    return tuple(round(v, 6) for v in mean.tolist()), tuple(round(v, 6) for v in std.tolist())


@dataclass(frozen=True)
class Card:
    """The description of a data set, available before it is loaded.

    Args:
        name: registry name.
        title: one line that describes the data set.
        task: "classification", "speech" or "detection", as in `Data`.
        kind: where it comes from: "embedded" in the project, "generated" at load, "archive" found under
            ``LOWBIT_DATA``, "download" from its publisher, or a "folder" that the user names.
        items: number of training and test items as text.
        classes: number of classes.
        license: terms of use, as far as stated.
        citation: the publication to cite.
        source: where the data set is published.
        files: archive file name -> sha256 (or "md5:..." where only that is published).
        loader: builds the `Data` from options.
        note: anything a user should know.
    """

    name: str
    title: str
    task: Task
    kind: Kind
    items: str
    classes: int
    license: str
    citation: str
    source: str
    loader: Callable[..., Data]
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""


_registry: dict[str, Card] = {}


def dataset(name: str, **card: Any) -> Callable[[Callable[..., Data]], Callable[..., Data]]:
    """Decorator that registers a loader under ``name``; the keywords are those of `Card`."""

    def register(loader: Callable[..., Data]) -> Callable[..., Data]:
        if name in _registry:
            raise LowbitError(f"two data sets are called {name!r}")
        _registry[name] = Card(name=name, loader=loader, **card)
        return loader

    return register


TOOLS = {
    "base",
    "archive",
    "download",
    "verify",
    "cli",
    "images",
    "sounds",
}  # every other file of this package holds data sets


@functools.cache
def _discover() -> None:
    """Import the files that hold data sets, which register themselves."""
    package = importlib.import_module("lowbit.data")
    for info in pkgutil.iter_modules(package.__path__):
        if info.name not in TOOLS:
            importlib.import_module(f"lowbit.data.{info.name}")


def names() -> list[str]:
    """Names of all data sets."""
    _discover()
    return sorted(_registry)


def card(name: str) -> Card:
    """The description of the data set ``name``.

    Raises:
        DataError: there is no data set of that name.
    """
    _discover()
    if name not in _registry:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"there is no data set {name!r}; there are {', '.join(names())}{hint}")
    return _registry[name]


def load(name: str, **options: Any) -> Data:
    """Load a data set.

    Args:
        name: one of `names`.
        options: options of its loader, e.g. ``path=`` for an image folder, ``seed=`` for a generated set.

    Raises:
        DataError: the name or an option is unknown, or the data is missing, truncated or altered; the message says
            what to do.
    """
    loader = card(name).loader
    allowed = list(inspect.signature(loader).parameters)
    if unknown := sorted(set(options) - set(allowed)):
        raise DataError(f"{name!r} has no option {unknown[0]!r}; it has {', '.join(allowed) or 'none'}")
    return loader(**options)
