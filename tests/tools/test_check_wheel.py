"""What is said of wheels that do not hold what their names say."""

import zipfile

import pytest

from tools import check_wheel


@pytest.mark.parametrize(
    "tag, more, less, said",
    [
        ("py3-none-any", [], None, ""),
        ("py3-none-any", [], "lowbit/py.typed", "it lacks lowbit/py.typed"),
        ("py3-none-any", ["tests/test_x.py"], None, "would install tests beside lowbit"),
        ("py3-none-any", [check_wheel.KERNELS], None, "compiled kernels are there"),
        ("py3-none-win_amd64", [], None, "compiled kernels are missing"),
        ("py3-none-win_amd64", [check_wheel.KERNELS], None, ""),
        ("cp311-cp311-win_amd64", [check_wheel.KERNELS], None, "its tag is cp311-cp311-win_amd64"),
    ],
)
def test_a_wheel_holds_what_its_name_says(tmp_path, tag, more, less, said):
    path = tmp_path / f"lowbit-9-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in [*check_wheel.NEEDED, "lowbit-9.dist-info/WHEEL", *more]:
            if name != less:
                archive.writestr(name, "")
    found = check_wheel.flaw(path)
    assert said in found and bool(found) == bool(said)
