"""The file that `lowbit.save` writes: safetensors, with one JSON document that describes the tensors.

This module writes, checks and reads the file, and copies tensors into an existing module. It does not know how to build
models: `lowbit.serialization` does that on top of it.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowbit.errors import CheckpointError, LowbitError
from lowbit.files import write_atomically

FORMAT = 3
"""Format 3 added modules that are not from `lowbit.models.create`, and tied tensors; format 2 added low-bit attention,
packed layers and a checksum that covers the header. This version reads all three."""
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
    """The settings of a packed layer (`lowbit.nn.packed.PackedLayer.settings`) and its kind."""

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
    """The structure of a packed model, as `lowbit.nn.structure.description` returns it."""

    layers: dict[Name, PackedLayerEntry]
    stored: list[Name]
    folded: list[Name]


class LayerEntry(_Entry):
    """The methods of a quantized layer; `lowbit.nn.QuantConfig` checks their settings."""

    weight: dict[str, Any] | None = None
    activation: dict[str, Any] | None = None


class QuantizationEntry(_Entry):
    """The methods of all quantized layers, by name."""

    layers: dict[Name, LayerEntry]
    attention: dict[Name, dict[str, Any]] = {}


class Header(BaseModel):
    """The whole header. ``model`` is None for a module not from `lowbit.models.create`; ``module`` names its class."""

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
    """Write a file atomically.

    Args:
        path: the file.
        header: the header without format and checksum, which are added.
        tensors: contiguous tensors on the CPU.

    Returns:
        The path.
    """
    from safetensors.torch import save as to_bytes

    header = {"format": FORMAT, **header}
    header["sha256"] = checksum(tensors, header)
    content = to_bytes(tensors, metadata={"lowbit": json.dumps(header)})
    write_atomically(path, lambda file: file.write(content))
    return Path(path)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check the header and tensors of a file that `lowbit.save` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not from `lowbit.save`, or newer than this library.
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
        raise CheckpointError(f"{path} is a safetensors file that lowbit.save did not write: it has no lowbit header")
    header = _header(raw, path)
    if _checksum_of(tensors, header) != header["sha256"]:
        raise CheckpointError(f"{path} has been altered: its contents do not match its checksum; get it anew")
    return header, tensors


def _header(raw: str, path: Path) -> dict[str, Any]:
    """The parsed header, after a check that every entry has the type that `lowbit.save` writes."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} has a damaged header (it is not JSON); get it anew") from None
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


