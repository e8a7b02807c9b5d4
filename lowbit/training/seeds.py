"""Random seeds, derived from their purpose, and the state of the global generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

ORDER, AUGMENT, SAMPLE, MODEL, MIX, CROPS = range(6)  # streams, so that no two uses share numbers


def derive(seed: int, stream: int, *place: int) -> int:
    """A 63-bit seed for one use (``stream``) at one place (epoch, step, sample, rank): a pure function of both."""
    return int(np.random.SeedSequence([seed, stream, *place]).generate_state(1, np.uint64)[0]) >> 1  # numpy 1.26 too


def generator(seed: int, stream: int, *place: int) -> torch.Generator:
    """A CPU generator seeded by :func:`derive`, so that CPU and GPU runs draw the same numbers."""
    return torch.Generator().manual_seed(derive(seed, stream, *place))


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python's, NumPy's and torch's global generators (what dropout and user code draw from)."""
    set_all(derive(seed, MODEL, rank))


def set_all(value: int) -> None:
    """Seed all three with ``value`` itself."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def get_state() -> dict[str, Any]:
    """The state of all global generators, in types that ``torch.load(weights_only=True)`` accepts."""
    numpy = np.random.get_state(legacy=False)
    keys, position = torch.from_numpy(numpy["state"]["key"].astype(np.int64)), int(numpy["state"]["pos"])
    return {
        "python": random.getstate(),
        "numpy": (str(numpy["bit_generator"]), keys, position, int(numpy["has_gauss"]), float(numpy["gauss"])),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_state(state: dict[str, Any]) -> None:
    """Put back what :func:`get_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the caller's global generators as they were, whatever happens inside."""
    state = get_state()
    try:
        yield
    finally:
        set_state(state)
