"""`pack`: a trained low-bit model with packed weights and integer kernels, ready to be shipped."""

import copy
import dataclasses
import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.kernels.packing import BITS, pack_weight
from lowbit.nn.attention import INPUT
from lowbit.nn.calls import calls_of, computes_as, holds_module, listed, own_class
from lowbit.nn.convert import QUANTIZABLE, QuantizedLayer, _quantize_input, quantized_layers, replace_
from lowbit.nn.packed import PackedConv2d, PackedLayer, PackedLinear, is_stored, store_
from lowbit.quantizers import ActivationQuantizer, WeightQuantizer
from lowbit.quantizers.base import IntegerForm

if TYPE_CHECKING:
    import pandas

KINDS = {PackedLinear: "linear", PackedConv2d: "conv2d"}
OF_TORCH = {"linear": nn.Linear, "conv2d": nn.Conv2d}
GEOMETRY = ("stride", "padding", "dilation")
HOOKS = (_quantize_input,)
# How far a packed layer may be from its own on the example, as a share of the output's norm: sums of float32 differ in
# their last bits, a value at the border between two steps becomes the other one, bf16 rounds, and inputs that were
# floats become 8 bits.
CLOSE, CLOSE_IN_HALF, CLOSE_IF_DYNAMIC, CLOSE_AS_A_WHOLE = 0.01, 0.05, 0.25, 0.5
# What a question about a tensor gives whose answer does not depend on the numbers in it: shape, dtype, ...
_FACTS = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout)


