"""What this machine and installation are: recorded with every measurement, and shown by ``lowbit doctor``."""

import functools
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from lowbit import paths

PACKAGES = ("torch", "torchvision", "torchaudio", "timm", "numpy", "papermill")
"""The packages whose versions can change a measured number."""

ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "neon")
"""The instruction sets that the kernels of this project ask for."""


def describe() -> dict:
    """Versions, hardware and state of the source tree, as JSON holds them; no paths, no names of users or hosts.

    Keys: ``python``, one for each of `PACKAGES` (None where missing), ``os``, ``cpu``, ``isa`` (list), ``cores``
    (logical), ``threads`` (torch's default here), ``memory_gb``, ``device`` (``cpu`` or ``cuda``), ``gpu`` (name or
    None), ``compiler`` (C++ compiler and version, or None), ``commit`` (or None), ``dirty`` (or None).
    """
    gpu, threads = _torch_sees()
    commit, dirty = _git()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        **processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": "cuda" if gpu else "cpu",
        "gpu": gpu,
        "compiler": compiler(),
        "commit": commit,
        "dirty": dirty,
    }


def processor() -> dict:
    """``cpu``, its name, and ``isa``, those of `ISA` that it has: what the last bits of a sum depend on."""
    model, flags = _cpu()
    return {"cpu": model, "isa": [name for name in ISA if name in flags]}


def version(package: str) -> str | None:
    """The installed version, without importing the package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that torch's extensions would use, as ``"g++ 13.3.0"``; None where there is none."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            text = _output([path, "--version"])
            return text.splitlines()[0].strip() if text else Path(path).name
    return None


def _torch_sees() -> tuple[str | None, int | None]:
    """The GPU's name, or None, and the number of threads that torch uses by default."""
    try:
        import torch
    except (ImportError, OSError):
        return None, None
    return (torch.cuda.get_device_name(0) if torch.cuda.is_available() else None), torch.get_num_threads()


def _cpu() -> tuple[str, set[str]]:
    """The processor's name and its feature flags in Linux' spelling."""
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features") and not flags:
                flags = set(value.split())
    except OSError:  # macOS tells through sysctl
        if text := _output(["sysctl", "-n", "machdep.cpu.brand_string"]):
            model = text.strip()
        flags = set((_output(["sysctl", "-n", "machdep.cpu.leaf7_features"]) or "").lower().split())
    if platform.machine().lower() in ("arm64", "aarch64"):
        flags.add("neon")  # part of the architecture; Linux calls it asimd
    return model, flags


def _git() -> tuple[str | None, bool | None]:
    """The commit that is checked out and whether tracked or new files differ from it."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None, None
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(folder), "status", "--porcelain"])
    return (commit.strip() if commit else None), (bool(changes.strip()) if changes is not None else None)


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@dataclass(frozen=True)
class Finding:
    """One line of ``lowbit doctor``: ``state`` is ``ok``, ``missing`` or ``note`` (works, but know this)."""

    state: str
    what: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """What is here, what is missing, and what to do about it."""
    here = describe()
    return [*_examine_packages(here), *_examine_machine(here), *_examine_data()]


def _examine_packages(here: dict) -> list[Finding]:
    new = sys.version_info >= (3, 11)
    found = [Finding("ok" if new else "missing", "Python", here["python"], "" if new else "3.11 or newer is needed")]
    asked = {}
    if version("lowbit") is None:
        found.append(Finding("note", "lowbit", "not installed, used from its folder", "pip install -e ."))
    else:
        requirements = map(Requirement, importlib.metadata.requires("lowbit") or ())
        asked = {requirement.name: requirement.specifier for requirement in requirements}
    for name in PACKAGES:
        spec, version_here = asked.get(name), here[name]
        if version_here is None:
            found.append(Finding("missing", name, "not installed", f"pip install '{name}{spec or ''}'"))
        elif spec is not None and not spec.contains(version_here, prereleases=True):
            advice = f"needs {spec}; torch, torchvision and torchaudio only work as a matched set"
            found.append(Finding("missing", name, version_here, advice))
        else:
            found.append(Finding("ok", name, version_here))
    for name in ("torchvision", "torchaudio"):  # a mismatched build is installed but cannot be imported
        try:
            importlib.import_module(name)
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            found.append(Finding("missing", f"import {name}", said, "install the three together, from one index"))
    return found


def _examine_machine(here: dict) -> list[Finding]:
    gpu = here["gpu"]
    free = shutil.disk_usage(paths.project()).free / 1e9
    isa = here["isa"]
    fast = {"avx2", "neon"} & set(isa)
    espeak = shutil.which("espeak-ng")
    return [
        Finding("ok", "processor", f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']} GB"),
        Finding("ok" if fast else "note", "instruction sets", ", ".join(isa) or "none that the kernels ask for"),
        _examine_kernels(),
        Finding("ok", "GPU", gpu) if gpu else Finding("note", "GPU", "none", "profiles smoke and desk need none"),
        Finding("ok", "C++ compiler", here["compiler"])
        if here["compiler"]
        else Finding(
            "note", "C++ compiler", "none", "torch.compile and the native kernels need one: install g++ or clang"
        ),
        Finding("ok", "espeak-ng", "found")
        if espeak
        else Finding(
            "note", "espeak-ng", "none", "only needed to generate the spoken words anew; they come with the project"
        ),
        Finding(
            "ok" if free >= 10 else "note", "free disk", f"{free:.0f} GB", "" if free >= 10 else "10 GB is comfortable"
        ),
    ]


def _examine_kernels() -> Finding:
    try:
        from lowbit.kernels import native

        if native.available():
            return Finding("ok", "compiled kernels", f"{native.isa()} (of {', '.join(native.isas())})")
        return Finding("note", "compiled kernels", "none: packed models run in PyTorch, slowly", native.why_not())
    except Exception as error:  # doctor has to finish whatever is broken; LOWBIT_ISA may name what is not here
        return Finding("missing", "compiled kernels", str(error), "unset LOWBIT_ISA, or name one that is here")


def _examine_data() -> list[Finding]:
    try:
        from lowbit import data

        table = data.describe()
    except Exception as error:  # doctor has to finish whatever is broken
        said = f"{type(error).__name__}: {error}"
        return [Finding("missing", "data sets", said, "the package is not whole: install it again")]
    if "here" not in table:
        return [Finding("note", "data sets", f"{len(table)} known", "lowbit data list says which are here")]
    names = table["name"] if "name" in table else table.index.to_series()
    here = table["here"].astype(bool).to_numpy()
    found = [Finding("ok", "data sets", ", ".join(names[here]))]
    if not here.all():
        found.append(Finding("note", "data sets not here", ", ".join(names[~here]), "lowbit data fetch NAME"))
    return found
