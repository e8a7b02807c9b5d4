"""From the start of a process to its first answer, and the memory that takes: what a device with one question pays.

Each engine is a program of its own: it reads its file and an input, computes once, and prints the answer. The time is
that from before the program is started until it has ended. Its peak memory is the high-water mark of its resident set,
which Linux tells in ``/proc/PID/status``.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import models as whole
from benchmarks.cases import check_close
from benchmarks.kernels import select
from benchmarks.models import BASELINE, INT8, MODELS, PACKED, Model
from benchmarks.report import Result, summarize
from lowbit.errors import LowbitError
from lowbit.kernels import build

BITS = 3
IN_PYTHON = """
import sys
import numpy as np
x = np.load(sys.argv[2])
{}
np.savetxt(sys.stdout, y.reshape(1, -1))
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""
PROGRAMS = {
    "lowbit": """
import torch, lowbit
torch.set_num_threads(1)
y = lowbit.load(sys.argv[1])(torch.from_numpy(x)).detach().numpy()""",
    "plan": """
from lowbit.engine.runtime import load_plan
y = load_plan(sys.argv[1], threads=1)(x)""",
    "onnxruntime": """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
y = session.run(None, {session.get_inputs()[0].name: x})[0]""",
    "openvino": """
import openvino
settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
y = openvino.Core().compile_model(sys.argv[1], "CPU", settings)(x)[0]""",
}


@dataclass(frozen=True)
class Program:
    """A command that answers one question.

    Args:
        command: with all its arguments.
        file: what it loads.
        tolerance: of the answer's relative error against float32.
    """

    command: list[str]
    file: Path
    tolerance: float


def programs(model: Model, folder: Path) -> dict[str, Program]:
    """Every engine's program for ``model``, with the files they need in ``folder``."""
    import lowbit

    torch.set_grad_enabled(False)
    x = model.inputs()
    np.save(folder / "x.npy", x.numpy())
    made, packed = model.create(), lowbit.pack(whole.quantized(model, BITS), x)
    files = {
        BASELINE: lowbit.save(made, folder / "fp32.safetensors"),
        f"lowbit {BITS}-bit": lowbit.save(packed, folder / "packed.safetensors"),
        f"lowbit {BITS}-bit plan": lowbit.plan(packed, x, 1).save(folder / "plan.lbp"),
    }
    files[f"lowbit {BITS}-bit runner"] = files[f"lowbit {BITS}-bit plan"]
    for kind in ("fp32", "static"):
        for peer in ("onnxruntime", "openvino"):
            files[f"{peer} {'int8' if kind == 'static' else kind}"] = whole.onnx_file(model, folder, kind)
    runner = build.build_runner(folder)
    found = {}
    for name, file in files.items():
        first = name.split()[0]
        kind = "plan" if name.endswith("plan") else "lowbit" if first == "torch" else first
        command = [sys.executable, "-c", IN_PYTHON.format(PROGRAMS[kind]), str(file), str(folder / "x.npy")]
        if name.endswith("runner"):
            command = [str(runner), str(file), str(folder / "x.npy"), "--threads", "1"]
        tolerance = 1e-3 if "fp32" in name else PACKED if first == "lowbit" else INT8
        found[name] = Program(command, Path(file), tolerance)
    return found


def run(models: Sequence[str] | None = None, repeats: int = 9, known: dict[str, Model] = MODELS) -> list[Result]:
    """Times every program of every model, in turns; peaks of memory (MB) and sizes of files follow as results.

    Raises:
        LowbitError: an unknown name, or a program that fails or gives another answer.
    """
    results = []
    for name in select(models, list(known), "--model", whole.OPTIONAL):
        model = known[name]
        with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as inside:
            made = programs(model, Path(inside))
            answers = {False: model.create()(model.inputs()), True: whole.quantized(model, BITS)(model.inputs())}
            seconds: dict[str, list[float]] = {engine: [] for engine in made}
            for turn in range(repeats + 1):
                for engine, program in made.items():
                    begin = time.perf_counter()
                    answer = first_answer(engine, program)
                    if turn:  # the first time, files come from the disk
                        seconds[engine].append(time.perf_counter() - begin)
                    else:
                        check_close(answer, answers[engine.startswith("lowbit")], program.tolerance)
            results += summarize(f"{model.title}: process start to first answer", seconds, BASELINE, threads=1)
            memory = {engine: peak(engine, program) for engine, program in made.items()}
            sizes = {engine: program.file.stat().st_size / 1e6 for engine, program in made.items()}
            for what, values in (("peak memory", memory), ("file", sizes)):
                results += whole.amounts(f"{model.title}: {what}", values, threads=1)
    return results


def first_answer(engine: str, program: Program) -> torch.Tensor:
    """What the program prints, ``[1, outputs]``."""
    done = subprocess.run(program.command, capture_output=True, text=True)
    if done.returncode:
        raise LowbitError(f"{engine} failed: {done.stderr.strip().splitlines()[-1]}")
    return torch.tensor([[float(number) for number in done.stdout.split()]])


def peak(engine: str, program: Program) -> float:
    """MB of memory that the program had at most. The runner does not tell: it is looked at while it repeats itself."""
    if not engine.endswith("runner"):
        said = subprocess.run(program.command, capture_output=True, text=True).stderr
        return _megabytes(said)
    process = subprocess.Popen([*program.command, "--time", "200"], stdout=subprocess.DEVNULL)
    found = 0.0
    while process.poll() is None:
        try:
            found = max(found, _megabytes(Path(f"/proc/{process.pid}/status").read_text()))
        except (OSError, LowbitError):  # it has just ended
            continue
    return found


def _megabytes(status: str) -> float:
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LowbitError("this system does not tell a process's peak memory: /proc/PID/status has no VmHWM")
