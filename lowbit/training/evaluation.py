"""Evaluate a model, or estimate its BatchNorm statistics again, outside a training run."""

import torch
from torch import nn

from lowbit.data import Data
from lowbit.training import loop
from lowbit.training.batches import Batches
from lowbit.training.config import TrainConfig
from lowbit.training.distributed import processes


def evaluate(
    model: nn.Module, data: Data, batch_size: int = 256, device: str | torch.device | None = None
) -> dict[str, float]:
    """Top-1 accuracy (``"acc"``, 0 to 1) and mean cross-entropy (``"loss"``, nats) on ``data.test``.

    Activation quantizers that have seen no batch yet are calibrated first, on ``batch_size`` training images, so
    that a model can be evaluated right after `lowbit.quantize_`. The model is left in evaluation mode on ``device``.
    """
    from lowbit.nn import calibrate

    config = TrainConfig(epochs=1, batch_size=max(1, min(batch_size, len(data.train))))
    with processes(device) as here:
        model.to(here.device)
        batches = Batches(data, config, here)
        calibrate(model, batches.first())
        loss, accuracy = loop.evaluate(model, batches, config, here)
    return {"acc": accuracy, "loss": loss}


def reestimate_batchnorm_(
    model: nn.Module, data: Data, batch_size: int = 256, device: str | torch.device | None = None
) -> nn.Module:
    """Replace the running statistics of every BatchNorm layer with those of one pass over ``data.train``, in place.

    Quantized weights change the mean and the variance of the layers' outputs, so that statistics gathered before no
    longer fit (Nagel et al. 2022, arXiv 2203.11086, section 4.1). The weights do not change, and neither does a model
    without BatchNorm. Returns the model, in evaluation mode.
    """
    from torch.optim.swa_utils import update_bn

    from lowbit.nn import calibrate

    config = TrainConfig(epochs=1, batch_size=max(1, min(batch_size, len(data.train))))
    with processes(device) as here:
        model.to(here.device)
        batches = Batches(data, config, here)
        calibrate(model, batches.first())
        update_bn((x for x, _ in batches.epoch(0)), model)
    return model.eval()
