"""What the readers of recordings share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import ArrayLike
from scipy import signal

from mtm.binning import Floats
from mtm.session import SessionError

WHEEL_RATE, WHEEL_CUTOFF = 1000.0, 20.0  # Hz
LONGEST = 1e5  # seconds; no recording lasts longer (a day has 86,400)


@contextmanager
def reading(session: str, what: str) -> Iterator[None]:
    """Turn any error of a damaged file of a recording into a SessionError that names it."""
    try:
        yield
    except (SessionError, ImportError):
        raise
    except Exception as error:  # of numpy, arrow, csv, pickle, zip: no list of them is complete
        raise SessionError(
            f"session {session!r}, {what}: cannot be read ({type(error).__name__}: {error}); "
            "download it again"
        ) from error


def ordered_samples(times: ArrayLike, values: ArrayLike) -> tuple[Floats, Floats]:
    """Sort the samples of a trace (S,) and leave out NaN; of equal times the first is kept."""
    t, v = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if t.ndim != 1 or t.shape != v.shape:
        raise ValueError(f"values has shape {v.shape} but times has {t.shape}")
    finite = np.isfinite(t) & np.isfinite(v)
    t, first = np.unique(t[finite], return_index=True)
    return t, v[finite][first]


def wheel_speed(times: ArrayLike, position: ArrayLike) -> tuple[Floats, Floats]:
    """Compute the speed of a wheel whose position is sampled irregularly, as IBL does.

    The position is interpolated at 1 kHz, low-pass filtered at 20 Hz (Butterworth of order 8, run
    forwards and backwards, so without delay) and differentiated.

    Args:
        times: (S,) seconds, strictly increasing (see `ordered_samples`).
        position: (S,) in any unit.

    Returns:
        times (S',) in seconds and absolute speed (S',), in the unit of position per second.

    Raises:
        ValueError: for less than a second of samples, or more than any recording lasts.
    """
    t, x = np.asarray(times, dtype=np.float64), np.asarray(position, dtype=np.float64)
    if len(t) < 2 or not 1 <= t[-1] - t[0] <= LONGEST:
        raise ValueError(f"wheel times must span 1 to {LONGEST:g} s, and be seconds")
    grid = np.arange(t[0], t[-1], 1 / WHEEL_RATE)
    low_pass = signal.butter(8, WHEEL_CUTOFF, fs=WHEEL_RATE, output="sos")
    smooth = signal.sosfiltfilt(low_pass, np.interp(grid, t, x))
    return grid, np.abs(np.gradient(smooth, 1 / WHEEL_RATE))
