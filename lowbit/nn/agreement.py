"""A comparison of a packed model with its fake-quantized source: how far they agree, and why they differ.

Both compute the same function but round differently in the last bits of float32. Each layer then rounds its input to
integers. That removes such a difference, unless the value lies at the border between two integers: then an activation
differs by one step, and later layers differ visibly. So equal logits cannot be expected, but this can: in each image,
the first difference between integers is a single step, of a value at a border.
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
    """Compare the values that both models round to integers, in order of execution.

    These are the inputs of packed layers and of all other activation quantizers (queries, keys, ...).

    Args:
        model: a quantized model in evaluation mode.
        packed: the result of `lowbit.pack` for it; not fused, since inputs of fused layers are integers already.
        x: an input batch ``[B, ...]`` of both.

    Returns:
        One row for each layer or quantizer, with the columns ``layer`` (its name); ``numbers`` (values in all images);
        ``values_differ`` and ``steps_differ`` (how many values differ before and after rounding to integers);
        ``first`` (images whose first difference between integers is in this layer); and, for those first differences,
        ``first_step`` (the largest one, in steps) and ``from_border`` (the largest distance of a value from the border
        between its two integers, in steps).
    """
    with extra("train", "the table of differences"):
        import pandas as pd

    forms = {name: form for name, module in packed.named_modules() if (form := _form(module)) is not None}
    inputs = zip(_inputs(model, forms, x), _inputs(packed, forms, x), strict=True)
    seen = torch.zeros(len(x), dtype=torch.bool)
    rows = []
    for (name, fake), (_, real) in inputs:
        form = forms[name]
        values = [(v if form.before is None else v + form.before) / form.scale for v in (fake, real)]
        integers = [torch.clamp(torch.round(v), form.low, form.high) for v in values]
        differ = (integers[0] != integers[1]).reshape(len(x), -1)
        new = differ.any(1) & ~seen
        first = differ & new[:, None]
        step, border = (
            (a.reshape(len(x), -1)[first]) for a in ((integers[0] - integers[1]).abs(), (integers[0] + integers[1]) / 2)
        )
        away = (values[0].reshape(len(x), -1)[first] - border).abs()
        rows.append(
            {
                "layer": name,
                "numbers": differ.numel(),
                "values_differ": int((fake != real).sum()),
                "steps_differ": int(differ.sum()),
                "first": int(new.sum()),
                "first_step": int(step.max()) if len(step) else 0,
                "from_border": float(away.max()) if len(away) else 0.0,
            }
        )
        seen |= new
    return pd.DataFrame(rows)


def _form(module: nn.Module) -> IntegerForm | None:
    """The rounding of the module's input; None if there is none, or if its scale is computed from the input."""
    if isinstance(module, ActivationQuantizer):
        return module.integer()
    if isinstance(module, PackedLayer) and module.x_scale is not None:
        return IntegerForm(module.x_scale, module.low, module.high, module.before)
    return None


def _inputs(model: nn.Module, names: Iterable[str], x: Tensor) -> list[tuple[str, Tensor]]:
    """The inputs of the modules of these names, with the name, one entry for each call."""
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
