"""Data sets by name: embedded and generated ones for everyone, real ones from archives or their publishers."""

import importlib
import pkgutil

from lowbit.data.base import ArrayDataset, Card, Data, card, labels, load, names

_PARTS = {"base", "archive", "download", "cli"}
for _info in pkgutil.iter_modules(__path__):  # every other file here holds data sets, which register themselves
    if _info.name not in _PARTS:
        importlib.import_module(f"{__name__}.{_info.name}")

__all__ = ["ArrayDataset", "Card", "Data", "card", "labels", "load", "names"]
