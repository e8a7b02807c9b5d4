"""Lowering: from the graph of `lowbit.fuse` to the operations of a plan.

The graph is interpreted once for a batch of one, with a `_Value` in the place of each tensor: the numbers of the
elements it consists of. So every view and rearrangement (flatten, transpose, slices, windows of Swin, concatenation) is
computed by torch itself, on these numbers; what an operation reads is then known exactly, and is copied only where it
does not lie in memory as rows. Integers between layers are not values of their own: a layer asks for its input rounded
by its step, and the operation before writes it so, if it can.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit.engine import format as file_format
from lowbit.engine.format import Op
from lowbit.engine.format import Tensor as Stored
from lowbit.engine.runtime import Plan
from lowbit.errors import LowbitError
from lowbit.kernels.packing import pack as pack_codes
from lowbit.kernels.packing import integer_levels, weight_codes
from lowbit.nn.fuse import FUSED, as_floats, fuse, plain_attention
from lowbit.nn.packed import PackedConv2d, PackedLinear, is_stored
from lowbit.quantizers.base import ActivationQuantizer

SKEW = 512  # from so many bytes on, rows of a linear layer are 64 bytes apart, out of each other's cache sets
_SHIFT = 40  # bits of an element's number that say where in its tensor it is
CLOSE = 0.25
"""How far the plan's output for the example may be from the model's, as a share of its norm, where float operations
differ in their last bits, so that single activations are rounded to the neighboring step."""


def plan(model: nn.Module, example: Tensor | None = None, threads: int | None = None) -> Plan:
    """Lower a packed model to a plan that C code runs in one call.

    Products on integers give the same bits as ``model``. Float operations (LayerNorm, GELU, softmax, averages) are
    defined in ``lowbit/kernels/csrc/vector.h``, the same to the bit on every processor; they differ from PyTorch's in
    the last bits. The plan is compared with ``model`` for the example.

    Args:
        model: a model with one input from `lowbit.pack`, or what `lowbit.fuse` made of it.
        example: an input batch; later ones have the same shape but for the number of items, which is free. None uses a
            generated input for models of `lowbit.models.create`.
        threads: see `Plan`.

    Raises:
        LowbitError: the model is not packed, has an operation that plans do not know (the message names the module and
            the operation; `lowbit.fuse` goes further), or the plan gives another output for the example.
    """
    if isinstance(model, fx.GraphModule) and model.meta.get("made_by") == FUSED["made_by"]:
        graph = model
    else:
        graph = fuse(model, example)
    if example is None:
        from lowbit.nn.deploy import made_up

        example = made_up(model, random=True)
        if example is None:
            raise LowbitError("the shape of this model's input is not known: pass an example, lowbit.plan(model, x)")
    if example.dtype != torch.float32:
        raise LowbitError(f"the example is {example.dtype}; plans take float32")
    lowering = _Lowering(example.shape[1:])
    with torch.no_grad():
        y = lowering.run(graph)
    made = Plan(lowering.finish(y), threads)
    _compare(made, model, example, exact=lowering.exact)
    return made


@torch.no_grad()
def _compare(made: Plan, model: nn.Module, example: Tensor, exact: bool) -> None:
    """Refuse a plan that gives another output than the model, for the example and for a batch of two."""
    batch = torch.cat([example, example.flip(0)])[:3].cpu()
    expected = model.eval()(batch.to(example.device)).cpu().flatten(1)
    actual = made(batch)
    if exact:
        same = torch.equal(actual, expected)
    else:
        same = bool((actual - expected).norm() <= CLOSE * expected.norm()) or torch.equal(actual, expected)
    if actual.shape != expected.shape or not same:
        raise LowbitError(
            f"the plan of {type(model).__name__} gives another output than the model for the example; use the model "
            "itself, or lowbit.fuse"
        )


class _Value:
    """A tensor of the graph: which elements of which stored tensors it consists of.

    Args:
        ids: int64, of the tensor's shape with a batch of one: ``number of the stored tensor << 40 | element``.
    """

    def __init__(self, ids: Tensor):
        self.ids = ids

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape

    @property
    def ndim(self) -> int:
        return self.ids.ndim

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(eq=False)
class _Request:
    """An operation's wish for a map: the view of rows ``[rows, channels]`` it reads, and how it is rounded."""

    op: Op
    source: Stored
    offset: int
    step: int
    planar: bool
    size: tuple[int, int, int]
    border: tuple[int, int]
    scale: float | None
    dynamic: int
    low: int
    high: int
    before: bytes
    tight: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """Requests with the same key are served by one map."""
        view = (id(self.source), self.offset, self.step, self.planar, self.size)
        return (*view, self.scale, self.dynamic, self.low, self.high, self.before, self.tight)


