"""Puts the site's pages together for Sphinx: ``python docs/assemble.py FOLDER`` (``make site`` does it).

The written pages are copied from docs/. The others are made here from what they show, so that they cannot go stale:
the course from notebooks/ and docs/course.yaml, the API pages from the source of lowbit/, the results from results/,
and the explorables from lowbit_suite/explorables/. Nothing of lowbit is imported.
"""

import importlib.util
import json
import os
import re
import shutil
import struct
import sys
import tomllib
from pathlib import Path

import nbformat
import public
import yaml

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
WRITTEN = ("*.md", "howto/*.md")
QUOTED = ("lowbit/quantizers/statsq.py", "examples/digit.c")
"""Tested code of the project that the how-to pages show."""
CODE_SPAN = re.compile(r"(?<!\[)`(\d\d_\w+)(?:\.ipynb)?`")


def repository() -> str:
    """The address of the repository, without a slash at its end; empty if it is not known.

    GitHub's workflows say where they run, so that a fork's site leads to the fork. Elsewhere it is ``Repository`` of
    ``[project.urls]`` in pyproject.toml.
    """
    if name := os.environ.get("GITHUB_REPOSITORY"):
        return f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}"
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls.get("Repository", "").rstrip("/")


def course() -> list[dict]:
    """The parts of docs/course.yaml, each with its notebooks."""
    return yaml.safe_load((DOCS / "course.yaml").read_text(encoding="utf-8"))


def number(name: str) -> int:
    """The number with which a notebook's name begins."""
    return int(name[:2])


def title(notebook: nbformat.NotebookNode) -> str:
    """A notebook's first heading without its number."""
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.sub(r"^#\s*(\d\d · )?", "", first.splitlines()[0]).strip()


def read(name: str) -> nbformat.NotebookNode:
    """A notebook of the course by its name."""
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def facts(entry: dict, names: dict[int, str]) -> str:
    """One line with a notebook's level, time and prerequisites."""
    needs = ", ".join(f"[{n:02d}]({names[n]}.ipynb)" for n in entry["needs"]) or "nothing"
    minutes = f"**run** ≈ {entry['run']} min · **read** ≈ {entry['read']} min"
    return f"**Level** {entry['level']} · {minutes} · **builds on** {needs}"


def course_pages(target: Path) -> None:
    """The notebooks with a line of facts under their titles, and the page that lists them."""
    entries = [entry for part in course() for entry in part["notebooks"]]
    names = {number(entry["name"]): entry["name"] for entry in entries}
    lines = [(DOCS / "_course.md").read_text(encoding="utf-8")]
    for part in course():
        lines += [f"## {part['part']}\n", "| notebook | level | minutes | builds on |", "|---|---|---|---|"]
        for entry in part["notebooks"]:
            notebook = read(entry["name"])
            heading, _, rest = notebook.cells[0].source.partition("\n")
            notebook.cells[0].source = f"{heading}\n\n:::{{div}} facts\n{facts(entry, names)}\n:::\n{rest}"
            for cell in notebook.cells:
                cell.source = cell.source.removeprefix("# NBVAL_CHECK_OUTPUT\n")  # a mark for tests, not for readers
                if cell.cell_type == "markdown":
                    cell.source = CODE_SPAN.sub(
                        lambda found: f"[`{found[1]}`]({found[1]}.ipynb)" if found[1] in names.values() else found[0],
                        cell.source,
                    )
            nbformat.write(notebook, target / f"{entry['name']}.ipynb")
            needs = ", ".join(f"{n:02d}" for n in entry["needs"]) or "–"
            lines.append(
                f"| [{entry['name'][:2]} · {title(notebook)}]({entry['name']}.ipynb)<br>You learn: {entry['learn']} "
                f"| {entry['level']} | {entry['run']} + {entry['read']} | {needs} |"
            )
        lines += ["", "```{toctree}", ":hidden:", *(entry["name"] for entry in part["notebooks"]), "```", ""]
    (target / "index.md").write_text("\n".join(lines), encoding="utf-8")


def escape_bars(line: str) -> str:
    """A line of a docstring whose bars, as in ``|w|``, are not taken for substitutions; code keeps its bars."""
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if index % 2 else re.sub(r"(?<!\\)\|", r"\|", part) for index, part in enumerate(parts))


API_HEAD = {
    "lowbit": "The names that most programs need. Everything loads on first use, so ``import lowbit`` is quick.",
    "lowbit.functional": "The math of every method as pure functions of tensors.",
}
DIRECTIVE = {"class": "autoapiclass", "function": "autoapifunction", "data": "autoapidata"}


def api_names() -> dict[str, dict[str, str]]:
    """The public names of each documented module, with the dotted names of their definitions."""
    modules = ["lowbit", "lowbit.functional"] + [f"lowbit.{name}" for name in (*public.PACKAGES, *public.MODULES)]
    return {module: public.names(ROOT, module) for module in modules}


