"""All six tasks, all baselines, on real recordings: who wins where. One command.

    python benchmarks/real_data.py FOLDER [--recordings NAME ...] [--seeds 0 1 2] [--methods ...]

FOLDER holds recordings as plain arrays (they are no part of this project):
- steinmetz2019/*.npz (Steinmetz et al. 2019, CC-BY 4.0): `spikes_10ms` (K, N, 40), `region`,
  `choice`, contrasts, `feedback`, `wheel_10ms`; here 20 ms bins, 0 to 0.4 s after stimulus onset;
- ibl_*.npz (one session of the International Brain Laboratory, CC-BY 4.0): `spikes` (K, N, 50) in
  20 ms bins, -0.2 to 0.8 s around stimulus onset; its first and last bin are dropped.

Every method learns from the training trials, is tuned on the validation trials and scored on the
test trials; scores are means over the neurons that fire at least 1 Hz in the training trials.
What is done is kept in --work, so that the command goes on where it was stopped; the table is
written to results/real_data.json and .md, the picture to book/_assets/real_data.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch

import mtm
from mtm.baselines import fit_baseline
from mtm.plots import BLUE
from mtm.recipes import RECIPES
from mtm.report import Mean, Report

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "book/_assets"
FOUR = ("co-smoothing", "forward-prediction", "inter-region", "intra-region")
ONE_OF_EACH = ("01_Cori_2016-12-14", "07_Forssmann_2017-11-05", "09_Hench_2017-06-16")  # animal
NEAR = 0.15  # bits per spike below 0 that a picture always shows
HISTORY = ".history.json"  # of a trained model, beside its report
CONTROLS = {  # rows of the table that the decoders bring along
    "smoothed counts": "smoothed_counts",
    "raw counts": "raw_counts",
    "no activity: average": ("time_course", "majority"),
    "no activity: stimulus": "stimulus_only",
}


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


def recordings(folder: Path, names: list[str]) -> list[mtm.Session]:
    """The named recordings; default one of each Steinmetz animal, and the IBL session."""
    found = {p.stem: (p, steinmetz) for p in sorted((folder / "steinmetz2019").glob("*.npz"))}
    found |= {p.stem: (p, ibl) for p in sorted(folder.glob("ibl_*.npz"))}
    chosen = names or [*ONE_OF_EACH, *(name for name in found if name.startswith("ibl_"))]
    if missing := [name for name in chosen if name not in found]:
        raise SystemExit(f"{folder} has no {missing[0]}; it has: {', '.join(found) or 'nothing'}")
    return [read(path) for path, read in (found[name] for name in chosen)]


class Method(NamedTuple):
    """How a predictor is made: ``make(sessions, seed)``; ``settings`` tell it from others."""

    make: Callable[[list[mtm.Session], int], Any]
    settings: dict[str, Any]
    seeded: bool = False  # another seed gives another predictor
    joint: bool = False  # learns from all sessions with the same bins at once


def methods(depth: int, epochs: int) -> dict[str, Method]:
    """Every method, by name."""

    def baseline(name: str, **kind: bool) -> Method:
        return Method(lambda sessions, seed: fit_baseline(name, sessions), {}, **kind)

    def trained(name: str | None, joint: bool = False, **settings: Any) -> Method:
        def make(sessions: list[mtm.Session], seed: int) -> Any:
            how = {"seed": seed, "progress": False, **told}
            return fit_baseline(name, sessions, **how) if name else mtm.fit(sessions, **how)

        told = {"depth": depth, **settings} if name else {"depth": depth, "epochs": epochs}
        return Method(make, told, seeded=True, joint=joint)

    return {
        "mean rate": Method(
            lambda sessions, seed: {s.name: mtm.mean_rates(s) for s in sessions}, {}
        ),
        "PSTH": baseline("PSTH"),
        "ridge": baseline("ridge"),
        "low-rank GLM": baseline("low-rank GLM"),
        "reduced-rank regression": baseline("reduced-rank regression", joint=True),
        "temporal NDT1": trained("temporal NDT1", ratios=(0.1, 0.3)),
        "random-token NDT2": trained("random-token NDT2", ratios=(0.3,)),  # slow: one share alone
        "MtM": trained(None),
        "MtM, sessions together": trained(None, joint=True),
    }


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


def groups(method: Method, sessions: list[mtm.Session]) -> list[list[mtm.Session]]:
    """The sessions that a method learns from at once."""
    if method.joint:
        return [group for group in same_bins(sessions) if len(group) > 1]
    return [[session] for session in sessions]


def kept(work: Path, name: str, method: Method, group: list[mtm.Session], seed: int) -> list[Path]:
    """Where the report on each session is kept: its name tells settings and data from others."""
    data = [(s.name, s.fingerprints(np.arange(s.n_trials)).tolist()) for s in group]
    told = json.dumps([method.settings, data], sort_keys=True).encode()
    digest = hashlib.sha256(told).hexdigest()[:8]
    return [work / s.name / f"{name}-{seed}-{digest}.json" for s in group]


def run(
    sessions: list[mtm.Session],
    chosen: dict[str, Method],
    seeds: list[int],
    work: Path,
    part: str = "test",
    tasks: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Whatever is not done yet; returns the seconds of each.

    Scored are the ``part``'s trials, "test" or "val", in all tasks or some. Several processes may
    share the work: give each other methods or seeds. After a change of the package, begin with
    another ``work``.
    """
    work.mkdir(parents=True, exist_ok=True)
    log = work / "seconds.json"

    def known() -> dict[str, dict[str, float]]:
        return json.loads(log.read_text()) if log.exists() else {}

    for seed in seeds:
        for name, method in chosen.items():
            if seed != seeds[0] and not method.seeded:
                continue
            for group in groups(method, sessions):
                paths = kept(work, name, method, group, seed if method.seeded else 0)
                if not all(path.exists() for path in paths):
                    key = f"{name}, {'+'.join(s.name for s in group)}, seed {seed}"
                    spent = score(name, method, group, seed, paths, part, tasks)
                    log.write_text(json.dumps(known() | {key: spent}, indent=1))
    return known()


