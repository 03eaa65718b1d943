"""Recordings of Steinmetz et al. 2019 (Nature 576:266).

`load_session` reads a folder of the archive (10.6084/m9.figshare.9598406), `load_bundle` the copy
that Neuromatch Academy distributes (``steinmetz_part0.npz`` to ``part2``), in which much is already
chosen: clusters annotated 2 or 3 that fired in a trial, 10 ms counts around stimulus onset. A
session has the same name from both. Facts about the files are from the wiki, issues 1 and 2 and
findMoveTimes.m of nsteinme/steinmetz-et-al-2019, and from MouseLand/steinmetz2019_NMA.

Behaviour of a session, NaN = missing:

- ``choice`` (K,): -1 right, +1 left, 0 no-go, as recorded: +1 is correct where the left contrast is
  higher; ``contrast``: right minus left, -1..1; ``reward``: 1 or 0.
- ``go-cue-time``, ``response-time``, ``feedback-time`` (K,): s from the event aligned to.
- ``reaction-time`` (K,): s from the stimulus to the onset of the first wheel move detected later
  than 0.1 s before the stimulus, if before the feedback; in the copy, to the first 10 ms in which
  the wheel turned by over 5 ticks.
- ``wheel-speed`` (K, T) rad/s: as in `mtm.data.ibl`; in the copy, the net turn in the bin.
- ``face-motion-energy`` (K, T), arbitrary units, averaged in each bin.

Trials without the event are left out. Where a file or field is missing, its behaviour is too.
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
GOOD = 2  # annotations: 1 multi-unit, 2 good, 3 unsorted; their analyses include 2 and 3
TIMES = {
    "goCue_times": "go-cue-time",
    "response_times": "response-time",
    "feedback_times": "feedback-time",
}
TRACES = {"wheel-speed": "wheel.position", "face-motion-energy": "face.motionEnergy"}
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
    """
    if units not in (None, "good") or trial_filter not in (None, "included"):
        raise ValueError(f"units may be 'good', got {units!r}; trial_filter 'included', got "
                         f"{trial_filter!r}")  # fmt: skip
    place = re.search(r"([^/]+)/([\d-]{10})/(\d{3})(?:/alf)?$", Path(folder).resolve().as_posix())
    words = place.groups() if place else ()  # as ONE keeps it
    files = Folder(folder, "_".join(words).removesuffix("_001"), origin=ORIGIN)
    trials, counted = _trials(files, align, trial_filter)
    neurons = _clusters(files)
    times = files.array("spikes.times")
    session = Session.from_spike_times(
        times,
        files.array("spikes.clusters", len(times)).astype(np.int64),
        trials[align],
        clusters=np.arange(len(neurons["channel"])),
        regions=neurons["allen"],
        window=window,
        bin_size=bin_size,
        traces=_traces(files),
        behaviour=_behaviour(trials, trials[align]) | _reaction_times(files, trials),
        trial_ids=trials["row"].astype(np.int64),
        n_recorded=counted["recorded"],
        name=files.name,
        subject=files.name.partition("_")[0],
        neurons=neurons,
        provenance=files.provenance | {"align": align, "trials": counted},
    )
    if units == "good":
        notes = files.array("clusters._phy_annotation", session.n_neurons)
        session = session.select(neurons=notes >= GOOD)
    return session