def _checksum_of(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str | None:
    try:
        return checksum(tensors, header)
    except (ValueError, RecursionError):  # text that has no UTF-8 form
        return None


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """The sha256 of header and tensors, as hex digits; it detects damage, but does not prove who wrote the file."""
    digest = hashlib.sha256()
    if header["format"] > 1:
        covered = {key: value for key, value in header.items() if key != "sha256"}
        digest.update(json.dumps(covered, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- modules and their tensors ----


def collect(model: nn.Module, dtype: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of ``model`` in the form that a file stores.

    Args:
        model: any module.
        dtype: name of the dtype to convert floating-point tensors to, one of `DTYPES`; None keeps theirs.

    Returns:
        ``(tensors, shared)``: contiguous tensors on the CPU, and the first name for each further name of a tied tensor.

    Raises:
        LowbitError: an entry of the state is not a tensor, has no values yet, or cannot be stored by safetensors.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for name, held in model.state_dict(keep_vars=True).items():
        if not isinstance(held, Tensor):
            raise LowbitError(
                f"the state {name!r} is a {type(held).__name__}; a file holds tensors only: let the module's "
                "get_extra_state return a tensor, or remove it"
            )
        if is_lazy(held) or held.is_meta:
            raise LowbitError(f"the tensor {name!r} has no values yet; run one batch through the model, then save it")
        if held.layout != torch.strided or held.dtype not in STORABLE:
            raise LowbitError(
                f"the tensor {name!r} is {held.dtype}, {held.layout}; a file holds dense tensors of "
                "float16 to float64, bfloat16, int8 to int64, uint8 and bool: convert it (view_as_real for complex "
                "numbers), or register the buffer with persistent=False if the module's code fills it"
            )
        if (before := first.setdefault(_place(held), name)) != name:
            shared[name] = before
            continue
        stored = held.detach().cpu()
        stored = stored.to(DTYPES[dtype]) if dtype is not None and stored.is_floating_point() else stored
        tensors[name] = stored.clone(memory_format=torch.contiguous_format)  # views of one storage come apart
    return tensors, shared


def _place(tensor: Tensor) -> Hashable:
    """A key that is equal for tied tensors: the same object, or the same view of the same memory."""
    if isinstance(tensor, Tensor) and not is_lazy(tensor) and not tensor.is_meta and tensor.numel():
        return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    return id(tensor)


def expand(header: Mapping[str, Any], tensors: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Add the further names of tied tensors to ``tensors``.

    Raises:
        CheckpointError: the header ties names that do not fit the tensors.
    """
    shared = header.get("shared", {})
    for name, first in shared.items():
        if name in tensors or first not in tensors:
            raise CheckpointError(f"{path} says that {name!r} is tied to {first!r}, which does not fit its tensors")
    return tensors | {name: tensors[first] for name, first in shared.items()}


def tie_(model: nn.Module, header: Mapping[str, Any]) -> None:
    """Tie the parameters and buffers of ``model`` that are tied in the file, if their shapes and dtypes agree."""
    own = model.state_dict(keep_vars=True)
    for name, first in header.get("shared", {}).items():
        kept, replaced = own.get(first), own.get(name)
        if kept is replaced or kept is None or replaced is None or type(kept) is not type(replaced):
            continue
        if (kept.shape, kept.dtype) != (replaced.shape, replaced.dtype):
            continue
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if module._parameters.get(leaf) is replaced:
            module._parameters[leaf] = kept
        elif module._buffers.get(leaf) is replaced:
            module._buffers[leaf] = kept


def was_converted(header: Mapping[str, Any]) -> bool:
    """Whether floating-point tensors may have another dtype in the file than in the model; formats 1 and 2 omit it."""
    return header["format"] < 3 or header.get("dtype") is not None


def mismatches(
    model: nn.Module,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    follow: AbstractSet[str] = frozenset(),
) -> list[str]:
    """List the names, shapes, dtypes and ties in which ``tensors`` do not fit ``model``.

    Args:
        model: a module.
        header: the file's header.
        tensors: the file's tensors, after `expand`.
        follow: names of floating-point tensors whose dtype may differ.

    Returns:
        One text for each difference; empty if everything fits.
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
        if held.shape == (0,):  # the parameter of a quantizer that waits for its first batch
            continue
        floats = held.is_floating_point() and saved.is_floating_point()
        same = held.dtype == saved.dtype or (floats and (was_converted(header) or name in follow))
        if held.shape != saved.shape or not same:
            wrong.append(f"{name!r} is {_kind(held)} in the module, {_kind(saved)} in the file")
    shared = header.get("shared", {})
    for name, first in shared.items():
        if name in own and first in own and _place(own[name]) != _place(own[first]):
            wrong.append(f"{name!r} and {first!r} are one tensor in the file, two in the module")
    firsts: dict[Hashable, str] = {}
    for name, held in own.items():
        first = firsts.setdefault(_place(held), name)
        tied = shared.get(name, name) == shared.get(first, first)
        if name in tensors and first in tensors and not tied and not torch.equal(tensors[name], tensors[first]):
            wrong.append(f"{name!r} and {first!r} are one tensor in the module, two in the file")
    return wrong


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def refuse(path: str | Path, what: str, wrong: Sequence[str]) -> None:
    """Raise one CheckpointError that lists ``wrong``, the differences between the file and ``what``, if any."""
    if wrong:
        more = f"; and {len(wrong) - MOST_MISTAKES} more" if len(wrong) > MOST_MISTAKES else ""
        shown = "; ".join(text if len(text) <= 300 else text[:299] + "…" for text in wrong[:MOST_MISTAKES])
        raise CheckpointError(f"{path} does not fit {what}: {shown}{more}")


def load_weights_(model: nn.Module, path: str | Path) -> nn.Module:
    """Copy the weights saved in ``path`` into ``model``, in place; both are in full precision.

    Args:
        model: a model of the saved architecture; floating-point tensors are converted to its dtypes.
        path: a file that `lowbit.save` wrote.

    Returns:
        The same model.

    Raises:
        CheckpointError: as `read`; also if the file holds another architecture or a quantized model.
    """
    header, tensors = read(path)
    if header["quantization"] is not None or header.get("packed"):
        raise CheckpointError(
            f"{path} holds a quantized model; lowbit.load({str(path)!r}) rebuilds it with its quantizers"
        )
    tensors = expand(header, tensors, path)
    refuse(path, f"the model {type(model).__name__}", mismatches(model, header, tensors, set(tensors)))
    model.load_state_dict(tensors)
    return model