def score(
    name: str,
    method: Method,
    group: list[mtm.Session],
    seed: int,
    paths: list[Path],
    part: str,
    tasks: Sequence[str] | None,
) -> dict[str, float]:
    """Make a predictor and keep its report on each session; returns seconds.

    Of what was trained, the history is kept with the first session's report.
    """
    start = time.perf_counter()
    predictor = method.make(group, seed)
    seconds = {"fit": round(time.perf_counter() - start, 1)}
    if isinstance(predictor, mtm.Fit):
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        write_json(paths[0].with_suffix(HISTORY), predictor.to_dict())
    for session, path in zip(group, paths, strict=True):
        start = time.perf_counter()
        trials = getattr(session.split(), part)
        how = {"tasks": tasks, "trials": trials, "neurons": busy(session)}
        report = mtm.evaluate(predictor, session, **how)
        seconds[session.name] = round(time.perf_counter() - start, 1)
        report.to_json(path)
        print(f"{session.name}, {name}, seed {seed}: {seconds['fit']} s to fit, "
              f"{seconds[session.name]} s to score\n{mtm.score_table({name: report})}",
              flush=True)  # fmt: skip
    return seconds


def table(
    sessions: list[mtm.Session], chosen: dict[str, Method], seeds: list[int], work: Path
) -> dict[str, dict[str, dict[str, Mean]]]:
    """Session -> task -> method -> mean and error: over neurons, of behaviours over seeds."""
    whole: dict[str, dict[str, dict[str, Mean]]] = {session.name: {} for session in sessions}
    for name, method in chosen.items():
        for group in groups(method, sessions):
            runs = [kept(work, name, method, group, s) for s in (seeds if method.seeded else [0])]
            for i, session in enumerate(group):
                reports = [Report.from_json(run[i]) for run in runs if run[i].exists()]
                if reports:
                    _enter(whole[session.name], name, Report.join(reports))
    return whole


def _enter(tasks: dict[str, dict[str, Mean]], name: str, report: Report) -> None:
    """A method's scores of a session; with MtM's, the controls that decoders bring along."""
    for task, scores in report.tasks.items():
        kind = "neurons" if "spikes" in scores.table else "seeds"
        row = tasks.setdefault(task, {})
        row[name] = scores.over(kind)
        if name == "MtM" and kind == "seeds":
            for control, columns in CONTROLS.items():
                for column in np.atleast_1d(columns):
                    if column in scores.table:
                        mean = scores.over("seeds", column)  # the same with every seed
                        row[control] = mean._replace(error=np.nan, n=1)


