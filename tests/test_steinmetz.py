"""The archive and Neuromatch's copy against brute-force counting; no pickle runs code."""

import io
import os
import pickle
import shutil
import uuid
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import brute_force

from mtm.data import steinmetz
from mtm.data.steinmetz import load_bundle
from mtm.inputs import SessionError
from mtm.session import Session

NAME = "Cori_2016-12-14"
REAL = Path(__file__).parents[2] / "shared/data/steinmetz2019"
K, N, S = 9, 6, 4000
AREAS = ["VISp", "VISp", "CA1", "root", "MOs", "CA3", "DG", "LP"]


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
            path = copy / f"{name}.npy"
            if change is None:
                path.unlink()
            else:
                np.save(path, change(np.load(path)) if callable(change) else change)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return steinmetz.load_session(copy, **options)

    return load


def trains(arrays):
    return [arrays["spikes.times"][arrays["spikes.clusters"] == n] for n in range(N)]


def test_folder_gives_the_session(folder, recwarn):
    arrays = {name: values[:, 0] for name, values in make_arrays().items()}
    session = steinmetz.load_session(folder)
    assert not recwarn.list
    stimulus = arrays["trials.visualStim_times"]
    expected = brute_force(trains(arrays), stimulus, (-0.5, 1.5), 0.02)
    np.testing.assert_array_equal(session.counts, expected)
    assert (session.name, session.subject, session.window) == (NAME, "Cori", (-0.5, 1.5))
    # Peak channels count from 1.
    assert session.regions.tolist() == ["VISp", "CA1", "CA1", "MOs", "LP", "root"]
    np.testing.assert_array_equal(session.neurons["channel"], [0, 2, 2, 4, 7, 3])
    np.testing.assert_array_equal(session.neurons["depth"], arrays["clusters.depths"])
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
    middle = stimulus[:, None] + session.times + 0.01
    speed = np.abs(400 * np.cos(middle)) * 2 * np.pi / 1440
    np.testing.assert_allclose(found["wheel-speed"], speed, atol=0.25)
    assert np.abs(found["wheel-speed"] - speed).mean() < 0.06  # of up to 1.7; ticks are whole
    # Frame i (from 0) is at i / 40 s, its energy i.
    np.testing.assert_allclose(found["face-motion-energy"], 40 * middle, rtol=1e-4)
    assert Session.load(session.save(folder.parent / "s.npz")).provenance == session.provenance


def test_a_folder_of_one_has_the_same_name(folder, tmp_path):
    alf = shutil.copytree(folder, tmp_path / "cortexlab/Subjects/Cori/2016-12-14/001/alf")
    session = steinmetz.load_session(alf)
    assert (session.name, session.subject) == (NAME, "Cori")


def test_events_units_and_trials(folder):
    arrays = {name: values[:, 0] for name, values in make_arrays().items()}
    every = steinmetz.load_session(folder)
    good = steinmetz.load_session(folder, units="good", trial_filter="included")
    kept, ids = np.flatnonzero(arrays["trials.included"]), [1, 2, 3, 5]
    np.testing.assert_array_equal(good.counts, every.counts[np.ix_(kept, range(100), ids)])
    np.testing.assert_array_equal(good.neurons["cluster"], ids)
    np.testing.assert_array_equal(good.trial_ids, kept)
    assert good.n_recorded == K and good.provenance["trials"]["not included"] == K - len(kept)
    grid = {"window": (-0.2, 0.3), "bin_size": 0.1}
    cue = steinmetz.load_session(folder, align="goCue_times", **grid)
    expected = brute_force(trains(arrays), arrays["trials.goCue_times"], *grid.values())
    np.testing.assert_array_equal(cue.counts, expected)
    np.testing.assert_allclose(cue.behaviour["response-time"], 0.5)
    np.testing.assert_allclose(cue.behaviour["reaction-time"], every.behaviour["reaction-time"])


