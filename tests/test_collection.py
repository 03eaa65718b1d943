"""Many recordings: prepared in processes and resumed; listed and chosen from without reading."""

import functools
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mtm import Session, SessionError, Sessions, TrainConfig, evaluate, fit, prepare
from mtm.batches import SessionData

ALONE = {"workers": 1, "progress": False}


def load(number, scale=1):
    """A recording: a module-level function, so that it can be sent to another process."""
    if number == 3:
        raise SessionError(f"session {number}, spikes: none; choose another")
    if number == 4:
        raise KeyError("whatever")
    if number == 5:
        warnings.warn(f"session {number}: no wheel", UserWarning, stacklevel=1)
    if number == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    counts = np.random.default_rng(number).poisson(scale, (20, 4, 3))
    return Session(counts, name=str(number), provenance={"number": number})


@pytest.mark.parametrize("workers", [1, 2])
def test_every_recording_ends_as_a_file_or_with_a_reason(tmp_path, workers):
    done = prepare(load, range(6), tmp_path, workers=workers, progress=False)
    assert [path.name for path in done.paths] == ["0.npz", "1.npz", "2.npz", "5.npz"]
    assert Sessions(done.paths).names == ["0", "1", "2", "5"]
    made = Session.load(done.paths[3]).provenance
    assert made["number"] == 5 and made["prepared"]["notes"] == ["session 5: no wheel"]
    assert done.skipped["3"] == "session 3, spikes: none; choose another"
    assert done.skipped["4"] == "KeyError: 'whatever'"
    total = "6 recordings: 4 written, 0 there already, 2 skipped"
    assert str(done).splitlines()[-3:] == ["written: 5", "    session 5: no wheel", total]


def test_a_run_is_resumed_and_other_options_make_other_files(tmp_path):
    def anything(number, **options):
        return load(number)

    first = prepare(anything, [0], tmp_path, **ALONE).paths[0].stat().st_mtime_ns
    done = prepare(anything, [0, 1], tmp_path, **ALONE)
    assert [o.status for o in done.outcomes] == ["there already", "written"]
    assert done.paths[0].stat().st_mtime_ns == first
    for options, status in (
        ({"align": np.arange(2000.0)}, "written"),
        ({"align": np.arange(2000.0)}, "there already"),
        ({"align": np.r_[np.arange(1999.0), 0]}, "written"),
        ({"token": "s3cret", "url": "http://me:s3cret@host/x?s3cret"}, "written"),
    ):
        done = prepare(anything, [0], tmp_path, **ALONE, **options)
        assert done.outcomes[0].status == status, options
    assert b"s3cret" not in done.paths[0].read_bytes()
    made = [load, *[functools.partial(load, scale=n) for n in (2, 3, 3)]]
    statuses = [prepare(each, [1], tmp_path, **ALONE).outcomes[0].status for each in made]
    assert statuses == ["written"] * 3 + ["there already"]


def from_folder(path):
    with np.load(Path(path) / "x.npz") as file:
        return Session(file["counts"], provenance={"sum": int(file["counts"].sum())})


def test_a_recording_that_changed_is_made_again(tmp_path):
    folder, out = tmp_path / "recording", tmp_path / "out"
    folder.mkdir()
    for value, status in ((1, "written"), (1, "there already"), (2, "written")):
        if status == "written":  # in place, and of the same size: the folder itself stays the same
            np.savez(folder / "x.npz", counts=np.full((20, 2, 3), value))
        done = prepare(from_folder, [folder if value == 1 else str(folder)], out, **ALONE)
        assert done.outcomes[0].status == status
        made = Session.load(out / "recording.npz")
        assert made.provenance["sum"] == 120 * value
        assert made.name == "recording"  # the function gave none


def test_nothing_but_sessions_is_written_over(tmp_path):
    path = tmp_path / "raw.npz"
    np.savez(path, counts=np.ones((9, 2, 3)), precious=np.arange(3))
    before = path.read_bytes()
    done = prepare(load, {"raw": 0}, tmp_path, **ALONE, overwrite=True)
    assert "is not written over" in str(done) and path.read_bytes() == before


def test_what_concerns_every_recording_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="two recordings are named 'x'"):
        prepare(load, ["x", "x"], tmp_path)
    with pytest.raises(RuntimeError, match="worker process .* unexpectedly terminated"):
        prepare(load, [0, 1, 99], tmp_path, workers=2, progress=False)


def slow(number):
    return Session(np.random.default_rng(number).poisson(1, (60, 50, 200)), name=str(number))


def test_killed_at_any_moment_nothing_is_half_written(tmp_path):
    """The whole run is killed, again and again, until it gets through."""
    for enough in (1, 5, 12):
        run = multiprocessing.get_context("fork").Process(
            target=prepare, args=(slow, range(30), tmp_path), kwargs=ALONE
        )
        run.start()
        while len(list(tmp_path.glob("*.npz"))) < enough:
            time.sleep(0.003)
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        for path in tmp_path.glob("*.npz"):
            assert Session.load(path).n_trials == 60
    assert len(prepare(slow, range(30), tmp_path, **ALONE).paths) == 30
    assert not list(tmp_path.glob(".*"))  # what the killed writers left behind


