"""Recordings of Steinmetz et al. 2019 (Nature 576:266): folders of 10.6084/m9.figshare.9598406.

Facts about the files are from the authors' notes ("data files" in the wiki of their repository
nsteinme/steinmetz-et-al-2019, as quoted in NWB conversions of the data; its issues 1 and 2; its
findMoveTimes.m). Neuromatch's copy of the recordings is read by `mtm.data.neuromatch`.

A session's behaviours, where NaN = missing:

- ``choice`` (K,): -1 right, +1 left, 0 no-go, as recorded: +1 is correct where the left contrast is
  higher; ``contrast``: right minus left, -1..1; ``reward``: 1 or 0.
- ``go-cue-time``, ``response-time``, ``feedback-time`` (K,): s from the event aligned to.
- ``reaction-time`` (K,): s from the stimulus to the onset of the first wheel move detected later
  than 0.1 s before the stimulus, if before the feedback.
- ``wheel-speed`` (K, T) rad/s: as in `mtm.data.ibl`; the encoder has 1,440 ticks a turn.
- ``face-motion-energy`` (K, T), arbitrary units, averaged in each bin.

Repairs: unsorted spikes are sorted; a trial without the event is left out; infinite values of a
trial are missing; a cluster whose peak channel has no row in ``channels.brainLocation.tsv`` has no
region (with a warning); NaN and infinite samples of wheel and face are interpolated across. Without
its file, a behaviour is absent; for wheel and face with a warning. Passive trials, pupil, licks and
LFP are not read.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from mtm.binning import ordered_samples, wheel_speed
from mtm.checks import one_of
from mtm.session import Session, SessionError, reading

TICK = 2 * np.pi / 1440  # rad
GOOD = 2  # annotations: 1 multi-unit, 2 good, 3 unsorted; their analyses include 2 and 3
LONGEST_SAMPLE = 0.2  # s; across longer gaps, binning interpolates nothing
CONTRASTS = ("visualStim_contrastLeft", "visualStim_contrastRight")
OUTCOMES = ("response_choice", "feedbackType", *CONTRASTS)
TIMES = {"goCue": "go-cue-time", "response": "response-time", "feedback": "feedback-time"}
TRACES = {"wheel-speed": "wheel.position", "face-motion-energy": "face.motionEnergy"}


def load_session(
    folder: str | Path,
    *,
    align: str = "visualStim_times",
    window: tuple[float, float] = (-0.5, 1.5),
    bin_size: float = 0.02,
    units: str | None = None,
    trial_filter: str | None = None,
) -> Session:
    """Load one folder of the archive: all probes, all trials of the task, behaviour.

    Args:
        folder: e.g. ``Cori_2016-12-14``, with ``spikes.times.npy`` in it; its name is the session's
            and the part before the first ``_`` the subject's.
        align: the event: ``trials.<align>.npy``, as "goCue_times" or "response_times".
        window: (start, stop) around the event, seconds.
        bin_size: seconds.
        units: "good" keeps clusters annotated 2 or 3, as the authors' analyses do. (1: multi-unit.)
        trial_filter: "included" leaves out trials in which the authors judged the mouse disengaged.

    Returns:
        the session; ``neurons`` has ``cluster``, ``channel`` (row of the channels' table from 0),
        ``allen``, and where present ``probe``, ``depth`` (micrometres from the tip),
        ``annotation``. ``regions`` are the archive's Allen acronyms.

    Raises:
        SessionError: naming the session, the file and the remedy.
        ValueError: for an unknown ``units`` or ``trial_filter``.
    """
    one_of("units", units, (None, "good"))
    one_of("trial_filter", trial_filter, (None, "included"))
    files = _Folder(folder)
    trials, counted = _trials(files, align, trial_filter)
    neurons = _clusters(files)
    n = len(neurons["channel"])
    keep = np.ones(n, bool) if units is None else files.array("clusters._phy_annotation", n) >= GOOD
    times = files.array("spikes.times")
    clusters = files.array("spikes.clusters", len(times))
    if np.all((clusters == np.floor(clusters)) & (np.abs(clusters) < 2**31)):
        clusters = clusters.astype(np.int32)
    if not (timed := np.isfinite(times)).all():
        files.warn(f"spikes.times: left out {np.sum(~timed)} without time")
    session = Session.from_spike_times(
        times[timed],
        clusters[timed],
        trials[align],
        clusters=np.arange(n),
        regions=neurons["allen"],
        window=window,
        bin_size=bin_size,
        traces=_traces(files),
        behaviour=_behaviour(files, trials, trials[align]),
        trial_ids=trials["row"],
        n_recorded=counted["recorded"],
        name=files.name,
        subject=files.name.partition("_")[0],
        neurons=neurons,
        provenance={"origin": "Steinmetz et al. 2019, 10.6084/m9.figshare.9598406", "align": align}
        | {"trials": counted, "clusters dropped": int(np.sum(~keep))},
    )
    return session if keep.all() else session.select(neurons=keep)


def outcomes(
    session: str, columns: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Behaviours choice, reward and contrast (K,), as far as there are columns (K,) for them.

    ``names``: the columns of choice, feedback, left contrast, right contrast.
    """
    for name in names:
        values, sign = columns.get(name, np.zeros(0)), name in names[:2]
        fine = np.isin(values, (-1, 0, 1)) if sign else (values >= 0) & (values <= 1)
        if not np.all(fine | np.isnan(values)):
            problem = f"values other than {'-1, 0 or 1' if sign else 'from 0 to 1'}"
            raise SessionError(f"session {session!r}, {name}: {problem}; download it again")
    choice, feedback, left, right = (columns.get(name) for name in names)
    found = {} if choice is None else {"choice": choice}
    if feedback is not None:
        found["reward"] = np.where(np.isnan(feedback), np.nan, feedback > 0)
    if left is not None and right is not None:
        found["contrast"] = right - left
    return found


class _Folder:
    """The files of one session."""

    def __init__(self, folder: str | Path) -> None:
        self.path, self.name = Path(folder), os.path.basename(os.path.abspath(folder))
        if not os.path.isdir(folder):
            raise SessionError(
                f"session {self.name!r}: no such folder; unpack the archive's .tar and pass the "
                "path of the folder of one session"
            )

    def fail(self, name: str, problem: str) -> NoReturn:
        raise SessionError(f"session {self.name!r}, {name}.npy: {problem}")

    def warn(self, problem: str) -> None:
        warnings.warn(f"session {self.name!r}: {problem}", UserWarning, stacklevel=4)

    def has(self, name: str) -> bool:
        return os.path.isfile(self.path / f"{name}.npy")

    def array(self, name: str, n: int | None = None, width: int = 1) -> np.ndarray:
        """Numbers (n,), or (n, width), float64. The archive has (n, 1) for (n,)."""
        with reading(self.name, f"{name}.npy"):
            array = np.load(self.path / f"{name}.npy", allow_pickle=False)
            array = array.astype(np.float64, casting="same_kind")  # no text, no complex numbers
            array = array.reshape(len(array), width)
        if n is not None and len(array) != n:
            self.fail(name, f"{len(array)} rows, but {n} in others; download it again")
        return array[:, 0] if width == 1 else array


def _trials(
    files: _Folder, align: str, trial_filter: str | None
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Columns (K,) of the trials to use, with their ``row``; number of trials, and why dropped."""
    events = sorted(file.name[7:-4] for file in files.path.glob("trials.*_times.npy"))
    if align not in events:
        files.fail(f"trials.{align}", f"no such event; align to one of {events}")
    n = len(files.array(f"trials.{align}"))
    names = (*OUTCOMES, *(f"{key}_times" for key in TIMES), "visualStim_times", align)
    present = [name for name in names if files.has(f"trials.{name}")]
    trials = {name: files.array(f"trials.{name}", n) for name in present}
    trials = {name: np.where(np.isfinite(v), v, np.nan) for name, v in trials.items()}
    keep = np.isfinite(trials[align])
    counted = {"recorded": n, f"without {align}": int(np.sum(~keep))}
    if trial_filter is not None:
        included = files.array("trials.included", n) == 1
        counted["not included"] = int(np.sum(keep & ~included))
        keep &= included
    if not keep.any():
        files.fail(f"trials.{align}", f"no trial of {n} is left; other align or trial_filter=None")
    return {"row": np.flatnonzero(keep)} | {key: v[keep] for key, v in trials.items()}, counted


def _behaviour(
    files: _Folder, trials: Mapping[str, np.ndarray], event: np.ndarray
) -> dict[str, np.ndarray]:
    """Behaviour with one value a trial, (K,), as far as there are files for it."""
    found = outcomes(files.name, trials, OUTCOMES)
    for key, label in TIMES.items():
        if f"{key}_times" in trials:
            found[label] = trials[f"{key}_times"] - event
    if {"visualStim_times", "feedback_times"} <= set(trials) and files.has("wheelMoves.intervals"):
        stimulus = trials["visualStim_times"]
        onsets = files.array("wheelMoves.intervals", width=2)[:, 0]
        onsets = np.append(np.sort(onsets[np.isfinite(onsets)]), np.inf)
        first = onsets[np.searchsorted(onsets[:-1], stimulus - 0.1, side="right")]
        during = first < trials["feedback_times"]
        found["reaction-time"] = np.where(during, first - stimulus, np.nan)
    return found


def _clusters(files: _Folder) -> dict[str, np.ndarray]:
    """Columns (N,) of all clusters: row of the peak channel, region, and what else there is."""
    with reading(files.name, "channels.brainLocation.tsv"):
        with open(files.path / "channels.brainLocation.tsv", encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            acronyms = np.array([row["allen_ontology"].strip() for row in table], dtype=np.str_)
    if files.has("channels.site"):  # shows a table that was cut short
        files.array("channels.site", len(acronyms))
    peak = files.array("clusters.peakChannel")  # counts from 1 (issue 1)
    known = np.isin(peak, np.arange(1, len(acronyms) + 1))
    if not known.all():
        files.warn(
            f"{np.sum(~known)} of {len(peak)} clusters have a peak channel outside the "
            f"{len(acronyms)} rows of channels.brainLocation.tsv, so no region"
        )
    row = np.where(known, peak - 1, -1).astype(np.int64)
    columns = {"channel": row, "allen": np.append(acronyms, "")[row]}  # -1: the last
    for key, name in (("probe", "probes"), ("depth", "depths"), ("annotation", "_phy_annotation")):
        if files.has(f"clusters.{name}"):
            columns[key] = files.array(f"clusters.{name}", len(peak))
    return columns


def _traces(files: _Folder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Wheel speed and face motion energy: times (S,) s and values (S,)."""
    traces = {}
    for key, name in TRACES.items():
        anchors = name.partition(".")[0] + ".timestamps"
        if not (files.has(name) and files.has(anchors)):
            files.warn(f"no {name}.npy with {anchors}.npy; the session has no behaviour {key!r}")
            continue
        samples = files.array(name)
        times, samples = ordered_samples(_sample_times(files, anchors, len(samples)), samples)
        if key == "wheel-speed":
            with reading(files.name, f"{name}.npy"):
                times, samples = wheel_speed(times, samples * TICK)
        traces[key] = times, samples
    return traces


def _sample_times(files: _Folder, name: str, n: int) -> np.ndarray:
    """Time of each of n samples, (n,) s, from anchors (m, 2): sample number, time.

    Between anchors times are interpolated; beyond them they are unknown: NaN. The notes number
    samples from 1 to n; those who read the files (Neuromatch's code, NWB conversions) take them as
    indices from 0. So the anchors decide: from 1 where the last is n and the first at least 1,
    else from 0; wrong by one sample at most.
    """
    number, time = files.array(name, width=2).T
    rising = len(time) > 1 and np.isfinite(number).all() and np.isfinite(time).all()
    rising = rising and np.all(np.diff(number) > 0) and np.all(np.diff(time) > 0)
    fits = rising and number[0] >= 0 and number[-1] <= n
    if not fits or time[-1] - time[0] > LONGEST_SAMPLE * n:
        files.fail(name, f"no rising sample numbers and times of {n} samples; download it again")
    first = 1 if number[-1] == n and number[0] >= 1 else 0
    return np.interp(np.arange(first, first + n), number, time, left=np.nan, right=np.nan)
