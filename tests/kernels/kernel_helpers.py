"""Tables of levels, random problems and a switch that the kernels' tests share."""

import torch

from lowbit.functional import denseshift_levels, s3_levels
from lowbit.kernels import native, ops, pack_weight


def statsq_levels(bits):
    n = 2 ** (bits - 1)
    return (torch.arange(-n, n, dtype=torch.float32) + 0.5) / n


TABLES = {
    **{f"denseshift{b}": (b, denseshift_levels(b)) for b in (2, 3, 4)},
    **{f"statsq{b}": (b, statsq_levels(b)) for b in (1, 2, 3, 4)},
    **{f"s3_{b}": (b, s3_levels(b)) for b in (2, 3, 4)},
    "ternary": (2, torch.tensor([-1.0, 0.0, 1.0])),
    "lsq4": (4, torch.arange(-8.0, 8.0)),
    "lsq8": (8, torch.arange(-128.0, 128.0)),
    "some of 8 bits": (8, torch.arange(-65.0, 12.0)),
    "top2": (2, torch.tensor([-127.0, 1.0, 127.0, 128.0])),  # beyond int8 at 2 and 3 bits too
    "top4": (4, torch.tensor([-128.0, -70.0, -33.0, -32.0, -17.0, -2.0, -1.0, 0, 1, 2, 16, 31, 33, 64, 65, 128])),
    "top3": (3, torch.tensor([-128.0, -65.0, -64.0, 0.0, 1.0, 64.0, 65.0, 128.0])),
}


def random_weight(table, shape, seed=0, **kwargs):
    """A packed weight of ``shape`` with random codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    bits, levels = TABLES[table]
    codes = torch.randint(0, len(levels), shape, generator=generator)
    scale = torch.rand(shape[0], generator=generator) - 0.3
    return pack_weight(codes, levels, scale, bits=max(2, bits), **kwargs)


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# What can be asked of a product: keyword arguments of the kernels, given the number of rows (or images).
MODES = {
    "dynamic": lambda rows: {},
    "calibrated": lambda rows: {"x_scale": torch.tensor(0.02)},
    "a scale for each row": lambda rows: {"x_scale": 0.01 + 0.01 * torch.arange(float(rows))},
    "unsigned 8 bits": lambda rows: {"x_scale": torch.tensor(0.01), "low": 0, "high": 255, "relu": True},
    "unsigned 2 bits": lambda rows: {"x_scale": torch.tensor(0.4), "low": 0, "high": 3},
    "signed 3 bits to int8": lambda rows: {"x_scale": torch.tensor(0.4), "low": -4, "high": 3, "out_scale": 0.3},
    "to uint8": lambda rows: {
        "x_scale": torch.tensor(0.02),
        "low": -128,
        "out_scale": 0.1,
        "out_low": 0,
        "out_high": 255,
    },
}


def forget() -> None:
    """Makes `native` and the ops look again."""
    native._load.cache_clear()
    ops.use_native.cache_clear()
