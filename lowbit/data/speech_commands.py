"""Google's Speech Commands v0.02: 105,829 one-second clips of 35 words."""

import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lowbit.data import sounds
from lowbit.data.archive import decoded_file, read_member
from lowbit.data.base import ArrayDataset, Data, dataset
from lowbit.data.download import fetch
from lowbit.data.fsdd import fit
from lowbit.errors import DataError

CORE = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
URL = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
FILES = {"speech_commands_v0.02.tar.gz": "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"}
RATE = 16000


def decode(path: Path, words: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Read the clips of ``words`` (None: all), int16 ``[N, 16000]``, with labels and the publisher's test list.

    Raises:
        DataError: a word has no clips, a clip has another rate, or the archive is no Speech Commands.
    """
    clips: list[tuple[str, str, np.ndarray]] = []
    test: set[str] = set()
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            word = name.split("/")[0]
            if name == "testing_list.txt":
                test = set(read_member(archive, member, path.name).decode().split())
            elif name.endswith(".wav") and not word.startswith("_") and (words is None or word in words):
                sound = sounds.read(read_member(archive, member, path.name), RATE, f"{path.name}: {name}")
                clips.append((word, name, fit(sound, RATE)))
    clips.sort(key=lambda clip: clip[:2])
    present = sorted({word for word, _, _ in clips})
    if missing := sorted(set(words or ()) - set(present)):
        raise DataError(f"{path.name} has no clip of the word(s) {', '.join(missing)}")
    if not clips or not test:
        raise DataError(f"{path.name} holds no clips or no testing_list.txt: it is not Speech Commands v0.02")
    order = words or tuple(present)
    return {
        "x": torch.from_numpy(np.stack([sound for _, _, sound in clips])),
        "y": torch.tensor([order.index(word) for word, _, _ in clips]),
        "test": torch.tensor([name in test for _, name, _ in clips]),
        "classes": list(order),
    }


@dataset(
    "speech-commands",
    title="Speech Commands v0.02, one second at 16 kHz",
    task="speech",
    kind="download",
    items="34,472 + 4,074 (10 words)",
    classes=10,
    license="CC BY 4.0",
    citation="Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, 2018, arXiv 1804.03209",
    source=URL,
    files=FILES,
    note='option words="all" for all 35 words (94,824 + 11,005) instead of the ten core ones',
)
def speech_commands(words: Literal["core", "all"] = "core") -> Data:
    """The commands; the publisher's testing list is the test split, everything else the training split."""
    if words not in ("core", "all"):
        raise DataError(f"speech-commands: words={words!r} is not allowed; use 'core' or 'all'")
    (_, expected), *_ = FILES.items()
    chosen = CORE if words == "core" else None
    contents = decoded_file(fetch(URL, expected), expected, lambda path: decode(path, chosen), variant=words)
    whole, held = ArrayDataset(contents["x"], contents["y"]), contents["test"]
    train, test = whole.take((~held).nonzero()[:, 0]), whole.take(held.nonzero()[:, 0])
    return Data("speech-commands", "speech", tuple(contents["classes"]), train, test, (RATE,), sample_rate=RATE)
