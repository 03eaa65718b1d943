"""What the readers share: errors that name their source, trials and units to use, downloads."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import signal
from tqdm import tqdm

from mtm.inputs import Floats, SessionError, plain
from mtm.session import Session

LONGEST = 1e5  # seconds; no recording lasts longer (a day has 86,400)
WAITS = (2, 4, 8)  # seconds until a download that was cut is resumed
NETWORK = (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException)
SILENCE = 0.1  # seconds without a spike of a whole probe that do not yet mean that it was off
PAUSE = 1.0  # seconds without a spike in which it was
RATE = 20.0  # spikes a second of a probe that is never silent for so long


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

    def event(self, trials: pd.DataFrame, align: str | None) -> np.ndarray:
        """Time (K,) of an event in each trial, a column of the table of trials."""
        if align not in (numbers := trials.select_dtypes("number")):
            known = list(filter(is_event, numbers)) or list(numbers)
            self.fail(f"trials.{align}", f"no such event; align to one of {known}")
        return numbers[align].to_numpy(np.float64)

    def trials_to_use(
        self,
        times: np.ndarray,
        behaviour: Mapping[str, Any],
        rejected: Mapping[str, Any],
        observed: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Arguments of `Session.from_spike_times` for the trials that have the event.

        Given are all K recorded trials: times in seconds, not finite without the event; behaviour
        (K,) or (K, T) by name; by reason which (K,) to leave out as well; and in which trials each
        unit was observed (K, N), of which those without any are left out.
        """
        for key, values in behaviour.items():
            if len(values) != len(times):
                self.fail(f"behaviour {key!r}", f"{len(values)} values of {len(times)} events")
        rejected = {"without the event": ~np.isfinite(times), **rejected}
        if observed is not None:
            rejected["not observed"] = ~observed.any(axis=1)
        keep, counts = np.ones(len(times), bool), {"recorded": len(times)}
        for reason, mask in rejected.items():
            counts[reason] = int((keep & mask).sum())
            keep &= ~mask
        self.provenance["trials"] = counts
        if not keep.any():
            self.fail("trials", f"none is left of {counts}; choose another event, or filter less")
        fields: dict[str, Any] = {
            "align_times": times[keep],
            "behaviour": {key: plain(values)[keep] for key, values in behaviour.items()},
            "trial_ids": np.flatnonzero(keep),
            "n_recorded": len(times),
        }
        if observed is not None and not observed[keep].all():
            fields["observed"] = observed[keep]
        return fields

    def to_session(
        self,
        times: np.ndarray,
        clusters: np.ndarray,
        table: pd.DataFrame,
        keep: Any = True,
        **fields: Any,
    ) -> Session:
        """Bin spikes, with their (S,) times in seconds and cluster ids; some have no time.

        ``table`` has a row for each cluster, by id; those where ``keep`` is False are left out.
        ``observed`` (K, N), if given, has all of its clusters.
        """
        keep = pd.Series(keep, table.index)
        self.provenance["clusters"] = len(table)
        if not keep.any():
            self.fail("units", f"no cluster is left of {len(table)}; pass units=None")
        if "observed" in fields:
            fields["observed"] = fields["observed"][:, keep.to_numpy()]
        used = np.isfinite(times)
        if not used.all():
            self.warn("spike times", f"left out {(~used).sum()} spikes without a time")
        used &= ~np.isin(clusters, table.index[~keep])
        fields |= {"clusters": table.index[keep], "neurons": table, "name": self.name}
        fields |= {"provenance": self.provenance, "subject": self.provenance.get("subject", "")}
        return Session.from_spike_times(times[used], clusters[used], **fields)


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


def within(intervals: np.ndarray, spans: np.ndarray, slack: float = 1e-3) -> np.ndarray:
    """Whether each span (K, 2) lies in one of the intervals (M, 2); seconds, but for ``slack``.

    Intervals that touch each other count as one.
    """
    none = [[-np.inf, -np.inf]]
    starts, stops = np.concatenate([none, intervals[np.argsort(intervals[:, 0])]]).T
    stops = np.maximum.accumulate(stops)
    apart = starts[1:] > stops[:-1] + slack
    starts, stops = starts[np.append(True, apart)], stops[np.append(apart, True)]
    last = np.searchsorted(starts, spans[:, 0] + slack, side="right") - 1
    return spans[:, 1] <= stops[last] + slack


