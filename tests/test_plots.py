"""Figures draw on the Axes they are given, and show what they say they show."""

import copy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from mtm import Report, evaluate, mean_rates, oracle, plots
from mtm.prediction import TASKS


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close("all")


@pytest.fixture(scope="module")
def reports(sessions):
    """Oracle and mean rates of one session."""
    predictors = {"oracle": oracle(sessions[0]), "mean rate": mean_rates(sessions[0])}
    return {n: evaluate(p, sessions[0], tasks=list(TASKS)) for n, p in predictors.items()}


def test_each_figure_returns_its_axes_with_labels(ax, sessions, reports):
    session, log_rates = sessions[0], oracle(sessions[0])
    entries = [{"epoch": e, "mean": 0.1, "validation": {"neuron": 0.1}} for e in (1, 2)]
    for draw, *given in (
        (plots.raster, session, 0),
        (plots.psth, session, 2, "choice"),
        (plots.history, entries),
        (plots.predicted, session, 1, 2, log_rates[1, :, 2]),
    ):
        ax.clear()
        assert draw(*given, ax) is ax
        assert ax.has_data() and ax.get_xlabel(), draw


def test_score_bars_stand_at_the_means_also_where_a_report_lacks_a_column(ax, reports):
    without = copy.deepcopy(reports["mean rate"])
    for scores in without.tasks.values():
        scores.table = scores.table.drop(columns="psth_r2")
    assert plots.score_bars({"oracle": reports["oracle"], "other": without}, "psth_r2", ax) is ax
    heights = np.array([bar.get_height() for bar in ax.patches]).reshape(2, -1)
    means = [scores.mean("psth_r2") for scores in reports["oracle"].tasks.values()]
    np.testing.assert_allclose(heights[0], means)
    assert np.isnan(heights[1]).all()
    assert [t.get_text().replace("\n", "") for t in ax.get_xticklabels()] == list(TASKS)


@pytest.mark.parametrize("name", ["neuron", "causal", "inter-region", "intra-region"])
def test_mask_pictures_show_the_mask(ax, sessions, name):
    session = sessions[0]
    plots.mask(session, name, [0, 1], ax, seed=3)
    image = ax.images[0].get_array()
    order = np.argsort(session.regions, kind="stable")
    spikes = np.concatenate(list(session.counts[:2][:, :, order] > 0)).T
    np.testing.assert_array_equal(image % 2, spikes)
    has_unscored = bool(((image // 2) == 1).any())
    assert bool((image >= 4).any()) and has_unscored == (name == "intra-region")
    assert {t.get_text() for t in ax.get_yticklabels()} == set(session.region_names)


def test_scatter_shows_every_scored_neuron_once(ax, sessions):
    task, predictors = "inter-region", (mean_rates, oracle)
    reports = [Report.join([evaluate(p(s), s, tasks=[task]) for s in sessions]) for p in predictors]
    plots.score_scatter(*reports, "inter-region", ax=ax, names=("mean rate", "oracle"))
    shown = np.concatenate([points.get_offsets() for points in ax.collections])
    expected = [[v for s in sessions for v in r.tasks[task].by_neuron(s.name)] for r in reports]
    np.testing.assert_allclose(np.sort(shown, axis=0), np.sort(np.transpose(expected), axis=0))


def test_psths_and_single_trials_are_those_of_the_trials(ax, sessions):
    session, trials = sessions[0], sessions[0].split().test
    rates, counts = session.rates[trials], session.counts[trials]
    figure = plots.psth_grid(session, rates, [0, 5, 7, 9, 11], trials)
    left = session.behaviour["choice"][trials] == -1
    observed, predicted = (figure.axes[1].lines[i].get_ydata() for i in (0, 2))
    np.testing.assert_allclose(observed, counts[left][:, :, 5].mean(0) / session.bin_size)
    np.testing.assert_allclose(predicted, rates[left][:, :, 5].mean(0) / session.bin_size)
    figure = plots.before_and_after(session, rates, 5, trials, by="choice")
    order = np.argsort(session.behaviour["choice"][trials], kind="stable")
    images = [ax.images[0].get_array() for ax in figure.axes[:2]]
    np.testing.assert_allclose(images[0], counts[order][:, :, 5] / session.bin_size)
    np.testing.assert_allclose(images[1], rates[order][:, :, 5] / session.bin_size)


@pytest.mark.parametrize("name", ["causal", "intra-region"])
def test_a_filled_in_trial_shows_what_is_scored_and_hides_the_answer(ax, sessions, name):
    session, given = sessions[0], []

    def silent(counts, scheme, mask, session_name):
        given.append((counts, scheme, mask))
        return torch.zeros(counts.shape)

    figure = plots.filled_in(session, name, 2, silent, seed=1)
    [(counts, scheme, mask)] = given
    assert scheme == name and counts.shape[0] == 1
    assert not counts[mask.hidden].any() and counts.sum() > 0
    order = np.argsort(session.regions, kind="stable")
    target, hidden = (each[0].numpy()[:, order].T for each in (mask.target, mask.hidden))
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_array_equal(shown // 2 > 0, hidden)
    assert not (shown % 2)[hidden].any()  # no spike that the model does not see
    for panel in figure.axes[2:4]:
        np.testing.assert_array_equal(~np.ma.getmaskarray(panel.images[0].get_array()), target)
    predicted = figure.axes[2].images[0].get_array()
    np.testing.assert_allclose(predicted[target], 1 / session.bin_size)
