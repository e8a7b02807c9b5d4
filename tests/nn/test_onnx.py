"""ONNX export of packed models: ONNX Runtime computes the same numbers."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn.onnx import export_onnx, standard
from lowbit.quantizers import LSQ, DenseShift, StatsQ

runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript")

CASES = {
    "linear, calibrated": (nn.Linear(24, 20), {"weight": DenseShift(bits=3), "activation": LSQ(bits=4)}, (5, 24)),
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
}


def packed(model, config, x):
    lowbit.quantize_(model, lowbit.QuantConfig(**{"first_last": "same", **config}))
    lowbit.calibrate(model, x)
    return lowbit.pack(model, x)


def run(path, x):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("case", CASES)
def test_one_layer_is_the_same_to_the_bit(case, tmp_path):
    layer, config, shape = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = packed(nn.Sequential(layer), dict(config), x)
    with torch.no_grad():
        assert torch.equal(standard(model)(x), model(x))
        path = export_onnx(model, x, tmp_path / "layer.onnx")
        assert torch.equal(run(path, x), model(x))
    assert b".py" not in path.read_bytes()  # no word of where the exporting machine keeps its files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "vit_nano"])
def test_a_whole_model_predicts_the_same(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32)
    attention = {"attention": True, "unsigned": ("*.fc2",)} if "vit" in name else {}
    config = {
        "weight": DenseShift(bits=3, scale="statistical"),
        "activation": LSQ(bits=8),
        "first_last": 8,
        **attention,
    }
    model = packed(lowbit.models.create(name, 10), config, x)
    with torch.no_grad():
        expected, found = model(x), run(export_onnx(model, x, tmp_path / "model.onnx"), x)
    assert torch.equal(expected.argmax(1), found.argmax(1))
    assert (expected - found).norm() < 0.02 * expected.norm()  # sums of float layers in another order turn a rounding


def test_an_unpacked_model_is_refused():
    with pytest.raises(LowbitError, match="not packed"):
        standard(lowbit.models.create("resnet8", 10))