def load_bundle(
    path: str | Path, *, window: tuple[float, float] = (-0.5, 1.5), bin_size: float = 0.02
) -> list[Session]:
    """Load the sessions of a file of Neuromatch Academy, ``steinmetz_part0.npz`` to ``part2``.

    The files hold pickles, which can run any code when `numpy.load` opens them. Here they are read
    by an unpickler that rebuilds arrays and refuses everything else.

    Args:
        path: the file.
        window: (start, stop) around stimulus onset, seconds: multiples of 0.01 in -0.5..2.0.
        bin_size: seconds, a multiple of 0.01: counts of 10 ms are added up.

    Returns:
        the sessions, in the order of the file; ``regions`` are Allen acronyms, of which Neuromatch
        keeps some coarser than the archive.

    Raises:
        SessionError: for a damaged file, or one that asks for anything but arrays.
        ValueError: for a ``window`` or ``bin_size`` that does not fit frames of 10 ms.
    """
    bins = n_bins(window, bin_size)
    exact = np.array([ONSET + window[0] / FRAME, bin_size / FRAME])
    first, width = np.round(exact).astype(int).tolist()
    if np.abs(exact - (first, width)).max() > 1e-6 or not 0 <= first <= FRAMES - bins * width:
        raise ValueError(f"bin_size {bin_size} and the start of window {window} must be multiples "
                         "of 0.01 s, and the window within (-0.5, 2.0) s")  # fmt: skip
    grid: dict[str, Any] = {"window": window, "bin_size": bin_size}
    grid["provenance"] = {"origin": "Neuromatch Academy", "file": Path(path).name}
    with Recording(Path(path).name).reading("dat"):
        entries = _entries(path)
        return [Session(**_fields(entry, first, bins, width), **grid) for entry in entries]


def _behaviour(
    trials: Mapping[str, np.ndarray], event: np.ndarray | float
) -> dict[str, np.ndarray]:
    """Behaviour with one value per trial (K,), from the archive's columns (K,)."""
    found = {label: trials[key] - event for key, label in TIMES.items() if key in trials}
    if "response_choice" in trials:
        found["choice"] = trials["response_choice"]
    if (feedback := trials.get("feedbackType")) is not None:
        found["reward"] = np.where(np.isnan(feedback), np.nan, feedback > 0)
    left, right = (trials.get(f"visualStim_contrast{side}") for side in ("Left", "Right"))
    if left is not None and right is not None:
        found["contrast"] = right - left
    return found


# ----------------------------------------------------------------------------------- the archive


def _trials(
    files: Folder, align: str, trial_filter: str | None
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Columns (K,) of the trials to use, with their ``row``; number of trials, and why dropped."""
    if not files.has(f"trials.{align}"):
        events = sorted(file.name[7:-4] for file in files.path.glob("trials.*_times.npy"))
        files.fail(f"trials.{align}", f"no such event; align to one of {events}")
    n = len(files.array(f"trials.{align}"))
    names = {*COLUMNS.values(), "visualStim_times", align}
    present = [name for name in names if files.has(f"trials.{name}")]
    table = pd.DataFrame({name: files.array(f"trials.{name}", n) for name in present})
    table = table.replace([np.inf, -np.inf], np.nan).assign(row=np.arange(n))
    known = table[table[align].notna()]
    counted = {"recorded": n, f"without {align}": n - len(known)}
    if trial_filter is not None:
        included = known[files.array("trials.included", n)[known["row"]] == 1]
        counted["not included"] = len(known) - len(included)
        known = included
    if known.empty:
        files.fail(f"trials.{align}", f"no trial of {n} has it and is included")
    return {name: column.to_numpy() for name, column in known.items()}, counted


def _reaction_times(files: Folder, trials: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The behaviour reaction-time (K,), where the files for it are there."""
    needed = {"visualStim_times", "feedback_times"}
    if not (needed <= set(trials) and files.has("wheelMoves.intervals")):
        return {}
    stimulus = trials["visualStim_times"]
    onsets = files.array("wheelMoves.intervals", width=2)[:, 0]
    onsets = np.append(np.sort(onsets[np.isfinite(onsets)]), np.inf)
    first = onsets[np.searchsorted(onsets[:-1], stimulus - 0.1, side="right")]
    during = first < trials["feedback_times"]
    return {"reaction-time": np.where(during, first - stimulus, np.nan)}


def _clusters(files: Folder) -> dict[str, np.ndarray]:
    """Columns (N,) of all clusters: row of the peak channel, region, and what else there is."""
    with files.reading("channels.brainLocation.tsv"):
        # Without keep_default_na, pandas would take some texts for missing values.
        options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "quoting": 3}
        table = pd.read_csv(files.path / "channels.brainLocation.tsv", sep="\t", **options)
        acronyms = table["allen_ontology"].str.strip()
    channel = pd.Series(files.array("clusters.peakChannel") - 1)  # counts from 1 (issue 1)
    allen = channel.map(acronyms).fillna("")
    if (allen == "").any():
        files.warn("clusters.peakChannel", f"{(allen == '').sum()} clusters have no region")
    columns = {"channel": channel.to_numpy(), "allen": allen.to_numpy(np.str_)}
    for key, name in (("probe", "probes"), ("depth", "depths"), ("annotation", "_phy_annotation")):
        if files.has(f"clusters.{name}"):
            columns[key] = files.array(f"clusters.{name}", len(channel))
    return columns


