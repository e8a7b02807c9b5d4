"""Random one-token mutants: how many of them the fast tests notice.

    python -m tools.mutants --count 40 --seed 7      # exit 1 if fewer than 95 % are noticed

The tests of the mutant's own module run first; if they pass, those of its whole folder run too. `tools.mutation` tries
faults that someone thought of; these are drawn. A survivor is a gap in the tests, or it changes nothing that matters:
then tests/harmless_mutants.yaml says why, and it is not drawn again.
"""

import argparse
import ast
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lowbit import paths, yamls
from lowbit.errors import LowbitError
from tools.mutation import Mutation, Outcome, run

AREAS = ("quantizers", "training", "metrics", "kernels", "nn", "engine")
HARMLESS = "tests/harmless_mutants.yaml"
ENOUGH = 0.95
SWAPPED = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.And: "or",
    ast.Or: "and",
}  # fmt: skip
WRITTEN = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
    ast.IsNot: "is not", ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.And: "and",
    ast.Or: "or",
}  # fmt: skip


def candidates(text: str) -> Iterator[tuple[int, str, str]]:
    """Every one-token change of a source text: where it begins (in characters), the old token, the new one.

    Annotations, texts (docstrings, messages) and the arguments of decorators stay as they are.
    """
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def between(left: ast.expr, right: ast.expr, kind: type) -> Iterator[tuple[int, str, str]]:
        begin, end = place(left.end_lineno, left.end_col_offset), place(right.lineno, right.col_offset)
        token = WRITTEN[kind]
        if (at := text[begin:end].find(token)) >= 0 and "#" not in text[begin:end]:
            yield begin + at, token, SWAPPED[kind]

    for node in _code(ast.parse(text)):
        if isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                if type(op) in SWAPPED:
                    yield from between(left, right, type(op))
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            yield from between(node.left, node.right, type(node.op))
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(left, right, type(node.op))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield place(node.lineno, node.col_offset), "not " if isinstance(node.op, ast.Not) else "-", ""
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int):
            new = not node.value if isinstance(node.value, bool) else node.value + 1
            yield place(node.lineno, node.col_offset), ast.get_source_segment(text, node), str(new)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    for name, held in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.JoinedStr):
            continue
        for child in held if isinstance(held, list) else [held]:
            if isinstance(child, ast.AST):
                yield child
                yield from _code(child)


def tests_of(file: str, root: Path) -> tuple[str, ...]:
    """The fast tests of a module: the test file of its name, or the whole folder where there is none."""
    _, area, name = file.split("/")
    own = root / "tests" / area / f"test_{name}"
    return (str(own.relative_to(root)) if own.exists() else f"tests/{area}", "-m", "not slow")


def try_all(mutants: list[Mutation], root: Path | None = None) -> Iterator[Outcome]:
    """Run each mutant's `tests_of`; if they notice nothing, or are all slow, run the fast tests of its folder."""
    for outcome in run(mutants, root):
        folder = (f"tests/{outcome.mutation.file.split('/')[1]}", "-m", "not slow")
        if outcome.status != "caught" and outcome.mutation.tests != folder:
            (outcome,) = run([replace(outcome.mutation, tests=folder)], root)
        yield outcome


def draw(count: int, seed: int, areas: tuple[str, ...] = AREAS, root: Path | None = None) -> list[Mutation]:
    """``count`` different mutants, each line as likely as its number of candidates; harmless ones are left out."""
    root = root or paths.project()
    held = root / HARMLESS
    known = yamls.load(held.read_text(encoding="utf-8"), HARMLESS) if held.exists() else []
    harmless = {(entry["file"], entry["line"], entry["change"]) for entry in known}
    found = []
    for area in areas:
        for path in sorted((root / "lowbit" / area).glob("*.py")):
            file, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
            for at, old, new in candidates(text):
                line = text[text.rfind("\n", 0, at) + 1 : text.find("\n", at)].strip()
                if (file, line, f"{old} -> {new}") not in harmless:
                    found.append((file, text, at, old, new, line))
    if len(found) < count:
        raise LowbitError(f"count={count}: there are {len(found)} mutants of {', '.join(areas)}")
    made = []
    for file, text, at, old, new, line in random.Random(seed).sample(found, count):
        number = text.count("\n", 0, at) + 1
        mutated = text[:at] + new + text[at + len(old) :]
        made.append(Mutation(f"{file}:{number}: {old} -> {new}: {line}", file, text, mutated, tests_of(file, root)))
    return made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", action="append", choices=AREAS, help="only this; repeat for several")
    given = parser.parse_args()
    noticed, asked = 0, 0
    for outcome in try_all(draw(given.count, given.seed, tuple(given.area or AREAS))):
        if outcome.status != "error":
            asked, noticed = asked + 1, noticed + (outcome.status == "caught")
        print(f"{outcome.status:9s} {outcome.mutation.name}  {outcome.noticed_by}", flush=True)
    print(f"{noticed} of {asked} noticed ({100 * noticed / max(asked, 1):.0f} %); seed {given.seed}")
    sys.exit(0 if asked and noticed >= ENOUGH * asked else 1)


if __name__ == "__main__":
    main()
