"""`save`, `load` and `load_into`: a model, quantized or not, in one safetensors file that says what is in it.

The file's metadata holds one JSON document (`lowbit.container`): format version, how to rebuild a model of
`lowbit.models.create`, the quantization, which layers have it, and a checksum over all tensors. Everything is checked
before any of it is used; a file that fails is refused by `CheckpointError`. Of a module of the user's own the file says
what its layers are, but not how to build it: `load_into` takes the module that the user's code has built.
"""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowbit import container
from lowbit.container import DTYPES, FORMAT, load_weights_, read
from lowbit.container import checksum as _checksum  # noqa: F401  (its name here before there was the container)
from lowbit.errors import CheckpointError, LowbitError, MissingExtraError

__all__ = ["DTYPES", "FORMAT", "load", "load_into", "load_weights_", "read", "save"]


def save(model: nn.Module, path: str | Path, dtype: str | None = None, card: dict[str, Any] | None = None) -> Path:
    """Write ``model`` to ``path``, atomically.

    Args:
        model: any module, quantized by `lowbit.quantize_`, packed by `lowbit.pack`, or neither. One of
            `lowbit.models.create` is rebuilt by `load`; for any other `load_into` needs the module.
        path: the file; its folder is made if need be.
        dtype: how floating-point tensors are stored: None as they are, or "float32", "float16", "bfloat16".
        card: anything worth keeping beside the weights (JSON), e.g. how the model was trained.

    Raises:
        LowbitError: ``dtype`` is unknown, or the model holds something that a file cannot.
    """
    from lowbit.models.spec import check
    from lowbit.nn.deploy import description
    from lowbit.nn.fuse import FUSED

    if dtype is not None and dtype not in DTYPES:
        raise LowbitError(f"dtype={dtype!r} is not allowed; None, {', '.join(DTYPES)} are")
    spec = getattr(model, "spec", None)
    spec = spec if isinstance(spec, dict) else None  # a module of the user's own may use the name for something else
    if spec is not None:
        own = "model.spec is what lowbit.models.create noted; give an attribute of your own another name"
        check(spec, lambda message: LowbitError(f"{message}; {own}"))
    if getattr(model, "meta", None) == FUSED:
        raise LowbitError("a fused model cannot be saved; save the packed model, and fuse it again after loading")
    tensors, shared = container.collect(model, dtype)
    header = {
        "model": spec,
        "module": None if spec is not None else type(model).__name__[:200],
        "quantization": _quantization(model),
        "packed": description(model),
        "dtype": dtype,
        "shared": shared,
        "modules": _shared(model) if spec is not None else {},
        "card": card or {},
    }
    return container.write(path, header, tensors)


