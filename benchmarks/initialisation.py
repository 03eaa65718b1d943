"""How many epochs until a model leaves the mean rate: our initialisation and the authors'.

    python benchmarks/initialisation.py [FOLDER [RECORDING]]

Without FOLDER on a simulated session, else on a recording in it (see real_data.py). Three runs that
share data, sizes, masks and order of batches: our start and the authors' start, both with our other
settings; and the authors' start with all of their settings.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from real_data import recordings

import mtm
from mtm.recipes import RECIPES, TrainConfig, recipe

RUNS: dict[str, TrainConfig] = {
    "our start": RECIPES["mtm"],
    "authors' start, our settings": recipe("mtm", init="paper"),
    "authors' start, their settings": RECIPES["paper"],
}
THRESHOLD = 0.01  # bits per spike over the mean rates that count as having left them


def main() -> None:
    """Read the command line, train, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("recording", nargs="*")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--depth", type=int, default=2)
    path = Path(__file__).parent / "results/initialisation.json"
    parser.add_argument("--json", type=Path, default=path)
    options = parser.parse_args()
    if options.folder:
        session = recordings(options.folder, options.recording)[0]
    else:
        session = mtm.simulate(1, 400, 96, seed=0)[0]
    runs = {}
    for name, config in RUNS.items():
        # Every run's learning-rate schedule is fitted to the epochs that are run.
        result = mtm.fit(
            session,
            config=config,
            depth=options.depth,
            epochs=options.epochs,
            validations=min(options.epochs, 50),
            seed=0,
        )
        curve = {entry["epoch"]: round(entry["mean"], 4) for entry in result.history}
        left = next((epoch for epoch, mean in curve.items() if mean > THRESHOLD), None)
        seconds = round(result.history[-1]["seconds"], 1)
        runs[name] = {"left_the_mean_rate_at_epoch": left, "validation": curve, "seconds": seconds}
        best = max(curve.values())
        print(f"{name:<32} above {THRESHOLD} at epoch {left}; best {best:.3f}; {seconds:.0f} s")
    report = {
        "session": session.name,
        "train_trials": len(session.split().train),
        "neurons": session.n_neurons,
        "depth": options.depth,
        "epochs": options.epochs,
        "threshold": THRESHOLD,
        "unit": "bits per spike over the training means, mean of four schemes, validation trials",
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "runs": runs,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
