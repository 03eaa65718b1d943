"""Arrays, tables and times as users have them: converted, and checked where they enter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from mtm.files import MemoryMapped

Floats = NDArray[np.float64]

# Edges are moved earlier by this fraction of a bin: rounding can put a spike that lies on an edge
# slightly before it (0.1 + 0.2 is not 0.3).
SNAP = 1e-6
AXES = ("trial|presentation", "time|bin", "neuron|unit|cluster|cell")  # as xarray may name them
LOWEST_RATE, LOWEST_SHARE = 0.1, 0.002  # below both, times are not seconds: see `check_times`


class SessionError(ValueError):
    """A recording that cannot be used as it is; the message names session, field and remedy."""


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Raise errors of values as SessionErrors that say what they are of."""
    try:
        yield
    except (ValueError, IndexError, TypeError) as error:
        raise SessionError(f"{what} {error}".lstrip()) from error


def plain(values: Any) -> NDArray[Any]:
    """Values as an array of numbers or words; NaN or "" where they are masked, None or NaN.

    ``np.asarray`` would show what is under a mask.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        values = np.ma.filled(values.astype(object), np.nan)
    array = np.asarray(values)
    if array.dtype.kind not in "OST":
        return array
    items = [x.decode() if isinstance(x, bytes) else x for x in array.ravel().tolist()]
    column = pd.Series(items, dtype=object).convert_dtypes()
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy(np.float64, na_value=np.nan).reshape(array.shape)
    return column.astype(object).fillna("").to_numpy().astype(np.str_).reshape(array.shape)


def seconds(name: str, values: Any, bin_size: float) -> Floats:
    """Times as finite float64 (n,) seconds, from numbers or quantities with units."""
    if hasattr(values, "magnitude"):  # it has a unit, of neo and quantities or else of pint
        values = (values.rescale if hasattr(values, "rescale") else values.to)("s").magnitude
    array = plain(values)
    if array.dtype.kind == "m":  # of numpy and pandas
        array = array / np.timedelta64(1, "s")
    if array.dtype.kind == "M":
        raise ValueError(f"{name} are dates; pass seconds, such as their distance from the first")
    vector: Floats = array.astype(np.float64)
    if (bad := ~np.isfinite(vector)).any() or vector.ndim != 1:
        found = f"{bad.shape} with {bad.sum()} NaN or infinite, the first at index {bad.argmax()}"
        raise ValueError(f"{name} must be (n,) finite numbers, not {found}")
    largest = np.abs(array).max(initial=0)
    if array.dtype.kind == "f" and (step := float(np.spacing(largest))) > bin_size / 10:
        problem = f"too large for {array.dtype} to resolve bin_size {bin_size} s ({step:.2g} s)"
        raise ValueError(f"{name} are {problem}; read them as float64, or subtract an offset")
    return vector


def cluster_places(spike_clusters: ArrayLike, clusters: ArrayLike) -> NDArray[np.int64]:
    """Index in ``clusters`` (N,) of each spike's cluster id, (S,).

    An id that is listed twice, or a spike of a cluster that is not listed, is a ValueError.
    """
    index, fired = pd.Index(plain(clusters)), plain(spike_clusters)
    if not index.is_unique:
        twice = index[index.duplicated()][0]
        raise ValueError(f"clusters: id {twice} twice; add an offset to the ids of one probe")
    places = index.get_indexer(pd.Index(fired)).astype(np.int64)
    if len(unknown := np.unique(fired[places < 0])):
        problem = f"ids {unknown[:5].tolist()} are not among the {len(index)} clusters"
        raise ValueError(f"spike_clusters: {problem}; list them, or leave their spikes out")
    return places


def checked_columns(
    kind: str, table: Any, *shapes: tuple[int, ...], **order: Any
) -> dict[str, Any]:
    """Each column of a mapping or DataFrame, by `checked_array`."""
    items = () if table is None else table.items()
    return {
        key: checked_array(f"{kind} {key!r}", values, *shapes, **order) for key, values in items
    }


def checked_array(
    field: str, values: Any, *shapes: tuple[int, ...], ids: Any = None, rows: Any = None
) -> np.ndarray:
    """Values as an array of one of the shapes; a Series in the order of ``ids``, by its index."""
    if isinstance(values, pd.Series):
        # With the index of `rows`, it is of the same table; that index is the default of ids.
        table = rows.index if isinstance(rows, pd.Series) else None
        order, index = table if ids is None else pd.Index(ids), values.index
        numbers = pd.RangeIndex(len(values if order is None else order))
        by_place, by_id = index.equals(numbers), order is not None and order.isin(index).all()
        if by_id == by_place and not index.equals(order) and not index.equals(table):
            found, wanted = index[:3].tolist(), (numbers if order is None else order)[:3].tolist()
            raise ValueError(
                f"{field}: a Series with index {found}... for {wanted}...; set these ids as its "
                "index, or pass .to_numpy() if it is in their order"
            )
        values = values.reindex(order) if by_id and not index.equals(table) else values
    found = plain(values)
    if found.dtype.kind not in ("uibfU" if found.ndim == 1 else "uibf"):
        raise ValueError(f"{field}: need numbers, or words for one axis; got {found.dtype}")
    if shapes and found.shape not in shapes:
        needed = f"need shape {' or '.join(map(str, shapes))}, got {found.shape}"
        raise ValueError(f"{field}: {needed}; counts are trials x bins x neurons")
    return found


def checked_parts(given: Sequence[ArrayLike], n_trials: int) -> list[np.ndarray]:
    """Sorted indices of the trials of each part of a split, of which no two share a trial."""
    every = np.arange(n_trials)
    parts = [every[part if part.size else []] for part in map(np.asarray, given)]
    if len(set().union(*parts)) < sum(map(len, parts)):
        raise ValueError("given_split: a trial is there twice; keep parts apart")
    return [np.sort(part) for part in parts]


def checked_ids(given: ArrayLike, n_trials: int, n_recorded: int) -> np.ndarray:
    """Numbers (K,) int64 of trials in the whole recording."""
    ids = checked_array("trial_ids", given, (n_trials,)).astype(np.int64)
    if ids.size and not (0 <= ids.min() and ids.max() < n_recorded):
        raise ValueError(f"trial_ids: need numbers from 0 to n_recorded - 1, {n_recorded - 1}")
    return ids


def check_counts(who: str, values: Any) -> np.ndarray:
    """Counts (K, T, N) as uint8 or uint16, copied unless they are on disk."""
    counts, names = plain(values), getattr(values, "dims", None)
    if counts.ndim != 3 or 0 in counts.shape:
        raise ValueError(f"counts: need trials x bins x neurons, got shape {counts.shape}")
    # Of h5py, `dims` is no tuple.
    if isinstance(names, tuple) and not all(map(re.search, AXES, map(str.lower, names))):
        order = "transpose to trials, time bins, neurons and pass .to_numpy()"
        raise ValueError(f"counts: the axes are {names}; {order}")
    if counts.dtype in (np.uint8, np.uint16):  # valid as they are; may be on disk
        return counts if isinstance(values, MemoryMapped) else counts.copy()
    if not (counts.min() >= 0 and counts.max() <= 65535):  # NaN is neither
        raise ValueError(f"counts: must be 0 to 65535, got {counts.min()} to {counts.max()}")
    whole = counts.astype(np.uint8 if counts.max() < 256 else np.uint16)
    if not np.array_equal(whole, counts):
        raise ValueError("counts: not whole numbers; pass spike counts, not rates or smoothed data")
    if counts.dtype.kind == "f" and np.count_nonzero(whole) >= 50:
        if (divisor := np.gcd.reduce(np.unique(whole))) > 1:
            doubt = f"all are multiples of {divisor}, as rates in Hz would be"
            warnings.warn(f"{who} counts: {doubt}; counts are spikes in a bin", stacklevel=3)
    return whole


def clusters_of(fired: Any, clusters: Any, regions: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The ids of the neuron axis, (N,), which ``clusters`` may not say, and their regions."""
    if clusters is not None:
        ids = plain(clusters)
    elif regions is None or isinstance(regions, Mapping):
        ids = np.unique(pd.Index(plain(fired)).dropna())
    else:
        ids = regions.index if isinstance(regions, pd.Series) else np.arange(len(regions))
        # Without id 0, ids may as well start at 1, and all labels be one place off.
        if np.array_equal(ids, np.arange(len(ids))) and not np.any(plain(fired) == 0):
            problem = f"clusters: no spike has id 0, so nothing tells whose the {len(ids)} regions"
            raise ValueError(f"{problem} are; pass clusters=, the id of each region")
    if isinstance(regions, Mapping):
        if not set(ids.tolist()) & set(regions):
            keys = f"{list(regions)[:3]}... for clusters {ids[:3].tolist()}..."
            raise ValueError(f"regions: labels of {keys}; its keys must be the clusters' ids")
        regions = [regions.get(cluster, "") for cluster in ids.tolist()]
    return ids, None if regions is None else checked_array(
        "regions", regions, ids=ids, rows=clusters
    )


