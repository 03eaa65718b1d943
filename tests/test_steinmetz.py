"""ALF folders against brute-force counting, and ways to break them."""

import shutil
import uuid
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtm.session import Session, SessionError
from mtm.data import steinmetz

NAME = "Cori_2016-12-14"
K, N, S = 9, 6, 4000
slow_files = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def make_arrays():
    """The files of a session of 40 s, as the archive shapes them: name -> array."""
    rng = np.random.default_rng(5)
    stimulus = 3.0 + 3.7 * np.arange(K)
    choice = np.resize([-1.0, 1.0, 0.0], K)
    wheel = np.round(400 * np.sin(np.arange(40 * 100) / 100))  # ticks at 100 Hz: 400 ticks/s
    column = {
        "spikes.times": np.sort(rng.uniform(0, 40, S)),
        "spikes.clusters": rng.integers(N, size=S).astype(np.uint32),
        "clusters.peakChannel": np.array([1.0, 3, 3, 5, 8, 4]),  # from 1
        "clusters.probes": np.array([0.0, 0, 0, 1, 1, 0]),
        "clusters.depths": 20.0 * np.arange(N),
        "clusters._phy_annotation": np.array([1.0, 2, 3, 3, 1, 2]),
        "channels.site": np.arange(8.0),
        "trials.visualStim_times": stimulus,
        "trials.goCue_times": stimulus + 0.6,
        "trials.response_times": stimulus + 1.1,
        "trials.feedback_times": stimulus + 1.2,
        "trials.response_choice": choice,
        "trials.feedbackType": np.where(choice == 0, -1.0, 1.0),
        "trials.visualStim_contrastLeft": np.where(choice > 0, 0.5, 0.0),
        "trials.visualStim_contrastRight": np.where(choice < 0, 1.0, 0.0),
        "trials.included": np.arange(K) % 4 != 3,
        "wheel.position": wheel,
        "face.motionEnergy": np.append(np.nan, np.arange(1, 1600.0)),  # 40 Hz; of frame 0 none
    }
    arrays = {name: values[:, None] for name, values in column.items()}
    arrays["wheel.timestamps"] = np.array([[0.0, 0.0], [3999, 39.99]])
    arrays["face.timestamps"] = np.array([[1.0, 0.0], [1600, 39.975]])
    early, late = stimulus - 0.3, stimulus + 0.2 + 0.05 * np.arange(K)
    arrays["wheelMoves.intervals"] = np.sort(np.concatenate([early, late]))[:, None] + [0.0, 0.1]
    return arrays


AREAS = ["VISp", "VISp", "CA1", "root", "MOs", "CA3", "DG", "LP"]


def write_folder(folder, arrays=None):
    folder.mkdir(parents=True)
    for name, values in (arrays or make_arrays()).items():
        np.save(folder / f"{name}.npy", values)
    rows = [f"{i}.5\t2\t3\t{area}" for i, area in enumerate(AREAS)]
    table = "\n".join(["ccf_ap\tccf_dv\tccf_lr\tallen_ontology", *rows]) + "\n"
    (folder / "channels.brainLocation.tsv").write_text(table)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("archive") / NAME)


@pytest.fixture
def variant(folder, tmp_path):
    """A function that loads a copy of the folder in which files were replaced (None: removed)."""

    def load(changes, **options):
        copy = shutil.copytree(folder, tmp_path / uuid.uuid4().hex / NAME)
        for name, change in changes.items():
            path = copy / (name if name.endswith(".tsv") else f"{name}.npy")
            if change is None:
                path.unlink()
            elif isinstance(change, bytes):
                path.write_bytes(change)
            else:
                np.save(path, change(np.load(path)) if callable(change) else change)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RuntimeWarning)
            return steinmetz.load_session(copy, **options)

    return load


