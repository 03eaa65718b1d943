"""What the benchmarks share: recordings, repeated fits and their scores, clocks, tables, files.

A study is a set of methods, each fitted to each session with each seed. Every finished report is
kept in a folder, so that a stopped command continues where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch

import mtm
from mtm.plots import BLUE
from mtm.recipes import RECIPES
from mtm.report import Mean, Report, mean_of

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "book/_assets"
FOUR = tuple(mtm.prediction.TASKS)  # the activity tasks
ONE_OF_EACH = ("01_Cori_2016-12-14", "07_Forssmann_2017-11-05", "09_Hench_2017-06-16")  # animal
HISTORY = ".history.json"  # of a trained model, beside its report
CONTROLS = {  # rows of the table that decoders bring along
    "smoothed counts": "smoothed_counts",
    "raw counts": "raw_counts",
    "no activity: average": ("time_course", "majority"),
    "no activity: stimulus": "stimulus_only",
}
Scores = dict[str, dict[str, Mean]]  # task -> method -> mean and error


def timed(act: Callable[[], Any], device: torch.device) -> tuple[Any, tuple[float, float]]:
    """What a function returns, and its wall and CPU seconds, work on the device included."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def peak_bytes(device: torch.device | None = None) -> int:
    """Peak memory of this process so far, or of what was allocated on the GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux, ru_maxrss also counts the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a measurement was made on."""
    name = platform.processor() or platform.machine()
    if str(device).startswith("cuda"):
        name = torch.cuda.get_device_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def speed_parser(text: str) -> argparse.ArgumentParser:
    """Options of all scripts that measure a device."""
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    made.add_argument("--json", type=Path)
    return made


def speed_path(name: str, options: argparse.Namespace) -> Path:
    """Where the numbers go: a file for the CPU, and one for each kind of GPU."""
    cuda = str(options.device).startswith("cuda")
    end = f"_{machine(options.device)['device']}".replace(" ", "_").lower() if cuda else ""
    return options.json or RESULTS / f"{name}{end}.json"


