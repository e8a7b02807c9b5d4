"""Folders that keep the tests away from the user's data and cache."""

import pytest


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """An empty data folder and an empty cache, as the environment variables name them; returns the data folder."""
    data = tmp_path / "archives"
    data.mkdir()
    monkeypatch.setenv("LOWBIT_DATA", str(data))
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return data
