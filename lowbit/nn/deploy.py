"""`pack`: a trained low-bit model with packed weights and integer kernels, ready for deployment."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.kernels.packing import BITS, pack_weight
from lowbit.nn.attention import INPUT
from lowbit.nn.calls import (
    call,
    calls_of,
    computes_as,
    copied,
    holds_module,
    listed,
    own_class,
    replace_,
    weight_of,
    weight_parametrization,
)
from lowbit.nn.convert import QUANTIZABLE, QuantizedLayer, _quantize_input, quantized_layers
from lowbit.nn.folding import fold_, following_norms, note_folded_
from lowbit.nn.packed import PackedConv2d, PackedLayer, PackedLinear, is_stored, store_
from lowbit.quantizers.base import ActivationQuantizer, IntegerForm, WeightQuantizer

if TYPE_CHECKING:
    import pandas

KINDS: dict[type[PackedLayer], str] = {PackedLinear: "linear", PackedConv2d: "conv2d"}
OF_TORCH: dict[str, type[nn.Linear | nn.Conv2d]] = {"linear": nn.Linear, "conv2d": nn.Conv2d}
GEOMETRY = ("stride", "padding", "dilation")
HOOKS = (_quantize_input,)
# How far a packed layer's output may be from the layer's own on the example, as a share of the output's norm: sums of
# float32 differ in their last bits, a value at the border between two steps may be rounded to the other, bf16 rounds,
# and inputs that were floats become 8 bits.
CLOSE, CLOSE_IN_HALF, CLOSE_IF_DYNAMIC, CLOSE_AS_A_WHOLE = 0.01, 0.05, 0.25, 0.5


def pack(model: nn.Module, example: Any = None) -> nn.Module:
    """A copy of the quantized ``model`` for inference: packed weights, integer kernels, BatchNorm folded in.

    Linear layers and convolutions of 2, 3 or 4 bits become `PackedLinear` and `PackedConv2d`. The quantizer of a
    layer's input goes into the kernel; an input without a quantizer is converted to 8-bit integers with a scale
    computed for each row (of a convolution: for each image). Layers of 5 to 8 bits with a quantized input, mostly the
    first and last, are packed too and take 8 bits.

    Only layers that compute exactly what the kernels compute are packed. A layer with a forward of its own (a subclass,
    an override on the object, a hook), one whose weight is read without a call, and one that no kernel supports
    (depthwise, other bit widths) keeps its class, its forward and its floats, and stores its weight as codes. Layers in
    full precision do not change.

    If all inputs are quantized, outputs equal those of ``model`` in evaluation mode up to the rounding of float32 sums.

    Args:
        model: a model that was quantized by `lowbit.quantize_` and trained; it does not change.
        example: an input batch of the model's dtype, on its device: a tensor, or a tuple or dict of the model's
            arguments. It is used to find the BatchNorm that follows each
            convolution and the layers that are called, and to compare each packed layer and the whole packed model with
            ``model``. None uses a generated input for models of `lowbit.models.create`; in other models nothing is
            folded and nothing compared.

    Returns:
        The packed model in evaluation mode. `lowbit.save`, `lowbit.load` and `lowbit.load_into` support it.

    Raises:
        LowbitError: nothing is quantized, an activation quantizer has seen no batch, a layer cannot be copied, no layer
            can be packed, or the output of the packed model differs from that of ``model``.
    """
    quantized = list(quantized_layers(model))
    if any(isinstance(module, PackedLayer) or is_stored(module) for module in model.modules()):
        raise LowbitError("this model is packed already")
    if not quantized:
        raise LowbitError("there is nothing to pack: quantize the model with lowbit.quantize_ and train it first")
    shown = made_up(model) if example is None else example
    _refuse_uncalibrated(model, quantized, shown is not None)
    _refuse_uncopied(model, quantized)
    model = copied(model).eval()
    layers = {each.layer: each for each in quantized_layers(model)}
    own = {layer for layer in layers if not any(computes_as(layer, kind, HOOKS) for kind in QUANTIZABLE)}
    candidates = {layer: packed for layer, each in layers.items() if (packed := _packed(each)) is not None}
    expected: Any = None
    follows: dict[str, str] = {}
    wrong: set[nn.Module] = set()
    uncalled = {layer for layer, each in layers.items() if _never_called(each)}
    if shown is not None:
        try:
            expected, called, wrong = _rehearse(model, layers, candidates, shown)
        except Exception as error:
            # Some of timm's models take a single image size, and do not record which.
            if example is not None or isinstance(error, LowbitError):
                raise
            shown = None
    if shown is not None:
        follows = following_norms(model, shown)
        if wrong:
            warnings.warn(
                "layers whose packed form gives other values for the example keep floats and store codes: "
                + listed(layers[layer].name for layer in wrong),
                stacklevel=2,
            )
        uncalled = layers.keys() - called
        candidates = {layer: packed for layer, packed in candidates.items() if layer not in uncalled | wrong}
    # Layers that are not packed because of their use in the model, rather than their bit width or shape.
    kept = [layer for layer, each in layers.items() if each.weight is not None and layer in uncalled | wrong | own]
    names = _replace_(model, layers, candidates)
    if not names and not kept:
        kinds = ", ".join(sorted({type(each.weight.config).__name__ for each in quantized if each.weight is not None}))
        raise LowbitError(
            f"no layer of this model can be packed: kernels take 2 to 4 bits in linear layers and 2-d convolutions "
            f"without groups that have torch's own forward and are called, and up to 8 bits if the input is quantized "
            f"too (this model's weights: {kinds or 'full precision'})"
        )
    folded = [follows[name] for name in names if name in follows and fold_(model, name, follows[name])]
    note_folded_(model, folded)
    if example is not None:
        _compare(model, example, expected)
    return model


def _refuse_uncalibrated(model: nn.Module, layers: Sequence[QuantizedLayer], shown: bool) -> None:
    """Refuse layers whose quantizer has seen no batch, unless the model never calls them.

    That is known if other quantizers have seen a batch, or from an example (``shown``).
    """
    # Methods that need no batch say nothing about calls.
    asked = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer) and type(module).calibrated is not ActivationQuantizer.calibrated
    }
    waiting = {name for name, module in asked.items() if not module.calibrated}
    uncalled = {f"{layer.name}.{INPUT}" for layer in layers if _never_called(layer)}
    if waiting and (waiting - uncalled or (len(waiting) == len(asked) and not shown)):
        raise LowbitError(
            "an activation quantizer has seen no batch yet: train the model, or call lowbit.calibrate(model, x) with "
            "a batch; if that was done, the model never calls these layers, and lowbit.pack(model, x) detects that "
            f"({listed(sorted(waiting))})"
        )


def _never_called(layer: QuantizedLayer) -> bool:
    """Whether the layer's own input quantizer has seen no batch."""
    if INPUT not in layer.layer._modules or layer.activation is None:
        return False
    return not layer.activation.calibrated


