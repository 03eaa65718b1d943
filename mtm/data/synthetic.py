"""Simulated sessions written in the file formats of real recordings.

`write_alf` writes a :class:`~mtm.session.Session` as the International Brain Laboratory stores its
own recordings (ALF), and `index_alf` makes the two tables that ONE needs to find it; then
`mtm.data.ibl.load_session` reads it as it reads the public server, without a network.
`write_bwb_session` writes a session as a file of BrainWideBench, for `mtm.bwb.load_session`.

Both lay the trials end to end on one clock (`mtm.simulation.layout`). A count becomes that many
spikes at random times inside its bin; between trials, neurons fire at their mean rates.
Everything random is seeded by the session's name.
"""

from __future__ import annotations

import datetime
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mtm.data.regions import LEVELS, allen_ids, at_level
from mtm.files import atomic_write, optional
from mtm.session import Session, SessionError
from mtm.simulation import CONTRASTS, RESPONSE, bin_edges, generator_of, layout, spike_times

TASK = ("choice", "block", "reward", "contrast")  # behaviour that a trials table needs
CAMERA_RATE = 60.0  # Hz, as IBL's left camera
N_CHANNELS = 384  # of a Neuropixels probe
ORIGIN = "mtm.alf"  # marks the tables that index_alf makes, and seeds ids, so it must not change
BWB_ORIGIN = "mtm.simulate"


