"""BrainWideBench files: what is read against what was written, damaged files, listing."""

import hashlib
import warnings
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("h5py")
import h5py  # noqa: E402
from bwb_files import EDITS, REGIONS, SUBJECT, counted, damaged, held_out, write_session  # noqa: E402
from conftest import Handler  # noqa: E402

from mtm import bwb, cli  # noqa: E402
from mtm.bwb import files, submission  # noqa: E402
from mtm.session import Session, SessionError  # noqa: E402

SMALL = {"duration": 160.0, "chunk": 40.0, "gap": 4.0, "units": 6}
TRACES = {
    "whisker-motion-energy": ("whisker", "whisker_motion_energy"),
    "wheel-speed": ("wheel", "wheel_speed"),
    "licking-rate": ("licks", "licking_rate"),
    "left-paw-speed": ("paws", "left_paw_speed"),
    "right-paw-speed": ("paws", "right_paw_speed"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file, and what is in it; not to be changed."""
    path = tmp_path_factory.mktemp("bwb") / "eval.h5"
    return path, write_session(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("bwb") / "small.h5"
    write_session(path, **SMALL)
    return path


@pytest.mark.parametrize("regime", ["eval", "pretrain"])
def test_what_was_written_is_read(tmp_path, regime):
    path = tmp_path / "any name.h5"
    made = write_session(path, seed=4, regime=regime, strings=regime == "eval")
    session = bwb.load_session(path)
    assert (session.name, session.subject) == (made["id"], SUBJECT)
    assert (session.window, session.bin_size) == ((-0.5, 1.5), 0.02)
    trials, units = made["trials"], made["units"]
    np.testing.assert_array_equal(session.behaviour["event-time"], trials["stim_on_time"])
    expected = counted(made, trials["stim_on_time"] - 0.5, 2.0)
    np.testing.assert_array_equal(session.counts, expected)
    named = {"id": "uuid", "cluster_id": "cluster", "depths": "depth", "label": "label"}
    for column, name in (named | {f"region_{level}": level for level in REGIONS}).items():
        np.testing.assert_array_equal(session.neurons[name], units[column])
    names = dict(zip(made["probes"]["id"], made["probes"]["name"], strict=True))
    assert session.neurons["probe"].tolist() == [names[i] for i in units["probe_id"]]
    assert session.regions.tolist() == units["region_allen"].tolist()
    flag = "ts2_co_smoothing_is_held_out_test"
    assert (flag in session.neurons) == (regime == "eval")
    if regime == "eval":
        np.testing.assert_array_equal(session.neurons[flag], held_out(units["id"], "test"))
    expected = {"unit_filtering": "selected_units", "file": "any name.h5", "absent": []}
    assert expected.items() <= session.provenance.items()


def test_behaviours_of_trials(written):
    path, made = written
    behaviour, trials = bwb.load_session(path, align="start").behaviour, made["trials"]
    assert {0, 1, 2} == set(trials["choice"])
    for k in range(len(trials["start"])):
        assert behaviour["choice"][k] == {0: -1, 1: 1, 2: 0}[trials["choice"][k]]
        assert behaviour["reward"][k] == trials["reward"][k]
        left, right = trials["contrast_left"][k], trials["contrast_right"][k]
        assert behaviour["contrast"][k] == (-left if np.isnan(right) else right)
    np.testing.assert_array_equal(behaviour["block"], trials["probability_left"])
    reaction = trials["movement_onset_time"] - trials["stim_on_time"]
    np.testing.assert_array_equal(behaviour["reaction-time"], reaction)


@pytest.mark.parametrize("irregular", [(), ("whisker", "paws", "licks", "wheel")])
def test_behaviours_of_bins_against_a_fine_grid(tmp_path, irregular):
    made = write_session(tmp_path / "s.h5", irregular=irregular)
    session = bwb.load_session(tmp_path / "s.h5", align="go_cue_time", window=(-0.2, 0.8))
    for name, (group, column) in TRACES.items():
        series = made["series"][group]
        times, values = series["times"], series[column]
        if name == "licking-rate":  # the count of the 20 ms that begin with the sample
            times = times + 0.01
        if group == "paws":
            trusted = series[column.replace("paw_speed", "paw_confident").join(["is_", ""])]
            assert 0.8 < trusted.mean() < 0.97
            times, values = times[trusted], values[trusted]
        binned = session.behaviour[name]
        assert np.isfinite(binned).mean() > (0.5 if group == "paws" else 0.999)
        assert (group == "paws") == bool(np.isnan(binned).any())  # longer gaps than 0.2 s
        for k, b in [(0, 0), (5, 20), (40, 49), (60, 3)]:
            start = session.behaviour["event-time"][k] - 0.2 + 0.02 * b
            grid = np.interp(start + 0.02 * (np.arange(4000) + 0.5) / 4000, times, values)
            if np.isfinite(binned[k, b]):
                np.testing.assert_allclose(binned[k, b], grid.mean(), rtol=1e-4, atol=1e-4)


def test_given_times_and_other_bins(written):
    path, made = written
    times = np.array([300.0, np.nan, 20.0, 1e9, -5.0, 100.25, 519.9])
    session = bwb.load_session(path, align=times, window=(0.0, 0.5), bin_size=0.1, split=None)
    assert session.trial_ids.tolist() == [0, 2, 5] and session.n_recorded == 7
    assert session.provenance["trials"]["not observed"] == 3
    assert session.given_split is None
    np.testing.assert_array_equal(session.counts, counted(made, [300.0, 20, 100.25], 0.5, 0.1))


def test_trials_without_the_event_and_not_valid_ones(written):
    path, trials = written[0], written[1]["trials"]
    session = bwb.load_session(path, align="movement_onset_time", window=(-1, 0))
    moved = np.flatnonzero(np.isfinite(trials["movement_onset_time"]))
    assert session.trial_ids.tolist() == moved.tolist()
    session = bwb.load_session(path, trial_filter="valid")
    assert session.trial_ids.tolist() == np.flatnonzero(trials["is_valid"]).tolist()


def test_what_a_probe_that_stopped_did_not_record_is_not_observed(tmp_path):
    path = tmp_path / "s.h5"
    made = write_session(path, rate=9.0)
    stopped = made["units"]["probe_id"] == made["probes"]["id"][1]
    with h5py.File(path, "r+") as file:
        late = stopped[made["spikes"]["unit_index"]] & (made["spikes"]["timestamps"] > 300)
        for name, values in made["spikes"].items():
            del file[f"spikes/{name}"]
            file[f"spikes/{name}"] = values[~late]
    session = bwb.load_session(path)
    after = session.behaviour["event-time"] + 1.5 > 300.2
    np.testing.assert_array_equal(session.observed, ~(after[:, None] & stopped))
    starts = bwb.ts2_windows(path, "test")  # the benchmark scores all
    assert submission.BenchmarkSession(path).session(starts).observed is None


def test_groups_may_be_absent(tmp_path):
    write_session(tmp_path / "s.h5", leave_out=("whisker", "licks", "paws/right_paw_speed"))
    session = bwb.load_session(tmp_path / "s.h5", atlas="Cosmos")
    absent = ["whisker-motion-energy", "licking-rate", "right-paw-speed"]
    assert session.provenance["absent"] == absent
    assert not set(absent) & set(session.behaviour)
    assert set(session.region_names) <= set(REGIONS["cosmos"])


@pytest.mark.parametrize("split", ["ts1", "ts2", "pretrain"])
def test_trials_belong_to_the_part_they_lie_in(tmp_path, split):
    regime = "pretrain" if split == "pretrain" else "eval"
    made = write_session(tmp_path / "s.h5", regime=regime, seed=2)
    session = bwb.load_session(tmp_path / "s.h5", split=split, window=(-1.0, 1.0))
    parts, outside = session.given_split._asdict(), 0
    for k, event in enumerate(session.behaviour["event-time"]):
        home = [
            part
            for part in parts
            for a, b in made["splits"].get(f"{split}_{part}", [])
            if a <= event - 1 and event + 1 <= b
        ]
        assert [part for part in parts if k in parts[part]] == home
        outside += not home
    assert session.provenance["trials"]["in no part of the split"] == outside > 0
    assert len(parts["train"]) > len(parts["val"]) > 0


SPLITS = [
    ("eval", "selected_units", "ts2"),
    ("eval", "all_units", "ts1"),
    ("pretrain", "all_units", "pretrain"),
]


@pytest.mark.parametrize(("regime", "build", "split"), SPLITS)
def test_the_split_follows_the_build(tmp_path, regime, build, split):
    write_session(tmp_path / "s.h5", regime=regime, filtering=build, **SMALL)
    for align in ("stim_on_time", "ts2"):
        session = bwb.load_session(tmp_path / "s.h5", align=align)
        assert session.provenance["split"] == split
    if regime == "pretrain":
        with pytest.raises(SessionError, match="'ts1': not in the file; pass one of .'pretrain'."):
            bwb.load_session(tmp_path / "s.h5", split="ts1")


def windows(made, part, stride=0.02):
    """The rule of the benchmark's sequential sampler, one interval and step after the other."""
    starts = []
    for a, b in made["hulls"]:
        for c, d in made["splits"][f"ts2_{part}"]:
            begin, end = max(a, c), min(b, d)
            if end - begin < 1.0:
                continue
            steps = torch.arange(begin, end, stride, dtype=torch.float64).tolist()
            mine = [t for t in steps if t + 1.0 <= end]
            if mine[-1] + 1.0 < end:
                mine.append(end - 1.0)
            starts += mine
    return np.array(sorted(starts))


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_windows_are_the_benchmarks_to_the_last_bit(written, part):
    path, made = written
    for stride in (0.02, 0.06, 1.0):
        starts = bwb.ts2_windows(path, part, stride)
        assert starts.dtype == np.float64 and len(starts) > 20
        np.testing.assert_array_equal(starts, windows(made, part, stride))  # equal, not close


def test_windows_as_trials(written):
    path, made = written
    session = bwb.load_session(path, align="ts2")
    starts = session.behaviour["event-time"]
    assert session.window == (0.0, 1.0) and session.counts.shape[1] == 50
    for part, trials in session.given_split._asdict().items():
        np.testing.assert_array_equal(starts[trials], windows(made, part, 1.0))
    assert sum(map(len, session.given_split)) == session.n_trials
    np.testing.assert_array_equal(session.counts, counted(made, starts, 1.0))
    with pytest.raises(ValueError, match="a window that starts at 0"):
        bwb.load_session(path, align="ts2", window=(-1.0, 1.0))
    longer = bwb.load_session(path, align="ts2", window=(0, 2.0), bin_size=0.04)
    assert longer.counts.shape[1] == 50 and 0 < longer.n_trials < session.n_trials


ERRORS = [
    ("spikes", "drop", "spikes/timestamps: not in the file; download"),
    ("trials/stim_on_time", "drop", "no such event; there are .*'feedback_time'"),
    ("spikes/unit_index", "NaN", "cannot be read"),
    ("spikes/timestamps", "milliseconds", "spikes: none falls into any trial"),
]


@pytest.mark.parametrize(("name", "edit", "message"), ERRORS)
def test_errors_name_session_dataset_and_remedy(small, name, edit, message):
    with pytest.raises(SessionError, match=f"^session '[-0-9a-z]+', .*{message}"):
        bwb.load_session(damaged(small, name, edit))


NAMES = [
    *("spikes/timestamps", "spikes/unit_index", "units/id", "units/region_allen", "trials"),
    *("trials/stim_on_time", "trials/choice", "task_aligned_intervals/domain/start", "session"),
    *("ts2_test_domain/start", "wheel/wheel_speed", "paws/is_left_paw_confident", "licks"),
]
OPTIONS = [
    {},
    {"align": "ts2"},
    {"align": "movement_onset_time", "window": (-1, 0), "split": "ts1", "trial_filter": "valid"},
    {"align": [30.0, 31.0, np.nan], "atlas": None, "split": None, "bin_size": 0.1},
]


@settings(max_examples=40, deadline=None)
@given(*map(st.sampled_from, (NAMES, sorted(EDITS), OPTIONS)))
def test_damaged_files_give_a_session_or_a_session_error(small, name, edit, options):
    path = damaged(small, name, edit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = bwb.load_session(path, **options)
    except SessionError as error:
        assert str(error).startswith("session ")
        return
    assert len(session.neurons["uuid"]) == session.n_neurons
    assert np.isfinite(session.behaviour["event-time"]).all()


IDS = [f"{i:08x}-0000-4000-8000-000000000000" for i in range(5)]
PREFIX = "brainsets/selected_units/ibl_brain_wide_bench_2026/eval/"


class Bucket(Handler):
    """The part of S3 that is used: lists of two entries a page, and the files."""

    body, log_in, asked = b"content", False, []

    def do_GET(self):
        url = urlsplit(self.path)
        type(self).asked.append(url.path)
        etag = hashlib.md5(self.body).hexdigest()
        if url.path != "/":
            return self.answer(self.body, ETag=f'"{etag}"')
        query = parse_qs(url.query)
        prefix, after = query["prefix"][0], query.get("continuation-token", [""])[0]
        keys = [PREFIX + name for name in (*(f"{i}.h5" for i in IDS), "README")]
        keys = [key for key in keys if key.startswith(prefix) and key > after]
        facts = f"<ETag>&quot;{etag}&quot;</ETag><Size>{len(self.body)}</Size>"
        items = [f"<Contents><Key>{key}</Key>{facts}</Contents>" for key in keys[:2]]
        if keys[2:]:
            items.append(f"<NextContinuationToken>{keys[1]}</NextContinuationToken>")
        text = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        text += f"{''.join(items)}</ListBucketResult>"
        self.answer(b"<html>please log in" if self.log_in else text.encode())


@pytest.fixture
def bucket(serve):
    """A stand-in for the bucket: its handler's class, with its address as ``url``."""
    handler = type("Handler", (Bucket,), {"asked": []})
    handler.url = serve(handler)
    return handler


def test_listing_follows_the_pages(bucket):
    entries = bwb.list_sessions(base_url=bucket.url)
    assert [entry.uuid for entry in entries] == IDS and len(bucket.asked) == 3
    bucket.log_in = True
    with pytest.raises(ConnectionError, match="cannot list.*check the network"):
        bwb.list_sessions(base_url=bucket.url)


def test_sessions_are_fetched_by_the_beginning_of_their_ids(bucket, tmp_path, small, monkeypatch):
    bucket.body = small.read_bytes()
    (path,) = bwb.fetch(IDS[1][:8], tmp_path, base_url=bucket.url, progress=False)
    assert path == tmp_path / PREFIX.removeprefix("brainsets/") / f"{IDS[1]}.h5"
    assert path.read_bytes() == bucket.body
    with pytest.raises(ConnectionError, match="list"):
        bwb.fetch("0802", tmp_path, base_url=bucket.url)
    monkeypatch.setattr(files, "BUCKET", bucket.url)
    command = ["prepare", "bwb", "--sessions", IDS[2][:8], "--out", str(tmp_path), "--workers", "1"]
    assert cli.main([*command, "--window", "0", "1"]) == 0
    (made,) = tmp_path.glob("*.npz")
    assert Session.load(made).n_bins == 50
