"""Read one image as 8-bit RGB, or refuse it by name; every loader of images uses this.

Less usual kinds of image are read like this:

- 16-bit gray: scaled to 8 bits (value / 257), a TIFF of 9 to 15 bits by its own largest value.
- Palette, black and white, gray: converted to RGB.
- Transparency: composed over white.
- CMYK and YCbCr: converted by the plain formula; color profiles are not applied.
- EXIF orientation: the image is turned as a viewer would show it.
- Animations and files of several pages: the first image is read.
- Floating point, 32-bit or signed integers, CIELAB: refused, since their range is not known.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowbit.errors import DataError
from lowbit.extras import extra

with extra("data", "reading images"):
    from PIL import Image, ImageOps

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
DIRECT = ("RGB", "L", "1", "CMYK", "YCbCr")
TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA", "P")


def read(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image as 8-bit RGB; the module's docstring says how other kinds are converted.

    Args:
        source: a path, or an open binary file.
        name: name of the image in errors; None takes the path.

    Raises:
        DataError: the file is missing, empty, truncated, damaged, no image, or of a kind without a known range of
            values; the message names it.
    """
    name = name or str(source)
    try:
        with Image.open(source) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image), image.format, getattr(image, "tag_v2", {}), name)
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name} cannot be read as an image ({reason}): it is empty, truncated, damaged or no image; restore it, "
            "or take it out of the data set"
        ) from error


def _rgb(image: Image.Image, kind: str | None, tags: Mapping[int, Any], name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        return _eight_bits(image, tags).convert("RGB")
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode in DIRECT:
        return image.convert("RGB")
    raise DataError(
        f"{name} has pixels of the kind {image.mode!r} ({kind}), whose range is not known: save it with 8 or "
        "16 bits a channel"
    )


def _eight_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """A gray picture of 9 to 16 bits, scaled to 8: its largest possible value becomes 255."""
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))
    if tags.get(PHOTOMETRIC) == 0:  # white is zero; Pillow inverts this for 8 bits only
        values = 255 - values
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
