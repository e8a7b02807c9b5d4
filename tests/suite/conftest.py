"""Small projects with small notebooks, made for each test."""

import shutil
import textwrap
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

CLAIMS = Path(__file__).parents[2] / "notebooks" / "claims.yaml"
PROFILES = """
smoke: {description: small, timeout_minutes: 2, threads: 1}
desk: {description: real, timeout_minutes: 2, threads: 1, notebooks: {}}
gpu: {description: GPU, timeout_minutes: 2, requires: cuda}
"""


class Project:
    def __init__(self, folder):
        self.folder = folder
        self.notebooks = folder / "notebooks"
        self.results = folder / "results"
        self.notebooks.mkdir()
        self.profiles(PROFILES)
        shutil.copy(CLAIMS, self.notebooks)

    def profiles(self, text):
        (self.notebooks / "profiles.yaml").write_text(textwrap.dedent(text))

    def add(self, name, *cells, parameters=None, after=None):
        cells = [new_code_cell(textwrap.dedent(cell)) for cell in cells]
        if parameters is not None:
            cells.insert(0, new_code_cell(textwrap.dedent(parameters), metadata={"tags": ["parameters"]}))
        notebook = new_notebook(cells=cells)
        # A kernel that is installed nowhere: the runner has to use its own interpreter all the same.
        notebook.metadata["kernelspec"] = {"name": "somewhere-else", "display_name": "x", "language": "python"}
        if after:
            notebook.metadata["lowbit"] = {"after": after}
        path = self.notebooks / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path


@pytest.fixture(scope="session")
def make_project():
    def make(folder, monkeypatch):
        monkeypatch.setenv("LOWBIT_PROJECT", str(folder))
        monkeypatch.setenv("LOWBIT_RESULTS", str(folder / "results"))
        return Project(folder)

    return make


@pytest.fixture
def project(make_project, tmp_path, monkeypatch):
    return make_project(tmp_path, monkeypatch)


@pytest.fixture
def gone():
    """Whether a process is gone, or is only waiting for its parent to notice."""

    def check(pid):
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return check
