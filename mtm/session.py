"""One recording, cut into trials and binned: the object that everything else takes.

A :class:`Session` holds spike counts ``(K, T, N)`` (trials, time bins, neurons), a region label for
each neuron, and whatever behaviour goes with the trials. It is checked once, when it is made, so
that the code after it can trust it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import math
import os
import re
import struct
import textwrap
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from mtm.binning import bin_spikes, bin_trace, cluster_ids, places_of
from mtm.checks import is_number

FORMAT = "mtm-session"
FORMAT_VERSION = 2
UNLABELLED = ("", "root", "void", "nan", "none", "unknown")
"""Labels (any case) that say "no region": such neurons are kept, but never form a region."""


LONE = re.compile("[\ud800-\udfff]")  # halves of characters, which no file can hold
UNFIT = re.compile("[\ud800-\udfff\0\\\\]|[.]npy$|.{200}")  # for the name of an array in a file
MOST_TRIALS = 10_000_000  # of a recording; splits are drawn among all
ENOUGH = 50  # spikes that cannot all fall two by two, three by three, ... by chance
LONGEST_WINDOW = 100.0  # s, before one asks whether it was meant so
OTHER_UNIT = 300.0  # times as long a span of spikes as of events, or the reverse: ms and s
FEW_EVENTS = 10  # whose span says nothing of its unit
MOST_SHARED = 0.1  # of the windows' time, before a random split is called into question


def has_region(label: str) -> bool:
    """Whether a label is that of a region, and not one of :data:`UNLABELLED`."""
    return label.lower() not in UNLABELLED


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file as a whole or not at all.

    Yields a temporary path beside ``path``, which replaces ``path`` at the end of the context.
    Folders are created. If writing fails, what was at ``path`` stays.

    Raises:
        OSError: for a full disk, naming the file and the remedy.
    """
    path = Path(path)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # before the move, or a power cut could leave an empty file
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        problem = f"{os.strerror(error.errno)}; free some space there, or write to another place"
        raise OSError(error.errno, problem, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def optional(module: str, extra: str) -> ModuleType:
    """Import a module that an optional extra of this package installs.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the module is there, and lacks something itself
        raise ImportError(f'{module} is missing: pip install "mtm-neural[{extra}]"') from error


class SessionError(ValueError):
    """A recording that cannot be used as it is; the message names session, field and remedy."""


class VersionError(SessionError):
    """A session file of another version of this package."""


class Split(NamedTuple):
    """Trial indices of the three parts of a session, each sorted."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(eq=False, repr=False, init=False)
class Session:
    """One recording, binned.

    Args:
        counts: spike counts, (K, T, N) trials x time bins x neurons; whole numbers from 0.
        regions: brain region of each neuron, (N,) strings. ``None`` and :data:`UNLABELLED`, such
            as ``""`` and ``"root"``, say "not labelled": those neurons are used, but never form a
            region.
        name: the session's key, unique among the sessions of a model (an eid, for IBL data).
        subject: the animal.
        bin_size: width of a time bin, seconds.
        window: (start, stop) of the trial around the event it is aligned to, seconds. Default:
            starts at 0.
        behaviour: name -> one number a trial (K,), or one a bin (K, T). NaN = missing.
        neurons: per-neuron table: column name -> (N,) numbers or strings.
        rates: expected count of each bin, (K, T, N); only simulated recordings know it.
        given_split: trials of each part, where the recording comes with a split of its own.
        trial_ids: (K,) place of each trial among the ``n_recorded`` trials of the whole recording,
            where these are a selection of them. Splits go by it, so that a test trial of the
            recording is a test trial of every selection. Default: these are all, in order.
        n_recorded: number of trials of the whole recording; default K.
        provenance: where the recording comes from; anything that JSON can hold.

    Raises:
        SessionError: naming the session, the field and the remedy.
    """

    counts: np.ndarray
    regions: np.ndarray
    name: str
    subject: str
    bin_size: float
    window: tuple[float, float]
    behaviour: dict[str, np.ndarray]
    neurons: dict[str, np.ndarray]
    rates: np.ndarray | None
    given_split: Split | None
    trial_ids: np.ndarray
    n_recorded: int
    provenance: dict[str, Any]

    # Written out, since more can be given than what there is afterwards: a list, or nothing.
    def __init__(
        self,
        counts: np.ndarray,
        regions: Sequence[str | None] | np.ndarray | None = None,
        name: str = "session",
        subject: str = "",
        bin_size: float = 0.02,
        window: tuple[float, float] | None = None,
        behaviour: Mapping[str, np.ndarray] | None = None,
        neurons: Mapping[str, np.ndarray] | None = None,
        rates: np.ndarray | None = None,
        given_split: Split | None = None,
        trial_ids: np.ndarray | None = None,
        n_recorded: int | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(name, str) or not name or LONE.search(name):
            raise SessionError(f"session name must be a non-empty string, got {name!r}")
        if not isinstance(subject, str) or LONE.search(subject):
            raise SessionError(f"session {name!r}, subject: need a string, got {subject!r}")
        self.name, self.subject, self.bin_size = name, subject, bin_size
        self.counts = self._check_counts(counts)
        self.regions = self._check_regions(regions)
        self.window = self._check_window(window)
        self.behaviour = {k: self._check_behaviour(k, v) for k, v in (behaviour or {}).items()}
        self.neurons = {k: self._check_column(k, v) for k, v in (neurons or {}).items()}
        self.rates = self._check_rates(rates)
        self.given_split = self._check_split(given_split)
        self.trial_ids, self.n_recorded = self._check_trial_ids(trial_ids, n_recorded)
        self.provenance = {} if provenance is None else provenance
        try:
            json.dumps({**self.provenance})
        except (TypeError, ValueError, RecursionError) as error:
            self._fail("provenance", f"{error}; keep numbers, strings, lists and dicts only")

    # ------------------------------------------------------------------ checks

    def _fail(self, what: str, problem: str) -> NoReturn:
        raise SessionError(f"session {self.name!r}, {what}: {problem}")

    def _check_counts(self, counts: Any) -> np.ndarray:
        counts = self._array("counts", counts)
        if counts.ndim != 3:
            self._fail("counts", f"need (trials, bins, neurons), got shape {counts.shape}")
        if 0 in counts.shape:
            empty = ("trials", "bins", "neurons")[counts.shape.index(0)]
            self._fail("counts", f"no {empty} in it (shape {counts.shape})")
        if counts.dtype.kind not in "uibf":
            self._fail("counts", f"need numbers, got dtype {counts.dtype}")
        if counts.dtype in (np.uint8, np.uint16):  # always valid; those on disk are not read
            return counts
        if counts.dtype.kind == "f" and not np.isfinite(counts).all():
            self._fail("counts", "NaN or infinite entries; remove or mend those trials first")
        if counts.min() < 0:
            self._fail("counts", f"negative counts (smallest {counts.min()})")
        if counts.max().item() > np.iinfo(np.uint16).max:  # float16 does not hold it
            self._fail("counts", f"largest count {counts.max()} is above 65535")
        whole = counts.astype(np.uint8 if counts.max() < 256 else np.uint16)
        if counts.dtype.kind == "f" and not np.array_equal(whole, counts):
            self._fail("counts", "not whole numbers; pass spike counts, not rates or smoothed data")
        if counts.dtype.kind == "f" and np.count_nonzero(whole) >= ENOUGH:
            divisor = np.gcd.reduce(np.flatnonzero(np.bincount(whole.ravel())))
            if divisor > 1:
                warnings.warn(
                    f"session {self.name!r}, counts: all are multiples of {divisor}, as where "
                    "rates in Hz are passed; counts are spikes in a bin",
                    stacklevel=4,
                )
        return whole

    def _check_regions(self, regions: Any) -> np.ndarray:
        if regions is None:
            return np.full(self.n_neurons, "", dtype="<U1")
        regions = self._array("regions", regions)
        if regions.shape != (self.n_neurons,):
            self._fail(
                "regions",
                f"need one label for each of the {self.n_neurons} neurons, the last axis of counts "
                f"{self.counts.shape}, got shape {regions.shape}; use '' for neurons without one",
            )
        labels = [r.decode(errors="replace") if isinstance(r, bytes) else r for r in regions]
        return np.array(["" if r is None else str(r) for r in labels], dtype=np.str_)

    def _check_window(self, window: Any) -> tuple[float, float]:
        if not (is_number(self.bin_size) and 0 < self.bin_size < 1e9):
            self._fail("bin_size", f"need seconds above 0, got {self.bin_size!r}")
        if self.bin_size > 1:
            warnings.warn(
                f"session {self.name!r}: bins of {self.bin_size} s; bin_size is in seconds, not "
                "milliseconds",
                stacklevel=3,
            )
        self.bin_size = float(self.bin_size)
        length = self.n_bins * self.bin_size
        if window is None:
            return (0.0, length)
        edges = np.array(window, dtype=object)  # whatever it is
        if edges.shape != (2,) or not all(map(is_number, edges)):
            self._fail("window", f"need (start, stop) in seconds, got {window!r}")
        start, stop = map(float, edges)
        if not abs(stop - start - length) < 1e-6 * max(1.0, length):
            self._fail(
                "window",
                f"({start}, {stop}) s lasts {stop - start:g} s, but {self.n_bins} bins of "
                f"{self.bin_size} s last {length:g} s",
            )
        return (start, stop)

    def _check_behaviour(self, key: str, values: Any) -> np.ndarray:
        self._check_key("behaviour", key)
        values = self._array(f"behaviour {key!r}", values)
        if values.dtype.kind not in "uibf":
            self._fail(f"behaviour {key!r}", f"need numbers, got dtype {values.dtype}")
        if values.dtype.kind == "f" and np.isinf(values).any():
            self._fail(f"behaviour {key!r}", "infinite values; what is missing is NaN")
        if values.shape not in ((self.n_trials,), (self.n_trials, self.n_bins)):
            self._fail(
                f"behaviour {key!r}",
                f"need ({self.n_trials},), one a trial, or ({self.n_trials}, {self.n_bins}), one "
                f"a bin; got {values.shape}",
            )
        return values

    def _check_column(self, key: str, values: Any) -> np.ndarray:
        self._check_key("neurons", key)
        values = self._array(f"neurons {key!r}", values)
        if values.dtype.kind == "O":
            values = values.astype(np.str_)
        if values.dtype.kind not in "biufUS":
            self._fail(f"neurons {key!r}", f"need numbers or strings, got dtype {values.dtype}")
        if values.shape[:1] != (self.n_neurons,):
            self._fail(f"neurons {key!r}", f"need {self.n_neurons} rows, got shape {values.shape}")
        return values

    def _check_rates(self, rates: Any) -> np.ndarray | None:
        if rates is None:
            return None
        rates = self._array("rates", rates)
        if rates.dtype.kind not in "uif":
            self._fail("rates", f"need numbers, got dtype {rates.dtype}")
        with np.errstate(over="ignore"):  # to infinity, which is refused below
            rates = rates.astype(np.float32, copy=False)
        if rates.shape != self.counts.shape:
            self._fail("rates", f"need the counts' shape {self.counts.shape}, got {rates.shape}")
        if not (np.isfinite(rates).all() and (rates > 0).all()):
            self._fail("rates", "expected counts must be finite and above 0")
        return rates

    def _check_split(self, split: Any) -> Split | None:
        if split is None:
            return None
        if not isinstance(split, Sequence | np.ndarray) or len(split) != len(Split._fields):
            self._fail("given_split", f"need (train, val, test), got a {type(split).__name__}")
        parts = []
        for label, part in zip(Split._fields, split, strict=True):
            part = self._array("given_split", part)
            part = np.flatnonzero(part) if part.dtype == bool else part
            part = np.unique(self._whole("given_split", part))
            if part.size and (part[0] < 0 or part[-1] >= self.n_trials):
                self._fail("given_split", f"{label} names trials outside 0..{self.n_trials - 1}")
            parts.append(part)
        if len(np.unique(np.concatenate(parts))) < sum(map(len, parts)):
            self._fail("given_split", "a trial is in two parts; keep them apart")
        return Split(*parts)

    def _check_trial_ids(self, ids: Any, n_recorded: int | None) -> tuple[np.ndarray, int]:
        ids = np.arange(self.n_trials) if ids is None else self._whole("trial_ids", ids)
        n_recorded = self.n_trials if n_recorded is None else n_recorded
        if not (is_number(n_recorded) and isinstance(n_recorded, Integral)):
            self._fail("n_recorded", f"need a whole number, got {n_recorded!r}")
        if ids.shape != (self.n_trials,) or len(np.unique(ids)) < self.n_trials:
            self._fail("trial_ids", f"need {self.n_trials} different numbers, one a trial")
        if n_recorded > MOST_TRIALS:
            self._fail("n_recorded", f"{n_recorded} trials; no recording has above {MOST_TRIALS}")
        if ids.min() < 0 or ids.max() >= n_recorded:
            self._fail("trial_ids", f"must lie in 0..{n_recorded - 1}; pass n_recorded, the number "
                       "of trials of the whole recording")  # fmt: skip
        return ids, int(n_recorded)

    def _array(self, what: str, values: Any) -> np.ndarray:
        try:
            return np.asarray(values)
        except (TypeError, ValueError, OverflowError) as error:
            self._fail(what, f"no array ({error})")

    def _whole(self, what: str, values: Any) -> np.ndarray:
        """Whole numbers (n,), int64; floats may hold them."""
        values = self._array(what, values)
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int64) if values.dtype.kind in "uif" else None
        if whole is None or values.ndim != 1 or not np.array_equal(whole, values):
            self._fail(what, f"need a row of whole numbers, got {values.dtype} {values.shape}")
        return whole

    def _check_key(self, what: str, key: Any) -> None:
        if not isinstance(key, str) or not key or UNFIT.search(key):
            self._fail(what, f"{key!r} is no name that a file can hold; rename it")

    # ------------------------------------------------------------- what is in it

    @property
    def n_trials(self) -> int:
        """Number of trials, K."""
        return self.counts.shape[0]

    @property
    def n_bins(self) -> int:
        """Number of time bins of a trial, T."""
        return self.counts.shape[1]

    @property
    def n_neurons(self) -> int:
        """Number of neurons, N."""
        return self.counts.shape[2]

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
        """The labelled regions, sorted; ``root``, ``void`` and empty labels are not among them."""
        return sorted({r for r in self.regions.tolist() if has_region(r)})

    @property
    def region_codes(self) -> np.ndarray:
        """Index of each neuron's region in :attr:`region_names`, (N,) int64; -1 = no region."""
        index = {region: code for code, region in enumerate(self.region_names)}
        return np.array([index.get(region, -1) for region in self.regions.tolist()], dtype=np.int64)

    def __repr__(self) -> str:
        labels = self.region_names
        sizes = ", ".join(f"{label} {np.sum(self.regions == label)}" for label in labels[:8])
        more = f", and {len(labels) - 8} more" if len(labels) > 8 else ""
        unlabelled = int(np.sum(self.region_codes < 0))
        rates = self.firing_rates
        lines = [
            f"Session {self.name!r}" + (f" of subject {self.subject}" if self.subject else ""),
            f"{self.n_trials} trials x {self.n_bins} bins x {self.n_neurons} neurons; "
            f"{1000 * self.bin_size:g} ms bins, {self.window[0]:g} to {self.window[1]:g} s",
            f"{len(labels)} regions: {sizes or 'none labelled'}{more}"
            + (f"; {unlabelled} neurons without a region" if unlabelled and labels else ""),
            f"firing rates: mean {rates.mean():.1f} Hz, from {rates.min():.1f} to "
            f"{rates.max():.1f} Hz",
        ]
        for ndim, unit in ((1, "trial"), (2, "bin")):
            if names := sorted(k for k, v in self.behaviour.items() if v.ndim == ndim):
                text = f"behaviour per {unit}: " + ", ".join(names)
                lines += textwrap.wrap(text, 74, subsequent_indent="  ", break_on_hyphens=False)
        if self.rates is not None:
            lines.append("true rates known (simulated)")
        return "\n  ".join(lines)

    # ------------------------------------------------------------------- splits

    def split(self, seed: int = 0) -> Split:
        """Random 70/10/20 % split of the trials into train, val and test.

        The draw is made among the trials of the whole recording and depends on the session's name
        and the seed alone: it stays the same whatever other sessions are loaded, and a selection of
        the trials (:meth:`select`, a trial filter) keeps each in its part. Every trial is in
        exactly one. A recording that came with its own split keeps it, whatever the seed; that
        may leave trials out.

        Raises:
            SessionError: when a part has no trials. (A split of the recording's own may be without
                test trials: it can be trained on.)
        """
        split = self.given_split
        if split is None:
            digest = hashlib.sha256(f"{self.name}|{seed}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            rank = np.empty(self.n_recorded, dtype=np.int64)
            rank[generator.permutation(self.n_recorded)] = np.arange(self.n_recorded)
            rank = rank[self.trial_ids]
            n_test = max(1, round(0.2 * self.n_recorded))
            n_val = max(1, round(0.1 * self.n_recorded))
            in_test, in_val = rank < n_test, (rank >= n_test) & (rank < n_test + n_val)
            parts = (~in_test & ~in_val, in_val, in_test)
            split = Split(*(np.flatnonzero(part) for part in parts))
        for label, part in zip(Split._fields, split, strict=True):
            if len(part) == 0 and (label != "test" or self.given_split is None):
                self._fail("split", f"none of its {self.n_trials} trials is in {label}; keep more "
                           "trials, or pass given_split")  # fmt: skip
        return split

    def select(
        self, trials: np.ndarray | None = None, neurons: np.ndarray | None = None
    ) -> Session:
        """A new session with only these trials and neurons (indices or boolean masks).

        Each trial stays in the part of the split that it was in.
        """
        trials = np.arange(self.n_trials)[slice(None) if trials is None else trials]
        neurons = np.arange(self.n_neurons)[slice(None) if neurons is None else neurons]
        split = self.given_split
        if split is not None:
            split = Split(*(np.flatnonzero(np.isin(trials, part)) for part in split))
        return Session(
            counts=self.counts[np.ix_(trials, np.arange(self.n_bins), neurons)],
            regions=self.regions[neurons],
            name=self.name,
            subject=self.subject,
            bin_size=self.bin_size,
            window=self.window,
            behaviour={key: value[trials] for key, value in self.behaviour.items()},
            neurons={key: value[neurons] for key, value in self.neurons.items()},
            rates=None if self.rates is None else self.rates[trials][:, :, neurons],
            given_split=split,
            trial_ids=self.trial_ids[trials],
            n_recorded=self.n_recorded,
            provenance=self.provenance,
        )

    def fingerprints(self, trials: np.ndarray) -> np.ndarray:
        """What tells these trials' spikes from all others', (K',) int64.

        Equal counts have equal fingerprints, whatever the session's name. 0 = fewer than
        ten spikes, which could be another trial's by chance.
        """
        prints = np.zeros(len(trials), dtype=np.int64)
        for i, trial in enumerate(trials):
            counts = self.counts[trial]
            if counts.sum(dtype=np.int64) >= 10:
                content = np.ascontiguousarray(counts, dtype="<u2").tobytes()
                digest = hashlib.blake2b(content, digest_size=8).digest()
                prints[i] = int.from_bytes(digest, "little", signed=True)
        return prints

    # ------------------------------------------------------------ making, storing

    @classmethod
    def from_spike_times(
        cls,
        spike_times: np.ndarray,
        spike_clusters: np.ndarray,
        align_times: np.ndarray,
        *,
        clusters: Sequence[Any] | np.ndarray | None = None,
        regions: Sequence[str] | Mapping[Any, str] | np.ndarray | None = None,
        window: tuple[float, float] = (-0.5, 1.5),
        bin_size: float = 0.02,
        traces: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
        behaviour: Mapping[str, np.ndarray] | None = None,
        name: str = "session",
        **fields: Any,
    ) -> Session:
        """Bin spike times around events.

        Args:
            spike_times: (S,) seconds.
            spike_clusters: (S,) the id of the neuron that fired.
            align_times: (K,) seconds; the event in each trial, where the window's 0 lies.
            clusters: (N,) the ids, in the order of the neuron axis. A cluster without a spike
                keeps its (silent) place. Default: 0..N-1 where ``regions`` lists N labels, else
                every id that fired.
            regions: label of each cluster: (N,) in that order, or a mapping from id to label.
            window: (start, stop) around each event, seconds; a whole number of bins.
            bin_size: seconds.
            traces: continuous behaviour: name -> (sample times (S',) in seconds, values (S',));
                averaged within each bin.
            behaviour: as in :class:`Session`, already one value a trial or bin.
            name: the session's key.
            **fields: any other field of :class:`Session`.

        Warns:
            UserWarning: times that seem to be in milliseconds; windows that share their time, so
                that a random split shows in training what it tests on; trials before the first or
                after the last spike of all.

        Raises:
            SessionError: naming the session, the field and the remedy.
        """
        listed = None if regions is None or isinstance(regions, Mapping) else len(regions)
        with _binning(name):
            clusters, spike_neurons = _neurons(spike_clusters, clusters, listed)
        if isinstance(regions, Mapping):
            regions = _labels(regions, clusters, name)
        grid: dict[str, Any] = {"window": window, "bin_size": bin_size}
        with _binning(name, "binning"):
            counts = bin_spikes(
                spike_times, spike_neurons, align_times, n_neurons=len(clusters), **grid
            )
        binned = {}
        for key, (times, values) in (traces or {}).items():
            with _binning(name, f"trace {key!r}"):
                binned[key] = bin_trace(times, values, align_times, **grid)
        if not counts.any():
            raise SessionError(
                f"session {name!r}, binning: no spike falls into any trial's window; spikes and "
                "events must be on the same clock, in seconds"
            )
        _doubt_events(name, counts, np.asarray(align_times, np.float64), window, fields)
        _doubt_units(name, np.asarray(spike_times), np.asarray(align_times), window)
        fields["neurons"] = {"cluster": clusters, **fields.get("neurons", {})}
        return cls(
            counts=counts,
            regions=regions,
            name=name,
            behaviour={**(behaviour or {}), **binned},
            **grid,
            **fields,
        )

    def save(self, path: str | Path) -> Path:
        """Write the session to one ``.npz`` without pickled objects; returns the path.

        Nothing in it is compressed, so that counts can be read from where they lie (``mmap``). The
        file appears complete or not at all: it is written beside its place and moved there.
        """
        path = Path(path)
        meta = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "name": self.name,
            "subject": self.subject,
            "bin_size": self.bin_size,
            "window": list(self.window),
            "n_recorded": self.n_recorded,
            "provenance": self.provenance,
        }
        listed = {"shape": list(self.counts.shape), "firing_rates": self.firing_rates.tolist()}
        arrays: dict[str, Any] = {"regions": self.regions, "trial_ids": self.trial_ids}
        arrays |= {"meta": np.array(json.dumps(meta)), "listed": np.array(json.dumps(listed))}
        arrays |= {f"behaviour/{key}": value for key, value in self.behaviour.items()}
        arrays |= {f"neurons/{key}": value for key, value in self.neurons.items()}
        if self.given_split is not None:
            arrays |= {f"split/{key}": part for key, part in self.given_split._asdict().items()}
        if self.rates is not None:
            arrays["rates"] = self.rates
        arrays["counts"] = np.ascontiguousarray(self.counts)  # trial after trial
        with atomic_write(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)  # no array here can hold objects
        return path

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False) -> Session:
        """Read a session that :meth:`save` wrote.

        Args:
            path: the file.
            mmap: leave counts (and true rates) on disk, and keep of them what is used while it is
                used: many sessions fit that way where memory would not hold them. What is then
                written into the arrays stays in memory; damaged counts are not noticed.

        Raises:
            FileNotFoundError: when there is no such file.
            SessionError: when the file is damaged, or not a session of this package.
        """
        path = Path(path)
        on_disk = ("counts", "rates") if mmap else ()
        with reading_file(path), np.load(path, allow_pickle=False) as file:
            meta = read_meta(file, path)
            arrays = {
                key: _on_disk(path, file.zip.getinfo(f"{key}.npy")) if key in on_disk else file[key]
                for key in file.files
                if key not in ("meta", "listed")
            }
            groups: dict[str, Any] = {"behaviour": {}, "neurons": {}, "split": {}}
            fields: dict[str, Any] = {}
            for key, value in arrays.items():
                group, _, rest = key.partition("/")
                (groups[group] if rest else fields)[rest or key] = value
            split = groups.pop("split")
            return cls(
                **{**meta, "window": tuple(meta["window"])},
                **fields,
                **groups,
                given_split=Split(**split) if split else None,
            )


