"""BrainWideBench (arXiv 2609.22064): list, download and read its public session files.

452 recordings of the International Brain Laboratory, one HDF5 file each: 423 to pretrain on, 29 of
other animals to evaluate on. Each comes in two builds: ``all_units`` is all that the spike sorter
found, ``selected_units`` the well isolated units.

Behaviours of a session, NaN where missing:

- ``choice`` (K,): -1 right, +1 left, 0 none; ``block``: probability of a stimulus on the left;
  ``reward``: 1 or 0; ``contrast``: right minus left; ``reaction-time``: first movement minus
  stimulus onset, s; all unless trials are aligned to given times. ``event-time``: s, of each trial.
- ``whisker-motion-energy``, ``wheel-speed``, ``left-paw-speed``, ``right-paw-speed``,
  ``licking-rate`` (licks/s) (K, T), averaged in each bin from confident samples, 50 a second.
  ``provenance["absent"]`` lists those that failed the benchmark's quality control.

``neurons`` has the columns of the file, with ``uuid``, ``probe`` (name), ``cluster`` (id on its
probe), ``depth``, ``allen``, ``beryl`` and ``cosmos``.
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
import pandas as pd
import torch

from mtm.binning import n_bins
from mtm.data import recording
from mtm.data.recording import observed_by_probe, within
from mtm.data.regions import LEVELS
from mtm.files import optional
from mtm.session import Session

BUCKET = "https://brain-wide-bench.s3.amazonaws.com"
DATASET = "ibl_brain_wide_bench_2026"
BUILDS = ("all_units", "selected_units")
SUITES = {"all_units": "ts1", "selected_units": "ts2"}  # build -> its tasks and their split
SPLITS = ("pretrain", "ts1", "ts2")
COLUMNS = {"id": "uuid", "probe_id": "probe", "cluster_id": "cluster", "depths": "depth"}
TRIAL_COLUMNS = (
    *("choice", "reward", "probability_left", "contrast_left", "contrast_right"),
    *("movement_onset_time", "stim_on_time"),
)
TRACES = {  # behaviour -> group; the column has the behaviour's name with underscores
    **{"whisker-motion-energy": "whisker", "wheel-speed": "wheel", "licking-rate": "licks"},
    **{"left-paw-speed": "paws", "right-paw-speed": "paws"},
}
ROUNDING = 1e-9  # seconds, of a time


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

    ``sessions`` are uuids or their beginnings, as ``"0802ced5"``; for the rest see `download` and
    `list_sessions`. Raises a ValueError for a beginning that no session has, or several.
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
) -> Session:
    """Load a session file: its units, trials, behaviour and split.

    A trial belongs to the part of the split in which its whole window lies, or to none. Trials that
    no probe recorded are left out; what one of several did not is not ``observed``.
    ``provenance["trials"]`` counts them.

    Args:
        path: a file from `download`.
        align: the event of each trial: a column of times in the file's ``trials``; or times (K,) in
            seconds; or "ts2", the `ts2_windows` of all parts, one a second.
        window: (start, stop) around the event, seconds. Default: (-0.5, 1.5), or (0, 1) for "ts2",
            where start must be 0.
        bin_size: seconds.
        atlas: level of ``Session.regions``, see `mtm.data.regions`; ``None`` for no regions.
        split: "pretrain", "ts1" (a cut after the other), "ts2" (chunks of five minutes), or None.
            "auto" is ts1 for all units and ts2 for selected units. Training time of one split is
            test time of the other.
        trial_filter: "valid": trials with a choice, all events, and reactions within 10 s.
    """
    cut, named = isinstance(align, str) and align == "ts2", isinstance(align, str)
    window = ((0.0, 1.0) if cut else (-0.5, 1.5)) if window is None else window
    n_bins(window, bin_size)  # raises for a window that is not a whole number of bins
    if atlas not in (None, *LEVELS) or split not in (None, "auto", *SPLITS):
        raise ValueError(f"atlas is one of {LEVELS} and split of {SPLITS}, or None")
    if cut and window[0] != 0:
        raise ValueError("align='ts2' needs a window that starts at 0")
    if trial_filter and (trial_filter != "valid" or cut or not named):
        raise ValueError("trial_filter is None, or 'valid' with an event of the file as align")
    with open_file(path) as file:
        file.provenance["align"] = align if named else "given times"
        parts = _parts(file, split, cut)
        if cut:
            align = _windows(file, np.concatenate([*parts.values()]), 1.0, window[1])
        spikes, units = file.spikes(), _units(file)
        fields = _trials(file, align, window, bool(trial_filter), parts, spikes, units)
        fields["regions"] = None if atlas is None else units[atlas.lower()]
        fields |= {"window": window, "bin_size": bin_size, "traces": _traces(file)}
    return file.to_session(*spikes, units, **fields)


def ts2_windows(
    path: str | Path, part: str, stride: float = 0.02, length: float = 1.0, split: str = "ts2"
) -> np.ndarray:
    """Starts (W,) in seconds, ascending, of the windows of the benchmark's tasks on units.

    They lie in the time of valid trials within a part ("train", "val" or "test") of a split: one
    every ``stride`` s from the start of each such interval, and one that ends with it. The stride
    is 0.02 in the benchmark's tests, 0.06 in its validation. Its scorer matches starts by exact
    equality; numpy's differ from `torch.arange`'s in the last bits.
    """
    with open_file(path) as file:
        return _windows(file, file.intervals(f"{split}_{part}_domain"), stride, length)


def _windows(file: SessionFile, bounds: np.ndarray, stride: float, length: float) -> np.ndarray:
    """Starts (W,) of the windows in intervals ``bounds`` (n, 2)."""
    trials, starts = file.intervals("task_aligned_intervals/domain")[:, None], [np.zeros(0)]
    first = np.maximum(trials[..., 0], bounds[:, 0]).ravel().tolist()
    last = np.minimum(trials[..., 1], bounds[:, 1]).ravel().tolist()
    for begin, end in zip(first, last, strict=True):
        if end - begin >= length:
            regular = torch.arange(begin, end, stride, dtype=torch.float64).numpy()
            regular = regular[regular + length <= end]
            short = not len(regular) or regular[-1] + length < end
            starts += [regular, np.array([end - length])] if short else [regular]
    return np.sort(np.concatenate(starts))


# ---------------------------------------------------------------------------- the file


class SessionFile(recording.Recording):
    """An open session file; its errors name the session and the dataset."""

    file: Any

    def text(self, group: str, key: str) -> str:
        """A string attribute; "" where there is none."""
        value = self.file[group].attrs.get(key, "") if group in self.file else ""
        return value.decode() if isinstance(value, bytes) else str(value)

    def column(self, path: str) -> np.ndarray:
        """A column (n,): numbers or strings."""
        if path not in self.file:
            self.fail(path, "not in the file; download it again")
        data = self.file[path]
        strings = data.dtype.kind in "OS"  # variable-length UTF-8, or fixed-length bytes
        return data.asstr()[()].astype(np.str_) if strings else data[()]

    def spikes(self) -> tuple[np.ndarray, np.ndarray]:
        """Time (S,) in seconds and number of the unit (S,) of every spike."""
        return self.column("spikes/timestamps"), self.column("spikes/unit_index")

    def intervals(self, path: str) -> np.ndarray:
        """Intervals (n, 2): start and end, seconds."""
        return np.stack([self.column(f"{path}/{end}") for end in ("start", "end")], axis=1)

    def trace(self, group: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times, values, and which values are known, of a sampled behaviour; (S,) each."""
        values = self.column(f"{group}/{name}")
        known = np.isfinite(values)
        if group == "paws":
            known &= self.column(f"paws/is_{name.removesuffix('_speed')}_confident") == 1
        if f"{group}/timestamps" in self.file:
            return self.column(f"{group}/timestamps"), values, known
        start, rate = self.column(f"{group}/domain/start"), self.file[group].attrs["sampling_rate"]
        return start[0] + np.arange(len(values)) / float(rate), values, known