def in_process(script: str, *arguments: object) -> dict[str, Any]:
    """The JSON that a script prints last, in a process (and memory) of its own."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write facts; a Mean becomes [value, error, n], NaN becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if isinstance(value, float):
            return float(f"{value:.5g}") if np.isfinite(value) else None
        return value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(facts), indent=1, allow_nan=False) + "\n")


def steinmetz(path: Path) -> mtm.Session:
    """One session of Steinmetz et al. 2019, from its arrays."""
    with np.load(path) as file:
        spikes = file["spikes_10ms"]  # (K, N, 40)
        wheel = file["wheel_10ms"][:, 50:90].astype(float)  # (K, 40), the same window
        n_trials, n_neurons, _ = spikes.shape
        return mtm.Session(
            counts=spikes.reshape(n_trials, n_neurons, 20, 2).sum(-1).transpose(0, 2, 1),
            regions=file["region"],
            name=path.stem,
            subject=path.stem.split("_")[1],
            bin_size=0.02,
            window=(0.0, 0.4),
            behaviour={
                "choice": file["choice"],
                "contrast": file["contrast_right"] - file["contrast_left"],
                "reward": (file["feedback"] > 0).astype(int),
                "wheel-speed": np.abs(wheel.reshape(n_trials, 20, 2).sum(-1)),
            },
        )


def ibl(path: Path) -> mtm.Session:
    """One IBL session, from its arrays; its choices were reconstructed, so only sure ones stay."""
    with np.load(path) as file:
        inner = slice(1, -1)
        sure = file["choice_certainty"] > 0.95
        choice = np.where(sure, 2 * file["choice"].astype(int) - 1, 0)  # 0: left out
        return mtm.Session(
            counts=file["spikes"].transpose(0, 2, 1)[:, inner],
            regions=file["region"],
            name=path.stem,
            bin_size=0.02,
            window=(-0.18, 0.78),
            behaviour={
                "choice": choice,
                "wheel-speed": file["wheel_speed"][:, inner],
                "whisker-motion-energy": file["motion_energy"][:, inner],
            },
        )


def recordings(folder: Path, names: Sequence[str] | str = ()) -> list[mtm.Session]:
    """The named recordings; "steinmetz": all of that folder; default: one an animal, and IBL's.

    The folder "simulated" stands for three simulated animals.
    """
    if folder == Path("simulated"):
        return mtm.simulate(3, 200, 96, seed=0)
    found = {p.stem: (p, steinmetz) for p in sorted((folder / "steinmetz2019").glob("*.npz"))}
    names = list(found) if names == "steinmetz" else names
    found |= {p.stem: (p, ibl) for p in sorted(folder.glob("ibl_*.npz"))}
    chosen = names or [*ONE_OF_EACH, *(name for name in found if name.startswith("ibl_"))]
    if missing := [name for name in chosen if name not in found]:
        raise SystemExit(f"{folder} has no {missing[0]}; it has: {', '.join(found) or 'nothing'}")
    return [read(path) for path, read in (found[name] for name in chosen)]


def busy(session: mtm.Session) -> np.ndarray:
    """Indices of the neurons that fire at least 1 Hz in the training trials."""
    means = session.counts[session.split().train].mean(axis=(0, 1))
    return np.flatnonzero(means / session.bin_size >= 1.0)


def same_bins(sessions: list[mtm.Session]) -> list[list[mtm.Session]]:
    """Groups of sessions that one model can be trained on."""
    groups: dict[tuple, list[mtm.Session]] = {}
    for session in sessions:
        groups.setdefault((session.n_bins, session.bin_size), []).append(session)
    return list(groups.values())


class Method(NamedTuple):
    """How a predictor is made: ``make(sessions, seed)``; ``settings`` identify it."""

    make: Callable[[list[mtm.Session], int], Any]
    settings: dict[str, Any]
    seeded: bool = False  # another seed gives another predictor
    joint: bool = False  # fitted to all sessions with the same bins at once


def trained(joint: bool = False, **settings: Any) -> Method:
    """Our model, trained with these settings of ``mtm.fit``."""

    def make(sessions: list[mtm.Session], seed: int) -> mtm.Fit:
        return mtm.fit(sessions, seed=seed, progress=False, **settings)

    return Method(make, settings, seeded=True, joint=joint)


def parser(text: str, work: str) -> argparse.ArgumentParser:
    """Options that all studies have."""
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    made.add_argument("folder", type=Path, help="where the recordings are, or 'simulated'")
    made.add_argument("--recordings", nargs="*", default=[], help="some of them, by name")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--depth", type=int, default=1)
    made.add_argument("--epochs", type=int, default=RECIPES["mtm"].epochs)
    made.add_argument("--work", type=Path, default=Path("_build") / work, help="finished reports")
    made.add_argument("--out", type=Path, default=RESULTS, help="where the tables go")
    made.add_argument("--pictures", type=Path, default=PICTURES)
    return made


def groups(method: Method, sessions: list[mtm.Session]) -> list[list[mtm.Session]]:
    """The sessions that a method is fitted to at once."""
    if method.joint:
        return [group for group in same_bins(sessions) if len(group) > 1]
    return [[session] for session in sessions]


def kept(work: Path, name: str, method: Method, group: list[mtm.Session], seed: int) -> list[Path]:
    """Where the report on each session is kept; settings and data decide the file's name."""
    data = [(s.name, s.fingerprints(np.arange(s.n_trials)).tolist()) for s in group]
    text = json.dumps([method.settings, data], sort_keys=True).encode()
    digest = hashlib.sha256(text).hexdigest()[:8]
    seed = seed if method.seeded else 0
    return [work / s.name / f"{name}-{seed}-{digest}.json" for s in group]


def run(
    sessions: list[mtm.Session],
    chosen: dict[str, Method],
    seeds: list[int],
    work: Path,
    part: str = "test",
    tasks: Sequence[str] | None = None,
) -> None:
    """Fit and score what is not done yet, on the ``part``'s trials.

    Several processes may share ``work``. After a change of the package, begin with another.
    """
    for seed, (name, method) in product(seeds, chosen.items()):
        if seed != seeds[0] and not method.seeded:
            continue
        for group in groups(method, sessions):
            paths = kept(work, name, method, group, seed)
            if all(path.exists() for path in paths):
                continue
            predictor = method.make(group, seed)
            if isinstance(predictor, mtm.Fit):
                write_json(paths[0].with_suffix(HISTORY), predictor.to_dict())
            for session, path in zip(group, paths, strict=True):
                trials, neurons = getattr(session.split(), part), busy(session)
                how = {"tasks": tasks, "trials": trials, "neurons": neurons}
                report = mtm.evaluate(predictor, session, **how)
                report.to_json(path)
                print(f"{name}, seed {seed}\n{mtm.score_table({session.name: report})}", flush=True)


