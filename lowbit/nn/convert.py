"""`quantize_`: puts quantizers into any model, in place, without replacing its layers.

Weights become parametrizations (`torch.nn.utils.parametrize`), so a layer computes with its fake-quantized
weight while the optimizer sees the latents; a layer's input goes through a quantizer called by a forward
pre-hook. Both live in the module tree, so ``state_dict``, ``deepcopy``, ``.to`` and DDP treat them as usual.
"""

import dataclasses
import fnmatch
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LowbitError
from lowbit.nn.attention import INPUT, LowBitAttention, check_reparameterizable, is_attention, low_bit_attentions
from lowbit.nn.calls import calls_of, listed
from lowbit.nn.config import QuantConfig, check_not_empty
from lowbit.nn.query_key import QueryKeyProduct
from lowbit.nn.refusals import check_attention, check_model, check_ties, check_weight
from lowbit.quantizers import ActivationQuantizer, Method, WeightQuantizer
from lowbit.quantizers.base import as_float
from lowbit.quantizers.lsq import LSQ

QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer with a quantized weight, input or both, as `quantized_layers` finds it."""

    name: str
    layer: nn.Module
    weight: WeightQuantizer | None
    activation: ActivationQuantizer | None

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """The full-precision tensors behind the weight: one, or several for DenseShift-like methods."""
        if self.weight is None:
            return (self.layer.weight,)
        held = self.layer.parametrizations.weight
        return (
            (held.original,) if held.is_tensor else tuple(getattr(held, f"original{i}") for i in range(held.ntensors))
        )

    def codes(self) -> Tensor:
        """The weight's level indices, int16."""
        return self.weight.codes(*self.latents)


