"""BrainWideBench (arXiv 2609.22064): what its tasks TS1 and TS2 ask of a session file, and scores.

TS3, the region of a unit, is not among them. A window is 1 s = 50 bins of 20 ms. Tasks on single
units (TS2) are scored in every window of the test part, one every 20 ms, tasks on behaviour (TS1)
in one window of each test trial:

===================================  ===================  ===========================  ===========
task                                 build of the file    predicted                    score
===================================  ===================  ===========================  ===========
ts2-co_smoothing                     selected_units       held-out units, all bins     poisson_d2
ts2-forecasting                      selected_units       all units, last 5 bins       poisson_d2
ts1-choice, -reward                  all_units            2 logits a trial             bacc
ts1-stimulus_contrast                all_units            5 logits a trial             bacc
ts1-whisker_motion_energy,           all_units            z-scored value, 50 samples   r2
-left_paw_speed, -right_paw_speed
ts1-wheel_speed                      all_units            value, 50 samples            r2
ts1-licking_rate                     all_units            log of the expected licks    poisson_d2
                                                          in each of 50 samples
===================================  ===================  ===========================  ===========

Source: the benchmark's own code, versions 0.1.0 of its scorer and of its data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from scipy.special import xlogy

from mtm.bwb.files import BUILDS, SPLITS, SUITES, OpenFile, load_session, opened, ts2_windows
from mtm.metrics import LOG2
from mtm.session import Session, SessionError

BINS, BIN_SIZE, LENGTH = 50, 0.02, 1.0  # of a window; seconds
AHEAD = 5  # bins that forecasting predicts
WINDOWS_AT_ONCE = 256  # so many are binned together


class Task(NamedTuple):
    """What a task asks for.

    Attributes:
        build: of the session files that it is scored on.
        prompt: masking scheme whose prompt a model is shown.
        events: name in ``task_aligned_intervals``, for a task on behaviour.
        classes: number of them, where a trial has one value.
        group: of the file, where its samples are.
    """

    build: str
    prompt: str
    events: str = ""
    classes: int = 0
    group: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Steps and values of the prediction of a trial, in a task on behaviour."""
        return (1, self.classes) if self.classes else (BINS, 1)


def _traces(events: str, **groups: str) -> dict[str, Task]:
    return {f"ts1-{k}": Task("all_units", "causal", events, group=v) for k, v in groups.items()}


TASKS = {
    "ts2-co_smoothing": Task("selected_units", "neuron"),
    "ts2-forecasting": Task("selected_units", "causal"),
    "ts1-choice": Task("all_units", "neuron", "choice", 2),
    "ts1-reward": Task("all_units", "neuron", "reward", 2),
    "ts1-stimulus_contrast": Task("all_units", "neuron", "stimulus_contrast", 5),
    **_traces("movement_window", whisker_motion_energy="whisker", wheel_speed="wheel"),
    **_traces("movement_window", left_paw_speed="paws", right_paw_speed="paws"),
    **_traces("licking_window", licking_rate="licks"),
}
"""Every task of TS1 and TS2 by the name that the scorer gives it.

:meta hide-value:
"""


