"""Binning against integer arithmetic on clock ticks, fine numerical averages and closed forms."""

import itertools
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mtm
from mtm.binning import bin_spikes, bin_trace, n_bins
from mtm.inputs import plain, seconds

FIVE_BINS = {"window": (-0.04, 0.06), "bin_size": 0.02}


def counts_by_ticks(spikes, neurons, align, start, width, shape):
    """Counts by the definition, in whole clock ticks, one spike and one trial at a time."""
    counts = np.zeros(shape, int)
    for spike, neuron in zip(spikes, neurons, strict=True):
        for trial, event in enumerate(align):
            since = spike - event - start
            if 0 <= since < shape[1] * width:
                counts[trial, since // width, neuron] += 1
    return counts


@st.composite
def recordings(draw):
    """A recording in whole ticks: spikes near few events, so that edges are hit often."""
    # (ticks a second, ticks that the recording is away from zero); the last is a Unix time
    rate, far = draw(
        st.sampled_from(
            [(1000, 0), (1000, 10**7), (10**6, 0), (10**6, 10**10), (30_000, 3 * 10**8)]
            + [(1000, 1_700_000_000_000)]
        )
    )
    width, bins = draw(st.integers(1, 60)), draw(st.integers(1, 7))
    start = draw(st.integers(-3 * width, 3 * width))
    align = [far + a for a in draw(st.lists(st.integers(-200, 200), max_size=5))]
    n_neurons = draw(st.integers(1, 4))
    near_edges = st.builds(
        lambda edge, off: far + start + edge * width + off, st.integers(-4, 9), st.integers(-1, 1)
    )
    anywhere = st.integers(far - 600, far + 900)
    spikes = draw(st.lists(st.one_of(near_edges, anywhere), max_size=40))
    if align:  # relative to an event: exactly on its edges
        spikes = [s + align[i % len(align)] - far for i, s in enumerate(spikes)]
    neurons = draw(
        st.lists(st.integers(0, n_neurons - 1), min_size=len(spikes), max_size=len(spikes))
    )
    return rate, width, bins, start, align, n_neurons, spikes, neurons


@settings(max_examples=150, deadline=None)
@given(recordings())
@example((1000, 1, 3, 0, [10**7], 1, [10**7, 10**7 + 1, 10**7 + 2, 10**7 + 3], [0, 0, 0, 0]))
def test_counts_equal_integer_arithmetic_on_ticks(recording):
    rate, width, bins, start, align, n_neurons, spikes, neurons = recording
    counts = bin_spikes(
        np.array(spikes, float) / rate,
        np.array(neurons, int),
        np.array(align, float) / rate,
        n_neurons=n_neurons,
        window=(start / rate, (start + bins * width) / rate),
        bin_size=width / rate,
    )
    shape = (len(align), bins, n_neurons)
    assert counts.shape == shape and counts.dtype == np.uint8
    np.testing.assert_array_equal(
        counts, counts_by_ticks(spikes, neurons, align, start, width, shape)
    )


@pytest.mark.parametrize("align", [0.0, 0.1, 7.7, 1234.567, 1e4 + 1 / 3, 1e6 / 7, 1.7e9 + 0.1])
@pytest.mark.parametrize("bin_size", [0.02, 0.01, 1 / 30, 0.05])
def test_no_edge_is_lost_to_rounding(align, bin_size):
    start, bins = -0.5, 60
    b = np.arange(bins + 1)
    exact = [Fraction(align) + Fraction(start) + int(i) * Fraction(bin_size) for i in b]
    orders = [
        (align + start) + b * bin_size,
        align + (start + b * bin_size),
        (align + b * bin_size) + start,
        align + start + np.concatenate([[0], np.cumsum(np.full(bins, bin_size))]),
        np.array(exact, float),
    ]
    for times in orders:
        how = {"window": (start, start + bins * bin_size), "bin_size": bin_size}
        counts = bin_spikes(times, np.zeros(bins + 1, int), [align], n_neurons=1, **how)
        # one in each bin, and the spike at the window's stop in none
        np.testing.assert_array_equal(counts[0, :, 0], np.ones(bins))


@pytest.mark.parametrize(
    ("spikes", "dtype"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16)]
)
def test_the_largest_count_decides_the_dtype(spikes, dtype):
    times = np.concatenate([np.full(7, 1.0), np.full(spikes, 2.0), np.full(9, 3.0)])
    counts = bin_spikes(
        times, np.zeros(len(times), int), [1, 2, 3], n_neurons=2, window=(0, 0.5), bin_size=0.5
    )
    assert counts.dtype == dtype
    np.testing.assert_array_equal(counts[:, 0], [[7, 0], [spikes, 0], [9, 0]])


@pytest.mark.parametrize("method", ["rescale", "to"])  # of neo and of pint
def test_units_are_converted(method):
    in_s = SimpleNamespace(magnitude=np.array([1.5, -0.02]), units="s")
    given = SimpleNamespace(magnitude=np.array([1500.0, -20.0]), units="ms")
    setattr(given, method, lambda unit: in_s)
    np.testing.assert_allclose(seconds("t", given, 0.02), [1.5, -0.02])
    milliseconds = np.array([1500, -20], "m8[ms]")
    np.testing.assert_allclose(seconds("t", milliseconds, 0.02), [1.5, -0.02])
    with pytest.raises(ValueError, match="t are dates; pass seconds"):
        seconds("t", np.datetime64("2026-01-01") + milliseconds, 0.02)


def test_what_is_masked_is_missing():
    hidden = [False, True, False]
    for numbers in (np.ma.array([1, 2, 3], mask=hidden), [1, None, 3], pd.array([1, None, 3])):
        np.testing.assert_array_equal(plain(numbers), [1, np.nan, 3])
    for words in (np.ma.array(["a", "b", "c"], mask=hidden), ["a", None, b"c"]):
        assert plain(words).tolist() == ["a", "", "c"]
    assert plain(np.ma.array([1, 2, 3])).dtype == int