def brute_force(times, clusters, events, window, bin_size, ids):
    bins = round((window[1] - window[0]) / bin_size)
    counts = np.zeros((len(events), bins, len(ids)), int)
    for k, event in enumerate(events):
        for b in range(bins):
            start = event + window[0] + b * bin_size
            inside = clusters[(times >= start) & (times < start + bin_size)]
            counts[k, b] = [np.sum(inside == i) for i in ids]
    return counts


def test_folder_gives_the_session(folder, recwarn):
    arrays = {name: values[:, 0] for name, values in make_arrays().items()}
    session = steinmetz.load_session(folder)
    assert not recwarn.list
    expected = brute_force(
        arrays["spikes.times"],
        arrays["spikes.clusters"],
        arrays["trials.visualStim_times"],
        (-0.5, 1.5),
        0.02,
        range(N),
    )
    np.testing.assert_array_equal(session.counts, expected)
    assert (session.name, session.subject, session.window) == (NAME, "Cori", (-0.5, 1.5))
    # Peak channels count from 1.
    assert session.regions.tolist() == ["VISp", "CA1", "CA1", "MOs", "LP", "root"]
    np.testing.assert_array_equal(session.neurons["channel"], [0, 2, 2, 4, 7, 3])
    for column, name in (("probe", "probes"), ("depth", "depths")):
        np.testing.assert_array_equal(session.neurons[column], arrays[f"clusters.{name}"])
    found = session.behaviour
    np.testing.assert_array_equal(found["choice"], arrays["trials.response_choice"])
    np.testing.assert_array_equal(found["contrast"], np.resize([1, -0.5, 0], K))
    np.testing.assert_array_equal(found["reward"], np.resize([1, 1, 0], K))
    # +1 is correct for the left, so that a rewarded choice and the contrast differ in sign.
    assert np.all((found["choice"] * found["contrast"])[found["reward"] == 1] < 0)
    for key, seconds in (("go-cue-time", 0.6), ("response-time", 1.1), ("feedback-time", 1.2)):
        np.testing.assert_allclose(found[key], seconds)
    np.testing.assert_allclose(found["reaction-time"], 0.2 + 0.05 * np.arange(K))
    # The position is 400 sin(t) ticks: its speed |400 cos(t)| ticks a second.
    middle = arrays["trials.visualStim_times"][:, None] + session.times + 0.01
    speed = np.abs(400 * np.cos(middle)) * 2 * np.pi / 1440
    np.testing.assert_allclose(found["wheel-speed"], speed, atol=0.25)
    assert np.abs(found["wheel-speed"] - speed).mean() < 0.06  # of up to 1.7; ticks are whole
    # Frame i (from 0) is at i / 40 s, its energy i.
    np.testing.assert_allclose(found["face-motion-energy"], 40 * middle, rtol=1e-4)
    assert Session.load(session.save(folder.parent / "s.npz")).provenance == session.provenance


def test_events_units_and_trials(folder):
    arrays = {name: values[:, 0] for name, values in make_arrays().items()}
    every = steinmetz.load_session(folder)
    good = steinmetz.load_session(folder, units="good", trial_filter="included")
    kept = np.flatnonzero(arrays["trials.included"])
    ids = [1, 2, 3, 5]
    np.testing.assert_array_equal(good.counts, every.counts[np.ix_(kept, range(100), ids)])
    np.testing.assert_array_equal(good.neurons["cluster"], ids)
    np.testing.assert_array_equal(good.trial_ids, kept)
    assert good.n_recorded == K and good.provenance["trials"]["not included"] == K - len(kept)
    grid = {"window": (-0.2, 0.3), "bin_size": 0.1}
    cue = steinmetz.load_session(folder, align="goCue_times", **grid)
    expected = brute_force(
        *(arrays["spikes.times"], arrays["spikes.clusters"], arrays["trials.goCue_times"]),
        *grid.values(),
        range(N),
    )
    np.testing.assert_array_equal(cue.counts, expected)
    np.testing.assert_allclose(cue.behaviour["response-time"], 0.5)
    np.testing.assert_allclose(cue.behaviour["reaction-time"], every.behaviour["reaction-time"])
    with pytest.raises(ValueError, match="units must be"):
        steinmetz.load_session(folder, units="best")
    with pytest.raises(ValueError, match="trial_filter must be"):
        steinmetz.load_session(folder, trial_filter="good")


