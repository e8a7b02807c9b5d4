"""Hooks of quantization methods in the loop: a penalty on their latents, and a call before each step."""

from torch import Tensor, nn

from lowbit.nn import QuantizedLayer, quantized_layers
from lowbit.quantizers import WeightQuantizer


class QuantizerHooks:
    """The weight quantizers of ``model`` that override `WeightQuantizer.penalty` or `WeightQuantizer.before_step_`."""

    def __init__(self, model: nn.Module):
        pairs = quantized_weights(model)
        self._penalized = [(layer, quantizer) for layer, quantizer in pairs if _overrides(quantizer, "penalty")]
        self._scheduled = [(layer, quantizer) for layer, quantizer in pairs if _overrides(quantizer, "before_step_")]

    def before_step(self, progress: float) -> None:
        """Tell each quantizer which share of the training is done (0 at the first step, below 1 at the last)."""
        for layer, quantizer in self._scheduled:
            quantizer.before_step_(progress, *layer.latents)

    def add_penalty(self, loss: Tensor) -> Tensor:
        """``loss`` plus the penalties of all layers."""
        for layer, quantizer in self._penalized:
            loss = loss + quantizer.penalty(*layer.latents)
        return loss


def quantized_weights(model: nn.Module) -> list[tuple[QuantizedLayer, WeightQuantizer]]:
    """Each layer of ``model`` with a quantized weight, and the quantizer of that weight."""
    return [(layer, layer.weight) for layer in quantized_layers(model) if layer.weight is not None]


def _overrides(quantizer: WeightQuantizer, name: str) -> bool:
    return getattr(type(quantizer), name) is not getattr(WeightQuantizer, name)
