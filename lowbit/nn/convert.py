"""`quantize_`: put quantizers into any model, in place, without replacing its linear and convolution layers.

Weights become parametrizations (`torch.nn.utils.parametrize`), so a layer computes with its fake-quantized
weight while the optimizer sees the latents. A forward pre-hook passes a layer's input through its quantizer.
Both are part of the module tree, so ``state_dict``, ``deepcopy``, ``.to`` and DDP treat them as usual.
"""

import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LowbitError
from lowbit.nn.attention import (
    INPUT,
    Granularity,
    LowBitAttention,
    check_reparameterizable,
    is_attention,
    low_bit_attentions,
)
from lowbit.nn.calls import call, calls_of, listed, replace_, size_of, weight_of, weight_parametrization, with_first
from lowbit.nn.config import QuantConfig, check_not_empty
from lowbit.nn.multihead import separate_
from lowbit.nn.products import attach_products_, check_projections, has_projections, low_bit_products, projections_of
from lowbit.nn.query_key import QueryKeyProduct
from lowbit.nn.refusals import check_attention, check_model, check_ties, check_weight
from lowbit.quantizers.base import ActivationQuantizer, Method, WeightQuantizer, as_float
from lowbit.quantizers.lsq import LSQ

if TYPE_CHECKING:
    from lowbit.nn.attention import TimmAttention

QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer with a quantized weight, a quantized input or both, as `quantized_layers` yields it.

    Attributes:
        name: the layer's name in the model.
        layer: the layer itself.
        weight: the quantizer of its weight, or None.
        activation: the quantizer of its input, or None.
    """

    name: str
    layer: nn.Module
    weight: WeightQuantizer | None
    activation: ActivationQuantizer | None

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """The full-precision tensors behind the weight: one, or several for DenseShift-like methods."""
        held = None if self.weight is None else weight_parametrization(self.layer)
        if held is None:
            return (weight_of(self.layer),)
        return (
            (held.original,) if held.is_tensor else tuple(getattr(held, f"original{i}") for i in range(held.ntensors))
        )

    def codes(self) -> Tensor:
        """The weight's level indices: int16, of the weight's shape.

        Raises:
            LowbitError: the weight is in full precision.
        """
        if self.weight is None:
            raise LowbitError(f"the weight of layer {self.name!r} is in full precision, so it has no codes")
        return self.weight.codes(*self.latents)


def quantize_(model: nn.Module, config: QuantConfig, filter_fn: Filter | None = None) -> nn.Module:
    """Quantize the linear and convolution layers of ``model`` in place.

    Args:
        model: any model; its layers keep their classes, their names and, as starting values, their weights.
            `torch.nn.MultiheadAttention`, which calls no layers, is replaced by that of `lowbit.nn.multihead`.
        config: what to quantize and how.
        filter_fn: called with each layer and its name; layers for which it returns False stay in full precision.

    Returns:
        The same model.

    Raises:
        LowbitError: there is nothing to quantize, the model is already quantized, compiled or wrapped, or a layer
            cannot be quantized; the message names it (see `lowbit.nn.refusals`). The model is then unchanged.
    """
    check_not_empty(config)
    check_model(model, filter_fn)
    if any(True for _ in quantized_layers(model)) or low_bit_attentions(model) or low_bit_products(model):
        raise LowbitError("this model is quantized already; quantize_ starts from a full-precision model")
    undo = separate_(model, filter_fn)
    try:
        plan, timm, others = _checked_plan(model, config, filter_fn)
    except BaseException:
        undo()
        raise
    settings = {"weight": config.weight, "activation": config.activation, "query_key": config.qkr}
    settings |= {"factors": config.attention, "z_bias": config.z_bias, "softmax_step": config.softmax_step}
    low: dict[str, LowBitAttention] = {}
    for name, attention in timm.items():
        low[name] = LowBitAttention(attention, fresh=config.attention_start == "as_published", **settings)
        low[name].train(attention.training)
    for name, attention in timm.items():
        replace_(model, attention, low[name])
    for name, other in others.items():
        attach_products_(other, projections_of(name, other), **settings)
    for _, layer, methods in plan:
        _attach(layer, *_build(layer, *methods))
    return model


Entry = tuple[str, Layer, tuple[Method | None, Method | None]]


def _checked_plan(
    model: nn.Module, config: QuantConfig, filter_fn: Filter | None
) -> tuple[list[Entry], dict[str, "TimmAttention"], dict[str, nn.Module]]:
    """What `quantize_` is to change: layers with their methods, timm's attention and other attention, all checked."""
    plan = [entry for entry in _plan(model, config) if filter_fn is None or filter_fn(entry[1], entry[0])]
    timm, others = _attentions(model, config, filter_fn)
    replaced: dict[str, nn.Module] = {}
    if config.qkr:
        replaced |= {f"{name}.qkv": attention.qkv for name, attention in timm.items()}
        for name, other in others.items():
            projections = projections_of(name, other)
            layers = check_projections(name, other, projections, config.weight)
            replaced |= {f"{name}.{part}": layer for part, layer in zip(projections.names or (), layers, strict=True)}
    plan = [entry for entry in plan if all(entry[1] is not layer for layer in replaced.values())]
    if not plan and not timm and not others:
        kinds = ", ".join(cls.__name__ for cls in QUANTIZABLE)
        raise LowbitError(
            f"no layer of {type(model).__name__} is left to quantize: quantize_ needs a {kinds} that neither "
            f"first_last={config.first_last!r} nor filter_fn excludes"
        )
    for name, layer, (weight, _) in plan:
        check_weight(name, layer, weight is not None)
    for name, attention in timm.items():
        check_weight(f"{name}.qkv", attention.qkv, config.qkr)
        check_attention(name, attention, config.qkr)
        if config.qkr:
            check_reparameterizable(name, attention, config.weight)
    for name, lost in replaced.items():
        check_weight(name, lost)
    check_ties(model, [(name, layer, weight) for name, layer, (weight, _) in plan], replaced)
    for _, layer, methods in plan:
        _build(layer, *methods)
    if others and config.attention_start == "as_published":
        raise LowbitError(
            f"attention_start='as_published' is for timm's attention; {next(iter(others))!r} is a "
            f"{type(others[next(iter(others))]).__name__}: use 'pretrained'"
        )
    return plan, timm, others


