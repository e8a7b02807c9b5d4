"""Check that wheels contain what their names promise: ``python tools/check_wheel.py WHEEL...``; needs Python alone.

The kernels are loaded if the wheel is for this machine; their parts for other machines cannot be.
"""

import ctypes
import platform
import sys
import tempfile
import zipfile
from pathlib import Path

NEEDED = (
    "lowbit/py.typed",
    "lowbit/kernels/csrc/lowbit.h",
    "lowbit/models/checkpoints/resnet20.digits.safetensors",
    "lowbit_suite/templates/report.html.j2",
    "lowbit_suite/course/notebooks/00_start_here.ipynb",
    "lowbit_suite/course/notebooks/claims.yaml",
    "lowbit_suite/course/results/claims.json",
)
TOPS = {"lowbit", "lowbit_suite"}
KERNELS = "lowbit/kernels/_native.so"


def flaw(wheel: Path) -> str:
    """Describe the problem with a wheel; empty if there is none."""
    tag = wheel.stem.split("-")[-3:]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        if missing := [name for name in NEEDED if name not in names]:
            return f"it lacks {', '.join(missing)}"
        tops = {name.split("/")[0] for name in names}
        if odd := sorted(top for top in tops - TOPS if not top.startswith("lowbit-")):
            return f"it would install {', '.join(odd)} beside lowbit"
        if tag[:2] != ["py3", "none"] or (tag[2] != "any") != (KERNELS in names):
            return f"its tag is {'-'.join(tag)}, and compiled kernels are {'there' if KERNELS in names else 'missing'}"
        if tag[2] != "any" and tag[2].endswith(platform.machine()) and tag[2].startswith(("linux", "many", "mac")):
            with tempfile.TemporaryDirectory() as folder:
                library = ctypes.CDLL(archive.extract(KERNELS, folder))
            library.lb_isa.restype = ctypes.c_char_p
            if not library.lb_isa():
                return "its kernels name no instruction set"
    return ""


if __name__ == "__main__":
    bad = {name: said for name in sys.argv[1:] if (said := flaw(Path(name)))}
    for name in sys.argv[1:]:
        print(f"{name}: {bad.get(name, 'as it should be')}")
    sys.exit(1 if bad or not sys.argv[1:] else 0)
