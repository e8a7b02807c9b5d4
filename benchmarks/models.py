"""Whole models, one image or sound at a time or a batch: packed models against torch, ONNX Runtime and OpenVINO.

Weights are random and statistics those of random inputs: times hardly depend on either, accuracy is not looked at. But
no engine is timed while it computes something else: packed models are compared with the quantized ones they are made
of, the others with the model in float32. Files of peers are made once a model, in a folder that goes with the run.
"""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import runtimes
from benchmarks.cases import check_close
from benchmarks.kernels import Outcome, select
from benchmarks.processes import BURST, Built, Workers
from benchmarks.report import Result
from lowbit.files import replacing

BASELINE = "torch fp32"
CALIBRATION = 8  # inputs
# These bounds only tell roundings from nonsense. Packed layers equal theirs to the last bits of float32, but where such
# a bit makes one activation round the other way, a dozen layers of random weights make up to a tenth of it.
BF16, INT8, PACKED = 0.1, 0.5, 0.25


@dataclass(frozen=True)
class Model:
    """A model of `lowbit.models.create` and what it is timed with.

    Args:
        name: as ``create`` knows it.
        pixels: height and width of the images; None for models of sound, which get a second of it.
        classes: outputs.
        batch: number of inputs of one call.
    """

    name: str
    pixels: int | None = 224
    classes: int = 1000
    batch: int = 1

    @property
    def title(self) -> str:
        """The case's name in results."""
        return f"{self.name}, {'1 s of sound' if self.pixels is None else f'{self.pixels} px'}, batch {self.batch}"

    def create(self) -> nn.Module:
        """The model, always with the same random weights, in evaluation mode."""
        from lowbit.models import create

        torch.manual_seed(0)
        shape = {} if self.pixels is None else {"img_size": self.pixels}
        model = create(self.name, num_classes=self.classes, **shape)
        return gather_statistics(model, self.inputs(CALIBRATION))

    def inputs(self, count: int | None = None) -> Tensor:
        """Random inputs of that number, by default a batch; always the same."""
        count = count or self.batch
        shape = (8000,) if self.pixels is None else (3, self.pixels, self.pixels)
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


MODELS = {
    "resnet18": Model("resnet18"),
    "deit-tiny": Model("deit_tiny_patch16_224"),
    "deit-small": Model("deit_small_patch16_224"),
    "resnet20": Model("resnet20", 32, 10),
    "vit_nano": Model("vit_nano", 32, 10),
    "kws_resnet": Model("kws_resnet", None, 10),
    "ds_cnn": Model("ds_cnn", None, 10),
}
"""By the names that ``--model`` takes."""
OPTIONAL = frozenset({"deit-small"})


def gather_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """Gives BatchNorm layers the statistics of ``x``, without which a random network's numbers run away."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()
        with torch.no_grad():
            model(x)
    return model.eval()


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


def _saved(model: nn.Module, folder: Path, **options: Any) -> float:
    """MB of the model as `lowbit.save` writes it."""
    import lowbit

    with tempfile.TemporaryDirectory(dir=folder) as inside:
        return _megabytes(lowbit.save(model, Path(inside) / "model.safetensors", **options))


def _layout(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Channels last, where there are convolutions of images."""
    if x.ndim == 4 and any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return model, x


# ---- engines ----


def torch_fp32(model: Model, threads: int, folder: Path) -> Built:
    """Eager, as `create` gives it."""
    _begin(threads)
    made, x = model.create(), model.inputs()
    return Built(partial(made, x), facts={"mb": _saved(made, folder)})


def torch_compiled(model: Model, threads: int, folder: Path, dtype: torch.dtype = torch.float32) -> Built:
    """Under torch.compile with weights frozen, channels last; in bf16 everything is, but for a sound's spectrogram."""
    import torch._inductor.config

    torch._inductor.config.freezing = True  # packs the weights beforehand, as ready-made runtimes do
    _begin(threads)
    made, x = model.create(), model.inputs()
    expected = made(x)
    half = dtype == torch.bfloat16
    facts = {"mb": _saved(made, folder, dtype="bfloat16" if half else "float32")}
    if half and model.pixels is None:
        made, front = made.to(dtype), made.front.float()
        made.front = nn.Sequential(front, _Cast(dtype))
    elif half:
        made, x = made.to(dtype), x.to(dtype)
    made, x = _layout(made, x)
    run = torch.compile(made)
    facts["error"] = check_close(run(x), expected, BF16 if half else 1e-3)
    return Built(partial(run, x), facts=facts)


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def quantized(model: Model, bits: int, activation: int = 8, attention: bool = False) -> nn.Module:
    """DenseShift weights with a scale by channel, LSQ inputs, 8 bits in first and last layers; calibrated.

    ``attention``: the factors of its products are rounded too.
    """
    import lowbit
    from lowbit.quantizers import LSQ, DenseShift

    config = lowbit.QuantConfig(
        weight=DenseShift(bits=bits, scale="statistical", init="project"),
        activation=LSQ(bits=activation),
        first_last=8,
        attention=attention,
    )
    made, x = model.create(), model.inputs(CALIBRATION)
    lowbit.calibrate(lowbit.quantize_(made, config), x)
    return gather_statistics(made, x)