def check_times(
    who: str, times: Sequence[Floats], counts: Any, places: Any, random_split: bool, grid: Any
) -> None:
    """Look at spike times and events, in seconds, and at the counts (K, T, N) made of them.

    Times in other units and trials that are there twice are a ValueError; windows that overlap, or
    lie where no spikes are, a warning. ``places`` is the neuron of each spike.
    """
    spikes, events = times
    (start, stop), whole = grid["window"], np.ptp(np.concatenate([spikes, events]))
    rates = counts.mean(axis=(0, 1), dtype=np.float64) / grid["bin_size"]
    rate = float(np.median(rates[np.unique(places)]))  # of neurons that fire at all
    length = stop - start
    share = len(events) * length / (whole or length)
    if rate < LOWEST_RATE and share < LOWEST_SHARE:
        raise ValueError(
            f"times: the median neuron fires {rate:.2g} times a second, in windows that cover "
            f"{share:.2%} of {whole:.3g} s; convert spike_times and align_times to seconds "
            "(from ms, divide by 1000; from samples, by the sampling rate)"
        )
    if len(again := np.flatnonzero(pd.Index(events).duplicated())):
        trials = f"trials {again[:5].tolist()} are at the time of an earlier one"
        raise ValueError(f"times: {trials}; drop duplicate rows")
    gaps = np.diff(np.sort(events))
    overlap = np.maximum(length - gaps, 0).sum() / (length * len(events))
    outside = (events + stop < spikes.min()) | (events + start > spikes.max())
    doubts = []
    if overlap > 0.1 and random_split:
        doubts += [
            f"{overlap:.0%} of the windows' time lies in the next window too, so a random split "
            "tests on what it trains on; take events further apart, or pass given_split"
        ]
    if 0.05 < outside.mean() < 1:
        doubts += [
            f"{outside.sum()} of {len(events)} trials lie before the first or after the last "
            "spike; leave them out, or add the trial's start to spike times that count from it"
        ]
    for doubt in doubts:
        warnings.warn(f"{who} align_times: {doubt}", stacklevel=3)


