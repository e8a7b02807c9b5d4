"""Winograd's form with tiles of 4x4 outputs, which plans use for 8-bit activations, gives exact sums."""

import subprocess

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import TABLES

from lowbit import Plan
from lowbit.engine.format import MAP, Op, Tensor, write
from lowbit.kernels.packing import pack

SMALL = ["denseshift2", "denseshift3", "statsq3", "statsq4", "s3_3", "ternary", "lsq4"]


def convolution(codes, levels, bits, size, low, padding=(1, 1)):
    """The content of a plan with one 3x3 convolution; its input are the integers low ... low + 255."""
    n, channels = codes.shape[:2]
    padded = np.zeros(16, np.int16)
    padded[: len(levels)] = levels
    data = {
        0: pack(codes.permute(0, 2, 3, 1).reshape(n, -1), bits).numpy(),
        1: np.ones(n, np.float32),
        2: padded[codes.numpy()].astype(np.int64).sum((1, 2, 3)).astype(np.int32),
        4: padded,
    }
    height, width = (size[i] + 2 * padding[i] - 2 for i in (0, 1))
    image = Tensor(*size, channels, MAP, padding, place=channels, low=low, high=low + 255)
    x, y = Tensor(*size, channels), Tensor(height, width, n)
    window = {2: bits, 3: 3, 4: 3, 5: 1, 6: 1, 7: padding[0], 8: padding[1], 9: 1, 10: 1}
    product = Op("product", [image], y, n=window, f={0: 1.0})
    product.data = data
    return write([Op("quantize", [x], None, image, n={0: 0, 1: channels}, f={0: 1.0}), product], x, y)


def assert_exact(library, codes, levels, bits, x, low, padding=(1, 1)):
    """All instruction sets give the sums, on one thread and on three."""
    content = convolution(codes, levels.numpy(), bits, x.shape[2:], low, padding)
    y = torch.nn.functional.conv2d(x.double(), levels.double()[codes], padding=padding)
    expected = y.permute(0, 2, 3, 1).reshape(len(x), -1).float().numpy()
    rows = x.permute(0, 2, 3, 1).reshape(len(x), -1).contiguous().float().numpy()
    for isa in library.isas():
        with library.use(isa):
            for threads in (1, 3):
                plan = Plan(content, threads)
                np.testing.assert_array_equal(plan(rows[:1]), expected[:1], err_msg=isa)
                np.testing.assert_array_equal(plan(rows), expected, err_msg=isa)


def integer_table(name):
    """Bits and levels, scaled to integers."""
    bits, levels = TABLES[name]
    return max(2, bits), (levels / levels.abs()[levels != 0].min()).round()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([16, 32, 48, 64, 96]), n=st.integers(1, 50), size=st.tuples(*[st.integers(8, 21)] * 2),
    padding=st.tuples(*[st.integers(0, 2)] * 2), table=st.sampled_from(SMALL), low=st.sampled_from([0, -128]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_any_convolution(library, channels, n, size, padding, table, low, seed):
    generator = torch.Generator().manual_seed(seed)
    bits, levels = integer_table(table)
    codes = torch.randint(0, len(levels), (n, channels, 3, 3), generator=generator)
    x = torch.randint(low, low + 256, (2, channels, *size), generator=generator)
    assert_exact(library, codes, levels, bits, x, low, padding)


SIGNS = {  # of the nine taps
    "all alike": [[1, 1, 1]] * 3,
    "lines": [[1, 1, 1], [-1, -1, -1], [1, 1, 1]],
    "columns": [[1, -1, 1]] * 3,
    "checkers": [[1, -1, 1], [-1, 1, -1], [1, -1, 1]],
}
PLACES = {  # activations of a 13x14 image, as patterns of 0 and 1
    "all": torch.ones(13, 14),
    "lines": (torch.arange(13) % 2)[:, None].expand(13, 14),
    "columns": (torch.arange(14) % 2)[None, :].expand(13, 14),
    "checkers": (torch.arange(13)[:, None] + torch.arange(14)) % 2,
    "squares": (torch.arange(13)[:, None] // 2 + torch.arange(14) // 2) % 2,
}


@pytest.mark.parametrize("low", [0, -128])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("signs", SIGNS)
def test_extremes(library, signs, places, low):
    """Levels of +-8 at the most channels that fit, and at 224, where 576 times the sums would leave int32."""
    bits, levels = integer_table("denseshift3")
    assert levels.abs().max() == 8
    for channels in (192, 224):
        codes = torch.where(torch.tensor(SIGNS[signs]) > 0, len(levels) - 1, 0).expand(17, channels, 3, 3)
        x = (low + 255 * PLACES[places]).expand(1, channels, 13, 14)
        assert_exact(library, codes, levels, bits, x, low)


@pytest.mark.parametrize("largest", [50, 51, 57, 127])
@pytest.mark.parametrize("channels", [16, 32])
def test_large_levels(library, channels, largest):
    """With 32 channels 50 is the largest level whose sums fit; beyond 56 transformed weights would leave int16."""
    levels = torch.tensor([-largest, -1, 1, largest])
    codes = torch.randint(0, 2, (20, channels, 3, 3), generator=torch.Generator().manual_seed(0)) * 3
    codes[0], codes[1] = 3, 0
    x = 255 * torch.randint(0, 2, (1, channels, 13, 14), generator=torch.Generator().manual_seed(1))
    for image in (torch.full_like(x, 255), x):
        assert_exact(library, codes, levels, 2, image, 0)


@pytest.mark.parametrize("size", [(13, 13), (14, 14), (15, 15), (16, 13)])
def test_cut_tiles_read_nothing_behind_the_map(size, fuzz_program, tmp_path):
    """The map is all that the arena holds. Without the limits of lines and places, the last tile would read up to three
    places of 128 bytes more, behind the 192 bytes of padding, which the address sanitizer reports."""
    bits, levels = integer_table("denseshift3")
    codes = torch.randint(0, len(levels), (8, 128, 3, 3), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "cut.lbp"
    path.write_bytes(convolution(codes, levels.numpy(), bits, size, 0))
    done = subprocess.run([fuzz_program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "1 files\n"
