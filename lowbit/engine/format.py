"""The file format of plans, as ``lowbit/kernels/csrc/plan.h`` describes it; written with numpy alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MAGIC = b"lowbit plan\n"
VERSION = 1
ALIGNED = 64
FLOATS, MAP = 0, 1
KINDS = (
    "quantize", "product", "copy", "add", "affine", "pool", "norm", "gelu", "mel", "attention", "depthwise", "round",
    "matmul", "softmax", "conv", "integer attention", "curve", "times",
    "grouped conv",
)  # fmt: skip
"""The kinds of operations; the index is their number in the file."""
CURVES = ("gelu", "sigmoid", "silu", "gelu tanh", "hardsigmoid", "hardswish", "inverse root", "inverse")
"""Functions of single numbers; the index is their number in the file."""
EACH, ROW, NUMBER = 0, 1, 2
"""How the second operand of a sum or product lies: as the first; one row for all rows; or one number for each row."""
TAIL = 128  # bytes behind a map that products may read

HEADER = np.dtype(
    [("magic", "S12"), ("version", "<u4"), ("file_bytes", "<i8"), ("arena_bytes", "<i8"), ("data_offset", "<i8")]
    + [(name, "<i4") for name in ("tensors", "ops", "input", "output")]
)
TENSOR = np.dtype(
    [(name, "<i4") for name in ("kind", "border_y", "border_x", "low", "high", "reserved")]
    + [(name, "<i8") for name in ("height", "width", "channels", "place", "offset")]
)
OP = np.dtype(
    [
        *(("kind", "<i4"), ("reserved", "<i4"), ("in", "<i4", 4), ("out", "<i4", 2)),
        *(("n", "<i8", 16), ("f", "<f8", 4), ("data", "<i8", (5, 2))),
    ]
)


@dataclass(eq=False)
class Tensor:
    """A value of one item of the batch: floats ``[height, width, channels]``, or a map of stored activations.

    Args:
        height, width, channels: size of the tensor.
        kind: `FLOATS` or `MAP`.
        border: number of places around a map, ``(y, x)``.
        place: bytes from one place of a map to the next.
        low, high: range of a map's integers.
        offset: its first byte in the arena; -1 until `place_tensors` sets it.
    """

    height: int
    width: int
    channels: int
    kind: int = FLOATS
    border: tuple[int, int] = (0, 0)
    place: int = 0
    low: int = 0
    high: int = 0
    offset: int = -1

    @property
    def rows(self) -> int:
        """Number of places."""
        return self.height * self.width

    @property
    def nbytes(self) -> int:
        """Size in bytes in the arena."""
        if self.kind == FLOATS:
            return 4 * self.rows * self.channels
        return (self.height + 2 * self.border[0]) * (self.width + 2 * self.border[1]) * self.place + TAIL


@dataclass(eq=False)
class Op:
    """An operation; the numbers ``n`` and ``f`` and the arrays ``data`` are those of ``plan.h``.

    Args:
        kind: one of `KINDS`.
        inputs: up to 4 tensors; None for an absent one.
        floats, map: the outputs; None for an absent one.
        n: integers by index.
        f: floating-point numbers by index.
        data: arrays by index.
        name: ``"linear"`` or ``"convolution"`` for products; used while lowering, not stored.
    """

    kind: str
    inputs: list[Tensor | None]
    floats: Tensor | None = None
    map: Tensor | None = None
    n: dict[int, int] = field(default_factory=dict)
    f: dict[int, float] = field(default_factory=dict)
    data: dict[int, np.ndarray] = field(default_factory=dict)
    name: str = ""

    @property
    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        return [tensor for tensor in (*self.inputs, self.floats, self.map) if tensor is not None]


def place_tensors(ops: Sequence[Op], outside: Sequence[Tensor]) -> int:
    """Give each tensor an offset in the arena, so that tensors in use at the same time do not overlap.

    Args:
        ops: operations in the order in which they run.
        outside: tensors that are not in the arena: the input and the output.

    Returns:
        The size of the arena in bytes.
    """
    first: dict[Tensor, int] = {}
    last: dict[Tensor, int] = {}
    for i, op in enumerate(ops):
        for tensor in op.tensors:
            first.setdefault(tensor, i)
            last[tensor] = i
    inside = [tensor for tensor in first if not any(tensor is other for other in outside)]
    placed: list[Tensor] = []
    # Largest first, so that small tensors fill the gaps between large ones.
    for tensor in sorted(inside, key=lambda tensor: -tensor.nbytes):
        taken = sorted(
            (other.offset, other.offset + other.nbytes)
            for other in placed
            if first[other] <= last[tensor] and first[tensor] <= last[other]
        )
        at = 0
        for begin, end in taken:
            if at + tensor.nbytes <= begin:
                break
            at = max(at, -(-end // ALIGNED) * ALIGNED)
        tensor.offset = at
        placed.append(tensor)
    return max((tensor.offset + tensor.nbytes for tensor in placed), default=0)


def write(ops: Sequence[Op], x: Tensor, y: Tensor) -> bytes:
    """The content of the file for these operations.

    Args:
        ops: operations in the order in which they run.
        x, y: the input and the output of the plan.
    """
    arena = place_tensors(ops, (x, y))
    tensors: list[Tensor] = []
    number: dict[Tensor, int] = {}
    for tensor in (x, y, *(tensor for op in ops for tensor in op.tensors)):
        if tensor not in number:
            number[tensor] = len(tensors)
            tensors.append(tensor)
    described = np.zeros(len(tensors), TENSOR)
    for row, tensor in zip(described, tensors, strict=True):
        row["kind"], row["border_y"], row["border_x"] = tensor.kind, *tensor.border
        for name in ("low", "high", "height", "width", "channels", "place", "offset"):
            row[name] = getattr(tensor, name)
    start = HEADER.itemsize + described.nbytes + len(ops) * OP.itemsize
    data = bytearray()
    first_data = -(-start // ALIGNED) * ALIGNED
    stored: dict[bytes, int] = {}
    records = np.zeros(len(ops), OP)
    for row, op in zip(records, ops, strict=True):
        row["kind"] = KINDS.index(op.kind)
        inputs = [*op.inputs, *[None] * (4 - len(op.inputs))]
        row["in"] = [-1 if tensor is None else number[tensor] for tensor in inputs]
        row["out"] = [-1 if tensor is None else number[tensor] for tensor in (op.floats, op.map)]
        for i, value in op.n.items():
            row["n"][i] = value
        for i, number_ in op.f.items():
            row["f"][i] = number_
        for i, array in op.data.items():
            content = np.ascontiguousarray(array).tobytes()
            if content not in stored:
                data += bytes(-len(data) % ALIGNED)
                stored[content] = len(data)
                data += content
            row["data"][i] = first_data + stored[content], len(content)
    header = np.zeros((), HEADER)
    header["magic"], header["version"] = MAGIC, VERSION
    header["file_bytes"], header["arena_bytes"] = first_data + len(data), arena
    header["data_offset"] = first_data
    header["tensors"], header["ops"], header["input"], header["output"] = len(tensors), len(ops), 0, 1
    head = header.tobytes() + described.tobytes() + records.tobytes()
    return head + bytes(first_data - len(head)) + bytes(data)
