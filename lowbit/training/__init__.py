"""Training: one loop for every experiment, described by one frozen `TrainConfig`.

The names below are loaded on first use, so that the command line starts quickly.
"""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "annealing": ["ConfidenceGuidedAnnealing"],
        "config": ["TrainConfig"],
        "dampening": ["Dampening"],
        "detection": ["evaluate_detector"],
        "evaluation": ["evaluate", "reestimate_batchnorm_"],
        "iterative_freezing": ["IterativeFreezing"],
        "loop": ["State", "train"],
        "moments": ["Moments"],
        "run_card": ["RunRecord"],
        "runfile": ["RunConfig"],
    },
)

if TYPE_CHECKING:
    from lowbit.training.annealing import ConfidenceGuidedAnnealing
    from lowbit.training.config import TrainConfig
    from lowbit.training.dampening import Dampening
    from lowbit.training.detection import evaluate_detector
    from lowbit.training.evaluation import evaluate, reestimate_batchnorm_
    from lowbit.training.iterative_freezing import IterativeFreezing
    from lowbit.training.loop import State, train
    from lowbit.training.moments import Moments
    from lowbit.training.run_card import RunRecord
    from lowbit.training.runfile import RunConfig
