import resource
import subprocess
import sys

import pytest

from lowbit.training.memory import keep_freed_memory

FAULTS = """
import resource, sys, torch
from lowbit.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.ones(1 << 20) for _ in range(32)]  # 128 MiB in 4 MiB blocks
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_freed_blocks_are_used_again_without_page_faults():
    faults = {
        way: int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout)
        for way in ("keep", "default")
    }
    touched = 10 * 32 * (4 << 20) // resource.getpagesize()  # pages that the ten steps write
    # glibc by itself re-uses some or none of them, depending on its moving threshold; what counts is what is left.
    assert faults["keep"] < touched / 20
    assert faults["keep"] < faults["default"]
