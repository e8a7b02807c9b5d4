"""The cost of a model: bits, multiply-accumulates (MACs) and what replaces them, bytes shipped, training memory.

Counting conventions, which are those of fvcore where it has one:

- one MAC is one multiplication with its addition, for one sample; only matrix products and convolutions count: not
  biases, normalization, activation functions, softmax, pooling, nor the quantization of activations;
- attention's own products (logits, and their product with the values) are one row, "(other matrix products)": float
  multiplications, or integer ones where `quantize_` quantized both factors (``attention=True``);
- with query-key reparameterization the product of query and key weights counts as one layer, as it is shipped;
- a MAC whose weight is one of several powers of two (times a common factor) is a shift and an addition; with at most
  one size for each sign it is an addition; otherwise it stays a multiplication, of integers if the layer's input is
  quantized too. Zeros are not skipped, and 2^0 counts as a shift;
- scaling a finished sum is counted separately, one multiplication per output unless the scale is a power of two; it can
  usually be folded into the next operation.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.metrics.layers import parametrization_of, weight_of
from lowbit.nn.attention import low_bit_attentions
from lowbit.nn.calls import copied
from lowbit.nn.convert import QUANTIZABLE, QuantizedLayer, quantized_layers
from lowbit.nn.products import low_bit_products
from lowbit.nn.query_key import QueryKeyProduct
from lowbit.quantizers import ActivationQuantizer

if TYPE_CHECKING:
    import pandas

STATES = {"sgd": 1, "adamw": 2, "radam": 2}
"""State values per trained parameter: one for SGD (its momentum), two for the Adam family (its moments)."""

OTHER, REST = "(other matrix products)", "(rest)"
FLOAT_BITS = 32


def cost(model: nn.Module, input_shape: Sequence[int]) -> "pandas.DataFrame":
    """Count the cost of each linear and convolution layer, with two rows for everything else.

    Columns: layer, kind, weights; weight_bits, ``ceil(log2(levels))``, and activation_bits (32 is full precision); macs
    and the operations they consist of: float_multiplications, integer_multiplications, shifts, additions;
    scale_multiplications; bytes as shipped (packed codes, and 32 bits for each scale of a method that has one);
    full_precision_bytes. The row "(rest)" holds all other parameters and running statistics, 32 bits each. The
    conventions of counting are those of this module.

    Args:
        model: quantized or not; it is copied, not changed.
        input_shape: shape of one sample without the batch dimension, e.g. (3, 32, 32).

    Raises:
        LowbitError: the model does not take an input of this shape.
    """
    with extra("train", "the table of costs"):
        import pandas

    macs = _macs(model, input_shape)
    rows = [_layer_row(layer, macs.get(layer.name, 0)) for layer in _layers(model)]
    other = macs[""] - sum(row["macs"] for row in rows)
    inside = {name: [row["macs"] for row in rows if row["layer"].startswith(f"{name}.")] for name in _integer(model)}
    integer = sum(macs.get(name, 0) - sum(layers) for name, layers in inside.items())
    if other:
        products = {"float_multiplications": other - integer, "integer_multiplications": integer}
        rows.append({"layer": OTHER, "kind": "matmul", "macs": other, **products})
    shipped, original = _rest(model)
    rows.append(
        {"layer": REST, "kind": "rest", "weights": shipped, "weight_bits": FLOAT_BITS, "bytes": 4 * shipped}
        | {"full_precision_bytes": 4 * original}
    )
    columns = [
        *("layer", "kind", "weights", "weight_bits", "activation_bits", "macs", "float_multiplications"),
        *("integer_multiplications", "shifts", "additions", "scale_multiplications", "bytes", "full_precision_bytes"),
    ]
    frame = pandas.DataFrame(rows, columns=columns)
    numbers = columns[2:]
    frame[numbers] = frame[numbers].fillna(0).astype("int64")
    frame["additions"] = frame["macs"]
    return frame


def totals(frame: "pandas.DataFrame") -> dict[str, int | float]:
    """Sums over the rows of `cost`, and ``compression``: full-precision bytes over bytes as shipped."""
    sums = frame.drop(columns=["layer", "kind", "weight_bits", "activation_bits"]).sum()
    result: dict[str, int | float] = {name: int(value) for name, value in sums.items()}
    result["compression"] = result["full_precision_bytes"] / result["bytes"]
    return result


def training_memory(model: nn.Module, optimizer: Literal["sgd", "adamw", "radam"] = "adamw") -> "pandas.DataFrame":
    """Bytes that training keeps for the parameters of each layer, without activations.

    Columns: layer, weights, latents (tensors per weight: 2, 4 or 8 for DenseShift), parameter_bytes (latents, and the
    weight quantizer's own parameters), gradient_bytes, state_bytes, bytes (their sum), full_precision_bytes (that sum
    for the layer unquantized) and ratio. The last row, "(rest)", holds all other parameters.

    Args:
        model: quantized or not.
        optimizer: "sgd" (with momentum) keeps one state value per trained parameter, "adamw" and "radam" two.

    Raises:
        LowbitError: an unknown optimizer.
    """
    with extra("train", "the table of costs"):
        import pandas

    if optimizer not in STATES:
        raise LowbitError(f"optimizer={optimizer!r} is not allowed; {', '.join(map(repr, STATES))} are")
    states = STATES[optimizer]

    def row(name: str, latents: int, parameters: Sequence[Tensor], original: Sequence[Tensor]) -> dict[str, Any]:
        held, trained, full, full_trained = (
            sum(p.nbytes for p in some if p.requires_grad or not only_trained)
            for some in (parameters, original)
            for only_trained in (False, True)
        )
        return {
            "layer": name,
            "weights": sum(p.numel() for p in original),
            "latents": latents,
            "parameter_bytes": held,
            "gradient_bytes": trained,
            "state_bytes": states * trained,
            "bytes": held + (1 + states) * trained,
            "full_precision_bytes": full + (1 + states) * full_trained,
        }

    rows: list[dict[str, Any]] = []
    seen: set[int] = set()
    for found in _layers(model):
        quantized = found.weight is not None
        parameters = list(parametrization_of(found.layer).parameters()) if quantized else list(found.latents)
        seen |= {id(p) for p in parameters}
        rows.append(row(found.name, len(found.latents), parameters, [found.latents[0]]))
    steps = {id(p) for found in quantized_layers(model) if found.activation for p in found.activation.parameters()}
    rest = [p for p in model.parameters() if id(p) not in seen]
    rows.append(row(REST, 1, rest, [p for p in rest if id(p) not in steps]))
    frame = pandas.DataFrame(rows)
    return frame.assign(ratio=frame.bytes / frame.full_precision_bytes)


def _layers(model: nn.Module) -> Iterator[QuantizedLayer]:
    """Every linear and convolution layer in order, quantized or not."""
    quantized = {found.name: found for found in quantized_layers(model)}
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZABLE):
            yield quantized.get(name) or QuantizedLayer(name, module, None, None)


def _macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """MACs of one sample by module name, including those of the modules inside; "" is the whole model."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # A copy, since a first forward pass calibrates activation quantizers and changes running statistics.
    own = copied(model).eval()
    x = torch.zeros(1, *input_shape, device=getattr(next(own.parameters(), None), "device", None))
    counter = FlopCounterMode(display=False)
    # Attention as plain matrix products, and with gradients, which keeps torch.nn.MultiheadAttention off its fast path:
    # the counter does not know the fused forms.
    with counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        try:
            own(x)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LowbitError(
                f"{type(model).__name__} does not take an input of shape {list(x.shape)} ({reason}); give the shape "
                "of one sample, without the batch, e.g. (3, 32, 32)"
            ) from error
    root = type(own).__name__
    counted = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    macs = {"": counted["Global"]} | {name.removeprefix(f"{root}."): n for name, n in counted.items() if name != root}
    # The product of query and key weights is computed once, not for each sample.
    for layer in quantized_layers(model):
        if isinstance(layer.weight, QueryKeyProduct):
            parts = layer.name.split(".")
            for name in (".".join(parts[:i]) for i in range(len(parts) + 1)):
                macs[name] -= layer.latents[0].numel() * layer.latents[0].shape[1]
    return macs


