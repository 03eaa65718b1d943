"""How long evaluation takes: each activity task at two sizes of model, and the whole report.

    python benchmarks/evaluate.py [--device cuda] [--small] [--neurons-timed 24]

One session of 700 neurons in 8 regions, 120 test trials of 100 bins of 20 ms: Poisson spikes at
constant rates, log-normal over neurons with a mean of 4 Hz. On a CPU a random few neurons are
scored (all are in the input), and what all would take is estimated from the number of passes. The
report has the choice and a trace as well, decoded from 600 trials.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import torch
from common import in_process, machine, peak_bytes, speed_parser, speed_path, timed, write_json

from mtm import evaluate
from mtm.model import MtM, MtMConfig
from mtm.prediction import TASKS, predict_held_out, queries_of
from mtm.session import Session

N_TRIALS, N_BINS, BIN_SIZE, N_NEURONS, N_REGIONS = 120, 100, 0.02, 700, 8
REPEATS = 3
MEAN_RATE, SPREAD = 4.0, 1.6  # Hz; standard deviation of the log rates
DEPTHS = {"small": 2, "paper": 5}
FEW = {"small": 16, "paper": 3}  # neurons scored on a CPU


def main() -> None:
    """Measure every model in a process of its own, print and write the JSON."""
    parser = speed_parser(__doc__)
    parser.add_argument("--neurons-timed", type=int, help="default: all on a GPU, few on a CPU")
    parser.add_argument("--model", choices=DEPTHS, help="measure this one here, and print JSON")
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measure(options)))
        return
    report = machine(options.device) | {"small": options.small, "repeats": REPEATS}
    report["models"] = {m: in_process(__file__, *sys.argv[1:], "--model", m) for m in DEPTHS}
    report["whole report, small model"] = whole_report(options)
    print(json.dumps(report, indent=1))
    if options.json or not options.small:
        write_json(speed_path("evaluate", options), report)


def recording(small: bool, fold: int = 1) -> Session:
    """Poisson spikes at log-normal rates, random behaviour; ``fold`` times as many trials."""
    rng = np.random.default_rng(0)
    n_trials, n_neurons = (12, 40) if small else (N_TRIALS, N_NEURONS)
    n_trials *= fold
    rates = rng.lognormal(0, SPREAD, n_neurons)
    rates *= MEAN_RATE / rates.mean()
    counts = rng.poisson(rates * BIN_SIZE, (n_trials, N_BINS, n_neurons)).astype(np.uint8)
    regions = [f"region {n % N_REGIONS}" for n in range(n_neurons)]
    behaviour = {"choice": rng.choice([-1, 1], n_trials), "trace": rng.random((n_trials, N_BINS))}
    return Session(counts, regions, "poisson", bin_size=BIN_SIZE, behaviour=behaviour)


def untrained(session: Session, depth: int, device: str) -> MtM:
    """A model with weights as the authors start them."""
    torch.manual_seed(0)
    config = MtMConfig.published(depth)
    model = MtM(config, session.n_bins, {session.name: session.n_neurons}, init="paper")
    model.split_seed = 0
    return model.to(device).eval()


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Seconds of each task and, estimated, of all neurons; peak of memory."""
    session = recording(options.small)
    model = untrained(session, DEPTHS[options.model], options.device)
    few = options.neurons_timed
    if few is None:
        few = session.n_neurons if model.device.type == "cuda" else FEW[options.model]
    scored = np.random.default_rng(1).permutation(session.n_neurons)[:few]
    wanted, trials = np.isin(np.arange(session.n_neurons), scored), np.arange(session.n_trials)
    found: dict[str, object] = {}
    for task in TASKS:
        act = lambda task=task: predict_held_out(model, session, task, trials, wanted)  # noqa: E731
        times = [timed(act, model.device)[1] for _ in range(REPEATS + 1)]
        wall, cpu = np.median(times[1:], axis=0).tolist()  # without the first, untimed start
        asked = wanted, np.ones_like(wanted)
        n_queries, n_all = (len(queries_of(task, session, some).hidden) for some in asked)
        found[task] = {
            "neurons_scored": int(wanted.sum()),
            "passes": n_queries * session.n_trials,
            "s": wall,
            "cpu_s": cpu,
            "all_neurons_passes": n_all * session.n_trials,
            "all_neurons_s": wall * n_all / n_queries,
        }
    return found | {"peak_gb": peak_bytes(model.device) / 1e9}


def whole_report(options: argparse.Namespace) -> dict[str, object]:
    """Seconds of `evaluate(model, session)`, task by task: what a user waits for."""
    session = recording(options.small, fold=5)
    model = untrained(session, DEPTHS["small"], options.device)
    seconds: dict[str, float] = {}
    for task in [*TASKS, "choice", "trace"]:
        act = lambda task=task: evaluate(model, session, tasks=[task], progress=True)  # noqa: E731
        seconds[task] = round(timed(act, model.device)[1][0], 1)
        print(task, seconds[task], flush=True)
    sizes = {"trials": session.n_trials, "test_trials": len(session.split().test)}
    sizes |= {"bins": session.n_bins, "neurons": session.n_neurons, "depth": DEPTHS["small"]}
    return sizes | {"seconds": seconds, "total_s": round(sum(seconds.values()), 1)}


if __name__ == "__main__":
    main()
