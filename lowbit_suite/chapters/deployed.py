"""Around a packed network in notebook 16: the parts of its file, and its answers elsewhere."""

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.extras import extra
from lowbit.nn.deploy import summary
from lowbit.nn.packed import PackedLayer


def parts(packed: nn.Module, file: Path) -> dict[str, int]:
    """Return the bytes of each part of the file of a packed model.

    Args:
        packed: the result of `lowbit.pack`.
        file: the file that `lowbit.save` wrote of it.

    Returns:
        Bytes of ``"packed codes"``, ``"scales and sums"``, ``"8-bit layers"``, ``"float32"`` and ``"header"``; layers
        that are kept as codes beside a table count as packed codes.
    """
    layers = [module for module in packed.modules() if isinstance(module, PackedLayer)]
    table = summary(packed)
    found = {
        "packed codes": sum(layer.data.numel() for layer in layers if layer.bits < 8),
        "scales and sums": sum(layer.weight.nbytes - layer.data.numel() for layer in layers),
        "8-bit layers": sum(layer.data.numel() for layer in layers if layer.bits == 8),
        "float32": int(table[table.how == "float32"].bytes.sum()),
    }
    found["packed codes"] += int(table[table.how == "codes"].bytes.sum())
    return found | {"header": file.stat().st_size - int(table.bytes.sum())}


def only_inference(threads: int) -> None:
    """Set the process up for inference: the number of threads, no gradients, and no warnings about tracing."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def checksum(answers: Tensor) -> str:
    """Return the SHA-256 of the bytes of a tensor."""
    return hashlib.sha256(answers.numpy().tobytes()).hexdigest()


PREDICT = """
import sys, torch, lowbit
from lowbit.kernels import native
from lowbit_suite.chapters.deployed import checksum
torch.set_num_threads(int(sys.argv[3]))
y = lowbit.load(sys.argv[1])(torch.load(sys.argv[2])).detach()
print(checksum(y), native.isa() or "PyTorch form")
"""


def elsewhere(model: Path, inputs: Path, threads: int, **environment: str) -> list[str]:
    """Run a saved model in a fresh Python process.

    Args:
        model: the file that `lowbit.save` wrote.
        inputs: the file that `torch.save` wrote of a batch.
        threads: number of threads.
        environment: environment variables of the process, beside those of this one.

    Returns:
        The `checksum` of the answers, and the form of the kernels in use.
    """
    command = [sys.executable, "-W", "ignore", "-c", PREDICT, str(model), str(inputs), str(threads)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().split(" ", 1)


def without_python(runner: Path, plan: Path, inputs: Path) -> np.ndarray:
    """Return the numbers that ``lowbit-run`` prints for a saved plan and a NumPy file of inputs."""
    done = subprocess.run([runner, plan, inputs], capture_output=True, text=True, check=True)
    return np.loadtxt(done.stdout.splitlines(), dtype=np.float32)


def session(path: Path, threads: int) -> Any:
    """Load an ONNX file into ONNX Runtime, for the CPU."""
    with extra("onnx", "running an ONNX file"):
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, x: Tensor) -> Tensor:
    """Return the answers of an ONNX Runtime session to one batch, of the size that the file was exported for."""
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def input_of(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """Return the float32 input of a layer when the model computes ``x``."""
    kept: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return kept[0].float()
