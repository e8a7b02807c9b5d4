"""Augmentation: whole batches in memory at once, or one sample at a time for large images.

Random numbers are drawn first (:func:`draw`, from a generator) and applied afterwards (:func:`apply`), so that each of
several processes can draw for the whole batch and apply its own share.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from lowbit.data.base import Split
from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.training import seeds

RANDAUGMENT_LEAST = 64  # pixels; its shears and rotations leave little of smaller images


def reach(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The largest "shift" along each axis: 1/8 of an image's height and width, 1/10 of a sound's length."""
    return (shape[-1] // 10,) if len(shape) == 1 else (shape[-2] // 8, shape[-1] // 8)


def draw(kind: str, n: int, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random numbers for ``n`` items of ``shape``: ``offsets`` int64 [n, axes]; for crop_flip ``flips`` bool [n]."""
    if kind == "none":
        return {}
    offsets = [torch.randint(-far, far + 1, (n,), generator=generator) for far in reach(shape)]
    drawn = {"offsets": torch.stack(offsets, 1)}
    if kind == "crop_flip":
        drawn["flips"] = torch.rand(n, generator=generator) < 0.5
    return drawn


def fixed(kind: str, n: int, crops: int, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random numbers as `draw` gives, ``[n, crops, ...]``: ``crops`` versions of each item, the same for every seed."""
    drawn = draw(kind, n * crops, shape, seeds.generator(0, seeds.CROPS))
    return {name: values.view(n, crops, *values.shape[1:]) for name, values in drawn.items()}


def apply(x: torch.Tensor, drawn: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Apply what :func:`draw` returned to a batch [N,C,H,W] or [N,T]; same shape and dtype."""
    if "offsets" in drawn:
        x = shift(x, drawn["offsets"].to(x.device))
    if "flips" in drawn:
        x = flip(x, drawn["flips"].to(x.device))
    return x


def shift(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Move each item by its own ``offsets`` (rows down and columns right, or samples later); zeros fill the gap.

    x: [N,C,H,W] with offsets [N,2], or [N,T] with offsets [N,1]; any dtype.
    """
    axes = range(x.ndim - offsets.shape[1], x.ndim)
    for column, axis in enumerate(axes):
        size = x.shape[axis]
        source = torch.arange(size, device=x.device) - offsets[:, column, None]  # [N, size]
        inside = (source >= 0) & (source < size)
        form = [x.shape[0]] + [1] * (x.ndim - 1)
        form[axis] = size
        moved = x.gather(axis, source.clamp(0, size - 1).view(form).expand(x.shape))
        x = torch.where(inside.view(form), moved, moved.new_zeros(()))
    return x


def flip(x: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Mirror left-right the images of [N,C,H,W] for which ``flips`` [N] is true."""
    return torch.where(flips.view(-1, 1, 1, 1), x.flip(-1), x)


def mix(
    x: torch.Tensor, y: torch.Tensor, classes: int, mixup: float, cutmix: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each item of a batch with the item at the mirrored position: the first with the last, and so on.

    Mixup (Zhang et al., arXiv 1710.09412) blends them, λ·x + (1-λ)·x'; CutMix (Yun et al., arXiv 1905.04899) pastes a
    rectangle of x' that covers 1-λ of the image. One λ ~ Beta(α, α) is drawn for the batch. With both methods on, a
    coin flip chooses one of them.

    Args:
        x: float [N,C,H,W], normalized.
        y: labels int64 [N].
        classes: the number of classes, K.
        mixup, cutmix: α of each method; 0 turns it off, and one of them is above 0.
        seed: random seed of λ, the rectangle and the choice.

    Returns:
        The mixed images, and the label probabilities float32 [N,K].
    """
    random = np.random.default_rng(seed)
    cut = cutmix > 0 and (mixup == 0 or random.random() < 0.5)
    share = random.beta(cutmix, cutmix) if cut else random.beta(mixup, mixup)
    if cut:
        height, width = x.shape[-2:]
        side = (1 - share) ** 0.5
        middle = random.integers(height), random.integers(width)
        ends = [
            [int(np.clip(c + sign * round(side * size / 2), 0, size)) for sign in (-1, 1)]
            for c, size in zip(middle, (height, width), strict=True)
        ]
        (top, bottom), (left, right) = ends
        mixed = x.clone()
        mixed[..., top:bottom, left:right] = x.flip(0)[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = share * x + (1 - share) * x.flip(0)
    labels = torch.nn.functional.one_hot(y, classes).float()
    return mixed, share * labels + (1 - share) * labels.flip(0)


class Erase:
    """Random erasing (Zhong et al., arXiv 1708.04896): with probability p a rectangle becomes Gaussian noise.

    Takes and returns uint8 [C,H,W]; the noise has about the mean and deviation of photographs.
    """

    def __init__(self, p: float):
        with extra("data", "random erasing"):
            from torchvision.transforms import v2

        self.choose = v2.RandomErasing(p=p)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The image, perhaps with a rectangle of noise."""
        keep = self.choose(torch.ones(1, *x.shape[-2:]))
        noise = (120 + 58 * torch.randn(x.shape)).clamp_(0, 255).to(torch.uint8)
        return torch.where(keep.bool(), x, noise)


def check(kind: str, shape: tuple[int, ...], in_memory: bool) -> None:
    """Refuse an augmentation that does not fit items of ``shape`` ((C,H,W) or (T,))."""
    if len(shape) == 1 and kind not in ("none", "shift"):
        raise LowbitError(f"augment={kind!r} is for images; allowed for sounds: none, shift")
    if kind == "deit" and in_memory:
        raise LowbitError("augment='deit' is for image folders; for sets held in memory use crop_flip or randaugment")
    if kind == "randaugment" and min(shape[-2:]) < RANDAUGMENT_LEAST:
        raise LowbitError(
            f"augment='randaugment' needs images of at least {RANDAUGMENT_LEAST}×{RANDAUGMENT_LEAST} pixels, these are "
            f"{shape[-2]}×{shape[-1]}; use 'crop_flip' for photographs or 'shift' for characters"
        )
    if kind == "shift" and not in_memory:
        raise LowbitError(
            "augment='shift' is for sets held in memory; for image folders use none, crop_flip, randaugment, deit"
        )


def sample_transform(kind: str, shape: tuple[int, ...], in_memory: bool) -> Callable[[Any], torch.Tensor]:
    """A torchvision transform of one item (PIL image or uint8 [C,H,W]) to uint8 [C,H,W] of ``shape``.

    Images in a folder differ in size: training takes a random-resized crop and a flip, ``kind="none"`` a resize and a
    center crop. Images in memory have the right size: training takes a padded random crop and a flip.
    """
    with extra("data", "augmenting images"):
        from torchvision.transforms import v2

    channels, height, width = shape
    size = [height, width]
    steps: list[Any] = [] if in_memory else [v2.RGB() if channels == 3 else v2.Grayscale(channels)]
    if kind == "none" and not in_memory:
        steps += [v2.Resize(round(min(size) * 256 / 224), antialias=True), v2.CenterCrop(size)]
    elif kind != "none":
        crop = (
            v2.RandomCrop(size, padding=min(size) // 8)
            if in_memory
            else v2.RandomResizedCrop(
                size, interpolation=v2.InterpolationMode.BICUBIC if kind == "deit" else v2.InterpolationMode.BILINEAR
            )
        )
        steps += [crop, v2.RandomHorizontalFlip()]
    if kind == "randaugment":
        steps.append(v2.RandAugment(num_ops=2, magnitude=9))
    if kind == "deit":
        with extra("models", "augment='deit'"):
            from timm.data.auto_augment import rand_augment_transform

        shifts = {"translate_const": int(0.45 * min(size)), "img_mean": (124, 116, 104)}
        steps.append(rand_augment_transform("rand-m9-mstd0.5-inc1", shifts))
    last = [Erase(0.25)] if kind == "deit" else []
    return v2.Compose([*steps, v2.ToImage(), v2.ToPureTensor(), *last])


class Samples(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """A data set under a random transform, indexed by ``(epoch, index[, copy])``.

    A sample depends on the seed and this index only, not on the number of workers or on earlier samples.
    """

    def __init__(self, dataset: Split, transform: Callable[[Any], torch.Tensor], seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, ...]) -> tuple[torch.Tensor, int]:
        epoch, index, *copy = place
        item, label = self.dataset[index]
        with seeds.preserved():  # timm's transforms draw from Python's and NumPy's generators
            seeds.set_all(seeds.derive(self.seed, seeds.SAMPLE, epoch, index, *copy))
            return self.transform(item), int(label)
