"""`save` and `load`: a model, quantised or not, in one safetensors file that says what is in it.

The file's metadata holds one JSON document: format version, how to rebuild the model (`lowbit.models.create`),
the quantisation, which layers have it, and a checksum over all tensors. Everything is checked before any of it
is used; a file that fails is refused by `CheckpointError`.
"""

import hashlib
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError, LowbitError

FORMAT = 2
"""1 had neither low-bit attention nor packed layers, and its checksum left the header out; it is read as before."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save(model: nn.Module, path: str | Path, dtype: str = "float32", card: dict[str, Any] | None = None) -> Path:
    """Writes ``model`` to ``path``, atomically.

    Args:
        model: from `lowbit.models.create`, quantised by `lowbit.quantize_` or not.
        path: the file; its folder is made if need be.
        dtype: how floating-point tensors are stored: "float32", or "float16"/"bfloat16" at half the size.
        card: anything worth keeping beside the weights (JSON), e.g. how the model was trained.

    Raises:
        LowbitError: the model does not know how it was made, or ``dtype`` is unknown.
    """
    from safetensors.torch import save as to_bytes

    from lowbit.models.spec import check
    from lowbit.nn.deploy import description

    if dtype not in DTYPES:
        raise LowbitError(f"dtype={dtype!r} is not allowed; {', '.join(DTYPES)} are")
    spec = getattr(model, "spec", None)
    if spec is None:
        raise LowbitError(
            "this model does not say how to rebuild it: make it with lowbit.models.create(name, ...), or set "
            "model.spec = {'name': ..., ...} with the arguments of create"
        )
    check(spec, LowbitError)
    tensors, tied, shared = {}, _tied(model), _shared(model)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        stored = tensor.detach().cpu().contiguous()
        tensors[name] = stored.to(DTYPES[dtype], copy=True) if stored.is_floating_point() else stored.clone()
    header = {
        "format": FORMAT,
        "model": spec,
        "quantization": _quantization(model),
        "packed": description(model),
        "card": card or {},
    }
    header |= {key: names for key, names in (("tied", tied), ("shared", shared)) if names}
    header["sha256"] = _checksum(tensors, header)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(to_bytes(tensors, metadata={"lowbit": json.dumps(header)}))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def load(path: str | Path) -> nn.Module:
    """Rebuilds the model that `save` wrote, with its quantisers, in eval mode.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not one of ours, or newer than this library.
    """
    from lowbit.models import create
    from lowbit.models.spec import check, check_size
    from lowbit.nn.deploy import restore_

    header, tensors = read(path)
    spec = header["model"]
    check(spec, lambda message: CheckpointError(f"{path}: {message}"))
    try:
        check_size(partial(create, **spec), spec["name"], Path(path).stat().st_size)
        model = create(**spec)
    except CheckpointError:
        raise
    except (LowbitError, TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} describes a model that cannot be built ({error!s:.200})") from None
    _share_(model, header.get("shared", {}), path)
    try:
        _restore_quantization(model, header["quantization"], path)
        if header.get("packed"):
            restore_(model, header["packed"], tensors)
    except CheckpointError:
        raise
    except (LowbitError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the model {spec['name']!r}: {error!r:.200}") from None
    _fill(model, tensors, path)
    _tie_(model, header.get("tied", {}), path)
    return model.eval()


def load_weights_(model: nn.Module, path: str | Path) -> nn.Module:
    """Copies the weights saved in ``path`` into ``model`` (same architecture, both full precision), in place.

    Raises:
        CheckpointError: as `load`; also where the file is of another model or holds a quantised one.
    """
    header, tensors = read(path)
    if header["quantization"] is not None or header.get("packed"):
        raise CheckpointError(f"{path} holds a quantised model; lowbit.load({str(path)!r}) rebuilds it whole")
    _fill(model, tensors, path)
    return model


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked header and tensors of a file that `save` wrote; see `load` for what is refused."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get("lowbit")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); get it anew") from None
    if raw is None:
        raise CheckpointError(f"{path} is a safetensors file that lowbit.save did not write: it has no header of ours")
    header = _header(raw, path)
    if header["format"] > FORMAT:
        version = header["format"]
        raise CheckpointError(f"{path} has format {version}, this version reads up to {FORMAT}: update lowbit")
    if _checksum(tensors, header) != header["sha256"]:
        raise CheckpointError(f"{path} has been altered: its contents do not match its checksum; get it anew")
    for name, first in header.get("tied", {}).items():
        if name in tensors or not isinstance(first, str) or first not in tensors:
            raise CheckpointError(f"{path} has a damaged header: it ties {name!r:.80} to {first!r:.80}; get it anew")
    return header, tensors | {name: tensors[first] for name, first in header.get("tied", {}).items()}


def _header(raw: str, path: Path) -> dict[str, Any]:
    """The header as JSON holds it, with every entry of the kind that `save` writes."""
    kinds = {"format": int, "sha256": str, "model": dict, "quantization": dict | None}
    optional = {"packed": dict | None, "card": dict, "tied": dict, "shared": dict}
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    entries = header.items() if isinstance(header, dict) else ()
    right = kinds.keys() <= {key for key, _ in entries} and all(
        isinstance(value, (kinds | optional).get(key, object)) and not isinstance(value, bool) for key, value in entries
    )
    if not right:
        raise CheckpointError(f"{path} has a damaged header; get it anew")
    return header


def _checksum(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    if header["format"] > 1:
        said = {key: value for key, value in header.items() if key != "sha256"}
        digest.update(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _quantization(model: nn.Module) -> dict[str, Any] | None:
    """Which layer has which method: enough to put the same quantisers back, whatever configuration made them."""
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


def _restore_quantization(model: nn.Module, quantization: dict[str, Any] | None, path: str | Path) -> None:
    from lowbit.nn import QuantConfig
    from lowbit.nn.attention import LowBitAttention, is_attention
    from lowbit.nn.convert import attach_, replace_

    if quantization is None:
        return
    for name, settings in quantization.get("attention", {}).items():
        modules = dict(model.named_modules())
        if name not in modules or not is_attention(modules[name]):
            raise CheckpointError(f"{path} quantises an attention {name!r} that {model.spec['name']!r} has not")
        methods = QuantConfig(**{kind: settings[kind] for kind in ("weight", "activation")})
        settings = settings | {"weight": methods.weight, "activation": methods.activation}
        replace_(model, modules[name], LowBitAttention(modules[name], **settings))
    modules = dict(model.named_modules())
    for name, methods in quantization["layers"].items():
        if name not in modules:
            raise CheckpointError(f"{path} quantises a layer {name!r} that the model {model.spec['name']!r} has not")
        config = QuantConfig(**methods)
        attach_(modules[name], config.weight, config.activation)


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()
        raise CheckpointError(
            f"{path} does not fit the model: {' '.join(line.strip() for line in reason[1:3])}"
        ) from None


def _tied(model: nn.Module) -> dict[str, str]:
    """Names in the state dict whose tensor has come before, each with the first name of that tensor."""
    first: dict[Any, str] = {}
    made = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and not name.endswith("_extra_state"):
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if (before := first.setdefault(key, name)) != name:
                made[name] = before
    return made


def _tie_(model: nn.Module, tied: dict[str, str], path: str | Path) -> None:
    """Makes parameters and buffers that were one tensor one again; they have the same values already."""
    for name, first in tied.items():
        owner, _, last = name.rpartition(".")
        holder, other = model.get_submodule(owner), model.get_submodule(first.rpartition(".")[0])
        for kind in ("_parameters", "_buffers"):
            own, tensor = (getattr(m, kind) for m in (holder, other))
            tensor = tensor.get(first.rpartition(".")[2])
            if last in own and tensor is not None and own[last].shape == tensor.shape:
                own[last] = tensor
                break
        else:
            raise CheckpointError(f"{path} ties {name!r} to {first!r}, which does not fit the model")


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
    """Gives modules their further names back, in the place of modules of the same kind and shape."""
    for name, first in shared.items():
        modules = dict(model.named_modules(remove_duplicate=False))
        own, module = modules.get(name), modules.get(str(first))
        if not name or own is None or module is None or _shape(own) != _shape(module):
            raise CheckpointError(f"{path} shares a module as {name!r:.80} and {first!r:.80}, which the model has not")
        model.set_submodule(name, module)


def _shape(module: nn.Module) -> list[Any]:
    """What modules that can stand for each other have in common; no module has it in common with a part of itself."""
    parts = [(name, type(part)) for name, part in module.named_modules(remove_duplicate=False)]
    return [parts, [(name, tensor.shape) for name, tensor in module.state_dict().items()]]
