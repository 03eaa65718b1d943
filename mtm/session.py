"""One recording, cut into trials, binned, and checked once, so that all other code can trust it."""

from __future__ import annotations

import hashlib
import itertools
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from mtm import inputs
from mtm.binning import bin_spikes, bin_trace
from mtm.files import MemoryMapped, read_arrays, write_arrays
from mtm.inputs import SessionError, checked_array, checked_columns, errors_of

FORMAT = "mtm-session 3"
PLAIN = ("name", "subject", "bin_size", "window", "n_recorded", "provenance")  # not arrays
LISTED = ("format", "shape", "firing_rates")  # for `Sessions`, which reads no counts
UNLABELLED = "|not available|root|void|nan|none|unknown|null|unassigned|n/a|na|tbd|?|-".split("|")
"""Labels (any case) that mean "no region": such neurons are kept, but never form a region."""


class Split(NamedTuple):
    """Indices of the training, validation and test trials, each sorted."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


class Session:
    """One recording, binned. All arguments are attributes.

    Args:
        counts: spikes, (K, T, N) trials x time bins x neurons, which are copied.
        regions: label of each neuron, (N,); one of :data:`UNLABELLED`, or None, = no region.
        name: the session's key, unique among the sessions of a model (an eid, for IBL data).
        subject: the animal.
        bin_size: seconds.
        window: (start, stop) of a trial around its event, seconds. Default: from 0.
        behaviour: name -> a number, boolean or word for each trial (K,), or a number for each bin
            (K, T). NaN, None, "" or masked = missing.
        neurons: table of neurons: column name -> (N,) numbers or words.
        rates: expected count in each bin, (K, T, N); known for simulated recordings only.
        observed: (K, N) bool, False where a neuron was not recorded in a trial. Models do not see
            these entries, nothing scores them, and their counts are set to 0. Default: all were.
        given_split: (train, val, test) trials, where the recording comes with a split of its own.
        trial_ids: (K,) place of each trial among the ``n_recorded`` trials of the whole recording,
            which splits are drawn among. Default: these are all trials, in order.
        provenance: where the recording comes from; anything that JSON can hold.

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
        observed: ArrayLike | None = None,
        given_split: Sequence[ArrayLike] | None = None,
        trial_ids: ArrayLike | None = None,
        n_recorded: int | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.subject, self.bin_size = str(name), str(subject), float(bin_size)
        who, self.provenance = f"session {self.name!r},", provenance or {}
        with errors_of(who):
            self.counts = inputs.check_counts(who, counts)
            self.n_trials, self.n_bins, self.n_neurons = trials, bins, units = self.counts.shape
            labels = [""] * units if regions is None else regions
            self.regions = checked_array("regions", labels, (units,)).astype(np.str_)
            self.behaviour = checked_columns("behaviour", behaviour, (trials,), (trials, bins))
            self.neurons = checked_columns("neurons", neurons, (units,))
            self.rates = self.observed = None
            if rates is not None:
                self.rates = np.asarray(checked_array("rates", rates, self.counts.shape), "f4")
            if observed is not None:
                self.observed = checked_array("observed", observed, (trials, units))
                if self.observed.dtype != bool:
                    raise ValueError("observed: need True or False for each trial and neuron")
                if not isinstance(counts, MemoryMapped):  # else it was done before saving
                    self.counts *= self.observed[:, None]
            parts = None if given_split is None else inputs.checked_parts(given_split, trials)
            self.given_split = None if parts is None else Split(*parts)
            self.n_recorded = trials if n_recorded is None else int(n_recorded)
            ids = np.arange(trials) if trial_ids is None else trial_ids
            self.trial_ids = inputs.checked_ids(ids, trials, self.n_recorded)
            if not self.bin_size > 0:
                raise ValueError(f"bin_size: need seconds above 0, got {self.bin_size}")
            length = bins * self.bin_size
            start, stop = (0.0, length) if window is None else map(float, window)
            if not abs(stop - start - length) < 1e-6 * max(1.0, length):
                problem = f"window: ({start}, {stop}) s, but {bins} bins last {length:g} s"
                raise ValueError(f"{problem}; counts are trials x bins x neurons")
            self.window = start, stop
        if self.bin_size > 1:
            doubt = f"bins of {self.bin_size} s; it is in seconds, not milliseconds"
            warnings.warn(f"{who} bin_size: {doubt}", stacklevel=2)

    @property
    def times(self) -> np.ndarray:
        """Start of each bin, (T,) seconds from the event the trials are aligned to."""
        return self.window[0] + self.bin_size * np.arange(self.n_bins)

    @property
    def firing_rates(self) -> np.ndarray:
        """Mean firing rate of each neuron over all trials and bins it was observed in, (N,) Hz."""
        n = self.n_trials if self.observed is None else np.maximum(self.observed.sum(axis=0), 1)
        return self.counts.sum(axis=(0, 1), dtype=np.int64) / (n * self.n_bins * self.bin_size)

    @property
    def region_names(self) -> list[str]:
        """The regions, sorted; labels that mean none are not among them."""
        return sorted(filter(has_region, set(self.regions.tolist())))

    @property
    def region_codes(self) -> np.ndarray:
        """Index of each neuron's region in :attr:`region_names`, (N,) int64; -1 = no region."""
        return pd.Index(self.region_names).get_indexer(self.regions).astype(np.int64)

    def __repr__(self) -> str:
        hz, labels = self.firing_rates, self.regions.tolist()
        regions = ", ".join(f"{name} {labels.count(name)}" for name in self.region_names)
        lines = [
            f"Session {self.name!r}" + f" of subject {self.subject}" * bool(self.subject),
            f"{self.n_trials} trials x {self.n_bins} bins x {self.n_neurons} neurons; "
            f"{1000 * self.bin_size:g} ms bins, {self.window[0]:g} to {self.window[1]:g} s",
            f"{len(self.region_names)} regions: {regions or 'none labelled'}",
            f"firing rates: mean {hz.mean():.1f} Hz, from {hz.min():.1f} to {hz.max():.1f} Hz",
        ]
        for n, unit in enumerate(["trial", "bin"], start=1):
            keys = [key for key, array in sorted(self.behaviour.items()) if array.ndim == n]
            lines += [f"behaviour per {unit}: {', '.join(keys)}"] * bool(keys)
        if self.observed is not None:
            lines += [f"{(~self.observed).any(axis=0).sum()} neurons not observed in all trials"]
        lines += ["true rates known (simulated)"] * (self.rates is not None)
        return "\n  ".join(textwrap.shorten(line, 200) for line in lines)

    def split(self, seed: int = 0) -> Split:
        """Split the trials at random into 70 % training, 10 % validation and 20 % test trials.

        The draw depends on the session's name, the seed and the number of recorded trials alone: a
        selection keeps each trial in its part. A given split is kept, and may have no test trials.
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
                problem = f"split: none of its {self.n_trials} trials is in {label}"
                remedy = "keep more trials, or pass given_split=(train, val, test), their indices"
                raise SessionError(f"session {self.name!r}, {problem}; {remedy}")
        return split

    def select(self, trials: ArrayLike | None = None, neurons: ArrayLike | None = None) -> Session:
        """Make a session of some trials and neurons (indices or masks), split as before."""
        kept = np.arange(self.n_trials)[slice(None) if trials is None else np.asarray(trials)]
        units = np.arange(self.n_neurons)[slice(None) if neurons is None else np.asarray(neurons)]
        parts = self.given_split and [np.flatnonzero(np.isin(kept, p)) for p in self.given_split]
        return Session(
            self.counts[np.ix_(kept, np.arange(self.n_bins), units)],
            self.regions[units],
            behaviour={key: inputs.plain(x)[kept] for key, x in self.behaviour.items()},
            neurons={key: values[units] for key, values in self.neurons.items()},
            rates=None if self.rates is None else self.rates[kept][:, :, units],
            observed=None if self.observed is None else self.observed[np.ix_(kept, units)],
            given_split=parts,
            trial_ids=self.trial_ids[kept],
            **{field: getattr(self, field) for field in PLAIN},
        )

    def filled(self, trials: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
        """Counts (K', T, N) of some trials, with a mean where a neuron was not observed.

        The mean is that of the same bin in the trials ``among`` (default: these) in which the
        neuron was observed, so it changes no neuron's mean; 0 if there is none.
        """
        if self.observed is None:
            return self.counts[trials]
        among = trials if among is None else among
        n_known = np.maximum(self.observed[among].sum(axis=0), 1)
        mean = (self.counts[among].sum(axis=0) / n_known).astype(np.float32)
        return np.where(self.observed[trials][:, None], self.counts[trials], mean)

    def fingerprints(self, trials: np.ndarray) -> np.ndarray:
        """Hash the spikes of each of these trials, (K',) int64, whatever the session's name.

        0 = fewer than ten spikes, which could be another trial's by chance.
        """
        fingerprints = np.zeros(len(trials), dtype=np.int64)
        for i, trial in enumerate(trials):
            counts = np.ascontiguousarray(self.counts[trial], dtype="<u2")
            if counts.sum(dtype=np.int64) >= 10:
                digest = hashlib.blake2b(counts.tobytes(), digest_size=8).digest()
                fingerprints[i] = int.from_bytes(digest, "little", signed=True)
        return fingerprints

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
            spike_times, spike_clusters: (S,) seconds, and the id of the neuron that fired.
            align_times: (K,) seconds; the event of each trial, where the window's 0 lies.
            clusters: (N,) the ids in the order of the neuron axis, silent ones included. Default:
                0..N-1 for a list of ``regions``, the index of a Series, else all that fired.
            regions: label of each cluster: (N,) in that order, or a mapping from id to label.
            traces: name -> (sample times (S',) in seconds, values (S',)), averaged in each bin.
            others: as in :class:`Session`. A Series whose index has the cluster ids (or
                is that of ``align_times``) is aligned by its index.

        Raises:
            SessionError: also where times seem to be in other units, or trials are there twice.
        """
        grid: dict[str, Any] = {"window": window, "bin_size": bin_size}
        who = f"session {name!r},"
        with errors_of(who):
            ids, labels = inputs.clusters_of(spike_clusters, clusters, regions)
            table = {"cluster": ids} | checked_columns("neurons", neurons, ids=ids, rows=clusters)
            trials = checked_columns("behaviour", behaviour, rows=align_times)
            with errors_of("spikes:"):
                spikes = inputs.seconds("spike_times", spike_times, bin_size)
                events = inputs.seconds("align_times", align_times, bin_size)
                places = inputs.cluster_places(spike_clusters, ids)
                counts = bin_spikes(spikes, places, events, n_neurons=len(ids), **grid)
                if not counts.any():
                    problem = "none falls into any trial's window"
                    raise ValueError(f"{problem}; are both on one clock, in s?")
            random_split = fields.get("given_split") is None
            inputs.check_times(who, (spikes, events), counts, places, random_split, grid)
            if both := set(traces or {}) & set(trials):
                raise ValueError(f"{min(both)!r} is in traces and in behaviour; rename one")
            for key, (times, values) in (traces or {}).items():
                with errors_of(f"{key}:"):
                    trials[key] = bin_trace(times, values, align_times, **grid)
                if np.isnan(trials[key]).all():
                    doubt = "NaN in every bin; its times must be seconds on the clock of the events"
                    doubt += ", samples at most 0.2 s apart (interpolate a slower trace first)"
                    warnings.warn(f"{who} trace {key!r}: {doubt}", stacklevel=2)
        return cls(counts, labels, name, behaviour=trials, neurons=table, **grid, **fields)

    @classmethod
    def from_spike_trains(
        cls, trains: Sequence[ArrayLike] | Mapping[Any, ArrayLike], align_times: ArrayLike,
        *, name: str = "session", bin_size: float = 0.02, **fields: Any,
    ) -> Self:  # fmt: skip
        """Bin one array of spike times (seconds) for each neuron, in a list or by cluster id.

        With a list, ``clusters`` are its ids. Others: as :meth:`from_spike_times`.
        """
        clusters = fields.pop("clusters", None)
        with errors_of(f"session {name!r}, spikes:"):
            keyed = isinstance(trains, Mapping | pd.Series)
            named: Any = trains if keyed else pd.Series(list(trains), clusters, dtype=object)
            times = [inputs.seconds("spike_times", train, bin_size) for _, train in named.items()]
        ids = np.array(list(named.keys()))
        spikes = np.concatenate(times), np.repeat(ids, list(map(len, times)))
        fields |= {"clusters": ids if clusters is None else clusters, "name": name}
        return cls.from_spike_times(*spikes, align_times, bin_size=bin_size, **fields)

    def save(self, path: str | Path) -> Path:
        """Write the session to one uncompressed ``.npz``, atomically; returns the path."""
        description = {"format": FORMAT, **{field: getattr(self, field) for field in PLAIN}}
        description |= {"shape": self.counts.shape, "firing_rates": self.firing_rates.tolist()}
        names = ("regions", "trial_ids", "counts", "rates", "observed")
        arrays = {key: array for key in names if (array := getattr(self, key)) is not None}
        split = self.given_split._asdict() if self.given_split else {}
        groups = {"behaviour": self.behaviour, "neurons": self.neurons, "split": split}
        for group, table in groups.items():
            arrays |= {f"{group}/{key}": values for key, values in table.items()}
        return write_arrays(path, description, arrays)

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False) -> Self:
        """Read a session that :meth:`save` wrote; with ``mmap``, counts and rates stay on disk."""
        description, arrays = read_session_file(path, mmap=("counts", "rates") if mmap else ())
        fields: dict[str, Any] = {k: v for k, v in description.items() if k not in LISTED}
        fields |= {"behaviour": {}, "neurons": {}, "split": {}}
        for key, values in arrays.items():
            group, _, column = key.partition("/")  # as in "behaviour/choice"
            (fields[group] if column else fields)[column or key] = values
        split = fields.pop("split")
        return cls(**fields, given_split=Split(**split) if split else None)


def read_session_file(
    path: str | Path, **options: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Description and arrays of a session file; ``options``: see :func:`mtm.files.read_arrays`."""
    with errors_of(""):
        description, arrays = read_arrays(path, **options)
        if description.get("format") != FORMAT:
            raise ValueError(f"{path} is no session file of this version; make it again")
    return description, arrays


def has_region(label: str) -> bool:
    """Return whether a label names a region, and is not one of :data:`UNLABELLED`."""
    return label.lower() not in UNLABELLED


def require_alike(sessions: Sequence[Session]) -> None:
    """Raise SessionError unless sessions for one model differ in name and are binned alike."""
    names, first = [session.name for session in sessions], sessions[0]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise SessionError(f"two sessions are named {min(repeated)!r}; names must differ")
    for session, field in itertools.product(sessions, ("n_bins", "bin_size", "window")):
        one, other = getattr(first, field), getattr(session, field)
        if not np.allclose(one, other):
            found = f"got {one} in {first.name!r} and {other} in {session.name!r}"
            raise SessionError(f"sessions must have the same {field}, {found}; bin them alike")
