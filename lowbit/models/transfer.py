"""Transfer: give a trained classifier a new head and keep everything else, quantizers and latents included."""

from torch import nn

from lowbit.errors import LowbitError
from lowbit.models.spec import note_
from lowbit.nn.convert import attach_, method_of, quantized_layers


def replace_head_(model: nn.Module, num_classes: int) -> nn.Module:
    """Replace the last linear layer of ``model`` by a new one with ``num_classes`` outputs, in place.

    All other layers keep their parameters. Quantized layers keep their latents, so fine-tuning continues where training
    stopped and weights stay on their grid. A quantized head is quantized again by the same methods.

    Args:
        model: a classifier, in full precision or quantized, whose last `torch.nn.Linear` is its head.
        num_classes: number of outputs of the new head, which gets torch's default initialization.

    Returns:
        The same model; ``model.spec`` is updated, so that it can be saved and loaded.

    Raises:
        LowbitError: the model has no linear layer, or ``num_classes`` is below 1.
    """
    if num_classes < 1:
        raise LowbitError(f"num_classes={num_classes} is not allowed; a head has 1 or more outputs")
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise LowbitError(f"{type(model).__name__} has no linear layer: there is no head to replace")
    name, old = linear[-1]
    quantized = {layer.name: layer for layer in quantized_layers(model)}.get(name)
    new = nn.Linear(old.in_features, num_classes, old.bias is not None).to(next(old.parameters()).device)
    model.set_submodule(name, new)
    if quantized is not None:
        attach_(new, method_of(quantized.weight), method_of(quantized.activation))
    if spec := getattr(model, "spec", None):
        note_(model, spec={**spec, "num_classes": num_classes})
    return model
