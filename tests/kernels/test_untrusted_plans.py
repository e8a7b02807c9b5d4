"""Plans that nobody should trust, operation by operation, and numbers that are none."""

import subprocess

import numpy as np
import pytest
from plan_seeds import small_plans

import lowbit
from lowbit.engine import format as file_format
from lowbit.engine.format import MAP, Op, Tensor
from lowbit.errors import LowbitError


@pytest.fixture(scope="module")
def seeds():
    return {name: plan.content for name, plan in small_plans().items()}


def test_the_fuzzers_first_inputs_have_every_operation(seeds):
    kinds = {row["kind"] for content in seeds.values() for row in lowbit.Plan(content).operations()}
    assert kinds == set(file_format.KINDS)


OTHER_NAN = np.uint32(0x7FC00001).view(np.float32)  # not the one that arithmetic makes


def special(inputs: int) -> np.ndarray:
    """Ordinary numbers, and such with a NaN, infinities, or huge numbers among them."""
    x = np.random.default_rng(0).standard_normal((6, inputs)).astype(np.float32)
    x[1, inputs // 2] = np.nan
    x[2, inputs // 3] = np.inf
    x[3, [0, inputs // 2]] = -np.inf, np.inf
    x[4] *= np.float32(1e37)
    x[5] = OTHER_NAN
    return x


def test_instruction_sets_agree_on_numbers_that_are_none(seeds, library):
    """To the bit but for which NaN a NaN is, over threads and batches."""
    for name, content in seeds.items():
        x = special(lowbit.Plan(content, 1).inputs)
        with library.use("portable"):
            expected = lowbit.Plan(content, 1)(x)
        for isa in library.isas():
            with library.use(isa):
                for threads in (1, 3):
                    plan = lowbit.Plan(content, threads)
                    np.testing.assert_array_equal(plan(x), expected, err_msg=f"{name} {isa} {threads}")
                    for i in range(len(x)):
                        np.testing.assert_array_equal(plan(x[i : i + 1])[0], expected[i], err_msg=f"{name} {isa} {i}")


def made(ops, x, y) -> lowbit.Plan:
    """A plan of exactly these operations."""
    return lowbit.Plan(file_format.write(ops, x, y), 1)


def test_a_nan_in_a_sound_does_not_become_a_number(library):
    """The spectrogram of such a clip is NaN throughout, as PyTorch's is."""
    cosine = np.cos(2 * np.pi * np.arange(64) / 64).astype(np.float32)
    data = {0: np.hanning(40).astype(np.float32), 1: np.ones((33, 2), np.float32), 2: cosine}
    x, y = Tensor(1, 1, 100), Tensor(2, 6, 1)
    content = file_format.write([Op("mel", [x], y, n={2: 64, 3: 20}, f={0: 60.0}, data=data)], x, y)
    sound = np.random.default_rng(0).standard_normal((1, 100)).astype(np.float32)
    for isa in library.isas():
        with library.use(isa):
            plan = lowbit.Plan(content, 1)
            assert np.isfinite(plan(sound)).all()
            for nan in (np.float32(np.nan), OTHER_NAN):
                assert np.isnan(plan(np.where(np.arange(100) == 50, nan, sound))).all()


@pytest.mark.parametrize("scale", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("tokens", [1, 5, 16, 21])
def test_attention_of_any_scale(tokens, scale, library):
    """Pads beside the logits have no share, also where the scale turns their sign."""
    x, y = Tensor(1, tokens, 6), Tensor(1, tokens, 2)
    op = Op("attention", [x], y, n={0: 0, 1: 6, 2: 1, 3: 2, 4: 2, 5: 4}, f={0: scale})
    content = file_format.write([op], x, y)
    inputs = np.random.default_rng(1).standard_normal((1, tokens, 6)).astype(np.float32)
    q, k, v = np.split(inputs[0].astype(np.float64), 3, 1)
    share = np.exp(scale * q @ k.T)
    expected = share / share.sum(1, keepdims=True) @ v
    for isa in library.isas():
        with library.use(isa):
            actual = lowbit.Plan(content, 1)(inputs)[0]
            np.testing.assert_allclose(actual, expected.reshape(-1), rtol=1e-5, atol=1e-5)


def test_softmax_of_infinities_and_nan(library):
    x, y = Tensor(1, 4, 20), Tensor(1, 4, 20)
    content = file_format.write([Op("softmax", [x], y, n={0: 0, 1: 20})], x, y)
    logits = np.zeros((1, 4, 20), np.float32)
    logits[0, 0, 3:] = -np.inf
    logits[0, 1, 7] = OTHER_NAN
    logits[0, 2, 7] = np.inf
    logits[0, 3] = -np.inf
    for isa in library.isas():
        with library.use(isa):
            shares = lowbit.Plan(content, 1)(logits).reshape(4, 20)
            np.testing.assert_allclose(shares[0], [1 / 3] * 3 + [0] * 17, rtol=1e-6)
            assert np.isnan(shares[1:]).all()


def test_levels_that_8_bits_do_not_have(library):
    """A fuzzer's finding: with AVX-512 they were added to the weights."""
    x, y = Tensor(1, 1, 64), Tensor(1, 1, 16)
    image = Tensor(1, 1, 64, MAP, place=64, low=-128, high=127)
    weights = np.random.default_rng(0).integers(-128, 128, (16, 16, 4))  # [k / 4][outputs][4]
    data = {0: weights.astype(np.int8), 1: np.ones(16, np.float32), 2: weights.sum((0, 2)).astype(np.int32)}
    data[4] = np.full(16, 128, np.int16)
    ops = [
        Op("quantize", [x], None, image, n={0: 0, 1: 64, 2: 0, 3: 0}, f={0: 1.0}),
        Op("product", [image], y, n={2: 8, 3: 1, 4: 1, 5: 1, 6: 1, 9: 1, 10: 1}, f={0: 1.0}, data=data),
    ]
    content = file_format.write(ops, x, y)
    inputs = np.random.default_rng(1).integers(-128, 128, (1, 64))
    expected = np.einsum("kni,ki->n", weights, inputs.reshape(16, 4))
    for isa in library.isas():
        with library.use(isa):
            np.testing.assert_array_equal(lowbit.Plan(content, 1)(inputs.astype(np.float32))[0], expected, err_msg=isa)


# ---- what plans may not ask for ----


def pieces(*rows):
    """The data of a copy: where to, from which input (4: the constant), where from, how many."""
    return {0: np.array(rows, np.int64)}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([(0, 0, 0, 5)], "pieces that do not fill the output"),
        ([(0, 0, 0, 5), (6, 0, 0, 2)], "pieces that do not follow each other"),
        ([(4, 0, 0, 4), (0, 0, 0, 4)], "pieces that do not follow each other"),
        ([(0, 0, 0, 8), (8, 0, 0, 1)], "a piece outside its tensor"),
    ],
)
def test_copies_fill_their_output(rows, why):
    """Else a run would give away what an earlier one left there."""
    with pytest.raises(LowbitError, match=f"operation 0: {why}"):
        x, y = Tensor(1, 1, 8), Tensor(1, 1, 8)
        made([Op("copy", [x], y, data=pieces(*rows))], x, y)
    x, y = Tensor(1, 1, 8), Tensor(1, 1, 8)
    halves = made([Op("copy", [x], y, data=pieces((0, 0, 4, 4), (4, 0, 0, 4)))], x, y)
    np.testing.assert_array_equal(halves(np.arange(8, dtype=np.float32)[None]), [[4, 5, 6, 7, 0, 1, 2, 3]])


@pytest.mark.parametrize("extra", [0, 1])
def test_tables_of_places_are_bounded(extra):
    """Each place of a map has 8 bytes in a table, and a file may have many maps in the same memory."""
    x, y = Tensor(1, 1, 1), Tensor(1, 1, 1)
    ops = []
    for height, width in [(1 << 12, 1 << 11), (1 << 12, (1 << 11) - 1), (1, (1 << 12) - 1 + extra)]:
        image = Tensor(height, width, 1, MAP, place=1, low=0, high=255)
        ops.append(Op("quantize", [x], None, image, n={0: 0, 1: 0, 2: 0, 3: 0}, f={0: 1.0}))
    ops.append(Op("copy", [x], y, data=pieces((0, 0, 0, 1))))  # one place more
    if not extra:
        assert made(ops, x, y).outputs == 1
        return
    with pytest.raises(LowbitError, match=r"operation 3: more than 2\^24 places in all"):
        made(ops, x, y)


@pytest.mark.parametrize("count", [2, 128])
def test_tables_from_shared_data_are_bounded(count):
    """A table of 8 MB that the file has once, and many operations that go through it while they are loaded."""
    bands = 1 << 12
    data = {0: np.ones(4, np.float32), 1: np.zeros((513, bands), np.float32), 2: np.ones(1024, np.float32)}
    x, outputs = Tensor(1, 1, 520), [Tensor(bands, 2, 1) for _ in range(count)]
    ops = [Op("mel", [x], y, n={2: 1024, 3: 520}, f={0: 60.0}, data=data) for y in outputs]
    if count == 2:
        assert made(ops, x, outputs[-1]).outputs == 2 * bands
        return
    with pytest.raises(LowbitError, match=r"operation 127: tables of more than 2\^30 bytes in all"):
        made(ops, x, outputs[-1])


def matmul(k: int, n: int) -> lowbit.Plan:
    """A row of ones by [k, n] times the same number, which is stored once."""
    x, row, y = Tensor(1, 1, 1), Tensor(1, 1, k), Tensor(1, 1, n)
    ones = Op("copy", [x], row, data=pieces((0, 4, 0, k)) | {1: np.ones(k, np.float32)})
    return made([ones, Op("matmul", [row, x], y, n={2: 1, 3: 1, 4: k, 5: n})], x, y)


def test_working_memory_is_bounded():
    np.testing.assert_array_equal(matmul(3, 5)(np.full((1, 1), 2, np.float32)), [[6] * 5])
    with pytest.raises(LowbitError, match=r"operation 1: more than 2\^32 bytes to work in"):
        matmul(1 << 16, 1 << 16)


def test_the_arena_is_bounded():
    x, y, big = Tensor(1, 1, 1), Tensor(1, 1, 1), Tensor(1 << 12, 1 << 12, 64)
    ops = [Op("affine", [x], big, n={0: 0, 1: 0}), Op("copy", [big], y, data=pieces((0, 0, 0, 1)))]
    content = bytearray(file_format.write(ops, x, y))
    with pytest.raises(LowbitError, match="operation 0: an input of another shape"):  # an arena of 2^32 bytes may be
        lowbit.Plan(bytes(content))
    np.frombuffer(content, file_format.HEADER, 1)["arena_bytes"] = (1 << 32) + 64
    with pytest.raises(LowbitError, match="impossible input, output or arena"):
        lowbit.Plan(bytes(content))


@pytest.mark.parametrize(
    ("n", "data", "why"),
    [
        ({}, {}, None),
        ({3: 65537}, {}, "wrong tensors or numbers"),
        ({11: 3}, {}, "wrong tensors or numbers"),
        ({13: 256 * 1024 + 255}, {}, "a range whose integers are not multiplied"),
        ({14: 256 * 1024 + 128}, {}, "a range whose integers are not multiplied"),
        ({15: 300 * 1024 + 300}, {}, "a range whose integers are not multiplied"),
        ({12: 256 * 1024}, {}, "a range whose integers are not multiplied"),
        ({8: 7}, {}, "an input of another shape"),
        ({6: 10}, {}, "an input of another shape"),
        ({5: 5}, {}, "an input of another shape"),
        ({}, {0: np.ones(5, np.float32)}, "steps of another size"),
        ({}, {2: np.ones(6, np.float32)}, "steps of another size"),
        ({}, {3: np.ones(0, np.float32)}, "steps of another size"),
        ({}, {4: np.ones(19, np.float32)}, "biases of another size"),
    ],
)
def test_attention_on_integers_is_checked(n, data, why):
    """Two heads of two channels, three tokens."""
    x, y = Tensor(1, 3, 8), Tensor(1, 3, 4)
    numbers = {1: 8, 2: 2, 3: 2, 4: 2, 5: 4, 6: 8, 7: 8, 8: 2, 9: 2, 10: 2, 11: 2}
    numbers |= {12 + i: 128 * 1024 + 127 for i in range(4)} | n
    arrays = {i: np.full(1, 0.1, np.float32) for i in range(4)} | {4: np.ones(20, np.float32)} | data
    ops = [Op("integer attention", [x, x, x], y, n=numbers, f={0: 1.0}, data=arrays)]
    if why is None:
        assert np.isfinite(made(ops, x, y)(np.ones((1, 24), np.float32))).all()
        return
    with pytest.raises(LowbitError, match=f"operation 0: {why}"):
        made(ops, x, y)


def test_seeds_under_the_sanitizers(seeds, fuzz_program, tmp_path):
    """The fuzzer's entry on its first inputs, whole and changed; it compares instruction sets and repeated runs."""
    draw = np.random.default_rng(1)
    paths = []
    for number in range(600):
        content = bytearray(list(seeds.values())[number % len(seeds)])
        for _ in range(draw.integers(1, 5) if number >= len(seeds) else 0):
            at, size = int(draw.integers(0, len(content) // 4 - 2)) * 4, int(draw.choice([1, 2, 4, 8]))
            content[at : at + size] = draw.bytes(size) if draw.integers(2) else bytes(size)
        paths.append(tmp_path / f"{number}.lbp")
        paths[-1].write_bytes(content)
    done = subprocess.run([fuzz_program, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "600 files\n"
