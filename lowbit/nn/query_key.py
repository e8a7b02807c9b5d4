"""Query-key reparameterization: one quantized matrix instead of two (OFQ, ICML 2023, arXiv 2302.02210)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float
from lowbit.quantizers.statsq import StatsQ, cga_mask

__all__ = ["QueryKeyProduct", "check_one_latent", "quantize_weight_", "query_key_layer", "query_key_product"]


def query_key_product(wq: Tensor, wk: Tensor, heads: int) -> Tensor:
    """The matrices ``M_h = Wq_hᵀ·Wk_h`` of all heads, stacked: ``x_i·M_h·x_jᵀ = (Wq_h·x_i)·(Wk_h·x_j)``.

    Args:
        wq, wk: float ``[heads·d, C]``, the query and key weights; head h has rows h·d to (h+1)·d.
        heads: number of heads.

    Returns:
        float ``[heads·C, C]``.

    Raises:
        LowbitError: ``wq`` and ``wk`` differ in shape or are no matrices, or ``heads`` does not divide their rows.
    """
    if wq.shape != wk.shape or wq.ndim != 2 or heads < 1 or len(wq) % heads:
        raise LowbitError(
            f"query and key weights of shapes {list(wq.shape)} and {list(wk.shape)} cannot be split into {heads} "
            "heads; both should be [heads x d, C]"
        )
    width = wq.shape[1]
    q, k = as_float(wq).reshape(heads, -1, width), as_float(wk).reshape(heads, -1, width)
    with torch.autocast(wq.device.type, enabled=False):  # half precision would move elements across levels
        return torch.bmm(q.transpose(1, 2), k).reshape(heads * width, width)


class _MaskGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class QueryKeyProduct(WeightQuantizer):
    """A parametrization that computes a layer ``C → heads·C`` as the quantized product of query and key weights.

    With separate quantizers, the gradient of Wk contains the quantized Wq, so a flip in one perturbs the other. Here
    the latents stay in full precision, and only their product is rounded.

    Args:
        heads: number of heads.
        wq, wk: starting values, float ``[heads·d, C]``.
        method: the weight method of the product, with a single latent; None leaves the product in full precision.

    Attributes:
        boundary: None, or the boundary range of confidence-guided annealing (StatsQ only): then only elements of the
            product that are this close to a decision boundary pass a gradient. The latents of frozen elements still
            move, since each element of Wq and Wk contributes to C elements of the product.
    """

    config: Method | None
    boundary: float | None
    quantizer: WeightQuantizer | None

    def __init__(self, heads: int, wq: Tensor, wk: Tensor, method: Method | None):
        super().__init__()
        self.heads, self.config = heads, method
        self.boundary = None
        self.quantizer = None if method is None else method.weight(query_key_product(wq, wk, heads))
        self._start: tuple[Tensor, Tensor] | None = (wq, wk)

    def product(self, wq: Tensor, wk: Tensor) -> Tensor:
        """The full-precision product, the latent of the quantizer: float ``[heads·C, C]``."""
        return query_key_product(wq, wk, self.heads)

    def forward(self, *latents: Tensor) -> Tensor:
        """The quantized product of the latents ``wq, wk``: ``[heads·C, C]``, of their dtype."""
        wq, wk = latents
        product = self.product(wq, wk)
        if self.quantizer is None:
            return product.to(wq.dtype)
        if self.boundary is not None:
            assert isinstance(self.config, StatsQ)  # lowbit.training.annealing sets a boundary for StatsQ alone
            product = _MaskGradient.apply(product, cga_mask(product.detach(), self.config.bits, self.boundary))
        return self.quantizer(product).to(wq.dtype)

    @property
    def levels(self) -> Tensor:
        """See `WeightQuantizer.levels`."""
        return self._quantizer.levels

    def codes(self, *latents: Tensor) -> Tensor:
        """Level indices of the product of the latents ``wq, wk``: int16 ``[heads·C, C]``."""
        return self._quantizer.codes(self.product(*latents))

    def scale(self, *latents: Tensor) -> Tensor:
        """Scale of the product of the latents ``wq, wk``: float, broadcastable to it, detached."""
        return self._quantizer.scale(self.product(*latents))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The starting latents, on the first call only: a product does not determine its factors."""
        if self._start is None:
            raise LowbitError(
                "the weight of a query-key product cannot be assigned, because it does not determine its two factors; "
                "set parametrizations.weight.original0 (queries) and original1 (keys)"
            )
        start, self._start = self._start, None
        return start

    @property
    def _quantizer(self) -> WeightQuantizer:
        if self.quantizer is None:
            raise LowbitError("this query-key product is in full precision: it has no levels, codes or scale")
        return self.quantizer


def query_key_layer(heads: int, wq: Tensor, wk: Tensor, method: Method | None) -> nn.Linear:
    """A linear layer ``C → heads·C`` without bias whose weight is the `QueryKeyProduct` of these starting values.

    Its latents require gradients where ``wq`` and ``wk`` do.
    """
    width = wq.shape[1]
    layer = nn.Linear(width, heads * width, bias=False, device=wq.device, dtype=wq.dtype)
    product = QueryKeyProduct(heads, wq.detach().clone(), wk.detach().clone(), method)
    parametrize.register_parametrization(layer, "weight", product)
    for i, start in enumerate((wq, wk)):
        layer.get_parameter(f"parametrizations.weight.original{i}").requires_grad_(start.requires_grad)
    return layer


def quantize_weight_(layer: nn.Linear, method: Method | None) -> None:
    """Quantize the weight of the values' layer of a reparameterized attention, in place; None leaves it as it is."""
    if method is not None:
        quantizer = method.weight(layer.weight.detach())
        parametrize.register_parametrization(layer, "weight", quantizer)
        quantizer.initialize_(layer.get_parameter("parametrizations.weight.original"))


def check_one_latent(name: str, method: Method | None) -> None:
    """Refuse a weight method with several latents for the attention ``name``, since the product replaces one.

    Raises:
        LowbitError: the method has several latents.
    """
    if method is not None and not isinstance(method.weight(torch.ones(2, 2)).right_inverse(torch.ones(2, 2)), Tensor):
        raise LowbitError(
            f"qkr=True is not possible for {name!r} with {method!r}: the product of query and key weights replaces the "
            "method's latent, and this method has several; use a method with one latent, such as StatsQ or LSQ"
        )
