"""How far a packed model agrees with the fake-quantised one it was made of, and why it differs where it does.

Both compute the same function and round differently in the last bits of float32. Each layer's input is then rounded to
whole numbers, which wipes such a difference out, unless the value lies at the border between two of them: then one
activation is a step away, and what follows differs visibly. So equal logits cannot be asked for, but this can: the
first difference in whole numbers, of each image, is one step, of values at a border.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbit.nn.packed import PackedLayer

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def compare(model: nn.Module, packed: nn.Module, x: Tensor) -> "pd.DataFrame":
    """The inputs of the packed layers in both models, layer by layer in order of execution.

    Args:
        model: a quantised model in evaluation mode.
        packed: what `lowbit.pack` made of it (not fused: then inputs are whole numbers already).
        x: its input ``[B, ...]``.

    Returns:
        One row a layer with a calibrated input: ``layer``; ``numbers``, of all images; ``values_differ`` and
        ``steps_differ``, how many of them differ before and after rounding to whole numbers; ``first``, images whose
        first difference in whole numbers is here, and of these ``first_step``, the largest difference (steps), and
        ``from_border``, how far from the border between its two whole numbers a value was at most (steps).
    """
    import pandas as pd

    layers = {n: m for n, m in packed.named_modules() if isinstance(m, PackedLayer) and m.x_scale is not None}
    inputs = zip(_inputs(model, layers, x), _inputs(packed, layers, x), strict=True)
    seen = torch.zeros(len(x), dtype=torch.bool)
    rows = []
    for (name, one), (_, two) in inputs:
        layer = layers[name]
        values = [(v if layer.before is None else v + layer.before) / layer.x_scale for v in (one, two)]
        whole = [torch.clamp(torch.round(v), layer.low, layer.high) for v in values]
        differ = (whole[0] != whole[1]).reshape(len(x), -1)
        new = differ.any(1) & ~seen
        first = differ & new[:, None]
        step, border = (
            (a.reshape(len(x), -1)[first]) for a in ((whole[0] - whole[1]).abs(), (whole[0] + whole[1]) / 2)
        )
        away = (values[0].reshape(len(x), -1)[first] - border).abs()
        rows.append(
            {
                "layer": name,
                "numbers": differ.numel(),
                "values_differ": int((one != two).sum()),
                "steps_differ": int(differ.sum()),
                "first": int(new.sum()),
                "first_step": int(step.max()) if len(step) else 0,
                "from_border": float(away.max()) if len(away) else 0.0,
            }
        )
        seen |= new
    return pd.DataFrame(rows)


def _inputs(model: nn.Module, names: "dict[str, PackedLayer]", x: Tensor) -> list[tuple[str, Tensor]]:
    """What came into the modules of these names, call by call."""
    kept: list[tuple[str, Tensor]] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: kept.append((name, args[0].float())), prepend=True
        )
        for name in names
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return kept
