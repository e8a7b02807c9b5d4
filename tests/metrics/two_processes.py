"""Run by torchrun from test_freezing.py: train in two processes with a tracker on each, and write what each found.

torchrun --nproc-per-node=2 two_processes.py OUT
"""

import copy
import os
import sys
from pathlib import Path

import torch
from metrics_helpers import make_config, make_data, make_model

import lowbit
from lowbit.metrics import FreezingTracker
from lowbit.quantizers import StatsQ


class Keep:
    """Copies of the weights after every step."""

    def __init__(self, model):
        self.weights = [copy.deepcopy(model.state_dict())]

    def on_step(self, state):
        self.weights.append(copy.deepcopy(state.model.state_dict()))


def main(out):
    rank = int(os.environ["RANK"])
    model = make_model(StatsQ(bits=2))
    tracker, keep = FreezingTracker(model, momentum=0.1), Keep(model)
    lowbit.train(model, make_data(), make_config(), callbacks=[tracker, keep], device="cpu")
    tracker.summary(since="start").to_json(out / f"{rank}.json", double_precision=15)
    if rank == 0:
        torch.save(keep.weights, out / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
