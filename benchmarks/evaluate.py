"""All six tasks; the four activity tasks beside a plain loop that takes one query at a time.

    python benchmarks/evaluate.py [--device cuda] [--small] [--neurons-timed 24] [--repeats 3]
    python benchmarks/evaluate.py --report-only    the whole report with a small model, nothing else

One session of 700 neurons in 8 regions, 120 test trials of 100 bins of 20 ms: Poisson spikes at
constant rates, log-normal over neurons with a mean of 4 Hz, spread so that a quarter of all pairs
(neuron, trial) is silent, as in 2 s of the recordings of Steinmetz et al. 2019. The plain loop
hides one query's neurons in all trials, makes one forward pass in fp32 with all outputs, fetches
the result, and takes the next.

Ours and the plain loop are timed in turn, on the same neurons to score; all are in the input. On a
CPU these are a random few. What all would take is therefore estimated, too: the seconds of a
forward pass of one trial times all passes. On a CPU these are CPU seconds over threads, which other
work on the machine does not lengthen. With the small model the whole report of all neurons is timed
as well: four tasks in the test trials of 600, and the choice and a trace decoded, which is fitted
to the other 480.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

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
    cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    name = f"_{device.replace(' ', '_').lower()}.json" if cuda else ".json"
    machine = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if options.report_only:
        write(options, f"report{name}", machine | whole_report(options))
        return
    results = {}
    for model in DEPTHS:
        command = [sys.executable, __file__, *sys.argv[1:], "--model", model]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[model] = json.loads(done.stdout.splitlines()[-1])
        print(model, json.dumps(results[model], indent=1), flush=True)
    counts = recording(options.small).counts
    report = machine | {
        "trials": counts.shape[0],
        "bins": counts.shape[1],
        "neurons": counts.shape[2],
        "regions": N_REGIONS,
        "mean_rate_hz": round(float(counts.mean() / BIN_SIZE), 3),
        "silent_share": round(float((counts.sum(axis=1) == 0).mean()), 4),
        "small": options.small,
        "repeats": options.repeats,
        "models": results,
    }
    write(options, f"evaluate{name}", report)


def write(options: argparse.Namespace, name: str, report: dict[str, object]) -> None:
    """Keep a report, but not that of a trial run unless it is asked for."""
    path = options.json or Path(__file__).parent / "results" / name
    if options.json or not options.small:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


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


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Numbers of each task, their sums, and the peaks of memory."""
    torch.manual_seed(0)
    device, session = torch.device(options.device), recording(options.small)
    few = options.neurons_timed
    if few is None:
        few = session.n_neurons if device.type == "cuda" else FEW[options.model]
    scored = np.random.default_rng(1).permutation(session.n_neurons)[:few]
    wanted = np.isin(np.arange(session.n_neurons), scored)
    config = MtMConfig.from_depth(DEPTHS[options.model], **PUBLISHED)
    model = MtM(config, session.n_bins, {session.name: session.n_neurons}, init="paper")
    model.split_seed = 0
    model = model.to(device).eval()
    whole = device.type == "cuda" or options.small or options.model == "small"
    ours = {task: activity(model, session, task) if whole else {} for task in TASKS}
    if not whole:  # find out what memory it takes before the plain loop does
        predict_held_out(model, session, "forward-prediction", np.arange(session.n_trials), wanted)
    memory = {"ours_peak_gb": peak_gb(device)}
    tasks = {}
    for task in TASKS:
        pair = compare(model, session, task, wanted, options.repeats)
        tasks[task] = pair | ours[task] | all_neurons(session, task, pair, device)
    together = [key for key in tasks["co-smoothing"] if key.startswith("all_neurons")]
    total = {key: sum(tasks[task][key] for task in TASKS) for key in together}
    for numbers in [total, *tasks.values()]:
        ours_s, plain_s = (numbers[f"all_neurons_{who}_estimate_s"] for who in ("ours", "plain"))
        numbers["all_neurons_plain_over_ours"] = plain_s / ours_s
    tasks["all tasks"] = total
    tasks["memory"] = memory | {"plain_peak_gb": peak_gb(device)}
    return {
        part: {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in found.items()}
        for part, found in tasks.items()
    }


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
    n_queries = len(queries_of(task, session, wanted)[0])
    return {
        "neurons_scored": int(wanted.sum()),
        "queries": n_queries,
        "ours_s": ours_s,
        "plain_s": plain_s,
        "plain_over_ours": plain_s / ours_s,
        "ours_cpu_s": ours_cpu_s,
        "plain_cpu_s": plain_cpu_s,
        "plain_over_ours_cpu": plain_cpu_s / ours_cpu_s,
        "ours_passes": passes(session, task, wanted),
        "plain_passes": n_queries * session.n_trials,
        "largest_difference_of_log_rates": difference,
    }


def all_neurons(
    session: Session, task: str, pair: dict[str, float], device: torch.device
) -> dict[str, float]:
    """Passes of both, and the seconds that they would take, from those of a few neurons."""
    everything = np.ones(session.n_neurons, dtype=bool)
    n_ours = passes(session, task, everything)
    n_plain = len(queries_of(task, session, everything)[0]) * session.n_trials
    unit, workers = ("s", 1) if device.type == "cuda" else ("cpu_s", torch.get_num_threads())
    ours, plain = (pair[f"{who}_{unit}"] / pair[f"{who}_passes"] for who in ("ours", "plain"))
    return {
        "all_neurons_ours_passes": n_ours,
        "all_neurons_plain_passes": n_plain,
        "all_neurons_ours_estimate_s": ours / workers * n_ours,
        "all_neurons_plain_estimate_s": plain / workers * n_plain,
    }


def passes(session: Session, task: str, wanted: np.ndarray) -> int:
    """Forward passes of one trial that ours makes."""
    hidden, *_ = queries_of(task, session, wanted)
    return len(hidden) * session.n_trials


def activity(model: MtM, session: Session, task: str) -> dict[str, float]:
    """Seconds of predicting and scoring all neurons of the session."""
    trials = np.arange(session.n_trials)
    _, (spent, _) = timed(
        lambda: evaluate(model, session, tasks=[task], trials=trials, progress=True), model.device
    )
    return {"all_neurons_ours_s": spent}


def whole_report(options: argparse.Namespace) -> dict[str, object]:
    """Seconds of `evaluate(model, session)`, task by task: what a user waits for."""
    torch.manual_seed(0)
    session = recording(options.small, fold=5)
    config = MtMConfig.from_depth(DEPTHS["small"], **PUBLISHED)
    model = MtM(config, session.n_bins, {session.name: session.n_neurons}, init="paper")
    model.split_seed = 0
    model = model.to(options.device).eval()
    seconds: dict[str, float] = {}
    for task in [*TASKS, "choice", "trace"]:
        how = {"tasks": [task], "progress": True}
        _, (spent, _) = timed(lambda how=how: evaluate(model, session, **how), model.device)
        seconds[task] = round(spent, 1)
        print(task, seconds[task], flush=True)
    sizes = {"trials": session.n_trials, "test_trials": len(session.split().test)}
    sizes |= {"bins": session.n_bins, "neurons": session.n_neurons, "depth": config.depth}
    total = round(sum(seconds.values()), 1)
    return sizes | {"small": options.small, "seconds": seconds, "total_s": total}


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


def timed(act: Callable[[], object], device: torch.device) -> tuple[object, tuple[float, float]]:
    """What a function returns, and its wall and CPU seconds, work on the device included."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def peak_gb(device: torch.device) -> float:
    """Peak of the process's memory so far, or of what was allocated on the GPU since last asked."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


if __name__ == "__main__":
    main()
