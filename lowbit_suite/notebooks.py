"""Finds the notebooks and reads their parameters and their order; executes none."""

import ast
import fnmatch
import graphlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit import paths, yamls
from lowbit.errors import LowbitError
from lowbit.training.runfile import refuse_repeated
from lowbit_suite.profiles import Profile, close


@dataclass(frozen=True)
class Notebook:
    """A notebook as read from its file: ``defaults`` are the literals of its parameters cell, ``code`` is all code."""

    name: str
    path: Path
    defaults: dict[str, Any]
    after: tuple[str, ...]
    code_hash: str
    code: str


def read(path: Path) -> Notebook:
    """Read one notebook; a broken file or parameters cell raises `LowbitError`."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in tree["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in code]
        tagged = [s for s, cell in zip(sources, code, strict=True) if "parameters" in cell["metadata"].get("tags", [])]
        after = tree["metadata"].get("lowbit", {}).get("after", [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LowbitError(f"{path.name} cannot be read as a notebook: {type(error).__name__} {error}") from None
    if not isinstance(after, list) or not all(isinstance(item, str) for item in after):
        raise LowbitError(f"{path.name}: metadata lowbit.after={after!r} is not a list of notebook names")
    digest = hashlib.sha256(json.dumps(sources).encode()).hexdigest()
    defaults = _literals(path.name, tagged[0]) if tagged else {}
    after = tuple(item.removesuffix(".ipynb") for item in after)
    return Notebook(path.stem, path, defaults, after, digest, "\n".join(sources))


def _literals(name: str, source: str) -> dict[str, Any]:
    """The names and values that a parameters cell assigns.

    It may hold nothing but literals: papermill sets its own values after this cell and does not recompute values
    derived in it.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise LowbitError(
            f"{name}: the parameters cell is not plain Python (line {error.lineno}: {error.msg})"
        ) from None
    found: dict[str, Any] = {}
    for item in statements:
        if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
            continue  # a docstring
        targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
        try:
            (target,) = targets
            if not isinstance(item, ast.Assign | ast.AnnAssign) or not isinstance(target, ast.Name):
                raise ValueError
            found[target.id] = ast.literal_eval(item.value)
        except (ValueError, TypeError):
            raise LowbitError(
                f"{name}: line {item.lineno} of the parameters cell is not 'name = literal'; "
                "derive other values in the next cell"
            ) from None
    return found


def available(folder: Path | None = None) -> dict[str, Path]:
    """The course's notebooks by name, in the order of their numbers."""
    folder = folder or paths.notebooks()
    return {path.stem: path for path in sorted(folder.glob("*.ipynb"))}


def select(patterns: Sequence[str], folder: Path | None = None) -> list[Notebook]:
    """The notebooks that match the names (with or without .ipynb), globs and paths; all if there are no patterns.

    They are sorted in execution order: by number, and each after those in its metadata ``lowbit.after``.
    """
    known = available(folder)
    if not known:
        raise LowbitError(f"there are no notebooks in {folder or paths.notebooks()}: set LOWBIT_PROJECT to the project")
    chosen: dict[str, Path] = {}
    for pattern in patterns or ["*"]:
        stem = pattern.removesuffix(".ipynb")
        path = Path(pattern)
        if matches := fnmatch.filter(known, stem):
            chosen |= {name: known[name] for name in matches}
        elif path.suffix == ".ipynb" and path.is_file():
            if path.stem in known and known[path.stem].resolve() != path.resolve():
                raise LowbitError(f"{pattern}: the course already has a notebook called {path.stem!r}; rename this one")
            chosen[path.stem] = path.resolve()
        else:
            raise LowbitError(f"no notebook is called {pattern!r}; there are {', '.join(known)}{close(stem, known)}")
    return order([read(path) for _, path in sorted(chosen.items())], known)


def order(notebooks: Sequence[Notebook], known: Iterable[str]) -> list[Notebook]:
    """Sort by name, then move each after those that it names; unknown names and cycles raise `LowbitError`."""
    by_name = {notebook.name: notebook for notebook in notebooks}
    known = set(known) | set(by_name)
    graph = graphlib.TopologicalSorter()
    for notebook in notebooks:
        for name in notebook.after:
            if name not in known:
                raise LowbitError(f"{notebook.name} comes after {name!r}, which is not a notebook{close(name, known)}")
        graph.add(notebook.name, *(name for name in notebook.after if name in by_name))
    try:
        graph.prepare()
    except graphlib.CycleError as error:
        raise LowbitError(f"these notebooks wait for each other: {' -> '.join(error.args[1])}") from None
    done: list[Notebook] = []
    ready: list[str] = []
    while graph.is_active():
        ready = sorted([*ready, *graph.get_ready()])
        name, *ready = ready
        done.append(by_name[name])
        graph.done(name)
    return done


