"""All six tasks; the four activity tasks beside a plain loop that takes one query at a time.

    python benchmarks/evaluate.py [--device cuda] [--small] [--neurons-timed 24] [--repeats 3]
    python benchmarks/evaluate.py --report-only    the whole report with a small model, nothing else

One session of 700 neurons in 8 regions, 120 test trials of 100 bins of 20 ms: Poisson spikes at
constant rates, log-normal over neurons with a mean of 4 Hz. The plain loop hides one query's
neurons in all trials, makes one forward pass with all outputs, fetches the result, and takes the
next. Ours and the plain loop are timed in turn, on the same neurons to score; all are in the input.
On a CPU these are a random few; what all would take is estimated from the time of a pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, in_process, machine, peak_bytes, timed, write_json

from mtm import evaluate
from mtm.masks import Mask
from mtm.model import MtM, MtMConfig
from mtm.prediction import TASKS, predict_held_out, queries_of
from mtm.session import Session

N_TRIALS, N_BINS, BIN_SIZE, N_NEURONS, N_REGIONS = 120, 100, 0.02, 700, 8
MEAN_RATE, SPREAD = 4.0, 1.6  # Hz; standard deviation of the log rates
PUBLISHED = {"positions": "learned", "input_counts": "raw"}  # the authors' options
DEPTHS = {"small": 2, "paper": 5}
FEW = {"small": 16, "paper": 3}  # neurons scored by both on a CPU


def main() -> None:
    """Measure every model in a process of its own, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of ours and the plain loop")
    parser.add_argument("--neurons-timed", type=int, help="default: all on a GPU, few on a CPU")
    parser.add_argument("--small", action="store_true", help="a tiny session, to try the script")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", choices=DEPTHS, help="measure this one here, and print JSON")
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measure(options)))
        return
    report = machine(options.device)
    end = ".json"
    if options.device.startswith("cuda"):
        end = f"_{report['device'].replace(' ', '_').lower()}.json"
    name = f"report{end}" if options.report_only else f"evaluate{end}"
    report |= {"small": options.small, "repeats": options.repeats}
    if options.report_only:
        report |= whole_report(options)
    else:
        counts = recording(options.small).counts
        report |= dict(zip(("trials", "bins", "neurons"), counts.shape, strict=True))
        report["mean_rate_hz"] = float(counts.mean() / BIN_SIZE)
        report["models"] = {
            model: in_process(__file__, *sys.argv[1:], "--model", model) for model in DEPTHS
        }
    print(json.dumps(report, indent=1))
    if options.json or not options.small:
        write_json(options.json or RESULTS / name, report)


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
    config = MtMConfig.from_depth(depth, **PUBLISHED)
    model = MtM(config, session.n_bins, {session.name: session.n_neurons}, init="paper")
    model.split_seed = 0
    return model.to(device).eval()


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Numbers of each task, the estimates of all tasks together, and peaks of memory."""
    session = recording(options.small)
    model = untrained(session, DEPTHS[options.model], options.device)
    few = options.neurons_timed
    if few is None:
        few = session.n_neurons if model.device.type == "cuda" else FEW[options.model]
    scored = np.random.default_rng(1).permutation(session.n_neurons)[:few]
    wanted = np.isin(np.arange(session.n_neurons), scored)
    trials = np.arange(session.n_trials)
    predict_held_out(model, session, "forward-prediction", trials, wanted)
    peak = {"ours_peak_gb": peak_bytes(model.device) / 1e9}
    tasks = {task: compare(model, session, task, wanted, options.repeats) for task in TASKS}
    total = {
        f"all_neurons_{who}_s": sum(task[f"all_neurons_{who}_s"] for task in tasks.values())
        for who in ("ours", "plain")
    }
    peak["plain_peak_gb"] = peak_bytes(model.device) / 1e9
    return tasks | {"all tasks": total, "memory": peak}


def compare(
    model: MtM, session: Session, task: str, wanted: np.ndarray, repeats: int
) -> dict[str, float]:
    """Medians of ours and of the plain loop, in turn after an untimed start, and their distance."""
    trials, two = np.arange(session.n_trials), wanted & (np.cumsum(wanted) <= 2)
    rounds, difference = [], 0.0
    for neurons in [two, *[wanted] * repeats]:
        ours, our_seconds = timed(
            lambda n=neurons: predict_held_out(model, session, task, trials, n), model.device
        )
        plain, plain_seconds = timed(
            lambda n=neurons: one_query_at_a_time(model, session, task, n), model.device
        )
        rounds.append([*our_seconds, *plain_seconds])
        difference = max(difference, float(np.nanmax(np.abs(ours - plain))))
    ours_s, ours_cpu_s, plain_s, plain_cpu_s = np.median(rounds[1:], axis=0).tolist()
    n_queries, n_all = (
        len(queries_of(task, session, some)[0]) for some in (wanted, np.ones_like(wanted))
    )
    return {
        "neurons_scored": int(wanted.sum()),
        "passes": n_queries * session.n_trials,
        "ours_s": ours_s,
        "plain_s": plain_s,
        "plain_over_ours": plain_s / ours_s,
        "ours_cpu_s": ours_cpu_s,
        "plain_cpu_s": plain_cpu_s,
        "plain_over_ours_cpu": plain_cpu_s / ours_cpu_s,
        "all_neurons_passes": n_all * session.n_trials,
        "all_neurons_ours_s": ours_s * n_all / n_queries,
        "all_neurons_plain_s": plain_s * n_all / n_queries,
        "largest_difference_of_log_rates": difference,
    }


def whole_report(options: argparse.Namespace) -> dict[str, object]:
    """Seconds of `evaluate(model, session)`, task by task: what a user waits for."""
    session = recording(options.small, fold=5)
    model = untrained(session, DEPTHS["small"], options.device)
    seconds: dict[str, float] = {}
    for task in [*TASKS, "choice", "trace"]:
        how = {"tasks": [task], "progress": True}
        _, (spent, _) = timed(lambda how=how: evaluate(model, session, **how), model.device)
        seconds[task] = round(spent, 1)
        print(task, seconds[task], flush=True)
    sizes = {"trials": session.n_trials, "test_trials": len(session.split().test)}
    sizes |= {"bins": session.n_bins, "neurons": session.n_neurons, "depth": DEPTHS["small"]}
    return sizes | {"seconds": seconds, "total_s": round(sum(seconds.values()), 1)}


@torch.no_grad()
def one_query_at_a_time(model: MtM, session: Session, task: str, wanted: np.ndarray) -> np.ndarray:
    """Log-rates as :func:`predict_held_out` returns them, made as plainly as can be."""
    found = np.full(session.counts.shape, np.nan)
    queries, all_scored, bins = queries_of(task, session, wanted)
    counts = torch.from_numpy(session.counts.astype(np.float32)).to(model.device)
    for neurons, scored in zip(queries, all_scored, strict=True):
        entries = torch.zeros(session.counts.shape[1:], dtype=torch.bool)
        entries[bins] = torch.from_numpy(neurons)
        hidden = entries.to(model.device).expand(counts.shape)
        mask = Mask(hidden, hidden, causal=task == "forward-prediction")
        log_rates = model(counts, TASKS[task], mask, session.name).cpu().numpy()
        entries = entries.numpy() & scored
        found[:, entries] = log_rates[:, entries]
    return found


if __name__ == "__main__":
    main()
