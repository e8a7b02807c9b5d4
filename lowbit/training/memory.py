"""Keep the C library from returning freed memory to the kernel between training steps."""

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGE = 2**30  # bytes; single tensors above it are still mapped and given back


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc's malloc re-use freed blocks instead of unmapping them; True if it took effect.

    By default glibc maps large blocks afresh and gives them back on free, so that every step of a CPU training run
    pays page faults for all its activations again. With this setting the process keeps its peak memory until it ends.
    Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(M_TRIM_THRESHOLD, LARGE))
