"""A session as the files of an IBL recording (ALF), and an index by which ONE finds and reads them.

``write_alf`` turns a (simulated) :class:`~mtm.session.Session` into spike times, a trials table, a
wheel and a camera, laid out as the International Brain Laboratory lays out its own recordings;
``index_alf`` makes the two tables that ONE's local mode needs. `mtm.data.ibl.load_session` then
reads the result exactly as it reads the public server, and no network is involved.
"""

from __future__ import annotations

import re
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mtm.checkpoint import extra, replacing
from mtm.data import regions as atlas
from mtm.data.regions import LEVELS, at_level
from mtm.session import Session, SessionError
from mtm.simulation import CONTRASTS, RESPONSE, bin_edges, generator_of, layout, spike_times

ESSENTIAL = ("choice", "block", "reward", "contrast")
CAMERA_RATE = 60.0  # Hz, as IBL's left camera
N_CHANNELS = 384  # of a Neuropixels probe
ORIGIN = "mtm.data.synthetic"  # who made the tables of an index


def write_alf(
    session: Session,
    root: str | Path,
    *,
    lab: str = "simlab",
    date: str = "2026-01-02",
    number: int = 1,
) -> Path:
    """Write a session as an ALF session folder.

    The trials are laid end to end on the recording's clock, at least 1 s apart. A count becomes
    that many spikes at random times strictly inside its bin; between the trials each neuron fires
    at its mean rate. The wheel turns with ``wheel-speed``,
    in opposite directions for the two choices, and rests between trials; the
    camera runs at 60 Hz. Everything random depends on the session's name alone. Places (``mlapdv``,
    depths that the session does not have) are made up; regions and counts are the session's.

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
        SessionError: an essential behaviour missing or not finite, a region that is no Allen
            acronym, a name that ALF does not allow, a recording of more than 1e5 s, or files of
            another recording in the folder.
        ImportError: without the ``[data]`` extra.
    """
    subject = session.subject or session.name
    place = (lab, subject, date)
    patterns = (r"\w+", r"[\w.-]+", r"\d{4}-\d{2}-\d{2}")
    if not all(re.fullmatch(p, part) for p, part in zip(patterns, place, strict=True)):
        _fail(session, "lab, subject, date", f"{place} are not names that ALF allows ({patterns})")
    _check_behaviour(session)
    stimulus, stop = layout(session)
    files: dict[str, Any] = {"_ibl_trials.table.pqt": _trials_table(session, stimulus)}
    if "wheel-speed" in session.behaviour:
        files |= _wheel(session, stimulus, stop)
    if "whisker-motion-energy" in session.behaviour:
        files |= _camera(session, stimulus, stop)
    probes = session.neurons.get("probe", np.full(session.n_neurons, "probe00"))
    for probe in np.unique(probes).tolist():
        if not re.fullmatch(r"probe\w+", probe):
            _fail(session, "neurons 'probe'", f"{probe!r} is not like 'probe00', 'probe01'")
        folder = f"{probe}/pykilosort/"
        sorted_ = _probe(session, np.flatnonzero(probes == probe), probe, stimulus, stop)
        files |= {folder + name: content for name, content in sorted_.items()}

    path = Path(root) / lab / "Subjects" / subject / date / f"{number:03d}"
    alf = path / "alf"
    there = {f.relative_to(alf).as_posix() for f in alf.rglob("*") if f.is_file()}
    if strangers := sorted(there - set(files)):
        _fail(session, str(alf), f"holds another recording's {strangers[0]}; pass another number")
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

    ONE's own indexer gives random ids. Here a session's id is a function of lab, subject, date and
    number, so that the same tree has the same eids on every machine, wherever it lies and whatever
    other sessions are added. Of a dataset with several revisions the last is the default one.

    Args:
        root: folder of the tree; ``sessions.pqt`` and ``datasets.pqt`` are written into it.

    Returns:
        eid -> the session's folder, ordered by lab, subject, date and number.

    Raises:
        SessionError: no session under ``root``, or tables there that this function did not make.
        ImportError: without the ``[data]`` extra.
    """
    root = Path(root).resolve()
    cache, parquet = extra("one.alf.cache", "data"), extra("iblutil.io.parquet", "data")
    path_of = extra("one.converters", "data").session_record2path
    if not any(extra("one.alf.io", "data").iter_sessions(root)):
        raise SessionError(f"no sessions lab/Subjects/subject/date/number under {root}")
    for name in ("sessions.pqt", "datasets.pqt"):
        if (root / name).exists():
            origin = parquet.load(root / name)[1].get("origin")
            if origin not in (ORIGIN, [ORIGIN]):
                raise SessionError(
                    f"{root / name} is the index of another tool (origin {origin!r}), whose eids "
                    "would be lost; move the file away, or index a copy of the tree"
                )
    with tempfile.TemporaryDirectory() as made:
        tables = cache.make_parquet_db(root, out_dir=made, hash_ids=False)
        (sessions, meta), (datasets, _) = (parquet.load(table) for table in tables)

    sessions["eid"] = [_uuid(place) for place in sessions["id"]]
    eids = dict(zip(sessions["id"], sessions["eid"], strict=True))
    datasets["eid"] = [eids[place] for place in datasets["eid"]]
    datasets["id"] = [_uuid(*row) for row in zip(datasets.eid, datasets.rel_path, strict=True)]
    datasets["hash"] = None  # an empty hash would fail ONE's check of every file
    revision = datasets.rel_path.str.extract(r"#([^/]*)#/", expand=False).fillna("")
    plain = datasets.rel_path.str.replace(r"#[^/]*#/", "", regex=True)
    order = datasets.assign(plain=plain, revision=revision).sort_values("revision", kind="stable")
    datasets["default_revision"] = ~order.duplicated(["eid", "plain"], keep="last")
    index = sessions.drop(columns="id").set_index("eid").rename_axis("id").sort_index()
    parquet.save(root / "sessions.pqt", index, {**meta, "origin": ORIGIN})
    datasets = datasets.set_index(["eid", "id"]).sort_index()
    parquet.save(root / "datasets.pqt", datasets, {**meta, "origin": ORIGIN})
    ordered = sessions.sort_values("id").set_index("eid")
    return {eid: Path(path_of(row, root)) for eid, row in ordered.iterrows()}


# ------------------------------------------------------------------------------- parts


def _fail(session: Session, what: str, problem: str) -> NoReturn:
    raise SessionError(f"session {session.name!r}, {what}: {problem}")


def _uuid(*parts: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join((ORIGIN, *parts))))


def _check_behaviour(session: Session) -> None:
    for key in (*ESSENTIAL, "reaction-time", "wheel-speed", "whisker-motion-energy"):
        values = session.behaviour.get(key)
        if values is None:
            if key in ESSENTIAL:
                _fail(session, f"behaviour {key!r}", f"missing; a trials table needs {ESSENTIAL}")
            continue
        ndim = 2 if key in ("wheel-speed", "whisker-motion-energy") else 1
        if values.ndim != ndim:
            need = "one value a bin (K, T)" if ndim == 2 else "one value a trial (K,)"
            _fail(session, f"behaviour {key!r}", f"need {need}, got shape {values.shape}")
        if key in (*ESSENTIAL, "wheel-speed") and not np.isfinite(values).all():
            _fail(session, f"behaviour {key!r}", "NaN or infinite; leave out those trials")


def _trials_table(session: Session, stimulus: np.ndarray) -> Any:
    """IBL's trials table: a row a trial, seconds; NaN contrast on the side without stimulus."""
    behaviour = {key: np.asarray(session.behaviour[key], dtype=float) for key in ESSENTIAL}
    choice, reward, contrast = behaviour["choice"], behaviour["reward"] > 0, behaviour["contrast"]
    reported_right = (choice < 0) == reward  # where the contrast is 0, the outcome tells the side
    right = np.where(contrast == 0, reported_right, contrast > 0)
    reaction = session.behaviour.get("reaction-time", np.full(session.n_trials, np.nan))
    response = stimulus + np.where(np.isfinite(reaction), reaction, 0.5) + RESPONSE
    return extra("pandas", "data").DataFrame(
        {
            "intervals_0": stimulus + min(session.window[0], 0) - 0.1,
            "intervals_1": np.maximum(stimulus + session.window[1], response) + 0.1,
            "stimOn_times": stimulus,
            "goCue_times": stimulus + 0.001,
            "firstMovement_times": stimulus + reaction,
            "response_times": response,
            "feedback_times": response,
            "choice": choice,
            "feedbackType": np.where(reward, 1.0, -1.0),
            "rewardVolume": np.where(reward, 1.5, 0.0),  # microlitres
            "contrastLeft": np.where(right, np.nan, np.abs(contrast)),
            "contrastRight": np.where(right, np.abs(contrast), np.nan),
            "probabilityLeft": behaviour["block"],
        }
    )


