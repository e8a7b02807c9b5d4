"""Downloads: continued after an interruption, checked, refused where wrong; a local server plays the publisher."""

import hashlib
import http.server
import threading

import numpy as np
import pytest
from small_archives import sha256

from lowbit.data.download import fetch
from lowbit.errors import DataError

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the server's attributes say whether ranges are known and after how many bytes to break off."""

    def do_GET(self):
        start, status = 0, 200
        if self.server.ranges and (asked := self.headers.get("Range")):
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(CONTENT):
                self.send_error(416)
                return
        body = CONTENT[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.asked.append((start, status))
        self.wfile.write(body[: self.server.break_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def publisher(folders):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher)
    server.ranges, server.break_after, server.asked = True, None, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/set.bin"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def downloads(tmp_path):
    return tmp_path / "cache" / "downloads"


def test_a_download_is_checked_and_kept(publisher, downloads):
    path = fetch(publisher.url, SHA256)
    assert path == downloads / "set.bin" and path.read_bytes() == CONTENT
    assert fetch(publisher.url, SHA256) == path and len(publisher.asked) == 1
    assert fetch(publisher.url, "md5:" + hashlib.md5(CONTENT).hexdigest()) == path


@pytest.mark.parametrize(("ranges", "second"), [(True, (120_000, 206)), (False, (0, 200))])
def test_an_interrupted_download_goes_on(publisher, downloads, ranges, second):
    publisher.ranges, publisher.break_after = ranges, 120_000
    with pytest.raises(DataError, match="120,000 bytes are kept"):
        fetch(publisher.url, SHA256)
    assert (downloads / "set.bin.part").stat().st_size == 120_000 and not (downloads / "set.bin").exists()
    publisher.break_after = None
    assert fetch(publisher.url, SHA256).read_bytes() == CONTENT
    assert publisher.asked[1] == second
    assert not (downloads / "set.bin.part").exists()


def test_a_complete_part_only_needs_its_name(publisher, downloads):
    downloads.mkdir(parents=True)
    (downloads / "set.bin.part").write_bytes(CONTENT)
    assert fetch(publisher.url, SHA256).read_bytes() == CONTENT


def test_wrong_contents_are_refused_and_not_kept(publisher, downloads):
    with pytest.raises(DataError, match="not what was published"):
        fetch(publisher.url, "0" * 64)
    assert not list(downloads.iterdir())


def test_without_a_network_the_message_says_what_to_put_where(folders):
    with pytest.raises(DataError, match=r"(?s)set\.bin could not be downloaded.*LOWBIT_DATA"):
        fetch("http://127.0.0.1:9/set.bin", SHA256)


def test_a_file_in_the_data_folder_is_used_or_refused(publisher, folders):
    (folders / "set.bin").write_bytes(CONTENT)
    assert fetch(publisher.url, SHA256) == folders / "set.bin" and not publisher.asked
    (folders / "set.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="truncated or altered"):
        fetch(publisher.url, SHA256)
    assert sha256(folders / "set.bin") != SHA256  # and left for its owner to judge
