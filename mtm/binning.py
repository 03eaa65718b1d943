"""Spike times to counts (K, T, N), and sampled traces to bins (K, T).

Both use the same half-open bins: bin b of trial k starts at
``align_times[k] + window[0] + b * bin_size`` and ends where bin b + 1 starts. Times are seconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mtm.inputs import SNAP, Floats, plain, seconds


def n_bins(window: tuple[float, float], bin_size: float) -> int:
    """Number of bins T of ``bin_size`` seconds in ``window`` = (start, stop): a whole number."""
    start, stop = map(float, window)
    if not (stop > start and bin_size > 0):
        raise ValueError(f"need start < stop and bin_size > 0, got {window!r} and {bin_size!r}")
    exact = (stop - start) / bin_size
    whole = max(1, round(exact))
    if abs(exact - whole) > SNAP:
        problem = f"window {window} holds {exact:.6g} bins of bin_size {bin_size} s"
        remedy = f"take a whole number, e.g. window[1] = {start + whole * bin_size:.6g}"
        raise ValueError(f"{problem}; {remedy}")
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

    Args:
        spike_times: (S,) seconds, in any order; or with units that convert to seconds (neo, pint).
        spike_neurons: (S,) integers in [0, n_neurons), the neuron of each spike.
        align_times: (K,) seconds, the event that each trial is aligned to, in any order.
        n_neurons: number of neurons, N.
        window, bin_size: (start, stop) around the event, and width of a bin, seconds.

    Returns:
        (K, T, N) counts: uint8 if the largest count fits, else uint16.
    """
    bins = n_bins(window, bin_size)
    times = seconds("spike_times", spike_times, bin_size)
    align = seconds("align_times", align_times, bin_size)
    neurons = np.asarray(spike_neurons).astype(np.int64)
    valid = (neurons >= 0) & (neurons < n_neurons) & (neurons == spike_neurons)
    if neurons.shape != times.shape or not valid.all():
        raise ValueError(f"spike_neurons must be {times.shape} integers in [0, {n_neurons})")
    order = np.argsort(times, kind="stable")  # quick where they are sorted
    times, neurons = times[order], neurons[order]
    edges, snap = _edges(align, bins, window[0], bin_size)
    first = np.searchsorted(times, edges - snap)  # (K, T + 1): first spike at or after each edge
    counts = np.zeros((len(align), bins, n_neurons), np.uint8)
    for trial, places in enumerate(first):
        bin_of_spike = np.repeat(np.arange(bins), np.diff(places))
        cells = bin_of_spike * n_neurons + neurons[places[0] : places[-1]]
        found = np.bincount(cells, minlength=bins * n_neurons)
        if (largest := found.max(initial=0)) > np.iinfo(np.uint16).max:
            raise ValueError(f"{largest} spikes of a neuron in a bin; are spike_times in seconds?")
        if largest > np.iinfo(counts.dtype).max:
            counts = counts.astype(np.uint16)
        counts[trial] = found.reshape(bins, n_neurons)
    return counts


def bin_trace(
    times: ArrayLike,
    values: ArrayLike,
    align_times: ArrayLike,
    *,
    window: tuple[float, float],
    bin_size: float,
    max_gap: float = 0.2,
) -> NDArray[np.float32]:
    """Average a sampled trace, such as wheel speed, over each bin of each trial.

    The trace is the straight line from sample to sample; its mean over a bin is exact. A bin is NaN
    when it overlaps a gap longer than ``max_gap`` or reaches beyond the samples.

    Args:
        times: (S,) seconds, strictly increasing.
        values: (S,) samples in any unit; NaN where missing.
        align_times, window, bin_size: as in `bin_spikes`.
        max_gap: seconds.

    Returns:
        (K, T) float32, in the unit of ``values``.
    """
    bins = n_bins(window, bin_size)
    t = seconds("times", times, bin_size)
    align = seconds("align_times", align_times, bin_size)
    v = plain(values).astype(np.float64)
    if v.shape != t.shape or np.isinf(v).any():
        raise ValueError(f"values {v.shape} must be one for each of times {t.shape}, none infinite")
    if not (t[1:] > t[:-1]).all():
        raise ValueError("times must be strictly increasing; sort them and drop duplicates")
    t, v = t[~np.isnan(v)], v[~np.isnan(v)]
    if len(t) < 2:
        return np.full((len(align), bins), np.nan, np.float32)
    edges, snap = _edges(align, bins, window[0], bin_size)
    # Integral from t[0] to each edge of the straight lines through the samples.
    gaps = np.diff(t)
    until = np.concatenate([[0.0], np.cumsum(gaps * (v[1:] + v[:-1]) / 2)])
    at = np.clip(edges, t[0], t[-1])
    i = np.searchsorted(t[1:-1], at, side="right")  # the line that the edge lies on
    elapsed = at - t[i]
    integral = until[i] + elapsed * (v[i] + (v[i + 1] - v[i]) * (elapsed / gaps[i]) / 2)
    mean = np.diff(integral) / np.diff(edges)
    start, stop = edges[:, :-1], edges[:, 1:]
    unknown = (start < t[0] - snap) | (stop > t[-1] + snap)
    # A bin is also unknown if a long gap lies between the samples around it.
    long_gaps = np.concatenate([[0], np.cumsum(gaps > max_gap + snap)])
    after = np.searchsorted(t[:-1], stop - snap)
    before = np.maximum(np.searchsorted(t[:-1], start + snap, side="right") - 1, 0)
    unknown |= long_gaps[after] > long_gaps[before]
    return np.where(unknown, np.nan, mean).astype(np.float32)


def _edges(align: Floats, bins: int, start: float, bin_size: float) -> tuple[Floats, float]:
    """Edges (K, T + 1) of each trial's bins, and by how much they move earlier; seconds."""
    edges: Floats = align[:, None] + (start + np.arange(bins + 1) * bin_size)
    rounding = 4 * float(np.spacing(np.abs(edges).max(initial=0.0)))
    return edges, max(SNAP * bin_size, rounding)
