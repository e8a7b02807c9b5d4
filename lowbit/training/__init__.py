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
        "elsewhere": ["Hooks", "lightning_callback", "transformers_callback"],
        "evaluation": ["evaluate", "reestimate_batchnorm_"],
        "iterative_freezing": ["IterativeFreezing"],
        "hooks": ["State"],
        "log": ["Log", "tensorboard"],
        "loop": ["train"],
        "moments": ["Moments"],
        "run_card": ["RunRecord"],
        "runfile": ["RunConfig"],
    },
)

if TYPE_CHECKING:  # importing a name as itself exports it to type checkers
    from lowbit.training.annealing import ConfidenceGuidedAnnealing as ConfidenceGuidedAnnealing
    from lowbit.training.config import TrainConfig as TrainConfig
    from lowbit.training.dampening import Dampening as Dampening
    from lowbit.training.detection import evaluate_detector as evaluate_detector
    from lowbit.training.elsewhere import Hooks as Hooks
    from lowbit.training.elsewhere import lightning_callback as lightning_callback
    from lowbit.training.elsewhere import transformers_callback as transformers_callback
    from lowbit.training.evaluation import evaluate as evaluate
    from lowbit.training.evaluation import reestimate_batchnorm_ as reestimate_batchnorm_
    from lowbit.training.hooks import State as State
    from lowbit.training.iterative_freezing import IterativeFreezing as IterativeFreezing
    from lowbit.training.log import Log as Log
    from lowbit.training.log import tensorboard as tensorboard
    from lowbit.training.loop import train as train
    from lowbit.training.moments import Moments as Moments
    from lowbit.training.run_card import RunRecord as RunRecord
    from lowbit.training.runfile import RunConfig as RunConfig
