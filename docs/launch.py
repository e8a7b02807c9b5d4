"""The course for Colab and Binder: ``python docs/launch.py FOLDER`` writes what the branch ``launch`` holds.

Each notebook gets a first code cell that installs lowbit and unpacks the course's data: it starts outside a clone.
The requirements are for Binder, which installs them before it opens a notebook.
"""

import sys
from pathlib import Path

import assemble
import nbformat

INSTALL = """\
# Install lowbit and unpack the course with its data, where they are missing: on Colab, or in a fresh environment.
import importlib.util
import os

if importlib.util.find_spec("lowbit") is None:
    %pip install --quiet "lowbit[course] @ git+{repository}"
if not os.path.isdir("notebooks"):
    if not os.path.isdir("course"):
        !lowbit course course
    %cd course
"""
REQUIREMENTS = """\
--extra-index-url https://download.pytorch.org/whl/cpu
lowbit[course] @ git+{repository}
"""


def launch(target: Path, repository: str) -> None:
    """Write the notebooks, for a course that is installed from ``repository``, into the new folder ``target``."""
    (target / "course").mkdir(parents=True)
    for part in assemble.course():
        for entry in part["notebooks"]:
            notebook = assemble.read(entry["name"])
            cell = nbformat.v4.new_code_cell(INSTALL.format(repository=repository))
            notebook.cells.insert(1, cell)
            nbformat.write(notebook, target / "course" / f"{entry['name']}.ipynb")
    (target / "requirements.txt").write_text(REQUIREMENTS.format(repository=repository), encoding="utf-8")
    (target / "runtime.txt").write_text("python-3.11\n", encoding="utf-8")
    (target / "apt.txt").write_text("build-essential\n", encoding="utf-8")


if __name__ == "__main__":
    if not assemble.repository():
        sys.exit("there is no Repository in [project.urls] of pyproject.toml: set it, or run this on GitHub")
    launch(Path(sys.argv[1]), assemble.repository())
