"""evaluate(): scores of the activity tasks and behaviours, of one session and of many."""

import numpy as np
import pandas as pd
import pytest
import torch

from mtm import Session, SessionError, evaluate, evaluation, fit, masks, mean_rates, metrics, oracle
from mtm.prediction import TASKS


def plus_one(counts, scheme, mask, session):
    """Predict each neuron's own count plus one, where it is visible, and else a constant."""
    return torch.log(counts + 1.0) - 1.0 * mask.hidden


@pytest.fixture(scope="module")
def session():
    rng = np.random.default_rng(0)
    regions = ["CA1", "CA1", "CA1", "DG", "DG", "root", "LP"]
    behaviour = {"choice": np.arange(20) % 2}
    return Session(rng.poisson(0.6, (20, 20, 7)), regions, "s", behaviour=behaviour)


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_the_metrics(task, session):
    scores = evaluate(plus_one, session, tasks=[task]).tasks[task]
    split = session.split()
    neurons = np.flatnonzero(session.region_codes >= 0) if "region" in task else np.arange(7)
    counts = session.counts[split.test][:, :, neurons]
    counts = counts[:, 18:] if task == "forward-prediction" else counts
    flat = np.full(counts.shape, -1.0)  # all that is scored was hidden
    null = metrics.log_mean(session.counts[split.train])[neurons]
    assert scores.neurons.tolist() == neurons.tolist()
    assert scores.table["region"].tolist() == session.regions[neurons].tolist()
    for column, expected in {
        "bits_per_spike": metrics.bits_per_spike(flat, counts),
        "bits_per_spike_train_null": metrics.bits_per_spike(flat, counts, null),
        "poisson_d2": metrics.poisson_d2(flat, counts),
        "trial_r2": metrics.trial_r2(flat, counts),
        "psth_r2": metrics.psth_r2(flat, counts, session.behaviour["choice"][split.test]),
        "gain": metrics.gain(flat, counts),
        "spikes": counts.sum((0, 1)),
    }.items():
        np.testing.assert_allclose(scores.table[column], expected, atol=1e-9)


def test_a_behaviour_that_was_set_as_a_column_of_a_table(session):
    again = session.select()
    again.behaviour["choice"] = pd.Series(session.behaviour["choice"], index=np.arange(20)[::-1])
    for one in (again, again.select()):
        psth = [
            evaluate(plus_one, s, tasks=["co-smoothing"]).means("psth_r2") for s in (session, one)
        ]
        assert psth[0] == psth[1]


def test_a_subset_of_neurons_and_trials(session):
    with pytest.raises(ValueError, match="neurons: need indices or .7,. bool, such as session"):
        evaluate(plus_one, session, neurons="CA1")
    report = evaluate(plus_one, session, trials=np.array([0, 5]), neurons=[1, 3, 5])
    assert report.n_trials == 2
    whole = evaluate(plus_one, session, trials=np.array([0, 5]))
    for task in TASKS:
        part, all_of = report.tasks[task], whole.tasks[task]
        keep = np.isin(all_of.neurons, part.neurons)
        np.testing.assert_allclose(part.table["trial_r2"], all_of.table["trial_r2"][keep])
    behaviour = {"wheel": np.random.default_rng(1).random((20, 20))}
    moving = Session(session.counts, name="s", behaviour=behaviour)
    report = evaluate(plus_one, moving, trials=moving.split().val)
    assert "wheel" not in report.tasks and "test trials alone" in report.left_out["wheel"]


def test_silent_neurons_are_counted_and_not_averaged():
    counts = np.random.default_rng(0).poisson(0.6, (20, 20, 3))
    counts[:, :, 1] = 0
    report = evaluate(mean_rates(s := Session(counts, name="s")), s)
    scores = report.tasks["co-smoothing"]
    assert scores.n_silent == 1 and np.isnan(scores.table["bits_per_spike"][1])
    assert scores.mean() == pytest.approx(np.nanmean(scores.table["bits_per_spike"]))
    reason = "no scored neuron has a region label"
    assert report.left_out == {"inter-region": reason, "intra-region": reason}
    assert f"intra-region: left out, {reason}" in str(report)