def test_first_column_of_timestamps_from_0_or_1(variant):
    energy = np.arange(1600.0)
    for stamps, shift in (
        ([[1, 0], [1600, 39.975]], 0),
        ([[0, 0], [1599, 39.975]], 0),
        ([[0, 0], [800, 20], [1599, 39.975]], 0),
        ([[11, 0.25], [1600, 39.975]], 0),  # from 1, the first frames' times unknown
        ([[10, 0.25], [1599, 39.975]], 0),
        ([[0, 1.0], [1599, 40.975]], 1),
    ):
        read = variant({"face.motionEnergy": energy, "face.timestamps": np.array(stamps, float)})
        middle = 3 + 3.7 * np.arange(K)[:, None] + read.times + 0.01
        np.testing.assert_allclose(
            read.behaviour["face-motion-energy"], 40 * (middle - shift), rtol=1e-4
        )


def test_repairs(variant, folder):
    every = steinmetz.load_session(folder)
    order = np.random.default_rng(0).permutation(S)
    shuffled = variant({"spikes.times": lambda t: t[order], "spikes.clusters": lambda c: c[order]})
    np.testing.assert_array_equal(shuffled.counts, every.counts)
    flat = variant({name: lambda v: v.ravel() for name in ("spikes.times", "trials.included")})
    np.testing.assert_array_equal(flat.counts, every.counts)
    lost = variant(
        {"trials.visualStim_times": lambda t: np.where(np.arange(K)[:, None] == 4, np.nan, t)}
    )
    np.testing.assert_array_equal(lost.counts, np.delete(every.counts, 4, axis=0))
    assert lost.provenance["trials"]["without visualStim_times"] == 1
    endless = variant(
        {
            name: lambda t: np.where(np.arange(K)[:, None] == 4, np.inf, t)
            for name in ("trials.visualStim_times", "trials.goCue_times")
        },
    )
    np.testing.assert_array_equal(endless.counts, lost.counts)
    assert np.isfinite(endless.behaviour["go-cue-time"]).all()
    outside = variant({"clusters.peakChannel": np.array([0, 3, np.nan, 99, 8, 4.0])})
    assert outside.regions.tolist() == ["", "CA1", "", "", "LP", "root"]
    before = variant({"spikes.times": lambda t: t - 5})  # times before 0 are before the clock's 0
    assert before.counts.sum() > 0
    many = variant({"spikes.times": np.full(300, 3.01), "spikes.clusters": np.zeros(300, int)})
    assert many.counts.dtype == np.uint16 and many.counts.max() == 300


def test_what_is_missing_is_absent(folder, tmp_path):
    arrays = make_arrays()
    needed = ("spikes.times", "spikes.clusters", "clusters.peakChannel", "trials.visualStim_times")
    bare = write_folder(tmp_path / "Cori_1", {name: arrays[name] for name in needed})
    with pytest.warns(UserWarning) as caught:
        session = steinmetz.load_session(bare)
    assert ["wheel-speed" in str(w.message) for w in caught] == [True, False]
    assert session.behaviour == {} and set(session.neurons) == {"cluster", "channel", "allen"}
    for name in needed:
        lacks = write_folder(tmp_path / name / NAME, {k: v for k, v in arrays.items() if k != name})
        with pytest.raises(SessionError, match=f"'{NAME}', {name}.npy: (no such|cannot be read)"):
            steinmetz.load_session(lacks)


