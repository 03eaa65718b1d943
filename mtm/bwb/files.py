"""BrainWideBench (arXiv 2609.22064): its public session files in, a Session out.

The benchmark holds 452 recordings of the International Brain Laboratory, 423 to pretrain on and 29
of other animals to score; one HDF5 file each, which needs no account. Each comes in two builds:
``all_units`` is everything that the spike sorter found, ``selected_units`` the well isolated units.

A session's behaviours, where NaN = missing:

- ``choice`` (K,): -1 right, +1 left, 0 none; ``block``: probability of a stimulus on the left;
  ``reward``: 1 or 0; ``contrast``: right minus left, -1..1; ``reaction-time``: first movement
  minus stimulus onset, s. Only where trials are the animal's own.
- ``event-time`` (K,) s: where a trial's window has its 0, on the recording's clock.
- ``whisker-motion-energy``, ``wheel-speed``, ``left-paw-speed``, ``right-paw-speed``,
  ``licking-rate`` (licks/s) (K, T), averaged in each bin from 50 samples a second. Absent where the
  file has none, which ``provenance["absent"]`` lists: the benchmark leaves out what failed its
  quality control. Paw samples that the file calls not confident count as missing.

Its ``neurons`` have ``uuid``, ``probe`` (name), and where present ``cluster`` (id on its probe),
``depth``, ``label``, ``firing_rate`` (Hz), ``channels``, ``x``, ``y``, ``z``, ``allen``, ``beryl``,
``cosmos``, ``qc_neural`` and its parts, and the flags ``ts2_co_smoothing_is_held_out_test`` and
``..._val``.

With ``align="ts2"`` counts are the benchmark's, floor((spike - start) * 50), except that a spike
less than 20 ns before a bin's edge, one in a million, counts in the bin after it.
"""

from __future__ import annotations

import http.client
import re
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from xml.etree import ElementTree

import numpy as np
import torch

from mtm.binning import n_bins
from mtm.checks import one_of
from mtm.data.recording import download as fetch
from mtm.data.recording import ordered_samples
from mtm.data.regions import LEVELS
from mtm.files import optional as extra
from mtm.session import Session, SessionError, Split

BUCKET = "https://brain-wide-bench.s3.amazonaws.com"
DATASET = "ibl_brain_wide_bench_2026"
TIMEOUT = 60.0  # seconds that the server may be silent
BUILDS = ("all_units", "selected_units")
REGIMES = ("pretrain", "eval")
SPLITS = {"pretrain": Split._fields[:2], "ts1": Split._fields, "ts2": Split._fields}
SUITES = {"all_units": "ts1", "selected_units": "ts2"}  # build -> tasks, and split, it is for

_UNITS = {  # columns of `units` -> columns of Session.neurons
    **{"id": "uuid", "probe_id": "probe", "cluster_id": "cluster", "depths": "depth"},
    **{name: name for name in ("label", "firing_rate", "channels", "x", "y", "z", "qc_neural")},
    **{f"qc_neural_{part}": f"qc_neural_{part}" for part in ("raw", "spikesorting", "alignment")},
    **{f"region_{level.lower()}": level.lower() for level in LEVELS},
    **{name: name for name in (f"ts2_co_smoothing_is_held_out_{part}" for part in ("test", "val"))},
}
_TRIALS = ("choice", "reward", "probability_left", "contrast_left", "contrast_right",
           "movement_onset_time", "stim_on_time")  # fmt: skip
_FACTS = {  # key of Session.provenance: group and its attribute
    **{"lab": ("/", "lab"), "subject": ("subject", "id")},
    "recording_date": ("session", "recording_date"),
    **{key: ("brainset", key) for key in ("derived_version", "unit_filtering")},
}
_TRACES = {  # behaviour -> group, where its column has the same name with underscores
    **{"whisker-motion-energy": "whisker", "wheel-speed": "wheel"},
    **{"left-paw-speed": "paws", "right-paw-speed": "paws", "licking-rate": "licks"},
}
_AGAIN = "download the file again"
_TOLERANCE = 1e-9  # s: many roundings of a time in a recording, far below what it resolves
_LONGEST = 1e6  # s: beyond is no time of a recording, and windows would fill the memory


# ----------------------------------------------------------------------------- download


class Entry(NamedTuple):
    """One session file on the server: its size in bytes, and its ETag, which names its content."""

    uuid: str
    url: str
    bytes: int
    etag: str


