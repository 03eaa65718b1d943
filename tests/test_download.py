"""Downloads that are cut, refused and changed in between, from a server with faults on demand."""

import hashlib
import socket
import time
import urllib.request
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest

from mtm import download as module
from mtm.data.download import download

BODY = np.random.default_rng(0).bytes(300_000)


class Server(BaseHTTPRequestHandler):
    """One file, and ``fault``, which it still has ``left`` times."""

    fault, left, body, asked = None, 0, BODY, []

    def do_GET(self):
        type(self).asked.append(self.headers.get("Range"))
        body, fault = self.body, self.fault if self.left else None
        type(self).left -= fault is not None
        if fault in (404, 403, 416, 503):
            return self.answer(fault, b"<Error/>")
        if fault == "silent":
            return time.sleep(1)
        etag = '"other"' if fault == "changed" else f'"{etag_of(body)}"'
        headers, status, start = {"ETag": etag}, 200, 0
        wish = self.headers.get("Range")
        if wish and self.headers.get("If-Range") == etag and fault != "ignore range":
            start, status = int(wish.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if fault == "wrong place":
            headers["Content-Range"] = f"bytes 7-{len(body) - 1}/{len(body)}"
            status = 206
        rest = body[start:]
        length = len(rest) + (5 if fault == "wrong length" else 0)
        if fault == "endless":  # no length, and more than there should be
            return self.answer(200, body + b"more", headers, length=None)
        third = fault in ("cut", "silent after a third")
        self.answer(status, rest[:100_000] if third else rest, headers, length)
        if fault == "silent after a third":
            self.wfile.flush()
            time.sleep(1)

    def answer(self, status, body, headers=None, length=-1):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def etag_of(body):
    return hashlib.md5(body).hexdigest()


@pytest.fixture
def server(monkeypatch, serve):
    """The handler's class, whose faults can be set, with its address as ``url``."""
    monkeypatch.setattr(module, "WAIT", 0.001)
    handler = type("Handler", (Server,), {"asked": []})
    handler.url = f"{serve(handler)}/file?signature=secret"
    return handler


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "big [1].h5"


def get(server, path, body=BODY, url=None):
    wanted = {"size": len(body), "etag": etag_of(body)}
    return download(url or server.url, path, **wanted, timeout=5, progress=False)


def part_of(path, body=BODY):
    """Place of what a download that was cut leaves behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{etag_of(body)}.part")


def test_download_and_what_is_there_already(server, path):
    assert get(server, path) == path and path.read_bytes() == BODY
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.etag"]
    assert get(server, str(path)) == path and len(server.asked) == 1
    # Made anew on the server, of the same size: only the ETag tells.
    server.body = BODY[::-1]
    assert get(server, path, BODY[::-1]).read_bytes() == BODY[::-1]
    # Without its mark, or of another size, a file is not trusted.
    path.with_name(f"{path.name}.etag").unlink()
    path.write_bytes(BODY)
    assert get(server, path, BODY[::-1]).read_bytes() == BODY[::-1]
    path.write_bytes(BODY[:-1])
    assert get(server, path, BODY[::-1]).read_bytes() == BODY[::-1]


def test_cut_connections_are_taken_up(server, path):
    server.fault, server.left = "cut", 2
    assert get(server, path).read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]
    path.unlink()
    server.fault, server.left = 503, 3
    assert get(server, path).read_bytes() == BODY
    path.unlink()
    server.left = 9
    with pytest.raises(ConnectionError, match="gave up after 4 tries.*503.*later") as caught:
        get(server, path)
    assert "secret" not in str(caught.value)


def test_what_came_before_a_silence_is_not_lost(server, path):
    """Less than a chunk each time: were chunks awaited, no try would bring anything."""
    server.fault, server.left = "silent after a third", 2
    wanted = {"size": len(BODY), "etag": etag_of(BODY), "timeout": 0.2, "progress": False}
    assert download(server.url, path, **wanted).read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]
    path.unlink()
    server.fault, server.left = "silent", 9
    before = time.perf_counter()
    with pytest.raises(ConnectionError, match="gave up after 4 tries.*timed out.*later"):
        download(server.url, path, **wanted)
    assert 4 * 0.2 < time.perf_counter() - before < 4 * 0.2 + 2
    assert not path.exists()


@pytest.mark.parametrize("ask", ["urllib", "requests"])
def test_a_time_limit_for_those_that_have_none(server, ask):
    requests = pytest.importorskip("requests")
    send, default = requests.adapters.HTTPAdapter.send, socket.getdefaulttimeout()
    server.fault, server.left = "silent", 9
    call = {"urllib": urllib.request.urlopen, "requests": requests.get}[ask]
    with pytest.raises(OSError, match="timed out"), module.time_limit(0.2):
        call(server.url)
    assert (requests.adapters.HTTPAdapter.send, socket.getdefaulttimeout()) == (send, default)
    server.left = 0
    with module.time_limit(0.2):
        call(server.url).close()


def test_a_later_call_goes_on(server, path):
    part_of(path).write_bytes(BODY[:123_456])
    assert get(server, path).read_bytes() == BODY
    assert server.asked == ["bytes=123456-"]
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.etag"]


@pytest.mark.parametrize("fault", ["ignore range", 416])
def test_servers_that_do_not_resume(server, path, fault):
    part_of(path).write_bytes(b"\0" * 50_000)  # so that what is kept of it would show
    server.fault, server.left = fault, 1
    assert get(server, path).read_bytes() == BODY


def test_parts_that_are_complete_or_too_long_or_of_another_version(server, path):
    part_of(path).write_bytes(BODY)
    assert get(server, path).read_bytes() == BODY and not server.asked
    path.unlink()
    part_of(path).write_bytes(BODY + b"x")
    assert get(server, path).read_bytes() == BODY
    path.unlink()
    part_of(path, b"older").write_bytes(b"older")
    assert get(server, path).read_bytes() == BODY
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (404, FileNotFoundError, r"not on the server \(404\)"),
        (403, ConnectionError, "refuses.*403"),
        ("changed", ConnectionError, "the file has changed; list it again"),
        ("wrong length", ConnectionError, "300005 bytes from 0 on, not 300000 from 0 on; list"),
        ("wrong place", ConnectionError, "300000 bytes from 7 on, not 300000 from 0 on; list"),
        ("endless", ConnectionError, "more than 300000 bytes; list it again"),
    ],
)
def test_nothing_half_written_under_the_final_name(server, path, fault, error, message):
    server.fault, server.left = fault, 99
    with pytest.raises(error, match=message) as caught:
        get(server, path)
    assert "secret" not in str(caught.value)
    assert not path.exists() and not list(path.parent.glob("*.etag"))
    server.fault = None  # and it is no obstacle to another try
    assert get(server, path).read_bytes() == BODY


def test_a_server_that_changes_a_file_in_between(server, path):
    part_of(path).write_bytes(BODY[:1000])
    server.body = BODY[::-1]
    with pytest.raises(ConnectionError, match="has changed"):
        get(server, path)
    assert get(server, path, BODY[::-1]).read_bytes() == BODY[::-1]


def test_server_gone_and_disk_full(server, path, monkeypatch):
    with pytest.raises(ConnectionError, match="127.0.0.1:9/x: gave up after 4 tries.*refused"):
        get(server, path, url="http://127.0.0.1:9/x")

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, chunk):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "open", lambda *a: Full(open(*a)), raising=False)
        with pytest.raises(OSError, match="No space left .*free some space .*h5"):
            get(server, path)
    assert not path.exists() and len(server.asked) == 1  # not tried again
    assert get(server, path).read_bytes() == BODY


def test_limits_of_threads_that_overlap_end_with_the_last():
    from requests.adapters import HTTPAdapter

    before = HTTPAdapter.send, socket.getdefaulttimeout()
    first, second = module.time_limit(30.0), module.time_limit(5.0)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert HTTPAdapter.send is not before[0] and socket.getdefaulttimeout() == 5.0
    second.__exit__(None, None, None)
    assert (HTTPAdapter.send, socket.getdefaulttimeout()) == before


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@host.org/a?sig=x#y", "https://host.org/a"),
        ("https://host.org?user=me@x.org&token=secret", "https://host.org"),
        ("GET https://host.org/a@b/c?sig=x", "GET https://host.org/a@b/c"),
    ],
)
def test_what_is_public_of_an_address(address, shown):
    assert module.public(address) == shown
