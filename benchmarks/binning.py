"""Time and memory of `mtm.binning.bin_spikes` beside a loop over trials and the memory's floor.

    python benchmarks/binning.py [--spikes 20_000_000] [--trials 600] [--neurons 600]

A synthetic recording on a 30 kHz clock: one trial every 4 s, binned from -0.5 to 1.5 s around its
event in 20 ms bins, so that half of the spikes lie outside every window. Times are medians of five.
A loop over trials, with a slice of the sorted spikes for each, runs afterwards on as many trials as
it manages in two minutes, and must give the same counts.
"""

import argparse
import json
import time
import tracemalloc
from functools import partial

import numpy as np
import torch
from common import RESULTS, machine, timed, write_json

from mtm.binning import bin_spikes, n_bins

CLOCK = 30_000  # ticks a second
TRIAL_SECONDS = 4.0
WINDOW, BIN_SIZE = (-0.5, 1.5), 0.02
REPEATS, LOOP_SECONDS = 5, 120.0


def make_recording(spikes: int, trials: int, neurons: int) -> tuple[np.ndarray, ...]:
    """Spike times (S,), their neurons (S,) and event times (K,)."""
    rng = np.random.default_rng(0)
    ticks = np.sort(rng.integers(0, int(trials * TRIAL_SECONDS * CLOCK), spikes))
    rates = rng.lognormal(0, 1, neurons)
    ids = np.searchsorted(np.cumsum(rates / rates.sum())[:-1], rng.random(spikes), side="right")
    jitter = rng.integers(0, CLOCK, trials)  # events 1 to 2 s into their trial
    events = np.arange(trials) * int(TRIAL_SECONDS * CLOCK) + CLOCK + jitter
    return ticks / CLOCK, ids.astype(np.int32), events / CLOCK


def measure(arrays: tuple[np.ndarray, ...], n_neurons: int) -> tuple[np.ndarray, dict]:
    """The counts; seconds, and the peak of memory, in a run that is not timed."""
    act = partial(bin_spikes, *arrays, n_neurons=n_neurons, window=WINDOW, bin_size=BIN_SIZE)
    seconds = [timed(act, torch.device("cpu"))[1][0] for _ in range(REPEATS)]
    tracemalloc.start()
    counts = act()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return counts, {
        "seconds": float(np.median(seconds)),
        "peak_bytes_above_inputs": peak,
        "input_bytes": sum(array.nbytes for array in arrays),
        "output_bytes": counts.nbytes,
        "counted_spikes": int(counts.sum(dtype=np.int64)),
    }


def measure_loop(arrays: tuple[np.ndarray, ...], counts: np.ndarray, limit: float) -> dict:
    """A loop over the first trials, until the limit in seconds is met; checks their counts."""
    times, neurons, align = arrays
    looped, n_neurons = np.zeros_like(counts), counts.shape[2]
    bins, snap = n_bins(WINDOW, BIN_SIZE), 1e-6 * BIN_SIZE  # without snap it loses spikes on edges
    begin, done, seconds = time.perf_counter(), 0, 0.0
    while done < len(align) and seconds < limit:
        start, stop = align[done] + WINDOW[0] - snap, align[done] + WINDOW[1] - snap
        inside = slice(*np.searchsorted(times, [start, stop]))
        rows = ((times[inside] - start) / BIN_SIZE).astype(int)
        cells = np.bincount(rows * n_neurons + neurons[inside], minlength=bins * n_neurons)
        looped[done] = cells.reshape(bins, n_neurons)
        done, seconds = done + 1, time.perf_counter() - begin
    if not np.array_equal(counts[:done], looped[:done]):
        raise SystemExit("bin_spikes and the loop over trials disagree")
    return {"trials_run": done, "seconds_all_trials": seconds * len(align) / done}


def bandwidth(n_bytes: int = 400_000_000) -> float:
    """Bytes a second that numpy reads and writes when it copies; the best of three."""
    source, target, cpu = np.ones(n_bytes // 8), np.ones(n_bytes // 8), torch.device("cpu")
    return 2 * n_bytes / min(timed(lambda: np.copyto(target, source), cpu)[1][0] for _ in range(3))


def main() -> None:
    """Run the benchmark, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spikes", type=int, default=20_000_000)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--neurons", type=int, default=600)
    options = vars(parser.parse_args())
    arrays = make_recording(**options)
    counts, found = measure(arrays, options["neurons"])
    loop = measure_loop(arrays, counts, LOOP_SECONDS)
    loop["ratio_to_bin_spikes"] = loop["seconds_all_trials"] / found["seconds"]
    floor = (found["input_bytes"] + found["output_bytes"]) / bandwidth()  # read and written once
    floor = {"seconds": floor, "ratio_bin_spikes_to_floor": found["seconds"] / floor}
    result = {"sizes": options, "bin_spikes": found, "loop_with_slices": loop, "floor": floor}
    result["machine"] = machine()
    print(json.dumps(result, indent=1))
    write_json(RESULTS / "binning.json", result)


if __name__ == "__main__":
    main()
