import random

import numpy as np
import torch

from lowbit.training import seeds


def test_derived_seeds_differ_by_use_and_place():
    made = {
        seeds.derive(seed, stream, epoch, step)
        for seed in range(3)
        for stream in range(3)
        for epoch in range(4)
        for step in range(5)
    }
    assert len(made) == 180 and all(0 <= value < 2**63 for value in made)
    assert seeds.derive(1, 2, 3) == seeds.derive(1, 2, 3)


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_state_of_all_generators_survives_a_file(tmp_path):
    seeds.seed_everything(7)
    np.random.randn()  # leaves a second normal number in NumPy's generator
    torch.save(seeds.get_state(), tmp_path / "state.pt")
    expected = *draw(), np.random.randn()
    draw()
    seeds.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (*draw(), np.random.randn()) == expected


def test_ranks_differ_and_preserved_puts_back():
    seeds.seed_everything(0, rank=0)
    first = draw()
    seeds.seed_everything(0, rank=1)
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    state = torch.get_rng_state()
    with seeds.preserved():
        seeds.seed_everything(5)
    assert torch.equal(torch.get_rng_state(), state)
