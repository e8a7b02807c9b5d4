"""Try every family of models of timm and torchvision: quantize, one training step, pack, save and load, plan.

    python tools/sweep_models.py                    # all; results/models.md
    python tools/sweep_models.py levit_128 vit_b_32 # these alone, printed

Weights are random, images small, and the weights of a model are quantized to 4 bits, inputs to 8. A refusal is a
`LowbitError`; anything else that is raised counts as a failure.
"""

import argparse
import copy
import datetime
import gc
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn import quantized_layers
from lowbit.nn.attention import is_attention, low_bit_attentions
from lowbit.nn.packed import PackedLayer, is_stored
from lowbit.nn.products import low_bit_products
from lowbit.quantizers import LSQ, StatsQ

# The smallest model, or nearly, of every module of timm whose smallest has at most 60 million weights, and of
# torchvision's families of classifiers.
MODELS = Path(__file__).with_suffix(".txt")
TABLE = Path(__file__).resolve().parent.parent / "results" / "models.md"

PIXELS = (64, 96, 128, 224, 240, 256)
CLASSES = 10
BATCHES = 5
QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)

HEAD = """# Models of timm and torchvision

Written by `python tools/sweep_models.py` on {date}, with torch {torch}, timm {timm}, torchvision {torchvision}: random
weights, two random images, 4-bit weights (StatsQ), 8-bit inputs (LSQ), 8 bits in the first and last layer, attention's
products quantized where lowbit knows the attention. Parameters that start at zero get random values, so that the answer
depends on the image.

- share: of the model's parameters that became low-bit weights
- attention: how many have quantized products
- untrained: quantized layers whose latents get no gradient
- packed: layers that run on integers; codes: layers stored as integers that compute with floats
- plan: whether `lowbit.plan` takes the packed model, so that it runs in C; its answers are compared like the others
- answers: distance of the packed model's output from the quantized one's, as a share of its norm; the smallest over
  five batches, because the sums of both differ in their last bits, so that a value at the border of two steps may be
  rounded to the other one, and layers without training amplify that
- rounding: the same for the quantized model in float64. A packed model whose distance is above a millionth and more
  than ten times as large counts as a failure, and so does a restored file that does not give the same bits

{counts}

"""
COLUMNS = (
    "model", "px", "parameters", "share", "attention", "untrained", "packed", "codes", "answers", "rounding", "outcome",
    "plan", "seconds",
)  # fmt: skip


@dataclass
class Row:
    """One model: what `sweep` found.

    Attributes:
        model: its name, with its library.
        outcome: "works", or which step refused or failed, with the first line of the message.
        values: the other columns.
    """

    model: str
    outcome: str
    values: dict[str, str]


