"""Low-bit attention for timm's vision transformers, with or without query-key reparameterization (QKR).

Liu, Liu and Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023, arXiv 2302.02210.
Quantization steps are shared among elements in the way of the authors' code.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.nn.query_key import check_one_latent, quantize_weight_, query_key_layer
from lowbit.quantizers.base import ActivationQuantizer, Method, as_float
from lowbit.quantizers.lsq import LSQ, LSQActivation

if TYPE_CHECKING:
    from timm.layers.attention import Attention
    from timm.models.swin_transformer import WindowAttention

    TimmAttention: TypeAlias = Attention | WindowAttention

INPUT = "input_quantizer"  # the name under which a layer holds the quantizer of its input
PRODUCTS = "low_bit_products"  # and an attention module its `lowbit.nn.products.LowBitProducts`
OLDEST_TIMM = "1.0.26"
Granularity = Literal["tensor", "channel", "token"]


@dataclass(frozen=True)
class Projections:
    """How an attention module makes its queries, keys and values.

    Attributes:
        heads: number of heads.
        size: width of a head.
        groups: number of heads that share keys and values.
        names: the attributes of the query, key and value layers; None if one layer makes several of them.
    """

    heads: int
    size: int
    groups: int = 1
    names: tuple[str, str, str] | None = None


def is_attention(module: nn.Module) -> "TypeGuard[TimmAttention]":
    """Whether `LowBitAttention` can replace ``module``: true for timm's Attention and Swin's WindowAttention.

    Raises:
        LowbitError: timm is older than `OLDEST_TIMM`.
    """
    if not type(module).__module__.startswith("timm."):  # models without timm's parts do not need timm
        return False
    try:
        from timm.layers.attention import Attention, maybe_add_mask, resolve_self_attn_mask  # noqa: F401
        from timm.models.swin_transformer import WindowAttention
    except ImportError:
        import timm

        raise LowbitError(
            f"low-bit attention (attention=True, qkr=True) needs timm {OLDEST_TIMM} or newer, and timm "
            f"{timm.__version__} is installed: pip install 'timm>={OLDEST_TIMM}'"
        ) from None
    return type(module) in (Attention, WindowAttention)


def check_reparameterizable(name: str, attention: "TimmAttention", weight: Method | None) -> None:
    """Refuse an attention layer or a weight method that QKR cannot be applied to.

    Args:
        name: the layer's name, for the message.
        attention: a layer for which `is_attention` is true.
        weight: the weight method, or None for full precision.

    Raises:
        LowbitError: the layer normalizes queries or keys, its ``qkv`` is not a plain `torch.nn.Linear`, or the method
            has several latents.
    """
    for norm in ("q_norm", "k_norm"):
        if not isinstance(getattr(attention, norm, nn.Identity()), nn.Identity):
            raise LowbitError(
                f"qkr=True is not possible for {name!r}: it normalizes queries and keys ({norm}), so that its logits "
                "are no longer a product of the input with one matrix; use qkr=False"
            )
    if type(attention.qkv) is not nn.Linear:
        raise LowbitError(
            f"qkr=True is not possible for {name!r}: its qkv is a {type(attention.qkv).__name__}, which may compute "
            "with more than its weight, not a torch.nn.Linear; use qkr=False"
        )
    check_one_latent(name, weight)


class LowBitAttention(nn.Module):
    """Self-attention that quantizes the factors of its own products; replaces timm's attention (see `is_attention`).

    Without QKR, queries, keys, values and the softmax's output are quantized: ``q̂·k̂ᵀ`` and ``â·v̂``. With QKR, the
    logits are ``x̂·ẑᵀ/sqrt(d)``, where ``ẑ`` is the quantized ``x̂·M̂ᵀ`` and ``M̂`` the quantized ``WqᵀWk`` of each head
    (see `QueryKeyProduct`). The input ``x̂`` is quantized once for all uses; the biases of queries and keys are dropped.

    ``activation`` decides which elements share a step. LSQ with granularity "token", the published form, has one step
    for each token (queries, keys), token and head (z), query and head (softmax), and channel (values). "channel" has
    one step for each channel, and a single one for the softmax; "tensor" has a single step for each factor. The
    softmax's output is unsigned and has no biases. Other factors have one bias for each channel; the heads share those
    of z. `QuantConfig` describes how ``z_bias`` and ``softmax_step`` change this.

    Children keep their names from timm, so checkpoints fit: ``qkv`` (or ``qk`` and ``v``) and ``proj``.

    Args:
        source: the attention layer to replace. Its layers and parameters are moved, not copied.
        weight: the weight method of ``qk`` and ``v`` with ``query_key``; `quantize_` handles ``qkv`` and ``proj``.
        activation: the method for the factors and, with ``query_key``, for the input x; None for full precision.
        query_key: whether to reparameterize.
        factors: False quantizes only the input x.
        fresh: whether to reinitialize ``proj``, ``qkv`` (without QKR) and Swin's relative position table, as the
            released code does, instead of keeping the pre-trained values.
        z_bias: dims along which the biases of z differ: "channel", or "head" for head and channel.
        softmax_step: dims along which the softmax's steps per token differ: "head" for head and query, or "query".

    Shapes:
        ``[B, N, C]`` in and out; for Swin, B counts windows. ``attn_mask`` is timm's mask, ``mask`` is Swin's.
    """

    settings: dict[str, Any]
    num_heads: int
    scale: float
    qkv: nn.Linear  # without query_key
    qk: nn.Linear  # with query_key, as are the next three
    v: nn.Linear
    x_quantizer: nn.Module
    z_quantizer: nn.Module
    q_quantizer: nn.Module  # without query_key, as is the next
    k_quantizer: nn.Module
    v_quantizer: nn.Module
    softmax_quantizer: nn.Module
    proj: nn.Linear
    attn_drop: nn.Module
    proj_drop: nn.Module
    norm: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    gate: nn.Module | None
    relative_position_bias_table: Tensor  # of Swin only, as is the next
    relative_position_index: Tensor

    def __init__(
        self,
        source: "TimmAttention",
        weight: Method | None = None,
        activation: Method | None = None,
        query_key: bool = False,
        factors: bool = True,
        fresh: bool = False,
        z_bias: Literal["channel", "head"] = "channel",
        softmax_step: Literal["head", "query"] = "head",
    ):
        super().__init__()
        self.settings = {"weight": weight, "activation": activation, "query_key": query_key, "factors": factors}
        options = {"z_bias": (z_bias, "channel"), "softmax_step": (softmax_step, "head")}
        self.settings |= {name: value for name, (value, default) in options.items() if value != default}
        factor = activation if factors else None
        self.num_heads, self.scale = source.num_heads, source.scale
        for name in ("proj", "attn_drop", "proj_drop", "norm", "q_norm", "k_norm", "gate"):
            child = getattr(source, name, None)
            self.add_module(name, nn.Identity() if child is None and name != "gate" else child)
        if hasattr(source, "relative_position_bias_table"):
            table, index = source.relative_position_bias_table, source.relative_position_index
            assert isinstance(table, Tensor) and isinstance(index, Tensor)
            self.relative_position_bias_table = table
            self.register_buffer("relative_position_index", index, persistent=False)
        width, heads = source.qkv.in_features, source.num_heads
        like, values = source.qkv.weight, len(source.qkv.weight) // 3
        if query_key:
            self._reparameterize(source, weight, activation)
            expect_(self.x_quantizer, (None, None, width), like)
        else:
            self.qkv = source.qkv
        widths = {"z": width, "v": values} if query_key else dict.fromkeys("qkv", values)
        add_factors_(self, factor, heads, widths, like, z_bias, softmax_step)
        if fresh:
            self._draw_again(query_key)

    def _reparameterize(self, source: "TimmAttention", weight: Method | None, activation: Method | None) -> None:
        parts = source.qkv.weight.detach().clone().chunk(3)
        wq, wk, wv = (part.requires_grad_(source.qkv.weight.requires_grad) for part in parts)
        width = source.qkv.in_features
        self.qk = query_key_layer(self.num_heads, wq, wk, weight)
        self.v = nn.Linear(width, len(wv), bias=source.qkv.bias is not None, device=wq.device, dtype=wq.dtype)
        with torch.no_grad():
            self.v.weight.copy_(wv).requires_grad_(wv.requires_grad)
            if self.v.bias is not None:
                self.v.bias.copy_(source.qkv.bias.chunk(3)[2]).requires_grad_(source.qkv.bias.requires_grad)
        quantize_weight_(self.v, weight)
        self.x_quantizer = operand(activation)
        if activation is not None:
            for layer in (self.qk, self.v):  # visible to code that counts bits, but not registered a second time
                layer.__dict__[INPUT] = self.x_quantizer

    def _draw_again(self, query_key: bool) -> None:
        for layer in (self.proj, *(() if query_key else (self.qkv,))):
            layer.reset_parameters()
        if hasattr(self, "relative_position_bias_table"):
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits before any mask, ``[B, heads, N, N]``, and values before quantization, ``[B, N, D]``."""
        batch, tokens, _ = x.shape
        if hasattr(self, "qk"):
            x = self.x_quantizer(x)
            z = self.z_quantizer(self.qk(x).view(batch, tokens, self.num_heads, x.shape[-1]))
            return (x[:, None] * self.scale) @ z.permute(0, 2, 3, 1), self.v(x)
        qkv = self.qkv(x)
        q, k, v = qkv.view(batch, tokens, 3, self.num_heads, qkv.shape[-1] // (3 * self.num_heads)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.q_quantizer(q.flatten(2)).view(q.shape), self.k_quantizer(k.flatten(2)).view(k.shape)
        return (q.transpose(1, 2) * self.scale) @ k.permute(0, 2, 3, 1), v.flatten(2)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """Compute timm's attention with quantized factors; the class describes shapes and masks."""
        from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask

        batch, tokens, _ = x.shape
        gate = None if self.gate is None else self.gate(x).sigmoid()
        attention, v = self.logits(x)
        attention = maybe_add_mask(attention, resolve_self_attn_mask(tokens, attention, attn_mask, is_causal))
        if hasattr(self, "relative_position_bias_table"):
            attention = self._add_positions(attention, mask)
        attention = self.attn_drop(self.softmax_quantizer(attention.softmax(-1)))
        v = self.v_quantizer(v).view(batch, tokens, self.num_heads, v.shape[-1] // self.num_heads).transpose(1, 2)
        y = self.norm((attention @ v).transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(y if gate is None else y * gate))

    def _add_positions(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Add Swin's relative position bias, and the mask that separates parts of a shifted window."""
        tokens = logits.shape[-1]
        table = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        logits = logits + table.view(tokens, tokens, -1).permute(2, 0, 1)
        if mask is None:
            return logits
        images = logits.shape[0] // mask.shape[0]  # not len(), which torch.export treats as a constant
        windows = logits.view(images, mask.shape[0], self.num_heads, tokens, tokens)
        return (windows + mask[None, :, None]).view(logits.shape)


def add_factors_(
    module: nn.Module,
    factor: Method | None,
    heads: int,
    widths: Mapping[str, int],
    like: Tensor,
    z_bias: Literal["channel", "head"],
    softmax_step: Literal["head", "query"],
) -> None:
    """Give ``module`` the quantizers of the factors of attention's products: of q and k or of z, of v and the softmax.

    Args:
        module: the module that computes the products.
        factor: the method, or None for full precision.
        heads: number of heads.
        widths: width of each factor ("q", "k", "z", "v"); "z" means query-key reparameterization.
        like: a tensor with the module's device and dtype.
        z_bias, softmax_step: as in `LowBitAttention`.
    """
    if "z" in widths:
        module.z_quantizer = operand(factor, bias_dims=(-2, -1) if z_bias == "head" else None)
        expect_(module.z_quantizer, (None, None, heads, widths["z"]), like)
    else:
        for name in "qk":
            quantizer = operand(factor)
            expect_(quantizer, (None, None, widths[name]), like)
            module.add_module(f"{name}_quantizer", quantizer)
    module.v_quantizer = operand(factor, token="channel")
    expect_(module.v_quantizer, (None, None, widths["v"]), like)
    by_token = getattr(factor, "granularity", None) == "token"
    step_dims = (-2,) if softmax_step == "query" and by_token else None
    module.softmax_quantizer = operand(factor, channel="tensor", signed=False, step_dims=step_dims)
    expect_(module.softmax_quantizer, (None, heads, None, None), like)


def operand(
    activation: Method | None,
    token: Granularity = "token",
    channel: Granularity = "channel",
    signed: bool | None = None,
    bias_dims: tuple[int, ...] | None = None,
    step_dims: tuple[int, ...] | None = None,
) -> nn.Module:
    """The quantizer of one factor in attention's products; the identity if ``activation`` is None.

    Args:
        activation: the method of the layers' inputs.
        token: the factor's LSQ granularity if that of ``activation`` is "token".
        channel: the factor's LSQ granularity if that of ``activation`` is "channel".
        signed: False for a factor that is never negative; LSQ then has no biases either.
        bias_dims, step_dims: arguments of `lowbit.quantizers.lsq.LSQActivation`; other methods ignore them.
    """
    if activation is None:
        return nn.Identity()
    if isinstance(activation, LSQ):
        given = activation.granularity
        shared = token if given == "token" else channel if given == "channel" else given
        activation = dataclasses.replace(activation, granularity=shared, signed=signed)
        if signed is False:
            activation = dataclasses.replace(activation, bias=False)
        return LSQActivation(activation, -1, bias_dims, step_dims)
    return activation.activation()


def expect_(quantizer: nn.Module, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Tell an `operand` the shape of its input (None for unknown sizes), and move it to the device of ``like``."""
    if isinstance(quantizer, ActivationQuantizer):
        quantizer.to(like.device, as_float(like).dtype)
        quantizer.expect_(shape)


def low_bit_attentions(model: nn.Module) -> dict[str, LowBitAttention]:
    """Every `LowBitAttention` of ``model``, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitAttention)}
