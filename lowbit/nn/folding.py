"""BatchNorm folded into packed layers: which one follows a convolution alone, and how its gain and shift go in."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit.nn.calls import call, computes_as, replace_
from lowbit.nn.packed import PackedLayer

FOLDED = "folded"  # the attribute of a packed model that names the BatchNorm layers folded into others
# Types of results that do not depend on the values in a tensor: shape, dtype, ...
_FACTS = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout)


def following_norms(model: nn.Module, example: Any) -> dict[str, str]:
    """Names of convolutions, each with the BatchNorm that alone takes its outputs, found by running ``example``."""
    outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # of convolutions; kept alive, so that ids stay unique
    takers: dict[int, list[nn.Module]] = {}
    sources: dict[nn.Module, set[nn.Module | None]] = {}  # of a BatchNorm; None is anything but a convolution
    inside: list[nn.Module] = []  # the BatchNorms that are running
    elsewhere: set[int] = set()  # outputs that anything else reads or changes

    def outputs_in(tree: Any) -> set[int]:
        return {id(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and id(leaf) in outputs}

    class Uses(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            used: set[int] = set() if inside else outputs_in((args, kwargs))
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, _FACTS):
                elsewhere.update(used)
            return result

    class Operators(TorchDispatchMode):  # `Uses` does not see scripted functions; the operators they call arrive here
        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            elsewhere.update(set() if inside else outputs_in((args, kwargs)))
            return func(*args, **(kwargs or {}))

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken = outputs_in((args, kwargs))
        for key in taken:
            takers.setdefault(key, []).append(module)
        if isinstance(module, nn.BatchNorm2d):
            sources.setdefault(module, set()).update({outputs[key][1] for key in taken} or {None})
            inside.append(module)

    def leaves(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(output, Tensor):
            outputs[id(output)] = (output, module)
        if inside and inside[-1] is module:
            inside.pop()

    hooks = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; `Operators` sees what it does
            continue
        hooks.append(module.register_forward_hook(leaves))
        hooks.append(module.register_forward_pre_hook(enters, with_kwargs=True))
    try:
        with torch.no_grad(), Uses(), Operators():
            result = call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    elsewhere |= outputs_in(result)
    norms: dict[nn.Module, set[nn.Module | None]] = {}  # of a convolution; None: something else takes an output too
    for key, (_, conv) in outputs.items():
        modules = takers.get(key, [])
        alone = len(modules) == 1 and isinstance(modules[0], nn.BatchNorm2d) and key not in elsewhere
        norms.setdefault(conv, set()).add(modules[0] if alone else None)
    names = {module: name for name, module in model.named_modules()}
    pairs = ((conv, taking.pop()) for conv, taking in norms.items() if len(taking) == 1)
    return {names[conv]: names[norm] for conv, norm in pairs if norm is not None and sources[norm] == {conv}}


def fold_(model: nn.Module, name: str, norm_name: str) -> bool:
    """Fold a BatchNorm into the packed layer ``name``, unless it is of another kind or has no running statistics."""
    norm, layer = model.get_submodule(norm_name), model.get_submodule(name)
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(layer, PackedLayer)
    if norm.running_var is None or norm.running_mean is None:
        warnings.warn(f"BatchNorm {norm_name!r} has no running statistics and is not folded", stacklevel=3)
        return False
    if not is_foldable(norm):
        return False
    gain = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().float()
    shift = -norm.running_mean.float() * gain + (0 if norm.bias is None else norm.bias.detach().float())
    layer.fold_(gain, shift)
    replace_(model, norm, without_norm(norm))
    return True


def is_foldable(norm: nn.Module) -> bool:
    """Whether ``norm`` computes what torch's BatchNorm does, or timm's BatchNorm with an activation."""
    if not type(norm).__module__.startswith("timm."):
        return computes_as(norm, nn.BatchNorm2d) and not parametrize.is_parametrized(norm)
    from timm.layers.norm_act import BatchNormAct2d

    return type(norm) is BatchNormAct2d and computes_as(norm, BatchNormAct2d)


def without_norm(norm: nn.Module) -> nn.Module:
    """The module that replaces a folded BatchNorm: the identity, or the activation that timm's BatchNorm contains."""
    activation = getattr(norm, "act", None)
    if activation is not None:
        return nn.Sequential(getattr(norm, "drop", nn.Identity()), activation)
    return nn.Identity()


def note_folded_(model: nn.Module, names: Sequence[str]) -> None:
    """Record the names of folded BatchNorm layers in ``model``, for `description`."""
    setattr(model, FOLDED, list(names))
