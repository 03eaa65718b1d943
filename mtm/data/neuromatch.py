"""Recordings of Steinmetz et al. 2019 as Neuromatch Academy bundles them.

They are ``steinmetz_part0.npz`` to ``part2``; facts about them are from the code that made them
(MouseLand/steinmetz2019_NMA). Much is already chosen: clusters annotated 2 or 3 that fired in a
trial, 10 ms counts around stimulus onset.
The archive itself is read by `mtm.data.steinmetz`; a session has the same name from both.

The behaviours are those of `mtm.data.steinmetz`, where NaN = missing, but for these:

- ``go-cue-time``, ``response-time``, ``feedback-time`` (K,): s from the stimulus.
- ``reaction-time`` (K,): s from the stimulus to the first 10 ms in which the wheel turned by over
  5 ticks.
- ``wheel-speed`` (K, T) rad/s: net turn in the bin, absolute.

A field that the file lacks is a behaviour less. Passive trials, pupil and licks are not read.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtm.binning import n_bins
from mtm.data.steinmetz import TICK, outcomes
from mtm.session import Session, SessionError, reading

FRAME, FRAMES, ONSET = 0.01, 250, 50  # s a frame, frames a trial, the stimulus' frame
OUTCOMES = ("response", "feedback_type", "contrast_left", "contrast_right")
TIMES = {"gocue": "go-cue-time"} | {
    f"{key}_time": f"{key}-time" for key in ("response", "feedback")
}


def load_bundle(
    path: str | Path,
    *,
    index: int | Sequence[int] | None = None,
    window: tuple[float, float] = (-0.5, 1.5),
    bin_size: float = 0.02,
) -> list[Session]:
    """Load the sessions in a file of Neuromatch Academy, ``steinmetz_part0.npz`` to ``part2``.

    The files hold pickles, which can run any code when `numpy.load` opens them. Here an unpickler
    reads them that rebuilds arrays and refuses all else.

    Args:
        path: the file.
        index: which of its sessions, from 0: one or several. Default: all.
        window: (start, stop) around stimulus onset, seconds: multiples of 0.01 in -0.5..2.0.
        bin_size: seconds, a multiple of 0.01: counts of 10 ms are added up.

    Returns:
        the sessions, in the order of the file or of ``index``; ``regions`` are Allen acronyms, of
        which Neuromatch keeps some coarser than the archive.

    Raises:
        SessionError: for a damaged file, one that asks for anything but arrays, or a session that
            cannot be used; naming it, the field and the remedy.
        ValueError: for another ``window`` or ``bin_size``.
    """
    grid = _grid(window, bin_size)
    file = os.path.basename(path)
    if not os.path.isfile(path):
        raise SessionError(f"session {file!r}: no such file; pass the path of steinmetz_part0.npz")
    with reading(file, "dat"):
        entries = _entries(path)
    chosen = range(len(entries)) if index is None else np.atleast_1d(index).tolist()
    if not set(chosen) <= set(range(len(entries))):
        raise SessionError(f"session {file!r}: index {index!r} is not among 0..{len(entries) - 1}")
    options: dict[str, Any] = {"window": window, "bin_size": bin_size, "file": file}
    sessions = []
    for number in chosen:
        with reading(f"{file}[{number}]", "mouse_name, date_exp"):
            name = f"{entries[number]['mouse_name']}_{entries[number]['date_exp']}"
        with reading(name, file):
            sessions.append(_session(name, entries[number], grid, **options))
    return sessions


def _session(
    name: str, entry: Mapping[str, Any], grid: tuple[int, int, int], *, file: str, **options: Any
) -> Session:
    """One session of its dictionary; ``options``: of `Session`."""
    first, bins, width = grid
    n, k, _ = np.shape(entry["spks"])

    def binned(field: str, *shape: int) -> np.ndarray:
        """Frames, ``shape`` (..., FRAMES), added up in bins: (..., T)."""
        frames = np.reshape(entry[field], (*shape, FRAMES))[..., first : first + bins * width]
        return frames.reshape(*shape, bins, width).sum(axis=-1)

    behaviour = _behaviour(name, entry, k)
    if "wheel" in entry:
        behaviour["wheel-speed"] = np.abs(binned("wheel", k)) * TICK / (width * FRAME)
    if "face" in entry:
        behaviour["face-motion-energy"] = binned("face", k) / width
    return Session(
        counts=np.ascontiguousarray(binned("spks", n, k).transpose(1, 2, 0)),
        regions=entry["brain_area"],
        name=name,
        subject=name.partition("_")[0],
        behaviour=behaviour,
        neurons={"allen": entry["brain_area"]},
        provenance={"origin": "Neuromatch Academy", "file": file},
        **options,
    )


def _behaviour(name: str, entry: Mapping[str, Any], k: int) -> dict[str, np.ndarray]:
    """Behaviour with one value a trial, (k,), as far as it is there."""
    columns = {
        field: np.asarray(entry[field], dtype=np.float64).reshape(k)  # (k,) or (k, 1)
        for field in (*OUTCOMES, *TIMES)
        if field in entry
    }
    found = outcomes(name, columns, OUTCOMES)
    found |= {label: columns[field] for field, label in TIMES.items() if field in columns}
    if "reaction_time" in entry:  # ms and direction; infinite: none
        seconds = np.reshape(entry["reaction_time"], (k, 2))[:, 0] / 1000
        found["reaction-time"] = np.where(np.isinf(seconds), np.nan, seconds)
    return found


def _grid(window: tuple[float, float], bin_size: float) -> tuple[int, int, int]:
    """First frame of the window, number of bins, frames a bin."""
    bins = n_bins(window, bin_size)
    exact = np.array([ONSET + window[0] / FRAME, bin_size / FRAME])
    first, width = np.round(exact).astype(int).tolist()
    if np.abs(exact - (first, width)).max() > 1e-6:
        raise ValueError("bin_size and the window's start must be multiples of 0.01 s")
    if first < 0 or first + bins * width > FRAMES:
        raise ValueError(f"window {tuple(window)} s is not within (-0.5, 2.0) s, the bundle's")
    return first, bins, width


def _entries(path: str | Path) -> list[Mapping[str, Any]]:
    """The sessions' dictionaries."""
    with zipfile.ZipFile(path) as archive:
        file = io.BytesIO(archive.read("dat.npy"))  # all of it, so that its checksum comes first
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    entries = _Unpickler(file).load().ravel().tolist()
    if not entries:
        raise ValueError("no session in it")
    return entries


class _Unpickler(pickle.Unpickler):
    """Rebuilds arrays, and refuses whatever else a pickle asks for, so that nothing is run.

    What it rebuilds is left to NumPy, which trusts what it is given: a file forged for that can
    still crash Python.
    """

    ALLOWED = {
        *(("numpy._core.multiarray", name) for name in ("_reconstruct", "scalar")),
        *(("numpy", name) for name in ("ndarray", "dtype")),
        ("_codecs", "encode"),  # bytes, in old pickles
    }

    def find_class(self, module: str, name: str) -> Any:
        module = (
            "numpy._core.multiarray" if module == "numpy.core.multiarray" else module
        )  # NumPy 1
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)
