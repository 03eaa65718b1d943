"""BrainWideBench files: what is read against what was written, bad files, downloads that fail."""

import hashlib
import shutil
import time
import warnings
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("h5py")
import h5py  # noqa: E402
from bwb_files import LAB, REGIONS, SUBJECT, held_out, write_session  # noqa: E402

from mtm import bwb  # noqa: E402
from mtm.binning import bin_spikes  # noqa: E402
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


def counted(made, starts, length, bin_size=0.02):
    """Spikes of each bin, one window and unit after the other: the benchmark's formula."""
    times, unit = made["spikes"]["timestamps"], made["spikes"]["unit_index"]
    bins = round(length / bin_size)
    counts = np.zeros((len(starts), bins, len(made["units"]["id"])), dtype=int)
    for k, start in enumerate(starts):
        inside = (times >= start) & (times < start + length)
        place = np.floor((times[inside] - start) * round(1 / bin_size)).astype(int)
        np.add.at(counts[k], (place, unit[inside]), 1)
    return counts


# ------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("strings", ["table", "array"])
@pytest.mark.parametrize("regime", ["eval", "pretrain"])
def test_what_was_written_is_read(tmp_path, strings, regime):
    path = tmp_path / "any name.h5"
    irregular = ("whisker",) if strings == "array" else ()
    made = write_session(path, seed=4, regime=regime, strings=strings, irregular=irregular)
    session = bwb.load_session(path)
    assert (session.name, session.subject) == (made["id"], SUBJECT)
    assert (session.window, session.bin_size) == ((-0.5, 1.5), 0.02)
    trials, units = made["trials"], made["units"]
    np.testing.assert_array_equal(session.behaviour["event-time"], trials["stim_on_time"])
    expected = counted(made, trials["stim_on_time"] - 0.5, 2.0)
    np.testing.assert_array_equal(session.counts, expected)
    for column, name in {
        **{"id": "uuid", "cluster_id": "cluster", "depths": "depth", "x": "x", "label": "label"},
        **{"firing_rate": "firing_rate", "channels": "channels", "qc_neural": "qc_neural"},
        **{f"region_{level}": level for level in REGIONS},
    }.items():
        np.testing.assert_array_equal(session.neurons[name], units[column])
    names = dict(zip(made["probes"]["id"], made["probes"]["name"], strict=True))
    assert session.neurons["probe"].tolist() == [names[i] for i in units["probe_id"]]
    assert session.regions.tolist() == units["region_allen"].tolist()
    for part in ("test", "val"):
        flag = f"ts2_co_smoothing_is_held_out_{part}"
        assert (flag in session.neurons) == (regime == "eval")
        if regime == "eval":
            np.testing.assert_array_equal(session.neurons[flag], held_out(units["id"], part))
            assert session.neurons[flag].dtype == bool and session.neurons[flag].sum() == 1
    origin = session.provenance
    assert (origin["lab"], origin["regime"], origin["derived_version"]) == (LAB, regime, "0.1.0")
    assert (origin["unit_filtering"], origin["subject"]) == ("selected_units", SUBJECT)
    assert (origin["file"], origin["absent"]) == ("any name.h5", [])
    again = Session.load(session.save(tmp_path / "s.npz"))
    assert again.provenance == origin
    np.testing.assert_array_equal(again.behaviour["event-time"], session.behaviour["event-time"])


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
    # Signs agree: an animal is rewarded for the side where the stimulus was.
    shown = behaviour["contrast"] != 0
    right = np.sign(behaviour["contrast"]) == -behaviour["choice"]
    np.testing.assert_array_equal(right[shown], behaviour["reward"][shown] == 1)


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


def test_series_of_either_kind_are_the_same(tmp_path):
    write_session(tmp_path / "a.h5")
    write_session(tmp_path / "b.h5", irregular=("whisker", "paws", "licks", "wheel"))
    a, b = bwb.load_session(tmp_path / "a.h5"), bwb.load_session(tmp_path / "b.h5")
    for name in TRACES:
        np.testing.assert_allclose(a.behaviour[name], b.behaviour[name], rtol=1e-4, atol=1e-4)


