"""Time and memory of `mtm.binning.bin_spikes` beside loops over trials.

    python benchmarks/binning.py
    python benchmarks/binning.py --spikes 1_000_000 --trials 100 --neurons 200 --json small.json

A synthetic recording on a 30 kHz clock: one trial every 4 s, binned from -0.5 to 1.5 s around its
event in 20 ms bins, so that half of the spikes lie outside every window. `bin_spikes` runs in a
process of its own, whose peak memory is thus its own, and its time is the median of --repeats. Two
loops over trials run once afterwards, each on as many trials as fit --loop-seconds, and must give
the same counts: the obvious one (a boolean mask over all spikes for each trial) and the careful one
(a slice of the sorted spikes, found with searchsorted; it checks nothing and repairs nothing).
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the script runs from a checkout that is not installed

from mtm.binning import bin_spikes, n_bins  # noqa: E402

CLOCK = 30_000  # ticks a second
TRIAL_SECONDS = 4.0
WINDOW, BIN_SIZE = (-0.5, 1.5), 0.02


def make_recording(spikes: int, trials: int, neurons: int, folder: Path) -> None:
    """Write spike_times (S,), spike_neurons (S,) and align_times (K,) to the folder."""
    rng = np.random.default_rng(0)
    seconds = trials * TRIAL_SECONDS
    ticks = np.sort(rng.integers(0, int(seconds * CLOCK), spikes))
    rates = rng.lognormal(0, 1, neurons)
    ids = np.searchsorted(np.cumsum(rates / rates.sum())[:-1], rng.random(spikes), side="right")
    jitter = rng.integers(0, CLOCK, trials)  # events 1 to 2 s into their trial
    events = np.arange(trials) * int(TRIAL_SECONDS * CLOCK) + CLOCK + jitter
    np.save(folder / "spike_times.npy", ticks / CLOCK)
    np.save(folder / "spike_neurons.npy", ids.astype(np.int32))
    np.save(folder / "align_times.npy", events / CLOCK)


def load_recording(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three arrays that `make_recording` wrote."""
    names = ("spike_times", "spike_neurons", "align_times")
    times, neurons, align = (np.load(folder / f"{name}.npy") for name in names)
    return times, neurons, align


def peak_bytes() -> int:
    """The most memory that this process has held so far.

    On Linux from VmHWM: ru_maxrss there also remembers the process that this one was forked from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_bin_spikes(folder: Path, n_neurons: int, repeats: int) -> None:
    """In a process of its own: bin, save the counts, print seconds and peak bytes as JSON."""
    times, neurons, align = load_recording(folder)
    loaded, seconds = peak_bytes(), []
    for _ in range(repeats):
        counts = None  # free the last ones, or the peak would hold two
        start = time.perf_counter()
        counts = bin_spikes(
            times, neurons, align, n_neurons=n_neurons, window=WINDOW, bin_size=BIN_SIZE
        )
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes()
    np.save(folder / "counts.npy", counts)
    print(
        json.dumps(
            {
                "seconds_all": seconds,
                "peak_bytes_including_inputs": peak,
                "peak_bytes_above_inputs": peak - loaded,
                "input_bytes": times.nbytes + neurons.nbytes + align.nbytes,
                "output_bytes": counts.nbytes,
                "counted_spikes": int(counts.sum(dtype=np.int64)),
            }
        )
    )


def spikes_by_mask(times: np.ndarray, start: float, stop: float) -> np.ndarray:
    """The obvious way to a trial's spikes: compare every spike."""
    return (times >= start) & (times < stop)


def spikes_by_slice(times: np.ndarray, start: float, stop: float) -> slice:
    """The careful way to a trial's spikes, which must be sorted."""
    return slice(*np.searchsorted(times, [start, stop]))


