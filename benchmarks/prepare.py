"""Time and memory of preparing one realistic session, split by stage, and how they grow.

    python benchmarks/prepare.py

An IBL-like recording in ALF files: two probes, random spikes on a 30 kHz clock, a trial every 5 s,
a wheel at 100 samples a second, a camera at 60. `prepare` reads it through ONE's local mode, bins
it and writes the session file, in a process of its own whose peak memory is thus its own. Python's
profiler times the stages; what is in none of them is "rest" (ONE's look-up of files, checks of the
session). Then one size after the other is halved and quartered. The files were just written, so
that reading them is reading the page cache: a disk or a network adds its own. Beside the binning
stands its floor: the time in which memory reads the spikes and writes the counts once.
"""

import cProfile
import json
import pstats
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import RESULTS, in_process, machine, peak_bytes, timed, write_json

from mtm import Session
from mtm.data import ibl
from mtm.data.synthetic import index_alf, write_alf

WHOLE = {"spikes": 20_000_000, "trials": 600, "neurons": 1000}
TRIAL_SECONDS = 5.0
CLOCK = 30_000  # ticks a second
STAGES = {  # function of the package that a stage is timed by
    "trials table": "_trials",
    "spikes, clusters, regions": "_probe",
    "wheel and camera": "_traces",
    "bin spikes": "bin_spikes",
    "bin traces": "bin_trace",
    "write": "save",
}


def make_recording(root: Path, spikes: int, trials: int, neurons: int) -> None:
    """Write an ALF session of these sizes and its index."""
    rng = np.random.default_rng(0)
    probes = np.where(np.arange(neurons) < neurons // 2, "probe00", "probe01")
    behaviour = {
        "choice": rng.choice([-1, 1], trials),
        "block": rng.choice([0.2, 0.5, 0.8], trials),
        "reward": rng.integers(2, size=trials),
        "contrast": rng.choice([-1.0, -0.25, 0.25, 1.0], trials),
        "reaction-time": rng.uniform(0.1, 1.0, trials),
    }
    regions = np.resize(["CA1", "DG", "LP", "PO"], neurons)
    how = {"bin_size": 1.0, "behaviour": behaviour, "neurons": {"probe": probes}}
    session = Session(np.ones((trials, 1, neurons)), regions, "benchmark", **how)
    alf = write_alf(session, root) / "alf"
    seconds = trials * TRIAL_SECONDS + 10
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
    samples = np.arange(0, seconds, 0.01)
    np.save(alf / "_ibl_wheel.timestamps.npy", samples)
    np.save(alf / "_ibl_wheel.position.npy", np.cumsum(rng.normal(0, 0.01, len(samples))))
    frames = np.arange(0, seconds, 1 / 60)
    np.save(alf / "_ibl_leftCamera.times.npy", frames)
    np.save(alf / "leftCamera.ROIMotionEnergy.npy", rng.random(len(frames)))
    index_alf(root)


def measure(root: Path) -> dict:
    """Prepare the one session; seconds, peak bytes, and the size of the file."""
    one = ibl.connect(root)
    eids, before = ibl.search(one), peak_bytes()
    how = {"workers": 1, "overwrite": True, "progress": False}
    profiler = cProfile.Profile()
    act = lambda: profiler.runcall(ibl.prepare, one, eids, root / "out", **how)  # noqa: E731
    done, (total, _) = timed(act, torch.device("cpu"))
    peak = peak_bytes()
    (path,) = done.paths
    table = pstats.Stats(profiler).stats.items()
    spent = {name: row[3] for (file, _, name), row in table if "mtm" in Path(file).parts}
    stages = {stage: spent.get(name, 0.0) for stage, name in STAGES.items()}
    n_spikes = sum(np.load(file).size for file in root.rglob("spikes.clusters.npy"))
    moved = 12 * n_spikes + Session.load(path).counts.nbytes  # a spike: float64 and int32
    return {
        "seconds": total,
        "floor_of_binning": moved / bandwidth(),
        "stages": stages | {"rest": total - sum(stages.values())},
        "peak_bytes": peak,
        "peak_bytes_above_imports": peak - before,
        "file_bytes": path.stat().st_size,
    }


def bandwidth(n_bytes: int = 400_000_000) -> float:
    """Bytes a second that numpy reads and writes when it copies; the best of three."""
    source, target, cpu = np.ones(n_bytes // 8), np.ones(n_bytes // 8), torch.device("cpu")
    return 2 * n_bytes / min(timed(lambda: np.copyto(target, source), cpu)[1][0] for _ in range(3))


def run(spikes: int, trials: int, neurons: int) -> dict:
    """Figures of one size: of three runs, that with the median time."""
    with tempfile.TemporaryDirectory() as folder:
        make_recording(Path(folder), spikes, trials, neurons)
        runs = [in_process(__file__, "--measure", folder) for _ in range(3)]
    runs.sort(key=lambda run: run["seconds"])
    return {"spikes": spikes, "trials": trials, "neurons": neurons, **runs[1]}


def main() -> None:
    """Run the benchmark, or one measurement in a process of its own."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
        return
    sizes = [WHOLE | {key: WHOLE[key] // part} for key in WHOLE for part in (4, 2)]
    result = {"realistic": run(**WHOLE)}
    result["growth"] = [run(**smaller) for smaller in sizes]
    result["machine"] = machine()
    print(json.dumps(result, indent=1))
    write_json(RESULTS / "prepare.json", result)


if __name__ == "__main__":
    main()
