"""BrainWideBench (arXiv 2609.22064): list, download and read its public session files.

The benchmark holds 452 recordings of the International Brain Laboratory, one HDF5 file each: 423
to pretrain on and 29 of other animals to evaluate on. No account is needed. Each file comes in two
builds: ``all_units`` is everything that the spike sorter found, ``selected_units`` the well
isolated units.

Behaviours of a session, where NaN means missing:

- ``choice`` (K,): -1 right, +1 left, 0 none; ``block``: probability of a stimulus on the left;
  ``reward``: 1 or 0; ``contrast``: right minus left, -1..1; ``reaction-time``: first movement
  minus stimulus onset, s. Only when the trials are those of the file.
- ``event-time`` (K,) s: time of the event that each trial is aligned to, on the recording's clock.
- ``whisker-motion-energy``, ``wheel-speed``, ``left-paw-speed``, ``right-paw-speed``,
  ``licking-rate`` (licks/s) (K, T), averaged in each bin from 50 samples a second. The benchmark
  leaves out signals that failed its quality control; ``provenance["absent"]`` lists them. Paw
  samples that the file marks as not confident count as missing.

Columns of ``neurons``: ``uuid``, ``probe`` (name), and where present ``cluster`` (id on its probe),
``depth``, ``label``, ``firing_rate`` (Hz), ``channels``, ``x``, ``y``, ``z``, ``allen``, ``beryl``,
``cosmos``, ``qc_neural`` and its parts, ``ts2_co_smoothing_is_held_out_test`` and ``..._val``.
"""

from __future__ import annotations

import re
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

from mtm.binning import n_bins
from mtm.data import recording
from mtm.data.regions import LEVELS
from mtm.files import optional
from mtm.session import Session, SessionError, Split

BUCKET = "https://brain-wide-bench.s3.amazonaws.com"
DATASET = "ibl_brain_wide_bench_2026"
BUILDS = ("all_units", "selected_units")
SUITES = {"all_units": "ts1", "selected_units": "ts2"}  # build -> its tasks and their split
SPLITS = {"pretrain": Split._fields[:2], "ts1": Split._fields, "ts2": Split._fields}

_UNITS = {  # columns of `units` -> columns of Session.neurons
    **{"id": "uuid", "probe_id": "probe", "cluster_id": "cluster", "depths": "depth"},
    **{name: name for name in ("label", "firing_rate", "channels", "x", "y", "z", "qc_neural")},
    **{f"qc_neural_{part}": f"qc_neural_{part}" for part in ("raw", "spikesorting", "alignment")},
    **{f"region_{level.lower()}": level.lower() for level in LEVELS},
    **{name: name for name in (f"ts2_co_smoothing_is_held_out_{part}" for part in ("test", "val"))},
}
_TRACES = {  # behaviour -> group; the column has the behaviour's name with underscores
    **{"whisker-motion-energy": "whisker", "wheel-speed": "wheel", "licking-rate": "licks"},
    **{"left-paw-speed": "paws", "right-paw-speed": "paws"},
}
_TOLERANCE = 1e-9  # s, rounding error of a time


# ----------------------------------------------------------------------------- download


class Entry(NamedTuple):
    """A session file on the server. Its ETag changes when the file does."""

    uuid: str
    url: str
    bytes: int
    etag: str


