"""Everything imported is declared in pyproject.toml for the part that imports it; what is optional may be missing."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lowbit.errors import LowbitError, MissingExtraError
from lowbit.extras import extra

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
IMPORTED_AS = {
    "beautifulsoup4": "bs4", "ipython": "IPython", "pillow": "PIL", "pytest-xdist": "xdist", "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}  # fmt: skip
SUITE = ("lowbit_suite",)
BENCHMARKS = ("benchmarks",)
UNGUARDED = {("lowbit/nn/attention.py", "timm"), ("lowbit/nn/folding.py", "timm")}  # reached with timm's layers only
OURS = ("lowbit", "lowbit_suite", "benchmarks", "tools")


def packages(requirements: list[str]) -> set[str]:
    """The names under which ``requirements`` are imported; those of the project's own extras are followed."""
    found = set()
    for requirement in requirements:
        name, _, inner = re.match(r"([\w.-]+)(\[([\w,]+)\])?", requirement).groups()
        if name == "lowbit":
            for one in inner.split(","):
                found |= packages(EXTRAS[one])
        else:
            found.add(IMPORTED_AS.get(name, name.replace("-", "_")))
    return found


CORE = packages(PROJECT["dependencies"])
BROUGHT = {name: CORE | packages(EXTRAS[name]) for name in EXTRAS}
OPTIONAL = set().union(*BROUGHT.values()) - CORE


def imports(tree: ast.AST, guard: str | None = None):
    """``(package, extra or None)`` of each import of another project; those for type checkers only are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            package = name.partition(".")[0]
            if package not in sys.stdlib_module_names and package not in OURS:
                yield package, guard
        inner = guard
        if isinstance(node, ast.With):
            for item in node.items:
                if isinstance(item.context_expr, ast.Call) and ast.unparse(item.context_expr.func) == "extra":
                    inner = item.context_expr.args[0].value
        yield from imports(node, inner)


def sources(*folders: str) -> dict[str, ast.AST]:
    found = [path for folder in folders for path in ([ROOT / folder, *(ROOT / folder).rglob("*.py")])]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in found if path.suffix == ".py"
            and path.is_file()}  # fmt: skip


def belongs(path: str, area: tuple[str, ...]) -> bool:
    return any(path == part or path.startswith(part + "/") for part in area)


LIBRARY = {path: tree for path, tree in sources("lowbit").items() if not belongs(path, SUITE + BENCHMARKS)}


def test_the_core_is_small_and_has_no_upper_bounds():
    assert {"torch", "numpy", "safetensors", "pydantic"} <= CORE and len(CORE) <= 8
    every = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    assert not [one for one in every if re.search(r"<|==|~=", one)]


def test_the_course_has_what_notebooks_and_the_suite_need():
    assert BROUGHT["course"] >= set().union(
        *(BROUGHT[name] for name in ("data", "detection", "models", "speech", "train"))
    )
    assert BROUGHT["test"] >= BROUGHT["course"]


@pytest.mark.parametrize("path", LIBRARY)
def test_the_library_imports_the_core_and_the_extra_that_it_names(path):
    for package, guard in imports(LIBRARY[path]):
        if (path, package) not in UNGUARDED:
            allowed = CORE if guard is None else BROUGHT[guard]
            assert package in allowed, f"{path} imports {package} " + (
                f"under extra({guard!r}), which does not bring it"
                if guard
                else "without extra(...), but it is optional"
            )


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines), (
        "exact versions, nothing else"
    )
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_the_lock_is_exact_and_has_an_allowed_version_of_everything_that_tests_need():
    versions = locked()
    for text in [*PROJECT["dependencies"], *(one for name in EXTRAS if name != "bench" for one in EXTRAS[name])]:
        requirement = Requirement(text)
        if requirement.name != "lowbit":
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_make_installs_the_lock_and_conda_too():
    installs = re.findall(r"-m pip install [^;\n]*(?:\\\n[^;\n]*)*", (ROOT / "Makefile").read_text())
    assert len([line for line in installs if "--constraint $(CONSTRAINTS)" in line]) == 4
    assert [line for line in installs if "CONSTRAINTS" not in line] == ["-m pip install --quiet --upgrade pip"]
    assert "- -c constraints.txt" in (ROOT / "environment.yml").read_text()


def notebook(path: Path) -> ast.AST:
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = [line for cell in code if not cell.startswith("%%") for line in cell.splitlines()]
    return ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))


def test_all_other_parts_import_what_their_extra_brings():
    own = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {
        path.stem for folder in ("notebooks", "docs") for path in (ROOT / folder).glob("*.py")
    }
    areas = {
        "course": sources(*SUITE, "notebooks")
        | {path.name: notebook(path) for path in (ROOT / "notebooks").glob("*.ipynb")},
        "bench": sources(*BENCHMARKS),
        "site": sources(*(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.py"))),
        "test": sources("tests", "data", "tools", "docs/howto", "docs/pictures"),
    }
    optional = {
        "course": BROUGHT["dask"] | BROUGHT["onnx"],
        "bench": set(),
        "site": set(),
        "test": {"a_package_that_nobody_has", "executorch"},  # the second pins versions of its own
    }
    for area, trees in areas.items():
        assert trees
        for path, tree in trees.items():
            unknown = {package for package, _ in imports(tree)} - BROUGHT[area] - optional[area] - own
            assert not unknown, f"{path} imports {unknown}, which lowbit[{area}] does not bring"


def run(code: str, missing: set[str] = frozenset()) -> str:
    """What ``code`` prints where none of ``missing`` can be imported."""
    start = f"import sys\nfor name in {sorted(missing)!r}:\n    sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", start + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


OWN_NETWORK = """
import importlib, pkgutil, lowbit
from lowbit.errors import MissingExtraError
refused = []
for info in pkgutil.walk_packages(lowbit.__path__, "lowbit."):
    if info.name not in ("lowbit.__main__", "lowbit.kernels._native"):
        try:
            importlib.import_module(info.name)
        except MissingExtraError:
            refused.append(info.name.removeprefix("lowbit."))
