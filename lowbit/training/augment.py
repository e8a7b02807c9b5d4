"""Augmentation: whole batches in memory at once, or one sample at a time for large images.

What is random is drawn first (:func:`draw`, from a generator) and applied afterwards (:func:`apply`), so that
several processes can draw for the whole batch and each apply its own share.
"""

from typing import Any

import torch

from lowbit.errors import LowbitError
from lowbit.training import seeds

RANDAUGMENT_LEAST = 64  # pixels; below, its shears and rotations leave little of a picture


def reach(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How far "shift" moves along each axis: 1/8 of an image's height and width, 1/10 of a sound's length."""
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


def apply(x: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
    """Apply what :func:`draw` returned to a batch [N,C,H,W] or [N,T]; same shape and dtype."""
    if "offsets" in drawn:
        x = shift(x, drawn["offsets"].to(x.device))
    if "flips" in drawn:
        x = flip(x, drawn["flips"].to(x.device))
    return x


def shift(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Move each item by its own ``offsets`` (rows down and columns right, or samples later); zeros come in.

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


def check(kind: str, shape: tuple[int, ...], in_memory: bool) -> None:
    """Refuse an augmentation that does not fit items of ``shape`` ((C,H,W) or (T,))."""
    if len(shape) == 1 and kind not in ("none", "shift"):
        raise LowbitError(f"augment={kind!r} is for images; allowed for sounds: none, shift")
    if kind == "randaugment" and min(shape[-2:]) < RANDAUGMENT_LEAST:
        raise LowbitError(
            f"augment='randaugment' needs images of at least {RANDAUGMENT_LEAST}×{RANDAUGMENT_LEAST} pixels, these are "
            f"{shape[-2]}×{shape[-1]}; use 'crop_flip' for photographs or 'shift' for characters"
        )
    if kind == "shift" and not in_memory:
        raise LowbitError(
            "augment='shift' is for sets held in memory; for image folders use none, crop_flip, randaugment"
        )


def sample_transform(kind: str, shape: tuple[int, ...], in_memory: bool) -> Any:
    """A torchvision transform of one item (PIL image or uint8 [C,H,W]) to uint8 [C,H,W] of ``shape``.

    Images of a folder come in all sizes: random-resized crop and flip in training, resize and centre crop with
    ``kind="none"``. Images in memory have their size already: padded random crop and flip.
    """
    from torchvision.transforms import v2

    channels, height, width = shape
    size = [height, width]
    steps: list[Any] = [] if in_memory else [v2.RGB() if channels == 3 else v2.Grayscale(channels)]
    if kind == "none" and not in_memory:
        steps += [v2.Resize(round(min(size) * 256 / 224), antialias=True), v2.CenterCrop(size)]
    elif kind != "none":
        crop = v2.RandomCrop(size, padding=min(size) // 8) if in_memory else v2.RandomResizedCrop(size, antialias=True)
        steps += [crop, v2.RandomHorizontalFlip()]
    if kind == "randaugment":
        steps.append(v2.RandAugment(num_ops=2, magnitude=9))
    return v2.Compose([*steps, v2.ToImage(), v2.ToPureTensor()])


class Samples(torch.utils.data.Dataset):
    """A dataset seen through a transform, asked for ``(epoch, index)``: what a sample looks like depends on the seed
    and these two only, never on the number of workers or on what came before."""

    def __init__(self, dataset: torch.utils.data.Dataset, transform: Any, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = place
        item, label = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(self.seed, seeds.SAMPLE, epoch, index))
            return self.transform(item), int(label)
