"""Which prompt to show: the paper's Table 6, on your recordings.

    python benchmarks/prompts.py WHERE ...

One model of each session and seed is scored in all tasks, and is shown each prompt in turn,
whatever the task hides. WHERE is "simulated", session files (as `python -m mtm prepare` writes), or
the folder of recordings that real_data.py reads. Out comes results/study_prompt.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common

import mtm
from mtm.masks import MTM_SCHEMES


class Prompted:
    """A model that is shown one prompt, whatever the task's own is; what is hidden stays."""

    def __init__(self, model: mtm.MtM, prompt: str) -> None:
        self.model, self.prompt, self.device = model, prompt, model.device

    def predict_log_rates(self, counts: Any, scheme: str, mask: Any, session: str) -> Any:
        """Log-rates (B, T, N)."""
        return self.model.predict_log_rates(counts, self.prompt, mask, session)


def methods(depth: int, epochs: int) -> dict[str, common.Method]:
    """One model of each session and seed, shown each prompt."""
    models: dict[tuple[str, int], mtm.Fit] = {}

    def prompted(name: str) -> common.Method:
        def make(sessions: list[mtm.Session], seed: int) -> Prompted:
            key = (sessions[0].name, seed)
            if key not in models:
                models[key] = common.trained(depth=depth, epochs=epochs).make(sessions, seed)
            return Prompted(models[key].model, name)

        return common.Method(make, {"depth": depth, "epochs": epochs, "prompt": name}, seeded=True)

    return {f"prompt {name}": prompted(name) for name in MTM_SCHEMES}


def sessions_of(where: list[str]) -> list[mtm.Session]:
    """Simulated sessions, session files, or recordings."""
    if where == ["simulated"]:
        return mtm.simulate(3, 200, 96, seed=0)
    if all(Path(path).suffix == ".npz" for path in where):
        return [mtm.Session.load(path) for path in where]
    return common.recordings(Path(where[0]), where[1:])


def main() -> None:
    """Read the command line, run, write the JSON."""
    arguments = common.parser(__doc__, "prompts")
    arguments.add_argument("where", nargs="+")
    options = arguments.parse_args()
    sessions = sessions_of(options.where)
    chosen = methods(options.depth, options.epochs)
    seconds = common.run(sessions, chosen, options.seeds, options.work)
    whole = common.table(sessions, chosen, options.seeds, options.work)
    alone = len(sessions) == 1  # its errors are over neurons, and over seeds for behaviour
    means = whole[sessions[0].name] if alone else common.averages(whole)
    facts = common.described(sessions, options) | {"study": "prompt", "seconds": seconds}
    common.write_json(options.out / "study_prompt.json", facts | {"scores": whole, "mean": means})
    who = sessions[0].name if alone else f"{len(sessions)} sessions"
    print(common.markdown(f"prompt: {who}, {len(options.seeds)} seeds", means))


if __name__ == "__main__":
    main()