def definitions() -> dict[str, str]:
    """Every public dotted name, such as ``lowbit.data.load``, and where it is defined."""
    return {f"{module}.{name}": origin for module, names in api_names().items() for name, origin in names.items()}


def home(name: str, origin: str, pages: dict[str, dict[str, str]]) -> str:
    """The page that describes ``origin``: the functional page for its functions, else that of its package."""
    if origin in pages["lowbit.functional"].values():
        return "lowbit.functional"
    package = ".".join(origin.split(".")[:2])
    return package if package in pages and origin in pages[package].values() else "lowbit"


def api_page(module: str, pages: dict[str, dict[str, str]]) -> str:
    """A page in reStructuredText: a table of all names, then the descriptions of those that belong here."""
    head = API_HEAD.get(module) or public.summary(ROOT, module)
    lines = [module, "=" * len(module), "", head, "", ".. list-table::", "   :widths: 30 70", "   :class: names"]
    lines += ["   :header-rows: 1", "", "   * - name", "     - what it is"]
    for name, origin in pages[module].items():
        what = public.kind(ROOT, origin)
        if what == "module":
            link = f":doc:`{origin} <{origin}>`" if origin in pages else f"``{origin}``"
        else:
            link = f":py:obj:`{name} <{origin}>`"
        lines += [f"   * - {link}", f"     - {escape_bars(public.summary(ROOT, origin))}"]
    for name, origin in pages[module].items():
        what = public.kind(ROOT, origin)
        if what != "module" and home(name, origin, pages) == module:
            members = ["   :members:"] if what == "class" else []
            lines += ["", f".. {DIRECTIVE[what]}:: {origin}", *members]
    return "\n".join(lines) + "\n"


def api_pages(target: Path) -> None:
    """One page for each public module, and their list."""
    pages = api_names()
    lines = [(DOCS / "_api.md").read_text(encoding="utf-8"), "| module | what it is |", "|---|---|"]
    for module in pages:
        (target / f"{module}.rst").write_text(api_page(module, pages), encoding="utf-8")
        head = API_HEAD.get(module) or public.summary(ROOT, module)
        lines.append(f"| [`{module}`]({module}.rst) | {head.replace('``', '`')} |")
    lines += ["", "```{toctree}", ":hidden:", *pages, "```", ""]
    (target / "index.md").write_text("\n".join(lines), encoding="utf-8")


def found_table() -> str:
    """The claims with their verdicts, and where the short trainings point, as a table in Markdown."""
    claims = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))
    looks = {(claim["id"], claim["profile"]): claim for claim in claims if claim["look"]}
    lines = ["| claim | in words | verdict | short trainings |", "|---|---|---|---|"]
    for claim in claims:
        if claim["look"]:
            continue
        name, verdict = claim["id"], claim["verdict"]
        if claim["verdict"] == "reproduced":
            verdict = f"**reproduced**, at `{claim['profile']}`"
        seen = [looks[name, profile]["direction"] for profile in ("desk", "embedded") if (name, profile) in looks]
        lines.append(f"| {name} | {claim['claim']} | {verdict} | {seen[0] if seen else '–'} |")
    return "\n".join(lines) + "\n"


def linked(text: str, prefix: str) -> str:
    """Links to files that the site does not hold lead to the repository; without its address they become plain text."""

    def lead(found: re.Match) -> str:
        path = found[2]
        if path.startswith(("http", "#")) or path.startswith("figures/") or path.endswith(".md"):
            return found[0]
        return f"[{found[1]}]({repository()}/blob/main/{prefix}{path})" if repository() else f"`{found[1]}`"

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", lead, text)


def result_pages(target: Path) -> None:
    """The verdicts, the figures, the benchmarks and the suite's own reports."""
    shutil.copytree(ROOT / "results" / "figures", target / "figures")
    for name in ("claims", "faults", "models", "mutations", "versions"):
        text = (ROOT / "results" / f"{name}.md").read_text(encoding="utf-8")
        (target / f"{name}.md").write_text(linked(text, "results/"), encoding="utf-8")
    (target / "figures.md").write_text(figures_page(), encoding="utf-8")
    (target / "benchmarks.md").write_text(benchmarks_page(target), encoding="utf-8")
    head = (DOCS / "_results.md").read_text(encoding="utf-8")
    (target / "index.md").write_text(head.replace("<!-- found -->", found_table()), encoding="utf-8")


def alt_text(path: Path) -> str:
    """The alternative text that ``lowbit_suite.plotting.save`` wrote into a PNG file, as its ``Description``."""
    data, place = path.read_bytes(), 8  # after the signature
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        key, _, text = data[place + 8 : place + 8 + length].partition(b"\0")
        if key == b"Description" and kind == b"tEXt":
            return text.decode("latin-1")
        if key == b"Description" and kind == b"iTXt":  # two bytes on compression, a language, a translated key
            return text[2:].split(b"\0", 2)[2].decode()
        place += length + 12  # length, kind and checksum
    raise ValueError(f"{path.name} has no alternative text; give plotting.save(figure, name, alt=...) one")


