"""Downloads against a server that cuts, refuses and changes its file."""

import re

import numpy as np
import pytest
from conftest import Handler

from mtm.data import recording
from mtm.data.recording import download

CONTENT = np.random.default_rng(0).bytes(300_000)
WANTED = {"size": len(CONTENT), "etag": "v1", "progress": False}


class Server(Handler):
    """One file. ``cuts`` is how many answers break off after 100,000 bytes."""

    cuts, ranges, etag, asked = 0, True, "v1", None

    def do_GET(self):
        type(self).asked.append(self.headers.get("Range"))
        if self.path != "/file":
            return self.send_error(404)
        start = 0
        current = self.headers.get("If-Range") == f'"{self.etag}"'
        if self.ranges and current and self.headers.get("Range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        body, length = CONTENT[start:], str(len(CONTENT) - start)
        if self.cuts:
            type(self).cuts -= 1
            self.close_connection, body = True, body[:100_000]
        headers = {"Content-Length": length, "ETag": f'"{self.etag}"'}
        self.answer(body, 206 if start else 200, **headers)


@pytest.fixture
def server(serve, monkeypatch):
    monkeypatch.setattr(recording.time, "sleep", lambda seconds: None)
    handler = type("Handler", (Server,), {"asked": []})
    handler.url = serve(handler)
    return handler


def test_what_is_there_is_not_downloaded_again(server, tmp_path):
    path = download(f"{server.url}/file", tmp_path / "new/file", **WANTED)
    assert path.read_bytes() == CONTENT and len(server.asked) == 1
    download(f"{server.url}/file", path, **WANTED)
    assert len(server.asked) == 1
    path.write_bytes(CONTENT[:10])
    assert download(f"{server.url}/file", path, **WANTED).read_bytes() == CONTENT
    server.etag = "v2"
    download(f"{server.url}/file", path, **WANTED | {"etag": "v2"})
    assert len(server.asked) == 3


def test_a_cut_download_goes_on_where_it_was(server, tmp_path):
    server.cuts = 2
    path = download(f"{server.url}/file", tmp_path / "file", **WANTED)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]


def test_a_later_call_goes_on_and_no_half_file_is_left(server, tmp_path):
    server.cuts = 1 + len(recording.WAITS)
    server.ranges = False  # each answer starts again
    with pytest.raises(ConnectionError, match="100000 of 300000 bytes.*it resumes"):
        download(f"{server.url}/file", tmp_path / "file", **WANTED)
    assert not (tmp_path / "file").exists()
    server.ranges = True
    path = download(f"{server.url}/file", tmp_path / "file", **WANTED)
    assert server.asked[-1] == "bytes=100000-" and path.read_bytes() == CONTENT


def test_a_file_that_changed_and_one_that_is_not_there(server, tmp_path):
    server.etag = "v2"
    with pytest.raises(ConnectionError, match="changed; list again"):
        download(f"{server.url}/file", tmp_path / "file", **WANTED)
    server.asked.clear()
    with pytest.raises(ConnectionError, match="404"):  # it is not asked for twice
        download(f"{server.url}/other", tmp_path / "file", **WANTED)
    assert len(server.asked) == 1 and not (tmp_path / "file").exists()
