"""The random inputs of notebook 15 hold what its comparisons rely on."""

import torch

from lowbit.kernels import reference, shift_linear
from lowbit_suite.chapters import kernel_cases


def test_random_layers_cover_every_kind_of_activation_and_are_repeatable():
    levels = {b: [torch.arange(2.0**b)] for b in (2, 3)}
    first, again = (
        [kernel_cases.random_layer(generator, levels) for _ in range(40)]
        for generator in (torch.Generator().manual_seed(0), torch.Generator().manual_seed(0))
    )
    assert {kind for kind, *_ in first} == {"int8", "uint8", "float, scale given", "float, scale found"}
    assert {weight.bits for _, _, weight, _ in first} == {2, 3}
    for (kind, x, weight, options), (_, y, *_) in zip(first, again, strict=True):
        assert torch.equal(x, y) and ("x_scale" in options) == (kind != "float, scale found")
        assert torch.equal(shift_linear(x, weight, **options), reference.linear(x, weight, **options))


def test_random_floats_are_of_every_kind_and_random_normals_stay_normal():
    generator = torch.Generator().manual_seed(0)
    x = kernel_cases.random_floats(generator, 4096)
    tiny = (x != 0) & (x.abs() < torch.finfo(torch.float32).tiny)
    assert x.isnan().any() and (x == 0).any() and tiny.float().mean() > 0.2
    products = kernel_cases.random_normals(generator, 4096) * 2.0**7
    assert products.isfinite().all() and (products.abs() >= torch.finfo(torch.float32).tiny).all()
