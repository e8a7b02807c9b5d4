"""The file of a plan, field by field, and where tensors lie in the arena."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lowbit.engine import format as file_format
from lowbit.engine.format import MAP, Op, Tensor, place_tensors, write


def copy(source: Tensor, target: Tensor, **more) -> Op:
    """All numbers of one tensor into another."""
    count = target.rows * target.channels
    return Op("copy", [source], target, data={0: np.array([[0, 0, 0, count]], np.int64)}, **more)


def test_sizes_of_tensors():
    floats, image = Tensor(3, 5, 4), Tensor(3, 5, 4, MAP, border=(1, 2), place=8)
    assert (floats.rows, floats.nbytes) == (15, 3 * 5 * 4 * 4)
    assert (image.rows, image.nbytes) == (15, 5 * 9 * 8 + 128)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=9))
def test_tensors_in_use_at_the_same_time_do_not_overlap(draw):
    """Each tensor is written by one operation and read by a later one."""
    lives = [(Tensor(1, size, 4), first, first + length) for size, first, length in draw]
    x, y = Tensor(1, 1, 1), Tensor(1, 1, 1)
    ops = [Op("add", [x, *(t for t, _, last in lives if last == i)], y) for i in range(10)]
    for tensor, first, _ in lives:
        ops[first].inputs.append(tensor)
    size = place_tensors(ops, (x, y))
    assert size == max(tensor.offset + tensor.nbytes for tensor, _, _ in lives)
    assert x.offset == y.offset == -1
    for i, (one, first, last) in enumerate(lives):
        assert one.offset % 64 == 0
        for other, begin, end in lives[i + 1 :]:
            if first <= end and begin <= last:
                assert one.offset + one.nbytes <= other.offset or other.offset + other.nbytes <= one.offset


def test_memory_is_used_again_where_it_fits_exactly():
    x, y = Tensor(1, 1, 64), Tensor(1, 1, 64)
    first, second, third = (Tensor(1, 1, 64) for _ in range(3))
    ops = [Op("add", [x, first], second), Op("add", [second], third), copy(third, y)]
    assert place_tensors(ops, (x, y)) == 512
    assert [tensor.offset for tensor in (first, second, third)] == [0, 256, 0]


def test_the_next_tensor_starts_at_a_multiple_of_64_bytes():
    x, y = Tensor(1, 1, 1), Tensor(1, 1, 1)
    large, small = Tensor(1, 1, 17), Tensor(1, 1, 3)
    assert place_tensors([Op("add", [large, small], y)], (x, y)) == 128 + 12
    assert (large.offset, small.offset) == (0, 128)


def test_a_file_field_by_field():
    x, y, image = Tensor(1, 2, 3), Tensor(1, 2, 3), Tensor(1, 2, 3, MAP, (0, 1), 4, -7, 9)
    table = np.arange(5, dtype=np.float32)
    ops = [
        Op("quantize", [x], None, image, n={0: 0, 1: 3, 15: 8}, f={0: 0.5, 3: 0.25}),
        Op("affine", [None, x], y, data={1: table}),
        Op("add", [x, x], y, data={0: np.ones(3, np.float32), 4: table.copy()}),
    ]
    content = write(ops, x, y)
    header = np.frombuffer(content, file_format.HEADER, 1)[0]
    assert (header["magic"], header["version"]) == (b"lowbit plan\n", 1)
    assert header["file_bytes"] == len(content)
    assert header["arena_bytes"] == image.nbytes == 4 * 4 + 128
    assert [int(header[name]) for name in ("tensors", "ops", "input", "output")] == [3, 3, 0, 1]
    at = file_format.HEADER.itemsize
    tensors = np.frombuffer(content, file_format.TENSOR, 3, at)
    assert list(tensors["kind"]) == [0, 0, 1]
    assert [int(tensors[2][name]) for name in ("border_y", "border_x", "low", "high")] == [0, 1, -7, 9]
    sizes = [[int(t[name]) for name in ("height", "width", "channels", "place", "offset")] for t in tensors]
    assert sizes == [[1, 2, 3, 0, -1], [1, 2, 3, 0, -1], [1, 2, 3, 4, 0]]
    stored = np.frombuffer(content, file_format.OP, 3, at + tensors.nbytes)
    assert [file_format.KINDS[kind] for kind in stored["kind"]] == ["quantize", "affine", "add"]
    assert stored["in"].tolist() == [[0, -1, -1, -1], [-1, 0, -1, -1], [0, 0, -1, -1]]
    assert stored["out"].tolist() == [[-1, 2], [1, -1], [1, -1]]
    assert stored["n"][0].tolist() == [0, 3, *[0] * 13, 8]
    assert stored["f"][0].tolist() == [0.5, 0, 0, 0.25]
    place, size = stored["data"][1][1]
    assert content[place : place + size] == table.tobytes()
    assert stored["data"][2][4].tolist() == [place, size]  # equal arrays are stored once
    other, _ = stored["data"][2][0]
    end = at + tensors.nbytes + stored.nbytes
    assert place == header["data_offset"] == -(-end // 64) * 64
    assert other == place + 64 and len(content) == other + 12
    assert not any(content[end:place]) and not any(content[place + size : other])


def test_a_plan_without_values_between_has_no_arena():
    x, y = Tensor(1, 1, 8), Tensor(1, 1, 8)
    assert np.frombuffer(write([copy(x, y)], x, y), file_format.HEADER, 1)[0]["arena_bytes"] == 0
