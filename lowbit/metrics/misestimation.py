"""The effect of rounding the query and key weights on their own gradients.

Liu, Liu and Cheng (OFQ, arXiv 2302.02210) argue that queries and keys misestimate each other's gradient: the
gradient of the key weights contains the rounded query weights, and vice versa. The measure is ours.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LowbitError
from lowbit.metrics.layers import parametrization_of
from lowbit.nn.attention import LowBitAttention, low_bit_attentions
from lowbit.nn.query_key import QueryKeyProduct


def query_key_misestimation(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The relative error that rounding queries and keys brings into their straight-through gradients.

    The result is the mean of ``‖g - g₀‖ / ‖g₀‖`` over attention layers. Here g is the gradient of the cross-entropy to
    the latent query and key weights, as in training, and g₀ is the same gradient with these weights (with QKR, their
    product) not rounded and everything else unchanged. 0 is a perfect estimate, 1 is an error as large as the gradient,
    and NaN means that a layer has no gradient at all.

    Args:
        model: a model with `lowbit.nn.LowBitAttention`; its mode and gradients are not changed.
        batches: normalized inputs and labels int64 [N], on the model's device; gradients are summed over them.

    Raises:
        LowbitError: no low-bit attention, or one whose query and key weights are not quantized.
    """
    attentions = list(low_bit_attentions(model).values())
    if not attentions:
        raise LowbitError(
            f"{type(model).__name__} has no low-bit attention; quantize it with attention=True or qkr=True"
        )
    batches = list(batches)
    rounded = _gradients(model, attentions, batches)
    with ExitStack() as stack:
        for attention in attentions:
            stack.enter_context(_unrounded(attention))
        exact = _gradients(model, attentions, batches)
    errors = [float((g - g0).norm() / g0.norm()) for g, g0 in zip(rounded, exact, strict=True)]
    return sum(errors) / len(errors)


def _latents(attention: LowBitAttention) -> list[Tensor]:
    """The query and key weights: as one stacked latent (values included), or as the two factors of a product."""
    reparameterized = hasattr(attention, "qk")
    layer = attention.get_submodule("qk" if reparameterized else "qkv")
    if not parametrize.is_parametrized(layer, "weight"):
        raise LowbitError("the query and key weights are not quantized; give quantize_ a weight method")
    held = parametrization_of(layer)
    if not (reparameterized or hasattr(held, "original")):
        raise LowbitError(f"{held[0].config!r} has several latents per weight; this measure takes methods with one")
    return [held.get_parameter(f"original{i}") for i in range(2)] if reparameterized else [held.original]


def _gradients(
    model: nn.Module, attentions: Sequence[LowBitAttention], batches: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """For each attention one vector: the gradients of query and key weights."""
    latents = [_latents(attention) for attention in attentions]
    flat = [latent for group in latents for latent in group]
    sums = [torch.zeros_like(latent) for latent in flat]
    for x, y in batches:
        with torch.enable_grad():
            output = model(x)
            loss = nn.functional.cross_entropy(output[0] if isinstance(output, tuple) else output, y)
            for total, grad in zip(sums, torch.autograd.grad(loss, flat), strict=True):
                total += grad
    parts = iter(sums)
    vectors = []
    for group in latents:
        grads = [next(parts) for _ in group]
        rows = len(grads[0]) * 2 // 3 if len(group) == 1 else None  # values are the last third
        vectors.append(torch.cat([grad[:rows].flatten() for grad in grads]))
    return vectors


@contextmanager
def _unrounded(attention: LowBitAttention) -> Iterator[None]:
    """A context in which query and key weights (or their product) are not rounded, but values are."""
    if hasattr(attention, "qk"):
        product = parametrization_of(attention.get_submodule("qk"))[0]
        assert isinstance(product, QueryKeyProduct)
        held, product.quantizer = product.quantizer, None
        try:
            yield
        finally:
            product.quantizer = held
        return
    quantizer = parametrization_of(attention.get_submodule("qkv"))[0]
    forward = quantizer.forward

    def values_only(latent: Tensor) -> Tensor:
        rows = len(latent) * 2 // 3
        return torch.cat([latent[:rows], forward(latent)[rows:]])

    quantizer.forward = values_only
    try:
        yield
    finally:
        del quantizer.forward