def test_neurons_predicted_from_nothing_are_counted(session):
    report = evaluate(plus_one, session, tasks=list(TASKS))
    visible = {task: scores.table["visible"].tolist() for task, scores in report.tasks.items()}
    assert visible["co-smoothing"] == [6] * 7 and visible["forward-prediction"] == [7] * 7
    assert visible["inter-region"] == [4, 4, 4, 5, 5, 6]
    assert visible["intra-region"] == [2, 2, 2, 1, 1, 0]  # LP has one neuron
    assert report.to_dict()["intra-region"]["neurons_with_nothing_visible"] == 1


def test_oracle_above_model_above_null(sessions, trained):
    for session in sessions:
        predictors = {"MtM": trained, "null": mean_rates(session), "oracle": oracle(session)}
        reports = {k: evaluate(p, session, tasks=list(TASKS)) for k, p in predictors.items()}
        for task in TASKS:
            score = {k: r.tasks[task].mean("bits_per_spike_train_null") for k, r in reports.items()}
            assert score["oracle"] > score["MtM"] > score["null"], (task, score)
            assert score["null"] == pytest.approx(0, abs=1e-9)
    assert str(evaluate(trained.model, session, tasks=list(TASKS))) == str(reports["MtM"])


# ------------------------------------------------------------------- splits and seen trials


def test_a_model_is_scored_on_the_split_it_was_trained_on(sessions):
    session = sessions[0]
    model = fit(session, depth=1, epochs=1, split_seed=5, progress=False).model
    null = evaluate(mean_rates(session, 5), session, split_seed=5, tasks=["forward-prediction"])
    ours = evaluate(model, session, tasks=["forward-prediction"])
    one, two = (r.tasks["forward-prediction"].table["spikes"].tolist() for r in (null, ours))
    assert one == two
    with pytest.raises(ValueError, match="trained on the split of seed 5, not 0"):
        evaluate(model, session, split_seed=0)
    # As of an imported checkpoint, fine-tuned to another session or not: nobody knows what it saw.
    for model.split_seed, model.seen in ((5, {"another": np.ones(1)}), (None, {})):
        with pytest.raises(ValueError, match="not known which trials.*pass split_seed=0"):
            evaluate(model, session)
    tasks = ["forward-prediction", "choice"]
    assert list(evaluate(model, session, tasks=tasks, split_seed=0).tasks) == tasks


def test_training_trials_are_refused(sessions, trained):
    session = sessions[0]
    split, task = session.split(), ["forward-prediction"]
    mixed = np.concatenate([split.test, split.train[:3]])
    with pytest.raises(ValueError, match="trained on 3 of the 23 trials to be scored"):
        evaluate(trained, session, tasks=task, trials=mixed)
    assert evaluate(trained, session, tasks=task, trials=mixed, allow_seen=True).n_trials == 23
    evaluate(trained, session, tasks=task, trials=split.val)  # selected by, not trained on
    other = evaluate(trained, session, tasks=[*task, "wheel-speed"], split_seed=1, allow_seen=True)
    assert set(other.tasks) == {*task, "wheel-speed"}
    # The same recording with another name, and so another split; and with a given split: trials
    # are known by their counts.
    same = {"bin_size": session.bin_size, "window": session.window, "behaviour": session.behaviour}
    swapped = (split.test, split.val, split.train)
    renamed = Session(session.counts, session.regions, "other", **same)
    given = Session(session.counts, session.regions, session.name, given_split=swapped, **same)
    for again, tasks in ((renamed, task), (renamed, ["choice"]), (given, task)):
        with pytest.raises(ValueError, match=r"\(in session 'sim-3-0'\); score the test trials"):
            evaluate(trained, again, tasks=tasks)


# ------------------------------------------------------------------- many sessions


def test_all_six_tasks_of_many_sessions(sessions):
    predictors = {session.name: oracle(session) for session in sessions}
    whole = evaluate(predictors, sessions)
    assert list(whole.tasks) == [*TASKS, "choice", "wheel-speed", "whisker-motion-energy"]
    tasks = [*TASKS, "wheel-speed"]
    singles = {s.name: evaluate(predictors, s, tasks=tasks) for s in sessions}
    for task in tasks:
        expected = {name: report.tasks[task].mean() for name, report in singles.items()}
        assert whole.tasks[task].by_session() == expected
    assert whole.tasks["wheel-speed"].mean("time_course") < whole.tasks["wheel-speed"].mean()
    assert "2 sessions" in str(whole) and "choice from rates: accuracy" in str(whole)


