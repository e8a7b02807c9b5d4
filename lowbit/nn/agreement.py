"""A comparison of a packed model with its fake-quantized source: how far they agree, and why they differ.

Both compute the same function but round differently in the last bits of float32. Each layer then rounds its input to
integers. That removes such a difference, unless the value lies at the border between two integers: then an activation
differs by one step, and later layers differ visibly. So equal logits cannot be expected, but this can: in each image,
the first difference between integers is a single step, of a value at a border.
"""

from collections.abc import Iterable, Mapping
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
    forms = {name: form for name, module in packed.named_modules() if (form := _form(module)) is not None}
    inputs = zip(_inputs(model, forms, x), _inputs(packed, forms, x), strict=True)
    return _table(
        (name, forms[name], fake, _integers(forms[name], real), int((fake != real).sum()))
        for (name, fake), (_, real) in inputs
    )


@torch.no_grad()
def compare_integers(packed: nn.Module, integers: Mapping[str, Tensor], x: Tensor) -> "pd.DataFrame":
    """Compare the integers of a packed model with those that another engine computes for the same batch.

    Args:
        packed: the result of `lowbit.pack`; each of its layers is called once.
        integers: the engine's integers, by name of the packed layer or quantizer that they enter.
        x: the input batch ``[B, ...]`` of both.

    Returns:
        The table of `compare` for these names without ``values_differ``, and ``step``, the smallest step of a rounding.
    """
    forms = {name: form for name in integers if (form := _form(packed.get_submodule(name))) is not None}
    inputs = _inputs(packed, forms, x)
    table = _table((name, forms[name], value, integers[name], 0) for name, value in inputs)
    table["step"] = [float(forms[name].scale.min()) for name in table.layer]
    return table.drop(columns="values_differ")


def _integers(form: IntegerForm, x: Tensor) -> Tensor:
    return torch.clamp(torch.round(_in_steps(form, x)), form.low, form.high)


def _in_steps(form: IntegerForm, x: Tensor) -> Tensor:
    return (x if form.before is None else x + form.before) / form.scale


def _table(pairs: Iterable[tuple[str, IntegerForm, Tensor, Tensor, int]]) -> "pd.DataFrame":
    """The table of `compare` from each rounding's name, form, input, other integers, and ``values_differ``."""
    with extra("train", "the table of differences"):
        import pandas as pd

    seen = torch.zeros(0, dtype=torch.bool)
    rows = []
    for name, form, value, others, values_differ in pairs:
        images = len(value)
        seen = seen if len(seen) else torch.zeros(images, dtype=torch.bool)
        steps, own = _in_steps(form, value), _integers(form, value)
        differ = (own != others).reshape(images, -1)
        new = differ.any(1) & ~seen
        first = differ & new[:, None]
        step, border = ((a.reshape(images, -1)[first]) for a in ((own - others).abs(), (own + others) / 2))
        away = (steps.reshape(images, -1)[first] - border).abs()
        rows.append(
            {
                "layer": name,
                "numbers": differ.numel(),
                "values_differ": values_differ,
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