def test_given_times_and_other_bins(written):
    path, made = written
    times = np.array([300.0, np.nan, 20.0, 1e9, -5.0, 100.25, 519.9])
    session = bwb.load_session(path, align=times, window=(0.0, 0.5), bin_size=0.1, split=None)
    assert session.behaviour["event-time"].tolist() == [300.0, 20.0, 100.25]
    assert session.trial_ids.tolist() == [0, 2, 5] and session.n_recorded == 7
    assert session.provenance["trials"] == {
        **{"in the recording": 7, "without the event": 1, "beyond the recording": 3}
    }
    assert session.given_split is None and set(session.behaviour) == {"event-time", *TRACES}
    np.testing.assert_array_equal(session.counts, counted(made, [300.0, 20, 100.25], 0.5, 0.1))


def test_trials_without_the_event_and_not_valid_ones(written):
    path, made = written
    missing, valid = np.isnan(made["trials"]["movement_onset_time"]), made["trials"]["is_valid"]
    assert missing.any() and (~valid & ~missing).any()
    session = bwb.load_session(path, align="movement_onset_time", window=(-1, 0))
    assert session.trial_ids.tolist() == np.flatnonzero(~missing).tolist()
    assert session.n_recorded == len(missing)
    assert session.provenance["trials"]["without the event"] == missing.sum()
    session = bwb.load_session(path, trial_filter="valid")
    assert session.trial_ids.tolist() == np.flatnonzero(valid).tolist()
    assert session.provenance["trials"]["not valid"] == np.sum(~valid)


def test_groups_may_be_absent(tmp_path):
    write_session(tmp_path / "s.h5", leave_out=("whisker", "licks", "paws/right_paw_speed"))
    session = bwb.load_session(tmp_path / "s.h5", atlas="Cosmos")
    assert session.provenance["absent"] == [
        *("whisker-motion-energy", "right-paw-speed", "licking-rate")
    ]
    assert {"wheel-speed", "left-paw-speed"} < set(session.behaviour)
    assert not set(session.provenance["absent"]) & set(session.behaviour)
    assert set(session.region_names) <= set(REGIONS["cosmos"])
    leave = [f"units/region_{level}" for level in REGIONS]
    write_session(tmp_path / "t.h5", leave_out=(*leave, "probes", "units/depths"))
    bare = bwb.load_session(tmp_path / "t.h5", atlas=None)
    assert bare.region_names == [] and not {"allen", "depth"} & set(bare.neurons)


def test_large_counts_and_order(tmp_path, written):
    """Spikes out of order are sorted; counts above 255 are kept; times may be negative."""

    def shuffle(file):
        order = np.random.default_rng(0).permutation(len(file["spikes/timestamps"]))
        for name in ("timestamps", "unit_index"):
            values = file[f"spikes/{name}"][()]
            file[f"spikes/{name}"][...] = values[order]

    write_session(tmp_path / "s.h5", edit=shuffle)
    mixed, plain = bwb.load_session(tmp_path / "s.h5"), bwb.load_session(written[0])
    np.testing.assert_array_equal(mixed.counts, plain.counts)

    def crowd(file):
        times = file["spikes/timestamps"]
        times[1000:1400] = file["trials/stim_on_time"][3] + 0.001
        times[0] = -3.0
        file["spikes/unit_index"][1000:1400] = 2

    write_session(tmp_path / "s.h5", edit=crowd)
    session = bwb.load_session(tmp_path / "s.h5")
    assert session.counts[3, 25, 2] >= 400 and session.counts.dtype == np.uint16


# ------------------------------------------------------------------------------- splits


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
    assert session.provenance["split"] == split
    assert session.provenance["trials"]["in no part of the split"] == outside > 0
    assert len(parts["train"]) > len(parts["val"]) > 0
    assert (len(parts["test"]) > 0) == (regime == "eval")