# --------------------------------------------------------------------- what the files hold


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """What predictions need of a session file.

    Attributes:
        path: of the file, which the rest of it is read from when it is needed.
        name: session id.
        build: "selected_units" or "all_units".
        version: of the data set.
        units: (N,) ids.
        held_out: (N,) bool, units that co-smoothing hides and scores; none in other builds.
        rates: (N,) mean count in 20 ms, from the first spike of the recording to the last.
    """

    path: Path
    name: str
    build: str
    version: str
    units: np.ndarray
    held_out: np.ndarray
    rates: np.ndarray

    @cached_property
    def spikes(self) -> tuple[np.ndarray, np.ndarray]:
        """Times (S,) of all spikes, seconds, ascending, and the row (S,) of each one's unit."""
        with opened(self.path) as file:
            return _spikes(file, len(self.units))

    def counts(self, starts: np.ndarray) -> np.ndarray:
        """Spikes of each bin (B, 50, N) int64 in windows that begin at ``starts`` (B,), seconds.

        The benchmark's own: floor((spike - start) * 50) of the spikes in [start, start + 1).
        """
        times, unit = self.spikes
        first, last = (np.searchsorted(times, edge) for edge in (starts, starts + LENGTH))
        window = np.repeat(np.arange(len(starts)), last - first)
        before = np.cumsum(last - first) - (last - first)  # spikes of the windows before
        spike = np.arange(len(window)) - before[window] + first[window]
        place = np.floor((times[spike] - starts[window]) * round(1 / BIN_SIZE))
        row = window * BINS + np.minimum(place, BINS - 1).astype(np.int64)
        size = (len(starts), BINS, len(self.units))
        flat = np.bincount(row * size[2] + unit[spike], minlength=int(np.prod(size)))
        return flat.reshape(size)

    def windows(self) -> np.ndarray:
        """Starts (W,) of the windows that the TS2 tasks score, seconds.

        Raises:
            SessionError: when there is none.
        """
        starts = ts2_windows(self.path, "test")
        if not len(starts):
            self.fail("ts2_test_domain", "no second of a valid trial in it; leave the session out")
        return starts

    def learnable(self) -> Session | None:
        """Windows that a model may have learned from though they lie in the test part, as trials.

        They are those that training with any split of the file cuts, and the behaviour tasks' own,
        as far as they reach into the test part of the tasks that the build is for. One a second is
        enough: whatever the stride, the first and the last of each trial are the same.

        Raises:
            SessionError: for a file without a test part.
        """
        suite, starts = SUITES[self.build], [np.zeros(0)]
        with opened(self.path) as file:
            test = file.intervals(f"{suite}_test_domain")
            for split, part in ((s, p) for s in ("ts1", "ts2") for p in SPLITS[s]):
                if f"{split}_{part}_domain" in file.file:
                    starts.append(ts2_windows(file.file, part, 1.0, LENGTH, split))
            for events in sorted({task.events for task in TASKS.values() if task.events}):
                place = f"task_aligned_intervals/{events}"
                starts.append(file.intervals(place)[:, 0] if place in file.file else np.zeros(0))
        found = np.unique(np.concatenate(starts))
        begun = found[:, None] + 1e-6 < test[:, 1]
        found = found[(begun & (found[:, None] + LENGTH - 1e-6 > test[:, 0])).any(axis=1)]
        if not len(found):
            return None
        window = (0.0, LENGTH)
        return load_session(
            self.path, align=found, window=window, bin_size=BIN_SIZE, atlas=None, split=suite
        )

    def scored(self, task: str) -> tuple[slice, np.ndarray]:
        """Bins and units (n,) that a TS2 task hides and scores.

        Raises:
            SessionError: when co-smoothing has none.
        """
        if task == "ts2-forecasting":
            return slice(BINS - AHEAD, BINS), np.arange(len(self.units))
        if not self.held_out.any():
            self.fail("units/ts2_co_smoothing_is_held_out_test", "no unit is held out; co-smoothing"
                      " is scored on the eval files of selected units")  # fmt: skip
        return slice(0, BINS), np.flatnonzero(self.held_out)

    def ids(self, units: np.ndarray) -> np.ndarray:
        """``<session>/<unit>`` of some units (n,), as rows of ASCII codes; (n, width) uint8."""
        names = np.array([f"{self.name}/{unit}".encode("ascii") for unit in self.units[units]])
        return names.view(np.uint8).reshape(len(names), -1)

    def fail(self, dataset: str, problem: str) -> NoReturn:
        """Raise a SessionError that names the session."""
        raise SessionError(f"session {self.name!r}, {dataset}: {problem}")


def read(path: str | Path) -> Recording:
    """What a session file says of its units; their spikes are read when they are needed.

    Raises:
        SessionError: for a file that is missing, damaged, or of no build that is scored.
        ImportError: without the ``[bwb]`` extra.
    """
    flag = "units/ts2_co_smoothing_is_held_out_test"
    with opened(path) as file:
        build, version = file.facts["unit_filtering"], file.facts["derived_version"]
        if build not in BUILDS:
            file.fail("brainset/unit_filtering", f"{build!r}, not one of {BUILDS}; download "
                      "the file again")  # fmt: skip
        units = file.column("units/id")
        held = file.column(flag) == 1 if flag in file.file else np.zeros(len(units), dtype=bool)
        times, unit = _spikes(file, len(units))
        bins = max(float(np.ptp(times)) / BIN_SIZE, 1.0)
        rates = np.bincount(unit, minlength=len(units)) / bins
        return Recording(Path(path), file.name, build, version, units, held, rates)


