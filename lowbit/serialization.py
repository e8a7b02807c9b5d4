"""`save`, `load` and `load_into`: a model, quantized or not, in one self-describing safetensors file.

The file's metadata holds one JSON document (`lowbit.container`): the format version, the arguments of
`lowbit.models.create`, the quantization of each layer, and a checksum of header and tensors. Everything is checked
before any of it is used; a file that fails a check raises `CheckpointError`. For a module of the user's own, the file
describes the layers but not how to build them: `load_into` takes the module that the user's code has built.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowbit import container
from lowbit.container import DTYPES, FORMAT, load_weights_, read
from lowbit.errors import CheckpointError, LowbitError, MissingExtraError

if TYPE_CHECKING:
    from lowbit.nn.attention import LowBitAttention
    from lowbit.nn.products import LowBitProducts
    from lowbit.quantizers.base import Method

__all__ = ["DTYPES", "FORMAT", "load", "load_into", "load_weights_", "read", "save"]


def save(model: nn.Module, path: str | Path, dtype: str | None = None, card: dict[str, Any] | None = None) -> Path:
    """Write ``model`` to ``path``, atomically.

    Args:
        model: any module, quantized by `lowbit.quantize_`, packed by `lowbit.pack`, or in full precision. `load`
            rebuilds a model of `lowbit.models.create`; for any other, `load_into` needs the module.
        path: the file; its folder is created if it does not exist.
        dtype: dtype of stored floating-point tensors: "float32", "float16", "bfloat16", or None for their own.
        card: further JSON data to store with the weights, e.g. how the model was trained.

    Returns:
        The path.

    Raises:
        LowbitError: ``dtype`` is unknown, or the model holds something that cannot be stored in a file.
    """
    from lowbit.models.spec import check
    from lowbit.nn.fuse import FUSED
    from lowbit.nn.structure import description

    if dtype is not None and dtype not in DTYPES:
        raise LowbitError(f"dtype={dtype!r} is not allowed; None, {', '.join(DTYPES)} are")
    spec = getattr(model, "spec", None)
    spec = spec if isinstance(spec, dict) else None  # a module of the user's own may use the name for something else
    if spec is not None:
        own = "model.spec belongs to lowbit.models.create; give an attribute of your own another name"
        check(spec, lambda message: LowbitError(f"{message}; {own}"))
    if getattr(model, "meta", None) == FUSED:
        raise LowbitError("a fused model cannot be saved; save the packed model, and fuse it again after loading")
    tensors, shared = container.collect(model, dtype)
    header: dict[str, Any] = {
        "model": spec,
        "quantization": _quantization(model),
        "packed": description(model),
        "card": card or {},
    }
    optional = {
        "module": None if spec is not None else type(model).__name__[:200],
        "dtype": dtype,
        "shared": shared,
        "modules": _shared(model) if spec is not None else {},
    }
    header |= {name: value for name, value in optional.items() if value}
    return container.write(path, header, tensors)


def load(path: str | Path) -> nn.Module:
    """Rebuild the model that `save` wrote, with its quantizers, in eval mode.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not from `save`, newer than this library, or holds a
            module that is not from `lowbit.models.create`.
    """
    from lowbit.models import create
    from lowbit.models.spec import check, check_size

    header, tensors = read(path)
    spec = header["model"]
    if spec is None:
        raise CheckpointError(
            f"{path} holds a module of your own ({header.get('module') or 'unnamed'}), which a file cannot build: "
            f"build it by your own code and call lowbit.load_into(module, {str(path)!r})"
        )
    check(spec, lambda message: CheckpointError(f"{path}: {message}"))
    try:
        check_size(partial(create, **spec), spec["name"], Path(path).stat().st_size)
        model = create(**spec)
    except (CheckpointError, MissingExtraError):
        raise
    except (LowbitError, TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} describes a model that cannot be built ({error!s:.200})") from None
    _share_(model, header.get("modules", {}), path)
    tensors = container.expand(header, tensors, path)
    kept = [name for name in model.state_dict() if name in tensors and name.rpartition(".")[0] not in _packed(header)]
    floats = {tensors[name].dtype for name in kept if tensors[name].is_floating_point()}
    if len(floats) == 1 and not container.was_converted(header):
        model.to(floats.pop())
    _restore_(model, header, tensors, path, f"the model {spec['name']!r}", ours=True)
    return model.eval()


def _packed(header: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of packed layers, whose scales and biases are float32 in a model of any dtype."""
    return (header.get("packed") or {}).get("layers", {})


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a file from `save` into a module that your own code has built, in place.

    Args:
        model: a module built like the saved one before `lowbit.quantize_`. Its quantizers or packed layers and all
            tensors come from the file. A module that is already quantized must be quantized like the saved one.
        path: the file.

    Returns:
        The same module, in eval mode.

    Raises:
        CheckpointError: as `load`; also if names, shapes, dtypes or tied tensors differ. One error names all layers
            that do not fit (the first few of many), and the module is unchanged.
        LowbitError: the module cannot be copied, which the check of the file needs.
    """
    from lowbit.nn.calls import copied

    header, tensors = read(path)
    tensors = container.expand(header, tensors, path)
    what = f"this {type(model).__name__}"
    lazy = [name for name, held in model.state_dict(keep_vars=True).items() if nn.parameter.is_lazy(held)]
    if lazy:
        raise CheckpointError(
            f"{what} has tensors without a shape ({', '.join(lazy[:3])}): run one batch through it first"
        )
    # On a copy first, so that every mismatch is found before the module changes.
    _restore_(copied(model), header, tensors, path, what)
    _restore_(model, header, tensors, path, what)
    return model.eval()


def _restore_(
    model: nn.Module,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: str | Path,
    what: str,
    ours: bool = False,
) -> None:
    """Put quantizers, packed layers and tensors of the file into ``model``.

    Args:
        model: the module, changed in place.
        header: the file's header.
        tensors: the file's tensors, expanded.
        path: the file, for messages.
        what: what messages call the model.
        ours: whether `load` has just built the model; then floating-point tensors may be converted to its dtypes, and
            its tensors are tied like those of the file.

    Raises:
        CheckpointError: the file does not fit the model.
    """
    from lowbit.nn.structure import restore_

    before = set(model.state_dict())
    described = header.get("packed")
    try:
        wrong = _restore_quantization_(model, header["quantization"], tensors, packed=bool(described))
        if described and not wrong:
            wrong = restore_(model, described, tensors)
    except (LowbitError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit {what}: {error!r:.200}") from None
    container.refuse(path, what, wrong)
    if ours:
        container.tie_(model, header)
    own = model.state_dict(keep_vars=True)
    # Quantizers come from the file, with its dtypes; the latents behind them are the module's.
    added = {name for name in own if name not in before and "original" not in name.rsplit(".", 1)[-1]}
    container.refuse(path, what, container.mismatches(model, header, tensors, set(own) if ours else added))
    for name in added:
        if own[name].is_floating_point() and not container.was_converted(header):
            own[name].data = own[name].data.to(tensors[name].dtype)
    if container.was_converted(header):  # a tensor that waits for its first batch would take the file's dtype
        waiting = {name: held.dtype for name, held in own.items() if held.shape == (0,)}
        tensors = {**tensors, **{name: tensors[name].to(dtype) for name, dtype in waiting.items()}}
    state = OrderedDict(tensors)
    state._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]  # some modules ask for their version
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:  # by a module's own rules for its state
        raise CheckpointError(f"{path} does not fit {what}: {error!s:.300}") from None


def _shared(model: nn.Module) -> dict[str, str]:
    """The further names of modules with several names, each with the module's first name."""
    first: dict[int, str] = {}
    further: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        before = first.setdefault(id(module), name)
        if before != name and not any(name.startswith(f"{outer}.") for outer in further):
            further[name] = before
    return further


