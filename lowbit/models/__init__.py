"""Small reference models, and any model of timm or torchvision, by name."""

from lowbit.models.transfer import replace_head_
from lowbit.models.zoo import checkpoints, create, names

__all__ = ["checkpoints", "create", "names", "replace_head_"]
