"""Time and memory of preparing one realistic session, split by stage, and how they grow.

    python benchmarks/prepare.py
    python benchmarks/prepare.py --spikes 1_000_000 --trials 100 --neurons 200 --json small.json

An IBL-like recording in ALF files: two probes, random spikes on a 30 kHz clock, a trial every 5 s,
a wheel at 100 samples a second, a camera at 60. `prepare` reads it through ONE's local mode, bins
it and writes the session file, in a process of its own whose peak memory is thus its own. Stages
are timed inside that process, as functions called, and the most memory that the process held while
in each is noted; what is in none of them is "rest" (ONE's look-up of files, checks of the session).
Then one size after the other is halved and quartered. The files were just written, so that reading
them is reading the page cache: a disk or a network adds its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from binning import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the script runs from a checkout that is not installed

TRIAL_SECONDS = 5.0
CLOCK = 30_000  # ticks a second
STAGES = {
    "trials table": ("mtm.data.ibl", "_trials"),
    "spikes, clusters, regions": ("mtm.data.ibl", "_probe"),
    "merge probes": ("mtm.data.ibl", "_merge"),
    "wheel to speed": ("mtm.data.ibl", "_wheel"),
    "camera": ("mtm.data.ibl", "_whisker"),
    "bin spikes": ("mtm.session", "bin_spikes"),
    "bin traces": ("mtm.session", "bin_trace"),
    "write": ("mtm.session", "Session.save"),
}


def make_recording(root: Path, spikes: int, trials: int, neurons: int) -> None:
    """Write an ALF session of these sizes and its index."""
    from mtm import Session
    from mtm.data.synthetic import index_alf, write_alf

    rng = np.random.default_rng(0)
    probes = np.where(np.arange(neurons) < neurons // 2, "probe00", "probe01")
    behaviour = {
        "choice": rng.choice([-1, 1], trials),
        "block": rng.choice([0.2, 0.5, 0.8], trials),
        "reward": rng.integers(2, size=trials),
        "contrast": rng.choice([-1.0, -0.25, 0.25, 1.0], trials),
        "reaction-time": rng.uniform(0.1, 1.0, trials),
    }
    session = Session(
        np.ones((trials, 1, neurons)), np.resize(["CA1", "DG", "LP", "PO"], neurons), "benchmark",
        bin_size=1.0, behaviour=behaviour, neurons={"probe": probes},
    )  # fmt: skip
    alf = write_alf(session, root) / "alf"
    seconds = trials * TRIAL_SECONDS + 10
    import pandas as pd

    table = pd.read_parquet(alf / "_ibl_trials.table.pqt")
    shift = 5 + TRIAL_SECONDS * np.arange(trials) - table["stimOn_times"].to_numpy()
    events = [name for name in table if name.endswith("_times") or name.startswith("intervals")]
    table[events] = table[events].add(shift, axis=0)
    table.to_parquet(alf / "_ibl_trials.table.pqt")
    for probe in ("probe00", "probe01"):
        n, s = int(np.sum(probes == probe)), spikes // 2
        folder = alf / probe / "pykilosort"
        rates = rng.lognormal(0, 1, n)
        ids = np.searchsorted(np.cumsum(rates / rates.sum())[:-1], rng.random(s), side="right")
        ticks = np.sort(rng.integers(0, int(seconds * CLOCK), s))
        np.save(folder / "spikes.times.npy", ticks / CLOCK)
        np.save(folder / "spikes.clusters.npy", ids.astype(np.int32))
        for name in ("amps", "depths"):  # there, and not read
            (folder / f"spikes.{name}.npy").unlink()
    samples = np.arange(0, seconds, 0.01)
    np.save(alf / "_ibl_wheel.timestamps.npy", samples)
    np.save(alf / "_ibl_wheel.position.npy", np.cumsum(rng.normal(0, 0.01, len(samples))))
    frames = np.arange(0, seconds, 1 / 60)
    np.save(alf / "_ibl_leftCamera.times.npy", frames)
    np.save(alf / "leftCamera.ROIMotionEnergy.npy", rng.random(len(frames)))
    index_alf(root)


def peak_since_reset() -> int:
    """Most memory that the process held since the last call, bytes; on Linux, else since it began.

    A stage's peak includes what the stages before it left behind.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_bytes()
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is held now
    return int(peak.split()[1]) * 1024


def measure(root: Path) -> None:
    """In a process of its own: prepare the one session, print seconds and peak bytes as JSON."""
    import importlib

    from mtm.data import ibl

    spent, peaks = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0)
    highest = 0

    def timed(stage, function):
        def call(*args, **kwargs):
            nonlocal highest
            highest = max(highest, peak_since_reset())
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] += time.perf_counter() - start
                peaks[stage] = max(peaks[stage], peak := peak_since_reset())
                highest = max(highest, peak)

        return call

    for stage, (module, name) in STAGES.items():
        *parents, last = name.split(".")
        holder = importlib.import_module(module)
        for parent in parents:
            holder = getattr(holder, parent)
        setattr(holder, last, timed(stage, getattr(holder, last)))
    one = ibl.connect(root)
    eids = ibl.search(one)
    before = peak_since_reset()
    start = time.perf_counter()
    done = ibl.prepare(one, eids, root / "out", workers=1, overwrite=True, progress=False)
    total = time.perf_counter() - start
    (path,) = done.paths
    result = {"seconds": total, "stages": spent | {"rest": total - sum(spent.values())}}
    highest = max(highest, peak_since_reset())
    result |= {"peak_bytes": highest, "peak_bytes_above_imports": highest - before}
    result |= {"peak_bytes_of_stages": peaks}
    print(json.dumps(result | {"file_bytes": path.stat().st_size}))


def run(spikes: int, trials: int, neurons: int, repeats: int) -> dict:
    """Figures of one size: the run with the median time of several."""
    with tempfile.TemporaryDirectory() as folder:
        make_recording(Path(folder), spikes, trials, neurons)
        runs = []
        for _ in range(repeats):
            done = subprocess.run(
                [sys.executable, __file__, "--measure", folder],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            runs.append(json.loads(done.stdout))
    runs.sort(key=lambda run: run["seconds"])
    sizes = {"spikes": spikes, "trials": trials, "neurons": neurons}
    seconds = [run["seconds"] for run in runs]
    return {**sizes, **runs[len(runs) // 2], "seconds_all": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--spikes", type=int, default=20_000_000)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--neurons", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/prepare.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure)
    whole = {key: getattr(options, key) for key in ("spikes", "trials", "neurons")}
    result = {"realistic": run(**whole, repeats=options.repeats), "growth": []}
    for key in whole:
        for part in (4, 2):
            smaller = whole | {key: whole[key] // part}
            result["growth"].append(run(**smaller, repeats=options.repeats))
    result["machine"] = {"cores": os.cpu_count(), "processor": platform.machine()}
    result["machine"]["python"] = platform.python_version()
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in [result["realistic"], *result["growth"]]:
        print(f"{row['spikes']:>12,} spikes {row['trials']:>5} trials {row['neurons']:>5} neurons  "
              f"{row['seconds']:6.2f} s  {row['peak_bytes'] / 1e9:5.2f} GB")  # fmt: skip
    peaks = result["realistic"]["peak_bytes_of_stages"]
    for stage, seconds in result["realistic"]["stages"].items():
        peak = f"{peaks[stage] / 1e9:5.2f} GB" if stage in peaks else ""
        print(f"  {stage:<26} {seconds:6.2f} s  {peak}")


if __name__ == "__main__":
    main()
