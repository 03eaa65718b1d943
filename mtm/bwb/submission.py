"""BrainWideBench (arXiv 2609.22064): predictions as its scorer reads them, checked and packed.

From session files and trained models to the zip to upload::

    export(models, files, "predictions", "my-model")
    check("predictions", files)  # a list of what would go wrong; empty = ready
    score("predictions", files)  # what the scorer says, from the session files themselves
    pack("predictions", "my-model", "my-model.zip", files)

`mtm.bwb.tasks` has the tasks, those of TS1 and TS2. The scorer matches windows by exact equality of
their starts, does not look at the order of units, and leaves out in silence what it cannot match;
hence `check`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.metrics import r2_score

from mtm.bwb.decoders import LOWEST, decode_classes, decode_counts, decode_traces
from mtm.bwb.files import SUITES
from mtm.bwb.tasks import (
    BIN_SIZE,
    BINS,
    LENGTH,
    TASKS,
    Recording,
    Trials,
    mean_recall,
    pieces,
    poisson_scores,
    read,
    trials,
    truth,
)
from mtm.decoding import FOLDS, principal_axes
from mtm.files import atomic_write as replacing
from mtm.masks import Mask, scheme
from mtm.model import MtM
from mtm.prediction import PredictorLike, predict_in_batches
from mtm.session import SessionError
from mtm.training import Fit

FIRST_SEED, LEAST_SEEDS = 43, 3
SCORER = "0.1.0"  # version of the scorer whose files these are
IMPLAUSIBLE = (0.1, 10.0)  # times the recording's own rate: log-rates beyond are no log-rates
IMPLAUSIBLE_LICKS = (0.01, 25.0)  # an animal may well stop licking; in Hz it would be 50
NOT_CHECKED = re.compile(r"ts3-unit_cosmos/seed_(0|[1-9]\d*)\.safetensors")  # TS3: from elsewhere


# ----------------------------------------------------------------------------- predictions


def predict_windows(
    predictor: PredictorLike,
    recording: Recording,
    starts: np.ndarray,
    prompt: str,
    *,
    hidden: tuple[slice, np.ndarray] | None = None,
    dtype: str = "float16",
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Log-rates that a predictor gives in windows of 1 s, each gathered when it is needed.

    Args:
        predictor: a model, or ``predict(counts, scheme, mask, session)``; see `mtm.prediction`.
        recording: from `read`.
        starts: (W,) of the windows, seconds.
        prompt: masking scheme whose prompt, and direction of attention, is used.
        hidden: bins and units (n,) to hide and to return. Default: hide nothing, return all.
        dtype: of what is returned.
        batch_size: windows at once. Default: as many as the model predicts fastest.
        progress: show a bar on a terminal.

    Returns:
        (W, T', n) of the hidden bins and units, or (W, 50, N); natural log of the expected count in
        20 ms, at least `LOWEST`.

    Raises:
        SessionError: for a model that does not know the session with so many neurons or such bins.
        ValueError: for predictions of a wrong shape, or NaN or infinite ones.
        MemoryError: when it runs out with a single window.
    """
    predictor = predictor.model if type(predictor) is Fit else predictor
    if problem := misfit(predictor, recording):
        raise SessionError(problem)
    n_units = len(recording.units)
    bins, units = hidden or (slice(0, BINS), np.arange(n_units))
    hide = torch.zeros(BINS, n_units, dtype=torch.bool)
    if hidden:
        hide[bins, torch.from_numpy(units)] = True
    found = np.empty((len(starts), bins.stop - bins.start, len(units)), dtype=dtype)
    mask = Mask(hide, hide, scheme(prompt).causal)

    def inputs(batch: slice) -> tuple[torch.Tensor, Mask]:
        return torch.from_numpy(recording.counts(starts[batch]).astype(np.float32)), mask

    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    for batch, predicted in predict_in_batches(
        predictor, recording.name, prompt, len(starts), inputs, **how
    ):
        log_rates = predicted[:, bins][:, :, units].clamp(min=LOWEST).cpu().numpy()
        if not np.isfinite(log_rates).all():
            raise ValueError(
                f"session {recording.name!r}: NaN or infinite log-rates were predicted"
            )
        with np.errstate(over="ignore"):  # too large for float16 is infinite
            found[batch] = log_rates
    return found


