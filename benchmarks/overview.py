"""Draw the picture of the README and of the book's first page: python benchmarks/overview.py"""

import matplotlib.pyplot as plt
import numpy as np
from common import FOUR, PICTURES

import mtm
from mtm import masks, plots
from mtm.checkpoint import SHIPPED
from mtm.prediction import predict_held_out


def main() -> None:
    """Masks, a hidden neuron, and scores, from the model that comes with the package."""
    session = mtm.simulate(n_sessions=3, n_trials=200, n_neurons=96, seed=0)[0]
    model = mtm.load(SHIPPED / "simulated")
    figure = plt.figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.25, 1, 1])

    for ax, name in zip(left.subplots(2, 2, sharey=True).ravel(), masks.MTM_SCHEMES, strict=True):
        plots.mask(session, name, [0, 1], ax, seed=4)
        ax.set_xticks([])

    ax, trials = middle.subplots(), session.split().test[[1]]
    candidates = np.flatnonzero(session.regions == "MOs5")
    neuron = candidates[np.abs(session.firing_rates[candidates] - 20).argmin()]
    wanted = np.arange(session.n_neurons) == neuron
    log_rates = predict_held_out(model, session, "co-smoothing", trials, wanted)
    plots.predicted(session, trials[0], neuron, log_rates[0, :, neuron], ax)
    ax.set_title("a hidden neuron, one trial")
    ax.legend(frameon=False)

    predictors = {"MtM": model, "mean rate": mtm.mean_rates(session)}
    predictors["oracle"] = mtm.oracle(session)
    reports = {n: mtm.evaluate(p, session, tasks=FOUR) for n, p in predictors.items()}
    ax = plots.score_bars(reports, ax=right.subplots())
    ax.set_xticks(range(4), [task.replace("-", "\n", 1) for task in FOUR])
    figure.savefig(PICTURES / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