def test_what_only_some_sessions_have():
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (40, 8, 3))
    with_choice = Session(counts, name="a", behaviour={"choice": rng.choice([-1, 1], 40)})
    both = [with_choice, Session(counts[:, :, :2], name="b")]
    predictors = {s.name: mean_rates(s) for s in both}
    report = evaluate(predictors, both)
    psth = report.tasks["co-smoothing"].table["psth_r2"]
    assert np.isnan(psth[3:]).all() and not np.isnan(psth[:3]).any()
    assert list(report.tasks["choice"].by_session()) == ["a"]
    reason = "no scored neuron has a region label"
    assert report.left_out["inter-region"] == f"a: {reason}; b: {reason}"
    asked = evaluate(predictors, both[::-1], tasks=["co-smoothing", "choice"])
    assert asked.left_out == {"choice": "b: not recorded"}
    assert set(asked.tasks) == {"co-smoothing", "choice"}
    with pytest.raises(ValueError, match="two sessions have the name 'a'"):
        evaluate(predictors, [with_choice, with_choice])


# ------------------------------------------------------------------- controls and errors


def test_shuffled_trials_keep_the_time_course_and_neurons_do_not(sessions):
    session = sessions[0]
    scores = evaluate(oracle(session), session, tasks=["co-smoothing"]).tasks["co-smoothing"]
    assert max(scores.mean("shuffled_neurons"), scores.mean("shuffled_trials")) < scores.mean()
    # The same prediction for every trial loses nothing when trials change places.
    course = np.log(session.rates[session.split().train].mean(axis=0, keepdims=True))
    for column, log_rates in {
        "shuffled_trials": course, "shuffled_neurons": mean_rates(session)
    }.items():  # fmt: skip
        table = evaluate(log_rates, session, tasks=["co-smoothing"]).tasks["co-smoothing"].table
        np.testing.assert_allclose(table[column], table["bits_per_spike"], atol=1e-12)


def test_errors(session):
    with pytest.raises(ValueError, match="unknown task 'cosmoothing'; pass a list of some of: co-"):
        evaluate(plus_one, session, tasks="cosmoothing")
    with pytest.raises(SessionError, match="inter-region: no scored neuron has a region label"):
        evaluate(plus_one, Session(session.counts), tasks=["inter-region"])


def test_what_a_scheme_hides_can_be_scored(session, monkeypatch):
    """One of a user's, which hides all of three neurons in the late bins."""
    monkeypatch.setattr(masks, "SCHEMES", dict(masks.SCHEMES))
    monkeypatch.setattr(evaluation, "SCHEMES", masks.SCHEMES)

    def late(counts, regions, ratio=0.5, generator=None):
        hidden = torch.zeros(counts.shape, dtype=torch.bool)
        hidden[:, 12:, :3] = True
        return masks.Mask(hidden, hidden)

    masks.register("late", late)
    scores = evaluate(plus_one, session, tasks=["late"], neurons=[0, 2, 5]).tasks["late"]
    counts = session.counts[session.split().test][:, 12:, [0, 2]]
    assert scores.neurons.tolist() == [0, 2]
    expected = metrics.bits_per_spike(np.full(counts.shape, -1.0), counts)
    np.testing.assert_allclose(scores.table["bits_per_spike"], expected, atol=1e-6)
    array = np.full(session.counts.shape, -1.0)
    same = evaluate(array, session, tasks=["late"]).tasks["late"]
    np.testing.assert_allclose(
        same.table["gain_train_null"][[0, 2]], scores.table["gain_train_null"]
    )
    twice = [evaluate(plus_one, session, tasks=["neuron"]).tasks["neuron"].table for _ in "ab"]
    assert twice[0].equals(twice[1])
    with pytest.raises(ValueError, match="unknown task 'early'"):
        evaluate(plus_one, session, tasks=["early"])
