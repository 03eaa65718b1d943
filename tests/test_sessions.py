"""Many recordings on disk: listed without reading them, chosen from, trained on in place."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mtm import Session, SessionError, Sessions, evaluate, fit
from mtm.data.collection import Entry


def make(name, seed=0, n_trials=30, n_neurons=12, **fields):
    rng = np.random.default_rng(seed)
    regions = np.resize(["CA1", "DG", "root"], n_neurons)
    counts = rng.poisson(rng.uniform(0.02, 1.0, n_neurons), (n_trials, 10, n_neurons))
    label = np.resize([1.0, 0.3], n_neurons)
    fields = {"neurons": {"label": label, "depth": np.arange(n_neurons)}} | fields
    return Session(counts, regions, name, subject=f"mouse {seed % 2}", **fields)


def on_disk(session):
    """Whether the counts lie in a mapping of a session file."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("mappings are read from /proc, which this system lacks")
    at = session.counts.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(edge, 16) for edge in line.split()[0].split("-"))
        if start <= at < stop:
            return line.endswith(".npz")
    return False


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        make(f"s{i}", i, n_trials=30 + i).save(tmp_path / f"s{i}.npz")
    return tmp_path


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("meta", {"provenance": []}),
        ("meta", {"name": 5}),
        ("listed", {"shape": [30, 10]}),
        ("listed", {"shape": [30, 10, 10**15]}),
        ("listed", {"shape": ["30", 10, 12]}),
        ("listed", {"firing_rates": [1.0]}),
        ("listed", {"firing_rates": None}),
        ("regions", np.zeros(12)),
        ("regions", np.array("CA1")),
        ("regions", np.full(12, 2**31 - 1, np.int32).view("<U1")),  # beyond Unicode
        ("meta", np.array(2**31 - 1, np.int32).view("<U1")),
    ],
)
def test_a_list_that_does_not_fit_its_file_is_refused(tmp_path, member, change):
    path = make("s").save(tmp_path / "s.npz")
    with np.load(path) as file:
        parts = {name: file[name] for name in file.files}
    if isinstance(change, dict):
        change = np.array(json.dumps(json.loads(str(parts[member])) | change))
    np.savez(path, **{**parts, member: change})
    with pytest.raises(SessionError, match="s.npz is not a readable session file"):
        Sessions(path)


def test_a_list_of_what_is_there(folder):
    sessions = Sessions(folder)
    assert sessions.names == ["s0", "s1", "s2"] and len(sessions) == 3
    assert isinstance(sessions[1], Session) and sessions[-1].name == "s2"
    assert sessions["s1"].n_trials == 31 and sessions[:2].names == ["s0", "s1"]
    assert [s.name for s in sessions] == sessions.names
    whole = Session.load(folder / "s1.npz")
    assert sessions.entries[1].firing_rates == pytest.approx(whole.firing_rates)
    table = sessions.summary().splitlines()
    assert table[2].split() == ["s1", "mouse", "1", "31", "10", "12", "2",
                                f"{whole.firing_rates.mean():.1f}"]  # fmt: skip
    assert table[-1] == "3 sessions of 2 subjects: 93 trials, 36 neurons, 0.00 GB of counts"
    with pytest.raises(KeyError, match="no session 's9'; there are: s0, s1, s2"):
        sessions["s9"]


def test_counts_stay_on_disk(folder):
    mapped, whole = Sessions(folder)[0], Session.load(folder / "s0.npz")
    assert on_disk(mapped) and not on_disk(whole)
    np.testing.assert_array_equal(mapped.counts, whole.counts)
    assert mapped.counts.flags.c_contiguous and repr(mapped) == repr(whole)
    before = (folder / "s0.npz").read_bytes()
    mapped.counts[:] = 7  # a copy of one's own
    assert (folder / "s0.npz").read_bytes() == before
    assert not on_disk(Sessions(folder, mmap=False)[0])


def test_every_kind_of_counts_is_read_in_place(tmp_path):
    rng = np.random.default_rng(0)
    for dtype, top in ((np.uint8, 9), (np.uint16, 60_000)):
        counts = rng.integers(0, top, (9, 4, 5)).astype(dtype)
        for order in (counts, np.asfortranarray(counts)):
            rates = rng.random(counts.shape, dtype=np.float32) + 0.1
            path = Session(order, rates=rates).save(tmp_path / "x.npz")
            again = Session.load(path, mmap=True)
            assert again.counts.dtype == dtype and again.counts.flags.c_contiguous
            np.testing.assert_array_equal(again.counts, counts)
            np.testing.assert_array_equal(again.rates, rates)


