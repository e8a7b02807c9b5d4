"""``lowbit new``: writes a notebook or a quantizer that works and passes the tests, as a start for your own."""

import builtins
import keyword
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit.files import write_text
from lowbit_suite.running.junit import clean
from lowbit_suite.running.run_json import show_path

if TYPE_CHECKING:
    import nbformat

LONGEST = 24
"""Longest name, in characters: lines that hold several names still fit."""

CODE = re.compile(r"^```python(?: (?P<tag>\w+))?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def notebook(name: str, *, execute: bool = True) -> list[Path]:
    """Write ``notebooks/<name>.ipynb``, executed, and the test of its exercises.

    Args:
        name: two digits that no other notebook has, ``_`` and a topic: ``17_my_topic``.
        execute: whether to run the notebook; if not, ``python -m tools.tidy`` adds the outputs later.

    Returns:
        The files written.

    Raises:
        LowbitError: the name is invalid or taken, or the skeleton does not run here; no file is left behind.
    """
    import nbformat

    from lowbit_suite.notebooks import available
    from tools import tidy

    name = name.removesuffix(".ipynb")
    taken = available()
    numbers = {known[:2]: known for known in reversed(taken)}
    free = next((f"{n:02}" for n in range(len(taken), 100) if f"{n:02}" not in numbers), "99")
    if not re.fullmatch(rf"\d\d_[a-z][a-z0-9_]{{0,{LONGEST - 1}}}", name):
        raise LowbitError(
            f"notebook {name!r}: a name is two digits, _ and a topic of at most {LONGEST} lower-case letters, digits "
            f"and _, such as {free}_my_topic"
        )
    if name[:2] in numbers:
        raise LowbitError(f"notebook {name!r}: {numbers[name[:2]]} already has this number; {free} is free")
    values = {"name": name, "number": name[:2], "title": name[3:].replace("_", " ").strip().capitalize()}
    made = _project("notebooks") / f"{name}.ipynb"
    test = _project("tests/notebooks") / f"test_{name}.py"
    _refuse_existing(made, test)
    nbformat.write(_notebook(_render("notebook.md.j2", values)), made)
    try:
        if execute:
            tidy.execute(made)
    except Exception as error:  # a kernel that does not start, a cell that fails, a timeout
        made.unlink()
        line = clean(str(error).strip() or type(error).__name__).splitlines()[-1]
        raise LowbitError(f"notebook {name!r}: the skeleton does not run here and was removed: {line}") from None
    write_text(test, _render("test_notebook.py.j2", values))
    return [made, test]


def quantizer(name: str) -> list[Path]:
    """Write ``lowbit/quantizers/<name>.py`` and ``tests/quantizers/test_<name>.py``.

    Args:
        name: name of the method, its file and its function; ``my_method`` gives the class ``MyMethod``.

    Returns:
        The files written.

    Raises:
        LowbitError: the name is invalid or taken; nothing is written.
    """
    import lowbit.functional
    from lowbit import quantizers

    name = name.removesuffix(".py")
    if not re.fullmatch(rf"[a-z][a-z0-9_]{{0,{LONGEST - 1}}}", name) or keyword.iskeyword(name):
        raise LowbitError(
            f"quantizer {name!r}: a name is at most {LONGEST} lower-case letters, digits and _, starts with a letter "
            "and is not a Python keyword; for example my_method"
        )
    cls = "".join(part.capitalize() for part in name.split("_"))
    # The new names must not hide names that the file uses, or names of other methods.
    used = {*dir(builtins), *dir(quantizers), *dir(quantizers.base), *dir(lowbit.functional), "Annotated", "Field"}
    if taken := {name, f"{name}_codes", cls, f"{cls}Weight"} & used:
        raise LowbitError(
            f"quantizer {name!r}: {', '.join(sorted(taken))} already exists in lowbit or in Python; choose another"
        )
    made = _project("lowbit/quantizers") / f"{name}.py"
    test = _project("tests/quantizers") / f"test_{name}.py"
    _refuse_existing(made, test)
    values = {"name": name, "cls": cls}
    write_text(made, _render("quantizer.py.j2", values))
    write_text(test, _render("test_quantizer.py.j2", values))
    return [made, test]


def _project(folder: str) -> Path:
    found = paths.project() / folder
    if not found.is_dir():
        raise LowbitError(
            f"there is no {folder}/ in {paths.project()}: run this inside a copy of the project's sources"
        )
    return found


def _refuse_existing(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise LowbitError(f"{show_path(file)} already exists; choose another name, or remove it first")


def _render(template: str, values: dict[str, str]) -> str:
    import jinja2

    loader = jinja2.PackageLoader("lowbit_suite", "templates")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(template).render(values)


def _notebook(text: str) -> "nbformat.NotebookNode":
    """A notebook from Markdown with fenced Python: each fence is a code cell, tagged by the word after ``python``."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    cells, end = [], 0
    for found in CODE.finditer(text):
        if prose := text[end : found.start()].strip():
            cells.append(new_markdown_cell(prose))
        cells.append(new_code_cell(found["code"].rstrip(), metadata={"tags": [found["tag"]]} if found["tag"] else {}))
        end = found.end()
    cells.append(new_markdown_cell(text[end:].strip()))
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})