def _refuse_uncopied(model: nn.Module, layers: Sequence[QuantizedLayer]) -> None:
    """Refuse modules whose copy would not be the same module with codes instead of weights."""
    quantized = [layer for layer in layers if layer.weight is not None]
    if others := [layer.name for layer in quantized if not is_only_quantized(layer.layer)]:
        raise LowbitError(
            f"layers have another parametrization beside that of the quantized weight: {listed(others)}; remove it "
            "(torch.nn.utils.parametrize.remove_parametrizations), or exclude these layers by quantize_'s filter_fn"
        )
    modules = {layer.layer for layer in quantized}
    overridden = {name: module for name, module in model.named_modules() if "forward" in module.__dict__}
    unbound = [
        name
        for name, module in overridden.items()
        if getattr(module.forward, "__self__", None) is not module
        and (module in modules or holds_module(module.forward))
    ]
    if unbound:
        raise LowbitError(
            "modules have a function in the place of their forward, which cannot be copied with them: "
            f"{listed(unbound)}; write a subclass with that forward, or assign a bound method (types.MethodType)"
        )


@torch.no_grad()
def _rehearse(
    model: nn.Module,
    layers: Mapping[nn.Module, QuantizedLayer],
    candidates: Mapping[nn.Module, PackedLayer],
    example: Any,
) -> tuple[Any, set[nn.Module], set[nn.Module]]:
    """Run ``example`` and compare each packed layer with its source, on the same input.

    Returns:
        The model's output, the layers that were called, and those whose packed form gives another output.
    """
    inputs: dict[nn.Module, Tensor] = {}
    wrong: set[nn.Module] = set()

    def enters(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _never_called(layers[layer]):
            raise LowbitError(
                f"the activation quantizer of layer {layers[layer].name!r} has seen no batch yet, and the example "
                "calls the layer: train the model, or call lowbit.calibrate(model, x) with a batch"
            )
        inputs[layer] = args[0] if args else kwargs["input"]

    def leaves(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        packed = candidates[layer](inputs.pop(layer))
        loose = CLOSE if packed.dtype in (torch.float32, torch.float64) else CLOSE_IN_HALF
        if not _close(packed, output, CLOSE_IF_DYNAMIC if candidates[layer].x_scale is None else loose):
            wrong.add(layer)

    # Before anything else sees the input, and before a hook changes the output.
    hooks = [layer.register_forward_pre_hook(enters, prepend=True, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leaves) for layer in candidates]
    try:
        with calls_of(layers) as called:
            output = call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return output, called, wrong


def _close(actual: Tensor, expected: Tensor, share: float) -> bool:
    """Whether the norm of the difference is at most ``share`` of the expected norm; true if that is not finite."""
    if actual.shape != expected.shape:
        return False
    actual, expected = actual.double(), expected.double()
    if not expected.isfinite().all():
        return True
    return bool((actual - expected).norm() <= share * expected.norm() + 1e-6)


@torch.no_grad()
def _compare(model: nn.Module, example: Any, expected: Any) -> None:
    """Refuse a packed model that fails, or whose output differs from that of the quantized model."""
    try:
        actual = call(model, example)
    except Exception as error:  # whatever the model's own code raises when it meets a packed layer
        first = (str(error).splitlines() or [""])[0]
        raise LowbitError(
            f"{type(model).__name__} cannot be packed: its own code fails with packed layers ({type(error).__name__}: "
            f"{first}); exclude the layers that it reads without calling them by quantize_'s filter_fn"
        ) from error
    outputs, wanted = (
        [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for tree in (actual, expected)
    )
    dtypes = [[leaf.dtype for leaf in leaves] for leaves in (outputs, wanted)]
    close = dtypes[0] == dtypes[1] and all(map(partial(_close, share=CLOSE_AS_A_WHOLE), outputs, wanted))
    if not close:
        raise LowbitError(
            f"{type(model).__name__} cannot be packed: for the example the packed model answers otherwise than the "
            f"quantized one, by more than {CLOSE_AS_A_WHOLE:.0%} of the output or with another shape or dtype; exclude "
            "the layers that its own code treats specially by quantize_'s filter_fn"
        )


def _replace_(
    model: nn.Module, layers: Mapping[nn.Module, QuantizedLayer], candidates: Mapping[nn.Module, PackedLayer]
) -> list[str]:
    """Replace all candidates under all their names, and store codes in the rest; return the candidates' names."""
    names = []
    for layer, each in layers.items():
        if each.weight is None:
            continue
        if layer in candidates:
            replace_(model, layer, candidates[layer])
            names.append(each.name)
        else:
            _store_codes_(each)
    return names


def _packed(quantized: QuantizedLayer) -> PackedLayer | None:
    """The packed form of a layer; None if the kernels do not support it."""
    if quantized.weight is None or _never_called(quantized):
        return None
    layer, levels = quantized.layer, quantized.weight.levels
    if isinstance(layer, nn.Linear):
        plain = computes_as(layer, nn.Linear, HOOKS)
    elif isinstance(layer, nn.Conv2d):
        plain = computes_as(layer, nn.Conv2d, HOOKS) and layer.groups == 1 and layer.padding_mode == "zeros"
        plain = plain and isinstance(layer.padding, tuple)
    else:
        return None
    if not plain or levels.numel() > 2 ** max(BITS):
        return None
    if levels.numel() > 16 and quantized.activation is None:  # first or last layers trained on floats get floats
        return None
    try:
        form = _input_form(quantized)
        weight = pack_weight(quantized.codes(), levels, quantized.weight.scale(*quantized.latents))
        weight = dataclasses.replace(weight, dtype=layer.weight.dtype)
        if isinstance(layer, nn.Linear):
            return PackedLinear(weight, layer.bias, form)
        return PackedConv2d(weight, layer.bias, form, **{name: getattr(layer, name) for name in GEOMETRY})
    except LowbitError:  # levels that are no integers, or an input that cannot be stored as such
        return None


def _input_form(quantized: QuantizedLayer) -> IntegerForm | None:
    """The integer form of the layer's input; None if it is not quantized."""
    if quantized.activation is None:
        return None
    form = quantized.activation.integer()
    channels = -1 if isinstance(quantized.layer, nn.Linear) else 1
    if form is None or (form.scale.ndim and form.scale.shape[channels] > 1):
        raise LowbitError("a step for each input channel cannot be factored out of the sum over channels")
    if INPUT in quantized.layer._modules:
        return form
    # The attention layer has quantized this input for several layers, so it already includes `after`.
    before = None if form.after is None else -form.after
    return dataclasses.replace(form, before=before)


def _store_codes_(quantized: QuantizedLayer) -> None:
    """Store the layer's weight as codes, in place, unless they do not fit into bytes; its hooks and forward stay."""
    layer, quantizer = quantized.layer, quantized.weight
    if quantizer is None or quantizer.levels.numel() > 256:
        return
    codes, levels, scale = quantized.codes(), quantizer.levels, quantizer.scale(*quantized.latents)
    dtype = weight_of(layer).dtype
    drop_quantizer_(layer)
    store_(layer, codes, levels, scale, dtype)
    if _never_called(quantized):
        del layer._modules[INPUT]
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook in HOOKS]:
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def drop_quantizer_(layer: nn.Module) -> None:
    """Remove a layer's quantized weight with its latents; torch's own function would change the class of copies."""
    layer.__class__ = own_class(layer)
    del layer._modules["parametrizations"]


def is_only_quantized(layer: nn.Module) -> bool:
    """Whether a layer has no parametrization besides a quantizer of its weight."""
    if not parametrize.is_parametrized(layer):
        return True
    held = weight_parametrization(layer)
    alone = list(layer.get_submodule("parametrizations")._modules) == ["weight"]
    return alone and held is not None and len(held) == 1 and isinstance(held[0], WeightQuantizer)


def made_up(model: nn.Module, random: bool = False) -> Tensor | None:
    """One generated input of the shape ``model.example_shape`` (`lowbit.models.create` sets it), or None without it.

    Args:
        model: the model; the input gets its device and dtype.
        random: whether to draw normal numbers from a fixed seed, instead of zeros.
    """
    shape = getattr(model, "example_shape", None)
    if shape is None:
        return None
    like = next(tensor for tensor in model.state_dict().values() if tensor.is_floating_point())
    packed = next((module.like for module in model.modules() if isinstance(module, PackedLayer)), like)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)) if random else torch.zeros(1, *shape)
    return x.to(device=packed.device, dtype=packed.dtype)


def summary(model: nn.Module) -> "pandas.DataFrame":
    """A table of the parts of a packed model and of their sizes in a file.

    Returns:
        One row for each layer, with the columns ``layer`` (its name), ``how`` ("packed", "codes" for weights stored by
        `lowbit.nn.packed.store_`, or "float32"), ``weights`` (their number), ``bits`` (for each weight) and ``bytes``.
        The last row, "(rest)", holds everything that is not the weight of a layer.

    Raises:
        MissingExtraError: pandas is missing.
    """
    with extra("train", "the table of a packed model"):
        import pandas

    rows: list[tuple[str, str, int, int, int]] = []
    counted: set[int] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer):
            how, weights, tensors = "packed", math.prod(layer.shape), [layer.data, layer.scale, layer.sums]
            bits = layer.bits
        elif is_stored(layer):
            tensors = [layer.get_buffer(part) for part in ("codes", "levels", "row_scale")]
            how, weights, bits = "codes", tensors[0].numel(), 8
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