def require_alike(sessions: Sequence[Session]) -> None:
    """Sessions that one model is to learn must differ in name, and be binned alike.

    Raises:
        SessionError: naming what differs, or the name that two of them have.
    """
    names = [session.name for session in sessions]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise SessionError(f"two sessions are named {min(repeated)!r}; names must differ")
    for what in ("n_bins", "bin_size", "window"):
        first: dict[Any, str] = {}  # the first session of each value
        for session in sessions:
            value = getattr(session, what)
            key = tuple(np.round(np.atleast_1d(value), 9).tolist())
            first.setdefault(key, f"{session.name!r} {value}")
        if len(first) > 1:
            unit = "" if what == "n_bins" else " (s)"
            raise SessionError(
                f"sessions must have the same {what}{unit}, got {', '.join(first.values())}; bin "
                "them alike, or take those together that are"
            )


@contextmanager
def reading(session: str, what: str) -> Iterator[None]:
    """Turns whatever a damaged file of a recording leads to into a SessionError that names it."""
    try:
        yield
    except (SessionError, ImportError):
        raise
    except Exception as error:  # of numpy, arrow, csv, pickle, zip: no list of them is complete
        raise SessionError(
            f"session {session!r}, {what}: cannot be read ({type(error).__name__}: {error}); "
            "download it again"
        ) from error


