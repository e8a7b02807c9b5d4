"""``lowbit bench kernels`` and ``models``: that engines compute the right thing, and what is made of their times."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import cases, kernels, models, report, roofline, runtimes
from lowbit import environment
from lowbit.errors import LowbitError
from lowbit.kernels import reference
from lowbit_suite.app import app

PRODUCT = cases.Case(5, 64, 48)
CONVOLUTION = cases.Case(36, 32, 16, image=6)
NATIVE = [name for name in kernels.ENGINES if name.startswith("lowbit") and "compiled" not in name]


@pytest.fixture
def small_copies(monkeypatch):
    monkeypatch.setattr(cases, "COLD_BYTES", 2**13)


@pytest.fixture(autouse=True)
def as_before():
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


@pytest.mark.parametrize("case", [PRODUCT, CONVOLUTION], ids=["product", "convolution"])
@pytest.mark.parametrize("given", [False, True])
def test_what_engines_are_checked_against_is_the_reference(case, given):
    weight = case.packed(3)
    x, scale = kernels._given(case, given)
    function, geometry = (reference.conv2d, {"padding": (1, 1)}) if case.image else (reference.linear, {})
    assert torch.equal(cases.exact(case, x, weight), function(x, weight, x_scale=scale, **geometry))


@pytest.mark.parametrize("case", [PRODUCT, CONVOLUTION], ids=["product", "convolution"])
@pytest.mark.parametrize("name", NATIVE)
def test_native_engines_compute_the_reference(case, name):
    if not kernels.native.available():
        pytest.skip(kernels.native.why_not())
    built = kernels.ENGINES[name](case, 1)
    given = name.endswith("int8 in")
    bits = int(name.removeprefix("lowbit ")[0])
    spread = next((levels for levels in ("uniform", "trained") if levels in name), "denseshift")
    weight = case.packed(bits, spread)
    assert torch.equal(built.step(), cases.exact(case, kernels._given(case, given)[0], weight))
    assert built.facts["bytes"] == weight.nbytes


def test_the_compiled_form_computes_the_reference(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # what it computes, without the wait
    for case in (PRODUCT, CONVOLUTION):
        built = kernels.ENGINES["lowbit 4-bit compiled"](case, 1)
        assert torch.equal(built.step(), cases.exact(case, case.input(), case.packed(4)))


def test_wrong_results_are_not_timed(monkeypatch):
    if not kernels.native.available():
        pytest.skip(kernels.native.why_not())
    right = kernels.kernels.shift_linear
    monkeypatch.setattr(kernels.kernels, "shift_linear", lambda *args, **kw: right(*args, **kw) + 1e-6)
    with pytest.raises(LowbitError, match="differs from the reference"):
        kernels.ENGINES["lowbit 2-bit"](PRODUCT, 1)
    y = torch.ones(4)
    assert cases.check_close(y * 1.01, y, 0.02) == pytest.approx(0.01, abs=1e-6)
    for wrong in (y * 1.1, y * float("nan"), y[:2]):
        with pytest.raises(LowbitError, match="not timed"):
            cases.check_close(wrong, y, 0.02)


@pytest.mark.parametrize("name", ["torch fp32", "torch bf16", "torch int8, int8 in"])
def test_engines_of_torch_compute_the_product(name, small_copies):
    for case in (PRODUCT, CONVOLUTION, cases.Case(1, 64, 32, cold=True)):
        assert kernels.ENGINES[name](case, 1).facts["error"] < 0.02


@pytest.mark.parametrize("name", [name for name in kernels.ENGINES if name.startswith(("onnxruntime", "openvino"))])
def test_peers_compute_the_product(name, small_copies):
    pytest.importorskip(name.split()[0])
    pytest.importorskip("onnx")
    try:
        kernels.ENGINES[name](PRODUCT, 1)
    except LowbitError as error:
        # Without VNNI their 8-bit products saturate, which the benchmark notices and refuses to time.
        if "off by" in str(error) and name.endswith(" int8") and "avx512_vnni" not in environment.describe()["isa"]:
            pytest.skip(f"{name} computes wrong products on this processor: {error}")
        raise
    for case in (PRODUCT, cases.Case(1, 128, 32, cold=True)):
        built = kernels.ENGINES[name](case, 1)
        built.step()
        assert built.facts["error"] < runtimes.TOLERANCE
    if "weights" in name:
        with pytest.raises(LowbitError, match="no convolution"):
            kernels.ENGINES[name](CONVOLUTION, 1)
    else:
        assert kernels.ENGINES[name](CONVOLUTION, 1).facts["error"] < runtimes.TOLERANCE


SIGNAL_STACK = """
import ctypes, gc
import torch
from benchmarks import runtimes
from benchmarks.cases import Case

class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

def mapped():
    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    ranges = ([int(edge, 16) for edge in line.split()[0].split("-")] for line in open("/proc/self/maps"))
    return any(low <= stack.start and stack.start + stack.size <= high for low, high in ranges)

