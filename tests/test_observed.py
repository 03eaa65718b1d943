"""What was not observed is not silence: it is hidden from models and never scored."""

import numpy as np
import pytest
import torch

import mtm
from mtm import metrics
from mtm.baselines import fit_baseline
from mtm.prediction import predict_held_out
from mtm.session import Session

HALF = 8  # neurons that are observed in a part of the trials only


def partly(session, garbage=0, **changes):
    """The session, but the first neurons are not observed in half of the trials."""
    observed = np.ones((session.n_trials, session.n_neurons), dtype=bool)
    observed[::2, :HALF] = False
    counts = np.where(observed[:, None], session.counts, garbage)
    fields = {"behaviour": session.behaviour, "bin_size": session.bin_size, **changes}
    return Session(counts, session.regions, session.name, observed=observed, **fields)


@pytest.fixture(scope="module")
def two(sessions):
    return partly(sessions[0]), partly(sessions[0], garbage=9)


@pytest.fixture(scope="module")
def fits(two):
    how = {"depth": 1, "epochs": 3, "validations": 1, "progress": False}
    return [mtm.fit(session, **how) for session in two]


def test_what_stands_there_changes_nothing(two, fits):
    reports = [mtm.evaluate(fit, session) for fit, session in zip(fits, two, strict=True)]
    a, b = (fit.model.state_dict() for fit in fits)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert reports[0].to_frame().equals(reports[1].to_frame())


def test_only_what_was_observed_is_scored(two, fits):
    session, trials = two[0], two[0].split().test
    table = mtm.evaluate(fits[0], session, tasks=["co-smoothing"]).tasks["co-smoothing"].table
    log_rates = predict_held_out(fits[0], session, "co-smoothing", trials)
    for neuron in (0, HALF):
        seen = session.observed[trials, neuron]
        assert seen.all() == (neuron == HALF)
        one = log_rates[seen][..., [neuron]], session.counts[trials[seen]][..., [neuron]]
        train = session.split().train
        null = metrics.log_mean(session.counts[train[session.observed[train, neuron]]])[[neuron]]
        row = table.set_index("neuron").loc[neuron]
        assert row["bits_per_spike"] == pytest.approx(metrics.bits_per_spike(*one)[0])
        expected = metrics.bits_per_spike(*one, null)[0]
        assert row["bits_per_spike_train_null"] == pytest.approx(expected)
        bias = fits[0].model.session_layers(session.name).mean[neuron].log()
        assert float(bias) == pytest.approx(null[0], abs=1e-5)
        rate = session.counts[session.observed[:, neuron], :, neuron].mean() / session.bin_size
        assert session.firing_rates[neuron] == pytest.approx(rate)


def test_predictors_see_it_hidden_and_not_as_a_target(two):
    session, seen = two[0], []

    def predictor(counts, scheme, mask, name):
        seen.append((counts, mask))
        return torch.zeros_like(counts)

    mtm.evaluate(predictor, session, tasks=["forward-prediction", "co-smoothing"])
    test = session.observed[session.split().test]
    (counts, mask), *rest = seen
    absent = ~torch.from_numpy(test)[:, None].expand(counts.shape)
    assert mask.hidden[absent].all() and not mask.target[absent].any()
    assert not any((mask.target & ~mask.hidden).any() for _, mask in rest)


@pytest.mark.parametrize("name", ["ridge", "low-rank GLM"])
def test_baselines_learn_from_what_was_observed(two, name):
    """Whatever stands elsewhere, and as well as a fit to the trials in which all was observed."""
    fits = [fit_baseline(name, session) for session in two]
    for task in ("co-smoothing", "forward-prediction"):
        pairs = zip(fits, two, strict=True)
        np.testing.assert_array_equal(*(predict_held_out(*pair, task) for pair in pairs))
    alone = two[0].select(trials=np.flatnonzero(two[0].observed[:, 0]))
    how, gains = {"tasks": ["co-smoothing"], "neurons": np.arange(HALF)}, []
    for predictor, session in ((fits[0], two[0]), (fit_baseline(name, alone), alone)):
        report = mtm.evaluate(predictor, session, **how)
        gains.append(report.tasks["co-smoothing"].table["gain"].sum())
    assert gains[0] > 0.9 * gains[1]


def test_decoders_leave_out_trials_in_which_nothing_was_observed(two, fits):
    session = two[0].select(neurons=np.arange(HALF))
    n = session.n_trials
    found = mtm.decode(np.zeros_like(session.counts, float), session, "wheel-speed")["wheel-speed"]
    assert (found.n_left_out, found.n_train + found.n_test) == (n // 2, n // 2)
    tuned = mtm.fit_behaviour(two[0], fits[0], "wheel-speed", epochs=1)["wheel-speed"]
    hidden = ~two[0].observed[:2, None]
    shown = [tuned.readout.predict(each.counts[:2] + 5 * hidden, hidden) for each in two]
    np.testing.assert_array_equal(*shown)


def test_it_is_selected_saved_and_shown(two, tmp_path):
    session = two[0]
    again = Session.load(session.save(tmp_path / "a.npz"))
    np.testing.assert_array_equal(again.observed, session.observed)
    some = session.select(trials=[1, 2], neurons=[0, HALF])
    np.testing.assert_array_equal(some.observed, [[True, True], [False, True]])
    filled = session.filled(np.arange(4))
    np.testing.assert_allclose(filled[0, :, 0], session.counts[[1, 3], :, 0].mean(0))
