"""ONNX Runtime, OpenVINO and torchao as engines of ``lowbit bench kernels``, and the sessions that ``models`` shares.

They get weights that their own grids hold exactly (integers times one power of two), so that their results may be
off by the rounding of activations only. Where a case wants copies of the weight, these are shifted by rows: runtimes
may keep equal ones only once, and then they would stay in the caches.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import W_SCALE, X_SCALE, Case, check_close, rotate
from benchmarks.processes import Built
from lowbit.errors import LowbitError

TOLERANCE = 0.05
Step = Callable[[], Any]


def _groups(k: int) -> int:
    """The largest of the usual group sizes that divides K: the fewest scales to read."""
    found = next((size for size in (128, 64, 32) if k % size == 0), None)
    if found is None:
        raise LowbitError(f"K={k} is no multiple of 32, which its groups of weights need")
    return found


def _products_only(case: Case) -> None:
    if case.image:
        raise LowbitError("it has no convolution with such weights")


def _expected(case: Case, weight: Tensor) -> Tensor:
    return case.product(case.input(), weight.float() * W_SCALE)


# ---- ONNX graphs ----


def _graph(case: Case, nodes: list, weights: dict[str, np.ndarray], outputs: list[str]) -> bytes:
    """An ONNX file of these parts, for the input ``x``."""
    from onnx import TensorProto, helper, numpy_helper

    y = [1, case.n, case.image, case.image] if case.image else [case.m, case.n]
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(case.input().shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, y) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _nbits(case: Case, bits: int) -> tuple[bytes, int, Tensor]:
    """ONNX Runtime's MatMulNBits, once for each copy of the weight; bytes of one weight; the expected result."""
    from onnx import helper

    group = _groups(case.k)
    weight = case.integers(bits)
    codes = (weight.numpy().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    each = 8 // bits
    data = sum(codes[:, i::each] << (bits * i) for i in range(each)).astype(np.uint8)
    blocks = case.k // group
    data = data.reshape(case.n, blocks, -1)
    scales = np.full((case.n, blocks), W_SCALE, np.float32)
    options = {"K": case.k, "N": case.n, "bits": bits, "block_size": group, "accuracy_level": 4}  # 4: int8 arithmetic
    nodes, weights = [], {}
    nbytes = data.nbytes + scales.nbytes
    count = case.copies(nbytes)
    for i in range(count):
        weights |= {f"w{i}": np.roll(data, i, axis=0), f"s{i}": scales}
        inputs = ["x", f"w{i}", f"s{i}"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **options))
    file = _graph(case, nodes, weights, [f"y{i}" for i in range(count)])
    return file, nbytes, _expected(case, weight)