print(refused)

import torch
from torch import nn
from lowbit.quantizers import LSQ, StatsQ
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 8), nn.Linear(8, 2))
lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8)))
x = torch.rand(4, 3, 8, 8)
lowbit.calibrate(model, x)
model(x).square().mean().backward()
assert all(p.grad is not None for p in model.parameters())
packed = lowbit.pack(model.eval())
assert packed(x).shape == (4, 2)
lowbit.functional.denseshift(torch.ones(2), torch.ones(2))
"""


def test_the_core_works_without_any_extra():
    """Every module but those of an extra can be imported; a network of one's own is quantized, trained and packed."""
    assert set(ast.literal_eval(run(OWN_NETWORK, OPTIONAL))) <= {
        "environment", "yamls", "data.cli", "kernels.cli", "engine.cli", "training.cli", "training.runfile",
        "data.images", "data.torchvision_sets", "models.detection", "models.resnet", "models.speech",
    }  # fmt: skip


DEIT = "from lowbit.training.augment import sample_transform as f; f('deit', (3, 32, 32), False)"
DECODE = "import lowbit.data.{0}; lowbit.data.{0}.decode('x')"
SOUND = "from lowbit.data.sounds import read as f; f(b'', 8000, 'x')"
AP = (
    "from lowbit.training.detection import average_precision as f; one = torch.ones(1); box = torch.rand(1, 4); "
    "f([{'boxes': box, 'scores': one, 'labels': one.long()}], [{'boxes': box, 'labels': one.long()}])"
)
TRAIN = (
    "d = lowbit.data.ArrayDataset(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])); "
    "d = lowbit.data.Data('d', 'classification', ('a', 'b'), d, d, (1, 8, 8)); n = torch.nn; "
    "lowbit.train(n.Sequential(n.Flatten(), n.Linear(64, 2)), d, lowbit.TrainConfig(epochs=1, batch_size=4))"
)
ONNX = (
    "from lowbit.nn.onnx import export_onnx as f; q = lowbit.quantizers; x = torch.rand(2, 4); "
    "m = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))); "
    "lowbit.quantize_(m, lowbit.QuantConfig(q.StatsQ(), q.LSQ())); "
    "m(x); f(lowbit.pack(m.eval()), x, 'x')"
)
FEATURES = [
    ("timm", "models", "lowbit.models.create('vit_nano')"),
    ("timm", "models", "lowbit.models.create('deit_tiny_patch16_224')"),
    ("timm", "models", "lowbit.load(lowbit.models.checkpoints()['vit_nano']['digits'])"),
    ("timm", "models", DEIT),
    ("torchvision", "models", "lowbit.models.create('resnet20')"),
    ("torchvision", "models", "lowbit.models.create('mobilenet_v2')"),
    ("torchvision", "speech", "lowbit.models.create('ds_cnn')"),
    ("torchvision", "detection", "lowbit.models.detector"),
    ("torchvision", "data", "lowbit.data.load('cifar10')"),
    ("torchvision", "data", "lowbit.data.load('image-folder', path='.')"),
    ("torchvision", "data", DEIT),
    ("soundfile", "speech", "lowbit.data.load('spoken-words')"),
    ("soundfile", "speech", SOUND),
    ("sklearn", "data", "lowbit.data.load('digits')"),
    ("PIL", "data", DECODE.format("bccd")),
    ("PIL", "data", DECODE.format("cifar_jpeg")),
    ("platformdirs", "data", "import os; os.environ.pop('LOWBIT_CACHE', None); lowbit.paths.cache()"),
    ("torchmetrics", "detection", AP),
    ("pycocotools", "detection", AP),
    ("pandas", "data", "lowbit.data.describe()"),
    ("pandas", "train", "lowbit.metrics.cost(torch.nn.Linear(2, 2), (1, 2))"),
    ("pandas", "train", "import lowbit.nn.deploy; lowbit.nn.deploy.summary(torch.nn.Linear(2, 2))"),
    ("scipy", "train", "lowbit.metrics.interval([1.0, 2.0])"),
    ("tqdm", "train", TRAIN),
    ("psutil", "train", TRAIN),
    ("yaml", "train", "lowbit.training.RunConfig"),
    ("onnx", "onnx", ONNX),
    ("matplotlib", "course", "import lowbit_suite.plotting"),
    ("joblib", "course", "import lowbit_suite; lowbit_suite.sweep(lambda **_: {'y': 0}, [{}], [0, 1], workers=2)"),
    ("typer", "train", "import lowbit_suite.app"),
]


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """What each of `FEATURES` says where its package is missing: one process that has torch forks one for each."""
    return run(f"""
import os, sys, torch, lowbit.data, lowbit.metrics, lowbit.models, lowbit.training
for package, _, code in {FEATURES!r}:
    sys.stdout.flush()
    if not os.fork():
        for name in [name for name in sys.modules if name.startswith(package + ".")]:
            del sys.modules[name]
        sys.modules[package] = None
        try:
            exec(code, {{"torch": torch, "lowbit": lowbit}})
        except lowbit.errors.MissingExtraError as error:
            print(error)
        except Exception as error:
            print(repr(error))
        else:
            print("no error")
        sys.stdout.flush()
        os._exit(0)
    os.wait()
""").splitlines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("index", range(len(FEATURES)), ids=[f"{one[0]}-{one[1]}" for one in FEATURES])
def test_a_missing_package_is_told_in_one_sentence_with_its_extra(messages, index):
    package, name, _ = FEATURES[index]
    assert package in BROUGHT[name] and len(messages) == len(FEATURES)
    assert re.fullmatch(rf".+ needs {package}: pip install 'lowbit\[{name}\]'", messages[index])


