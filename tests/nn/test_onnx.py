"""ONNX export of packed models: exact integers in Q/DQ operators, on which other engines calculate with integers."""

import collections
import copy

import numpy as np
import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn.agreement import compare_integers
from lowbit.nn.onnx import export_onnx, standard
from lowbit.nn.packed import PackedLayer
from lowbit.quantizers import LSQ, PACT, DenseShift, StatsQ, get, names

onnx = pytest.importorskip("onnx", reason="needs onnx")
runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript")

CASES = {
    "linear, calibrated": (nn.Linear(24, 20), {"weight": DenseShift(bits=3), "activation": LSQ(bits=4)}, (5, 24)),
    "linear, tokens": (nn.Linear(24, 20), {"weight": StatsQ(bits=3), "activation": LSQ(bits=8)}, (2, 5, 24)),
    "linear, a step for each token": (
        nn.Linear(24, 20),
        {"weight": StatsQ(bits=3), "activation": LSQ(bits=4, granularity="token", bias=True)},
        (2, 5, 24),
    ),
    "linear, dynamic": (nn.Linear(24, 20), {"weight": StatsQ(bits=2)}, (5, 24)),
    "linear, 4 bits": (nn.Linear(24, 20), {"weight": DenseShift(bits=4), "activation": LSQ(bits=8)}, (5, 24)),
    "linear, 8 bits": (nn.Linear(24, 20), {"weight": LSQ(bits=8), "activation": LSQ(bits=8)}, (5, 24)),
    "convolution, 8 bits": (
        nn.Conv2d(3, 12, 3, 2, 1),
        {"weight": LSQ(bits=8), "activation": LSQ(bits=8)},
        (2, 3, 9, 9),
    ),
    "convolution": (nn.Conv2d(8, 12, 3, 2, 1), {"weight": DenseShift(bits=2), "activation": LSQ(bits=8)}, (2, 8, 9, 9)),
    "convolution, dynamic": (nn.Conv2d(8, 12, 3, padding=1), {"weight": StatsQ(bits=4)}, (2, 8, 7, 9)),
    "depthwise": (
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        {"weight": StatsQ(bits=3), "activation": LSQ(bits=8)},
        (2, 8, 7, 9),
    ),
}


def packed(model, config, x):
    lowbit.quantize_(model, lowbit.QuantConfig(**{"first_last": "same", **config}))
    lowbit.calibrate(model, x)
    return lowbit.pack(model, x)


def case(name):
    layer, config, shape = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    # Depthwise layers are stored, and a model in which no layer is packed is refused.
    last = nn.Conv2d(8, 3, 1) if name == "depthwise" else nn.Identity()
    return packed(nn.Sequential(copy.deepcopy(layer), last), dict(config), x), x


def run(path, x, outputs=None):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(outputs, {session.get_inputs()[0].name: x.numpy()})[0])


def kind(tensor):
    return onnx.TensorProto.DataType.Name(tensor.data_type)


def factors(graph):
    """By name of each product (MatMul, Conv): the nodes and the initializers that its weight is computed from."""
    made = {output: node for node in graph.node for output in node.output}
    held = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for product in graph.node:
        if product.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        node, operators, tensors = made.get(product.input[1]), [], [held.get(product.input[1])]
        while node is not None:
            operators.append(node.op_type)
            tensors += [held[name] for name in node.input if name in held]
            node = next((made[name] for name in node.input if name in made), None)
        found[product.name] = operators, [tensor for tensor in tensors if tensor is not None]
    return found


@pytest.mark.parametrize("name", CASES)
def test_one_layer_is_the_same(name, tmp_path):
    model, x = case(name)
    with torch.no_grad():
        expected = model(x)
        if name == "depthwise":
            torch.testing.assert_close(standard(model)(x), expected)
        else:
            assert torch.equal(standard(model)(x), expected)  # to the bit
        path = export_onnx(model, x, tmp_path / "layer.onnx")
        found = run(path, x)
    assert (found - expected).norm() <= 1e-6 * expected.norm()  # roundings of float32, not of integers
    assert b".py" not in path.read_bytes()  # no word of where the exporting machine keeps its files
    for operators, tensors in factors(onnx.load(path).graph).values():
        assert operators[0] == "DequantizeLinear" and set(operators[1:]) <= {"Cast", "Gather"}
        assert all(
            kind(tensor) != "FLOAT" or tensor.dims == [len(tensor.dims) and max(tensor.dims)] for tensor in tensors
        )


