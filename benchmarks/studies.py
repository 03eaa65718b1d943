"""How much to hide, and which prompt to show: the paper's Tables 7 and 6, on your recordings.

    python benchmarks/studies.py ratio WHERE       a share of 0.1, 0.3 or 0.6 hidden
    python benchmarks/studies.py prompt WHERE      the same model, shown each prompt in turn

WHERE is "simulated", session files (as `python -m mtm prepare` writes), or the folder of recordings
that real_data.py reads. Each session is trained on alone, with each seed. What is done is kept in
--work, so that the command goes on where it was stopped. Out come results/study_<name>.json and the
picture book/_assets/study_<name>.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from real_data import (
    PICTURES,
    RESULTS,
    Method,
    averages,
    described,
    draw,
    markdown,
    recordings,
    run,
    table,
    write_json,
)

import mtm
from mtm.baselines import OPTIONS, SETTINGS, temporal_ndt1
from mtm.masks import MTM_SCHEMES
from mtm.recipes import RECIPES

RATIOS = (0.1, 0.3, 0.6)  # of the paper's Table 7
SHARED = ("neuron", "intra-region")  # the schemes of MtM that hide a share, by the paper's Table 7


def ratio(depth: int, epochs: int) -> dict[str, Method]:
    """How much is hidden: of temporal masking (with its own settings), of schemes, of all four."""

    def temporal(share: float) -> Method:
        def make(sessions: list[mtm.Session], seed: int) -> mtm.Fit:
            how = {"ratios": (share,), "depth": depth, "progress": False}
            return temporal_ndt1(sessions, seed=seed, **how)

        told = {"depth": depth, "baseline": "temporal", "ratio": share, **OPTIONS, **SETTINGS}
        return Method(make, told, seeded=True)

    rows = {f"temporal {share}": temporal(share) for share in RATIOS}
    for name in SHARED:
        for share in RATIOS:
            settings = {"schemes": (name,), "prompt": False, "ratios": {name: share}}
            rows[f"{name} {share}"] = _trained(depth, epochs, **settings)
    shares = {f"MtM {share}": dict.fromkeys(SHARED, share) for share in RATIOS}
    return rows | {name: _trained(depth, epochs, ratios=ratios) for name, ratios in shares.items()}


def _trained(depth: int, epochs: int, **settings: Any) -> Method:
    def make(sessions: list[mtm.Session], seed: int) -> mtm.Fit:
        options = {"depth": depth, "epochs": epochs, "seed": seed, "progress": False}
        return mtm.fit(sessions, **options, **settings)

    return Method(make, {"depth": depth, "epochs": epochs, **settings}, seeded=True)


class Prompted:
    """A model that is shown one prompt, whatever the task's own is; what is hidden stays."""

    def __init__(self, model: mtm.MtM, prompt: str) -> None:
        self.model, self.prompt = model, prompt
        self.device, self.seen = model.device, model.seen

    def predict_log_rates(
        self, counts: Any, scheme: str, mask: Any, session: str, neurons: Any = None
    ) -> Any:
        """Log-rates; see `mtm.prediction`."""
        return self.model.predict_log_rates(counts, self.prompt, mask, session, neurons=neurons)


def prompt(depth: int, epochs: int) -> dict[str, Method]:
    """One model of each session and seed, shown each prompt."""
    models: dict[tuple[str, int], mtm.Fit] = {}

    def shown(name: str) -> Method:
        def make(sessions: list[mtm.Session], seed: int) -> Prompted:
            key = (sessions[0].name, seed)
            if key not in models:
                models[key] = _trained(depth, epochs).make(sessions, seed)
            return Prompted(models[key].model, name)

        settings = {"depth": depth, "epochs": epochs, "prompt": name}
        return Method(make, settings, seeded=True)

    return {f"prompt {name}": shown(name) for name in MTM_SCHEMES}


STUDIES = {"ratio": ratio, "prompt": prompt}


def sessions_of(where: list[str]) -> list[mtm.Session]:
    """Simulated sessions, session files, or recordings."""
    if where == ["simulated"]:
        return mtm.simulate(3, 200, 96, seed=0)
    if all(Path(path).suffix == ".npz" for path in where):
        return [mtm.Session.load(path) for path in where]
    return recordings(Path(where[0]), where[1:])


def main() -> None:
    """Read the command line, run, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("where", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=RECIPES["mtm"].epochs)
    parser.add_argument("--work", type=Path, default=Path("_build/studies"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args()
    sessions = sessions_of(options.where)
    chosen = STUDIES[options.study](options.depth, options.epochs)
    work = options.work / options.study
    seconds = run(sessions, chosen, options.seeds, work)
    whole = table(sessions, chosen, options.seeds, work)
    alone = len(sessions) == 1  # its errors are over neurons, and over seeds for behaviour
    means = whole[sessions[0].name] if alone else averages(whole)
    facts = described(sessions, options)
    facts |= {"study": options.study, "seconds": seconds, "scores": whole, "mean": means}
    write_json(options.out / f"study_{options.study}.json", facts)
    who = sessions[0].name if alone else f"{len(sessions)} sessions"
    who += f", {len(options.seeds)} seeds"
    over = "neurons (behaviour: seeds)" if alone else "sessions"
    figure = draw(means, f"{options.study}: {who}, mean ± standard error over {over}")
    figure.savefig(options.pictures / f"study_{options.study}.png", dpi=110)
    print(markdown(f"{options.study}, {who}", means))


if __name__ == "__main__":
    main()
