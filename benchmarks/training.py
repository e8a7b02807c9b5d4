"""What a quantized training step costs: every engine steps in turn in one process, ratios are taken round by round."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.report import Result, summarize
from lowbit.training import distillation

CLASSES = 10
BASELINE = "fp32"


@dataclass
class Engine:
    """One way to take a training step; ``step`` returns nothing and is called many times."""

    name: str
    model: nn.Module
    step: Callable[[], None]


@dataclass(frozen=True)
class Case:
    """What is timed: the model ``make(pixels)`` on ``batch`` images at a time, by what ``engines`` makes of it."""

    make: Callable[[int], nn.Module]
    batch: int
    pixels: int
    engines: Callable[[nn.Module, Tensor, Tensor], list[Engine]]
    baseline: str = BASELINE


def _vit(pixels: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=pixels, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=CLASSES)


def _resnet18(pixels: int) -> nn.Module:
    import timm

    return timm.create_model("resnet18", num_classes=CLASSES, zero_init_last=False)


def _timm(name: str) -> Callable[[int], nn.Module]:
    def make(pixels: int) -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, img_size=pixels)

    return make


def _engine(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    bf16: bool = False,
    sgd: bool = False,
    after: Callable[[], None] | None = None,
    teach: Callable[[], Tensor] | None = None,
) -> Engine:
    """Forward, backward, optimizer, and then ``after`` if there is one; ``teach`` gives a teacher's logits for x."""
    if sgd:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = model(x)
            loss = distillation.loss(logits, y, teacher=None if teach is None else teach(), weight=0.5)
        loss.backward()
        optimizer.step()
        if after is not None:
            after()

    return Engine(name, model, step)


def engines(model: nn.Module, x: Tensor, y: Tensor, bits: int = 4) -> list[Engine]:
    """Full precision, LSQ and StatsQ in eager, compiled-quantizer and bf16-compiled form, and the peers installed.

    LSQ: weights per channel, activations per tensor; StatsQ: weights, with the same LSQ activations. First and
    last layers stay in full precision everywhere.
    """
    from lowbit.nn import QuantConfig, calibrate, compile_quantizers, quantize_
    from lowbit.quantizers import LSQ, StatsQ

    activation = LSQ(bits=bits)
    configs = {
        "lsq": QuantConfig(weight=LSQ(bits=bits, granularity="channel"), activation=activation),
        "statsq": QuantConfig(weight=StatsQ(bits=bits), activation=activation),
    }

    def quantized(config: QuantConfig) -> nn.Module:
        return calibrate(quantize_(copy.deepcopy(model), config), x)

    made = [_engine(BASELINE, copy.deepcopy(model), x, y)]
    if any(hasattr(module, "fused_attn") for module in model.modules()):
        made.append(_engine("fp32, attention unfused", unfuse_attention(copy.deepcopy(model)), x, y))
    for name, config in configs.items():
        made.append(_engine(f"{name} eager", quantized(config), x, y))
        made.append(_engine(f"{name} compiled quantizers", compile_quantizers(quantized(config)), x, y))
    for name, config in {"fp": None, **configs}.items():
        whole = unfuse_attention(copy.deepcopy(model) if config is None else quantized(config))
        whole.compile()
        made.append(_engine(f"{name} bf16 + compile, attention unfused", whole, x, y, bf16=True))
    return made + [_engine(name, peer, x, y) for name, peer in peers.training(model, bits)]


def shift_engines(model: nn.Module, x: Tensor, y: Tensor) -> list[Engine]:
    """Full precision and DenseShift at 2, 3 and 4 bits (2, 4 and 8 latents a weight), with SGD as published.

    Eager, and 3 bits also with compiled quantizers, and with a `FreezingTracker` that looks at every step. Convolutions
    channels-last everywhere.
    """
    from lowbit.metrics import FreezingTracker
    from lowbit.nn import QuantConfig, compile_quantizers, quantize_
    from lowbit.quantizers import DenseShift

    model, x = (part.to(memory_format=torch.channels_last) for part in (model, x))

    def quantized(bits: int) -> nn.Module:
        return quantize_(copy.deepcopy(model), QuantConfig(weight=DenseShift(bits=bits)))

    made = [_engine(BASELINE, copy.deepcopy(model), x, y, sgd=True)]
    made += [_engine(f"denseshift {bits}-bit eager", quantized(bits), x, y, sgd=True) for bits in (2, 3, 4)]
    tracked = quantized(3)
    after = FreezingTracker(tracked).update
    made.append(_engine("denseshift 3-bit eager, tracked", tracked, x, y, sgd=True, after=after))
    compiled = compile_quantizers(quantized(3))
    return [*made, _engine("denseshift 3-bit compiled quantizers", compiled, x, y, sgd=True)]