def list_sessions(
    build: str = "selected_units",
    regime: str = "eval",
    *,
    base_url: str = BUCKET,
    timeout: float = TIMEOUT,
) -> list[Entry]:
    """The session files that the public bucket has, sorted by uuid; no account is needed.

    Args:
        build: "selected_units" (tasks on single units) or "all_units" (decoding of behaviour).
        regime: "eval" (29 sessions) or "pretrain" (423).
        base_url: where the bucket is.
        timeout: seconds that the server may be silent.

    Raises:
        ConnectionError: server out of reach, or an answer that lists no session files.
    """
    base, prefix = base_url.rstrip("/"), f"brainsets/{build}/{DATASET}/{regime}/"
    entries, query = [], {"list-type": "2", "prefix": prefix}
    token: str | None = ""
    while token is not None:  # S3's ListObjectsV2, page after page
        url = f"{base}/?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=timeout) as answer:
                page = ElementTree.fromstring(answer.read())
            for item in page.iterfind("{*}Contents"):
                key, etag, size = (_text(item, tag) for tag in ("Key", "ETag", "Size"))
                if match := re.fullmatch(rf"{prefix}([-0-9a-fA-F]{{36}})\.h5", key):
                    entries.append(Entry(match[1], f"{base}/{key}", int(size), etag.strip('"')))
        except (OSError, http.client.HTTPException, ElementTree.ParseError,
                ValueError) as error:  # fmt: skip
            raise ConnectionError(f"cannot list {url} ({error}); check base_url and the network "
                                  "(a log-in page?), or try again later") from error  # fmt: skip
        token = page.findtext("{*}NextContinuationToken")
        query["continuation-token"] = token or ""
    if not entries:
        raise ConnectionError(f"{base_url} lists no session file {prefix!r}; check base_url, build "
                              f"(one of {BUILDS}) and regime (one of {REGIMES})")  # fmt: skip
    return sorted(entries)


def _text(item: ElementTree.Element, tag: str) -> str:
    found = item.findtext("{*}" + tag)
    if found is None:
        raise ValueError(f"no {tag}")
    return found


def download(
    session: Entry | str,
    folder: str | Path,
    *,
    build: str = "selected_units",
    regime: str = "eval",
    base_url: str = BUCKET,
    timeout: float = TIMEOUT,
    progress: bool = True,
) -> Path:
    """Download a session file, or go on with a download that was cut; returns its path.

    The file becomes ``<folder>/<build>/ibl_brain_wide_bench_2026/<regime>/<uuid>.h5``, as in the
    bucket, so that the builds stay apart and the benchmark's own code finds it. What is there
    already is downloaded again only if the benchmark has made it anew; see `mtm.data.recording.download`,
    also for what it raises.

    Args:
        session: from `list_sessions`; or a uuid, which is looked up in ``build`` and ``regime``.
        folder: where the tree of files begins; made if need be.
        build, regime, base_url: see `list_sessions`; unused for an `Entry`.
        timeout: seconds that the server may be silent.
        progress: show a bar on a terminal.
    """
    if isinstance(session, str):
        listed = list_sessions(build, regime, base_url=base_url, timeout=timeout)
        found = {entry.uuid: entry for entry in listed}
        if session not in found:
            raise FileNotFoundError(f"{build}, {regime}: no session {session!r}; see list_sessions")
        session = found[session]
    path = Path(folder) / session.url.rpartition("/brainsets/")[2]
    return fetch(
        session.url, path, size=session.bytes, etag=session.etag, timeout=timeout, progress=progress
    )


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
    """Load one session file: all its units, its trials, its behaviour, its own split.

    A trial belongs to a part of the split if its whole window lies in that part's time; trials in
    no part (the benchmark leaves gaps of 20 s) stay in the session, but in none of train, val and
    test. Files to pretrain on have train and val only. Trials whose window reaches beyond the first
    or the last spike are left out. ``provenance["trials"]`` counts what was left out and why.

    Args:
        path: a file from `download`.
        align: the event of each trial: a column of the file's ``trials`` that holds times. Or times
            (K,) in seconds. Or "ts2": the benchmark's own windows (`ts2_windows`) of all parts are
            the trials; of a file to pretrain on, those that the same rule cuts from its parts.
        window: (start, stop) around the event, seconds. Default: (-0.5, 1.5); for "ts2" (0, 1),
            whose start must be 0 and whose stop is the windows' length.
        bin_size: seconds.
        atlas: level of ``Session.regions``: "Allen", "Beryl" or "Cosmos". ``None``: no regions.
        split: which of the file's splits to keep: "pretrain", "ts1" (one cut after the other),
            "ts2" (chunks of five minutes), or ``None``. "auto": what there is; of ts1 and ts2 the
            one whose tasks the build is for, ts1 for all units, ts2 for selected units, whatever
            ``align``. What is training time for one is test time for the other.
        trial_filter: "valid" keeps what the benchmark calls valid: a choice was made, reaction
            times are 0 to 10 s, and no event is missing.
        stride: seconds from one "ts2" window to the next; its tests use 0.02, 50 times as many.

    Raises:
        SessionError: naming session, dataset and remedy, whatever the file holds.
        ValueError: for an unknown ``atlas``, ``split`` or ``trial_filter``, a wrong ``window``.
        ImportError: without the ``[bwb]`` extra.
    """
    cut = isinstance(align, str) and align == "ts2"
    window = ((0.0, 1.0) if cut else (-0.5, 1.5)) if window is None else window
    n_bins(window, bin_size)  # says what is wrong with them
    one_of("atlas", atlas, (None, *LEVELS))
    one_of("split", split, (None, "auto", *SPLITS))
    one_of("trial_filter", trial_filter, (None, "valid"))
    with opened(path) as recording:
        recording.facts["align"] = align if isinstance(align, str) else "given times"
        fields = _unit_fields(recording, atlas)
        parts = _parts(recording, split, cut)
        if cut:
            windows = [_windows(recording, part, stride, window) for part in parts.values()]
            align = np.sort(np.concatenate(windows))
        fields |= _trial_fields(recording, align, window, trial_filter, fields["spike_times"])
        fields["given_split"] = _membership(recording, fields["align_times"], window, parts)
        fields |= {"traces": _traces(recording), "subject": recording.facts["subject"]}
        fields |= {"name": recording.name, "provenance": recording.facts}
        return Session.from_spike_times(window=window, bin_size=bin_size, **fields)