def quantize_(
    model: nn.Module, config: QuantConfig, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Quantizes the linear and convolution layers of ``model`` in place.

    Args:
        model: any model; its layers keep their class, their names and (as starting point) their weights.
        config: what to quantize and how.
        filter_fn: called with each layer and its name; layers for which it is false stay untouched.

    Returns:
        The same model.

    Raises:
        LowbitError: nothing to quantize, a model that is quantized, compiled or wrapped already, or a layer that
            cannot be quantized, named (see `lowbit.nn.refusals`). The model is then unchanged.
    """
    check_not_empty(config)
    check_model(model, filter_fn)
    if any(True for _ in quantized_layers(model)) or low_bit_attentions(model):
        raise LowbitError("this model is quantized already; quantize_ starts from a full-precision model")
    plan = [found for found in _plan(model, config) if filter_fn is None or filter_fn(found[1], found[0])]
    attentions = _attentions(model, config, filter_fn)
    replaced = {f"{name}.qkv": attention.qkv for name, attention in attentions.items()} if config.qkr else {}
    plan = [found for found in plan if all(found[1] is not qkv for qkv in replaced.values())]
    if not plan and not attentions:
        kinds = ", ".join(cls.__name__ for cls in QUANTIZABLE)
        raise LowbitError(
            f"no layer of {type(model).__name__} is left to quantize: it takes a {kinds} that is neither kept back by "
            f"first_last={config.first_last!r} nor refused by filter_fn"
        )
    # Everything that can refuse is asked before anything is changed.
    for name, layer, (weight, _) in plan:
        check_weight(name, layer, weight is not None)
    for name, attention in attentions.items():
        check_weight(f"{name}.qkv", attention.qkv, config.qkr)
        check_attention(name, attention, config.qkr)
        if config.qkr:
            check_reparameterizable(name, attention, config.weight)
    check_ties(model, [(name, layer, weight) for name, layer, (weight, _) in plan], replaced)
    for _, layer, methods in plan:
        _build(layer, *methods)
    fresh, options = config.attention_start == "as_published", (config.z_bias, config.softmax_step)
    low = {
        name: LowBitAttention(
            attention, config.weight, config.activation, config.qkr, config.attention, fresh, *options
        ).train(attention.training)
        for name, attention in attentions.items()
    }
    for name, attention in attentions.items():
        replace_(model, attention, low[name])
    for _, layer, methods in plan:
        _attach(layer, *_build(layer, *methods))
    return model


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old`` under all names that ``old`` has in ``model``.

    Raises:
        LowbitError: ``old`` is the model itself.
    """
    if old is model:
        raise LowbitError(
            f"the model is a single {type(model).__name__}, which cannot be replaced inside itself; wrap it: "
            "torch.nn.Sequential(layer)"
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def attach_(layer: nn.Module, weight: Method | None, activation: Method | None) -> None:
    """Quantizes one layer's weight, input or both, in place; `quantize_` does it to all of a model's.

    Raises:
        LowbitError: a layer that cannot be quantized; it is then unchanged.
    """
    check_weight(type(layer).__name__, layer, weight is not None)
    _attach(layer, *_build(layer, weight, activation))


def _build(
    layer: nn.Module, weight: Method | None, activation: Method | None
) -> tuple[WeightQuantizer | None, ActivationQuantizer | None]:
    if activation is None:
        return weight and weight.weight(layer.weight.detach()), None
    linear, current = isinstance(layer, nn.Linear), layer.weight.detach()
    quantizer = activation.activation(-1 if linear else 1)
    quantizer.to(current.device, as_float(current).dtype)
    quantizer.expect_((layer.in_features,) if linear else (None, layer.in_channels, *(None for _ in layer.kernel_size)))
    return weight and weight.weight(current), quantizer


def _attach(layer: nn.Module, weight: WeightQuantizer | None, activation: ActivationQuantizer | None) -> None:
    if weight is not None:
        parametrize.register_parametrization(layer, "weight", weight)
        weight.initialize_(*_found("", layer).latents)
    if activation is not None:
        layer.add_module(INPUT, activation)
        layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _attentions(
    model: nn.Module, config: QuantConfig, filter_fn: Callable[[nn.Module, str], bool] | None
) -> dict[str, nn.Module]:
    """The attention layers to replace by `LowBitAttention`, by name."""
    if not (config.attention or config.qkr):
        return {}
    found = {name: module for name, module in model.named_modules() if is_attention(module)}
    found = {name: m for name, m in found.items() if filter_fn is None or filter_fn(m.qkv, f"{name}.qkv")}
    if not found:
        raise LowbitError(
            f"attention={config.attention}, qkr={config.qkr}: {type(model).__name__} has no attention for it (timm's "
            "Attention and WindowAttention, in ViT, DeiT and Swin, have), or filter_fn refused its qkv layers"
        )
    return found


def _plan(
    model: nn.Module, config: QuantConfig
) -> Iterator[tuple[str, nn.Module, tuple[Method | None, Method | None]]]:
    """Each layer to quantize with its weight and activation methods, first and last layers as configured."""
    layers = dict(_quantizable(model))
    aliases = _aliases(model)
    names = {name: [alias for alias, first in aliases.items() if first == name] for name in layers}
    for pattern in config.unsigned:
        if not any(fnmatch.filter(each, pattern) for each in names.values()):
            raise LowbitError(f"unsigned: {pattern!r} is the name of no layer; there are {', '.join(layers)}")
    if config.weight is None and config.activation is None:
        return
    ends = first_and_last(model)
    for name, layer in layers.items():
        if name not in ends or config.first_last == "same":
            activation = config.activation
            if any(fnmatch.filter(names[name], pattern) for pattern in config.unsigned):
                activation = dataclasses.replace(activation, signed=False)
            yield name, layer, (config.weight, activation)
        elif config.first_last is not None:
            weight = config.weight and LSQ(bits=config.first_last, granularity="channel")
            # As published: a step for each color of the image, one for the input of the head.
            by_color = getattr(config.activation, "granularity", None) == "token" and not isinstance(layer, nn.Linear)
            shared, bias = "channel" if by_color else "tensor", config.end_bias
            if bias and not isinstance(layer, nn.Linear):
                bias = "place"
            activation = config.activation and LSQ(bits=config.first_last, granularity=shared, bias=bias)
            yield name, layer, (weight, activation)


def _quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside_attention: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.append(f"{name}." if name else "")
        elif isinstance(module, QUANTIZABLE) and not name.startswith(tuple(inside_attention)):
            yield name, module
    if inside_attention:
        warnings.warn(
            f"{len(inside_attention)} torch.nn.MultiheadAttention layers stay in full precision: they read their "
            "weights without calling their layers; timm's vision transformers are quantized whole",
            stacklevel=4,
        )


def first_and_last(model: nn.Module) -> set[str]:
    """Names of the layers next to the input and the output.

    timm says which they are (``pretrained_cfg``: first_conv, classifier); elsewhere the first and the last
    linear or convolution layer in order of registration.
    """
    layers = [name for name, _ in _quantizable(model)]
    config = getattr(model, "pretrained_cfg", None) or {}
    named = set()
    for key in ("first_conv", "classifier"):
        value = config.get(key) or ()
        named |= {value} if isinstance(value, str) else set(value)
    aliases = _aliases(model)
    ends = {aliases.get(name) for name in named} & set(layers)
    return ends | ({layers[0], layers[-1]} if layers and len(ends) < 2 else set())


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of every module, with the first name that the module has."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)}


def _quantize_input(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    quantizer = getattr(layer, INPUT)
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    name = "input" if "input" in kwargs else next(iter(inspect.signature(layer.forward).parameters))
    return args, {**kwargs, name: quantizer(kwargs[name])} if name in kwargs else kwargs


def _found(name: str, module: nn.Module) -> QuantizedLayer:
    weight = None
    if parametrize.is_parametrized(module, "weight"):
        first = module.parametrizations.weight[0]
        weight = first if isinstance(first, WeightQuantizer) else None
    return QuantizedLayer(name, module, weight, getattr(module, INPUT, None))


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLayer]:
    """Every quantized layer of ``model``, in order."""
    for name, module in model.named_modules():
        found = _found(name, module)
        if found.weight is not None or isinstance(found.activation, ActivationQuantizer):
            yield found


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Sets the starting step of every activation quantizer that has none yet, by one forward pass of ``x``.

    Args:
        model: a quantized model; one without activation quantizers is left alone.
        x: one normalized input batch, on the model's device. BatchNorm layers normalize it by its own statistics, as
            in training: those gathered before may not fit quantized weights at all. The model's mode, gradients and
            running statistics stay as they were.

    Warns of quantized layers that the pass does not call: their input stays in full precision.

    Raises:
        LowbitError: a batch without items.
    """
    if len(x) == 0:
        raise LowbitError(f"calibrate needs a batch with items, not one of shape {list(x.shape)}")
    if not any(isinstance(module, ActivationQuantizer) for module in model.modules()):
        return model
    layers = {found.layer: found.name for found in quantized_layers(model) if found.activation is not None}
    was_training = {module: module.training for module in model.modules()}
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    statistics = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    model.eval()
    if len(x) > 1:
        for norm in norms:
            norm.train()
    try:
        with torch.no_grad(), calls_of(layers) as called:
            model(x)
    finally:
        for module, training in was_training.items():
            module.training = training
        for norm, kept in zip(norms, statistics, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(kept[name])
    if uncalled := [name for layer, name in layers.items() if layer not in called]:
        warnings.warn(
            f"{len(uncalled)} of {len(layers)} layers with quantized inputs were not called, so that their inputs stay "
            f"in full precision (the model reads their weights without calling them, or does not use them): "
            f"{listed(uncalled)}; quantize_'s filter_fn leaves them out",
            stacklevel=2,
        )
    return model


def compile_quantizers(model: nn.Module) -> nn.Module:
    """Compiles the quantizers of ``model`` with torch.compile, each for its own shape, and nothing else.

    The rest of the model stays eager. Building takes some seconds; a step then costs little more than a
    full-precision one.
    """
    inner = {id(m.quantizer) for m in model.modules() if isinstance(m, QueryKeyProduct)}  # compiled with its product
    quantizers = [m for m in model.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer)]
    quantizers = [m for m in quantizers if id(m) not in inner]
    # All quantizers of a method share one forward, and each shape counts as a recompilation of it.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(quantizers))
    for quantizer in quantizers:
        quantizer.compile(dynamic=False)
    return model
