"""The activity tasks: what is hidden, what is scored, and that nothing can cheat."""

import json

import numpy as np
import pytest
import torch

from mtm import (
    Session,
    SessionError,
    evaluate,
    fit,
    mean_rates,
    metrics,
    oracle,
    score_table,
)
from mtm.evaluate import TASKS, forward_bins


class Watcher:
    """Predicts from what it is shown: each neuron's own count plus one. Keeps what it saw."""

    def __init__(self):
        self.calls = []

    def predict(self, counts, scheme, mask, session):
        self.calls.append((counts.clone(), scheme, mask, session))
        return torch.log(counts + 1.0) + mask.hidden * -1.0


@pytest.fixture(scope="module")
def session():
    rng = np.random.default_rng(0)
    return Session(
        rng.poisson(0.6, (20, 20, 7)),
        ["CA1", "CA1", "CA1", "DG", "DG", "root", "LP"],
        "s",
        behaviour={"choice": np.arange(20) % 2},
    )


def expected_hidden(task, n, session):
    """Hidden neurons when neuron n is scored, by the words of the table."""
    regions = session.regions
    return {
        "co-smoothing": np.arange(7) == n,
        "forward-prediction": np.ones(7, bool),
        "inter-region": regions == regions[n],
        "intra-region": (regions != regions[n]) | (np.arange(7) == n),
    }[task]


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("task", TASKS)
def test_each_task_hides_and_scores_what_it_says(task, batch_size, session):
    watcher = Watcher()
    report = evaluate(watcher, session, tasks=[task], batch_size=batch_size)
    test = session.split().test
    bins = range(18, 20) if task == "forward-prediction" else range(20)
    scored = np.zeros((4, 20, 7), int)
    for counts, scheme, mask, name in watcher.calls:
        assert scheme == TASKS[task] and name == "s"
        assert mask.causal == (task == "forward-prediction")
        assert not counts[mask.hidden].any()  # zeroed before the predictor sees it
        for b in range(len(counts)):
            (n, *_) = mask.target[b].any(0).nonzero().ravel().tolist()
            hidden = np.zeros((20, 7), bool)
            hidden[np.ix_(list(bins), np.flatnonzero(expected_hidden(task, n, session)))] = True
            np.testing.assert_array_equal(mask.hidden[b], hidden)
            shown = [
                k
                for k in range(4)
                if np.array_equal(np.where(hidden, 0, session.counts[test[k]]), counts[b])
            ]
            assert shown
            scored[shown[0]] += mask.target[b].numpy()
    labelled = np.ones(7, bool) if "region" not in task else session.region_codes >= 0
    expected = np.zeros((20, 7), int)
    expected[np.ix_(list(bins), np.flatnonzero(labelled))] = 1
    if len({session.counts[k].tobytes() for k in test}) == 4:
        np.testing.assert_array_equal(scored.sum(0), 4 * expected)  # each entry exactly once
    scores = report.tasks[task]
    assert scores.neurons.tolist() == np.flatnonzero(labelled).tolist()
    assert scores.bins == (bins[0], bins[-1] + 1)
    # every scored entry was predicted while hidden: log(0 + 1) - 1 = -1
    counts = session.counts[test][:, bins[0] :][:, :, labelled]
    flat = np.full(counts.shape, -1.0)
    np.testing.assert_allclose(
        scores.table["bits_per_spike"], metrics.bits_per_spike(flat, counts), atol=1e-6
    )
    null = metrics.log_mean(session.counts[session.split().train])[labelled]
    np.testing.assert_allclose(
        scores.table["bits_per_spike_train_null"],
        metrics.bits_per_spike(flat, counts, null),
        atol=1e-6,
    )


def test_an_array_is_scored_as_the_same_predictions_from_a_function(session):
    log_rates = np.random.default_rng(1).normal(-0.5, 0.3, session.counts.shape)
    constant = log_rates.mean((0, 1))
    a = evaluate(constant, session)
    b = evaluate(lambda c, scheme, mask, name: torch.from_numpy(constant).expand(c.shape), session)
    for task in TASKS:
        for column in ("bits_per_spike", "trial_r2", "poisson_d2"):
            x, y = (r.tasks[task].table[column] for r in (a, b))
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_a_subset_of_neurons_and_trials(session):
    report = evaluate(Watcher(), session, trials=np.array([0, 5]), neurons=[1, 3, 5])
    assert report.n_trials == 2
    assert report.tasks["co-smoothing"].neurons.tolist() == [1, 3, 5]
    assert report.tasks["intra-region"].neurons.tolist() == [1, 3]
    whole = evaluate(Watcher(), session, trials=np.array([0, 5]))
    for task in TASKS:
        part, all_of = report.tasks[task], whole.tasks[task]
        keep = np.isin(all_of.neurons, part.neurons)
        np.testing.assert_allclose(part.table["trial_r2"], all_of.table["trial_r2"][keep])


