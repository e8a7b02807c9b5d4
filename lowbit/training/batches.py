"""Batches: a deterministic order, the share of each process, and normalization on the device.

Step s of epoch e is a function of (seed, e, s) alone. Each process takes its consecutive share of the global batch, so
the global batches do not depend on the number of processes.
"""

from collections.abc import Iterator
from typing import Protocol, TypeGuard

import torch

from lowbit.data import Data, labels
from lowbit.data.base import Split
from lowbit.errors import LowbitError
from lowbit.training import augment, seeds
from lowbit.training.config import TrainConfig
from lowbit.training.distillation import Taught
from lowbit.training.distributed import Processes

Batch = tuple[torch.Tensor, torch.Tensor | Taught]
Place = tuple[int, int, int]  # epoch, index, copy: what `augment.Samples` is asked for
KEEP_ON_DEVICE = 4 * 2**30  # bytes; larger sets stay in main memory


def order(n: int, batch_size: int, seed: int, epoch: int, repeats: int = 1) -> torch.Tensor:
    """Indices int64 [steps, batch_size] of one epoch: a random permutation without its incomplete last batch.

    Each index occurs ``repeats`` times in a row. The epoch keeps its length, so it covers fewer different items
    (repeated augmentation, Hoffer et al., arXiv 1901.09335).
    """
    shuffled = torch.randperm(n, generator=seeds.generator(seed, seeds.ORDER, epoch))
    shuffled = shuffled.repeat_interleave(repeats)[:n]
    steps = n // batch_size
    return shuffled[: steps * batch_size].view(steps, batch_size)


