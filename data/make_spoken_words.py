"""Makes the spoken-word set from text with espeak-ng: ``python data/make_spoken_words.py``.

Ten words, each spoken by many synthetic voices at several speeds and pitches, at varied loudness, over a little noise.
The voices of the test split are heard in no training clip. Written beside this file: one FLAC a word with all its clips
one after the other, ``index.csv`` with where each clip lies, and ``manifest.json`` with the checksums that the loader
compares. Needs espeak-ng (Debian: ``apt-get install espeak-ng``); the project's users do not.
"""

import hashlib
import itertools
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
import torchaudio.functional

FOLDER = Path(__file__).parent / "spoken_words"
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
TRAIN_VOICES = ("en-gb+m1", "en-us+f1", "en-gb-scotland+m3", "en-us+m7", "en-gb-x-rp+f3", "en-029+m4", "en-gb+f4")
TEST_VOICES = ("en-us+m2", "en-gb-x-gbclan+f2", "en-gb+klatt4")
SPEEDS = (130, 165, 200)  # words a minute
PITCHES = (35, 75)  # espeak-ng's own unit, 0 to 99
RATE = 8000
LONGEST = 0.9  # s
QUIET = 0.02  # of the peak: what counts as silence at either end


def speak(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """One clip at 8 kHz, float in -1 ... 1, without the silence around it."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", file.name, word]
        subprocess.run(command, check=True)
        sound, rate = soundfile.read(file.name, dtype="float32")
    sound = torchaudio.functional.resample(torch.from_numpy(sound), rate, RATE).numpy()
    loud = np.flatnonzero(np.abs(sound) > QUIET * np.abs(sound).max())
    return sound[loud[0] : loud[-1] + 1]


def vary(sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another loudness, and white noise 18 to 30 dB below the voice; int16."""
    sound = sound / np.abs(sound).max() * rng.uniform(0.3, 0.85)
    level = np.sqrt(np.mean(sound**2)) * 10 ** (-rng.uniform(18, 30) / 20)
    noisy = sound + rng.normal(0, level, len(sound))
    return np.round(noisy.clip(-1, 1) * 32767).astype(np.int16)


def main() -> None:
    """Speaks, checks and writes everything."""
    FOLDER.mkdir(exist_ok=True)
    rows = []
    for number, word in enumerate(WORDS):
        rng = np.random.default_rng([2302, 2210, number])
        clips, start = [], 0
        voices = [(v, "train") for v in TRAIN_VOICES] + [(v, "test") for v in TEST_VOICES]
        for (voice, split), speed, pitch in itertools.product(voices, SPEEDS, PITCHES):
            clip = vary(speak(word, voice, speed, pitch), rng)
            if not 0.08 <= len(clip) / RATE <= LONGEST:
                raise SystemExit(f"{word} by {voice} at {speed}: {len(clip) / RATE:.2f} s long")
            rows.append((word, voice, speed, pitch, start, len(clip), split))
            clips.append(clip)
            start += len(clip)
        soundfile.write(FOLDER / f"{word}.flac", np.concatenate(clips), RATE, subtype="PCM_16")
    index = pd.DataFrame(rows, columns=["word", "voice", "speed", "pitch", "start", "length", "split"])
    index.to_csv(FOLDER / "index.csv", index=False)
    files = [*(f"{word}.flac" for word in WORDS), "index.csv"]
    sums = {file: hashlib.sha256((FOLDER / file).read_bytes()).hexdigest() for file in files}
    version = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout.split()[3]
    manifest = {"made_with": f"espeak-ng {version}", "rate": RATE, "files": sums}
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    size = sum((FOLDER / file).stat().st_size for file in [*files, "manifest.json"])
    print(f"{len(index)} clips, {index.length.sum() / RATE:.0f} s, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
