"""BrainWideBench (arXiv 2609.22064): predict its tasks, check the predictions, pack the upload.

    export(models, files, "predictions", "my-model")
    check("predictions", files)  # a list of problems; empty when ready
    score("predictions", files)  # the scorer's numbers, from the session files themselves
    pack("predictions", "my-model", "my-model.zip", files)

A window is 1 s = 50 bins of 20 ms. Tasks on single units (TS2) are scored in every window of the
test part, one every 20 ms; tasks on behaviour (TS1) in one window of each test trial. TS3, the
region of a unit, is not covered. What is predicted, and the main score:

- ``ts2-co_smoothing``: log-rates of the held-out units; ``ts2-forecasting``: of all units, in the
  last 5 bins (poisson_d2);
- ``ts1-choice``, ``-reward``, ``-stimulus_contrast``: 2, 2 and 5 logits (bacc);
- ``ts1-whisker_motion_energy``, ``-left_paw_speed``, ``-right_paw_speed`` (z-scored),
  ``-wheel_speed``: 50 samples (r2); ``ts1-licking_rate``: log of the licks in each (poisson_d2).

The scorer (package ``ibl-bwb-eval``) matches windows by exact equality of their starts, does not
check the order of units, and skips what it cannot match without an error; hence `check`.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from mtm import decoding
from mtm.bwb.files import SPLITS, SUITES, inside, load_session, open_file, ts2_windows
from mtm.data.recording import Recording
from mtm.files import atomic_write
from mtm.prediction import PredictorLike, Queries, predict_queries, require_unseen
from mtm.session import Session, SessionError

BINS, BIN_SIZE, LENGTH = 50, 0.02, 1.0  # of a window; seconds
AHEAD = 5  # bins that forecasting predicts
LOWEST = float(np.log(1e-9))  # log-probability of a class that cannot be predicted
FIRST_SEED, LEAST_SEEDS = 43, 3
SCORER = "0.1.0"  # version of ibl-bwb-eval
PLAUSIBLE = (0.1, 10.0)  # mean predicted rate, as a multiple of the recorded one


class Task(NamedTuple):
    """A task: what it is predicted from. The last three fields are of tasks on behaviour."""

    build: str  # of its files
    prompt: str  # masking scheme whose prompt a model gets
    events: str = ""  # name of its windows in the file's `task_aligned_intervals`
    classes: int = 0  # of a trial
    group: str = ""  # of the file, with 50 samples of a trial, where there are no classes

    @property
    def shape(self) -> tuple[int, int]:
        """Steps and values of the prediction of a trial, in a task on behaviour."""
        return (1, self.classes) if self.classes else (BINS, 1)


TASKS = {
    "ts2-co_smoothing": Task("selected_units", "neuron"),
    "ts2-forecasting": Task("selected_units", "causal"),
    "ts1-choice": Task("all_units", "neuron", "choice", classes=2),
    "ts1-reward": Task("all_units", "neuron", "reward", classes=2),
    "ts1-stimulus_contrast": Task("all_units", "neuron", "stimulus_contrast", classes=5),
    "ts1-whisker_motion_energy": Task("all_units", "causal", "movement_window", group="whisker"),
    "ts1-wheel_speed": Task("all_units", "causal", "movement_window", group="wheel"),
    "ts1-left_paw_speed": Task("all_units", "causal", "movement_window", group="paws"),
    "ts1-right_paw_speed": Task("all_units", "causal", "movement_window", group="paws"),
    "ts1-licking_rate": Task("all_units", "causal", "licking_window", group="licks"),
}
"""Every task of TS1 and TS2 by its name at the benchmark.

