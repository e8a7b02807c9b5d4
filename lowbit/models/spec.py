"""Checks of a saved model's description, made before anything is built from it.

A saved model names the arguments of `lowbit.models.create`. Constructors of other libraries also take arguments that
open files or fetch weights (``checkpoint_path``, ``pretrained_cfg``, ``weights``, a name such as ``hf-hub:...``). So a
file may name only the arguments listed here, within these bounds. `lowbit.save` refuses whatever `lowbit.load` would.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from lowbit.errors import CheckpointError, LowbitError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
LARGEST = 65_536
COUNTS = {
    "num_classes", "in_chans", "img_size", "sample_rate", "depth", "depths", "embed_dim", "embed_dims", "num_heads",
    "patch_size", "window_size", "reg_tokens", "width", "blocks", "layers", "base_width", "cardinality", "stem_width",
    "n_mels", "freq_mask", "time_mask", "stages", "channels", "head_convs", "min_size", "max_size",
    "detections_per_img",
}  # fmt: skip
"""Integers from 0 to `LARGEST`, or short lists of them, or None."""
FLAGS = {
    "class_token", "no_embed_class", "pre_norm", "qkv_bias", "qk_norm", "distilled", "dynamic_img_size",
    "zero_init_last", "avg_down", "stem_pool", "frozen_batchnorm",
}  # fmt: skip
"""True, False or None."""
NUMBERS = {
    "mlp_ratio", "init_values", "drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate",
    "patch_drop_rate", "width_mult", "dropout", "top_db", "anchor_size", "score_thresh", "nms_thresh",
}  # fmt: skip
"""Finite numbers from 0 to 1024, or None."""
WORDS = {
    "global_pool": ("", "avg", "max", "avgmax", "catavgmax", "fast", "token", "map"),
    "head": ("fcos", "retinanet"),
}
"""The words allowed for each argument."""
SLACK, GROWTH = 64 * 2**20, 64
"""A model may need ``SLACK + GROWTH · (bytes of its file)`` bytes: 2-bit weights, packed, grow sixteenfold."""


def check(spec: Any, error: Callable[[str], LowbitError] = CheckpointError) -> None:
    """Refuse a description of a model that holds anything but known arguments with bounded values.

    Args:
        spec: the description, as `lowbit.models.create` records it in ``model.spec``.
        error: builds the exception from its message.

    Raises:
        LowbitError: the exception that ``error`` builds; its message names the entry.
    """
    if not isinstance(spec, dict):
        raise error(f"the description of a model should be a mapping, not {spec!r:.80}")
    name = spec.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise error(f"the model's name {name!r:.80} is not allowed: letters, digits, '_', '-' and '.' are")
    for key, value in spec.items():
        if key == "backbone" and name == "detector":
            check(value, error)
        elif key != "name" and not _allowed(key, value):
            raise error(
                f"the model's option {key}={value!r:.80} is not allowed in a file; sizes, switches and numbers that "
                "only shape the network are (lowbit/models/spec.py lists them)"
            )


def _allowed(key: str, value: Any) -> bool:
    if key in WORDS:
        return value in WORDS[key]
    if key not in COUNTS | FLAGS | NUMBERS:
        return False
    if value is None:
        return True
    if key in FLAGS:
        return isinstance(value, bool)
    if key in NUMBERS:
        return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 1024
    values = value if isinstance(value, list | tuple) else [value]
    return len(values) <= 16 and all(type(size) is int and 0 <= size <= LARGEST for size in values)


def note_(model: nn.Module, **facts: Any) -> None:
    """Set plain attributes of ``model``, such as ``spec``; torch's types declare only tensors and modules."""
    for name, value in facts.items():
        setattr(model, name, value)


def check_size(create: Callable[[], nn.Module], name: str, file_bytes: int) -> None:
    """Refuse a model far larger than the file that describes it, before memory is allocated for it.

    Args:
        create: builds the model; called with torch's device "meta", where tensors have no memory. A model that cannot
            be built there is not checked.
        name: the model's name, for the message.
        file_bytes: size of the file.

    Raises:
        CheckpointError: the model needs more than ``SLACK + GROWTH · file_bytes`` bytes.
    """
    import torch

    try:
        with torch.device("meta"):
            model = create()
    except RuntimeError:  # a constructor that reads a value of a tensor
        return
    needed = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    if needed > SLACK + GROWTH * file_bytes:
        raise CheckpointError(
            f"the file has {file_bytes:,} bytes but describes a model {name!r} of {needed:,}: it does not hold its "
            "weights"
        )