def carry_over(
    whole: dict[str, dict[str, dict[str, Mean]]],
    rest: dict[str, Method],
    earlier: dict[str, Any],
) -> None:
    """Fill in rows of methods that were not run, as they were before."""
    for session, tasks in whole.items():
        for task, rows in earlier.get(session, {}).items():
            mine = tasks.setdefault(task, {})
            for name, (value, error, n) in rows.items():
                if name in rest and name not in mine:
                    numbers = (np.nan if x is None else x for x in (value, error))
                    mine[name] = Mean(*numbers, n)
            order = [*[n for n in rest if n in mine], *[n for n in mine if n not in rest]]
            tasks[task] = {name: mine[name] for name in order}


def rows(whole: dict[str, dict[str, dict[str, Mean]]]) -> list[dict[str, Mean]]:
    """The rows of every session and task."""
    return [row for tasks in whole.values() for row in tasks.values()]


def averages(whole: dict[str, dict[str, dict[str, Mean]]]) -> dict[str, dict[str, Mean]]:
    """Task -> method -> mean over sessions and its error, for methods that did every session."""
    means: dict[str, dict[str, Mean]] = {}
    for task in dict.fromkeys(task for tasks in whole.values() for task in tasks):
        having = [tasks[task] for tasks in whole.values() if task in tasks]
        for name in having[0]:
            if all(name in one for one in having):
                means.setdefault(task, {})[name] = mtm.report.mean_of(
                    [o[name].value for o in having]
                )
    return means


def best_of(scores: dict[str, Mean]) -> float:
    """The best score of those that look at activity; NaN where none has a score."""
    seeing = [mean.value for name, mean in scores.items() if not name.startswith("no activity")]
    return float(np.fmax.reduce(seeing, initial=np.nan))


def winners(whole: dict[str, dict[str, dict[str, Mean]]]) -> list[str]:
    """A sentence for each session and task: the best method, and how MtM compares."""
    lines = []
    for session, tasks in whole.items():
        for task, scores in tasks.items():
            values = {n: s.value for n, s in scores.items() if not n.startswith("no activity")}
            values = {n: value for n, value in values.items() if not np.isnan(value)}
            ours = {n: value for n, value in values.items() if n.startswith("MtM")}
            others = {n: value for n, value in values.items() if n not in ours}
            if not values:
                continue
            best = max(values, key=values.get)
            line = f"{session}, {task}: {best} {values[best]:.3f}"
            if best in ours and others:
                second = max(others, key=others.get)
                line += f"; ahead of {second} by {values[best] - others[second]:.3f}"
            elif ours:
                mine = max(ours, key=ours.get)
                line += f"; the best of MtM ({mine}) is behind by {values[best] - ours[mine]:.3f}"
            lines.append(line)
    return lines