def ofq_engines(model: nn.Module, x: Tensor, y: Tensor, bits: int = 2) -> list[Engine]:
    """OFQ's recipe with and without query-key reparameterization (QKR) against full precision.

    StatsQ weights; LSQ activations with a step for each token and two biases, in front of every layer and in the
    attention's products; 8 bits in the first and last layers. Each eager, with compiled quantizers, as a whole under
    torch.compile, and eager with an `OscillationTracker` that looks at every step.
    """
    from lowbit.metrics import OscillationTracker
    from lowbit.nn import QuantConfig, calibrate, compile_quantizers, quantize_
    from lowbit.quantizers import LSQ, StatsQ

    def quantized(qkr: bool) -> nn.Module:
        config = QuantConfig(
            weight=StatsQ(bits=bits),
            activation=LSQ(bits=bits, granularity="token", bias=True),
            first_last=8,
            attention=True,
            qkr=qkr,
            unsigned=("*.fc2",),
        )
        return calibrate(quantize_(copy.deepcopy(model), config), x)

    made = [
        _engine(BASELINE, copy.deepcopy(model), x, y),
        _engine("fp32, attention unfused", unfuse_attention(copy.deepcopy(model)), x, y),
    ]
    whole = unfuse_attention(copy.deepcopy(model))
    whole.compile()
    made.append(_engine("fp32 compile, attention unfused", whole, x, y))
    for qkr in (False, True):
        name = f"ofq W{bits}A{bits}{' + QKR' * qkr}"
        made.append(_engine(f"{name} eager", quantized(qkr), x, y))
        tracked = quantized(qkr)
        made.append(_engine(f"{name} eager, tracked", tracked, x, y, after=OscillationTracker(tracked).update))
        made.append(_engine(f"{name} compiled quantizers", compile_quantizers(quantized(qkr)), x, y))
        whole = quantized(qkr)
        whole.compile()
        made.append(_engine(f"{name} compile", whole, x, y))
    return made


BEFORE = "as before"


def study_vit_engines(model: nn.Module, x: Tensor, y: Tensor, qkr: bool = False) -> list[Engine]:
    """The study's 2-bit vision transformer with its teacher: as before, then with each of what makes it faster.

    Before: eager, the teacher asked at every step. Then the teacher's answers stored, the quantizers compiled, and
    both, as the study runs; with bfloat16 too where the processor has it.
    """
    from lowbit.nn import QuantConfig, calibrate, compile_quantizers, quantize_
    from lowbit.quantizers import LSQ, StatsQ

    teacher = unfuse_attention(copy.deepcopy(model)).eval()
    config = QuantConfig(
        weight=StatsQ(bits=2),
        activation=LSQ(bits=2, bias=True),
        first_last=8,
        unsigned=("*.fc2",),
        attention=True,
        qkr=qkr,
    )

    @torch.no_grad()
    def ask() -> Tensor:
        return teacher(x)

    answers = ask()

    def student(compiled: bool) -> nn.Module:
        low = unfuse_attention(calibrate(quantize_(copy.deepcopy(model), config), x)).train()
        return compile_quantizers(low) if compiled else low

    made = [
        _engine(BEFORE, student(False), x, y, teach=ask),
        _engine("stored answers", student(False), x, y, teach=lambda: answers),
        _engine("compiled quantizers", student(True), x, y, teach=ask),
        _engine("compiled quantizers, stored answers", student(True), x, y, teach=lambda: answers),
    ]
    if torch.cpu._is_avx512_bf16_supported():
        made.append(
            _engine("compiled quantizers, stored answers, bf16", student(True), x, y, bf16=True, teach=lambda: answers)
        )
    return made