def figures_page() -> str:
    """The study's figures by claim, then those of the accepted desk runs under the notebook that made them."""
    lines = [(DOCS / "_figures.md").read_text(encoding="utf-8")]
    if study := sorted((ROOT / "results" / "figures" / "study").glob("*.png")):
        lines.append(
            "\n## The study\n\nEach claim's effect by length of training; [the claims](claims.md) have the numbers.\n"
        )
        lines += [f"![{alt_text(path)}](figures/study/{path.name})\n" for path in study]
    names = {number(entry["name"]): entry["name"] for part in course() for entry in part["notebooks"]}
    last = None
    for path in sorted((ROOT / "results" / "figures" / "desk").glob("*.png")):
        if number(path.name) != last:
            last = number(path.name)
            name = names[last]
            lines += [f"\n## {last:02d} · {title(read(name))}\n", f"From [`{name}`](../course/{name}.ipynb).\n"]
        lines.append(f"![{alt_text(path)}](figures/desk/{path.name})\n")
    return "\n".join(lines)


BENCHMARKS = {
    "models": "Whole models",
    "models-avx2": "Whole models on a processor with AVX2 alone",
    "kernels": "Packed layers",
    "training": "A step of training",
    "ofq_deit_tiny": "OFQ's recipe on DeiT-tiny",
}


def benchmarks_page(target: Path) -> str:
    """The recorded benchmarks as tables, each with the machine that it ran on."""
    lines = [(DOCS / "_benchmarks.md").read_text(encoding="utf-8")]
    shutil.copyfile(ROOT / "results" / "bench" / "roofline.png", target / "figures" / "roofline.png")
    for name, heading in BENCHMARKS.items():
        rows = json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text(encoding="utf-8"))
        lines += [f"\n## {heading}\n"]
        machine = ROOT / "results" / "bench" / f"{name}.machine.json"
        if machine.is_file():
            told = json.loads(machine.read_text(encoding="utf-8"))["machine"]
            lines.append(
                f"{told['cpu']}, {told['cores']} cores, {', '.join(told['isa'])}; torch {told['torch']}; "
                f"`{name}.json`.\n"
            )
        for case in dict.fromkeys(row["case"] for row in rows):
            lines += [
                f":::{{dropdown}} {case}",
                "| engine | threads | median | ratio to baseline |",
                "|---|---|---|---|",
            ]
            lines += [
                f"| {row['engine']} | {row['threads']} | {row['median']:.4g} {row['unit']} | {row['ratio']:.3g} |"
                for row in rows
                if row["case"] == case
            ]
            lines += [":::", ""]
    return "\n".join(lines)


def explore_page(target: Path, modules: Path) -> None:
    """The page of explorables: each as its picture, which ``embed.js`` makes live by the modules beside it."""
    folder = ROOT / "lowbit_suite" / "explorables"
    spec = importlib.util.spec_from_file_location("explorables", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    explorables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(explorables)
    text = (DOCS / "_explore.md").read_text(encoding="utf-8")
    for name in explorables.ALT:
        assert f"<!-- {name} -->" in text, f"docs/_explore.md has no place for {name}"
        text = text.replace(f"<!-- {name} -->", explorables.figure(name))
    (target / "index.md").write_text(text, encoding="utf-8")
    modules.mkdir(parents=True)
    for path in folder.glob("*.js"):
        shutil.copyfile(path, modules / path.name)


def mathjax(target: Path) -> None:
    """MathJax with its fonts, from the installed package, for pages that load nothing from elsewhere."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    source = Path(spec.origin).parent / "static" / "mathjax"
    target.mkdir(parents=True)
    shutil.copyfile(source / "tex-chtml.js", target / "tex-chtml.js")
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    shutil.copytree(source / fonts, target / fonts)


def assemble(target: Path) -> None:
    """Write the whole source of the site into ``target``, whose old content is removed."""
    shutil.rmtree(target, ignore_errors=True)
    for folder in ("course", "api", "results", "explore", "howto"):
        (target / folder).mkdir(parents=True)
    for pattern in WRITTEN:
        for path in DOCS.glob(pattern):
            if not path.name.startswith("_"):
                shutil.copyfile(path, target / path.relative_to(DOCS))
    for path in (*(DOCS / "howto").glob("*.py"), *(DOCS / "howto").glob("*.sh"), *(ROOT / name for name in QUOTED)):
        shutil.copyfile(path, target / "howto" / path.name)
    index = target / "index.md"
    index.write_text(index.read_text(encoding="utf-8").replace("<!-- found -->", found_table()), encoding="utf-8")
    course_pages(target / "course")
    api_pages(target / "api")
    result_pages(target / "results")
    explore_page(target / "explore", target / "_static" / "explorables")
    mathjax(target / "_static" / "mathjax")
    for path in (DOCS / "pictures").glob("*.svg"):
        shutil.copyfile(path, target / "_static" / path.name)


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