def pack(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy of the quantized ``model`` for inference: packed weights, integer kernels, BatchNorm folded in.

    Linear layers and convolutions of 2, 3 or 4 bits become `PackedLinear` and `PackedConv2d`. Their input's quantizer
    goes into the kernel; where a layer has none, its input becomes 8-bit numbers with a scale that follows each row (of
    a convolution: each image). So do layers of 5 to 8 bits, mostly the first and last, whose input is quantized; they
    take 8 bits.

    Only layers that compute exactly what the kernels compute are packed. A layer with a forward of its own (a subclass,
    an override on the object, a hook), one whose weight is read without a call, and one that no kernel serves
    (depthwise, other widths) keeps its class, its forward and its floats, and stores its weight as codes. What is in
    full precision stays.

    Outputs equal those of ``model`` in evaluation mode up to the rounding of float32 sums, as far as all inputs are
    quantized.

    Args:
        model: quantized by `lowbit.quantize_` and trained; it stays as it is.
        example: an input batch of the dtype and on the device of the model. It shows which BatchNorm follows which
            convolution and which layers are called; each packed layer and the whole packed model are compared with
            ``model`` on it. None makes one up for models of `lowbit.models.create`; for others nothing is folded and
            nothing compared.

    Returns:
        The packed model in evaluation mode. `lowbit.save`, `lowbit.load` and `lowbit.load_into` know it.

    Raises:
        LowbitError: nothing is quantized, an activation quantizer has seen no batch, a layer cannot be copied, no layer
            can be packed, or the packed model answers otherwise than ``model``.
    """
    found = list(quantized_layers(model))
    if any(isinstance(module, PackedLayer) or is_stored(module) for module in model.modules()):
        raise LowbitError("this model is packed already")
    if not found:
        raise LowbitError("there is nothing to pack: quantize the model with lowbit.quantize_ and train it first")
    shown = made_up(model) if example is None else example
    _refuse_uncalibrated(model, found, shown is not None)
    _refuse_uncopied(model, found)
    model = copy.deepcopy(model).eval()
    layers = {found.layer: found for found in quantized_layers(model)}
    own = {layer for layer in layers if not any(computes_as(layer, kind, HOOKS) for kind in QUANTIZABLE)}
    candidates = {layer: packed for layer, found in layers.items() if (packed := _packed(found)) is not None}
    expected, follows, wrong = None, {}, set()
    uncalled = {layer for layer, found in layers.items() if _never_called(found)}
    if shown is not None:
        try:
            expected, called, wrong = _rehearse(model, layers, candidates, shown)
        except Exception as error:
            # Some of timm's models take one size of images only, and do not tell.
            if example is not None or isinstance(error, LowbitError):
                raise
            shown = None
    if shown is not None:
        follows = _batchnorms(model, shown)
        if wrong:
            warnings.warn(
                "layers whose packed form gives other numbers for the example keep floats and store codes: "
                + listed(layers[layer].name for layer in wrong),
                stacklevel=2,
            )
        uncalled = layers.keys() - called
        candidates = {layer: made for layer, made in candidates.items() if layer not in uncalled | wrong}
    # Layers that are left out for what the model does with them, rather than for their bits or shape.
    kept = [layer for layer, found in layers.items() if found.weight is not None and layer in uncalled | wrong | own]
    packed = _replace_(model, layers, candidates)
    if not packed and not kept:
        kinds = ", ".join(sorted({type(layer.weight.config).__name__ for layer in found if layer.weight is not None}))
        raise LowbitError(
            f"no layer of this model can be packed: kernels take 2 to 4 bits in linear layers and 2-d convolutions "
            f"without groups that have torch's own forward and are called, and up to 8 bits where the input is "
            f"quantized too (its weights: {kinds or 'full precision'})"
        )
    model.folded = [follows[name] for name in packed if name in follows and _fold_(model, name, follows[name])]
    if example is not None:
        _compare(model, example, expected)
    return model


def _refuse_uncalibrated(model: nn.Module, found: list[QuantizedLayer], shown: bool) -> None:
    """Let layers that no batch has reached through only where nobody calls them.

    So it is where other quantizers have seen a batch; where none has, an example (``shown``) has to tell.
    """
    # Only methods that need a batch say anything here.
    asked = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer) and type(module).calibrated is not ActivationQuantizer.calibrated
    }
    waiting = {name for name, module in asked.items() if not module.calibrated}
    uncalled = {f"{layer.name}.{INPUT}" for layer in found if _never_called(layer)}
    if waiting and (waiting - uncalled or (len(waiting) == len(asked) and not shown)):
        raise LowbitError(
            "an activation quantizer has seen no batch yet: train the model, or lowbit.calibrate(model, x) with a "
            "batch; if that was done, the model never calls these layers, and lowbit.pack(model, x) finds that out "
            f"({listed(sorted(waiting))})"
        )


def _never_called(found: QuantizedLayer) -> bool:
    """Whether the layer's own input quantizer has seen no batch."""
    return INPUT in found.layer._modules and not found.activation.calibrated


def _refuse_uncopied(model: nn.Module, found: list[QuantizedLayer]) -> None:
    """Refuse, by name, modules of which a copy would not be the module itself with codes in the place of weights."""
    quantized = [layer for layer in found if layer.weight is not None]
    if others := [layer.name for layer in quantized if not _only_quantized(layer.layer)]:
        raise LowbitError(
            f"layers have another parametrization beside that of the quantized weight: {listed(others)}; remove it "
            "(torch.nn.utils.parametrize.remove_parametrizations), or keep these layers out by quantize_'s filter_fn"
        )
    layers = {layer.layer for layer in quantized}
    overridden = {name: module for name, module in model.named_modules() if "forward" in module.__dict__}
    unbound = [
        name
        for name, module in overridden.items()
        if getattr(module.forward, "__self__", None) is not module
        and (module in layers or holds_module(module.forward))
    ]
    if unbound:
        raise LowbitError(
            "modules have a function in the place of their forward, which cannot be copied with them: "
            f"{listed(unbound)}; write a subclass with that forward, or assign a bound method (types.MethodType)"
        )


@torch.no_grad()
def _rehearse(
    model: nn.Module,
    layers: dict[nn.Module, QuantizedLayer],
    candidates: dict[nn.Module, PackedLayer],
    example: Tensor,
) -> tuple[Any, set[nn.Module], set[nn.Module]]:
    """Run ``example`` and compare each packed layer with the layer that it is made of, on the same input.

    Returns:
        The model's output, the layers that were called, and those whose packed form gives something else.
    """
    inputs: dict[nn.Module, Tensor] = {}
    wrong: set[nn.Module] = set()

    def enters(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if _never_called(layers[layer]):
            raise LowbitError(
                f"the activation quantizer of layer {layers[layer].name!r} has seen no batch yet, and the example "
                "calls the layer: train the model, or lowbit.calibrate(model, x) with a batch"
            )
        inputs[layer] = args[0] if args else kwargs["input"]

    def leaves(layer: nn.Module, args: tuple, output: Tensor) -> None:
        packed = candidates[layer](inputs.pop(layer))
        loose = CLOSE if packed.dtype in (torch.float32, torch.float64) else CLOSE_IN_HALF
        if not _close(packed, output, CLOSE_IF_DYNAMIC if candidates[layer].x_scale is None else loose):
            wrong.add(layer)

    # Before anything else sees the input, and before what a hook makes of the output.
    hooks = [layer.register_forward_pre_hook(enters, prepend=True, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leaves) for layer in candidates]
    try:
        with calls_of(layers) as called:
            output = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return output, called, wrong


def _close(found: Tensor, expected: Tensor, share: float) -> bool:
    """Whether the norm of the difference is a small share of the expected norm; what is not finite is not judged."""
    if found.shape != expected.shape:
        return False
    found, expected = found.double(), expected.double()
    if not expected.isfinite().all():
        return True
    return bool((found - expected).norm() <= share * expected.norm() + 1e-6)


@torch.no_grad()
def _compare(model: nn.Module, example: Tensor, expected: Any) -> None:
    """Refuse a packed model that does not run, or says something else than the quantized one."""
    try:
        found = model(example)
    except Exception as error:  # whatever the model's own code raises when it meets a packed layer
        first = (str(error).splitlines() or [""])[0]
        raise LowbitError(
            f"{type(model).__name__} cannot be packed, its own code fails with packed layers ({type(error).__name__}: "
            f"{first}); keep the layers that it reads in another way out by quantize_'s filter_fn"
        ) from error
    found, expected = (
        [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for tree in (found, expected)
    )
    dtypes = [[leaf.dtype for leaf in leaves] for leaves in (found, expected)]
    close = dtypes[0] == dtypes[1] and all(map(partial(_close, share=CLOSE_AS_A_WHOLE), found, expected))
    if not close:
        raise LowbitError(
            f"{type(model).__name__} cannot be packed, for the example the packed model answers otherwise than the "
            f"quantized one: by more than {CLOSE_AS_A_WHOLE:.0%} of the output, or with another shape or dtype"
        )


def _replace_(
    model: nn.Module, layers: dict[nn.Module, QuantizedLayer], candidates: dict[nn.Module, PackedLayer]
) -> list[str]:
    """Replace every layer that can be, under all its names; return the names of the packed ones."""
    made = []
    for layer, found in layers.items():
        if found.weight is None:
            continue
        if layer in candidates:
            replace_(model, layer, candidates[layer])
            made.append(found.name)
        else:
            _store_codes_(found)
    return made


def _packed(found: QuantizedLayer) -> PackedLayer | None:
    """The packed form of a layer; None if the kernels don't do it."""
    if found.weight is None or _never_called(found):
        return None
    layer = found.layer
    linear = computes_as(layer, nn.Linear, HOOKS)
    plain = computes_as(layer, nn.Conv2d, HOOKS) and layer.groups == 1 and layer.padding_mode == "zeros"
    levels = found.weight.levels.numel()
    if not (linear or (plain and isinstance(layer.padding, tuple))) or levels > 2 ** max(BITS):
        return None
    if levels > 16 and found.activation is None:  # a first or last layer that was trained on floats gets floats
        return None
    try:
        form = _input_form(found)
        weight = pack_weight(found.codes(), found.weight.levels, found.weight.scale(*found.latents))
        weight = dataclasses.replace(weight, dtype=layer.weight.dtype)
        if linear:
            return PackedLinear(weight, layer.bias, form)
        return PackedConv2d(weight, layer.bias, form, **{name: getattr(layer, name) for name in GEOMETRY})
    except LowbitError:  # levels that are no integers, or an input that cannot be stored as such
        return None


def _input_form(found: QuantizedLayer) -> IntegerForm | None:
    """The integer form of the layer's input; None if it is not quantized."""
    if found.activation is None:
        return None
    form = found.activation.integer()
    channels = -1 if isinstance(found.layer, nn.Linear) else 1
    if form is None or (form.scale.ndim and form.scale.shape[channels] > 1):
        raise LowbitError("a step for each input channel cannot be taken out of the sum over channels")
    if INPUT in found.layer._modules:
        return form
    # The attention has quantized this input for several layers: it comes with `after` in it.
    before = None if form.after is None else -form.after
    return dataclasses.replace(form, before=before)


def _store_codes_(found: QuantizedLayer) -> None:
    """Keep the layer's weight as codes, in place, unless they do not fit into bytes; its hooks and forward stay."""
    layer = found.layer
    if found.weight.levels.numel() > 256:
        return
    weight = found.codes(), found.weight.levels, found.weight.scale(*found.latents), layer.weight.dtype
    _drop_quantizer_(layer)
    store_(layer, *weight)
    if _never_called(found):
        del layer._modules[INPUT]
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook in HOOKS]:
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _drop_quantizer_(layer: nn.Module) -> None:
    """Leave a quantized layer without its weight; torch's function for it changes the class of copies too."""
    layer.__class__ = own_class(layer)
    del layer._modules["parametrizations"]


def _only_quantized(layer: nn.Module) -> bool:
    """Whether a layer has no parametrization besides the quantizer of its weight, if that."""
    return not parametrize.is_parametrized(layer) or (
        set(layer.parametrizations) == {"weight"}
        and isinstance(layer.parametrizations.weight[0], WeightQuantizer)
        and len(layer.parametrizations.weight) == 1
    )


def made_up(model: nn.Module, random: bool = False) -> Tensor | None:
    """One input of the shape that ``model.example_shape`` says (`lowbit.models.create` sets it), or None.

    Args:
        model: on whose device and in whose dtype it is made.
        random: normal numbers, always the same; else zeros.
    """
    shape = getattr(model, "example_shape", None)
    if shape is None:
        return None
    like = next(tensor for tensor in model.state_dict().values() if tensor.is_floating_point())
    packed = next((module.like for module in model.modules() if isinstance(module, PackedLayer)), like)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)) if random else torch.zeros(1, *shape)
    return x.to(device=packed.device, dtype=packed.dtype)


