"""`Lowering` by hand: which elements a value consists of, how operations read them, and which maps they get."""

import math

import numpy as np
import pytest
import torch

from lowbit.engine.format import MAP, Op
from lowbit.engine.format import Tensor as Stored
from lowbit.engine.values import SHIFT, Lowering, Value
from lowbit.errors import LowbitError


def begun(*shape: int) -> tuple[Lowering, torch.Tensor]:
    """A lowering whose input, number 0, has been copied to number 1, and the ids of the copy ``[rows, channels]``."""
    lowering = Lowering((1, *shape))
    lowering.number(lowering.x)
    made = Stored(1, *shape)
    lowering.add(Op("gelu", [lowering.x], made))
    return lowering, lowering.value(made, shape).ids


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 8, 5), (8, 5, 3)), ((4, 6), (1, 6, 4)), ((2, 3, 4, 5), (1, 60, 2)), ((7,), (1, 1, 7)), ((), (1, 1, 1))],
)
def test_the_size_of_the_input(shape, size):
    x = Lowering(shape).x
    assert (x.height, x.width, x.channels) == size


def test_numbers_of_elements():
    lowering, ids = begun(3, 4)
    assert ids.tolist() == (torch.arange(12).reshape(3, 4) + 2**40).tolist()
    value = Value(ids)
    assert (value.shape, value.ndim, value.dtype, value.device.type) == ((3, 4), 2, torch.float32, "cpu")
    assert lowering.of(value) is value
    first, second = lowering.of(2.5), lowering.of(torch.tensor([[1, 2]]))
    assert (first.ids.tolist(), second.ids.tolist()) == (2 << SHIFT, [[3 << SHIFT, (3 << SHIFT) + 1]])
    both = torch.cat([second.ids.flip(1).flatten(), first.ids.reshape(1)])
    np.testing.assert_array_equal(lowering.constant(both), np.array([2, 1, 2.5], np.float32))
    assert lowering.constant(torch.cat([both, ids[0]])) is None


def test_rows_in_memory():
    lowering, ids = begun(6, 4)
    stored = lowering.stored[1]
    assert lowering.view(ids) == (stored, 0, 4)
    assert lowering.view(ids[1::2, 1:3]) == (stored, 5, 8)
    assert lowering.view(ids[2:3, :2]) == (stored, 8, 2)  # of one row the step is its length
    assert lowering.view(ids[1:2].expand(3, 4)) == (stored, 4, 0)
    assert lowering.view(ids[:2]) == (stored, 0, 4)
    for other in (ids.flip(0), ids.flip(1), ids.t(), ids[[0, 1, 3]], lowering.of(torch.ones(2, 2)).ids):
        assert lowering.view(other) is None
    assert lowering.rows_of(ids) == (stored, 0, 4) and len(lowering.ops) == 1
    made, offset, step = lowering.rows_of(ids.t())
    assert (made.height, made.width, made.channels, offset, step) == (1, 4, 6, 0, 6)
    assert lowering.ops[-1].kind == "copy"


def test_a_tensor_of_its_own_is_not_copied():
    lowering, ids = begun(3, 4)
    assert lowering.dense(ids, (1, 3, 4)) is lowering.stored[1]
    assert len(lowering.ops) == 1
    x = lowering.value(lowering.x, (3, 4)).ids  # what a caller passes is not the plan's to hand on
    for count, other in enumerate((ids[:2], ids[1:], ids.flip(1), torch.cat([ids[:2], ids[:1]]), x), 2):
        made = lowering.dense(other, (1, len(other), 4))
        assert made is not lowering.stored[1] and (made.height, made.width, made.channels) == (1, len(other), 4)
        assert len(lowering.ops) == count and lowering.ops[-1].kind == "copy"


def test_a_copy_in_pieces():
    lowering, ids = begun(3, 4)
    x = lowering.value(lowering.x, (12,)).ids
    flat = torch.cat(
        [ids[1], x[2:5], lowering.of(torch.tensor([7.0, 8.0])).ids, lowering.of(9.0).ids[None], ids[0, :1]]
    )
    made = lowering.copy(flat, (1, 1, 11))
    op = lowering.ops[-1]
    assert op.inputs == [lowering.stored[1], lowering.x] and op.floats is made
    assert op.data[0].tolist() == [[0, 0, 4, 4], [4, 1, 2, 3], [7, 4, 0, 2], [9, 4, 2, 1], [10, 0, 0, 1]]
    np.testing.assert_array_equal(op.data[1], np.array([7, 8, 9], np.float32))
    lowering.copy(ids[0], (1, 1, 4))
    assert lowering.ops[-1].data.keys() == {0}


