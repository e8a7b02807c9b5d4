"""Read one recording as 16-bit mono, or refuse it by name; every loader of sounds uses this.

Integers of 8, 24 and 32 bits are scaled to 16 bits, and so is floating point from [-1, 1]. Recordings with several
channels, another rate, no samples, values that are NaN or beyond [-1, 1], and files that end too early are refused.
"""

import io
from pathlib import Path

import numpy as np

from lowbit.errors import DataError
from lowbit.extras import extra

FLOATING = ("FLOAT", "DOUBLE")
UNKNOWN_LENGTH = (0, 0xFFFFFFFF)  # written by a program that could not return to the header


def read(source: bytes | Path, rate: int, name: str) -> np.ndarray:
    """Read the samples of a recording, int16 ``[T]``.

    Args:
        source: the file's contents, or its path.
        rate: the required samples per second.
        name: name of the recording in errors.

    Raises:
        DataError: the recording is refused; the message names it and says why.
    """
    with extra("speech", "reading sound"):
        import soundfile

    content = source.read_bytes() if isinstance(source, Path) else source
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            actual, channels, frames, subtype = file.samplerate, file.channels, file.frames, file.subtype
            # libsndfile truncates floating point to integers without scaling, which would leave only -1, 0 and 1.
            sound = file.read(dtype="float64" if subtype in FLOATING else "int16")
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise DataError(f"{name} cannot be read as a recording ({error}): it is empty, damaged or no sound") from error
    if actual != rate or channels != 1:
        raise DataError(f"{name} is not a mono recording at {rate} Hz: it has {channels} channel(s) at {actual} Hz")
    if len(sound) < frames or _cut(content):
        raise DataError(f"{name} is truncated: it ends before the length that its header gives; restore it")
    if not len(sound):
        raise DataError(f"{name} has no samples; take it out of the data set")
    if subtype not in FLOATING:
        return sound
    if not np.isfinite(sound).all() or np.abs(sound).max() > 1:
        raise DataError(f"{name} has samples that are NaN or beyond [-1, 1]; scale it, or save it with 16 bits")
    return (sound * 32768).round().clip(-32768, 32767).astype(np.int16)


def _cut(content: bytes) -> bool:
    """Whether a WAV file is shorter than it says; libsndfile reads such a file without an error."""
    if content[:4] != b"RIFF":
        return False
    place = 12
    while place + 8 <= len(content):
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        if content[place : place + 4] == b"data":
            return size not in UNKNOWN_LENGTH and place + 8 + size > len(content)
        place += 8 + size + size % 2
    return False
