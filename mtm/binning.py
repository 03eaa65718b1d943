"""Spike times to counts (K, T, N), and behaviour traces to bins (K, T).

Both cut the same half-open bins out of a recording: bin b of trial k starts at
align_times[k] + window[0] + b * bin_size and ends where bin b + 1 starts. All times are seconds.
"""

from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import signal

from mtm.checks import is_number, numbers

WHEEL_RATE, WHEEL_CUTOFF = 1000.0, 20.0  # Hz
MOST_BINS = 10_000_000  # of a trial
LARGEST_TABLE = 10_000_000  # entries, for cluster ids
LONGEST = 1e5  # s, of a recording (a day has 86,400); a wrong time stamp would fill the memory

# A spike at a bin's start can come out a few float64 roundings before it (0.1 + 0.2 is not 0.3) and
# would fall into the bin before. So every edge is moved earlier by this fraction of a bin: far more
# than rounding (1e-10 of a 20 ms bin at 10,000 s), far less than a recording resolves (20 ns).
# Where float64 is coarser than that (Unix timestamps), the edge moves by a few roundings instead.
_SNAP = 1e-6
_ROUNDINGS = 4

# Spikes plus cells of one chunk of trials: about 32 bytes each, so 16 MB of work space, which stays
# in the cache. Eight times as much is half as fast.
_CHUNK_ITEMS = 500_000


def n_bins(window: tuple[float, float], bin_size: float) -> int:
    """Number of bins T (at least 1) of bin_size seconds in window = (start, stop) seconds.

    Raises:
        ValueError: stop <= start, bin_size <= 0, more bins than any trial has, or a window that is
            not a whole number of bins (to 1e-6 of a bin).
    """
    edges = np.array(window, dtype=object)  # whatever it is
    if edges.shape != (2,) or not all(map(is_number, edges)) or not edges[1] > edges[0]:
        raise ValueError(
            f"window must be (start, stop) in seconds with start < stop, got {window!r}"
        )
    if not (is_number(bin_size) and bin_size > 0):
        raise ValueError(f"bin_size must be a positive number of seconds, got {bin_size!r}")
    exact = (float(window[1]) - float(window[0])) / float(bin_size)
    if exact > MOST_BINS:
        raise ValueError(
            f"window {window} holds {exact:.3g} bins of bin_size {bin_size} s; both are in seconds"
        )
    whole = max(1, round(exact))
    if abs(exact - whole) > _SNAP:
        raise ValueError(
            f"window {window} holds {exact:.6g} bins of bin_size {bin_size} s; change one of them "
            f"so that it holds a whole number, e.g. window[1] = {window[0] + whole * bin_size:.6g}"
        )
    return whole


