"""The weight of a layer and its parametrization, with their types: `nn.Module` says no more than Tensor or Module."""

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that ``layer`` computes with: float, fake-quantized if a weight quantizer is attached."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def parametrization_of(layer: nn.Module) -> ParametrizationList:
    """The parametrization of the weight of ``layer``, which must have one: its latents and its weight quantizer."""
    parametrization = layer.get_submodule("parametrizations.weight")
    assert isinstance(parametrization, ParametrizationList)
    return parametrization
