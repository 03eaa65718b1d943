"""BrainWideBench (arXiv 2609.22064): predict its tasks, check the predictions, pack the upload.

    export(models, files, "predictions", "my-model")
    check("predictions", files)  # a list of problems; empty when ready
    score("predictions", files)  # the scorer's numbers, from the session files themselves
    pack("predictions", "my-model", "my-model.zip", files)

A window is 1 s = 50 bins of 20 ms. Tasks on single units (TS2) have one every 20 ms of the test
part, tasks on behaviour (TS1) one in each test trial. What is predicted, and the main score:

- ``ts2-co_smoothing``: log-rates of the held-out units; ``ts2-forecasting``: of all units, in the
  last 5 bins (poisson_d2);
- classes: as many logits (bacc); ``ts1-licking_rate``: log of the licks in each bin (poisson_d2);
  other behaviours: 50 samples, of whisker and paws z-scored (r2).

The scorer (package ``ibl-bwb-eval``) skips what it cannot match without an error; hence `check`.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtm import decoding
from mtm.bwb.files import ROUNDING, SUITES, open_file, ts2_windows
from mtm.data.recording import Recording, within
from mtm.files import atomic_write
from mtm.inputs import SessionError
from mtm.prediction import PredictorLike, Queries, predict_queries, require_unseen
from mtm.session import Session, Split

BINS, BIN_SIZE, LENGTH = 50, 0.02, 1.0  # of a window; seconds
AHEAD = 5  # bins that forecasting predicts
LOWEST = float(np.log(1e-9))  # log-probability of a class that cannot be predicted
FIRST_SEED, LEAST_SEEDS = 43, 3
SCORER = "0.1.0"  # version of ibl-bwb-eval
METADATA = ("label", "task", "seed", "recording_id", "unit_filtering", "dataset_version")


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


class Trials(NamedTuple):
    """The trials of a behaviour task in a part of the split, in the order of the file."""

    rows: np.ndarray  # (K,) int64, of the file's `trials`
    starts: np.ndarray  # (K,) of the windows, seconds
    values: np.ndarray  # (K, 1) int64 classes, or (K, 50, 1) float32 samples in the task's unit
    trusted: np.ndarray  # (K, 50) bool, samples that are scored


class BenchmarkSession(Recording):
    """What the tasks need of a session file.

    ``units`` (N,) are ids, ``held_out`` (N,) bool the units that co-smoothing hides and scores.
    """

    def __init__(self, path: str | Path) -> None:
        flag = "units/ts2_co_smoothing_is_held_out_test"
        with open_file(path) as file:
            super().__init__(file.name)
            self.path, self.build = Path(path), file.provenance["unit_filtering"]
            self.version = file.provenance["derived_version"]
            self.units = file.column("units/id")
            self.held_out = np.zeros(len(self.units), dtype=bool)
            if flag in file.file:  # in eval files of selected units
                self.held_out = file.column(flag) == 1

    def metadata(self, label: str, task: str, seed: int) -> dict[str, str]:
        """The metadata that the benchmark requires of a prediction file."""
        values = label, task, str(seed), self.name, self.build, self.version
        return dict(zip(METADATA, values, strict=True))

    def windows(self) -> np.ndarray:
        """Starts (W,) in seconds of the windows that the TS2 tasks score."""
        return ts2_windows(self.path, "test")

    def session(self, starts: np.ndarray, val: Any = (), test: Any = ()) -> Session:
        """The windows of 1 s that begin at ``starts`` (W,), seconds, then at those of val and test.

        Nothing is left out, observed or not: the benchmark scores all.
        """
        with open_file(self.path) as file:
            spikes = file.spikes()
        events = np.concatenate([starts, val, test])
        fields: dict[str, Any] = {"window": (0.0, LENGTH), "bin_size": BIN_SIZE, "name": self.name}
        parts = np.split(np.arange(len(events)), np.cumsum([len(starts), len(val)]))
        fields |= {"clusters": np.arange(len(self.units)), "given_split": parts}
        return Session.from_spike_times(*spikes, events, **fields)

    def scored(self, task: str) -> tuple[slice, np.ndarray]:
        """Bins and units (N,) bool that a TS2 task hides and scores."""
        if task == "ts2-forecasting":
            return slice(BINS - AHEAD, BINS), np.ones(len(self.units), dtype=bool)
        if not self.held_out.any():
            self.fail("units", "none is held out; co-smoothing needs an eval file, selected_units")
        return slice(0, BINS), self.held_out

    def trials(self, task: str, part: str) -> Trials:
        """The trials of a behaviour task in a part of the split ts1; none without the behaviour.

        Their windows lie in the part, and where the behaviour was recorded; of the paws, at least
        one sample is confident. Whisker and paws are z-scored as the file says; licks are counts.
        """
        spec, name = TASKS[task], task.removeprefix("ts1-")
        place, series = f"task_aligned_intervals/{spec.events}", f"{spec.group}/{name}"
        with open_file(self.path) as file:
            if place not in file.file or (spec.group and series not in file.file):
                return Trials(*[np.zeros(0, dtype=np.int64)] * 4)
            rows, bounds = file.column(f"{place}/trial_index"), file.intervals(place)
            keep = within(file.intervals(f"ts1_{part}_domain"), bounds, ROUNDING)
            if spec.classes:
                values = file.column(f"{place}/{name}").astype(np.int64)[:, None]
                trusted = np.ones((len(rows), BINS), dtype=bool)
            else:
                keep &= within(file.intervals(f"{spec.group}/domain"), bounds, ROUNDING)
                times, samples, known = file.trace(spec.group, name)
                if spec.group in ("whisker", "paws"):
                    scale = file.file[f"ts1_normalize/{series}"].attrs
                    samples = (samples - scale["mean"]) / scale["std"]
                elif spec.group == "licks":
                    samples = np.round(samples * BIN_SIZE)
                # The 50 samples from the first one at or after the start (but for rounding).
                first = np.searchsorted(times, bounds[:, 0] - 2e-11)
                index = first[:, None] + np.arange(BINS)
                keep &= index[:, -1] < len(samples)
                index = index.clip(max=len(samples) - 1)
                values = np.where(known, samples, 0.0)[index, None].astype(np.float32)
                trusted = known[index]
                keep &= trusted.any(axis=1)
        return Trials(rows[keep].astype(np.int64), bounds[keep, 0], values[keep], trusted[keep])

    def index(self, task: str) -> dict[str, np.ndarray] | None:
        """What identifies the rows and columns of a prediction file; None without the behaviour.

        ``window_timestamps`` (W,) and ``unit_ids`` (n, width), codes of ``<session>/<unit>``; or
        ``trial_id`` (K,).
        """
        if TASKS[task].events:
            rows = self.trials(task, "test").rows
            return {"trial_id": rows} if len(rows) else None
        ids = [f"{self.name}/{unit}".encode("ascii") for unit in self.units[self.scored(task)[1]]]
        codes = np.array(ids).view(np.uint8).reshape(len(ids), -1)
        return {"window_timestamps": self.windows(), "unit_ids": codes}

    def truth(self, task: str) -> dict[str, np.ndarray] | None:
        """The scorer's ground truth: `index`; ``targets`` (W, 50 or 5, n), counts; or `Trials`."""
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
    predictor: PredictorLike, recording: BenchmarkSession, task: str, **options: Any
) -> dict[str, np.ndarray] | None:
    """Predict a task: the tensors of a prediction file.

    Behaviour is decoded from the log-rates that the predictor gives when nothing is hidden, by
    linear decoders that are fitted to the training and validation trials, as in :func:`mtm.decode`.

    Args:
        predictor: as in :func:`mtm.evaluate`, except for an array.
        recording: of the task's build.
        task: one of `TASKS`.
        **options: ``batch_size`` and, of activity, ``progress`` as in :func:`mtm.evaluate`.

    Returns:
        `BenchmarkSession.index` and ``predictions``: (W, 50 or 5, n) float16 log-rates of what was
        hidden; of behaviour, (K, 1, C) or (K, 50, 1) float32; or None where the file has none.
    """
    spec, index = TASKS[task], recording.index(task)
    if index is None:
        return None
    if spec.events:
        return index | {"predictions": _predict_behaviour(predictor, recording, task, **options)}
    bins, units = recording.scored(task)
    session = recording.session(index["window_timestamps"])
    queries, predicted = Queries(units[None], units[None], bins), []
    # A real test part has 70,000 windows, too many for their predictions to be kept as float64.
    for trials in np.array_split(np.arange(session.n_trials), session.n_trials // 1000 + 1):
        log_rates = predict_queries(predictor, session, spec.prompt, trials, queries, **options)
        predicted.append(log_rates[:, bins][:, :, units].astype(np.float16))
    return index | {"predictions": np.concatenate(predicted)}


def _predict_behaviour(
    predictor: PredictorLike, recording: BenchmarkSession, task: str, **options: Any
) -> np.ndarray:
    """Decode a behaviour in the test trials, (K, 1, C) or (K, 50, 1) float32."""
    train, val, test = (recording.trials(task, part) for part in Split._fields)
    fit = Trials(*map(np.concatenate, zip(train, val, strict=True)))
    # Decoders are fitted to both parts; a session needs a trial in each.
    session = recording.session(fit.starts[:-1], fit.starts[-1:], test.starts)
    how: dict[str, Any] = {"split_seed": 0, "allow_seen": True, "read": "rates"}
    how["batch_size"] = options.get("batch_size")
    decoder = decoding.Decoder(predictor, session, **how)
    every = np.ones(session.n_trials, dtype=bool)
    try:
        features = decoder.features(("rates", TASKS[task].prompt), every)
        decoded = decode_trials(*features, fit, TASKS[task])
    except ValueError as error:
        recording.fail(task, f"too few trials to fit a decoder ({error}); leave the task out")
    return decoded.reshape(len(test.rows), *TASKS[task].shape).astype(np.float32)


def decode_trials(x: np.ndarray, x_test: np.ndarray, fit: Trials, task: Task) -> np.ndarray:
    """Decode a behaviour from features (K', F), fitted to features (K, F) of the trials ``fit``.

    Returns logits (K', C), samples (K', 50), or log-rates (K', 50) of licks.
    """
    if task.group:
        samples = np.where(fit.trusted, fit.values[..., 0], 0.0)  # mean, where not trusted
        means = samples.sum(axis=0) / np.maximum(fit.trusted.sum(axis=0), 1)
        search = decoding.search(x, np.where(fit.trusted, samples, means), "trace")
        found = search.predict(x_test).reshape(len(x_test), -1)
        if task.group == "licks":  # a line may fall below 0: at least half a lick in all trials
            found = np.log(np.maximum(found, 0.5 / len(samples)))
        return found
    classes, n_each = np.unique(fit.values, return_counts=True)
    found = np.full((len(x_test), task.classes), -np.inf)  # of classes never seen
    found[:, classes] = decoding.search(x, fit.values[:, 0], "classes").predict_log_proba(x_test)
    # The score is balanced accuracy: as if all classes were as frequent.
    found[:, classes] -= np.log(n_each / n_each.sum())
    return found.clip(min=LOWEST)


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

    Args:
        models: as in `predict_task`; each for the files whose session and units it knows.
        files: session files of either or both builds; each for the tasks of its build.
        folder: of all predictions.
        label: name of the model at the benchmark.
        tasks: some of `TASKS`. Default: all.
        seeds: of the models of a file, in their order. Default: from 43 on, as the benchmark.
        **options: of `predict_task`.

    Raises:
        SessionError: for a file that no model fits, or a model that fits no file or was trained
            on windows of a test part; before anything is predicted.
    """
    models = list(models) if isinstance(models, Sequence) else [models]
    tasks = list(TASKS if tasks is None else tasks)
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    builds = {TASKS[task].build for task in tasks}
    recordings = [each for each in map(BenchmarkSession, files) if each.build in builds]
    if not recordings:
        raise SessionError(f"none of the files is of the build that the tasks need: {builds}")
    chosen = [models_for(recording, models, seeds) for recording in recordings]
    used = [id(model) for fitting in chosen for model in fitting.values()]
    if unused := [n for n, model in enumerate(models, start=1) if id(model) not in used]:
        raise SessionError(f"models {unused} of {len(models)} fit none of the files")
    for recording, fitting in zip(recordings, chosen, strict=True):
        require_untrained(fitting, recording)
    paths = []
    for recording, fitting in zip(recordings, chosen, strict=True):
        for seed, task in itertools.product(fitting, tasks):
            if TASKS[task].build == recording.build:
                tensors = predict_task(fitting[seed], recording, task, **options)
                if tensors is not None:
                    paths.append(save(folder, label, task, seed, recording, tensors))
    return paths


def models_for(
    recording: BenchmarkSession, models: Sequence[PredictorLike], seeds: Sequence[int] | None
) -> dict[int, PredictorLike]:
    """Seed -> model, of the models that fit a session file; functions fit all."""
    wanted, fitting = (BINS, len(recording.units)), []
    for predictor in models:
        model: Any = getattr(predictor, "model", predictor)
        found: Any = wanted  # of functions
        if hasattr(model, "session_layers"):
            known = recording.name in model.session_names
            found = known and (model.n_bins, model.session_layers(recording.name).n_neurons)
        fitting += [predictor] * (found == wanted)
    if not fitting:
        problem = f"no model knows this session with {wanted[1]} units ({recording.build})"
        remedy = "train one: python -m mtm prepare bwb FILE --out DIR --align ts2, then train DIR"
        recording.fail(str(recording.path), f"{problem} and {BINS} bins; {remedy}")
    given = list(range(FIRST_SEED, FIRST_SEED + len(fitting)) if seeds is None else seeds)
    if len(set(given)) != len(fitting):
        raise ValueError(f"{len(fitting)} models need as many different seeds, got {given}")
    return dict(zip(given, fitting, strict=True))


def require_untrained(models: dict[int, PredictorLike], recording: BenchmarkSession) -> None:
    """Raise a SessionError for models (seed -> model) that were trained on the test part.

    Their training trials are compared with the windows in the test part of all tasks and splits.
    Those one second apart suffice: the first and last of a trial are the same with any stride.
    """
    suite = SUITES[recording.build]
    with open_file(recording.path) as file:
        test, aligned = file.intervals(f"{suite}_test_domain"), file.file["task_aligned_intervals"]
        starts = [aligned[name]["start"][()] for name in aligned if name != "domain"]
    for split, part in itertools.product(SUITES.values(), Split._fields):
        starts.append(ts2_windows(recording.path, part, 1.0, split=split))
    every = np.unique(np.concatenate(starts))
    begin, end = every[:, None] + 1e-6, every[:, None] + LENGTH - 1e-6
    overlap = np.any((begin < test[:, 1]) & (end > test[:, 0]), axis=1)
    windows = recording.session(every[overlap])
    for seed, model in models.items():
        try:
            require_unseen(model, windows, np.arange(windows.n_trials))
        except ValueError:
            problem = f"the model of seed {seed} was trained on windows of this part; prepare"
            remedy = f"the file again with --align ts2 --split {suite}, and train another"
            recording.fail(f"{suite}_test_domain", f"{problem} {remedy}")


def save(
    folder: str | Path,
    label: str,
    task: str,
    seed: int,
    recording: BenchmarkSession,
    tensors: dict[str, np.ndarray],
) -> Path:
    """Write the tensors of `predict_task`; returns its path."""
    path = Path(folder) / label / task / recording.name / f"seed_{seed}.safetensors"
    metadata = recording.metadata(label, task, seed) | {"ibl_bwb_eval_version": SCORER}
    metadata |= {"context_window": str(LENGTH), "bin_size": str(BIN_SIZE)}
    return _write(path, tensors, metadata)


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Path:
    with atomic_write(path) as partial:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial, metadata)
    return path


# --------------------------------------------------------------------------- check and pack


def check(
    folder: str | Path,
    files: Iterable[str | Path],
    *,
    label: str | None = None,
    deterministic: bool = False,
) -> list[str]:
    """Find what would spoil an upload: a list of problems with file and remedy; empty when ready.

    Each prediction file is compared with its session file. TS3 is not checked.

    Args:
        folder: that `export` wrote to.
        files: the session files, of each build whose tasks are in the folder.
        label: which to check. Default: the only one.
        deterministic: accept one seed, as is declared with the upload.
    """
    try:
        root, findings = _of_label(folder, label), []
    except ValueError as error:
        return [str(error)]
    recordings = {(each.build, each.name): each for each in map(BenchmarkSession, files)}
    found: dict[tuple[str, str], list[int]] = {}  # task and session -> seeds
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        task, *rest = path.relative_to(root).parts
        if task == "ts3-unit_cosmos":
            continue
        seed = re.fullmatch(r"seed_(0|[1-9]\d*)\.safetensors", path.name)
        if task not in TASKS or not seed or len(rest) != 2:
            findings.append(f"{path}: not <task>/<session>/seed_<n>.safetensors; remove it")
            continue
        found.setdefault((task, rest[0]), []).append(int(seed[1]))
        problems: Iterable[str] = ["no session file"]
        if recording := recordings.get((TASKS[task].build, rest[0])):
            problems = _problems(
                path, recording, task, recording.metadata(root.name, task, int(seed[1]))
            )
        findings += [f"{path}: {problem}; export it again or remove it" for problem in problems]
    seeds = sorted({seed for each in found.values() for seed in each})
    for (build, name), recording in recordings.items():
        for task in sorted({task for task, _ in found if TASKS[task].build == build}):
            here = sorted(found.get((task, name), []))
            if here != seeds and (here or recording.index(task) is not None):
                place = f"{root / task / name}: has seeds {here}"
                findings.append(f"{place}, others have {seeds}; export them all")
    if len(seeds) < (1 if deterministic else LEAST_SEEDS) or seeds[-1] - seeds[0] >= len(seeds):
        need = f"{LEAST_SEEDS} are needed, numbered one after the other"
        findings.append(f"{root}: seeds {seeds}; {need}, or a deterministic model")
    return findings


def _problems(
    path: Path, recording: BenchmarkSession, task: str, metadata: dict[str, str]
) -> Iterator[str]:
    """Problems of a prediction file that should have this ``metadata``."""
    try:
        with safe_open(path, framework="np") as file:
            tensors, said = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    except (SafetensorError, OSError) as error:
        yield f"cannot be read ({error})"
        return
    for key, value in metadata.items():
        if (given := (said or {}).get(key)) != value:
            yield f"says {key} {given!r}, its place and the session file say {value!r}"
    index = recording.index(task)
    if index is None or (lacking := sorted({"predictions", *index} - tensors.keys())):
        yield f"lacks {', '.join(lacking)}" if index else "the session has no such behaviour"
        return
    (key, wanted), *_ = index.items()  # rows in any order
    rows, predictions, events = tensors[key], tensors["predictions"], TASKS[task].events
    missing, others = len(np.setdiff1d(wanted, rows)), len(np.setdiff1d(rows, wanted))
    if missing or others or rows.shape != wanted.shape or rows.dtype != wanted.dtype:
        exact = "" if events else " and equal to the last bit (bwb.ts2_windows)"
        yield (
            f"{key} is {rows.dtype} {rows.shape}: {missing} of {len(wanted)} are missing, "
            f"{others} are not of the task; need {wanted.dtype}, each once{exact}"
        )
    if "unit_ids" in index and not np.array_equal(tensors["unit_ids"], index["unit_ids"]):
        yield "unit_ids are not the scored units in the order of the session file"
    types, shape = ["float32"], (len(rows), *TASKS[task].shape)
    if not events:
        bins, units = recording.scored(task)
        types, shape = ["float16", "float32"], (len(rows), bins.stop - bins.start, int(units.sum()))
    if predictions.shape != shape or predictions.dtype.name not in types:
        found = f"predictions are {predictions.dtype} {predictions.shape}"
        yield f"{found}, not {' or '.join(types)} {shape}"
    elif not np.isfinite(predictions).all():
        yield "predictions hold NaN or infinite values"
    elif not events or TASKS[task].group == "licks":
        # Bins are short: no animal licks and no unit fires once in each of them.
        if (mean := np.exp(predictions.astype(np.float32)).mean()) >= 1:
            problem = f"their mean rate is {mean:.3g} in a bin"
            remedy = "write the natural log of the expected count in a bin"
            yield f"predictions are no log-rates ({problem}): {remedy}"


def _of_label(folder: str | Path, label: str | None) -> Path:
    """The folder of a label; None: the only one."""
    labels = sorted(path.name for path in Path(folder).glob("*") if path.is_dir())
    label = labels[0] if label is None and len(labels) == 1 else label
    if label not in labels:
        raise ValueError(f"{folder}: has predictions of {labels or 'no label'}; name one as label")
    return Path(folder) / label


def pack(
    folder: str | Path,
    label: str,
    out: str | Path,
    files: Iterable[str | Path],
    *,
    deterministic: bool = False,
) -> Path:
    """Zip a label's predictions for the upload if `check`, which says more, finds nothing.

    Returns the path ``out`` of the zip, whose root holds ``<label>/<task>/...``. Raises a
    ValueError with all findings.
    """
    folder, out = Path(folder), Path(out)
    if findings := check(folder, files, label=label, deterministic=deterministic):
        listed = "".join(f"\n- {finding}" for finding in findings)
        raise ValueError(f"{folder / label} is not ready to be uploaded:{listed}")
    with atomic_write(out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((folder / label).rglob("*.safetensors")):
            file.write(path, path.relative_to(folder).as_posix())
    return out


def score(
    folder: str | Path, files: Iterable[str | Path], *, label: str | None = None
) -> dict[tuple[str, str, int], dict[str, float]]:
    """Score predictions with the benchmark's scorer, against the session files (see `check`).

    Returns (task, session, seed) -> the scorer's metrics: ``poisson_d2`` and ``bps`` (bits per
    spike, pooled over units) for TS2; ``bacc``, ``r2`` or ``poisson_d2`` and others for TS1. What
    the scorer cannot match is left out; `check` finds it.
    """
    try:
        ts1, ts2 = (import_module(f"ibl_bwb_eval.scoring.{suite}") for suite in ("ts1", "ts2"))
    except ImportError as error:
        install = f"pip install torchmetrics rich; pip install --no-deps ibl-bwb-eval=={SCORER}"
        raise ImportError(f"the benchmark's scorer is missing: {install}") from error
    root = _of_label(folder, label)
    tasks = [task for task in TASKS if any(root.rglob(f"{task}/*/seed_*.safetensors"))]
    with tempfile.TemporaryDirectory() as truth:
        for recording in map(BenchmarkSession, files):
            for task in (task for task in tasks if TASKS[task].build == recording.build):
                if (tensors := recording.truth(task)) is not None:
                    path = Path(truth) / task / recording.name / "ground_truth.safetensors"
                    _write(path, tensors, {})
        found = ts1.score_dir(root, truth) | ts2.score_dir(root, truth)
    return {key[1:]: values for key, values in found.items()}
