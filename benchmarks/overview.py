"""Draw the picture of the README and of the book's first page: python benchmarks/overview.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import mtm
from mtm import checkpoint as hub, masks, plots


def main() -> None:
    """Masks, a hidden neuron, and scores, from the model that comes with the package."""
    session = mtm.simulate(n_sessions=3, n_trials=200, n_neurons=96, seed=0)[0]
    model = mtm.load(hub.SHIPPED / "simulated")
    figure = plt.figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.25, 1, 1])

    for ax, name in zip(left.subplots(2, 2, sharey=True).ravel(), masks.MTM_SCHEMES, strict=True):
        plots.mask(session, name, [0, 1], ax, seed=4)
        ax.set_xticks([])

    ax = middle.subplots()
    trial = session.split().test[1]
    counts = torch.from_numpy(session.counts[[trial]]).float()
    candidates = np.flatnonzero(session.regions == "MOs5")
    neuron = candidates[np.abs(session.firing_rates[candidates] - 20).argmin()]
    hidden = torch.zeros(counts.shape, dtype=torch.bool)
    hidden[:, :, neuron] = True
    log_rates = model.predict_log_rates(counts, "neuron", mtm.Mask(hidden, hidden), session.name)
    plots.predicted(session, trial, neuron, log_rates[0, :, neuron].numpy(), ax)
    ax.set_title("a hidden neuron, one trial")
    ax.legend(frameon=False)

    predictors = {
        "MtM": model,
        "mean rate": mtm.mean_rates(session),
        "oracle": mtm.oracle(session),
    }
    reports = {name: mtm.evaluate(p, session) for name, p in predictors.items()}
    ax = plots.score_bars(reports, ax=right.subplots())
    ax.set_xticks(
        range(4), ["co-\nsmoothing", "forward\nprediction", "inter-\nregion", "intra-\nregion"]
    )
    path = Path(__file__).parents[1] / "book/_assets/overview.png"
    figure.savefig(path, dpi=110)
    print(path.name)


if __name__ == "__main__":
    main()