def _spikes(file: OpenFile, n_units: int) -> tuple[np.ndarray, np.ndarray]:
    times = file.column("spikes/timestamps").astype(np.float64)
    unit = file.column("spikes/unit_index").astype(np.int64)
    known = len(unit) == len(times) > 0 and unit.min() >= 0 and unit.max() < n_units
    if not known or not np.isfinite(times).all():
        file.fail("spikes", "not finite times and rows of units; download the file again")
    order = np.argsort(times, kind="stable")
    return times[order], unit[order]


class Trials(NamedTuple):
    """The trials of a behaviour task in a part of the split, in the order of the file.

    Attributes:
        rows: (K,) int64, of the file's ``trials``.
        starts: (K,) of the windows, seconds.
        values: (K, 1) int64 classes, or (K, 50, 1) float32 samples in the task's unit.
        trusted: (K, 50) bool, samples that are scored.
    """

    rows: np.ndarray
    starts: np.ndarray
    values: np.ndarray
    trusted: np.ndarray


def trials(recording: Recording, task: str, part: str) -> Trials | None:
    """What a behaviour task asks for; ``None`` where the file lacks the behaviour.

    A window counts if it lies in the part, and in the time for which the behaviour was recorded;
    of the paws, if at least one sample is confident. Whisker and paws are z-scored with the mean
    and standard deviation that the file has for TS1, licks are whole counts.

    Args:
        recording: from `read`.
        task: one of `TASKS` that begins with "ts1".
        part: "train", "val" or "test".

    Raises:
        SessionError: naming session, dataset and remedy.
    """
    spec, name = TASKS[task], task.removeprefix("ts1-")
    place = f"task_aligned_intervals/{spec.events}"
    with opened(recording.path) as file:
        if place not in file.file or (spec.group and f"{spec.group}/{name}" not in file.file):
            return None
        rows = file.column(f"{place}/trial_index").astype(np.int64)
        bounds = file.intervals(place)
        keep = _inside(bounds, file.intervals(f"ts1_{part}_domain"))
        if spec.classes:
            values = file.column(f"{place}/{name}").astype(np.int64)[:, None]
            if not ((values >= 0) & (values < spec.classes)).all():
                file.fail(f"{place}/{name}", f"not classes from 0 to {spec.classes - 1}; "
                          "download the file again")  # fmt: skip
            trusted = np.ones((len(rows), BINS), dtype=bool)
        else:
            keep &= _inside(bounds, file.intervals(f"{spec.group}/domain"))
            values, trusted, whole = _samples(file, spec.group, name, bounds[:, 0])
            keep &= whole & trusted.any(axis=1)
        return Trials(rows[keep], bounds[keep, 0], values[keep], trusted[keep])


