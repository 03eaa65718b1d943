"""Small random session files in the layout of BrainWideBench (arXiv 2609.22064)."""

import hashlib
import shutil
import uuid

import h5py
import numpy as np

from mtm.data.synthetic import WINDOWS  # in task_aligned_intervals

SUBJECT, LAB = "SYN_001", "simlab"
REGIONS = {  # at the levels Allen, Beryl, Cosmos
    "allen": ["CA1", "VISp2/3", "LP", "SCig", "root"],
    "beryl": ["CA1", "VISp", "LP", "SCm", "root"],
    "cosmos": ["HPF", "Isocortex", "TH", "MB", "root"],
}
NORMALIZE = {  # mean and standard deviation of what is z-scored
    "whisker/whisker_motion_energy": (6.1, 4.3),
    "paws/left_paw_speed": (63.0, 33.0),
    "paws/right_paw_speed": (62.0, 32.0),
}


def write_session(
    path,
    *,
    seed=0,
    regime="eval",
    filtering="selected_units",
    units=12,
    rate=4.0,
    duration=520.0,
    chunk=100.0,
    gap=20.0,
    strings=True,
    irregular=(),
    leave_out=(),
):
    """Write one file, of a seed; returns what was written.

    Args:
        regime: "eval" (splits ts1 and ts2, held-out units) or "pretrain".
        filtering: "selected_units" or "all_units" (no held-out units).
        units, rate, duration, chunk, gap: Hz and seconds; the last two of the splits.
        strings: of variable length, UTF-8; else of fixed length.
        irregular, leave_out: behaviour groups to store with timestamps; what to remove at the end.
    """
    rng = np.random.default_rng(seed)
    made = {"id": _uuids(rng, 1).item()}
    made["probes"] = {"id": _uuids(rng, 2), "name": np.array(["probe00", "probe01"])}
    made["units"] = _units(rng, units, made["probes"]["id"])
    if regime == "eval" and filtering == "selected_units":
        for part in ("test", "val"):
            flag = f"ts2_co_smoothing_is_held_out_{part}"
            made["units"][flag] = held_out(made["units"]["id"], part)
    unit = rng.permutation(np.repeat(np.arange(units), rng.poisson(rate * duration, units)))
    times = np.sort(rng.uniform(0.5, duration, len(unit)))
    made["spikes"] = {"timestamps": times, "unit_index": unit, "depth": rng.normal(size=len(unit))}
    trials = made["trials"] = _trials(rng, duration)
    row = np.flatnonzero(trials["is_valid"])
    events = ("stim_on_time", "movement_onset_time", "feedback_time")
    on, move, feedback = (trials[name][row] for name in events)
    spans = [np.minimum(on, move) - 1.0, np.maximum(feedback, move) + 1.0]
    made["hulls"] = np.stack(spans, axis=1)
    made["splits"] = _splits(times[0], trials["end"][-1], regime, chunk, gap)
    made["series"] = _series(rng, duration)
    with h5py.File(path, "w") as file:
        _write(file, made, filtering, strings, irregular)
        for name in leave_out:
            del file[name]
    return made


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


EDITS = {
    "drop": lambda v: None,
    "empty": lambda v: v[:0],
    "backwards": lambda v: v[::-1],
    "text": lambda v: np.array([b"\xf0odd"] * len(v)),
    "NaN": lambda v: np.full(len(v), np.nan),
    "milliseconds": lambda v: np.arange(len(v)) * 1e4,
}


def damaged(path, name, edit):
    """A copy of an HDF5 file in which one dataset, or group, went through one of EDITS."""
    copy = shutil.copy(path, path.with_name(f"damaged{path.suffix}"))
    with h5py.File(copy, "r+") as file:
        values = file[name][()] if isinstance(file[name], h5py.Dataset) else np.arange(3)
        del file[name]
        if edit != "drop":
            file[name] = EDITS[edit](values)
    return copy


def held_out(ids, part):
    """The held-out units of co-smoothing: a tenth, those with the smallest hashes."""
    digests = [hashlib.sha256(f"ts2_co_smoothing_{part}:{i}".encode()).hexdigest() for i in ids]
    return np.isin(digests, sorted(digests)[: max(1, round(0.1 * len(digests)))])


def _uuids(rng, n):
    return np.array([str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(n)])


def _units(rng, n, probes):
    region = rng.integers(len(REGIONS["allen"]), size=n)
    return {
        "id": _uuids(rng, n),
        "probe_id": probes[np.sort(rng.integers(len(probes), size=n))],
        "cluster_id": rng.permutation(400)[:n],
        "depths": rng.uniform(0, 3800, n),
        "firing_rate": rng.uniform(1, 20, n),
        "label": np.ones(n),
        **{f"region_{level}": np.array(names)[region] for level, names in REGIONS.items()},
    }