:meta hide-value:
"""


# ----------------------------------------------------------- windows, trials and targets


class Trials(NamedTuple):
    """The trials of a behaviour task that are scored or fitted to, in the order of the file."""

    rows: np.ndarray  # (K,) int64, of the file's `trials`
    starts: np.ndarray  # (K,) of the windows, seconds
    values: np.ndarray  # (K, 1) int64 classes, or (K, 50, 1) float32 samples in the task's unit
    trusted: np.ndarray  # (K, 50) bool, samples that are scored


class BenchmarkSession(Recording):
    """What the tasks need of a session file.

    Attributes:
        path, name, build, version: of the file, the session, its units and the data set.
        units: (N,) ids.
        rates: (N,) mean counts of the units in a bin.
        held_out: (N,) bool, units that co-smoothing hides and scores.
    """

    def __init__(self, path: str | Path) -> None:
        flag = "units/ts2_co_smoothing_is_held_out_test"
        with open_file(path) as file:
            super().__init__(file.name)
            self.path, self.build = Path(path), file.provenance["unit_filtering"]
            self.version = file.provenance["derived_version"]
            self.units = file.column("units/id")
            self.rates = file.column("units/firing_rate") * BIN_SIZE
            self.held_out = np.zeros(len(self.units), dtype=bool)
            if flag in file.file:  # in eval files of selected units
                self.held_out = file.column(flag) == 1

    def windows(self) -> np.ndarray:
        """Starts (W,) in seconds of the windows that the TS2 tasks score."""
        return ts2_windows(self.path, "test")

    def session(self, starts: np.ndarray) -> Session:
        """The windows of 1 s that begin at ``starts`` (W,), seconds, as trials."""
        grid: dict[str, Any] = {"window": (0.0, LENGTH), "bin_size": BIN_SIZE, "atlas": None}
        return load_session(self.path, align=starts, split=SUITES[self.build], **grid)

    def scored(self, task: str) -> tuple[slice, np.ndarray]:
        """Bins and units (N,) bool that a TS2 task hides and scores."""
        if task == "ts2-forecasting":
            return slice(BINS - AHEAD, BINS), np.ones(len(self.units), dtype=bool)
        if not self.held_out.any():
            self.fail("units", "none is held out; co-smoothing needs an eval file, selected_units")
        return slice(0, BINS), self.held_out

    def trials(self, task: str, part: str) -> Trials:
        """The trials of a behaviour task in a part of the split ts1; none without the behaviour.

        A window counts if it lies in the part and in the time for which the behaviour was recorded;
        of the paws, if at least one sample is confident. Whisker and paws are z-scored with the
        mean and standard deviation of the file; licks are counts.
        """
        spec, name = TASKS[task], task.removeprefix("ts1-")
        place, series = f"task_aligned_intervals/{spec.events}", f"{spec.group}/{name}"
        with open_file(self.path) as file:
            if place not in file.file or (spec.group and series not in file.file):
                return Trials(*[np.zeros(0, dtype=np.int64)] * 4)
            rows, bounds = file.column(f"{place}/trial_index"), file.intervals(place)
            keep = inside(bounds, file.intervals(f"ts1_{part}_domain"))
            if spec.classes:
                values = file.column(f"{place}/{name}").astype(np.int64)[:, None]
                trusted = np.ones((len(rows), BINS), dtype=bool)
            else:
                keep &= inside(bounds, file.intervals(f"{spec.group}/domain"))
                samples = file.column(series).astype(np.float64)
                known = np.isfinite(samples)
                if spec.group == "paws":
                    known = file.column(f"paws/is_{name.removesuffix('_speed')}_confident") == 1
                if spec.group in ("whisker", "paws"):
                    scale = file.file[f"ts1_normalize/{series}"].attrs
                    samples = (samples - scale["mean"]) / scale["std"]
                elif spec.group == "licks":
                    samples = np.round(samples * BIN_SIZE)
                # The 50 samples from the first one at or after the start (but for rounding).
                first = np.searchsorted(file.times(spec.group, len(samples)), bounds[:, 0] - 2e-11)
                index = first[:, None] + np.arange(BINS)
                keep &= index[:, -1] < len(samples)
                index = index.clip(max=len(samples) - 1)
                values = np.where(known, samples, 0.0)[index, None].astype(np.float32)
                trusted = known[index]
                keep &= trusted.any(axis=1)
        rows = rows.astype(np.int64)
        return Trials(rows[keep], bounds[keep, 0], values[keep], trusted[keep])

    def index(self, task: str) -> dict[str, np.ndarray] | None:
        """What identifies the rows and columns of a prediction file.

        TS2: ``window_timestamps`` (W,) float64 and ``unit_ids`` (n, width) uint8, the ASCII codes
        of ``<session>/<unit>``. TS1: ``trial_id`` (K,) int64; ``None`` without the behaviour.
        """
        if TASKS[task].events:
            rows = self.trials(task, "test").rows
            return {"trial_id": rows} if len(rows) else None
        ids = [f"{self.name}/{unit}".encode("ascii") for unit in self.units[self.scored(task)[1]]]
        codes = np.array(ids).view(np.uint8).reshape(len(ids), -1)
        return {"window_timestamps": self.windows(), "unit_ids": codes}

    def truth(self, task: str) -> dict[str, np.ndarray] | None:
        """The scorer's ground truth: `index`, and what was to be predicted.

        TS2: ``targets`` (W, 50 or 5, n) float32 counts. TS1: ``values`` (K, 1) int64 or
        (K, 50, 1) float32, and for the paws ``mask`` (K, 50) bool.
        """
        index = self.index(task)
        if index is None:
            return None
        if TASKS[task].events:
            _, _, values, trusted = self.trials(task, "test")
            return index | {"values": values} | ({"mask": trusted} if "paw" in task else {})
        bins, units = self.scored(task)
        counts = self.session(index["window_timestamps"]).counts
        return index | {"targets": counts[:, bins][:, :, units].astype(np.float32)}


# ----------------------------------------------------------------------------- predictions


def predict_task(
    predictor: PredictorLike,
    recording: BenchmarkSession,
    task: str,
    *,
    dtype: str = "float16",
    cache: dict[Any, Any] | None = None,
    **options: Any,
) -> dict[str, np.ndarray] | None:
    """Predict a task: the tensors of a prediction file.

    Behaviour is decoded from the log-rates that the predictor gives when nothing is hidden, by
    linear decoders that are fitted to the training and validation trials.

    Args:
        predictor: as in :func:`mtm.evaluate`, except for an array.
        recording: of the task's build.
        task: one of `TASKS`.
        dtype: of TS2 predictions, "float16" or "float32".
        cache: {} to reuse a predictor's features in the next behaviour task of this recording.
        **options: ``batch_size`` and ``progress`` as in :func:`mtm.evaluate`.

    Returns:
        `BenchmarkSession.index` and ``predictions``. TS2: (W, 50 or 5, n) log-rates of what was
        hidden. TS1: (K, 1, C) or (K, 50, 1) float32. ``None`` where the file lacks the behaviour.
    """
    spec, index = TASKS[task], recording.index(task)
    if index is None:
        return None
    if spec.events:
        cache = {} if cache is None else cache
        index["predictions"] = _predict_behaviour(predictor, recording, task, cache, **options)
        return index
    bins, units = recording.scored(task)
    session = recording.session(index["window_timestamps"])
    queries, predicted = Queries(units[None], units[None], bins), []
    # A real test part has 70,000 windows, too many for their predictions to be kept as float64.
    for trials in np.array_split(np.arange(session.n_trials), session.n_trials // 1000 + 1):
        log_rates = predict_queries(predictor, session, spec.prompt, trials, queries, **options)
        predicted.append(log_rates[:, bins][:, :, units].astype(dtype))
    return index | {"predictions": np.concatenate(predicted)}


def _predict_behaviour(
    predictor: PredictorLike,
    recording: BenchmarkSession,
    task: str,
    cache: dict[Any, Any],
    **options: Any,
) -> np.ndarray:
    """Decode a behaviour in the test trials, (K, 1, C) or (K, 50, 1) float32."""
    spec = TASKS[task]
    train, val, test = (recording.trials(task, part) for part in SPLITS["ts1"])
    if (spec.prompt, spec.events) not in cache:
        cache.clear()  # features of one kind of window are all that is kept in memory
        with open_file(recording.path) as file:
            starts = file.column(f"task_aligned_intervals/{spec.events}/start")
        session, everything = recording.session(starts), np.ones((1, len(recording.units)), bool)
        queries, trials = Queries(~everything, everything, slice(BINS)), np.arange(session.n_trials)
        log_rates = predict_queries(predictor, session, spec.prompt, trials, queries, **options)
        features = log_rates.reshape(session.n_trials, -1)
        cache[spec.prompt, spec.events] = session.behaviour["event-time"], features
    starts, features = cache[spec.prompt, spec.events]
    try:
        fit = Trials(*map(np.concatenate, zip(train, val, strict=True)))
        x, x_test = (features[np.searchsorted(starts, part.starts)] for part in (fit, test))
        decoded = decode_trials(*decoding.principal_axes(x, x_test), fit, spec)
    except ValueError as error:
        recording.fail(task, f"too few trials to fit a decoder ({error}); leave the task out")
    return decoded.reshape(len(test.rows), *spec.shape).astype(np.float32)


def decode_trials(x: np.ndarray, x_test: np.ndarray, fit: Trials, task: Task) -> np.ndarray:
    """Decode a behaviour from features (K', F), fitted to features (K, F) of the trials ``fit``.

    Classes are decoded by logistic regression with equal weight for each class, samples by ridge
    regression, where a sample that is not trusted is replaced by the mean of the trusted ones at
    its place. Penalties are cross-validated. Returns log-probabilities (K', C), samples (K', 50),
    or log-rates (K', 50) of licks.
    """
    if task.group:
        samples = np.where(fit.trusted, fit.values[..., 0], 0.0)
        means = samples.sum(axis=0) / np.maximum(fit.trusted.sum(axis=0), 1)
        search = decoding.search(x, np.where(fit.trusted, samples, means), "trace")
        found = search.predict(x_test).reshape(len(x_test), -1)
        if task.group == "licks":  # a line may fall below 0: at least half a lick in all trials
            found = np.log(np.maximum(found, 0.5 / len(samples)))
        return found
    classes, n_each = np.unique(fit.values, return_counts=True)
    solver = "newton-cholesky" if len(classes) == 2 else "lbfgs"
    logistic = LogisticRegression(solver=solver, class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(min(decoding.FOLDS, *n_each), shuffle=True, random_state=0)
    grid = {"C": decoding.CLASS_PENALTIES}
    search = GridSearchCV(logistic, grid, cv=folds, scoring="balanced_accuracy")
    found = np.full((len(x_test), task.classes), -np.inf)  # of classes never seen
    found[:, classes] = decoding.fitted(search, x, fit.values[:, 0]).predict_log_proba(x_test)
    return found.clip(min=LOWEST)


# ---------------------------------------------------------------------------------- export


def export(
    models: PredictorLike | Sequence[PredictorLike],
    files: Iterable[str | Path],
    folder: str | Path,
    label: str,
    *,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> list[Path]:
    """Write the prediction files of models that differ in their seed; returns the paths.

    Models and files of both builds may be given at once: a file serves the tasks of its build, and
    a model the files whose session it knows with that number of units.

    Args:
        models: as in `predict_task`.
        files: session files of either or both builds.
        folder: of all predictions.
        label: name of the model at the benchmark.
        tasks: some of `TASKS`. Default: all that the files serve.
        seeds: of the models of a file, in their order. Default: from 43 on, as the benchmark.
        **options: of `predict_task`.

    Raises:
        SessionError: for a file that no model fits, or a model that fits no file or was trained
            on windows of a test part; before anything is predicted.
        ValueError: for unknown tasks, a bad label, or the wrong number of seeds.
    """
    models = list(models) if isinstance(models, Sequence) else [models]
    tasks = list(TASKS if tasks is None else tasks)
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    if not re.fullmatch(r"\w[\w.-]*", label, re.ASCII):
        raise ValueError(f"label {label!r}: use letters, digits, and - _ . after the first")
    builds = {TASKS[task].build for task in tasks}
    recordings = [each for each in map(BenchmarkSession, files) if each.build in builds]
    if not recordings:
        raise SessionError(f"none of the files is of the build that the tasks need: {builds}")
    plan = [(recording, models_for(recording, models, seeds)) for recording in recordings]
    used = {id(model) for _, chosen in plan for model in chosen.values()}
    if unused := [n for n, model in enumerate(models, start=1) if id(model) not in used]:
        raise SessionError(f"models {unused} of {len(models)} fit none of the files")
    for recording, chosen in plan:
        require_untrained(chosen, recording)
    paths = []
    for recording, chosen in plan:
        for seed, model in chosen.items():
            cache: dict[Any, Any] = {}
            for task in (task for task in tasks if TASKS[task].build == recording.build):
                tensors = predict_task(model, recording, task, cache=cache, **options)
                if tensors is not None:
                    paths.append(save(folder, label, task, seed, recording, tensors))
    return paths


def models_for(
    recording: BenchmarkSession, models: Sequence[PredictorLike], seeds: Sequence[int] | None
) -> dict[int, PredictorLike]:
    """Seed -> model, of the models that fit a session file; functions fit all."""
    n_units = len(recording.units)

    def fits(predictor: Any) -> bool:
        model = getattr(predictor, "model", predictor)
        if not hasattr(model, "session_layers"):
            return True
        known = recording.name in model.session_names and model.n_bins == BINS
        return known and model.session_layers(recording.name).n_neurons == n_units

    fitting = [predictor for predictor in models if fits(predictor)]
    if not fitting:
        recording.fail(
            str(recording.path),
            f"no model knows this session with {n_units} units ({recording.build}) and {BINS} bins;"
            " train one: python -m mtm prepare bwb FILE --out DIR --align ts2, then train DIR",
        )
    found = list(range(FIRST_SEED, FIRST_SEED + len(fitting)) if seeds is None else seeds)
    if len(set(found)) != len(fitting):
        raise ValueError(f"{len(fitting)} models need as many different seeds, got {found}")
    return dict(zip(found, fitting, strict=True))


def require_untrained(models: dict[int, PredictorLike], recording: BenchmarkSession) -> None:
    """Raise a SessionError for models (seed -> model) that were trained on the test part.

    A model's training trials are compared with the windows in the test part that training with any
    split of the file cuts, and with those of the behaviour tasks. Windows one second apart suffice:
    whatever the stride, the first and the last window of each trial are the same.
    """
    suite = SUITES[recording.build]
    with open_file(recording.path) as file:
        test, groups = file.intervals(f"{suite}_test_domain"), set(file.file)
        aligned = file.file["task_aligned_intervals"]
        starts = [aligned[name]["start"][()] for name in aligned if name != "domain"]
    for split, part in itertools.product(SUITES.values(), SPLITS["ts1"]):
        if f"{split}_{part}_domain" in groups:
            starts.append(ts2_windows(recording.path, part, 1.0, LENGTH, split))
    every = np.unique(np.concatenate(starts))[:, None]
    overlap = (every + 1e-6 < test[:, 1]) & (every + LENGTH - 1e-6 > test[:, 0])
    windows = recording.session(every[overlap.any(axis=1), 0])
    for seed, model in models.items():
        try:
            require_unseen(model, windows, np.arange(windows.n_trials))
        except ValueError:
            recording.fail(
                f"{suite}_test_domain",
                f"the model of seed {seed} was trained on windows of this part; "
                f"prepare the file again with --align ts2 --split {suite}, and train another",
            )


def save(
    folder: str | Path,
    label: str,
    task: str,
    seed: int,
    recording: BenchmarkSession,
    tensors: dict[str, np.ndarray],
) -> Path:
    """Write the tensors of `predict_task`; returns the path.

    It is ``<folder>/<label>/<task>/<session>/seed_<seed>.safetensors``.
    """
    path = Path(folder) / label / task / recording.name / f"seed_{seed}.safetensors"
    metadata = _metadata(label, task, seed, recording)
    metadata |= {"ibl_bwb_eval_version": SCORER, "context_window": str(LENGTH)}
    metadata |= {"bin_size": str(BIN_SIZE)}
    with atomic_write(path) as partial:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial, metadata)
    return path


def _metadata(label: str, task: str, seed: int, recording: BenchmarkSession) -> dict[str, str]:
    """The metadata that the benchmark requires of a prediction file."""
    return {
        "label": label,
        "task": task,
        "seed": str(seed),
        "recording_id": recording.name,
        "unit_filtering": recording.build,
        "dataset_version": recording.version,
    }


# --------------------------------------------------------------------------- check and pack


def check(
    folder: str | Path,
    files: Iterable[str | Path],
    *,
    label: str | None = None,
    deterministic: bool = False,
) -> list[str]:
    """Find what would spoil an upload: a list of problems with file and remedy; empty when ready.

    Each prediction file is compared with its session file: windows or trials, units and their
    order, shapes, numbers and metadata. All sessions must have the same seeds. TS3 is not checked.

    Args:
        folder: that `export` wrote to.
        files: the session files, of each build whose tasks are in the folder.
        label: which to check. Default: the only one.
        deterministic: accept one seed, as is declared with the upload.
    """
    folder, recordings = Path(folder), [BenchmarkSession(path) for path in files]
    labels = sorted(path.name for path in folder.glob("*") if path.is_dir())
    label = labels[0] if label is None and len(labels) == 1 else label
    if label not in labels:
        return [f"{folder}: has predictions of {labels or 'no label'}; name the one to upload"]
    found, findings = list_predictions(folder / label)
    by_build = {(recording.build, recording.name): recording for recording in recordings}
    for (task, session, seed), path in found.items():
        recording = by_build.get((TASKS[task].build, session))
        problems = ["no session file"]
        if recording is not None:
            problems = _check_file(path, recording, task, label, seed)
        findings += [f"{path}: {problem}; export it again or remove it" for problem in problems]
    seeds = sorted({seed for _, _, seed in found})
    for recording in recordings:
        for task in sorted({task for task, _, _ in found if TASKS[task].build == recording.build}):
            here = [seed for seed in seeds if (task, recording.name, seed) in found]
            if here != seeds and (here or recording.index(task) is not None):
                place = folder / label / task / recording.name
                findings.append(f"{place}: has seeds {here}, others have {seeds}; export them all")
    if len(seeds) < (1 if deterministic else LEAST_SEEDS) or seeds[-1] - seeds[0] >= len(seeds):
        need = f"{LEAST_SEEDS} are needed, numbered one after the other"
        findings.append(f"{folder / label}: seeds {seeds}; {need}, or a deterministic model")
    return findings


def list_predictions(root: Path) -> tuple[dict[tuple[str, str, int], Path], list[str]]:
    """The prediction files of a label by task, session and seed; a finding for other files."""
    found, findings = {}, []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        place = path.relative_to(root).as_posix()
        match = re.fullmatch(r"([^/]+)/([^/]+)/seed_(0|[1-9]\d*)\.safetensors", place)
        if match and match[1] in TASKS:
            found[match[1], match[2], int(match[3])] = path
        elif not re.fullmatch(r"ts3-unit_cosmos/seed_\d+\.safetensors", place):
            findings.append(f"{path}: not <task>/<session>/seed_<n>.safetensors; remove it")
    return found, findings


def _check_file(
    path: Path, recording: BenchmarkSession, task: str, label: str, seed: int
) -> list[str]:
    """Problems of a prediction file."""
    try:
        with safe_open(path, framework="np") as file:
            tensors, said = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    except (SafetensorError, OSError) as error:
        return [f"cannot be read ({error})"]
    problems = [
        f"says {key} {(said or {}).get(key)!r}, its place and the session file say {value!r}"
        for key, value in _metadata(label, task, seed, recording).items()
        if (said or {}).get(key) != value
    ]
    index = recording.index(task)
    if index is None:
        return [*problems, "the session has no such behaviour in its test part"]
    if lacking := sorted({"predictions", *index} - tensors.keys()):
        return [*problems, f"lacks {', '.join(lacking)}"]
    # The order of rows (windows or trials) is free, that of units is not.
    (key, wanted), *_ = index.items()
    given = tensors[key]
    missing, others = len(np.setdiff1d(wanted, given)), len(np.setdiff1d(given, wanted))
    if missing or others or given.shape != wanted.shape or given.dtype != wanted.dtype:
        exact = "" if TASKS[task].events else " and equal to the last bit (bwb.ts2_windows)"
        problems.append(
            f"{key} is {given.dtype} {given.shape}: {missing} of {len(wanted)} are missing, "
            f"{others} are not of the task; need {wanted.dtype}, each once{exact}"
        )
    if "unit_ids" in index and not np.array_equal(tensors["unit_ids"], index["unit_ids"]):
        problems.append("unit_ids are not the scored units in the order of the session file")
    return problems + _check_numbers(tensors["predictions"], len(given), recording, task)


def _check_numbers(
    predictions: np.ndarray, n_rows: int, recording: BenchmarkSession, task: str
) -> list[str]:
    """Problems of the predictions: their shape, type and range."""
    spec, dtypes, shape = TASKS[task], ["float32"], (n_rows, *TASKS[task].shape)
    if not spec.events:
        bins, units = recording.scored(task)
        dtypes, shape = ["float16", "float32"], (n_rows, bins.stop - bins.start, int(units.sum()))
    if predictions.shape != shape or predictions.dtype.name not in dtypes:
        wanted = f"{' or '.join(dtypes)} {shape}"
        return [f"predictions are {predictions.dtype} {predictions.shape}, not {wanted}"]
    if not np.isfinite(predictions).all():
        return ["predictions hold NaN or infinite values"]
    if spec.events and spec.group != "licks":
        return []
    # Log-rates: bins are short, so most are below 0, and their rates are near the recorded ones.
    problem = "none is below 0" if predictions.min() >= 0 else ""
    if not (spec.events or problem):
        mean, own = np.exp(predictions.astype(np.float32)).mean(), recording.rates[units].mean()
        if not PLAUSIBLE[0] < mean / own < PLAUSIBLE[1]:
            problem = f"their mean rate is {mean:.3g} in a bin, the session's {own:.3g}"
    remedy = "write the natural log of the expected count in a bin"
    return [f"predictions are no log-rates ({problem}): {remedy}"] if problem else []


def pack(
    folder: str | Path,
    label: str,
    out: str | Path,
    files: Iterable[str | Path],
    *,
    deterministic: bool = False,
) -> Path:
    """Zip a label's predictions for the upload if `check` finds nothing; returns the zip's path.

    Args:
        folder, label, files, deterministic: as in `check`.
        out: the zip; its root holds ``<label>/<task>/...``.

    Raises:
        ValueError: with all findings.
    """
    folder, out = Path(folder), Path(out)
    if findings := check(folder, files, label=label, deterministic=deterministic):
        listed = "".join(f"\n- {finding}" for finding in findings)
        raise ValueError(f"{folder / label} is not ready to be uploaded:{listed}")
    with atomic_write(out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((folder / label).rglob("*.safetensors")):
            file.write(path, path.relative_to(folder).as_posix())
    return out


# ---------------------------------------------------------------------------------- scores


def write_truth(
    files: Iterable[str | Path], folder: str | Path, tasks: Iterable[str] = TASKS
) -> list[Path]:
    """Write ground truth, which the session files contain, for the scorer's ``--gt_dir``.

    Returns the paths, ``<folder>/<task>/<session>/ground_truth.safetensors``.
    """
    paths = []
    for recording in map(BenchmarkSession, files):
        for task in (task for task in tasks if TASKS[task].build == recording.build):
            if (truth := recording.truth(task)) is not None:
                path = Path(folder) / task / recording.name / "ground_truth.safetensors"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({k: np.ascontiguousarray(v) for k, v in truth.items()}, path)
                paths.append(path)
    return paths


def score(
    folder: str | Path, files: Iterable[str | Path], *, label: str = ""
) -> dict[tuple[str, str, int], dict[str, float]]:
    """Score predictions with the benchmark's scorer, against the session files.

    Args:
        folder, files, label: as in `check`.

    Returns:
        (task, session, seed) -> the scorer's metrics: ``poisson_d2`` and ``bps`` (bits per spike,
        pooled over units) for TS2; ``bacc``, ``r2`` or ``poisson_d2`` and others for TS1. What the
        scorer cannot match is left out; `check` finds it.
    """
    try:
        ts1, ts2 = (import_module(f"ibl_bwb_eval.scoring.{suite}") for suite in ("ts1", "ts2"))
    except ImportError as error:
        install = f"pip install torchmetrics rich; pip install --no-deps ibl-bwb-eval=={SCORER}"
        raise ImportError(f"the benchmark's scorer is missing: {install}") from error
    root = Path(folder) / label
    tasks = [task for task in TASKS if any(root.rglob(f"{task}/*/seed_*.safetensors"))]
    with tempfile.TemporaryDirectory() as truth:
        write_truth(files, truth, tasks)
        found = ts1.score_dir(root, truth) | ts2.score_dir(root, truth)
    return {key[1:]: values for key, values in found.items()}
