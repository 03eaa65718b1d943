"""How long each chapter of the book takes, alone and with one thread.

    python benchmarks/book.py [NAME ...]

Runs the notebooks of book/ one after the other, or those whose names begin so, and writes their
seconds to benchmarks/results/book.json: wall time, and CPU time of the kernel and all it starts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS, machine, write_json

BOOK = Path(__file__).parents[1] / "book"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=[""], help="beginnings of names (default all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "book.json")
    options = parser.parse_args()
    seconds = {}
    for page in sorted(BOOK.glob("[0-9]*.ipynb")):
        if page.name.startswith(tuple(options.names)):
            seconds[page.stem] = run(page)
            print(page.stem, seconds[page.stem], flush=True)
    cpu = round(sum(each["cpu_s"] for each in seconds.values()), 1)
    write_json(options.out, machine() | {"threads": 1, "cpu_s": cpu, "chapters": seconds})


def run(page: Path) -> dict[str, float]:
    """Seconds of one notebook, whose outputs are not kept."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    command = [Path(sys.executable).with_name("jupyter-execute"), page, "--timeout", "1800"]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=one_thread, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # with the processes that it waited for
    if status:
        raise RuntimeError(f"{page.name} failed")
    wall, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1)}


if __name__ == "__main__":
    main()
