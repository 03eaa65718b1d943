"""ALF out, ONE's index, and back in, against the session that was written and what ONE reads."""

import json
import logging
import re
import shutil
import uuid
import warnings
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

pytest.importorskip("one")
pytest.importorskip("iblatlas")
import pandas as pd  # noqa: E402
from conftest import Handler  # noqa: E402
from iblatlas.regions import BrainRegions  # noqa: E402

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
    tolerances = {"reaction-time": 1e-9, "wheel-speed": 0.05, "whisker-motion-energy": 0.1}
    for key, far in tolerances.items():
        np.testing.assert_allclose(read.behaviour[key], written.behaviour[key], atol=far)
        pair = read.behaviour[key].ravel(), written.behaviour[key].ravel()
        assert np.corrcoef(*pair)[0, 1] > 0.99
    assert read.provenance["camera"] == "left"
    assert read.provenance["collections"]["probe01"] == "alf/probe01/pykilosort"
    assert Session.load(read.save(tree.parent / "s.npz")).provenance == read.provenance


def litter(alf):
    """What macOS leaves beside a file, and what a person does."""
    for name in ("._spikes.times.npy", "spikes.times copy.npy", ".DS_Store"):
        (alf / SORTING / name).write_bytes(b"\0\5\x16\7")
    (alf / SORTING / f"channels.{LOCATIONS} copy.npy").write_bytes(b"\0")


def sites(alf):
    """Regions of the probe's sites, of which channels are some."""
    path = alf / SORTING / f"channels.{LOCATIONS}.npy"
    ids = np.load(path)
    path.unlink()
    np.save(alf / f"probe00/electrodeSites.{LOCATIONS}.npy", np.r_[997, 997, 997, ids])
    np.save(alf / SORTING / "channels.rawInd.npy", 3 + np.arange(len(ids)))


def another_sorting(alf):
    """Without regions of its own."""
    shutil.copytree(alf / SORTING, alf / "probe00/iblsorter")
    (alf / f"probe00/iblsorter/channels.{LOCATIONS}.npy").unlink()


def half_a_sorting(alf):
    another_sorting(alf)
    (alf / "probe00/iblsorter/spikes.clusters.npy").unlink()


def no_sorter(alf):
    for file in (alf / "probe01/pykilosort").iterdir():
        shutil.move(file, alf / "probe01" / file.name)


def trials_in_files(alf):
    """A file for each column, as in older recordings."""
    table = pd.read_parquet(alf / "_ibl_trials.table.pqt")
    for name in table:
        np.save(alf / f"_ibl_trials.{name}.npy", table[name].to_numpy())
    (alf / "_ibl_trials.table.pqt").unlink()


PLACES = (litter, sites, another_sorting, half_a_sorting, no_sorter, trials_in_files)


@pytest.mark.parametrize("change", PLACES)
def test_the_same_session_from_other_files(variant, read, change):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "session '.*iblsorter: not all")
        found = variant(change)
    np.testing.assert_array_equal(found.counts, read.counts)
    np.testing.assert_array_equal(found.regions, read.regions)
    for key, values in read.behaviour.items():
        np.testing.assert_array_equal(found.behaviour[key], values)
    newer = "iblsorter" if change is another_sorting else "pykilosort"
    assert found.provenance["collections"]["probe00"] == f"alf/probe00/{newer}"


def test_last_revision_is_the_default(variant):
    def revise(alf):
        for revision in ("2024-01-01", "2025-05-05"):
            new = alf / SORTING / f"#{revision}#"
            new.mkdir()
            np.save(new / "clusters.depths.npy", np.full(8, float(revision[3])))

    read = variant(revise)
    assert np.all(read.neurons["depth"][:8] == 5) and np.all(read.neurons["depth"][8:] != 5)
    assert read.provenance["revisions"] == {f"alf/{SORTING}/clusters.depths.npy": "2025-05-05"}


def test_regions_at_each_level_against_iblatlas(tree, read):
    table, ids = BrainRegions(), read.neurons["allen_id"]
    for level in ("Allen", "Beryl", "Cosmos"):
        expected = table.id2acronym(ids, mapping=level).tolist()
        assert read.neurons[level.lower()].tolist() == expected
    assert load(tree, atlas="Cosmos").regions.tolist() == expected


