"""What each choice of MtM is worth: the paper's Tables 1, 6 and 7, on recordings of your own.

    python benchmarks/studies.py ablation WHERE    each scheme alone; all, without and with prompt
    python benchmarks/studies.py ratio WHERE       a share of 0.1, 0.3 or 0.6 hidden
    python benchmarks/studies.py prompt WHERE      the same model, shown each prompt in turn

WHERE is "simulated", session files (as `python -m mtm prepare` writes), or the folder of recordings
that real_data.py reads. Each session is trained on alone, with each seed. What is done is kept in
--work, so that the command goes on where it was stopped; results/study_<name>.json and .png come
out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from real_data import (
    FOUR,
    RESULTS,
    Method,
    averages,
    described,
    markdown,
    recordings,
    run,
    table,
    write_json,
)

import mtm
from mtm.masks import MTM_SCHEMES
from mtm.plots import BLUE
from mtm.report import Mean

RATIOS = (0.1, 0.3, 0.6)  # of the paper's Table 7
SHARED = ("neuron", "intra-region")  # the schemes of MtM that hide a share, by the paper's Table 7


def ablation(depth: int, epochs: int) -> dict[str, Method]:
    """Each scheme alone, without a prompt as there is but one; all four without and with it."""
    rows = {name: {"schemes": (name,), "prompt": False} for name in ("temporal", *MTM_SCHEMES)}
    rows |= {"MtM, no prompt": {"prompt": False}, "MtM": {}}
    return {name: _trained(depth, epochs, **settings) for name, settings in rows.items()}


def ratio(depth: int, epochs: int) -> dict[str, Method]:
    """How much is hidden: of temporal masking, of each scheme alone, of all four."""
    rows: dict[str, dict[str, Any]] = {}
    for share in RATIOS:
        for name in ("temporal", *SHARED):
            settings = {"schemes": (name,), "prompt": False, "ratios": {name: share}}
            rows[f"{name} {share}"] = settings
        rows[f"MtM {share}"] = {"ratios": dict.fromkeys(SHARED, share)}
    rows = {name: rows[name] for name in sorted(rows)}
    return {name: _trained(depth, epochs, **settings) for name, settings in rows.items()}


def _trained(depth: int, epochs: int, **settings: Any) -> Method:
    def make(sessions: list[mtm.Session], seed: int) -> mtm.Fit:
        options = {"depth": depth, "epochs": epochs, "seed": seed, "progress": False}
        return mtm.fit(sessions, **options, **settings)

    return Method(make, seeded=True)


class Prompted:
    """A model that is shown one prompt, whatever the task's own is; what is hidden stays."""

    def __init__(self, model: mtm.MtM, prompt: str) -> None:
        self.model, self.prompt = model, prompt
        self.device, self.sees_mask, self.seen = model.device, model.sees_mask, model.seen

    def predict(
        self, counts: Any, scheme: str, mask: Any, session: str, neurons: Any = None
    ) -> Any:
        """Log-rates; see `mtm.predict`."""
        return self.model.predict(counts, self.prompt, mask, session, neurons=neurons)


def prompt(depth: int, epochs: int) -> dict[str, Method]:
    """One model of each session and seed, shown each prompt."""
    models: dict[tuple[str, int], mtm.Fit] = {}

    def shown(name: str) -> Method:
        def make(sessions: list[mtm.Session], seed: int) -> Prompted:
            key = (sessions[0].name, seed)
            if key not in models:
                models[key] = _trained(depth, epochs).make(sessions, seed)
            return Prompted(models[key].model, name)

        return Method(make, seeded=True)

    return {f"prompt {name}": shown(name) for name in MTM_SCHEMES}


STUDIES = {"ablation": ablation, "ratio": ratio, "prompt": prompt}


def sessions_of(where: list[str]) -> list[mtm.Session]:
    """Simulated sessions, session files, or recordings."""
    if where == ["simulated"]:
        return mtm.simulate(3, 200, 96, seed=0)
    if all(Path(path).suffix == ".npz" for path in where):
        return [mtm.Session.load(path) for path in where]
    return recordings(Path(where[0]), where[1:])


def draw(means: dict[str, dict[str, Mean]], title: str) -> plt.Figure:
    """A panel for each task, a bar for each row; lines are standard errors."""
    tasks = [*[t for t in FOUR if t in means], *[t for t in means if t not in FOUR]]
    names = list(means[tasks[0]])
    size = (1.2 + 1.75 * len(tasks), 1.1 + 0.26 * len(names))
    figure, axes = plt.subplots(1, len(tasks), sharey=True, figsize=size, layout="constrained")
    for ax, task in zip(axes, tasks, strict=True):
        values = [means[task].get(name, Mean(np.nan, np.nan, 0)) for name in names]
        best = max(value.value for value in values)
        ax.barh(
            names,
            [value.value for value in values],
            xerr=np.nan_to_num([value.error for value in values]),
            color=[BLUE if value.value == best else "0.7" for value in values],
            height=0.7,
        )
        low = min(0.0, min(value.value for value in values))
        ax.set_xlim(left=max(low * 1.1, -best))  # what is far below 0 is cut; its number is told
        for i, value in enumerate(values):
            if value.value < -best:
                ax.text(-0.95 * best, i, f"{value.value:.2f}", va="center", fontsize=7, color="w")
        ax.axvline(0, color="black", lw=0.8)
        ax.set_title(task, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel("bits per spike; behaviour: accuracy or R2", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    """Read the command line, run, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("where", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("_build/studies"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sessions = sessions_of(options.where)
    chosen = STUDIES[options.study](options.depth, options.epochs)
    work = options.work / options.study
    seconds = run(sessions, chosen, options.seeds, work)
    whole = table(sessions, list(chosen), work)
    means = averages(whole)
    facts = described(sessions, options)
    facts |= {"study": options.study, "seconds": seconds, "scores": whole, "mean": means}
    write_json(options.out / f"study_{options.study}.json", facts)
    who = f"{len(sessions)} sessions, {len(options.seeds)} seeds"
    figure = draw(means, f"{options.study}: {who}, mean ± standard error over sessions")
    figure.savefig(options.out / f"study_{options.study}.png", dpi=150)
    print(markdown(f"{options.study}, {who}", means))


if __name__ == "__main__":
    main()