assert mapped()  # that of faulthandler
built = [runtimes.openvino_weights(Case(1, 64, 32), 1, 8) for _ in range(2)]
while built:
    del built[0]  # the older one first
    gc.collect()
    assert mapped()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_signals_keep_their_stack_when_openvino_is_gone():
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", SIGNAL_STACK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_weights_from_memory_are_gone_round():
    assert cases.Case(1, 8, 8, cold=True).copies(2**20) == 256
    assert cases.Case(1, 8, 8).copies(2**20) == 1
    seen = []
    step = cases.rotate([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(4):
        step()
    assert seen == [0, 1, 2, 0]


def test_a_convolution_counts_as_its_product():
    conv, product = cases.CASES["conv-64"], cases.CASES["resnet-early"]
    assert conv.operations == product.operations == 2 * 3136 * 576 * 64


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["kernels", "--shape", "m7"], "gemv-cold"),
        (["kernels", "--engine", "tvm*"], "onnxruntime 2-bit weights"),
        (["models", "--model", "vgg"], "resnet18"),
        (["models", "--engine", "tvm"], "openvino bf16"),
    ],
)
def test_unknown_names_are_refused_with_those_allowed(arguments, known):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2 and known in result.stderr


def test_names_may_be_patterns():
    known = list(kernels.ENGINES)
    assert kernels.select(["lowbit ?-bit"], known, "--engine") == [f"lowbit {bits}-bit" for bits in (2, 3, 4)]
    for given in (None, ["lowbit*"]):
        assert not set(kernels.select(given, known, "--engine", kernels.SLOW)) & kernels.SLOW
    assert kernels.select(["lowbit 3-bit compiled"], known, "--engine", kernels.SLOW) == ["lowbit 3-bit compiled"]
    assert "deit-small" not in kernels.select(None, list(models.MODELS), "--model", models.OPTIONAL)


def _outcome():
    """Two cases of 1 ms and 2 ms on one native engine."""
    outcome = kernels.Outcome()
    for case, seconds, m in (("a", 0.001, 1), ("b", 0.002, 8)):
        times = {kernels.BASELINE: [0.01] * 3, "lowbit 2-bit": [seconds] * 3}
        outcome.results += report.summarize(case, times, kernels.BASELINE, threads=1, unit="µs")
        for name in times:
            facts = {"bytes": 4 * 10**6, "operations": 6 * 10**9, "m": m}
            outcome.facts.append({"case": case, "threads": 1, "engine": name, **facts})
    return outcome


def test_units_and_what_was_attained():
    outcome = _outcome()
    assert [result["median"] for result in outcome.results] == pytest.approx([1e4, 1e3, 1e4, 2e3])
    reads, multiplies = roofline.attained(outcome)
    assert (reads["value"], reads["unit"]) == (pytest.approx(4), "GB/s")
    assert (multiplies["value"], multiplies["unit"]) == (pytest.approx(3000), "GOP/s")


def test_roofs_are_measured():
    roofs = roofline.measure(1, memory_bytes=2**20, products={"small": cases.Case(32, 64, 64)})
    found = {roof["what"]: roof for roof in roofs}
    assert {"memory read", "fp32 best"} <= set(found)
    assert all(roof["value"] > 0 and roof["threads"] == 1 for roof in roofs)
    assert found["memory read"]["unit"] == "GB/s" and found["fp32 best"]["how"] == "small"


def test_files(tmp_path):
    outcome = _outcome()
    roofs = [{"what": "memory read", "threads": 1, "value": 10.0, "unit": "GB/s", "how": "torch.sum"}]
    assert roofline.save(roofline.draw(outcome, roofs), tmp_path / "new" / "roofs.png").stat().st_size > 10_000
    about = {"machine": report.machine(), "skipped": [], "roofline": roofs}
    path, beside = report.write(tmp_path / "new" / "kernels.json", outcome.results, about)
    keys = {"case", "engine", "threads", "median", "unit", "ratio", "baseline", "repeats"}
    assert all(set(result) == keys for result in json.loads(path.read_text()))
    assert beside.name == "kernels.machine.json"
    machine = json.loads(beside.read_text())["machine"]
    assert {"cpu", "isa", "caches", "torch", "date", "load_average", "peers"} <= set(machine)


def test_tables_and_reasons_are_printed(capsys):
    report.show(_outcome().results)
    sizes = models.amounts("resnet20: file", {models.BASELINE: 2.0, "lowbit 2-bit": 0.5}, 1)
    report.show(sizes)
    skipped = [{"case": case, "engine": "tvm", "threads": 1, "reason": "it is [not] here"} for case in ("a", "b")]
    report.show_skipped(skipped)
    out = capsys.readouterr().out
    assert "lowbit 2-bit" in out and "MB" in out and "0.25" in out
    assert "skipped: tvm (a; b): it is [not] here" in out


def test_packed_models_compute_what_the_quantized_ones_do(tmp_path):
    model = models.Model("resnet8", 16, 10)
    built = models.ENGINES["lowbit 3-bit"](model, 1, tmp_path)
    assert built.facts["error"] < 0.01
    baseline = models.ENGINES[models.BASELINE](model, 1, tmp_path)
    assert built.facts["mb"] < baseline.facts["mb"] / 2
    assert torch.isfinite(built.step()).all() and built.step().std() > 0