def make(name, seed=0, n_trials=30, n_neurons=12):
    rng = np.random.default_rng(seed)
    regions = np.resize(["CA1", "DG", "root"], n_neurons)
    counts = rng.poisson(rng.uniform(0.02, 1.0, n_neurons), (n_trials, 10, n_neurons))
    how = {"subject": f"mouse {seed % 2}", "neurons": {"depth": np.arange(n_neurons)}}
    return Session(counts, regions, name, **how)


def on_disk(counts):
    """Whether they lie in a mapping of a session file."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("mappings are read from /proc, which this system lacks")
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(edge, 16) for edge in line.split()[0].split("-"))
        if start <= counts.ctypes.data < stop:
            return line.endswith(".npz")
    return False


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        make(f"s{i}", i, n_trials=30 + i).save(tmp_path / f"s{i}.npz")
    return tmp_path


def test_listing_and_loading(folder):
    (folder / "._s0.npz").write_bytes(b"\0\5\x16\7")  # as macOS leaves them on other disks
    sessions = Sessions(folder)
    assert sessions.names == ["s0", "s1", "s2"] and len(sessions) == 3
    assert sessions["s1"].n_trials == 31 and sessions[:2].names == ["s0", "s1"]
    assert [s.name for s in sessions] == sessions.names
    whole = Session.load(folder / "s1.npz")
    row = sessions.to_frame().loc[1]
    assert row.tolist() == ["s1", "mouse 1", 31, 10, 12, 2, whole.firing_rates.mean().round(1)]
    assert "3 sessions of 2 subjects: 93 trials, 36 neurons" in repr(sessions)
    with pytest.raises(KeyError, match="no session 's9'; there are: s0, s1, s2"):
        sessions["s9"]


def test_counts_stay_on_disk(folder):
    mapped, whole = Sessions(folder)[0], Session.load(folder / "s0.npz")
    assert on_disk(mapped.counts) and not on_disk(whole.counts)
    np.testing.assert_array_equal(mapped.counts, whole.counts)
    before = (folder / "s0.npz").read_bytes()
    used = SessionData(mapped, TrainConfig(), torch.device("cpu"))  # by training
    assert on_disk(used.counts.numpy())
    mapped.counts[:] = 7  # a copy of one's own
    assert (folder / "s0.npz").read_bytes() == before
    turned = Session(np.asfortranarray(whole.counts).astype(float), name="turned")
    read = Sessions(turned.save(folder / "turned.npz"))[0].counts
    assert on_disk(read) and np.array_equal(read, whole.counts)


def test_what_cannot_be_listed(folder):
    make("s0").save(folder / "again.npz")
    with pytest.raises(SessionError, match=r"again\.npz and .*s0\.npz both hold .* 's0'"):
        Sessions(folder)
    (folder / "again.npz").write_bytes((folder / "s0.npz").read_bytes()[:-9])
    with pytest.raises(SessionError, match=r"again\.npz is damaged"):
        Sessions(folder)


def test_choosing_neurons_against_doing_it_by_hand(folder):
    chosen = Sessions(folder).filter(regions="CA1", min_rate=10)
    for session in Sessions(folder):
        keep = (session.regions == "CA1") & (session.firing_rates >= 10)
        if not keep.any():
            assert session.name not in chosen.names
            continue
        np.testing.assert_array_equal(chosen[session.name].counts, session.counts[:, :, keep])
        assert chosen[session.name].neurons["depth"].tolist() == np.flatnonzero(keep).tolist()
    deep = Sessions(folder).filter(regions=["CA1", "DG"]).filter(regions=["DG"])
    assert deep[0].neurons["depth"].tolist() == [1, 4, 7, 10]
    assert Sessions(folder).filter(min_neurons=13).names == []
    saved = deep.save(folder / "deep")
    assert saved.names == deep.names and on_disk(saved[0].counts)
    np.testing.assert_array_equal(saved[2].counts, deep[2].counts)
    assert saved[2].split().test.tolist() == Session.load(folder / "s2.npz").split().test.tolist()
    with pytest.raises(SessionError, match=r"no neuron is in \['VISp'\]; there are \['CA1', 'DG'"):
        Sessions(folder).filter(regions="VISp")
    make("s0", 3, n_neurons=9).save(folder / "s0.npz")
    with pytest.raises(SessionError, match=r"s0\.npz has changed since it was listed"):
        deep[0]


def test_training_from_disk_is_training_from_memory(folder):
    options = {"depth": 1, "epochs": 2, "validations": 1, "progress": False, "schemes": ["neuron"]}
    disk, memory = Sessions(folder), [Session.load(folder / f"s{i}.npz") for i in range(3)]
    results = [fit(sessions, **options) for sessions in (disk, memory)]
    mapped, loaded = (result.model.state_dict() for result in results)
    assert all(torch.equal(mapped[key], value) for key, value in loaded.items())
    reports = [evaluate(results[0], sessions[1]) for sessions in (disk, memory)]
    assert str(reports[0]) == str(reports[1]) and "co-smoothing" in str(reports[0])
