"""The packed layout: by hand, there and back, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import TABLES, random_weight, statsq_levels

from lowbit.errors import LowbitError
from lowbit.functional import denseshift_levels
from lowbit.kernels import pack, pack_weight, unpack
from lowbit.kernels.packing import integer_levels, largest_k, packed_shape, padded_channels
from lowbit.quantizers import DenseShift, StatsQ


@given(bits=st.sampled_from([2, 3, 4, 8]), n=st.integers(1, 40), k=st.integers(1, 200), seed=st.integers(0, 999))
def test_there_and_back(bits, n, k, seed):
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and tuple(packed.shape) == packed_shape(bits, n, k)
    assert torch.equal(unpack(packed, bits, n, k), codes)


def test_bytes_by_hand():
    codes = torch.zeros(17, 64, dtype=torch.int64)
    codes[3, 6] = 3  # row 1, byte 3·4 + 2
    assert pack(codes, 2)[0].nonzero().tolist() == [[14]] and pack(codes, 2)[0, 14] == 3 << 2
    assert pack(codes, 4)[0, 14] == 3 << 4
    assert pack(codes, 3)[0, 14] == 3 << 2
    codes[3, 6], codes[16, 33] = 0, 4  # second block, row 8: first of the second group of eight, byte 1
    packed = pack(codes, 3)
    assert packed[1].nonzero().tolist() == [[192 + 128 + 1]] and packed[1, 321] == 1 << 2  # the top bit of row 0


@given(first=st.integers(-128, 126), count=st.integers(2, 256), n=st.integers(1, 40), k=st.integers(1, 150))
def test_eight_bits_hold_the_levels_themselves(first, count, n, k):
    count = min(count, 128 - first)
    codes = torch.arange(n * k).reshape(n, k) * 7 % count
    weight = pack_weight(codes, torch.arange(first, first + count).float(), bits=8)
    assert torch.equal(weight.codes().long(), codes) and torch.equal(weight.integers().long(), codes + first)
    assert weight.levels == tuple(range(first, first + count)) and weight.table == ()
    assert torch.equal(weight.sums.long(), (codes + first).sum(1))
    blocks, width = packed_shape(8, n, k)
    stored = torch.zeros(blocks * 16, width // 16, dtype=torch.int8)  # the pads are 0
    stored[:n, :k] = codes + first
    rows = weight.data.view(torch.int8).reshape(blocks, width // 64, 16, 4)
    assert torch.equal(rows.transpose(1, 2).reshape(blocks * 16, -1), stored)


def test_eight_bits_by_hand():
    weight = pack_weight(torch.tensor([[0] * 7, [1] * 7]), torch.tensor([-2.0, -1.0]), bits=8)
    assert weight.data.shape == (1, 1024) and weight.data[0, [0, 4, 64 + 2, 64 + 4 + 2]].tolist() == [
        254,
        255,
        254,
        255,
    ]
    assert weight.data.count_nonzero() == 14
    stem = pack_weight(torch.full((5, 3, 3, 3), 1), torch.arange(-1.0, 40.0))  # level 0 wherever it is no pad
    assert stem.bits == 8 and stem.k == 36 and not stem.data.any() and not stem.sums.any()


@pytest.mark.parametrize(("count", "bits"), [(4, 2), (5, 3), (8, 3), (9, 4), (16, 4), (17, 8), (256, 8)])
def test_the_fewest_bits_that_hold_the_levels_are_taken(count, bits):
    codes = torch.arange(count).expand(3, -1)
    assert pack_weight(codes, torch.arange(count) - count // 2 + 0.0).bits == bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_blocks_take_exactly_that_many_bits(bits):
    assert pack(torch.zeros(32, 128, dtype=torch.uint8), bits).numel() * 8 == 32 * 128 * bits


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", [(5, 70), (20, 3, 3, 3), (3, 33, 1, 1), (4, 40, 3, 2)])
def test_packed_weights_give_back_codes_and_values(table, shape):
    levels = TABLES[table][1]
    codes = torch.randint(0, len(levels), shape)
    scale = torch.rand(shape[0])
    weight = pack_weight(codes, levels, scale)
    assert torch.equal(weight.codes().long(), codes)
    expected = levels[codes] * scale.reshape(-1, *(1,) * (len(shape) - 1))
    assert torch.allclose(weight.dequantize(), expected, rtol=1e-6, atol=0)
    assert torch.equal(weight.sums.long(), weight.integers().long().flatten(1).sum(1))


@pytest.mark.parametrize("method", [StatsQ(bits=3), DenseShift(bits=4, scale="statistical")])
def test_a_quantizer_is_reproduced_exactly(method):
    latent = torch.randn(20, 50)
    quantizer = method.weight(latent)
    latents = quantizer.right_inverse(latent)
    latents = latents if isinstance(latents, tuple) else (latents,)
    weight = pack_weight(quantizer.codes(*latents), quantizer.levels, quantizer.scale(*latents))
    assert torch.equal(weight.dequantize(), quantizer(*latents).detach())


def test_whole_levels_are_the_smallest():
    assert integer_levels(statsq_levels(3)) == ((-7, -5, -3, -1, 1, 3, 5, 7), 8.0)
    assert integer_levels(denseshift_levels(2)) == ((-2, -1, 1, 2), 1.0)
    assert integer_levels(torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])) == ((-3, -1, 1, 3), 3.0)
    with pytest.raises(LowbitError, match="no integers"):
        integer_levels(torch.tensor([-0.123, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("c", "kernel", "expected"),
    [(3, (3, 3), 4), (31, (3, 3), 32), (32, (3, 1), 64), (100, (1, 1), 100)],
)
def test_padded_channels(c, kernel, expected):
    assert padded_channels(c, kernel) == expected


def test_the_bound_of_k():
    levels = denseshift_levels(4)
    bound = largest_k(integer_levels(levels)[0])
    assert bound == (2**31 - 1) // (255 * 128)
    assert pack_weight(torch.full((1, bound), 15), levels).sums.item() == bound * 128
    with pytest.raises(LowbitError, match=rf"K={bound + 1} .*K={bound};"):
        pack_weight(torch.full((1, bound + 1), 15), levels)
    pack_weight(torch.full((1, bound + 1), 1), denseshift_levels(2))  # smaller levels allow more
    whole = torch.arange(-128.0, 128.0)
    assert pack_weight(torch.zeros(1, bound, dtype=torch.int16), whole).sums.item() == bound * -128
    with pytest.raises(LowbitError, match=rf"K={bound + 1} .*K={bound};"):
        pack_weight(torch.zeros(1, bound + 1, dtype=torch.int16), whole)


def test_every_code_that_has_a_level_is_allowed_and_no_other():
    codes = torch.tensor([[0, 1, 2, 1]], dtype=torch.int16)
    weight = pack_weight(codes, torch.tensor([-1.0, 0.0, 1.0]))
    weight.check()
    for levels in ((-1, -1, 1), (1, 0, -1)):
        with pytest.raises(LowbitError, match="not ascending"):
            replace(weight, levels=levels).check()
    weight = replace(weight, data=pack(codes + 1, 2))
    with pytest.raises(LowbitError, match="codes go from 1 to 3; there are 3 levels"):
        weight.check()


CODES = torch.zeros(4, 8, dtype=torch.int16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(CODES, 5), "bits=5"),
        (lambda: pack(CODES - 1, 2), "from -1"),
        (lambda: pack(CODES + 4, 2), "2 bits hold 0 to 3"),
        (lambda: pack(CODES.float(), 2), "float32"),
        (lambda: pack(CODES[0], 2), r"\[8\]"),
        (lambda: pack(CODES[:0], 2), "nothing"),
        (lambda: unpack(pack(CODES, 2), 3, 4, 8), "3-bit"),
        (lambda: unpack(pack(CODES, 2), 2, 17, 8), "17"),
        (lambda: pack_weight(CODES[0], denseshift_levels(2)), r"\[8\]"),
        (lambda: pack_weight(CODES, denseshift_levels(4), bits=3), "16 levels"),
        (lambda: pack_weight(CODES + 3, torch.tensor([-1.0, 0.0, 1.0])), "3 levels"),
        (lambda: pack_weight(CODES, denseshift_levels(2), torch.ones(3)), r"scale is \[3\]"),
        (lambda: pack_weight(CODES, denseshift_levels(2), torch.ones(1, 8)), r"scale is \[1, 8\]"),
        (lambda: pack_weight(CODES, denseshift_levels(2), float("nan")), "NaN"),
        (lambda: pack_weight(CODES, torch.ones(1)), r"levels are \[1\]"),
        (lambda: pack_weight(CODES, torch.arange(257.0) - 128), r"levels are \[257\]"),
        (lambda: pack_weight(CODES.float(), denseshift_levels(2)), "float32"),
        (lambda: pack_weight(CODES - 1, denseshift_levels(2)), "from -1"),
        (lambda: pack_weight(CODES - 1, torch.arange(-65.0, 12.0)), "from -1"),
        (lambda: pack_weight(CODES + 77, torch.arange(-65.0, 12.0)), "to 77; of 77 levels"),
        (lambda: pack_weight(CODES, torch.arange(0.0, 80.0, 2) / 2 - torch.eye(40)[0]), "consecutive"),  # -1, 1, 2 ...
        (lambda: pack_weight(CODES, torch.arange(100.0, 129.0)), "from -128 to 127"),
        (lambda: pack_weight(CODES, denseshift_levels(3), bits=8), "consecutive"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(LowbitError, match=message):
        call()


def test_moving_keeps_everything():
    weight = random_weight("denseshift3", (5, 20))
    moved = weight.to("cpu")
    assert moved is not weight and torch.equal(moved.codes(), weight.codes()) and moved.levels == weight.levels
    assert weight.nbytes == weight.data.numel() + 5 * 8
