"""Recordings of Steinmetz et al. 2019 (Nature 576:266).

`load_session` reads a folder of the archive (10.6084/m9.figshare.9598406), `load_bundle` the copy
that Neuromatch Academy distributes (``steinmetz_part0.npz`` to ``part2``): clusters annotated 2 or
3 that fired in a trial, 10 ms counts around stimulus onset. A session has the same name from both.
Facts about the files are from the wiki, issues 1 and 2 and findMoveTimes.m of
nsteinme/steinmetz-et-al-2019, and from MouseLand/steinmetz2019_NMA.

Behaviour of a session, NaN = missing; what is known of no trial is left out:

- ``choice`` (K,): -1 right, +1 left, 0 no-go, as recorded: +1 is correct where the left contrast is
  higher; ``contrast``: right minus left, -1..1; ``reward``: 1 or 0.
- ``go-cue-time``, ``response-time``, ``feedback-time`` (K,): s from the event aligned to.
- ``reaction-time`` (K,): s from the stimulus to the onset of the first wheel move detected later
  than 0.1 s before the stimulus, if before the feedback; in the copy, to the first 10 ms in which
  the wheel turned by over 5 ticks.
- ``wheel-speed`` (K, T) rad/s: as in `mtm.data.ibl`; in the copy, the net turn in the bin.
- ``face-motion-energy`` (K, T), arbitrary units, averaged in each bin.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mtm.binning import n_bins
from mtm.data.recording import Folder, Recording, ordered_samples, wheel_speed
from mtm.session import Session

ORIGIN = "Steinmetz et al. 2019, 10.6084/m9.figshare.9598406"
TICK = 2 * np.pi / 1440  # rad; the wheel's encoder has 1,440 ticks a turn
TRACES = {  # file, factor, what makes it a trace
    "wheel-speed": ("wheel.position", TICK, wheel_speed),
    "face-motion-energy": ("face.motionEnergy", 1.0, ordered_samples),
}
COLUMNS = {  # of the copy -> of the archive
    "response": "response_choice",
    "feedback_type": "feedbackType",
    "contrast_left": "visualStim_contrastLeft",
    "contrast_right": "visualStim_contrastRight",
    "gocue": "goCue_times",
    "response_time": "response_times",
    "feedback_time": "feedback_times",
}
FRAME, FRAMES, ONSET = 0.01, 250, 50  # of the copy: s a frame, frames a trial, stimulus' frame


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
            and the part before the first ``_`` the subject's. Or as ONE keeps it, where the same
            session is ``Cori/2016-12-14/001/alf``.
        align: the event: ``trials.<align>.npy``, as "goCue_times" or "response_times".
        window, bin_size: (start, stop) around the event, and width of a bin; seconds.
        units: "good" keeps clusters annotated 2 or 3, as the authors' analyses do. (1: multi-unit.)
        trial_filter: "included" leaves out trials in which the authors judged the mouse disengaged.

    Returns:
        the session; ``neurons`` has ``cluster``, ``channel`` (row of the channels' table from 0),
        ``allen`` (acronym, also ``regions``), and where present ``probe``, ``depth`` (micrometres
        from the tip), ``annotation``.

    Raises:
        SessionError: naming the session, the file and the remedy.
    """
    if units not in (None, "good") or trial_filter not in (None, "included"):
        raise ValueError("units is 'good' or None, trial_filter is 'included' or None")
    place = re.search(r"([^/]+)/([\d-]{10})/(\d{3})(?:/alf)?$", Path(folder).resolve().as_posix())
    words = place.groups() if place else ()  # as ONE keeps it
    files = Folder(folder, "_".join(words).removesuffix("_001"), origin=ORIGIN, align=align)
    files.provenance["subject"] = files.name.partition("_")[0]
    trials, clusters = _trials(files), _clusters(files)
    keep = files.array("clusters._phy_annotation", len(clusters)) >= 2 if units else True
    event = files.event(trials, align)
    behaviour = _behaviour(trials, event, _reaction_times(files, trials))
    rejected = {"not included": trials["included"] != 1} if trial_filter else {}
    fields = files.trials_to_use(event, behaviour, rejected)
    fields |= {"window": window, "bin_size": bin_size, "traces": _traces(files)}
    times = files.array("spikes.times")
    ids = files.array("spikes.clusters", len(times)).astype(np.int64)
    return files.to_session(times, ids, clusters, keep, regions=clusters["allen"], **fields)


