"""Small synthetic session files in the layout of BrainWideBench (arXiv 2609.22064)."""

import hashlib
import uuid

import h5py
import numpy as np

SUBJECT, LAB = "SYN_001", "simlab"
REGIONS = {  # at the levels Allen, Beryl, Cosmos
    "allen": ["CA1", "VISp2/3", "LP", "SCig", "root"],
    "beryl": ["CA1", "VISp", "LP", "SCm", "root"],
    "cosmos": ["HPF", "Isocortex", "TH", "MB", "root"],
}
NORMALIZE = {  # mean and standard deviation, as the benchmark would have taken them
    "whisker/whisker_motion_energy": (6.1, 4.3),
    "paws/left_paw_speed": (63.0, 33.0),
    "paws/right_paw_speed": (62.0, 32.0),
}
PATTERN = ("train", "test", "train", "val", "test")  # of the TS2 chunks


def write_session(
    path,
    *,
    seed=0,
    regime="eval",
    filtering="selected_units",
    units=12,
    probes=2,
    rate=4.0,
    duration=520.0,
    chunk=100.0,
    gap=20.0,
    strings="table",
    irregular=(),
    leave_out=(),
    edit=None,
):
    """Write one file; the same arguments give the same content.

    Args:
        path: where to; the session id does not depend on it.
        seed: of everything random.
        regime: "eval" (splits ts1 and ts2, held-out units) or "pretrain".
        filtering: "selected_units" or "all_units" (no held-out units).
        units, probes, rate: how many, and the mean firing rate, Hz.
        duration: of the recording, seconds; a trial lasts about six.
        chunk, gap: of the split ts2, seconds; 300 and 20 in the benchmark.
        strings: "table" (variable length, UTF-8) or "array" (fixed length, `_unicode_keys`).
        irregular: behaviour groups to store with timestamps.
        leave_out: groups or datasets to remove at the end.
        edit: called with the open file at the very end, to damage it.

    Returns:
        dict of what was written: id, spikes, units, probes, trials (columns), hulls (n, 2),
        splits (name -> (n, 2)), series (group -> times and columns).
    """
    rng = np.random.default_rng(seed)
    made = {"id": str(uuid.UUID(bytes=rng.bytes(16), version=4))}
    made["probes"] = {
        "id": np.array([str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(probes)]),
        "name": np.array([f"probe{i:02d}" for i in range(probes)]),
        "qc_neural": np.array(["PASS", "WARNING"] * probes)[:probes],
    }
    made["units"] = _units(rng, units, made["probes"], regime, filtering)
    made["spikes"] = _spikes(rng, units, rate, duration)
    made["trials"] = _trials(rng, duration)
    trials, domain = made["trials"], made["spikes"]["timestamps"][[0, -1]]
    row = np.flatnonzero(trials["is_valid"])
    made["hulls"] = np.stack(
        [
            np.minimum(trials["stim_on_time"], trials["movement_onset_time"])[row] - 1.0,
            np.maximum(trials["feedback_time"], trials["movement_onset_time"])[row] + 1.0,
        ],
        axis=1,
    )
    if regime == "pretrain":
        made["splits"] = causal(domain, made["hulls"], (0.9, 0.1), gap, "pretrain")
    else:
        made["splits"] = causal(domain, made["hulls"], (0.4, 0.2, 0.4), gap, "ts1")
        made["splits"] |= chunked(domain, made["hulls"], chunk, gap)
    made["series"] = _series(rng, duration)
    with h5py.File(path, "w") as file:
        _write(file, made, regime, filtering, strings, irregular)
        for name in leave_out:
            del file[name]
        if edit is not None:
            edit(file)
    return made


# --------------------------------------------------------------------------- what is in it


def held_out(ids, part):
    """The held-out units of co-smoothing: a tenth, those with the smallest hashes."""
    digests = [hashlib.sha256(f"ts2_co_smoothing_{part}:{i}".encode()).hexdigest() for i in ids]
    kept = sorted(digests)[: max(1, round(0.1 * len(digests)))]
    return np.isin(digests, kept)


