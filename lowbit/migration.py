"""Read checkpoints that the papers' own programs have written into models of lowbit, to evaluate, pack and deploy them.

Layouts, as the published code names its tensors:

- "ofq": https://github.com/nbasyl/OFQ, ViT, DeiT (distilled or not) and Swin, with and without query-key
  reparameterization
- "denseshift", "s3": https://github.com/xinlinli170/noah-research (S3-Training), 3-bit residual networks: files of a
  training, which hold latents, and files as published with S3, which hold the levels 0, ±1, ±2 and ±4 themselves

OFQ's Swin computes what timm's does, under torchvision's names (``features.1.0.attn``). It is quantized like OFQ's
DeiT, with steps for each token of a window in attention. Three things differ:

- The other layers of a block, and those that merge patches, see maps ``[B, H, W, C]``. OFQ's quantizer then has one
  step for each column, which all rows share. lowbit has one for each place; each place gets the step of its column.
- OFQ's linear layers always have a bias. So those that merge patches have one here, which timm's do not have.
- The index of relative positions is stored. It follows from the size of the window and is not read.
"""

import argparse
import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError, LowbitError
from lowbit.nn.calls import copied, listed
from lowbit.nn.config import QuantConfig
from lowbit.nn.convert import calibrate, method_of, quantized_layers
from lowbit.quantizers.lsq import LSQ
from lowbit.quantizers.statsq import StatsQ

# What each layout calls a tensor, as a pattern, and what lowbit calls it; "" for tensors that nothing reads. The first
# pattern that matches counts.
_BIASES = (("b4", "bias_in"), ("aft", "bias_out"))
_OFQ: tuple[tuple[str, str], ...] = (
    (r"(.*\.)?(statsq_fn|qk_quant|v_quant)\.clip_val", ""),
    (r"(.*\.attn)\.q\.weight", r"\1.qk.parametrizations.weight.original0"),
    (r"(.*\.attn)\.k\.weight", r"\1.qk.parametrizations.weight.original1"),
    (r"(.*\.attn)\.quant_x_4_qkv\.input_quant_fn\.s", r"\1.x_quantizer.step"),
    *((rf"(.*\.attn)\.quant_x_4_qkv\.move_{a}\.bias", rf"\1.x_quantizer.{b}") for a, b in _BIASES),
    (r"(.*\.attn)\.quan_a_qkx_fn\.s", r"\1.z_quantizer.step"),
    *((rf"(.*\.attn)\.move_qkx_{a}\.bias", rf"\1.z_quantizer.{b}") for a, b in _BIASES),
    (r"(.*\.attn)\.quan_a_(q|k|v|softmax)_fn\.s", r"\1.\2_quantizer.step"),
    *((rf"(.*\.attn)\.move_(q|k|v)_{a}\.bias", rf"\1.\2_quantizer.{b}") for a, b in _BIASES),
    (r"(.*)\.input_quant_fn\.s", r"\1.input_quantizer.step"),
    *((rf"(.*)\.move_{a}\.bias", rf"\1.input_quantizer.{b}") for a, b in _BIASES),
    (r"(.*)\.input_quant_fn\.signed", r"\1.input_quantizer._extra_state"),
    (r"(.*)\.lsqw_fn\.s", r"\1.parametrizations.weight.0.step"),
    (r"(.*\.attn)\.relative_position_index", ""),
)
_OFQ_SMALLEST_STEP = 1e-5  # what OFQ's program computes with if a learned step is smaller or negative
_DENSESHIFT = (
    (r"(.*)\.weight_sign", r"\1.parametrizations.weight.original0"),
    (r"(.*)\.weight_t([123])", r"\1.parametrizations.weight.original\2"),
)
_S3 = (
    (r"(.*)\.weight_sign", r"\1.parametrizations.weight.original0"),
    (r"(.*)\.weight_val", r"\1.parametrizations.weight.original1"),
    (r"(.*)\.weight_shift", r"\1.parametrizations.weight.original2"),
    (r"(.*)\.weight_shift2", r"\1.parametrizations.weight.original3"),
)
_LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {"ofq": _OFQ, "denseshift": _DENSESHIFT, "s3": _S3}


