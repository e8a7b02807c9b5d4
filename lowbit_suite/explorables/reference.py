"""The maths of the explorables in Python, by `lowbit.functional`: for their golden values and their PNG twins.

``python -m lowbit_suite.explorables.reference`` counts the weights of a shipped checkpoint and writes
``latents.js``.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

import lowbit
import lowbit.functional as F
from lowbit.nn import quantized_layers
from lowbit.quantizers import StatsQ

ROW = (-3.4, -2.7, -2.2, -1.6, -1.3, -0.8, -0.4, 0.4, 0.6, 0.9, 1.3, 1.7, 2.2, 2.6, 2.9)
QUERY = ((0.39, 0.01), (-0.25, 0.15))
KEY = ((0.3, -0.12), (0.16, 0.34))
GIVEN = ((1.0, -1.0), (2.0, 3.0))
TARGET = ((-0.2, 0.3), (0.1, -0.25))
BINS = 160
"""Bins of the histogram of y = w·n/s over [-n, n], n = 2 at two bits."""


def denseshift(latents: list[float], gradient: float, surrogate: str) -> dict:
    """Weight, exponent and gradients of one DenseShift weight; ``latents`` are the sign's and the gates'."""
    tensors = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in latents]
    weight = F.denseshift(*tensors, surrogate=surrogate)
    weight.backward(torch.tensor(gradient, dtype=torch.float64))
    sign, *gates = (t.grad.item() for t in tensors)
    exponent = int(F.denseshift_exponent(*tensors[1:]).item())
    return {"weight": weight.item(), "exponent": exponent, "signGradient": sign, "gateGradients": gates}


def train(optimum: float, rate: float, learned: bool, steps: int) -> dict:
    """Latent, code and scale of one LSQ weight at each step; the row that shares its scale trains with it."""
    optima = torch.tensor([optimum, *ROW], dtype=torch.float64)
    weights, scale = optima.clone().requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=learned)
    optimizer = torch.optim.SGD([weights, scale] if learned else [weights], lr=rate)
    found = {"latents": [], "codes": [], "scales": []}
    for _ in range(steps):
        found["latents"].append(weights[0].item())
        found["codes"].append(int(F.lsq_codes(weights.detach(), scale.detach(), bits=3)[0]))
        found["scales"].append(scale.item())
        optimizer.zero_grad()
        (0.5 * (F.lsq(weights, scale, bits=3) - optima).square().sum()).backward()
        optimizer.step()
    return found


def reversals(codes: list[int]) -> list[int]:
    """1 where the code turns back, else 0: ``oscillation_step`` with momentum 1."""
    state, turned = None, []
    for code in codes:
        state = F.oscillation_step(torch.tensor(code), state, momentum=1.0)
        turned.append(int(state.frequency.item()))
    return turned


def angle(a: Tensor, b: Tensor) -> float:
    """The angle between two matrices taken as vectors, in degrees."""
    cosine = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
    return math.degrees(math.acos(cosine.clamp(-1, 1).item()))


def query_key(degrees: float, bits: int, loss: bool) -> dict:
    """The gradient of W_k, by autograd, three ways: in full precision, factors rounded apart, their product rounded.

    With ``loss`` it is that of ½‖logits - TARGET‖²; without, that of Σ logits · GIVEN.
    """
    a = math.radians(degrees)
    turned = torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]], dtype=torch.float64)
    query = torch.tensor(QUERY, dtype=torch.float64) @ turned
    target, given = (torch.tensor(m, dtype=torch.float64) for m in (TARGET, GIVEN))
    gradients = {}
    for name in ("full", "apart", "one"):
        key = torch.tensor(KEY, dtype=torch.float64, requires_grad=True)
        if name == "apart":
            logits = F.statsq(query, bits).T @ F.statsq(key, bits)
        else:
            logits = query.T @ key
            logits = F.statsq(logits, bits) if name == "one" else logits
        (0.5 * (logits - target).square().sum() if loss else (logits * given).sum()).backward()
        gradients[name] = key.grad
    return {
        "query": query.tolist(),
        "rounded": F.statsq(query, bits).tolist(),
        **{name: gradient.tolist() for name, gradient in gradients.items()},
        "apartAngle": angle(gradients["apart"], gradients["full"]),
        "oneAngle": angle(gradients["one"], gradients["full"]),
    }


def network() -> torch.nn.Module:
    """The network that notebook 12 starts from: a shipped checkpoint, to be quantized by StatsQ at two bits."""
    model = lowbit.models.create("vit_nano", 10, 1, 8, pretrained="digits")
    return lowbit.quantize_(model, lowbit.QuantConfig(weight=StatsQ(bits=2)))


def latents(model: torch.nn.Module) -> dict:
    """The 2-bit weights of a model's blocks around their thresholds, counted.

    Returns:
        ``counts``, the histogram of y = clip(w/s, -1, 1)·2 in `BINS` bins over [-2, 2], and ``within``: for 0, 1, ...,
        500 thousandths, how many weights `lowbit.functional.cga_mask` lets move at this boundary range.
    """
    layers = [layer for layer in quantized_layers(model) if layer.name.startswith("blocks.")]
    weights = [layer.latents[0].detach() for layer in layers]
    y = torch.cat([(2 * (w / F.statsq_scale(w)).clamp(-1, 1)).flatten() for w in weights])
    within = [sum(int(F.cga_mask(w, 2, k / 1000).sum()) for w in weights) for k in range(501)]
    return {"counts": torch.histc(y.double(), BINS, -2, 2).long().tolist(), "within": within}


def main() -> None:
    """Write ``latents.js``."""
    text = (
        "// The latent weights of the shipped checkpoint from which notebook 12 starts (vit_nano on digits, 2 bits);\n"
        "// python -m lowbit_suite.explorables.reference wrote this.\n"
        f"export const LATENTS = {json.dumps(latents(network()), separators=(',', ':'))};\n"
    )
    Path(__file__).with_name("latents.js").write_text(text)


if __name__ == "__main__":
    main()
