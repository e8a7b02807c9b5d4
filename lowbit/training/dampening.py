"""Oscillation dampening: pull every latent weight toward the level that it is rounded to.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv 2203.11086, section 4.2.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.nn import QuantizedLayer
from lowbit.quantizers import WeightQuantizer
from lowbit.quantizers.base import as_float, nearest
from lowbit.training.hooks import quantized_weights

if TYPE_CHECKING:
    from lowbit.training.hooks import State


def dampening_loss(w: Tensor, q: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``Σ (q - clip(w, low, high))²``, no gradient through q or the bounds (the paper's regularizer, without its λ).

    The gradient to ``w`` is ``2·(w - q)`` inside the clip range, including its ends, and zero outside, so that no
    clipped weight is pulled.

    Args:
        w: latent weights, float, any shape.
        q: the quantized weights, of the shape of ``w``.
        low, high: the lowest and the highest value of the grid, broadcastable against ``w``.

    Returns:
        A scalar tensor.
    """
    low, high = (torch.as_tensor(bound, dtype=w.dtype, device=w.device).detach() for bound in (low, high))
    # The mask is explicit because torch 2.14 changed the gradient of clamp at its bounds.
    clipped = torch.where((w >= low) & (w <= high), w, torch.clamp(w.detach(), low, high))
    return (q.detach() - clipped).square().sum()


def cosine(progress: float, start: float, first: float, last: float) -> float:
    """A cosine schedule: ``first`` until ``start``, then half a cosine wave to ``last`` at the end.

    Args:
        progress: share of the training's steps that is done; a larger value counts as 1.
        start: share of the steps before the wave begins, 0 <= start < 1.
        first, last: values before ``start`` and at the end.
    """
    done = min(1.0, max(0.0, progress - start) / (1 - start))
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def check_start(start: float) -> None:
    """Raise LowbitError for a starting point outside [0, 1)."""
    if not 0 <= start < 1:
        raise LowbitError(
            f"start={start!r} is not allowed; use a share of the training, from 0 to below 1, such as 0.25"
        )


def one_latent_layers(model: nn.Module, what: str) -> list[tuple[QuantizedLayer, WeightQuantizer]]:
    """The layers of ``model`` with quantized weights, each with its weight quantizer.

    Args:
        model: a quantized model.
        what: the method that needs them; begins the message.

    Raises:
        LowbitError: ``model`` has no quantized weight, or one with several latents.
    """
    layers = quantized_weights(model)
    if not layers:
        raise LowbitError(f"{what} needs quantized weights, and {type(model).__name__} has none; call quantize_ first")
    for layer, quantizer in layers:
        if len(layer.latents) != 1:
            raise LowbitError(
                f"{what} takes weights with one latent, such as those of LSQ; layer {layer.name!r} "
                f"({quantizer.config!r}) has {len(layer.latents)}"
            )
    return layers


class Dampening:
    """Callback of `lowbit.train` that adds λ times the gradient of `dampening_loss` to that of the weights.

    It acts between backward and the optimizer's step, before gradients are clipped. This equals a term of the loss,
    summed over all layers, except that the reported loss does not contain it. λ goes from 0 at ``start`` to
    ``strength`` at the end by `cosine`. The clip range ends at the outermost levels.

    Args:
        model: a quantized model whose weights have one latent each, rounded to the nearest level: LSQ, EWGS, StatsQ,
            PoT.
        strength: λ at the end of the training.
        start: share of the optimization steps during which λ stays 0.

    Raises:
        LowbitError: the model has other weights, or a setting is out of range.
    """

    def __init__(self, model: nn.Module, strength: float = 0.1, start: float = 0.25):
        if not 0 <= strength < math.inf:
            raise LowbitError(f"strength={strength!r} is not allowed; use a finite number from 0, such as 0.1")
        check_start(start)
        self.strength, self.start = strength, start
        self._layers = one_latent_layers(model, "dampening")
        for layer, quantizer in self._layers:
            _check_nearest(layer, quantizer)

    def weight_of(self, progress: float) -> float:
        """λ when the share ``progress`` of the steps is done."""
        return cosine(progress, self.start, 0.0, self.strength)

    @torch.no_grad()
    def add_gradients(self, strength: float) -> None:
        """Add ``strength`` times the gradient of `dampening_loss` to the latents' ``.grad``."""
        for layer, quantizer in self._layers:
            (latent,) = layer.latents
            if not latent.requires_grad:
                continue
            q, low, high = _on_grid(quantizer, latent)
            # Beyond the outermost level q is that level and so is the clipped latent: the difference is zero there.
            pull = (torch.clamp(latent, low.to(latent.dtype), high.to(latent.dtype)) - q).mul_(2 * strength)
            latent.grad = pull if latent.grad is None else latent.grad.add_(pull)

    def on_gradients(self, state: "State") -> None:
        """Callback of `lowbit.train`: add the gradients with the λ of this step."""
        strength = self.weight_of(state.step / (state.config.epochs * state.steps_per_epoch))
        if strength > 0:
            self.add_gradients(strength)


def _on_grid(quantizer: WeightQuantizer, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The quantized weight, and the lowest and the highest value of its grid (broadcastable against it)."""
    scale, levels = quantizer.scale(latent), quantizer.levels
    return quantizer(latent), scale * float(levels[0]), scale * float(levels[-1])


@torch.no_grad()
def _check_nearest(layer: QuantizedLayer, quantizer: WeightQuantizer) -> None:
    """Refuse a method that does not round the latent to the nearest level: there is nothing to pull it toward."""
    (latent,) = layer.latents
    w, (q, _, _) = as_float(latent), _on_grid(quantizer, latent)
    scale, levels = quantizer.scale(latent), quantizer.levels.to(w.device)
    best = scale * levels[nearest(w / scale, levels).long()]
    if ((w - q).abs() > (w - best).abs() + 1e-4 * scale).any():
        raise LowbitError(
            "dampening takes weights that are rounded to the nearest level, such as those of LSQ, EWGS, StatsQ and "
            f"PoT; those of layer {layer.name!r} ({quantizer.config!r}) are not"
        )
