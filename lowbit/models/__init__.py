"""Small reference models, detectors on them, and any model of timm or torchvision, by name."""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "detection": ["detector"],
        "transfer": ["replace_head_"],
        "zoo": ["checkpoints", "create", "names"],
    },
)

if TYPE_CHECKING:
    # The aliases mark the names as public: type checkers ignore plain imports of a package.
    from lowbit.models.detection import detector as detector
    from lowbit.models.transfer import replace_head_ as replace_head_
    from lowbit.models.zoo import checkpoints as checkpoints
    from lowbit.models.zoo import create as create
    from lowbit.models.zoo import names as names