def test_which_split_is_kept(tmp_path):
    for regime, filtering, align, expected in [
        ("eval", "selected_units", "stim_on_time", "ts2"),
        ("eval", "all_units", "stim_on_time", "ts1"),
        ("eval", "all_units", "ts2", "ts1"),
        ("eval", "selected_units", "ts2", "ts2"),
        ("pretrain", "all_units", "stim_on_time", "pretrain"),
        ("pretrain", "all_units", "ts2", "pretrain"),
    ]:
        path = tmp_path / f"{regime}-{filtering}.h5"
        if not path.exists():
            write_session(path, regime=regime, filtering=filtering)
        session = bwb.load_session(path, align=align)
        assert session.provenance["split"] == expected
        assert session.given_split is not None
    with pytest.raises(
        SessionError, match="split 'ts1': not in the file; pass one of .'pretrain'."
    ):
        bwb.load_session(path, split="ts1")
    names = [f"pretrain_{part}_domain" for part in ("train", "val")]
    write_session(path, regime="pretrain", leave_out=names)
    assert bwb.load_session(path).given_split is None
    with pytest.raises(SessionError, match="split None: not in the file; .*align other than 'ts2'"):
        bwb.load_session(path, align="ts2")


# -------------------------------------------------------------------------- ts2 windows


def windows(made, part, stride=0.02):
    """The rule of the benchmark's sequential sampler, one interval and step after the other."""
    starts = []
    for a, b in made["hulls"]:
        for c, d in made["splits"][f"ts2_{part}"]:
            begin, end = max(a, c), min(b, d)
            if end - begin < 1.0:
                continue
            mine = [
                t.item()
                for t in torch.arange(begin, end, stride, dtype=torch.float64)
                if t + 1.0 <= end
            ]
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
    with h5py.File(path) as file:
        np.testing.assert_array_equal(bwb.ts2_windows(file, part, 1.0), starts)
        assert file.id  # still open


def test_windows_as_trials(written):
    path, made = written
    session = bwb.load_session(path, align="ts2", stride=0.5)
    starts = session.behaviour["event-time"]
    assert session.window == (0.0, 1.0) and session.counts.shape[1] == 50
    for part, trials in session.given_split._asdict().items():
        np.testing.assert_array_equal(starts[trials], windows(made, part, 0.5))
    assert sum(map(len, session.given_split)) == session.n_trials
    np.testing.assert_array_equal(session.counts, counted(made, starts, 1.0))
    picked = session.select(session.given_split.test[:7])
    assert picked.behaviour["event-time"].tolist() == windows(made, "test", 0.5)[:7].tolist()
    longer = bwb.load_session(path, align="ts2", window=(0, 2.0), bin_size=0.04)
    assert longer.counts.shape[1] == 50 and 0 < longer.n_trials < session.n_trials


def test_counts_of_windows_equal_the_benchmarks_formula(tmp_path):
    """20,000 windows anywhere; spikes at 30 kHz, as recorded. Differences only at bins' edges."""
    rng = np.random.default_rng(8)
    times = np.sort(np.round(rng.uniform(0, 3000, 60_000) * 30_000) / 30_000)
    starts = rng.uniform(0, 2999, 20_000)
    counts = bin_spikes(
        times, np.zeros(len(times), int), starts, n_neurons=1, window=(0.0, 1.0), bin_size=0.02
    )[..., 0]
    for start, row in zip(starts, counts, strict=True):
        spikes = times[np.searchsorted(times, start) : np.searchsorted(times, start + 1.0)] - start
        expected = np.bincount(np.floor(spikes * 50).astype(int), minlength=50)
        if not np.array_equal(row, expected):
            edge = np.abs(spikes - 0.02 * np.round(spikes * 50))
            assert edge.min() < 2e-8
    # Spikes within 20 ns before an edge count in the next bin; others stay where they are.
    at = np.array([0.02 - 3e-8, 0.04 - 1e-8, 0.06, 1.0 - 1e-8])
    row = bin_spikes(at, np.zeros(4, int), [0.0], n_neurons=1, window=(0.0, 1.0), bin_size=0.02)
    assert np.flatnonzero(row).tolist() == [0, 2, 3]


# ----------------------------------------------------------------------------- bad files


