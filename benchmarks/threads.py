"""What several trainings at once on one CPU cost each other, by how their threads wait.

    python benchmarks/threads.py

A thread of GNU's OpenMP that waits for another one spins 300,000 times (some milliseconds) before
it sleeps, and keeps the thread that it waits for from its core where other processes compute. Tried
are as many spins, a thousand (as in the Makefile), none, and a single thread; alone, and beside one
and two other processes that train in the same way. A run of more than a minute counts as one.
"""

import json
import os
import statistics
import subprocess
import sys

from common import RESULTS, machine, write_json

WAYS = {
    "300,000 turns": {"GOMP_SPINCOUNT": "300000"},  # GNU's default
    "1,000 turns": {"GOMP_SPINCOUNT": "1000"},  # ours
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
TRAIN = """
import sys, time, mtm
session = mtm.simulate(1, 100, 48, seed=0)
epochs, forever = int(sys.argv[1]), sys.argv[2] == "forever"
mtm.fit(session, depth=1, epochs=1, progress=False, device="cpu")
start = time.perf_counter()
while True:
    mtm.fit(session, depth=1, epochs=epochs, validations=1, progress=False, device="cpu")
    print(time.perf_counter() - start, flush=True)
    if not forever: break
"""


def start(way: str, epochs: int, how: str) -> subprocess.Popen[str]:
    """A process that trains, once or until it is killed."""
    silent = ("OMP_", "GOMP_", "KMP_", "MKL_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(silent)} | WAYS[way]
    command = [sys.executable, "-c", TRAIN, str(epochs), how]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def measure(way: str, n_others: int, epochs: int = 4, limit: float = 60.0) -> float:
    """Seconds that training took beside others, at most ``limit``."""
    others = [start(way, 1, "forever") for _ in range(n_others)]
    for other in others:
        other.stdout.readline()  # it has begun
    trained = start(way, epochs, "once")
    try:
        return round(float(trained.communicate(timeout=limit)[0]), 3)
    except subprocess.TimeoutExpired:
        return limit
    finally:
        for process in (trained, *others):
            process.kill()
            process.wait()


def main() -> None:
    """Try each way in turn, three times, and write the seconds and their medians."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(3):
        for way in WAYS:
            for n, beside in enumerate(("alone", "two at once", "three at once")):
                found.setdefault(beside, {}).setdefault(way, []).append(measure(way, n))
    median = {
        beside: {way: statistics.median(seconds) for way, seconds in ways.items()}
        for beside, ways in found.items()
    }
    facts = {"seconds": found, "median": median, "cores": os.cpu_count(), **machine()}
    write_json(RESULTS / "threads.json", facts)
    print(json.dumps(median, indent=1))


if __name__ == "__main__":
    main()
