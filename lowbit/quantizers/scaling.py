"""Helpers of the shift methods: the size of rows, scales that preserve it, and the nearest weight on a grid."""

import math
from typing import Literal

import torch
from torch import Tensor

from lowbit.quantizers.base import as_float, nearest, per_row


def kaiming_std(weight: Tensor) -> float:
    """Standard deviation sqrt(2/(k²·C_out)) of S3's initialization, for a weight ``[C_out, C_in, ...]``."""
    rows, _, *kernel = weight.shape
    return math.sqrt(2 / (rows * math.prod(kernel)))


def rms(w: Tensor) -> Tensor:
    """Root mean square of each row, ``[rows, 1, ...]``, never zero."""
    size = as_float(w.detach()).square().mean(dim=per_row(w), keepdim=True).sqrt()
    return size.clamp_min(torch.finfo(size.dtype).tiny)


def _search(w: Tensor, levels: Tensor) -> Tensor:
    """Codes of the nearest levels at the best per-row scale of a small search; weights on the grid keep their codes."""
    smallest = w.abs().amin(dim=per_row(w), keepdim=True)
    size = rms(w)
    candidates = [torch.ones_like(size), smallest.clamp_min(torch.finfo(w.dtype).tiny)]
    candidates += [size * 2.0 ** (-k / 4) for k in range(-4, 24)]
    best_codes, best_error = _rounded(w, levels, candidates[0])
    for scale in candidates[1:]:
        codes, error = _rounded(w, levels, scale)
        better = error < best_error
        best_codes, best_error = torch.where(better, codes, best_codes), torch.where(better, error, best_error)
    return best_codes


def _rounded(w: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the levels nearest to ``w / scale``, and each row's squared error, ``[rows, 1, ...]``."""
    codes = nearest(w / scale, levels)
    return codes, (levels[codes.long()] * scale - w).square().sum(dim=per_row(w), keepdim=True)


def row_scale(weight: Tensor, target: Tensor, kind: Literal["statistical", "pow2"]) -> Tensor:
    """The scale that brings each row of ``weight`` to the root mean square ``target``: ``[rows, 1, ...]``, detached.

    It is finite: a row of zeros gets ``target``. ``kind`` "pow2" rounds it to a power of two, "statistical" does not.
    """
    now = rms(weight)
    scale = target / torch.where(now > torch.finfo(now.dtype).tiny, now, 1.0)
    return scale if kind == "statistical" else torch.exp2(torch.round(torch.log2(scale)))


def nearest_codes(weight: Tensor, levels: Tensor, raw: bool) -> Tensor:
    """Codes of the ``levels`` nearest to each row of ``weight``, after a search for the best scale of the row.

    A row that is a multiple of levels keeps its ratios exactly; with ``raw``, a row of levels keeps its codes.
    """
    weight = as_float(weight)
    if not raw:
        size = weight.abs()
        smallest = torch.where(size > 0, size, math.inf).amin(dim=per_row(weight), keepdim=True)
        # The floor keeps squares of the quotient finite; no row on a grid of up to 6 bits is below it.
        weight = weight / torch.where(smallest < math.inf, smallest, 1.0).maximum(rms(weight) * 2.0**-32)
    return _search(weight, levels)
