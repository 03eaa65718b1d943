"""Large files over HTTP: resumed where they were cut, and in their place complete or not at all.

Also a time limit for packages that download without one.
"""

from __future__ import annotations

import glob
import http.client
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

ATTEMPTS, WAIT = 4, 1.0  # tries without a new byte; seconds before the second, then doubled
CHUNK = 1 << 20  # bytes


def download(
    url: str,
    path: str | Path,
    *,
    size: int,
    etag: str,
    timeout: float = 60.0,
    progress: bool = True,
) -> Path:
    """Download a file, or go on with a download that was cut; returns its path.

    The file's ETag is kept beside it (``<name>.etag``): where size and ETag are those wanted,
    nothing is downloaded. What has arrived waits in a hidden ``.part`` file with the ETag in its
    name, so that two versions never mix. Two processes must not download to the same path.

    Args:
        url: http or https.
        path: where the file goes; folders are made if need be.
        size: bytes that the file must have.
        etag: the server's name for the version that is wanted, without quotes.
        timeout: seconds that the server may be silent. A cut connection is taken up again, until
            four tries in a row bring nothing.
        progress: show a bar on a terminal.

    Raises:
        FileNotFoundError: the server has no such file.
        ConnectionError: server out of reach, or a file of another size or version.
        OSError: no space, or no permission to write; what has arrived is kept.
    """
    path = Path(path)
    mark = path.with_name(f"{path.name}.etag")
    if path.is_file() and path.stat().st_size == size and mark.is_file():
        if mark.read_bytes() == etag.encode():
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{re.sub('[^0-9A-Za-z-]', '_', etag)}.part")
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if other != part:  # of a version that is no longer wanted
            other.unlink()
    style = {"unit": "B", "unit_scale": True, "disable": None if progress else True}
    with tqdm(total=size, desc=path.name, leave=False, **style) as bar:
        _fetch(url, part, size, etag, timeout, bar)
    os.replace(part, path)
    mark.write_bytes(etag.encode())  # last: a file without its mark is only fetched again
    return path


USER = re.compile(r"(?<=://)[^/?#\s]*@")
"""Name and password in an address."""


def public(text: str) -> str:
    """An address without its password, signature or token, which belong into no file or log."""
    return re.sub(r"[?#\n].*", "", USER.sub("", text))


class _Refused(ConnectionError):
    """An answer that another try would not change."""


def _fetch(url: str, part: Path, size: int, etag: str, timeout: float, bar: tqdm) -> None:
    """Bring the part file to its full size, taking up again what was cut."""
    shown = public(url)
    part.touch()
    if part.stat().st_size > size:
        os.truncate(part, 0)
    tries = 0
    problem: str | Exception = ""
    while (have := part.stat().st_size) < size:
        if tries == ATTEMPTS:
            raise ConnectionError(
                f"{shown}: gave up after {tries} tries that brought nothing ({problem}); download "
                "again later, it goes on from there"
            )
        if tries:
            time.sleep(WAIT * 2 ** (tries - 1))
        try:
            _append(url, part, have, size, etag, timeout, bar)
            problem = "the connection was closed early"
        except _Refused as error:
            raise ConnectionError(f"{shown}: {error}; list it again") from error
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                raise FileNotFoundError(f"{shown}: not on the server (404)") from error
            if error.code == 416:  # the part is not a beginning of the file that is there now
                os.truncate(part, 0)
            elif error.code < 500 and error.code not in (408, 429):  # too slow, too many
                raise ConnectionError(f"{shown}: the server refuses ({error})") from error
            problem = error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError,
                TimeoutError) as error:  # fmt: skip
            problem = error
        tries = 0 if part.stat().st_size > have else tries + 1
    if have > size:
        os.truncate(part, 0)
        raise ConnectionError(f"{shown}: more than {size} bytes; list it again")


def _append(
    url: str, part: Path, have: int, size: int, etag: str, timeout: float, bar: tqdm
) -> None:
    """One request: what the server sends of the missing bytes goes to the end of the part file."""
    headers = {"Range": f"bytes={have}-", "If-Range": f'"{etag}"'} if have else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        if answer.headers.get("ETag", etag).removeprefix("W/").strip('"') != etag:
            raise _Refused("the file has changed")
        start, total = 0, answer.headers.get("Content-Length", str(size))
        if answer.status == 206:
            place = answer.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", place)
            start, total = (-1, place) if match is None else (int(match[1]), match[2])
        if total != str(size) or start not in (0, have):
            raise _Refused(f"{total} bytes from {start} on, not {size} from {have} on")
        with open(part, "r+b") as file:
            file.truncate(start)
            bar.n = file.seek(start)
            for chunk in _chunks(answer):
                file.write(chunk)
                bar.update(len(chunk))


def _chunks(answer: Any) -> Iterator[bytes]:
    """What arrives, as it arrives: of a connection that breaks off, nothing is lost.

    A failing network is told from a full disk, also an OSError.
    """
    try:
        while chunk := answer.read1(CHUNK):
            yield chunk
    except OSError as error:
        raise urllib.error.URLError(error) from error


_LIMITS = threading.Lock()
_LIMITED: list[float] = []  # limits that hold just now
_BEFORE: list[Any] = []  # what there was before the first of them


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within, a server that is silent for so long is an error also to what would wait for ever.

    ONE and remfile set no limit, and take none: this one holds for every connection that urllib and
    requests open meanwhile, in all threads, unless it has one of its own. Where several overlap,
    the one that began last holds.

    Raises:
        OSError: of urllib (``TimeoutError``) or requests (``Timeout``).
        ImportError: without requests, which ONE and remfile bring.
    """
    from requests.adapters import HTTPAdapter

    adapter: Any = HTTPAdapter  # one whose method can be another
    with _LIMITS:  # those of other threads may overlap: the last one to end takes the limit away
        if not _LIMITED:
            _BEFORE[:] = adapter.send, socket.getdefaulttimeout()
        _LIMITED.append(seconds)
        send = _BEFORE[0]

        def in_time(
            self: HTTPAdapter, request: Any, stream: bool = False, timeout: Any = None, *rest: Any,
            **options: Any,
        ) -> Any:  # fmt: skip
            return send(self, request, stream, timeout or seconds, *rest, **options)

        adapter.send = in_time  # requests passes by the default of the sockets
        socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        with _LIMITS:
            _LIMITED.remove(seconds)
            if not _LIMITED:
                adapter.send = _BEFORE[0]
                socket.setdefaulttimeout(_BEFORE[1])
