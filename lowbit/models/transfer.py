"""Transfer: a trained classifier gets a new head and keeps everything else, quantizers and latents included."""

from torch import nn

from lowbit.errors import LowbitError
from lowbit.nn.convert import attach_, quantized_layers


def replace_head_(model: nn.Module, num_classes: int) -> nn.Module:
    """Replaces the last linear layer of ``model`` by a fresh one with ``num_classes`` outputs, in place.

    All other layers keep their parameters; quantized ones keep their latents, so that fine-tuning goes on where
    training stopped and weights stay on their grid. A quantized head is quantized again by the same methods.

    Args:
        model: a classifier, in full precision or quantized, whose last `torch.nn.Linear` is its head.
        num_classes: outputs of the new head, drawn from torch's default initialization.

    Returns:
        The same model; ``model.spec`` follows, so that it can be saved and loaded.

    Raises:
        LowbitError: no linear layer, or fewer than one class.
    """
    if num_classes < 1:
        raise LowbitError(f"num_classes={num_classes} is not allowed; a head has 1 or more outputs")
    heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not heads:
        raise LowbitError(f"{type(model).__name__} has no linear layer: there is no head to replace")
    old = model.get_submodule(heads[-1])
    quantized = {found.name: found for found in quantized_layers(model)}.get(heads[-1])
    new = nn.Linear(old.in_features, num_classes, old.bias is not None).to(next(old.parameters()).device)
    model.set_submodule(heads[-1], new)
    if quantized is not None:
        attach_(new, *(part and part.config for part in (quantized.weight, quantized.activation)))
    if getattr(model, "spec", None):
        model.spec = {**model.spec, "num_classes": num_classes}
    return model