def ofq_config(bits: int, qkr: bool = True) -> QuantConfig:
    """How OFQ's program quantizes a ViT, a DeiT or a Swin: the configuration for timm's models.

    Args:
        bits: bit width of weights and activations.
        qkr: whether the run had query-key reparameterization.
    """
    return QuantConfig(
        StatsQ(bits=bits),
        LSQ(bits=bits, granularity="token", bias=True, signed=True),
        first_last=8,
        unsigned=("*.fc2",),
        attention=True,
        qkr=qkr,
        z_bias="head" if qkr else "channel",
        softmax_step="query",
        end_bias=True,
    )


def load_published_(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    layout: Literal["ofq", "denseshift", "s3"],
    example: Tensor | None = None,
) -> nn.Module:
    """Put the tensors of a published program's checkpoint into a quantized model, in place.

    Args:
        model: quantized by `lowbit.quantize_` as the checkpoint was: by `ofq_config`, ``DenseShift(bits=3)`` or
            ``S3(bits=3)``, with layers that have the names of the checkpoint's (timm's ViT and DeiT, torchvision's and
            timm's ResNet), or timm's Swin. The networks that OFQ publishes are timm's
            ``deit_tiny_distilled_patch16_224``, ``deit_small_distilled_patch16_224`` and
            ``swin_tiny_patch4_window7_224``. The layers that merge a Swin's patches (``downsample.reduction``) get the
            bias that OFQ's have. A file that `lowbit.save` writes of the packed model fits timm's Swin; one of the
            model before packing fits only a Swin with these biases.
        source: the file, or the tensors by name. Nothing in a file is run; only tensors and plain data are read.
        layout: whose program wrote it.
        example: a batch of images, which tells the number of tokens; needed by "ofq".

    Returns:
        The same model, in evaluation mode.

    Raises:
        CheckpointError: the file cannot be read, its tensors are not those of the model, a weight without latents
            holds other values than the method's levels, or the command line that OFQ's program stores in a file tells
            of other bit widths; the message names them. The model is then unchanged.
        LowbitError: the layout is unknown, or ``example`` is missing.
    """
    if layout not in _LAYOUTS:
        raise LowbitError(f"layout={layout!r} is not allowed; {', '.join(_LAYOUTS)} are")
    if layout == "ofq" and example is None:
        raise LowbitError("layout='ofq' needs example=..., a batch of images: its steps belong to single tokens")
    given, args = _read(source) if isinstance(source, str | Path) else (dict(source), None)
    given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    if layout == "ofq":
        _check_bits(model, args)
    _latents_for_levels_(given, model)
    fitted = copied(model)  # on a copy first, so that an error leaves the model as it was
    _complete_(fitted, given, example)
    own = fitted.state_dict()
    found, unused = _translated(given, own, layout)
    missing = [name for name in own if name not in found]
    if unused or missing:
        raise CheckpointError(
            f"this is no checkpoint of layout {layout!r} for this model: "
            + "; ".join(
                f"{what} {listed(names)}"
                for what, names in (("it lacks", missing), ("the model has no place for", unused))
                if names
            )
        )
    for name, tensor in found.items():
        if tensor.numel() != own[name].numel():
            raise CheckpointError(
                f"{name!r} is {list(tensor.shape)} in the file; the model needs {list(own[name].shape)}"
            )
        found[name] = tensor.reshape(own[name].shape).to(own[name].dtype)
        if layout == "ofq" and name.endswith(".step"):
            found[name] = found[name].clamp_min(_OFQ_SMALLEST_STEP)
    _complete_(model, given, example)
    model.load_state_dict(found)
    return model.eval()


def _check_bits(model: nn.Module, args: Any) -> None:
    """Refuse a model of other bit widths than the run of OFQ's program whose parsed command line is ``args``."""
    ran = getattr(args, "wq_bitw", None), getattr(args, "aq_bitw", None)
    # With a quantized teacher, the program has overwritten both by the teacher's.
    if not all(isinstance(bits, int) for bits in ran) or getattr(args, "quant_teacher", False):
        return
    for layer in quantized_layers(model):
        weight, activation = method_of(layer.weight), method_of(layer.activation)
        if isinstance(weight, StatsQ) and isinstance(activation, LSQ) and (weight.bits, activation.bits) != ran:
            raise CheckpointError(
                f"the run that wrote this file had weights of {ran[0]} bits and activations of {ran[1]} (wq_bitw, "
                f"aq_bitw); layer {layer.name!r} of the model has {weight.bits} and {activation.bits}: quantize a new "
                "model with the widths of the run"
            )


