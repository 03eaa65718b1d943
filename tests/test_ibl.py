"""ALF out, ONE's index, and back in, against the session that was written and what ONE reads."""

import json
import logging
import re
import shutil
import uuid
import warnings
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

pytest.importorskip("one")
pytest.importorskip("iblatlas")
import pandas as pd  # noqa: E402

from mtm.data import ibl  # noqa: E402
from mtm.data.ibl import LOCATIONS  # noqa: E402
from mtm.data.synthetic import index_alf, write_alf  # noqa: E402
from mtm.session import Session, SessionError  # noqa: E402

K, T, N, BIN, WINDOW = 40, 100, 20, 0.02, (-0.5, 1.5)
REGIONS = np.repeat(["CA1", "DG-mo", "LP", "PO", "SCig"], 4)
PROBES = np.where(np.isin(REGIONS, ["CA1", "DG-mo"]), "probe00", "probe01")
SORTING = "probe00/pykilosort"
EID = "056ffb5d-3b6a-5a97-b190-f08833c01c47"  # of make_session() at its default place, for ever


def make_session(name="hand-made", subject="MOUSE-1.a"):
    rng = np.random.default_rng(3)
    counts = rng.poisson(rng.uniform(0.05, 0.6, N), (K, T, N))
    counts[..., 7] = 0  # a neuron that never fires
    choice = rng.choice([-1, 1], K)
    contrast = rng.choice([-1.0, -0.25, -0.0625, 0.0, 0.125, 1.0], K)
    reward = np.where(contrast == 0, rng.integers(2, size=K), np.sign(contrast) == -choice)
    time = WINDOW[0] + BIN * (np.arange(T) + 0.5)
    reaction = rng.uniform(0.1, 0.9, K)
    since = (time[None, :] - reaction[:, None]) / 0.4
    speed = np.where((since > 0) & (since < 1), np.sin(np.pi * since.clip(0, 1)) ** 2, 0)
    energy = 5 + np.sin(7 * time + rng.uniform(0, 6, (K, 1))) + speed
    behaviour = {"choice": choice, "contrast": contrast, "reward": reward.astype(int)}
    behaviour |= {"block": rng.choice([0.2, 0.5, 0.8], K), "reaction-time": reaction}
    behaviour |= {"wheel-speed": 3 * speed, "whisker-motion-energy": energy}
    neurons = {"probe": PROBES, "uuid": np.array([str(uuid.UUID(int=i)) for i in range(N)])}
    neurons |= {"depth": rng.uniform(0, 3800, N), "label": rng.choice([1 / 3, 2 / 3, 1.0], N)}
    return Session(counts, REGIONS, name, subject, BIN, WINDOW, behaviour, neurons)


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path):
    """An empty home, nobody to answer a prompt, and every warning an error."""

    def asked(*args):
        raise AssertionError(f"asked for input: {args}")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("getpass.getpass", asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*utcnow")  # of ONE, from Python 3.12 on
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    write_alf(make_session(), root)
    index_alf(root)
    return root


@pytest.fixture(scope="module")
def read(tree):
    """The session as it comes back; not to be changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ibl.load_session(ibl.connect(tree), EID)


@pytest.fixture
def variant(tree, tmp_path):
    """A function that loads a copy of the tree in which ``edit(alf folder)`` changed something."""

    def load(edit, **options):
        root = tmp_path / f"variant-{uuid.uuid4().hex}"
        shutil.copytree(tree, root)
        edit(next(root.glob("simlab/Subjects/*/*/001/alf")))
        index_alf(root)
        return ibl.load_session(ibl.connect(root), EID, **options)

    return load


def load(root, **options):
    return ibl.load_session(ibl.connect(root), EID, **options)


def edit_trials(change):
    def edit(alf):
        table = pd.read_parquet(alf / "_ibl_trials.table.pqt")
        change(table)
        table.to_parquet(alf / "_ibl_trials.table.pqt")

    return edit


def remove(name):
    return lambda alf: [file.unlink() for file in alf.glob(f"**/{name}")]


def edit_array(name, change):
    return lambda alf: np.save(alf / name, change(np.load(alf / name)))


def test_round_trip_gives_back_the_session(tree, caplog):
    written = make_session()
    with caplog.at_level(logging.WARNING):
        read = load(tree)
    assert not caplog.records  # ONE logs its complaints about hashes
    assert read.counts.dtype == np.uint8
    np.testing.assert_array_equal(read.counts, written.counts)
    np.testing.assert_array_equal(read.regions, written.regions)
    for column in ("probe", "depth", "label", "uuid"):
        np.testing.assert_array_equal(read.neurons[column], written.neurons[column])
    np.testing.assert_array_equal(read.neurons["allen"], REGIONS)
    np.testing.assert_array_equal(read.neurons["cluster"], [*range(8), *range(12)])
    assert (read.window, read.bin_size, read.subject) == (WINDOW, BIN, "MOUSE-1.a")
    for key in ("choice", "block", "reward", "contrast"):
        np.testing.assert_array_equal(read.behaviour[key], written.behaviour[key])
    for key, far in {
        "reaction-time": 1e-9,
        "wheel-speed": 0.05,
        "whisker-motion-energy": 0.1,
    }.items():
        np.testing.assert_allclose(read.behaviour[key], written.behaviour[key], atol=far)
        pair = read.behaviour[key].ravel(), written.behaviour[key].ravel()
        assert np.corrcoef(*pair)[0, 1] > 0.99
    assert read.provenance["camera"] == "left"
    assert read.provenance["collections"]["probe01"] == "alf/probe01/pykilosort"
    assert Session.load(read.save(tree.parent / "s.npz")).provenance == read.provenance


def test_counts_equal_direct_binning_of_the_files(tree):
    alf = next(tree.glob("simlab/Subjects/*/*/001/alf"))
    times = [np.load(alf / p / "pykilosort/spikes.times.npy") for p in ("probe00", "probe01")]
    ids = [np.load(alf / p / "pykilosort/spikes.clusters.npy") for p in ("probe00", "probe01")]
    trials = pd.read_parquet(alf / "_ibl_trials.table.pqt")
    grid = {"window": (-0.2, 0.4), "bin_size": 0.05}
    spikes = np.concatenate(times), np.concatenate([ids[0], ids[1] + 8])
    events = trials["feedback_times"].to_numpy()
    direct = Session.from_spike_times(*spikes, events, clusters=np.arange(N), **grid)
    read = load(tree, align="feedback_times", **grid)
    np.testing.assert_array_equal(read.counts, direct.counts)


def test_stray_files_are_no_datasets(tree, variant):
    """What macOS leaves beside a file, and what a person does."""

    def litter(alf):
        for name in ("._spikes.times.npy", "spikes.times copy.npy", ".DS_Store"):
            (alf / SORTING / name).write_bytes(b"\0\5\x16\7")
        (alf / SORTING / f"channels.{LOCATIONS} copy.npy").write_bytes(b"\0")

    np.testing.assert_array_equal(variant(litter).counts, make_session().counts)


def test_last_revision_is_the_default(variant):
    def revise(alf):
        for revision, shift in (("2024-01-01", 1.0), ("2025-05-05", 2.0)):
            new = alf / SORTING / f"#{revision}#"
            new.mkdir()
            np.save(new / "clusters.depths.npy", np.full(8, shift))

    read = variant(revise)
    assert np.all(read.neurons["depth"][:8] == 2.0) and np.all(read.neurons["depth"][8:] != 2.0)
    assert read.provenance["revisions"] == {f"alf/{SORTING}/clusters.depths.npy": "2025-05-05"}


def test_write_needs_only_the_essential(tmp_path):
    session = make_session(subject="")
    for key in ("reaction-time", "wheel-speed", "whisker-motion-energy"):
        del session.behaviour[key]
    session.neurons.clear()
    session.regions = np.array(["", "root", "id 123456789", *REGIONS[3:]])
    write_alf(session, tmp_path)
    eid = next(iter(index_alf(tmp_path)))
    with pytest.warns(UserWarning) as caught:
        read = ibl.load_session(ibl.connect(tmp_path), eid)
    assert {"wheel-speed", "whisker-motion-energy"} == {
        re.search(r"no behaviour '(.*)'", str(w.message))[1] for w in caught
    }
    np.testing.assert_array_equal(read.counts, session.counts)
    assert read.subject == "hand-made" and set(read.neurons["probe"]) == {"probe00"}
    assert read.regions.tolist()[:4] == ["void", "root", "id 123456789", "CA1"]
    assert "reaction-time" not in read.behaviour  # it is not known of any trial


def test_regions_at_each_level_against_iblatlas(tree, read):
    from iblatlas.regions import BrainRegions

    table = BrainRegions()
    for level in ("Allen", "Beryl", "Cosmos"):
        one_by_one = [table.id2acronym(i, mapping=level)[0] for i in read.neurons["allen_id"]]
        assert one_by_one == read.neurons[level.lower()].tolist()
    assert load(tree, atlas="Cosmos").regions.tolist() == one_by_one


def test_good_units(tree, read, variant):
    every, good = read, load(tree, units="good")
    keep = every.neurons["label"] >= 1
    assert 0 < keep.sum() < N
    np.testing.assert_array_equal(good.counts, every.counts[:, :, keep])
    np.testing.assert_array_equal(good.neurons["uuid"], every.neurons["uuid"][keep])

    def lose(alf):  # IBL's metrics leave out clusters without a spike
        path = alf / SORTING / "clusters.metrics.pqt"
        pd.read_parquet(path).iloc[[5, 0, 3]].to_parquet(path)

    lost = variant(lose)
    known = np.isin(np.arange(N), [0, 3, 5, *range(8, N)])
    np.testing.assert_array_equal(
        lost.neurons["label"], np.where(known, every.neurons["label"], np.nan)
    )


def test_a_probe_whose_clusters_have_no_labels(variant, read):
    with pytest.warns(UserWarning, match="probe00.*metrics: no cluster has a label"):
        good = variant(remove("probe00/**/*.metrics.pqt"), units="good")
    keep = (read.neurons["label"] >= 1) & (PROBES == "probe01")
    np.testing.assert_array_equal(good.counts, read.counts[:, :, keep])


@pytest.mark.parametrize(
    "place", ["sites", "sites with rawInd", "another sorting", "half a sorting"]
)
def test_where_histology_and_sorting_may_lie(variant, place):
    """The sites of the probe, of which channels are some; the channels of another sorting."""

    def change(alf):
        sorting, newer = alf / SORTING, alf / "probe00/iblsorter"
        ids = np.load(sorting / f"channels.{LOCATIONS}.npy")
        if place.startswith("sites"):
            (sorting / f"channels.{LOCATIONS}.npy").unlink()
            raw = np.arange(len(ids)) + 3 * ("rawInd" in place)
            sites = np.full(len(ids) + 3, 997)
            sites[raw] = ids
            np.save(alf / f"probe00/electrodeSites.{LOCATIONS}.npy", sites)
            if "rawInd" in place:
                np.save(sorting / "channels.rawInd.npy", raw)
            return
        shutil.copytree(sorting, newer)
        (newer / f"channels.{LOCATIONS}.npy").unlink()
        if place == "half a sorting":
            (newer / "spikes.clusters.npy").unlink()

    read = variant(change)
    np.testing.assert_array_equal(read.regions, REGIONS)
    np.testing.assert_array_equal(read.counts, make_session().counts)


@pytest.mark.parametrize("columns", [["firstMovement_times", "stimOn_times"], None])
def test_trials_in_files_of_their_own(variant, read, columns):
    """Some columns, or all of them, as in older recordings."""

    def split(alf):
        path = alf / "_ibl_trials.table.pqt"
        table = pd.read_parquet(path)
        for name in columns or table:
            np.save(alf / f"_ibl_trials.{name}.npy", table.pop(name).to_numpy())
        path.unlink() if columns is None else table.to_parquet(path)

    found = variant(split)
    np.testing.assert_array_equal(found.counts, read.counts)
    for key, values in read.behaviour.items():
        np.testing.assert_array_equal(found.behaviour[key], values)


def test_sorter_folders(variant):
    def newer(alf):
        shutil.copytree(alf / SORTING, alf / "probe00/iblsorter")
        np.save(alf / "probe00/iblsorter/clusters.depths.npy", np.full(8, -1.0))
        for file in (alf / "probe01/pykilosort").iterdir():
            shutil.move(file, alf / "probe01" / file.name)
        (alf / "probe01/clusters.uuids.csv").unlink()

    read = variant(newer)
    assert read.provenance["collections"] == {
        "probe00": "alf/probe00/iblsorter",
        "probe01": "alf/probe01",
    }
    assert np.all(read.neurons["depth"][:8] == -1)
    np.testing.assert_array_equal(read.counts, make_session().counts)
    assert set(read.neurons["uuid"][8:]) == {""}


def test_reaction_time_filter_by_hand():
    good = {"stimOn_times": 100.0, "firstMovement_times": 100.3, "goCue_times": 100.0}
    good |= {"feedback_times": 101.0, "choice": 1.0, "feedbackType": -1.0, "probabilityLeft": 0.5}
    moved, fed = "firstMovement_times", "feedback_times"
    cases = [
        ({}, True),
        *[({moved: t}, 100.08 < t < 102) for t in (99.0, 100.079, 100.081, 101.999, 102.001)],
        *[({fed: t}, t < 110) for t in (109.999, 110.001)],
        *[({"choice": c}, c != 0) for c in (-1.0, 0.0, 1.0)],
        *[({name: np.nan}, name == "goCue_times") for name in good],
    ]
    table = pd.DataFrame([{**good, **change} for change, _ in cases])
    assert ibl.reaction_time_filter(table).tolist() == [keep for _, keep in cases]


def test_bad_trials_are_kept_counted_or_dropped(variant):
    def spoil(table):
        table.loc[3, "stimOn_times"] = np.nan
        table.loc[5, "firstMovement_times"] = table.loc[5, "stimOn_times"] + 0.01
        table.loc[6, ["choice", "feedbackType"]] = [0.0, np.nan]
        table.loc[7, ["contrastLeft", "contrastRight"]] = np.nan

    written = make_session()
    kept = variant(edit_trials(spoil))
    np.testing.assert_array_equal(kept.counts, np.delete(written.counts, 3, axis=0))
    assert np.isnan(kept.behaviour["reward"]).nonzero()[0].tolist() == [5]
    assert np.isnan(kept.behaviour["contrast"]).nonzero()[0].tolist() == [6]
    filtered = variant(edit_trials(spoil), trial_filter="reaction-time")
    np.testing.assert_array_equal(filtered.counts, np.delete(written.counts, [3, 5, 6], axis=0))
    assert filtered.trial_ids.tolist() == np.delete(np.arange(K), [3, 5, 6]).tolist()
    for few, all_ in zip(filtered.split(), kept.split(), strict=True):  # of the whole recording
        assert set(filtered.trial_ids[few]) == set(kept.trial_ids[all_]) - {5, 6}


@pytest.mark.parametrize("pause", [slice(20, K), slice(20, 25)])
def test_trials_that_a_probe_did_not_record_are_not_observed(variant, pause):
    """It stops before a trial, or pauses: half of the neurons then only seem silent."""

    def stop(alf):
        events = pd.read_parquet(alf / "_ibl_trials.table.pqt")["stimOn_times"].to_numpy()[pause]
        folder = alf / "probe01/pykilosort"
        times = np.load(folder / "spikes.times.npy")
        kept = (times < events[0] - 0.5) | (times > events[-1] + 1.5)
        for name in ("times", "clusters"):
            edit_array(f"spikes.{name}.npy", lambda values: values[kept])(folder)

    read = variant(stop)
    expected = np.ones((K, read.n_neurons), dtype=bool)
    expected[pause, read.neurons["probe"] == "probe01"] = False
    np.testing.assert_array_equal(read.observed, expected)
    np.testing.assert_array_equal(read.counts, make_session().counts * expected[:, None])
    assert variant(stop, probes=["probe00"]).observed is None  # the other probe went on


def test_cameras(read, variant):
    energy = read.behaviour["whisker-motion-energy"]

    def rename(alf):
        for name in ("_ibl_leftCamera.times.npy", "leftCamera.ROIMotionEnergy.npy"):
            (alf / name).rename(alf / name.replace("left", "right"))

    right = variant(rename)
    assert right.provenance["camera"] == "right"
    np.testing.assert_array_equal(right.behaviour["whisker-motion-energy"], energy)
    # Surplus times belong to frames before the video began.
    early = edit_array("_ibl_leftCamera.times.npy", lambda times: np.r_[-0.2, -0.1, np.nan, times])
    np.testing.assert_array_equal(variant(early).behaviour["whisker-motion-energy"], energy)
    with pytest.warns(UserWarning, match="leftCamera.*rightCamera.*whisker-motion-energy"):
        none = variant(remove("leftCamera.ROIMotionEnergy.npy"))
    assert "whisker-motion-energy" not in none.behaviour


def test_wheel_speed_of_a_known_rotation(variant):
    """Constant 2 rad/s throughout, sampled as an encoder does: at steps, not at times."""

    def rotate(alf):
        stop = np.load(alf / "_ibl_wheel.timestamps.npy")[-1]
        times = np.arange(0, stop, 0.013)
        np.save(alf / "_ibl_wheel.timestamps.npy", np.repeat(times, 2))  # doubled samples
        position = np.repeat(-2 * times, 2)
        position[1000] = np.nan
        np.save(alf / "_ibl_wheel.position.npy", position)

    speed = variant(rotate).behaviour["wheel-speed"]
    np.testing.assert_allclose(speed[1:-1], 2, rtol=1e-4)


ERRORS = [  # a damage, options, words of the error
    (remove("spikes.times.npy"), {}, "no spike sorting"),
    (remove("_ibl_trials.table.pqt"), {}, "trials.table: no such dataset"),
    (remove("channels.b*"), {}, "atlas=None"),
    (remove("*.metrics.pqt"), {"units": "good"}, "units=None"),
    (remove("nothing"), {"align": "laserOn_times"}, "laserOn_times: no such.*'stimOn_times'"),
    (edit_trials(lambda t: t.__setitem__("stimOn_times", np.nan)), {}, "trials: none is left"),
    (edit_array(f"{SORTING}/spikes.clusters.npy", lambda c: c[:-1]), {}, "different sortings"),
    (edit_array(f"{SORTING}/clusters.channels.npy", lambda c: c[:-2]), {}, "different sortings"),
    (lambda alf: (alf / SORTING / "spikes.times.npy").write_bytes(b"half"), {}, "spikes.times.npy"),
    (edit_trials(lambda t: t.__setitem__("choice", "left")), {}, "trials.table.pqt"),
]


@pytest.mark.parametrize("damage, options, message", ERRORS)
def test_errors_name_session_dataset_and_remedy(variant, damage, options, message):
    with pytest.raises(SessionError, match=rf"(?s){EID}.*{message}"):
        variant(damage, **options)


def test_what_one_of_two_probes_lacks(variant, tree):
    """A probe without spikes is left out with a word; half a sorting has a remedy."""
    with pytest.warns(UserWarning, match="probe01: no spike sorting; it is left out"):
        read = variant(remove("probe01/**/spikes.times.npy"))
    np.testing.assert_array_equal(read.counts, make_session().counts[..., :8])
    broken = remove("probe01/**/clusters.channels.npy")
    with pytest.raises(SessionError, match="probe01.*/clusters.channels.*leave its probe out"):
        variant(broken)
    read = variant(broken, probes=["probe00"])
    np.testing.assert_array_equal(read.counts, make_session().counts[..., :8])
    with pytest.warns(UserWarning, match="alf/probe01: no histology; its clusters have no region"):
        read = variant(remove("probe01/**/channels.*"))
    np.testing.assert_array_equal(read.counts, make_session().counts)
    assert read.regions.tolist() == [*REGIONS[:8], *["void"] * 12]
    assert variant(remove("channels.brain*"), atlas=None).region_names == []  # needs no histology
    with pytest.raises(SessionError, match=r"probe07.*there are \['probe00', 'probe01'\]"):
        load(tree, probes=["probe00", "probe07"])


def test_units_without_a_channel_have_no_region(variant):
    name = f"{SORTING}/clusters.channels.npy"
    for nothing in (np.nan, -1):
        lose = edit_array(name, lambda c, x=nothing: np.r_[c[:-2].astype(float), [x, x]])
        with pytest.warns(UserWarning, match="clusters.channels: 2 clusters without a channel"):
            read = variant(lose)
        np.testing.assert_array_equal(read.counts, make_session().counts)
        assert read.regions[6:8].tolist() == ["void", "void"] and "void" not in read.region_names
        assert read.regions[:6].tolist() == make_session().regions[:6].tolist()


def test_unknown_sessions_and_options(tree):
    one = ibl.connect(tree)
    absent = "5dcee0eb-b34d-4652-acc3-d10afc6eae68"
    with pytest.raises(SessionError, match=rf"{absent}.*ibl\.search"):
        ibl.load_session(one, absent)
    for options in ({"atlas": "Swanson"}, {"trial_filter": "all"}, {"units": "best"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ibl.load_session(one, EID, **options)


def test_connect_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index_alf.*username.*token.*/signup"):
        ibl.connect(tmp_path)
    with pytest.raises(ValueError, match="No Alyx username"):
        ibl.connect(password="secret", base_url="http://localhost:9")
    with pytest.raises(ValueError, match="'me'.*is saved.*/me"):  # asks neither user nor network
        ibl.connect(username="me", base_url="http://localhost:9")


def test_search(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "copy")
    other = make_session("other", "MOUSE-2")
    other.regions[:] = "VISp5"
    write_alf(other, root / "other")
    shutil.move(root / "other/simlab", root / "otherlab")
    shutil.rmtree(write_alf(make_session("third", "MOUSE-3"), root) / "alf/probe00")
    write_alf(make_session("bare", "MOUSE-4"), root)
    for folder in root.glob("simlab/Subjects/MOUSE-4/*/*/alf/probe*"):
        shutil.rmtree(folder)
    subject = {eid: path.parts[-3] for eid, path in index_alf(root).items()}
    one = ibl.connect(root)

    def found(**terms):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # one probe is without a sorting
            return sorted(subject[eid] for eid in ibl.search(one, **terms))

    assert found() == ["MOUSE-1.a", "MOUSE-2", "MOUSE-3"]  # with spikes
    assert found(lab="otherlab") == ["MOUSE-2"] == found(subject="MOUSE-2")
    assert found(region="CA1") == found(region="HPF") == ["MOUSE-1.a"]
    assert found(region="TH") == found(region="PO") == ["MOUSE-1.a", "MOUSE-3"]
    assert found(region="VISp") == ["MOUSE-2"] and found(region="CB") == []
    assert found(date_range="2026-01-02", subject="MOUSE-1") == ["MOUSE-1.a"]
    with pytest.raises(ValueError, match="region 'V1' is not an acronym"):
        ibl.search(one, region="V1")


def test_prepare_writes_what_load_session_gives(tree, read, tmp_path):
    root = shutil.copytree(tree, tmp_path / "copy")
    bad = write_alf(make_session("bad", "MOUSE-2"), root)
    next(bad.rglob("spikes.clusters.npy")).unlink()
    blind = write_alf(make_session("blind", "MOUSE-3"), root)
    next(blind.rglob("leftCamera.ROIMotionEnergy.npy")).unlink()
    eids = {path.parts[-3]: eid for eid, path in index_alf(root).items()}
    one = ibl.connect(root)
    done = ibl.prepare(one, ibl.search(one), tmp_path / "out", workers=2, progress=False)
    assert sorted(path.stem for path in done.paths) == sorted([eids["MOUSE-1.a"], eids["MOUSE-3"]])
    (reason,) = [o.note for o in done.outcomes if o.status == "skipped"]
    assert eids["MOUSE-2"] in reason and "spikes.clusters: no such dataset" in reason
    assert "no behaviour 'whisker-motion-energy'" in str(done)
    written = Session.load(tmp_path / "out" / f"{EID}.npz")
    np.testing.assert_array_equal(written.counts, read.counts)
    assert written.provenance["eid"] == EID


class Alyx(BaseHTTPRequestHandler):
    """As much of IBL's server as ONE asks for: log-in, schema, one session, its files."""

    tree = None

    def do_GET(self):
        allowed = self.headers.get("Authorization") == "Token t0ken"
        if self.path.startswith("/public/"):
            path = Path(unquote(self.path.removeprefix("/public/")))
            name = re.sub(r"\.[0-9a-f-]{36}(?=\.\w+$)", "", path.name)
            return self.answer(200, (self.tree / path.parent / name).read_bytes())
        if not allowed:
            return self.answer(403, {"detail": "Invalid credentials"})
        if self.path == "/me":
            return self.answer(200, {"username": "someone"})
        if self.path == "/api/schema":
            paths = {"/sessions/{id}": {"get": {}}, "/sessions": {"get": {}}}
            return self.answer(200, {"paths": paths})
        if self.path.startswith(f"/sessions/{EID}"):
            return self.answer(200, self.session())
        return self.answer(404, {"detail": "Not found."})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        right = self.path == "/auth-token" and body == "username=someone&password=secret"
        self.answer(*(200, {"token": "t0ken"}) if right else (400, {"detail": "no"}))

    def session(self):
        table = pd.read_parquet(self.tree / "datasets.pqt").loc[EID]
        place = "https://data/public/simlab/Subjects/MOUSE-1.a/2026-01-02/001"
        facts = {"hash": None, "default_revision": "True", "qc": "NOT_SET"}
        files = [
            {"id": i, "data_url": f"{place}/{row.rel_path}", "file_size": row.file_size, **facts}
            for i, row in table.iterrows()
        ]
        return {
            **{"url": f"https://alyx/sessions/{EID}", "subject": "MOUSE-1.a", "lab": "simlab"},
            **{"start_time": "2026-01-02T12:00:00", "number": 1, "task_protocol": ""},
            **{"projects": [], "data_dataset_session_related": files},
        }

    def answer(self, status, body):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tree, serve, monkeypatch):
    """Address of a stand-in for the public server that hands out the tree."""
    import one.params

    Alyx.tree = tree
    url = serve(Alyx)
    defaults = one.params.default().set("HTTP_DATA_SERVER", f"{url}/public")
    monkeypatch.setattr(one.params, "default", lambda: defaults)
    return url


