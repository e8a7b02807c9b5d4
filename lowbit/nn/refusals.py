"""Checks that `quantize_` makes before it changes anything; each error names the layer and says what to do."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.nn.calls import has_hooks, weight_of, weight_parametrization
from lowbit.nn.huggingface import is_conv1d
from lowbit.nn.packed import PackedLayer
from lowbit.quantizers.base import Method, refuse_nonfinite

if TYPE_CHECKING:
    from lowbit.nn.attention import TimmAttention

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCRIPTED = ("Linear", "Conv1d", "Conv2d")


def check_model(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None) -> None:
    """Refuse anything but a model of ordinary, uncompiled layers in one process.

    Args:
        model: the model to check.
        filter_fn: as in `quantize_`; modules that it excludes may be scripted or quantized by torch.

    Raises:
        LowbitError: ``model`` is not a module, or one of its modules is a wrapper for several processes or devices, or
            is compiled, scripted, packed or quantized by torch.
    """
    if not isinstance(model, nn.Module):
        raise LowbitError(f"quantize_ takes a torch.nn.Module, not a {type(model).__name__}")
    for name, module in model.named_modules():
        kind, where = type(module).__name__, f"{name!r} is" if name else "the model is"
        if _is_wrapper(module):
            inner = "model.module" if hasattr(module, "module") else "the model"
            raise LowbitError(f"{where} wrapped in {kind}; quantize {inner} first and wrap it afterwards")
        if module._compiled_call_impl is not None or hasattr(module, "_torchdynamo_orig_callable"):
            raise LowbitError(f"{where} compiled and would ignore quantizers; quantize it before torch.compile")
        if isinstance(module, PackedLayer):
            raise LowbitError(f"{where} packed already; quantize_ starts from a full-precision model")
        if is_conv1d(module) and (filter_fn is None or filter_fn(module, name)):
            raise LowbitError(
                f"{where} a Conv1D of transformers, whose weight is the transpose of a linear layer's; call "
                "lowbit.nn.conv1d_to_linear_(model) first, or exclude it by filter_fn"
            )
        scripted = isinstance(module, torch.jit.ScriptModule) and (name == "" or module.original_name in SCRIPTED)
        parts = type(module).__module__.split(".")
        by_torch = parts[:3] == ["torch", "ao", "nn"] and bool({"quantized", "qat"} & set(parts))
        if not (scripted or by_torch) or (name and filter_fn is not None and not filter_fn(module, name)):
            continue
        if scripted:
            raise LowbitError(f"{where} a torch.jit.ScriptModule, whose layers are fixed; quantize before scripting")
        raise LowbitError(f"{where} a {kind} of torch.ao, quantized already; start from the full-precision model")


def _is_wrapper(module: nn.Module) -> bool:
    parallel = nn.parallel
    kinds: tuple[type, ...] = (parallel.DistributedDataParallel, parallel.DataParallel)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        kinds += (FSDPModule, FullyShardedDataParallel)
    return isinstance(module, (*kinds, torch._dynamo.eval_frame.OptimizedModule))


def check_weight(name: str, layer: nn.Module, quantized: bool = True) -> None:
    """Refuse a ``layer`` whose weight cannot become the latent of a quantizer.

    Args:
        name: the layer's name, for the message.
        layer: a linear or convolution layer.
        quantized: False if only the layer's input is quantized; any mechanism may then compute its weight.

    Raises:
        LowbitError: another mechanism computes the weight, or the weight has no values yet, no elements, a type other
            than a floating-point parameter, or values that are not finite.
    """
    what = f"the weight of layer {name!r}"
    weight = layer._parameters.get("weight")
    if weight is None and not quantized:
        return
    if weight is None:
        raise LowbitError(f"{what} {_computed(layer)}, so it cannot be quantized")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise LowbitError(f"{what} has no shape yet ({type(layer).__name__}); give the model one batch first")
    if quantized and type(weight) is not nn.Parameter:
        raise LowbitError(f"{what} is a {type(weight).__name__}; a plain torch.nn.Parameter is allowed")
    if weight.is_meta:
        raise LowbitError(
            f"{what} is on the meta device, without values; build the model on a real device, or fill it by "
            "model.to_empty(device='cpu') and load_state_dict, and quantize it then"
        )
    if quantized and weight.dtype not in FLOATS:
        raise LowbitError(
            f"{what} has the dtype {weight.dtype}; {', '.join(map(str, FLOATS))} are allowed: convert the "
            "model, or exclude the layer by filter_fn"
        )
    if quantized and weight.is_inference():
        raise LowbitError(
            f"{what} was made under torch.inference_mode and cannot be changed; build the model outside of it"
        )
    if weight.numel() == 0:
        raise LowbitError(f"{what} has the shape {list(weight.shape)}, no elements; exclude the layer by filter_fn")
    if quantized:
        refuse_nonfinite(what, weight)


def _computed(layer: nn.Module) -> str:
    """The mechanism that computes the weight of ``layer``, and how to turn the weight into an ordinary parameter."""
    hooks = [type(hook).__name__ for hook in layer._forward_pre_hooks.values()]
    if (held := weight_parametrization(layer)) is not None:
        kinds = ", ".join(type(part).__name__ for part in held)
        return (
            f"is parametrized ({kinds}; torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') undoes it)"
        )
    if "WeightNorm" in hooks:
        return "is computed by torch.nn.utils.weight_norm (remove_weight_norm(layer) undoes it)"
    if "SpectralNorm" in hooks:
        return "is computed by torch.nn.utils.spectral_norm (remove_spectral_norm(layer) undoes it)"
    if "weight_orig" in layer._parameters:
        return "is computed by torch.nn.utils.prune (prune.remove(layer, 'weight') makes it permanent)"
    return f"is no parameter of the {type(layer).__name__}"


def check_attention(name: str, attention: "TimmAttention", query_key: bool) -> None:
    """Refuse an attention layer whose replacement would lose something.

    Args:
        name: the layer's name, for the message; "" if it is the model itself.
        attention: the layer.
        query_key: whether its ``qkv`` is replaced too.

    Raises:
        LowbitError: the layer is the model itself, or a layer to be replaced has hooks.
    """
    if name == "":
        raise LowbitError(
            "the model itself is an attention layer, which cannot be replaced inside itself; wrap it: "
            "torch.nn.Sequential(model)"
        )
    layers: list[tuple[str, nn.Module]] = [(name, attention), (f"{name}.qkv", attention.qkv)]
    for where, module in layers[: 1 + query_key]:
        if has_hooks(module):
            raise LowbitError(
                f"{where!r} is replaced by a low-bit layer and would lose its hooks; remove them, quantize the model, "
                "and register them again"
            )


def check_ties(
    model: nn.Module, layers: Iterable[tuple[str, nn.Module, Method | None]], replaced: Mapping[str, nn.Module]
) -> None:
    """Refuse to untie parameters that modules share.

    Args:
        model: the whole model, in which other modules may hold one of the parameters.
        layers: name, layer and weight method of each layer to quantize.
        replaced: layers by name whose parameters are copied into others (query-key reparameterization).

    Raises:
        LowbitError: a parameter is shared, and its method would replace it by latents of its own or redraw it.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(f"{name}.{part}".lstrip("."))

    def others(name: str, layer: nn.Module, part: str) -> str:
        held = holders.get(id(layer._parameters.get(part)), [])
        return ", ".join(repr(holder) for holder in held if holder != f"{name}.{part}".lstrip("."))

    untie = "or untie them: layer.weight = torch.nn.Parameter(layer.weight.clone())"
    for name, layer in replaced.items():
        for part in ("weight", "bias"):
            if shared := others(name, layer, part):
                raise LowbitError(f"the {part} of layer {name!r} is also {shared}; use qkr=False, {untie}")
    for name, layer, method in layers:
        if method is not None and (shared := others(name, layer, "weight")) and not _keeps(method, weight_of(layer)):
            raise LowbitError(
                f"the weight of layer {name!r} is also {shared}, and {method!r} starts from latents of its own, which "
                f"would untie them; use a method that keeps the weight (StatsQ, LSQ), use filter_fn, {untie}"
            )


def _keeps(method: Method, weight: Tensor) -> bool:
    """Whether the weight itself becomes the method's only latent, with its values unchanged."""
    with torch.random.fork_rng(devices=[]):
        trial = torch.eye(2, dtype=weight.dtype)
        quantizer = method.weight(trial)
        latents = quantizer.right_inverse(trial.clone())
        if not isinstance(latents, Tensor):
            return False
        quantizer.initialize_(latents)
        return torch.equal(latents, trial)
