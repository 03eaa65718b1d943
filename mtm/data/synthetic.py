"""Simulated sessions written in the file formats of real recordings: ALF and BrainWideBench.

Trials lie end to end on one clock (`mtm.simulation.layout`). A count becomes that many spikes at
random times inside its bin; between trials, neurons fire at their mean rates. Everything random is
seeded by the session's name.
"""

from __future__ import annotations

import datetime
import re
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mtm.data.regions import LEVELS, allen_ids, at_level
from mtm.files import atomic_write, optional
from mtm.inputs import SessionError
from mtm.session import Session
from mtm.simulation import CONTRASTS, RESPONSE, bin_edges, generator_of, layout, spike_times

CAMERA_RATE = 60.0  # Hz, as IBL's left camera
N_CHANNELS = 384  # of a Neuropixels probe
ORIGIN = "mtm.alf"  # marks the tables that index_alf makes, and seeds ids, so it must not change
BWB_ORIGIN = "mtm.simulate"


def write_alf(session: Session, root: str | Path, number: int = 1) -> Path:
    """Write a session as ALF: ``root/simlab/Subjects/<subject>/2026-01-02/<number>``.

    The window's 0 becomes the stimulus onset. The wheel turns with ``wheel-speed``, in opposite
    directions for the two choices. Depths and ids that are not there are made up.

    Args:
        session: needs behaviour ``choice``, ``block``, ``reward`` and ``contrast``, as
            `mtm.data.ibl` describes it, and Allen acronyms. Optional: ``reaction-time``,
            ``wheel-speed``, ``whisker-motion-energy``; neurons ``probe`` (default: all on
            ``probe00``), ``depth``, ``label``, ``uuid``.
        root: folder of the tree.
        number: of the session; another one for each session of a subject.
    """
    stimulus, stop = layout(session)
    files: dict[str, Any] = {"_ibl_trials.table.pqt": _alf_trials(session, stimulus)}
    files |= _alf_traces(session, stimulus, stop)
    probes = session.neurons.get("probe", np.full(session.n_neurons, "probe00"))
    for probe in np.unique(probes).tolist():
        sorting = _alf_probe(session, np.flatnonzero(probes == probe), probe, stimulus, stop)
        files |= {f"{probe}/pykilosort/{name}": content for name, content in sorting.items()}

    subject = session.subject or session.name
    path = Path(root) / "simlab" / "Subjects" / subject / "2026-01-02" / f"{number:03d}"
    present = {file.relative_to(path / "alf").as_posix() for file in path.rglob("[!.]*.*")}
    if other := sorted(present - set(files)):
        problem = f"holds another recording's {other[0]}; pass another root or number"
        raise SessionError(f"{path} {problem}")
    for name, content in files.items():
        file = path / "alf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            np.save(file, content)
        elif name.endswith(".csv"):
            content.to_csv(file, index=False)
        else:
            content.to_parquet(file)
    return path


def index_alf(root: str | Path) -> dict[str, Path]:
    """Make the tables by which ONE's local mode finds the sessions under ``root``.

    Returns eid -> the session's folder. An eid depends on lab, subject, date and number alone
    (ONE's own indexer gives random ones). Of several revisions of a dataset the last is the
    default. Tables that another tool made are a SessionError.
    """
    root = Path(root).resolve()
    cache, parquet = optional("one.alf.cache", "data"), optional("iblutil.io.parquet", "data")
    for table in (root / "sessions.pqt", root / "datasets.pqt"):
        if table.exists() and ORIGIN not in np.ravel(parquet.load(table)[1].get("origin")):
            raise SessionError(f"{table} was made by another tool; move it away, or copy the tree")
    folders: dict[str, Path] = {}
    sessions, datasets = [], []
    for folder in sorted(root.glob("*/Subjects/*/????-??-??/[0-9][0-9][0-9]")):
        lab, _, subject, day, number = folder.relative_to(root).parts
        eid = _uuid(ORIGIN, lab, subject, day, number)
        folders[eid] = folder
        sessions.append((eid, lab, subject, datetime.date.fromisoformat(day), int(number), "", ""))
        paths = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("[!.]*.*.*"))
        paths.sort(key=lambda path: re.findall(r"#([^/]*)#/", path))  # revisions: folders #name#
        last = {re.sub(r"#[^/]*#/", "", path): path for path in paths}.values()
        for path in paths:
            # No hash: with an empty one, ONE would compare it with every file's.
            facts = ((folder / path).stat().st_size, None, True, "NOT_SET", path in last)
            datasets.append((eid, _uuid(ORIGIN, eid, path), path, *facts))
    if not sessions:
        raise SessionError(f"no sessions lab/Subjects/subject/date/number under {root}")
    meta = {"date_created": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "origin": ORIGIN}
    for name, rows, kinds, index in (
        ("sessions", sessions, cache.SESSIONS_COLUMNS, ["id"]),
        ("datasets", datasets, cache.DATASETS_COLUMNS | {"default_revision": bool}, ["eid", "id"]),
    ):
        frame = pd.DataFrame(rows, columns=list(kinds)).astype(kinds).set_index(index).sort_index()
        parquet.save(root / f"{name}.pqt", frame, meta)
    return folders


