"""Ten spoken words by synthetic voices, shipped with the project (see ``data/make_spoken_words.py``)."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

from lowbit import paths
from lowbit.data import sounds
from lowbit.data.archive import check
from lowbit.data.base import ArrayDataset, Data, dataset
from lowbit.data.fsdd import fit
from lowbit.errors import DataError
from lowbit.extras import extra

CLASSES = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
RATE = 8000


def folder() -> Path:
    """The folder of the data set."""
    return paths.embedded_data() / "spoken_words"


@cache
def manifest() -> dict[str, str]:
    """File name -> sha256, from the set's manifest; empty if the project's data folder is missing."""
    path = folder() / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else {}


@dataset(
    "spoken-words",
    title="ten words by synthetic voices, one second at 8 kHz",
    task="speech",
    kind="embedded",
    items="420 + 180",
    classes=10,
    license="MIT, as the project",
    citation="made with espeak-ng",
    source="data/spoken_words in the project's sources",
    files=manifest(),
    note="the three voices of the test split are in no training clip",
)
def spoken_words() -> Data:
    """The words, int16 ``[N, 8000]``, with word, voice, speed and pitch of each clip.

    Raises:
        DataError: a file is missing, truncated or altered.
    """
    with extra("speech", "the data set spoken-words"):
        import pandas as pd

    sums = manifest()
    if not sums:
        raise DataError(f"spoken-words was not found: {folder()} has no manifest.json; run from the project's sources")
    for file, expected in sums.items():
        if not (folder() / file).is_file():
            raise DataError(f"spoken-words lacks the file {file}; restore it from the project's sources")
        check(folder() / file, expected)
    index = pd.read_csv(folder() / "index.csv")
    clips_of = {word: sounds.read(folder() / f"{word}.flac", RATE, f"{word}.flac") for word in CLASSES}
    clips = [fit(clips_of[row.word][row.start : row.start + row.length], RATE) for row in index.itertuples()]
    y = torch.tensor([CLASSES.index(word) for word in index.word])
    whole = ArrayDataset(torch.from_numpy(np.stack(clips)), y, index[["word", "voice", "speed", "pitch"]])
    held = torch.from_numpy((index.split == "test").to_numpy(copy=True))
    train, test = whole.take((~held).nonzero()[:, 0]), whole.take(held.nonzero()[:, 0])
    return Data("spoken-words", "speech", CLASSES, train, test, (RATE,), sample_rate=RATE)
