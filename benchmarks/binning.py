"""Time and memory of `mtm.binning.bin_spikes` beside loops over trials.

    python benchmarks/binning.py
    python benchmarks/binning.py --spikes 1_000_000 --trials 100 --neurons 200 --json small.json

A synthetic recording on a 30 kHz clock: one trial every 4 s, binned from -0.5 to 1.5 s around its
event in 20 ms bins, so that half of the spikes lie outside every window. `bin_spikes` runs in a
process of its own, whose peak memory is thus its own, and its time is the median of --repeats. A
loop over trials, with a slice of the sorted spikes for each, runs afterwards on as many trials as
fit --loop-seconds, and must give the same counts.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, in_process, machine, peak_bytes, timed, write_json

from mtm.binning import bin_spikes, n_bins

CLOCK = 30_000  # ticks a second
TRIAL_SECONDS = 4.0
WINDOW, BIN_SIZE = (-0.5, 1.5), 0.02
FILES = ("spike_times", "spike_neurons", "align_times")


def make_recording(args: argparse.Namespace, folder: Path) -> None:
    """Write spike_times (S,), spike_neurons (S,) and align_times (K,) to the folder."""
    rng = np.random.default_rng(0)
    ticks = np.sort(rng.integers(0, int(args.trials * TRIAL_SECONDS * CLOCK), args.spikes))
    rates = rng.lognormal(0, 1, args.neurons)
    uniform = rng.random(args.spikes)
    ids = np.searchsorted(np.cumsum(rates / rates.sum())[:-1], uniform, side="right")
    jitter = rng.integers(0, CLOCK, args.trials)  # events 1 to 2 s into their trial
    events = np.arange(args.trials) * int(TRIAL_SECONDS * CLOCK) + CLOCK + jitter
    arrays = ticks / CLOCK, ids.astype(np.int32), events / CLOCK
    for name, array in zip(FILES, arrays, strict=True):
        np.save(folder / f"{name}.npy", array)


def measure(folder: Path, n_neurons: int, repeats: int) -> dict:
    """Bin, save the counts, and return seconds and peak bytes."""
    arrays = [np.load(folder / f"{name}.npy") for name in FILES]
    loaded, seconds, counts = peak_bytes(), [], None
    for _ in range(repeats):
        counts = None  # free the last ones, or the peak would hold two
        how = {"n_neurons": n_neurons, "window": WINDOW, "bin_size": BIN_SIZE}
        counts, (wall, _) = timed(lambda how=how: bin_spikes(*arrays, **how), torch.device("cpu"))
        seconds.append(wall)
    peak = peak_bytes()
    np.save(folder / "counts.npy", counts)
    return {
        "seconds_all": seconds,
        "peak_bytes_including_inputs": peak,
        "peak_bytes_above_inputs": peak - loaded,
        "input_bytes": sum(array.nbytes for array in arrays),
        "output_bytes": counts.nbytes,
        "counted_spikes": int(counts.sum(dtype=np.int64)),
    }


def measure_loop(folder: Path, n_neurons: int, limit: float) -> dict:
    """A loop over the first trials, until the limit in seconds is met; checks its counts."""
    times, neurons, align = (np.load(folder / f"{name}.npy") for name in FILES)
    counts = np.load(folder / "counts.npy")
    looped = np.zeros_like(counts)
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


def benchmark(args: argparse.Namespace, folder: Path) -> dict:
    """The whole result, as it is written to JSON."""
    make_recording(args, folder)
    told = ["--neurons", args.neurons, "--repeats", args.repeats, "--folder", folder]
    result = in_process(__file__, *told)
    seconds = float(np.median(result["seconds_all"]))
    loop = measure_loop(folder, args.neurons, args.loop_seconds)
    loop["ratio_to_bin_spikes"] = loop["seconds_all_trials"] / seconds
    rate = bandwidth()
    floor = (result["input_bytes"] + result["output_bytes"]) / rate  # read and written once
    sizes = {key: getattr(args, key) for key in ("spikes", "trials", "neurons")}
    sizes |= {"bins": n_bins(WINDOW, BIN_SIZE), "window_seconds": WINDOW, "bin_seconds": BIN_SIZE}
    return {
        "sizes": sizes | {"counted_spikes": result.pop("counted_spikes")},
        "bin_spikes": {"seconds": seconds, **result},
        "loop_with_slices": loop,
        "floor": {
            "bandwidth_bytes_per_second": rate,
            "seconds": floor,
            "ratio_bin_spikes_to_floor": seconds / floor,
        },
        "machine": machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


def main() -> None:
    """Run the benchmark, or its measurement in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spikes", type=int, default=20_000_000)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--neurons", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop-seconds", type=float, default=120.0)
    parser.add_argument("--json", type=Path, default=RESULTS / "binning.json")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(measure(args.folder, args.neurons, args.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = benchmark(args, Path(folder))
    print(json.dumps(result, indent=1))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
