"""Reports: means and errors against closed forms, joining, JSON, and the checks around them."""

import json

import numpy as np
import pytest
from scipy.stats import sem

from mtm import (
    Report,
    Session,
    Sessions,
    evaluate,
    fit,
    hub,
    mean_rates,
    metrics,
    oracle,
    score_table,
)
from mtm.prediction import predict_held_out
from mtm.report import Mean, TaskScores, mean_of
from mtm.prediction import TASKS


def table(session, seed, scores, regions, spikes=None):
    scores, n = np.asarray(scores, float), len(scores)
    spikes = np.where(np.isnan(scores), 0, 1) if spikes is None else np.asarray(spikes)
    return {
        "session": np.full(n, session), "seed": np.full(n, seed), "neuron": np.arange(n),
        "region": np.array(regions), "bits_per_spike": scores, "spikes": spikes,
        "bits_per_spike_train_null": scores, "visible": np.ones(n, int),
        "gain": np.nan_to_num(scores) * spikes, "gain_train_null": np.nan_to_num(scores) * spikes,
        "shuffled_trials": scores, "shuffled_neurons": scores,
    }  # fmt: skip


def report(session, scores, regions, **more):
    sizes = {session: {"trials": 4, "neurons": len(scores) + 1, "wanted": len(scores)}}
    return Report({"co-smoothing": TaskScores(table(session, 0, scores, regions, **more))}, sizes)


@pytest.fixture
def joined():
    """Two seeds of session a, whose last neuron is silent, and two of b."""
    a = [report("a", x, ["CA1", "CA1", "DG"]) for x in ([1.0, 3.0, np.nan], [2.0, 6.0, np.nan])]
    b = [report("b", x, ["DG", "DG"]) for x in ([0.0, 1.0], [0.0, 3.0])]
    return Report.join([*a, *b])


def test_mean_of_leaves_nan_out():
    assert mean_of([1.0, np.nan, 4.0]) == Mean(2.5, pytest.approx(sem([1, 4])), 2)
    assert mean_of([2.0])[::2] == (2.0, 1) and np.isnan(mean_of([2.0]).error)
    assert np.isnan(mean_of([np.nan]).value) and str(mean_of([])) == "-"
    assert str(mean_of([1.0, 2.0])) == "1.500 ± 0.500" and str(mean_of([1.0])) == "1.000"


def test_means_are_over_neurons_then_seeds_then_sessions(joined):
    scores = joined.tasks["co-smoothing"]
    assert scores.by_session() == {"a": 3.0, "b": 1.0}  # (2 + 4) / 2 and (0.5 + 1.5) / 2
    assert scores.mean() == 2.0
    assert scores.table["seed"].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    np.testing.assert_array_equal(scores.by_neuron("a"), [1.5, 4.5, np.nan])
    over = {what: scores.over(what) for what in ("neurons", "sessions", "seeds")}
    assert over["sessions"] == Mean(2.0, pytest.approx(sem([3, 1])), 2)
    assert over["seeds"] == Mean(2.0, pytest.approx(sem([1.25, 2.75])), 2)
    of_neurons = np.hypot(sem([1.5, 4.5]), sem([0, 2])) / 2
    assert over["neurons"] == Mean(2.0, pytest.approx(of_neurons), 4)
    with pytest.raises(ValueError, match="over must be 'neurons', 'sessions' or 'seeds'"):
        scores.over("trials")


def test_regions_and_pooling_and_counts(joined):
    scores = joined.tasks["co-smoothing"]
    regions = scores.by_region()
    assert regions["CA1"] == mean_of([1.5, 4.5]) and regions["DG"] == mean_of([0, 2])
    assert scores.neurons.tolist() == [0, 1, 2, 0, 1]  # each once, whatever the seeds
    assert scores.regions.tolist() == ["CA1", "CA1", "DG", "DG", "DG"]
    assert scores.session_of.tolist() == ["a", "a", "a", "b", "b"]
    one = report("a", [1.0, 3.0, np.nan], ["", "", ""], spikes=[3, 1, 0]).tasks["co-smoothing"]
    assert one.mean(pooled=True) == (1 * 3 + 3 * 1) / 4 and one.mean() == 2 and one.n_silent == 1
    assert joined.n_dropped("co-smoothing") == 2  # one of each session
    summary = joined.to_dict()["co-smoothing"]
    assert (summary["neurons"], summary["silent_neurons"], summary["dropped_neurons"]) == (5, 1, 2)
    assert summary["errors"]["sessions"]["bits_per_spike"] == 1.0
    assert summary["errors"]["seeds"]["bits_per_spike_train_null"] == 0.75
    assert summary["regions"]["DG"] == [1.0, 1.0, 2]
    text = str(joined)
    assert text.count("± over sessions") == 2 and "neurons                              5" in text


