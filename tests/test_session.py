"""Sessions: checks, splits, selection, spike times, and files that return what was saved."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtm.inputs import SessionError
from mtm.session import Session, Split

ARRAYS = ("counts", "rates", "regions", "trial_ids")


class Named(np.ndarray):
    """An array of ones whose axes have names, as xarray's."""

    def __new__(cls, *dims):
        array = np.ones((20, 5, 4)).view(cls)
        array.dims = dims
        return array


def make(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "counts": rng.poisson(1.0, (20, 5, 4)),
        "regions": ["CA1", "root", "DG", "CA1"],
        "name": "mouse 1",
        "subject": "M1",
        "window": (-0.04, 0.06),
        "behaviour": {"choice": np.arange(20) % 2 * 2 - 1, "wheel": rng.random((20, 5))},
        "neurons": {"depth": np.arange(4.0), "uuid": np.array(list("abcd"), dtype=object)},
        "provenance": {"lab": "here", "numbers": [1, 2]},
    }
    return Session(**{**fields, **changes})


def test_attributes_and_description():
    session = make()
    assert (session.n_trials, session.n_bins, session.n_neurons) == (20, 5, 4)
    assert session.counts.dtype == np.uint8
    assert session.region_names == ["CA1", "DG"]
    assert session.region_codes.tolist() == [0, -1, 1, 0]
    np.testing.assert_allclose(session.times, [-0.04, -0.02, 0.0, 0.02, 0.04], atol=1e-12)
    np.testing.assert_allclose(session.firing_rates, session.counts.mean((0, 1)) / 0.02)
    parts = ["'mouse 1'", "M1", "20 trials x 5 bins x 4 neurons", "CA1 2"]
    for part in [*parts, "per trial: choice", "per bin: wheel"]:
        assert part in repr(session)
    assert make(counts=np.full((20, 5, 4), 300)).counts.dtype == np.uint16
    assert make(regions=None).region_names == []
    assert make(regions=pd.Series(list("abca"))).region_names == ["a", "b", "c"]
    masked = np.ma.array(["CA1", "DG", "DG", "LP"], mask=[0, 1, 0, 0])
    assert make(regions=masked).regions.tolist() == ["CA1", "", "DG", "LP"]
    assert make(regions=[b"CA1", "DG", "", None]).regions.tolist() == ["CA1", "DG", "", ""]


def test_axes_with_names_must_be_in_order():
    assert Session(Named("trial", "time_bin", "Units")).n_bins == 5
    with pytest.raises(
        SessionError, match="counts: the axes are .*; transpose to trials, time bin"
    ):
        Session(Named("unit", "trial", "time"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.zeros((3, 4))}, "counts: need trials x bins x neurons, got shape"),
        ({"counts": np.full((20, 5, 4), -1)}, "counts: must be 0 to 65535, got -1"),
        ({"counts": np.full((20, 5, 4), 0.5)}, "counts: not whole numbers"),
        ({"counts": np.ones((4, 20, 5))}, "regions: need .* are trials x bins x"),  # transposed
        (
            {"counts": np.ones((20, 4, 5)), "regions": None, "behaviour": None, "neurons": None},
            "window: .* but 4 bins last 0.08 s; counts are trials x bins x neurons",
        ),
        ({"counts": np.ma.array(np.ones((20, 5, 4)), mask=1)}, "counts: .* got nan"),
        ({"regions": pd.Series(list("abcd"), index=[3, 5, 8, 9])}, "regions: a Series with index"),
        ({"neurons": {"x": pd.Series(range(4)).iloc[::-1]}}, r"neurons 'x': .* \[3, 2, 1\]"),
        ({"window": (0.0, 1.0)}, "window: .0.0, 1.0. s, but 5 bins last 0.1 s"),
        ({"behaviour": {"wheel": np.zeros((20, 4))}}, "behaviour 'wheel': .* or .20, 5.*20, 4"),
        ({"neurons": {"depth": np.zeros(3)}}, "neurons 'depth': need shape .4,., got .3,."),
        ({"given_split": ([0], [1], [1])}, "given_split: a trial is there twice; keep parts apart"),
        ({"trial_ids": range(1, 21)}, "trial_ids: need numbers from 0 to n_recorded - 1, 19"),
    ],
)
def test_errors_name_the_session_and_the_field(changes, message):
    with pytest.raises(SessionError, match=f"session 'mouse 1', {message}"):
        make(**changes)