def write_alf(
    session: Session,
    root: str | Path,
    *,
    lab: str = "simlab",
    date: str = "2026-01-02",
    number: int = 1,
) -> Path:
    """Write a session as an ALF session folder.

    The wheel turns with ``wheel-speed``, in opposite directions for the two choices. Depths and
    ids that the session does not have are made up.

    Args:
        session: needs behaviour ``choice`` (-1 right, +1 left, 0 none), ``block`` (probability of
            left), ``reward`` (0/1) and ``contrast`` (right minus left), each (K,). Optional:
            ``reaction-time`` (K,) seconds, ``wheel-speed`` (K, T) rad/s and
            ``whisker-motion-energy`` (K, T); neurons ``probe`` (default: all on ``probe00``),
            ``depth``, ``label``, ``uuid``. The window's 0 becomes the stimulus onset.
        root: folder of the tree.
        lab, date, number: place of the session in it; the subject is the session's, or its name.

    Returns:
        the session's folder ``root/lab/Subjects/subject/date/number``. It is read back with its
        neurons grouped by probe, probes in the order of their names.

    Raises:
        SessionError: behaviour that is missing or NaN, a region that is no Allen acronym, a name
            that ALF does not allow, or files of another recording in the folder.
    """
    subject = session.subject or session.name
    probes = session.neurons.get("probe", np.full(session.n_neurons, "probe00"))
    names = {lab: r"\w+", subject: r"[\w.-]+", date: r"\d{4}-\d\d-\d\d"}
    names |= dict.fromkeys(np.unique(probes).tolist(), r"probe\w+")
    for name, pattern in names.items():
        if not re.fullmatch(pattern, name):
            problem = f"{name!r} is not among the names that ALF allows ({pattern})"
            raise SessionError(f"session {session.name!r}: {problem}")
    _require_task(session)
    stimulus, stop = layout(session)
    files: dict[str, Any] = {"_ibl_trials.table.pqt": _alf_trials(session, stimulus)}
    files |= _alf_traces(session, stimulus, stop)
    for probe in np.unique(probes).tolist():
        sorting = _alf_probe(session, np.flatnonzero(probes == probe), probe, stimulus, stop)
        files |= {f"{probe}/pykilosort/{name}": content for name, content in sorting.items()}

    path = Path(root) / lab / "Subjects" / subject / date / f"{number:03d}"
    alf = path / "alf"
    present = {file.relative_to(alf).as_posix() for file in alf.rglob("*") if file.is_file()}
    if other := sorted(present - set(files)):
        raise SessionError(f"{alf} holds another recording's {other[0]}; pass another number")
    for name, content in files.items():
        (alf / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            np.save(alf / name, content)
        elif name.endswith(".csv"):
            content.to_csv(alf / name, index=False)
        else:
            content.to_parquet(alf / name)
    return path


def index_alf(root: str | Path) -> dict[str, Path]:
    """Make the tables by which ONE's local mode finds the sessions under ``root``.

    ONE's own indexer gives random ids. Here a session's id depends on lab, subject, date and number
    alone, so that the same tree has the same eids on every machine. Of a dataset with several
    revisions the last is the default one.

    Args:
        root: folder of the tree; ``sessions.pqt`` and ``datasets.pqt`` are written into it.

    Returns:
        eid -> the session's folder, ordered by lab, subject, date and number.

    Raises:
        SessionError: no session under ``root``, or tables there that another tool made.
        ImportError: without the ``[data]`` extra.
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
        default = {}  # dataset without its revision (a folder #name#) -> path of the last revision
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.*.*")}
        for path in sorted(files, key=lambda path: re.findall(r"#([^/]*)#/", path)):
            default[re.sub(r"#[^/]*#/", "", path)] = path
        for path, file in files.items():
            # No hash: with an empty one, ONE would compare it with every file's.
            facts = (file.stat().st_size, None, True, "NOT_SET", path in default.values())
            datasets.append((eid, _uuid(ORIGIN, eid, path), path, *facts))
    if not sessions:
        raise SessionError(f"no sessions lab/Subjects/subject/date/number under {root}")
    meta = {"date_created": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "origin": ORIGIN}
    kinds = cache.SESSIONS_COLUMNS
    frame = pd.DataFrame(sessions, columns=list(kinds)).astype(kinds).set_index("id").sort_index()
    parquet.save(root / "sessions.pqt", frame, meta)
    kinds = cache.DATASETS_COLUMNS | {"default_revision": bool}
    frame = pd.DataFrame(datasets, columns=list(kinds)).astype(kinds)
    parquet.save(root / "datasets.pqt", frame.set_index(["eid", "id"]).sort_index(), meta)
    return folders


def _uuid(*parts: str) -> str:
    """An id that depends on the parts alone."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(parts)))


def _require_task(session: Session) -> None:
    """Check that the behaviour of a trials table is there, and without NaN."""
    for key in TASK:
        if key not in session.behaviour:
            raise SessionError(f"session {session.name!r}, behaviour {key!r}: missing; need {TASK}")
    for key in (*TASK, "wheel-speed"):
        if not np.isfinite(session.behaviour.get(key, 0.0)).all():
            problem = "NaN or infinite; leave out those trials with session.select"
            raise SessionError(f"session {session.name!r}, behaviour {key!r}: {problem}")


def _contrasts(behaviour: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Contrast left and right (K,), NaN on the side without stimulus."""
    contrast, rewarded = np.asarray(behaviour["contrast"], float), behaviour["reward"] > 0
    # At contrast 0 the outcome tells the side: a rewarded choice was of the stimulus' side.
    on_right = np.where(contrast == 0, (behaviour["choice"] < 0) == rewarded, contrast > 0)
    strength = np.abs(contrast)
    return np.where(on_right, np.nan, strength), np.where(on_right, strength, np.nan)


# ------------------------------------------------------------------------------------- ALF files


def _alf_trials(session: Session, stimulus: np.ndarray) -> pd.DataFrame:
    """IBL's trials table: one row per trial, times in seconds."""
    behaviour = session.behaviour
    rewarded = behaviour["reward"] > 0
    left, right = _contrasts(behaviour)
    reaction = behaviour.get("reaction-time", np.full(session.n_trials, np.nan))
    response = stimulus + np.where(np.isfinite(reaction), reaction, 0.5) + RESPONSE
    return pd.DataFrame(
        {
            "intervals_0": stimulus + min(session.window[0], 0) - 0.1,
            "intervals_1": np.maximum(stimulus + session.window[1], response) + 0.1,
            "stimOn_times": stimulus,
            "goCue_times": stimulus + 0.001,
            "firstMovement_times": stimulus + reaction,
            "response_times": response,
            "feedback_times": response,
            "choice": np.asarray(behaviour["choice"], float),
            "feedbackType": np.where(rewarded, 1.0, -1.0),
            "rewardVolume": np.where(rewarded, 1.5, 0.0),  # microlitres
            "contrastLeft": left,
            "contrastRight": right,
            "probabilityLeft": np.asarray(behaviour["block"], float),
        }
    )


def _alf_traces(session: Session, stimulus: np.ndarray, stop: float) -> dict[str, np.ndarray]:
    """Wheel and camera, as far as the session has them."""
    files = {}
    edges = bin_edges(session, stimulus)
    if (speed := session.behaviour.get("wheel-speed")) is not None:
        # The angle (rad) at the bin edges, between which it is linear; the speed is its slope.
        direction = np.where(session.behaviour["choice"] > 0, -1.0, 1.0)
        moved = np.zeros(edges.shape)
        moved[:, 1:] = speed * direction[:, None] * session.bin_size
        position = np.concatenate([[0], np.cumsum(moved)])
        files["_ibl_wheel.timestamps.npy"] = np.concatenate([[0], edges.ravel(), [stop]])
        files["_ibl_wheel.position.npy"] = np.append(position, position[-1])
    if (energy := session.behaviour.get("whisker-motion-energy")) is not None:
        # At each frame, on the line through the bins' values at their centres.
        frames = np.arange(0, stop, 1 / CAMERA_RATE)
        centres = edges[:, :-1] + session.bin_size / 2
        files["_ibl_leftCamera.times.npy"] = frames
        values = np.interp(frames, centres.ravel(), energy.ravel())
        files["leftCamera.ROIMotionEnergy.npy"] = values
    return files


def _alf_probe(
    session: Session, mine: np.ndarray, probe: str, stimulus: np.ndarray, stop: float
) -> dict[str, Any]:
    """The spike sorting of the neurons ``mine`` (n,), all on one probe."""
    n, rng = len(mine), generator_of(session, probe)
    times, clusters = spike_times(session, mine, stimulus, stop, rng)

    # Neurons stand along the probe region by region, each on a channel of its own; the channels
    # in between belong to the region of the neuron below them.
    regions = session.regions[mine]
    along = np.argsort(pd.factorize(regions)[0], kind="stable")
    n_channels = max(N_CHANNELS, n)
    channels = np.empty(n, dtype=np.int64)
    channels[along] = np.arange(n) * n_channels // n
    below = along[np.searchsorted(channels[along], np.arange(n_channels), side="right") - 1]

    columns = {key: values[mine] for key, values in session.neurons.items()}
    depth = np.asarray(columns.get("depth", 20.0 * (channels // 2)), dtype=float)  # um
    names = columns.get("uuid", [_uuid(ORIGIN, session.name, probe, str(i)) for i in range(n)])
    metrics = {"cluster_id": np.arange(n), "label": columns.get("label", np.ones(n))}
    metrics["firing_rate"] = np.bincount(clusters, minlength=n) / stop
    return {
        "spikes.times.npy": times,
        "spikes.clusters.npy": clusters.astype(np.int32),
        "spikes.amps.npy": rng.lognormal(np.log(1e-4), 0.3, len(times)).astype(np.float32),
        "spikes.depths.npy": (depth[clusters] + rng.normal(0, 10, len(times))).astype(np.float32),
        "clusters.channels.npy": channels,
        "clusters.depths.npy": depth,
        "clusters.uuids.csv": pd.DataFrame({"uuids": names}),
        "clusters.metrics.pqt": pd.DataFrame(metrics),
        "channels.brainLocationIds_ccf_2017.npy": _ids_of(session, regions)[below],
    }


def _ids_of(session: Session, regions: np.ndarray) -> np.ndarray:
    """Allen id of each region label, (n,) int64; ``""`` becomes 0, which is ``void``."""
    ids, labels = allen_ids() | {"": 0}, regions.tolist()
    unknown = [x for x in labels if x not in ids and not x.startswith("id ")]
    if unknown:
        problem = f"{unknown[0]!r} is not an acronym of the Allen atlas"
        raise SessionError(f"session {session.name!r}, regions: {problem}")
    # "id 12345" names a structure that the atlas does not have.
    return np.array([ids[x] if x in ids else int(x[3:]) for x in labels])


# --------------------------------------------------------------------------------- BrainWideBench

SAMPLE_RATE = 50.0  # Hz, of behaviour
FEEDBACK = 0.1  # s from movement to feedback
CHUNKS = ("train", "test", "train", "val", "test")  # fifths of a recording, for tasks on neurons
SCALED = ("whisker/whisker_motion_energy", "paws/left_paw_speed", "paws/right_paw_speed")


def write_bwb_session(session: Session, path: str | Path, build: str = "selected_units") -> Path:
    """Write a simulated session as a file that :func:`mtm.bwb.load_session` reads.

    The file has every group that the benchmark's tasks on neurons and on behaviour need. Paws (a
    noisy copy of the wheel, here and there not confident) and licks (after rewards) are made up.
    Splits are the benchmark's, by whole trials, without its gaps of 20 s.

    Args:
        session: from `simulate`, with a window from -1 to 2.5 s or more, so that the windows of the
            tasks are part of the simulation; elsewhere neurons fire at their mean rates.
        path: of the file.
        build: "selected_units" (those above 1 Hz) or "all_units".

    Returns:
        the file's path.

    Raises:
        ImportError: without the ``[bwb]`` extra.
    """
    stimulus, stop = layout(session)
    units = np.arange(session.n_neurons)
    if build == "selected_units":
        units = np.flatnonzero(session.firing_rates > 1.0)
    rng = np.random.default_rng(list(session.name.encode()))
    times, unit = spike_times(session, units, stimulus, stop, rng)
    trials = _bwb_trials(session, stimulus)
    # From the first to the last moment that any task reads of a trial, (K, 2).
    spans = np.stack([stimulus - 0.9, trials["feedback_time"] + 1.0], axis=1)
    series = _bwb_traces(session, stimulus, stop, trials, rng)
    groups: dict[str, Any] = {
        "spikes": {"timestamps": times, "unit_index": unit},
        "units": _bwb_units(session, units, build),
        "trials": trials,
        **_bwb_windows(trials, spans),
        **_bwb_splits(spans, times[[0, -1]]),
        **series,
        **{f"{group}/domain": _interval(np.array([[0.0, stop]])) for group in series},
    }
    attributes: dict[str, dict[str, Any]] = {
        "session": {"id": _uuid(BWB_ORIGIN, session.name)},
        "subject": {"id": session.subject},
        "brainset": {"derived_version": "0.1.0", "unit_filtering": build},
        **{group: {"sampling_rate": SAMPLE_RATE} for group in series},
    }
    for place in SCALED:  # the scorer divides these by their spread
        group, _, column = place.partition("/")
        values = series[group][column]
        attributes[f"ts1_normalize/{place}"] = {"mean": values.mean(), "std": values.std()}
    h5py, path = optional("h5py", "bwb"), Path(path)
    with atomic_write(path) as partial, h5py.File(partial, "w") as file:
        for group, columns in groups.items():
            for name, values in columns.items():
                text = np.char.encode(values, "utf-8") if values.dtype.kind == "U" else values
                file[f"{group}/{name}"] = text
        for group, pairs in attributes.items():
            file.require_group(group).attrs.update(pairs)
    return path


def _bwb_units(session: Session, units: np.ndarray, build: str) -> dict[str, np.ndarray]:
    """The table of units: ids, rates, regions at three levels, and which are held out."""
    ids = np.array([_uuid(BWB_ORIGIN, session.name, str(unit)) for unit in units])
    table = {"id": ids, "firing_rate": session.firing_rates[units]}
    for level in LEVELS:
        table[f"region_{level.lower()}"] = at_level(session, level).regions[units]
    if build == "selected_units":  # a tenth for each, spread over the regions
        for part, remainder in (("test", 3), ("val", 7)):
            held = np.arange(len(units)) % 10 == remainder
            table[f"ts2_co_smoothing_is_held_out_{part}"] = held
    return table


def _bwb_trials(session: Session, stimulus: np.ndarray) -> dict[str, np.ndarray]:
    """The table of trials, times in seconds."""
    behaviour = session.behaviour
    movement = stimulus + behaviour["reaction-time"]
    left, right = _contrasts(behaviour)
    return {
        "start": stimulus - 0.9,
        "end": movement + FEEDBACK + 1.0,
        "stim_on_time": stimulus,
        "movement_onset_time": movement,
        "feedback_time": movement + FEEDBACK,
        "probability_left": behaviour["block"],
        "contrast_left": left,
        "contrast_right": right,
        "choice": np.where(behaviour["choice"] < 0, 0, 1),  # 0 = right
        "reward": behaviour["reward"],
        "stimulus_contrast": np.searchsorted(CONTRASTS, np.abs(behaviour["contrast"])),
        "is_valid": np.ones(len(stimulus), dtype=bool),
        "trial_index": np.arange(len(stimulus)),
    }


def _bwb_windows(trials: dict[str, np.ndarray], spans: np.ndarray) -> dict[str, Any]:
    """The window of each task in each trial, one second each."""
    groups = {"task_aligned_intervals/domain": _interval(spans)}
    for name, event, begin in (
        ("choice", "movement_onset_time", -1.0),
        ("reward", "feedback_time", 0.0),
        ("stimulus_contrast", "stim_on_time", -0.9),
        ("movement_window", "movement_onset_time", 0.0),
        ("licking_window", "feedback_time", 0.0),
    ):
        bounds = trials[event][:, None] + [begin, begin + 1.0]
        labels = {key: trials[key] for key in (name, "trial_index") if key in trials}
        groups[f"task_aligned_intervals/{name}"] = _interval(bounds) | labels
    return groups


def _bwb_splits(spans: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
    """The splits for behaviour (ts1: 40, 20 and 40 %) and for neurons (ts2: five chunks)."""
    # Cuts lie half way between trials.
    edges = np.concatenate([ends[:1], (spans[:-1, 1] + spans[1:, 0]) / 2, ends[1:]])
    parts: dict[str, list[Any]] = {}
    for split, names, shares in (
        ("ts1", ("train", "val", "test"), (0.0, 0.4, 0.6, 1.0)),
        ("ts2", CHUNKS, np.arange(6) / 5),
    ):
        cuts = edges[np.round(np.array(shares) * len(spans)).astype(int)]
        for name, begin, end in zip(names, cuts, cuts[1:], strict=False):
            parts.setdefault(f"{split}_{name}_domain", []).append([begin, end])
    return {name: _interval(np.array(bounds)) for name, bounds in parts.items()}


def _bwb_traces(
    session: Session,
    stimulus: np.ndarray,
    stop: float,
    trials: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, dict[str, np.ndarray]]:
    """Behaviour 50 times a second: the session's, interpolated between trials; paws and licks."""
    times = np.arange(0.0, stop, 1 / SAMPLE_RATE)
    centres = (bin_edges(session, stimulus)[:, :-1] + session.bin_size / 2).ravel()
    wheel, whisker = (
        np.interp(times, centres, session.behaviour[key].ravel())
        for key in ("wheel-speed", "whisker-motion-energy")
    )
    since_reward = times[:, None] - trials["feedback_time"][trials["reward"] == 1]
    licking = ((since_reward > 0.1) & (since_reward < 0.9)).any(axis=1)
    paws = {}
    for side in ("left", "right"):
        paws[f"{side}_paw_speed"] = 20.0 * wheel + rng.gamma(2.0, 5.0, len(times))
        # Confidence is lost for half a second at a time.
        confident = np.repeat(rng.random(len(times) // 25 + 1) < 0.9, 25)[: len(times)]
        paws[f"is_{side}_paw_confident"] = confident
    return {
        "wheel": {"wheel_speed": wheel},
        "whisker": {"whisker_motion_energy": whisker},
        "paws": paws,
        "licks": {"licking_rate": SAMPLE_RATE * rng.poisson(np.where(licking, 0.14, 0.001))},
    }


def _interval(bounds: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of intervals (n, 2)."""
    return {"start": bounds[:, 0], "end": bounds[:, 1]}