@pytest.mark.parametrize(
    "stamps",
    [
        [[1, 0], [1600, 39.975]],
        [[0, 0], [800, 20], [1599, 39.975]],
        [[11, 0.25], [1600, 39.975]],  # from 1, the first frames' times unknown
    ],
)
def test_timestamps_number_samples_from_0_or_1(variant, stamps):
    stamps = np.array(stamps, float)
    read = variant({"face.motionEnergy": np.arange(1600.0), "face.timestamps": stamps})
    middle = 3 + 3.7 * np.arange(K)[:, None] + read.times + 0.01
    np.testing.assert_allclose(read.behaviour["face-motion-energy"], 40 * middle, rtol=1e-4)


def test_what_a_recording_may_lack(variant, folder, tmp_path):
    every = steinmetz.load_session(folder)
    lost = variant({"trials.visualStim_times": lambda t: np.where(t == t[4], np.inf, t)})
    np.testing.assert_array_equal(lost.counts, np.delete(every.counts, 4, axis=0))
    assert lost.provenance["trials"]["without the event"] == 1
    outside = variant({"clusters.peakChannel": np.array([0, 3, np.nan, 99, 8, 4.0])})
    assert outside.regions.tolist() == ["", "CA1", "", "", "LP", "root"]
    needed = ("spikes.times", "spikes.clusters", "clusters.peakChannel", "trials.visualStim_times")
    bare = write_folder(tmp_path / "Cori_1", {name: make_arrays()[name] for name in needed})
    with pytest.warns(UserWarning, match="has no behaviour"):
        session = steinmetz.load_session(bare)
    assert session.behaviour == {} and set(session.neurons) == {"cluster", "channel", "allen"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spikes.times": None}, "spikes.times.npy: cannot be read"),
        ({"clusters.depths": np.full(N, None)}, "depths.npy: cannot be read"),  # pickled
        ({"spikes.clusters": lambda c: c[:-1]}, "3999 rows, but 4000"),
        ({"spikes.clusters": lambda c: c + 1}, r"ids \[6\] are not among the 6"),
        ({"wheel.timestamps": lambda a: a[::-1]}, "wheel.timestamps.npy: .*must rise"),
    ],
)
def test_bad_files_are_named(variant, changes, message):
    with pytest.raises(SessionError, match=f"session '{NAME}'.*{message}"):
        variant(changes)


def make_entry(name="Cori", date="2016-12-14", k=5, n=4):
    """A session as steinmetz_NMA.ipynb makes one."""
    rng = np.random.default_rng(1)
    return {
        "spks": rng.poisson(0.1, (n, k, 250)).astype(np.int8),
        "wheel": rng.integers(-9, 10, (1, k, 250)).astype(np.int8),
        "pupil": rng.normal(size=(3, k, 250)),
        "face": rng.normal(size=(1, k, 250)).astype(np.float32),
        "response": np.resize([-1.0, 1, 0], k),
        "response_time": rng.uniform(0.5, 2, (k, 1)),
        "contrast_right": np.resize([1.0, 0, 0], k),
        "contrast_left": np.resize([0.5, 0.25, 0], k),
        "brain_area": np.array(["VISp", "CA1", "root", "CA1"])[:n],
        "feedback_time": rng.uniform(0.5, 2, (k, 1)),
        "feedback_type": np.resize([1.0, -1], k),
        "gocue": rng.uniform(0.5, 1, (k, 1)),
        "mouse_name": name,
        "date_exp": date,
        "reaction_time": np.column_stack([[170, np.inf, *[200] * (k - 2)], np.ones(k)]),
    }


def write_bundle(path, *entries):
    np.savez_compressed(path, dat=np.array(entries, dtype=object))
    return path


def write_pickle(path, content):
    """An npz whose dat.npy goes on, after its header, with these bytes."""
    header = io.BytesIO()
    kind = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    np.lib.format.write_array_header_1_0(header, kind)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dat.npy", header.getvalue() + content)
    return path