def ts2_windows(
    source: Any, part: str, stride: float = 0.02, length: float = 1.0, split: str = "ts2"
) -> np.ndarray:
    """Starts (W,) of the windows that the benchmark's tasks on single units (TS2) cut, seconds.

    Windows lie in the time of valid trials (``task_aligned_intervals``), as far as it lies in the
    part: from each such interval's start every ``stride`` seconds while they fit, and one more that
    ends where the interval ends. The scorer looks for exactly these float64 numbers, ascending:
    they are `torch.arange`'s, numpy's differ in the last bits.

    Args:
        source: a session file's path, or an open `h5py.File`.
        part: "train", "val" or "test".
        stride: seconds; 0.02 in the benchmark's tests, 0.06 in its validation.
        length: seconds.
        split: "ts2", or another of the splits that the file has.

    Raises:
        SessionError, ImportError: see `load_session`.
        ValueError: for an unknown part or split.
    """
    if part not in SPLITS.get(split, ()):
        raise ValueError(f"part must be one of those in {SPLITS}, got {part!r} of {split!r}")
    with opened(source) as recording:
        bounds = recording.intervals(f"{split}_{part}_domain")
        return _windows(recording, bounds, stride, (0.0, length))


# ---------------------------------------------------------------------------- the file


class OpenFile:
    """An open session file: its columns, its facts, and errors that name it."""

    def __init__(self, name: str) -> None:
        self.name = name  # until the file has said its own
        self.file: Any = None
        self.facts: dict[str, Any] = {"origin": "BrainWideBench"}  # Session.provenance

    def fail(self, dataset: str, problem: str) -> NoReturn:
        """Raise a SessionError that names the session, the dataset and the problem."""
        raise SessionError(f"session {self.name!r}, {dataset}: {problem}")

    def text(self, group: str, key: str) -> str:
        """An attribute that is a string; "" where there is none."""
        return _decode(self.file[group].attrs.get(key, "")) if group in self.file else ""

    def column(self, path: str) -> np.ndarray:
        """A column (n,): numbers, or strings."""
        node = self.file.get(path)
        if len(getattr(node, "shape", None) or ()) != 1:  # groups have no shape, empty ones None
            self.fail(path, f"no such column; {_AGAIN}")
        values = node[()]
        if values.dtype.kind in "OS":  # of a table: variable length, UTF-8; of an array: fixed
            values = np.array([_decode(value) for value in values.tolist()], dtype=np.str_)
        return values

    def columns(self, group: str, names: Collection[str]) -> dict[str, np.ndarray]:
        """Those of the columns that a group has."""
        paths = {name: f"{group}/{name}" for name in names}
        return {name: self.column(path) for name, path in paths.items() if path in self.file}

    def intervals(self, path: str) -> np.ndarray:
        """Intervals (n, 2): start and end, seconds."""
        ends = [self.column(f"{path}/{end}").astype(np.float64) for end in ("start", "end")]
        bounds = np.stack(ends, axis=1)
        if not (np.abs(bounds) < _LONGEST).all() or (bounds[:, 0] > bounds[:, 1]).any():
            self.fail(path, f"not intervals from start to end in seconds; {_AGAIN}")
        return bounds


