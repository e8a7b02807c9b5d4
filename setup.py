"""Compiles the native kernels while installing; everything else stands in pyproject.toml.

They are a plain C library, loaded by ctypes: no headers of Python or torch are needed, so neither is built against.
Without a C compiler the installation succeeds all the same, and the first use of a kernel says what is missing.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("lowbit/kernels")
_spec = importlib.util.spec_from_file_location("_lowbit_kernels_build", FOLDER / "build.py")
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)


class BuildNative(build_ext):
    """A shared library under a name without Python's version: it depends on none."""

    def get_ext_filename(self, fullname: str) -> str:
        """``_native.so``."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: there is no ``PyInit`` function to look for."""
        return []


native = Extension(
    "lowbit.kernels._native",
    sources=[str(FOLDER / "csrc" / name) for name in _build.SOURCES],
    depends=[str(path) for path in sorted((FOLDER / "csrc").glob("*.h"))],
    extra_compile_args=list(_build.FLAGS),
    extra_link_args=["-pthread"],
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})