@contextmanager
def reading_file(path: Path) -> Iterator[None]:
    """Turns what can go wrong with a damaged or foreign ``.npz`` into a SessionError."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except SessionError as err:
        if str(path) in str(err):
            raise
        raise SessionError(f"{path}: {err}") from err  # which names the session alone
    except Exception as err:  # of numpy, zip, json, torch: no list of them is complete
        reason = textwrap.shorten(f"{type(err).__name__}: {err}", 160)
        raise SessionError(
            f"{path} is not a readable session file ({reason}); session files are "
            "written by Session.save, and by `python -m mtm simulate` and `prepare`"
        ) from err


def read_meta(file: Mapping[str, np.ndarray], path: Path) -> dict[str, Any]:
    """What a session file says of itself, if it is one, of this version."""
    meta = json.loads(str(file["meta"][()]).encode())  # numpy may read what is no text
    if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT:
        raise SessionError(f"{path} is not a session file of this package")
    if (version := meta.pop("version", None)) != FORMAT_VERSION:
        raise VersionError(
            f"{path} has format version {version}, this package reads {FORMAT_VERSION}; "
            "write it again from the recording"
        )
    return meta


def _on_disk(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """A member of an ``.npz`` as an array that is read when it is indexed."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)  # the local header: name and extra field, then content
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("holds Python objects")
        offset = file.tell()
    # Through torch, which keeps no file open for each: systems allow few hundred of them.
    import torch

    stop = offset + math.prod(shape) * dtype.itemsize
    if stop > path.stat().st_size:
        raise ValueError("counts end too early")
    whole = torch.from_file(str(path), shared=False, size=stop, dtype=torch.uint8).numpy()
    return whole[offset:].view(dtype).reshape(shape, order="F" if fortran else "C")


