"""Sessions: checks, splits, selection, spike times, and files that come back as they went."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtm.session import Session, SessionError, Split


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


def test_what_it_says_of_itself():
    session = make()
    assert (session.n_trials, session.n_bins, session.n_neurons) == (20, 5, 4)
    assert session.counts.dtype == np.uint8
    assert session.region_names == ["CA1", "DG"]
    assert session.region_codes.tolist() == [0, -1, 1, 0]
    np.testing.assert_allclose(session.times, [-0.04, -0.02, 0.0, 0.02, 0.04], atol=1e-12)
    np.testing.assert_allclose(session.firing_rates, session.counts.mean((0, 1)) / 0.02)
    for part in (
        "'mouse 1'",
        "M1",
        "20 trials x 5 bins x 4 neurons",
        "CA1 2",
        "per trial: choice",
        "per bin: wheel",
    ):
        assert part in repr(session)
    assert make(counts=np.full((20, 5, 4), 300)).counts.dtype == np.uint16
    assert make(regions=None).region_names == []


RING: dict = {}
RING["again"] = RING  # as no file can hold it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.zeros((3, 4))}, "counts: need .trials, bins, neurons., got shape"),
        ({"counts": np.zeros((0, 5, 4))}, "counts: no trials"),
        ({"counts": np.zeros((20, 5, 0))}, "counts: no neurons"),
        ({"counts": np.full((20, 5, 4), -1)}, "counts: negative"),
        ({"counts": np.full((20, 5, 4), 0.5)}, "counts: not whole numbers"),
        ({"counts": np.full((20, 5, 4), np.nan)}, "counts: NaN"),
        ({"counts": np.full((20, 5, 4), 70_000)}, "counts: largest count 70000"),
        ({"counts": np.full((20, 5, 4), "x")}, "counts: need numbers"),
        ({"regions": ["CA1"]}, "regions: need one label for each of the 4 neurons"),
        ({"bin_size": 0.0}, "bin_size: need seconds above 0"),
        ({"window": (0.0, 1.0)}, "window: .0.0, 1.0. s lasts 1 s, but 5 bins"),
        ({"behaviour": {"wheel": np.zeros((20, 4))}}, "behaviour 'wheel': need .20,., one a trial"),
        ({"behaviour": {"choice": np.array(["l"] * 20)}}, "behaviour 'choice': need numbers"),
        ({"neurons": {"depth": np.zeros(3)}}, "neurons 'depth': need 4 rows"),
        ({"neurons": {"day": np.zeros(4, "M8[D]")}}, "neurons 'day': need numbers or strings, got"),
        ({"rates": np.zeros((20, 5, 4))}, "rates: expected counts must be finite and above 0"),
        ({"given_split": ([0], [1], [1])}, "given_split: a trial is in two parts"),
        ({"given_split": ([0], [1], [99])}, "given_split: test names trials outside"),
        ({"trial_ids": np.zeros(20)}, "trial_ids: need 20 different numbers"),
        ({"trial_ids": np.arange(1, 21)}, "trial_ids: must lie in 0..19; pass n_recorded"),
        ({"n_recorded": 10**12}, "n_recorded: 1000000000000 trials"),
        ({"subject": None}, "subject: need a string, got None"),
        ({"provenance": {"x": object()}}, "provenance: .*not JSON serializable"),
        ({"provenance": ["x"]}, "provenance: "),
        ({"provenance": RING}, "provenance: Circular reference"),
        ({"counts": [[[1]], [[1, 2]]]}, "counts: no array"),
        ({"regions": [["CA1"], "DG"]}, "regions: no array"),
        ({"bin_size": "0.02"}, "bin_size: need seconds above 0, got '0.02'"),
        ({"bin_size": 1e308}, "bin_size: need seconds above 0"),
        ({"window": 0.1}, "window: need .start, stop. in seconds, got 0.1"),
        ({"window": (0.0,)}, "window: need .start, stop."),
        ({"window": (0.0, np.nan)}, "window: need .start, stop."),
        ({"behaviour": {"x": np.full(20, np.inf)}}, "behaviour 'x': infinite values"),
        ({"behaviour": {"": np.zeros(20)}}, "behaviour: '' is no name that a file can hold"),
        ({"behaviour": {1: np.zeros(20)}}, "behaviour: 1 is no name"),
        ({"neurons": {"a\0b": np.zeros(4)}}, "neurons: .* is no name"),
        ({"neurons": {"\ud800": np.zeros(4)}}, "neurons: .* is no name"),
        ({"neurons": {"a.npy": np.zeros(4)}}, "neurons: 'a.npy' is no name"),
        ({"rates": "x"}, "rates: need numbers, got dtype <U1"),
        ({"rates": np.ones((20, 5, 4), complex)}, "rates: need numbers, got dtype complex128"),
        ({"rates": np.full((20, 5, 4), 1e300)}, "rates: expected counts must be finite"),
        ({"given_split": 5}, "given_split: need .train, val, test., got a int"),
        ({"given_split": ([0], [1])}, "given_split: need .train, val, test., got a tuple"),
        ({"given_split": ([0.5], [1], [2])}, "given_split: need a row of whole numbers"),
        ({"given_split": ([2**64], [1], [2])}, "given_split: need a row of whole numbers"),
        ({"given_split": (["a"], [1], [2])}, "given_split: need a row of whole numbers"),
        ({"trial_ids": np.arange(20) + 0.5}, "trial_ids: need a row of whole numbers"),
        ({"trial_ids": np.full(20, np.nan)}, "trial_ids: need a row of whole numbers"),
        ({"n_recorded": 20.5}, "n_recorded: need a whole number, got 20.5"),
        ({"n_recorded": "many"}, "n_recorded: need a whole number, got 'many'"),
    ],
)
def test_errors_name_the_session_and_the_field(changes, message):
    with pytest.raises(SessionError, match=f"session 'mouse 1', {message}"):
        make(**changes)


def test_bins_in_milliseconds_are_doubted():
    with pytest.warns(UserWarning, match="bin_size is in seconds"):
        make(bin_size=20, window=None)


def test_a_name_is_needed():
    for name in ("", "\ud800", 5):
        with pytest.raises(SessionError, match="session name"):
            make(name=name)


def test_half_floats_and_damaged_labels_are_taken():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session = make(counts=np.ones((20, 5, 4), np.float16), regions=[b"CA1", b"\xff", b"", None])
    assert session.counts.dtype == np.uint8
    assert session.regions.tolist() == ["CA1", "\ufffd", "", ""]


@given(st.integers(3, 400), st.integers(0, 5))
def test_splits_hold_every_trial_once(n_trials, seed):
    session = Session(np.zeros((n_trials, 1, 1)), name=f"s{n_trials}")
    split = session.split(seed)
    assert sorted(np.concatenate(split).tolist()) == list(range(n_trials))
    assert min(map(len, split)) >= 1
    if n_trials >= 20:
        assert abs(len(split.train) / n_trials - 0.7) < 0.05
    for part in split:
        assert (np.diff(part) > 0).all()


def test_splits_depend_on_name_and_seed_alone():
    one, same = make(), make(counts=np.ones((20, 5, 4)))
    assert all(np.array_equal(a, b) for a, b in zip(one.split(), same.split(), strict=True))
    for other in (make(name="mouse 2").split(), one.split(1)):
        assert not np.array_equal(one.split().test, other.test)
    # a golden draw: a split must never change between versions, or test trials leak into training
    assert one.split().test.tolist() == [8, 10, 11, 13]
    with pytest.raises(SessionError, match="split: none of its 2 trials is in train"):
        Session(np.zeros((2, 1, 1))).split()


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
    for label in Split._fields:
        whole = set(getattr(session.split(3), label).tolist())
        for selection in (part, again):
            kept = selection.trial_ids[getattr(selection.split(3), label)]
            assert set(kept.tolist()) == whole & set(trials)


def test_no_trial_twice():
    with pytest.raises(SessionError, match="trial_ids: need 3 different numbers"):
        make().select(trials=np.array([1, 1, 2]))


def test_select_cuts_every_field():
    session = make(rates=np.random.default_rng(0).random((20, 5, 4)) + 0.1)
    part = session.select(trials=np.array([3, 1]), neurons=session.regions == "CA1")
    np.testing.assert_array_equal(part.counts, session.counts[[3, 1]][:, :, [0, 3]])
    np.testing.assert_array_equal(part.rates, session.rates[[3, 1]][:, :, [0, 3]])
    np.testing.assert_array_equal(part.behaviour["wheel"], session.behaviour["wheel"][[3, 1]])
    assert part.neurons["uuid"].tolist() == ["a", "d"] and part.regions.tolist() == ["CA1", "CA1"]


def test_a_file_gives_back_the_session(tmp_path):
    session = make(
        rates=np.random.default_rng(0).random((20, 5, 4)) + 0.1,
        given_split=Split(np.arange(14), [14, 15], np.arange(16, 20)),
        behaviour={"a/b": np.arange(20.0), "with space": np.zeros((20, 5))},
    )
    session = session.select(trials=np.arange(19, -1, -1))
    path = session.save(tmp_path / "deep" / "x.npz")
    with np.load(path, allow_pickle=False) as file:  # no pickled objects
        assert all(file[key].dtype.kind != "O" for key in file.files)
    again = Session.load(path)
    assert repr(again) == repr(session) and again.provenance == session.provenance
    for a, b in [
        (again.counts, session.counts),
        (again.rates, session.rates),
        (again.regions, session.regions),
        (again.trial_ids, session.trial_ids),
        *zip(again.split(), session.split(), strict=True),
        *((again.behaviour[k], v) for k, v in session.behaviour.items()),
        *((again.neurons[k], v) for k, v in session.neurons.items()),
    ]:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["x.npz"]


def test_files_that_are_no_sessions_are_refused(tmp_path):
    path = make().save(tmp_path / "good.npz")
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 40)):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(SessionError, match="cut.npz"):
            Session.load(tmp_path / "cut.npz")
    for place in range(30, len(whole), max(1, len(whole) // 60)):  # one byte wrong
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        (tmp_path / "flip.npz").write_bytes(flipped)
        try:
            Session.load(tmp_path / "flip.npz")  # a byte that nothing depends on
        except SessionError as error:
            assert "flip.npz" in str(error) or "session" in str(error)
    np.save(tmp_path / "bare.npy", np.zeros((3, 4, 5)))
    with pytest.raises(SessionError, match=r"bare\.npy is not a readable session file"):
        Session.load(tmp_path / "bare.npy")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(SessionError, match=r"other\.npz"):
        Session.load(tmp_path / "other.npz")
    np.savez(tmp_path / "pickle.npz", meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(SessionError, match=r"pickle\.npz"):
        Session.load(tmp_path / "pickle.npz")
    with pytest.raises(FileNotFoundError):
        Session.load(tmp_path / "absent.npz")


def test_well_formed_files_of_wrong_content_are_refused_by_name(tmp_path):
    path = make().save(tmp_path / "good.npz")
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    changes = [{"what/else": np.arange(3)}, {"split/train": np.arange(3)}, {"else": np.arange(3)},
               {"counts": arrays["counts"][0]}, {"trial_ids": arrays["trial_ids"][1:]}]  # fmt: skip
    wrong = {"name": None, "subject": 5, "bin_size": "x", "window": [0, 1, 2], "more": 1}
    wrong |= {"n_recorded": 10**30}
    changes += [{"meta": np.array(json.dumps(meta | {key: value}))} for key, value in wrong.items()]
    for change in changes:
        np.savez(path, **(arrays | change))
        for mmap in (False, True):
            with pytest.raises(SessionError, match=r"good\.npz"):
                Session.load(path, mmap=mmap)


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
        name="loop",
    )
    assert session.counts.shape == (16, 6, 4)
    for k, event in enumerate(events):
        for t in range(6):
            for n, cluster in enumerate([10, 3, 5, 7]):
                start = event - 0.1 + 0.05 * t
                inside = (times >= start) & (times < start + 0.05) & (clusters == cluster)
                assert session.counts[k, t, n] == inside.sum()
    assert session.regions.tolist() == ["CA1", "", "", "DG"]
    assert session.neurons["cluster"].tolist() == [10, 3, 5, 7]
    middle = events[:, None] - 0.1 + 0.05 * (np.arange(6) + 0.5)
    np.testing.assert_allclose(session.behaviour["wheel"], middle, rtol=1e-6)


@pytest.mark.parametrize(
    ("ids", "fired"),
    [
        (np.array([-128, 124, 125], np.int8), 1),  # whose differences no int8 holds
        (np.array([3, 2**63 + 1, 2**63 + 2], np.uint64), 1),
        (np.array([3, 7, 9], np.uint64), 2),
        (np.array(["a", "b", "c"], object), 0),
        (np.array([b"a", b"b", b"c"]), 2),
        (np.array([0.5, 1.5, 2.5]), 1),
    ],
)
def test_ids_of_any_type_are_told_apart(ids, fired):
    times = [0.1, 0.2, 0.3]
    made = Session.from_spike_times(
        times, ids[[fired] * 3], [0.0], clusters=ids, window=(0.0, 1.0), bin_size=1.0
    )
    assert made.counts[0, 0].tolist() == [3 * (i == fired) for i in range(3)]


def test_events_that_are_too_close_or_outside_are_doubted():
    times = np.arange(0, 100, 0.01)
    spikes = (times, np.resize([0, 1], len(times)))
    apart = np.arange(2.0, 90.0, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Session.from_spike_times(*spikes, apart)
    with pytest.warns(UserWarning, match="align_times: 8.% of the windows' time lies in the next"):
        Session.from_spike_times(*spikes, np.arange(2.0, 90.0, 0.25))
    parts = Split(np.arange(200), np.arange(220, 260), np.arange(280, 352))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Session.from_spike_times(*spikes, np.arange(2.0, 90.0, 0.25), given_split=parts)
    with pytest.warns(UserWarning, match="align_times: 40 of 88 trials lie before the first or"):
        Session.from_spike_times(*spikes, np.arange(-80.0, 96.0, 2.0) + 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": [0, 0]}, "clusters: id 0 twice"),
        ({"clusters": ["0", "1"]}, "spike_clusters: int64 cannot be looked up among clusters of"),
        ({"clusters": [[0, 1]]}, "clusters: need a row of ids"),
        ({"clusters": [[0], 1]}, "clusters: no ids"),
        ({"spike_clusters": [0, None]}, "spike_clusters: need a row of ids"),
        ({"spike_clusters": 0}, "spike_clusters: need a row of ids"),
        ({"window": ("0", "1")}, "binning: .*window must be"),
        ({"bin_size": None}, "binning: .*bin_size must be"),
        ({"clusters": [0]}, r"spike_clusters: ids \[1\] are not among the 1 clusters"),
        ({"align_times": [np.nan]}, "binning: .*align"),
        ({"spike_times": [0.1, np.inf]}, "binning: .*spike_times"),
        ({"spike_times": [0.1]}, "binning"),
        ({"window": (0, 0.03)}, "binning: .*window"),
        ({"align_times": [99.0]}, "binning: no spike falls into any trial's window"),
        ({"regions": {"0": "CA1"}}, "regions: no key of the mapping is a cluster id"),
        ({"traces": {"wheel": ([1.0, 0.0], [0.0, 0.0])}}, "trace 'wheel': "),
    ],
)
def test_from_spike_times_errors(changes, message):
    fields = {"spike_times": [0.1, 0.2], "spike_clusters": [0, 1], "align_times": [0.1]}
    with pytest.raises(SessionError, match=f"session 's', {message}"):
        Session.from_spike_times(**{**fields, **changes}, name="s")


def test_milliseconds_are_doubted():
    rng = np.random.default_rng(0)
    spikes, events = np.sort(rng.uniform(0, 300, 30_000)), np.arange(5.0, 295.0, 3.0)
    fields = {"spike_clusters": np.zeros(30_000, dtype=int), "name": "s"}
    asked = "session 's', spike_times and align_times: spikes span 3e.05 s and events 288 s"
    with pytest.warns(UserWarning, match=asked), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*trials lie before the first or")
        Session.from_spike_times(1000 * spikes, align_times=events, **fields)
    with pytest.warns(UserWarning, match="window: trials of 2000 s; window is in seconds"):
        long = {"window": (-500, 1500), "bin_size": 20, "given_split": ([0, 1, 2], [3], [4, 5])}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*bin_size is in seconds")
            Session.from_spike_times(spikes, align_times=events[:6], **long, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Session.from_spike_times(spikes, align_times=events, **fields)


def test_rates_in_hz_are_doubted():
    counts = np.random.default_rng(0).poisson(0.3, (20, 20, 4))
    with pytest.warns(UserWarning, match="session 's', counts: all are multiples of 50, as where"):
        Session(counts / 0.02, name="s")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (counts.astype(float), np.zeros((10, 5, 4)), 50.0 * (counts[:3, :2] > 0)):
            Session(fine, name="s")


AWKWARD = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=64),
    st.sampled_from([-1.0, 0.0, 0.1, 0.1, 5e9, np.nan, np.inf, -np.inf]),
)
LABEL = st.one_of(st.text(max_size=6), st.sampled_from(["CA1", "root", "", None, "\x00", "é/\\\n"]))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_spike_times_end_as_a_session_or_with_a_reason(data):
    """Lengths that differ, times that are none, ids twice or unknown, no trials, no neurons."""
    n = data.draw(st.integers(0, 12))
    times = data.draw(st.lists(AWKWARD, min_size=n, max_size=n))
    more = data.draw(st.sampled_from([0, 0, 0, 1]))
    ids = data.draw(st.lists(st.integers(-1, 4), min_size=n + more, max_size=n + more))
    events = data.draw(st.lists(AWKWARD, max_size=4))
    clusters = data.draw(st.none() | st.lists(st.integers(-1, 4), max_size=5))
    regions = data.draw(
        st.none() | st.lists(LABEL, max_size=5) | st.dictionaries(st.integers(-1, 4), LABEL)
    )
    window = data.draw(st.sampled_from([(0.0, 1.0), (0.0, 0.03), (1.0, 0.0), (0, np.nan), (-1, 1)]))
    trace = (data.draw(st.lists(AWKWARD, max_size=5)), data.draw(st.lists(AWKWARD, max_size=5)))
    options = {"clusters": clusters, "regions": regions, "window": window, "name": "any"}
    if data.draw(st.booleans()):
        options["traces"] = {"wheel": trace}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="session 'any', (align_times|spike_times|window)")
        try:
            session = Session.from_spike_times(times, ids, events, bin_size=0.1, **options)
        except SessionError as error:
            assert "session 'any', " in str(error)
            return
    least, most = (
        sum(e + window[0] - slack <= t < e + window[1] + slack for e in events for t in times)
        for slack in (-1e-3, 1e-3)  # what is at an edge, to within its rounding, may be either way
    )
    assert least <= int(session.counts.sum()) <= most
    assert session.n_neurons == len(session.regions) and len(session.behaviour) <= 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_arrays_end_as_a_session_or_with_a_reason(data):
    shape = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    values = st.one_of(AWKWARD, st.integers(-3, 70_000), st.booleans(), st.text(max_size=2))
    size = int(np.prod(shape))
    flat = data.draw(st.lists(values, min_size=size, max_size=size))
    kind = data.draw(st.sampled_from([object, float, int, str, np.uint8, bool]))
    try:
        with np.errstate(all="ignore"):
            counts = np.array(flat, dtype=object).reshape(shape).astype(kind)
    except (ValueError, OverflowError, TypeError):
        counts = np.array(flat, dtype=object).reshape(shape)
    regions = data.draw(st.none() | st.lists(LABEL, max_size=4))
    behaviour = {"x": data.draw(st.lists(AWKWARD, max_size=3))}
    try:
        session = Session(counts, regions, "any", behaviour=behaviour)
    except SessionError as error:
        assert "session 'any', " in str(error)
        return
    assert session.counts.dtype in (np.uint8, np.uint16)
    np.testing.assert_array_equal(session.counts, counts.astype(float))