def normalize(x: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Float32 network input: uint8 images [N,C,H,W] become (x/255 - mean)/std, int16 sounds [N,T] become x/32768."""
    if x.dtype == torch.int16:
        return x.float() / 32768
    if x.dtype != torch.uint8:
        raise LowbitError(f"items should be uint8 images or int16 sounds, not {x.dtype}")
    x = x.float()
    if not mean:
        return x / 255
    shape = (-1, 1, 1)
    mean_, std_ = (torch.tensor(values, device=x.device).view(shape) for values in (mean, std))
    return (x - 255 * mean_) / (255 * std_)


def check_labels(y: torch.Tensor, classes: int, where: str) -> None:
    """Refuse labels that are not integers from 0 to ``classes`` - 1: a GPU would fail without naming the label."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.ndim != 1:
        raise LowbitError(f"{where}: labels are {y.dtype} {list(y.shape)}; they should be integers, one per item")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        wrong = int(y.min()) if y.min() < 0 else int(y.max())
        raise LowbitError(f"{where}: the label {wrong} is not among its {classes} classes, numbered from 0")


class _Tensors(Protocol):
    """A split that is held in memory."""

    @property
    def x(self) -> torch.Tensor: ...

    @property
    def y(self) -> torch.Tensor: ...


def _in_memory(split: Split) -> TypeGuard[_Tensors]:
    return hasattr(split, "x")


def _known_labels(split: Split) -> torch.Tensor | None:
    try:
        return labels(split)
    except LowbitError:
        return None  # unknown before the items are read; each batch is checked instead


class Batches:
    """Training and test batches of a :class:`lowbit.data.Data`, normalized, on this process's device."""

    def __init__(self, data: Data, config: TrainConfig, here: Processes, has_labels: bool = True):
        self.data, self.config, self.here = data, config, here
        self.in_memory = _in_memory(data.train)
        augment.check(config.augment, tuple(data.input_shape), self.in_memory)
        n = len(data.train)
        self.has_labels = has_labels  # whether the second part of an item is a class
        for kind, split in (("training", data.train), ("test", data.test)):
            if not len(split):
                raise LowbitError(f"{data.name} has no {kind} items; at least one is needed")
            if _in_memory(split) and tuple(split.x.shape[1:]) != tuple(data.input_shape):
                raise LowbitError(
                    f"the {kind} items of {data.name} are {list(split.x.shape[1:])}, but its input_shape is "
                    f"{list(data.input_shape)}; make them agree"
                )
            if has_labels and (known := _known_labels(split)) is not None:
                check_labels(known, data.num_classes, f"{data.name}, {kind} split")
        if n < config.batch_size:
            raise LowbitError(f"batch_size={config.batch_size} should be at most the {n} training items of {data.name}")
        if config.batch_size % here.count:
            raise LowbitError(
                f"batch_size={config.batch_size} (of all processes together) should be a multiple of the "
                f"{here.count} processes"
            )
        if config.repeats > 1 and self.in_memory and config.augment != "randaugment":
            raise LowbitError(f"repeats={config.repeats} is for image folders and augment='randaugment'; use 1")
        if (config.mixup or config.cutmix) and len(data.input_shape) != 3:
            raise LowbitError(
                f"mixup and cutmix are for images; set both to 0 for {data.name}, whose items are "
                f"{list(data.input_shape)}"
            )
        self.n, self.steps = n, n // config.batch_size
        # Whole-batch augmentation needs items of one size and cheap geometry; the rest goes through DataLoader.
        self.batched = False
        if _in_memory(data.train) and config.augment != "randaugment":
            self.batched = True
            self.x, self.y = self._near(data.train.x), self._near(data.train.y)
        if config.crops and not self.batched:
            raise LowbitError(
                f"crops={config.crops} is for data held in memory; {data.name} is read item by item: set 0"
            )
        self.crops = augment.fixed(config.augment, self.n, config.crops, data.input_shape) if config.crops else {}
        self.answers: torch.Tensor | None = None  # a teacher's logits [n, crops, classes], by stored_answers
        if _in_memory(data.test):
            self.test_x, self.test_y = self._near(data.test.x), self._near(data.test.y)

    def _near(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.here.device) if tensor.nbytes < KEEP_ON_DEVICE else tensor

    def _ready(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.here.device
        if self.has_labels and not self.in_memory:
            check_labels(y, self.data.num_classes, self.data.name)
        x = normalize(x.to(device, non_blocking=True), self.data.mean, self.data.std)
        if self.config.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y.to(device, non_blocking=True)

    def _loader(
        self, dataset: Split, kind: str, batches: list[list[Place]], in_memory: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        transform = augment.sample_transform(kind, tuple(self.data.input_shape), in_memory)
        loader = torch.utils.data.DataLoader(
            augment.Samples(dataset, transform, self.config.seed),
            batch_sampler=batches,
            num_workers=self.config.workers,
            pin_memory=self.here.device.type == "cuda",
        )
        try:
            yield from loader
        except LowbitError as error:  # one from a worker process has that worker's traceback in its message
            cls = type(error)
            raise cls(str(error).rpartition(f"{cls.__module__}.{cls.__name__}: ")[2].strip()) from None

    def first(self) -> torch.Tensor:
        """The inputs of the whole first global batch, without augmentation, to calibrate quantizers with."""
        indices = order(self.n, self.config.batch_size, self.config.seed, epoch=0)[0]
        if _in_memory(self.data.train):
            return self._ready(self.data.train.x[indices], self.data.train.y[indices])[0]
        loader = self._loader(self.data.train, "none", [[(0, i, 0) for i in indices.tolist()]], in_memory=False)
        return self._ready(*next(loader))[0]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This process's share of each global batch of one epoch, augmented."""
        config, here = self.config, self.here
        indices = order(self.n, config.batch_size, config.seed, epoch, config.repeats)
        mine = slice(here.rank * here.share(config.batch_size), (here.rank + 1) * here.share(config.batch_size))
        if not self.batched:
            copies = (torch.arange(indices.numel()) % config.repeats).view(indices.shape)
            numbered = torch.stack([torch.full_like(indices, epoch), indices, copies], -1)[:, mine]
            places = [[(epoch, index, copy) for epoch, index, copy in row] for row in numbered.tolist()]
            for step, (x, y) in enumerate(self._loader(self.data.train, config.augment, places, self.in_memory)):
                yield self._mixed(*self._ready(x, y), epoch, step)
            return
        shape = tuple(self.x.shape[1:])
        for step, batch in enumerate(indices.to(self.x.device)):
            random = seeds.generator(config.seed, seeds.AUGMENT, epoch, step)
            if config.crops:
                version = torch.randint(config.crops, (config.batch_size,), generator=random)
                yield self.versions(batch[mine], version[mine])
                continue
            drawn = augment.draw(config.augment, config.batch_size, shape, random)
            x = augment.apply(self.x[batch[mine]], {name: values[mine] for name, values in drawn.items()})
            yield self._mixed(*self._ready(x, self.y[batch[mine]]), epoch, step)

    def versions(self, items: torch.Tensor, version: torch.Tensor) -> Batch:
        """The fixed augmented versions (``config.crops``) of training items; both int64 [N].

        With `answers` the labels come as a `Taught`.
        """
        place = items.cpu(), version
        x = augment.apply(self.x[items], {name: values[place] for name, values in self.crops.items()})
        x, y = self._ready(x, self.y[items])
        return x, y if self.answers is None else Taught(y, self.answers[place].to(y.device).float())

    def _mixed(self, x: torch.Tensor, y: torch.Tensor, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        if not (config.mixup or config.cutmix):
            return x, y
        seed = seeds.derive(config.seed, seeds.MIX, epoch, step)
        return augment.mix(x, y, self.data.num_classes, config.mixup, config.cutmix, seed)

    def test(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's share of the test split: every ``count``-th item, in order; none is dropped."""
        size = max(self.here.share(self.config.batch_size), 256 // self.here.count)
        mine = torch.arange(self.here.rank, len(self.data.test), self.here.count)
        if _in_memory(self.data.test):
            for part in mine.split(size):
                part = part.to(self.test_x.device)
                yield self._ready(self.test_x[part], self.test_y[part])
            return
        places = [[(0, index, 0) for index in part.tolist()] for part in mine.split(size)]
        for x, y in self._loader(self.data.test, "none", places, in_memory=False):
            yield self._ready(x, y)