def misfit(predictor: PredictorLike, recording: Recording) -> str | None:
    """Why a predictor cannot predict the windows of a recording; ``None`` if it can."""
    if not isinstance(predictor, MtM):
        return None
    name, n = recording.name, len(recording.units)
    known = {other: predictor.session_layers(other).n_neurons for other in predictor.session_names}
    if name not in known:
        return (f"the model does not know session {name!r}; train it on the session, or go on with "
                "it: python -m mtm train ... --start MODEL")  # fmt: skip
    if known[name] != n:
        return (f"session {name!r} has {n} units in {recording.path} ({recording.build}), the "
                f"model knows {known[name]}; a model is for the build it learned")  # fmt: skip
    if predictor.n_bins != BINS or abs(predictor.bin_size - BIN_SIZE) > 1e-9:
        return (f"the model takes {predictor.n_bins} bins of {predictor.bin_size} s, the "
                f"benchmark has {BINS} of {BIN_SIZE} s; prepare the sessions with --align ts2")  # fmt: skip
    return None


def predict_task(
    predictor: PredictorLike,
    recording: Recording,
    task: str,
    *,
    dtype: str = "float16",
    kept: dict[Any, dict[float, np.ndarray]] | None = None,
    **options: Any,
) -> dict[str, np.ndarray] | None:
    """The tensors of a prediction file.

    Args:
        predictor: see `predict_windows`.
        recording: of the task's build.
        task: one of `TASKS`.
        dtype: of TS2 predictions, "float16" or "float32".
        kept: one predictor's features of one recording, kept from a behaviour task to the next
            that looks at the same windows; changed in place, {} to begin with.
        **options: ``batch_size`` and ``progress`` of `predict_windows`.

    Returns:
        TS2: ``predictions`` (W, 50 or 5, n) log-rates of what was hidden, ``window_timestamps``
        (W,) float64, ``unit_ids`` (n, width) uint8. TS1: ``predictions`` (K, 1, C) or (K, 50, 1)
        float32, ``trial_id`` (K,) int64. ``None`` where the file lacks the behaviour.

    Raises:
        SessionError: also for too few trials to fit a decoder.
        ValueError, MemoryError: see `predict_windows`.
    """
    spec = TASKS[task]
    if not spec.events:
        starts, hidden = recording.windows(), recording.scored(task)
        predicted = predict_windows(
            predictor, recording, starts, spec.prompt, hidden=hidden, dtype=dtype, **options
        )
        ids = recording.ids(hidden[1])
        return {"predictions": predicted, "window_timestamps": starts, "unit_ids": ids}
    train, val, test = (trials(recording, task, part) for part in ("train", "val", "test"))
    if train is None or val is None or test is None or not len(test.rows):
        return None
    fit = Trials(*map(np.concatenate, zip(train, val, strict=True)))
    _require_trials(recording, task, fit)
    key, kept = (spec.prompt, spec.events), {} if kept is None else kept
    if key not in kept:
        kept.clear()  # the windows of one event are all that memory should hold
    known, asked = kept.setdefault(key, {}), [fit.starts.tolist(), test.starts.tolist()]
    if new := sorted({*asked[0], *asked[1]} - known.keys()):
        options |= {"dtype": "float32"}
        found = predict_windows(predictor, recording, np.array(new), spec.prompt, **options)
        known.update(zip(new, found.reshape(len(new), -1), strict=True))
    features = [np.array([known[s] for s in each], dtype=np.float64) for each in asked]
    x, x_test = principal_axes(*features)
    if spec.classes:
        found = decode_classes(x, x_test, fit.values[:, 0], spec.classes)
    elif spec.group == "licks":
        found = decode_counts(x, x_test, fit.values[..., 0])
    else:
        found = decode_traces(x, x_test, fit.values[..., 0], fit.trusted)
    found = found.reshape(len(x_test), *spec.shape).astype(np.float32)
    return {"predictions": found, "trial_id": test.rows}


def _require_trials(recording: Recording, task: str, fit: Trials) -> None:
    """Raise SessionError where trials do not suffice to fit a decoder with cross-validation."""
    if len(fit.rows) < 2 * FOLDS:
        recording.fail(task, f"{len(fit.rows)} trials to fit to, {2 * FOLDS} are needed; leave "
                       "the task out")  # fmt: skip
    present, count = np.unique(fit.values, return_counts=True)
    if TASKS[task].classes and (len(present) < 2 or count.min() < 2):
        recording.fail(task, f"classes {present.tolist()} have {count.tolist()} trials to fit to; "
                       "two or more with 2 each are needed; leave the task out")  # fmt: skip


