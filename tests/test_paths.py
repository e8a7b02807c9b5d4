"""`lowbit.paths`: where things are when the results are kept elsewhere."""

import pytest

from lowbit import paths
from lowbit.errors import LowbitError


def test_the_record_travels_with_the_project_until_own_results_have_one(tmp_path, monkeypatch):
    """A notebook shows what was measured at desk size also where LOWBIT_RESULTS points to an empty folder."""
    (tmp_path / "project" / "notebooks").mkdir(parents=True)
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path / "project"))
    monkeypatch.setenv("LOWBIT_RESULTS", str(tmp_path / "own"))
    shipped, own = (tmp_path / folder / "claims.json" for folder in ("project/results", "own"))
    assert paths.recorded("claims.json") == shipped  # also where there is none: the message names this one
    for file in (shipped, own):
        file.parent.mkdir()
        file.touch()
        assert paths.recorded("claims.json") == file


def test_a_folder_without_notebooks_is_no_project(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path))
    for ask in (paths.project, paths.notebooks, paths.embedded_data):
        with pytest.raises(LowbitError, match=rf"LOWBIT_PROJECT: {tmp_path} is no lowbit project.*notebooks/"):
            ask()
    (tmp_path / "notebooks").mkdir()
    assert paths.project() == tmp_path