def test_rates_are_told_from_counts():
    counts = np.random.default_rng(0).poisson(0.3, (20, 20, 4))
    with pytest.warns(UserWarning, match="session 's', counts: all are multiples of 50, as rates"):
        Session(counts / 0.02, name="s")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (counts.astype(float), np.zeros((10, 5, 4)), 50.0 * (counts[:3, :2] > 0)):
            Session(fine, name="s")


@given(st.integers(3, 400), st.integers(0, 5))
def test_splits_hold_every_trial_once(n_trials, seed):
    split = Session(np.zeros((n_trials, 1, 1)), name=f"s{n_trials}").split(seed)
    assert sorted(np.concatenate(split).tolist()) == list(range(n_trials))
    assert min(map(len, split)) >= 1
    if n_trials >= 20:
        assert abs(len(split.train) / n_trials - 0.7) < 0.05
    for part in split:
        assert (np.diff(part) > 0).all()


def test_splits_depend_on_name_and_seed_alone():
    one, same = make(), make(counts=np.ones((20, 5, 4)))
    assert all(map(np.array_equal, one.split(), same.split()))
    for other in (make(name="mouse 2").split(), one.split(1)):
        assert not np.array_equal(one.split().test, other.test)
    # A split must never change between versions, or test trials leak into training.
    assert one.split().test.tolist() == [8, 10, 11, 13]


def test_a_given_split_is_kept_and_follows_a_selection():
    session = make(given_split=Split([0, 1, 2, 5], [3, 6], [4, 7]))
    assert session.split(3).val.tolist() == [3, 6]
    part = session.select(trials=np.array([1, 3, 4, 5]))
    assert [p.tolist() for p in part.split()] == [[0, 3], [1], [2]]
    flags = np.arange(20) < 14, np.arange(20) == 14, np.arange(20) > 14
    assert make(given_split=flags).split().test.tolist() == [15, 16, 17, 18, 19]
    with pytest.raises(SessionError, match="split: none of its 2 trials is in val"):
        session.select(trials=[0, 4]).split()


@given(st.data())
def test_a_selection_keeps_every_trial_in_its_part(data):
    session = Session(np.zeros((60, 1, 1)), name=data.draw(st.text(min_size=1)))
    trials = data.draw(st.permutations(range(60)))[: data.draw(st.integers(56, 60))]
    part = session.select(trials=np.array(trials))
    again = part.select(trials=np.arange(part.n_trials)[::-1])
    for selection in (part, again):
        for whole, found in zip(session.split(3), selection.split(3), strict=True):
            assert set(selection.trial_ids[found].tolist()) == set(whole.tolist()) & set(trials)


def test_select_cuts_every_field():
    session = make(rates=np.random.default_rng(0).random((20, 5, 4)) + 0.1)
    part = session.select(trials=np.array([3, 1]), neurons=session.regions == "CA1")
    for field in ("counts", "rates"):
        whole, found = getattr(session, field), getattr(part, field)
        np.testing.assert_array_equal(found, whole[[3, 1]][:, :, [0, 3]])
    np.testing.assert_array_equal(part.behaviour["wheel"], session.behaviour["wheel"][[3, 1]])
    assert part.neurons["uuid"].tolist() == ["a", "d"] and part.regions.tolist() == ["CA1", "CA1"]
    for field in ("name", "subject", "window", "provenance"):
        assert getattr(part, field) == getattr(session, field)


