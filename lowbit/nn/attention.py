"""Low-bit attention for timm's vision transformers, with or without query-key reparameterisation (QKR).

Liu, Liu and Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023, arXiv 2302.02210.
Which factor shares a quantisation step with what follows the authors' code.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LowbitError
from lowbit.nn.query_key import QueryKeyProduct
from lowbit.quantizers import LSQ, Method

INPUT = "input_quantizer"  # the name under which a layer holds the quantiser of its input


def is_attention(module: nn.Module) -> bool:
    """Whether `LowBitAttention` can take the place of ``module``: timm's Attention and Swin's WindowAttention."""
    from timm.layers.attention import Attention
    from timm.models.swin_transformer import WindowAttention

    return type(module) in (Attention, WindowAttention)


def check_reparameterizable(name: str, attention: nn.Module, weight: Method | None) -> None:
    """Refuses what QKR cannot be applied to; ``attention`` is one of `is_attention`, called ``name`` in the message."""
    for norm in ("q_norm", "k_norm"):
        if not isinstance(getattr(attention, norm, nn.Identity()), nn.Identity):
            raise LowbitError(
                f"qkr=True is not possible for {name!r}: it normalises queries and keys ({norm}), so that its logits "
                "are no longer a product of the input with one matrix; use qkr=False"
            )
    if weight is not None and not isinstance(weight.weight(torch.ones(2, 2)).right_inverse(torch.ones(2, 2)), Tensor):
        raise LowbitError(
            f"qkr=True is not possible with {weight!r}: the product of query and key weights takes the place of the "
            "method's latent, and this method has several; StatsQ and LSQ have one"
        )


class LowBitAttention(nn.Module):
    """Self-attention whose own products have quantised factors; takes the place of one of `is_attention`.

    Without QKR queries, keys, values and the softmax's output are quantised: ``q̂·k̂ᵀ`` and ``â·v̂``. With it the logits
    are ``x̂·ẑᵀ/sqrt(d)``, ``ẑ`` the quantised ``x̂·M̂ᵀ`` and ``M̂`` the quantised ``WqᵀWk`` of each head (see
    `QueryKeyProduct`); ``x̂`` is quantised once for all; biases of queries and keys are dropped.

    Steps are shared as ``activation`` says. For LSQ with granularity "token", as published: one step for each token
    (queries, keys), token and head (z), query and head (softmax), channel (values); "channel": one for each channel,
    one for the softmax; "tensor": one each. The softmax's output is unsigned and has no biases.

    Children keep the names that they have in timm, so checkpoints fit: ``qkv`` (or ``qk`` and ``v``) and ``proj``.

    Args:
        source: the attention to replace. Its layers and parameters are moved, not copied.
        weight: with ``query_key`` the method for ``qk`` and ``v``; ``qkv`` and ``proj`` are left to `quantize_`.
        activation: the method for the factors and, with ``query_key``, for the input x; None leaves them as they are.
        query_key: reparameterise.
        factors: False quantises the input x only.
        fresh: draw ``proj``, ``qkv`` without QKR, and Swin's table of relative positions anew, as the released code
            does, instead of keeping the pre-trained ones.

    Shapes:
        ``[B, N, C]`` in and out; for Swin B counts windows. ``attn_mask`` as in timm; ``mask`` is Swin's.
    """

    def __init__(
        self,
        source: nn.Module,
        weight: Method | None = None,
        activation: Method | None = None,
        query_key: bool = False,
        factors: bool = True,
        fresh: bool = False,
    ):
        super().__init__()
        self.settings = {"weight": weight, "activation": activation, "query_key": query_key, "factors": factors}
        factor = activation if factors else None
        self.num_heads, self.scale = source.num_heads, source.scale
        for name in ("proj", "attn_drop", "proj_drop", "norm", "q_norm", "k_norm", "gate"):
            child = getattr(source, name, None)
            self.add_module(name, nn.Identity() if child is None and name != "gate" else child)
        if hasattr(source, "relative_position_bias_table"):
            self.relative_position_bias_table = source.relative_position_bias_table
            self.register_buffer("relative_position_index", source.relative_position_index, persistent=False)
        if query_key:
            self._reparameterize(source, weight, activation)
            self.z_quantizer = operand(factor)
        else:
            self.qkv = source.qkv
            self.q_quantizer, self.k_quantizer = operand(factor), operand(factor)
        self.v_quantizer = operand(factor, token="channel")
        self.softmax_quantizer = operand(factor, channel="tensor", signed=False)
        if fresh:
            self._draw_again(query_key)

    def _reparameterize(self, source: nn.Module, weight: Method | None, activation: Method | None) -> None:
        wq, wk, wv = source.qkv.weight.detach().clone().chunk(3)
        width = source.qkv.in_features
        like = {"device": wq.device, "dtype": wq.dtype}
        self.qk = nn.Linear(width, self.num_heads * width, bias=False, **like)
        product = QueryKeyProduct(self.num_heads, wq, wk, weight)
        parametrize.register_parametrization(self.qk, "weight", product)
        self.v = nn.Linear(width, len(wv), bias=source.qkv.bias is not None, **like)
        with torch.no_grad():
            self.v.weight.copy_(wv)
            if self.v.bias is not None:
                self.v.bias.copy_(source.qkv.bias.chunk(3)[2])
        if weight is not None:
            parametrize.register_parametrization(self.v, "weight", weight.weight(wv))
        self.x_quantizer = operand(activation)
        if activation is not None:
            for layer in (self.qk, self.v):  # told to whoever counts their bits, but not registered a second time
                layer.__dict__[INPUT] = self.x_quantizer

    def _draw_again(self, query_key: bool) -> None:
        for layer in (self.proj, *(() if query_key else (self.qkv,))):
            layer.reset_parameters()
        if hasattr(self, "relative_position_bias_table"):
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits before any mask, ``[B, heads, N, N]``, and the values before quantisation, ``[B, N, D]``."""
        batch, tokens, _ = x.shape
        if hasattr(self, "qk"):
            x = self.x_quantizer(x)
            z = self.z_quantizer(self.qk(x).view(batch, tokens, self.num_heads, -1))
            return (x[:, None] * self.scale) @ z.permute(0, 2, 3, 1), self.v(x)
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.q_quantizer(q.flatten(2)).view(q.shape), self.k_quantizer(k.flatten(2)).view(k.shape)
        return (q.transpose(1, 2) * self.scale) @ k.permute(0, 2, 3, 1), v.flatten(2)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """What timm's attention computes, with quantised factors; see the class."""
        from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask

        batch, tokens, _ = x.shape
        gate = None if self.gate is None else self.gate(x).sigmoid()
        attention, v = self.logits(x)
        attention = maybe_add_mask(attention, resolve_self_attn_mask(tokens, attention, attn_mask, is_causal))
        if hasattr(self, "relative_position_bias_table"):
            attention = self._add_positions(attention, mask)
        attention = self.attn_drop(self.softmax_quantizer(attention.softmax(-1)))
        v = self.v_quantizer(v).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        y = self.norm((attention @ v).transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(y if gate is None else y * gate))

    def _add_positions(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Swin's bias of each pair of places in a window, and the mask between parts that were rolled together."""
        tokens = logits.shape[-1]
        table = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        logits = logits + table.view(tokens, tokens, -1).permute(2, 0, 1)
        if mask is None:
            return logits
        windows = logits.view(-1, mask.shape[0], self.num_heads, tokens, tokens)
        return (windows + mask[None, :, None]).view(logits.shape)


def operand(
    activation: Method | None, token: str = "token", channel: str = "channel", signed: bool | None = None
) -> nn.Module:
    """The quantiser of a factor of attention's products; the identity if ``activation`` is None.

    Args:
        activation: the method of the layers' inputs.
        token: LSQ's granularity here where that of ``activation`` is "token".
        channel: the same where it is "channel".
        signed: False for a factor that is never negative; LSQ then also goes without its biases.
    """
    if activation is None:
        return nn.Identity()
    if isinstance(activation, LSQ):
        shared = {"token": token, "channel": channel}.get(activation.granularity, activation.granularity)
        activation = dataclasses.replace(activation, granularity=shared, signed=signed)
        if signed is False:
            activation = dataclasses.replace(activation, bias=False)
    return activation.activation()


def low_bit_attentions(model: nn.Module) -> dict[str, LowBitAttention]:
    """Every `LowBitAttention` of ``model`` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitAttention)}
