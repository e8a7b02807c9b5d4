"""A plan as a torch module, and the operator ``lowbit::run_plan``, which torch.compile and torch.export support."""

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.engine.runtime import Plan

_plans = WeakTensorKeyDictionary()


class PlanModule(nn.Module):
    """A `Plan` as a module. Its file is a buffer, so it is saved and exported with the model around it.

    Args:
        plan: the plan to run.
    """

    content: Tensor

    def __init__(self, plan: Plan):
        super().__init__()
        self.register_buffer("content", torch.frombuffer(bytearray(plan.content), dtype=torch.uint8))
        self.outputs = plan.outputs

    def forward(self, x: Tensor) -> Tensor:
        """Float32 ``[B, outputs]`` of float32 ``[B, ...]``."""
        return torch.ops.lowbit.run_plan(self.content, x, self.outputs)


@torch.library.custom_op("lowbit::run_plan", mutates_args=(), device_types="cpu")
def run_plan(content: Tensor, x: Tensor, outputs: int) -> Tensor:
    """Run a plan. It is loaded once per tensor with its content.

    Args:
        content: the content of the plan's file, uint8.
        x: float32 ``[B, ...]``.
        outputs: the plan's number of outputs.
    """
    plan = _plans.get(content)
    if plan is None:
        plan = _plans[content] = Plan(content.numpy().tobytes())
    plan.threads = torch.get_num_threads()
    return plan(x)


@run_plan.register_fake
def _(content: Tensor, x: Tensor, outputs: int) -> Tensor:
    return x.new_empty((x.shape[0], outputs))