def packed(model: Model, threads: int, folder: Path, bits: int, compile: bool = False, fuse: bool = False) -> Built:
    """What `lowbit.pack` makes of it, channels last.

    ``compile``: the rest of the model under torch.compile; ``fuse``: by `lowbit.fuse`.
    """
    import lowbit

    _begin(threads)
    made, x = quantized(model, bits), model.inputs()
    expected = made(x)
    made = lowbit.pack(made, x)
    facts = {"mb": _saved(made, folder)}
    made, x = _layout(made, x)
    run = torch.compile(made) if compile else lowbit.fuse(made, x) if fuse else made
    facts["error"] = check_close(run(x), expected, PACKED)
    return Built(partial(run, x), facts=facts)


def planned(model: Model, threads: int, folder: Path, bits: int, activation: int = 8, attention: bool = False) -> Built:
    """The packed model as a plan: one native call; ``activation`` and ``attention`` as of `quantized`."""
    import lowbit

    _begin(threads)
    made, x = quantized(model, bits, activation, attention), model.inputs()
    expected = made(x)
    plan = lowbit.plan(lowbit.pack(made, x), x, threads)
    facts = {"mb": len(plan.content) / 1e6, "error": check_close(plan(x), expected, PACKED)}
    return Built(partial(plan, x), facts=facts)


def exported(model: Model, threads: int, folder: Path, bits: int, engine: str) -> Built:
    """The packed model's ONNX file (`lowbit.nn.onnx.export_onnx`) in ``engine``, "onnxruntime" or "openvino"."""
    import lowbit
    from lowbit.nn.onnx import export_onnx

    _begin(threads)
    made, x = quantized(model, bits), model.inputs()
    expected = made(x)
    path = folder / f"{model.name}.{model.batch}.{bits}.{engine}.onnx"
    export_onnx(lowbit.pack(made, x), x, path)
    if engine == "openvino":
        step, result = runtimes.openvino_step(path, x, threads)
    else:
        step, result = runtimes.onnxruntime_step(runtimes.onnxruntime_session(path, threads), x)
    return Built(step, facts={"mb": _megabytes(path), "error": check_close(result(), expected, PACKED)})


def onnx_file(model: Model, folder: Path, kind: str = "fp32") -> Path:
    """The model's ONNX file, made if it is not there yet.

    ``kind`` is "fp32"; "ready", the same optimized for quantization; or made of that by ONNX Runtime's tools, "static"
    (8-bit quantize and dequantize nodes, calibrated) or "dynamic".
    """
    path = folder / f"{model.name}.{model.batch}.{kind}.onnx"
    if path.exists():
        return path
    with replacing(path) as unfinished:
        _write_onnx(model, folder, kind, unfinished)
    return path


def _write_onnx(model: Model, folder: Path, kind: str, path: Path) -> None:
    if kind == "fp32":
        import onnxscript  # noqa: F401  (torch needs it and would say so in many more words)

        made, x = model.create(), model.inputs()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(made, (x,), str(path), dynamo=True, external_data=False, verbose=False)
        return
    import onnxruntime.quantization as tools
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if kind == "ready":  # all shapes are fixed, so that symbolic ones, which fail on spectrograms, are not needed
        quant_pre_process(str(onnx_file(model, folder)), str(path), skip_symbolic_shape=True)
        return
    ready = onnx_file(model, folder, "ready")
    front = {"nodes_to_exclude": _front(ready)} if model.pixels is None else {}
    if kind == "dynamic":
        tools.quantize_dynamic(ready, path, weight_type=tools.QuantType.QInt8, per_channel=True, **front)
    else:
        reader = _Calibration(ready, model.inputs(max(CALIBRATION, model.batch)).split(model.batch))
        # The operators that hold the work, and those between them; the others stay in float32.
        types = ["Conv", "MatMul", "Gemm", "Add", "GlobalAveragePool", "MaxPool"]
        options = {"per_channel": True, "quant_format": tools.QuantFormat.QDQ, "op_types_to_quantize": types}
        tools.quantize_static(ready, path, reader, **options, **front)


def _front(path: Path) -> list[str]:
    """The spectrogram of a model of sound, which stays in float32: the nodes before its first 2-d convolution."""
    import onnx

    graph = onnx.load(path).graph
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    first = next(
        i for i, node in enumerate(graph.node) if node.op_type == "Conv" and len(shapes.get(node.input[1], ())) == 4
    )
    return [node.name for node in graph.node[:first]]