def attach_(layer: Layer, weight: Method | None, activation: Method | None) -> None:
    """Quantize the weight, the input or both of a single layer in place, as `quantize_` does for a whole model.

    Args:
        layer: a linear or convolution layer in full precision.
        weight: the method for its weight, or None.
        activation: the method for its input, or None.

    Raises:
        LowbitError: the layer cannot be quantized; it is then unchanged.
    """
    check_weight(type(layer).__name__, layer, weight is not None)
    _attach(layer, *_build(layer, weight, activation))


def _build(
    layer: Layer, weight: Method | None, activation: Method | None
) -> tuple[WeightQuantizer | None, ActivationQuantizer | None]:
    current, quantizer = layer.weight.detach(), None
    if activation is not None:
        quantizer = activation.activation(-1 if isinstance(layer, nn.Linear) else 1)
        quantizer.to(current.device, as_float(current).dtype)
        if isinstance(layer, nn.Linear):
            quantizer.expect_((layer.in_features,))
        else:
            quantizer.expect_((None, layer.in_channels, *(None for _ in layer.kernel_size)))
    return None if weight is None else weight.weight(current), quantizer


def _attach(layer: Layer, weight: WeightQuantizer | None, activation: ActivationQuantizer | None) -> None:
    if weight is not None:
        parametrize.register_parametrization(layer, "weight", weight)
        weight.initialize_(*_quantized("", layer).latents)
    if activation is not None:
        layer.add_module(INPUT, activation)
        layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _attentions(
    model: nn.Module, config: QuantConfig, filter_fn: Filter | None
) -> tuple[dict[str, "TimmAttention"], dict[str, nn.Module]]:
    """The attention that gets low-bit products, by name: timm's, which is replaced, and other, which stays."""
    if not (config.attention or config.qkr):
        return {}, {}
    timm = {name: module for name, module in model.named_modules() if is_attention(module)}
    timm = {name: m for name, m in timm.items() if filter_fn is None or filter_fn(m.qkv, f"{name}.qkv")}
    others = {name: module for name, module in model.named_modules() if has_projections(module)}
    if filter_fn is not None:
        others = {name: module for name, module in others.items() if _chosen(name, module, filter_fn)}
    if not timm and not others:
        raise LowbitError(
            f"attention={config.attention}, qkr={config.qkr}: {type(model).__name__} has no attention layer that can "
            "be quantized (Attention and WindowAttention of timm, in ViT, DeiT and Swin, torch.nn.MultiheadAttention, "
            "and attention of transformers can), or filter_fn excludes its layers"
        )
    return timm, others


def _chosen(name: str, attention: nn.Module, filter_fn: Filter) -> bool:
    """Whether ``filter_fn`` accepts a layer of the attention, or the attention itself if it has none."""
    layers = {part: layer for part, layer in attention.named_modules() if isinstance(layer, QUANTIZABLE)}
    return any(filter_fn(layer, f"{name}.{part}") for part, layer in layers.items()) or (
        not layers and filter_fn(attention, name)
    )


def _plan(model: nn.Module, config: QuantConfig) -> Iterator[tuple[str, Layer, tuple[Method | None, Method | None]]]:
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
            shared: Granularity = "channel" if by_color else "tensor"
            bias: bool | Literal["place"] = config.end_bias
            if bias and not isinstance(layer, nn.Linear):
                bias = "place"
            activation = config.activation and LSQ(bits=config.first_last, granularity=shared, bias=bias)
            yield name, layer, (weight, activation)


