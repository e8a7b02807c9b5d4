"""Programs that answer one question each: what they print, and what is said of those that fail."""

import sys

import numpy as np
import pytest
import torch

import lowbit
from benchmarks import models, start
from lowbit.errors import LowbitError

MODEL = models.Model("resnet8", 16, 10)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc, which Linux has")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("start")
    np.save(made / "x.npy", MODEL.inputs().numpy())
    return made


def program(folder, kind, file):
    command = [sys.executable, "-c", start.IN_PYTHON.format(start.PROGRAMS[kind]), str(file), str(folder / "x.npy")]
    return start.Program(command, file, 1e-3)


@LINUX
def test_a_plan_answers_without_torch_in_little_memory(folder):
    packed, x = lowbit.pack(models.quantized(MODEL, 3), MODEL.inputs()), MODEL.inputs()
    plan, saved = lowbit.plan(packed, x, 1), lowbit.save(packed, folder / "packed.safetensors")
    alone, beside = program(folder, "plan", plan.save(folder / "plan.lbp")), program(folder, "lowbit", saved)
    assert torch.allclose(start.first_answer("plan", alone), plan(x), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(start.first_answer("lowbit", beside), packed(x), rtol=1e-5, atol=1e-5)
    assert start.peak("plan", alone) < start.peak("lowbit", beside) / 3  # torch alone is more


@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_peers_answer_too(folder, kind):
    pytest.importorskip(kind)
    pytest.importorskip("onnxscript")
    answer = start.first_answer(kind, program(folder, kind, models.onnx_file(MODEL, folder)))
    with torch.no_grad():
        assert torch.allclose(answer, MODEL.create()(MODEL.inputs()), rtol=1e-3, atol=1e-3)


def test_a_program_that_fails_is_named(folder):
    with pytest.raises(LowbitError, match=r"^plan failed: .*is not a plan"):
        start.first_answer("plan", program(folder, "plan", folder / "x.npy"))


@LINUX
def test_every_engine_takes_part(monkeypatch, folder):
    """Times of a quick stand-in for all of them: one line for each engine, quantity and model."""
    quick = start.Program([sys.executable, "-c", "import time; print(1); time.sleep(0.3)"], folder / "x.npy", 0.0)
    loud = "print(1); import sys; print('VmHWM: 2000 kB', file=sys.stderr)"
    engines = {models.BASELINE: start.Program([sys.executable, "-c", loud], folder / "x.npy", 0.0), "a runner": quick}
    monkeypatch.setattr(start, "programs", lambda model, inside: engines)
    monkeypatch.setattr(start, "check_close", lambda y, expected, tolerance: None)
    results = start.run(["tiny"], repeats=2, known={"tiny": MODEL})
    assert [(r["case"].split(": ")[1], r["engine"], r["unit"]) for r in results] == [
        (what, engine, unit)
        for what, unit in (("process start to first answer", "ms"), ("peak memory", "MB"), ("file", "MB"))
        for engine in engines
    ]
    assert results[2]["median"] == 2.048 and results[3]["median"] > 1
