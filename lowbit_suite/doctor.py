"""``lowbit doctor``: shows what this machine has, what is missing, and how to get it."""

import importlib
import importlib.metadata
import shutil
import sys
from dataclasses import dataclass

from packaging.requirements import Requirement

from lowbit import environment, paths


@dataclass(frozen=True)
class Finding:
    """One line of ``lowbit doctor``: ``state`` is ``ok``, ``missing`` or ``note`` (it works, with a limitation)."""

    state: str
    what: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """All findings about packages, machine, kernels and data."""
    here = environment.describe()
    return [*_examine_packages(here), *_examine_machine(here), *_examine_data()]


def _examine_packages(here: dict) -> list[Finding]:
    new = sys.version_info >= (3, 11)
    found = [Finding("ok" if new else "missing", "Python", here["python"], "" if new else "3.11 or newer is needed")]
    asked = {}
    if environment.version("lowbit") is None:
        found.append(Finding("note", "lowbit", "not installed; used from its source folder", "pip install -e ."))
    else:
        requirements = map(Requirement, importlib.metadata.requires("lowbit") or ())
        asked = {requirement.name: requirement.specifier for requirement in requirements}
    for name in environment.PACKAGES:
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
            found.append(
                Finding(
                    "missing",
                    f"import {name}",
                    said,
                    "install all three together, from one index",
                )
            )
    return found


def _examine_machine(here: dict) -> list[Finding]:
    gpu = here["gpu"]
    free = shutil.disk_usage(paths.project()).free / 1e9
    isa = here["isa"]
    fast = {"avx2", "neon"} & set(isa)
    espeak = shutil.which("espeak-ng")
    return [
        Finding("ok", "processor", f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']} GB"),
        Finding("ok" if fast else "note", "instruction sets", ", ".join(isa) or "none that the kernels use"),
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
            "note", "espeak-ng", "none", "only needed to generate the spoken words again; the project includes them"
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
    except Exception as error:  # doctor has to finish whatever is broken; a variable may name what is not here
        return Finding(
            "missing",
            "compiled kernels",
            str(error),
            "unset LOWBIT_ISA and LOWBIT_FORM, or name what is here",
        )


def _examine_data() -> list[Finding]:
    try:
        from lowbit import data

        table = data.describe()
    except Exception as error:  # doctor has to finish whatever is broken
        said = f"{type(error).__name__}: {error}"
        return [Finding("missing", "data sets", said, "the package is incomplete: install it again")]
    if "here" not in table:
        return [Finding("note", "data sets", f"{len(table)} known", "lowbit data list shows which are here")]
    names = table["name"] if "name" in table else table.index.to_series()
    here = table["here"].astype(bool).to_numpy()
    found = [Finding("ok", "data sets", ", ".join(names[here]))]
    if not here.all():
        found.append(Finding("note", "data sets not here", ", ".join(names[~here]), "lowbit data fetch NAME"))
    return found
