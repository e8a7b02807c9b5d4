"""Confidence-guided annealing: only weights near a decision boundary keep learning.

Liu, Liu and Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023, arXiv 2302.02210.
`lowbit.functional.cga_mask` is the mask; this is the phase of training that applies it.
"""

import fnmatch
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.nn.query_key import QueryKeyProduct
from lowbit.quantizers.statsq import StatsQ, cga_mask, check_boundary, statsq_scale
from lowbit.training.config import TrainConfig
from lowbit.training.hooks import quantized_weights

if TYPE_CHECKING:
    from lowbit.training.hooks import State

RATE = 0.1
"""Largest step allowed, in half widths of the zone in which a weight may move."""


class ConfidenceGuidedAnnealing:
    """Callback of `lowbit.train` that holds confident weights still; ``TrainConfig.cga_epochs`` adds one.

    Each step computes the mask from the weights before that step. The gradients of frozen weights become zero, and
    their latents are restored after the optimizer's step, since momentum and weight decay would move them.

    Args:
        model: a model with StatsQ weights; layers with other weights are not annealed.
        boundary: BR, the half width of the zone in which a weight may move, in steps; 0.005 in the paper.
        layers: names or patterns of the layers to anneal; None takes all with StatsQ weights.
        query_key: how to treat a query-key product (QKR). "effective" masks the gradient of its elements;
            "as_published" does not: in the code released with OFQ, the product's mask acts on a detached tensor and
            has no effect.
        from_step: first optimization step to anneal, counted from 0 over all epochs.
        rate_rule: refuse a learning rate at which one step of an Adam-like optimizer carries a weight out of the zone.
            The rate may be at most `RATE` times ``boundary`` times the distance between two thresholds (for the
            published 1e-5 the factor is about 0.07). False turns the check off.

    Raises:
        LowbitError: there is no StatsQ weight, a pattern matches no layer, or the boundary is out of range.
            `check_rate` and the first annealed step also refuse a learning rate that is too large.
    """

    def __init__(
        self,
        model: nn.Module,
        boundary: float = 0.005,
        layers: Sequence[str] | None = None,
        query_key: Literal["effective", "as_published"] = "effective",
        from_step: int = 0,
        rate_rule: bool = True,
    ):
        check_boundary(boundary)
        if query_key not in ("effective", "as_published"):
            raise LowbitError(f"query_key={query_key!r} is not allowed; use 'effective' or 'as_published'")
        candidates = [
            (layer, quantizer, quantizer.config.bits)
            for layer, quantizer in quantized_weights(model)
            if isinstance(quantizer.config, StatsQ)
        ]
        names = [layer.name for layer, _, _ in candidates]
        for pattern in layers or ():
            if not fnmatch.filter(names, pattern):
                raise LowbitError(
                    f"layers: {pattern!r} matches none of the layers with StatsQ weights: {', '.join(names) or 'none'}"
                )
        chosen = [
            (layer, quantizer, bits)
            for layer, quantizer, bits in candidates
            if layers is None or any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in layers)
        ]
        if not chosen:
            raise LowbitError(
                f"confidence-guided annealing needs StatsQ weights, and {type(model).__name__} has none; quantize it "
                "with QuantConfig(weight=StatsQ(bits=2))"
            )
        self.boundary, self.query_key, self.from_step, self.rate_rule = boundary, query_key, from_step, rate_rule
        self._products = [quantizer for _, quantizer, _ in chosen if isinstance(quantizer, QueryKeyProduct)]
        self._layers = [(layer, bits) for layer, weight, bits in chosen if not isinstance(weight, QueryKeyProduct)]
        self._frozen: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def largest_rate(self) -> float:
        """The largest learning rate that the rule allows for the current weights: ``RATE · boundary · spacing``.

        Under Adam a step moves a weight by about the learning rate, and the zone reaches ``boundary · spacing`` to both
        sides of a threshold. ``spacing``, the distance between two thresholds, is the median over all output channels.
        """
        rows = [statsq_scale(layer.latents[0]).flatten() / 2 ** (bits - 1) for layer, bits in self._layers]
        return RATE * self.boundary * float(torch.cat(rows).median()) if rows else math.inf

    def check_rate(self, lr: float) -> None:
        """Raise LowbitError for a learning rate above `largest_rate`, unless ``rate_rule`` is off."""
        allowed = self.largest_rate()
        if self.rate_rule and lr > allowed:
            raise LowbitError(
                f"a learning rate of {lr:.3g} is too large for confidence-guided annealing with boundary="
                f"{self.boundary:g}: one step would carry a weight through its zone. At most {RATE:g} * boundary * "
                f"distance between thresholds = {allowed:.2g} is allowed (1e-5 in the paper); lower the rate (cga_lr)"
            )

    @torch.no_grad()
    def freeze(self) -> None:
        """Zero the gradients of confident weights; call it between backward and the optimizer's step."""
        self._frozen = []
        for layer, bits in self._layers:
            (latent,) = layer.latents
            movable = cga_mask(latent, bits, self.boundary)
            if latent.grad is not None:
                latent.grad.mul_(movable)
            self._frozen.append((movable, latent.clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the confident weights; call it after the optimizer's step."""
        for (layer, _), (movable, before) in zip(self._layers, self._frozen, strict=True):
            (latent,) = layer.latents
            torch.where(movable, latent, before, out=latent)

    def movable(self) -> float:
        """The share of the weights that may move now; query-key products do not count."""
        masks = [cga_mask(layer.latents[0], bits, self.boundary) for layer, bits in self._layers]
        return sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))

    def before_forward(self, state: "State") -> None:
        """Callback of `lowbit.train`: mask the query-key products, whose masks act in their forward pass."""
        on = state.step >= self.from_step and self.query_key == "effective"
        for product in self._products:
            product.boundary = self.boundary if on else None

    def on_gradients(self, state: "State") -> None:
        """Callback of `lowbit.train`: freeze the confident weights, after a check of the rate at the first step."""
        if state.step >= self.from_step:
            if self.rate_rule and state.step == self.from_step and adam_like(state.optimizer):
                self.check_rate(state.lr)
            self.freeze()

    def on_step(self, state: "State") -> None:
        """Callback of `lowbit.train`: restore the confident weights."""
        if state.step >= self.from_step:
            self.restore()

    def on_epoch(self, state: "State") -> None:
        """Callback of `lowbit.train`: unmask the query-key products, so that later gradients are whole."""
        for product in self._products:
            product.boundary = None


def adam_like(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step moves a weight by about the learning rate, regardless of the size of its gradient."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.RAdam)  # AdamW is an Adam


def annealing_phase(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> list[ConfidenceGuidedAnnealing]:
    """The callback that anneals ``model`` after ``config.epochs``; an empty list if ``config`` asks for no annealing.

    It belongs before all other callbacks, so that trackers see the restored weights.

    Raises:
        LowbitError: ``model`` does not fit the ``cga_*`` settings, or ``cga_lr`` is too large. The rate is checked
            here, before the first epoch, for the weights as they are now, and again when the phase begins.
    """
    if not config.cga_epochs:
        return []
    settings = (config.cga_boundary, config.cga_layers, config.cga_query_key)
    annealing = ConfidenceGuidedAnnealing(model, *settings, from_step=config.epochs * steps_per_epoch)
    if adam_like(optimizer):
        annealing.check_rate(config.cga_lr)
    return [annealing]
