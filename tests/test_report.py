"""Reports: means and errors against closed forms, joining, tables and JSON."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import sem

from mtm import Report, Session, evaluate, metrics, oracle, score_table
from mtm.report import Mean, TaskScores, mean_of


def report(session, scores, regions, spikes=None, **columns):
    """A report of one task, whose scored neurons are all but one of the session's."""
    scores, n = np.asarray(scores, float), len(scores)
    spikes = np.where(np.isnan(scores), 0, 1) if spikes is None else np.asarray(spikes)
    gain = np.nan_to_num(scores) * spikes
    table = {
        "session": session, "seed": 0, "neuron": np.arange(n), "region": regions,
        "bits_per_spike": scores, "bits_per_spike_train_null": scores,
        "shuffled_trials": scores, "shuffled_neurons": scores,
        "gain": gain, "gain_train_null": gain, "spikes": spikes, "visible": 1, **columns,
    }  # fmt: skip
    sizes = {session: {"trials": 4, "neurons": n + 1}}
    return Report({"co-smoothing": TaskScores(pd.DataFrame(table))}, sizes)


def of_choice(session, accuracy):
    row = {
        "session": session,
        "seed": 0,
        "features": "rates",
        "accuracy": accuracy,
        "majority": 0.5,
    }
    scores = TaskScores(pd.DataFrame([row]), "accuracy")
    return Report({"choice": scores}, {session: {"trials": 4, "neurons": 3}})


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


def test_regions_and_pooling_and_counts(joined):
    scores = joined.tasks["co-smoothing"]
    regions = scores.by_region()
    assert regions["CA1"] == mean_of([1.5, 4.5]) and regions["DG"] == mean_of([0, 2])
    assert scores.neurons.tolist() == [0, 1, 2, 0, 1]  # each once, whatever the seeds
    one = report("a", [1.0, 3.0, np.nan], ["", "", ""], spikes=[3, 1, 0]).tasks["co-smoothing"]
    assert one.by_region() == {}  # no label, no region
    assert one.mean(pooled=True) == (1 * 3 + 3 * 1) / 4 and one.mean() == 2 and one.n_silent == 1
    summary = joined.to_dict()["co-smoothing"]
    assert [summary[k] for k in ("neurons", "silent_neurons", "dropped_neurons")] == [5, 1, 2]
    assert summary["errors"]["sessions"]["bits_per_spike"] == 1.0
    assert summary["errors"]["seeds"]["bits_per_spike_train_null"] == 0.75
    assert summary["regions"]["DG"] == [1.0, 1.0, 2]


def test_what_has_no_score_is_nan():
    nothing = report("a", [np.nan, np.nan], ["DG", "DG"]).tasks["co-smoothing"]
    for what in ("neurons", "sessions", "seeds"):
        assert np.isnan(nothing.over(what)[:2]).all() and nothing.over(what).n == 0
    assert np.isnan(nothing.mean(pooled=True)) and np.isnan(nothing.by_session()["a"])
    with_silent = Report.join([report("a", [np.nan], ["DG"]), report("b", [1.0, 2.0], ["", ""])])
    scores = with_silent.tasks["co-smoothing"]
    assert [scores.over(what).value for what in ("neurons", "sessions", "seeds")] == [1.5] * 3


def test_seeds_are_paired_by_their_number():
    a = [report("a", [x, x + 2], ["", ""]) for x in (0.0, 5.0, 1.0)]
    joined = Report.join([*a[:2], Report.join([a[2], report("b", [10.0, 20.0], ["", ""])])])
    scores = joined.tasks["co-smoothing"]  # a has seeds 0, 1, 2; b, from the third, 2
    assert scores.by_session() == {"a": 3.0, "b": 15.0}
    assert scores.over("seeds")[::2] == (8.5, 1)


def test_only_runs_of_the_same_trials_and_neurons_are_seeds():
    one = report("a", [1.0, 2.0], ["", ""])
    with pytest.raises(ValueError, match="session 'a': these reports scored other neurons"):
        Report.join([one, report("a", [1.0], [""])])
    with pytest.raises(ValueError, match="or other trials"):
        Report.join([one, report("a", [1.0, 2.0], ["", ""], spikes=[4, 5])])
    with pytest.warns(
        UserWarning, match="co-smoothing: 'b' and 'a' were scored on other neurons, tr"
    ):
        score_table({"a": one, "b": report("a", [1.0], [""])})
    choices = of_choice("a", 0.75), of_choice("a", 0.5)
    reasons = [Report({}, {}, {"choice": f"{name}: not recorded"}) for name in ("11", "1", "11")]
    assert Report.join(reasons).left_out == {"choice": "11: not recorded; 1: not recorded"}
    assert Report.join(choices).means() == {"choice": 0.625}
    choices[1].tasks["choice"].table["majority"] = 0.500001  # as a file rounds it
    assert Report.join(choices).means() == {"choice": 0.625}
    choices[1].tasks["choice"].table["majority"] = 0.6  # of the test trials of another split
    with pytest.raises(ValueError, match="or other trials"):
        Report.join(choices)


def test_a_column_that_one_report_lacks():
    """As psth_r2, of sessions without conditions."""
    with_it = report("a", [1.0, 2.0], ["", ""], psth_r2=[0.25, 0.75])
    without = report("a", [2.0, 4.0], ["", ""])
    lines = score_table({"one": with_it, "other": without}, "psth_r2").splitlines()
    assert [line.split()[-1] for line in lines] == ["co-smoothing", "0.500", "-"]
    assert with_it.means("psth_r2") == {"co-smoothing": 0.5} and without.means("psth_r2") == {}
    own = score_table({"one": with_it, "two": of_choice("a", 0.75)}).splitlines()
    assert [line.split() for line in own] == [
        ["co-smoothing", "choice"], ["one", "1.500", "-"], ["two", "-", "0.750"]
    ]  # fmt: skip


def test_pooled_equals_the_metric_silent_neurons_included():
    counts = np.random.default_rng(0).poisson(0.5, (20, 10, 4))
    split = Session(counts, name="s").split()
    counts[split.test, :, 2] = 0
    log_rates = np.random.default_rng(1).normal(-1, 0.3, counts.shape)
    session = Session(counts, name="s")
    scores = evaluate(log_rates, session, tasks=["co-smoothing"]).tasks["co-smoothing"]
    null = metrics.log_mean(counts[split.train])
    for column, against in (("bits_per_spike", None), ("bits_per_spike_train_null", null)):
        expected = metrics.pooled_bits_per_spike(log_rates[split.test], counts[split.test], against)
        assert scores.mean(column, pooled=True) == pytest.approx(expected, rel=1e-9)


def test_json_and_one_table_hold_everything(joined, tmp_path, sessions):
    path = tmp_path / "new" / "report.json"
    joined.to_json(path)
    assert json.loads(path.read_text())["summary"] == joined.to_dict()
    assert str(Report.from_json(path)) == str(joined)
    real = evaluate(oracle(sessions[0]), sessions[0], tasks=["co-smoothing", "wheel-speed"])
    real.to_json(path)
    again, frame = Report.from_json(path), real.to_frame()
    assert str(again) == str(real) and list(again.tasks) == list(real.tasks)
    assert frame["task"].tolist() == ["co-smoothing"] * 24 + ["wheel-speed"]
    for task, scores in real.tasks.items():
        for other in (again.tasks[task].table, frame[frame["task"] == task][[*scores.table]]):
            pd.testing.assert_frame_equal(
                other.reset_index(drop=True), scores.table, atol=1e-6, check_dtype=False
            )
