"""Packed models in ExecuTorch, as docs/howto/deploy.md shows it: XNNPACK's products in float, the same integers."""

import os
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.nn.onnx import standard
from lowbit.quantizers import LSQ, DenseShift

pytest.importorskip("executorch", reason="needs executorch 1.2 (with torch 2.11), which brings its own torchao")


@pytest.fixture(autouse=True)
def its_programs_are_found(monkeypatch):
    """Executorch calls flatc, which it installs beside Python."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(("name", "attention"), [("resnet8", False), ("vit_nano", True)])
@torch.no_grad()
def test_the_program_gives_the_same_answers(name, attention, tmp_path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass
    from executorch.runtime import Runtime

    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = lowbit.models.create(name, 10)
    config = lowbit.QuantConfig(DenseShift(bits=3), LSQ(bits=8), first_last=8, attention=attention)
    lowbit.calibrate(lowbit.quantize_(model, config), x)
    packed = lowbit.pack(model, x)
    exported = constant_prop_pass(torch.export.export(standard(packed), (x,)))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    delegated = [n for n in program.exported_program().graph.nodes if "executorch_call_delegate" in str(n.target)]
    assert delegated and not any("convolution" in str(n.target) for n in program.exported_program().graph.nodes)
    file = tmp_path / "model.pte"
    file.write_bytes(program.to_executorch().buffer)
    found = Runtime.get().load_program(file).load_method("forward").execute([x])[0]
    assert (found - packed(x)).norm() <= 1e-5 * packed(x).norm()
