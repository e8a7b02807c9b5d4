"""Compiles the native kernels and packs the course while building; everything else stands in pyproject.toml.

The kernels are a plain C library, loaded by ctypes: no headers of Python or torch are needed, so neither is built
against, and one wheel serves every Python of its platform. Without a C compiler the build succeeds all the same, and
the first use of a kernel says what is missing; with ``LOWBIT_BUILD_KERNELS=1`` it fails instead.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


def _module(path: str):
    spec = importlib.util.spec_from_file_location("_" + Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOLDER = Path("lowbit/kernels")
_build = _module("lowbit/kernels/build.py")


class BuildNative(build_ext):
    """A shared library under a name without Python's version: it depends on none."""

    def get_ext_filename(self, fullname: str) -> str:
        """``_native.so``."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: there is no ``PyInit`` function to look for."""
        return []


class BuildCourse(build_py):
    """Puts the course beside the suite's modules; an editable installation uses the source tree's own."""

    def run(self) -> None:
        """Modules first, then the course."""
        super().run()
        if not self.editable_mode:
            _module("lowbit_suite/course.py").copy_parts(Path(), Path(self.build_lib, "lowbit_suite", "course"))


class PlatformWheel(bdist_wheel):
    """``py3-none-<platform>``: of this platform because of the kernels, of any where there are none."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag that the wheel's contents deserve."""
        there = Path(self.bdist_dir, FOLDER, "_native.so").exists()
        return "py3", "none", super().get_tag()[2] if there else "any"


native = Extension(
    "lowbit.kernels._native",
    sources=[str(FOLDER / "csrc" / name) for name in _build.SOURCES],
    depends=[str(path) for path in sorted((FOLDER / "csrc").glob("*.h"))],
    extra_compile_args=list(_build.FLAGS),
    extra_link_args=["-pthread", "-lm"],
    optional=os.environ.get("LOWBIT_BUILD_KERNELS") != "1",
)
setup(
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative, "build_py": BuildCourse, "bdist_wheel": PlatformWheel},
)
