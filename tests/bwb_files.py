"""Small random session files in the layout of BrainWideBench (arXiv 2609.22064)."""

import hashlib
import shutil
import uuid

import h5py
import numpy as np

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
WINDOWS = {  # in task_aligned_intervals: event and offset of each window of 1 s
    "choice": ("movement_onset_time", -1.0),
    "reward": ("feedback_time", 0.0),
    "stimulus_contrast": ("stim_on_time", -0.9),
    "movement_window": ("movement_onset_time", 0.0),
    "licking_window": ("feedback_time", 0.0),
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
    strings="table",
    irregular=(),
    leave_out=(),
):
    """Write one file; the same arguments give the same content. Returns what was written.

    Args:
        regime: "eval" (splits ts1 and ts2, held-out units) or "pretrain".
        filtering: "selected_units" or "all_units" (no held-out units).
        units, rate: number of units, and their mean firing rate, Hz.
        duration: of the recording, seconds; a trial lasts about six.
        chunk, gap: of the split ts2, seconds; 300 and 20 in the benchmark.
        strings: "table" (variable length, UTF-8) or "array" (fixed length).
        irregular: behaviour groups to store with timestamps.
        leave_out: groups or datasets to remove at the end.
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
    domain = times[[0, -1]]
    if regime == "pretrain":
        made["splits"] = _consecutive(domain, made["hulls"], gap, "pretrain", (0.9, 0.1))
    else:
        made["splits"] = _consecutive(domain, made["hulls"], gap, "ts1", (0.4, 0.2, 0.4))
        made["splits"] |= _chunks(domain, made["hulls"], chunk, gap)
    made["series"] = _series(rng, duration)
    with h5py.File(path, "w") as file:
        _write(file, made, filtering, strings, irregular)
        for name in leave_out:
            del file[name]
    return made


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
        "channels": rng.integers(384, size=n),
        "x": rng.normal(0, 1e-3, n),
        "depths": rng.uniform(0, 3800, n),
        "firing_rate": rng.uniform(1, 20, n),
        "label": np.ones(n),
        "qc_neural": np.repeat("PASS", n),
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


def _consecutive(domain, hulls, gap, prefix, shares):
    """Parts one after the other, by their share of the trials' time; cut at trials' edges."""
    inside = hulls[(hulls[:, 0] >= domain[0]) & (hulls[:, 1] <= domain[1])]
    total = np.cumsum(inside[:, 1] - inside[:, 0])
    parts, start = {}, domain[0]
    for part, share in zip(("train", "val", "test"), np.cumsum(shares), strict=False):
        end = inside[np.abs(total - share * total[-1]).argmin(), 1]
        parts[f"{prefix}_{part}"] = np.array([[start, domain[1] if share > 0.999 else end]])
        across = (inside[:, 0] < end + gap) & (end + gap < inside[:, 1])
        start = inside[across, 1][0] if across.any() else end + gap
    return parts


def _chunks(domain, hulls, chunk, gap):
    """Chunks in turn to train, test, train, val, test; trials whole, and a gap before each."""
    edges = np.append(np.arange(domain[0], domain[1], chunk), domain[1])
    for i, edge in enumerate(edges[1:-1], start=1):
        across = (hulls[:, 0] < edge) & (edge < hulls[:, 1])
        if across.any():  # to the chunk that holds more of it
            start, end = hulls[across][0]
            edges[i] = end if edge - start >= end - edge else start
    chunks = np.stack([edges[:-1], edges[1:]], axis=1)
    for i in range(1, len(chunks)):
        later = hulls[hulls[:, 0] >= chunks[i - 1, 1] + gap, 0]
        chunks[i, 0] = min([*later[:1], chunks[i, 1]])
    part = np.resize(["train", "test", "train", "val", "test"], len(chunks))
    kept = chunks[:, 0] < chunks[:, 1]
    return {f"ts2_{name}": chunks[kept & (part == name)] for name in ("train", "val", "test")}


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


def _table(file, name, columns, strings="table"):
    group = file.require_group(name)
    for key, values in columns.items():
        if values.dtype.kind == "U" and strings == "table":
            group.create_dataset(key, data=values.astype(object), dtype=h5py.string_dtype())
        else:
            group[key] = np.char.encode(values, "utf-8") if values.dtype.kind == "U" else values
    return group


def _interval(file, name, bounds, columns=None):
    _table(file, name, {"start": bounds[:, 0], "end": bounds[:, 1], **(columns or {})})
