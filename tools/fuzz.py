"""Feed damaged plan files to the C code under the sanitizers, guided by coverage (libFuzzer, so it needs clang).

    python -m tools.fuzz --minutes 30        # or `make fuzz`; exit 1 at the first finding, which is kept in build/fuzz

The first inputs are the small plans of tests/kernels/plan_seeds.py, which have every operation. Inputs that reach new
code are kept in build/fuzz/corpus, where the next run goes on. A finding is a crash, a sanitizer's report, a file that
takes longer than ten seconds, or numbers that depend on the instruction set or on an earlier run.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit.kernels import build
from lowbit_suite.command import plain_errors

LARGEST = 1 << 15
"""Bytes of an input; the largest seed has 22,280."""


def program(folder: Path) -> Path:
    """Build the fuzzer of `lowbit/kernels/csrc/fuzz_plan.c` in ``folder``.

    Raises:
        LowbitError: there is no clang, or it cannot build a fuzzer.
    """
    compiler = shutil.which("clang")
    if compiler is None:
        raise LowbitError(
            "libFuzzer is a part of clang, and no clang is here: install it (Debian: apt-get install clang)"
        )
    source = build.FOLDER / "csrc" / "fuzz_plan.c"
    try:
        flags = ("-fsanitize=fuzzer", "-O1")
        return build.build(folder / "fuzz_plan", cc=compiler, sanitize=True, program=source, extra=flags)
    except RuntimeError as error:
        raise LowbitError(f"clang builds no fuzzer here: {error}") from None


def fuzz(folder: Path, seconds: int) -> int:
    """Fuzz for ``seconds``, and return libFuzzer's exit status: 0 if nothing was found."""
    seeds, corpus = folder / "seeds", folder / "corpus"
    for made in (seeds, corpus):
        made.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, paths.project() / "tests" / "kernels" / "plan_seeds.py", seeds], check=True)
    limits = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", "-timeout=10", "-rss_limit_mb=4096"]
    shown = [f"-artifact_prefix={folder}/", "-print_final_stats=1"]
    return subprocess.run([program(folder), *limits, *shown, corpus, seeds]).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    with plain_errors():
        sys.exit(1 if fuzz(paths.project() / "build" / "fuzz", round(60 * parser.parse_args().minutes)) else 0)
