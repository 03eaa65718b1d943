"""Train a model to start from, score it on test trials, and write its card.

    python benchmarks/weights.py simulated    three animals; into mtm/weights/simulated
    python benchmarks/weights.py specialists  one animal, a model for each masking scheme; into
                                              mtm/weights/specialists
    python benchmarks/weights.py FOLDER       the eleven recordings of real_data.py's folder

The first two are shipped, and the book loads them; each takes a few minutes on a CPU core. The same
command resumes a run. --out is another folder for `model.safetensors`, `config.json`, and
`README.md`, the card, whose every number was measured by this script.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import FOUR, RESULTS, busy, recordings

import mtm
from mtm.checkpoint import SHIPPED
from mtm.report import Report

TOLD = ("epochs", "batch_size", "batches_per_step", "lr", "weight_decay", "ratios",
        "regions_by_size", "input_dropout")  # fmt: skip

CARD = """# {title}

A multi-task-masking (MtM) model of neural population activity: it predicts hidden neurons, regions
and future bins of the sessions that it was trained on, and can be fine-tuned to new ones.

```python
import mtm

model = mtm.load({folder})
result = mtm.fit(session, model)  # fine-tuned to a session of yours
```

## Data

{data}

{sessions}

Trials were split at random into 70 % for training, 10 % for choosing the weights and 20 % for the
scores below (`session.split({split_seed})`); the model carries fingerprints of its training trials,
and evaluation refuses them.

## Recipe

`mtm.fit(sessions, depth={depth})` with the recipe `mtm`: {settings}. The weights are those of epoch
{epoch}, the best on validation trials. {parameters:,} parameters.

## Scores

Bits per spike on test trials over each neuron's mean in them; mean over neurons of at least 1 Hz ±
standard error over sessions. "Mean rate" is each neuron's mean in the training trials{oracle}.

{scores}

## Limits

{limits}
"""

SIMULATED = {
    "folder": 'mtm.checkpoint.SHIPPED / "simulated"',
    "title": "Small model of three simulated animals",
    "data": "Three animals of `mtm.simulate(3, 200, 96, seed=0)`; no recording, so no licence to "
    "heed but this project's.",
    "limits": "Made for the book. Simulated animals share one circuit, and their spikes are "
    "Poisson; it is not meant as a start for real recordings.",
}
STEINMETZ = {
    "folder": '"steinmetz-model"',
    "title": "Model of eleven Neuropixels recordings of three mice",
    "data": "Steinmetz, Zatka-Haas, Carandini and Harris, Nature 2019 (figshare "
    "10.6084/m9.figshare.9598406, CC-BY 4.0; the weights are derived from it and need the same "
    "attribution): 20 ms bins, 0 to 0.4 s after stimulus onset, units not filtered by quality.",
    "limits": "Bins of 20 ms and trials of 0.4 s after a visual stimulus, in one task, of three "
    "mice; other bins are refused. A new session needs training trials of its own for its maps. "
    "Behaviour was not trained for.",
}

SMALL = {"width": 64, "heads": 1, "mlp_width": 128, "stitch_width": 48, "latents": 16}
"""Sizes of the specialists: half as wide as depth 1, so that all five fit into the package."""

SPECIALISTS: dict[str, tuple[mtm.MtMConfig, dict[str, Any]]] = {
    name: (mtm.MtMConfig.from_depth(1, **SMALL), {"epochs": 100})
    for name in ("neuron", "causal", "intra-region", "inter-region")
}
SPECIALISTS["temporal"] = (  # the paper's first baseline, with the settings of `fit_baseline`
    mtm.MtMConfig.published(1, **SMALL | {"latents": 0}),
    {"epochs": 100, "weight_decay": 0.01, "batch_size": 16, "batches_per_step": 1},
)
"""Scheme -> sizes and options of the model, and settings of training."""

SPECIALISTS_CARD = """# Specialists: one small model for each masking scheme

The book's chapters on the schemes load these five models with
`mtm.load(mtm.checkpoint.SHIPPED / "specialists" / scheme)`. Each was trained on one simulated
animal, `mtm.simulate(1, 200, 96, seed=0)`, with one scheme and no prompt, by
`python benchmarks/weights.py specialists`. The temporal one is the paper's baseline, with its
options and settings; the other four use the recipe `mtm` for 100 epochs, but with all regions
equally likely, and without input dropout.

