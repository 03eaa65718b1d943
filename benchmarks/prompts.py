"""Which prompt to show: the paper's Table 6, on your recordings.

    python benchmarks/prompts.py FOLDER [--recordings NAME ...]

One model of each session and seed is scored in all tasks, and is shown each prompt in turn,
whatever the task hides. FOLDER is "simulated", or that of real_data.py. Out comes
results/study_prompt.json.
"""

from __future__ import annotations

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


def main() -> None:
    """Read the command line, run, write the JSON."""
    options = common.parser(__doc__, "prompts").parse_args()
    sessions = common.recordings(options.folder, options.recordings)
    chosen = methods(options.depth, options.epochs)
    common.run(sessions, chosen, options.seeds, options.work)
    whole = common.table(sessions, chosen, options.seeds, options.work)
    alone = len(sessions) == 1  # its errors are over neurons, and over seeds for behaviour
    means = whole[sessions[0].name] if alone else common.averages(whole)
    facts = {"study": "prompt", "scores": whole, "mean": means}
    facts = common.described(sessions, options) | facts
    common.write_json(options.out / "study_prompt.json", facts)
    who = sessions[0].name if alone else f"{len(sessions)} sessions"
    print(common.markdown(f"prompt: {who}, {len(options.seeds)} seeds", means))


if __name__ == "__main__":
    main()