def _uuid(*parts: str) -> str:
    """An id that depends on the parts alone."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(parts)))


def _task(session: Session, stimulus: np.ndarray) -> dict[str, np.ndarray]:
    """Columns that both formats have: block, contrasts (NaN on the side without), movement."""
    b = session.behaviour
    # At contrast 0 the outcome tells the side: a rewarded choice was of the stimulus' side.
    by_outcome = (b["choice"] < 0) == (b["reward"] > 0)
    on_right = np.where(b["contrast"] == 0, by_outcome, b["contrast"] > 0)
    strength = np.abs(np.asarray(b["contrast"], float))
    return {
        "block": np.asarray(b["block"], float),
        "left": np.where(on_right, np.nan, strength),
        "right": np.where(on_right, strength, np.nan),
        "movement": stimulus + b.get("reaction-time", np.nan),
    }


def _alf_trials(session: Session, stimulus: np.ndarray) -> pd.DataFrame:
    """IBL's trials table: one row per trial, times in seconds."""
    task = _task(session, stimulus)
    moved = task["movement"]
    response = np.where(np.isfinite(moved), moved, stimulus + 0.5) + RESPONSE
    columns = {
        "intervals_0": stimulus + min(session.window[0], 0) - 0.1,
        "intervals_1": np.maximum(stimulus + session.window[1], response) + 0.1,
        "stimOn_times": stimulus,
        "goCue_times": stimulus + 0.001,
        "firstMovement_times": moved,
        "response_times": response,
        "feedback_times": response,
        "choice": np.asarray(session.behaviour["choice"], float),
        "feedbackType": np.where(session.behaviour["reward"] > 0, 1.0, -1.0),
        "contrastLeft": task["left"],
        "contrastRight": task["right"],
        "probabilityLeft": task["block"],
    }
    return pd.DataFrame(columns)


def _alf_traces(session: Session, stimulus: np.ndarray, stop: float) -> dict[str, np.ndarray]:
    """Wheel and camera, as far as the session has them."""
    files, edges = {}, bin_edges(session, stimulus)
    if (speed := session.behaviour.get("wheel-speed")) is not None:
        # The angle (rad) at the bin edges, between which it is linear; the speed is its slope.
        direction = np.where(session.behaviour["choice"] > 0, -1.0, 1.0)
        moved = np.zeros(edges.shape)
        moved[:, 1:] = speed * direction[:, None] * session.bin_size
        files["_ibl_wheel.timestamps.npy"] = np.concatenate([[0], edges.ravel(), [stop]])
        files["_ibl_wheel.position.npy"] = np.cumsum(np.pad(moved.ravel(), 1))
    if "whisker-motion-energy" in session.behaviour:
        frames = np.arange(0, stop, 1 / CAMERA_RATE)
        energy = _sampled(session, "whisker-motion-energy", stimulus, frames)
        files |= {"_ibl_leftCamera.times.npy": frames, "leftCamera.ROIMotionEnergy.npy": energy}
    return files


