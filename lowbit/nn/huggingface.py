"""Models of Hugging Face's transformers: their attention with quantized products, and GPT-2's layers.

All attention of transformers hands queries, keys and values to a function that it looks up by name
(``AttentionInterface``). A quantized attention module gets the name of ours, in a copy of its configuration, and the
quantizers as a submodule; its class, its layers and their names stay.
"""

import copy
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.nn.attention import PRODUCTS, Projections
from lowbit.nn.calls import has_hooks, listed, with_first

INTERFACE = "lowbit"  # the name of our attention function

# Attention that projects one input by three linear layers and takes their products as they are: no rotation, no
# normalization between. Others have low-bit products too, but no query-key reparameterization.
REPARAMETERIZABLE = (
    "BertSelfAttention", "DeiTAttention", "ElectraSelfAttention", "RobertaSelfAttention", "SwinAttention",
    "ViTAttention", "ViTMAEAttention",
)  # fmt: skip

# Layers that usually stay in full precision beside the first and the last, by the family (``model.config.model_type``).
FULL_PRECISION: dict[str, tuple[str, ...]] = {
    "bert": ("*pooler.dense", "cls.*"),
    "deit": ("*pooler.dense", "*classifier"),
    "distilbert": ("*pre_classifier", "*vocab_transform"),
    "gpt2": ("*lm_head",),
    "llama": ("*lm_head",),
    "roberta": ("*pooler.dense", "*classifier.*", "*lm_head.*"),
    "swin": ("*downsample.reduction", "*classifier"),
    "vit": ("*pooler.dense", "*classifier"),
}


def family_filter(model: nn.Module) -> Callable[[nn.Module, str], bool]:
    """A ``filter_fn`` for `quantize_` by the family of a transformers model, with or without adapters of peft.

    It leaves in full precision what `FULL_PRECISION` lists, and the adapters of LoRA.

    Raises:
        LowbitError: the model has no configuration of a known family.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FULL_PRECISION:
        raise LowbitError(
            f"there is no filter for {type(model).__name__} (model_type {family!r}); there are "
            f"{', '.join(FULL_PRECISION)}: write a filter_fn(layer, name) of your own"
        )
    patterns = (*FULL_PRECISION[family], "*lora_*")
    return lambda layer, name: not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class Logits(nn.Module):
    """A classifier of transformers as a module that returns its logits alone, as `lowbit.train` expects.

    Args:
        model: the classifier; it takes one tensor, or named arguments.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits, float ``[N, K]``."""
        return self.model(*args, **kwargs).logits


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is an attention of transformers that looks up the function of its products."""
    if not type(module).__module__.startswith("transformers"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def projections_of(name: str, module: nn.Module) -> Projections:
    """How an attention of transformers makes its queries, keys and values.

    Args:
        name: the module's name, for the message.
        module: a module for which `is_attention` is true.

    Raises:
        LowbitError: it does not say how many heads it has, or of what size.
    """

    def first(*attributes: str) -> int | None:
        found = (getattr(module, attribute, None) for attribute in attributes)
        return next((value for value in found if isinstance(value, int)), None)

    names = next(
        (
            trio
            for trio in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
            if all(isinstance(getattr(module, part, None), nn.Module) for part in trio)
        ),
        None,
    )
    size = first("head_dim", "attention_head_size")
    heads = first("num_attention_heads", "num_heads", "n_heads")
    if heads is None and size and names:
        width = getattr(getattr(module, names[0]), "out_features", None)
        heads = None if width is None else width // size
    if not size or not heads:
        raise LowbitError(
            f"{name!r} is a {type(module).__name__} of transformers that does not tell its number and size of heads; "
            "use attention=False, qkr=False"
        )
    allowed = type(module).__name__ in REPARAMETERIZABLE
    return Projections(heads, size, first("num_key_value_groups") or 1, names if allowed else None)


def hand_over_(module: nn.Module, query_key: bool) -> None:
    """Make an attention of transformers use the `lowbit.nn.products.LowBitProducts` that it holds.

    Args:
        module: the attention module.
        query_key: whether its query and key layers are reparameterized, so that its input is quantized first.
    """
    _register()
    config: Any = copy.copy(module.config)
    config._attn_implementation = INTERFACE
    module.config = config
    if query_key:
        module.register_forward_pre_hook(_quantize_x, with_kwargs=True)


def conv1d_to_linear_(model: nn.Module) -> nn.Module:
    """Replace each ``Conv1D`` of transformers (GPT-2), a linear layer with a transposed weight, by a `torch.nn.Linear`.

    Results stay the same. The weights of a checkpoint in transformers' own layout must be loaded before.

    Returns:
        The same model.

    Raises:
        LowbitError: such a layer has hooks, which would be lost. The model is then unchanged.
    """
    if hooked := [name for name, module in model.named_modules() if is_conv1d(module) and has_hooks(module)]:
        raise LowbitError(
            f"Conv1D layers have hooks, which a torch.nn.Linear in their place would lose: {listed(hooked)}; remove "
            "them and register them again afterwards"
        )
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if is_conv1d(child):
                weight = child.get_parameter("weight")
                width, out = weight.shape
                layer = nn.Linear(width, out, device=weight.device, dtype=weight.dtype)
                layer.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
                layer.bias = child.get_parameter("bias")
                parent.add_module(name, layer.train(child.training))
    return model


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is GPT-2's linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _register() -> None:
    with extra("huggingface", "low-bit attention in a model of transformers"):
        from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE, low_bit_attention)


# Arguments that would change the result and that ours does not know; a sliding window is in the mask.
_UNKNOWN = ("head_mask", "position_bias", "s_aux", "softcap")


def low_bit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """The attention function of quantized modules, with the arguments of transformers' own.

    Args:
        module: the attention module, with `LowBitProducts`.
        query, key, value: float ``[B, heads, N, d]``.
        attention_mask: float or boolean ``[B, 1 or heads, N, M]``, or None.
        scaling: factor of the logits; None means 1/sqrt(d).
        dropout: share of attention weights that are dropped.
        is_causal: whether to mask later tokens if there is no mask; None asks the module.
        others: further arguments, which are for other functions.

    Returns:
        The result ``[B, N, heads, d]`` and the attention weights.

    Raises:
        LowbitError: the mask has another form, or an argument would change the result.
    """
    if wrong := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise LowbitError(
            f"low-bit attention does not know the argument {', '.join(wrong)} of {type(module).__name__}; use "
            "attention=False, qkr=False"
        )
    if attention_mask is not None and getattr(attention_mask, "ndim", None) != 4:
        raise LowbitError(
            f"low-bit attention takes masks of four dimensions, as attn_implementation='sdpa' and 'eager' make them, "
            f"not a {type(attention_mask).__name__}; load the model with one of these"
        )
    products: Any = module.get_submodule(PRODUCTS)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and attention_mask is None and query.shape[2] > 1:
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = ones.tril()
    q, k, v = (each.transpose(1, 2).flatten(2) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    y, weights = products(q, k, v, attention_mask, scale, dropout)
    return y.unflatten(-1, (products.heads, -1)), weights


def _quantize_x(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Quantize the input of a reparameterized attention, for all three of its layers."""
    return with_first(module, args, kwargs, module.get_submodule("x_quantizer"))
