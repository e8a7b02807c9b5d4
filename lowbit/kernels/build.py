"""Compiles the native kernels in place: ``python -m lowbit.kernels.build``.

An installation does it by itself (see ``setup.py``) where it finds a C compiler; this is for clones that were not
installed, for trying flags, and for tests. The library needs neither Python's nor torch's headers. This file imports
neither torch nor the rest of `lowbit`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PLANS = ("plan.c", "plan_check.c", "plan_products.c", "plan_floats.c", "plan_attention.c")
SOURCES = ("dispatch.c", "winograd.c", "threads.c", "portable.c", "avx2.c", "avx512vnni.c", "amx.c", "neon.c", *PLANS)
# No fused multiply-add: the epilogue rounds after each operation, on every processor. The other two take no liberty
# with values; they only let loops over floats be vectorized.
FLAGS = (
    "-O3", "-g0", "-std=gnu11", "-pthread", "-fvisibility=hidden",
    "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-Wno-psabi",
)  # fmt: skip
LIBRARY = "_native.so"
# In a program for small devices size counts. With AVX2, -O2 alone takes up to 1.7 times as long as -O3; with these loop
# transformations it takes up to 1.1 times as long, and 30 kB less.
RUNNER_FLAGS = ("-O2", "-DLB_SMALL", "-ffunction-sections", "-fno-asynchronous-unwind-tables")
LOOP_FLAGS = ("-fvect-cost-model=dynamic", "-fsplit-loops", "-funswitch-loops")  # gcc's; clang does so anyway
# With -Os: what they spend their time in lies elsewhere.
SMALL = ("portable.c", "winograd.c", "dispatch.c", "threads.c", "amx.c", *PLANS)


def compiler() -> str | None:
    """The C compiler to use: ``$CC``, else cc, gcc or clang; None where there is none."""
    candidates = (os.environ.get("CC", "").split(" ")[0], "cc", "gcc", "clang")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def sources() -> list[Path]:
    """The C files, in order."""
    return [FOLDER / "csrc" / name for name in SOURCES]


def build(
    output: Path | None = None,
    *,
    cc: str | None = None,
    extra: tuple[str, ...] = (),
    emulate_amx: bool = False,
    sanitize: bool = False,
    program: Path | None = None,
) -> Path:
    """Compiles the kernels.

    Args:
        output: the file to write; None puts the library next to this file, where `lowbit.kernels.native` finds it.
        cc: the compiler; None takes `compiler()`.
        extra: further flags and libraries.
        emulate_amx: replaces the AMX instructions by C functions, for tests.
        sanitize: adds the address and undefined-behavior sanitizers.
        program: a C file with ``main``: builds an executable of it and the kernels instead of a library.

    Returns:
        The file that was written, atomically.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message holds what it said.
    """
    cc = cc or compiler()
    if cc is None:
        raise RuntimeError("no C compiler is here: install gcc or clang, or name one in the environment variable CC")
    output = output or FOLDER / LIBRARY
    flags = [*FLAGS, *(["-DLOWBIT_EMULATE_AMX"] if emulate_amx else [])]
    if sanitize:
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    inputs = [*map(str, sources()), *([str(program)] if program else ["-fPIC", "-shared"])]
    handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=output.name)
    os.close(handle)
    command = [cc, *flags, f"-I{FOLDER / 'csrc'}", *inputs, *extra, "-lm", "-o", temporary]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        Path(temporary).unlink(missing_ok=True)  # the compiler may have removed it
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    os.chmod(temporary, 0o755)
    os.replace(temporary, output)
    return output


RUNNER, ARCHIVE = "lowbit-run", "liblowbit.a"


def build_runner(folder: Path, *, cc: str | None = None, extra: tuple[str, ...] = ()) -> Path:
    """Builds what runs plans without Python: the program ``lowbit-run`` and the library ``liblowbit.a``.

    The program is static where the system's C library allows that.

    Args:
        folder: where to write both; made if it is missing.
        cc: the compiler, possibly one for another processor; None takes `compiler()`.
        extra: further flags.

    Returns:
        The program.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message holds what it said.
    """
    cc = cc or compiler()
    if cc is None:
        raise RuntimeError("no C compiler is here: install gcc or clang, or name one in the environment variable CC")
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *RUNNER_FLAGS, *_accepted(cc, LOOP_FLAGS), *extra, f"-I{FOLDER / 'csrc'}"]
    archiver = re.sub(r"(gcc|clang|cc)(-[\d.]+)?$", "ar", cc) if cc.endswith(("gcc", "clang")) else "ar"
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        objects = []
        for source in sources():
            made = str(Path(inside, f"{source.stem}.o"))
            _compile([cc, *flags, *(["-Os"] if source.name in SMALL else []), "-c", str(source), "-o", made])
            objects.append(made)
        archive, program = Path(inside, ARCHIVE), Path(inside, RUNNER)
        _compile([shutil.which(archiver) or "ar", "rcs", str(archive), *objects])
        link = [cc, *flags, "-Os", str(FOLDER / "csrc" / "runner.c"), str(archive), "-lm", "-s", "-o", str(program)]
        try:
            _compile([*link, "-static", "-Wl,--gc-sections,-z,noseparate-code,-z,norelro"])
        except RuntimeError:  # macOS has neither
            _compile(link)
        for finished in (archive, program):
            os.replace(finished, folder / finished.name)
    return folder / RUNNER


def _accepted(cc: str, flags: tuple[str, ...]) -> tuple[str, ...]:
    """These flags, if the compiler knows all of them; else none."""
    tried = [cc, "-Werror", *flags, "-x", "c", "-fsyntax-only", os.devnull]
    return () if subprocess.run(tried, capture_output=True).returncode else flags


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m lowbit.kernels.build", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: where lowbit looks for it)")
    parser.add_argument("--cc", help="C compiler (default: $CC, cc, gcc or clang)")
    parser.add_argument("--emulate-amx", action="store_true", help="C functions in place of the AMX instructions")
    parser.add_argument("--sanitize", action="store_true", help="address and undefined-behavior sanitizers")
    parser.add_argument("--runner", type=Path, metavar="DIR", help="build lowbit-run and liblowbit.a there instead")
    options = parser.parse_args()
    try:
        if options.runner:
            print(f"built {build_runner(options.runner, cc=options.cc)}")
            return
        made = build(options.output, cc=options.cc, emulate_amx=options.emulate_amx, sanitize=options.sanitize)
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"built {made}")


if __name__ == "__main__":
    main()