def drop(name):
    return lambda file: file.__delitem__(name)


def change(name, edit):
    """Replace a dataset by what ``edit`` makes of it."""

    def damage(file):
        values = edit(file[name][()])
        del file[name]
        file[name] = values

    return damage


def put(name, index, value):
    return lambda file: file[name].__setitem__(index, value)


def attribute(group, name, value):
    return lambda file: file[group].attrs.__setitem__(name, value)


def empty(group):
    def damage(file):
        for name in [name for name in file[group] if isinstance(file[group][name], h5py.Dataset)]:
            change(f"{group}/{name}", lambda values: values[:0])(file)

    return damage


CANNOT = "file: cannot be read as one of BrainWideBench .*; download the file again"
ERRORS = {
    "no spikes group": (drop("spikes"), {}, "spikes/timestamps: no such column; download"),
    "no units": (drop("units"), {}, "units/id: no such column"),
    "no session id": (lambda f: f["session"].attrs.__delitem__("id"), {}, CANNOT),
    "no times": (drop("spikes/timestamps"), {}, "spikes/timestamps: no such column; download"),
    "no unit index": (drop("spikes/unit_index"), {}, "spikes/unit_index: no such column"),
    "no trials": (drop("trials"), {}, CANNOT),
    "no event": (drop("trials/stim_on_time"), {}, "no such event.*'feedback_time'"),
    "no contrast": (drop("trials/contrast_left"), {}, "contrast_left: no such column"),
    "not an event": (None, {"align": "choice"}, "trials/choice: no such event"),
    "a path as event": (None, {"align": "../units/x_time"}, "no such event"),
    "no ids": (drop("units/id"), {}, "units/id: no such column"),
    "no regions": (drop("units/region_beryl"), {"atlas": "Beryl"}, "region_Beryl: no.*or None"),
    "no validity": (drop("trials/is_valid"), {"trial_filter": "valid"}, "is_valid: no such"),
    "validity of times": (None, {"trial_filter": "valid", "align": [9.0]}, "is_valid: not known"),
    "no domain": (drop("ts2_val_domain"), {}, "ts2_val_domain/start: no such column"),
    "no ends": (drop("ts2_val_domain/end"), {}, "ts2_val_domain/end: no such column"),
    "no hulls": (drop("task_aligned_intervals"), {"align": "ts2"}, "task_aligned_intervals/domain"),
    "short index": (change("spikes/unit_index", lambda v: v[:-1]), {}, "spike_neurons has shape"),
    "short regions": (change("units/region_allen", lambda v: v[:-1]), {}, "regions: need one"),
    "short depths": (change("units/depths", lambda v: v[:-1]), {}, "'depth': need 6 rows"),
    "short choice": (change("trials/choice", lambda v: v[1:]), {}, CANNOT),
    "one choice": (change("trials/choice", lambda v: v[:1]), {}, CANNOT),
    "one validity": (change("trials/is_valid", lambda v: v[:1]), {"trial_filter": "valid"}, CANNOT),
    "square speed": (change("wheel/wheel_speed", lambda v: v[:, None]), {}, "wheel_speed: no such"),
    "index too large": (put("spikes/unit_index", 5, 6), {}, "spike_clusters: ids .6. are not"),
    "index negative": (put("spikes/unit_index", 5, -1), {}, "spike_clusters: ids .-1. are not"),
    "index not whole": (change("spikes/unit_index", lambda v: v + 0.5), {}, "spike_clusters: ids"),
    "NaN spike": (put("spikes/timestamps", 7, np.nan), {}, "timestamps: not finite times"),
    "infinite spike": (put("spikes/timestamps", 7, np.inf), {}, "timestamps: not finite times"),
    "milliseconds": (change("spikes/timestamps", lambda v: v * 1e6), {}, "trials: none is left"),
    "zero units": (empty("units"), {}, "spike_clusters: ids .* are not among"),
    "zero spikes": (empty("spikes"), {}, "spikes/timestamps: not finite times"),
    "zero trials": (empty("trials"), {}, "trials: none is left"),
    "all NaN": (put("trials/stim_on_time", slice(None), np.nan), {}, "trials: none is left"),
    "none inside": (None, {"align": [-50.0, 5e4]}, "trials: none is left.*beyond the recording"),
    "no times given": (None, {"align": []}, "trials: none is left"),
    "no window fits": (None, {"align": "ts2", "window": (0, 8.0)}, "trials: none is left"),
    "interval backwards": (put("ts2_val_domain/end", 0, 0.0), {}, "ts2_val_domain: not intervals"),
    "interval NaN": (put("ts2_val_domain/end", 0, np.nan), {}, "ts2_val_domain: not intervals"),
    "two parts": (
        lambda f: (put("ts2_val_domain/start", 0, 0.0)(f), put("ts2_val_domain/end", 0, 900.0)(f)),
        {},
        "given_split: a trial is in two parts",
    ),
    "no rate": (lambda f: f["licks"].attrs.__delitem__("sampling_rate"), {}, CANNOT),
    "rate zero": (attribute("licks", "sampling_rate", 0.0), {}, "licks: sampling_rate is 0.0"),
    "rate negative": (attribute("licks", "sampling_rate", -50.0), {}, "licks: sampling_rate is"),
    "rate text": (attribute("licks", "sampling_rate", "fast"), {}, CANNOT),
    "no start": (drop("licks/domain"), {}, "licks/domain/start: no such column"),
    "two starts": (
        lambda f: [change(f"licks/domain/{n}", lambda v: v.repeat(2))(f) for n in ("start", "end")],
        {},
        CANNOT,
    ),
    "few times": (lambda f: f["licks"].__setitem__("timestamps", np.arange(9.0)), {}, CANNOT),
    "group for a dataset": (
        lambda f: (f.__delitem__("units/label"), f.create_group("units/label")),
        {},
        "units/label: no such column",
    ),
    "dataset for a group": (
        lambda f: (f.__delitem__("spikes"), f.__setitem__("spikes", np.arange(4))),
        {},
        "spikes/timestamps: no such column",
    ),
    "scalar": (change("units/label", lambda v: v[0]), {}, "units/label: no such column"),
    "empty": (change("units/label", lambda v: h5py.Empty("f8")), {}, "units/label: no such column"),
    "dangling link": (
        lambda f: (f.__delitem__("spikes"), f.__setitem__("spikes", h5py.SoftLink("/gone"))),
        {},
        "spikes/timestamps: no such column",
    ),
}