class SideBySide(nn.ModuleDict):
    """Models of the same input; their outputs side by side."""

    def forward(self, x):
        return torch.cat([model(x).flatten(1) for model in self.values()], dim=1)


@pytest.fixture(scope="module")
def every_method():
    """A packed convolution and a packed linear layer of every method and of every number of bits that has kernels."""
    torch.manual_seed(0)
    x, models = torch.randn(3, 8, 5, 5), {}
    for name in names("weight"):
        for bits in (2, 3, 4):
            model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(54, 20))
            try:
                models[f"{name}_{bits}"] = packed(model, {"weight": get(name)(bits=bits), "activation": LSQ(bits=8)}, x)
            except LowbitError:  # such bits, or levels that are no integers
                continue
    assert len(models) > 20
    return SideBySide(models), x


@pytest.mark.parametrize("opset", [21, 25])
def test_the_file_holds_exactly_the_weights_of_every_method_in_few_bits(every_method, opset, tmp_path):
    models, x = every_method
    path = export_onnx(models, x, tmp_path / "model.onnx", opset)
    proto = onnx.load(path)
    weights = [node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(weight) for weight in weights)
    values = onnx.reference.ReferenceEvaluator(proto).run(weights, {proto.graph.input[0].name: x.numpy()})
    held = {tensor.name: kind(tensor) for tensor in proto.graph.initializer}
    for name, layer in models.named_modules():
        if not isinstance(layer, PackedLayer):
            continue
        expected = layer.weight.dequantize().numpy()
        expected = expected if expected.ndim == 4 else expected.T
        assert any(value.shape == expected.shape and np.array_equal(value, expected) for value in values), name
        few = len(layer.weight.integers().unique()) <= 4 and opset >= 25
        assert held[f"{name}.whole.stored"] in ({"INT2", "UINT2"} if few else {"INT4", "UINT4"}), name
    with torch.no_grad():
        expected, found = models(x), run(path, x)
    assert (found - expected).norm() <= 0.01 * expected.norm()


def test_sixteen_levels_up_to_128_are_exact(tmp_path):
    # Channel 0 has +128 alone and changes its sign; channel 1 has both, for which 8 bits are too few.
    for both, expected in ((False, "INT8"), (True, "INT16")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 2, bias=False))
        model = packed(model, {"weight": DenseShift(bits=4), "activation": LSQ(bits=8)}, torch.randn(4, 8))
        whole = torch.tensor([[128, 1, -2, 4, 8, -64, 32, 16], [128 if both else 1, -128, 1, 2, 4, 8, 16, 32]])
        levels = torch.tensor(model[0].levels)
        weight = lowbit.kernels.pack_weight(torch.searchsorted(levels, whole), levels, model[0].scale)
        model[0].data, model[0].sums = weight.data, weight.sums
        x = torch.randn(4, 8)
        path = export_onnx(model, x, tmp_path / "layer.onnx")
        assert {kind(t) for t in onnx.load(path).graph.initializer if t.name.endswith("levels")} == {expected}
        with torch.no_grad():
            torch.testing.assert_close(run(path, x), model(x), rtol=1e-6, atol=1e-6)
            assert torch.equal(standard(model)(x), model(x))


# ---- ONNX Runtime's operator for weights of few bits ----


