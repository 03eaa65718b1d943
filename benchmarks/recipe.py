"""Which settings train best, and how much better than the paper's: searched here, tested there.

    python benchmarks/recipe.py FOLDER [--search NAME ...] [--test NAME ...]

FOLDER is that of real_data.py, or the word "simulated". Two parts, on different recordings:

- search: our recipe, but hiding the paper's shares, with one thing changed at a time. All take the
  same steps on the same trials, unless the change is of just that, and are scored on validation
  trials: bits per spike in the four activity tasks, mean over neurons of at least 1 Hz.
- test: our recipe and the paper's, on test trials of recordings that the search never saw; the
  paper's with as many epochs as ours, and with all of its 1,000. And after how many steps ours
  validates as well as the paper's does at best.

What is done is kept in --work, so that the command goes on where it was stopped. Out come
results/recipe.json and .md, and the picture book/_assets/recipe.png. On 2 cores: 2 hours.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from real_data import (
    FOUR,
    HISTORY,
    PICTURES,
    RESULTS,
    Method,
    described,
    kept,
    markdown,
    recordings,
    run,
    table,
    write_json,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

import mtm
from mtm import training as train
from mtm.masks import SCHEMES, register
from mtm.model import MtMConfig
from mtm.plots import BLUE
from mtm.recipes import RECIPES
from mtm.report import Mean, mean_of

SEARCH = ("01_Cori_2016-12-14", "07_Forssmann_2017-11-05")
TEST = ("03_Cori_2016-12-18", "09_Hench_2017-06-16", "ibl_DY_016_2020-09-12_probe00")  # fmt: skip
OURS, BASE = "ours", "ours, hiding 0.3"
PUBLISHED = {"positions": "learned", "input_counts": "raw"}  # the authors' options
AGAIN = "causal again"  # drawn as often as each of the others
AVERAGE = 0.99  # decay of the running average of the weights, a step

Trick = Callable[[list[mtm.Session]], Any]


# --------------------------------------------------------- tried, and not part of the package


@contextmanager
def neurons_alike(sessions: list[mtm.Session]) -> Iterator[None]:
    """The loss of a neuron is divided by the square root of its mean count."""
    [session] = sessions
    means = session.counts[session.split().train].mean(axis=(0, 1))
    weights = torch.from_numpy((means + 0.005) ** -0.5 * means.mean() ** 0.5).float()
    plain = train.masked_loss

    def weighted(log_rates: Any, counts: Any, target: Any, reduction: str) -> Any:
        if not torch.is_grad_enabled():
            return plain(log_rates, counts, target, reduction)
        return (torch.where(target, log_rates.exp() - counts * log_rates, 0.0) * weights).sum()

    with mock.patch.object(train, "masked_loss", weighted):
        yield


@contextmanager
def weights_averaged(sessions: list[mtm.Session]) -> Iterator[None]:
    """Validated, and kept, is a running average of the weights."""
    averages: dict[int, torch.Tensor] = {}
    validate = train.validate

    def take(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                averages.setdefault(id(p), p.detach().clone()).lerp_(p, 1 - AVERAGE)

    def validated(model: mtm.MtM, *args: Any) -> dict[str, float]:
        for p in model.parameters():
            p.data, averages[id(p)] = averages[id(p)], p.data
        try:
            return validate(model, *args)
        finally:
            best[:] = [copy.deepcopy(model.state_dict())]
            for p in model.parameters():
                p.data, averages[id(p)] = averages[id(p)], p.data

    def kept_as_best(run: Any, entry: dict[str, Any], model: mtm.MtM) -> bool:
        better = keep(run, entry, model)
        if better:
            run.best = best[0]
        return better

    best: list[dict[str, torch.Tensor]] = []
    keep = train.Run.add
    hook = register_optimizer_step_post_hook(take)
    try:
        with (
            mock.patch.object(train, "validate", validated),
            mock.patch.object(train.Run, "add", kept_as_best),
        ):
            yield
    finally:
        hook.remove()


# ------------------------------------------------------------------------------ what is tried


def variants() -> dict[str, tuple[dict[str, Any], Trick | None]]:
    """Name -> what differs from our recipe: settings and sizes, or a trick.

    The search began with the schemes' own shares, as in the paper. That more is hidden is the one
    change that it added to the recipe.
    """
    ours, sizes = RECIPES["mtm"], MtMConfig.from_depth(1)
    if AGAIN not in SCHEMES:
        register(AGAIN, SCHEMES["causal"].draw, SCHEMES["causal"].ratio, causal=True, prompt=False)
    wide, narrow = (
        {
            name: round(factor * getattr(sizes, name))
            for name in ("width", "mlp_width", "stitch_width")
        }
        for factor in (2, 0.5)
    )
    shares = ("neuron", "intra-region")
    half = {"ratios": dict.fromkeys(shares, 0.6)}
    plain: dict[str, dict[str, Any]] = {
        BASE: {},
        "counts as they are": {"input_counts": "raw"},
        "learned time embedding": {"positions": "learned"},
        "one mask a step": {"batch_size": 16, "batches_per_step": 1},
        "8 masks a step": {"batch_size": 2, "batches_per_step": 8},
        "half the learning rate": {"lr": ours.lr / 2},
        "twice the learning rate": {"lr": ours.lr * 2},
        "half the epochs": {"epochs": ours.epochs // 2},
        "twice the epochs": {"epochs": ours.epochs * 2},
        "loss summed": {"loss": "sum"},
        "hide 0.1": {"ratios": dict.fromkeys(shares, 0.1)},
        "hide 0.6": half,
        "hide 0.8": {"ratios": dict.fromkeys(shares, 0.8)},
        "hide 0.6, half the learning rate": {**half, "lr": ours.lr / 2},
        "hide 0.6, causal twice as often": {**half, "schemes": (*ours.schemes, AGAIN)},
        "hide 0.3 of the bins": {"ratios": {"causal": 0.3}},
        "weight decay 0.01": {"weight_decay": 0.01},
        "dropout 0.2": {"dropout": 0.2, "embed_dropout": 0.1},
        "twice as wide": {**wide, "heads": 2 * sizes.heads},
        "half as wide": narrow,
        "two layers": {"depth": 2},
        "no session token": {"session_token": False},
        "no prompt": {"prompt": False},
        "causal twice as often": {"schemes": (*ours.schemes, AGAIN)},
        "the authors' options": {**PUBLISHED, "init": "paper"},
        "the authors' options, two layers": {**PUBLISHED, "init": "paper", "depth": 2},
    }
    tricks: dict[str, tuple[dict[str, Any], Trick]] = {
        "neurons weigh alike": ({}, neurons_alike),
        "weights averaged": ({}, weights_averaged),
    }  # fmt: skip
    whole = {name: (changes, None) for name, changes in plain.items()} | tricks
    return {name: ({"ratios": {}} | changes, trick) for name, (changes, trick) in whole.items()}


def trained(changes: dict[str, Any], trick: Trick | None = None, config: str = "mtm") -> Method:
    """A recipe with changes, at depth 1 unless they say another."""
    sizes = {f.name for f in fields(MtMConfig)}
    of_model = {name: value for name, value in changes.items() if name in sizes}
    of_training = {name: value for name, value in changes.items() if name not in sizes}
    settings = replace(RECIPES[config], **of_training)
    if settings.init == "paper":
        of_model = PUBLISHED | of_model

    def make(sessions: list[mtm.Session], seed: int) -> mtm.Fit:
        model = MtMConfig.from_depth(**({"depth": 1} | of_model))
        how = {"config": replace(settings, seed=seed), "progress": False}
        if trick is None:
            return mtm.fit(sessions, model, **how)
        with trick(sessions):
            return mtm.fit(sessions, model, **how)

    told = {"train": asdict(settings), "model": of_model, "trick": getattr(trick, "__name__", None)}
    return Method(make, told, seeded=True)


# ----------------------------------------------------------------------------------- the search


def differences(
    whole: dict[str, dict[str, dict[str, Mean]]], names: list[str]
) -> dict[str, dict[str, Mean]]:
    """Variant -> task, and "mean" of the four -> score over ours, mean over sessions."""
    found: dict[str, dict[str, Mean]] = {}
    for name in names:
        gains: dict[str, list[float]] = {task: [] for task in (*FOUR, "mean")}
        for tasks in whole.values():
            if name in tasks.get(FOUR[0], {}):
                each = [tasks[task][name].value - tasks[task][BASE].value for task in FOUR]
                for task, gain in zip(gains, [*each, float(np.mean(each))], strict=True):
                    gains[task].append(gain)
        if gains["mean"]:
            found[name] = {task: mean_of(values) for task, values in gains.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]["mean"].value))


def draw(found: dict[str, dict[str, Mean]], n_sessions: int) -> plt.Figure:
    """A bar for each variant: the mean of the four tasks, less ours; dots are the tasks."""
    names = [name for name in found if name != BASE]
    figure, ax = plt.subplots(figsize=(7.0, 1.2 + 0.26 * len(names)), layout="constrained")
    means = [found[name]["mean"] for name in names]
    low = -0.12
    ax.barh(names, [max(m.value, low) for m in means], color="0.8", height=0.7)
    for marker, task in zip("os^D", FOUR, strict=True):
        values = np.array([found[name][task].value for name in names])
        inside = values > low
        ax.plot(values[inside], np.flatnonzero(inside), marker, ms=4, mfc="none", label=task)
    for i, mean in enumerate(means):
        if mean.value < low:
            ax.text(low, i, f" {mean.value:.2f}", va="center", fontsize=7)
    ax.axvline(0, color=BLUE, lw=1.5)
    ax.set_xlim(left=low)
    ax.invert_yaxis()
    ax.tick_params(labelsize=8)
    ax.set_xlabel(f"bits per spike more than '{BASE}', validation trials", fontsize=9)
    ax.set_title(f"One thing changed; bars: mean of four tasks, {n_sessions} sessions", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    ax.margins(y=0.01)
    return figure


def search_table(found: dict[str, dict[str, Mean]]) -> str:
    """Markdown: each variant, best first."""
    lines = ["| changed | mean | " + " | ".join(FOUR) + " |", "| --- " * 6 + "|"]
    for name, gains in found.items():
        cells = [f"{gains[task].value:+.3f}" for task in FOUR]
        mean = f"{gains['mean'].value:+.3f} ± {gains['mean'].error:.3f}"
        lines.append(f"| {name} | {'0' if name == BASE else mean} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


# ------------------------------------------------------------------------------------- the test


def contest() -> dict[str, Method]:
    """Ours, and the paper's recipe with as many epochs and with all of its own."""
    epochs = RECIPES["mtm"].epochs
    return {
        OURS: trained({}),
        f"paper, {epochs} epochs": trained({"epochs": epochs}, config="paper"),
        f"paper, {RECIPES['paper'].epochs} epochs": trained({}, config="paper"),
    }


