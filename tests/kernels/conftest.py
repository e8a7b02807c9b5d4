"""The compiled kernels under test, built here with AMX emulated: every x86 path runs on any AVX-512 machine."""

import os
import platform
import shutil

import pytest
from kernel_helpers import forget

from lowbit.kernels import build, native

ARM = platform.machine().lower() in ("arm64", "aarch64")
ISAS = ("portable", "neon", "neon_plain") if ARM else ("portable", "avx2", "avx512vnni", "amx")


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """Path of a library with emulated AMX; real AMX hardware was not available to any test here."""
    if build.compiler() is None:
        pytest.skip("no C compiler: the native kernels are not tested")
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root  # one build for all workers, or nearly
    path = shared / "lowbit_emulated.so"
    return path if path.exists() else build.build(path, emulate_amx=True)


@pytest.fixture(scope="package")
def library(emulated_library):
    """`native` with that library, whatever is installed."""
    names = ("LOWBIT_NATIVE", "LOWBIT_ISA")
    before = {name: os.environ.get(name) for name in names}
    os.environ["LOWBIT_NATIVE"] = str(emulated_library)
    os.environ.pop("LOWBIT_ISA", None)
    forget()
    assert native.available(), native.why_not()
    yield native
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    forget()


@pytest.fixture(scope="session")
def fuzz_program(tmp_path_factory):
    """The fuzzer's entry for files named on the command line, with the address and undefined-behavior sanitizers."""
    if build.compiler() is None:
        pytest.skip("no C compiler: hostile plans are not tried under the sanitizers")
    folder, program = tmp_path_factory.mktemp("fuzz"), build.FOLDER / "csrc" / "fuzz_plan.c"
    try:
        return build.build(folder / "fuzz", sanitize=True, program=program, extra=("-DWITH_MAIN", "-O1"))
    except RuntimeError as error:
        pytest.skip(f"the sanitizers cannot be linked here: {error}")


@pytest.fixture(params=ISAS)
def isa(request, library):
    """Each instruction set in turn, in use."""
    if request.param not in library.isas():
        pytest.skip(f"{request.param} is not offered here: {', '.join(library.isas())} are")
    with library.use(request.param):
        yield request.param


@pytest.fixture
def no_library(monkeypatch):
    """The state of an installation without a compiler."""
    monkeypatch.setenv("LOWBIT_NATIVE", "0")
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture(scope="session")
def aarch64():
    """``(compiler, emulator)`` for 64-bit Arm."""
    tools = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if None in tools:
        pytest.skip("no aarch64-linux-gnu-gcc or no qemu-aarch64: the NEON kernels are not tested here")
    return tools
