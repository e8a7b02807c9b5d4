"""The values of a graph while it is lowered, as numbers of elements, and the operations made so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.engine import format as file_format
from lowbit.engine.format import Op
from lowbit.engine.format import Tensor as Stored
from lowbit.errors import LowbitError
from lowbit.quantizers.base import IntegerForm

SKEW = 512
"""Rows of a linear layer of a multiple of so many bytes get 64 bytes more, to avoid conflicts in the cache."""
SHIFT = 40
"""Number of low bits of an element's number that hold its index in its tensor."""

_WRITERS = frozenset((
    "product", "norm", "gelu", "attention", "integer attention", "depthwise", "conv", "grouped conv", "curve",
    "add", "times",
))  # fmt: skip
"""Operations that write a map themselves."""


class Value:
    """A tensor of the graph, described by the elements of stored tensors that it consists of.

    Args:
        ids: int64, of the tensor's shape with a batch of one: ``number of the stored tensor << 40 | element``.
    """

    def __init__(self, ids: Tensor):
        self.ids = ids

    @property
    def shape(self) -> torch.Size:
        """Its shape, with a batch of one."""
        return self.ids.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.ids.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Float32: values between layers are floats."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")


@dataclass(eq=False)
class Request:
    """An operation's request for a map: the rows ``[rows, channels]`` that it reads, and how they are rounded."""

    op: Op
    source: Stored
    offset: int
    step: int
    planar: bool
    size: tuple[int, int, int]
    border: tuple[int, int]
    scale: float | bytes | None  # of everything; float32, of each row; or computed
    dynamic: int
    low: int
    high: int
    before: bytes
    tight: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """Requests with equal keys share one map."""
        view = (id(self.source), self.offset, self.step, self.planar, self.size)
        return (*view, self.scale, self.dynamic, self.low, self.high, self.before, self.tight)


@dataclass(eq=False)
class Origin:
    """Where a stored tensor's elements come from, for operations that a later one may take over.

    Args:
        kind: "round", "scaled" or "softmax", which compute each element, or each row, from those in the same place; or
            "matmul".
        operands: the numbers of the elements that were read; of a matmul ``[count, m, k]`` and ``[count, k, n]``.
        form: of "round", with tensors of the operand's shape.
        gain: of "scaled".
    """

    kind: str
    operands: tuple[Tensor, ...]
    form: IntegerForm | None = None
    gain: float = 1.0