def bin_spikes(
    spike_times: ArrayLike,
    spike_neurons: ArrayLike,
    align_times: ArrayLike,
    *,
    n_neurons: int,
    window: tuple[float, float],
    bin_size: float,
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Count the spikes of each neuron in each bin of each trial.

    A spike at a bin's start belongs to that bin, a spike at the window's stop to nothing. Where the
    windows of two trials overlap, a spike counts in both. Unsorted spikes (probes that were
    concatenated) are sorted first: a repair, which costs time and a sorted copy.

    Args:
        spike_times: (S,) seconds, float64: at 10,000 s, float32 resolves no better than 1 ms.
        spike_neurons: (S,) integers in [0, n_neurons), the neuron of each spike.
        align_times: (K,) seconds, the event that each trial is aligned to, in any order.
        n_neurons: number of neurons, N; one without a spike keeps its column of zeros.
        window: (start, stop) relative to the align time, seconds.
        bin_size: width of a bin, seconds.

    Returns:
        (K, T, N) counts: uint8 if the largest count fits, else uint16.

    Raises:
        ValueError: times that are not finite or not 1-D, lengths that differ, neuron ids that are
            not integers or out of range, n_neurons < 0, a count above 65,535, or see `n_bins`.
    """
    bins = n_bins(window, bin_size)
    times = _vector("spike_times", spike_times, "drop those spikes, from spike_neurons too")
    align = _vector("align_times", align_times, "drop those trials before binning")
    neurons = _neuron_ids(spike_neurons, len(times), n_neurons)
    if np.any(times[1:] < times[:-1]):
        order = np.argsort(times)
        times, neurons = times[order], neurons[order]

    edges, snap = _bin_edges(align, bins, window[0], bin_size)
    first = np.searchsorted(times, edges - snap)  # (K, T + 1): first spike at or after each edge
    counts = np.zeros((len(align), bins, n_neurons), np.uint8)
    largest = 0
    for trials in _chunks(first[:, -1] - first[:, 0] + bins * n_neurons):
        chunk = _count_chunk(neurons, first[trials], n_neurons)
        largest = max(largest, int(chunk.max(initial=0)))
        if largest > np.iinfo(np.uint8).max:
            counts = counts.astype(np.uint16, copy=False)
        counts[trials] = chunk
    if largest > np.iinfo(np.uint16).max:
        raise ValueError(
            f"the largest count, {largest} spikes of a neuron in a bin, does not fit uint16; "
            f"make bin_size ({bin_size} s) smaller, or check that spike_times are seconds"
        )
    return counts


def cluster_ids(name: str, values: ArrayLike) -> NDArray[Any]:
    """Ids of clusters (n,), numbers or text, made comparable with each other.

    Raises:
        ValueError: naming what is called ``name``.
    """
    try:
        ids: Any = np.asarray(values)
        ids = np.array(ids.tolist()) if ids.dtype == object else ids
        ids = np.char.decode(ids) if ids.dtype.kind == "S" else ids
    except ValueError as error:
        raise ValueError(f"{name}: no ids ({error})") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iufU"):
        raise ValueError(
            f"{name}: need a row of ids, numbers or text; got {ids.dtype} of shape {ids.shape}"
        )
    if ids.dtype == np.uint64 and ids.max(initial=0) < 2**63:  # else compared as float64
        ids = ids.astype(np.int64)
    return ids


def places_of(spike_clusters: NDArray[Any], clusters: NDArray[Any]) -> NDArray[np.integer]:
    """Index in ``clusters`` (N,) of each spike's cluster id, (S,); both from :func:`cluster_ids`.

    Raises:
        ValueError: for an id that is there twice, or a spike of none of them.
    """
    order = np.argsort(clusters, kind="stable")
    ids = clusters[order]
    if np.any(ids[1:] == ids[:-1]):
        raise ValueError(
            f"clusters: id {ids[1:][ids[1:] == ids[:-1]][0]} twice; merge probes with an offset so "
            "that ids are unique"
        )
    if not len(spike_clusters):
        return np.zeros(0, dtype=np.int64)
    kinds = {ids.dtype.kind, spike_clusters.dtype.kind}
    if len(ids) and "U" in kinds and len(kinds) > 1:
        raise ValueError(
            f"spike_clusters: {spike_clusters.dtype} cannot be looked up among clusters of "
            f"{ids.dtype}; give both the same type"
        )
    if len(ids) and kinds <= set("iu") and np.uint64 not in (ids.dtype, spike_clusters.dtype):
        span = int(ids[-1]) - int(ids[0]) + 1
        if span <= LARGEST_TABLE:  # thirty times as fast as a search for each spike
            table = np.full(span + 1, -1, dtype=np.int32)
            table[ids.astype(np.int64) - int(ids[0])] = order  # int8 would overflow
            place = spike_clusters.astype(np.int64) - int(ids[0])
            place[(place < 0) | (place >= span)] = span  # -1, as all that is in between
            found = table[place]
            if found.min(initial=0) >= 0:
                return found
    place = np.searchsorted(ids, spike_clusters)
    known = place < len(ids)
    known[known] = ids[place[known]] == spike_clusters[known]
    if not known.all():
        strangers = np.unique(spike_clusters[~known])[:5].tolist()
        raise ValueError(
            f"spike_clusters: ids {strangers} are not among the {len(ids)} clusters; list them in "
            "`clusters` or leave their spikes out"
        )
    return order[place]


def bin_trace(
    times: ArrayLike,
    values: ArrayLike,
    align_times: ArrayLike,
    *,
    window: tuple[float, float],
    bin_size: float,
    max_gap: float = 0.2,
) -> NDArray[np.float32]:
    """Mean of a sampled trace (wheel speed, whisker motion energy) over each bin of each trial.

    The trace is the straight line from sample to sample; its mean over a bin is exact. The authors
    of MtM take one value at each bin's right edge instead. The mean is better twice over: it uses
    every sample, so what is faster than the bins averages out instead of aliasing, and it describes
    the time in which the bin's spikes were counted, not the moment at which the next bin starts.

    NaN samples are dropped, and the line runs across them. Whatever cannot be known is NaN: a bin
    that overlaps a gap between samples longer than max_gap, or reaches beyond the samples.

    Args:
        times: (S,) seconds, strictly increasing.
        values: (S,) samples in any unit; NaN where missing.
        align_times, window, bin_size: as in `bin_spikes`.
        max_gap: the longest gap between samples that is interpolated across, seconds.

    Returns:
        (K, T) float32, in the unit of values.

    Raises:
        ValueError: times that are not finite, not 1-D or not strictly increasing, lengths that
            differ, infinite values or such as float32 does not hold, max_gap <= 0, or see `n_bins`.
    """
    bins = n_bins(window, bin_size)
    t, v = _samples(times, values)
    align = _vector("align_times", align_times, "drop those trials before binning")
    if not (isinstance(max_gap, Real) and max_gap > 0):
        raise ValueError(f"max_gap must be a positive number of seconds, got {max_gap!r}")
    edges, snap = _bin_edges(align, bins, window[0], bin_size)
    if len(t) < 2:
        return np.full((len(align), bins), np.nan, np.float32)
    mean = np.diff(_integral(t, v, edges)) / np.diff(edges)

    start, stop = edges[:, :-1], edges[:, 1:]
    unknown = (start < t[0] - snap) | (stop > t[-1] + snap)
    long_before = np.concatenate([[0], np.cumsum(np.diff(t) > max_gap + snap)])  # (S,)
    last = np.searchsorted(t[:-1], stop - snap)  # the first sample at the bin's stop or later
    # The last sample at the bin's start or earlier.
    before = np.maximum(np.searchsorted(t[:-1], start + snap, side="right") - 1, 0)
    unknown |= long_before[last] > long_before[before]
    return np.where(unknown, np.nan, mean).astype(np.float32)


def ordered_samples(
    times: ArrayLike, values: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mend a trace for `bin_trace`: finite times and values only, sorted; of equal times the first.

    Args:
        times: (S,) seconds.
        values: (S,) samples.

    Returns:
        times and values, (S',) each.

    Raises:
        ValueError: no numbers, or not equally many of both.
    """
    times, values = (_row("times", times), _row("values", values))
    if len(times) != len(values):
        raise ValueError(f"values has {len(values)} samples but times has {len(times)}")
    finite = np.isfinite(times) & np.isfinite(values)
    times, first = np.unique(times[finite], return_index=True)
    return times, values[finite][first]


def wheel_speed(
    times: ArrayLike, position: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Speed of a wheel whose position is sampled irregularly, as IBL computes it.

    The position is interpolated at 1 kHz, low-pass filtered at 20 Hz (Butterworth of order 8, run
    both ways, so that nothing is delayed) and differentiated; of that the absolute value.

    Args:
        times: (S,) seconds, strictly increasing (see `ordered_samples`).
        position: (S,) in any unit.

    Returns:
        times (S',) seconds and speed (S',), in the unit of position a second.

    Raises:
        ValueError: less than a second, or more than any recording lasts.
    """
    times, position = np.asarray(times), np.asarray(position)
    if len(times) < 2 or not 1 <= times[-1] - times[0] <= LONGEST:
        raise ValueError(f"wheel times must span 1 to {LONGEST:g} s, and be seconds")
    grid = np.arange(times[0], times[-1], 1 / WHEEL_RATE)
    low_pass = signal.butter(8, WHEEL_CUTOFF, fs=WHEEL_RATE, output="sos")
    smooth = signal.sosfiltfilt(low_pass, np.interp(grid, times, position))
    return grid, np.abs(np.gradient(smooth, 1 / WHEEL_RATE))


def _integral(
    t: NDArray[np.float64], v: NDArray[np.float64], at: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Integral from t[0] to `at` (any shape) of the straight lines through (t, v).

    The difference of two of these over a bin is off by about 1e-16 of (recording / bin) times the
    largest |v|: 1e-10 for 20 ms in 10,000 s, far below what float32 shows.
    """
    gaps = np.diff(t)
    until = np.concatenate([[0.0], np.cumsum(gaps * (v[1:] + v[:-1]) / 2)])
    at = np.clip(at, t[0], t[-1])
    i = np.searchsorted(t[1:-1], at, side="right")  # the line that `at` lies on
    elapsed = at - t[i]
    share = elapsed / gaps[i]  # from 0 to 1, however short the gap
    return until[i] + elapsed * (v[i] + (v[i + 1] - v[i]) * share / 2)


def _bin_edges(
    align: NDArray[np.float64], bins: int, start: float, bin_size: float
) -> tuple[NDArray[np.float64], float]:
    """Edges (K, T + 1) of each trial's bins and the snap tolerance, both in seconds."""
    edges = align[:, None] + (start + np.arange(bins + 1) * bin_size)
    with np.errstate(all="ignore"):  # of the largest float64 there is: infinite, or none
        rounding = _ROUNDINGS * float(np.spacing(np.abs(edges).max(initial=0.0)))
    if not rounding <= 0.01 * bin_size:
        raise ValueError(
            f"align_times are too far from zero for float64 to resolve bin_size {bin_size} s; "
            "subtract one offset from align_times and from the times of the recording"
        )
    return edges, max(_SNAP * bin_size, rounding)


def _chunks(items: NDArray[np.int64]) -> Iterator[slice]:
    """Slices of consecutive trials that hold at most _CHUNK_ITEMS items, or one trial."""
    total = np.cumsum(items)
    start = 0
    while start < len(items):
        limit = total[start] - items[start] + _CHUNK_ITEMS
        stop = max(start + 1, int(np.searchsorted(total, limit, side="right")))
        yield slice(start, stop)
        start = stop


def _count_chunk(
    neurons: NDArray[np.integer], first: NDArray[np.int64], n_neurons: int
) -> NDArray[np.int64]:
    """Counts (k, T, N) of k trials, given the first spike (k, T + 1) at or after each edge."""
    k, bins = first.shape[0], first.shape[1] - 1
    per_trial = first[:, -1] - first[:, 0]
    skipped = first[:, 0] - (np.cumsum(per_trial) - per_trial)
    spikes = np.arange(per_trial.sum()) + np.repeat(skipped, per_trial)
    cells = np.repeat(np.arange(k * bins) * n_neurons, np.diff(first).ravel())
    cells += neurons[spikes].astype(np.int64, copy=False)
    return np.bincount(cells, minlength=k * bins * n_neurons).reshape(k, bins, n_neurons)


def _vector(
    name: str, values: ArrayLike, remedy: str, allow_nan: bool = False
) -> NDArray[np.float64]:
    """The argument as finite (or NaN) float64 (n,), or a ValueError that names it."""
    vector = _row(name, values)
    bad = np.isinf(vector) if allow_nan else ~np.isfinite(vector)
    if bad.any():
        raise ValueError(
            f"{name} holds {bad.sum()} {'infinite' if allow_nan else 'NaN or infinite'} values, "
            f"the first at index {bad.argmax()}; {remedy}"
        )
    return vector


def _row(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """The argument as float64 (n,), or a ValueError that names it."""
    row = np.asarray(numbers(name, values), dtype=np.float64)
    if row.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {row.shape}; ravel it")
    return row


def _neuron_ids(spike_neurons: ArrayLike, n_spikes: int, n_neurons: int) -> NDArray[np.integer]:
    """The neuron of each spike as integers (S,), or a ValueError that says what is wrong."""
    if type(n_neurons) is bool or not isinstance(n_neurons, Integral) or n_neurons < 0:
        raise ValueError(f"n_neurons must be an integer of at least 0, got {n_neurons!r}")
    neurons = np.asarray(spike_neurons)
    if neurons.shape != (n_spikes,):
        raise ValueError(
            f"spike_neurons has shape {neurons.shape} but spike_times has shape ({n_spikes},); "
            "pass one neuron for each spike"
        )
    if n_spikes == 0:  # an empty list arrives as float64
        return np.zeros(0, np.int64)
    if neurons.dtype.kind not in "iu":
        raise ValueError(f"spike_neurons must be integers, got {neurons.dtype}; use .astype(int)")
    low, high = int(neurons.min()), int(neurons.max())
    if low < 0 or high >= n_neurons:
        raise ValueError(
            f"spike_neurons runs from {low} to {high} but must lie in [0, n_neurons={n_neurons}); "
            "renumber the ids, e.g. with np.searchsorted(kept_ids, ids), or raise n_neurons"
        )
    return neurons


def _samples(
    times: ArrayLike, values: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times and values (n,) of the samples that are not NaN, checked."""
    t = _vector("times", times, "drop those samples, from values too")
    v = _vector("values", values, "set them to NaN to interpolate across them", allow_nan=True)
    if v.shape != t.shape:
        raise ValueError(f"values has {len(v)} samples but times has {len(t)}; pass one for each")
    largest = np.abs(v).max(initial=0, where=~np.isnan(v))
    if largest > np.finfo(np.float32).max:
        raise ValueError(
            f"values are up to {largest:.3g}, more than float32 holds; set such samples to NaN, or "
            "give values in a larger unit"
        )
    later = t[1:] > t[:-1]
    if not later.all():
        raise ValueError(
            f"times must be strictly increasing, but times[{later.argmin() + 1}] does not exceed "
            "the one before; t, i = np.unique(times, return_index=True) sorts them and drops "
            "duplicates (then pass t and values[i])"
        )
    known = ~np.isnan(v)
    return t[known], v[known]
