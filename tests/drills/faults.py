"""Fault drills: what is left when a process is killed, a disk is full or a file is damaged.

    python tests/drills/faults.py [--kills 30] [--damages 40] [--json OUT]

The tests hold a case of each kind; a drill repeats it at random moments and places, and counts.
POSIX only. Exits with 1 where there are problems.

kills    SIGKILL while training, saving and preparing: every file under its final name is whole, and
         a run that goes on ends with the weights of a run that nobody disturbed.
disk     a file that does not fit: the old file stays, the error names file and remedy.
damage   files that were cut, replaced by other files, or that hold a pickle: refused with a reason
         or read as before, and no code in them runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import platform
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mtm  # noqa: E402
from mtm import checkpoint  # noqa: E402
from mtm.model import CheckpointError  # noqa: E402

N_RECORDINGS = 200
SIZES = {"width": 32, "heads": 2, "mlp_width": 32, "stitch_width": 16}


class Tally:
    """Counts of a drill, and the problems that it found."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def check(self, what: str, fine: bool) -> None:
        self.counts[what] += 1
        self.problems += [] if fine else [f"not so: {what}"]


def animals() -> list[mtm.Session]:
    return mtm.simulate(2, 40, 12, seed=3, mean_rate=30.0, bin_size=0.1)


# ------------------------------------------------------------------------------- kills


def killed(job: Callable[[], Any], seconds: float) -> bool:
    """Start a job in a process and kill it after some seconds; whether it was still at work."""
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def train(folder: Path, restart: bool = False) -> None:
    settings = {"epochs": 40, "validations": 20, "batch_size": 8, "batches_per_step": 1}
    how = {"progress": False, "device": "cpu", "save_every": 0.0, "restart": restart}
    mtm.fit(animals(), mtm.MtMConfig(depth=1, **SIZES), folder=folder, **settings, **how)


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def drill_kills(folder: Path, kills: int, tally: Tally) -> None:
    """Kill training, saving and preparing at random moments."""
    chance = random.Random(0)
    torch.set_num_threads(1)
    train(folder / "whole")
    whole = mtm.load(folder / "whole")
    for _ in range(kills):
        at_work = killed(lambda: train(folder / "run"), chance.uniform(0.3, 2.0))
        tally.counts["kills of training that landed"] += at_work
        if (folder / "run" / checkpoint.MODEL).exists():
            mtm.load(folder / "run")
            tally.counts["models read after a kill"] += 1
    train(folder / "run")
    same = same_tensors(whole, mtm.load(folder / "run"))
    tally.check("a killed run ends with the weights of an undisturbed one", same)

    sessions = animals()
    models = [mtm.MtM(mtm.MtMConfig(depth=depth, **SIZES), 20, {"a": 12}) for depth in (1, 2)]

    def save_in_turn() -> None:
        for turn in range(10**6):
            mtm.save(models[turn % 2], folder / "saved")
            sessions[turn % 2].save(folder / "saved.npz")

    for _ in range(kills):
        tally.counts["kills of saving that landed"] += killed(save_in_turn, chance.uniform(0.1, 1))
        if not (folder / "saved.npz").exists():
            continue
        saved, session = mtm.load(folder / "saved"), mtm.Session.load(folder / "saved.npz")
        fine = any(same_tensors(saved, model) for model in models)
        fine &= any(np.array_equal(session.counts, each.counts) for each in sessions)
        tally.check("after a kill while saving there is the one or the other file", fine)

    def prepare() -> None:
        mtm.prepare(recording, range(N_RECORDINGS), folder / "out", workers=1, progress=False)

    for _ in range(kills):
        tally.counts["kills of preparing that landed"] += killed(prepare, chance.uniform(0.02, 0.3))
        for path in (folder / "out").glob("*.npz"):
            counts = mtm.Session.load(path).counts
            fine = np.array_equal(counts, recording(int(path.stem)).counts)
            tally.check("after a kill while preparing every file is whole", fine)
    prepare()
    tally.check("preparing goes on", len(list((folder / "out").glob("*.npz"))) == N_RECORDINGS)