def test_compressed_and_damaged_files(folder):
    with np.load(folder / "s0.npz") as file:
        arrays = {key: file[key] for key in file.files}
    np.savez_compressed(folder / "small.npz", **arrays)
    assert Session.load(folder / "small.npz").name == "s0"
    with pytest.raises(SessionError, match=r"small\.npz is not a readable session file"):
        Session.load(folder / "small.npz", mmap=True)
    whole = (folder / "s0.npz").read_bytes()
    for size in range(0, len(whole), len(whole) // 40):
        (folder / "cut.npz").write_bytes(whole[:size])
        for read in (Entry.read, lambda path: Session.load(path, mmap=True)):
            with pytest.raises(SessionError, match=r"cut\.npz"):
                read(folder / "cut.npz")
    with zipfile.ZipFile(folder / "cut.npz", "w") as file:  # counts of another shape than it says
        for key, array in (arrays | {"counts": arrays["counts"][:-1]}).items():
            with file.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    with pytest.raises(SessionError):
        Session.load(folder / "cut.npz", mmap=True)


def test_what_cannot_be_listed(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Sessions(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no session"):
        Sessions(tmp_path / "empty")
    make("s0").save(folder / "again.npz")
    with pytest.raises(SessionError, match=r"again\.npz and .*s0\.npz both hold .* 's0'"):
        Sessions(folder)
    with np.load(folder / "again.npz") as file:
        arrays = dict(file)
    for key, change in (("meta", {"name": ["x"]}), ("listed", {"firing_rates": [1.0]}),
                        ("listed", {"shape": [1, 2]})):  # fmt: skip
        wrong = np.array(json.dumps(json.loads(str(arrays[key])) | change))
        np.savez(folder / "again.npz", **(arrays | {key: wrong}))
        with pytest.raises(SessionError, match=r"again\.npz is not a readable session file"):
            Sessions(folder)


def test_choosing_neurons_against_doing_it_by_hand(folder):
    chosen = Sessions(folder).filter(regions="CA1", min_rate=10, units={"label": 1})
    for session in Sessions(folder):
        keep = (session.regions == "CA1") & (session.firing_rates >= 10)
        keep &= session.neurons["label"] == 1
        if not keep.any():
            assert session.name not in chosen.names
            continue
        np.testing.assert_array_equal(chosen[session.name].counts, session.counts[:, :, keep])
        assert chosen[session.name].neurons["depth"].tolist() == np.flatnonzero(keep).tolist()
    deep = Sessions(folder).filter(units={"depth": lambda depth: depth > 5}).filter(regions=["DG"])
    assert deep[0].neurons["depth"].tolist() == [7, 10]
    assert Sessions(folder).filter(min_trials=31).names == ["s1", "s2"]
    assert Sessions(folder).filter(min_neurons=13).names == []
    saved = deep.save(folder / "deep")
    assert saved.names == deep.names and on_disk(saved[0])
    np.testing.assert_array_equal(saved[2].counts, deep[2].counts)
    assert saved[2].split().test.tolist() == Session.load(folder / "s2.npz").split().test.tolist()
    with pytest.raises(SessionError, match=r"no column 'quality' .*there are .*'label'"):
        Sessions(folder).filter(units={"quality": 1})


def test_rules_of_every_kind_and_wrong_ones(folder):
    sessions = Sessions(folder)
    several = sessions.filter(units={"label": [1.0, 0.5]})
    assert several.entries[0].neurons.tolist() == list(range(0, 12, 2))
    with pytest.raises(SessionError, match="the rule gives float64 .12,., not a bool for each"):
        sessions.filter(units={"depth": lambda depth: depth * 2.0})
    with pytest.raises(SessionError, match=r"no neuron is in \['VISp'\]; there are \['CA1', 'DG'"):
        sessions.filter(regions="VISp")
    assert "s1" in sessions and sessions["s1"] in sessions and "s9" not in sessions


def test_nothing_of_a_collection_is_written_over(folder, tmp_path):
    some = Sessions(folder).filter(regions="CA1")
    before = (folder / "s0.npz").read_bytes()
    with pytest.raises(ValueError, match="holds files of this collection"):
        some.save(folder)
    assert (folder / "s0.npz").read_bytes() == before
    other = make("other", 5)
    other.save(tmp_path / "b" / "s0.npz")
    with pytest.raises(ValueError, match="the same name"):
        Sessions([folder / "s0.npz", tmp_path / "b" / "s0.npz"]).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    saved = some.save(tmp_path / "d")[0]
    assert saved.provenance["neurons chosen"] == "4 of 12"


def test_a_file_that_changes_is_noticed(folder):
    chosen = Sessions(folder).filter(regions="CA1")
    make("s0", 3, n_neurons=9).save(folder / "s0.npz")
    with pytest.raises(SessionError, match=r"s0\.npz has changed since it was listed"):
        chosen[0]
    (folder / "s1.npz").unlink()
    with pytest.raises(SessionError, match=r"s1\.npz has changed"):
        chosen["s1"]


def test_training_from_disk_is_training_from_memory(folder):
    options = {"depth": 1, "epochs": 2, "validations": 1, "progress": False, "schemes": ["neuron"]}
    mapped, loaded = (
        fit(Sessions(folder, mmap=mmap), **options).model.state_dict() for mmap in (True, False)
    )
    assert all(torch.equal(mapped[key], value) for key, value in loaded.items())
    result = fit(Sessions(folder), **options)
    reports = [evaluate(result, Sessions(folder, mmap=mmap)["s1"]) for mmap in (True, False)]
    assert str(reports[0]) == str(reports[1]) and "co-smoothing" in str(reports[0])


def test_counts_above_255_train_too():
    session = make("wide")
    session = Session((session.counts * 9000.0).clip(max=65_535), session.regions, "wide")
    assert session.counts.dtype == np.uint16 and session.counts.max() > np.iinfo(np.int16).max
    from mtm.training import SessionData
    from mtm.training import TrainConfig

    cpu = torch.device("cpu")
    data = SessionData(session, TrainConfig(), cpu)
    batch = data.batch(torch.arange(5))
    np.testing.assert_array_equal(batch.numpy(), session.counts[:5])


def test_mapped_sessions_need_no_file_descriptors(folder):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("open files are counted in /proc, which this system lacks")
    before = len([*descriptors.iterdir()])
    held = [Sessions(folder)[0] for _ in range(50)]
    assert len([*descriptors.iterdir()]) < before + 5 and len(held) == 50


def test_four_hundred_sessions_are_listed_within_a_second(tmp_path):
    """Of 600 trials x 100 bins x 700 neurons, as their files say; counts are not looked at."""
    rng = np.random.default_rng(0)
    columns = {key: rng.random(700) for key in ("depth", "label", "x", "y", "z")}
    path = make("template", n_neurons=700, neurons=columns).save(tmp_path / "template.npz")
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files if key not in ("counts", "meta", "listed")}
    arrays["trial_ids"] = np.arange(600)
    listed = '{"shape": [600, 100, 700], "firing_rates": ' + str(rng.random(700).tolist()) + "}"
    meta = (
        '{{"format": "mtm-session", "version": 2, "name": "s{0}", "subject": "m", "bin_size": 0.02,'
        ' "window": [-0.5, 1.5], "n_recorded": 600, "provenance": {{}}}}'
    )
    path.unlink()
    for i in range(400):
        texts = {"meta": np.array(meta.format(i)), "listed": np.array(listed)}
        np.savez(tmp_path / f"s{i}.npz", **texts, **arrays, counts=np.zeros((1, 1, 1), np.uint8))
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        sessions = Sessions(tmp_path)
        best = min(best, time.perf_counter() - start)
    assert len(sessions) == 400
    assert sessions.summary().endswith("240,000 trials, 280,000 neurons, 16.80 GB of counts")
    assert best < 1.0, f"{best:.2f} s"


def test_training_keeps_counts_where_they_are(tmp_path):
    """What a process holds of its own for 40 sessions of 7 MB each, ready to train and in use.

    Pages of the files themselves are not counted: the system takes them back when it needs memory.
    """
    counts = np.random.default_rng(0).poisson(0.05, (100, 100, 700)).astype(np.uint8)
    for i in range(40):
        Session(counts, ["CA1"] * 700, f"s{i}", subject="m").save(tmp_path / f"s{i}.npz")
    code = (
        "import re, sys, torch\n"
        "from mtm import Sessions\n"
        "from mtm.training import SessionData\nfrom mtm.training import TrainConfig\n"
        "def own():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', status)[1]) / 1e3\n"
        "sessions, cpu = Sessions(sys.argv[1]), torch.device('cpu')\n"
        "before = own()\n"
        "data = [SessionData(session, TrainConfig(), cpu) for session in sessions]\n"
        "total = sum(float(s.batch(torch.from_numpy(s.train[:16])).sum()) for s in data)\n"
        "print(own() - before, sum(s.counts.nbytes for s in data) / 1e6, total > 0)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc, which this system lacks")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown, size, some = done.stdout.split()
    assert some == "True" and float(size) == 280.0
    assert float(grown) < 0.25 * float(size), done.stdout