def test_the_same_code_reads_a_server(read, tmp_path, server, capfd):
    """Against a stand-in for Alyx; the real one cannot be reached from a test."""
    import requests
    from joblib.externals.loky import get_reusable_executor

    with pytest.raises(requests.HTTPError, match="authentication failed"):
        ibl.connect(username="someone", password="wrong", base_url=server)
    cache = tmp_path / "cache"
    one = ibl.connect(cache, username="someone", password="secret", base_url=server)
    remote, local = ibl.load_session(one, EID), read
    np.testing.assert_array_equal(remote.counts, local.counts)
    assert (remote.name, read.subject) == (local.name, local.subject)
    assert remote.provenance == {**local.provenance, "server": server}
    for key, values in local.behaviour.items():
        np.testing.assert_array_equal(remote.behaviour[key], values)
    for key, values in local.neurons.items():
        np.testing.assert_array_equal(remote.neurons[key], values)
    # Processes of their own log in with what ONE has saved.
    get_reusable_executor().shutdown()  # those of earlier tests have another home
    done = ibl.prepare(one, [EID], tmp_path / "out", workers=2, progress=False)
    assert Session.load(done.paths[0]).provenance["server"] == server, done
    # A token alone, then the saved one; and what was downloaded, without the server.
    assert ibl.connect(cache, token="t0ken", base_url=server).alyx.user == "someone"
    assert ibl.connect(cache, username="someone", base_url=server).alyx.is_logged_in
    one.save_cache()
    offline = ibl.load_session(ibl.connect(cache), EID)
    np.testing.assert_array_equal(offline.counts, local.counts)
    assert capfd.readouterr() == ("", "")