def _integer(model: nn.Module) -> list[str]:
    """Names of the attentions whose own products have quantized factors."""
    attentions = (*low_bit_attentions(model).items(), *low_bit_products(model).items())
    return [name for name, attention in attentions if isinstance(attention.softmax_quantizer, ActivationQuantizer)]


def _layer_row(found: QuantizedLayer, macs: int) -> dict[str, Any]:
    weight, quantizer = weight_of(found.layer).detach(), found.weight
    row: dict[str, Any] = {
        "layer": found.name,
        "kind": parametrize.type_before_parametrizations(found.layer).__name__,
        "weights": weight.numel(),
        "weight_bits": FLOAT_BITS if quantizer is None else code_bits(quantizer.levels),
        "activation_bits": FLOAT_BITS if found.activation is None else code_bits(found.activation.levels),
        "macs": macs,
        "full_precision_bytes": 4 * weight.numel(),
    }
    if quantizer is None:
        return row | {"float_multiplications": macs, "bytes": 4 * weight.numel()}
    scale = quantizer.scale(*found.latents)
    stored = 4 * scale.numel() if quantizer.has_scale else 0
    row["bytes"] = math.ceil(weight.numel() * row["weight_bits"] / 8) + stored
    if not _powers_of_two(scale):
        row["scale_multiplications"] = macs * len(weight) // weight.numel()  # one for each output
    product = kind_of_product(quantizer.levels)
    if product == "shift":
        row["shifts"] = macs
    elif product == "multiplication":
        row[f"{'float' if found.activation is None else 'integer'}_multiplications"] = macs
    return row


def _rest(model: nn.Module) -> tuple[int, int]:
    """Count of floating-point numbers outside the weights of `_layers`: as shipped, and in the unquantized model."""
    weights = {id(t) for found in _layers(model) for t in found.latents}
    saved = model.state_dict().keys()
    held = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in saved)]
    counts = {
        name: tensor.numel()
        for name, tensor in held
        if tensor.is_floating_point() and id(tensor) not in weights and ".parametrizations." not in f".{name}"
    }
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    own = {id(t) for q in quantizers for t in q.parameters()}
    steps = [counts[name] for name, tensor in held if id(tensor) in own and name in counts]
    return sum(counts.values()), sum(counts.values()) - sum(steps)


def code_bits(levels: Tensor) -> int:
    """Bits needed to distinguish the levels: ``ceil(log2(L))``, at least 1."""
    return max(1, math.ceil(math.log2(len(levels))))


def kind_of_product(levels: Tensor) -> Literal["addition", "shift", "multiplication"]:
    """The operation that replaces a multiplication by one of ``levels``, up to a common factor."""
    if (levels > 0).sum() <= 1 and (levels < 0).sum() <= 1:
        return "addition"  # sums of the inputs with each sign
    sizes = levels[levels != 0].abs()
    return "shift" if _powers_of_two(sizes / sizes.min()) else "multiplication"


def _powers_of_two(values: Tensor) -> bool:
    return bool((torch.frexp(values.detach())[0] == 0.5).all())
