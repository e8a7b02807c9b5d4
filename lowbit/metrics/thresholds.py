"""The position of weights relative to the thresholds between their levels, which limits how many of them can move.

These measures are ours. They take weight quantizers with one latent and evenly spaced levels, such as LSQ and StatsQ.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.metrics.tracking import TrackedLayer, tracked_layers

WIDTH = 0.05
"""Half width of the zone around a threshold that `boundary_density` counts, in distances between thresholds."""


def spacings(model: nn.Module, bits: int | None = None) -> Tensor:
    """The distance between neighboring thresholds of each output channel, float32 [channels], over all layers.

    Args:
        model: a quantized model.
        bits: only layers whose weights have this many bits; None takes all.

    Raises:
        LowbitError: no such layer.
    """
    spacing = [
        _spacing(layer).expand(layer.shape[0], *[1] * (len(layer.shape) - 1)).flatten() for layer in _even(model, bits)
    ]
    return torch.cat(spacing)


def reach(rates: float, model: nn.Module, bits: int | None = None) -> float:
    """The number of thresholds that a weight can cross under an optimizer like Adam: sum of rates over median spacing.

    A step of Adam moves a weight by at most about the learning rate. Below 1, most weights cannot leave the rounding
    cell that they start in, so a comparison of methods compares their starting points.

    Args:
        rates: sum of the learning rates of all steps.
        model: the quantized model.
        bits: only layers whose weights have this many bits; None takes all.

    Raises:
        LowbitError: no such layer.
    """
    return rates / float(spacings(model, bits).median())


@torch.no_grad()
def boundary_density(model: nn.Module, bits: int | None = None, width: float = WIDTH) -> float:
    """The share of weights within ``width`` spacings of a threshold, 0 to 1.

    Weights spread evenly over their cells give 2·width (less for those beyond the outermost thresholds).

    Args:
        model: a quantized model; for a query-key product, the elements of the product are counted.
        bits: only layers whose weights have this many bits; None takes all.
        width: half width of the zone, in distances between thresholds, above 0 and below 0.5.

    Raises:
        LowbitError: no such layer, or a width out of range.
    """
    if not 0 < width < 0.5:
        raise LowbitError(f"width={width!r} is not allowed; shares of the spacing between 0 and 0.5 are, e.g. {WIDTH}")
    near = total = 0
    for layer in _even(model, bits):
        cells = layer.latents[0].detach().float() / _spacing(layer)
        # Thresholds lie half-way between levels, which are `first`, `first + 1`, ... times the spacing.
        scaled = layer.levels / (layer.levels[1] - layer.levels[0])
        first, last = float(scaled[0]) + 0.5, float(scaled[-1]) - 0.5
        threshold = ((cells - first).round() + first).clamp(first, last)
        near += int(((cells - threshold).abs() <= width).sum())
        total += cells.numel()
    return near / total


def _even(model: nn.Module, bits: int | None) -> Iterator[TrackedLayer]:
    """The layers with one latent and evenly spaced levels."""
    any_layer = False
    for layer in tracked_layers(model, None):
        gaps = layer.levels.diff()
        wanted = bits is None or getattr(layer.quantizer.config, "bits", None) == bits
        if wanted and len(layer.latents) == 1 and torch.allclose(gaps, gaps[:1].expand_as(gaps)):
            any_layer = True
            yield layer
    if not any_layer:
        width = "" if bits is None else f" of {bits} bits"
        raise LowbitError(
            f"{type(model).__name__} has no weight quantizer{width} with one latent and evenly spaced levels; quantize "
            "its weights by LSQ or StatsQ, for example"
        )


def _spacing(layer: TrackedLayer) -> Tensor:
    """The distance between thresholds in units of the latent, broadcastable to the weight."""
    scale = layer.quantizer.scale(*layer.found.latents).detach().float()
    return scale * float(layer.levels[1] - layer.levels[0])