def _traces(files: Folder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Wheel speed and face motion energy: times (S,) s and values (S,)."""
    traces = {}
    for key, name in TRACES.items():
        anchors = name.partition(".")[0] + ".timestamps"
        if not files.has(name, anchors):
            files.warn(f"{name} with {anchors}", f"missing; the session has no behaviour {key!r}")
            continue
        samples = files.array(name)
        with files.reading(f"{anchors}.npy"):
            sampled = _sample_times(files.array(anchors, width=2), len(samples))
            times, samples = ordered_samples(sampled, samples)
            if key == "wheel-speed":
                times, samples = wheel_speed(times, samples * TICK)
        traces[key] = times, samples
    return traces


def _sample_times(anchors: np.ndarray, n: int) -> np.ndarray:
    """Time of each of n samples, (n,) s, from anchors (m, 2): sample number, time.

    Between anchors times are interpolated; beyond them they are unknown: NaN. The notes number
    samples from 1, those who read the files from 0. So the anchors decide: from 1 where the last is
    n and the first at least 1, else from 0; wrong by one sample at most.
    """
    number, time = anchors.T
    if not (np.diff(anchors, axis=0) > 0).all():
        raise ValueError("sample numbers and times must rise")
    first = 1 if number[-1] == n and number[0] >= 1 else 0
    return np.interp(np.arange(first, first + n), number, time, left=np.nan, right=np.nan)


# ------------------------------------------------------------------------------ Neuromatch's copy


def _fields(entry: Mapping[str, Any], first: int, bins: int, width: int) -> dict[str, Any]:
    """Fields of a `Session` from one dictionary of the file."""
    n, k, _ = np.shape(entry["spks"])

    def binned(field: str, *shape: int) -> np.ndarray:
        """Frames, ``shape`` (..., FRAMES), added up in bins: (..., T)."""
        frames = np.reshape(entry[field], (*shape, FRAMES))[..., first : first + bins * width]
        return frames.reshape(*shape, bins, width).sum(axis=-1)

    fields = [field for field in COLUMNS if field in entry]  # (k,) or (k, 1)
    columns = {COLUMNS[f]: np.asarray(entry[f], np.float64).reshape(k) for f in fields}
    behaviour = _behaviour(columns, 0.0)
    if "reaction_time" in entry:  # ms and direction; infinite: none
        seconds = np.reshape(entry["reaction_time"], (k, 2))[:, 0] / 1000
        behaviour["reaction-time"] = np.where(np.isinf(seconds), np.nan, seconds)
    if "wheel" in entry:
        behaviour["wheel-speed"] = np.abs(binned("wheel", k)) * TICK / (width * FRAME)
    if "face" in entry:
        behaviour["face-motion-energy"] = binned("face", k) / width
    return {
        "counts": binned("spks", n, k).transpose(1, 2, 0),
        "regions": entry["brain_area"],
        "name": f"{entry['mouse_name']}_{entry['date_exp']}",
        "subject": entry["mouse_name"],
        "behaviour": behaviour,
        "neurons": {"allen": entry["brain_area"]},
    }


def _entries(path: str | Path) -> list[Mapping[str, Any]]:
    """The sessions' dictionaries."""
    with zipfile.ZipFile(path) as archive:
        file = io.BytesIO(archive.read("dat.npy"))
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return _Unpickler(file).load().ravel().tolist()


class _Unpickler(pickle.Unpickler):
    """Rebuilds arrays, and refuses whatever else a pickle asks for, so that no code is run."""

    ALLOWED = {
        *(("numpy._core.multiarray", name) for name in ("_reconstruct", "scalar")),
        *(("numpy", name) for name in ("ndarray", "dtype")),
        ("_codecs", "encode"),  # bytes, in old pickles
    }

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # NumPy 1
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)
