"""The package as a whole: what importing it costs, what it offers, how settings and commands refuse."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lowbit
import lowbit_suite
from lowbit import paths
from lowbit.errors import LowbitError
from lowbit.settings import settings
from lowbit_suite.app import app


def test_importing_the_package_or_the_command_line_loads_no_heavy_library():
    script = (
        "import sys, lowbit, lowbit_suite.app\n"
        "heavy = {'torch', 'torchvision', 'timm', 'pandas', 'matplotlib', 'papermill', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_library_does_without_the_suite_and_what_only_the_course_needs():
    script = (
        "import importlib, pkgutil, sys, lowbit\n"
        "names = {m.name for m in pkgutil.walk_packages(lowbit.__path__, 'lowbit.')} - {'lowbit.kernels._native'}\n"
        "assert len(names) > 80, names\n"
        "for name in names: importlib.import_module(name)\n"
        "course = ('lowbit_suite', 'tools', 'benchmarks', 'jupyterlab', 'IPython', 'ipykernel', 'papermill', "
        "'nbclient', 'nbconvert', 'nbformat', 'matplotlib', 'seaborn', 'jinja2', 'distributed')\n"
        "found = [name for name in course if name in sys.modules]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_sdist_holds_every_file_that_git_tracks():
    root = paths.SOURCES
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    rules = [line.split() for line in (root / "MANIFEST.in").read_text().splitlines() if line and line[0] != "#"]
    folders = [name for rule, *names in rules if rule == "graft" for name in names]
    files = [name for rule, *names in rules if rule == "include" for name in names]
    files += ["MANIFEST.in", "pyproject.toml", "setup.py"]  # setuptools adds them
    missing = [
        name
        for name in listed.splitlines()
        if name.partition("/")[0] not in folders and not any(fnmatch.fnmatch(name, pattern) for pattern in files)
    ]
    assert listed and not missing


def test_what_notebooks_write_by_is_there_too():
    assert lowbit.record is lowbit_suite.record and lowbit.save_table is lowbit_suite.save_table
    assert {"record", "save_table", "skip"} <= set(dir(lowbit))


def imports() -> dict[str, set[str]]:
    """Which module of the library imports which others, at its top or inside a function."""
    root = Path(lowbit.__file__).parent
    modules = {
        ".".join(file.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in root.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, file in modules.items():
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        taken = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lowbit"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                taken |= (names & modules.keys()) or {node.module}
            elif isinstance(node, ast.Import):
                taken |= {alias.name for alias in node.names if alias.name in modules}
        found[name] = taken - {name}
    return found


LAYERS = (
    {"lowbit.errors", "lowbit.extras", "lowbit.files", "lowbit.settings", "lowbit.paths"},
    {"lowbit.container", "lowbit.kernels", "lowbit.quantizers"},
    {"lowbit.nn"},
    {"lowbit.models"},
    {"lowbit.serialization", "lowbit.engine"},
)
COMMANDS = ("lowbit.kernels.cli", "lowbit.engine.cli")  # they stand beside what they run, and use all of the library


def test_the_library_s_layers_go_one_way():
    level = {name: index for index, names in enumerate(LAYERS) for name in names}

    def of(module: str) -> int | None:
        return next((level[name] for name in level if f"{module}.".startswith(f"{name}.")), None)

    taken = {name: others for name, others in imports().items() if of(name) is not None and name not in COMMANDS}
    assert len(taken) > 50
    wrong = [
        f"{name} imports {other}"
        for name, others in taken.items()
        for other in others
        if of(other) is None or of(other) > of(name)
    ]
    assert not wrong


def test_packing_names_no_model_of_the_zoo():
    from lowbit.models import names

    for file in (Path(lowbit.__file__).parent / "nn").glob("*.py"):
        assert not [name for name in (*names(), *names("speech")) if name in file.read_text()], file.name


@pytest.mark.parametrize("name", lowbit.__all__)
def test_every_public_name_is_there(name):
    assert getattr(lowbit, name) is not None
    assert name in dir(lowbit)


@pytest.mark.parametrize("package", [lowbit, lowbit.models], ids=lambda package: package.__name__)
def test_type_checkers_see_every_name_that_is_loaded_on_first_use(package):
    blocks = [
        node
        for node in ast.parse(Path(package.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [statement for block in blocks for statement in block.body if isinstance(statement, ast.ImportFrom)]
    # Only an alias makes a name public to a type checker.
    aliases = [alias.asname for statement in imports for alias in statement.names if alias.asname == alias.name]
    assert sorted(aliases) == sorted(package.__all__)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nosuch"):
        lowbit.nosuch  # noqa: B018


@pytest.mark.parametrize("command", [[], ["run"], ["check"], ["accept"], ["train"], ["data"], ["data", "list"],
                                     ["bench"], ["bench", "training"], ["doctor"], ["new"],
                                     ["new", "notebook"], ["new", "quantizer"]])  # fmt: skip
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.stdout


def test_a_mistake_ends_with_one_line_and_status_2():
    result = CliRunner().invoke(app, ["data", "fetch", "cifar11"])
    assert result.exit_code == 2
    assert result.stderr.startswith("lowbit: ") and "cifar10" in result.stderr and "Traceback" not in result.stderr


@settings
class Example:
    """Settings to test with."""

    size: int
    name: str = "x"


def test_settings_are_frozen_and_positional_and_comparable():
    assert Example(3) == Example(size=3) and Example(3) != Example(4)
    with pytest.raises(AttributeError):
        Example(3).size = 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": "3"}, "size='3'"),
        ({"size": 3.5}, r"size=3\.5"),
        ({}, "needs the setting 'size'"),
        ({"size": 1, "nam": "y"}, "no setting 'nam'; it has size, name; did you mean 'name'"),
    ],
)
def test_settings_refuse_by_name(given, message):
    with pytest.raises(LowbitError, match=message):
        Example(**given)
