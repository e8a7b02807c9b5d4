import json

import pandas as pd
import pytest

import lowbit


@pytest.mark.parametrize("notebook", [{}, {"notebook": "02_zero_free_shifting"}])
def test_a_table_and_its_card_are_written(tmp_path, monkeypatch, notebook):
    monkeypatch.setenv("LOWBIT_CONTEXT", json.dumps({"tables": str(tmp_path / "tables")} | notebook))
    frame = pd.DataFrame({"method": ["s3", "denseshift"], "seed": [0, 0], "accuracy, %": [50.5, 51.25]})
    assert lowbit.save_table(frame, "small", profile="desk", seeds=[0]) is frame
    assert pd.read_csv(tmp_path / "tables" / "small.csv").equals(frame)
    card = json.loads((tmp_path / "tables" / "small.json").read_text())
    assert card["rows"] == 2 and card["settings"] == {"profile": "desk", "seeds": [0]}
    assert card["command"] == (f"lowbit run {notebook['notebook']} --profile desk" if notebook else "interactive")
    assert card["environment"]["torch"]
