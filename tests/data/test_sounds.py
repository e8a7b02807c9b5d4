"""One recording in, 16-bit mono out: every kind is scaled or refused by name."""

import io

import numpy as np
import pytest
import soundfile
from small_archives import wav, zipped

from lowbit.data import fsdd, sounds
from lowbit.errors import DataError

WAVE = np.array([0.0, 0.25, -0.5, 0.75])


def encoded(samples, subtype, rate=8000, form="WAV"):
    out = io.BytesIO()
    soundfile.write(out, np.asarray(samples), rate, subtype=subtype, format=form)
    return out.getvalue()


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_width_is_scaled_to_sixteen_bits(subtype):
    found = sounds.read(encoded(WAVE, subtype), 8000, "a.wav")
    assert found.dtype == np.int16 and np.abs(found - WAVE * 32768).max() <= (128 if subtype == "PCM_U8" else 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a recording"),
        (b"RIFF of nothing", "cannot be read as a recording"),
        (encoded(np.zeros(0), "PCM_16"), "has no samples"),
        (encoded(np.zeros((9, 2)), "PCM_16"), "not a mono recording at 8000 Hz: it has 2 channel"),
        (encoded(WAVE, "PCM_16", rate=16000), "at 16000 Hz"),
        (encoded([0.0, np.nan], "FLOAT"), "are NaN or beyond"),
        (encoded([0.0, 1.5], "FLOAT"), "are NaN or beyond"),
        (wav(np.arange(900))[:-400], "is truncated"),
        (encoded(np.sin(np.arange(9000)), "PCM_16", form="FLAC")[:4000], "is truncated|cannot be read"),
    ],
    ids=["zero bytes", "text", "empty", "stereo", "rate", "nan", "loud", "cut wav", "cut flac"],
)
def test_what_is_no_whole_mono_recording_is_refused_by_name(content, message):
    with pytest.raises(DataError, match=rf"odd\.wav.*({message})"):
        sounds.read(content, 8000, "odd.wav")


def test_a_header_without_a_length_is_read_to_its_end():
    content = bytearray(wav(np.arange(100)))
    content[40:44] = b"\xff\xff\xff\xff"
    assert len(sounds.read(bytes(content), 8000, "streamed.wav")) == 100


def test_a_damaged_recording_of_an_archive_is_refused_by_its_own_name(tmp_path):
    with pytest.raises(DataError, match=r"f\.zip: recordings/0_theo_0\.wav is truncated"):
        fsdd.decode(zipped(tmp_path / "f.zip", {"recordings/0_theo_0.wav": wav(np.arange(99))[:-50]}))