def _quantizable(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    inside_attention: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.append(f"{name}." if name else "")
        elif isinstance(module, QUANTIZABLE) and not name.startswith(tuple(inside_attention)):
            yield name, module


def first_and_last(model: nn.Module) -> set[str]:
    """Names of the layers next to the input and the output.

    timm's models name them in ``pretrained_cfg`` (first_conv, classifier). In other models they are the first and the
    last linear or convolution layer in order of registration. Where an embedding comes before all of them (models of
    text), it is the first layer, and only the last is named.
    """
    layers = [name for name, _ in _quantizable(model)]
    config = getattr(model, "pretrained_cfg", None) or {}
    named: set[str] = set()
    for key in ("first_conv", "classifier"):
        value = config.get(key) or ()
        named |= {value} if isinstance(value, str) else set(value)
    aliases = _aliases(model)
    ends = {aliases[name] for name in named if name in aliases} & set(layers)
    if len(ends) >= 2 or not layers:
        return ends
    begins = next(module for module in model.modules() if isinstance(module, (*QUANTIZABLE, nn.Embedding)))
    return ends | {layers[-1]} | (set() if isinstance(begins, nn.Embedding) else {layers[0]})


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of every module, with the module's first name."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)}


def _quantize_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return with_first(layer, args, kwargs, getattr(layer, INPUT))


def _quantized(name: str, module: nn.Module) -> QuantizedLayer:
    held = weight_parametrization(module)
    weight = held[0] if held is not None and isinstance(held[0], WeightQuantizer) else None
    return QuantizedLayer(name, module, weight, getattr(module, INPUT, None))


def method_of(quantizer: WeightQuantizer | ActivationQuantizer | None) -> Method | None:
    """The settings that a quantizer was built from; None without a quantizer."""
    config = None if quantizer is None else quantizer.config
    return config if isinstance(config, Method) else None


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLayer]:
    """Yield every quantized layer of ``model``, in order of registration."""
    for name, module in model.named_modules():
        layer = _quantized(name, module)
        if layer.weight is not None or isinstance(layer.activation, ActivationQuantizer):
            yield layer


def calibrate(model: nn.Module, x: Any) -> nn.Module:
    """Set the starting step of every activation quantizer that has none yet, by one forward pass of ``x``.

    The model's mode, gradients and running statistics do not change. A warning names quantized layers that the pass
    does not call: their inputs stay in full precision.

    Args:
        model: a quantized model; without activation quantizers nothing happens.
        x: one normalized input batch, on the model's device: a tensor, or a tuple or dict of the model's arguments.
            BatchNorm layers normalize it by its own statistics, as
            in training, because running statistics of the full-precision model may not fit quantized weights.

    Returns:
        The same model.

    Raises:
        LowbitError: ``x`` is empty.
    """
    if size_of(x) == 0:
        shape = f" of shape {list(x.shape)}" if isinstance(x, Tensor) else ""
        raise LowbitError(f"calibrate needs a batch with items, not one{shape}")
    if not any(isinstance(module, ActivationQuantizer) for module in model.modules()):
        return model
    layers = {each.layer: each.name for each in quantized_layers(model) if each.activation is not None}
    was_training = {module: module.training for module in model.modules()}
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    statistics = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    model.eval()
    if size_of(x) > 1:
        for norm in norms:
            norm.train()
    try:
        with torch.no_grad(), calls_of(layers) as called:
            call(model, x)
    finally:
        for module, training in was_training.items():
            module.training = training
        for norm, kept in zip(norms, statistics, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(kept[name])
    if uncalled := [name for layer, name in layers.items() if layer not in called]:
        warnings.warn(
            f"{len(uncalled)} of {len(layers)} layers with quantized inputs were not called, so their inputs stay in "
            f"full precision (the model reads their weights without calling them, or does not use them): "
            f"{listed(uncalled)}; exclude them by quantize_'s filter_fn",
            stacklevel=2,
        )
    return model


def compile_quantizers(model: nn.Module) -> nn.Module:
    """Compile only the quantizers of ``model`` with torch.compile, each for its own shape.

    The rest of the model stays eager. Compilation takes some seconds; a training step then costs little more than in
    full precision.

    Returns:
        The same model.
    """
    inner = {id(m.quantizer) for m in model.modules() if isinstance(m, QueryKeyProduct)}  # compiled with its product
    quantizers = [m for m in model.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer)]
    quantizers = [m for m in quantizers if id(m) not in inner]
    # All quantizers of a method share one forward, and each shape counts as a recompilation of that forward.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(quantizers))
    for quantizer in quantizers:
        quantizer.compile(dynamic=False)
    return model