Scores on test trials: bits per spike over each neuron's mean in them, mean over neurons; accuracy
of the choice; R2 of the traces. They are also in `benchmarks/results/specialists.json`.

```text
{scores}
```
"""


def main() -> None:
    """Read the command line, train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="'simulated', 'specialists', or where recordings are")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("_build/weights"))
    options = parser.parse_args()
    if options.folder == "specialists":
        specialists(options.out or SHIPPED / "specialists", options.work)
        return
    simulated = options.folder == "simulated"
    sessions = recordings(Path(options.folder), "steinmetz")
    name = "simulated" if simulated else "steinmetz"
    out = options.out or (SHIPPED / name if simulated else options.work / f"{name}-model")
    fit = mtm.fit(sessions, depth=1, folder=options.work / name)
    mtm.save(fit, out)
    text = card(fit, sessions, SIMULATED if simulated else STEINMETZ, 1)
    (out / "README.md").write_text(text)
    print(text)


def specialists(out: Path, work: Path) -> None:
    """Train, save and score a model for each masking scheme."""
    (session,) = mtm.simulate(1, 200, 96, seed=0)
    predictors: dict[str, Any] = {"mean rate": mtm.mean_rates(session)}
    for name, (sizes, settings) in SPECIALISTS.items():
        settings = settings | {"schemes": (name,), "prompt": False}
        settings |= {"regions_by_size": False, "input_dropout": {}}
        fit = mtm.fit(session, sizes, folder=work / f"specialist-{name}", **settings)
        mtm.save(fit, out / name)
        (out / name / "config.json").unlink()  # the same is in the model's file
        predictors[name] = fit
    predictors["oracle"] = mtm.oracle(session)
    reports = {name: mtm.evaluate(each, session) for name, each in predictors.items()}
    table = mtm.score_table(reports)
    means = {
        name: {task: round(float(each.mean()), 4) for task, each in report.tasks.items()}
        for name, report in reports.items()
    }
    (RESULTS / "specialists.json").write_text(json.dumps({"scores": means}, indent=1) + "\n")
    (out / "README.md").write_text(SPECIALISTS_CARD.format(scores=table))
    print(table)


def card(fit: mtm.Fit, sessions: list[mtm.Session], told: dict[str, str], depth: int) -> str:
    """Data, licence, recipe, scores and limits, as markdown."""
    lines = ["| session | trials | neurons | scored | regions |", "| --- | --- | --- | --- | --- |"]
    for s in sessions:
        numbers = (s.n_trials, s.n_neurons, len(busy(s)), len(s.region_names))
        lines.append(f"| {s.name} | " + " | ".join(map(str, numbers)) + " |")
    changed = {k: v for k, v in asdict(fit.config).items() if k in TOLD}
    return CARD.format(
        sessions="\n".join(lines),
        split_seed=fit.config.split_seed,
        depth=depth,
        settings=", ".join(f"{key} {value}" for key, value in changed.items()),
        epoch=fit.best["epoch"],
        parameters=sum(p.numel() for p in fit.model.parameters()),
        scores=scores(fit, sessions),
        oracle='; the oracle, the true rates' if sessions[0].rates is not None else "",
        **told,
    )  # fmt: skip


def scores(fit: mtm.Fit, sessions: list[mtm.Session]) -> str:
    """A row for the model, for what knows less and, where it is known, for the truth."""
    rows = {"this model": [fit] * len(sessions), "mean rate": list(map(mtm.mean_rates, sessions))}
    if sessions[0].rates is not None:
        rows["oracle"] = list(map(mtm.oracle, sessions))
    lines = ["| | " + " | ".join(FOUR) + " |", "| --- " * 5 + "|"]
    for name, predictors in rows.items():
        report = Report.join([
            mtm.evaluate(predictor, session, tasks=FOUR, neurons=busy(session))
            for predictor, session in zip(predictors, sessions, strict=True)
        ])  # fmt: skip
        cells = [str(report.tasks[task].over("sessions")) for task in FOUR]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
