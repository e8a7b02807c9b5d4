"""Building, finding and choosing the native kernels; forks; sanitizers; other processors."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from kernel_helpers import forget, randn, random_weight

from lowbit.errors import LowbitError
from lowbit.kernels import build, native, shift_linear

ROOT = Path(build.__file__).resolve().parents[2]


def test_what_is_offered(library):
    isas = library.isas()
    assert isas[-1] == "portable" and library.isa() == isas[0]
    with library.use("portable"):
        assert library.isa() == "portable"
    assert library.isa() == isas[0]


def test_an_instruction_set_that_is_not_here_is_refused(library, monkeypatch):
    with pytest.raises(LowbitError, match=r"'sse9'.*none of that name; here are .*portable"), library.use("sse9"):
        pass
    monkeypatch.setenv("LOWBIT_ISA", "avx3")
    native._load.cache_clear()
    with pytest.raises(LowbitError, match="'avx3'"):
        native.available()
    monkeypatch.setenv("LOWBIT_ISA", "portable")
    native._load.cache_clear()
    assert native.isa() == "portable"
    monkeypatch.undo()
    native._load.cache_clear()
    native._load()[0].lb_select(None)  # the best again


def test_an_instruction_set_that_the_processor_lacks_is_refused(tmp_path):
    """The library as it is installed, not emulated."""
    if build.compiler() is None:
        pytest.skip("no C compiler: the native kernels are not tested")
    made = build.build(tmp_path / "plain.so", extra=("-O0",))
    there = ctypes_names(made, 0)
    for name in ctypes_names(made, 1):
        done = python(
            "from lowbit.kernels import native; print(native.isa())", LOWBIT_NATIVE=str(made), LOWBIT_ISA=name
        )
        if name in there:
            assert done.stdout.strip() == name
        else:
            assert f"'{name}' (LOWBIT_ISA): this processor does not offer it" in done.stderr


def ctypes_names(path, which):
    library = ctypes.CDLL(str(path))
    library.lb_isas.restype = ctypes.c_char_p
    return library.lb_isas(which).decode().split(",")


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT
    )


def test_arguments_lie_where_the_library_expects_them(tmp_path):
    """`native` packs the bytes of ``lb_args`` itself."""
    if build.compiler() is None:
        pytest.skip("no C compiler: the native kernels are not tested")
    fields = ("x", "out", "add", "x_type", "bits", "low", "threads", "add_type", "out_scale", "add_scale", "levels")
    source, program = tmp_path / "fields.c", tmp_path / "fields"
    sizes = "".join(f'printf("%zu ", offsetof(lb_args, {field}));' for field in fields)
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "lowbit.h"\n'
        f'int main(void) {{ {sizes} printf("%zu %d", sizeof(lb_args), LB_ABI); return 0; }}'
    )
    subprocess.run([build.compiler(), f"-I{build.FOLDER / 'csrc'}", str(source), "-o", str(program)], check=True)
    *offsets, size, abi = map(int, subprocess.run([program], capture_output=True, text=True).stdout.split())
    assert offsets == [8 * i for i in (0, 6, 7, 8, 11, 26, 31, 32, 33, 34, 35)]
    assert (size, abi) == (native._ARGS.size, native.ABI)


def test_libraries_that_cannot_be_used_are_not(library, monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    other = tmp_path / "other.c"
    other.write_text("int lb_abi(void) { return 99; }")
    subprocess.run([build.compiler(), "-shared", "-fPIC", str(other), "-o", str(tmp_path / "other.so")], check=True)
    refused = {"missing.so": "cannot be used", "broken.so": "cannot be used", "other.so": f"99, not {native.ABI}"}
    for name, message in refused.items():
        monkeypatch.setenv("LOWBIT_NATIVE", str(tmp_path / name))
        forget()
        assert not native.available()
        with pytest.warns(UserWarning, match=message):
            shift_linear(randn(1, 4), random_weight("denseshift2", (2, 4)))
    assert native.isa() is None and native.isas() == []
    with pytest.raises(LowbitError, match="no compiled kernels"), native.use("portable"):
        pass
    monkeypatch.undo()
    forget()


def test_importing_the_library_needs_neither_torch_nor_the_kernels():
    done = python("import sys, lowbit; assert 'torch' not in sys.modules and 'lowbit.kernels.ops' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(library):
    weight, x = random_weight("denseshift4", (300, 2000)), randn(50, 2000)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected = shift_linear(x, weight)  # the pool runs
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if all(torch.equal(shift_linear(x, weight), expected) for _ in range(5)) else 1)
            children.append(child)
        assert torch.equal(shift_linear(x, weight), expected)
        for child in children:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_no_gradient_flows(library):
    x = randn(3, 20).requires_grad_()
    y = shift_linear(x, random_weight("denseshift2", (4, 20)))
    with pytest.raises(RuntimeError):
        y.sum().backward()


def test_the_command_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no C compiler"):
        build.build(tmp_path / "x.so")
    with pytest.raises(RuntimeError, match="failed"):
        build.build(tmp_path / "x.so", cc="/bin/false")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [False, True])
def test_random_problems_in_c(tmp_path, sanitizer):
    """Every instruction set, with AMX emulated; once under the address and undefined-behavior sanitizers."""
    if build.compiler() is None:
        pytest.skip("no C compiler: the native kernels are not tested")
    extra = ("-O1",) if sanitizer else ()
    program = build.FOLDER / "csrc" / "selfcheck.c"
    made = build.build(
        tmp_path / "selfcheck", emulate_amx=True, sanitize=sanitizer, program=program, extra=(*extra, "-lm")
    )
    problems = "150" if sanitizer else "400"  # each takes several times as long with it
    done = subprocess.run([made, problems, "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) runs of them in Winograd's form", done.stdout)[1]) > 100
    print(done.stdout)


def test_random_problems_on_arm(tmp_path, aarch64):
    """The NEON kernels, without and with the dot-product extension, under an emulator."""
    compiler, emulator = aarch64
    program = build.FOLDER / "csrc" / "selfcheck.c"
    made = build.build(tmp_path / "selfcheck", cc=compiler, program=program, extra=("-static", "-lm"))
    for cpu in ("cortex-a57", "max"):
        done = subprocess.run([emulator, "-cpu", cpu, made, "60"], capture_output=True, text=True)
        assert done.returncode == 0, f"{cpu}: {done.stdout}{done.stderr}"
        assert "neon,neon_plain,portable" in done.stdout, cpu


@pytest.mark.slow
def test_an_installation_without_a_compiler_succeeds(tmp_path):
    """The wheel is built all the same, without the library, and its tag says so; asked for kernels, none is built."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "checkpoints")
    for package in ("lowbit", "lowbit_suite"):
        shutil.copytree(ROOT / package, tree / package, ignore=ignored)
    (tree / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "profiles.yaml", tree / "notebooks")
    for cc, expected in (("/nonexistent/cc", False), (build.compiler(), True)):
        if cc is None:
            continue
        command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", tmp_path / str(expected)]
        done = subprocess.run(command, env={**os.environ, "CC": cc}, cwd=tree, capture_output=True, text=True)
        if "No matching distribution found for setuptools" in done.stdout + done.stderr:
            pytest.skip("setuptools 77 or newer cannot be had here")
        assert done.returncode == 0, done.stderr
        (wheel,) = (tmp_path / str(expected)).glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert ("lowbit/kernels/_native.so" in names) == expected
        assert wheel.name.endswith("-py3-none-any.whl") != expected and "-py3-none-" in wheel.name
        assert {"lowbit/kernels/csrc/lowbit.h", "lowbit_suite/course/notebooks/profiles.yaml"} <= set(names)
        shutil.rmtree(tree / "build", ignore_errors=True)
    env = {**os.environ, "CC": "/nonexistent/cc", "LOWBIT_BUILD_KERNELS": "1"}
    assert subprocess.run(command, env=env, cwd=tree, capture_output=True).returncode != 0