def observed_by_probe(
    times: np.ndarray, units: np.ndarray, probes: np.ndarray, spans: np.ndarray
) -> np.ndarray:
    """In which trials, of time ``spans`` (K, 2), each unit's probe recorded; (K, N) bool.

    In the others the unit only seems silent. Spikes have ``times`` (S,) and ``units`` (S,), the
    places in ``probes`` (N,). A probe records from its first to its last spike, without the pauses
    in which it has none; one with few spikes does not tell.
    """
    observed = np.ones((len(spans), len(probes)), dtype=bool)
    for probe in np.unique(probes):
        spike_times = np.sort(times[(probes == probe)[units] & np.isfinite(times)])
        edges = np.concatenate([[-np.inf], spike_times, [np.inf]])
        last = np.flatnonzero(np.diff(edges) > PAUSE)  # spikes before pauses, and -1
        on = np.stack([edges[last[:-1] + 1], edges[last[1:]]], axis=1) + (-SILENCE, SILENCE)
        recorded = within(on, spans)
        # Where it recorded no trial, it is by another clock; binning reports it.
        if recorded.any() and len(spike_times) > RATE * np.ptp(spike_times):
            observed[:, probes == probe] = recorded[:, None]
    return observed


def is_event(column: str) -> bool:
    """Return whether a column of trials seems to hold times, which are nothing to decode."""
    return re.search(r"times?$", column.lower()) is not None


def ordered_samples(times: ArrayLike, values: ArrayLike) -> tuple[Floats, Floats]:
    """Sort the samples of a trace (S,) and leave out NaN; of equal times the first is kept."""
    t, v = np.asarray(times, float), np.asarray(values, float)
    finite = np.isfinite(t) & np.isfinite(v)
    t, first = np.unique(t[finite], return_index=True)
    return t, v[finite][first]


def wheel_speed(times: ArrayLike, position: ArrayLike) -> tuple[Floats, Floats]:
    """Compute the speed of a wheel whose position is sampled irregularly, as IBL does.

    The position (S,), at times (S,) in seconds, is interpolated at 1 kHz, low-pass filtered at
    20 Hz (Butterworth of order 8, run forwards and backwards) and differentiated. Returns times
    (S',) and absolute speed (S',); raises a ValueError for less than a second, or over a day.
    """
    t, x = ordered_samples(times, position)
    if len(t) < 2 or not 1 <= t[-1] - t[0] <= LONGEST:
        raise ValueError(f"wheel times must span 1 to {LONGEST:g} s, and be seconds")
    grid = np.arange(t[0], t[-1], 1 / 1000)
    low_pass = signal.butter(8, 20, fs=1000, output="sos")
    smooth = signal.sosfiltfilt(low_pass, np.interp(grid, t, x))
    return grid, np.abs(np.gradient(smooth, 1 / 1000))


def public(text: str) -> str:
    """An address without its password, signature or token, which belong into no file or log."""
    return re.sub(r"[?#\n].*", "", re.sub(r"(?<=://)[^/?#\s]*@", "", text))


def download(url: str, path: str | Path, *, size: int, etag: str, progress: bool = True) -> Path:
    """Download a file of ``size`` bytes and version ``etag``, or resume; returns its path.

    What has arrived waits in a hidden ``.part`` file of that version, beside a file ``.etag`` with
    the version of the finished file, which is not asked for again.

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
    shown = None if progress else True  # None: on a terminal
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=shown) as bar:
        for wait in (*WAITS, None):
            try:
                _append(url, part, size, etag, bar)
                break
            except NETWORK as error:
                if wait is None or getattr(error, "code", 500) < 500:  # an answer that stays
                    problem = f"{public(url)}: {error}; download again, it resumes"
                    raise ConnectionError(problem) from error
                time.sleep(wait)
    os.replace(part, path)
    mark.write_text(etag)
    return path


def _append(url: str, part: Path, size: int, etag: str, bar: Any) -> None:
    """Ask once for the missing bytes."""
    if (have := part.stat().st_size) == size:
        return
    # With If-Range, a server whose file has changed sends all of the new one.
    headers = {"Range": f"bytes={have}-", "If-Range": f'"{etag}"'} if 0 < have < size else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.headers.get("ETag", etag).removeprefix("W/").strip('"') != etag:
            raise ConnectionError("the file has changed; list again")
        # 206: a server that sends the range asked for; others send the whole file.
        with open(part, "ab" if answer.status == 206 else "wb") as file:
            bar.n = file.tell()
            while chunk := answer.read1(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if (have := part.stat().st_size) != size:
        raise ConnectionError(f"{have} of {size} bytes came")
