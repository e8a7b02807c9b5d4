"""The structure of a packed model as plain data, and a model of its own code given that structure: for files."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LowbitError
from lowbit.nn.calls import computes_as, replace_
from lowbit.nn.convert import QUANTIZABLE
from lowbit.nn.deploy import GEOMETRY, HOOKS, KINDS, OF_TORCH, drop_quantizer_, is_only_quantized
from lowbit.nn.folding import FOLDED, is_foldable, note_folded_, without_norm
from lowbit.nn.packed import PackedLayer, is_stored, store_


def description(model: nn.Module) -> dict[str, Any] | None:
    """The structure of a packed model, which `lowbit.save` stores as JSON; None if the model is not packed."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
    stored = [name for name, layer in model.named_modules() if is_stored(layer)]
    if not layers and not stored:
        return None
    return {
        "layers": {name: {"kind": KINDS[type(layer)]} | layer.settings() for name, layer in layers.items()},
        "stored": stored,
        "folded": [
            f"{name}.{norm}" if name else norm
            for name, module in model.named_modules()
            if isinstance(folded := module.__dict__.get(FOLDED), list)
            for norm in folded
        ],
    }


def restore_(model: nn.Module, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Replace layers of a model in full precision by the packed layers of a `description`, as far as they fit.

    Args:
        model: the model, changed in place.
        described: a `description` that `lowbit.container.PackedEntry` has checked.
        tensors: all tensors of the file.

    Returns:
        One text for each layer that does not fit; if there are any, the model must be discarded.
    """
    wrong = []
    packed: dict[str, dict[str, Any]] = described["layers"]
    steps: list[tuple[str, Callable[[nn.Module, Mapping[str, Tensor]], None]]] = [
        *((name, partial(_restore_packed_, model, settings)) for name, settings in packed.items()),
        *((name, _restore_stored_) for name in described["stored"]),
        *((name, partial(_restore_folded_, model)) for name in described["folded"]),
    ]
    for name, restore in steps:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            wrong.append(f"there is no layer {name!r}")
            continue
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        try:
            restore(layer, own)
        except LowbitError as error:
            wrong.append(f"{name!r}: {error}")
    note_folded_(model, described["folded"])
    return wrong


def _restore_packed_(
    model: nn.Module, settings: Mapping[str, Any], layer: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    kind = OF_TORCH[settings["kind"]]
    if not isinstance(layer, kind) or not computes_as(layer, kind, HOOKS) or not is_only_quantized(layer):
        raise LowbitError(
            f"it is a {type(layer).__name__}; a packed layer takes the place of a plain nn.{kind.__name__}"
        )
    geometry = {name: list(settings.get(name) or ()) for name in GEOMETRY}
    has = {name: list(getattr(layer, name, ())) for name in GEOMETRY}
    if settings["shape"] != list(layer.weight.shape) or geometry != has:
        raise LowbitError(
            f"its weight is {list(layer.weight.shape)}, {has}; in the file it is {settings['shape']}, {geometry}"
        )
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise LowbitError("a packed convolution has groups=1 and padding_mode='zeros'")
    packed_kind = {word: cls for cls, word in KINDS.items()}[settings["kind"]]
    packed = packed_kind.restore(settings, tensors, layer.weight.dtype)
    replace_(model, layer, packed.to(layer.weight.device))


def _restore_stored_(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if not isinstance(layer, QUANTIZABLE) or not is_only_quantized(layer):
        kinds = ", ".join(f"nn.{cls.__name__}" for cls in QUANTIZABLE)
        raise LowbitError(f"it is a {type(layer).__name__}; stored codes take the place of the weight of a {kinds}")
    missing = [name for name in ("codes", "levels", "row_scale") if name not in tensors]
    if missing:
        raise LowbitError(f"stored codes need {', '.join(missing)}")
    codes, levels, scale = (tensors[name] for name in ("codes", "levels", "row_scale"))
    if codes.dtype != torch.uint8 or codes.shape != layer.weight.shape:
        raise LowbitError(
            f"its weight is {list(layer.weight.shape)}, in the file it has codes {codes.dtype} {list(codes.shape)}"
        )
    fits = scale.ndim <= codes.ndim and all(
        size in (1, whole) for size, whole in zip(reversed(scale.shape), reversed(codes.shape), strict=False)
    )
    floats = levels.is_floating_point() and scale.is_floating_point()
    if not floats or levels.ndim != 1 or not fits or (codes.numel() and int(codes.max()) >= len(levels)):
        raise LowbitError(
            f"its codes, levels {levels.dtype} {list(levels.shape)} and row_scale {scale.dtype} {list(scale.shape)} do "
            "not belong together"
        )
    device, dtype = layer.weight.device, layer.weight.dtype
    if parametrize.is_parametrized(layer):  # the layers of query-key reparameterization are quantized from the start
        drop_quantizer_(layer)
    store_(layer, codes.to(device), levels.to(device), scale.to(device), dtype)


def _restore_folded_(model: nn.Module, norm: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if not is_foldable(norm):
        raise LowbitError(f"it is a {type(norm).__name__}; only an nn.BatchNorm2d can be folded")
    replace_(model, norm, without_norm(norm))
