"""Downloads that resume after an interruption, and whose checksums are compared before anyone reads them."""

import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path

from lowbit import paths
from lowbit.data.archive import CHUNK, checksum
from lowbit.errors import DataError
from lowbit.extras import extra

TIMEOUT = 30  # seconds without a byte


def fetch(url: str, expected: str, file: str | None = None) -> Path:
    """The file at ``url``, from the cache, a data folder, or the network.

    A download goes to ``<file>.part`` and resumes there after an interruption. It gets its final name once its checksum
    is right.

    Args:
        url: address at which the file is published.
        expected: the file's sha256, or ``"md5:..."`` if the publisher gives only that.
        file: local name of the file; None takes the last part of ``url``.

    Raises:
        DataError: there is no network, or the contents are wrong; the message says which file to put where.
        StorageError: the cache folder cannot be written.
    """
    file = file or url.rsplit("/", 1)[-1]
    for folder in paths.archives():
        if (folder / file).is_file():
            return _checked(folder / file, expected)
    target = paths.cache() / "downloads" / file
    if target.is_file():
        return _checked(target, expected)
    part = paths.create_cache("downloads") / (file + ".part")
    try:
        _continue(url, part)
    except OSError as error:  # urllib's errors, time-outs and broken connections are all OSErrors
        kept = f" ({part.stat().st_size:,} bytes are kept; the next try resumes there)" if part.exists() else ""
        raise DataError(
            f"{file} could not be downloaded from {url}: {error}{kept}. Without a network, get the file elsewhere and "
            "put it into a folder that the environment variable LOWBIT_DATA names"
        ) from None
    actual = checksum(part, expected)
    if actual != expected:
        part.unlink()
        raise DataError(
            f"{file} from {url} is not what was published: its checksum is {actual[:20]}..., expected "
            f"{expected[:20]}...; it was not kept. Try again; if it happens again, the publisher's file has changed"
        )
    part.replace(target)
    return target


def _checked(path: Path, expected: str) -> Path:
    actual = checksum(path, expected)
    if actual != expected:
        raise DataError(
            f"{path} is truncated or altered: its checksum is {actual[:20]}..., expected {expected[:20]}...; "
            "delete it and get it again"
        )
    return path


def _continue(url: str, part: Path) -> None:
    """Append the missing bytes of ``url`` to ``part``; start again if the server cannot resume."""
    with extra("data", "downloading"):
        from tqdm.auto import tqdm

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing; the checksum decides
        raise
    with response:
        resumed = response.status == HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            open(part, "ab" if resumed else "wb") as out,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while block := response.read(CHUNK):
                out.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"the connection broke off after {part.stat().st_size:,} of {total:,} bytes")