def _complete_(model: nn.Module, given: Mapping[str, Tensor], example: Tensor | None) -> None:
    """Give ``model`` its steps, from ``example``, and the biases that only OFQ's Swin has, where patches are merged."""
    biases = [_name_in_timm(name) for name in given if re.fullmatch(r"features\.[0-9]+\.reduction\.bias", name)]
    for name, layer in model.named_modules():
        if f"{name}.bias" in biases and isinstance(layer, nn.Linear) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
    if example is not None:
        calibrate(model, example)


def _latents_for_levels_(given: dict[str, Tensor], model: nn.Module) -> None:
    """Replace weights that are levels of a method with several latents, in place, by latents that give these levels."""
    for layer in quantized_layers(model):
        # A copy: `right_inverse` may set a quantizer's state, and the model is not to change yet.
        name, quantizer = f"{layer.name}.weight", copy.deepcopy(layer.weight)
        if quantizer is None or len(layer.latents) < 2 or name not in given or f"{name}_sign" in given:
            continue
        weight = given.pop(name).to(layer.latents[0].dtype)
        latents = quantizer.right_inverse(weight)
        if not torch.equal(quantizer(*latents), weight):
            raise CheckpointError(
                f"{name!r} has neither latents in the file nor the values of levels alone: "
                f"{method_of(quantizer)!r} takes {', '.join(f'{level:g}' for level in quantizer.levels)}"
            )
        given |= {f"{layer.name}.parametrizations.weight.original{i}": latent for i, latent in enumerate(latents)}


def _translated(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], layout: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The given tensors under lowbit's names, and the names of those that have no place."""
    found, unused = {}, []
    swin = layout == "ofq" and any(name.startswith("features.") for name in given)
    for name, tensor in given.items():
        if name.endswith(".weight") and f"{name}_sign" in given:
            continue  # the same tensor under two names
        old = _name_in_timm(name) if swin else name
        if old.endswith(".attn.move_qkv_b4.bias"):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found[old.replace("move_qkv_b4.bias", f"{part}_quantizer.bias_in")] = third
            continue
        new = _renamed(old, layout)
        latent = f"{new.removesuffix('.weight')}.parametrizations.weight.original"
        if new.endswith(".weight") and new not in own and latent in own:
            new = latent
        if new in own:
            size, by_column = tensor.numel(), swin and new.endswith(".input_quantizer.step") and ".attn." not in new
            # The steps of a square map's columns, once for each of its rows.
            found[new] = tensor.flatten().repeat(size) if by_column and size**2 == own[new].numel() else tensor
        elif new:
            unused.append(name)
    # What a quantizer knows of its input's sign is not stored, except for images.
    for name, tensor in own.items():
        if name.endswith("._extra_state"):
            found.setdefault(name, tensor)
    return found, unused


def _name_in_timm(name: str) -> str:
    """timm's name of a tensor of torchvision's Swin, whose stages and patch mergings are one numbered sequence."""
    if name.startswith("head."):
        return f"head.fc.{name.removeprefix('head.')}"
    match = re.fullmatch(r"features\.([0-9]{1,3})\.(.+)", name)
    if match is None:
        return name
    index, rest = int(match[1]), match[2]
    if index == 0:
        part, _, rest = rest.partition(".")
        return f"patch_embed.{'proj' if part == '0' else 'norm' if part == '2' else part}.{rest}"
    return f"layers.{index // 2}.{'blocks' if index % 2 else 'downsample'}.{rest}"


def _renamed(name: str, layout: str) -> str:
    for pattern, new in _LAYOUTS[layout]:
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return name


def _read(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file that torch.save has written, and the training's command line, or None.

    Of a training's state, the tensors are the averaged model's if it has one.
    """
    try:
        # timm's trainer stores its command line, an object without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises for a file that is none, or that holds other objects
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as tensors and plain data: {first:.200}") from None
    args = content.get("args") if isinstance(content, dict) else None
    for key in ("state_dict_ema", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(f"{path} holds no tensors by name")
    return content, args
