"""Confidence-guided annealing for shift networks: a question of notebooks 14 and 18, not a published method.

The rule is that of Liu, Liu and Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv 2302.02210. It needs a grid; DenseShift's several latents a weight have none, so each is a one-bit quantizer here.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import lowbit.functional as F
from lowbit.nn import QuantizedLayer
from lowbit.training.annealing import RATE


class AnnealLatents:
    """Callback of `lowbit.train`: latents farther than ``boundary · 2·mean|t|`` from zero are held still.

    Args:
        layers: the quantized layers to anneal, from `lowbit.nn.quantized_layers`.
        boundary: BR, 0 to 0.5; 0 holds all latents.
    """

    def __init__(self, layers: Iterable[QuantizedLayer], boundary: float):
        self.latents = [latent for layer in layers for latent in layer.latents]
        self.boundary = boundary

    def masks(self) -> list[Tensor]:
        """Masks of the latents that may move now, bool, each of its latent's shape."""
        return [F.cga_mask(latent, 1, self.boundary) for latent in self.latents]

    def movable(self) -> float:
        """The share of the latents that may move now."""
        return torch.cat([may.flatten() for may in self.masks()]).double().mean().item()

    def largest_rate(self) -> float:
        """CGA's rule for the learning rate, as `ConfidenceGuidedAnnealing.largest_rate` has it for StatsQ."""
        scales = [F.statsq_scale(latent).flatten() for latent in self.latents]
        return RATE * self.boundary * torch.cat(scales).median().item()

    def on_gradients(self, state: Any) -> None:
        """Zero the gradients of the held latents, and keep their values."""
        self._held = [(t, may, t.detach().clone()) for t, may in zip(self.latents, self.masks(), strict=True)]
        for latent, may, _ in self._held:
            if latent.grad is not None:
                latent.grad.mul_(may)

    @torch.no_grad()
    def on_step(self, state: Any) -> None:
        """Restore the held latents, which momentum and weight decay have moved."""
        for latent, may, before in self._held:
            torch.where(may, latent, before, out=latent)