@pytest.mark.parametrize("count", [4, 5, 7, 8, 13])
def test_a_copy_of_more_than_four_tensors_takes_several_operations(count):
    lowering = Lowering((1, 4))
    tensors = [Stored(1, 1, 3) for _ in range(count)]
    mixed = torch.cat([lowering.value(tensor, (3,)).ids for tensor in tensors]).reshape(-1, 3).T.flatten()
    made = lowering.copy(mixed, (1, 3, count))
    assert len(lowering.ops) == 1 + math.ceil((count - 4) / 3)
    held = {tensor: np.arange(3) + 10 * i for i, tensor in enumerate(tensors)}
    for op in lowering.ops:
        assert len(op.inputs) <= 4
        held[op.floats] = np.zeros(op.floats.rows * op.floats.channels, int)
        for begin, source, at, length in op.data[0]:
            held[op.floats][begin : begin + length] = held[op.inputs[source]][at : at + length]
    assert held[made].tolist() == [10 * i + j for j in range(3) for i in range(count)]


def ask(lowering, ids, border=(0, 0), scale=0.5, name="linear", before=None, tight=False, low=-8) -> Op:
    """An operation that reads a map of ``ids`` ``[height, width, channels]``."""
    op = Op("product", [None, None, None], Stored(1, 1, 1), name=name)
    step = None if scale is None else torch.tensor(scale)
    lowering.ask(op, ids, border, step, low, 7, before, tight)
    lowering.add(op)
    return op


def finish(lowering: Lowering, op: Op) -> list[str]:
    """The kinds of the operations when ``op`` gives the output."""
    lowering.finish(lowering.value(op.floats, (1, 1)))
    return [op.kind for op in lowering.ops]


def test_a_map_is_written_by_the_operation_before():
    lowering, ids = begun(3, 4)
    op = ask(lowering, ids[None])
    assert finish(lowering, op) == ["gelu", "product"]
    made, before = op.inputs[0], lowering.ops[0]
    assert before.map is made and before.floats is None and before.f == {1: 0.5}
    assert (made.kind, made.height, made.width, made.channels) == (MAP, 1, 3, 4)
    assert (made.place, made.border, made.low, made.high) == (4, (0, 0), -8, 7)


@pytest.mark.parametrize(
    ("change", "n"),
    [
        ({"rows": slice(1, None)}, {0: 4, 1: 4, 2: 0, 3: 0}),
        ({"rows": slice(None, 2)}, {0: 0, 1: 4, 2: 0, 3: 0}),
        ({"rows": slice(None, None, 2)}, {0: 0, 1: 8, 2: 0, 3: 0}),
        ({"scale": None}, {0: 0, 1: 4, 2: 0, 3: 1}),
        ({"scale": None, "name": "convolution"}, {0: 0, 1: 4, 2: 0, 3: 2}),
        ({"before": torch.tensor([1.0, 2, 3, 4])}, {0: 0, 1: 4, 2: 0, 3: 0}),
    ],
)
def test_other_maps_have_an_operation_of_their_own(change, n):
    lowering, ids = begun(3, 4)
    rows = ids[change.pop("rows", slice(None))]
    op = ask(lowering, rows[None], **change)
    assert finish(lowering, op) == ["gelu", "quantize", "product"]
    quantize = lowering.ops[1]
    assert (quantize.map, quantize.n) == (op.inputs[0], n)
    assert (op.inputs[0].width, lowering.ops[0].map) == (len(rows), None)
    if change.get("scale", 0) is None:
        scales = op.inputs[2]
        assert quantize.floats is scales and quantize.f == {}
        assert (scales.height, scales.width, scales.channels) == (1, 3 if n[3] == 1 else 1, 1)
    else:
        assert quantize.floats is None and quantize.f == {0: 0.5}
    assert quantize.data.get(0, np.zeros(0)).tolist() == change.get("before", torch.zeros(0)).tolist()


def test_repeated_rows_and_transposed_squares_are_not_what_was_written():
    """They have as many rows and channels as the tensor, which alone the operation before could round."""
    for change, n in ((lambda ids: ids[:1].expand(4, 4), (0, 0, 0, 0)), (torch.t, (0, 4, 1, 0))):
        lowering, ids = begun(4, 4)
        op = ask(lowering, change(ids)[None])
        assert finish(lowering, op) == ["gelu", "quantize", "product"]
        assert lowering.ops[1].n == dict(enumerate(n))


def test_planes_of_the_input():
    """An image lies in memory channel by channel; one channel, or one place, lies there as rows too."""
    for size, n in (((2, 3, 5), {0: 0, 1: 2, 2: 1, 3: 0}), ((1, 3, 5), {0: 0, 1: 1, 2: 0, 3: 0})):
        lowering = Lowering(size)
        op = ask(lowering, lowering.value(lowering.x, size).ids.permute(1, 2, 0), (2, 1))
        assert finish(lowering, op) == ["quantize", "product"]
        assert lowering.ops[0].n == n
        made = op.inputs[0]
        assert (made.height, made.width, made.channels, made.border, made.place) == (3, 5, size[0], (2, 1), 4)
    lowering = Lowering((6, 1, 1))
    op = ask(lowering, lowering.value(lowering.x, (6, 1, 1)).ids.permute(1, 2, 0))
    finish(lowering, op)
    assert lowering.ops[0].n == {0: 0, 1: 6, 2: 0, 3: 0}
    lowering = Lowering((4, 3, 5))
    half = lowering.value(lowering.x, (4, 3, 5)).ids[:2].permute(1, 2, 0)  # not all planes: a copy as rows
    assert finish(lowering, ask(lowering, half)) == ["copy", "quantize", "product"]