def _batchnorms(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Which BatchNorm takes all outputs of which convolution, and nothing else does: names, by running ``example``."""
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
    if not _foldable(norm):
        return False
    gain = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().float()
    shift = -norm.running_mean.float() * gain + (0 if norm.bias is None else norm.bias.detach().float())
    model.get_submodule(name).fold_(gain, shift)
    replace_(model, norm, without_norm(norm))
    return True


def _foldable(norm: nn.Module) -> bool:
    """Whether the BatchNorm computes what torch's does, or timm's with an activation behind it."""
    if not type(norm).__module__.startswith("timm."):
        return computes_as(norm, nn.BatchNorm2d) and not parametrize.is_parametrized(norm)
    from timm.layers import BatchNormAct2d

    return type(norm) is BatchNormAct2d and computes_as(norm, BatchNormAct2d)


def description(model: nn.Module) -> dict[str, Any] | None:
    """What `lowbit.save` has to know of a packed model besides its tensors (JSON); None if it is not packed."""
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
            if isinstance(folded := module.__dict__.get("folded"), list)
            for norm in folded
        ],
    }


def summary(model: nn.Module) -> "pandas.DataFrame":
    """Each part of a packed model: layer, how it is kept, weights, bits a weight, bytes in the file.

    ``how`` is "packed", "codes" (see `lowbit.nn.packed.store_`) or "float32"; the last row is all that is not a layer's
    weight.
    """
    with extra("train", "the table of a packed model"):
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


def restore_(model: nn.Module, described: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """Give a model in full precision the packed layers of a `description`, as far as they fit it.

    Args:
        model: changed in place.
        described: the `description`, of the kinds that `lowbit.container.Packed` says.
        tensors: those of the whole file.

    Returns:
        What does not fit, one text for each layer; then the model is of no more use.
    """
    wrong = []
    for restore, entries in (
        (_restore_packed_, described["layers"].items()),
        (_restore_stored_, [(name, None) for name in described["stored"]]),
        (_restore_folded_, [(name, None) for name in described["folded"]]),
    ):
        for name, settings in entries:
            try:
                layer = model.get_submodule(name)
            except AttributeError:
                wrong.append(f"there is no layer {name!r}")
                continue
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            try:
                restore(model, layer, settings, own)
            except LowbitError as error:
                wrong.append(f"{name!r}: {error}")
    model.folded = list(described["folded"])
    return wrong


def _restore_packed_(model: nn.Module, layer: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    kind = OF_TORCH[settings["kind"]]
    if not computes_as(layer, kind, HOOKS) or not _only_quantized(layer):
        raise LowbitError(
            f"it is a {type(layer).__name__}; a packed layer takes the place of a plain nn.{kind.__name__}"
        )
    geometry = {name: list(settings.get(name) or ()) for name in GEOMETRY}
    has = {name: list(getattr(layer, name, ())) for name in GEOMETRY}
    if settings["shape"] != list(layer.weight.shape) or geometry != has:
        raise LowbitError(
            f"its weight is {list(layer.weight.shape)}, {has}; in the file it is {settings['shape']}, {geometry}"
        )
    if kind is nn.Conv2d and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise LowbitError("a packed convolution has groups=1 and padding_mode='zeros'")
    packed_kind = {word: cls for cls, word in KINDS.items()}[settings["kind"]]
    packed = packed_kind.restore(settings, tensors, layer.weight.dtype)
    replace_(model, layer, packed.to(layer.weight.device))


def _restore_stored_(model: nn.Module, layer: nn.Module, settings: None, tensors: dict[str, Tensor]) -> None:
    if not isinstance(layer, QUANTIZABLE) or not _only_quantized(layer):
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
        size in (1, of) for size, of in zip(reversed(scale.shape), reversed(codes.shape), strict=False)
    )
    floats = levels.is_floating_point() and scale.is_floating_point()
    if not floats or levels.ndim != 1 or not fits or (codes.numel() and int(codes.max()) >= len(levels)):
        raise LowbitError(
            f"its codes, levels {levels.dtype} {list(levels.shape)} and row_scale {scale.dtype} {list(scale.shape)} do "
            "not belong together"
        )
    device, dtype = layer.weight.device, layer.weight.dtype
    if parametrize.is_parametrized(layer):  # query-key reparameterization makes quantized layers
        _drop_quantizer_(layer)
    store_(layer, codes.to(device), levels.to(device), scale.to(device), dtype)


def _restore_folded_(model: nn.Module, norm: nn.Module, settings: None, tensors: dict[str, Tensor]) -> None:
    if not _foldable(norm):
        raise LowbitError(f"it is a {type(norm).__name__}; a folded BatchNorm was an nn.BatchNorm2d")
    replace_(model, norm, without_norm(norm))


def without_norm(norm: nn.Module) -> nn.Module:
    """What stays of a BatchNorm that is folded away: nothing, or the activation that timm puts into it."""
    if hasattr(norm, "act"):
        return nn.Sequential(getattr(norm, "drop", nn.Identity()), norm.act)
    return nn.Identity()