def test_bundle_gives_sessions(tmp_path):
    entries = [make_entry(), make_entry("Hench", "2017-06-15", k=7)]
    path = write_bundle(tmp_path / "steinmetz_part0.npz", *entries)
    sessions = load_bundle(path)
    assert [s.name for s in sessions] == [NAME, "Hench_2017-06-15"]
    assert [s.subject for s in sessions] == ["Cori", "Hench"]
    for session, entry in zip(sessions, entries, strict=True):
        k = len(entry["response"])
        expected = entry["spks"][..., :200].reshape(4, k, 100, 2).sum(-1).transpose(1, 2, 0)
        np.testing.assert_array_equal(session.counts, expected)
        assert session.regions.tolist() == entry["brain_area"].tolist()
        found = session.behaviour
        turned = np.abs(entry["wheel"][0, :, :200].reshape(k, 100, 2).sum(-1, dtype=int))
        np.testing.assert_allclose(found["wheel-speed"], turned * 2 * np.pi / 1440 / 0.02)
        face = entry["face"][0, :, :200].reshape(k, 100, 2).mean(-1)
        np.testing.assert_allclose(found["face-motion-energy"], face, atol=1e-6)
        np.testing.assert_array_equal(found["choice"], entry["response"])
        contrast = entry["contrast_right"] - entry["contrast_left"]
        np.testing.assert_array_equal(found["contrast"], contrast)
        np.testing.assert_array_equal(found["reward"], entry["feedback_type"] > 0)
        np.testing.assert_array_equal(found["go-cue-time"], entry["gocue"][:, 0])
        np.testing.assert_allclose(found["reaction-time"], [0.17, np.nan, *[0.2] * (k - 2)])
    with pytest.raises(ValueError, match="multiples of 0.01 s, and the window within"):
        load_bundle(path, window=(0.2, 2.2))
    second = load_bundle(path, window=(0.0, 0.4), bin_size=0.04)[1]
    expected = entries[1]["spks"][..., 50:90].reshape(4, 7, 10, 4).sum(-1).transpose(1, 2, 0)
    np.testing.assert_array_equal(second.counts, expected)


def test_pickles_of_numpy_1(tmp_path):
    entry = make_entry()
    entry["brain_area"] = entry["brain_area"].astype(object)
    content = pickle.dumps(np.array([entry], dtype=object), protocol=2)
    content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (read,) = load_bundle(write_pickle(tmp_path / "a.npz", content))
    assert read.counts[..., 0].sum() == entry["spks"][0, :, :200].sum()
    assert read.regions.tolist() == entry["brain_area"].tolist()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")
def test_signs_and_units_of_a_real_recording(tmp_path):
    """The wheel, responses and times are real, the counts are not."""
    file = sorted(REAL.glob("*.npz"))[0]
    with np.load(file) as real:
        real = dict(real)
    reaction = np.column_stack([real["reaction_time_ms"], real["choice"]])
    entry = make_entry(*file.stem.split("_")[1:], k=len(reaction), n=1)
    entry |= {"wheel": real["wheel_10ms"][None], "response": real["choice"].astype(float)}
    entry |= {f"contrast_{side}": real[f"contrast_{side}"] for side in ("left", "right")}
    entry |= {"feedback_type": real["feedback"].astype(float), "reaction_time": reaction}
    (session,) = load_bundle(write_bundle(tmp_path / "part0.npz", entry))
    found = session.behaviour
    assert 1 < np.percentile(found["wheel-speed"], 99) < 50  # rad/s, as of a mouse
    went = (found["choice"] != 0) & (found["contrast"] != 0)
    correct = (found["choice"] == -np.sign(found["contrast"]))[went]
    np.testing.assert_array_equal(correct, found["reward"][went] == 1)
    assert 0.1 < np.nanmedian(found["reaction-time"]) < 1


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_no_pickle_runs_anything(tmp_path):
    mark = tmp_path / "ran"
    for bad in (
        Evil(os.system, f"touch {mark}"),
        Evil(open, str(mark), "w"),
        Evil(np.memmap, str(mark), "u1", "w+", 0, (9,)),
        Evil(pickle.loads, b"N."),
    ):
        path = write_bundle(tmp_path / "evil.npz", make_entry() | {"spks": bad}, None)
        with pytest.raises(SessionError, match="asks for .*, which no array needs"):
            load_bundle(path)
        assert not mark.exists()
    for content in (  # names asked for by other ways
        b"cnumpy\ndtype.__class__\n.",
        b"cnumpy._core.multiarray\n_reconstruct\nN}X\x08\x00\x00\x00__code__Ns\x86b.",
    ):
        with pytest.raises(SessionError, match="dat: cannot be read"):
            load_bundle(write_pickle(tmp_path / "evil.npz", content))