def continuous_windows(
    start: float,
    stop: float,
    length: float,
    *,
    block: float = 30.0,
    gap: float = 1.0,
    seed: int = 0,
) -> tuple[Floats, list[NDArray[np.int64]]]:
    """Cut a recording without trials into windows, and split them by blocks of time.

    Neighbouring windows are alike, and a random split would test on what it trains on. Here 70 % of
    the blocks are training, 10 % validation and 20 % test blocks.

    Args:
        start, stop: of the recording, seconds.
        length: of a window, seconds; ``Session.from_spike_times`` takes ``window=(0, length)``.
        block: seconds, with the gap at its end that no window covers.
        gap: seconds.
        seed: of the split.

    Returns:
        the start of each window, (K,) seconds, for ``align_times``; and the training, validation
        and test windows, for ``given_split``.

    Raises:
        ValueError: for fewer than three blocks, or blocks without a window.
    """
    n_blocks, n_each = int((stop - start) / block + SNAP), int((block - gap) / length + SNAP)
    if n_blocks < 3 or n_each < 1:
        raise ValueError(f"{n_blocks} blocks of {n_each} windows; need 3 or more, of 1 or more")
    starts = start + block * np.arange(n_blocks)[:, None] + length * np.arange(n_each)
    rank = np.random.default_rng(seed).permutation(n_blocks).repeat(n_each)
    n_test, n_val = (max(1, round(share * n_blocks)) for share in (0.2, 0.1))
    part = np.digitize(rank, [n_test, n_test + n_val])  # 0 test, 1 validation, 2 training
    return starts.ravel(), [np.flatnonzero(part == number) for number in (2, 1, 0)]