@pytest.fixture
def damaged(small, tmp_path):
    """A function that loads a copy of the small file after ``damage(file)``."""

    def load(damage, **options):
        path = shutil.copy(small, tmp_path / "copy.h5")
        if damage is not None:
            with h5py.File(path, "r+") as file:
                damage(file)
        return bwb.load_session(path, **options)

    return load


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_session_dataset_and_remedy(damaged, case):
    damage, options, message = ERRORS[case]
    with pytest.raises(SessionError, match=f"^session '[-0-9a-z]+', .*{message}") as caught:
        damaged(damage, **options)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value) or "need" in str(caught.value)  # those of Session


REPAIRS = {
    "NaN samples": put("whisker/whisker_motion_energy", slice(500, 503), np.nan),
    "infinite samples": put("whisker/whisker_motion_energy", 77, np.inf),
    "no probes": drop("probes"),
    "no depths": drop("units/depths"),
    "NaN choice": change("trials/choice", lambda v: np.where(np.arange(len(v)) == 1, np.nan, v)),
    "strange choice": put("trials/choice", 1, 7),
    "odd strings": change("units/region_allen", lambda v: np.array([b"\xff\xfe"] * len(v), "S2")),
    "empty strings": change("units/region_allen", lambda v: np.array([b""] * len(v), "S1")),
    "long strings": change("units/region_allen", lambda v: np.array([b"x" * 999] * len(v))),
    "negative spike": put("spikes/timestamps", 0, -40.0),
    "no subject": drop("subject"),
    "no brainset": drop("brainset"),
    "int times": change("trials/stim_on_time", lambda v: np.round(v).astype(int)),
    "one sample": lambda f: [change(f"licks/{n}", lambda v: v[:1])(f) for n in ("licking_rate",)],
}