def _trials(rng, duration):
    start = 2 + np.cumsum(rng.uniform(5.5, 7.0, int(duration / 7)))
    start = start[start < duration - 6]
    n = len(start)
    stimulus, choice = rng.integers(2, size=n), rng.choice([0, 1, 2], n, p=[0.47, 0.47, 0.06])
    level = rng.integers(5, size=n)
    contrast = np.array([0, 0.0625, 0.125, 0.25, 1.0])[level]
    on = start + rng.uniform(1.0, 1.2, n)
    move = on + rng.uniform(0.05, 1.2, n)
    move[rng.random(n) < 0.05] = np.nan
    return {
        "start": start,
        "end": start + 5.2,
        "stim_on_time": on,
        "go_cue_time": on + 0.001,
        "movement_onset_time": move,
        "feedback_time": on + rng.uniform(1.3, 1.6, n),
        "probability_left": rng.choice([0.2, 0.5, 0.8], n),
        "contrast_left": np.where(stimulus == 1, contrast, np.nan),
        "contrast_right": np.where(stimulus == 0, contrast, np.nan),
        "choice": choice,
        "reward": (choice == stimulus).astype(int),
        "stimulus_contrast": level,
        "is_valid": (choice != 2) & ~np.isnan(move),
        "trial_index": np.arange(n),
    }


def _series(rng, duration):
    """Behaviour at 50 Hz; the wheel starts a little earlier than the camera."""
    start = {"whisker": 1.0001, "paws": 1.0001, "licks": 1.0001, "wheel": 0.0801}
    n = {group: int((duration - t) * 50) - 30 for group, t in start.items()}
    series = {group: {"times": start[group] + np.arange(n[group]) / 50} for group in start}
    series["whisker"]["whisker_motion_energy"] = rng.gamma(2.0, 3.0, n["whisker"])
    for side in ("left", "right"):
        speed = np.linalg.norm(rng.normal(0, 50, (n["paws"], 2)), axis=1)
        confident = np.repeat(rng.random(n["paws"] // 25 + 1) < 0.9, 25)[: n["paws"]]
        series["paws"] |= {f"{side}_paw_speed": speed, f"is_{side}_paw_confident": confident}
    series["wheel"]["wheel_speed"] = np.abs(rng.normal(0, 2, n["wheel"]))
    series["licks"]["licking_rate"] = 50.0 * rng.poisson(0.1, n["licks"])
    return series


def _splits(begin, end, regime, chunk, gap):
    """Parts by their share of the recording (ts1, pretrain), or chunks in turn (ts2); gaps between.

    The benchmark moves the edges to those of trials; here, they cut through some.
    """
    span, chunks = end - begin, np.append(np.arange(begin, end, chunk), end)
    turns = np.resize(["train", "test", "train", "val", "test"], len(chunks) - 1)
    edges = {"pretrain": (begin + span * np.array([0, 0.9, 1]), np.array(["train", "val"]))}
    if regime == "eval":
        parts = np.array(["train", "val", "test"])
        edges = {"ts1": (begin + span * np.array([0, 0.4, 0.6, 1]), parts), "ts2": (chunks, turns)}
    found = {}
    for split, (at, names) in edges.items():
        bounds = np.stack([at[:-1] + gap * (at[:-1] > begin), at[1:]], axis=1)
        found |= {f"{split}_{name}": bounds[names == name] for name in dict.fromkeys(names)}
    return found


def _write(file, made, filtering, strings, irregular):
    trials, row = made["trials"], np.flatnonzero(made["trials"]["is_valid"])
    file.attrs.update({"object": "Data", "absolute_start": 0.0, "lab": LAB})
    for group, attributes in {
        "brainset": {"derived_version": "0.1.0", "unit_filtering": filtering},
        "session": {"id": made["id"], "recording_date": "2026-01-02 00:00:00"},
        "subject": {"id": SUBJECT, "species": "MUS_MUSCULUS"},
        **{f"ts1_normalize/{k}": {"mean": v[0], "std": v[1]} for k, v in NORMALIZE.items()},
    }.items():
        file.create_group(group).attrs.update(attributes)
    for group in ("spikes", "units", "probes", "trials"):
        _table(file, group, made[group], strings)
    for name, (event, offset) in WINDOWS.items():
        bounds = trials[event][row, None] + [offset, offset + 1.0]
        values = {key: trials[key][row] for key in ("trial_index", name) if key in trials}
        _interval(file, f"task_aligned_intervals/{name}", bounds, values)
    _interval(file, "task_aligned_intervals/domain", made["hulls"])
    for name, bounds in made["splits"].items():
        _interval(file, f"{name}_domain", bounds)
    for group, columns in made["series"].items():
        stored = {key: values for key, values in columns.items() if key != "times"}
        stored |= {"timestamps": columns["times"]} if group in irregular else {}
        _table(file, group, stored, strings).attrs["sampling_rate"] = 50
        _interval(file, f"{group}/domain", columns["times"][None, [0, -1]])


def _table(file, name, columns, strings=True):
    group = file.require_group(name)
    for key, values in columns.items():
        if values.dtype.kind == "U":
            values = values.astype(object) if strings else np.char.encode(values, "utf-8")
        group[key] = values
    return group


def _interval(file, name, bounds, columns=None):
    _table(file, name, {"start": bounds[:, 0], "end": bounds[:, 1], **(columns or {})})
