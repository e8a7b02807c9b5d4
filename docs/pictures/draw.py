"""Draws the first page's picture: ``python docs/pictures/draw.py`` writes a moving and a still SVG beside this file.

Ten weights of two bits learn one target each, by gradient descent through `lowbit.functional.statsq`. Drawing needs
torch, so it is done by hand and the output is committed; a test draws it again and compares.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import lowbit.functional as F

STEPS, SECONDS, BITS = 48, 12, 2
WIDTH, HEIGHT, LEFT, TOP, PANEL = 720, 320, 96, 46, 224
TARGETS = torch.tensor([[-0.95, 0.78, -0.30, 0.02, 0.55, -0.62, 0.24, 1.05, -0.80, 0.41]])
INK, MUTED, LATENT, WEIGHT = "#1b1f24", "#57606a", "#b35900", "#0b5cad"


def train() -> tuple[list[Tensor], list[Tensor]]:
    """The latent weights and the weights in use at every step, divided by the row's scale: float ``[10]`` each."""
    latent = torch.zeros_like(TARGETS).uniform_(-0.9, 0.9, generator=torch.Generator().manual_seed(4))
    latents, weights = [], []
    for _ in range(STEPS):
        latent.requires_grad_()
        used = F.statsq(latent, bits=BITS)
        scale = F.statsq_scale(latent)
        latents.append((latent.detach() / scale)[0])
        weights.append((used.detach() / scale)[0])
        (0.5 * (used - TARGETS).square().sum()).backward()
        latent = latent.detach() - 0.12 * latent.grad
    return latents, weights


def height(value: float) -> float:
    """The vertical position of a value between -1.2 and 1.2."""
    return round(TOP + PANEL * (1.2 - max(-1.2, min(1.2, value))) / 2.4, 1)


def keyframes(name: str, values: list[float]) -> str:
    """CSS keyframes that move a mark from where it stands last to where it stood at each step."""
    last = height(values[-1])
    steps = "".join(
        f"{100 * i / len(values):.1f}%{{transform:translateY({height(v) - last:.1f}px)}}" for i, v in enumerate(values)
    )
    return f"@keyframes {name}{{{steps}100%{{transform:translateY(0)}}}}"


def line(y: float, color: str, style: str) -> str:
    """A horizontal line through the whole picture."""
    return f'<line x1="{LEFT}" x2="{WIDTH - 24}" y1="{y}" y2="{y}" stroke="{color}" {style}/>'


def draw(moving: bool) -> str:
    """The picture as SVG: the last step, and with ``moving`` the way there, except where readers want no motion."""
    latents, weights = train()
    levels = torch.unique(torch.cat(weights)).tolist()
    style, marks = [], []
    for level in levels:
        y = height(level)
        marks.append(line(y, WEIGHT, 'stroke-opacity=".35"'))
        marks.append(f'<text x="{LEFT - 12}" y="{y + 5}" text-anchor="end" fill="{WEIGHT}">{level:+.2f}</text>')
    for low, high in pairwise(levels):
        marks.append(line(height((low + high) / 2), MUTED, 'stroke-dasharray="3 5" stroke-opacity=".7"'))
    for index in range(TARGETS.shape[1]):
        x = LEFT + 34 + index * 58
        path, jumps = ([step[index].item() for step in steps] for steps in (latents, weights))
        bar, dot = height(jumps[-1]) - 6, height(path[-1])
        marks += [
            f'<rect class="w{index}" x="{x - 16}" y="{bar}" width="32" height="12" rx="3" fill="{WEIGHT}"/>',
            f'<circle class="l{index}" cx="{x}" cy="{dot}" r="5" fill="{LATENT}" stroke="#fff" stroke-width="1.5"/>',
        ]
        style += [
            keyframes(f"W{index}", jumps), f".w{index}{{animation:W{index} {SECONDS}s step-end infinite}}",
            keyframes(f"L{index}", path), f".l{index}{{animation:L{index} {SECONDS}s linear infinite}}",
        ]  # fmt: skip
    css = f"<style>@media (prefers-reduced-motion: no-preference){{{''.join(style)}}}</style>" if moving else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="14">{css}<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#fff"/>'
        f'<text x="{LEFT}" y="28" fill="{INK}">ten weights learn, two bits each</text>'
        f'<circle cx="{LEFT + 270}" cy="23" r="5" fill="{LATENT}"/>'
        f'<text x="{LEFT + 282}" y="28" fill="{INK}">latent weights</text>'
        f'<rect x="{LEFT + 454}" y="17" width="24" height="12" rx="3" fill="{WEIGHT}"/>'
        f'<text x="{LEFT + 484}" y="28" fill="{INK}">weights in use</text>'
        f"{''.join(marks)}"
        f'<text x="{LEFT}" y="{HEIGHT - 20}" fill="{MUTED}">'
        "solid: the four levels · dashed: where rounding goes to another level</text></svg>\n"
    )


if __name__ == "__main__":
    for name, moving in (("learning", True), ("learning_still", False)):
        Path(__file__).with_name(f"{name}.svg").write_text(draw(moving), encoding="utf-8")