def load_bundle(
    path: str | Path, *, window: tuple[float, float] = (-0.5, 1.5), bin_size: float = 0.02
) -> list[Session]:
    """Load the sessions of a file of Neuromatch Academy, in its order.

    The pickles in it could run any code in `numpy.load`; here only arrays are rebuilt from them.
    Some ``regions`` are coarser than the archive's.

    Args:
        path: the file.
        window: (start, stop) around stimulus onset, seconds: multiples of 0.01 in -0.5..2.0.
        bin_size: seconds, a multiple of 0.01: counts of 10 ms are added up.

    Raises:
        SessionError: for a damaged file, or one that asks for anything but arrays.
        ValueError: for a ``window`` or ``bin_size`` that does not fit frames of 10 ms.
    """
    bins = n_bins(window, bin_size)
    exact = np.array([ONSET + window[0] / FRAME, bin_size / FRAME])
    first, width = np.round(exact).astype(int).tolist()
    if np.abs(exact - (first, width)).max() > 1e-6 or not 0 <= first <= FRAMES - bins * width:
        needed = "multiples of 0.01 s, and the window within (-0.5, 2.0) s"
        raise ValueError(f"bin_size {bin_size} and window {window} must be {needed}")
    grid: dict[str, Any] = {"window": window, "bin_size": bin_size}
    grid["provenance"] = {"origin": "Neuromatch Academy", "file": Path(path).name}
    with Recording(Path(path).name).reading("dat"), zipfile.ZipFile(path) as archive:
        file = io.BytesIO(archive.read("dat.npy"))
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        entries = _Unpickler(file).load().ravel().tolist()
        return [_session(entry, first, bins, width, **grid) for entry in entries]


def _behaviour(
    trials: pd.DataFrame, event: np.ndarray | float, reaction_time: np.ndarray | float
) -> dict[str, np.ndarray]:
    """Behaviour (K,) from the archive's columns; what is known of no trial is left out."""
    feedback = trials["feedbackType"]
    found = {
        "choice": trials["response_choice"],
        "contrast": trials["visualStim_contrastRight"] - trials["visualStim_contrastLeft"],
        "reward": (feedback > 0).astype(float).where(feedback.notna()),
        "go-cue-time": trials["goCue_times"] - event,
        "response-time": trials["response_times"] - event,
        "feedback-time": trials["feedback_times"] - event,
        "reaction-time": pd.Series(reaction_time, trials.index),
    }
    return {key: x.to_numpy() for key, x in found.items() if x.notna().any()}


def _trials(files: Folder) -> pd.DataFrame:
    """All trials; what is missing, or infinite, is NaN."""
    names = {path.name[7:-4] for path in files.path.glob("trials.*.npy")} - {"intervals"}
    found = {name: files.array(f"trials.{name}") for name in sorted(names)}
    with files.reading("trials.*.npy"):
        table = pd.DataFrame(found, dtype=float).replace([np.inf, -np.inf], np.nan)
    known = [*COLUMNS.values(), "visualStim_times", "included"]
    return table.reindex(columns=table.columns.union(known, sort=False))


def _reaction_times(files: Folder, trials: pd.DataFrame) -> np.ndarray | float:
    """The behaviour reaction-time (K,); NaN without the file for it."""
    if not files.has("wheelMoves.intervals"):
        return np.nan
    stimulus = trials["visualStim_times"].to_numpy()
    onsets = files.array("wheelMoves.intervals", width=2)[:, 0]
    onsets = np.append(np.sort(onsets[np.isfinite(onsets)]), np.inf)
    first = onsets[np.searchsorted(onsets[:-1], stimulus - 0.1, side="right")]
    return np.where(first < trials["feedback_times"], first - stimulus, np.nan)


