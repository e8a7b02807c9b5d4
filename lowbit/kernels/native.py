"""Finds, checks and calls the compiled kernels; see ``csrc/lowbit.h`` for what they offer.

Environment: ``LOWBIT_NATIVE=0`` does without them, or names a library to load; ``LOWBIT_ISA`` chooses the instruction
set (``portable``, ``avx2``, ``avx512vnni``, ``amx``, ``neon``, ``neon_plain``) that otherwise follows from the
processor; ``LOWBIT_FORM`` chooses how convolutions are computed (``auto``, ``direct``, ``winograd``), with the same
result.
"""

import contextlib
import ctypes
import functools
import importlib.machinery
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowbit.errors import LowbitError

ABI = 4
# lb_args: 8 pointers, integers, 2 scales, 16 levels. Packing bytes is a good deal quicker than a ctypes structure.
_ARGS = struct.Struct("=8Q 25q 2d 16h")
_UNUSED = (0,) * 16  # levels


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why."""
    asked = os.environ.get("LOWBIT_NATIVE", "")
    if asked == "0":
        return None, "LOWBIT_NATIVE=0 asks to do without"
    path = Path(asked) if asked not in ("", "1") else _find()
    if path is None:
        return None, "it is not built: run python -m lowbit.kernels.build (needs a C compiler: gcc or clang)"
    try:
        library = ctypes.CDLL(str(path))
        abi = library.lb_abi()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be used ({error}): build it anew by python -m lowbit.kernels.build"
    if abi != ABI:
        return None, f"{path} is of another version ({abi}, not {ABI}): build it anew by python -m lowbit.kernels.build"
    library.lb_isas.restype = library.lb_isa.restype = library.lb_form.restype = ctypes.c_char_p
    library.lb_form_taken.restype = ctypes.c_char_p
    library.lb_select.argtypes = library.lb_run.argtypes = library.lb_run_floats.argtypes = [ctypes.c_char_p]
    library.lb_select_form.argtypes = [ctypes.c_char_p]
    if name := os.environ.get("LOWBIT_ISA"):
        _select(library, name)
    if name := os.environ.get("LOWBIT_FORM"):
        _select_form(library, name)
    return library, ""


def _find() -> Path | None:
    folder = Path(__file__).resolve().parent
    for suffix in (".so", *importlib.machinery.EXTENSION_SUFFIXES):
        if (path := folder / f"_native{suffix}").exists():
            return path
    return None


def _select(library: ctypes.CDLL, name: str | None) -> None:
    status = library.lb_select(name.encode() if name else None)
    if status:
        there = library.lb_isas(0).decode().replace(",", ", ")
        known = library.lb_isas(1).decode().split(",")
        what = "this processor does not offer it" if name in known else "there is none of that name"
        raise LowbitError(f"instruction set {name!r} (LOWBIT_ISA): {what}; here are {there}")


def _select_form(library: ctypes.CDLL, name: str) -> None:
    if library.lb_select_form(name.encode()):
        raise LowbitError(
            f"the form of convolutions {name!r} (LOWBIT_FORM) is not allowed: auto, direct and winograd are"
        )


def available() -> bool:
    """Whether the compiled kernels are there and usable.

    Raises:
        LowbitError: ``LOWBIT_ISA`` names an instruction set that is not, or ``LOWBIT_FORM`` an unknown form.
    """
    return _load()[0] is not None


def why_not() -> str:
    """Why they are not `available`, and what to do; empty if they are."""
    return _load()[1]


def isa() -> str | None:
    """The instruction set in use; None without compiled kernels."""
    library = _load()[0]
    return library.lb_isa().decode() if library else None


def isas() -> list[str]:
    """The instruction sets that this processor offers to the compiled kernels, best first."""
    library = _load()[0]
    return library.lb_isas(0).decode().split(",") if library else []


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Inside ``with use("avx2"):`` the kernels of the whole process use that instruction set.

    Raises:
        LowbitError: it is unknown or not offered here, or there are no compiled kernels.
    """
    library = loaded()
    before = isa()
    _select(library, name)
    try:
        yield
    finally:
        _select(library, before)


@contextlib.contextmanager
def use_form(name: str) -> Iterator[None]:
    """Inside ``with use_form("direct"):`` the whole process computes convolutions in that form.

    Args:
        name: ``"direct"``; ``"winograd"``, wherever it can be used (3x3 kernels with stride and dilation 1, weights of
            2 or 3 bits with levels up to 8, activations from 0 to at most 31), and the direct form elsewhere; or
            ``"auto"``, the one expected to be faster. All give the same bits.

    Raises:
        LowbitError: the form is unknown, or there are no compiled kernels.
    """
    library = loaded()
    before = library.lb_form().decode()
    _select_form(library, name)
    try:
        yield
    finally:
        _select_form(library, before)


def form_taken() -> str:
    """``"direct"`` or ``"winograd"``: how this thread's last call of `run` was computed.

    Raises:
        LowbitError: there are no compiled kernels.
    """
    return loaded().lb_form_taken().decode()


def loaded() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        LowbitError: there are none.
    """
    library, why = _load()
    if library is None:
        raise LowbitError(f"there are no compiled kernels: {why}")
    return library


def run(
    pointers: tuple[int, ...], numbers: tuple[int, ...], scales: tuple[float, float], levels: Sequence[int]
) -> None:
    """One call of ``lb_run``; the arguments are the fields of ``lb_args`` in order."""
    args = _ARGS.pack(*pointers, *numbers, *scales, *levels, *_UNUSED[len(levels) :])
    _raise(loaded().lb_run(args), numbers)


def run_floats(
    pointers: tuple[int, int, int, int, int], numbers: tuple[int, int, int, int, int], levels: Sequence[int]
) -> None:
    """One call of ``lb_run_floats``: x, packed, scale, bias, out; bits, rows, K, outputs, threads; the levels."""
    x, packed, scale, bias, out = pointers
    bits, rows, k, outputs, threads = numbers
    args = _ARGS.pack(
        x, packed, scale, 0, bias, 0, out, 0, 0, 0, 0, bits, rows, 1, 1, k, k, outputs, *(1,) * 8, 0, 0, 0, 0, 0,
        threads, 0, 1.0, 1.0, *levels, *_UNUSED[len(levels) :],
    )  # fmt: skip
    _raise(loaded().lb_run_floats(args), numbers)


def _raise(status: int, numbers: tuple[int, ...]) -> None:
    if status == 1:
        raise MemoryError("the native kernels could not get their working memory")
    if status:
        raise RuntimeError(f"the native kernels refused their arguments ({status}): {numbers}")
