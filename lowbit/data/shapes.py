"""Shapes to detect in textured images, drawn at load from a seed: a detection set without files."""

import numpy as np
import torch

from lowbit.data.base import Data, DetectionDataset, dataset
from lowbit.errors import DataError

CLASSES = ("circle", "square", "triangle")


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene: uint8 ``[3, size, size]``, boxes ``[n, 4]`` (x1, y1, x2, y2; pixels) and labels ``[n]``, n = 1 ... 5.

    Later shapes cover earlier ones; a shape is not drawn if it overlaps another by more than a fifth of the smaller.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    angle, wave = rng.uniform(0, np.pi), rng.uniform(3, 12)
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / wave)
    image = rng.uniform(60, 190, 3)[:, None, None] + rng.uniform(5, 20) * stripes + rng.normal(0, 6, (3, size, size))
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(1, 6))):
        label, radius = int(rng.integers(3)), rng.uniform(size / 14, size / 6)
        cx, cy = rng.uniform(radius, size - radius, 2)
        box = (cx - radius, cy - radius, cx + radius, cy + radius)
        if any(_overlap(box, other) > 0.2 for other in boxes):
            continue
        if label == 0:
            inside = (x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 <= radius**2
        else:
            inside = (np.abs(x + 0.5 - cx) <= radius) & (np.abs(y + 0.5 - cy) <= radius)
            if label == 2:
                inside &= np.abs(x + 0.5 - cx) <= (y + 0.5 - (cy - radius)) / 2
        background = image[:, inside].mean(1)
        color = rng.uniform(0, 255, 3)
        while np.abs(color - background).max() < 70:  # visible against its background
            color = rng.uniform(0, 255, 3)
        image[:, inside] = color[:, None] + rng.normal(0, 6, (3, int(inside.sum())))
        boxes.append(box)
        labels.append(label)
    return (
        image.clip(0, 255).round().astype(np.uint8),
        np.array(boxes, dtype=np.float32).reshape(-1, 4).clip(0, size),
        np.array(labels, dtype=np.int64),
    )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over the smaller area of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0) * max(height, 0) / smaller


def _scenes(count: int, size: int, seed: int, split: int) -> DetectionDataset:
    scenes = [draw(np.random.default_rng([seed, split, i]), size) for i in range(count)]
    return DetectionDataset(
        torch.from_numpy(np.stack([image for image, _, _ in scenes])),
        tuple(torch.from_numpy(boxes) for _, boxes, _ in scenes),
        tuple(torch.from_numpy(labels) for _, _, labels in scenes),
    )


@dataset(
    "shapes",
    title="circles, squares and triangles on textured ground",
    task="detection",
    kind="generated",
    items="600 + 150 (options)",
    classes=3,
    license="none needed",
    citation="",
    source="generated at load",
    note="options size, n_train, n_test, seed; training and test scenes come from separate random streams",
)
def shapes(size: int = 64, n_train: int = 600, n_test: int = 150, seed: int = 0) -> Data:
    """The scenes, uint8 ``[N, 3, size, size]``; the same ``seed`` gives the same scenes."""
    if size < 32 or n_train < 1 or n_test < 1:
        raise DataError(
            f"shapes: size={size}, n_train={n_train}, n_test={n_test}; allowed are size >= 32, the others >= 1"
        )
    train, test = _scenes(n_train, size, seed, 0), _scenes(n_test, size, seed, 1)
    half = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return Data("shapes", "detection", CLASSES, train, test, (3, size, size), *half)