def test_fingerprints_tell_trials_apart():
    session = Session(np.random.default_rng(0).poisson(1.0, (20, 5, 4)), name="a")
    marks = session.fingerprints(np.arange(20))
    assert len(np.unique(marks)) == 20 and 0 not in marks
    other = Session(session.counts[[7, 3]].astype(np.uint16), name="b")  # whatever name and dtype
    np.testing.assert_array_equal(other.fingerprints(np.arange(2)), marks[[7, 3]])
    assert Session(np.ones((1, 3, 3))).fingerprints(np.arange(1)) == [0]  # too few spikes
    # Trained models keep the fingerprints of their training trials.
    assert marks[0] == -6051953351631025376


def test_a_file_returns_the_session(tmp_path):
    session = make(
        rates=np.random.default_rng(0).random((20, 5, 4)) + 0.1,
        given_split=Split(np.arange(14), [14, 15], np.arange(16, 20)),
        behaviour={"a/b": np.arange(20.0), "with space": np.zeros((20, 5))},
    ).select(trials=np.arange(19, -1, -1))
    path = session.save(tmp_path / "deep" / "x.npz")
    for again in (Session.load(path), Session.load(path, mmap=True)):
        assert repr(again) == repr(session) and again.provenance == session.provenance
        pairs = [(getattr(again, key), getattr(session, key)) for key in ARRAYS]
        pairs += zip(again.split(), session.split(), strict=True)
        pairs += [(again.behaviour[k], v) for k, v in session.behaviour.items()]
        pairs += [(again.neurons[k], v) for k, v in session.neurons.items()]
        for a, b in pairs:
            assert a.dtype == b.dtype and a.dtype.kind != "O"
            np.testing.assert_array_equal(a, b)


def test_words_booleans_and_missing_values_are_kept(tmp_path):
    number = [1, None] * 10
    given = {
        "cue": ["go left", None, "", b"right"] * 5,
        "correct": np.arange(20) % 2 == 0,
        "delay": pd.array(number, dtype="Int64"),
        "block": pd.Categorical(["a", "b"] * 10),
        "mixed": np.array(number, dtype=object),
    }
    s = Session.load(make(behaviour=given).save(tmp_path / "s.npz")).select(trials=np.arange(4))
    assert s.behaviour["cue"].tolist() == ["go left", "", "", "right"]
    assert s.behaviour["correct"].tolist() == [True, False, True, False]
    assert s.behaviour["block"].tolist() == ["a", "b", "a", "b"]
    for key in ("delay", "mixed"):
        np.testing.assert_array_equal(s.behaviour[key], [1, np.nan, 1, np.nan])