def test_what_has_no_score_is_nan_and_what_cannot_be_asked_is_refused():
    nothing = report("a", [np.nan, np.nan], ["DG", "DG"]).tasks["co-smoothing"]
    for what in ("neurons", "sessions", "seeds"):
        assert np.isnan(nothing.over(what)[:2]).all() and nothing.over(what).n == 0
    assert np.isnan(nothing.mean(pooled=True)) and np.isnan(nothing.by_session()["a"])
    with_silent = Report.join([report("a", [np.nan], ["DG"]), report("b", [1.0, 2.0], ["", ""])])
    scores = with_silent.tasks["co-smoothing"]
    assert [scores.over(what).value for what in ("neurons", "sessions", "seeds")] == [1.5] * 3
    with pytest.raises(ValueError, match="only bits per spike can be pooled"):
        scores.mean("shuffled_trials", pooled=True)
    with pytest.raises(ValueError, match="no error over neurons"):
        scores.over("neurons", pooled=True)
    zero = report("b", [0.0, 0.0], ["", ""])
    assert np.isnan(zero.share(zero)["co-smoothing"])
    with pytest.raises(ValueError, match="same sessions, got a, b and b"):
        with_silent.share(zero)
    with pytest.raises(ValueError, match="no task has a column 'r2'; there are: session"):
        score_table({"x": zero}, "r2")


def test_seeds_are_paired_by_their_number():
    first, again = report("a", [0.0, 2.0], ["", ""]), report("a", [5.0, 7.0], ["", ""])
    both = Report.join([report("a", [1.0, 3.0], ["", ""]), report("b", [10.0, 20.0], ["", ""])])
    joined = Report.join([first, again, both])  # a has seeds 0, 1, 2; b, from the third, 2
    scores = joined.tasks["co-smoothing"]
    assert scores.by_session() == {"a": 3.0, "b": 15.0}
    assert scores.over("seeds") == Mean(8.5, pytest.approx(np.nan, nan_ok=True), 1)


def test_only_runs_of_the_same_trials_and_neurons_are_seeds():
    with pytest.raises(ValueError, match="session 'a': these reports scored other neurons"):
        Report.join([report("a", [1.0, 2.0], ["", ""]), report("a", [1.0], [""])])
    other = report("a", [1.0, 2.0], ["", ""], spikes=[4, 5])
    with pytest.raises(ValueError, match="or other trials"):
        Report.join([report("a", [1.0, 2.0], ["", ""]), other])


def test_pooled_equals_the_metric_silent_neurons_included():
    counts = np.random.default_rng(0).poisson(0.5, (20, 10, 4))
    session = Session(counts, name="s")
    test = session.split().test
    counts[test, :, 2] = 0
    session = Session(counts, name="s")
    log_rates = np.random.default_rng(1).normal(-1, 0.3, counts.shape)
    scores = evaluate(log_rates, session, tasks=["co-smoothing"]).tasks["co-smoothing"]
    null = metrics.log_mean(counts[session.split().train])
    for column, against in (("bits_per_spike", None), ("bits_per_spike_train_null", null)):
        expected = metrics.pooled_bits_per_spike(log_rates[test], counts[test], against)
        assert scores.mean(column, pooled=True) == pytest.approx(expected, rel=1e-9)


def test_json_holds_everything_and_comes_back(joined, tmp_path, sessions):
    text = joined.to_json(tmp_path / "new" / "report.json")
    assert json.loads(text)["summary"] == joined.to_dict()
    again = Report.from_json(tmp_path / "new" / "report.json")
    assert str(again) == str(joined) == str(Report.from_json(text))
    real = evaluate(oracle(sessions[0]), sessions[0], tasks=["co-smoothing", "wheel-speed"])
    real.to_json(tmp_path / "report.json")
    again = Report.from_json(tmp_path / "report.json")
    assert str(again) == str(real) and list(again.tasks) == list(real.tasks)
    for task, scores in real.tasks.items():
        for column, values in scores.table.items():
            np.testing.assert_array_equal(
                np.round(again.tasks[task].table[column], 6) if values.dtype == float else values,
                np.round(values, 6) if values.dtype == float else values,
            )


