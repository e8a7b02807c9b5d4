"""Plans in C: the same bits on every instruction set, hostile files, and the program that runs them without Python."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lowbit
from lowbit.engine import format as file_format
from lowbit.engine.format import MAP, Op, Tensor
from lowbit.errors import LowbitError
from lowbit.kernels import build
from lowbit.kernels.packing import pack
from lowbit.models import create
from lowbit.nn import QuantConfig
from lowbit.quantizers import LSQ, DenseShift, StatsQ

ROOT = Path(lowbit.__file__).parent.parent


def packed(model: nn.Module, x: torch.Tensor, bits: int = 3, **more) -> nn.Module:
    """A calibrated and packed model."""
    settings = {"weight": DenseShift(bits=bits), "activation": LSQ(bits=8), "first_last": 8} | more
    lowbit.quantize_(model, QuantConfig(**settings))
    lowbit.calibrate(model.eval(), x)
    return lowbit.pack(model, x)


class Parts(nn.Module):
    """Most operations of plans, on a small image."""

    def __init__(self):
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, groups=5)
        self.second, self.norm = nn.Conv2d(5, 6, 3, padding=1), nn.LayerNorm(6)
        self.groups = nn.Conv2d(6, 6, 1, groups=2)
        self.pools = nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1))
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        y = self.first(x).relu()
        y = self.second(nn.functional.silu(self.deep(y))) + 1
        y = self.groups(y) * torch.sigmoid(y.mean((2, 3), keepdim=True))
        rows = self.norm(self.pools(y).flatten(2).transpose(1, 2))
        rows = nn.functional.gelu(rows)
        rows = torch.softmax(rows @ rows.transpose(1, 2), -1) @ rows
        return self.last(torch.cat([rows, rows.flip(1)], 2).mean(1))


@pytest.fixture(scope="module")
def plans():
    """Files of plans with an input each, by name; together they have every operation."""
    torch.manual_seed(0)
    made = {}

    def add(name, model, shape, bits=3, **more):
        x = torch.randn(3, *shape)
        plan = lowbit.plan(packed(model, x, bits, **more), x)
        made[name] = plan.content, x.numpy(), [row["kind"] for row in plan.operations()]

    image = (3, 32, 32)
    add("resnet8", create("resnet8"), image)
    add("resnet8 of 4 bits", create("resnet8"), image, 4)
    add("resnet8 of few activations", create("resnet8"), image, activation=LSQ(bits=4))  # Winograd's form
    add("vit", create("vit_nano_patch8"), image)
    attention = {"weight": StatsQ(bits=3), "activation": LSQ(bits=4), "attention": True}
    add("low-bit attention", create("vit_nano_patch8"), image, **attention)
    add("query-key attention", create("vit_nano_patch8"), image, qkr=True, **attention)
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=16, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=5
    )
    add("low-bit attention with positions", swin, (3, 16, 16), **attention)
    add("ds_cnn", create("ds_cnn"), (1000,))
    add("parts", Parts(), (3, 9, 8))
    add("full precision at the ends", create("resnet8"), image, first_last=None)
    add("scales of the inputs", create("resnet8"), image, activation=None)
    return made


def test_every_operation_is_among_them(plans):
    assert {kind for _, _, kinds in plans.values() for kind in kinds} == set(file_format.KINDS)


def run(content: bytes, x: np.ndarray, threads: int = 1) -> np.ndarray:
    return lowbit.Plan(content, threads)(x)


def test_all_instruction_sets_and_threads_agree(plans, library):
    """To the bit, float operations included."""
    for name, (content, x, _) in plans.items():
        with library.use("portable"):
            expected = run(content, x)
        for isa in library.isas():
            with library.use(isa):
                for threads in (1, 3):
                    np.testing.assert_array_equal(run(content, x, threads), expected, err_msg=f"{name} {isa}")
                    np.testing.assert_array_equal(run(content, x[:1], threads), expected[:1], err_msg=f"{name} {isa}")


@pytest.mark.parametrize("name", ["resnet8 of few activations", "resnet8 of 4 bits"])
def test_an_instruction_set_chosen_after_loading(name, plans, library):
    """Weights that were transformed for another one are not used, nor what was found in them."""
    content, x, _ = plans[name]
    plan = lowbit.Plan(content)
    expected = plan(x)
    for isa in library.isas():
        with library.use(isa):
            np.testing.assert_array_equal(plan(x), expected)


@pytest.mark.parametrize("rows", [1, 3, 8, 30])
@pytest.mark.parametrize("share", [0, 0.004, 0.1, 1])
def test_weights_beyond_int8_found_beforehand(share, rows, library):
    """From none to all of the levels are +128; 40 outputs of 200 inputs."""
    draw = np.random.default_rng(2)
    codes = np.where(draw.random((40, 200)) < share, 15, draw.integers(0, 15, (40, 200)))
    levels = np.concatenate([np.arange(-7, 8), [128]]).astype(np.int16)
    weights = levels[codes].astype(np.int64)
    data = {0: pack(torch.from_numpy(codes), 4).numpy(), 1: np.ones(40, np.float32), 4: levels}
    data[2] = weights.sum(1).astype(np.int32)
    x, y = Tensor(1, rows, 200), Tensor(1, rows, 40)
    image = Tensor(1, rows, 200, MAP, place=200, low=-128, high=127)
    window = {2: 4, 3: 1, 4: 1, 5: 1, 6: 1, 9: 1, 10: 1}
    ops = [
        Op("quantize", [x], None, image, n={0: 0, 1: 200}, f={0: 1.0}),
        Op("product", [image], y, n=window, f={0: 1.0}),
    ]
    ops[1].data = data
    content = file_format.write(ops, x, y)
    inputs = draw.integers(-128, 128, (2, rows, 200)).astype(np.float32)
    expected = (inputs.astype(np.int64) @ weights.T).reshape(2, -1)
    for isa in library.isas():
        with library.use(isa):
            np.testing.assert_array_equal(run(content, inputs.reshape(2, -1)), expected, err_msg=isa)


def test_calls_from_several_threads(plans, library):
    """Each call works in memory of its own."""
    content, _, _ = plans["vit"]
    plan = lowbit.Plan(content, 2)
    inputs = [np.random.default_rng(seed).standard_normal((2, 3, 32, 32), np.float32) for seed in range(24)]
    expected = [plan(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for actual, wanted in zip(pool.map(plan, inputs), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


# ---- files that nobody should trust ----


@st.composite
def hostile(draw, content: bytes) -> bytes:
    """A plan's file with a few fields set to anything, cut, or extended."""
    data = bytearray(content)
    header = np.frombuffer(content, file_format.HEADER, 1)[0]
    head = int(header["data_offset"])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, head // 4 - 2)) * 4
        size = draw(st.sampled_from([1, 4, 8]))
        signed = draw(st.one_of(st.sampled_from([-1, 0, 1, 2, 63, 64, 65, 255, 4096, 2**24, 2**31 - 1, -(2**31)])))
        wide = draw(st.sampled_from([signed, 2**62, -(2**63), 2**63 - 1])) if size == 8 else signed
        data[at : at + size] = (wide % 2 ** (8 * size)).to_bytes(size, "little")
    if draw(st.integers(0, 5)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    if draw(st.integers(0, 5)) == 0:
        data += bytes(draw(st.integers(1, 100)))
    return bytes(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(data=st.data())
def test_hostile_files_are_refused_or_run(plans, data):
    """Under the sanitizers the program below repeats this; here nothing may crash, and the error is one sentence."""
    name = data.draw(st.sampled_from(["parts", "low-bit attention", "scales of the inputs"]))
    content = data.draw(hostile(plans[name][0]))
    try:
        plan = lowbit.Plan(content, 1)
    except LowbitError as error:
        assert str(error).startswith("this is not a plan that can be run: ")
        return
    if plan.inputs < 10_000 and plan.outputs < 10_000 and plan.arena_bytes < 10_000_000:
        assert plan(np.ones((1, plan.inputs), np.float32)).shape == (1, plan.outputs)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("magic", b"something el", "not a plan"),
        ("version", 7, "another version"),
        ("file_bytes", 100, "cut short"),
        ("tensors", 1 << 20, "impossible numbers of tensors"),
        ("arena_bytes", 64, "outside the arena"),
        ("output", 0, "impossible input, output"),
        ("ops", 1, "never written"),
    ],
)
def test_what_is_wrong_is_said(plans, field, value, why):
    content = bytearray(plans["parts"][0])
    np.frombuffer(content, file_format.HEADER, 1)[field] = value
    with pytest.raises(LowbitError, match=why):
        lowbit.Plan(bytes(content))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        (("kind",), 99, "of unknown kind"),
        (("in", 0), 9999, "a tensor that does not exist"),
        (("n", 3), -5, "an impossible number"),
        (("out", 1), -2, "a tensor that does not exist"),
        (("data", 0, 0), -(2**63), "another size|wrong tensors"),
        (("data", 0, 1), -(2**63), "another size|wrong tensors"),
    ],
)
def test_a_wrong_operation_is_named(plans, field, value, why):
    content = bytearray(plans["resnet8"][0])
    header = np.frombuffer(content, file_format.HEADER, 1)[0]
    at = file_format.HEADER.itemsize + int(header["tensors"]) * file_format.TENSOR.itemsize
    ops = np.frombuffer(content, file_format.OP, int(header["ops"]), at)
    name, *index = field
    if index:
        ops[1][name][tuple(index)] = value
    else:
        ops[1:2][name] = value
    with pytest.raises(LowbitError, match=rf"operation 1: .*({why})"):
        lowbit.Plan(bytes(content))