first = np.arange(K)[:, None] == 0
UNREAD = "cannot be read"
BAD = {
    "no table": ({"channels.brainLocation.tsv": None}, f"tsv: {UNREAD}"),
    "not a table": ({"channels.brainLocation.tsv": b"\xff\xfe\x00"}, f"tsv: {UNREAD}"),
    "no acronyms": ({"channels.brainLocation.tsv": b"a\tb\n1\t2\n"}, f"tsv: {UNREAD}"),
    "only a head": ({"channels.brainLocation.tsv": b"allen_ontology\n"}, "site.npy: 8 rows, but 0"),
    "short row": ({"channels.brainLocation.tsv": b"a\tallen_ontology\n1\n"}, f"tsv: {UNREAD}"),
    "few channels": ({"channels.brainLocation.tsv": b"allen_ontology\nCA1\n"}, "site.npy: 8 rows"),
    "no clusters": ({"clusters.peakChannel": np.zeros((0, 1))}, "npy: 6 rows, but 0"),
    "depths": ({"clusters.depths": np.zeros(N - 1)}, "depths.npy: 5 rows, but 6"),
    "texts": ({"clusters.depths": np.full(N, "x")}, f"depths.npy: {UNREAD}"),
    "objects": ({"clusters.depths": np.full(N, None)}, f"depths.npy: {UNREAD}"),
    "two columns": ({"clusters.depths": np.zeros((N, 2))}, f"depths.npy: {UNREAD}"),
    "a scalar": ({"spikes.times": np.float64(3)}, f"spikes.times.npy: {UNREAD}"),
    "fewer clusters": ({"spikes.clusters": lambda c: c[:-1]}, "clusters.npy: 3999 rows, but 4000"),
    "id too large": ({"spikes.clusters": lambda c: c + 1}, r"ids \[6\] are not among the 6"),
    "negative id": ({"spikes.clusters": lambda c: c.astype(int) - 1}, r"ids \[-1\] are not"),
    "half an id": ({"spikes.clusters": lambda c: c / 2}, r"ids \[0.5, 1.5, 2.5\] are not"),
    "huge id": ({"spikes.clusters": lambda c: c + 2.0**40}, r"ids \[109951162777.* are not"),
    "infinite id": ({"spikes.clusters": np.full(S, np.inf)}, r"ids \[inf\] are not"),
    "NaN id": ({"spikes.clusters": np.full(S, np.nan)}, r"ids \[nan\] are not"),
    "no spikes": ({"spikes.times": [], "spikes.clusters": []}, "no spike falls"),
    "other clock": ({"spikes.times": lambda t: t + 1000}, "no spike falls"),
    "no trials": ({n: np.zeros((0, 1)) for n in make_arrays() if "trials" in n}, "no trial of 0"),
    "all NaN": ({"trials.visualStim_times": np.full(K, np.nan)}, "no trial of 9"),
    "fewer trials": ({"trials.response_choice": np.zeros(K - 1)}, "choice.npy: 8 rows, but 9"),
    "choice 2": ({"trials.response_choice": np.full(K, 2)}, "choice: values .* -1, 0 or 1"),
    "feedback": ({"trials.feedbackType": np.full(K, 0.5)}, "Type: values other than -1, 0 or 1"),
    "contrast": ({"trials.visualStim_contrastLeft": np.full(K, 50)}, "other than from 0 to 1"),
    "contrast < 0": ({"trials.visualStim_contrastRight": np.full(K, -1)}, "other than from 0"),
    "one column": ({"wheelMoves.intervals": np.zeros(5)}, f"intervals.npy: {UNREAD}"),
    "one anchor": ({"wheel.timestamps": np.zeros((1, 2))}, "wheel.timestamps.npy: no rising"),
    "falling": ({"wheel.timestamps": lambda a: a[::-1]}, "no rising"),
    "NaN anchor": ({"wheel.timestamps": lambda a: a * [1, np.nan]}, "no rising"),
    "endless anchors": (
        {"wheel.timestamps": np.array([[0, 0], [9, np.inf], [12, np.inf]])},
        "no ri",
    ),
    "infinite anchor": ({"wheel.timestamps": lambda a: a + [[0, 0], [0, np.inf]]}, "no rising"),
    "times only": ({"wheel.timestamps": np.arange(4000.0)}, f"timestamps.npy: {UNREAD}"),
    "past the end": ({"wheel.timestamps": lambda a: a + [9, 0]}, "of 4000 samples"),
    "before 0": ({"face.timestamps": lambda a: a - [2, 0]}, "of 1600 samples"),
    "too slow": ({"wheel.timestamps": lambda a: a * [1, 100]}, "of 4000 samples"),
    "no wheel": ({"wheel.position": np.full(4000, np.nan)}, f"wheel.position.npy: {UNREAD}"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(variant, case):
    changes, message = BAD[case]
    with pytest.raises(SessionError, match=f"session '{NAME}', .*{message}"):
        variant(changes)


def test_bad_options_are_named(variant, tmp_path):
    for options, message in (
        ({"align": "lunch_times"}, r"align to one of \['feedback_times', 'goCue_times'"),
        ({"align": "../x"}, "align to one of"),
        ({"window": (1, 0)}, "window"),
        ({"bin_size": 0.03}, "bin_size"),
    ):
        with pytest.raises(SessionError, match=f"'{NAME}', .*{message}"):
            variant({}, **options)
    missing = {"clusters._phy_annotation": None, "trials.included": None}
    for option, file in (("units", "_phy_annotation"), ("trial_filter", "included")):
        value = {"units": "good", "trial_filter": "included"}[option]
        with pytest.raises(SessionError, match=f"{file}.npy: cannot be read .*No such file"):
            variant(missing, **{option: value})
        with pytest.raises(SessionError, match="no trial of 9 is left|no neurons in it"):
            variant({k: lambda v: np.zeros(len(v)) for k in missing}, **{option: value})
    for absent in (tmp_path / "absent", tmp_path / ("x" * 300), f"{tmp_path}/a\0b"):
        with pytest.raises(SessionError, match="no such folder"):
            steinmetz.load_session(absent)


def test_spikes_without_a_time_are_left_out(folder, tmp_path, variant):
    copy = shutil.copytree(folder, tmp_path / NAME)
    times = np.load(copy / "spikes.times.npy").ravel()
    np.save(copy / "spikes.times.npy", np.r_[np.inf, times[1:-1], np.nan])
    with pytest.warns(UserWarning, match="spikes.times: left out 2 without time"):
        read = steinmetz.load_session(copy)
    assert read.counts.sum() in variant({}).counts.sum() - np.arange(3)


@settings(slow_files, max_examples=75)
@given(st.data())
def test_truncated_files_are_named_or_a_session(folder, data):
    files = sorted(file.name for file in folder.iterdir())
    path = folder / data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    length = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(whole))
    try:
        path.write_bytes(whole[:length])
        if path.suffix == ".npy" or length < len(whole) - 3:
            message = f"'{NAME}', .*download it again"
            with pytest.raises(SessionError, match=message):
                steinmetz.load_session(folder, units="good", trial_filter="included")
    finally:
        path.write_bytes(whole)


NUMBER = st.floats() | st.integers(-3, 3) | st.floats(0, 40)


@settings(slow_files, max_examples=75)
@given(st.data())
def test_whatever_is_in_a_file_a_session_or_an_error(folder, data):
    files = sorted(file.name for file in folder.iterdir() if file.suffix == ".npy")
    path = folder / data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    array = np.load(path).astype(float)
    if data.draw(st.booleans()):
        array = array[: data.draw(st.integers(0, len(array)))]
    for value in data.draw(st.lists(NUMBER, max_size=3)) if array.size else ():
        array.ravel()[data.draw(st.integers(0, array.size - 1))] = value
    kind = data.draw(st.sampled_from([float, np.float32, np.int64, bool, np.complex64, "U4"]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.save(path, array.astype(kind))
            warnings.simplefilter("error", RuntimeWarning)
            session = steinmetz.load_session(folder, bin_size=0.1)
        assert session.counts.shape[1:] == (20, N)
    except SessionError as error:
        assert NAME in str(error)
    finally:
        path.write_bytes(whole)
