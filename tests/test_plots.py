"""Figures draw on the Axes they are given, with labels, and change nothing global."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mtm import evaluate, mean_rates, oracle, plots


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_each_figure_returns_its_axes_with_labels(ax, sessions, trained):
    session = sessions[0]
    reports = {
        "oracle": evaluate(oracle(session), session),
        "mean rate": evaluate(mean_rates(session), session),
    }
    log_rates = oracle(session)
    draws = {
        "raster": lambda: plots.raster(session, 0, ax),
        "psth": lambda: plots.psth(session, 2, "choice", ax),
        "history": lambda: plots.history(trained.history, ax),
        "predicted": lambda: plots.predicted(session, 1, 2, log_rates[1, :, 2], ax),
        "scatter": lambda: plots.rate_scatter(session.rates, log_rates, session.bin_size, ax),
        "bars": lambda: plots.score_bars(reports, ax=ax),
    }
    for name, draw in draws.items():
        ax.clear()
        assert draw() is ax, name
        assert ax.has_data() and (ax.get_xlabel() or name == "bars"), name
    assert ax.get_ylabel() == "bits per spike"
    assert [t.get_text() for t in ax.get_xticklabels()] == list(reports["oracle"].tasks)


def test_bars_stand_at_the_means(ax, sessions):
    session = sessions[0]
    report = evaluate(oracle(session), session)
    plots.score_bars({"oracle": report}, ax=ax)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx([s.mean() for s in report.tasks.values()])


@pytest.mark.parametrize("name", ["neuron", "causal", "inter-region", "intra-region", "temporal"])
def test_mask_pictures_show_the_mask(ax, sessions, name):
    session = sessions[0]
    plots.mask(session, name, [0, 1], ax, seed=3)
    image = ax.images[0].get_array()
    assert image.shape == (session.n_neurons, 2 * session.n_bins)
    order = np.argsort(session.regions, kind="stable")
    spikes = np.concatenate(list(session.counts[:2][:, :, order] > 0)).T
    np.testing.assert_array_equal(image % 2, spikes)
    has_unscored = bool(((image // 2) == 1).any())
    assert bool((image >= 4).any()) and has_unscored == (name == "intra-region")
    assert name in ax.get_title()
    assert {t.get_text() for t in ax.get_yticklabels()} == set(session.region_names)
