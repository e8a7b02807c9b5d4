"""FSDD, the Free Spoken Digit Dataset: 3,000 recordings of the ten digits by six people."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.data import sounds
from lowbit.data.archive import decoded
from lowbit.data.base import ArrayDataset, Data, dataset
from lowbit.errors import DataError
from lowbit.extras import extra

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
SOURCE = "github.com/Jakobovski/free-spoken-digit-dataset (zipped as recordings/<digit>_<speaker>_<index>.wav)"
FILES = {"fsdd.zip": "72be567be32b90d4e72a82fcbdf4215aa4957770bd3e8a3849bf731bbef1cf25"}
RATE = 8000
TEST_INDICES = 5  # the customary split: recordings 0-4 of each speaker and digit are the test set
RECORDING = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")


def fit(sound: np.ndarray, length: int) -> np.ndarray:
    """Pad ``sound`` with silence on both sides, or cut both ends, to ``length`` samples."""
    if len(sound) >= length:
        start = (len(sound) - length) // 2
        return sound[start : start + length]
    before = (length - len(sound)) // 2
    return np.pad(sound, (before, length - len(sound) - before))


def decode(path: Path) -> dict[str, Any]:
    """All recordings, int16 ``[N, 8000]`` (one second), with digit, speaker and index, in that order.

    Raises:
        DataError: a recording has another rate or form, or a digit is missing.
    """
    recordings = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            match = RECORDING.fullmatch(Path(name).name)
            if match is None:
                continue
            if match[2] not in SPEAKERS:
                raise DataError(f"{path.name}: {name} is not a recording by {', '.join(SPEAKERS)}")
            sound = sounds.read(archive.read(name), RATE, f"{path.name}: {name}")
            recordings.append((int(match[1]), SPEAKERS.index(match[2]), int(match[3]), fit(sound, RATE)))
    recordings.sort(key=lambda item: item[:3])
    present = {digit for digit, *_ in recordings}
    if missing := [name for i, name in enumerate(CLASSES) if i not in present]:
        raise DataError(f"{path.name} has no recording of the digit(s) {', '.join(missing)}")
    keys = torch.tensor([item[:3] for item in recordings])
    return {"x": torch.from_numpy(np.stack([item[3] for item in recordings])), "keys": keys}


@dataset(
    "fsdd",
    title="spoken digits, six speakers, one second at 8 kHz",
    task="speech",
    kind="archive",
    items="2,700 + 300",
    classes=10,
    license="CC BY-SA 4.0",
    citation="Jackson et al., Free Spoken Digit Dataset",
    source=SOURCE,
    files=FILES,
    note="option speaker=: hold that speaker out as the test set (500 recordings), instead of the customary split",
)
def fsdd(speaker: str | None = None) -> Data:
    """The digits, int16 ``[N, 8000]``; ``speaker`` (a name) makes that person's 500 recordings the test set."""
    with extra("speech", "the data set fsdd"):
        import pandas as pd

    if speaker is not None and speaker not in SPEAKERS:
        raise DataError(f"fsdd: speaker={speaker!r} is not one of {', '.join(SPEAKERS)}")
    (file, expected), *_ = FILES.items()
    contents = decoded(file, expected, SOURCE, decode)
    digit, who, index = contents["keys"].T
    meta = pd.DataFrame({"speaker": [SPEAKERS[i] for i in who.tolist()], "index": index.numpy()})
    whole = ArrayDataset(contents["x"], digit.clone(), meta)
    held = index < TEST_INDICES if speaker is None else who == SPEAKERS.index(speaker)
    train, test = whole.take((~held).nonzero()[:, 0]), whole.take(held.nonzero()[:, 0])
    return Data("fsdd", "speech", CLASSES, train, test, (RATE,), sample_rate=RATE)