def _wheel(session: Session, stimulus: np.ndarray, stop: float) -> dict[str, np.ndarray]:
    """Wheel angle in rad at the bin edges, where its speed changes; in between it is linear."""
    choice = np.asarray(session.behaviour["choice"], dtype=float)
    turn = session.behaviour["wheel-speed"] * np.where(choice > 0, -1.0, 1.0)[:, None]
    moved = np.zeros((session.n_trials, session.n_bins + 1))
    moved[:, 1:] = turn * session.bin_size
    position = np.concatenate([[0], np.cumsum(moved)])
    times = np.concatenate([[0], bin_edges(session, stimulus).ravel(), [stop]])
    return {
        "_ibl_wheel.timestamps.npy": times,
        "_ibl_wheel.position.npy": np.append(position, position[-1]),
    }


def _camera(session: Session, stimulus: np.ndarray, stop: float) -> dict[str, np.ndarray]:
    """Motion energy at each frame: the line through the bins' values at their centres."""
    frames = np.arange(0, stop, 1 / CAMERA_RATE)
    centres = bin_edges(session, stimulus)[:, :-1] + session.bin_size / 2
    energy = np.interp(frames, centres.ravel(), session.behaviour["whisker-motion-energy"].ravel())
    return {"_ibl_leftCamera.times.npy": frames, "leftCamera.ROIMotionEnergy.npy": energy}


