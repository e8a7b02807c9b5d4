"""Data sets by name: embedded and generated ones for everyone, real ones from archives or their publishers.

The names below are loaded on first use, so that the command line starts quickly.
"""

import importlib
from typing import TYPE_CHECKING

_EXPORTS = {
    "ArrayDataset": "base",
    "Card": "base",
    "Data": "base",
    "DetectionDataset": "base",
    "card": "base",
    "describe": "verify",
    "labels": "base",
    "load": "base",
    "manifest": "verify",
    "names": "base",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from lowbit.data.base import ArrayDataset, Card, Data, DetectionDataset, card, labels, load, names
    from lowbit.data.verify import describe, manifest


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lowbit.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