def list_sessions(
    build: str = "selected_units", regime: str = "eval", *, base_url: str = BUCKET
) -> list[Entry]:
    """List the session files in the public bucket, sorted by uuid.

    Args:
        build: "selected_units" (tasks on single units) or "all_units" (tasks on behaviour).
        regime: "eval" (29 sessions) or "pretrain" (423).
        base_url: address of the bucket.
    """
    base, prefix = base_url.rstrip("/"), f"brainsets/{build}/{DATASET}/{regime}/"
    entries, query = [], {"list-type": "2", "prefix": prefix}
    token: str | None = ""
    while token is not None:  # S3's ListObjectsV2, page after page
        url = f"{base}/?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                page = ElementTree.fromstring(answer.read())
        except (OSError, ElementTree.ParseError) as error:  # the latter for a log-in page
            raise ConnectionError(f"cannot list {url} ({error}); check the network") from error
        for item in page.iterfind("{*}Contents"):
            key, size, etag = (item.findtext("{*}" + tag, "") for tag in ("Key", "Size", "ETag"))
            if match := re.fullmatch(rf"{prefix}([-0-9a-f]{{36}})\.h5", key):
                entries.append(Entry(match[1], f"{base}/{key}", int(size), etag.strip('"')))
        token = page.findtext("{*}NextContinuationToken")
        query["continuation-token"] = token or ""
    if not entries:
        known = f"build is one of {BUILDS}, regime 'eval' or 'pretrain'"
        raise ConnectionError(f"{base_url} lists no session file {prefix!r}; {known}")
    return sorted(entries)


def download(session: Entry, folder: str | Path, *, progress: bool = True) -> Path:
    """Download a session file of `list_sessions`, or resume its download.

    A file that is there already is downloaded again only if it changed on the server. Returns
    ``<folder>/<build>/ibl_brain_wide_bench_2026/<regime>/<uuid>.h5``, as in the bucket. Raises an
    OSError if the download fails, see `mtm.data.recording.download`.
    """
    path = Path(folder) / session.url.rpartition("/brainsets/")[2]
    expected: dict[str, Any] = {"size": session.bytes, "etag": session.etag}
    return recording.download(session.url, path, progress=progress, **expected)


