"""Train MtM on real recordings and print its scores beside the null: one command.

    python benchmarks/real_data.py FOLDER [--recordings NAME ...] [--depth D] [--epochs E]

FOLDER holds recordings as plain arrays (they are no part of this project):
- steinmetz2019/*.npz (Steinmetz et al. 2019, CC-BY 4.0): `spikes_10ms` (K, N, 40), `region`,
  `choice`, contrasts, `feedback`, `wheel_10ms`; here 20 ms bins, 0 to 0.4 s after stimulus onset;
- ibl_*.npz (one session of the International Brain Laboratory, CC-BY 4.0): `spikes` (K, N, 50) in
  20 ms bins, -0.2 to 0.8 s around stimulus onset; its first and last bin are dropped.

Scores are means over the neurons that fire at least 1 Hz in the training trials.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

import mtm


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
    """The named recordings; default the first Steinmetz session and the IBL session."""
    found = {p.stem: (p, steinmetz) for p in sorted((folder / "steinmetz2019").glob("*.npz"))}
    first = list(found)[:1]
    found |= {p.stem: (p, ibl) for p in sorted(folder.glob("ibl_*.npz"))}
    chosen = names or first + [name for name in found if name.startswith("ibl_")]
    if missing := [name for name in chosen if name not in found]:
        raise SystemExit(f"{folder} has no {missing[0]}; it has: {', '.join(found) or 'nothing'}")
    return [read(path) for path, read in (found[name] for name in chosen)]


def run(session: mtm.Session, depth: int, changes: dict[str, object]) -> dict[str, object]:
    """Train on one session and score it; returns everything worth keeping."""
    train = session.counts[session.split().train]
    neurons = np.flatnonzero(train.mean(axis=(0, 1)) / session.bin_size >= 1.0)
    print(f"\n{session!r}\n  scored: {len(neurons)} neurons of at least 1 Hz", flush=True)
    start = time.perf_counter()
    result = mtm.fit(session, depth=depth, **changes)
    trained = time.perf_counter() - start
    predictors = {"MtM": result.model, "mean rate": mtm.mean_rates(session)}
    start = time.perf_counter()
    reports = {k: mtm.evaluate(p, session, neurons=neurons) for k, p in predictors.items()}
    evaluated = time.perf_counter() - start
    print(mtm.score_table(reports))
    decoded = {name: d.to_dict() for name, d in mtm.decode(result.model, session).items()}
    for name, scores in decoded.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))
    print(f"trained in {trained:.0f} s, evaluated in {evaluated:.0f} s", flush=True)
    return {
        "session": session.name,
        "trials": session.n_trials,
        "bins": session.n_bins,
        "neurons": session.n_neurons,
        "scored_neurons": len(neurons),
        "activity": {name: report.to_dict() for name, report in reports.items()},
        "behaviour": decoded,
        "history": [{k: e[k] for k in ("epoch", "mean", "seconds")} for e in result.history],
        "seconds": {"train": round(trained, 1), "evaluate": round(evaluated, 1)},
    }


def main() -> None:
    """Read the command line, run, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recordings", nargs="*", default=[])
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results/real_data.json"
    )
    options = parser.parse_args()
    changes: dict[str, object] = {"seed": options.seed}
    if options.epochs:
        changes["epochs"] = options.epochs
    runs = []
    for session in recordings(options.folder, options.recordings):
        runs.append(run(session, options.depth, changes))
        report = {
            "depth": options.depth,
            "train": {k: v for k, v in vars(mtm.TrainConfig(**changes)).items() if k != "ratios"},
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(mtm.train.pick_device()),
            "torch": torch.__version__,
            "runs": runs,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
