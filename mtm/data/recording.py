"""What the readers of recordings share: errors that name their source, samples, downloads."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike
from scipy import signal
from tqdm import tqdm

from mtm.binning import Floats
from mtm.session import SessionError

WHEEL_RATE, WHEEL_CUTOFF = 1000.0, 20.0  # Hz
LONGEST = 1e5  # seconds; no recording lasts longer (a day has 86,400)
WAITS = (0, 2, 4, 8)  # seconds before each attempt; each goes on where the one before was cut
CHUNK = 1 << 20  # bytes
NETWORK = (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException)


class Recording:
    """A recording that is being read: its name, and what becomes ``Session.provenance``."""

    def __init__(self, name: str, **provenance: Any) -> None:
        self.name = name
        self.provenance: dict[str, Any] = provenance

    def fail(self, dataset: str, problem: str) -> NoReturn:
        """Raise a SessionError that names the session and the dataset."""
        raise SessionError(f"session {self.name!r}, {dataset}: {problem}")

    def warn(self, dataset: str, problem: str) -> None:
        """Warn of a problem that the session can live with."""
        warnings.warn(f"session {self.name!r}, {dataset}: {problem}", UserWarning, stacklevel=3)

    @contextmanager
    def reading(self, dataset: str, remedy: str = "copy or download it again") -> Iterator[None]:
        """Turn any error of a damaged or foreign file into a SessionError that names the file."""
        try:
            yield
        except (SessionError, ImportError):
            raise
        except Exception as error:  # of numpy, h5py, arrow, csv, zip: no list of them is complete
            line = public(f"{type(error).__name__}: {error}")
            text = f"session {self.name!r}, {dataset}: cannot be read ({line}); {remedy}"
            raise SessionError(text) from None  # that error may quote a password in an address


class Folder(Recording):
    """A recording that is a folder of ``.npy`` files."""

    def __init__(self, folder: str | Path, name: str = "", **provenance: Any) -> None:
        self.path = Path(folder)
        super().__init__(name or self.path.resolve().name, **provenance)
        if not self.path.is_dir():
            self.fail("folder", f"{folder} does not exist; check the path")

    def has(self, *names: str) -> bool:
        """Return whether all these files are there."""
        return all((self.path / f"{name}.npy").is_file() for name in names)

    def array(self, name: str, n: int | None = None, width: int = 1) -> np.ndarray:
        """Numbers (n,), or (n, width), float64; (n, 1) is read as (n,)."""
        with self.reading(f"{name}.npy"):
            array = np.load(self.path / f"{name}.npy", allow_pickle=False)
            array = array.astype(np.float64).reshape(len(array), width)
            if n is not None and len(array) != n:
                raise ValueError(f"{len(array)} rows, but {n} in other files")
        return array[:, 0] if width == 1 else array


def is_event(column: str) -> bool:
    """Return whether a column of a table of trials seems to hold times: ``stim_time``, ``times``.

    Times from the start of a recording are nothing to decode, so they are read when asked for.
    """
    return re.search(r"times?$", column.lower()) is not None


# ---------------------------------------------------------------- sampled traces


def ordered_samples(times: ArrayLike, values: ArrayLike) -> tuple[Floats, Floats]:
    """Sort the samples of a trace (S,) and leave out NaN; of equal times the first is kept."""
    t, v = np.asarray(times, float), np.asarray(values, float)
    if t.ndim != 1 or t.shape != v.shape:
        raise ValueError(f"values has shape {v.shape} but times has {t.shape}")
    finite = np.isfinite(t) & np.isfinite(v)
    t, first = np.unique(t[finite], return_index=True)
    return t, v[finite][first]


def wheel_speed(times: ArrayLike, position: ArrayLike) -> tuple[Floats, Floats]:
    """Compute the speed of a wheel whose position is sampled irregularly, as IBL does.

    The position is interpolated at 1 kHz, low-pass filtered at 20 Hz (Butterworth of order 8, run
    forwards and backwards) and differentiated.

    Args:
        times: (S,) seconds, strictly increasing (see `ordered_samples`).
        position: (S,) in any unit.

    Returns:
        times (S',) in seconds and absolute speed (S',), in the unit of position per second.

    Raises:
        ValueError: for less than a second of samples, or more than any recording lasts.
    """
    t, x = np.asarray(times, float), np.asarray(position, float)
    if len(t) < 2 or not 1 <= t[-1] - t[0] <= LONGEST:
        raise ValueError(f"wheel times must span 1 to {LONGEST:g} s, and be seconds")
    grid = np.arange(t[0], t[-1], 1 / WHEEL_RATE)
    low_pass = signal.butter(8, WHEEL_CUTOFF, fs=WHEEL_RATE, output="sos")
    smooth = signal.sosfiltfilt(low_pass, np.interp(grid, t, x))
    return grid, np.abs(np.gradient(smooth, 1 / WHEEL_RATE))


# ---------------------------------------------------------------- downloads


def public(text: str) -> str:
    """An address without its password, signature or token, which belong into no file or log."""
    return re.sub(r"[?#\n].*", "", re.sub(r"(?<=://)[^/?#\s]*@", "", text))


def download(url: str, path: str | Path, *, size: int, etag: str, progress: bool = True) -> Path:
    """Download a file, or go on with a download that was cut; returns its path.

    What has arrived waits beside the file, in a hidden ``.part`` file that has the version in its
    name. The version of a finished file is kept in ``<name>.etag``.

    Args:
        url: http or https.
        path: where the file goes; folders are created.
        size: bytes that the file must have.
        etag: the server's name for the wanted version, without quotes.
        progress: show a bar on a terminal.

    Raises:
        ConnectionError: server out of reach, or without this version of the file.
    """
    path = Path(path)
    mark = path.with_name(f"{path.name}.etag")
    whole = path.is_file() and path.stat().st_size == size
    if whole and mark.is_file() and mark.read_text() == etag:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{re.sub('[^0-9A-Za-z-]', '_', etag)}.part")
    part.touch()
    problem: object = "the connection was closed early"
    style: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": None if progress else True}
    with tqdm(total=size, desc=path.name, leave=False, **style) as bar:
        for wait in WAITS:
            if part.stat().st_size < size:
                time.sleep(wait)
                try:
                    _append(url, part, etag, bar)
                except NETWORK as error:
                    code = getattr(error, "code", 500)
                    if code < 500 and code not in (408, 429):  # an answer that stays
                        raise ConnectionError(f"{public(url)}: {error}") from error
                    problem = error
    if (have := part.stat().st_size) != size:
        if have > size:
            part.unlink()
        raise ConnectionError(
            f"{public(url)}: {have} of {size} bytes ({problem}); download again, it goes on from "
            "there"
        )
    os.replace(part, path)
    mark.write_text(etag)
    return path


def _append(url: str, part: Path, etag: str, bar: Any) -> None:
    """Ask once for the missing bytes."""
    have = part.stat().st_size
    # With If-Range, a server whose file has changed sends all of the new one.
    headers = {"Range": f"bytes={have}-", "If-Range": f'"{etag}"'} if have else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.headers.get("ETag", etag).removeprefix("W/").strip('"') != etag:
            raise ConnectionError("the file has changed; list again")
        # 206: a server that sends the range asked for; others send the whole file.
        with open(part, "ab" if answer.status == 206 else "wb") as file:
            bar.n = file.tell()
            while chunk := answer.read1(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