# --------------------------------------------------------------------------------- to disk


def _save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Path:
    with replacing(path) as partial:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial, metadata)
    return path


def save(
    folder: str | Path,
    label: str,
    task: str,
    seed: int,
    recording: Recording,
    tensors: dict[str, np.ndarray],
    model: str = "",
) -> Path:
    """Write ``<folder>/<label>/<task>/<session>/seed_<seed>.safetensors``; returns the path.

    Args:
        folder: of all predictions.
        label: the model's name at the benchmark.
        task: one of `TASKS`.
        seed: of the training run.
        recording: whose predictions these are.
        tensors: from `predict_task`.
        model: from `fingerprint`, by which `check` tells the files of one model from another's.

    Raises:
        ValueError: for a label or a seed that does not go into a path.
    """
    _check_label(label)
    if seed < 0:
        raise ValueError(f"a seed is 0 or more, got {seed}")
    path = Path(folder) / label / task / recording.name / f"seed_{seed}.safetensors"
    more = {"context_window": str(LENGTH), "bin_size": str(BIN_SIZE)}
    more |= {"ibl_bwb_eval_version": SCORER} | ({"model": model} if model else {})
    return _save(path, tensors, _metadata(label, task, seed, recording) | more)


def fingerprint(predictor: PredictorLike) -> str:
    """SHA-256 of a model's weights; "" for a predictor that is no model."""
    if not isinstance(predictor, torch.nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(predictor.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_label(label: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", label, re.ASCII):
        raise ValueError(f"label {label!r}: use letters, digits, and - _ . after the first")


def _metadata(label: str, task: str, seed: int, recording: Recording) -> dict[str, str]:
    """What a prediction file has to say of itself."""
    return {
        "label": label,
        "task": task,
        "seed": str(seed),
        "recording_id": recording.name,
        "unit_filtering": recording.build,
        "dataset_version": recording.version,
    }


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
    """Write the prediction files of models, which differ in their seed; returns the paths.

    Each file serves the tasks of its build, and a model the build whose sessions it knows with
    their number of units: models of both builds may be given at once. A behaviour that a session
    lacks is left out there. Models that have learned from windows of a test part are refused.

    Args:
        models: see `predict_windows`.
        files: session files of either or both builds.
        folder, label: see `save`.
        tasks: some of `TASKS`. Default: all that the files serve.
        seeds: of the models of a build, in their order. Default: from 43 on, as the benchmark.
        **options: of `predict_task`.

    Raises:
        SessionError: for a file that is no session file of the benchmark, or that no model is for;
            for a model that has learned from the test part, before anything is predicted.
        ValueError: for unknown tasks, a bad label, seeds that do not go with the models.
    """
    _check_label(label)
    models = list(models) if isinstance(models, Sequence) else [models]
    models = [model.model if type(model) is Fit else model for model in models]
    tasks = checked_tasks(tasks)
    recordings = [read(path) for path in files]
    recordings = [r for r in recordings if any(TASKS[task].build == r.build for task in tasks)]
    if not recordings:
        needed = " or ".join(sorted({TASKS[task].build for task in tasks}))
        raise SessionError(f"none of the files has the units that the tasks are scored on "
                           f"({needed}); download that build")  # fmt: skip
    builds: dict[str, list[Recording]] = {recording.build: [] for recording in recordings}
    for recording in recordings:
        builds[recording.build].append(recording)
    numbered = {build: models_for(mine, models, seeds) for build, mine in builds.items()}
    used = [id(model) for chosen in numbered.values() for model in chosen.values()]
    for place, model in enumerate(models, start=1):
        if id(model) not in used:
            problem = next(filter(None, (misfit(model, r) for r in recordings)))
            raise SessionError(
                f"model {place} of {len(models)} serves none of the files: {problem}"
            )
    for build, mine in builds.items():
        for recording in mine:
            require_untaught(numbered[build], recording)
    marks, paths = {id(model): fingerprint(model) for model in models}, []
    for build, mine in builds.items():
        asked = [task for task in tasks if TASKS[task].build == build]
        for recording in map(dataclasses.replace, mine):  # copies: spikes of one at a time
            for seed, model in numbered[build].items():
                kept: dict[Any, Any] = {}
                for task in asked:
                    made = predict_task(model, recording, task, kept=kept, **options)
                    if made is not None:
                        mark = marks[id(model)]
                        paths.append(save(folder, label, task, seed, recording, made, mark))
    return paths


def require_untaught(models: dict[int, PredictorLike], recording: Recording) -> None:
    """Refuse models (seed -> model) that have learned from windows of the test part.

    The two suites split a recording in different ways: training time of one is test time of the
    other. Models and baselines keep fingerprints of what they learned from; see
    `mtm.prediction.require_unseen`.

    Raises:
        SessionError: naming session, number of windows, and remedy.
    """
    learned = {seed: getattr(model, "seen", None) or {} for seed, model in models.items()}
    windows = recording.learnable() if any(learned.values()) else None
    if windows is None:
        return
    mine, suite = windows.fingerprints(np.arange(windows.n_trials)), SUITES[recording.build]
    for seed, seen in learned.items():
        known = np.isin(mine, np.concatenate([np.zeros(0, np.int64), *seen.values()])) & (mine != 0)
        if known.any():
            recording.fail(f"{suite}_test_domain", f"the model of seed {seed} has learned from "
                           f"{int(known.sum())} of {len(mine)} windows of the test part of {suite}"
                           "; train another on the windows of the other parts: python -m mtm "
                           f"prepare bwb {recording.path.name} --out DIR --align ts2 --split "
                           f"{suite}")  # fmt: skip


def checked_tasks(tasks: Sequence[str] | None) -> tuple[str, ...]:
    """The tasks asked for, all by default; raises ValueError that lists the known ones."""
    if unknown := [task for task in tasks or () if task not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    return tuple(tasks or TASKS)


def models_for(
    recordings: Sequence[Recording],
    models: Sequence[PredictorLike],
    seeds: Sequence[int] | None = None,
) -> dict[int, PredictorLike]:
    """Seed -> model, of those that know all recordings of a build.

    Raises:
        SessionError: when there is none.
        ValueError: for seeds that are fewer, more, or twice the same.
    """
    problems = [next(filter(None, (misfit(m, r) for r in recordings)), None) for m in models]
    fitting = [model for model, problem in zip(models, problems, strict=True) if problem is None]
    if not fitting:
        raise SessionError(problems[0] if problems else "no model is given; name one or more")
    found = list(range(FIRST_SEED, FIRST_SEED + len(fitting)) if seeds is None else seeds)
    if len(found) != len(fitting) or len(set(found)) != len(found):
        raise ValueError(f"{len(fitting)} models need as many different seeds, got {found}")
    return dict(zip(found, fitting, strict=True))


# ------------------------------------------------------------------------- checked and packed


def check(
    folder: str | Path,
    files: Iterable[str | Path],
    *,
    label: str | None = None,
    deterministic: bool = False,
) -> list[str]:
    """What would spoil an upload, each finding naming file and remedy; an empty list = ready.

    The scorer matches what it can and is silent about the rest. This compares every prediction
    file with what its session file asks for: windows or trials, their order, units, shapes,
    numbers and metadata; and the files with each other: sessions, tasks, seeds, and the models
    that `export` made them with. Files of TS3 (``ts3-unit_cosmos``) are let through unchecked.

    Args:
        folder: that `export` wrote to.
        files: the session files, of each build whose tasks are in the folder.
        label: which to check. Default: the only one, and it is a finding that there are several.
        deterministic: one seed will do, as is declared with the upload.

    Raises:
        SessionError: when a session file cannot be read.
    """
    try:
        root = _only(folder, label)
    except ValueError as error:
        return [str(error)]
    recordings = {(recording.build, recording.name): recording for recording in map(read, files)}
    found, findings = _listed(root)
    seeds: dict[tuple[str, str], set[int]] = {}
    made: dict[tuple[str, int], dict[tuple[str, str], Path]] = {}
    for (task, session, seed), path in found.items():
        recording = recordings.get((TASKS[task].build, session))
        if recording is None:
            findings.append(f"{path}: no session file of {TASKS[task].build} with this id was "
                            "given to check it with; name it, or remove this")  # fmt: skip
            continue
        seeds.setdefault((task, session), set()).add(seed)
        expected = _metadata(root.name, task, seed, recording)
        problems, model = _check_file(path, recording, task, expected)
        findings += problems
        if model:
            made.setdefault((recording.build, seed), {}).setdefault((session, model), path)
    for files_of in made.values():
        findings += _check_models(files_of)
    return findings + _check_seeds(root, seeds, recordings, deterministic)


def _check_models(made: dict[tuple[str, str], Path]) -> list[str]:
    """Findings about the models of a seed and a build: one for all sessions, or each its own.

    Args:
        made: session and weights -> a file that they made.
    """
    models, sessions = ({key[i] for key in made} for i in (1, 0))
    if len(models) == 1 or len(models) == len(made) == len(sessions):
        return []
    one, other = [next(p for key, p in made.items() if key[1] == m) for m in sorted(models)[:2]]
    return [f"{one}: made by another model than {other}, which is of the same seed and build; "
            "export all of it with one model, or remove what is not meant"]  # fmt: skip


def _only(folder: str | Path, label: str | None) -> Path:
    """The folder of a label; without one, the only folder; raises ValueError that names it."""
    folder = Path(folder)
    inside = folder.iterdir() if folder.is_dir() else ()
    labels = sorted(path.name for path in inside if path.is_dir())
    if not labels or (label is not None and label not in labels):
        raise ValueError(f"{folder / (label or '')}: holds no predictions; export them first")
    if label is None and len(labels) > 1:
        raise ValueError(
            f"{folder}: holds {', '.join(labels)}, an upload has one label; name it, or move the "
            "others away"
        )
    return folder / (label or labels[0])


def _listed(root: Path) -> tuple[dict[tuple[str, str, int], Path], list[str]]:
    """The prediction files under a label by task, session and seed; a finding for all else."""
    found, findings = {}, []
    for path in sorted(path for path in root.rglob("*") if not path.is_dir()) or [root]:
        match = re.fullmatch(r"([^/]+)/([^/]+)/seed_(0|[1-9]\d*)\.safetensors",
                             path.relative_to(root).as_posix())  # fmt: skip
        if match and match[1] in TASKS:
            found[match[1], match[2], int(match[3])] = path
        elif not NOT_CHECKED.fullmatch(path.relative_to(root).as_posix()):
            findings.append(f"{path}: not <label>/<task>/<session>/seed_<n>.safetensors of a known "
                            "task; remove it")  # fmt: skip
    return found, findings


def _check_seeds(
    root: Path,
    seeds: dict[tuple[str, str], set[int]],
    recordings: dict[tuple[str, str], Recording],
    deterministic: bool,
) -> list[str]:
    """Findings about sessions without predictions, and seeds."""
    findings, known = [], sorted(set().union(*seeds.values()))
    for task in dict.fromkeys(task for task, _ in seeds):
        for build, session in recordings:
            place, recording = root / task / session, recordings[build, session]
            if build != TASKS[task].build:
                continue
            here = seeds.get((task, session))
            if here is None and (not TASKS[task].events or truth(recording, task) is not None):
                findings.append(f"{place}: no predictions for this session; export them")
            elif here is not None and sorted(here) != known:
                findings.append(f"{place}: has seeds {sorted(here)} where others have {known}; "
                                "export the same of all")  # fmt: skip
    if known and known[-1] - known[0] + 1 != len(known):
        findings.append(f"{root}: seeds {known} leave some out; number them one after the other")
    if known and len(known) < LEAST_SEEDS and not deterministic:
        findings.append(f"{root}: seeds {known}, {LEAST_SEEDS} are needed; train with others, "
                        "or declare the model deterministic")  # fmt: skip
    return findings


def _check_file(
    path: Path, recording: Recording, task: str, metadata: dict[str, str]
) -> tuple[list[str], str]:
    """Findings about one prediction file, and what it says of the model that made it."""
    try:
        tensors, said = _load(path)
    except ValueError as error:
        return [str(error)], ""
    problems = [
        f"says {key} {said.get(key)!r}, its place and the session file say {value!r}"
        for key, value in metadata.items()
        if said.get(key) != value
    ]
    more = ["trial_id"] if TASKS[task].events else ["window_timestamps", "unit_ids"]
    if lacking := sorted({"predictions", *more} - tensors.keys()):
        problems.append(f"lacks {', '.join(lacking)}")
    elif TASKS[task].events:
        problems += _check_trials(tensors, recording, task)
    else:
        problems += _check_windows(tensors, recording, task)
    return [f"{path}: {problem}; export it again" for problem in problems], said.get("model", "")


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a prediction file; raises ValueError that names it."""
    try:
        with safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); export it again") from error


def _check_windows(tensors: dict[str, np.ndarray], recording: Recording, task: str) -> list[str]:
    """Problems of a TS2 file."""
    starts, (bins, units) = recording.windows(), recording.scored(task)
    given, ids, problems = tensors["window_timestamps"], recording.ids(units), []
    if given.dtype != np.float64 or given.ndim != 1:
        problems.append(f"window_timestamps are {given.dtype} {given.shape}, not float64 (W,)")
    else:
        missing, extra = len(np.setdiff1d(starts, given)), len(np.setdiff1d(given, starts))
        if missing or extra:
            near = len(given) == len(starts) and np.allclose(np.sort(given), starts, 0, 1e-6)
            why = " (only the last bits differ: take them from bwb.ts2_windows)" if near else ""
            problems.append(f"{missing} windows are missing and {extra} are not of the task{why}")
        if len(np.unique(given)) != len(given):
            problems.append("some windows are there twice")
    found = tensors["unit_ids"]
    if found.dtype != np.uint8 or found.ndim != 2 or sorted(_rows(found)) != sorted(_rows(ids)):
        problems.append(f"unit_ids are not those of the {len(ids)} scored units")
    elif _rows(found) != _rows(ids):
        problems.append("units are in another order than in the session file")
    shape = (len(given), bins.stop - bins.start, len(units))
    events, dtypes = float(recording.rates[units].mean()), ("float16", "float32")
    return problems + _check_numbers(tensors["predictions"], shape, dtypes, events, IMPLAUSIBLE)


def _rows(ids: np.ndarray) -> list[bytes]:
    return [row.tobytes().rstrip(b"\0") for row in ids]


def _check_trials(tensors: dict[str, np.ndarray], recording: Recording, task: str) -> list[str]:
    """Problems of a TS1 file."""
    expected, given, problems = truth(recording, task), tensors["trial_id"], []
    if expected is None:
        return ["the session file has no such behaviour in its test part"]
    wanted = expected["trial_id"]
    if given.dtype != np.int64 or given.ndim != 1:
        problems.append(f"trial_id is {given.dtype} {given.shape}, not int64 (K,)")
    elif sorted(given.tolist()) != sorted(wanted.tolist()):
        n = len(np.setdiff1d(wanted, given)), len(np.setdiff1d(given, wanted))
        problems.append(f"{n[0]} trials are missing and {n[1]} are not of the task, or some are "
                        "there twice")  # fmt: skip
    events = None
    if TASKS[task].group == "licks":  # in all parts: the test part may be unlike the others
        parts = [trials(recording, task, part) for part in ("train", "val", "test")]
        events = float(np.concatenate([part.values for part in parts if part]).mean())
    shape, numbers = (len(given), *TASKS[task].shape), tensors["predictions"]
    return problems + _check_numbers(numbers, shape, ("float32",), events, IMPLAUSIBLE_LICKS)


def _check_numbers(
    predictions: np.ndarray,
    shape: tuple[int, ...],
    dtypes: Sequence[str],
    events: float | None,
    bounds: tuple[float, float],
) -> list[str]:
    """Problems of the predictions.

    Where ``events`` are expected in a bin, they are log-rates, and their mean rate divided by that
    is between the ``bounds``.
    """
    if predictions.shape != shape or predictions.dtype.name not in dtypes:
        return [f"predictions are {predictions.dtype} {predictions.shape}, not "
                f"{' or '.join(dtypes)} {shape}"]  # fmt: skip
    total, least = 0.0, np.inf
    for at in pieces(len(predictions)):
        piece = predictions[at].astype(np.float64)
        if not np.isfinite(piece).all():
            return ["predictions hold NaN or infinite values"]
        total, least = total + np.exp(piece.clip(max=80.0)).sum(), min(least, piece.min())
    if not events or not predictions.size:
        return []
    mean = total / predictions.size
    if least >= 0 or not bounds[0] < mean / events < bounds[1]:
        return [f"predictions are log-rates of {mean:.3g} in a bin, where the session has "
                f"{events:.3g}; write the natural log of the expected count in a bin"]  # fmt: skip
    return []


def pack(
    folder: str | Path,
    label: str,
    out: str | Path,
    files: Iterable[str | Path],
    *,
    deterministic: bool = False,
) -> Path:
    """Zip a label's predictions for the upload, if `check` finds nothing; returns the zip's path.

    Args:
        folder, label: see `save`.
        out: the zip; its root holds ``<label>/<task>/...``.
        files, deterministic: see `check`.

    Raises:
        ValueError: with all findings.
    """
    findings = check(folder, files, label=label, deterministic=deterministic)
    if findings:
        listed = "".join(f"\n- {finding}" for finding in findings)
        raise ValueError(f"{Path(folder) / label} is not ready to be uploaded:{listed}")
    folder, out = Path(folder), Path(out)
    with replacing(out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted((folder / label).rglob("*.safetensors")):
            packed.write(path, path.relative_to(folder).as_posix())
    return out


# ---------------------------------------------------------------------------------- scores


def write_truth(
    files: Iterable[str | Path], folder: str | Path, tasks: Sequence[str] = tuple(TASKS)
) -> list[Path]:
    """Ground truth for the scorer's ``--gt_dir``, made of the session files; returns the paths.

    The benchmark keeps its own files to itself, but the session files hold all that is in them.

    Args:
        files: session files; each serves the tasks of its build.
        folder: becomes ``<folder>/<task>/<session>/ground_truth.safetensors``.
        tasks: some of `TASKS`.
    """
    paths = []
    for recording in map(read, files):
        for task in tasks:
            made = truth(recording, task) if TASKS[task].build == recording.build else None
            if made is not None:
                if "targets" in made:
                    made["targets"] = made["targets"].astype(np.float32)
                place = Path(folder) / task / recording.name / "ground_truth.safetensors"
                paths.append(_save(place, made, {"recording_id": recording.name, "task": task}))
    return paths


def score(
    folder: str | Path, files: Iterable[str | Path], *, label: str | None = None
) -> dict[tuple[str, str, int], dict[str, float]]:
    """What the scorer says of predictions, computed from the session files.

    Like the scorer, it goes by what windows or trials a file and its session have in common, and by
    the order of units in the file. Sums are float64, the scorer's float32.

    Args:
        folder, files, label: see `check`.

    Returns:
        (task, session, seed) -> scores: ``poisson_d2`` and ``bps`` (bits per spike, pooled over
        units) for TS2; ``bacc``, ``r2`` or ``poisson_d2`` for TS1. NaN where there is none.

    Raises:
        SessionError: when a session file cannot be read.
        ValueError: for predictions that cannot be read or matched, and when there are none.
    """
    recordings = {(recording.build, recording.name): recording for recording in map(read, files)}
    root, scores, last, expected = _only(folder, label), {}, None, None
    for (task, session, seed), path in _listed(root)[0].items():
        if last != (task, session):  # the same for all seeds
            last, recording = (task, session), recordings.get((TASKS[task].build, session))
            expected = recording and truth(dataclasses.replace(recording), task)
        if expected:
            scores[task, session, seed] = score_file(path, task, expected)
    if not scores:
        raise ValueError(f"{folder}: no predictions of the sessions given; export them first")
    return scores


def score_file(path: Path, task: str, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Scores of one prediction file against what `truth` gives; see `score`."""
    tensors, _ = _load(path)
    key, target = ("trial_id", "values") if TASKS[task].events else ("window_timestamps", "targets")
    if not {key, "predictions"} <= tensors.keys():
        raise ValueError(f"{path}: lacks predictions or {key}; export it again")
    _, mine, theirs = np.intersect1d(tensors[key], expected[key], return_indices=True)
    guess, values = tensors["predictions"], expected[target]
    shape = values.shape[1:] if not TASKS[task].classes else TASKS[task].shape
    if not len(mine) or guess.shape[1:] != shape:
        raise ValueError(f"{path}: {len(mine)} windows or trials match and predictions have shape "
                         f"{guess.shape}, not (..., {shape}); export it again")  # fmt: skip
    if not TASKS[task].events:
        return poisson_scores((guess[mine[at]], values[theirs[at]]) for at in pieces(len(mine)))
    guess, values = guess[mine].astype(np.float64), values[theirs]
    if TASKS[task].classes:
        return {"bacc": mean_recall(guess[:, 0].argmax(axis=1), values[:, 0])}
    if TASKS[task].group == "licks":
        return {"poisson_d2": poisson_scores([(guess, values)])["poisson_d2"]}
    trusted = expected["mask"][theirs] if "mask" in expected else np.ones(values.shape[:2], bool)
    return {"r2": float(r2_score(values[trusted], guess[trusted]))}
