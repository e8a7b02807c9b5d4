"""Low-bit products of attention for modules that project queries, keys and values by three layers of their own.

These are our form of `torch.nn.MultiheadAttention` (`lowbit.nn.multihead`) and the attention of Hugging Face's models
(`lowbit.nn.huggingface`). `lowbit.nn.attention` has the form for timm, whose projections are one layer.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import LowbitError
from lowbit.nn import huggingface
from lowbit.nn.attention import INPUT, PRODUCTS, Projections, add_factors_, expect_, operand
from lowbit.nn.calls import has_hooks, listed
from lowbit.nn.query_key import check_one_latent, quantize_weight_, query_key_layer
from lowbit.quantizers.base import Method


class LowBitProducts(nn.Module):
    """Attention on given queries, keys and values, with quantized factors: ``q̂·k̂ᵀ`` and ``â·v̂``.

    It shares steps and biases among elements as `lowbit.nn.LowBitAttention` does, and differs from it only in that the
    projections stay in the module around it.

    Args:
        projections: heads and sizes.
        like: a tensor with the module's device and dtype.
        width: width C of the module's input.
        weight, activation, query_key, factors, z_bias, softmax_step: as in `lowbit.nn.LowBitAttention`. With
            ``query_key``, the module's query layer passes its quantized input x̂ on, and its key layer returns
            ``x̂·M̂ᵀ`` of all heads (see `reparameterize_`).
    """

    q_quantizer: nn.Module  # without query_key, as is the next
    k_quantizer: nn.Module
    z_quantizer: nn.Module  # with query_key
    v_quantizer: nn.Module
    softmax_quantizer: nn.Module

    def __init__(
        self,
        projections: Projections,
        like: Tensor,
        width: int,
        weight: Method | None = None,
        activation: Method | None = None,
        query_key: bool = False,
        factors: bool = True,
        z_bias: Literal["channel", "head"] = "channel",
        softmax_step: Literal["head", "query"] = "head",
    ):
        super().__init__()
        self.settings: dict[str, Any] = {"weight": weight, "activation": activation}
        self.settings |= {"query_key": query_key, "factors": factors}
        options = {"z_bias": (z_bias, "channel"), "softmax_step": (softmax_step, "head")}
        self.settings |= {name: value for name, (value, default) in options.items() if value != default}
        self.heads, self.groups, self.query_key, self.width = projections.heads, projections.groups, query_key, width
        widths = {name: projections.heads // projections.groups * projections.size for name in "kv"}
        widths |= {"z": width} if query_key else {"q": projections.heads * projections.size}
        add_factors_(self, activation if factors else None, self.heads, widths, like, z_bias, softmax_step)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            q: float ``[B, N, heads·d]``; with ``query_key`` the input x̂, ``[B, N, C]``.
            k: float ``[B, M, heads/groups·d]``; with ``query_key`` ``[B, M, heads·C]``.
            v: float ``[B, M, heads/groups·d]``.
            mask: what is added to the logits, broadcastable to ``[B, heads, N, M]``; or boolean, False where no
                attention is allowed; or None.
            scale: factor of the logits.
            dropout: share of the weights set to zero in training.

        Returns:
            The result ``[B, N, heads·d]``, and the attention weights ``[B, heads, N, M]``.
        """
        if self.query_key:
            z = self.z_quantizer(k.unflatten(-1, (self.heads, self.width)))
            logits = (q[:, None] * scale) @ z.permute(0, 2, 3, 1)
        else:
            q = self.q_quantizer(q).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            logits = (q * scale) @ self._of_each_head(self.k_quantizer(k)).transpose(2, 3)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        attention = F.dropout(self.softmax_quantizer(logits.softmax(-1)), dropout, self.training)
        y = attention @ self._of_each_head(self.v_quantizer(v))
        return y.transpose(1, 2).flatten(2), attention

    def _of_each_head(self, x: Tensor) -> Tensor:
        """``[B, M, heads/groups·d]`` as ``[B, heads, M, d]``."""
        x = x.unflatten(-1, (self.heads // self.groups, -1)).transpose(1, 2)
        return x if self.groups == 1 else x.repeat_interleave(self.groups, 1)


def check_projections(
    name: str, module: nn.Module, projections: Projections, weight: Method | None
) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The query, key and value layers of an attention to reparameterize, or a refusal.

    Args:
        name: the module's name, for the message.
        module: the attention module.
        projections: how it makes queries, keys and values.
        weight: the weight method, or None.

    Raises:
        LowbitError: they are not three plain linear layers of the same input and of equal heads, or the method has
            several latents.
    """
    no = f"qkr=True is not possible for {name!r}: "
    if projections.names is None or projections.groups != 1:
        raise LowbitError(
            f"{no}query-key reparameterization needs a linear layer each for queries, keys and values, with as many "
            f"heads, and nothing between them and their product; {type(module).__name__} has another form or is not "
            "known to have this one; use qkr=False"
        )
    layers = [getattr(module, part) for part in projections.names]
    for part, layer in zip(projections.names, layers, strict=True):
        if type(layer) is not nn.Linear:
            raise LowbitError(
                f"{no}its {part} is a {type(layer).__name__}, which may compute with more than its weight, not a "
                "torch.nn.Linear; use qkr=False"
            )
    if hooked := [part for part, layer in zip(projections.names[:2], layers, strict=False) if has_hooks(layer)]:
        raise LowbitError(
            f"{no}its {listed(hooked)} would lose its hooks, because another layer takes its place; remove them, "
            "quantize the model, and register them again"
        )
    q, k, v = layers
    if q.weight.shape != k.weight.shape or q.in_features != v.in_features:
        raise LowbitError(
            f"{no}its queries, keys and values have weights of {list(q.weight.shape)}, {list(k.weight.shape)} and "
            f"{list(v.weight.shape)}, which cannot be made from one input; use qkr=False"
        )
    if q.in_features % projections.size:
        raise LowbitError(f"{no}its input of {q.in_features} features is no multiple of a head of {projections.size}")
    check_one_latent(name, weight)
    return q, k, v


def has_projections(module: nn.Module) -> bool:
    """Whether `attach_products_` takes ``module``: `lowbit.nn.multihead.MultiheadAttention`, or one of transformers."""
    return hasattr(type(module), "projections") or huggingface.is_attention(module)


def projections_of(name: str, module: nn.Module) -> Projections:
    """How an attention module makes its queries, keys and values; ``name`` is for the message of a refusal.

    Raises:
        LowbitError: the module does not tell.
    """
    own = getattr(module, "projections", None)
    return own if isinstance(own, Projections) else huggingface.projections_of(name, module)


def attach_products_(module: nn.Module, projections: Projections, **settings: Any) -> None:
    """Give an attention module its `LowBitProducts`, in place; with ``query_key`` also `reparameterize_` it.

    Args:
        module: a module for which `has_projections` is true.
        projections: how it makes queries, keys and values.
        settings: arguments of `LowBitProducts`.
    """
    if settings.get("query_key"):
        q, _, _ = check_projections(type(module).__name__, module, projections, settings.get("weight"))
        like, width = q.weight, q.in_features
        reparameterize_(module, projections, settings.get("weight"), settings.get("activation"))
    else:
        like, width = next(module.parameters()), projections.heads * projections.size
    products = LowBitProducts(projections, like, width, **settings)
    module.add_module(PRODUCTS, products.train(module.training))
    if huggingface.is_attention(module):
        huggingface.hand_over_(module, bool(settings.get("query_key")))


def reparameterize_(
    module: nn.Module, projections: Projections, weight: Method | None, activation: Method | None
) -> None:
    """Put query-key reparameterization in the place of the query and key layers of ``module``.

    The module's code must quantize its input x by the ``x_quantizer`` that this adds. Then the query layer passes x̂ on,
    and the key layer computes ``x̂·M̂ᵀ`` for all heads, M̂ being the quantized ``WqᵀWk`` of each (see
    `lowbit.nn.query_key`). The biases of queries and keys are dropped.
    """
    names = projections.names
    assert names is not None
    q, k, v = (getattr(module, name) for name in names)
    product = query_key_layer(projections.heads, q.weight, k.weight, weight)
    quantize_weight_(v, weight)
    module.x_quantizer = operand(activation)
    if activation is not None:
        expect_(module.x_quantizer, (None, None, q.in_features), q.weight)
        for layer in (product, v):  # visible to code that counts bits, but not registered a second time
            layer.__dict__[INPUT] = module.x_quantizer
    setattr(module, names[0], nn.Identity())
    setattr(module, names[1], product)


def low_bit_products(model: nn.Module) -> dict[str, LowBitProducts]:
    """The `LowBitProducts` of every attention module that holds some, by the attention module's name."""
    held = {name: getattr(module, PRODUCTS, None) for name, module in model.named_modules()}
    return {name: products for name, products in held.items() if isinstance(products, LowBitProducts)}