def _units(rng, n, probes, regime, filtering):
    which = np.sort(rng.integers(len(probes["id"]), size=n))
    region = rng.integers(len(REGIONS["allen"]), size=n)
    units = {
        "id": np.array([str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(n)]),
        "probe_id": probes["id"][which],
        "cluster_id": rng.permutation(400)[:n],
        "channels": rng.integers(384, size=n),
        "rawInd": rng.integers(384, size=n),
        "acronym": np.array(REGIONS["allen"])[region],
        **{axis: rng.normal(0, 1e-3, n) for axis in "xyz"},
        "depths": rng.uniform(0, 3800, n),
        "firing_rate": rng.uniform(1, 20, n),
        "label": np.ones(n),
        "wf_template": rng.normal(size=(n, 4, 3)),
        "qc_neural": probes["qc_neural"][which],
    }
    units |= {f"region_{level}": np.array(names)[region] for level, names in REGIONS.items()}
    units["location"] = np.stack([units[axis] for axis in "xyz"], axis=1)
    if regime == "eval" and filtering == "selected_units":
        for part in ("test", "val"):
            units[f"ts2_co_smoothing_is_held_out_{part}"] = held_out(units["id"], part)
    return units


def _spikes(rng, n, rate, duration):
    unit = np.repeat(np.arange(n), rng.poisson(rate * duration, n))
    times = np.sort(rng.uniform(0.5, duration, len(unit)))
    return {
        "timestamps": times,
        "unit_index": rng.permutation(unit),
        "amplitude": rng.uniform(1e-5, 1e-4, len(unit)),
        "depth": rng.uniform(0, 3800, len(unit)),
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
    response = on + rng.uniform(1.3, 1.6, n)
    prior = rng.choice([0.2, 0.5, 0.8], n)
    reward = (choice == stimulus).astype(int)
    return {
        "start": start,
        "end": start + 5.2,
        "stim_on_time": on,
        "go_cue_trigger_time": on + 0.0005,
        "go_cue_time": on + 0.001,
        "movement_onset_time": move,
        "response_time": response,
        "feedback_time": response + 0.01,
        "stim_off_time": response + 1.0,
        "probability_left": prior,
        "feedback_type": 2.0 * reward - 1,
        "reward_volume": 1.5 * reward,
        "contrast_left": np.where(stimulus == 1, contrast, np.nan),
        "contrast_right": np.where(stimulus == 0, contrast, np.nan),
        "choice": choice,
        "reward": reward,
        "block_prior": np.select([prior == 0.2, prior == 0.8], [0, 1], -1),
        "stimulus_side": stimulus,
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
        velocity = rng.normal(0, 50, (n["paws"], 2))
        series["paws"] |= {
            f"{side}_paw": np.cumsum(velocity, axis=0) / 50,
            f"{side}_paw_v_xy": velocity,
            f"{side}_paw_speed": np.linalg.norm(velocity, axis=1),
            f"is_{side}_paw_confident": np.repeat(rng.random(n["paws"] // 25 + 1) < 0.9, 25)[
                : n["paws"]
            ],
        }
    velocity = rng.normal(0, 2, n["wheel"])
    series["wheel"] |= {"wheel_pos": np.cumsum(velocity) / 50, "wheel_vel": velocity}
    series["wheel"]["wheel_speed"] = np.abs(velocity)
    series["licks"]["licking_rate"] = 50.0 * rng.poisson(0.1, n["licks"])
    return series


def causal(domain, hulls, shares, gap, prefix):
    """Parts one after the other, by their share of the trials' time; cut at trials' edges."""
    inside = hulls[(hulls[:, 0] >= domain[0]) & (hulls[:, 1] <= domain[1])]
    total = np.concatenate([[0.0], np.cumsum(inside[:, 1] - inside[:, 0])])
    cuts = []
    for share in np.cumsum(shares)[:-1]:
        nearest = np.abs(total - share * total[-1]).argmin()  # so many whole trials before the cut
        cuts.append(inside[nearest - 1, 1])
    starts = [domain[0]]
    for cut in cuts:
        ready, across = cut + gap, (inside[:, 0] < cut + gap) & (cut + gap < inside[:, 1])
        starts.append(inside[across, 1][0] if across.any() else ready)
    names = ("train", "val", "test")[: len(shares)]
    rows = zip(names, starts, [*cuts, domain[1]], strict=True)
    return {f"{prefix}_{part}": np.array([[start, end]]) for part, start, end in rows}


def chunked(domain, hulls, chunk, gap):
    """Chunks in turn to train, test, train, val, test; trials whole, and a gap before each."""
    edges = np.append(np.arange(domain[0], domain[1], chunk), domain[1])
    edges[-1] = domain[1]
    for i, edge in enumerate(edges[1:-1], start=1):
        across = (hulls[:, 0] < edge) & (edge < hulls[:, 1])
        if across.any():  # to the chunk that holds more of it
            start, end = hulls[across][0]
            edges[i] = end if edge - start >= end - edge else start
    chunks = np.stack([edges[:-1], edges[1:]], axis=1)
    for i in range(1, len(chunks)):
        later = hulls[hulls[:, 0] >= chunks[i - 1, 1] + gap, 0]
        chunks[i, 0] = min([*later[:1], chunks[i, 1]])
    part = np.array(PATTERN * len(chunks))[: len(chunks)]
    kept = chunks[:, 0] < chunks[:, 1]
    return {f"ts2_{name}": chunks[kept & (part == name)] for name in ("train", "val", "test")}


# ------------------------------------------------------------------------------- the file


def _write(file, made, regime, filtering, strings, irregular):
    spikes, trials = made["spikes"], made["trials"]
    ends = spikes["timestamps"][[0, -1]]
    file.attrs.update({"object": "Data", "absolute_start": 0.0, "lab": LAB})
    for name, attributes in {
        "brainset": {
            "id": "ibl_brain_wide_bench_2026",
            "origin_version": "0.0.1",
            "derived_version": "0.1.0",
            "source": "one-api",
            "unit_filtering": filtering,
        },
        "session": {"id": made["id"], "recording_date": "2026-01-02 00:00:00"},
        "subject": {"id": SUBJECT, "species": "MUS_MUSCULUS"},
        "device": {"id": f"{LAB}_{SUBJECT}_20260102", "recording_tech": "NEUROPIXELS_ARRAY"},
        "behavior_qc": {"qc_behavior": "PASS"},
    }.items():
        file.create_group(name).attrs.update({"object": "Data", **attributes})
    _group(file, "spikes", "IrregularTimeSeries", spikes, strings)
    seconds = np.arange(0.0, ends[1], 1.0)
    file["spikes/timestamp_indices_1s"] = np.searchsorted(spikes["timestamps"], seconds)
    _interval(file, "spikes/domain", [ends])
    _interval(file, "domain", [ends])
    for name in ("units", "probes"):
        _group(file, name, "ArrayDict", made[name], strings)
    _group(file, "trials", "Interval", trials, strings)
    file["trials"].attrs["timekeys"] = np.array(
        ["start", "end", *(name for name in trials if name.endswith("_time"))], dtype="S"
    )
    file.create_group("task_aligned_intervals").attrs["object"] = "Data"
    row = np.flatnonzero(trials["is_valid"])
    for name, event, start, end in (
        ("choice", "movement_onset_time", -1.0, 0.0),
        ("reward", "feedback_time", 0.0, 1.0),
        ("stimulus_contrast", "stim_on_time", -0.9, 0.1),
        ("movement_window", "movement_onset_time", 0.0, 1.0),
        ("licking_window", "feedback_time", 0.0, 1.0),
    ):
        bounds = trials[event][row, None] + [start, end]
        values = {name: trials[name][row]} if name in trials else {}
        place = f"task_aligned_intervals/{name}"
        _interval(file, place, bounds, {"trial_index": row, **values})
    _interval(file, "task_aligned_intervals/domain", made["hulls"])
    for name, bounds in made["splits"].items():
        _interval(file, f"{name}_domain", bounds)
    normalize = file.create_group("pretrain_normalize" if regime == "pretrain" else "ts1_normalize")
    normalize.attrs["object"] = "Data"
    if regime == "eval":
        for name, (mean, std) in NORMALIZE.items():
            normalize.create_group(name).attrs.update({"mean": mean, "std": std})
    for name, columns in made["series"].items():
        kind = "IrregularTimeSeries" if name in irregular else "RegularTimeSeries"
        stored = {key: value for key, value in columns.items() if key != "times"}
        if name in irregular:
            stored["timestamps"] = columns["times"]
        group = _group(file, name, kind, stored, strings)
        if name not in irregular:
            group.attrs["sampling_rate"] = 50
        _interval(file, f"{name}/domain", [columns["times"][[0, -1]]])


def _group(file, name, kind, columns, strings):
    group = file.create_group(name)
    fixed = []
    for key, values in columns.items():
        if values.dtype.kind == "U" and strings == "table":
            group.create_dataset(key, data=values.astype(object), dtype=h5py.string_dtype())
        elif values.dtype.kind == "U":
            group[key] = np.char.encode(values, "utf-8")
            fixed.append(key)
        else:
            group[key] = values
    group.attrs["object"] = kind
    group.attrs["_unicode_keys"] = np.array(fixed, dtype="S")
    return group


def _interval(file, name, bounds, columns=None):
    bounds = np.asarray(bounds, dtype=np.float64).reshape(-1, 2)
    table = {"start": bounds[:, 0].copy(), "end": bounds[:, 1].copy(), **(columns or {})}
    group = _group(file, name, "Interval", table, "table")
    group.attrs["timekeys"] = np.array(["start", "end"], dtype="S")
