"""``lowbit bench agreement``: packed models beside the fake-quantized ones they are made of, answer by answer.

Small models start from their checkpoint (or from nothing), are trained for a few epochs with quantized weights and
asked about test images or sounds they have not seen. Models of 224 pixels have no checkpoint here: their weights and
images are random, so they have answers to compare and no accuracy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import select
from benchmarks.models import MODELS, quantized
from lowbit.training.batches import normalize

BATCH = 16


@dataclass(frozen=True)
class Training:
    """What a small model is trained on: a data set, a checkpoint or None, and settings of `lowbit.TrainConfig`."""

    data: str
    pretrained: str | None
    augment: str
    settings: dict[str, Any]


SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "decay": "all"}
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}
TRAINED = {
    "resnet20": Training("digits", "digits", "shift", {"epochs": 3, "batch_size": 64, **SGD}),
    "vit_nano": Training("digits", "digits", "shift", {"epochs": 3, "batch_size": 64, **ADAMW}),
    "kws_resnet": Training("spoken-words", None, "none", {"epochs": 12, "batch_size": 32, **SGD}),
}


def run(models: Sequence[str] | None = None, bits: Sequence[int] = (2, 3, 4), count: int = 64) -> Iterator[dict]:
    """One row a model and width: how many of the answers are the same, and what explains the others.

    Args:
        models: names or patterns of `benchmarks.models.MODELS`; None takes all.
        bits: widths of DenseShift weights (StatsQ's for the vision transformers that are trained).
        count: test inputs of models with random weights; the others get their whole test set.

    Raises:
        LowbitError: an unknown name.
    """
    for name in select(models, list(MODELS), "--model"):
        for width in bits:
            model, x, y = _trained(name, width) if name in TRAINED else _random(name, width, count)
            yield {
                "model": name,
                "weights": "trained" if name in TRAINED else "random",
                "bits": width,
                **_agree(model, x, y),
            }


def _random(name: str, bits: int, count: int) -> tuple[nn.Module, Tensor, None]:
    return quantized(MODELS[name], bits), MODELS[name].inputs(count), None


def _trained(name: str, bits: int) -> tuple[nn.Module, Tensor, Tensor]:
    import lowbit
    from lowbit.quantizers import LSQ, DenseShift, StatsQ

    recipe = TRAINED[name]
    data = lowbit.data.load(recipe.data)
    torch.manual_seed(0)
    shape = {} if MODELS[name].pixels is None else {"in_chans": data.input_shape[0], "img_size": data.input_shape[-1]}
    model = lowbit.models.create(name, data.num_classes, pretrained=recipe.pretrained, **shape)
    transformer = name.startswith("vit")
    weight = StatsQ(bits=bits) if transformer else DenseShift(bits=bits)
    more = {"attention": True, "unsigned": ("*.fc2",)} if transformer else {}
    lowbit.quantize_(model, lowbit.QuantConfig(weight=weight, activation=LSQ(bits=8), first_last=8, **more))
    lowbit.train(model, data, lowbit.TrainConfig(augment=recipe.augment, eval_every=10**6, seed=0, **recipe.settings))
    return model.eval(), normalize(data.test.x, data.mean, data.std), data.test.y


def _agree(model: nn.Module, x: Tensor, y: Tensor | None) -> dict[str, Any]:
    import pandas as pd

    import lowbit
    from lowbit.nn.agreement import compare

    packed = lowbit.pack(model, x[:1])
    with torch.no_grad():
        one, two = (torch.cat([m(part) for part in x.split(BATCH)]) for m in (model, packed))
    layers = pd.concat([compare(model, packed, part) for part in x.split(BATCH)])
    accuracy = {}
    if y is not None:
        accuracy = {k: 100 * (z.argmax(1) == y).float().mean().item() for k, z in (("fake", one), ("packed", two))}
    return {
        "inputs": len(x),
        "accuracy, fake-quantized, %": accuracy.get("fake"),
        "accuracy, packed, %": accuracy.get("packed"),
        "other answers": int((one.argmax(1) != two.argmax(1)).sum()),
        "inputs with an integer that differs": int(layers["first"].sum()),
        "integers that differ, %": 100 * layers["steps_differ"].sum() / layers["numbers"].sum(),
        "first differences: largest, steps": int(layers["first_step"].max()),
        "first differences: farthest from a border, steps": layers["from_border"].max(),
    }