def _probe(
    session: Session, mine: np.ndarray, probe: str, stimulus: np.ndarray, stop: float
) -> dict[str, Any]:
    """The spike sorting of the neurons ``mine`` (n,), all on one probe."""
    pandas = extra("pandas", "data")
    n, rng = len(mine), generator_of(session, probe)
    times, clusters = spike_times(session, mine, stimulus, stop, rng)

    # Along the probe the neurons stand region by region, each on a channel of its own.
    regions = session.regions[mine]
    _, first, group = np.unique(regions, return_index=True, return_inverse=True)
    along = np.argsort(first[group], kind="stable")
    n_channels = max(N_CHANNELS, n)
    channels = np.empty(n, dtype=np.int64)
    channels[along] = np.arange(n) * n_channels // n
    holder = along[np.searchsorted(channels[along], np.arange(n_channels), side="right") - 1]
    y = 20.0 * (np.arange(n_channels) // 2)  # micrometres from the tip
    x = np.resize([43.0, 11.0, 59.0, 27.0], n_channels)

    columns = {key: values[mine] for key, values in session.neurons.items()}
    depth = np.asarray(columns.get("depth", y[channels]), dtype=float)
    names = columns.get("uuid", [_uuid(session.name, probe, str(i)) for i in range(n)])
    metrics = {"cluster_id": np.arange(n), "label": columns.get("label", np.ones(n))}
    return {
        "spikes.times.npy": times,
        "spikes.clusters.npy": clusters.astype(np.int32),
        "spikes.amps.npy": rng.lognormal(np.log(1e-4), 0.3, len(times)).astype(np.float32),
        "spikes.depths.npy": (depth[clusters] + rng.normal(0, 10, len(times))).astype(np.float32),
        "clusters.channels.npy": channels,
        "clusters.depths.npy": depth,
        "clusters.uuids.csv": pandas.DataFrame({"uuids": names}),
        "clusters.metrics.pqt": pandas.DataFrame(
            metrics | {"firing_rate": np.bincount(clusters, minlength=n) / stop}
        ),
        "channels.brainLocationIds_ccf_2017.npy": _allen_ids(session, regions)[holder],
        "channels.mlapdv.npy": np.column_stack([x - 2000.0, 0 * y - 2000.0, y - 4000.0]),
        "channels.localCoordinates.npy": np.column_stack([x, y]),
    }


def _allen_ids(session: Session, regions: np.ndarray) -> np.ndarray:
    """Allen id of each region label, (n,) int64; ``""`` becomes 0, which is ``void``."""
    ids = atlas.allen_ids() | {"": 0}
    found = [ids.get(name, name.removeprefix("id ")) for name in regions.tolist()]
    try:
        return np.array([int(i) for i in found], dtype=np.int64)
    except ValueError:
        unknown = next(name for name in regions.tolist() if name not in ids)
        _fail(session, "regions", f"{unknown!r} is not an acronym of the Allen atlas")


SAMPLES = 50.0  # of behaviour, a second
FEEDBACK = 0.1  # seconds from the movement on
CHUNKS = ("train", "test", "train", "val", "test")  # of the split for tasks on single units


def write_session(session: Session, path: str | Path, build: str = "selected_units") -> Path:
    """Write a simulated session as a file that :func:`mtm.bwb.load_session` reads.

    Trials are laid end to end by `mtm.simulate.layout`, with every group that the benchmark's tasks
    on single units and on behaviour need. Paws (a noisy copy of the wheel, here and there not
    confident) and licks (after rewards) are made up. Splits are the benchmark's, by whole trials,
    without its gaps of 20 s. Everything random depends on the session's name alone.

    Args:
        session: from `simulate`, with a window from -1 to 2.5 s or more, so that what the tasks
            look at is part of the simulation; elsewhere neurons fire at their mean rates.
        path: of the file.
        build: "selected_units" (those above 1 Hz) or "all_units".

    Raises:
        ImportError: without the ``[bwb]`` extra.
    """
    stimulus, stop = layout(session)
    units = np.arange(session.n_neurons)
    if build == "selected_units":
        units = np.flatnonzero(session.firing_rates > 1.0)
    rng = np.random.default_rng(list(session.name.encode()))
    times, unit = spike_times(session, units, stimulus, stop, rng)
    trials = _trials(session, stimulus)
    hulls = np.stack([stimulus - 0.9, trials["feedback_time"] + 1.0], axis=1)
    groups: dict[str, Any] = {
        "spikes": {"timestamps": times, "unit_index": unit},
        "units": _units(session, units, build),
        "trials": trials,
        **_windows(trials, hulls),
        **_splits(hulls, times[[0, -1]]),
    }
    series = _series(session, stimulus, stop, trials, rng)
    for group, columns in series.items():
        groups[group] = columns
        groups[f"{group}/domain"] = _interval(np.array([[0.0, stop]]))
    attributes = {
        "session": {"id": _id(session.name)},
        "subject": {"id": session.subject},
        "brainset": {"derived_version": "0.1.0", "unit_filtering": build},
        **{group: {"sampling_rate": SAMPLES} for group in series},
    }
    for group, column in (("whisker", "whisker_motion_energy"), ("paws", "left_paw_speed"),
                          ("paws", "right_paw_speed")):  # fmt: skip
        values = series[group][column]
        scale = {"mean": values.mean(), "std": values.std()}
        attributes[f"ts1_normalize/{group}/{column}"] = scale
    return _write_groups(Path(path), groups, attributes)


def _id(*parts: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(("mtm.simulate", *parts))))