def test_damaged_and_other_files_are_refused(tmp_path):
    whole = make().save(tmp_path / "good.npz").read_bytes()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", description=np.array([{"a": 1}], dtype=object))
    files = [(tmp_path / f"{name}.npz").read_bytes() for name in ("other", "pickle")]
    for content in [*files, *(whole[:n] for n in range(0, len(whole), len(whole) // 20)), b"hello"]:
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(SessionError, match=r"bad\.npz"):
            Session.load(tmp_path / "bad.npz")


def test_from_spike_times_counts_by_loop():
    rng = np.random.default_rng(1)
    times, clusters = rng.uniform(0, 50, 5000), rng.choice([3, 10, 7], 5000)
    events = np.arange(2.0, 48.0, 3.0)
    session = Session.from_spike_times(
        times,
        clusters,
        events,
        clusters=[10, 3, 5, 7],  # 5 never fires, and keeps its place
        regions={10: "CA1", 7: "DG"},
        window=(-0.1, 0.2),
        bin_size=0.05,
        traces={"wheel": (np.arange(0, 50, 0.01), np.arange(0, 50, 0.01))},
        behaviour={"choice": np.ones(16)},
        neurons=None,
    )
    assert session.counts.shape == (16, 6, 4)
    for (k, t, n), count in np.ndenumerate(session.counts):
        start = events[k] - 0.1 + 0.05 * t
        inside = (times >= start) & (times < start + 0.05) & (clusters == [10, 3, 5, 7][n])
        assert count == inside.sum()
    assert session.regions.tolist() == ["CA1", "", "", "DG"]
    assert session.neurons["cluster"].tolist() == [10, 3, 5, 7]
    middle = events[:, None] - 0.1 + 0.05 * (np.arange(6) + 0.5)
    np.testing.assert_allclose(session.behaviour["wheel"], middle, rtol=1e-6)


LABELS = pd.Series(["CA1", "", "DG", "LP"], index=[10, 3, 5, 7])


@pytest.mark.parametrize("labels", [LABELS, LABELS.to_dict(), LABELS.iloc[[2, 0, 3, 1]]], ids=type)
@pytest.mark.parametrize("clusters", [[3, 5, 7, 10], pd.Series([10, 7, 3, 5], index=[4, 1, 2, 0])])
def test_columns_with_ids_are_taken_by_id(labels, clusters):
    rng = np.random.default_rng(0)
    times, ids = rng.uniform(0, 60, 3000), rng.choice([3, 5, 7, 10], 3000)
    events = pd.Series(np.arange(2.0, 58.0, 4.0), index=np.arange(14) * 2 + 1)
    depth = pd.Series({10: 1.0, 3: 2.0, 5: 3.0, 7: 4.0, 11: 5.0})  # more than are used
    table = pd.DataFrame({"depth": depth})
    session = Session.from_spike_times(
        times, ids, events, clusters=clusters, regions=labels, neurons=table,
        behaviour={"number": pd.Series(events.index[::-1], index=events.index[::-1])},
    )  # fmt: skip
    found = session.neurons["cluster"].tolist()
    assert found == list(clusters)
    assert session.regions.tolist() == [LABELS[i] for i in found]
    assert session.neurons["depth"].tolist() == [depth[i] for i in found]
    assert session.behaviour["number"].tolist() == events.index.tolist()
    rows = clusters if isinstance(clusters, pd.Series) else pd.Series(clusters)
    same_table = rows.map(LABELS)  # labels that follow the rows of clusters, whatever the index
    again = Session.from_spike_times(times, ids, events, clusters=clusters, regions=same_table)
    assert again.regions.tolist() == session.regions.tolist()


def test_spike_trains_and_labels_with_an_index_of_ids():
    times, ids = np.arange(0, 60, 0.01), np.resize([3, 7, 10], 6000)  # 5 is silent
    events = np.arange(2.0, 58.0, 4.0)
    session = Session.from_spike_times(times, ids, events, regions=LABELS)
    assert session.neurons["cluster"].tolist() == [10, 3, 5, 7]
    assert session.regions.tolist() == ["CA1", "", "DG", "LP"] and not session.counts[..., 2].any()
    trains = {i: times[ids == i] for i in (7, 5, 3, 10)}
    for named in (trains, pd.Series(trains)):
        made = Session.from_spike_trains(named, events, regions=LABELS)
        np.testing.assert_array_equal(made.counts, session.counts[..., [3, 2, 1, 0]])
        assert made.regions.tolist() == ["LP", "DG", "", "CA1"]
    listed = Session.from_spike_trains([*trains.values()], events, regions=made.regions)
    assert repr(listed) == repr(made) and np.array_equal(listed.counts, made.counts)
    same = Session.from_spike_trains(trains, events, clusters=None, regions=LABELS)
    assert same.n_neurons == 4  # of which one is silent
    named = Session.from_spike_trains(
        [*trains.values()], events, clusters=[*trains], regions=LABELS, bin_size=0.1
    )
    assert named.neurons["cluster"].tolist() == [*trains] and named.bin_size == 0.1
    assert named.regions.tolist() == made.regions.tolist()
    table = pd.DataFrame(
        {"id": [*trains], "region": ["LP", "DG", "", "CA1"]}, index=[30, 31, 32, 2]
    )
    how = {"clusters": table["id"], "regions": table["region"]}
    again = Session.from_spike_trains([*trains.values()], events, **how)
    assert repr(again) == repr(made) and np.array_equal(again.counts, made.counts)
    order = Session.from_spike_trains(trains, events, clusters=[10, 3, 5, 7], regions=LABELS)
    np.testing.assert_array_equal(order.counts, session.counts)


def test_a_trace_does_not_replace_a_behaviour():
    times, events = np.arange(0, 60, 0.01), np.arange(2.0, 58.0, 4.0)
    traces, behaviour = {"speed": (times, times)}, {"speed": events}
    with pytest.raises(SessionError, match="'speed' is in traces and in behaviour; rename one"):
        Session.from_spike_times(times, np.zeros(6000), events, traces=traces, behaviour=behaviour)


def test_warnings_of_events_that_are_too_close_or_outside():
    times = np.arange(0, 100, 0.01)
    spikes = (times, np.resize([0, 1], len(times)))
    close = np.arange(2.0, 90.0, 0.25)
    with pytest.warns(UserWarning, match="align_times: 8.% of the windows' time lies in the next"):
        Session.from_spike_times(*spikes, close)
    parts = Split(np.arange(200), np.arange(220, 260), np.arange(280, 352))
    with pytest.warns(UserWarning, match="bin_size: bins of 20.0 s; it is in seconds, not milli"):
        Session.from_spike_times(*spikes, close[:9], window=(-500, 1500), bin_size=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Session.from_spike_times(*spikes, np.arange(2.0, 90.0, 2.0))
        Session.from_spike_times(*spikes, close, given_split=parts)


@pytest.mark.parametrize("spikes", [1, 1e3, 3e4])
@pytest.mark.parametrize("events", [1, 1e3, 3e4])
@pytest.mark.parametrize("rate", [0.5, 20])
def test_times_in_other_units_are_refused(spikes, events, rate):
    rng = np.random.default_rng(0)
    times = rng.uniform(0, 600, 12 * int(600 * rate))
    given = times * spikes, rng.integers(0, 12, len(times)), np.arange(2.0, 590.0, 3.0) * events
    if spikes == events == 1:
        assert Session.from_spike_times(*given).n_trials == 196
        few = (
            rng.uniform(0, 7200, 4320),
            np.arange(4320) % 12,
            np.arange(20) * 300 + 60.0,
        )
        assert Session.from_spike_times(*few).n_trials == 20
        return
    with pytest.raises(SessionError, match="convert spike_times and|are both on one clock, in s"):
        Session.from_spike_times(*given)


@pytest.mark.parametrize("scale", [25, 1000])  # samples 0.25 s apart, or times in ms
def test_a_trace_without_samples_is_told(scale):
    traces = {"pupil": (np.arange(0, 100, 0.01) * scale, np.ones(10_000))}
    with pytest.warns(UserWarning, match="session 'session', trace 'pupil': NaN in every bin"):
        Session.from_spike_times([5.0, 9.0], [0, 0], [5.0, 9.0], traces=traces)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": [0, 0]}, "spikes: clusters: id 0 twice"),
        ({"clusters": [0]}, r"spikes: spike_clusters: ids \[1\] are not among the 1 clusters"),
        ({"align_times": [np.nan]}, "spikes: align_times must be .n,. finite numbers, .* 1 NaN"),
        ({"align_times": [99.0]}, "spikes: none falls into any trial's window"),
        ({"align_times": [0.0, 0.1, 0.0]}, r"times: trials \[2\] are at the time of an earlier"),
        ({"spike_clusters": [1, 2], "regions": ["a", "b", "c"]}, "clusters: no spike has id 0"),
        ({"spike_clusters": np.ma.array([0, 1], mask=[0, 1])}, r"spikes: .* ids \[nan\] are not"),
        ({"clusters": [1, 0], "regions": pd.Series(["a", "b"])}, "regions: a Series with index"),
        ({"neurons": {"x": pd.Series([1, 2], [5, 6])}}, "neurons 'x': a Series with index"),
    ],
)
def test_from_spike_times_errors(changes, message):
    fields = {"spike_times": [0.1, 0.2], "spike_clusters": [0, 1], "align_times": [0.1]}
    with pytest.raises(SessionError, match=f"session 's', {message}"):
        Session.from_spike_times(**{**fields, **changes}, name="s")
