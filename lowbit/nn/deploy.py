"""`pack`: a trained low-bit model with packed weights and integer kernels, ready to be shipped."""

import copy
import dataclasses
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit.errors import LowbitError
from lowbit.kernels.packing import BITS, pack_weight
from lowbit.nn.attention import INPUT
from lowbit.nn.convert import QUANTIZABLE, QuantizedLayer, quantized_layers, replace_
from lowbit.nn.packed import PackedConv2d, PackedLayer, PackedLinear, is_stored, store_
from lowbit.quantizers import ActivationQuantizer
from lowbit.quantizers.base import IntegerForm

if TYPE_CHECKING:
    import pandas

KINDS = {PackedLinear: "linear", PackedConv2d: "conv2d"}
# What a question about a tensor gives whose answer does not depend on the numbers in it: shape, dtype, ...
_FACTS = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout)


def pack(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy of the quantised ``model`` for inference: packed weights, integer kernels, BatchNorm folded in.

    Linear layers and convolutions of 2, 3 or 4 bits become `PackedLinear` and `PackedConv2d`. Their input's quantiser
    goes into the kernel; where a layer has none, its input becomes 8-bit numbers with a scale that follows each row (of
    a convolution: each image). So do layers of 5 to 8 bits, mostly the first and last, whose input is quantised; they
    take 8 bits. Other quantised layers (depthwise, other widths) keep calculating with floats but store codes. What is
    in full precision stays.

    Outputs equal those of ``model`` in evaluation mode up to the rounding of float32 sums, as far as all inputs are
    quantised.

    Args:
        model: quantised by `lowbit.quantize_` and trained; it stays as it is.
        example: an input batch, by which is found out which BatchNorm follows which convolution; None makes one up for
            models of `lowbit.models.create`, and else folds nothing.

    Returns:
        The packed model in evaluation mode. `lowbit.save` and `lowbit.load` know it.

    Raises:
        LowbitError: nothing is quantised, an activation quantiser has seen no batch, or no layer can be packed.
    """
    found = list(quantized_layers(model))
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise LowbitError("this model is packed already")
    if not found:
        raise LowbitError("there is nothing to pack: quantise the model with lowbit.quantize_ and train it first")
    if not all(module.calibrated for module in model.modules() if isinstance(module, ActivationQuantizer)):
        raise LowbitError(
            "an activation quantiser has seen no batch yet: train the model, or lowbit.calibrate(model, x) with a batch"
        )
    model = copy.deepcopy(model).eval()
    follows = _batchnorms(model, _example(model) if example is None else example)
    packed = _replace_(model)
    if not packed:
        kinds = ", ".join(sorted({type(layer.weight.config).__name__ for layer in found if layer.weight is not None}))
        raise LowbitError(
            f"no layer of this model can be packed: kernels take 2 to 4 bits in linear layers and 2-d convolutions "
            f"without groups, and up to 8 where the input is quantised too (its weights: {kinds or 'full precision'})"
        )
    model.folded = [follows[name] for name in packed if name in follows and _fold_(model, name, follows[name])]
    return model


def _replace_(model: nn.Module) -> list[str]:
    """Replaces every layer that can be; returns the names of the packed ones."""
    made = []
    for found in list(quantized_layers(model)):
        if found.weight is None:
            continue
        layer = _packed(found) or _stored(found)
        if layer is not None:
            replace_(model, found.layer, layer)
        if isinstance(layer, PackedLayer):
            made.append(found.name)
    return made


def _packed(found: QuantizedLayer) -> PackedLayer | None:
    """The packed form of a layer; None if the kernels don't do it."""
    layer, linear = found.layer, isinstance(found.layer, nn.Linear)
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    levels = found.weight.levels.numel()
    if not (linear or (plain and isinstance(layer.padding, tuple))) or levels > 2 ** max(BITS):
        return None
    if levels > 16 and found.activation is None:  # a first or last layer that was trained on floats gets floats
        return None
    try:
        form = _input_form(found)
        weight = pack_weight(found.codes(), found.weight.levels, found.weight.scale(*found.latents))
        if linear:
            return PackedLinear(weight, layer.bias, form)
        geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        return PackedConv2d(weight, layer.bias, form, **geometry)
    except LowbitError:  # levels that are no whole numbers, or an input that cannot be stored as such
        return None


def _input_form(found: QuantizedLayer) -> IntegerForm | None:
    """The integer form of the layer's input; None if it is not quantised."""
    if found.activation is None:
        return None
    form = found.activation.integer()
    channels = -1 if isinstance(found.layer, nn.Linear) else 1
    if form is None or (form.scale.ndim and form.scale.shape[channels] > 1):
        raise LowbitError("a step for each input channel cannot be taken out of the sum over channels")
    if INPUT in found.layer._modules:
        return form
    # The attention has quantised this input for several layers: it comes with `after` in it.
    before = None if form.after is None else -form.after
    return dataclasses.replace(form, before=before)


def _stored(found: QuantizedLayer) -> nn.Module | None:
    """The layer with its weight kept as codes, its input quantiser in front; None if they do not fit into bytes."""
    if found.weight.levels.numel() > 256:
        return None
    # torch's remove_parametrizations would change the class, which the model that was copied has in common.
    parametrized = found.layer
    bare = object.__new__(type(parametrized).__bases__[0])
    bare.__dict__.update(parametrized.__dict__)
    bare._modules = {name: child for name, child in parametrized._modules.items() if name != "parametrizations"}
    bare._parameters, bare._buffers = dict(parametrized._parameters), dict(parametrized._buffers)
    return store_(bare, found.codes(), found.weight.levels, found.weight.scale(*found.latents))


def _example(model: nn.Module) -> Tensor | None:
    spec = getattr(model, "spec", {})
    if "img_size" in spec:
        return torch.zeros(1, spec["in_chans"], spec["img_size"], spec["img_size"])
    if spec.get("name") in ("kws_resnet", "ds_cnn"):
        return torch.zeros(1, spec.get("sample_rate", 8000))
    return None


def _batchnorms(model: nn.Module, example: Tensor | None) -> dict[str, str]:
    """Which BatchNorm takes all outputs of which convolution, and nothing else does: names, by running ``example``."""
    if example is None:
        return {}
    made: dict[int, tuple[Tensor, nn.Module]] = {}  # outputs of convolutions; kept alive, so that ids stay theirs
    takers: dict[int, list[nn.Module]] = {}
    sources: dict[nn.Module, set[nn.Module | None]] = {}  # of a BatchNorm; None: something else than a convolution
    inside: list[nn.Module] = []  # the BatchNorms that are running
    elsewhere: set[int] = set()  # outputs that something outside of them reads or changes

    def outputs_in(tree: Any) -> set[int]:
        return {id(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and id(leaf) in made}

    class Uses(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            used = set() if inside else outputs_in((args, kwargs))
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, _FACTS):
                elsewhere.update(used)
            return result

    class Operators(TorchDispatchMode):  # a scripted function is none that `Uses` hears of, what it calls arrives here
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            elsewhere.update(set() if inside else outputs_in((args, kwargs)))
            return func(*args, **(kwargs or {}))

    def enters(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        taken = outputs_in((args, kwargs))
        for key in taken:
            takers.setdefault(key, []).append(module)
        if isinstance(module, nn.BatchNorm2d):
            sources.setdefault(module, set()).update({made[key][1] for key in taken} or {None})
            inside.append(module)

    def leaves(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(output, Tensor):
            made[id(output)] = (output, module)
        if inside and inside[-1] is module:
            inside.pop()

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_hook(leaves))
        hooks.append(module.register_forward_pre_hook(enters, with_kwargs=True))
    try:
        with torch.no_grad(), Uses(), Operators():
            result = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    elsewhere |= outputs_in(result)
    norms: dict[nn.Module, set[nn.Module | None]] = {}  # of a convolution; None: not only a BatchNorm takes an output
    for key, (_, conv) in made.items():
        modules = takers.get(key, [])
        alone = len(modules) == 1 and isinstance(modules[0], nn.BatchNorm2d) and key not in elsewhere
        norms.setdefault(conv, set()).add(modules[0] if alone else None)
    names = {module: name for name, module in model.named_modules()}
    pairs = ((conv, taking.pop()) for conv, taking in norms.items() if len(taking) == 1)
    return {names[conv]: names[norm] for conv, norm in pairs if norm is not None and sources[norm] == {conv}}


def _fold_(model: nn.Module, name: str, norm_name: str) -> bool:
    norm = model.get_submodule(norm_name)
    if norm.running_var is None:
        warnings.warn(f"BatchNorm {norm_name!r} has no running statistics and stays", stacklevel=3)
        return False
    gain = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach()
    shift = -norm.running_mean * gain + (0 if norm.bias is None else norm.bias.detach())
    model.get_submodule(name).fold_(gain.detach(), shift.detach())
    replace_(model, norm, without_norm(norm))
    return True


def description(model: nn.Module) -> dict[str, Any] | None:
    """What `lowbit.save` has to know of a packed model besides its tensors (JSON); None if it is not packed."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
    if not layers:
        return None
    return {
        "layers": {name: {"kind": KINDS[type(layer)]} | layer.settings() for name, layer in layers.items()},
        "stored": [name for name, layer in model.named_modules() if is_stored(layer)],
        "folded": list(model.folded),
    }


def summary(model: nn.Module) -> "pandas.DataFrame":
    """Each part of a packed model: layer, how it is kept, weights, bits a weight, bytes in the file.

    ``how`` is "packed", "codes" (see `lowbit.nn.packed.store_`) or "float32"; the last row is all that is not a layer's
    weight.
    """
    import pandas

    rows, counted = [], set()
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer):
            how, weights, tensors = "packed", math.prod(layer.shape), [layer.data, layer.scale, layer.sums]
            bits = layer.bits
        elif is_stored(layer):
            how, weights, tensors = "codes", layer.codes.numel(), [layer.codes, layer.levels, layer.row_scale]
            bits = 8
        elif isinstance(layer, QUANTIZABLE):
            how, weights, tensors, bits = "float32", layer.weight.numel(), [layer.weight], 32
        else:
            continue
        counted |= {id(tensor) for tensor in tensors}
        rows.append((name, how, weights, bits, sum(t.numel() * t.element_size() for t in tensors)))
    rest = [tensor for tensor in model.state_dict(keep_vars=True).values() if id(tensor) not in counted]
    size = sum(tensor.numel() for tensor in rest)
    rows.append(("(rest)", "float32", size, 32, sum(t.numel() * t.element_size() for t in rest)))
    return pandas.DataFrame(rows, columns=["layer", "how", "weights", "bits", "bytes"])


def restore_(model: nn.Module, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Gives a model in full precision the packed layers of a `description`; ``tensors`` are those of the whole file."""
    for name, settings in described["layers"].items():
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        kind = {word: cls for cls, word in KINDS.items()}[settings["kind"]]
        replace_(model, model.get_submodule(name), kind.restore(settings, own))
    for name in described["stored"]:
        store_(model.get_submodule(name), *(tensors[f"{name}.{part}"] for part in ("codes", "levels", "row_scale")))
    for name in described["folded"]:
        norm = model.get_submodule(name)
        replace_(model, norm, without_norm(norm))
    model.folded = list(described["folded"])


def without_norm(norm: nn.Module) -> nn.Module:
    """What stays of a BatchNorm that is folded away: nothing, or the activation that timm puts into it."""
    if hasattr(norm, "act"):
        return nn.Sequential(getattr(norm, "drop", nn.Identity()), norm.act)
    return nn.Identity()