def test_the_type_of_times_must_resolve_a_bin():
    at = np.array([10_000.0])
    assert seconds("t", at.astype("f4"), 0.02) == at  # steps of 0.98 ms
    with pytest.raises(ValueError, match="t are too large for float32 to resolve bin_size 0.005 s"):
        seconds("t", at.astype("f4"), 0.005)
    with pytest.raises(ValueError, match="times are too large for float32"):
        late = np.array([10_000, 10_001], "f4")
        bin_trace(late, [0.0, 1.0], [0.0], window=(0, 0.005), bin_size=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spike_times": np.ma.array([1.0, 2.0], mask=[0, 1])}, "spike_times must .* 1 NaN"),
        ({"spike_times": [1.0, np.nan]}, "spike_times must be .n,. finite .* first at index 1"),
        ({"spike_times": np.ones(70_000), "spike_neurons": np.zeros(70_000, int)}, "70000 spikes"),
        ({"align_times": [1e16]}, "align_times are too large for float64"),
        ({"spike_neurons": [0]}, r"spike_neurons must be \(2,\) integers in \[0, 3\)"),
        ({"spike_neurons": [-1, 2]}, "spike_neurons must be"),
        ({"spike_neurons": [0.9, 1.0]}, "spike_neurons must be"),
    ],
)
def test_bad_spikes_are_refused_by_name(change, message):
    good = {"spike_times": [1.0, 2.0], "spike_neurons": [0, 1], "align_times": [1.0]}
    with pytest.raises(ValueError, match=message):
        bin_spikes(**(good | {"n_neurons": 3} | FIVE_BINS | change))


@pytest.mark.parametrize(
    ("window", "bin_size", "bins"),
    [((-0.5, 1.5), 0.02, 100), ((0, 0.3), 0.1, 3), ((-0.1, 0.6), 0.7, 1), ((0, 1), 1 / 3, 3)],
)
def test_n_bins(window, bin_size, bins):
    assert n_bins(window, bin_size) == bins
    with pytest.raises(ValueError, match=r"bins of bin_size .*whole number, e.g. window\[1\] = "):
        n_bins(window, bin_size * (1 + 2e-5))


@pytest.mark.parametrize("rate", [4, 60, 1000])  # samples a second: fewer and more than bins
def test_trace_equals_a_fine_numerical_average(rate):
    rng = np.random.default_rng(rate)
    times = np.cumsum(rng.uniform(0.2, 1.0, 12 * rate)) / rate
    values = 3 + np.sin(5 * times) + rng.normal(size=len(times))
    values[rng.integers(0, len(times), len(times) // 10)] = np.nan
    align = np.array([4.123, 2.0, 4.15, times[len(times) // 3]])  # overlapping, unordered
    binned = bin_trace(times + 1e4, values, align + 1e4, max_gap=np.inf, **FIVE_BINS)
    assert binned.shape == (4, 5) and binned.dtype == np.float32
    known, points = ~np.isnan(values), (np.arange(20_000) + 0.5) / 20_000
    starts = align[:, None, None] - 0.04 + 0.02 * np.arange(5)[:, None]
    fine = np.interp(starts + 0.02 * points, times[known], values[known]).mean(-1)  # midpoint rule
    np.testing.assert_allclose(binned, fine, atol=2e-4)


@settings(max_examples=50, deadline=None)
@given(
    ticks=st.lists(st.integers(-50, 150), min_size=2, max_size=30, unique=True).map(sorted),
    max_gap=st.integers(1, 60),
    width=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_trace_by_definition_on_ticks(ticks, max_gap, width, seed):
    """Exact means with fractions, and NaN where a long gap or the end of the samples is met."""
    values = np.random.default_rng(seed).integers(-9, 9, len(ticks))
    align, bins, far = [0, 31], 4, 10_000_000
    binned = bin_trace(
        (np.array(ticks) + far) / 1000,
        values,
        (np.array(align) + far) / 1000,
        window=(0, bins * width / 1000),
        bin_size=width / 1000,
        max_gap=max_gap / 1000,
    )
    for trial, event in enumerate(align):
        for b in range(bins):
            start, stop = event + b * width, event + (b + 1) * width
            total = Fraction(0)
            known = ticks[0] <= start and stop <= ticks[-1]
            for (t0, v0), (t1, v1) in itertools.pairwise(zip(ticks, values, strict=True)):
                low, high = max(start, t0), min(stop, t1)
                if low < high:
                    known = known and t1 - t0 <= max_gap
                    middle = Fraction(low + high, 2) - t0
                    total += (high - low) * (int(v0) + int(v1 - v0) * middle / (t1 - t0))
            if known:
                assert binned[trial, b] == pytest.approx(float(total / width), abs=1e-5)
            else:
                assert np.isnan(binned[trial, b])


def test_windows_of_a_continuous_recording_are_split_by_blocks_of_time():
    starts, split = mtm.continuous_windows(100.0, 1000.0, 0.5, block=30.0, gap=2.0)
    assert len(starts) == 30 * 56 and starts.min() == 100.0 and starts.max() + 0.5 <= 998.0
    np.testing.assert_allclose([len(part) / len(starts) for part in split], [0.7, 0.1, 0.2])
    assert sorted(np.concatenate(split)) == list(range(len(starts)))
    train, val, test = (starts[part] for part in split)
    for one, other in ((train, test), (train, val), (val, test)):
        assert np.abs(one[:, None] - other).min() - 0.5 >= 2.0 - 1e-9
