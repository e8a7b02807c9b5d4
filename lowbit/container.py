"""The file that `lowbit.save` writes: safetensors, with one JSON document that says what the tensors are.

This module knows the file and nothing of models: writing, checking and reading it, and copying tensors into a module
that is there already. `lowbit.serialization` rebuilds models on top of it.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowbit.errors import CheckpointError, LowbitError
from lowbit.files import write_atomically

FORMAT = 3
"""3 also holds modules that are not from `lowbit.models.create`, and tied tensors. 2 had neither; 1 had neither low-bit
attention nor packed layers, and its checksum left the header out. All are read."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
}  # fmt: skip
MOST_MISTAKES = 8

# ---- what a header may hold ----

Name = Annotated[str, Field(max_length=1024)]
Size = Annotated[int, Field(ge=0, le=2**31 - 1)]
Pair = Annotated[list[Size], Field(min_length=2, max_length=2)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class PackedLayerEntry(_Entry):
    """What `lowbit.nn.packed.PackedLayer.settings` gives, and the kind of the layer."""

    kind: Literal["linear", "conv2d"]
    bits: Literal[2, 3, 4, 8]
    levels: Annotated[list[Annotated[int, Field(ge=-128, le=128)]], Field(min_length=2, max_length=256)]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**31 - 1)]], Field(min_length=2, max_length=4)]
    low: Annotated[int, Field(ge=-128, le=255)]
    high: Annotated[int, Field(ge=-128, le=255)]
    stride: Pair | None = None
    padding: Pair | None = None
    dilation: Pair | None = None


class PackedEntry(_Entry):
    """What `lowbit.nn.deploy.description` gives."""

    layers: dict[Name, PackedLayerEntry]
    stored: list[Name]
    folded: list[Name]


class LayerEntry(_Entry):
    """The methods of a quantized layer; `lowbit.nn.QuantConfig` checks their settings."""

    weight: dict[str, Any] | None = None
    activation: dict[str, Any] | None = None


class QuantizationEntry(_Entry):
    """Which layer has which method."""

    layers: dict[Name, LayerEntry]
    attention: dict[Name, dict[str, Any]] = {}


class Header(BaseModel):
    """All of it. A module that is not from `lowbit.models.create` has no ``model``, only the name of its class."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: int
    sha256: str
    model: dict[str, Any] | None
    quantization: QuantizationEntry | None
    packed: PackedEntry | None = None
    module: Annotated[str, Field(max_length=200)] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    shared: dict[Name, Name] = {}
    modules: dict[Name, Name] = {}
    card: dict[str, Any] = {}


# ---- writing and reading ----


def write(path: str | Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a file atomically; ``header`` without format and checksum."""
    from safetensors.torch import save as to_bytes

    header = {"format": FORMAT, **header}
    header["sha256"] = checksum(tensors, header)
    content = to_bytes(tensors, metadata={"lowbit": json.dumps(header)})
    write_atomically(path, lambda file: file.write(content))
    return Path(path)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked header and tensors of a file that `lowbit.save` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not one of ours, or newer than this library.
    """
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
    if _checksum_of(tensors, header) != header["sha256"]:
        raise CheckpointError(f"{path} has been altered: its contents do not match its checksum; get it anew")
    return header, tensors


def _header(raw: str, path: Path) -> dict[str, Any]:
    """The header as JSON holds it, with every entry of the kind that `lowbit.save` writes."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} has a damaged header (it is no JSON); get it anew") from None
    version = header.get("format") if isinstance(header, dict) else None
    if type(version) is int and version > FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads up to {FORMAT}: update lowbit")
    try:
        Header.model_validate(header)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(all)"
        raise CheckpointError(f"{path} has a damaged header ({where:.200}: {first['msg']:.200}); get it anew") from None
    return header


def _checksum_of(tensors: dict[str, Tensor], header: dict[str, Any]) -> str | None:
    try:
        return checksum(tensors, header)
    except (ValueError, RecursionError):  # text that has no UTF-8 form
        return None