def _units(session: Session, units: np.ndarray, build: str) -> dict[str, np.ndarray]:
    ids = np.array([_id(session.name, str(unit)) for unit in units])
    table = {"id": ids, "firing_rate": session.firing_rates[units]}
    for level in LEVELS:
        table[f"region_{level.lower()}"] = at_level(session, level).regions[units]
    if build == "selected_units":
        for part in ("test", "val"):  # another tenth each, spread over the regions
            place = np.arange(len(units)) % 10
            held = place == (3 if part == "test" else 7)
            table[f"ts2_co_smoothing_is_held_out_{part}"] = held
    return table


def _trials(session: Session, stimulus: np.ndarray) -> dict[str, np.ndarray]:
    behaviour = session.behaviour
    movement = stimulus + behaviour["reaction-time"]
    contrast, right = behaviour["contrast"], behaviour["choice"] < 0
    on_right = np.where(contrast == 0, right == (behaviour["reward"] == 1), contrast > 0)
    return {
        "start": stimulus - 0.9,
        "end": movement + FEEDBACK + 1.0,
        "stim_on_time": stimulus,
        "movement_onset_time": movement,
        "feedback_time": movement + FEEDBACK,
        "probability_left": behaviour["block"],
        "contrast_left": np.where(on_right, np.nan, np.abs(contrast)),
        "contrast_right": np.where(on_right, np.abs(contrast), np.nan),
        "choice": np.where(right, 0, 1),
        "reward": behaviour["reward"],
        "stimulus_contrast": np.searchsorted(CONTRASTS, np.abs(contrast)),
        "is_valid": np.ones(len(stimulus), dtype=bool),
        "trial_index": np.arange(len(stimulus)),
    }