class _Lowering:
    """The operations so far, and what is known of their values."""

    def __init__(self, shape: Sequence[int]):
        height, width = (shape[1], shape[2]) if len(shape) == 3 else (1, math.prod(shape[1:]) if shape else 1)
        self.x = Stored(height, width, shape[0] if shape else 1)
        self.shape = tuple(shape)
        self.stored: list[Stored | np.ndarray] = []
        self.ops: list[Op] = []
        self.made: dict[Stored, Op] = {}
        self.requests: list[_Request] = []
        self.exact = True  # whether there are only operations that are the same to the bit in PyTorch

    # ---- values ----

    def number(self, stored: Stored | np.ndarray) -> int:
        """Its number in ids."""
        for i, other in enumerate(self.stored):
            if other is stored:
                return i
        self.stored.append(stored)
        return len(self.stored) - 1

    def value(self, stored: Stored | np.ndarray, shape: Sequence[int]) -> _Value:
        """All elements of a stored tensor, in order, with that shape."""
        count = stored.size if isinstance(stored, np.ndarray) else stored.rows * stored.channels
        ids = torch.arange(count) + (self.number(stored) << _SHIFT)
        return _Value(ids.reshape(tuple(shape)))

    def of(self, x: Any) -> _Value:
        """A value of the graph, or a constant tensor as one."""
        if isinstance(x, _Value):
            return x
        array = np.ascontiguousarray(x.detach().float().cpu().numpy())
        return self.value(array, x.shape)

    def constant(self, ids: Tensor) -> np.ndarray | None:
        """The numbers, if all of these elements are constants."""
        numbers = ids.flatten() >> _SHIFT
        if not all(isinstance(self.stored[i], np.ndarray) for i in numbers.unique().tolist()):
            return None
        flat = ids.flatten()
        out = np.empty(flat.numel(), np.float32)
        for i in numbers.unique().tolist():
            mask = (numbers == i).numpy()
            out[mask] = self.stored[i].reshape(-1)[(flat[numbers == i] - (i << _SHIFT)).numpy()]
        return out

    def add(self, op: Op) -> None:
        """Append an operation."""
        self.ops.append(op)
        if op.floats is not None:
            self.made[op.floats] = op

    # ---- how operations read ----

    def view(self, rows: Tensor) -> tuple[Stored, int, int] | None:
        """The tensor, offset and step of ids ``[rows, channels]``, if they lie in memory like that."""
        first = int(rows[0, 0])
        stored = self.stored[first >> _SHIFT]
        step = int(rows[1, 0]) - first if len(rows) > 1 else rows.shape[1]
        if isinstance(stored, np.ndarray) or step < 0:
            return None
        expected = first + step * torch.arange(len(rows))[:, None] + torch.arange(rows.shape[1])
        return (stored, first & ((1 << _SHIFT) - 1), step) if torch.equal(rows, expected) else None

    def dense(self, ids: Tensor, size: tuple[int, int, int]) -> Stored:
        """A tensor that holds exactly these elements in order: the one they come from, or a copy."""
        flat = ids.flatten()
        stored = self.stored[int(flat[0]) >> _SHIFT]
        if isinstance(stored, Stored) and stored is not self.x and stored.rows * stored.channels == flat.numel():
            if torch.equal(flat, int(flat[0]) + torch.arange(flat.numel())) and not int(flat[0]) & ((1 << _SHIFT) - 1):
                return stored
        return self.copy(flat, size)

    def copy(self, flat: Tensor, size: tuple[int, int, int]) -> Stored:
        """A new tensor of these elements, of whatever tensors."""
        jumps = torch.nonzero(flat[1:] != flat[:-1] + 1).flatten() + 1
        begins = [0, *jumps.tolist()]
        ends = [*begins[1:], flat.numel()]
        sources: list[Stored] = []
        constants: list[np.ndarray] = []
        pieces = []
        for begin, end in zip(begins, ends, strict=True):
            first = int(flat[begin])
            stored, at = self.stored[first >> _SHIFT], first & ((1 << _SHIFT) - 1)
            if isinstance(stored, np.ndarray):
                source, at_source = 4, sum(array.size for array in constants)
                constants.append(stored.reshape(-1)[at : at + end - begin])
                at = at_source
            else:
                if not any(stored is other for other in sources):
                    sources.append(stored)
                source = next(i for i, other in enumerate(sources) if other is stored)
            pieces.append((begin, source, at, end - begin))
        if len(sources) > 4:
            raise LowbitError("a concatenation of more than 4 tensors is not an operation of plans")
        made = Stored(*size)
        data = {0: np.array(pieces, np.int64)}
        if constants:
            data[1] = np.concatenate(constants).astype(np.float32)
        self.add(Op("copy", [*sources], made, data=data))
        return made

    def rows_of(self, ids: Tensor) -> tuple[Stored, int, int]:
        """Where ids ``[rows, channels]`` lie, after a copy if need be."""
        found = self.view(ids)
        if found is None:
            made = self.copy(ids.flatten(), (1, len(ids), ids.shape[1]))
            found = (made, 0, ids.shape[1])
        return found

    def ask(
        self,
        op: Op,
        ids: Tensor,
        border: tuple[int, int],
        scale: Tensor | None,
        low: int,
        high: int,
        before: Tensor | None,
        tight: bool,
    ) -> None:
        """Let ``op`` read the elements ``[height, width, channels]`` from a map as its first input.

        ``tight``: without pads between the places, though the number of channels is not a multiple of 4.
        """
        height, width, channels = ids.shape
        rows = ids.reshape(-1, channels)
        planes = ids.permute(2, 0, 1).flatten()
        first = self.stored[int(planes[0]) >> _SHIFT]
        planar = (
            isinstance(first, Stored)
            and rows.shape[0] > 1
            and channels > 1
            and first.rows * first.channels == planes.numel()
            and torch.equal(planes, int(planes[0]) + torch.arange(planes.numel()))
        )
        source, offset, step = (first, 0, channels) if planar else self.rows_of(rows)
        dynamic = 0
        if scale is None:
            dynamic = 1 if op.name == "linear" else 2
        kept = b"" if before is None else before.detach().float().reshape(-1).numpy().tobytes()
        step_size = None if scale is None else float(scale)
        size = (height, width, channels)
        self.requests.append(
            _Request(op, source, offset, step, planar, size, border, step_size, dynamic, low, high, kept, tight)
        )

    # ---- the end ----

    def finish(self, y: Any) -> bytes:
        """Serve the requests for maps, and write the file."""
        if not isinstance(y, _Value):
            raise LowbitError(f"the model returns a {type(y).__name__}; plans return one tensor")
        out = self.dense(y.ids, (1, 1, y.ids.numel())) if y.ids.numel() else None
        if out is None or out is self.x:
            raise LowbitError("the model returns nothing that it computed")
        self._merge_affine(out)
        maps: dict[tuple[Any, ...], Stored] = {}
        groups: dict[tuple[Any, ...], list[_Request]] = {}
        for request in self.requests:
            groups.setdefault(request.key, []).append(request)
        for key, group in groups.items():
            maps[key] = self._serve(group)
        for request in self.requests:
            request.op.inputs[0] = maps[request.key]
        read = {tensor for op in self.ops for tensor in op.inputs if tensor is not None} | {out}
        for op in self.ops:
            if op.map is not None and op.kind != "quantize" and op.floats not in read:
                op.floats = None
        return file_format.write(self.ops, self.x, out)

    def _merge_affine(self, out: Stored) -> None:
        """Let depthwise convolutions take in a BatchNorm and a ReLU that alone read them, as `fuse` does for others."""
        for op in list(self.ops):
            if op.kind != "affine" or op not in self.ops:
                continue
            source = op.inputs[0]
            before = None if source is None else self.made.get(source)
            if before is None or source is out or op.floats is None:
                continue
            readers = sum(source in other.inputs for other in self.ops) + sum(r.source is source for r in self.requests)
            whole = not op.n[0] and op.n[1] == source.channels and op.floats.channels == source.channels
            if before.kind == "affine" and whole and readers == 1 and not before.n[11] and not op.data:
                before.n[11], before.f[2] = op.n[11], op.f[2]
            elif before.kind == "depthwise" and whole and readers == 1 and not before.n[11]:
                if op.data and (4 in before.data or len(op.data) < 2):
                    continue
                before.n[11], before.f[2] = op.n[11], op.f[2]
                if op.data:
                    before.data[4] = np.stack([op.data[0], op.data[1]])
            else:
                continue
            made = op.floats
            made.height, made.width = source.height, source.width
            before.floats = made
            self.made[made] = before
            self.ops.remove(op)

    def _serve(self, group: list[_Request]) -> Stored:
        """The map for requests that agree; written by the operation before, or by one of its own."""
        first = group[0]
        height, width, channels = first.size
        border = (max(r.border[0] for r in group), max(r.border[1] for r in group))
        place = channels if first.tight else -(-channels // 4) * 4
        if border == (0, 0) and place >= SKEW and place % SKEW == 0:
            place += 64
        made = Stored(height, width, channels, file_format.MAP, border, place, first.low, first.high)
        before = self.made.get(first.source)
        whole = first.offset == 0 and first.step == channels and not first.planar
        if (
            before is not None
            and before.kind in ("product", "norm", "gelu", "attention", "depthwise")
            and before.map is None
            and whole
            and not first.dynamic
            and not first.before
            and first.source.rows == height * width
            and first.source.channels == channels
        ):
            before.map = made
            assert first.scale is not None
            before.f[1] = first.scale
            return made
        op = Op("quantize", [first.source], None, made, n={0: first.offset, 1: first.step})
        op.n |= {2: int(first.planar), 3: first.dynamic}
        if first.before:
            op.data[0] = np.frombuffer(first.before, np.float32)
        if first.dynamic:
            op.floats = Stored(1, height * width if first.dynamic == 1 else 1, 1)
            for request in group:
                request.op.inputs[2] = op.floats
        else:
            assert first.scale is not None
            op.f[0] = first.scale
        self.ops.insert(min(self.ops.index(request.op) for request in group), op)
        return made

    # ---- running the graph ----

    def run(self, graph: fx.GraphModule, *inputs: Any) -> Any:
        """The graph's output for these inputs; without any, for the plan's input."""
        if not inputs:
            inputs = (self.value(self.x, (1, *self.shape)),)
        return _Interpreter(graph, self).run(*inputs)


class _Interpreter(fx.Interpreter):
    """Runs a graph with `_Value` in the place of tensors."""

    def __init__(self, graph: fx.GraphModule, lowering: _Lowering):
        super().__init__(graph, garbage_collect_values=True)
        self.lowering = lowering
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except LowbitError:
            raise
        except Exception as error:
            raise LowbitError(f"{n.format_node()}: not an operation of plans ({error}); lowbit.fuse takes it") from error

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _holds_value((args, kwargs)):
            return super().call_function(target, args, kwargs)
        return self.lower(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _holds_value((args, kwargs)):
            return super().call_method(target, args, kwargs)
        return self.lower(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not _holds_value((args, kwargs)):
            return super().call_module(target, args, kwargs)
        return lower_module(self.lowering, str(target), module, args, kwargs)

    def lower(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A function or a method, by its name for methods."""
        handler = FUNCTIONS.get(target) or FUNCTIONS.get(getattr(target, "__name__", ""))
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if handler is not None:
            return handler(self.lowering, *args, **kwargs)
        if name in _VIEWS:
            return _view(target, args, kwargs, self.lowering)
        raise LowbitError(f"{name} is not an operation of plans; lowbit.fuse takes the model as it is")


def _holds_value(tree: Any) -> bool:
    found = False

    def look(x: Any) -> Any:
        nonlocal found
        found |= isinstance(x, _Value)
        return x

    torch.utils._pytree.tree_map(look, tree)
    return found


_VIEWS = frozenset(
    "flatten transpose permute reshape view unbind getitem unsqueeze squeeze contiguous expand chunk split cat concat "
    "stack roll movedim swapaxes detach unflatten select narrow flip repeat t clone tile expand_as".split()
)
_FACTS: dict[Any, Callable[..., Any]] = {
    "size": lambda x, dim=None: x.shape if dim is None else x.shape[dim],
    "dim": lambda x: x.ndim,
    "numel": lambda x: x.ids.numel(),
    len: lambda x: len(x.ids),
}


def _view(target: Any, args: Any, kwargs: Any, lowering: _Lowering) -> Any:
    """A rearrangement: torch's own, on the elements' numbers."""
    args, kwargs = torch.utils._pytree.tree_map(
        lambda x: lowering.of(x).ids if isinstance(x, _Value) or (isinstance(x, Tensor) and x.is_floating_point()) else x,
        (args, kwargs),
    )
    function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    made = function(*args, **kwargs)
    return torch.utils._pytree.tree_map(lambda x: _Value(x) if isinstance(x, Tensor) else x, made)


# ---- operations ----


def _image(ids: Tensor) -> Tensor:
    """Ids ``[height, width, channels]`` of an image ``[1, channels, height, width]``."""
    if ids.ndim != 4 or len(ids) != 1:
        raise LowbitError(f"a tensor {list(ids.shape)} where plans take one image [1, channels, height, width]")
    return ids[0].permute(1, 2, 0)


def _back(lowering: _Lowering, stored: Stored) -> _Value:
    """The image ``[1, channels, height, width]`` of a stored tensor."""
    size = (stored.height, stored.width, stored.channels)
    return _Value(lowering.value(stored, size).ids.permute(2, 0, 1)[None])


def _product(
    lowering: _Lowering,
    ids: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    name: str,
    packed: Tensor,
    levels: Sequence[int],
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    low: int,
    high: int,
    relu: bool = False,
    add: Any = None,
    before: Tensor | None = None,
) -> Stored:
    channels, outputs = ids.shape[2], len(scale)
    # 8-bit weights have a zero for pads, so the taps of a line of the kernel may follow each other without any.
    tight = bits == 8 and kernel[1] > 1 and channels % 4 != 0 and dilation[1] == 1
    packed = _repack(packed, bits, (outputs, channels, kernel[0], kernel[1]), tight)
    size = [
        (ids.shape[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    made = Stored(size[0], size[1], outputs)
    numbers = [bits, *kernel, *stride, *padding, *dilation, int(relu)]
    table = np.zeros(16, np.int16)
    table[: len(levels)] = levels
    data = {0: packed.numpy(), 1: scale.detach().numpy(), 2: sums.numpy(), 4: table}
    if bias is not None:
        data[3] = bias.detach().numpy()
    op = Op("product", [None, None, None], made, n=dict(enumerate(numbers, 2)), data=data, name=name)
    if x_scale is not None:
        op.f[0] = float(x_scale)
    lowering.ask(op, ids, (padding[0], padding[1]), x_scale, low, high, before, tight)
    if add is not None:
        order = add.ids[0].permute(1, 2, 0) if name == "convolution" else add.ids
        op.inputs[1] = lowering.dense(order, (made.height, made.width, outputs))
    lowering.add(op)
    return made


def _repack(packed: Tensor, bits: int, shape: tuple[int, int, int, int], tight: bool) -> Tensor:
    """Packed bytes for taps of a multiple of 4 channels, or without pads between the taps of a line."""
    outputs, channels, height, width = shape
    if height * width == 1 or (channels % 64 == 0 and not tight):
        return packed
    codes = weight_codes(packed, bits, shape).permute(0, 2, 3, 1)
    if tight:
        codes = codes.reshape(outputs, height, -1)
    codes = F.pad(codes, (0, -codes.shape[-1] % 4)).reshape(outputs, -1)
    return pack_codes(codes.long() % 256 if bits == 8 else codes, bits)


def _conv2d(lowering: _Lowering, **kwargs: Any) -> _Value:
    x = kwargs.pop("x")
    window = (kwargs.pop("kernel_size"), *(kwargs.pop(name) for name in ("stride", "padding", "dilation")))
    for name in ("out_scale", "out_low", "out_high", "add_scale"):
        kwargs.pop(name, None)
    return _back(lowering, _product(lowering, _image(x.ids), *window, name="convolution", **kwargs))


def _linear(lowering: _Lowering, **kwargs: Any) -> _Value:
    x = kwargs.pop("x")
    for name in ("out_scale", "out_low", "out_high", "add_scale"):
        kwargs.pop(name, None)
    rows = x.ids.reshape(1, -1, x.shape[-1])
    made = _product(lowering, rows, (1, 1), (1, 1), (0, 0), (1, 1), name="linear", **kwargs)
    return lowering.value(made, (*x.shape[:-1], made.channels))


def _packed_layer(lowering: _Lowering, layer: Any, x: _Value) -> _Value:
    """A packed layer that `fuse` left as a module: its input has an offset, or a step for each token."""
    if layer.x_scale is not None and layer.x_scale.numel() > 1:
        raise LowbitError("a packed layer with a step for each token is not an operation of plans")
    kwargs = {"packed": layer.data, "levels": layer.weight.table, "scale": layer.scale, "sums": layer.sums}
    kwargs |= {"bias": layer.bias, "x_scale": layer.x_scale, "bits": layer.bits, "low": layer.low, "high": layer.high}
    kwargs |= {"x": x, "before": layer.before}
    if isinstance(layer, PackedConv2d):
        window = {name: list(getattr(layer, name)) for name in ("stride", "padding", "dilation")}
        return _conv2d(lowering, kernel_size=list(layer.kernel_size), **window, **kwargs)
    return _linear(lowering, **kwargs)


def _rows(lowering: _Lowering, kind: str, x: _Value, **more: Any) -> _Value:
    """An operation from rows to rows of the last dim."""
    ids = x.ids.reshape(-1, x.shape[-1])
    source, offset, step = lowering.rows_of(ids)
    made = Stored(1, len(ids), ids.shape[1])
    n = {0: offset, 1: step} | more.pop("n", {})
    lowering.add(Op(kind, [source], made, n=n, **more))
    lowering.exact = False
    return lowering.value(made, x.shape)


def _gelu(lowering: _Lowering, x: _Value, approximate: str = "none") -> _Value:
    if approximate != "none":
        raise LowbitError(f"GELU with approximate={approximate!r} is not an operation of plans")
    return _rows(lowering, "gelu", x)


def _layer_norm(
    lowering: _Lowering,
    x: _Value,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> _Value:
    if len(normalized_shape) != 1:
        raise LowbitError(f"LayerNorm over {len(normalized_shape)} dims is not an operation of plans")
    data = {i: t.detach().float().numpy() for i, t in enumerate((weight, bias)) if t is not None}
    return _rows(lowering, "norm", x, f={0: eps}, data=data)


def _add(lowering: _Lowering, a: Any, b: Any, relu: bool = False) -> Any:
    a, b = lowering.of(a), lowering.of(b)
    if lowering.constant(a.ids) is not None:
        a, b = b, a
    ids = torch.broadcast_tensors(a.ids, b.ids)
    last = ids[0].shape[-1]
    size = (1, ids[0].numel() // last, last)
    order = _memory_order(ids[0])
    first, second = (part.permute(order).flatten() for part in ids)
    made = Stored(*size)
    constant = lowering.constant(second)
    source = lowering.dense(first, size)
    op = Op("add", [source], made, n={11: int(relu)})
    if constant is not None:
        op.data[0] = constant
    else:
        op.inputs.append(lowering.dense(second, size))
    lowering.add(op)
    return _ordered(lowering, made, ids[0], order)


def _memory_order(ids: Tensor) -> list[int]:
    """The dims from the slowest to the fastest in memory, by the elements' numbers."""
    steps = []
    for dim, size in enumerate(ids.shape):  # at the end, since a class token is put before the others
        step = ids.select(dim, -1) - ids.select(dim, -2) if size > 1 else None
        steps.append((-(1 << 62) if step is None else -abs(int(step.flatten()[-1])), dim))
    return [dim for _, dim in sorted(steps)]


def _ordered(lowering: _Lowering, made: Stored, like: Tensor, order: list[int]) -> _Value:
    """The value of ``made``, which holds the elements of ``like`` permuted by ``order``."""
    shape = [like.shape[dim] for dim in order]
    back = [order.index(dim) for dim in range(like.ndim)]
    made.height, made.width, made.channels = 1, math.prod(shape[:-1]), shape[-1]
    return _Value(lowering.value(made, shape).ids.permute(back))


def _relu(lowering: _Lowering, x: _Value, inplace: bool = False) -> _Value:
    return _affine(lowering, x, None, None, relu=True, order=_memory_order(x.ids))


def _pad(lowering: _Lowering, x: _Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> _Value:
    if mode != "constant":
        raise LowbitError(f"padding with mode={mode!r} is not an operation of plans")
    filler = lowering.value(np.full(1, value or 0.0, np.float32), (1,))
    return _Value(F.pad(x.ids, tuple(pad), value=int(filler.ids[0])))


def _hardtanh(lowering: _Lowering, x: _Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> _Value:
    if min_val != 0 or max_val <= 0:
        raise LowbitError(f"hardtanh from {min_val} is not an operation of plans; ReLU6, from 0, is")
    return _affine(lowering, x, None, None, relu=True, order=_memory_order(x.ids), most=max_val)


def _affine(
    lowering: _Lowering,
    x: _Value,
    gain: np.ndarray | None,
    bias: np.ndarray | None,
    relu: bool = False,
    dim: int = -1,
    order: list[int] | None = None,
    most: float = 0.0,
) -> _Value:
    """``x·gain + bias`` by channel; ``order``: the dims as they lie in memory, the channels last; ``most``: of ReLU6."""
    order = order or [*(d for d in range(x.ndim) if d != dim % x.ndim), dim % x.ndim]
    ids = x.ids.permute(order)
    rows = ids.reshape(-1, ids.shape[-1])
    source, offset, step = lowering.rows_of(rows)
    made = Stored(1, len(rows), rows.shape[1])
    data = {i: array for i, array in enumerate((gain, bias)) if array is not None}
    lowering.add(Op("affine", [source], made, n={0: offset, 1: step, 11: int(relu)}, f={2: most}, data=data))
    return _ordered(lowering, made, x.ids, order)


def _pool(
    lowering: _Lowering,
    x: _Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    largest: bool = False,
    divisor: int = 0,
) -> _Value:
    ids = _image(x.ids)
    height, width, channels = ids.shape
    if padding[0] * 2 > kernel[0] or padding[1] * 2 > kernel[1]:
        raise LowbitError("pooling with a padding of more than half its window is not an operation of plans")
    size = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip((height, width), kernel, stride, padding, strict=True)]
    source = lowering.dense(ids, (height, width, channels))
    if (source.height, source.width) != (height, width):  # its lines are not the image's
        source = lowering.copy(ids.flatten(), (height, width, channels))
    made = Stored(size[0], size[1], channels)
    numbers = {2: int(largest), **dict(enumerate([*kernel, *stride, *padding, 1, 1, divisor], 3))}
    lowering.add(Op("pool", [source], made, n=numbers))
    if not largest:
        lowering.exact = False
    return _back(lowering, made)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _max_pool2d(
    lowering: _Lowering,
    x: _Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Value:
    if ceil_mode or return_indices or _pair(dilation) != [1, 1]:
        raise LowbitError("max-pooling with ceil_mode, dilation or indices is not an operation of plans")
    kernel = _pair(kernel_size)
    return _pool(lowering, x, kernel, _pair(stride) if stride else kernel, _pair(padding), largest=True)


def _avg_pool2d(
    lowering: _Lowering,
    x: _Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> _Value:
    if ceil_mode:
        raise LowbitError("average pooling with ceil_mode is not an operation of plans")
    kernel = _pair(kernel_size)
    divisor = divisor_override or (kernel[0] * kernel[1] if count_include_pad else 0)
    return _pool(lowering, x, kernel, _pair(stride) if stride else kernel, _pair(padding), divisor=divisor)


def _adaptive_avg_pool2d(lowering: _Lowering, x: _Value, output_size: Any) -> _Value:
    wanted = [n if n is not None else x.shape[2 + i] for i, n in enumerate(_pair(output_size))]
    kernel = [x.shape[2 + i] // n for i, n in enumerate(wanted)]
    if any(x.shape[2 + i] % n for i, n in enumerate(wanted)):
        raise LowbitError(f"adaptive pooling of {list(x.shape[2:])} to {wanted} is not an operation of plans")
    return _pool(lowering, x, kernel, kernel)


def _mean(lowering: _Lowering, x: _Value, dim: Any = None, keepdim: bool = False) -> _Value:
    dims = sorted(d % x.ndim for d in ([dim] if isinstance(dim, int) else list(dim or range(x.ndim))))
    rest = [d for d in range(x.ndim) if d not in dims]
    if not rest or 0 in dims or len(x.shape) != len(x.ids.shape) or x.shape[0] != 1:
        raise LowbitError("a mean over the batch is not an operation of plans")
    ids = x.ids.permute(*dims, *rest).reshape(math.prod(x.shape[d] for d in dims), -1)
    pooled = _pool(lowering, _Value(ids.t()[None, :, :, None]), (len(ids), 1), (1, 1))
    shape = [1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims]
    return _Value(pooled.ids.reshape(shape))


def _attention(
    lowering: _Lowering,
    q: _Value,
    k: _Value,
    v: _Value,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> _Value:
    if dropout_p or is_causal or any(others.values()):
        raise LowbitError("causal attention is not an operation of plans")
    if attn_mask is not None or len(q.ids) != 1 or not q.shape == k.shape == v.shape:
        return _masked_attention(lowering, q, k, v, attn_mask, scale)
    if not q.shape == k.shape == v.shape or q.ndim != 4 or len(q.ids) != 1:
        raise LowbitError(f"attention of {list(q.shape)}, {list(k.shape)}, {list(v.shape)} is not an operation of plans")
    _, heads, tokens, size = q.shape
    rows = [x.ids[0].transpose(0, 1).reshape(tokens, heads * size) for x in (q, k, v)]
    views = [lowering.view(each) for each in rows]
    if any(found is None for found in views) or len({(id(found[0]), found[2]) for found in views if found}) > 1:
        made = lowering.copy(torch.cat(rows, 1).flatten(), (1, tokens, 3 * heads * size))
        views = [(made, i * heads * size, 3 * heads * size) for i in range(3)]
    (source, at_q, step), (_, at_k, _), (_, at_v, _) = (found for found in views if found)
    out = Stored(1, tokens, heads * size)
    n = {0: at_q, 1: step, 2: heads, 3: size, 4: at_k, 5: at_v}
    lowering.add(Op("attention", [source], out, n=n, f={0: size**-0.5 if scale is None else scale}))
    lowering.exact = False
    ids = lowering.value(out, (tokens, heads, size)).ids
    return _Value(ids.transpose(0, 1)[None])


def _log_mel(lowering: _Lowering, front: Any, x: _Value) -> _Value:
    """`lowbit.models.speech.LogMel`."""
    samples = x.ids.numel()
    source = lowering.stored[int(x.ids.flatten()[0]) >> _SHIFT]
    if x.ndim != 2 or not isinstance(source, Stored) or not torch.equal(x.ids, lowering.value(source, x.shape).ids):
        raise LowbitError("log-mel features of anything but the whole input are not an operation of plans")
    made = Stored(front.bands.shape[1], 1 + samples // front.hop, 1)
    angles = 2 * np.pi * np.arange(front.n_fft) / front.n_fft
    data = {0: front.window.numpy(), 1: front.bands.numpy(), 2: np.cos(angles).astype(np.float32)}
    lowering.add(Op("mel", [source], made, n={2: front.n_fft, 3: front.hop}, f={0: front.top_db}, data=data))
    lowering.exact = False
    return _Value(lowering.value(made, (1, made.height, made.width)).ids[None])


def _depthwise(lowering: _Lowering, layer: nn.Conv2d, x: _Value) -> _Value:
    """A depthwise convolution that `pack` left with codes, on the integers of its quantized input."""
    form = layer.input_quantizer.integer() if hasattr(layer, "input_quantizer") else None
    levels, divisor = integer_levels(layer.get_buffer("levels"))
    if form is None or form.scale.numel() != 1 or form.after is not None or max(map(abs, levels)) > 127:
        raise LowbitError("a depthwise convolution without an input of one step, or with larger weights than 127")
    padding = layer.padding if isinstance(layer.padding, tuple) else None
    if layer.groups != layer.in_channels or layer.out_channels != layer.in_channels or padding is None:
        raise LowbitError("a convolution of groups, other than of one channel each")
    ids = _image(x.ids)
    channels = layer.in_channels
    weights = torch.tensor(levels)[layer.get_buffer("codes").long()].reshape(channels, -1)
    scale = layer.get_buffer("row_scale").reshape(-1).expand(channels) / divisor
    size = [
        (ids.shape[i] + 2 * padding[i] - layer.dilation[i] * (layer.kernel_size[i] - 1) - 1) // layer.stride[i] + 1
        for i in range(2)
    ]
    made = Stored(size[0], size[1], channels)
    numbers = [*layer.kernel_size, *layer.stride, *padding, *layer.dilation, 0]
    data = {0: weights.t().to(torch.int8).numpy(), 1: scale.numpy(), 2: weights.sum(1).to(torch.int32).numpy()}
    if layer.bias is not None:
        data[3] = layer.bias.detach().numpy()
    op = Op("depthwise", [None, None, None], made, n=dict(enumerate(numbers, 3)), data=data, name="convolution")
    op.f[0] = float(form.scale)
    lowering.ask(op, ids, (padding[0], padding[1]), form.scale, form.low, form.high, form.before, tight=False)
    lowering.add(op)
    lowering.exact = False
    return _back(lowering, made)


def _rounded(lowering: _Lowering, quantizer: ActivationQuantizer, x: _Value) -> _Value:
    """An activation quantizer of its own: one factor of attention."""
    form = quantizer.integer()
    if form is None:
        raise LowbitError(f"{type(quantizer).__name__} has no integer form, so it is not an operation of plans")
    order = _memory_order(x.ids)
    ids = x.ids.permute(order)
    channels = ids.shape[-1]
    source = lowering.dense(ids, (1, ids.numel() // channels, channels))
    made = Stored(1, ids.numel() // channels, channels)
    data = {}
    for i, part in enumerate((form.scale, form.scale, form.before, form.after)):
        if part is not None:
            whole = part.float() if part.numel() == 1 else part.float().broadcast_to(x.ids.shape).permute(order)
            data[i] = _least(whole.reshape(-1, channels) if part.numel() > 1 else whole.reshape(1, 1))
    lowering.add(Op("round", [source], made, n={2: form.low + 256, 3: form.high}, data=data))
    lowering.exact = False
    return _ordered(lowering, made, x.ids, order)


def _least(rows: Tensor) -> np.ndarray:
    """Rows of numbers, or one row where all are equal."""
    return (rows[:1] if torch.equal(rows, rows[:1].expand_as(rows)) else rows).contiguous().numpy()


def _scaled(lowering: _Lowering, x: Any, y: Any) -> _Value:
    """A product with constants."""
    if not isinstance(x, _Value):
        x, y = y, x
    if isinstance(y, int | float):
        y = torch.tensor(float(y))
    constant = None if isinstance(y, _Value) else y.detach().float()
    if constant is None and (array := lowering.constant(y.ids)) is not None:
        constant = torch.from_numpy(array).reshape(y.ids.shape)
    if constant is None:
        raise LowbitError("a product of two tensors, element by element, is not an operation of plans")
    if constant.numel() == 1:
        order = _memory_order(x.ids)
        channels = x.ids.permute(order).shape[-1]
        gain = np.full(channels, float(constant), np.float32)
        return _affine(lowering, x, gain, None, order=order)
    shape = [1] * (x.ndim - constant.ndim) + list(constant.shape)
    dims = [d for d, n in enumerate(shape) if n > 1]
    if len(dims) != 1 or shape[dims[0]] != x.shape[dims[0]]:
        raise LowbitError("a product with constants that differ along more than one dim is not an operation of plans")
    return _affine(lowering, x, constant.reshape(-1).numpy(), None, dim=dims[0])


def _softmax(lowering: _Lowering, x: _Value, dim: int | None = -1, _stacklevel: int = 3, dtype: Any = None) -> _Value:
    if dim is None or dim % x.ndim != x.ndim - 1:
        raise LowbitError("a softmax over another than the last dim is not an operation of plans")
    return _rows(lowering, "softmax", x)


def _matmul(lowering: _Lowering, a: _Value, b: _Value) -> _Value:
    a, b = lowering.of(a), lowering.of(b)
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (_Value(x.ids.expand(*outer, *x.shape[-2:])) for x in (a, b))
    outer, (m, k), n = a.shape[:-2], a.shape[-2:], b.shape[-1]
    left, right = a.ids.reshape(-1, m, k), b.ids.reshape(-1, k, n)
    first, second = _strided(lowering, left), _strided(lowering, right)
    if first is None or first[2][2] != 1:
        first = (lowering.copy(left.flatten(), (1, len(left) * m, k)), 0, (m * k, k, 1))
    if second is None:
        second = (lowering.copy(right.flatten(), (1, len(left) * k, n)), 0, (k * n, n, 1))
    made = Stored(1, len(left) * m, n)
    numbers = {0: first[1], 1: first[2][1], 2: len(left), 3: m, 4: k, 5: n, 6: first[2][0]}
    numbers |= {7: second[1], 8: second[2][0], 9: second[2][1], 10: second[2][2]}
    lowering.add(Op("matmul", [first[0], second[0]], made, n=numbers))
    lowering.exact = False
    return lowering.value(made, (*outer, m, n))


def _strided(lowering: _Lowering, ids: Tensor) -> tuple[Stored, int, tuple[int, ...]] | None:
    """The tensor, offset and steps of ids, if they lie at equal distances along each dim."""
    first = int(ids.flatten()[0])
    stored = lowering.stored[first >> _SHIFT]
    expected = torch.tensor(first)
    steps = []
    for dim, size in enumerate(ids.shape):
        step = int(ids.select(dim, 1).flatten()[0]) - first if size > 1 else 1
        steps.append(step)
        expected = expected[..., None] + step * torch.arange(size)
    if isinstance(stored, np.ndarray) or min(steps) < 0 or not torch.equal(ids, expected):
        return None
    return stored, first & ((1 << _SHIFT) - 1), tuple(steps)


def _masked_attention(lowering: _Lowering, q: _Value, k: _Value, v: _Value, mask: Any, scale: float | None) -> _Value:
    """Attention in its parts, with constants that are added to the logits."""
    scaled = _scaled(lowering, q, q.shape[-1] ** -0.5 if scale is None else scale)
    logits = _matmul(lowering, scaled, _Value(k.ids.transpose(-2, -1)))
    logits = logits if mask is None else _add(lowering, logits, mask)
    return _matmul(lowering, _softmax(lowering, logits), v)


def _getattr(lowering: _Lowering, x: _Value, name: str) -> Any:
    return getattr(x, name)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.lowbit.shift_conv2d.default: _conv2d,
    torch.ops.lowbit.shift_linear.default: _linear,
    as_floats: lambda lowering, x: x,
    "float": lambda lowering, x: x,
    "to": lambda lowering, x, *args, **kwargs: x,
    getattr: _getattr,
    F.gelu: _gelu,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    plain_attention: _attention,
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _scaled),
    operator.truediv: lambda lowering, x, y: _scaled(lowering, x, 1 / y),
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), _matmul),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), _softmax),
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((F.relu, torch.relu, "relu"), _relu),
    F.pad: _pad,
    F.hardtanh: _hardtanh,
    F.relu6: lambda lowering, x, inplace=False: _hardtanh(lowering, x, 0.0, 6.0),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((F.dropout, F.dropout2d), lambda lowering, x, *args, **kwargs: x),
    # timm's functions around the mask of its attention, which is not there in inference
    "resolve_self_attn_mask": lambda lowering, tokens, attention, mask=None, causal=False: mask,
    "maybe_add_mask": lambda lowering, x, mask=None: x if mask is None else _add(lowering, x, mask),
    **{name: partial(lambda f, lowering, *args, **kwargs: f(*args, **kwargs), f) for name, f in _FACTS.items()},
}
"""How functions, and methods by their names, are lowered; rearrangements are `_VIEWS`."""


def lower_module(lowering: _Lowering, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A module that the graph calls: one that plans know, or else what it consists of."""
    x = args[0] if args else None
    if isinstance(module, PackedLinear | PackedConv2d):
        return _packed_layer(lowering, module, *args)
    if isinstance(module, ActivationQuantizer):
        return _rounded(lowering, module, x)
    if isinstance(module, nn.Conv2d) and is_stored(module):
        return _depthwise(lowering, module, x)
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        return _layer_norm(lowering, x, shape, module.weight, module.bias, module.eps)
    if isinstance(module, nn.GELU):
        return _gelu(lowering, x, module.approximate)
    if isinstance(module, nn.ReLU):
        return _relu(lowering, x)
    if isinstance(module, nn.Identity | nn.Dropout):
        return x
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.running_var is not None:
        inverse = 1 / torch.sqrt(module.running_var + module.eps)
        gain = inverse if module.weight is None else module.weight * inverse
        shift = -module.running_mean * gain + (0 if module.bias is None else module.bias)
        lowering.exact = False
        return _affine(lowering, x, gain.detach().float().numpy(), shift.detach().float().numpy(), dim=1)
    if isinstance(module, nn.MaxPool2d):
        window = (module.kernel_size, module.stride, module.padding, module.dilation)
        return _max_pool2d(lowering, x, *window, module.ceil_mode, module.return_indices)
    if isinstance(module, nn.AvgPool2d):
        window = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
        return _avg_pool2d(lowering, x, *window, module.count_include_pad, module.divisor_override)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _adaptive_avg_pool2d(lowering, x, module.output_size)
    if type(module).__name__ == "LogMel" and type(module).__module__ == "lowbit.models.speech":
        return _log_mel(lowering, module, x)
    if isinstance(module, nn.Flatten):
        return _Value(x.ids.flatten(module.start_dim, module.end_dim))
    try:
        graph = fx.symbolic_trace(module)
    except Exception as error:
        raise LowbitError(f"{name}, a {type(module).__name__}, is not an operation of plans; lowbit.fuse takes it") from error
    if any(node.op == "call_module" and graph.get_submodule(str(node.target)) is module for node in graph.graph.nodes):
        raise LowbitError(f"{name}, a {type(module).__name__}, is not an operation of plans; lowbit.fuse takes it")
    try:
        return lowering.run(graph, *args)
    except LowbitError as error:
        raise LowbitError(f"{name}, a {type(module).__name__}: {error}") from error
