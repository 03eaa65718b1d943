"""Simulated sessions as session files of BrainWideBench, for lessons without a network."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtm.atlas import LEVELS, at_level
from mtm.atomic import replacing
from mtm.extras import extra
from mtm.session import Session
from mtm.simulate import CONTRASTS, layout, spike_times

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