def race(session: mtm.Session, ours: list[Path], theirs: Path) -> dict[str, Any]:
    """Steps after which ours validates as well as the paper's does at its best; each seed's."""
    goal = read_history(theirs)
    best = max(entry["mean"] for entry in goal)
    found: dict[str, Any] = {"goal": best, "steps of the paper": goal[-1]["step"], "steps": []}
    for path in ours:
        there = [e["step"] for e in read_history(path) if e["mean"] >= best]
        found["steps"].append(there[0] if there else None)
    found["shares"] = [s and s / goal[-1]["step"] for s in found["steps"]]
    print(f"{session.name}: as good as the paper's best, {best:.3f}, after {found['steps']} of "
          f"{goal[-1]['step']} steps")  # fmt: skip
    return found


def read_history(report: Path) -> list[dict[str, Any]]:
    """What was kept beside a report."""
    return json.loads(report.with_suffix(HISTORY).read_text())["history"]


def main() -> None:
    """Read the command line, run, write the JSON, the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--search", nargs="*", default=SEARCH, help="recordings to search on")
    parser.add_argument("--test", nargs="*", default=TEST, help="recordings to test on")
    parser.add_argument("--variants", nargs="*", help="some, by name; default all")
    parser.add_argument("--search-seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the test")
    parser.add_argument("--work", type=Path, default=Path("_build/recipe"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args()
    options.depth, options.epochs = 1, RECIPES["mtm"].epochs
    known = variants()
    if strangers := set(options.variants or ()) - set(known):
        parser.error(f"unknown variant {min(strangers)!r}; known: {', '.join(known)}")
    tried = {name: trained(*known[name]) for name in options.variants or known}
    searched = recordings(options.folder, list(options.search))
    how = {"part": "val", "tasks": FOUR}
    seconds = run(searched, tried, options.search_seeds, options.work / "search", **how)
    every = {name: trained(*variant) for name, variant in known.items()}
    scores = table(searched, every, options.search_seeds, options.work / "search")
    found = differences(scores, list(known))

    tested, rivals = recordings(options.folder, list(options.test)), contest()
    work, long = options.work / "test", list(rivals)[-1]
    for name, method in rivals.items():  # the paper's take long: one seed of them
        seeds = options.seeds if name == OURS else options.seeds[:1]
        seconds |= run(tested, {name: method}, seeds, work, tasks=FOUR)
    whole = table(tested, rivals, options.seeds, work)
    races = {}
    for session in tested:
        ours = [kept(work, OURS, rivals[OURS], [session], seed)[0] for seed in options.seeds]
        theirs = kept(work, long, rivals[long], [session], options.seeds[0])[0]
        races[session.name] = race(session, ours, theirs)
    facts = described([*searched, *tested], options) | {"seconds": seconds}
    facts |= {"recipe": asdict(RECIPES["mtm"]), "search_seeds": options.search_seeds}
    facts |= {"searched": scores, "differences": found, "tested": whole, "races": races}
    write_json(options.out / "recipe.json", facts)
    draw(found, len(searched)).savefig(options.pictures / "recipe.png", dpi=110)
    text = report(found, whole, races, [s.name for s in searched])
    (options.out / "recipe.md").write_text(text)
    print(text)


def report(
    found: dict[str, dict[str, Mean]],
    whole: dict[str, dict[str, dict[str, Mean]]],
    races: dict[str, Any],
    searched: list[str],
) -> str:
    """Both parts as markdown."""
    parts = [
        "# The recipe: what was tried, and what it is worth",
        "",
        "## Search",
        "",
        "Our recipe hiding the paper's shares, with one thing changed, less the same without the "
        f"change: bits per spike on validation trials of {', '.join(searched)}; mean over "
        "recordings (± standard error over recordings, of the mean of the four tasks). Above 0 the "
        "change is better. Made by `python benchmarks/recipe.py`.",
        "",
        search_table(found),
        "## Test: recordings that the search never saw",
        "",
        "Bits per spike on test trials ± standard error over neurons, ours with three seeds, the "
        "paper's with one.",
        "",
        *[markdown(name, tasks) for name, tasks in whole.items()],
        "## Steps until ours validates as well as the paper's recipe at its best",
        "",
        "| recording | steps of the paper's | steps of ours, each seed | share |",
        "| --- | --- | --- | --- |",
    ]
    for name, one in races.items():
        steps = ", ".join(map(str, one["steps"]))
        worst = "-" if None in one["shares"] else f"{max(one['shares']):.3f}"
        parts.append(f"| {name} | {one['steps of the paper']} | {steps} | {worst} |")
    return "\n".join([*parts, ""])


if __name__ == "__main__":
    main()