def _decode(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@contextmanager
def opened(source: Any) -> Iterator[OpenFile]:
    """A session file, given open or by its path; what goes wrong becomes a SessionError."""
    h5py = extra("h5py", "bwb")
    given = isinstance(source, h5py.File)
    recording = OpenFile("?" if given else Path(source).stem)
    if not given and not Path(source).is_file():
        recording.fail(repr(str(source)), "no such file; bwb.download fetches it")
    try:
        with nullcontext(source) if given else h5py.File(source, "r") as recording.file:
            recording.name = _decode(recording.file["session"].attrs["id"])
            recording.facts |= {key: recording.text(*place) for key, place in _FACTS.items()}
            recording.facts["file"] = Path(recording.file.filename).name
            yield recording
    except SessionError:
        raise
    except Exception as error:  # h5py and numpy raise all sorts on damaged and foreign files
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        recording.fail("file", f"cannot be read as one of BrainWideBench ({line}); {_AGAIN}")


def _unit_fields(recording: OpenFile, atlas: str | None) -> dict[str, Any]:
    """What `Session.from_spike_times` needs of spikes and units, which are rows of ``units``."""
    table = {"id": recording.column("units/id")} | recording.columns("units", _UNITS)
    neurons = {_UNITS[name]: values for name, values in table.items()}
    if atlas is not None and f"region_{atlas.lower()}" not in table:
        recording.fail(f"units/region_{atlas}", f"no such column; atlas must be one of {LEVELS} "
                       "that the file has, or None")  # fmt: skip
    if "probe" in neurons and "probes" in recording.file:
        probes = [recording.column(f"probes/{key}").tolist() for key in ("id", "name")]
        called = dict(zip(*probes, strict=True))
        neurons["probe"] = np.array([called.get(probe, probe) for probe in neurons["probe"]])
    times = recording.column("spikes/timestamps").astype(np.float64)
    if not len(times) or not np.isfinite(times).all():
        recording.fail("spikes/timestamps", f"not finite times of spikes; {_AGAIN}")
    return {
        "spike_times": times,
        "spike_clusters": recording.column("spikes/unit_index"),
        "clusters": np.arange(len(table["id"])),
        "regions": None if atlas is None else neurons[atlas.lower()],
        "neurons": neurons,
    }


def _parts(recording: OpenFile, split: str | None, cut: bool) -> dict[str, np.ndarray]:
    """Intervals (n, 2) of each part of the split; none without one."""
    here = [name for name in SPLITS if f"{name}_train_domain" in recording.file]
    if split == "auto":
        suite = SUITES.get(recording.facts["unit_filtering"], "ts2")
        split = next((name for name in ("pretrain", suite, *here) if name in here), None)
    regime = "pretrain" if "pretrain" in here else "eval" if here else None
    recording.facts |= {"split": split, "regime": regime}
    if split is None and not cut:
        return {}
    if split not in here:
        recording.fail(f"split {split!r}", f"not in the file; pass one of {here}, or None and an "
                       "align other than 'ts2'")  # fmt: skip
    return {part: recording.intervals(f"{split}_{part}_domain") for part in SPLITS[split]}


def _windows(
    recording: OpenFile, part: np.ndarray, stride: float, window: tuple[float, float]
) -> np.ndarray:
    """Starts (W,) of the windows in the valid trials' time within a part (n, 2)."""
    length = window[1]
    if not (1e-3 <= stride < np.inf and window[0] == 0 < length < np.inf):
        recording.fail("ts2 windows", f"stride must be 0.001 s or more, window must start at 0 and "
                       f"its length be above 0; got stride {stride}, window {window}")  # fmt: skip
    trials = recording.intervals("task_aligned_intervals/domain")
    first = np.maximum(trials[:, None, 0], part[None, :, 0]).ravel()
    last = np.minimum(trials[:, None, 1], part[None, :, 1]).ravel()
    starts: list[np.ndarray] = [np.zeros(0)]
    for begin, end in zip(first.tolist(), last.tolist(), strict=True):
        if end - begin >= length:
            fit = torch.arange(begin, end, stride, dtype=torch.float64).numpy()
            fit = fit[fit + length <= end]
            short = not len(fit) or fit[-1] + length < end
            starts += [fit, np.array([end - length])] if short else [fit]
    return np.sort(np.concatenate(starts))


def _trial_fields(
    recording: OpenFile, align: str | np.ndarray, window: tuple[float, float],
    trial_filter: str | None, spikes: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """What `Session.from_spike_times` needs of the trials that are used."""
    time, behaviour = _trials(recording, align)
    tests = {"without the event": np.isfinite(time)}
    if trial_filter is not None:
        if trial_filter != "valid" or not isinstance(align, str):
            recording.fail("trials/is_valid", "not known of these trials; trial_filter must be "
                           "None, or 'valid' for the animal's own trials")  # fmt: skip
        tests["not valid"] = recording.column("trials/is_valid") == 1
    begun = time + window[0] >= spikes.min() - _TOLERANCE
    tests["beyond the recording"] = begun & (time + window[1] <= spikes.max() + _TOLERANCE)
    passed = np.logical_and.accumulate(np.stack(list(tests.values())))  # (tests, K)
    keep, lost = passed[-1], -np.diff([len(time), *passed.sum(axis=1)])
    counted = {"in the recording": len(time)} | dict(zip(tests, lost.tolist(), strict=True))
    if not keep.any():
        recording.fail("trials", f"none is left ({counted}); align to other events")
    recording.facts["trials"] = counted
    return {
        "align_times": time[keep],
        "behaviour": {name: values[keep] for name, values in behaviour.items()},
        "trial_ids": np.flatnonzero(keep),
        "n_recorded": len(time),
    }


def _trials(
    recording: OpenFile, align: str | np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Time (K,) of each trial's event; and behaviour (K,) of the animal, if trials are its own."""
    if not isinstance(align, str):
        times = np.asarray(align, dtype=np.float64)
        if times.ndim != 1:
            recording.fail("align", f"must be one time a trial, got shape {times.shape}; ravel it")
        return times, {"event-time": times}
    events = [key for key in recording.file["trials"] if re.fullmatch(r"start|end|\w+_time", key)]
    if align not in events:
        recording.fail(f"trials/{align}", f"no such event; there are {events}")
    columns = [recording.column(f"trials/{name}") for name in (align, *_TRIALS)]
    time, choice, reward, block, left, right, moved, shown = np.stack(columns).astype(np.float64)
    cases = [choice == 0, choice == 1, choice == 2]  # right, left, none
    contrast = np.nan_to_num(right) - np.nan_to_num(left)  # NaN: the side without a stimulus
    return time, {
        "event-time": time,
        "choice": np.select(cases, [-1.0, 1.0, 0.0], default=np.nan),
        "block": block,
        "reward": reward,
        "contrast": np.where(np.isnan(left) & np.isnan(right), np.nan, contrast),
        "reaction-time": moved - shown,
    }


def _membership(
    recording: OpenFile, events: np.ndarray, window: Any, parts: dict[str, np.ndarray]
) -> Split | None:
    """The trials of each part: those whose window lies in one of its intervals."""
    if not parts:
        return None
    start, stop = events[:, None] + window[0] + _TOLERANCE, events[:, None] + window[1] - _TOLERANCE
    given = {part: np.zeros(0, dtype=np.int64) for part in Split._fields}
    for part, bounds in parts.items():
        inside = (start >= bounds[:, 0]) & (stop <= bounds[:, 1])
        given[part] = np.flatnonzero(inside.any(axis=1))
    outside = len(events) - sum(map(len, given.values()))
    recording.facts["trials"]["in no part of the split"] = outside
    return Split(**given)


def _traces(recording: OpenFile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Times and values of each behaviour that the file has."""
    traces = {}
    for key, group in _TRACES.items():
        column = key.replace("-", "_")
        trust = f"is_{column.removesuffix('_speed')}_confident"  # of the paws: which to believe
        table = recording.columns(group, (column, trust, "timestamps"))
        if column not in table:
            continue
        values = table[column].astype(np.float64)
        if trust in table:
            values[table[trust] != 1] = np.nan
        times = table.get("timestamps")
        if times is None:
            rate = float(recording.file[group].attrs["sampling_rate"])
            if not 0 < rate < np.inf:
                recording.fail(group, f"sampling_rate is {rate}, not samples a second; {_AGAIN}")
            [[start, _]] = recording.intervals(f"{group}/domain")
            times = start + np.arange(len(values)) / rate
        if key == "licking-rate":  # of the 20 ms that begin with the sample: known of their middle
            times = times + 0.01
        traces[key] = ordered_samples(times, values)
    recording.facts["absent"] = [key for key in _TRACES if key not in traces]
    return traces