def recording(number: int) -> mtm.Session:
    """A recording to prepare."""
    counts = np.random.default_rng(number).poisson(1.0, (60, 40, 50))
    return mtm.Session(counts, name=str(number))


# ------------------------------------------------------------------------------- disk


def drill_disk(folder: Path, tally: Tally) -> None:
    """Write files of which no more than half a megabyte fits, over smaller ones."""
    small, large = (
        mtm.MtM(mtm.MtMConfig(depth=1, **SIZES | {"mlp_width": width}), 20, {"a": 12})
        for width in (32, 20_000)
    )
    session, path = animals()[0], folder / "session.npz"
    session.save(path)
    mtm.save(small, folder / "model")
    many = mtm.Session(np.random.default_rng(0).poisson(1.0, (200, 100, 100)))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of the end of the process
    for name, write in (
        (path.name, lambda: many.save(path)),
        (checkpoint.MODEL, lambda: mtm.save(large, folder / "model")),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, unlimited[1]))
        try:
            write()
            tally.problems.append(f"{name} fits")
        except OSError as error:
            named = name in str(error) and "free some space" in str(error)
            tally.check("the error of a full disk names file and remedy", named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    fine = np.array_equal(mtm.Session.load(path).counts, session.counts)
    fine &= same_tensors(mtm.load(folder / "model"), small)
    tally.check("where the disk is full, the old files stay", fine)
    tally.check("nothing half written is left", not list(folder.rglob(".*.part")))


# ------------------------------------------------------------------------------- damage


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "it ran")


def drill_damage(folder: Path, damages: int, tally: Tally) -> None:
    """Open files that were cut, are of another kind, or hold a pickle."""
    rng, marker = np.random.default_rng(0), folder / "marker"
    session = animals()[0]
    model = mtm.MtM(mtm.MtMConfig(depth=1, **SIZES), 20, {session.name: 12})
    saved = mtm.save(model, folder / "model")
    official = folder / "official.pt"
    readers: dict[Path, Callable[[], Any]] = {
        session.save(folder / "session.npz"): lambda: mtm.Session.load(folder / "session.npz"),
        saved / checkpoint.MODEL: lambda: mtm.load(saved),
        official: lambda: mtm.from_official(official, {"a": 12}),
    }
    torch.save({"encoder.out_norm.weight": torch.zeros(8)}, official)
    contents = {path: path.read_bytes() for path in readers}
    for path, read in readers.items():
        whole = contents[path]
        wrong = [whole[: rng.integers(len(whole))] for _ in range(damages)]
        wrong += [b"", bytes(1000), b"{}", pickle.dumps(Bomb(marker))]
        wrong += [other for place, other in contents.items() if place != path]
        for number, content in enumerate(wrong):
            path.write_bytes(content)
            try:
                read()
                tally.problems.append(f"{path.name}, damage {number}: no error")
            except (mtm.SessionError, CheckpointError) as error:
                named = path.name in str(error) or str(path.parent) in str(error)
                tally.check("the error of a damaged file names it", named)
        path.write_bytes(whole)
    tally.check("no code in a file was run", not marker.exists())
    pickle.loads(pickle.dumps(Bomb(marker)))
    tally.check("the pickle would have shown itself", marker.exists())


def main() -> int:
    """Run the drills; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each kind")
    parser.add_argument("--damages", type=int, default=40, help="cuts of each file")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__}
    for drill, amount in ((drill_kills, options.kills), (drill_disk, None),
                          (drill_damage, options.damages)):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            tally, start = Tally(), time.perf_counter()
            drill(Path(folder), *(() if amount is None else (amount,)), tally)
        seconds = round(time.perf_counter() - start)
        counts = {**tally.counts, "problems": tally.problems, "seconds": seconds}
        found[drill.__name__.removeprefix("drill_")] = counts
        print(json.dumps({drill.__name__: counts}, indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(part["problems"] for part in found.values() if isinstance(part, dict)))


if __name__ == "__main__":
    sys.exit(main())
