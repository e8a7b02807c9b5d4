"""What quantization methods ask of the loop: a penalty on their latents, and a word before each step."""

from torch import Tensor, nn

from lowbit.nn import quantized_layers
from lowbit.quantizers import WeightQuantizer


class QuantizerHooks:
    """The weight quantizers of ``model`` that override `WeightQuantizer.penalty` or `WeightQuantizer.before_step_`."""

    def __init__(self, model: nn.Module):
        found = [layer for layer in quantized_layers(model) if layer.weight is not None]
        self._penalized = [layer for layer in found if _overrides(layer.weight, "penalty")]
        self._scheduled = [layer for layer in found if _overrides(layer.weight, "before_step_")]

    def before_step(self, progress: float) -> None:
        """Tells each quantizer how much of the training is done (0 at the first step, below 1 at the last)."""
        for layer in self._scheduled:
            layer.weight.before_step_(progress, *layer.latents)

    def add_penalty(self, loss: Tensor) -> Tensor:
        """``loss`` plus the penalties of all layers."""
        for layer in self._penalized:
            loss = loss + layer.weight.penalty(*layer.latents)
        return loss


def _overrides(quantizer: WeightQuantizer, name: str) -> bool:
    return getattr(type(quantizer), name) is not getattr(WeightQuantizer, name)
