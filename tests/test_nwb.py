"""NWB files written with pynwb, read back and counted by brute force; damaged and odd ones."""

import functools
import json
import re
import shutil
import warnings
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

pynwb = pytest.importorskip("pynwb")
pytest.importorskip("remfile")
import h5py  # noqa: E402
from bwb_files import EDITS, damaged  # noqa: E402
from conftest import Handler, brute_force  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pynwb import behavior as nwb_behavior  # noqa: E402

from mtm.data import nwb  # noqa: E402
from mtm.session import SessionError  # noqa: E402

REAL = Path(__file__).parents[2] / "shared/data/A2929-200711.nwb"
TABLE = "general/extracellular_ephys/electrodes"
N, K, WINDOW = 6, 40, (-0.2, 0.6)
LOCATIONS = ["CA1", "CA1", "LP", "LP", "unknown", "void"]
ELECTRODES = [[0], [2, 0, 1], [2, 0, 3], [4, 3], [4, 5], []]  # of each unit
REGIONS = ["CA1", "CA1", "LP", "LP", "", ""]  # as the vote above has it
START = 2.0 + 1.5 * np.arange(K)
GO = np.where(np.arange(K) % 7 == 3, np.nan, START + 0.25)
SIDES = np.where(np.arange(K) % 3 == 0, "left", "right")
NOTES = np.where(np.arange(K) % 5 == 0, "", np.resize(["a", "b"], K))
UNITS = [7, 3, 3, 9, 1, 0]  # ids, 3 twice
RATES = np.array([3.0, 8.0, 20.0, 1.0, 12.0, 0.0])  # Hz; the last unit is silent


def spikes():
    rng = np.random.default_rng(0)
    return [np.sort(rng.uniform(-3, 70, rng.poisson(rate * 70))) for rate in RATES]


def add_units(file):
    group = file.create_electrode_group("shank", "s", "PO", file.create_device("probe"))
    file.add_electrode_column("fine", "finer location")
    for location in LOCATIONS:
        file.add_electrode(location=location, group=group, fine=location.lower())
    for column in ("quality", "snr", "brain_area", "keep"):
        file.add_unit_column(column, "c")
    for n, train in enumerate(spikes()):
        unit = {"quality": ["good", "mua"][n % 2], "snr": float(n), "keep": n < 2}
        unit |= {"brain_area": f" area {n // 3} ", "electrodes": ELECTRODES[n]}
        file.add_unit(id=UNITS[n], spike_times=train, electrode_group=group, **unit)


def add_trials(file):
    for column in ("go_time", "choice", "correct", "contrast", "side", "note", "pair"):
        file.add_trial_column(column, "c")
    for k in range(K):
        file.add_trial(
            **{"start_time": START[k], "stop_time": START[k] + 1, "go_time": GO[k]},
            **{"choice": k % 2 * 2 - 1, "correct": bool(k % 4 < 2), "pair": [1.0, 2.0]},
            **{"contrast": [0.5, np.nan, np.inf, 0.0][k % 4], "side": SIDES[k], "note": NOTES[k]},
        )


T_HEAD = 0.5 + np.arange(7000) / 100
HEAD = np.stack([np.sin(T_HEAD), T_HEAD], axis=1)