class Lowering:
    """The operations so far, and their values."""

    def __init__(self, shape: Sequence[int]):
        height, width = (shape[1], shape[2]) if len(shape) == 3 else (1, math.prod(shape[1:]) if shape else 1)
        self.x = Stored(height, width, shape[0] if shape else 1)
        self.shape = tuple(shape)
        self.stored: list[Stored | np.ndarray] = []
        self.ops: list[Op] = []
        self.made: dict[Stored, Op] = {}
        self.origins: dict[Stored | np.ndarray, Origin] = {}
        self.taken_over: set[Stored | np.ndarray] = set()  # what a later operation computes by itself
        self.requests: list[Request] = []
        self.exact = True  # whether all operations give the same bits as PyTorch's

    # ---- values ----

    def number(self, stored: Stored | np.ndarray) -> int:
        """The number of a stored tensor, which it gets at the first call."""
        for i, other in enumerate(self.stored):
            if other is stored:
                return i
        self.stored.append(stored)
        return len(self.stored) - 1

    def value(self, stored: Stored | np.ndarray, shape: Sequence[int]) -> Value:
        """The value of all elements of a stored tensor, in order, with the given shape."""
        count = stored.size if isinstance(stored, np.ndarray) else stored.rows * stored.channels
        ids = torch.arange(count) + (self.number(stored) << SHIFT)
        return Value(ids.reshape(tuple(shape)))

    def of(self, x: Any) -> Value:
        """Return a value unchanged; make a constant tensor or number a value."""
        if isinstance(x, Value):
            return x
        x = torch.as_tensor(x)
        array = np.ascontiguousarray(x.detach().float().cpu().numpy())
        return self.value(array, x.shape)

    def constant(self, ids: Tensor) -> np.ndarray | None:
        """The numbers of these elements, float32 and flat, if all are constants; otherwise None."""
        numbers = ids.flatten() >> SHIFT
        if not all(isinstance(self.stored[i], np.ndarray) for i in numbers.unique().tolist()):
            return None
        flat = ids.flatten()
        out = np.empty(flat.numel(), np.float32)
        for i in numbers.unique().tolist():
            mask = (numbers == i).numpy()
            out[mask] = self.stored[i].reshape(-1)[(flat[numbers == i] - (i << SHIFT)).numpy()]
        return out

    def add(self, op: Op, origin: Origin | None = None) -> None:
        """Append an operation to the plan."""
        self.ops.append(op)
        if op.floats is not None:
            self.made[op.floats] = op
            if origin is not None:
                self.origins[op.floats] = origin

    # ---- how operations read ----

    def view(self, rows: Tensor) -> tuple[Stored, int, int] | None:
        """Tensor, offset and step of ids ``[rows, channels]`` if they lie in memory as such rows; otherwise None."""
        first = int(rows[0, 0])
        stored = self.stored[first >> SHIFT]
        step = int(rows[1, 0]) - first if len(rows) > 1 else rows.shape[1]
        if isinstance(stored, np.ndarray) or step < 0:
            return None
        expected = first + step * torch.arange(len(rows))[:, None] + torch.arange(rows.shape[1])
        return (stored, first & ((1 << SHIFT) - 1), step) if torch.equal(rows, expected) else None

    def strided(self, ids: Tensor) -> tuple[Stored, int, tuple[int, ...]] | None:
        """Tensor, offset and steps of ids if they lie at equal distances along each dim; otherwise None."""
        first = int(ids.flatten()[0])
        stored = self.stored[first >> SHIFT]
        expected = torch.tensor(first)
        steps = []
        for dim, size in enumerate(ids.shape):
            step = int(ids.select(dim, 1).flatten()[0]) - first if size > 1 else (1 if dim == ids.ndim - 1 else 0)
            steps.append(step)
            expected = expected[..., None] + step * torch.arange(size)
        if isinstance(stored, np.ndarray) or min(steps) < 0 or not torch.equal(ids, expected):
            return None
        return stored, first & ((1 << SHIFT) - 1), tuple(steps)

    def dense(self, ids: Tensor, size: tuple[int, int, int]) -> Stored:
        """A tensor that holds exactly these elements in order: their own tensor, or a copy."""
        flat = ids.flatten()
        stored = self.stored[int(flat[0]) >> SHIFT]
        inside = isinstance(stored, Stored) and stored is not self.x and stored.rows * stored.channels == flat.numel()
        whole = inside and not int(flat[0]) & ((1 << SHIFT) - 1)
        if isinstance(stored, Stored) and whole and torch.equal(flat, int(flat[0]) + torch.arange(flat.numel())):
            return stored
        return self.copy(flat, size)

    def copy(self, flat: Tensor, size: tuple[int, int, int]) -> Stored:
        """Copy these elements, which may come from several tensors, into a new tensor.

        One operation reads at most four tensors. Of more, the elements of the first four are copied together first.
        """
        jumps = torch.nonzero(flat[1:] != flat[:-1] + 1).flatten() + 1
        begins = np.concatenate([[0], jumps.numpy()])
        lengths = np.diff(begins, append=flat.numel())
        first = flat.numpy()[begins]
        numbers, at = first >> SHIFT, first & ((1 << SHIFT) - 1)
        source = np.zeros_like(first)
        sources: list[Stored] = []
        constants: list[np.ndarray] = []
        for number in dict.fromkeys(numbers.tolist()):
            stored, here = self.stored[number], numbers == number
            if isinstance(stored, np.ndarray):
                source[here] = 4
                at[here] += sum(array.size for array in constants)
                constants.append(stored.reshape(-1))
            else:
                source[here] = len(sources)
                sources.append(stored)
        if len(sources) > 4:
            first_four = [self.number(stored) for stored in sources[:4]]
            chosen = torch.isin(flat >> SHIFT, torch.tensor(first_four))
            together = self.copy(flat[chosen], (1, 1, int(chosen.sum())))
            flat = flat.masked_scatter(chosen, self.value(together, (together.channels,)).ids)
            return self.copy(flat, size)
        made = Stored(*size)
        data = {0: np.stack([begins, source, at, lengths], axis=1)}
        if constants:
            data[1] = np.concatenate(constants).astype(np.float32)
        self.add(Op("copy", [*sources], made, data=data))
        return made

    def rows_of(self, ids: Tensor) -> tuple[Stored, int, int]:
        """Tensor, offset and step of ids ``[rows, channels]``, copied if they do not lie in memory as rows."""
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
        """Request a map of the elements ``[height, width, channels]`` as the first input of ``op``.

        ``tight`` leaves out the pads between places, even if the number of channels is not a multiple of 4.
        """
        height, width, channels = ids.shape
        rows = ids.reshape(-1, channels)
        planes = ids.permute(2, 0, 1).flatten()
        first = self.stored[int(planes[0]) >> SHIFT]
        planar = (
            isinstance(first, Stored)
            and rows.shape[0] > 1
            and channels > 1
            and first.rows * first.channels == planes.numel()
            and torch.equal(planes, int(planes[0]) + torch.arange(planes.numel()))
        )
        if planar:
            assert isinstance(first, Stored)
            source, offset, step = first, 0, channels
        else:
            source, offset, step = self.rows_of(rows)
        dynamic = 0
        step_size: float | bytes | None = None
        if scale is None:
            dynamic = 1 if op.name == "linear" else 2
        elif scale.numel() == 1:
            step_size = float(scale)
        else:
            dynamic, step_size = 3, scale.detach().float().numpy().tobytes()
        kept = b"" if before is None else before.detach().float().reshape(-1).numpy().tobytes()
        size = (height, width, channels)
        self.requests.append(
            Request(op, source, offset, step, planar, size, border, step_size, dynamic, low, high, kept, tight)
        )

    # ---- the end ----

    def finish(self, y: Any) -> bytes:
        """Serve the requests for maps and return the content of the plan's file."""
        if not isinstance(y, Value):
            raise LowbitError(f"the model returns a {type(y).__name__}; plans return one tensor")
        out = self.dense(y.ids, (1, 1, y.ids.numel())) if y.ids.numel() else None
        if out is None or out is self.x:
            raise LowbitError("the model returns its input or nothing; plans return a computed tensor")
        self._drop_taken_over(out)
        self._merge_affine(out)
        maps: dict[tuple[Any, ...], Stored] = {}
        groups: dict[tuple[Any, ...], list[Request]] = {}
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

    def _drop_taken_over(self, out: Stored) -> None:
        """Remove the operations before those taken over, as far as nothing else reads their outputs."""
        read = {out, *(request.source for request in self.requests)}
        for op in reversed(list(self.ops)):
            inputs = {tensor for tensor in op.inputs if tensor is not None}
            if op.floats in self.taken_over and op.floats not in read:
                self.ops.remove(op)
                self.taken_over |= inputs
            else:
                read |= inputs

    def _merge_affine(self, out: Stored) -> None:
        """Merge a BatchNorm or ReLU into the operation before it, if nothing else reads that operation's output."""
        for op in list(self.ops):
            if op.kind != "affine" or op not in self.ops:
                continue
            source = op.inputs[0]
            before = None if source is None else self.made.get(source)
            if source is None or before is None or source is out or op.floats is None:
                continue
            readers = sum(source in other.inputs for other in self.ops) + sum(r.source is source for r in self.requests)
            whole = not op.n[0] and op.n[1] == source.channels and op.floats.channels == source.channels
            if (
                before.kind in ("affine", "conv", "grouped conv")
                and whole
                and readers == 1
                and not before.n[11]
                and not op.data
            ):
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
            if not any(made in other.inputs for other in self.ops if other.kind == "pool"):  # it has its lines already
                made.height, made.width = source.height, source.width
            before.floats = made
            self.made[made] = before
            self.ops.remove(op)

    def _serve(self, group: list[Request]) -> Stored:
        """Make the map for requests with equal keys; the operation before writes it, or else a new one."""
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
            and before.kind in _WRITERS
            and before.map is None
            and whole
            and not first.dynamic
            and not first.before
            and first.source.rows == height * width
            and first.source.channels == channels
        ):
            before.map = made
            assert isinstance(first.scale, float)
            before.f[1] = first.scale
            return made
        op = Op("quantize", [first.source], None, made, n={0: first.offset, 1: first.step})
        op.n |= {2: int(first.planar), 3: first.dynamic}
        if first.before:
            op.data[0] = np.frombuffer(first.before, np.float32)
        if isinstance(first.scale, bytes):
            op.data[1] = np.frombuffer(first.scale, np.float32)
        if first.dynamic:
            op.floats = Stored(1, 1 if first.dynamic == 2 else height * width, 1)
            for request in group:
                request.op.inputs[2] = op.floats
        else:
            assert isinstance(first.scale, float)
            op.f[0] = first.scale
        self.ops.insert(min(self.ops.index(request.op) for request in group), op)
        return made