def table(
    sessions: list[mtm.Session], chosen: dict[str, Method], seeds: list[int], work: Path
) -> dict[str, Scores]:
    """Session -> task -> method -> mean and error: over neurons, of behaviours over seeds.

    MtM brings along the controls of its decoders.
    """
    whole: dict[str, Scores] = {session.name: {} for session in sessions}
    for name, method in chosen.items():
        for group in groups(method, sessions):
            runs = [kept(work, name, method, group, s) for s in (seeds if method.seeded else [0])]
            for i, session in enumerate(group):
                reports = [Report.from_json(run[i]) for run in runs if run[i].exists()]
                for task, scores in (Report.join(reports).tasks if reports else {}).items():
                    kind = "neurons" if "spikes" in scores.table else "seeds"
                    row = whole[session.name].setdefault(task, {})
                    row[name] = scores.over(kind)
                    if name == "MtM" and kind == "seeds":
                        row |= _controls(scores)
    return whole


def _controls(scores: Any) -> dict[str, Mean]:
    """The controls of a decoder, which are the same with every seed."""
    found = [(name, c) for name, columns in CONTROLS.items() for c in np.atleast_1d(columns)]
    return {
        name: scores.over("seeds", column)._replace(error=np.nan, n=1)
        for name, column in found
        if column in scores.table
    }


def averages(whole: dict[str, Scores]) -> Scores:
    """Task -> method -> mean over sessions and its error, for methods that did every session."""
    means: Scores = {}
    for task in dict.fromkeys(task for tasks in whole.values() for task in tasks):
        having = [tasks[task] for tasks in whole.values() if task in tasks]
        for name in having[0]:
            if all(name in one for one in having):
                means.setdefault(task, {})[name] = mean_of([one[name].value for one in having])
    return means


def described(sessions: list[mtm.Session], options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and on what."""
    train = {"depth": options.depth, "epochs": options.epochs, "seeds": options.seeds}
    about = {}
    for s in sessions:
        about[s.name] = dict(zip(("trials", "bins", "neurons"), s.counts.shape, strict=True))
        about[s.name] |= {"scored": len(busy(s)), "regions": len(s.region_names)}
    device = mtm.distributed.pick_device()
    facts = machine(device) | {"device": str(device), "machine": machine(device)["device"]}
    return {"train": train, **facts, "sessions": about}


def best_of(scores: dict[str, Mean]) -> float:
    """The best score of those that see activity; NaN where none has a score."""
    seeing = [mean.value for name, mean in scores.items() if not name.startswith("no activity")]
    return float(np.fmax.reduce(seeing, initial=np.nan))


def _layout(scores: Scores) -> tuple[list[str], list[str]]:
    """Tasks in their order, and methods."""
    tasks = [*[t for t in FOUR if t in scores], *[t for t in scores if t not in FOUR]]
    return tasks, list(dict.fromkeys(name for task in tasks for name in scores[task]))


def markdown(title: str, scores: Scores) -> str:
    """A table with a row for each method; the best of each task is bold."""
    tasks, names = _layout(scores)
    lines = [f"### {title}", "", "| | " + " | ".join(tasks) + " |"]
    lines += ["| --- " * (len(tasks) + 1) + "|"]
    for name in names:
        means = [scores[task].get(name, Mean(np.nan, np.nan, 0)) for task in tasks]
        best = [mean.value == best_of(scores[t]) for t, mean in zip(tasks, means, strict=True)]
        cells = [f"**{mean}**" if b else str(mean) for b, mean in zip(best, means, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def draw(means: Scores, title: str) -> plt.Figure:
    """A panel for each task, a bar for each row; lines are standard errors."""
    tasks, names = _layout(means)
    size = (1.5 + 1.35 * len(tasks), 1.0 + 0.27 * len(names))
    how = {"sharey": True, "squeeze": False, "figsize": size, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(tasks), **how)
    for ax, task in zip(axes[0], tasks, strict=True):
        values = [means[task].get(name, Mean(np.nan, np.nan, 0)) for name in names]
        best = best_of(means[task])
        ax.barh(
            names,
            [mean.value for mean in values],
            xerr=np.nan_to_num([mean.error for mean in values]),
            color=[BLUE if mean.value == best else "0.7" for mean in values],
            height=0.7,
        )
        ax.set_xlim(left=max(ax.get_xlim()[0], -max(best, 0.15)))  # what is far below 0 is cut
        ax.axvline(0, color="black", lw=0.8)
        ax.set_title(task, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("bits per spike; behaviour: accuracy or R2", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
