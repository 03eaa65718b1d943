"""Recordings of the International Brain Laboratory in the archive DANDI (set 000409), streamed.

No account is needed. Columns and series are named as in the code that converts the recordings
(``catalystneuro/IBL-to-nwb``), since 2025 and before; files of the archive were not at hand.

A session has ``choice`` (-1, +1, 0), ``reward`` (1 or 0), ``block``, ``contrast``, ``wheel-speed``
and ``whisker-motion-energy`` (left camera), as in `mtm.data.ibl`.
"""

from __future__ import annotations

import itertools
import json
import re
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

import numpy as np

from mtm.data import nwb
from mtm.data.recording import public
from mtm.inputs import SessionError
from mtm.session import Session

API = "https://api.dandiarchive.org/api"
BEFORE = {  # events
    "gabor_stimulus_onset_time": "stim_on_time",
    "auditory_cue_time": "go_cue_time",
    "wheel_movement_onset_time": "first_movement_time",
}
SERIES = {"wheel-speed": "wheel_?velocity", "whisker-motion-energy": "left.*motion_?energy"}
COLUMNS = (
    *("mouse_wheel_choice", "is_mouse_rewarded", "probability_left", "gabor_stimulus_contrast"),
    *("gabor_stimulus_side", "choice", "feedback_type", "contrast_left", "contrast_right"),
)
CHOICES = {  # turns of the wheel
    **{"left": -1.0, "right": 1.0, "no_go": 0.0, "no_response": 0.0},
    **{"counter_clockwise": -1.0, "clockwise": 1.0, "none": 0.0, "": np.nan},
}


def find(session: str, *, api: str = API) -> str:
    """Look up the address of a session's file with sorted spikes, for `load_session`.

    Args:
        session: its id, or the beginning.
        api: address of the archive's interface.

    Raises:
        ConnectionError: the archive cannot be reached.
        SessionError: it has no such file, or those of several sessions.
    """
    query = urllib.parse.urlencode({"glob": f"*ses-{session}*.nwb", "page_size": 100})
    url = f"{api}/dandisets/000409/versions/draft/assets/?{query}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            ids = {asset["path"]: asset["asset_id"] for asset in json.load(answer)["results"]}
    except (OSError, ValueError) as error:
        raise ConnectionError(f"cannot list {url} ({error}); check the network") from error
    paths = [path for path in sorted(ids) if not re.search(r"-raw|_ecephys\+image", path)]
    if len({re.findall(r"_ses-([-0-9a-f]{36})", path)[0] for path in paths}) != 1:
        problem = f"not one session with sorted spikes in DANDI 000409, but {paths}"
        raise SessionError(f"session {session!r}: {problem}; give the whole id")
    best = max(paths, key=lambda path: "desc-processed" in path)  # since 2025
    return f"{api}/assets/{ids[best]}/download/"


def load_session(
    source: str | Path,
    align: str = "gabor_stimulus_onset_time",
    *,
    window: tuple[float, float] = (-0.5, 1.5),
    bin_size: float = 0.02,
    atlas: str = "Allen",
) -> Session:
    """Load one recording, with behaviours named as by the other readers of IBL.

    Args:
        source: what `find` returned, or the path of a copy.
        align: the event: a column of the trials table, by its name since 2025.
        window: (start, stop) around each event, seconds.
        bin_size: seconds.
        atlas: level of the regions, "Allen", "Beryl" or "Cosmos"; before 2025 "Allen" alone.

    Raises:
        SessionError: see `mtm.data.nwb.load_session`.
    """
    with nwb._opened(source) as file:
        columns, series = nwb._Table(file, "intervals/trials").scalars, list(file.series())
    found: dict[str, str] = {}
    for name, path in itertools.product(SERIES, series):
        if re.search(SERIES[name], path, re.IGNORECASE):
            found.setdefault(name, path)
    for name in sorted(SERIES.keys() - found):
        warnings.warn(f"{public(str(source))}: no series of {name}", stacklevel=2)
    session = nwb.load_session(
        source,
        align if align in columns else BEFORE.get(align, align),
        window=window,
        bin_size=bin_size,
        behaviour=[name for name in COLUMNS if name in columns],
        traces=found.values(),
        region="electrodes/" + ("location" if atlas == "Allen" else f"{atlas.lower()}_location"),
    )
    read = session.behaviour
    now = {key: np.abs(read[path]) for key, path in found.items()}  # of the velocity's mean
    now["block"] = read["probability_left"]
    if "mouse_wheel_choice" in read:
        words, side = read["mouse_wheel_choice"].tolist(), read["gabor_stimulus_side"]
        if unknown := set(words) - set(CHOICES):
            raise SessionError(f"session {session.name!r}, mouse_wheel_choice: unknown {unknown}")
        now["choice"] = np.array([CHOICES[word] for word in words])
        now["reward"] = np.asarray(read["is_mouse_rewarded"], dtype=np.float64)
        sign = np.where(side == "left", -0.01, 0.01)  # of percents
        now["contrast"] = sign * read["gabor_stimulus_contrast"]
    else:
        left, right = (np.nan_to_num(read[f"contrast_{side}"]) for side in ("left", "right"))
        now |= {"choice": read["choice"], "contrast": right - left}
        now["reward"] = (read["feedback_type"] > 0).astype(np.float64)
    session.behaviour = now
    return session
