"""A sorter's folder that the test writes, counted by brute force."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import brute_force

from mtm import Session, SessionError
from mtm.cli import main
from mtm.data import kilosort

RATE, WINDOW, BIN = 29999.5, (-0.25, 0.75), 0.05
EVENTS = 1.0 + 2.0 * np.arange(30)
IDS = np.array([3, 10, 17, 24, 99])  # good, noise, mua, not in a table, KSLabel alone
GROUPS = "cluster_id\tgroup\n3\tgood\n10\tnoise\n17\tmua\n50\tgood\n"  # 50 was merged
LABELS = "cluster_id\tKSLabel\n3\tmua\n10\tgood\n17\tgood\n99\tgood\n"
INFO = "cluster_id\tdepth\tgroup\n3\t120.5\tgood\n17\t40\tmua\n50\t\t\n\t10\t\n"  # as after a merge


def spikes():
    rng = np.random.default_rng(0)
    samples = np.sort(rng.integers(0, int(62 * RATE), 9000)).astype(np.uint64)
    return samples, rng.choice(IDS, 9000).astype(np.int32)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "mouse 1" / "kilosort4"
    path.mkdir(parents=True)
    samples, clusters = spikes()
    np.save(path / "spike_times.npy", samples[:, None])
    np.save(path / "spike_clusters.npy", clusters[:, None])
    np.save(path / "spike_templates.npy", clusters // 7)
    (path / "params.py").write_text(f"raise SystemExit\nsample_rate = {RATE}  # Hz\n")
    (path / "cluster_group.tsv").write_text(GROUPS)
    (path / "cluster_KSLabel.tsv").write_text(LABELS)
    (path / "cluster_info.tsv").write_text(INFO)
    (path / "._cluster_group.tsv").write_bytes(b"\0\5\x16\7")
    return path


def expected(ids, events=EVENTS, rate=RATE):
    samples, clusters = spikes()
    return brute_force([samples[clusters == i] / rate for i in ids], events, WINDOW, BIN)


def load(folder, events=EVENTS, **options):
    return kilosort.load_session(folder, events, **{"window": WINDOW, "bin_size": BIN} | options)


def test_clusters_and_counts(folder):
    session = load(folder, regions={3: "CA1", 10: "CA1", 99: "LP"})
    np.testing.assert_array_equal(session.counts, expected([3, 17, 24, 99]))
    assert session.name == "kilosort4" and session.regions.tolist() == ["CA1", "", "", "LP"]
    assert session.neurons["cluster"].tolist() == [3, 17, 24, 99]
    assert session.neurons["quality"].tolist() == ["good", "mua", "", "good"]
    np.testing.assert_array_equal(session.neurons["depth"], [120.5, 40, np.nan, np.nan])
    assert (session.provenance["clusters"], session.provenance["sample_rate"]) == (5, RATE)
    few = load(folder, units="good", name="a", sample_rate=30000.0)
    np.testing.assert_array_equal(few.counts, expected([3, 99], rate=30000.0))
    assert few.name == "a" and few.neurons["cluster"].tolist() == [3, 99]


def test_a_folder_before_phy(folder):
    for path in folder.glob("cluster_*"):
        path.unlink()
    (folder / "spike_clusters.npy").unlink()
    np.save(folder / "spike_times.npy", spikes()[0].astype(np.int64))
    (folder / "params.py").write_text("sample_rate = 3_0e3\r\n")
    session = load(folder)
    assert session.neurons["cluster"].tolist() == [0, 1, 2, 3, 14]
    assert session.neurons["quality"].tolist() == [""] * 5
    np.testing.assert_array_equal(session.counts, expected(IDS, rate=30000.0))


def test_events_from_files(folder, tmp_path):
    events = np.where(np.arange(30) == 4, np.nan, EVENTS)
    kept, good = np.delete(np.arange(30), 4), expected([3, 99], np.delete(EVENTS, 4))
    columns = {"trial": np.arange(30), "go": events, "move_time": events, "side": ["a", "b"] * 15}
    pd.DataFrame(columns).to_csv(folder / "trials.csv")
    np.save(tmp_path / "events.npy", events[:, None])
    pair = {"choice": np.arange(30) % 2, "speed": np.ones((30, 20))}
    for given, options, names in (
        ("trials.csv", {"align": "go"}, ["trial"]),
        (tmp_path / "events.npy", {"behaviour": pair}, ["choice", "speed"]),
        (events, {"traces": {"pupil": (np.arange(0, 70, 0.1), np.ones(700))}}, []),
    ):
        session = load(folder, given, units="good", **options)
        np.testing.assert_array_equal(session.counts, good)
        assert session.trial_ids.tolist() == kept.tolist() and session.n_recorded == 30
        assert [key for key in session.behaviour if key != "pupil"] == names
    choice = load(folder, events, behaviour=pair).behaviour["choice"]
    np.testing.assert_array_equal(choice, kept % 2)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("spike_times.npy", {}, "spike_times.npy: missing; pass"),
        ("params.py", {}, "params.py: no sample_rate in it; pass sample_rate="),
        ("cluster_*.tsv", {"units": "good"}, "no cluster is left of 5; pass units="),
        ("", {"events": np.ones((30, 2))}, r"one time for each trial, got shape \(30, 2\)"),
        ("", {"events": "two.csv"}, r"no such event; align to one of \['a', 'b'\]"),
    ],
)
def test_what_is_missing_is_named(folder, change, options, message):
    (folder / "two.csv").write_text("a,b\n1,2\n")
    for path in folder.glob(change or "none"):
        path.unlink()
    with pytest.raises(SessionError, match=f"session 'kilosort4', .*{message}"):
        load(folder, **options)


def test_times_in_seconds(folder):
    np.save(folder / "spike_times.npy", spikes()[0] / RATE)
    with pytest.raises(SessionError, match="not whole samples.*Session.from_spike_times"):
        load(folder)


def test_prepare_names_sessions_by_the_folders_above(folder, tmp_path):
    """Every sorter's folder is called alike; the events of each lie in it."""
    other = shutil.copytree(folder, tmp_path / "mouse 2" / "kilosort4")
    for path, events in ((folder, EVENTS), (other, EVENTS[:20])):
        np.save(path / "events.npy", events)
    names = ["mouse 1_kilosort4", "mouse 2_kilosort4"]
    command = ["prepare", "kilosort", str(folder), str(other), "--out", str(tmp_path / "out")]
    command += ["--align-times", "events.npy", "--units", "good", "--workers", "1"]
    assert main(command) == 0
    made = [Session.load(tmp_path / "out" / f"{name}.npz") for name in names]
    assert [session.name for session in made] == names
    assert [session.n_trials for session in made] == [30, 20]