@contextmanager
def open_file(path: str | Path) -> Iterator[SessionFile]:
    """Open a session file; errors in reading it become a SessionError."""
    h5py, path = optional("h5py", "bwb"), Path(path)
    opened = SessionFile(path.stem, origin="BrainWideBench", file=path.name)
    if not path.is_file():
        opened.fail(str(path), "no such file; bwb.download fetches it")
    with opened.reading(str(path)), h5py.File(path, "r") as opened.file:
        opened.name = opened.text("session", "id") or path.stem
        opened.provenance["subject"] = opened.text("subject", "id")
        for key in ("derived_version", "unit_filtering"):
            opened.provenance[key] = opened.text("brainset", key)
        yield opened


def _parts(file: SessionFile, split: str | None, needed: bool) -> dict[str, np.ndarray]:
    """Intervals (n, 2) of each part of the split; empty without one, if none is needed."""
    present = [name for name in SPLITS if f"{name}_train_domain" in file.file]
    if split == "auto":
        suite = SUITES.get(file.provenance["unit_filtering"], "ts2")
        split = next((name for name in ("pretrain", suite) if name in present), None)
    file.provenance["split"] = split
    if split is None and not needed:
        return {}
    if split not in present:
        remedy = f"pass one of {present}, or None and an align other than 'ts2'"
        file.fail(f"split {split!r}", f"not in the file; {remedy}")
    parts = {part: file.intervals(f"{split}_{part}_domain") for part in ("train", "val")}
    test = np.zeros((0, 2)) if split == "pretrain" else file.intervals(f"{split}_test_domain")
    return parts | {"test": test}