def measure_loop(folder: Path, select: Callable, n_neurons: int, limit: float) -> dict:
    """A loop over the first trials, until the limit in seconds is met; checks its counts."""
    times, neurons, align = load_recording(folder)
    counts = np.load(folder / "counts.npy")
    looped = np.zeros_like(counts)
    bins, snap = n_bins(WINDOW, BIN_SIZE), 1e-6 * BIN_SIZE  # without snap it loses spikes on edges
    begin, done, seconds = time.perf_counter(), 0, 0.0
    while done < len(align) and seconds < limit:
        start, stop = align[done] + WINDOW[0] - snap, align[done] + WINDOW[1] - snap
        inside = select(times, start, stop)
        rows = ((times[inside] - start) / BIN_SIZE).astype(int)
        cells = np.bincount(rows * n_neurons + neurons[inside], minlength=bins * n_neurons)
        looped[done] = cells.reshape(bins, n_neurons)
        done, seconds = done + 1, time.perf_counter() - begin
    if not np.array_equal(counts[:done], looped[:done]):
        raise SystemExit("bin_spikes and the loop over trials disagree")
    return {
        "trials_run": done,
        "seconds_run": seconds,
        "seconds_all_trials": seconds * len(align) / done,
        "scaled_from_a_subset": done < len(align),
        "counts_equal_on_trials_run": True,
    }


def bandwidth(n_bytes: int = 400_000_000) -> float:
    """Bytes a second that numpy reads and writes when it copies; the best of three."""
    source, target = np.ones(n_bytes // 8), np.ones(n_bytes // 8)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * n_bytes / min(seconds)


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for row in info.read_text().splitlines():
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def benchmark(args: argparse.Namespace, folder: Path) -> dict:
    """The whole result, as it is written to JSON."""
    # all in child processes, so that nothing is left in the memory of this one
    shared = ["--spikes", args.spikes, "--trials", args.trials, "--neurons", args.neurons]
    shared += ["--repeats", args.repeats, "--folder", folder]
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, shared), "--step"]
    subprocess.run([*command, "make"], check=True)
    run = subprocess.run([*command, "bin"], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(run.stdout)
    seconds = float(np.median(result["seconds_all"]))
    loops = {}
    for name, select in (
        ("loop_with_masks", spikes_by_mask),
        ("loop_with_slices", spikes_by_slice),
    ):
        loops[name] = measure_loop(folder, select, args.neurons, args.loop_seconds)
        loops[name]["ratio_to_bin_spikes"] = loops[name]["seconds_all_trials"] / seconds
    rate = bandwidth()
    # every input byte read once, every count written once
    floor = (result["input_bytes"] + result["output_bytes"]) / rate
    return {
        "sizes": {
            "spikes": args.spikes,
            "counted_spikes": result.pop("counted_spikes"),
            "trials": args.trials,
            "neurons": args.neurons,
            "bins": n_bins(WINDOW, BIN_SIZE),
            "window_seconds": WINDOW,
            "bin_seconds": BIN_SIZE,
        },
        "bin_spikes": {"seconds": seconds, **result},
        **loops,
        "floor": {
            "bandwidth_bytes_per_second": rate,
            "seconds": floor,
            "ratio_bin_spikes_to_floor": seconds / floor,
        },
        "machine": {"processor": processor(), "cpu_count": os.cpu_count()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


def describe(result: dict) -> str:
    """The result in six lines."""
    ours = result["bin_spikes"]
    lines = [
        f"sizes             {result['sizes']}",
        f"bin_spikes        {ours['seconds']:.3f} s (median of {len(ours['seconds_all'])})",
    ]
    for name in ("loop_with_masks", "loop_with_slices"):
        loop = result[name]
        subset = f" (scaled from {loop['trials_run']} trials)" * loop["scaled_from_a_subset"]
        lines.append(
            f"{name:<17} {loop['seconds_all_trials']:.3f} s{subset}, "
            f"{loop['ratio_to_bin_spikes']:.2f} times bin_spikes, equal counts"
        )
    including, above = ours["peak_bytes_including_inputs"], ours["peak_bytes_above_inputs"]
    lines.append(
        f"peak memory       {including / 1e9:.3f} GB with inputs, {above / 1e9:.3f} GB above them"
    )
    floor = result["floor"]["seconds"]
    lines.append(f"floor             {floor:.3f} s to read the inputs and write the counts once")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark, or one of its steps in a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spikes", type=int, default=20_000_000)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--neurons", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop-seconds", type=float, default=120.0)
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results" / "binning.json"
    )
    parser.add_argument("--step", choices=["make", "bin"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "make":
        make_recording(args.spikes, args.trials, args.neurons, args.folder)
    elif args.step == "bin":
        measure_bin_spikes(args.folder, args.neurons, args.repeats)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = benchmark(args, Path(folder))
        print(describe(result))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
