"""How far a packed model agrees with the fake-quantized one it was made of, and why it differs where it does.

Both compute the same function and round differently in the last bits of float32. Each layer's input is then rounded to
integers, which wipes such a difference out, unless the value lies at the border between two of them: then one
activation is a step away, and what follows differs visibly. So equal logits cannot be asked for, but this can: the
first difference in integers, of each image, is one step, of values at a border.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbit.extras import extra
from lowbit.nn.packed import PackedLayer
from lowbit.quantizers.base import ActivationQuantizer, IntegerForm

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def compare(model: nn.Module, packed: nn.Module, x: Tensor) -> "pd.DataFrame":
    """What is rounded to integers in both models, in order of execution.

    That is the inputs of packed layers, and whatever else has a quantizer of its own (queries, keys, ...).

    Args:
        model: a quantized model in evaluation mode.
        packed: what `lowbit.pack` made of it (not fused: then inputs are integers already).
        x: its input ``[B, ...]``.

    Returns:
        One row a layer or quantizer: ``layer``; ``numbers``, of all images; ``values_differ`` and
        ``steps_differ``, how many of them differ before and after rounding to integers; ``first``, images whose
        first difference in integers is here, and of these ``first_step``, the largest difference (steps), and
        ``from_border``, how far from the border between its two integers a value was at most (steps).
    """
    with extra("train", "the table of differences"):
        import pandas as pd

    forms = {name: form for name, module in packed.named_modules() if (form := _form(module)) is not None}
    inputs = zip(_inputs(model, forms, x), _inputs(packed, forms, x), strict=True)
    seen = torch.zeros(len(x), dtype=torch.bool)
    rows = []
    for (name, one), (_, two) in inputs:
        form = forms[name]
        values = [(v if form.before is None else v + form.before) / form.scale for v in (one, two)]
        whole = [torch.clamp(torch.round(v), form.low, form.high) for v in values]
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


def _form(module: nn.Module) -> IntegerForm | None:
    """How the module rounds its input; None if it does not, or by a scale that follows from the input."""
    if isinstance(module, ActivationQuantizer):
        return module.integer()
    if isinstance(module, PackedLayer) and module.x_scale is not None:
        return IntegerForm(module.x_scale, module.low, module.high, module.before)
    return None


def _inputs(model: nn.Module, names: Iterable[str], x: Tensor) -> list[tuple[str, Tensor]]:
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
