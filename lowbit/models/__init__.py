"""Small reference models, and any model of timm or torchvision, by name."""

from lowbit.models.zoo import checkpoints, create, names

__all__ = ["checkpoints", "create", "names"]