def test_overlapping_tensors_are_refused(plans):
    """A fuzzer's finding: pieces were copied onto themselves."""
    content = bytearray(plans["parts"][0])
    header = np.frombuffer(content, file_format.HEADER, 1)[0]
    np.frombuffer(content, file_format.TENSOR, int(header["tensors"]), file_format.HEADER.itemsize)["offset"][2:] = 0
    with pytest.raises(LowbitError, match="operation 1: tensors that overlap"):
        lowbit.Plan(bytes(content))


def test_hostile_files_under_the_sanitizers(plans, fuzz_program, tmp_path):
    """The fuzzer's entry, on a thousand files made as above, with the address and undefined-behavior sanitizers."""
    draw = np.random.default_rng(0)
    paths = []
    for number in range(1000):
        name = ["parts", "low-bit attention", "scales of the inputs", "ds_cnn"][number % 4]
        content = bytearray(plans[name][0])
        head = int(np.frombuffer(content, file_format.HEADER, 1)[0]["data_offset"])
        for _ in range(draw.integers(1, 4) if number >= 4 else 0):
            at, size = int(draw.integers(0, head // 4 - 2)) * 4, int(draw.choice([1, 4, 8]))
            value = int(draw.choice([-1, 0, 1, 2, 3, 16, 64, 255, 4096, 2**24, 2**31 - 1, -(2**31), 2**62, -(2**63)]))
            content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        paths.append(tmp_path / f"{number}.lbp")
        paths[-1].write_bytes(content)
    done = subprocess.run([fuzz_program, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "1000 files\n"


# ---- without Python ----


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """``lowbit-run`` and ``liblowbit.a``, built for this machine."""
    if build.compiler() is None:
        pytest.skip("no C compiler: the runner is not tested")
    return build.build_runner(tmp_path_factory.mktemp("runner"))


def answers(program: list, plan: Path, x: Path, **options) -> np.ndarray:
    done = subprocess.run([*program, plan, x], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return np.array([line.split() for line in done.stdout.splitlines()], np.float32)


def test_the_runner_in_an_empty_folder(plans, runner, tmp_path):
    """Without any environment; the numbers are printed with enough digits to be the same floats."""
    for name, (content, x, _) in plans.items():
        (tmp_path / "net.lbp").write_bytes(content)
        np.save(tmp_path / "x.npy", x)
        x.tofile(tmp_path / "x.raw")
        expected = run(content, x)
        for file in ("x.npy", "x.raw"):
            actual = answers([runner], Path("net.lbp"), Path(file), cwd=tmp_path, env={})
            np.testing.assert_array_equal(actual, expected, err_msg=name)


def test_what_the_runner_says(plans, runner, tmp_path):
    plan, x = tmp_path / "net.lbp", tmp_path / "x.npy"
    plan.write_bytes(plans["resnet8"][0])
    np.save(x, plans["resnet8"][1])

    def say(*arguments):
        done = subprocess.run([runner, *map(str, arguments)], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    status, out, _ = say(plan, x, "--time", 3, "--threads", 2)
    assert status == 0
    assert "2 threads: median" in out
    for arguments in ((), (plan,), (plan, x, x), (plan, x, "--time"), (plan, x, "--threads", "0")):
        assert say(*arguments)[0] == 2
    np.save(tmp_path / "double.npy", np.zeros((1, 3, 32, 32)))
    np.save(tmp_path / "short.npy", np.zeros((1, 3, 32), np.float32))
    items = np.zeros((3, 3, 32, 32), np.float32)
    np.save(tmp_path / "cut.npy", items)
    whole = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[: -items.nbytes // 3])  # the other two would do
    (tmp_path / "long.npy").write_bytes(whole + bytes(items.nbytes // 3))
    (tmp_path / "cut.lbp").write_bytes(plan.read_bytes()[:1000])
    for arguments, why in (
        ((tmp_path / "none", x), "No such file"),
        ((tmp_path / "cut.lbp", x), "cut short"),
        ((x, x), "not a plan"),
        ((plan, tmp_path / "double.npy"), "not of float32"),
        ((plan, tmp_path / "short.npy"), "takes 3072 numbers"),
        ((plan, tmp_path / "cut.npy"), "fewer or more numbers than its shape says"),
        ((plan, tmp_path / "long.npy"), "fewer or more numbers than its shape says"),
    ):
        status, out, error = say(*arguments)
        assert (status, out) == (1, "")
        assert error.startswith("lowbit-run: ") and why in error and error.count("\n") == 1
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run([runner, plan, x], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert "standard output: No space left" in done.stderr


def test_the_runner_is_small(runner, tmp_path):
    """What it adds to an empty static program, which is about 680 kB with glibc 2.36: then it has less than 1 MiB."""
    source, empty = tmp_path / "empty.c", tmp_path / "empty"
    source.write_text("int main(void) { return 0; }\n")
    if subprocess.run([build.compiler(), source, "-static", "-s", "-o", empty], capture_output=True).returncode:
        pytest.skip("programs are not static here: the runner's size is not looked at")
    assert runner.stat().st_size - empty.stat().st_size < 365_000


def test_the_runner_on_arm(plans, tmp_path, aarch64):
    """The same bits under an emulator, with and without the dot-product extension."""
    compiler, emulator = aarch64
    made = build.build_runner(tmp_path, cc=compiler)
    for name in ("resnet8", "vit", "low-bit attention", "ds_cnn", "parts"):
        content, x, _ = plans[name]
        (tmp_path / "net.lbp").write_bytes(content)
        np.save(tmp_path / "x.npy", x[:1])
        for cpu in ("cortex-a57", "max"):
            actual = answers([emulator, "-cpu", cpu, made], tmp_path / "net.lbp", tmp_path / "x.npy")
            np.testing.assert_array_equal(actual, run(content, x[:1]), err_msg=f"{name} {cpu}")


def test_the_example_classifies_digits(runner, tmp_path):
    """The 30 lines of examples/digit.c, with a plan that ``lowbit export`` makes of a file."""
    data = lowbit.data.load("digits")
    images, labels = data.test.x, data.test.y
    model = create("resnet20", in_chans=1, img_size=8, pretrained="digits")
    mean, std = (torch.tensor(numbers) for numbers in (data.mean, data.std))
    x = (images[:64].float() / 255 - mean) / std
    model = packed(model, x, weight=LSQ(bits=4))
    saved, plan = lowbit.save(model, tmp_path / "digits.safetensors"), tmp_path / "digits.lbp"
    subprocess.run([sys.executable, "-m", "lowbit", "export", saved, plan], check=True, env={**os.environ})
    program = tmp_path / "digit"
    folder = build.FOLDER / "csrc"
    files = [ROOT / "examples" / "digit.c", runner.parent / build.ARCHIVE]
    subprocess.run([build.compiler(), f"-I{folder}", *files, "-pthread", "-lm", "-o", program], check=True)
    expected = lowbit.load_plan(plan)(x).argmax(1)
    said = [
        int(subprocess.run([program, plan], input=image.numpy().tobytes(), capture_output=True, check=True).stdout)
        for image in x
    ]
    assert said == expected.tolist()
    assert (expected == labels[:64]).float().mean() > 0.8  # 4 bits, not trained any further


def test_plans_need_no_torch(plans, tmp_path):
    (tmp_path / "net.lbp").write_bytes(plans["resnet8"][0])
    np.save(tmp_path / "x.npy", plans["resnet8"][1])
    code = (
        "import sys, numpy; from lowbit.engine import load_plan; y = load_plan('net.lbp')(numpy.load('x.npy'))\n"
        "assert 'torch' not in sys.modules, 'torch'; print(y.shape)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "(3, 10)\n", done.stderr


def test_no_compiled_kernels(plans, no_library):
    with pytest.raises(LowbitError, match="no compiled kernels"):
        lowbit.Plan(plans["resnet8"][0])
