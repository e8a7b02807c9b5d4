"""Data sets by name: embedded and generated ones for everyone, real ones from archives or their publishers.

The names below are loaded on first use, so that the command line starts quickly.
"""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["ArrayDataset", "Card", "Data", "DetectionDataset", "card", "labels", "load", "names"],
        "verify": ["describe", "manifest"],
    },
)

if TYPE_CHECKING:
    from lowbit.data.base import ArrayDataset, Card, Data, DetectionDataset, card, labels, load, names
    from lowbit.data.verify import describe, manifest