def parse_assignments(assignments: Sequence[str], notebooks: Sequence[Notebook]) -> dict[str, dict[str, Any]]:
    """Parse ``-p name=value`` and ``-p notebook:name=value`` into the parameters of each notebook.

    Values are YAML scalars or lists. An unqualified name has to be a parameter of every selected notebook.
    """
    found: dict[str, dict[str, Any]] = {notebook.name: {} for notebook in notebooks}
    refuse_repeated("-p", assignments)
    for text in assignments:
        left, equals, right = text.partition("=")
        owner, colon, name = left.rpartition(":")
        if not equals or not name.strip() or (colon and not owner.strip()):
            raise LowbitError(f"-p {text!r} is not of the form name=value or notebook:name=value")
        owner, name = owner.strip().removesuffix(".ipynb"), name.strip()
        if colon and owner not in found:
            raise LowbitError(
                f"-p {text!r}: {owner!r} is not among the notebooks to run: {', '.join(found)}{close(owner, found)}"
            )
        for notebook in notebooks:
            if not colon or notebook.name == owner:
                found[notebook.name][name] = parse_value(text, right)
    return found


def parse_value(text: str, value: str) -> Any:
    """Parse a scalar or list of YAML 1.2 (`lowbit.yamls`); an empty value is the empty string."""
    if "&" in value and "*" in value:
        raise LowbitError(f"-p {text!r}: write the value out, without YAML anchors and aliases")
    try:
        parsed = yamls.load(value, "it") if value.strip() else ""
    except LowbitError as error:
        raise LowbitError(f"-p {text!r}: the value is not a YAML scalar or list ({error})") from None
    items = parsed if isinstance(parsed, list) else [parsed]
    if any(isinstance(item, dict) or not isinstance(item, str | int | float | bool | list | None) for item in items):
        raise LowbitError(f"-p {text!r}: the value has to be a number, a string, true/false or a list of these")
    return parsed


def resolve(
    notebooks: Sequence[Notebook], profile_name: str, profile: Profile, given: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The parameters of each notebook: the profile's, overridden by those given, and ``profile`` if it is declared.

    The notebook's parameters cell has to declare every name, with a value of the same type. A profile with
    ``listed_only`` has to list the notebook.
    """
    known = available()
    for name in profile.notebooks:
        if name not in known and name not in given:
            raise LowbitError(f"profiles.yaml, {profile_name}: no notebook is called {name!r}{close(name, known)}")
    resolved = {}
    for notebook in notebooks:
        if profile.listed_only and notebook.name not in profile.notebooks:
            raise LowbitError(
                f"profile {profile_name} has no settings for {notebook.name}, so it would run with its smoke values: "
                f"add '{notebook.name}: {{...}}' to the profile in profiles.yaml, or choose another profile "
                f"({profile_name}: {profile.description})"
            )
        overrides: dict[str, Any] = {}
        sources = (
            (f"profiles.yaml, {profile_name}", profile.notebooks.get(notebook.name, {})),
            ("-p", given.get(notebook.name, {})),
        )
        for source, values in sources:
            for name, value in values.items():
                _allow(f"{source}: ", notebook, name, value)
                overrides[name] = value
        if "profile" in notebook.defaults:
            if overrides.get("profile", profile_name) != profile_name:
                raise LowbitError(f"{notebook.name}: choose the profile with --profile, not with a parameter")
            overrides["profile"] = profile_name
        resolved[notebook.name] = overrides
    return resolved


def _allow(source: str, notebook: Notebook, name: str, value: Any) -> None:
    if name not in notebook.defaults:
        there = ", ".join(notebook.defaults) or "none"
        raise LowbitError(
            f"{source}{notebook.name} has no parameter {name!r}; it has {there}{close(name, notebook.defaults)}"
        )
    default = notebook.defaults[name]
    kinds = {
        bool: (bool,),
        int: (int,),
        float: (float, int),
        str: (str,),
        list: (list, tuple),
        tuple: (list, tuple),
    }.get(type(default))
    if kinds is None:
        return
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise LowbitError(
            f"{source}{notebook.name}: {name}={value!r} has type {type(value).__name__}; "
            f"it has to be {type(default).__name__}, like the default {default!r}"
        )
