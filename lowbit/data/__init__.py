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

if TYPE_CHECKING:  # importing a name as itself exports it to type checkers
    from lowbit.data.base import ArrayDataset as ArrayDataset
    from lowbit.data.base import Card as Card
    from lowbit.data.base import Data as Data
    from lowbit.data.base import DetectionDataset as DetectionDataset
    from lowbit.data.base import card as card
    from lowbit.data.base import labels as labels
    from lowbit.data.base import load as load
    from lowbit.data.base import names as names
    from lowbit.data.verify import describe as describe
    from lowbit.data.verify import manifest as manifest