def _units(file: SessionFile) -> pd.DataFrame:
    """The table of the units, in the order of their numbers in the spikes."""
    file.column("units/id")  # which says so if it is not there
    flat = [key for key, column in file.file["units"].items() if column.ndim == 1]
    names = [COLUMNS.get(key, key.removeprefix("region_")) for key in flat]
    units = pd.DataFrame(
        {n: file.column(f"units/{key}") for n, key in zip(names, flat, strict=True)}
    )
    if "probe" in units and "probes" in file.file:  # ids of insertions -> "probe00", ...
        names = pd.Series(file.column("probes/name"), file.column("probes/id"))
        units["probe"] = units["probe"].map(names)
    return units


def _trials(
    file: SessionFile,
    align: str | np.ndarray,
    window: tuple[float, float],
    valid: bool,
    parts: dict[str, np.ndarray],
    spikes: tuple[np.ndarray, np.ndarray],
    units: pd.DataFrame,
) -> dict[str, Any]:
    """Arguments of `Session.from_spike_times` for the trials that are kept."""
    behaviour = _behaviour(file, align)
    time = behaviour["event-time"]
    spans, whole = time[:, None] + np.array(window), [[spikes[0].min(), spikes[0].max()]]
    probes = units.get("probe", pd.Series("", units.index)).to_numpy()
    observed = observed_by_probe(*spikes, probes, spans)
    observed &= within(np.array(whole), spans, ROUNDING)[:, None]
    rejected = {"not valid": file.column("trials/is_valid") != 1} if valid else {}
    fields = file.trials_to_use(time, behaviour, rejected, observed)
    if parts:
        kept = spans[fields["trial_ids"]]
        members = fields["given_split"] = [within(part, kept, ROUNDING) for part in parts.values()]
        nowhere = ~np.any(members, axis=0)
        file.provenance["trials"]["in no part of the split"] = int(nowhere.sum())
    return fields


def _behaviour(file: SessionFile, align: str | np.ndarray) -> dict[str, np.ndarray]:
    """Time (K,) of each trial's event, and the behaviours of one value a trial."""
    if not isinstance(align, str):
        return {"event-time": np.asarray(align, dtype=np.float64)}
    events = [key for key in file.file["trials"] if re.fullmatch(r"start|end|\w+_time", key)]
    if align not in events:
        file.fail(f"trials/{align}", f"no such event; there are {events}")
    table = pd.DataFrame({name: file.column(f"trials/{name}") for name in {align, *TRIAL_COLUMNS}})
    return {
        "event-time": table[align].to_numpy(),
        "choice": table["choice"].map({0: -1.0, 1: 1.0, 2: 0.0}),
        "block": table["probability_left"],
        "reward": table["reward"].astype(np.float64),
        # NaN on the side without a stimulus; unknown where both are.
        "contrast": table["contrast_right"].sub(table["contrast_left"], fill_value=0),
        "reaction-time": table["movement_onset_time"] - table["stim_on_time"],
    }


def _traces(file: SessionFile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Times and values of each continuous behaviour in the file."""
    traces = {}
    for key, group in TRACES.items():
        name = key.replace("-", "_")
        if f"{group}/{name}" in file.file:
            times, values, known = file.trace(group, name)
            # A lick sample counts the 20 ms that begin with it: its time is their middle.
            traces[key] = times[known] + 0.01 * (group == "licks"), values[known]
    file.provenance["absent"] = [key for key in TRACES if key not in traces]
    return traces