@pytest.mark.parametrize(
    ("package", "command"), [("typer", "doctor"), ("yaml", "run"), ("nbformat", "new notebook 99_nothing")]
)
def test_a_command_without_its_packages_ends_with_one_line_and_status_2(package, command):
    start = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['lowbit', *{command.split()!r}]; "
    done = subprocess.run(
        [sys.executable, "-c", start + "from lowbit_suite.__main__ import main; main()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"lowbit: .+ needs {package}: pip install 'lowbit\[\w+\]'\n", done.stderr)


def test_a_package_that_cannot_be_imported_is_told_with_its_reason():
    reason = r"^sound needs packages that .* \(libcudart\.so\.13: no such file\)"
    with pytest.raises(MissingExtraError, match=reason) as told, extra("speech", "sound"):
        raise OSError("libcudart.so.13: no such file\nmore")
    assert isinstance(told.value, LowbitError) and isinstance(told.value, ImportError)
    with (
        pytest.raises(
            MissingExtraError, match=r"needs torch that cannot be imported here \(cannot import name 'nothing'"
        ),
        extra("models", "a model"),
    ):
        from torch.nn import nothing  # noqa: F401


def test_mistakes_within_the_library_and_inner_messages_stay_as_they_are():
    with pytest.raises(ModuleNotFoundError, match="nothing"), extra("models", "a model"):
        import lowbit.nothing  # noqa: F401
    with (
        pytest.raises(MissingExtraError, match=r"^inner needs nowhere"),
        extra("course", "outer"),
        extra("data", "inner"),
    ):
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
