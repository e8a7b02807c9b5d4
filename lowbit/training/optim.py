"""The optimizer, its parameter groups, and the learning rate of a step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lowbit.training.config import TrainConfig


def param_groups(model: nn.Module, weight_decay: float, decay: str) -> list[dict[str, Any]]:
    """The parameters with and without weight decay; empty groups and frozen parameters are left out.

    With ``decay="weights"`` these are not decayed: parameters with fewer than two dimensions, a quantizer's steps
    and scales whatever their shape, and the names that the model itself lists in ``no_weight_decay()`` (timm:
    position embeddings and class tokens).
    """
    from lowbit.quantizers import ActivationQuantizer, WeightQuantizer

    no_weight_decay: Callable[[], Iterable[str]] = getattr(model, "no_weight_decay", tuple)
    listed = set(no_weight_decay())
    # A quantizer's own parameters are its steps; the latents of a weight belong to the layer's parametrization.
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]
    steps = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or name in listed or id(parameter) in steps
        (kept if decay == "weights" and plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names over :func:`param_groups`; AdamW and SGD in their fused form."""
    groups = param_groups(model, config.weight_decay, config.decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.optimizer == "radam":
        return torch.optim.RAdam(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The rate of optimization step ``step`` (from 0).

    Warm-up: ``lr·(step+1)/w`` over the first w steps. Then ``lr`` (constant), or
    ``min_lr + (lr-min_lr)·(1+cos πt)/2`` with t from 0 to (almost) 1 over the remaining steps (cosine). After
    ``config.epochs``: ``cga_lr``.
    """
    if step >= config.epochs * steps_per_epoch:
        return config.cga_lr
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate
