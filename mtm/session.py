"""One recording, cut into trials and binned: the object that everything else takes.

A :class:`Session` holds spike counts ``(K, T, N)`` (trials, time bins, neurons), the region of each
neuron, and behaviour. It is checked once, when it is made, so that all other code can trust it.
"""

from __future__ import annotations

import hashlib
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from mtm.binning import bin_spikes, bin_trace, cluster_places, plain, seconds
from mtm.files import MemoryMapped, read_arrays, write_arrays

FORMAT = "mtm-session 3"
LISTED = ("format", "shape", "firing_rates")  # for `Sessions`, which reads no counts
UNLABELLED = (
    *("", "root", "void", "nan", "none", "unknown", "null", "unassigned", "not available"),
    *("n/a", "na", "tbd", "?", "-"),
)
"""Labels (any case) that mean "no region": such neurons are kept, but never form a region."""
AXES = (("trial", "presentation"), ("time", "bin"), ("neuron", "unit", "cluster", "cell"))
"""Words in the names of counts' axes, for arrays that name them (xarray)."""
LOWEST_RATE, LOWEST_SHARE = 0.1, 0.01  # below both, times are not seconds: see `_check_times`


class SessionError(ValueError):
    """A recording that cannot be used as it is; the message names session, field and remedy."""


class Split(NamedTuple):
    """Indices of the training, validation and test trials, each sorted."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


class Session:
    """One recording, binned. All arguments are attributes.

    Args:
        counts: spike counts, (K, T, N) trials x time bins x neurons; whole numbers from 0. They are
            copied. Axes that have names, as in xarray, may come in any order.
        regions: brain region of each neuron, (N,) strings; ``None``, ``""`` or another of
            :data:`UNLABELLED` where there is none. Default: no neuron has one.
        name: the session's key, unique among the sessions of a model (an eid, for IBL data).
        subject: the animal.
        bin_size: width of a time bin, seconds.
        window: (start, stop) of a trial around its event, seconds. Default: from 0.
        behaviour: name -> a number, boolean or word for each trial (K,), or a number for each bin
            (K, T). NaN, None or "" = missing.
        neurons: table of neurons: column name -> (N,) numbers or strings.
        rates: expected count in each bin, (K, T, N); known for simulated recordings only.
        given_split: (train, val, test) trials, where the recording comes with a split of its own.
        trial_ids: (K,) place of each trial among the ``n_recorded`` trials of the whole recording,
            which splits are drawn among. Default: these are all trials, in order.
        n_recorded: number of trials of the whole recording; default K.
        provenance: where the recording comes from; anything that JSON can hold.

    Masked entries of arrays count as missing: NaN, or no label. A pandas Series must have the index
    0, 1, 2, ..., since nothing tells which neuron or trial another index means.

    Attributes:
        n_trials, n_bins, n_neurons: K, T and N.

    Raises:
        SessionError: naming the session, the field and the remedy.
    """

    def __init__(
        self,
        counts: ArrayLike,
        regions: Sequence[str | None] | np.ndarray | None = None,
        name: str = "session",
        subject: str = "",
        bin_size: float = 0.02,
        window: tuple[float, float] | None = None,
        behaviour: Mapping[str, ArrayLike] | None = None,
        neurons: Mapping[str, ArrayLike] | None = None,
        rates: np.ndarray | None = None,
        given_split: Sequence[ArrayLike] | None = None,
        trial_ids: ArrayLike | None = None,
        n_recorded: int | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.subject, self.bin_size = str(name), str(subject), float(bin_size)
        self.counts = self._check_counts(counts)
        self.n_trials, self.n_bins, self.n_neurons = trials, bins, units = self.counts.shape
        given = self._array("regions", [""] * units if regions is None else regions, (units,))
        labels = ["" if pd.isna(label) else label or "" for label in given.tolist()]
        labels = [label.decode() if isinstance(label, bytes) else label for label in labels]
        self.regions = np.array(labels, dtype=np.str_)
        self.window = self._check_window(window)
        self.behaviour: dict[str, np.ndarray] = {}
        for key, values in (behaviour or {}).items():
            shapes = ((trials,), (trials, bins))
            array = _plain(self._array(f"behaviour {key!r}", values, *shapes))
            words = array.dtype.kind == "U"
            if array.dtype.kind not in "uibfU" or (not words and np.isinf(array).any()):
                self._fail(f"behaviour {key!r}", "need finite numbers, or words; missing: NaN, ''")
            if words and array.ndim == 2:
                self._fail(f"behaviour {key!r}", "need numbers in bins; words are for whole trials")
            self.behaviour[key] = array
        self.neurons: dict[str, np.ndarray] = {}
        for key, values in ({} if neurons is None else neurons).items():
            self.neurons[key] = _plain(self._array(f"neurons {key!r}", values, (units,)))
        self.rates = None if rates is None else np.asarray(plain(rates), np.float32)
        if self.rates is not None:
            self._array("rates", self.rates, self.counts.shape)
            on_disk = isinstance(rates, MemoryMapped)  # checked before they were written
            if not on_disk and not (np.isfinite(self.rates) & (self.rates > 0)).all():
                self._fail("rates", "expected counts must be finite and above 0")
        self.given_split = None if given_split is None else self._check_split(given_split)
        self.n_recorded = trials if n_recorded is None else int(n_recorded)
        ids = np.arange(trials) if trial_ids is None else trial_ids
        self.trial_ids = self._array("trial_ids", ids, (trials,)).astype(np.int64)
        if len(np.intersect1d(self.trial_ids, np.arange(self.n_recorded))) < trials:
            problem = f"need {trials} different numbers below n_recorded={self.n_recorded}"
            self._fail("trial_ids", problem)
        self.provenance = provenance or {}

    # ------------------------------------------------------------------ checks

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise SessionError(f"session {self.name!r}, {field}: {problem}")

    def _check_counts(self, values: Any) -> np.ndarray:
        counts = plain(values)
        if isinstance(names := getattr(values, "dims", None), tuple):  # of h5py, it is no tuple
            names = [str(name).lower() for name in names]
            order = [
                [i for i, name in enumerate(names) if any(word in name for word in words)]
                for words in AXES
            ]
            if sorted(order) != [[0], [1], [2]]:
                self._fail("counts", f"axes {names} do not tell trials, time bins and neurons; "
                           "transpose to this order and pass .to_numpy()")  # fmt: skip
            counts = counts.transpose([axis for [axis] in order])
        if counts.ndim != 3 or 0 in counts.shape:
            self._fail("counts", f"need trials x bins x neurons, got shape {counts.shape}")
        if counts.dtype in (np.uint8, np.uint16):  # valid as they are; may be on disk
            return counts if isinstance(values, MemoryMapped) else counts.copy()
        if not (counts.min() >= 0 and counts.max() <= np.iinfo(np.uint16).max):  # NaN is neither
            self._fail("counts", f"must be 0 to 65535, got {counts.min()} to {counts.max()}")
        whole = counts.astype(np.uint8 if counts.max() < 256 else np.uint16)
        if not np.array_equal(whole, counts):
            self._fail("counts", "not whole numbers; pass spike counts, not rates or smoothed data")
        if counts.dtype.kind == "f" and np.count_nonzero(whole) >= 50:
            if (divisor := np.gcd.reduce(np.unique(whole))) > 1:
                self._warn("counts", f"all are multiples of {divisor}, as rates in Hz would be; "
                           "counts are spikes in a bin")  # fmt: skip
        return whole

    def _warn(self, field: str, problem: str) -> None:
        warnings.warn(f"session {self.name!r}, {field}: {problem}", stacklevel=4)

    def _check_window(self, window: tuple[float, float] | None) -> tuple[float, float]:
        if not self.bin_size > 0:
            self._fail("bin_size", f"need seconds above 0, got {self.bin_size}")
        if self.bin_size > 1:
            self._warn("bin_size", f"bins of {self.bin_size} s; it is in seconds, not milliseconds")
        length = self.n_bins * self.bin_size
        start, stop = (0.0, length) if window is None else map(float, window)
        if not abs(stop - start - length) < 1e-6 * max(1.0, length):
            problem = f"({start}, {stop}) s, but {self.n_bins} bins last {length:g} s"
            sizes, bins = self.counts.shape, round((stop - start) / self.bin_size)
            if bins in sizes:
                problem += (f"; axis {sizes.index(bins)} of counts {sizes} has {bins}: if it is "
                            "time, transpose to trials x bins x neurons")  # fmt: skip
            self._fail("window", problem)
        return start, stop

    def _array(self, field: str, values: Any, *shapes: tuple[int, ...]) -> np.ndarray:
        if isinstance(values, pd.Series) and not values.index.equals(pd.RangeIndex(len(values))):
            index = f"a Series with index {values.index[:3].tolist()}..., not 0, 1, 2, ..."
            self._fail(field, f"{index}; put it in the order of counts and pass .to_numpy()")
        array = plain(values)
        if array.shape not in shapes:
            needed, sizes = " or ".join(map(str, shapes)), self.counts.shape
            problem = f"need shape {needed}, got {array.shape}"
            self._fail(field, f"{problem}; counts {sizes} are trials x bins x neurons")
        return array

    def _check_split(self, split: Sequence[ArrayLike]) -> Split:
        masks = np.zeros((3, self.n_trials), dtype=int)  # one for each part
        for mask, part in zip(masks, map(np.asarray, split), strict=True):
            if part.dtype == bool and part.shape != mask.shape:
                self._fail("given_split", f"a mask of {part.shape}, not of {self.n_trials} trials")
            if part.dtype != bool and part.size and not 0 <= part.min() <= part.max() < len(mask):
                self._fail("given_split", f"trials outside 0..{self.n_trials - 1}")
            mask[part if part.dtype == bool else part.astype(np.int64)] = 1
        if masks.sum(axis=0).max() > 1:
            self._fail("given_split", "a trial is in two parts; keep them apart")
        return Split(*map(np.flatnonzero, masks))

    # ------------------------------------------------------------- what is in it

    @property
    def times(self) -> np.ndarray:
        """Start of each bin, (T,) seconds from the event the trials are aligned to."""
        return self.window[0] + self.bin_size * np.arange(self.n_bins)

    @property
    def firing_rates(self) -> np.ndarray:
        """Mean firing rate of each neuron over all trials and bins, (N,) Hz."""
        return self.counts.mean(axis=(0, 1), dtype=np.float64) / self.bin_size

    @property
    def region_names(self) -> list[str]:
        """The regions, sorted; labels that mean none are not among them."""
        return sorted({r for r in self.regions.tolist() if has_region(r)})

    @property
    def region_codes(self) -> np.ndarray:
        """Index of each neuron's region in :attr:`region_names`, (N,) int64; -1 = no region."""
        index = {region: code for code, region in enumerate(self.region_names)}
        return np.array([index.get(region, -1) for region in self.regions.tolist()], dtype=np.int64)

    def __repr__(self) -> str:
        rates, sizes = self.firing_rates, pd.Series(self.regions).value_counts()
        regions = ", ".join(f"{name} {sizes[name]}" for name in self.region_names)
        per = {"trial": "", "bin": ""}
        for key in sorted(self.behaviour):
            per["trial" if self.behaviour[key].ndim == 1 else "bin"] += f", {key}"
        lines = [
            f"Session {self.name!r}" + (f" of subject {self.subject}" if self.subject else ""),
            f"{self.n_trials} trials x {self.n_bins} bins x {self.n_neurons} neurons; "
            f"{1000 * self.bin_size:g} ms bins, {self.window[0]:g} to {self.window[1]:g} s",
            f"{len(self.region_names)} regions: {regions or 'none labelled'}",
            f"firing rates: mean {rates.mean():.1f} Hz, from {rates.min():.1f} to "
            f"{rates.max():.1f} Hz",
            *(f"behaviour per {unit}: {keys[2:]}" for unit, keys in per.items() if keys),
            *["true rates known (simulated)"] * (self.rates is not None),
        ]
        return "\n  ".join(textwrap.shorten(line, 200) for line in lines)

    # ------------------------------------------------------------ splits and selections

    def split(self, seed: int = 0) -> Split:
        """Split the trials at random into 70 % training, 10 % validation and 20 % test trials.

        The draw depends on the session's name and the seed alone, and is made among the trials of
        the whole recording, so that a selection of trials keeps each in its part. A recording that
        came with its own split keeps it.

        Raises:
            SessionError: when a part has no trials. (A given split may be without test trials.)
        """
        split = self.given_split
        if split is None:
            digest = hashlib.sha256(f"{self.name}|{seed}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            # Rank of each trial in a random order of all recorded trials (argsort inverts the
            # permutation): the first 20 % are test trials, the next 10 % validation trials.
            rank = np.argsort(generator.permutation(self.n_recorded))[self.trial_ids]
            n_test = max(1, round(0.2 * self.n_recorded))
            n_val = max(1, round(0.1 * self.n_recorded))
            part = np.digitize(rank, [n_test, n_test + n_val])  # 0 test, 1 validation, 2 training
            split = Split(*(np.flatnonzero(part == number) for number in (2, 1, 0)))
        for label, trials in split._asdict().items():
            if len(trials) == 0 and (label != "test" or self.given_split is None):
                problem = f"none of its {self.n_trials} trials is in {label}; keep more trials, or "
                self._fail("split", f"{problem}pass given_split=(train, val, test), their indices")
        return split

    def select(self, trials: ArrayLike | None = None, neurons: ArrayLike | None = None) -> Session:
        """Make a session of some trials and neurons (indices or masks).

        Each trial stays in its part of the split.
        """
        kept = np.arange(self.n_trials)[slice(None) if trials is None else np.asarray(trials)]
        units = np.arange(self.n_neurons)[slice(None) if neurons is None else np.asarray(neurons)]
        fields = ("name", "subject", "bin_size", "window", "n_recorded", "provenance")
        parts = self.given_split and [np.flatnonzero(np.isin(kept, p)) for p in self.given_split]
        return Session(
            self.counts[np.ix_(kept, np.arange(self.n_bins), units)],
            self.regions[units],
            behaviour={key: values[kept] for key, values in self.behaviour.items()},
            neurons={key: values[units] for key, values in self.neurons.items()},
            rates=None if self.rates is None else self.rates[kept][:, :, units],
            given_split=parts,
            trial_ids=self.trial_ids[kept],
            **{field: getattr(self, field) for field in fields},
        )

    def fingerprints(self, trials: np.ndarray) -> np.ndarray:
        """Hash the spikes of each of these trials, (K',) int64, whatever the session's name.

        0 = fewer than ten spikes, which could be another trial's by chance.
        """
        fingerprints = np.zeros(len(trials), dtype=np.int64)
        for i, trial in enumerate(trials):
            counts = self.counts[trial]
            if counts.sum(dtype=np.int64) >= 10:
                content = np.ascontiguousarray(counts, dtype="<u2").tobytes()
                digest = hashlib.blake2b(content, digest_size=8).digest()
                fingerprints[i] = int.from_bytes(digest, "little", signed=True)
        return fingerprints

    # ------------------------------------------------------------ from spike times

    @classmethod
    def from_spike_times(
        cls,
        spike_times: ArrayLike,
        spike_clusters: ArrayLike,
        align_times: ArrayLike,
        *,
        clusters: ArrayLike | None = None,
        regions: Sequence[str | None] | Mapping[Any, str] | np.ndarray | None = None,
        window: tuple[float, float] = (-0.5, 1.5),
        bin_size: float = 0.02,
        traces: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
        behaviour: Mapping[str, ArrayLike] | None = None,
        neurons: Mapping[str, ArrayLike] | None = None,
        name: str = "session",
        **fields: Any,
    ) -> Self:
        """Bin spike times around events.

        Args:
            spike_times: (S,) seconds.
            spike_clusters: (S,) the id of the neuron that fired.
            align_times: (K,) seconds; the event of each trial, where the window's 0 lies.
            clusters: (N,) the ids, in the order of the neuron axis, silent ones included. Default:
                0..N-1 where ``regions`` lists N labels, the index of a Series of labels, else every
                id that fired.
            regions: label of each cluster: (N,) in that order, or a mapping from id to label.
            window: (start, stop) around each event, seconds; a whole number of bins.
            bin_size: seconds.
            traces: continuous behaviour, averaged within each bin: name -> (sample times (S',) in
                seconds, values (S',)).
            behaviour, neurons, name, fields: as in :class:`Session`. A Series with the cluster ids
                (or with the rows of ``align_times``) in its index is taken by index.

        Raises:
            SessionError: naming what is wrong, also where times seem to be in other units, two
                trials are at the same time, or a Series cannot be put in order.

        Warns:
            UserWarning: for windows that overlap, trials outside the recording, and traces without
                a value.
        """
        try:
            ids = _cluster_ids(plain(spike_clusters), clusters, regions)
            labels = _labels(regions, clusters, ids)
            trials = _columns("behaviour", behaviour, align_times)
            table = {"cluster": ids} | _columns("neurons", neurons, clusters, ids)
            if both := trials.keys() & (traces or {}).keys():
                raise ValueError(f"{min(both)}: a behaviour has the same name")
        except ValueError as error:
            raise SessionError(f"session {name!r}, {error}") from error
        grid: dict[str, Any] = {"window": window, "bin_size": bin_size}
        recorded = spike_times, spike_clusters, align_times
        split_given = fields.get("given_split") is not None
        counts, binned = _bin(name, *recorded, ids, traces or {}, split_given, **grid)
        trials |= binned
        return cls(counts, labels, name, behaviour=trials, neurons=table, **grid, **fields)

    @classmethod
    def from_spike_trains(
        cls, trains: Sequence[ArrayLike] | Mapping[Any, ArrayLike], align_times: ArrayLike,
        *, name: str = "session", bin_size: float = 0.02, **fields: Any,
    ) -> Self:  # fmt: skip
        """Bin one array of spike times (seconds) for each neuron, as :meth:`from_spike_times`.

        ``trains`` is a list, or a mapping or Series from cluster id to times.
        """
        named: Any = trains if isinstance(trains, Mapping | pd.Series) else enumerate(trains)
        pairs: dict[Any, Any] = dict(named)
        try:
            times = [seconds("spike_times", train, bin_size) for train in pairs.values()]
        except ValueError as error:
            raise SessionError(f"session {name!r}, spikes: {error}") from error
        fields |= {"clusters": np.array(list(pairs)), "name": name, "bin_size": bin_size}
        spikes = np.concatenate(times), np.repeat(fields["clusters"], [len(t) for t in times])
        return cls.from_spike_times(*spikes, align_times, **fields)

    # ------------------------------------------------------------ files

    def save(self, path: str | Path) -> Path:
        """Write the session to one uncompressed ``.npz``, atomically; returns the path."""
        fields = ("name", "subject", "bin_size", "window", "n_recorded", "provenance")
        description = {"format": FORMAT, **{field: getattr(self, field) for field in fields}}
        description |= {"shape": self.counts.shape, "firing_rates": self.firing_rates.tolist()}
        arrays = {"regions": self.regions, "trial_ids": self.trial_ids}
        arrays |= {f"behaviour/{key}": value for key, value in self.behaviour.items()}
        arrays |= {f"neurons/{key}": value for key, value in self.neurons.items()}
        if self.given_split is not None:
            arrays |= {f"split/{key}": part for key, part in self.given_split._asdict().items()}
        if self.rates is not None:
            arrays["rates"] = self.rates
        return write_arrays(path, description, arrays | {"counts": self.counts})

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False) -> Self:
        """Read a session that :meth:`save` wrote.

        Args:
            path: the file.
            mmap: leave counts and true rates on disk, and read what is used when it is used.

        Raises:
            SessionError: when the file is damaged, or not a session of this package.
        """
        description, arrays = read_session_file(path, mmap=("counts", "rates") if mmap else ())
        fields: dict[str, Any] = {k: v for k, v in description.items() if k not in LISTED}
        fields |= {"behaviour": {}, "neurons": {}, "split": {}}
        for key, array in arrays.items():
            group, _, column = key.partition("/")  # as in "behaviour/choice"
            (fields[group] if column else fields)[column or key] = array
        split = fields.pop("split")
        return cls(**fields, given_split=Split(**split) if split else None)


def read_session_file(
    path: str | Path, **options: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Description and arrays of a session file; ``options``: see :func:`mtm.files.read_arrays`."""
    try:
        description, arrays = read_arrays(path, **options)
    except ValueError as error:
        raise SessionError(f"{error}; Session.save writes session files") from error
    if description.get("format") != FORMAT:
        raise SessionError(f"{path} is no session file of this version; make it again")
    return description, arrays


def _plain(array: np.ndarray) -> np.ndarray:
    """Numbers or words instead of Python objects and bytes; a missing word is ''."""
    if array.dtype.kind not in "OST":
        return array
    values = [v.decode() if isinstance(v, bytes) else v for v in array.ravel().tolist()]
    column = pd.Series(values, dtype=object).convert_dtypes()
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy(np.float64, na_value=np.nan).reshape(array.shape)
    return column.astype(object).fillna("").to_numpy().astype(np.str_).reshape(array.shape)


def has_region(label: str) -> bool:
    """Return whether a label names a region, and is not one of :data:`UNLABELLED`."""
    return label.lower() not in UNLABELLED


def require_alike(sessions: Sequence[Session]) -> None:
    """Check that sessions for one model differ in name and are binned alike.

    Raises:
        SessionError: naming what differs, or the name that two of them have.
    """
    names, first = [session.name for session in sessions], sessions[0]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise SessionError(f"two sessions are named {min(repeated)!r}; names must differ")
    for session in sessions:
        for field in ("n_bins", "bin_size", "window"):
            one, other = getattr(first, field), getattr(session, field)
            if not np.allclose(one, other):
                raise SessionError(
                    f"sessions must have the same {field}, got {one} in {first.name!r} and "
                    f"{other} in {session.name!r}; bin them alike"
                )


def _bin(
    name: str,
    spike_times: Any,
    spike_clusters: Any,
    align_times: Any,
    ids: np.ndarray,
    traces: Mapping[str, tuple[Any, Any]],
    split_given: bool,
    **grid: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Counts (K, T, N) and binned traces, with checks of the times."""
    binned, field = {}, "spikes"
    try:
        places = cluster_places(spike_clusters, ids)
        counts = bin_spikes(spike_times, places, align_times, n_neurons=len(ids), **grid)
        if not counts.any():
            raise ValueError("none falls into any trial's window; are both on one clock, in s?")
        field, rates = "times", counts.mean(axis=(0, 1), dtype=np.float64) / grid["bin_size"]
        spikes = seconds("spike_times", spike_times, grid["bin_size"])
        events = seconds("align_times", align_times, grid["bin_size"])
        fires = np.bincount(places, minlength=len(ids)) > 0
        _check_times(spikes, events, grid["window"], rates[fires])
        for field, (times, values) in traces.items():
            binned[field] = bin_trace(times, values, align_times, **grid)
    except ValueError as error:
        raise SessionError(f"session {name!r}, {field}: {error}") from error
    doubts = _doubts(spikes, events, grid["window"], split_given)
    doubts += [f"trace {key!r}: {NO_SAMPLES}" for key in traces if np.isnan(binned[key]).all()]
    for doubt in doubts:
        warnings.warn(f"session {name!r}, {doubt}", stacklevel=3)
    return counts, binned


def _cluster_ids(fired: np.ndarray, clusters: Any, regions: Any) -> np.ndarray:
    """The ids of the neuron axis, (N,), where ``clusters`` may not say."""
    if clusters is not None:
        return plain(clusters)
    found = np.unique(fired[~pd.isna(fired)])
    if regions is None or isinstance(regions, Mapping):
        return found
    ids = regions.index.to_numpy() if isinstance(regions, pd.Series) else np.arange(len(regions))
    # Without id 0, ids may as well start at 1, and all labels be one place off.
    if found.size and np.array_equal(ids, np.arange(len(ids))):
        if not (found[0] == 0 and found[-1] < len(ids)):
            raise ValueError(
                f"clusters: spikes have ids {found[0]} to {found[-1]}, and nothing tells which of "
                f"the {len(ids)} regions are theirs; pass clusters=, the id of each region"
            )
    return ids


def _labels(regions: Any, clusters: Any, ids: np.ndarray) -> Any:
    """Labels of the clusters ``ids``, (N,), where they come as a mapping or a Series."""
    if not isinstance(regions, Mapping):
        return _in_order("regions", regions, clusters, ids)
    if regions and not set(regions) & set(ids.tolist()):
        keys = f"{list(regions)[:1]} against {ids[:1].tolist()}"
        raise ValueError(f"regions: no key is a cluster id: {keys}")
    return [regions.get(cluster, "") for cluster in ids.tolist()]


def _columns(kind: str, table: Any, rows: Any, ids: np.ndarray | None = None) -> dict[str, Any]:
    """The columns of a mapping or DataFrame, each `_in_order`."""
    items = () if table is None else table.items()
    return {key: _in_order(f"{kind} {key!r}", values, rows, ids) for key, values in items}


def _in_order(field: str, values: Any, rows: Any, ids: np.ndarray | None = None) -> Any:
    """A Series in the order of ``ids``, by its index; anything else as it is.

    Args:
        field: what it is, for errors.
        values: one for each neuron or trial.
        rows: the column that sets the order; a Series with the same index is of the same table.
        ids: of the neurons, in order. Default: the index of ``rows``, if they are a Series.
    """
    index = rows.index if isinstance(rows, pd.Series) else None
    if not isinstance(values, pd.Series) or (ids is None and index is None):
        return values
    if index is not None and values.index.equals(index):
        return values.to_numpy()
    order = pd.Index(index if ids is None else ids)
    known, numbered = order.isin(values.index).all(), values.index.equals(pd.RangeIndex(len(order)))
    if numbered and not known:  # no ids in the index: by place
        return values.to_numpy()
    if known and (not numbered or values.index.equals(order)):
        return values.reindex(order).to_numpy()
    raise ValueError(
        f"{field}: a Series with index {values.index[:3].tolist()}... for {order[:3].tolist()}...; "
        "set these ids as its index, or pass .to_numpy() if it is in their order"
    )


NO_SAMPLES = (
    "NaN in every bin; its times must be seconds on the clock of the events, and samples at most "
    "0.2 s apart (interpolate a slower trace first)"
)


def _check_times(
    spikes: np.ndarray, events: np.ndarray, window: tuple[float, float], rates: np.ndarray
) -> None:
    """Refuse times that are no seconds, and trials that are there twice.

    Args:
        spikes, events: (S,) and (K,) times.
        window: of a trial.
        rates: in the windows, of each neuron that fires at all.
    """
    rate, times = float(np.median(rates)), np.concatenate([spikes, events])
    share = len(events) * (window[1] - window[0]) / np.ptp(times) if np.ptp(times) else 1.0
    if rate < LOWEST_RATE and share < LOWEST_SHARE:
        raise ValueError(
            f"the median neuron fires {rate:.2g} times a second, in windows that cover {share:.2%} "
            f"of {np.ptp(times):.3g} s; convert spike_times and align_times to seconds (from ms, "
            "divide by 1000; from samples, by the sampling rate)"
        )
    if (again := pd.Index(events).duplicated()).any():
        trials = np.flatnonzero(again)[:5].tolist()
        raise ValueError(f"trials {trials} are at the time of an earlier one; drop duplicate rows")


def _doubts(
    spikes: np.ndarray, events: np.ndarray, window: tuple[float, float], split_given: bool
) -> list[str]:
    """What is odd about the times, and about events that do not suit a split."""
    events, length, doubts = np.sort(events), window[1] - window[0], []
    if length > 100:
        doubts.append(f"trials of {length:g} s; window is in seconds, not milliseconds")
    spans = np.ptp(spikes), np.ptp(events)
    if len(events) >= 10 and max(spans) > 300 * min(spans) > 0:
        doubts.append(
            f"spikes span {spans[0]:.3g} s and events {spans[1]:.3g} s; both must be in "
            "seconds, on the same clock"
        )
    overlap = np.maximum(length - np.diff(events), 0).sum() / (length * len(events))
    if overlap > 0.1 and not split_given:
        doubts.append(
            f"{overlap:.0%} of the windows' time lies in the next window too, so a random "
            "split tests on what it trains on; take events further apart, or pass given_split"
        )
    outside = (events + window[1] < spikes.min()) | (events + window[0] > spikes.max())
    if 0.05 < outside.mean() < 1:
        doubts.append(
            f"{outside.sum()} of {len(events)} trials lie before the first or after the last "
            "spike; leave them out, or add the trial's start to spike times that count from it"
        )
    return [f"align_times: {doubt}" for doubt in doubts]