def build(library: str, name: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights, and two images of the smallest size that it takes."""
    reason: Exception | None = None
    for pixels in PIXELS:
        try:
            torch.manual_seed(0)
            if library == "timm":
                size = timm.get_pretrained_cfg(name)
                fixed = size is not None and size.fixed_input_size
                model = timm.create_model(name, num_classes=CLASSES, **({"img_size": pixels} if fixed else {}))
            else:
                sized = {"image_size": pixels} if name.startswith("vit") else {}
                sized |= {"input_size": (pixels, pixels)} if name.startswith("maxvit") else {}
                sized |= {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
                model = torchvision.models.get_model(name, num_classes=CLASSES, **sized)
            x = torch.randn(2, 3, pixels, pixels)
            wake_(model)
            model.train()(x)
            with torch.no_grad():
                model.eval()(x)
            return model, x
        except Exception as error:  # whatever the library raises for a size that it does not take
            reason = error
    raise RuntimeError(f"takes none of {PIXELS} pixels: {reason!s:.100}")


@torch.no_grad()
def wake_(model: nn.Module) -> None:
    """Make the answers depend on the image, before any training.

    Parameters that start at zero, or nearly, get other values, and BatchNorm takes its statistics from the last batch.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-2:
            parameter.normal_(std=0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)


def quantize(model: nn.Module) -> None:
    """Quantize as the table's head says; the attention where there is one that can be."""
    known = any(is_attention(m) or isinstance(m, nn.MultiheadAttention) for m in model.modules())
    config = lowbit.QuantConfig(StatsQ(bits=4), LSQ(bits=8), first_last=8, attention=known)
    lowbit.quantize_(model, config)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of the expected norm."""
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def batches(x: Tensor) -> Iterator[Tensor]:
    """Random images of the shape of ``x``, `BATCHES` times; ``x`` first."""
    yield x
    for seed in range(1, BATCHES):
        yield torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def compare(model: nn.Module, packed: nn.Module, x: Tensor) -> tuple[float, float]:
    """The smallest distances over `batches` of the packed model's answers, and of those in float64.

    Raises:
        RuntimeError: the answers do not depend on the image, or differ by more than rounding explains.
    """
    double = copy.deepcopy(model).double()
    apart, rounding = [], []
    for images in batches(x):
        expected = model(images)
        apart.append(distance(packed(images), expected))
        rounding.append(distance(double(images.double()).float(), expected))
        if distance(expected[:1], expected[1:]) < 1e-2:
            raise RuntimeError("both images have the same answer, so that answers say nothing")
    check(min(apart), min(rounding), "packed model")
    return min(apart), min(rounding)


def check(apart: float, rounding: float, who: str) -> None:
    """Raise a RuntimeError if answers differ by more than rounding explains."""
    if apart > max(1e-6, 10 * rounding):
        raise RuntimeError(f"the {who} answers otherwise, by {apart:.0e}: more than rounding explains")


@torch.no_grad()
def plan(packed: nn.Module, x: Tensor, rounding: float) -> str:
    """Whether the packed model becomes a plan with the same answers, or the reason why it is refused."""
    try:
        made = lowbit.plan(packed, x)
    except LowbitError as error:
        return _first(error)
    check(min(distance(made(images).reshape(len(x), -1), packed(images)) for images in batches(x)), rounding, "plan")
    return "yes"


def sweep(library: str, name: str) -> Row:
    """Try one model."""
    values: dict[str, str] = {}
    start, step = time.perf_counter(), "build"
    try:
        model, x = build(library, name)
        again = build(library, name)[0]
        total = sum(parameter.numel() for parameter in model.parameters())
        values |= {"px": str(x.shape[-1]), "parameters": f"{total / 1e6:.1f} M"}
        step = "quantize_"
        quantize(model)
        weights = sum(found.layer.weight.numel() for found in quantized_layers(model) if found.weight is not None)
        values["share"] = f"{weights / total:.0%}"
        values["attention"] = str(len(low_bit_attentions(model)) + len(low_bit_products(model)) or "")
        step = "calibrate"
        lowbit.calibrate(model, x)
        step = "a training step"
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        loss = nn.functional.cross_entropy(model.train()(x), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise RuntimeError("the loss is not finite")
        lost = [found.name for found in quantized_layers(model) if all(latent.grad is None for latent in found.latents)]
        values["untrained"] = str(len(lost) or "")
        step = "pack"
        packed = lowbit.pack(model.eval(), x)
        values["packed"] = str(sum(isinstance(module, PackedLayer) for module in packed.modules()))
        values["codes"] = str(sum(is_stored(module) for module in packed.modules()) or "")
        apart, rounding = compare(model, packed, x)
        values |= {"answers": f"{apart:.0e}", "rounding": f"{rounding:.0e}"}
        step = "save and load"
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            restored = lowbit.load_into(again, lowbit.save(packed, Path(folder) / "packed.safetensors"))
            if not torch.equal(restored(x), packed(x)):
                raise RuntimeError("the restored model answers otherwise")
        step = "plan"
        values["plan"] = plan(packed, x, rounding)
        outcome = "works"
    except LowbitError as error:
        outcome = f"{step} refuses: {_first(error)}"
    except Exception as error:  # counted in the table
        outcome = f"**{step} fails**: {type(error).__name__}: {_first(error)}"
    values["seconds"] = f"{time.perf_counter() - start:.0f}"
    return Row(f"{library} {name}", outcome, values)


def _first(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0].replace("|", "\\|")
    return line if len(line) <= 240 else line[:240] + " ..."


def table(rows: Sequence[Row]) -> str:
    """The page results/models.md."""
    works = sum(row.outcome == "works" for row in rows)
    refused = sum(" refuses: " in row.outcome for row in rows)
    counts = f"{works} of {len(rows)} models work, {refused} are refused by name, {len(rows) - works - refused} fail."
    counts += f" {sum(row.values.get('plan') == 'yes' for row in rows)} become plans."
    versions = {"torch": torch.__version__.split("+")[0], "timm": timm.__version__}
    versions["torchvision"] = torchvision.__version__.split("+")[0]
    lines = [HEAD.format(date=datetime.date.today(), counts=counts, **versions)]
    lines.append("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n")
    for row in rows:
        cells = {"model": f"`{row.model}`", "outcome": row.outcome, **row.values}
        lines.append("| " + " | ".join(cells.get(column, "") for column in COLUMNS) + " |\n")
    return "".join(lines)


def main() -> None:
    """Try the models that the arguments name, or all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to try; all, and the table, if none is named")
    names = parser.parse_args().names
    models = [line.split() for line in MODELS.read_text(encoding="utf-8").splitlines()]
    if unknown := set(names) - {name for _, name in models}:
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(name for _, name in models)}")
    rows = []
    for library, name in models:
        if names and name not in names:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(sweep(library, name))
        print(rows[-1].model, rows[-1].outcome, rows[-1].values, flush=True)
        gc.collect()
        if not names:
            TABLE.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
