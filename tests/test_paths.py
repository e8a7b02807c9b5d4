"""`lowbit.paths`: where things are when the results are kept elsewhere."""

from lowbit import paths


def test_the_record_travels_with_the_project_until_own_results_have_one(tmp_path, monkeypatch):
    """A notebook shows what was measured at desk size also where LOWBIT_RESULTS points to an empty folder."""
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path / "project"))
    monkeypatch.setenv("LOWBIT_RESULTS", str(tmp_path / "own"))
    shipped, own = (tmp_path / folder / "claims.json" for folder in ("project/results", "own"))
    assert paths.recorded("claims.json") == shipped  # also where there is none: the message names this one
    for file in (shipped, own):
        file.parent.mkdir(parents=True)
        file.touch()
        assert paths.recorded("claims.json") == file
