"""Threads that wait for each other: one training alone, and two and three at once.

    python benchmarks/threads.py [--rounds 3] [--json OUT]

A small model is trained in a process of its own. A thread of GNU's OpenMP that waits for another
turns round 300,000 times (some milliseconds) before it sleeps, unless it is told otherwise, which
`import mtm` does where nobody else has. Tried are as many turns, a thousand, none, and a single
thread, which need not wait; alone on the machine, and beside one and two other processes that train
in the same way. There a thread that turns keeps the one that it waits for from its core. A run that
takes longer than --limit is stopped, and counts as that.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "300,000 turns": {"GOMP_SPINCOUNT": "300000"},  # GNU's default
    "1,000 turns": {"GOMP_SPINCOUNT": "1000"},  # ours
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OTHER = """
import torch, mtm
session = mtm.simulate(1, 100, 48, seed=1)
while True:
    mtm.fit(session, depth=1, epochs=1, progress=False, device="cpu")
    print("trained", flush=True)
"""
TRAIN = """
import json, sys, time, torch  # which reads the environment now, before mtm adds to it
import mtm
n_trials, n_neurons, depth, epochs = map(int, sys.argv[1:])
session = mtm.simulate(1, n_trials, n_neurons, seed=0)
mtm.fit(session, depth=depth, epochs=1, progress=False, device="cpu")
start = time.perf_counter()
mtm.fit(session, depth=depth, epochs=epochs, validations=2, progress=False, device="cpu")
print(json.dumps([time.perf_counter() - start, torch.get_num_threads()]))
"""


def plain() -> dict[str, str]:
    """The environment without a word on threads."""
    said = ("OMP_", "GOMP_", "KMP_", "MKL_")
    return {key: value for key, value in os.environ.items() if not key.startswith(said)}


def measure(way: str, sizes: list[int], limit: float) -> tuple[float, int | None]:
    """Seconds that training took, and the threads it had; the limit where it took longer."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, *map(str, sizes)],
            env=plain() | WAYS[way], cwd=ROOT, capture_output=True, text=True, check=True,
            timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return limit, None
    return tuple(json.loads(done.stdout))


def start_other(way: str) -> subprocess.Popen[bytes]:
    """Another process that trains until it is killed; it has begun."""
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER], env=plain() | WAYS[way], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    return other


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="each way is tried, in turn")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--neurons", type=int, default=48)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a run may take")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/threads.json")
    options = parser.parse_args()
    sizes = [options.trials, options.neurons, options.depth, options.epochs]
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for way in WAYS:
            for n, beside in enumerate(("alone", "two at once", "three at once")):
                others = [start_other(way) for _ in range(n)]
                taken, threads = measure(way, sizes, options.limit)
                for other in others:
                    other.kill()
                    other.wait()
                seconds.setdefault(beside, {}).setdefault(way, []).append(round(taken, 3))
                print(f"{beside}, {way}: {taken:.2f} s, {threads} threads", flush=True)
    found = {
        "limit_s": options.limit,
        "sizes": dict(zip(("trials", "neurons", "depth", "epochs"), sizes, strict=True)),
        "seconds": seconds,
        "median": {
            beside: {way: statistics.median(values) for way, values in ways.items()}
            for beside, ways in seconds.items()
        },
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "platform": platform.platform(terse=True),
        "date": time.strftime("%Y-%m-%d"),
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["median"], indent=1))


if __name__ == "__main__":
    main()