def _share_(model: nn.Module, shared: Mapping[str, str], path: str | Path) -> None:
    """Restore the further names of shared modules, where a module of the same kind and shape has that name."""
    for name, first in shared.items():
        modules = dict(model.named_modules(remove_duplicate=False))
        own, module = modules.get(name), modules.get(first)
        if not name or own is None or module is None or _shape(own) != _shape(module):
            raise CheckpointError(
                f"{path} shares a module as {name!r:.80} and {first!r:.80}, which does not fit the model; get it anew"
            )
        model.set_submodule(name, module)


def _shape(module: nn.Module) -> list[Any]:
    """Kinds and shapes of a module's parts; equal for interchangeable modules, never for a module and its own part."""
    parts = [(name, type(part)) for name, part in module.named_modules(remove_duplicate=False)]
    return [parts, [(name, tensor.shape) for name, tensor in module.state_dict().items()]]


def _quantization(model: nn.Module) -> dict[str, Any] | None:
    """The methods of all quantized layers: enough to restore the quantizers, whatever configuration created them."""
    from lowbit.nn import quantized_layers
    from lowbit.nn.attention import low_bit_attentions
    from lowbit.nn.convert import method_of
    from lowbit.nn.products import low_bit_products, projections_of

    layers = {}
    attentions: dict[str, LowBitAttention | LowBitProducts] = {**low_bit_attentions(model), **low_bit_products(model)}
    inside = {f"{name}.{part}" for name in attentions for part in ("qk", "v")}  # their attention restores these
    for name, products in low_bit_products(model).items():
        if products.query_key:
            names = projections_of(name, model.get_submodule(name)).names
            inside |= {f"{name}.{part}" for part in names or ()}
    for layer in quantized_layers(model):
        if layer.name not in inside:
            layers[layer.name] = _methods(method_of(layer.weight), method_of(layer.activation))
    quantization: dict[str, Any] = {"layers": layers} if layers or attentions else {}
    if attentions:
        quantization["attention"] = {name: _attention_settings(attention) for name, attention in attentions.items()}
    return quantization or None