def _clusters(files: Folder) -> pd.DataFrame:
    """All clusters: row of the peak channel, region, and what else there is."""
    with files.reading("channels.brainLocation.tsv"):
        # Without keep_default_na, pandas would take some texts for missing values.
        options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "quoting": 3}
        table = pd.read_csv(files.path / "channels.brainLocation.tsv", sep="\t", **options)
        acronyms = table["allen_ontology"].str.strip()
    channel = files.array("clusters.peakChannel") - 1  # counts from 1 (issue 1)
    clusters = pd.DataFrame({"channel": channel, "allen": acronyms.reindex(channel).to_numpy()})
    if (unknown := clusters["allen"].isna()).any():
        files.warn("clusters.peakChannel", f"{unknown.sum()} clusters have no region")
    for key, name in (("probe", "probes"), ("depth", "depths"), ("annotation", "_phy_annotation")):
        if files.has(f"clusters.{name}"):
            clusters[key] = files.array(f"clusters.{name}", len(channel))
    return clusters


def _traces(files: Folder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Wheel speed and face motion energy: times (S,) s and values (S,)."""
    traces = {}
    for key, (name, factor, trace) in TRACES.items():
        anchors = name.partition(".")[0] + ".timestamps"
        if files.has(name, anchors):
            samples = files.array(name) * factor
            with files.reading(f"{anchors}.npy"):
                times = _sample_times(files.array(anchors, width=2), len(samples))
                traces[key] = trace(times, samples)
        else:
            files.warn(f"{name} with {anchors}", f"missing; the session has no behaviour {key!r}")
    return traces


def _sample_times(anchors: np.ndarray, n: int) -> np.ndarray:
    """Time of each of n samples, (n,) s, from anchors (m, 2): sample number, time.

    The notes number samples from 1, readers of the files from 0. So the anchors decide: from 1
    where the last is n and the first at least 1. Beyond the anchors times are unknown: NaN.
    """
    number, time = anchors.T
    if not (np.diff(anchors, axis=0) > 0).all():
        raise ValueError("sample numbers and times must rise")
    first = 1 if number[-1] == n and number[0] >= 1 else 0
    return np.interp(np.arange(first, first + n), number, time, left=np.nan, right=np.nan)


def _session(entry: Mapping[str, Any], first: int, bins: int, width: int, **grid: Any) -> Session:
    """The session of one dictionary of the file."""
    n, k, _ = np.shape(entry["spks"])

    def binned(field: str, *shape: int) -> np.ndarray:
        """Frames, ``shape`` (..., FRAMES), added up in bins: (..., T)."""
        frames = np.reshape(entry[field], (*shape, FRAMES))[..., first : first + bins * width]
        return frames.reshape(*shape, bins, width).sum(axis=-1)

    known = {name: np.ravel(entry[key]) for key, name in COLUMNS.items() if key in entry}
    trials = pd.DataFrame(known, range(k), list(COLUMNS.values()), dtype=float)
    # Milliseconds, infinite where there is none, and direction.
    reaction_time = np.reshape(entry.get("reaction_time", np.full((k, 2), np.nan)), (k, 2))[:, 0]
    reaction_time = np.where(np.isinf(reaction_time), np.nan, reaction_time / 1000)
    behaviour = _behaviour(trials, 0.0, reaction_time)
    if "wheel" in entry:
        behaviour["wheel-speed"] = np.abs(binned("wheel", k)) * TICK / (width * FRAME)
    if "face" in entry:
        behaviour["face-motion-energy"] = binned("face", k) / width
    counts, regions = binned("spks", n, k).transpose(1, 2, 0), entry["brain_area"]
    mouse = entry["mouse_name"]
    grid |= {"behaviour": behaviour, "neurons": {"allen": regions}}
    return Session(counts, regions, f"{mouse}_{entry['date_exp']}", mouse, **grid)


class _Unpickler(pickle.Unpickler):
    """Rebuilds arrays, and refuses whatever else a pickle asks for, so that no code is run."""

    ALLOWED = (
        *("numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"),
        *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),  # the last for bytes in old pickles
    )

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # NumPy 1
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)