def nbits_weight(graph):
    """The float weight [N, K] that the only MatMulNBits of a graph holds; its bits and block size."""
    node = next(node for node in graph.node if node.op_type == "MatMulNBits")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    facts = {attribute.name: attribute.i for attribute in node.attribute}
    codes, scales = (held[name].astype(np.float32) for name in node.input[1:])
    if facts["bits"] == 4:
        codes = np.stack([codes % 16, codes // 16], axis=-1).reshape(*codes.shape[:2], -1)
    weight = (codes - 2 ** (facts["bits"] - 1)) * scales[..., None]
    return torch.from_numpy(weight.reshape(facts["N"], -1)[:, : facts["K"]]), facts["bits"], facts["block_size"]


def set_integers(layer, at):
    """Give a layer no integer of 8 or ±128, but in row 1 those of ``at``, by input."""
    whole = layer.weight.integers().clamp(-64, 64)
    whole[whole.abs() == 8] = 4
    for place, value in at.items():
        whole[1, place] = value
    levels = torch.tensor(layer.levels)
    weight = lowbit.kernels.pack_weight(torch.searchsorted(levels, whole), levels, layer.scale)
    layer.data, layer.sums = weight.data, weight.sums


@pytest.mark.parametrize(
    ("method", "change", "bits", "size"),
    [
        (StatsQ(bits=2), None, 4, 128),
        (LSQ(bits=4), None, 4, 128),
        (DenseShift(bits=3), {3: 8, 99: 8}, 4, 128),
        (DenseShift(bits=3), {3: 8, 99: -8}, 4, 64),
        (DenseShift(bits=3), {3: 8, 17: -8}, 4, 16),
        (DenseShift(bits=3), {3: 8, 15: -8}, 8, 128),
        (DenseShift(bits=4), {3: 128, 15: -64}, 8, 128),
    ],
)
@pytest.mark.parametrize("inputs", [100, 128])
def test_matmul_nbits_holds_the_weights_and_rounds_its_inputs_by_block(method, change, bits, size, inputs, tmp_path):
    torch.manual_seed(0)
    model = packed(nn.Sequential(nn.Linear(inputs, 20)), {"weight": method}, torch.randn(4, inputs))
    layer = model[0]
    if change is not None:
        set_integers(layer, change)
    x = torch.randn(1, inputs)
    path = export_onnx(model, x, tmp_path / "layer.onnx", nbits=True)
    weight, *found = nbits_weight(onnx.load(path).graph)
    assert found == [bits, size]
    assert torch.equal(weight, layer.weight.dequantize())
    blocks = torch.nn.functional.pad(x, (0, -inputs % size)).reshape(1, -1, size)
    step = blocks.abs().amax(2, keepdim=True) / 127
    rounded = ((blocks / step).round() * step).reshape(1, -1)[:, :inputs]
    found, expected = run(path, x), rounded @ weight.T + layer.bias
    assert (found - expected).norm() <= 1e-5 * expected.norm()  # roundings of float32, not of integers
    with torch.no_grad():
        assert (found - model(x)).norm() <= 0.02 * model(x).norm()


@pytest.mark.parametrize(
    "name", ["linear, calibrated", "linear, a step for each token", "convolution, dynamic", "depthwise"]
)
def test_other_layers_stay_between_quantize_and_dequantize_nodes(name, tmp_path):
    model, x = case(name)
    paths = [export_onnx(model, x, tmp_path / f"{nbits}.onnx", nbits=nbits) for nbits in (False, True)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_both_signs_of_128_in_a_block_are_left_to_floats(tmp_path):
    torch.manual_seed(0)
    model = packed(nn.Sequential(nn.Linear(40, 20)), {"weight": DenseShift(bits=4)}, torch.randn(4, 40))
    set_integers(model[0], {3: 128, 15: -128})
    graph = onnx.load(export_onnx(model, torch.randn(1, 40), tmp_path / "layer.onnx", nbits=True)).graph
    assert "MatMulNBits" not in {node.op_type for node in graph.node}


# ---- the engines' kernels ----


class Net(nn.Sequential):
    """Convolutions that follow each other directly, and linear layers."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 32), nn.GELU(), nn.Linear(32, 10),
        )  # fmt: skip


MODELS = {
    "net, DenseShift 3, 8 bits": (Net, {"weight": DenseShift(bits=3), "activation": LSQ(bits=8)}, 16),
    "net, StatsQ 2, 4 bits": (Net, {"weight": StatsQ(bits=2), "activation": PACT(bits=4)}, 16),
    "resnet8": ("resnet8", {"weight": DenseShift(bits=3), "activation": LSQ(bits=8), "first_last": 8}, 32),
    "vit_nano": (
        "vit_nano",
        {"weight": StatsQ(bits=2), "activation": LSQ(bits=4), "first_last": 8, "unsigned": ("*.fc2",)},
        32,
    ),
    "vit_nano, attention with QKR": (
        "vit_nano",
        {
            "weight": StatsQ(bits=4),
            "activation": LSQ(bits=4, granularity="token", bias=True),
            "first_last": 8,
            "attention": True,
            "qkr": True,
        },
        32,
    ),
}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * ("net" not in name[:3])) for name in MODELS])
def exported(request, tmp_path):
    create, config, size = MODELS[request.param]
    torch.manual_seed(0)
    x = torch.randn(8, 3, size, size)
    model = packed(create() if callable(create) else lowbit.models.create(create, 10), config, x)
    return request.param, model, x, export_onnx(model, x, tmp_path / "model.onnx")


def with_integers(path):
    """The file with the integers of each layer's input as further outputs; their names and zero points, by layer."""
    proto = onnx.load(path)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    made = {output: node for node in proto.graph.node for output in node.output}
    entering = {}
    for node in proto.graph.node:
        if node.op_type in ("MatMul", "Conv"):
            pair, weight = (made.get(name) for name in node.input[:2])
            if weight is not None and weight.op_type == "DequantizeLinear" and ".whole" in weight.input[0]:
                integers, _, zero = pair.input
                entering[weight.input[0].removesuffix(".whole")] = integers, int(values[zero])
                element = onnx.helper.np_dtype_to_tensor_dtype(values[zero].dtype)
                if integers not in {output.name for output in proto.graph.output}:
                    proto.graph.output.append(onnx.helper.make_tensor_value_info(integers, element, None))
    return proto.SerializeToString(), entering


def onnxruntime_kernels(content, x, folder):
    """Outputs by name, and the operators that ONNX Runtime executes."""
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    executed = collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
    return dict(zip((output.name for output in session.get_outputs()), outputs, strict=True)), executed


def openvino_kernels(content, x, folder):
    """Outputs by name, and the kernels of OpenVINO's products with a weight."""
    pytest.importorskip("openvino", reason="needs openvino")
    from benchmarks.runtimes import openvino_core

    core = openvino_core()
    model = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = {output.get_any_name(): value for output, value in model([x.numpy()]).items()}
    facts = [node.get_rt_info() for node in model.get_runtime_model().get_ordered_ops()]
    products = [f for f in facts if f["layerType"].astype(str) in ("FullyConnected", "Convolution")]
    return outputs, collections.Counter(f["primitiveType"].astype(str) for f in products)


@pytest.mark.parametrize("engine", [onnxruntime_kernels, openvino_kernels])
def test_engines_calculate_with_integers_and_agree(exported, engine, tmp_path):
    name, model, x, path = exported
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    linear = sum(len(layer.shape) == 2 for layer in layers)
    outputs, kernels = engine(path.read_bytes(), x, tmp_path)
    if engine is openvino_kernels:
        assert sum(count for kernel, count in kernels.items() if kernel.lower().endswith("i8")) == len(layers)
    else:
        assert kernels["MatMulIntegerToFloat"] >= linear and not kernels["Gemm"]
        if name.startswith("net"):  # a convolution that hands integers on
            assert kernels["QLinearConv"] == len(layers) - linear and not kernels["Conv"]

    with torch.no_grad():
        expected = model(x)
    found = torch.from_numpy(next(iter(outputs.values())))
    content, entering = with_integers(path)
    outputs, _ = engine(content, x, tmp_path)
    integers = {of: torch.from_numpy(outputs[name].astype(np.int16)) - zero for of, (name, zero) in entering.items()}
    assert {n for n, module in model.named_modules() if isinstance(module, PackedLayer)} == integers.keys()
    if MODELS[name][1].get("attention"):  # the integers of queries, keys, ... are not among these
        assert (found - expected).norm() <= 0.1 * expected.norm()
        return
    rows = compare_integers(model, integers, x)
    # ONNX Runtime rounds the bias of a convolution between integers to the unit of its sums.
    units = [(layer.x_scale.max() * layer.scale.abs().max()).item() for layer in layers if len(layer.shape) == 4]
    slack = 0.5 * max(units, default=0) if engine is onnxruntime_kernels else 0
    assert (rows.first_step <= 1).all()
    assert (rows.from_border <= 1e-3 + slack / rows.step).all(), rows.to_string()
    assert (found - expected).norm() <= (0.1 if rows["first"].sum() or slack else 1e-5) * expected.norm()


def test_what_is_refused(tmp_path):
    with pytest.raises(LowbitError, match="not packed"):
        standard(lowbit.models.create("resnet8", 10))
    model, x = case("linear, calibrated")
    with pytest.raises(LowbitError, match="opset=20 is not allowed"):
        export_onnx(model, x, tmp_path / "model.onnx", opset=20)