def _qdq(case: Case, copies: int, first: int = 0) -> bytes:
    """A product or convolution between quantize and dequantize nodes, int8 weights by channel.

    Copies count from ``first``.
    """
    from onnx import helper

    kernel = case.integers(8).numpy()
    weights = {
        "xs": np.float32(X_SCALE),
        "xz": np.uint8(128),
        "ys": np.float32(4 * 127 * W_SCALE * math.sqrt(math.prod(case.weight_shape[1:])) / 127),
        "ws": np.full(case.n, W_SCALE, np.float32),
        "wz": np.zeros(case.n, np.int8),
    }
    weights = {name: np.asarray(array) for name, array in weights.items()}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["xd"]),
    ]
    for i in range(copies):
        shifted = np.roll(kernel, first + i, axis=0)
        weights[f"w{i}"] = shifted if case.image else np.ascontiguousarray(shifted.T)
        axis = 0 if case.image else 1
        nodes.append(helper.make_node("DequantizeLinear", [f"w{i}", "ws", "wz"], [f"wd{i}"], axis=axis))
        if not case.image:
            nodes.append(helper.make_node("MatMul", ["xd", f"wd{i}"], [f"y{i}"]))
            continue
        # Convolutions are only done in integers if their outputs are quantized as well.
        nodes.append(helper.make_node("Conv", ["xd", f"wd{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("QuantizeLinear", [f"c{i}", "ys", "xz"], [f"cq{i}"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"cq{i}", "ys", "xz"], [f"y{i}"]))
    return _graph(case, nodes, weights, [f"y{i}" for i in range(copies)])


# ---- ONNX Runtime ----


def onnxruntime_session(file: bytes | str | Path, threads: int) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = file if isinstance(file, bytes) else str(file)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def onnxruntime_step(session: Any, x: Tensor) -> tuple[Step, Callable[[], Tensor]]:
    """Runs ``session`` on ``x``, inputs and outputs bound once; and how to get its (first) result."""
    import onnxruntime

    binding = session.io_binding()
    held = onnxruntime.OrtValue.ortvalue_from_numpy(x.contiguous().numpy())
    binding.bind_ortvalue_input(session.get_inputs()[0].name, held)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")

    def result() -> Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[0].numpy())

    return partial(session.run_with_iobinding, binding), result


def onnxruntime_nbits(case: Case, threads: int, bits: int) -> Built:
    """MatMulNBits: 2- or 4-bit weights with scales by group, activations quantized inside, int8 arithmetic.

    Copies of the weight, if memory is to be read, are nodes of one graph: sessions would each bring a thread pool.
    """
    _products_only(case)
    file, nbytes, expected = _nbits(case, bits)
    step, result = onnxruntime_step(onnxruntime_session(file, threads), case.input())
    error = check_close(result(), expected, TOLERANCE)
    return Built(step, calls=case.copies(nbytes), facts={"bytes": nbytes, "error": error})


def onnxruntime_int8(case: Case, threads: int) -> Built:
    """Int8 weights by channel and uint8 activations, quantized inside, as quantize and dequantize nodes say."""
    weight = case.integers(8)
    copies = case.copies(weight.nbytes)
    step, result = onnxruntime_step(onnxruntime_session(_qdq(case, copies), threads), case.input())
    error = check_close(result(), _expected(case, weight), TOLERANCE)
    return Built(step, calls=copies, facts={"bytes": weight.nbytes, "error": error})


# ---- OpenVINO ----


@functools.cache
def openvino_core() -> Any:
    """The one ``openvino.Core`` of this process, kept until the process ends.

    Each further one would load the CPU plugin anew, which registers a stack for signals and, when it goes, puts back
    the one it found (2026.4.1). If they do not go in the reverse order, that one is unmapped by then, and the next
    signal that Python handles, say of a data loader's worker that ends, overwrites whatever lies there.
    """
    import openvino

    return openvino.Core()


def openvino_step(model: Any, x: Tensor, threads: int, precision: str = "f32") -> tuple[Step, Callable[[], Tensor]]:
    """Compiles and runs an OpenVINO model, or the file of one, on ``x``; and how to get its first result."""
    import openvino

    core = openvino_core()
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    if isinstance(model, bytes | str | Path):
        model = core.read_model(model if isinstance(model, bytes) else str(model))
    request = core.compile_model(model, "CPU", config).create_infer_request()
    held = x.contiguous().numpy()
    request.set_input_tensor(openvino.Tensor(held, shared_memory=True))

    def step() -> None:
        request.start_async()
        request.wait()

    def result() -> Tensor:
        step()
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    step.held = held  # the request only borrows it
    return step, result


def openvino_weights(case: Case, threads: int, bits: int) -> Built:
    """Compressed weights, 4 bits with scales by group or 8 bits by channel; activations are left to OpenVINO."""
    _products_only(case)
    import openvino
    from openvino import opset13 as ops

    weight = case.integers(bits)
    if bits == 4:
        group = _groups(case.k)
        codes = weight.numpy().reshape(-1)
        packed = (codes[0::2] & 15 | (codes[1::2] & 15) << 4).astype(np.uint8)
        shape, kind = [case.n, case.k // group, group], openvino.Type.i4
        scales = np.full((case.n, case.k // group, 1), W_SCALE, np.float32)
    else:
        packed, shape, kind = weight.numpy(), [case.n, case.k], openvino.Type.i8
        scales = np.full((case.n, 1), W_SCALE, np.float32)
    nbytes = packed.nbytes + scales.nbytes

    borrowed = []  # a tensor of 4-bit numbers does not own its memory

    def model(shift: int) -> Any:
        data = np.roll(packed, shift * packed.size // case.n)  # whole rows
        borrowed.append(data)
        x = ops.parameter([case.m, case.k], np.float32, name="x")
        held = openvino.Tensor(data, openvino.Shape(shape), kind) if bits == 4 else openvino.Tensor(data)
        floats = ops.multiply(ops.convert(ops.constant(held), np.float32), ops.constant(scales))
        if bits == 4:
            floats = ops.reshape(floats, ops.constant(np.array([case.n, case.k])), False)
        return openvino.Model([ops.matmul(x, floats, False, True)], [x])

    made = [openvino_step(model(i), case.input(), threads) for i in range(case.copies(nbytes))]
    error = check_close(made[0][1](), _expected(case, weight), TOLERANCE)
    step = rotate([step for step, _ in made])
    step.borrowed = borrowed
    return Built(step, facts={"bytes": nbytes, "error": error})


def openvino_int8(case: Case, threads: int) -> Built:
    """The same file as `onnxruntime_int8`."""
    weight = case.integers(8)
    files = (_qdq(case, 1, first) for first in range(case.copies(weight.nbytes)))
    made = [openvino_step(file, case.input(), threads) for file in files]
    error = check_close(made[0][1](), _expected(case, weight), TOLERANCE)
    return Built(rotate([step for step, _ in made]), facts={"bytes": weight.nbytes, "error": error})


# ---- torchao ----


def _torchao(case: Case, threads: int, config: Any, dtype: torch.dtype, bits: int, mode: str) -> Built:
    from torchao.quantization import quantize_

    _products_only(case)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    weight = case.integers(bits)
    nbytes = case.n * case.k * bits // 8
    x = case.input().to(dtype)

    def layer() -> nn.Module:
        made = nn.Linear(case.k, case.n, bias=False, dtype=dtype)
        made.weight.data = (weight.float() * W_SCALE).to(dtype)
        quantize_(made, config)
        if type(made.weight.data) is Tensor:
            raise LowbitError("torchao left the layer as it was")
        return made

    layers = [layer() for _ in range(case.copies(nbytes))]
    run = torch.compile(lambda layer, x: layer(x), mode=mode)
    error = check_close(run(layers[0], x), _expected(case, weight), TOLERANCE)
    return Built(rotate([partial(run, layer, x) for layer in layers]), facts={"bytes": nbytes, "error": error})


def torchao_int4(case: Case, threads: int) -> Built:
    """4-bit weights with scales by group in torch's own CPU layout, bf16 activations, max-autotune."""
    group = _groups(case.k)
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=group)
    except ImportError:  # other versions
        from torchao.quantization import Int4WeightOnlyConfig

        config = Int4WeightOnlyConfig(group_size=group, int4_packing_format="opaque")
    return _torchao(case, threads, config, torch.bfloat16, 4, "max-autotune-no-cudagraphs")


def torchao_int8(case: Case, threads: int) -> Built:
    """Int8 weights by channel, int8 activations by row, quantized inside, compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(case, threads, Int8DynamicActivationInt8WeightConfig(), torch.float32, 8, "default")