def study_qkr_engines(model: nn.Module, x: Tensor, y: Tensor) -> list[Engine]:
    """`study_vit_engines` with query-key reparameterization."""
    return study_vit_engines(model, x, y, qkr=True)


def study_resnet_engines(model: nn.Module, x: Tensor, y: Tensor) -> list[Engine]:
    """The study's 3-bit DenseShift ResNets: as before (eager), compiled, and with bfloat16 where that is fast."""
    from lowbit.nn import QuantConfig, compile_quantizers, quantize_
    from lowbit.quantizers import DenseShift

    model, x = (part.to(memory_format=torch.channels_last) for part in (model, x))

    def student() -> nn.Module:
        return quantize_(copy.deepcopy(model), QuantConfig(weight=DenseShift(bits=3))).train()

    whole = student()
    whole.compile()
    made = [
        _engine(BEFORE, student(), x, y, sgd=True),
        _engine("compiled quantizers", compile_quantizers(student()), x, y, sgd=True),
        _engine("compiled", whole, x, y, sgd=True),
    ]
    if torch.cpu._is_avx512_bf16_supported():
        whole = student()
        whole.compile()
        made += [
            _engine("bf16", student(), x, y, bf16=True, sgd=True),
            _engine("bf16, compiled", whole, x, y, bf16=True, sgd=True),
        ]
    return made


def _small(name: str) -> Callable[[int], nn.Module]:
    def make(pixels: int) -> nn.Module:
        from lowbit import models

        return models.create(name, CLASSES, 3, pixels)

    return make


CASES = {
    "vit-d192": Case(_vit, 64, 32, engines),
    "resnet18": Case(_resnet18, 64, 32, engines),
    "resnet18-shift": Case(_resnet18, 32, 224, shift_engines),
    "resnet18-shift-small": Case(_resnet18, 64, 32, shift_engines),
    "deit-tiny-ofq": Case(_timm("deit_tiny_distilled_patch16_224"), 16, 224, ofq_engines),
    "deit-small-ofq": Case(_timm("deit_small_distilled_patch16_224"), 8, 224, ofq_engines),
    "swin-tiny-ofq": Case(_timm("swin_tiny_patch4_window7_224"), 8, 224, ofq_engines),
    "vit-tiny-ofq": Case(_timm("vit_tiny_patch16_224"), 16, 224, ofq_engines),
    "study-vit": Case(_small("vit_nano_patch8"), 64, 32, study_vit_engines, BEFORE),
    "study-qkr": Case(_small("vit_nano_patch8"), 64, 32, study_qkr_engines, BEFORE),
    "study-vit-64-tokens": Case(_small("vit_nano"), 64, 32, study_vit_engines, BEFORE),
    "study-resnet8": Case(_small("resnet8"), 64, 32, study_resnet_engines, BEFORE),
    "study-resnet20": Case(_small("resnet20"), 64, 32, study_resnet_engines, BEFORE),
}


def unfuse_attention(model: nn.Module) -> nn.Module:
    """Turns timm's fused attention off, whose backward is slow on the CPU."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def run(names: list[str], repeats: int = 15, warmup: int = 3, threads: int | None = None) -> list[Result]:
    """Times one step of every engine of the `CASES` named, interleaved, ``repeats`` rounds after ``warmup``."""
    from tqdm.auto import tqdm

    from lowbit.training.memory import keep_freed_memory

    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    results = []
    for name in names:
        case = CASES[name]
        torch.manual_seed(0)
        x, y = torch.randn(case.batch, 3, case.pixels, case.pixels), torch.randint(CLASSES, (case.batch,))
        contestants = case.engines(case.make(case.pixels), x, y)
        seconds: dict[str, list[float]] = {engine.name: [] for engine in contestants}
        for engine in tqdm(contestants, desc=f"{name}: build and warm up"):
            for _ in range(warmup):
                engine.step()
        for _ in tqdm(range(repeats), desc=f"{name}: rounds"):
            for engine in contestants:
                start = time.perf_counter()
                engine.step()
                seconds[engine.name].append(time.perf_counter() - start)
        results += summarize(f"training step, {name}, batch {case.batch}, {case.pixels} px", seconds, case.baseline)
    return results
