"""Fault drill: what is left when a process is killed.

    python tests/drills/faults.py [--kills 30] [--json OUT]

SIGKILL while training, saving and preparing: every file under its final name is whole, and a run
that goes on ends with the weights of a run that nobody disturbed. The tests hold a case of each;
the drill repeats them at random moments, and counts. POSIX only. Exits with 1 where there are
problems.
"""

import argparse
import json
import multiprocessing
import platform
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mtm  # noqa: E402
from mtm import checkpoint  # noqa: E402

N_RECORDINGS = 200
SIZES = {"width": 32, "heads": 2, "mlp_width": 32, "stitch_width": 16}


def killed(job, seconds):
    """Start a job in a process and kill it after some seconds; whether it was still at work."""
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def animals():
    return mtm.simulate(2, 40, 12, seed=3, mean_rate=30.0, bin_size=0.1)


def recording(number):
    """A recording to prepare."""
    counts = np.random.default_rng(number).poisson(1.0, (60, 40, 50))
    return mtm.Session(counts, name=str(number))


def train(folder):
    settings = {"epochs": 240, "validations": 120, "batch_size": 8, "batches_per_step": 1}
    how = {"progress": False, "device": "cpu", "save_every": 0.0}
    mtm.fit(animals(), mtm.MtMConfig(depth=1, **SIZES), folder=folder, **settings, **how)


def same_tensors(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def drill(folder, kills, check):
    """Kill training, saving and preparing at random moments."""
    chance = random.Random(0)
    torch.set_num_threads(1)
    train(folder / "whole")
    whole = mtm.load(folder / "whole")
    for _ in range(kills):
        if killed(lambda: train(folder / "run"), chance.uniform(0.3, 1.2)):
            check("kills of training that landed")
        if (folder / "run" / checkpoint.MODEL).exists():
            mtm.load(folder / "run")
            check("models read after a kill")
    train(folder / "run")
    same = same_tensors(whole, mtm.load(folder / "run"))
    check("a killed run ends with the weights of an undisturbed one", same)

    sessions = animals()
    models = [mtm.MtM(mtm.MtMConfig(depth=depth, **SIZES), 20, {"a": 12}) for depth in (1, 2)]

    def save_in_turn():
        for turn in range(10**6):
            mtm.save(models[turn % 2], folder / "saved")
            sessions[turn % 2].save(folder / "saved.npz")

    for _ in range(kills):
        if killed(save_in_turn, chance.uniform(0.1, 1)):
            check("kills of saving that landed")
        if not (folder / "saved.npz").exists():
            continue
        saved, session = mtm.load(folder / "saved"), mtm.Session.load(folder / "saved.npz")
        fine = any(same_tensors(saved, model) for model in models)
        fine &= any(np.array_equal(session.counts, each.counts) for each in sessions)
        check("after a kill while saving there is the one or the other file", fine)

    def prepare():
        mtm.prepare(recording, range(N_RECORDINGS), folder / "out", workers=1, progress=False)

    for _ in range(kills):
        if killed(prepare, chance.uniform(0.02, 0.1)):
            check("kills of preparing that landed")
        for path in (folder / "out").glob("*.npz"):
            counts = mtm.Session.load(path).counts
            fine = np.array_equal(counts, recording(int(path.stem)).counts)
            check("after a kill while preparing every file is whole", fine)
    prepare()
    check("preparing goes on", len(list((folder / "out").glob("*.npz"))) == N_RECORDINGS)


def main():
    """Run the drill; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts, problems, start = Counter(), [], time.perf_counter()

    def check(what, fine=True):
        counts[what] += 1
        problems.extend([] if fine else [what])

    with tempfile.TemporaryDirectory() as folder:
        drill(Path(folder), options.kills, check)
    found = {"machine": platform.machine(), "torch": torch.__version__, **counts}
    found |= {"problems": problems, "seconds": round(time.perf_counter() - start)}
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
