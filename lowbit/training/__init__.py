"""Training: one loop for every experiment, described by one frozen :class:`TrainConfig`."""

from lowbit.training.config import TrainConfig
from lowbit.training.evaluation import evaluate, reestimate_batchnorm_
from lowbit.training.loop import State, train
from lowbit.training.record import RunRecord
from lowbit.training.runfile import RunConfig

__all__ = ["RunConfig", "RunRecord", "State", "TrainConfig", "evaluate", "reestimate_batchnorm_", "train"]