def test_all_six_tasks_of_many_sessions(sessions, tmp_path):
    for session in sessions:
        session.save(tmp_path / f"{session.name}.npz")
    predictors = {session.name: oracle(session) for session in sessions}
    whole = evaluate(predictors, sessions)
    assert list(whole.tasks) == [*TASKS, "choice", "wheel-speed", "whisker-motion-energy"]
    tasks = [*TASKS, "wheel-speed"]
    singles = [evaluate(predictors[s.name], s, tasks=tasks) for s in sessions]
    for task, scores in [(task, whole.tasks[task]) for task in tasks]:
        assert scores.by_session() == {s.name: r.tasks[task].mean()
                                       for s, r in zip(sessions, singles, strict=True)}  # fmt: skip
    assert whole.tasks["choice"].score == "accuracy"
    assert whole.tasks["wheel-speed"].mean("time_course") < whole.tasks["wheel-speed"].mean()
    text = str(whole)
    assert "2 sessions" in text and "± over sessions" in text and "choice: accuracy" in text
    on_disk = evaluate(predictors, Sessions(tmp_path), tasks=["co-smoothing"])
    assert on_disk.tasks["co-smoothing"].mean() == whole.tasks["co-smoothing"].mean()
    with pytest.raises(ValueError, match="no predictor for session 'sim-3-1'; there are: sim-3-0"):
        evaluate({"sim-3-0": predictors["sim-3-0"]}, sessions, tasks=["co-smoothing"])


def test_what_only_some_sessions_have_is_nan_elsewhere():
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (40, 8, 3))
    with_choice = Session(counts, name="a", behaviour={"choice": rng.choice([-1, 1], 40)})
    without = Session(counts[:, :, :2], name="b")
    both = evaluate({s.name: mean_rates(s) for s in (with_choice, without)}, [with_choice, without])
    psth = both.tasks["co-smoothing"].table["psth_r2"]
    assert np.isnan(psth[3:]).all() and not np.isnan(psth[:3]).any()
    assert both.tasks["choice"].sessions == ["a"]
    reason = "no scored neuron has a region label"
    assert both.left_out["inter-region"] == f"a: {reason}; b: {reason}"
    tasks = ["co-smoothing", "choice"]
    some = {s.name: mean_rates(s) for s in (with_choice, without)}
    asked = evaluate(some, [with_choice, without], tasks=tasks)
    assert asked.left_out == {"choice": "b: not recorded"} and list(asked.tasks) == tasks
    with pytest.raises(ValueError, match="unknown task 'choise'"):
        evaluate(some, [with_choice, without], tasks=["choise"])
    for sessions in ([], [with_choice, with_choice]):
        with pytest.raises(ValueError, match="one or more, with different names"):
            evaluate(some, sessions)
    with pytest.raises(ValueError, match="trials and neurons are of one session"):
        evaluate(some, [with_choice, without], neurons=[2])


# --------------------------------------------------------------------------------- controls


def test_shuffled_trials_keep_the_time_course_and_neurons_do_not(sessions):
    session = sessions[0]
    scores = evaluate(oracle(session), session, tasks=["co-smoothing"]).tasks["co-smoothing"]
    mean, trials, neurons = (
        scores.mean(c) for c in ("bits_per_spike", "shuffled_trials", "shuffled_neurons")
    )
    assert neurons < trials < mean
    # a predictor that gives every trial the same loses nothing when trials change places
    course = np.log(session.rates[session.split().train].mean(axis=0, keepdims=True))
    scores = evaluate(course, session, tasks=["co-smoothing"]).tasks["co-smoothing"]
    np.testing.assert_allclose(
        scores.table["shuffled_trials"], scores.table["bits_per_spike"], atol=1e-12
    )
    flat = evaluate(mean_rates(session), session, tasks=["co-smoothing"]).tasks["co-smoothing"]
    np.testing.assert_allclose(
        flat.table["shuffled_neurons"], flat.table["bits_per_spike"], atol=1e-12
    )