def _inside(bounds: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Which intervals (K, 2) lie in one of the domain's (n, 2); (K,) bool."""
    begun = bounds[:, None, 0] >= domain[None, :, 0] - 1e-9
    within = begun & (bounds[:, None, 1] <= domain[None, :, 1] + 1e-9)
    return np.any(within, axis=1)


def _samples(
    file: OpenFile, group: str, name: str, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 50 samples from each start.

    Values (K, 50, 1), which to trust (K, 50), and (K,) bool, whether there are so many.
    """
    values = file.column(f"{group}/{name}").astype(np.float64)
    if group in ("whisker", "paws"):
        scale = file.file[f"ts1_normalize/{group}/{name}"].attrs
        values = (values - float(scale["mean"])) / float(scale["std"])
    elif group == "licks":
        values = np.round(values * BIN_SIZE)
    first = _first_sample(file, group, starts)
    place = first[:, None] + np.arange(BINS)
    whole = (first >= 0) & (place[:, -1] < len(values))
    place = place.clip(0, len(values) - 1)
    trust = f"{group}/is_{name.removesuffix('_speed')}_confident"
    trusted = np.isfinite(values) if trust not in file.file else file.column(trust) == 1
    if not np.isfinite(values[trusted]).all():
        file.fail(f"{group}/{name}", "NaN in samples that the file trusts; download it again")
    values = np.where(trusted, values, 0.0).astype(np.float32)  # NaN is no number to be masked
    return values[place][..., None], trusted[place], whole


def _first_sample(file: OpenFile, group: str, starts: np.ndarray) -> np.ndarray:
    """Index (K,) of the first sample at or after each start, as the benchmark slices."""
    if f"{group}/timestamps" in file.file:
        return np.searchsorted(file.column(f"{group}/timestamps"), starts)
    begin, rate = file.intervals(f"{group}/domain")[0, 0], file.file[group].attrs["sampling_rate"]
    exact = (starts - begin) * float(rate)
    near = np.round(exact)
    return np.where(np.abs(exact - near) < 1e-9, near, np.ceil(exact)).astype(np.int64)


def truth(recording: Recording, task: str) -> dict[str, np.ndarray] | None:
    """What the scorer compares with, as its ``ground_truth.safetensors`` has it.

    Returns:
        TS2: ``window_timestamps`` (W,) float64, ``targets`` (W, 50 or 5, n) counts, ``unit_ids``.
        TS1: ``trial_id`` (K,) int64, ``values`` (K, 1) int64 or (K, 50, 1) float32, for the paws
        also ``mask`` (K, 50) bool. ``None`` where the file lacks the behaviour.
    """
    if TASKS[task].events:
        test = trials(recording, task, "test")
        if test is None or not len(test.rows):
            return None
        mask = {"mask": test.trusted} if TASKS[task].group == "paws" else {}
        return {"trial_id": test.rows, "values": test.values} | mask
    starts, (bins, units) = recording.windows(), recording.scored(task)
    targets = np.empty((len(starts), bins.stop - bins.start, len(units)), dtype=np.uint16)
    for at in pieces(len(starts)):
        targets[at] = recording.counts(starts[at])[:, bins][:, :, units]
    return {"window_timestamps": starts, "targets": targets, "unit_ids": recording.ids(units)}


def pieces(n: int) -> Iterator[slice]:
    """Windows 0 to n, as many at once as are binned together."""
    return (slice(i, min(i + WINDOWS_AT_ONCE, n)) for i in range(0, n, WINDOWS_AT_ONCE))


# ---------------------------------------------------------------------------------- scores


def poisson_scores(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Mean Poisson D2 over units, and bits per spike pooled over units, as the benchmark has them.

    The null is each unit's mean over the same entries. Units without a spike have no share.

    Args:
        parts: log-rates and counts of the same shape (B, T, n), piece by piece.
    """
    size, sums = 0, np.zeros((4, 1))
    for log_rates, counts in parts:
        f, y = log_rates.astype(np.float64), counts.astype(np.float64)
        size += f.shape[0] * f.shape[1]
        each = (np.exp(f), f * y, xlogy(y, y), y)
        sums = sums + np.stack([entries.sum(axis=(0, 1)) for entries in each])
    expected, product, own, spikes = sums[:, sums[3] > 0]
    if not len(spikes):
        return {"poisson_d2": np.nan, "bps": np.nan}
    loss, null = expected - product, spikes * (1 - np.log(spikes / size))
    deviance = null - (spikes - own)  # of the null from the counts themselves
    varies = np.abs(deviance) >= 1e-9
    d2 = 1 - (loss - (spikes - own))[varies] / deviance[varies]
    return {
        "poisson_d2": float(d2.mean()) if varies.any() else np.nan,
        "bps": float((null - loss).sum() / (LOG2 * spikes.sum())),
    }


def mean_recall(guess: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the share recognised; one that is only ever guessed counts as 0."""
    occurs = np.union1d(guess, labels)
    hits = [(guess[labels == k] == k).mean() if (labels == k).any() else 0.0 for k in occurs]
    return float(np.mean(hits))