@pytest.mark.parametrize("case", REPAIRS)
def test_what_is_not_an_error(damaged, case):
    session = damaged(REPAIRS[case])
    assert session.counts.shape[1:] == (100, 6) and session.n_trials > 15
    if "samples" in case:
        energy = session.behaviour["whisker-motion-energy"]
        assert np.isfinite(energy).mean() > 0.95  # the line runs across so short a gap
    if case == "one sample":
        assert np.isnan(session.behaviour["licking-rate"]).all()
    if "choice" in case:
        assert np.isnan(session.behaviour["choice"]).nonzero()[0].tolist() == [1]
    if case == "odd strings":
        assert set(session.regions) == {"\ufffd\ufffd"}


def test_truncated_and_foreign_files(small, tmp_path):
    whole = small.read_bytes()
    path = tmp_path / "cut.h5"
    lengths = {0, 1, 8, 100, len(whole) - 1, *np.linspace(0, len(whole) - 1, 60).astype(int)}
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(
            SessionError, match="'cut', file: cannot be .*; download the file again"
        ):
            bwb.load_session(path)
    path.write_bytes(b"PK\x03\x04 not HDF5" * 100)
    with pytest.raises(SessionError, match="file: cannot be read as"):
        bwb.ts2_windows(path, "test")
    with pytest.raises(SessionError, match="no such file"):
        bwb.load_session(tmp_path)
    with h5py.File(path, "w") as file:
        file["data"] = np.arange(3)
    with pytest.raises(SessionError, match="'cut', file: cannot be read as one of BrainWideBench"):
        bwb.load_session(path)
    with pytest.raises(SessionError, match="gone.h5'?: no such file; bwb.download fetches it"):
        bwb.load_session(tmp_path / "gone.h5")
    with h5py.File(small) as file:
        pass
    with pytest.raises(SessionError, match="'[?]', file: cannot be read"):
        bwb.ts2_windows(file, "test")


def test_data_overwritten_anywhere(small, tmp_path):
    """Sixteen bytes of the data (of HDF5's own headers, HDF5 itself may read for ever)."""
    whole, places = small.read_bytes(), []

    def find(_, node):
        if isinstance(node, h5py.Dataset) and node.dtype.kind != "O" and node.nbytes > 16:
            places.append((node.id.get_offset(), node.nbytes - 16))

    with h5py.File(small) as file:
        file.visititems(find)
    rng = np.random.default_rng(5)
    for i, (offset, length) in enumerate(places[::3]):
        hole, start = bytearray(whole), offset + int(rng.integers(length))
        hole[start : start + 16] = bytes(16) if i % 2 else rng.bytes(16)
        (tmp_path / "hole.h5").write_bytes(hole)
        outcome(tmp_path / "hole.h5")


