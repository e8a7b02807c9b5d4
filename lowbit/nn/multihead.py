"""`torch.nn.MultiheadAttention` with layers that can be quantized.

torch's module keeps the weights of queries, keys and values in one parameter and never calls a layer with it, so no
quantizer can take part. `MultiheadAttention` gives the same results
by a linear layer for each.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LowbitError
from lowbit.nn.attention import PRODUCTS, Projections
from lowbit.nn.calls import computes_as, has_hooks, listed, replace_
from lowbit.nn.products import LowBitProducts

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` as four linear layers: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    It takes the same arguments and returns the same results, and loads the state of torch's module as well as its own.

    Args:
        source: the module to replace. Its ``out_proj`` is moved, its other weights are copied.
    """

    # torch's encoder asks for these, and leaves its fused path, which would read weights instead of calling layers.
    _qkv_same_embed_dim = False
    in_proj_weight = in_proj_bias = bias_k = bias_v = None
    add_zero_attn = False
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.kdim, self.vdim = source.kdim, source.vdim
        self.batch_first, self.dropout = source.batch_first, source.dropout
        given = source.in_proj_weight
        weights = given.chunk(3) if given is not None else [getattr(source, f"{name}_weight") for name in PROJECTIONS]
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            layer = nn.Linear(
                weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
            )
            with torch.no_grad():
                layer.weight.copy_(weight)
                if bias is not None:
                    layer.bias.copy_(bias)
                    layer.bias.requires_grad_(source.in_proj_bias.requires_grad)
            layer.weight.requires_grad_(weight.requires_grad if given is None else given.requires_grad)
            self.add_module(name, layer)
        self.out_proj = source.out_proj
        self.train(source.training)

    @property
    def projections(self) -> Projections:
        """How `LowBitProducts` finds queries, keys and values."""
        return Projections(self.num_heads, self.head_dim, names=PROJECTIONS)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; `torch.nn.MultiheadAttention.forward` describes the arguments and the results.

        Raises:
            LowbitError: ``is_causal`` without ``attn_mask``, which torch's module refuses too; or, with query-key
                reparameterization, queries, keys and values of different tensors.
        """
        if is_causal and attn_mask is None:
            raise LowbitError("is_causal=True is a hint about attn_mask, which is None; give the mask")
        products = self._modules.get(PRODUCTS)
        if isinstance(products, LowBitProducts) and products.query_key:
            if query is not key or key is not value:
                raise LowbitError(
                    "this attention has query-key reparameterization (qkr=True), which needs one tensor as query, key "
                    "and value (self-attention); exclude the layers of cross-attention by quantize_'s filter_fn"
                )
            query = key = value = self.get_submodule("x_quantizer")(query)
        batched = query.dim() == 3
        if not batched:
            query, key, value = (each[None] for each in (query, key, value))
        elif not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        attend = self._attend if products is None else products
        mask = _mask(attn_mask, key_padding_mask, self.num_heads, query)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        y, weights = attend(q, k, v, mask, self.head_dim**-0.5, self.dropout)
        y = self.out_proj(y)
        weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            y, weights = y[0], weights[0]
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, weights if need_weights else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
        logits = (q * scale) @ k.transpose(2, 3)
        weights = (logits if mask is None else logits + mask).softmax(-1)
        weights = nn.functional.dropout(weights, dropout, self.training)
        return (weights @ v).transpose(1, 2).flatten(2), weights

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _split_(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _mask(attention: Tensor | None, padding: Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    """Both masks of `torch.nn.MultiheadAttention`, in which True excludes, as one that is added to the logits."""
    added = [
        each if each.dtype != torch.bool else torch.zeros_like(each, dtype=like.dtype).masked_fill(each, -torch.inf)
        for each in (attention, padding)
        if each is not None
    ]
    if attention is not None and attention.dim() == 3:
        added[0] = added[0].unflatten(0, (-1, heads))
    if padding is not None:
        added[-1] = added[-1].reshape(-1, 1, 1, padding.shape[-1])
    return added[0] + added[1] if len(added) == 2 else next(iter(added), None)


def _split_(state_dict: dict[str, Any], prefix: str) -> None:
    """Put the three parts of torch's ``in_proj_weight`` and ``in_proj_bias`` under the names of the layers."""
    for old, new in (("in_proj_weight", "weight"), ("in_proj_bias", "bias")):
        joined = state_dict.pop(f"{prefix}{old}", None)
        if joined is not None:
            for name, part in zip(PROJECTIONS, joined.chunk(3), strict=True):
                state_dict[f"{prefix}{name}.{new}"] = part
    for name in PROJECTIONS:
        if (weight := state_dict.pop(f"{prefix}{name}_weight", None)) is not None:
            state_dict[f"{prefix}{name}.weight"] = weight


def separate_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Callable[[], None]:
    """Replace every `torch.nn.MultiheadAttention` of ``model`` that can be replaced, in place.

    Modules that are changed by a hook, a subclass or a parametrization, or that append keys and values of their own
    (``add_bias_kv``, ``add_zero_attn``), stay, with a warning.

    Args:
        model: the model.
        filter_fn: as in `lowbit.quantize_`; attention of which it excludes every layer stays.

    Returns:
        A function that puts torch's modules back.

    Raises:
        LowbitError: the model itself is such a module.
    """
    swapped: list[tuple[nn.Module, nn.Module]] = []
    kept = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if not _can_be_separate(module):
            kept.append(name)
            continue
        new = MultiheadAttention(module)
        layers = ((part, new.get_submodule(part)) for part in (*PROJECTIONS, "out_proj"))
        if filter_fn is None or any(filter_fn(layer, f"{name}.{part}".lstrip(".")) for part, layer in layers):
            replace_(model, module, new)
            swapped.append((module, new))
    if kept:
        warnings.warn(
            f"{len(kept)} torch.nn.MultiheadAttention layers stay in full precision, because hooks, a subclass, a "
            f"parametrization, add_bias_kv or add_zero_attn change what they compute: {listed(kept)}",
            stacklevel=3,
        )
    # torch's encoder would hand nested tensors to its layers' fused path, which these do not have.
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and swapped and m.use_nested_tensor]
    for encoder in encoders:
        encoder.use_nested_tensor = False

    def undo() -> None:
        for old, new in swapped:
            replace_(model, new, old)
        for encoder in encoders:
            encoder.use_nested_tensor = True

    return undo


def _can_be_separate(module: nn.MultiheadAttention) -> bool:
    changed = parametrize.is_parametrized(module) or has_hooks(module)
    appends = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    return computes_as(module, nn.MultiheadAttention) and not changed and not appends