def test_good_units(tree, read, variant):
    good, labels = load(tree, units="good"), read.neurons["label"]
    assert 0 < good.n_neurons < N
    np.testing.assert_array_equal(good.counts, read.counts[:, :, labels >= 1])
    with pytest.warns(UserWarning, match="probe00.*metrics: no cluster has a label"):
        good = variant(remove("probe00/**/*.metrics.pqt"), units="good")
    keep = (labels >= 1) & (PROBES == "probe01")
    np.testing.assert_array_equal(good.counts, read.counts[:, :, keep])

    def lose(alf):  # IBL's metrics leave out clusters without a spike
        path = alf / SORTING / "clusters.metrics.pqt"
        pd.read_parquet(path).iloc[[5, 0, 3]].to_parquet(path)

    lost = variant(lose)
    known = np.isin(np.arange(N), [0, 3, 5, *range(8, N)])
    np.testing.assert_array_equal(lost.neurons["label"], np.where(known, labels, np.nan))


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
    def spoil(alf):
        table = pd.read_parquet(alf / "_ibl_trials.table.pqt")
        table.loc[3, "stimOn_times"] = np.nan
        table.loc[5, "firstMovement_times"] = table.loc[5, "stimOn_times"] + 0.01
        table.loc[6, ["choice", "feedbackType"]] = [0.0, np.nan]
        table.loc[7, ["contrastLeft", "contrastRight"]] = np.nan
        table.to_parquet(alf / "_ibl_trials.table.pqt")

    written = make_session()
    kept = variant(spoil)
    np.testing.assert_array_equal(kept.counts, np.delete(written.counts, 3, axis=0))
    assert np.isnan(kept.behaviour["reward"]).nonzero()[0].tolist() == [5]
    assert np.isnan(kept.behaviour["contrast"]).nonzero()[0].tolist() == [6]
    filtered = variant(spoil, trial_filter="reaction-time")
    np.testing.assert_array_equal(filtered.counts, np.delete(written.counts, [3, 5, 6], axis=0))
    assert filtered.trial_ids.tolist() == np.delete(np.arange(K), [3, 5, 6]).tolist()
    for few, all_ in zip(filtered.split(), kept.split(), strict=True):  # of the whole recording
        assert set(filtered.trial_ids[few]) == set(kept.trial_ids[all_]) - {5, 6}


@pytest.mark.parametrize("pause", [slice(20, K), slice(20, 25)])
def test_trials_that_a_probe_did_not_record_are_not_observed(variant, pause):
    """It stops, or pauses: half of the neurons then only seem silent."""

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


def test_cameras(read, variant):
    energy = read.behaviour["whisker-motion-energy"]

    def empty(alf):
        for name in ("_ibl_leftCamera.times.npy", "leftCamera.ROIMotionEnergy.npy"):
            shutil.copy(alf / name, alf / name.replace("left", "right"))
            edit_array(name, lambda values: values[:0])(alf)

    right = variant(empty)
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
        times = np.repeat(np.arange(0, stop, 0.013), 2)  # doubled samples
        np.save(alf / "_ibl_wheel.timestamps.npy", times)
        np.save(alf / "_ibl_wheel.position.npy", np.where(times == times[1000], np.nan, -2 * times))

    speed = variant(rotate).behaviour["wheel-speed"]
    np.testing.assert_allclose(speed[1:-1], 2, rtol=1e-4)