def test_tables_and_files_that_are_incomplete(tmp_path):
    """An empty camera, metrics without labels, a spike without a time, an event of its own file."""
    alf = write_alf(make_session(), tmp_path) / "alf"
    for name in ("_ibl_leftCamera.times.npy", "leftCamera.ROIMotionEnergy.npy"):
        shutil.copy(alf / name, alf / name.replace("left", "right"))
        edit_array(name, lambda values: values[:0])(alf)
    table = alf / SORTING / "clusters.metrics.pqt"
    pd.read_parquet(table).drop(columns="label").to_parquet(table)
    edit_array(f"{SORTING}/spikes.times.npy", lambda times: np.r_[times[:-1], np.nan])(alf)
    onset = pd.read_parquet(alf / "_ibl_trials.table.pqt")["stimOn_times"].to_numpy()
    np.save(alf / "_ibl_trials.stimOff_times.npy", onset + 0.1)
    index_alf(tmp_path)
    one = ibl.connect(tmp_path)
    with pytest.warns(UserWarning, match="left out 1 spikes without a time"):
        found = ibl.load_session(one, EID, align="stimOff_times", probes=["probe00"])
    assert found.provenance["camera"] == "right" and found.n_trials == K
    assert not np.isnan(found.behaviour["whisker-motion-energy"]).all()