def test_shuffling_against_every_other_trial():
    """With two trials, the other one's prediction; with one neuron, there is no other."""
    rng = np.random.default_rng(0)
    session = Session(rng.poisson(1.0, (12, 6, 1)), name="s")
    log_rates = rng.normal(0, 0.5, (12, 6, 1))
    report = evaluate(log_rates, session, tasks=["co-smoothing"], trials=[3, 8])
    table = report.tasks["co-smoothing"].table
    swapped = metrics.bits_per_spike(log_rates[[8, 3]], session.counts[[3, 8]])
    np.testing.assert_allclose(table["shuffled_trials"], swapped)
    assert np.isnan(table["shuffled_neurons"]).all()


def test_share_of_the_oracle(sessions, trained):
    session = sessions[0]
    best, ours, null = (
        evaluate(p, session, tasks=list(TASKS))
        for p in (oracle(session), trained, mean_rates(session))
    )
    shares = ours.share(best)
    for task in TASKS:
        column = "bits_per_spike_train_null"
        assert 0 < shares[task] < 1
        assert shares[task] == ours.tasks[task].mean(column) / best.tasks[task].mean(column)
    assert null.share(best) == pytest.approx(dict.fromkeys(TASKS, 0.0), abs=1e-9)


def test_trials_that_were_learned_from_are_refused(sessions, trained, tmp_path):
    session = sessions[0]
    split = session.split()
    task = ["forward-prediction"]
    mixed = np.concatenate([split.test, split.train[:3]])
    with pytest.raises(ValueError, match="trained on 3 of the 27 trials to be scored"):
        evaluate(trained, session, tasks=task, trials=mixed)
    assert evaluate(trained, session, tasks=task, trials=mixed, allow_seen=True).n_trials == 27
    evaluate(trained, session, tasks=task, trials=split.val)  # selected by, not learned from
    other = evaluate(trained, session, tasks=[*task, "wheel-speed"], split_seed=1, allow_seen=True)
    assert set(other.tasks) == {*task, "wheel-speed"}
    with pytest.raises(ValueError, match="trained on the split of seed 0, not 1"):
        evaluate(trained, session, split_seed=1)
    loaded = hub.load(hub.save(trained, tmp_path / "model"))
    assert {k: v.tolist() for k, v in loaded.seen.items()} == {
        k: v.tolist() for k, v in trained.model.seen.items()
    }
    # The same recording under another name, and so with another split; and with a split that was
    # given: the trials are known by what is in them.
    same = {"bin_size": session.bin_size, "window": session.window}
    renamed = Session(session.counts, session.regions, "other", behaviour=session.behaviour, **same)
    loaded.add_session("other", session.n_neurons)
    swapped = (split.test, split.val, split.train)
    given = Session(session.counts, session.regions, session.name, given_split=swapped, **same)
    for again in (renamed, given):
        with pytest.raises(ValueError, match=r"\(in session 'sim-3-0'\); score the test trials"):
            evaluate(loaded, again, split_seed=0, tasks=task)
    with pytest.raises(ValueError, match="predictor was trained on"):
        evaluate(loaded, renamed, split_seed=0, tasks=["choice"])


def test_going_on_with_a_model_remembers_what_it_saw(sessions):
    first, second = (s.select(neurons=np.arange(4)) for s in sessions)
    options = {"depth": 1, "epochs": 1, "progress": False, "schemes": ["neuron"]}
    model = fit(first, **options).model
    seen = set(model.seen[first.name].tolist())
    assert seen == {x for x in first.fingerprints(first.split().train).tolist() if x}
    model = fit(second, model, epochs=1, progress=False, schemes=["neuron"]).model
    assert set(model.seen) == {first.name, second.name} and set(model.seen[first.name]) == seen


def test_fingerprints_tell_trials_apart_whatever_the_type_of_counts():
    counts = np.random.default_rng(0).poisson(1.0, (6, 5, 8))
    counts[3] = counts[1]
    counts[4] = 0
    prints = Session(counts, name="a").fingerprints(np.arange(6))
    assert prints[1] == prints[3] and prints[4] == 0 and len(set(prints.tolist())) == 5
    wide = counts.copy()
    wide[0, 0, 0] = 300
    assert Session(wide, name="b").fingerprints(np.arange(1, 6)).tolist() == prints[1:].tolist()


def test_predicting_defaults_to_the_test_trials(sessions):
    session = sessions[0]
    found = predict_held_out(oracle(session), session, "co-smoothing")
    np.testing.assert_allclose(found, oracle(session)[session.split().test])