def checksum(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """The sha256 over header and tensors; it shows damage, not who wrote the file."""
    digest = hashlib.sha256()
    if header["format"] > 1:
        said = {key: value for key, value in header.items() if key != "sha256"}
        digest.update(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- modules and their tensors ----


def collect(model: nn.Module, dtype: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of ``model`` as a file holds them.

    Args:
        model: any module.
        dtype: into which floating-point tensors are converted, one of `DTYPES`; None keeps them.

    Returns:
        ``(tensors, shared)``: contiguous tensors on the CPU, and for each further name of a tied tensor its first one.

    Raises:
        LowbitError: a state that is no tensor, has no values yet, or is of a kind that safetensors do not hold.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, held in model.state_dict(keep_vars=True).items():
        if not isinstance(held, Tensor):
            raise LowbitError(f"the state {name!r} is a {type(held).__name__}; a file holds tensors only")
        if is_lazy(held) or held.is_meta:
            raise LowbitError(f"the tensor {name!r} has no values yet; run one batch through the model, then save it")
        if held.layout != torch.strided or held.dtype not in STORABLE:
            raise LowbitError(f"the tensor {name!r} is {held.dtype}, {held.layout}; a file holds dense plain numbers")
        if (before := first.setdefault(_place(held), name)) != name:
            shared[name] = before
            continue
        stored = held.detach().cpu()
        stored = stored.to(DTYPES[dtype]) if dtype is not None and stored.is_floating_point() else stored
        tensors[name] = stored.clone(memory_format=torch.contiguous_format)  # views of one storage come apart
    return tensors, shared


def _place(tensor: Tensor) -> Any:
    """The same for tensors that are one, be it as one object or by one memory."""
    if isinstance(tensor, Tensor) and not is_lazy(tensor) and not tensor.is_meta and tensor.numel():
        return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    return id(tensor)


def expand(header: dict[str, Any], tensors: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """``tensors`` with the further names of tied ones."""
    shared = header.get("shared", {})
    for name, first in shared.items():
        if name in tensors or first not in tensors:
            raise CheckpointError(f"{path} says that {name!r} is tied to {first!r}, which does not fit its tensors")
    return tensors | {name: tensors[first] for name, first in shared.items()}


def tie_(model: nn.Module, header: dict[str, Any]) -> None:
    """Make one parameter or buffer of those that are one in the file, where they are of one shape and dtype."""
    own = model.state_dict(keep_vars=True)
    for name, first in header.get("shared", {}).items():
        one, other = own.get(first), own.get(name)
        if one is other or one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            continue
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        for held in (module._parameters, module._buffers):
            if held.get(leaf) is other and type(one) is type(other):
                held[leaf] = one


def was_converted(header: dict[str, Any]) -> bool:
    """Whether floating-point tensors may have another dtype in the file than in the model; before 3 none is told."""
    return header["format"] < 3 or header.get("dtype") is not None


def mismatches(
    model: nn.Module,
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    follow: frozenset[str] | set[str] = frozenset(),
) -> list[str]:
    """What of ``tensors`` (expanded) does not fit ``model``: names, shapes, dtypes and ties, one text for each.

    Args:
        model: a module.
        header: the file's.
        tensors: the file's.
        follow: names of floating-point tensors whose dtype may differ.
    """
    wrong = []
    own = model.state_dict(keep_vars=True)
    wrong += [f"{name!r} is not in the file" for name in own if name not in tensors]
    wrong += [f"{name!r} is not in the module" for name in tensors if name not in own]
    for name, held in own.items():
        saved = tensors.get(name)
        if saved is None:
            continue
        if not isinstance(held, Tensor):
            wrong.append(f"{name!r} is a {type(held).__name__} in the module")
            continue
        if is_lazy(held):
            wrong.append(f"{name!r} has no shape yet (run one batch through the module first)")
            continue
        if held.shape == (0,):  # of a quantizer that waits for its first batch
            continue
        floats = held.is_floating_point() and saved.is_floating_point()
        same = held.dtype == saved.dtype or (floats and (was_converted(header) or name in follow))
        if held.shape != saved.shape or not same:
            wrong.append(f"{name!r} is {_kind(held)} in the module, {_kind(saved)} in the file")
    shared = header.get("shared", {})
    for name, first in shared.items():
        if name in own and first in own and _place(own[name]) != _place(own[first]):
            wrong.append(f"{name!r} and {first!r} are one tensor in the file, two in the module")
    firsts: dict[Any, str] = {}
    for name, held in own.items():
        first = firsts.setdefault(_place(held), name)
        tied = shared.get(name, name) == shared.get(first, first)
        if name in tensors and first in tensors and not tied and not torch.equal(tensors[name], tensors[first]):
            wrong.append(f"{name!r} and {first!r} are one tensor in the module, two in the file")
    return wrong


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def refuse(path: str | Path, what: str, wrong: list[str]) -> None:
    """Raise one CheckpointError if anything is ``wrong`` between the file and ``what``."""
    if wrong:
        more = f"; and {len(wrong) - MOST_MISTAKES} more" if len(wrong) > MOST_MISTAKES else ""
        told = "; ".join(text if len(text) <= 300 else text[:299] + "…" for text in wrong[:MOST_MISTAKES])
        raise CheckpointError(f"{path} does not fit {what}: {told}{more}")


def load_weights_(model: nn.Module, path: str | Path) -> nn.Module:
    """Copy the weights saved in ``path`` into ``model`` (same architecture, both full precision), in place.

    Floating-point tensors are converted to the dtypes of ``model``.

    Raises:
        CheckpointError: as `read`; also where the file is of another model or holds a quantized one.
    """
    header, tensors = read(path)
    if header["quantization"] is not None or header.get("packed"):
        raise CheckpointError(f"{path} holds a quantized model; lowbit.load({str(path)!r}) rebuilds it whole")
    tensors = expand(header, tensors, path)
    refuse(path, f"the model {type(model).__name__}", mismatches(model, header, tensors, set(tensors)))
    model.load_state_dict(tensors)
    return model
