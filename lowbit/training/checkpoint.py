"""Checkpoints: written atomically, and read without executing anything in them."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import CheckpointError, LowbitError
from lowbit.files import write_atomically

SCHEMA = 1
KIND = "lowbit training checkpoint"
KEYS = {"kind", "schema", "config", "identity", "epoch", "model", "optimizer", "rng", "callbacks", "history"}
PLAIN = (str, int, float, bool, type(None), torch.Tensor)


def save(path: Path, **contents: Any) -> None:
    """Write a checkpoint of this schema atomically; ``contents`` are the other entries of ``KEYS``.

    Raises:
        StorageError: the disk is full or the folder cannot be written to; an earlier checkpoint stays intact.
    """
    contents = {"kind": KIND, "schema": SCHEMA, **contents}
    if set(contents) != KEYS:
        raise TypeError(f"a checkpoint holds {sorted(KEYS)}, not {sorted(contents)}")
    write_atomically(path, lambda file: torch.save(contents, file))


def read(path: Path, advice: str) -> Any:
    """Read what torch.save wrote onto the CPU, without executing anything in it.

    Raises:
        CheckpointError: the file is truncated, damaged or of another kind; the message ends with ``advice``.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums that torch.save wrote
            if (damaged := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path} is truncated, damaged or no checkpoint ({reason}); {advice}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, or raise a :class:`~lowbit.errors.CheckpointError` that says what to do."""
    advice = f"delete {path} or start afresh (--fresh, or fresh=True)"
    contents = read(path, advice)
    if not isinstance(contents, dict) or contents.get("kind") != KIND:
        raise CheckpointError(f"{path} was not written by lowbit's training; {advice}")
    if contents["schema"] != SCHEMA:
        raise CheckpointError(f"{path} has schema {contents['schema']}, this lowbit reads {SCHEMA}; {advice}")
    if set(contents) != KEYS:
        raise CheckpointError(f"{path} should hold {sorted(KEYS)}, but holds {sorted(contents)}; {advice}")
    return contents


def require_plain(value: Any, where: str) -> Any:
    """Return ``value`` if a checkpoint can hold it and is still safe to read: tensors and plain values, nested.

    Args:
        value: the value to check.
        where: the name of the value; begins the message.

    Raises:
        LowbitError: ``value`` holds anything else.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            require_plain(part, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            require_plain(part, f"{where}[{index}]")
    elif type(value) not in PLAIN and not isinstance(value, torch.Tensor):
        raise LowbitError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings and None")
    return value


def load_model(model: torch.nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """``model.load_state_dict(state)``, with a mismatch raised as a :class:`~lowbit.errors.CheckpointError`."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = [line.strip() for line in str(error).splitlines()[1:3]]
        raise CheckpointError(
            f"{path} was written for another model ({' '.join(first)}); use the model it was written for, "
            "another out folder, or start afresh (--fresh, or fresh=True)"
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load ``state``, in which a quantizer's step may have been saved with additional dims of size 1."""
    optimizer.load_state_dict(state)
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and value.ndim > parameter.ndim and value.numel() == parameter.numel():
                held[name] = value.reshape(parameter.shape)