@pytest.mark.parametrize(
    ("channels", "border", "tight", "place"),
    [
        (5, (0, 0), False, 8), (5, (0, 0), True, 5), (8, (0, 0), False, 8), (512, (0, 0), False, 576),
        (1024, (0, 0), False, 1088), (512, (1, 0), False, 512), (512, (0, 1), False, 512), (256, (0, 0), False, 256),
        (516, (0, 0), False, 516), (1021, (0, 0), False, 1088),
    ],
)  # fmt: skip
def test_bytes_from_place_to_place(channels, border, tight, place):
    lowering, ids = begun(2, channels)
    op = ask(lowering, ids[None], border, tight=tight)
    finish(lowering, op)
    assert op.inputs[0].place == place


def test_equal_requests_share_a_map_with_the_widest_borders():
    lowering, ids = begun(3, 4)
    ops = [ask(lowering, ids[None], border) for border in ((0, 2), (1, 0), (0, 0))]
    others = [ask(lowering, ids[None], **more) for more in ({"scale": 0.25}, {"low": -7}, {"tight": True})]
    assert finish(lowering, others[-1]).count("quantize") == 3
    assert ops[0].inputs[0] is ops[1].inputs[0] is ops[2].inputs[0]
    assert ops[0].inputs[0].border == (1, 2)
    assert len({id(op.inputs[0]) for op in [ops[0], *others]}) == 4
    assert [op.kind for op in lowering.ops].index("quantize") == lowering.ops.index(others[0]) - 1


@pytest.mark.parametrize("y", [3, [1], None])
def test_a_model_must_return_one_tensor(y):
    with pytest.raises(LowbitError, match=f"returns a {type(y).__name__}"):
        Lowering((1, 4)).finish(y)


def test_the_output_is_never_the_input():
    lowering = Lowering((1, 4))
    content = lowering.finish(lowering.value(lowering.x, (4,)))
    assert [op.kind for op in lowering.ops] == ["copy"] and content
    with pytest.raises(LowbitError, match="returns"):
        lowering.finish(Value(torch.zeros(0, dtype=torch.int64)))


def merged(before: Op, affine: Op, *, read_twice: str = "") -> list[Op]:
    """The operations when ``affine`` reads ``before``, and another one ``affine``; ``before`` may be read twice."""
    lowering = Lowering((1, 3, 4))
    lowering.add(before)
    affine.inputs = [before.floats]
    lowering.add(affine)
    if read_twice == "floats":
        lowering.add(Op("gelu", [before.floats], Stored(1, 3, 4)))
    elif read_twice == "map":
        ask(lowering, lowering.value(before.floats, (1, 3, 4)).ids)
    lowering.add(Op("gelu", [affine.floats], last := Stored(1, 3, 4)))
    lowering.finish(lowering.value(last, (12,)))
    return lowering.ops


def affine(gain=False, **n) -> Op:
    data = {0: np.full(4, 2, np.float32), 1: np.full(4, 3, np.float32)} if gain else {}
    return Op(
        "affine",
        [None],
        Stored(1, 3, 4),
        n={0: 0, 1: 4, 11: 1} | {int(k[1:]): v for k, v in n.items()},
        f={2: 6.0},
        data=data,
    )


@pytest.mark.parametrize("kind", ["affine", "conv", "depthwise"])
def test_a_relu_goes_into_the_operation_before(kind):
    def before(**n):
        return Op(kind, [Stored(1, 3, 4)], Stored(3, 1, 4), n={11: 0} | n, f={2: 0.0})

    ops = merged(before(), affine())
    assert [op.kind for op in ops] == [kind, "gelu"]
    assert (ops[0].n[11], ops[0].f[2]) == (1, 6.0)
    assert ops[1].inputs == [ops[0].floats] and (ops[0].floats.height, ops[0].floats.width) == (3, 1)
    for other in (affine(n0=4), affine(n1=8)):
        assert len(merged(before(), other)) == 3
    for reader in ("floats", "map"):
        relu = affine()
        assert relu in merged(before(), relu, read_twice=reader)
    relu = before()
    relu.n[11] = 1
    assert len(merged(relu, affine())) == 3


def test_a_batchnorm_goes_into_a_depthwise_convolution_only():
    def before(kind, **data):
        held = {0: np.ones((9, 4), np.int16), 1: np.ones(4, np.float32)} | {int(k[1:]): v for k, v in data.items()}
        return Op(kind, [Stored(1, 3, 4)], Stored(1, 3, 4), n={11: 0}, f={2: 0.0}, data=held)

    ops = merged(before("depthwise"), affine(gain=True))
    assert [op.kind for op in ops] == ["depthwise", "gelu"]
    np.testing.assert_array_equal(ops[0].data[4], [[2] * 4, [3] * 4])
    assert len(merged(before("conv"), affine(gain=True))) == 3
    assert len(merged(before("depthwise", d4=np.ones((2, 4))), affine(gain=True))) == 3
    only_gain = affine(gain=True)
    del only_gain.data[1]
    assert len(merged(before("depthwise"), only_gain)) == 3
