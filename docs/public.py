"""The public names of the library, read from its source: nothing is imported, so torch need not be installed.

A package exports the names that its ``__init__.py`` imports for type checkers. `lowbit.functional` and
`lowbit.quantizers` collect theirs from the files of the methods, each of which lists its own in ``__all__``.
"""

import ast
import functools
from pathlib import Path

PACKAGES = ("data", "engine", "kernels", "metrics", "models", "nn", "quantizers", "training")
MODULES = ("environment", "errors", "migration", "paths")
"""Modules whose own public definitions are documented; packages and `lowbit.functional` have their tables."""


def _source(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(tree: ast.Module) -> dict[str, str]:
    """Name to dotted origin of all imports from lowbit, also those inside ``if TYPE_CHECKING``."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowbit")
        for alias in node.names
    }


def _definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in tree.body if isinstance(node, kinds)}


def _listed(tree: ast.Module) -> list[str]:
    """The literal ``__all__`` of a module; empty if it has none or computes it."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


@functools.cache
def parse(root: Path, module: str) -> ast.Module:
    """The syntax tree of a module of the library, given by its dotted name."""
    return ast.parse(_source(root, module).read_text(encoding="utf-8"))


def kind(root: Path, origin: str) -> str:
    """``"module"``, ``"class"``, ``"function"`` or ``"data"``: what the dotted name ``origin`` is defined as."""
    if _source(root, origin).is_file():
        return "module"
    module, _, name = origin.rpartition(".")
    node = _definitions(parse(root, module)).get(name)
    return {ast.ClassDef: "class", ast.FunctionDef: "function"}.get(type(node), "data")


def summary(root: Path, origin: str) -> str:
    """The first line of the docstring of a module, class or function; empty for data."""
    what = kind(root, origin)
    module, _, name = origin.rpartition(".")
    node = parse(root, origin) if what == "module" else _definitions(parse(root, module)).get(name)
    return (ast.get_docstring(node) or "").partition("\n")[0] if node else ""


def _methods(root: Path) -> list[str]:
    """The modules of the quantizers' methods, as `lowbit.quantizers` finds them."""
    files = (root / "lowbit" / "quantizers").glob("*.py")
    return [f"lowbit.quantizers.{path.stem}" for path in sorted(files)
            if path.stem not in ("__init__", "base", "scaling")]  # fmt: skip


def functional(root: Path) -> dict[str, str]:
    """The functions of `lowbit.functional`, each with the dotted name of its definition."""
    found = {"oscillation_step": "lowbit.metrics.oscillation.oscillation_step"}
    for module in _methods(root):
        tree = parse(root, module)
        found |= {name: f"{module}.{name}" for name in _listed(tree)
                  if not isinstance(_definitions(tree).get(name), ast.ClassDef)}  # fmt: skip
    return found


def names(root: Path, module: str) -> dict[str, str]:
    """The public names of ``lowbit`` or one of its packages or modules, each with the dotted name of its definition.

    Args:
        root: the folder that holds ``lowbit/``.
        module: ``"lowbit"``, ``"lowbit.functional"``, or ``"lowbit."`` and one of `PACKAGES` and `MODULES`.
    """
    tree = parse(root, module)
    if module == "lowbit.functional":
        found = functional(root)
    elif module == "lowbit.quantizers":
        base = {name: origin for name, origin in _imports(tree).items() if origin.startswith("lowbit.quantizers.base")}
        found = base | {"MODULES": "lowbit.quantizers.MODULES"} | settings(root)
        found.pop("methods", None)
        found["methods"] = "lowbit.quantizers.base.methods"
    elif module.removeprefix("lowbit.") in MODULES:
        found = {name: f"{module}.{name}" for name in _definitions(tree) if not name.startswith("_")}
    else:
        found = _imports(tree)
    return dict(
        sorted(((name, defined(root, origin)) for name, origin in found.items()), key=lambda item: item[0].lower())
    )


def defined(root: Path, origin: str) -> str:
    """The dotted name under which ``origin`` is defined: imports, as a package's, are followed."""
    module, _, name = origin.rpartition(".")
    if _source(root, origin).is_file() or not _source(root, module).is_file():
        return origin
    imported = _imports(parse(root, module)).get(name)
    return defined(root, imported) if imported and imported != origin else origin


def settings(root: Path) -> dict[str, str]:
    """The settings class of every quantization method: those decorated by ``@method(...)``."""
    return {
        node.name: f"{module}.{node.name}"
        for module in _methods(root)
        for node in _definitions(parse(root, module)).values()
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(decorator).startswith("method(") for decorator in node.decorator_list)
    }