def markdown(title: str, scores: dict[str, dict[str, Mean]]) -> str:
    """A table with a row for each method; the best of each task is bold."""
    tasks = [*[t for t in FOUR if t in scores], *[t for t in scores if t not in FOUR]]
    names = list(dict.fromkeys(name for task in tasks for name in scores[task]))
    lines = [
        f"### {title}",
        "",
        "| | " + " | ".join(tasks) + " |",
        "| --- " * (len(tasks) + 1) + "|",
    ]
    for name in names:
        cells = []
        for task in tasks:
            best = best_of(scores[task])
            mean = scores[task].get(name, Mean(np.nan, np.nan, 0))
            cells.append(f"**{mean}**" if mean.value == best else str(mean))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def draw(means: dict[str, dict[str, Mean]], title: str) -> plt.Figure:
    """A panel for each task, a bar for each row; lines are standard errors."""
    tasks = [*[t for t in FOUR if t in means], *[t for t in means if t not in FOUR]]
    names = list(dict.fromkeys(name for task in tasks for name in means[task]))
    size = (1.5 + 1.35 * len(tasks), 1.0 + 0.27 * len(names))
    how = {"sharey": True, "squeeze": False, "figsize": size, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(tasks), **how)
    for ax, task in zip(axes[0], tasks, strict=True):
        values = [means[task].get(name, Mean(np.nan, np.nan, 0)) for name in names]
        best = best_of(means[task])
        ax.barh(
            names,
            [value.value for value in values],
            xerr=np.nan_to_num([value.error for value in values]),
            color=[BLUE if value.value == best else "0.7" for value in values],
            height=0.7,
        )
        low = min(0.0, np.nanmin([value.value for value in values]))
        end = max(best, NEAR)
        if low < -end and best > 0:  # what is far below 0 is cut; its number is told
            ax.set_xlim(left=-end)
            for i, value in enumerate(values):
                if value.value < -end:
                    text = f"{value.value:.2f}"
                    ax.text(-0.95 * end, i, text, va="center", fontsize=7, color="w")
        ax.axvline(0, color="black", lw=0.8)
        ax.set_title(task, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("bits per spike; behaviour: accuracy or R2", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    """Read the command line, run, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recordings", nargs="*", default=[])
    parser.add_argument(
        "--methods", nargs="*", default=[],
        help="some, by name; default all. The others' rows stay as they are",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=RECIPES["mtm"].epochs)
    parser.add_argument("--work", type=Path, default=Path("_build/real_data"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args()
    known = methods(options.depth, options.epochs)
    if strangers := set(options.methods) - set(known):
        parser.error(f"unknown method {min(strangers)!r}; known: {', '.join(known)}")
    sessions = recordings(options.folder, options.recordings)
    for session in sessions:
        print(f"{session!r}\n  scored: {len(busy(session))} neurons of at least 1 Hz", flush=True)
    chosen = {name: known[name] for name in options.methods or known}
    seconds = run(sessions, chosen, options.seeds, options.work)
    whole = table(sessions, known, options.seeds, options.work)
    path, rest = options.out / "real_data.json", {}
    if options.methods and path.exists():
        rest = {name: known[name] for name in known if name not in options.methods}
        carry_over(whole, rest, json.loads(path.read_text())["scores"])
        rest = {name: rest[name] for name in rest if any(name in row for row in rows(whole))}
    means = averages(whole)
    together = averages({s.name: whole[s.name] for s in max(same_bins(sessions), key=len)})
    facts = described(sessions, options) | {"seconds": seconds, "scores": whole, "mean": means}
    facts |= {"mean_with_the_same_bins": together, "measured_before": list(rest)}
    write_json(path, facts)
    n = len(max(same_bins(sessions), key=len))
    text = [
        "# Real recordings: who wins where",
        "",
        "Test trials. Activity: bits per spike over each neuron's test mean, mean over neurons "
        "of at least 1 Hz ± standard error over neurons. Behaviour: accuracy of the choice, R2 of "
        "traces, ± standard error over seeds. Bold: the best of those that see activity. Made by "
        "`python benchmarks/real_data.py`."
        + f" Seeds: {options.seeds}."
        + (f" Measured before, with seeds of their own: {', '.join(rest)}." if rest else ""),
        "",
        markdown("Mean over recordings (± standard error over recordings)", means),
        markdown(f"Mean over the {n} recordings with the same bins, all methods", together),
        *[markdown(name, tasks) for name, tasks in whole.items()],
        "## Who wins",
        "",
        *[f"- {line}" for line in winners(whole)],
        "",
    ]
    figure = draw(together, f"{n} recordings, mean ± standard error over recordings")
    figure.savefig(options.pictures / "real_data.png", dpi=110)
    (options.out / "real_data.md").write_text("\n".join(text))
    print("\n".join(text))


def described(sessions: list[mtm.Session], options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "train": {"depth": options.depth, "epochs": options.epochs, "seeds": options.seeds},
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(mtm.training.pick_device()),
        "torch": torch.__version__,
        "sessions": {
            s.name: {
                "trials": s.n_trials,
                "bins": s.n_bins,
                "neurons": s.n_neurons,
                "scored": len(busy(s)),
                "regions": len(s.region_names),
            }
            for s in sessions
        },
    }


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write them; a Mean becomes [value, error, n], NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_nan(facts), indent=1, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [_without_nan(v) for v in value]
    if isinstance(value, float):
        return round(value, 5) if np.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
