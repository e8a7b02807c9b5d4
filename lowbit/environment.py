"""A description of this machine and installation, recorded with every measurement."""

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from lowbit.extras import extra

with extra("train", "describing this machine"):
    import psutil

PACKAGES = ("torch", "torchvision", "timm", "numpy", "papermill")
"""The packages whose versions can change a measured number."""

ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "neon")
"""The instruction sets that the kernels of this project look for."""


def describe() -> dict[str, Any]:
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


def processor() -> dict[str, Any]:
    """The processor's name, ``cpu``, and its instruction sets of `ISA`, ``isa``; the last bits of a sum follow them."""
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
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features") and not flags:
                flags = set(value.split())
    except OSError:  # macOS has sysctl instead
        if text := _output(["sysctl", "-n", "machdep.cpu.brand_string"]):
            model = text.strip()
        flags = set((_output(["sysctl", "-n", "machdep.cpu.leaf7_features"]) or "").lower().split())
    if platform.machine().lower() in ("arm64", "aarch64"):
        flags.add("neon")  # part of the architecture; Linux calls it asimd
    return model, flags


def _git() -> tuple[str | None, bool | None]:
    """The commit that is checked out, and whether tracked or new files differ from it."""
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