def _methods(weight: "Method | None", activation: "Method | None") -> dict[str, Any]:
    """The settings of both methods as plain dicts."""
    from lowbit.nn import QuantConfig

    plain = QuantConfig(weight=weight, activation=activation).to_dict()
    return {kind: plain[kind] for kind in ("weight", "activation")}


def _attention_settings(attention: "LowBitAttention | LowBitProducts") -> dict[str, Any]:
    settings = attention.settings
    return settings | _methods(settings["weight"], settings["activation"])


def _restore_quantization_(
    model: nn.Module, quantization: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], packed: bool
) -> list[str]:
    """Put the file's quantizers into ``model``; return one text for each layer that does not fit."""
    from lowbit.nn import QuantConfig
    from lowbit.nn.attention import LowBitAttention, is_attention
    from lowbit.nn.calls import replace_
    from lowbit.nn.convert import QUANTIZABLE, attach_
    from lowbit.nn.multihead import separate_
    from lowbit.nn.products import attach_products_, has_projections, projections_of
    from lowbit.nn.structure import description

    if description(model) is not None:
        return ["the module is packed already; give one as it was before lowbit.quantize_"]
    present = json.loads(json.dumps(_quantization(model)))
    if present is not None:
        if not packed and present == quantization:
            return []
        return ["the module is quantized already, and not as the saved one; give one as it was before lowbit.quantize_"]
    # A packed model may have no quantizers left, so what has become of torch's attention shows in the tensors' names.
    separate = {name.rpartition(".v_proj.")[0] for name in tensors if ".v_proj." in name}
    if separate:
        separate_(model, lambda layer, name: name.rpartition(".")[0] in separate)
    if quantization is None:
        return []
    wrong = []
    attentions = quantization.get("attention", {})
    for name, settings in attentions.items():
        attention = dict(model.named_modules()).get(name)
        if attention is None or not (is_attention(attention) or has_projections(attention)):
            wrong.append(f"there is no attention layer {name!r}")
            continue
        config = QuantConfig(weight=settings["weight"], activation=settings["activation"])
        settings = settings | {"weight": config.weight, "activation": config.activation}
        if is_attention(attention):
            replace_(model, attention, LowBitAttention(attention, **settings))
        else:
            attach_products_(attention, projections_of(name, attention), **settings)
    modules = dict(model.named_modules())
    for name, methods in quantization["layers"].items():
        layer = modules.get(name)
        if not isinstance(layer, QUANTIZABLE):
            wrong.append(
                f"there is no layer {name!r} to quantize" + ("" if layer is None else f" ({type(layer).__name__})")
            )
            continue
        config = QuantConfig(**methods)
        attach_(layer, config.weight, config.activation)
    return wrong