class _Calibration:
    """What onnxruntime.quantization reads inputs from: ``get_next`` until it gives None."""

    def __init__(self, path: Path, batches: Sequence[Tensor]):
        import onnx

        name = onnx.load(path, load_external_data=False).graph.input[0].name
        self._feeds = iter([{name: x.numpy()} for x in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def onnxruntime_model(model: Model, threads: int, folder: Path, kind: str = "fp32") -> Built:
    """ONNX Runtime with the float32 file or a quantized one."""
    _begin(threads)
    path, x = onnx_file(model, folder, kind), model.inputs()
    step, result = runtimes.onnxruntime_step(runtimes.onnxruntime_session(path, threads), x)
    error = check_close(result(), model.create()(x), 1e-3 if kind == "fp32" else INT8)
    return Built(step, facts={"mb": _megabytes(path), "error": error})


def openvino_model(model: Model, threads: int, folder: Path, kind: str = "fp32", precision: str = "f32") -> Built:
    """OpenVINO with the same files; ``precision="bf16"`` lets it calculate so, and its file holds 16-bit weights."""
    import openvino

    _begin(threads)
    path, x = onnx_file(model, folder, kind), model.inputs()
    half = precision == "bf16"
    if half and "BF16" not in runtimes.openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("OpenVINO does not offer bf16 on this processor")
    read = runtimes.openvino_core().read_model(str(path))
    stored = folder / f"{model.name}.{model.batch}.{kind}.{precision}.xml"
    openvino.save_model(read, str(stored), compress_to_fp16=half)
    step, result = runtimes.openvino_step(stored, x, threads, precision)
    error = check_close(result(), model.create()(x), INT8 if kind != "fp32" else BF16 if half else 1e-3)
    return Built(step, facts={"mb": _megabytes(stored) + _megabytes(stored.with_suffix(".bin")), "error": error})


ENGINES = {
    BASELINE: torch_fp32,
    "torch fp32 compiled": torch_compiled,
    "torch bf16 compiled": partial(torch_compiled, dtype=torch.bfloat16),
    **{f"lowbit {bits}-bit": partial(packed, bits=bits) for bits in (2, 3, 4)},
    **{f"lowbit {bits}-bit fused": partial(packed, bits=bits, fuse=True) for bits in (2, 3, 4)},
    **{f"lowbit {bits}-bit compiled": partial(packed, bits=bits, compile=True) for bits in (2, 3, 4)},
    **{f"lowbit {bits}-bit plan": partial(planned, bits=bits) for bits in (2, 3, 4)},
    "lowbit 3-bit plan, 4-bit inputs": partial(planned, bits=3, activation=4),
    "lowbit 3-bit plan, low-bit attention": partial(planned, bits=3, attention=True),
    "onnxruntime 3-bit, exported": partial(exported, bits=3, engine="onnxruntime"),
    "openvino 3-bit, exported": partial(exported, bits=3, engine="openvino"),
    "onnxruntime fp32": onnxruntime_model,
    "onnxruntime int8 static": partial(onnxruntime_model, kind="static"),
    "onnxruntime int8 dynamic": partial(onnxruntime_model, kind="dynamic"),
    "openvino fp32": openvino_model,
    "openvino bf16": partial(openvino_model, precision="bf16"),
    "openvino int8": partial(openvino_model, kind="static"),
}


def run(
    models: Sequence[str] | None = None,
    engines: Sequence[str] | None = None,
    threads: Sequence[int] = (1,),
    repeats: int = 15,
    burst: float = BURST,
    known: dict[str, Model] = MODELS,
    batches: Sequence[int] = (1,),
) -> Outcome:
    """Times every engine on every model; sizes of files follow as results of their own, in MB.

    Args:
        models: names or patterns of `MODELS`; None takes all but `OPTIONAL`.
        engines: names or patterns of `ENGINES`; None takes all. The baseline always takes part.
        threads: numbers of threads.
        repeats: rounds counted.
        burst: seconds an engine calculates in each round.
        known: what ``models`` names.
        batches: numbers of inputs of one call.

    Raises:
        LowbitError: an unknown name.
    """
    chosen = select(models, list(known), "--model", OPTIONAL)
    names = [BASELINE, *(name for name in select(engines, list(ENGINES), "--engine") if name != BASELINE)]
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as folder:
        for count in threads:
            with Workers(count, burst) as workers:
                for model in (replace(known[name], batch=batch) for name in chosen for batch in batches):
                    makes = {name: partial(ENGINES[name], model, count, Path(folder)) for name in names}
                    race = workers.race(model.title, makes, BASELINE, repeats)
                    outcome.add(race, model.title, count)
                    if count == threads[0]:
                        sizes = {result["engine"]: race.facts[result["engine"]]["mb"] for result in race.results}
                        outcome.results += amounts(f"{model.title}: file", sizes, count)
    return outcome


def amounts(case: str, megabytes: dict[str, float], threads: int) -> list[Result]:
    """Results that are no times, MB of each engine; ``ratio`` is to the baseline's."""
    return [
        Result(
            case=case,
            engine=engine,
            threads=threads,
            median=amount,
            unit="MB",
            ratio=amount / megabytes[BASELINE],
            baseline=BASELINE,
            repeats=1,
        )
        for engine, amount in megabytes.items()
    ]
