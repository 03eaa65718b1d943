"""All six tasks, all baselines, on real recordings: who wins where. One command.

    python benchmarks/real_data.py FOLDER [--recordings NAME ...] [--seeds 0 1 2] [--methods ...]

FOLDER holds recordings as plain arrays (they are no part of this project):
- steinmetz2019/*.npz (Steinmetz et al. 2019, CC-BY 4.0): `spikes_10ms` (K, N, 40), `region`,
  `choice`, contrasts, `feedback`, `wheel_10ms`; here 20 ms bins, 0 to 0.4 s after stimulus onset;
- ibl_*.npz (one session of the International Brain Laboratory, CC-BY 4.0): `spikes` (K, N, 50) in
  20 ms bins, -0.2 to 0.8 s around stimulus onset; its first and last bin are dropped.

Every method is fitted to training trials, tuned on validation trials and scored on test trials,
over the neurons of at least 1 Hz. Out come results/real_data.json and .md, and a picture for the
book.
"""

from __future__ import annotations

from typing import Any

import common
import numpy as np

import mtm
from mtm.baselines import fit_baseline


def methods(depth: int, epochs: int) -> dict[str, common.Method]:
    """Every method, by name."""

    def baseline(name: str, **kind: bool) -> common.Method:
        return common.Method(lambda sessions, seed: fit_baseline(name, sessions), {}, **kind)

    def transformer(name: str, ratios: tuple[float, ...]) -> common.Method:
        settings = {"depth": depth, "ratios": ratios}

        def make(sessions: list[mtm.Session], seed: int) -> Any:
            return fit_baseline(name, sessions, seed=seed, progress=False, **settings)

        return common.Method(make, settings, seeded=True)

    def means(sessions: list[mtm.Session], seed: int) -> dict[str, np.ndarray]:
        return {session.name: mtm.mean_rates(session) for session in sessions}

    return {
        "mean rate": common.Method(means, {}),
        "PSTH": baseline("PSTH"),
        "ridge": baseline("ridge"),
        "low-rank GLM": baseline("low-rank GLM"),
        "reduced-rank regression": baseline("reduced-rank regression", joint=True),
        "temporal NDT1": transformer("temporal NDT1", (0.1, 0.3)),
        "random-token NDT2": transformer("random-token NDT2", (0.3,)),  # slow: one share alone
        "MtM": common.trained(depth=depth, epochs=epochs),
        "MtM, sessions together": common.trained(joint=True, depth=depth, epochs=epochs),
    }


def main() -> None:
    """Read the command line, run, write the table."""
    arguments = common.parser(__doc__, "real_data")
    arguments.add_argument("--methods", nargs="*", default=[], help="to run; default all")
    options = arguments.parse_args()
    known = methods(options.depth, options.epochs)
    sessions = common.recordings(options.folder, options.recordings)
    chosen = {name: known[name] for name in options.methods or known}
    common.run(sessions, chosen, options.seeds, options.work)
    whole = common.table(sessions, known, options.seeds, options.work)
    means, alike = common.averages(whole), max(common.same_bins(sessions), key=len)
    together = common.averages({session.name: whole[session.name] for session in alike})
    facts = common.described(sessions, options) | {"scores": whole}
    facts |= {"mean": means, "mean_with_the_same_bins": together}
    common.write_json(options.out / "real_data.json", facts)
    title = f"{len(alike)} recordings with the same bins"
    text = [
        "# Real recordings: who wins where\n",
        "Test trials. Activity: bits per spike over each neuron's test mean, mean over neurons "
        "of at least 1 Hz ± standard error over neurons. Behaviour: accuracy of the choice, R2 of "
        "traces, ± standard error over seeds. Bold: the best of those that see activity. Made by "
        f"`python benchmarks/real_data.py`. Seeds: {options.seeds}.\n",
        common.markdown("Mean over recordings (± standard error over recordings)", means),
        common.markdown(f"Mean over the {title}", together),
        *[common.markdown(name, tasks) for name, tasks in whole.items()],
    ]
    figure = common.draw(together, f"{title}, mean ± standard error over recordings")
    figure.savefig(options.pictures / "real_data.png", dpi=110)
    (options.out / "real_data.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