def fetch(
    sessions: str | Iterable[str],
    folder: str | Path,
    build: str = "selected_units",
    *,
    base_url: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Download the files of some sessions, whichever regime they are of; again, it resumes.

    Args:
        sessions: uuids or their beginnings, as ``"0802ced5"``.
        folder: see `download`.
        build: "selected_units" or "all_units".
        base_url: address of the bucket.
        progress: show a bar on a terminal.

    Raises:
        ValueError: for a beginning that no session has, or several.
    """
    wanted = [sessions] if isinstance(sessions, str) else list(sessions)
    found: dict[str, list[Entry]] = {start: [] for start in wanted}
    for regime in ("eval", "pretrain"):
        if not all(found.values()):
            for entry in list_sessions(build, regime, base_url=base_url or BUCKET):
                for start in wanted:
                    found[start] += [entry] if entry.uuid.startswith(start) else []
    for start, entries in found.items():
        if len(entries) != 1:
            problem = f"{len(entries)} sessions of {build} begin so; bwb.list_sessions lists all"
            raise ValueError(f"session {start!r}: {problem}")
    return [download(found[start][0], folder, progress=progress) for start in wanted]


# ------------------------------------------------------------------------------ session


def load_session(
    path: str | Path,
    *,
    align: str | np.ndarray = "stim_on_time",
    window: tuple[float, float] | None = None,
    bin_size: float = 0.02,
    atlas: str | None = "Allen",
    split: str | None = "auto",
    trial_filter: str | None = None,
    stride: float = 1.0,
) -> Session:
    """Load a session file: its units, trials, behaviour and split.

    A trial belongs to the part of the split in which its whole window lies; trials in no part stay
    in the session. Trials that reach beyond the first or last spike are left out.
    ``provenance["trials"]`` counts both.

    Args:
        path: a file from `download`.
        align: the event of each trial: a column of the file's ``trials`` that holds times; or times
            (K,) in seconds; or "ts2", the benchmark's own windows (`ts2_windows`) of all parts.
        window: (start, stop) around the event, seconds. Default: (-0.5, 1.5), or (0, 1) for "ts2",
            where start must be 0.
        bin_size: seconds.
        atlas: level of ``Session.regions``: "Allen", "Beryl" or "Cosmos"; ``None`` for no regions.
        split: "pretrain", "ts1" (one cut after the other), "ts2" (chunks of five minutes), or
            ``None``. "auto": the one that the build's tasks use, ts1 for all units and ts2 for
            selected units. Training time of one split is test time of the other.
        trial_filter: "valid" keeps the benchmark's valid trials: a choice was made, reaction times
            are 0 to 10 s, and no event is missing.
        stride: seconds between the starts of "ts2" windows; 0.02 in the benchmark's tests.
    """
    cut = isinstance(align, str) and align == "ts2"
    window = ((0.0, 1.0) if cut else (-0.5, 1.5)) if window is None else window
    n_bins(window, bin_size)  # raises for a window that is not a whole number of bins
    if atlas not in (None, *LEVELS) or split not in (None, "auto", *SPLITS):
        raise ValueError(f"atlas is one of {LEVELS} and split of {(*SPLITS,)}, or None")
    if cut and (window[0] != 0 or stride <= 0):
        raise ValueError("align='ts2' needs a window that starts at 0, and a stride above 0")
    with open_file(path) as file:
        file.provenance["align"] = align if isinstance(align, str) else "given times"
        parts = _parts(file, split, cut)
        if cut:
            pieces = [_windows(file, part, stride, window[1]) for part in parts.values()]
            align = np.sort(np.concatenate(pieces))
        fields = _units(file, atlas)
        fields |= _trials(file, align, window, trial_filter, fields["spike_times"])
        fields["given_split"] = _membership(file, fields["align_times"], window, parts)
        fields |= {"traces": _traces(file), "name": file.name, "provenance": file.provenance}
    subject = file.provenance["subject"]
    return Session.from_spike_times(window=window, bin_size=bin_size, subject=subject, **fields)


def ts2_windows(
    path: str | Path, part: str, stride: float = 0.02, length: float = 1.0, split: str = "ts2"
) -> np.ndarray:
    """Starts (W,) in seconds, ascending, of the windows of the benchmark's tasks on units (TS2).

    Windows lie in the time of valid trials (``task_aligned_intervals``) within the part: one every
    ``stride`` seconds from the start of each such interval, and one that ends with the interval.
    The scorer matches windows by exact equality of these float64 numbers. They are computed by
    `torch.arange`; numpy's differ in the last bits.

    Args:
        path: a session file.
        part: "train", "val" or "test".
        stride: seconds; 0.02 in the benchmark's tests, 0.06 in its validation.
        length: seconds.
        split: "ts2", or another split of the file.
    """
    with open_file(path) as file:
        return _windows(file, file.intervals(f"{split}_{part}_domain"), stride, length)


# ---------------------------------------------------------------------------- the file


class SessionFile(recording.Recording):
    """An open session file; its errors name the session and the dataset."""

    def open(self, file: Any) -> None:
        """Read the session's id and where it is from."""
        self.file, self.name = file, _decode(file["session"].attrs["id"])
        self.provenance |= {
            "lab": self.text("/", "lab"),
            "subject": self.text("subject", "id"),
            "recording_date": self.text("session", "recording_date"),
            "derived_version": self.text("brainset", "derived_version"),
            "unit_filtering": self.text("brainset", "unit_filtering"),
        }

    def text(self, group: str, key: str) -> str:
        """A string attribute; "" where there is none."""
        return _decode(self.file[group].attrs.get(key, "")) if group in self.file else ""

    def column(self, path: str) -> np.ndarray:
        """A column (n,): numbers or strings."""
        if path not in self.file:
            self.fail(path, "not in the file; download it again")
        values = self.file[path][()]
        if values.dtype.kind in "OS":  # variable-length UTF-8, or fixed-length bytes
            values = np.array([_decode(value) for value in values.tolist()], dtype=np.str_)
        return values

    def intervals(self, path: str) -> np.ndarray:
        """Intervals (n, 2): start and end, seconds."""
        return np.stack([self.column(f"{path}/{end}") for end in ("start", "end")], axis=1)

    def times(self, group: str, n: int) -> np.ndarray:
        """Times (n,) of the samples of a group; a regular series stores its start and rate."""
        if f"{group}/timestamps" in self.file:
            return self.column(f"{group}/timestamps")
        rate = float(self.file[group].attrs["sampling_rate"])
        return self.intervals(f"{group}/domain")[0, 0] + np.arange(n) / rate


def _decode(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@contextmanager
def open_file(path: str | Path) -> Iterator[SessionFile]:
    """Open a session file; errors in reading it become a SessionError."""
    h5py, path = optional("h5py", "bwb"), Path(path)
    if not path.is_file():
        raise SessionError(f"session {path.stem!r}, {path}: no such file; bwb.download fetches it")
    opened = SessionFile(path.stem, origin="BrainWideBench", file=path.name)
    with opened.reading(str(path)), h5py.File(path, "r") as file:
        opened.open(file)
        yield opened


def _units(file: SessionFile, atlas: str | None) -> dict[str, Any]:
    """Arguments of `Session.from_spike_times` for the spikes and units."""
    present = [name for name in _UNITS if name == "id" or f"units/{name}" in file.file]
    neurons = {_UNITS[name]: file.column(f"units/{name}") for name in present}
    if "probe" in neurons and "probes" in file.file:  # ids of insertions -> "probe00", ...
        ids, names = (file.column(f"probes/{key}").tolist() for key in ("id", "name"))
        name_of = dict(zip(ids, names, strict=True))
        neurons["probe"] = np.array([name_of[probe] for probe in neurons["probe"].tolist()])
    return {
        "spike_times": file.column("spikes/timestamps"),
        "spike_clusters": file.column("spikes/unit_index"),
        "clusters": np.arange(len(neurons["uuid"])),
        "regions": None if atlas is None else file.column(f"units/region_{atlas.lower()}"),
        "neurons": neurons,
    }


def _parts(file: SessionFile, split: str | None, cut: bool) -> dict[str, np.ndarray]:
    """Intervals (n, 2) of each part of the split; empty without one."""
    present = [name for name in SPLITS if f"{name}_train_domain" in file.file]
    if split == "auto":
        suite = SUITES.get(file.provenance["unit_filtering"], "ts2")
        split = next((name for name in ("pretrain", suite) if name in present), None)
    file.provenance["split"] = split
    if split is None and not cut:
        return {}
    if split not in present:
        remedy = f"pass one of {present}, or None and an align other than 'ts2'"
        file.fail(f"split {split!r}", f"not in the file; {remedy}")
    return {part: file.intervals(f"{split}_{part}_domain") for part in SPLITS[split]}


def _windows(file: SessionFile, part: np.ndarray, stride: float, length: float) -> np.ndarray:
    """Starts (W,) of the windows in the valid trials' time within a part (n, 2)."""
    trials = file.intervals("task_aligned_intervals/domain")
    first = np.maximum(trials[:, None, 0], part[None, :, 0]).ravel()
    last = np.minimum(trials[:, None, 1], part[None, :, 1]).ravel()
    starts: list[np.ndarray] = [np.zeros(0)]
    for begin, end in zip(first.tolist(), last.tolist(), strict=True):
        if end - begin >= length:
            regular = torch.arange(begin, end, stride, dtype=torch.float64).numpy()
            regular = regular[regular + length <= end]
            # Where the stride does not end with the interval, one more window does.
            short = not len(regular) or regular[-1] + length < end
            starts += [regular, np.array([end - length])] if short else [regular]
    return np.sort(np.concatenate(starts))


def _trials(
    file: SessionFile,
    align: str | np.ndarray,
    window: tuple[float, float],
    trial_filter: str | None,
    spikes: np.ndarray,
) -> dict[str, Any]:
    """Arguments of `Session.from_spike_times` for the trials that are kept."""
    if isinstance(align, str):
        behaviour = _behaviour(file, align)
    else:
        behaviour = {"event-time": np.asarray(align, dtype=np.float64)}
    time = behaviour["event-time"]
    tests = {"without the event": np.isfinite(time)}
    if trial_filter is not None:
        if trial_filter != "valid" or not isinstance(align, str):
            file.fail("trial_filter", "must be None, or 'valid' with an event of the file as align")
        tests["not valid"] = file.column("trials/is_valid") == 1
    begins = time + window[0] >= spikes.min() - _TOLERANCE
    tests["beyond the recording"] = begins & (time + window[1] <= spikes.max() + _TOLERANCE)
    # A trial is counted under the first test that it fails.
    passed = np.logical_and.accumulate(np.stack(list(tests.values())))  # (tests, K)
    lost = -np.diff([len(time), *passed.sum(axis=1)])
    counted = {"in the recording": len(time)} | dict(zip(tests, lost.tolist(), strict=True))
    file.provenance["trials"], keep = counted, passed[-1]
    if not keep.any():
        file.fail("trials", f"none is left ({counted}); align to other events, in seconds")
    return {
        "align_times": time[keep],
        "behaviour": {name: values[keep] for name, values in behaviour.items()},
        "trial_ids": np.flatnonzero(keep),
        "n_recorded": len(time),
    }


def _behaviour(file: SessionFile, align: str) -> dict[str, np.ndarray]:
    """Time (K,) of each trial's event, and the behaviours of one value a trial."""
    events = [key for key in file.file["trials"] if re.fullmatch(r"start|end|\w+_time", key)]
    if align not in events:
        file.fail(f"trials/{align}", f"no such event; there are {events}")
    names = ("choice", "contrast_left", "contrast_right", "movement_onset_time", "stim_on_time")
    choice, left, right, moved, shown = (file.column(f"trials/{name}") for name in names)
    contrast = np.nan_to_num(right) - np.nan_to_num(left)  # NaN on the side without a stimulus
    return {
        "event-time": file.column(f"trials/{align}"),
        "choice": np.select([choice == 0, choice == 1, choice == 2], [-1.0, 1.0, 0.0], np.nan),
        "block": file.column("trials/probability_left"),
        "reward": file.column("trials/reward").astype(np.float64),
        "contrast": np.where(np.isnan(left) & np.isnan(right), np.nan, contrast),
        "reaction-time": moved - shown,
    }


def inside(spans: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Which intervals (K, 2) lie in one of a part's (n, 2); (K,) bool."""
    begun = spans[:, None, 0] >= part[:, 0] - _TOLERANCE
    return np.any(begun & (spans[:, None, 1] <= part[:, 1] + _TOLERANCE), axis=1)


def _membership(
    file: SessionFile, events: np.ndarray, window: tuple[float, float], parts: dict[str, np.ndarray]
) -> Split | None:
    """The trials of each part: those whose window lies in one of its intervals."""
    if not parts:
        return None
    spans, nowhere = events[:, None] + np.array(window), np.zeros((0, 2))
    members = {p: np.flatnonzero(inside(spans, parts.get(p, nowhere))) for p in Split._fields}
    outside = len(events) - sum(map(len, members.values()))
    file.provenance["trials"]["in no part of the split"] = outside
    return Split(**members)


def _traces(file: SessionFile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Times and values of each continuous behaviour in the file."""
    traces = {}
    for key, group in _TRACES.items():
        path = f"{group}/{key.replace('-', '_')}"
        if path not in file.file:
            continue
        values = file.column(path)
        times, known = file.times(group, len(values)), np.isfinite(values)
        if key == "licking-rate":  # a sample counts the 20 ms that begin with it: use their middle
            times = times + 0.01
        if group == "paws":
            known &= file.column(f"paws/is_{path[5:].removesuffix('_speed')}_confident") == 1
        traces[key] = times[known], values[known]
    file.provenance["absent"] = [key for key in _TRACES if key not in traces]
    return traces