def outcome(path, **options):
    """A session, or None for a SessionError; nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # sums of absurd samples overflow
            warnings.filterwarnings("ignore", message=".*align_times")  # of absurd events
            return bwb.load_session(path, **options)
    except SessionError as error:
        assert str(error).startswith("session ")


NAMES = [
    *("spikes/timestamps", "spikes/unit_index", "units/id", "units/probe_id", "units/label"),
    *("units/region_allen", "probes/id", "probes/name", "trials/stim_on_time", "trials/choice"),
    *("trials/contrast_left", "trials/is_valid", "task_aligned_intervals/domain/start"),
    *("ts2_test_domain/start", "ts2_test_domain/end", "ts2_train_domain", "wheel/wheel_speed"),
    *("whisker/domain/start", "paws/is_left_paw_confident", "licks", "spikes", "domain"),
    *("units/ts2_co_smoothing_is_held_out_test", "trials", "session", "brainset"),
]
EDITS = {
    "drop": lambda v: None,
    "empty": lambda v: v[:0],
    "short": lambda v: v[:-1],
    "one": lambda v: v[:1],
    "twice": lambda v: np.repeat(v, 2),
    "backwards": lambda v: v[::-1],
    "square": lambda v: np.stack([v, v], axis=1),
    "scalar": lambda v: v[0],
    "text": lambda v: np.array([b"\xf0odd"] * len(v)),
    "same": lambda v: v[:1].repeat(len(v)),
    "NaN": lambda v: np.full(len(v), np.nan),
    "infinite": lambda v: np.full(len(v), -np.inf),
    "huge": lambda v: np.full(len(v), 1e300),
    "large": lambda v: np.arange(len(v)) * 1e4,
    "negative": lambda v: -np.arange(len(v)),
    "lowest": lambda v: np.full(len(v), np.iinfo(np.int64).min),
    "unsigned": lambda v: np.arange(len(v), dtype=np.uint64) + 2**63,
    "bool": lambda v: np.arange(len(v)) % 2 == 0,
    "complex": lambda v: np.arange(len(v)) * 1j,
    "compound": lambda v: np.zeros(len(v), dtype=[("a", int), ("b", float)]),
    "half": lambda v: np.arange(len(v)).astype(np.float16),
    "void": lambda v: h5py.Empty("i8"),
}
OPTIONS = [
    {},
    {"align": "ts2", "stride": 0.1},
    {"align": "movement_onset_time", "window": (-1, 0), "split": "ts1", "trial_filter": "valid"},
    {"align": [30.0, 31.0, np.nan], "atlas": None, "split": None, "bin_size": 0.1},
]


@settings(max_examples=150, deadline=None)
@given(
    damages=st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(sorted(EDITS))), min_size=1, max_size=2
    ),
    options=st.sampled_from(OPTIONS),
)
@example(damages=[("ts2_test_domain/start", "lowest")], options=OPTIONS[1])
def test_bad_input_gives_a_session_or_a_session_error(tmp_path_factory, small, damages, options):
    path = shutil.copy(small, tmp_path_factory.getbasetemp() / "property.h5")
    with h5py.File(path, "r+") as file:
        for name, edit in damages:
            node = file.get(name)
            values = node[()] if isinstance(node, h5py.Dataset) and node.shape else np.arange(3)
            values = values[:, 0] if np.ndim(values) == 2 else values
            if name in file:
                del file[name]
            inside = file.get(name.rpartition("/")[0] or "/")  # may be a number by now
            if edit != "drop" and len(values) and isinstance(inside, h5py.Group):
                file[name] = EDITS[edit](values)
    session = outcome(path, **options)
    if session is not None:
        assert len(session.neurons["uuid"]) == session.n_neurons
        assert np.isfinite(session.behaviour["event-time"]).all()


def test_options_that_are_unknown(written):
    path, _ = written
    for options, message in (
        ({"atlas": "Swanson"}, "atlas must be one of None, "),
        ({"atlas": "depth"}, "atlas must be one of None, "),
        ({"split": "ts3"}, "split must be one of None, "),
        ({"trial_filter": "good"}, "trial_filter must be"),
        ({"align": "ts2", "split": None}, "split None: not in the file"),
        ({"align": "ts2", "window": (-1.0, 1.0)}, "window must start at 0"),
        ({"align": "ts2", "stride": 0.0}, "stride must be"),
        ({"align": [[1.0]]}, "align: must be one time a trial"),
    ):
        with pytest.raises(ValueError, match=message):  # of which a SessionError is one
            bwb.load_session(path, **options)
    with pytest.raises(ValueError, match="holds 49.95 bins"):
        bwb.load_session(path, window=(0.0, 0.999))
    with pytest.raises(ValueError, match="length be above 0"):
        bwb.ts2_windows(path, "test", length=0.0)
    for part, split in (("all", "ts2"), ("test", "pretrain"), ("test", "ts4")):
        with pytest.raises(ValueError, match="part must be one"):
            bwb.ts2_windows(path, part, split=split)


# ------------------------------------------------------------------------------ download

IDS = [f"{i:08x}-0000-4000-8000-000000000000" for i in range(5)]
PREFIX = "brainsets/selected_units/ibl_brain_wide_bench_2026/eval/"


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as is asked for: lists of two entries a page, and the files."""

    body, fault, asked = b"content", None, []

    def do_GET(self):
        url = urlsplit(self.path)
        type(self).asked.append(url.path)
        etag = hashlib.md5(self.body).hexdigest()
        if url.path != "/":
            return self.answer(200, self.body, ETag=f'"{etag}"')
        query = parse_qs(url.query)
        prefix, after = query["prefix"][0], query.get("continuation-token", [""])[0]
        keys = [PREFIX + name for name in (*(f"{i}.h5" for i in IDS), "README", "../x.h5")]
        keys = [key for key in keys if key.startswith(prefix) and key > after]
        items = "".join(
            f"<Contents><Key>{key}</Key><ETag>&quot;{etag}&quot;</ETag>"
            f"<Size>{len(self.body)}</Size></Contents>"
            for key in keys[:2]
        )
        more = len(keys) > 2
        token = f"<NextContinuationToken>{keys[1]}</NextContinuationToken>" if more else ""
        text = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{items}{token}'
        text += "</ListBucketResult>"
        if self.fault == "silent":
            return time.sleep(1)
        if self.fault == "not a list":
            text = "<html>please log in"
        self.answer(503 if self.fault == "list down" else 200, text.encode())

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def bucket(serve):
    """A stand-in for the bucket: its handler's class, with its address as ``url``."""
    handler = type("Handler", (Bucket,), {"asked": []})
    handler.url = serve(handler)
    return handler


