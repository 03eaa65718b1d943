"""Seconds until our recipe validates as well as the paper's recipe does at its end.

    python benchmarks/time_to_quality.py [FOLDER [RECORDING ...]] [--depth D] [--epochs E]

On a simulated animal, and on the recordings in FOLDER (see real_data.py). Both recipes train the
same sizes on the same trials in one run of this script, one after the other: the paper's with all
of its epochs, ours with its own. Validation (bits per spike, mean of four schemes) hides the same
entries in both. Seconds include validating, as often in both.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from real_data import recordings

import mtm
from mtm.recipes import RECIPES, recipe

VALIDATIONS = 50  # of each run


def race(session: mtm.Session, depth: int, epochs: int | None) -> dict[str, object]:
    """Train with both recipes; what each reached, and when ours was as far as the paper's."""
    runs, curves = {}, {}
    for name in RECIPES:
        n_epochs = epochs or RECIPES[name].epochs
        config = recipe(name, epochs=n_epochs, validations=min(n_epochs, VALIDATIONS), seed=0)
        result = mtm.fit(session, depth=depth, config=config, progress=False)
        curves[name] = result.history
        runs[name] = {
            "epochs": config.epochs,
            "steps": result.history[-1]["step"],
            "seconds": round(result.history[-1]["seconds"], 1),
            "best": round(result.best["mean"], 4),
            "best_at_epoch": result.best["epoch"],
            "last": round(result.history[-1]["mean"], 4),
            "validation": {e["epoch"]: round(e["mean"], 4) for e in result.history},
        }
        print(f"{session.name:<28} {name:<6} best {runs[name]['best']:.3f} "
              f"in {runs[name]['seconds']:.0f} s", flush=True)  # fmt: skip
    goal = runs["paper"]["best"]
    there = next((entry for entry in curves["mtm"] if entry["mean"] >= goal), None)
    found: dict[str, object] = {"session": session.name, "goal": goal, "runs": runs}
    if there is not None:
        found |= {
            "reached_at_epoch": there["epoch"],
            "reached_at_step": there["step"],
            "reached_in_seconds": round(there["seconds"], 1),
            "share_of_the_papers_seconds": round(there["seconds"] / runs["paper"]["seconds"], 4),
            "share_of_the_papers_steps": round(there["step"] / runs["paper"]["steps"], 4),
        }
        print(f"{'':<28} ours was there after {there['seconds']:.0f} s, {there['step']} steps")
    return found


def main() -> None:
    """Read the command line, train, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("recording", nargs="*")
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="of both recipes, for a quick try")
    path = Path(__file__).parent / "results/time_to_quality.json"
    parser.add_argument("--json", type=Path, default=path)
    options = parser.parse_args()
    sessions = mtm.simulate(1, 100, 48, seed=0)
    if options.folder:
        sessions += recordings(options.folder, options.recording)
    report = {
        "unit": "bits per spike over the training means, mean of four schemes, validation trials",
        "depth": options.depth,
        "machine": platform.processor() or platform.machine(),
        "device": str(mtm.train.pick_device()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sessions": [],
    }
    for session in sessions:
        report["sessions"].append(race(session, options.depth, options.epochs))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