def _doubt_units(
    name: str, spikes: np.ndarray, events: np.ndarray, window: tuple[float, float]
) -> None:
    """Warn of times that seem to be in milliseconds, or on a clock of another unit."""
    if window[1] - window[0] > LONGEST_WINDOW:
        warnings.warn(
            f"session {name!r}, window: trials of {window[1] - window[0]:g} s; window is in "
            "seconds, not milliseconds",
            stacklevel=3,
        )
    spans = float(np.ptp(spikes)), float(np.ptp(events))
    some = len(events) >= FEW_EVENTS and min(spans) > 0  # two events may well be a second apart
    if some and max(spans) > OTHER_UNIT * min(spans):
        warnings.warn(
            f"session {name!r}, spike_times and align_times: spikes span {spans[0]:.3g} s and "
            f"events {spans[1]:.3g} s; both must be in seconds, on the same clock",
            stacklevel=3,
        )


def _doubt_events(
    name: str,
    counts: np.ndarray,
    events: np.ndarray,
    window: tuple[float, float],
    fields: Mapping[str, Any],
) -> None:
    """Warn of events that are too close for a random split, or lie outside the recording."""
    length = window[1] - window[0]
    shared = np.maximum(length - np.diff(np.sort(events)), 0).sum() / (length * len(events))
    if shared > MOST_SHARED and fields.get("given_split") is None:
        warnings.warn(
            f"session {name!r}, align_times: {shared:.0%} of the windows' time lies in the next "
            "window too, so a random split tests on what it trains on; take events further apart, "
            "or pass given_split with parts that lie apart in time",
            stacklevel=3,
        )
    spiking = counts.any(axis=(1, 2))
    inside = events[spiking]
    outside = int(np.sum(~spiking & ((events < inside.min()) | (events > inside.max()))))
    if outside > 0.05 * len(events):
        warnings.warn(
            f"session {name!r}, align_times: {outside} of {len(events)} trials lie before the "
            "first or after the last spike, as if nothing had been recorded; leave them out",
            stacklevel=3,
        )


@contextmanager
def _binning(name: str, what: str = "") -> Iterator[None]:
    """Within, what cannot be binned is named."""
    try:
        yield
    except ValueError as error:
        raise SessionError(f"session {name!r}, {what}{': ' * bool(what)}{error}") from error


def _neurons(
    spike_clusters: Any, clusters: Any, n_listed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N,) in the order of the neuron axis, and the place there of each spike's, (S,)."""
    fired = cluster_ids("spike_clusters", spike_clusters)
    if clusters is None:
        clusters = np.unique(fired) if n_listed is None else np.arange(n_listed)
    clusters = cluster_ids("clusters", clusters)
    return clusters, places_of(fired, clusters)


def _labels(regions: Mapping[Any, str], clusters: np.ndarray, name: str) -> list[str]:
    """The region of each cluster id, (N,); "" where the mapping has none."""
    labels = [regions.get(cluster, "") for cluster in clusters.tolist()]
    if regions and len(clusters) and not set(regions) & set(clusters.tolist()):
        raise SessionError(
            f"session {name!r}, regions: no key of the mapping is a cluster id; keys are like "
            f"{next(iter(regions))!r}, ids like {clusters.tolist()[0]!r}"
        )
    return labels