def test_listing_follows_the_pages(bucket):
    entries = bwb.list_sessions(base_url=bucket.url)
    assert [entry.uuid for entry in entries] == IDS and len(bucket.asked) == 3
    assert {entry.bytes for entry in entries} == {len(bucket.body)}
    assert entries[1].url == f"{bucket.url}/{PREFIX}{IDS[1]}.h5"
    assert entries[0].etag == hashlib.md5(bucket.body).hexdigest()
    for options in ({"regime": "pretrain"}, {"build": "good_units"}, {"regime": "test"}):
        with pytest.raises(ConnectionError, match="lists no session file.*'all_units'.*'pretrain'"):
            bwb.list_sessions(**options, base_url=bucket.url)
    for fault, message in (("not a list", "cannot list.*log-in page"), ("list down", "503")):
        bucket.fault = fault
        with pytest.raises(ConnectionError, match=message):
            bwb.list_sessions(base_url=bucket.url)
    bucket.fault = "silent"
    with pytest.raises(ConnectionError, match="cannot list.*timed out.*try again later"):
        bwb.list_sessions(base_url=bucket.url, timeout=0.2)
    with pytest.raises(ConnectionError, match="cannot list.*timed out.*try again later"):
        bwb.download(IDS[0], "nowhere", base_url=bucket.url, timeout=0.2)
    with pytest.raises(ConnectionError, match="cannot list http://127.0.0.1:9/.*refused"):
        bwb.list_sessions(base_url="http://127.0.0.1:9")
    for bad in ("file:///etc", "nowhere"):
        with pytest.raises(ConnectionError, match="cannot list"):
            bwb.list_sessions(base_url=bad)


def test_downloaded_file_is_a_session(bucket, tmp_path, small):
    bucket.body = small.read_bytes()
    options = {"base_url": f"{bucket.url}/", "progress": False}
    path = bwb.download(IDS[2], tmp_path, **options)
    assert path == tmp_path / PREFIX.removeprefix("brainsets/") / f"{IDS[2]}.h5"
    assert bwb.load_session(path).n_trials == bwb.load_session(small).n_trials
    entry = bwb.list_sessions(base_url=bucket.url)[2]
    bucket.asked.clear()
    assert bwb.download(entry, tmp_path, progress=False) == path and not bucket.asked
    for bad in ("../../etc/passwd", "0802ced5", IDS[0].replace("8000", "9000")):
        with pytest.raises(FileNotFoundError, match="no session.*see list_sessions"):
            bwb.download(bad, tmp_path, **options)