def test_silent_neurons_are_counted_and_not_averaged():
    counts = np.random.default_rng(0).poisson(0.6, (20, 20, 3))
    counts[:, :, 1] = 0
    report = evaluate(mean_rates(s := Session(counts, name="s")), s)
    scores = report.tasks["co-smoothing"]
    assert scores.n_silent == 1 and np.isnan(scores.table["bits_per_spike"][1])
    assert scores.mean() == pytest.approx(np.nanmean(scores.table["bits_per_spike"]))
    assert set(report.left_out) == {"inter-region", "intra-region"}
    json.dumps(report.to_dict(), allow_nan=False)


def test_oracle_above_model_above_null(sessions, trained):
    for session in sessions:
        predictors = {
            "MtM": trained.model, "null": mean_rates(session), "oracle": oracle(session)
        }  # fmt: skip
        reports = {k: evaluate(p, session) for k, p in predictors.items()}
        for task in TASKS:
            score = {k: r.tasks[task].mean("bits_per_spike_train_null") for k, r in reports.items()}
            assert score["oracle"] > score["MtM"] > score["null"], (task, score)
            assert score["null"] == pytest.approx(0, abs=1e-9)
    table = score_table(reports)
    assert "co-smoothing" in table and "oracle" in table


def test_forward_prediction_hides_a_tenth():
    assert [forward_bins(t) for t in (100, 50, 20, 7, 1)] == [
        (90, 100), (45, 50), (18, 20), (6, 7), (0, 1)
    ]  # fmt: skip


def test_the_report_says_what_it_holds(session):
    text = str(evaluate(mean_rates(session), session))
    for part in (
        "'s', 4 trials",
        "over their test mean",
        "over their training mean",
        "of them silent",
    ):
        assert part in text
    text = str(evaluate(np.zeros(7), Session(session.counts)))
    assert "inter-region: left out, no neuron has a region label" in text


def test_neurons_predicted_from_nothing_are_counted(session):
    report = evaluate(Watcher(), session)
    visible = {task: scores.table["visible"].tolist() for task, scores in report.tasks.items()}
    assert visible["co-smoothing"] == [6] * 7 and visible["forward-prediction"] == [7] * 7
    assert visible["inter-region"] == [4, 4, 4, 5, 5, 6]
    assert visible["intra-region"] == [2, 2, 2, 1, 1, 0]  # LP has one neuron
    assert report.to_dict()["intra-region"]["neurons_with_nothing_visible"] == 1


def test_a_model_is_scored_on_the_split_it_was_trained_on(sessions):
    session = sessions[0]
    model = fit(session, depth=1, epochs=1, split_seed=5, progress=False).model
    null = evaluate(mean_rates(session, 5), session, split_seed=5, tasks=["forward-prediction"])
    ours = evaluate(model, session, tasks=["forward-prediction"])
    spikes = [r.tasks["forward-prediction"].table["spikes"].tolist() for r in (null, ours)]
    assert spikes[0] == spikes[1]
    with pytest.raises(ValueError, match="trained on the split of seed 5, not 0"):
        evaluate(model, session, split_seed=0)


def test_trials_and_neurons_as_flags(session):
    flags = np.arange(20) < 5
    a = evaluate(Watcher(), session, trials=flags, neurons=np.arange(7) < 2)
    b = evaluate(Watcher(), session, trials=np.arange(5), neurons=[0, 1])
    assert str(a) == str(b) and a.n_trials == 5


def test_errors(session):
    with pytest.raises(ValueError, match="no trials or no neurons to score"):
        evaluate(mean_rates(session), session, trials=[])
    with pytest.raises(ValueError, match="unknown task 'c'; pass a list"):
        evaluate(mean_rates(session), session, tasks="co-smoothing")
    with pytest.raises(ValueError, match="log-rates hold NaN"):
        evaluate(np.full(session.counts.shape, np.nan), session)
    with pytest.raises(
        ValueError, match="unknown task 'cosmoothing'; pass a list of some of: co-smoothing"
    ):
        evaluate(mean_rates(session), session, tasks=["cosmoothing"])
    with pytest.raises(SessionError, match="inter-region: no scored neuron has a region label"):
        evaluate(Watcher(), Session(session.counts), tasks=["inter-region"])
    with pytest.raises(ValueError, match="the predictor returned shape"):
        evaluate(lambda c, *_: c[:, :1], session)
    with pytest.raises(ValueError, match="NaN or infinite log-rates in session 's'"):
        evaluate(lambda c, *_: torch.log(c * 0.0), session)
    with pytest.raises(SessionError, match="only simulated sessions"):
        oracle(session)


def test_hidden_neurons_equal_the_authors(parity):
    """Which neurons each task zeroes, against inputs that the authors' code made."""
    theirs = torch.load(parity / "metrics.pt", weights_only=True)
    counts = theirs["heldout_input"].int().numpy()  # (3, 6, 8)
    session = Session(counts, theirs["heldout_regions"], "theirs", given_split=([0], [1], [2]))
    for task, name, scored in [
        ("co-smoothing", "per_neuron", [2]),
        ("inter-region", "inter_region", [0, 2, 5, 7]),
        ("intra-region", "intra_region", [2]),
    ]:
        watcher = Watcher()
        evaluate(watcher, session, tasks=[task], trials=[0, 1, 2], neurons=scored)
        ((shown, *_),) = watcher.calls
        np.testing.assert_array_equal(shown, theirs["heldout"][name]["spikes"])