def load(path: str | Path) -> nn.Module:
    """Rebuild the model that `save` wrote, with its quantizers, in eval mode.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not one of ours, newer than this library, or holds a
            module that is not from `lowbit.models.create`.
    """
    from lowbit.models import create
    from lowbit.models.spec import check, check_size

    header, tensors = read(path)
    spec = header["model"]
    if spec is None:
        raise CheckpointError(
            f"{path} holds a module of your own ({header.get('module') or 'unnamed'}), which a file cannot build: "
            f"build it by your code and call lowbit.load_into(module, {str(path)!r})"
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


def _packed(header: dict[str, Any]) -> dict[str, Any]:
    """The packed layers, whose own numbers are float32 in a model of any dtype."""
    return (header.get("packed") or {}).get("layers", {})


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Put what `save` wrote into a module that your own code has built, in place.

    Args:
        model: built as the saved one was before `lowbit.quantize_`; its quantizers or packed layers come from the file,
            and so do all tensors. A module that is quantized already has to be quantized as the saved one.
        path: the file.

    Returns:
        The same module, in eval mode.

    Raises:
        CheckpointError: as `load`; or names, shapes, dtypes or tied tensors differ. One error names all layers that do
            not fit (the first few of many), and the module is unchanged.
    """
    header, tensors = read(path)
    tensors = container.expand(header, tensors, path)
    what = f"this {type(model).__name__}"
    lazy = [name for name, held in model.state_dict(keep_vars=True).items() if nn.parameter.is_lazy(held)]
    if lazy:
        raise CheckpointError(
            f"{what} has tensors without a shape ({', '.join(lazy[:3])}): run one batch through it first"
        )
    # On a copy first: what does not fit is found before the module is touched.
    _restore_(copy.deepcopy(model), header, tensors, path, what)
    _restore_(model, header, tensors, path, what)
    return model.eval()


def _restore_(
    model: nn.Module,
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str | Path,
    what: str,
    ours: bool = False,
) -> None:
    """Put quantizers, packed layers and tensors of the file into ``model``, called ``what`` in messages.

    ``ours``: the model was just built by `load`, so that floating-point tensors may be converted to its dtypes, and its
    tensors be tied as those of the file are.
    """
    from lowbit.nn.deploy import restore_

    before = set(model.state_dict())
    described = header.get("packed")
    try:
        wrong = _restore_quantization_(model, header["quantization"], packed=bool(described))
        if described and not wrong:
            wrong = restore_(model, described, tensors)
    except (LowbitError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit {what}: {error!r:.200}") from None
    container.refuse(path, what, wrong)
    if ours:
        container.tie_(model, header)
    own = model.state_dict(keep_vars=True)
    # Quantizers come from the file, with its dtypes; the latents behind them are the module's.
    made = {name for name in own if name not in before and "original" not in name.rsplit(".", 1)[-1]}
    container.refuse(path, what, container.mismatches(model, header, tensors, set(own) if ours else made))
    for name in made:
        if own[name].is_floating_point() and not container.was_converted(header):
            own[name].data = own[name].data.to(tensors[name].dtype)
    if container.was_converted(header):  # a tensor that waits for its first batch would take the file's dtype
        waiting = {name: held.dtype for name, held in own.items() if held.shape == (0,)}
        tensors = tensors | {name: tensors[name].to(dtype) for name, dtype in waiting.items()}
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:  # by a module's own rules for its state
        raise CheckpointError(f"{path} does not fit {what}: {error!s:.300}") from None


def _shared(model: nn.Module) -> dict[str, str]:
    """Further names of modules that have several, each with the first name."""
    first: dict[int, str] = {}
    made: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        before = first.setdefault(id(module), name)
        if before != name and not any(name.startswith(f"{outer}.") for outer in made):
            made[name] = before
    return made


def _share_(model: nn.Module, shared: dict[str, str], path: str | Path) -> None:
    """Give modules their further names back, in the place of modules of the same kind and shape."""
    for name, first in shared.items():
        modules = dict(model.named_modules(remove_duplicate=False))
        own, module = modules.get(name), modules.get(first)
        if not name or own is None or module is None or _shape(own) != _shape(module):
            raise CheckpointError(f"{path} shares a module as {name!r:.80} and {first!r:.80}, which the model has not")
        model.set_submodule(name, module)


def _shape(module: nn.Module) -> list[Any]:
    """What modules that can stand for each other have in common; no module has it in common with a part of itself."""
    parts = [(name, type(part)) for name, part in module.named_modules(remove_duplicate=False)]
    return [parts, [(name, tensor.shape) for name, tensor in module.state_dict().items()]]


def _quantization(model: nn.Module) -> dict[str, Any] | None:
    """Which layer has which method: enough to put the same quantizers back, whatever configuration made them."""
    from lowbit.nn import QuantConfig, quantized_layers
    from lowbit.nn.attention import low_bit_attentions

    layers, attentions = {}, low_bit_attentions(model)
    inside = {f"{name}.{layer}" for name in attentions for layer in ("qk", "v")}  # their attention puts these back
    for found in quantized_layers(model):
        if found.name in inside:
            continue
        config = QuantConfig(
            weight=found.weight and found.weight.config, activation=found.activation and found.activation.config
        )
        layers[found.name] = {
            kind: value for kind, value in config.to_dict().items() if kind in ("weight", "activation")
        }
    made: dict[str, Any] = {"layers": layers} if layers or attentions else {}
    if attentions:
        made["attention"] = {name: _attention_settings(attention) for name, attention in attentions.items()}
    return made or None


def _attention_settings(attention: nn.Module) -> dict[str, Any]:
    from lowbit.nn import QuantConfig

    settings = attention.settings
    return settings | {kind: QuantConfig(**{kind: settings[kind]}).to_dict()[kind] for kind in ("weight", "activation")}


def _restore_quantization_(model: nn.Module, quantization: dict[str, Any] | None, packed: bool) -> list[str]:
    """Put the file's quantizers into ``model``; return what does not fit, one text for each layer."""
    from lowbit.nn import QuantConfig
    from lowbit.nn.attention import LowBitAttention, is_attention
    from lowbit.nn.convert import QUANTIZABLE, attach_, replace_
    from lowbit.nn.deploy import description

    if description(model) is not None:
        return ["the module is packed already; give one as it was before lowbit.quantize_"]
    has = json.loads(json.dumps(_quantization(model)))
    if has is not None:
        if not packed and has == quantization:
            return []
        return ["the module is quantized already, and not as the saved one; give one as it was before lowbit.quantize_"]
    if quantization is None:
        return []
    wrong = []
    for name, settings in quantization.get("attention", {}).items():
        modules = dict(model.named_modules())
        if name not in modules or not is_attention(modules[name]):
            wrong.append(f"there is no attention {name!r}")
            continue
        methods = QuantConfig(**{kind: settings[kind] for kind in ("weight", "activation")})
        settings = settings | {"weight": methods.weight, "activation": methods.activation}
        replace_(model, modules[name], LowBitAttention(modules[name], **settings))
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
