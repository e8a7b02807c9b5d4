"""Small archives in the publishers' layouts."""

import hashlib
import io
import tarfile
import zipfile

import numpy as np
import soundfile
from PIL import Image


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def jpeg(color, size=(32, 32)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "JPEG", quality=95)
    return out.getvalue()


def wav(samples, rate=8000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.asarray(samples, dtype=np.int16), rate, format="WAV")
    return out.getvalue()


def tar(path, files: dict[str, bytes], mode="w:xz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