def add_series(file):
    def plain(name, data, **times):
        return pynwb.TimeSeries(**{"name": name, "data": data, "unit": "u", "rate": 1.0} | times)

    even = {"rate": 100.0, "starting_time": 0.5}
    module = file.create_processing_module("behavior", "b")
    spatial = functools.partial(nwb_behavior.SpatialSeries, name="head", reference_frame="r")
    module.add(nwb_behavior.Position(spatial_series=spatial(data=HEAD, timestamps=T_HEAD)))
    module.add(nwb_behavior.CompassDirection(spatial_series=spatial(data=HEAD[:, 0], **even)))
    module.add(nwb_behavior.PupilTracking(time_series=plain("pupil", np.arange(7000.0), **even)))
    order = np.random.default_rng(5).permutation(7000)
    data = np.append(np.where(np.arange(7000) % 9 == 0, np.nan, 4 * T_HEAD + 1)[order], 7.0)
    stamps = {"timestamps": np.append(T_HEAD[order], np.nan), "rate": None}
    file.add_acquisition(plain("messy", data, conversion=0.5, offset=2.0, **stamps))
    file.add_acquisition(plain("cube", np.zeros((5, 2, 2))))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*align_times: 2.% of the windows")  # of these
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file with everything; not to be changed."""
    file = pynwb.NWBFile("test", "recording 1", datetime(2024, 5, 1, 12, tzinfo=UTC), lab="a lab")
    file.subject = pynwb.file.Subject(subject_id="mouse 5", species="Mus musculus")
    add_units(file)
    add_trials(file)
    add_series(file)
    path = tmp_path_factory.mktemp("nwb") / "full.nwb"
    with pynwb.NWBHDF5IO(path, "w") as io:
        io.write(file)
    return path


@pytest.fixture
def edited(path, tmp_path):
    """A function that loads a copy of the file which ``edit(h5py file)`` changed."""

    def load(edit, *arguments, **options):
        copy = tmp_path / "edited.nwb"
        shutil.copy(path, copy)
        with h5py.File(copy, "r+") as file:
            edit(file)
        return nwb.load_session(copy, *arguments, **options)

    return load


def put(path, values):
    """An edit: a dataset in place of another."""

    def edit(file):
        attributes = dict(file.pop(path).attrs)
        file[path] = values
        file[path].attrs.update(attributes)

    return edit


def refusal(function, *arguments, **options):
    """The text of the SessionError, one line that names session and remedy."""
    with pytest.raises(SessionError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert re.fullmatch(r"session .+, .+: .+; .+", text), text
    return text


def test_counts_are_those_of_brute_force(path):
    session = nwb.load_session(path, window=WINDOW)
    np.testing.assert_array_equal(session.counts, brute_force(spikes(), START, WINDOW, 0.02))
    assert session.counts.shape == (K, 40, N) and not session.counts[..., 5].any()
    assert (session.name, session.subject) == ("recording 1", "mouse 5")
    assert session.regions.tolist() == REGIONS and session.region_names == ["CA1", "LP"]
    facts = json.loads(json.dumps(session.provenance))
    assert facts["origin"] == "NWB" and facts["source"] == str(path) and facts["lab"] == "a lab"
    assert facts["regions"] == "electrodes/location" and facts["align"] == "start_time"
    neurons = {key: values.tolist() for key, values in session.neurons.items()}
    assert set(neurons) == {"cluster", "quality", "snr", "brain_area", "keep"}
    assert neurons["cluster"] == UNITS and neurons["quality"] == ["good", "mua"] * 3
    text = nwb.describe(path)
    assert "units: 6 rows; columns brain_area (text)" in text and "pair (many)" in text


def test_trials_without_the_event_are_left_out_and_keep_the_split(path):
    go = nwb.load_session(path, "go_time", window=WINDOW)
    rows = np.flatnonzero(np.isfinite(GO))
    np.testing.assert_array_equal(go.counts, brute_force(spikes(), GO[rows], WINDOW, 0.02))
    assert go.trial_ids.tolist() == rows.tolist() and go.n_recorded == K
    assert go.provenance["trials"]["without the event"] == K - len(rows)
    np.testing.assert_array_equal(go.behaviour["choice"], rows % 2 * 2 - 1)
    whole = nwb.load_session(path).split()
    for part, all_of_it in zip(go.split(), whole, strict=True):
        assert rows[part].tolist() == [row for row in all_of_it if row in rows]


def test_behaviour(path):
    session = nwb.load_session(path)
    assert set(session.behaviour) == {"choice", "correct", "contrast"}
    np.testing.assert_array_equal(session.behaviour["correct"], np.arange(K) % 4 < 2)
    contrast = np.array([0.5, np.nan, np.nan, 0.0] * (K // 4))
    np.testing.assert_array_equal(session.behaviour["contrast"], contrast)
    expected = {"side": SIDES, "stop_time": START + 1, "note": NOTES}
    session = nwb.load_session(path, behaviour=list(expected))
    assert set(session.behaviour) == set(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(session.behaviour[key], values)


@pytest.mark.parametrize("kind", ["EnumData", "HDF5"])
def test_codes_are_read_as_the_words_they_stand_for(edited, kind):
    words, codes = np.array(["right", "left", "none"]), np.arange(K) % 3

    def edit(file):
        table, enum = file["intervals/trials"], {w: code for code, w in enumerate(words.tolist())}
        kinds = {"EnumData": "u1", "HDF5": h5py.enum_dtype(enum, "u1")}
        put("intervals/trials/side", codes.astype(kinds[kind]))(file)
        if kind == "EnumData":
            table["side_elements"] = words.astype(object)
            table["side"].attrs["elements"] = table["side_elements"].ref

    assert edited(edit).behaviour["side"].tolist() == words[codes].tolist()


def test_traces(path):
    x, t, turn = "Position/head[0]", "behavior/Position/head[1]", "CompassDirection/head"
    session = nwb.load_session(path, window=WINDOW, traces=[x, t, turn, "pupil", "messy"])
    middle = START[:, None] + session.times + 0.01  # (K, T): the mean of a line is its middle
    read = session.behaviour
    np.testing.assert_allclose(read[t], middle, rtol=1e-6)
    np.testing.assert_allclose(read[x], np.sin(middle), atol=1e-4)
    np.testing.assert_array_equal(read[x], read[turn])
    np.testing.assert_allclose(read["pupil"], (middle - 0.5) * 100, rtol=1e-5)
    np.testing.assert_allclose(read["messy"], 0.5 * (4 * middle + 1) + 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"align": [1.0], "behaviour": ["choice"]}, "choice"),
        ({"behaviour": ["nope"]}, "'contrast'"),
        ({"region": "electrodes/nope"}, "brain_area"),
        ({"traces": ["nope"]}, "acquisition/cube"),
        ({"traces": ["head"]}, "processing/behavior/Position/head"),
    ],
)
def test_what_is_not_there_is_named(path, options, words):
    assert words in refusal(nwb.load_session, path, **options)


def test_regions(path, edited):
    def regions(place):
        return nwb.load_session(path, region=place).regions.tolist()

    assert regions(None) == [""] * N
    assert regions("brain_area") == ["area 0"] * 3 + ["area 1"] * 3
    assert regions("electrode_group/location") == ["PO"] * N
    assert regions("electrodes/fine") == [r.lower() for r in REGIONS]

    def strip(*columns):
        def edit(file):
            for column in ("electrodes", "electrodes_index", *columns):
                del file[f"units/{column}"]

        return edit

    assert edited(strip()).provenance["regions"] == "brain_area"
    assert edited(strip("brain_area")).regions.tolist() == ["PO"] * N
    placeholders = put("units/brain_area", np.array(["N/A", "?", " tbd", "CA1", "-", "NA"], object))
    labelled = edited(placeholders, region="brain_area")
    assert labelled.region_names == ["CA1"] and (labelled.region_codes == 0).sum() == 1
    nowhere = edited(put(f"{TABLE}/location", np.array(["TBD"] * 6, object)))
    assert nowhere.provenance["regions"] == "brain_area"

    def peaks(file):  # as the Allen Institute has it: the id of an electrode, not its row
        strip()(file)
        file[f"{TABLE}/id"][:] = 100 + np.arange(6)
        file["units/peak_channel_id"] = [100, 101, 102, 103, 104, 999]

    assert edited(peaks).regions.tolist() == REGIONS


def list_all(file):
    """Every unit lists all six electrodes, as templates do."""
    put("units/electrodes", np.tile(np.arange(6), N))(file)
    put("units/electrodes_index", 6 * np.arange(1, N + 1))(file)


@pytest.mark.parametrize("name", ["peak_channel_id", "max_electrode", "maximum_amplitude_channel"])
@pytest.mark.parametrize("holds", ["ids", "rows", "reference"])
def test_the_peak_electrode_counts_where_many_are_listed(edited, name, holds):
    def edit(file):
        list_all(file)
        file[f"{TABLE}/id"][:] = 100 + np.arange(6)
        file[f"units/{name}"] = np.array([0, 3, 1, 4, 2, 2]) + 100 * (holds == "ids")
        if holds == "reference":  # to rows; then the list of all electrodes is not needed
            file[f"units/{name}"].attrs["table"] = file[TABLE].ref
            del file["units/electrodes"], file["units/electrodes_index"]

    assert edited(edit).regions.tolist() == ["CA1", "LP", "CA1", "", "LP", "LP"]


def test_a_unit_that_lists_a_whole_probe_has_no_region(edited, monkeypatch):
    monkeypatch.setattr(nwb, "WIDEST", 5)
    with pytest.warns(UserWarning, match="6 units list over 5 electrodes of several regions"):
        session = edited(list_all, region="electrodes/location")
    assert session.region_names == []


def test_times_relative_to_the_trials_are_not_taken_in_silence(edited):
    def edit(file):
        put("units/spike_times", np.tile([0.1, 0.4], 40 * N))(file)
        put("units/spike_times_index", 80 * np.arange(1, N + 1))(file)

    with pytest.raises(SessionError, match="none falls into any trial"):
        edited(edit)
    each_at_the_first = put("intervals/trials/start_time", np.zeros(K))
    assert "trials [1, 2" in refusal(edited, each_at_the_first)


def test_files_without_what_is_needed(edited):
    def rename(file):
        file.move("intervals/trials", "intervals/gratings")

    assert "no sorted spikes" in refusal(edited, lambda file: file.pop("units"))
    assert "mtm.continuous_windows" in refusal(edited, lambda f: f.pop("intervals"))
    assert "one of ['gratings'], or" in refusal(edited, rename)
    assert edited(rename, trials="gratings").n_trials == K


def test_what_is_mended(edited):
    bad = np.concatenate(spikes())
    bad[[0, 5]] = np.nan, np.inf
    with pytest.warns(UserWarning, match="session 'recording 1', spike times: left out 2"):
        session = edited(put("units/spike_times", bad), window=WINDOW)
    few = [spikes()[0][[1, 2, 3, 4, *range(6, len(spikes()[0]))]], *spikes()[1:]]
    np.testing.assert_array_equal(session.counts, brute_force(few, START, WINDOW, 0.02))
    mixed = np.concatenate([train[::-1] for train in spikes()])
    session = edited(put("units/spike_times", mixed), window=WINDOW)
    np.testing.assert_array_equal(session.counts, brute_force(spikes(), START, WINDOW, 0.02))


NAMES = [
    *("units/id", "units/electrodes", "units/snr"),
    *("units/brain_area", "units/electrodes_index", f"{TABLE}/id", f"{TABLE}/location"),
    *("intervals/trials/id", "intervals/trials/start_time", "intervals/trials/contrast"),
    *("intervals/trials/side", "intervals/trials/correct", "acquisition/messy/timestamps"),
    *("processing/behavior/Position/head/data", "processing/behavior/PupilTracking/pupil/data"),
]
OPTIONS = [
    {},
    {"align": "go_time", "region": "brain_area", "traces": ["pupil"]},
    {"align": "side", "region": None, "behaviour": ["note", "side"]},
    {"align": [0.5, np.nan, 5.0], "traces": ["messy", "Position/head[1]"]},
]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(*map(st.sampled_from, (NAMES, sorted(EDITS), OPTIONS)))
def test_damaged_files_give_a_session_or_a_session_error(path, name, edit, options):
    copy = damaged(path, name, edit)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="session '")  # ours; all others are errors
        try:
            session = nwb.load_session(copy, **options)
        except SessionError as error:
            assert re.match(r"session .+, .+: ", str(error), re.DOTALL)
            return
    assert session.n_neurons == N and session.counts.sum() <= sum(map(len, spikes())) * K


class Archive(Handler):
    """``/file`` with ranges, ``/moved`` to it, ``/whole`` without ranges."""

    content, sent = b"", 0

    def do_GET(self):
        place, ranges = self.path.partition("?")[0], self.headers.get("Range")
        if place == "/moved":
            return self.answer(b"", 302, Location="/file?signature=secret")
        size = len(self.content)
        if ranges is None:  # remfile asks for the length alone, and hangs up
            return self.answer(b"", **{"Content-Length": str(size)})
        if place == "/whole":
            return self.answer(self.content)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", ranges).groups())
        type(self).sent += last + 1 - first
        where = {"Content-Range": f"bytes {first}-{last}/{size}"}
        self.answer(self.content[first : last + 1], 206, **where)


@pytest.fixture
def archive(path, serve):
    handler = type("Handler", (Archive,), {"content": path.read_bytes()})
    handler.url = serve(handler)
    return handler


def test_streamed_is_the_same(archive, path):
    options = {"window": WINDOW, "traces": ["pupil"]}
    local = nwb.load_session(path, **options)
    session = nwb.load_session(f"{archive.url}/moved?token=secret", **options)
    np.testing.assert_array_equal(session.counts, local.counts)
    np.testing.assert_array_equal(session.behaviour["pupil"], local.behaviour["pupil"])
    assert session.name == local.name and session.regions.tolist() == REGIONS
    assert session.provenance["source"] == f"{archive.url}/moved"
    text = refusal(nwb.load_session, f"{archive.url}/whole?token=secret")
    assert "byte range" in text and "secret" not in text


def test_only_what_is_needed_is_fetched(archive, path, tmp_path):
    big = tmp_path / "big.nwb"
    shutil.copy(path, big)
    with h5py.File(big, "r+") as file:
        raw = file.create_group("acquisition/raw")
        noise = np.ones((400_000, 16), dtype=np.int16)
        raw["data"], raw["starting_time"] = noise, 0.0
        raw["starting_time"].attrs["rate"] = 30000.0
    archive.content = big.read_bytes()
    assert len(archive.content) > 12e6
    assert nwb.load_session(f"{archive.url}/file", traces=["pupil"]).n_neurons == N
    assert archive.sent < 2.5e6


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is absent")
def test_a_real_file():
    times = np.arange(700.0, 1200.0, 20.0)
    session = nwb.load_session(REAL, times, window=(0, 2), traces=["ry"])
    with warnings.catch_warnings(), pynwb.NWBHDF5IO(REAL, "r") as io:
        warnings.simplefilter("ignore")
        file = io.read()
        trains = [file.units["spike_times"][n] for n in range(15)]
        angle = file.acquisition["CompassDirection"]["ry"]
        at, values = angle.timestamps[:], angle.data[:]
    np.testing.assert_array_equal(session.counts, brute_force(trains, times, (0, 2), 0.02))
    assert session.name == "A2929-200711" and session.n_neurons == 15
    assert [np.sum(session.regions == name) for name in ("adn", "ca1")] == [7, 8]
    head = session.behaviour["ry"]
    assert head.shape == (25, 100) and np.isfinite(head).mean() > 0.99
    centres = times[:, None] + session.times + 0.01
    assert np.nanmedian(np.abs(head - np.interp(centres, at, values))) < 0.01