def _sampled(session: Session, key: str, stimulus: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Behaviour (K, T) at ``times`` (S,), on the line through the bins' values at their centres."""
    centres = bin_edges(session, stimulus)[:, :-1] + session.bin_size / 2
    return np.interp(times, centres.ravel(), session.behaviour[key].ravel())


def _alf_probe(
    session: Session, mine: np.ndarray, probe: str, stimulus: np.ndarray, stop: float
) -> dict[str, Any]:
    """The spike sorting of the neurons ``mine`` (n,), all on one probe."""
    n, rng = len(mine), generator_of(session, probe)
    times, clusters = spike_times(session, mine, stimulus, stop, rng)

    # Neurons stand along the probe region by region, each on a channel of its own; the channels
    # in between belong to the region of the neuron below them.
    along = np.argsort(pd.factorize(session.regions[mine])[0], kind="stable")
    n_channels = max(N_CHANNELS, n)
    channels = np.empty(n, dtype=np.int64)
    channels[along] = np.arange(n) * n_channels // n
    below = along[np.searchsorted(channels[along], np.arange(n_channels), side="right") - 1]

    # "id 12345" names a structure that the atlas does not have; 0 is ``void``.
    known, labels = allen_ids() | {"": 0}, session.regions[mine].tolist()
    locations = np.array([known[x] if x in known else int(x.removeprefix("id ")) for x in labels])

    columns = {key: values[mine] for key, values in session.neurons.items()}
    depth = np.asarray(columns.get("depth", 20.0 * (channels // 2)), dtype=float)  # um
    names = columns.get("uuid", [_uuid(ORIGIN, session.name, probe, str(i)) for i in range(n)])
    metrics = {"cluster_id": np.arange(n), "label": columns.get("label", np.ones(n))}
    return {
        "spikes.times.npy": times,
        "spikes.clusters.npy": clusters.astype(np.int32),
        "clusters.channels.npy": channels,
        "clusters.depths.npy": depth,
        "clusters.uuids.csv": pd.DataFrame({"uuids": names}),
        "clusters.metrics.pqt": pd.DataFrame(metrics),
        "channels.brainLocationIds_ccf_2017.npy": locations[below],
    }


SAMPLE_RATE = 50.0  # Hz, of behaviour
FEEDBACK = 0.1  # s from movement to feedback
SIDES = ("left", "right")
HELD_OUT = {"test": 3, "val": 7}
SCALED = [("whisker", "whisker_motion_energy"), *(("paws", f"{x}_paw_speed") for x in SIDES)]
WINDOWS = {  # of one second each: event, start relative to it (s)
    "choice": ("movement_onset_time", -1.0),
    "reward": ("feedback_time", 0.0),
    "stimulus_contrast": ("stim_on_time", -0.9),
    "movement_window": ("movement_onset_time", 0.0),
    "licking_window": ("feedback_time", 0.0),
}


def write_bwb_session(session: Session, path: str | Path, build: str = "selected_units") -> Path:
    """Write a simulated session as a file that :func:`mtm.bwb.load_session` reads.

    Paws (a noisy copy of the wheel) and licks (after rewards) are made up. Splits are the
    benchmark's, by whole trials, without its gaps of 20 s. ``session`` needs a window from -1 to
    2.5 s, which holds those of the tasks. ``build`` is "selected_units" (above 1 Hz) or
    "all_units".
    """
    if session.window[0] > -1 or session.window[1] < 2.5:
        raise ValueError(f"window must hold -1 to 2.5 s, got {session.window}")
    stimulus, stop = layout(session)
    units = np.arange(session.n_neurons)
    if build == "selected_units":
        units = np.flatnonzero(session.firing_rates > 1.0)
    rng = np.random.default_rng(list(session.name.encode()))
    times, unit = spike_times(session, units, stimulus, stop, rng)
    trials = _bwb_trials(session, stimulus)
    ids = np.array([_uuid(BWB_ORIGIN, session.name, str(unit)) for unit in units])
    table = {"id": ids, "firing_rate": session.firing_rates[units]}
    table |= {f"region_{x.lower()}": at_level(session, x).regions[units] for x in LEVELS}
    if build == "selected_units":  # a tenth for each, spread over the regions
        tenth = np.arange(len(units)) % 10
        table |= {f"ts2_co_smoothing_is_held_out_{x}": tenth == i for x, i in HELD_OUT.items()}
    series = _bwb_traces(session, stimulus, stop, trials, rng)
    groups: dict[str, dict[str, np.ndarray]] = {
        "spikes": {"timestamps": times, "unit_index": unit},
        "units": table,
        "trials": trials,
        **_bwb_intervals(trials, times[[0, -1]]),
        **series,
        **{f"{group}/domain": _interval(np.array([[0.0, stop]])) for group in series},
    }
    attributes: dict[str, dict[str, Any]] = {
        "session": {"id": _uuid(BWB_ORIGIN, session.name)},
        "subject": {"id": session.subject},
        "brainset": {"derived_version": "0.1.0", "unit_filtering": build},
        **{group: {"sampling_rate": SAMPLE_RATE} for group in series},
    }
    for group, column in SCALED:  # the scorer divides these by their spread
        values, name = series[group][column], f"ts1_normalize/{group}/{column}"
        attributes[name] = {"mean": values.mean(), "std": values.std()}
    h5py, path = optional("h5py", "bwb"), Path(path)
    with atomic_write(path) as partial, h5py.File(partial, "w") as file:
        for group, columns in groups.items():
            for name, values in columns.items():
                text = np.char.encode(values, "utf-8") if values.dtype.kind == "U" else values
                file[f"{group}/{name}"] = text
        for group, pairs in attributes.items():
            file.require_group(group).attrs.update(pairs)
    return path


def _bwb_trials(session: Session, stimulus: np.ndarray) -> dict[str, np.ndarray]:
    """The table of trials, times in seconds."""
    task, behaviour = _task(session, stimulus), session.behaviour
    return {
        "start": stimulus - 0.9,
        "end": task["movement"] + FEEDBACK + 1.0,
        "stim_on_time": stimulus,
        "movement_onset_time": task["movement"],
        "feedback_time": task["movement"] + FEEDBACK,
        "probability_left": task["block"],
        "contrast_left": task["left"],
        "contrast_right": task["right"],
        "choice": np.where(behaviour["choice"] < 0, 0, 1),  # 0 = right
        "reward": behaviour["reward"],
        "stimulus_contrast": np.searchsorted(CONTRASTS, np.abs(behaviour["contrast"])),
        "is_valid": np.ones(len(stimulus), dtype=bool),
        "trial_index": np.arange(len(stimulus)),
    }


def _bwb_intervals(trials: dict[str, np.ndarray], ends: np.ndarray) -> dict[str, Any]:
    """The window of each task in each trial, and the splits of the recording."""
    # From the first to the last moment that any task reads of a trial, (K, 2).
    spans = np.stack([trials["start"], trials["end"]], axis=1)
    groups = {"task_aligned_intervals/domain": _interval(spans)}
    for name, (event, begin) in WINDOWS.items():
        bounds = trials[event][:, None] + [begin, begin + 1.0]
        labels = {key: trials[key] for key in (name, "trial_index") if key in trials}
        groups[f"task_aligned_intervals/{name}"] = _interval(bounds) | labels
    # For behaviour (ts1) 40, 20 and 40 %; for neurons (ts2) five chunks. Cuts lie between trials.
    edges = np.concatenate([ends[:1], (spans[:-1, 1] + spans[1:, 0]) / 2, ends[1:]])
    parts: dict[str, list[Any]] = {}
    for split, names, shares in (
        ("ts1", ("train", "val", "test"), (0.0, 0.4, 0.6, 1.0)),
        ("ts2", ("train", "test", "train", "val", "test"), np.arange(6) / 5),
    ):
        cuts = edges[np.round(np.array(shares) * len(spans)).astype(int)]
        for name, begin, end in zip(names, cuts, cuts[1:], strict=False):
            parts.setdefault(f"{split}_{name}_domain", []).append([begin, end])
    return groups | {name: _interval(np.array(bounds)) for name, bounds in parts.items()}


def _bwb_traces(
    session: Session,
    stimulus: np.ndarray,
    stop: float,
    trials: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Behaviour 50 times a second: the session's, interpolated between trials; paws and licks."""
    times = np.arange(0.0, stop, 1 / SAMPLE_RATE)
    wheel = _sampled(session, "wheel-speed", stimulus, times)
    whisker = _sampled(session, "whisker-motion-energy", stimulus, times)
    since_reward = times[:, None] - trials["feedback_time"][trials["reward"] == 1]
    licking = ((since_reward > 0.1) & (since_reward < 0.9)).any(axis=1)
    paws: dict[str, np.ndarray] = {}
    for side in SIDES:
        paws[f"{side}_paw_speed"] = 20.0 * wheel + rng.gamma(2.0, 5.0, len(times))
        confident = rng.random(len(times) // 25 + 1) < 0.9  # lost for half a second at a time
        paws[f"is_{side}_paw_confident"] = np.repeat(confident, 25)[: len(times)]
    return {
        "wheel": {"wheel_speed": wheel},
        "whisker": {"whisker_motion_energy": whisker},
        "paws": paws,
        "licks": {"licking_rate": SAMPLE_RATE * rng.poisson(np.where(licking, 0.14, 0.001))},
    }


def _interval(bounds: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of intervals (n, 2)."""
    return {"start": bounds[:, 0], "end": bounds[:, 1]}