def _windows(trials: dict[str, np.ndarray], hulls: np.ndarray) -> dict[str, Any]:
    """The window of each task in each trial, and the hull of a trial's windows."""
    groups = {"task_aligned_intervals/domain": _interval(hulls)}
    for name, event, begin in (
        ("choice", "movement_onset_time", -1.0),
        ("reward", "feedback_time", 0.0),
        ("stimulus_contrast", "stim_on_time", -0.9),
        ("movement_window", "movement_onset_time", 0.0),
        ("licking_window", "feedback_time", 0.0),
    ):
        bounds = trials[event][:, None] + [begin, begin + 1.0]
        more = {key: trials[key] for key in (name, "trial_index") if key in trials}
        groups[f"task_aligned_intervals/{name}"] = _interval(bounds) | more
    return groups


def _splits(hulls: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
    """The splits for behaviour (ts1, 40, 20 and 40 %) and for single units (ts2, five chunks)."""
    edges = np.concatenate([ends[:1], (hulls[:-1, 1] + hulls[1:, 0]) / 2, ends[1:]])
    parts: dict[str, list[Any]] = {}
    for split, names, cuts in (
        ("ts1", ("train", "val", "test"), (0.0, 0.4, 0.6, 1.0)),
        ("ts2", CHUNKS, np.arange(6) / 5),
    ):
        at = edges[np.round(np.array(cuts) * len(hulls)).astype(int)]
        for name, begin, end in zip(names, at, at[1:], strict=False):
            parts.setdefault(f"{split}_{name}_domain", []).append([begin, end])
    return {name: _interval(np.array(bounds)) for name, bounds in parts.items()}


def _series(
    session: Session,
    stimulus: np.ndarray,
    stop: float,
    trials: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, dict[str, np.ndarray]]:
    """Behaviour 50 times a second: what the session has, still in between; paws and licks."""
    times = np.arange(0.0, stop, 1 / SAMPLES)
    centres = session.window[0] + session.bin_size * (np.arange(session.n_bins) + 0.5)
    at = (stimulus[:, None] + centres).ravel()
    traces = [np.interp(times, at, session.behaviour[key].ravel())
              for key in ("wheel-speed", "whisker-motion-energy")]  # fmt: skip
    since = times[:, None] - trials["feedback_time"][trials["reward"] == 1]
    licking = ((since > 0.1) & (since < 0.9)).any(axis=1)
    paws = {}
    for side in ("left", "right"):
        paws[f"{side}_paw_speed"] = 20.0 * traces[0] + rng.gamma(2.0, 5.0, len(times))
        sure = np.repeat(rng.random(len(times) // 25 + 1) < 0.9, 25)[: len(times)]
        paws[f"is_{side}_paw_confident"] = sure
    return {
        "wheel": {"wheel_speed": traces[0]},
        "whisker": {"whisker_motion_energy": traces[1]},
        "paws": paws,
        "licks": {"licking_rate": SAMPLES * rng.poisson(np.where(licking, 0.14, 0.001))},
    }


def _interval(bounds: np.ndarray) -> dict[str, np.ndarray]:
    return {"start": bounds[:, 0], "end": bounds[:, 1]}


def _write_groups(
    path: Path, groups: Mapping[str, dict[str, np.ndarray]], attributes: Mapping[str, Any]
) -> Path:
    h5py = extra("h5py", "bwb")
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        for place, columns in groups.items():
            for name, values in columns.items():
                text = np.char.encode(values, "utf-8") if values.dtype.kind == "U" else values
                file[f"{place}/{name}"] = text
        for place, pairs in attributes.items():
            file.require_group(place).attrs.update(pairs)
    return path