ERRORS = [  # a damage, options, words of the error
    (remove("spikes.times.npy"), {}, "no spike sorting"),
    (remove("channels.b*"), {}, "atlas=None"),
    (remove("*.metrics.pqt"), {"units": "good"}, "units=None"),
    (remove("nothing"), {"align": "laserOn_times"}, "laserOn_times: no such.*'stimOn_times'"),
    (edit_array(f"{SORTING}/spikes.clusters.npy", lambda c: c[:-1]), {}, "different sortings"),
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
    assert variant(broken, probes=["probe00"]).n_neurons == 8
    with pytest.warns(UserWarning, match="alf/probe01: no histology; its clusters have no region"):
        read = variant(remove("probe01/**/channels.*"))
    assert read.regions.tolist() == [*REGIONS[:8], *["void"] * 12]
    assert variant(remove("channels.brain*"), atlas=None).region_names == []  # needs no histology
    with pytest.raises(SessionError, match=r"probe07.*there are \['probe00', 'probe01'\]"):
        load(tree, probes=["probe00", "probe07"])


def test_units_without_a_channel_have_no_region(variant):
    name = f"{SORTING}/clusters.channels.npy"
    lose = edit_array(name, lambda channels: np.r_[channels[:-2].astype(float), np.nan, -1])
    with pytest.warns(UserWarning, match="clusters.channels: 2 clusters without a channel"):
        read = variant(lose)
    np.testing.assert_array_equal(read.counts, make_session().counts)
    assert read.regions.tolist() == [*REGIONS[:6], "void", "void", *REGIONS[8:]]


def test_search(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "copy")
    other = make_session("other", "MOUSE-2")
    other.regions[:] = "VISp5"
    write_alf(other, root / "other")
    shutil.move(root / "other/simlab", root / "otherlab")
    shutil.rmtree(write_alf(make_session("third", "MOUSE-3"), root) / "alf/probe00")
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
    with pytest.raises(ValueError, match="region 'V1' is not an acronym"):
        ibl.search(one, region="V1")
    with pytest.raises(SessionError, match=r"5dcee0eb.*ibl\.search"):
        ibl.load_session(one, "5dcee0eb-b34d-4652-acc3-d10afc6eae68")


class Alyx(Handler):
    """As much of IBL's server as ONE asks for: log-in, schema, one session, its files."""

    tree = None

    def do_GET(self):
        if self.path.startswith("/public/"):
            path = Path(unquote(self.path.removeprefix("/public/")))
            name = re.sub(r"\.[0-9a-f-]{36}(?=\.\w+$)", "", path.name)
            return self.answer((self.tree / path.parent / name).read_bytes())
        if self.headers.get("Authorization") != "Token t0ken":
            return self.say(403, {"detail": "Invalid credentials"})
        if self.path == "/me":
            return self.say(200, {"username": "someone"})
        if self.path == "/api/schema":
            paths = {"/sessions/{id}": {"get": {}}, "/sessions": {"get": {}}}
            return self.say(200, {"paths": paths})
        if self.path.startswith(f"/sessions/{EID}"):
            return self.say(200, self.session())
        return self.say(404, {"detail": "Not found."})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        right = self.path == "/auth-token" and body == "username=someone&password=secret"
        self.say(*(200, {"token": "t0ken"}) if right else (400, {"detail": "no"}))

    def session(self):
        table = pd.read_parquet(self.tree / "datasets.pqt").loc[EID]
        place = "https://data/public/simlab/Subjects/MOUSE-1.a/2026-01-02/001"
        facts = {"hash": None, "default_revision": "True", "qc": "NOT_SET"}
        files = [
            {"id": i, "data_url": f"{place}/{row.rel_path}", "file_size": row.file_size, **facts}
            for i, row in table.iterrows()
        ]
        found = {"url": f"https://alyx/sessions/{EID}", "subject": "MOUSE-1.a", "lab": "simlab"}
        found |= {"start_time": "2026-01-02T12:00:00", "number": 1, "task_protocol": ""}
        return found | {"projects": [], "data_dataset_session_related": files}

    def say(self, status, facts):
        self.answer(json.dumps(facts).encode(), status)


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

    with pytest.raises(requests.HTTPError, match="authentication failed"):
        ibl.connect(username="someone", password="wrong", base_url=server)
    cache = tmp_path / "cache"
    one = ibl.connect(cache, username="someone", password="secret", base_url=server)
    remote, local = ibl.load_session(one, EID), read
    np.testing.assert_array_equal(remote.counts, local.counts)
    assert (remote.name, remote.subject) == (local.name, local.subject)
    assert remote.provenance == {**local.provenance, "server": server}
    for key, values in local.behaviour.items():
        np.testing.assert_array_equal(remote.behaviour[key], values)
    for key, values in local.neurons.items():
        np.testing.assert_array_equal(remote.neurons[key], values)
    # `prepare` logs in again, with what ONE has saved.
    done = ibl.prepare(one, [EID, "5dcee0eb"], tmp_path / "out", workers=1, progress=False)
    assert Session.load(done.paths[0]).provenance["server"] == server
    assert done.paths[0].stem == EID and list(done.skipped) == ["5dcee0eb"]
    # A token alone, then the saved one; and what was downloaded, without the server.
    assert ibl.connect(cache, token="t0ken", base_url=server).alyx.user == "someone"
    assert ibl.connect(cache, username="someone", base_url=server).alyx.is_logged_in
    one.save_cache()
    offline = ibl.load_session(ibl.connect(cache), EID)
    np.testing.assert_array_equal(offline.counts, local.counts)
    assert capfd.readouterr() == ("", "")
