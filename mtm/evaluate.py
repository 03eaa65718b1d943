"""The four activity tasks: hide part of the test trials, predict it, score the prediction.

==================  ======================================================  ==================
task                hidden                                                  scored
==================  ======================================================  ==================
co-smoothing        one neuron at a time                                    it, all bins
forward-prediction  the last 10 % of the bins, all neurons                  those bins
inter-region        each region in turn                                     its neurons
intra-region        all outside a region, and one of its neurons at a time  it, all bins
==================  ======================================================  ==================

Anything that predicts can be evaluated: a model, an array of log-rates, or a function of yours,
``predict(counts, scheme, mask, session) -> log-rates``. Models and functions are shown counts in
which hidden entries are zeroed; an array is scored as it is. Source: arXiv 2407.14668, section 4.

What a predictor need not do twice, or at all, is left out, which changes no score. One that takes
``neurons`` is asked for that output alone where one neuron a trial is scored. One that says
``sees_mask = False`` cannot tell a hidden entry from a silent one: what it is shown with a silent
neuron hidden is what it is shown with all such neurons hidden, and one pass serves them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mtm import metrics
from mtm.masks import Mask
from mtm.model import MtM
from mtm.session import Session, SessionError
from mtm.train import Fit

TASKS = {
    "co-smoothing": "neuron",
    "forward-prediction": "causal",
    "inter-region": "inter-region",
    "intra-region": "intra-region",
}
"""Each activity task, and the masking scheme that trains for it (whose prompt is shown)."""

CONDITIONS = ("choice", "reward", "block")
"""Behaviours that make up a trial's condition in PSTH R2."""

TOKENS_AT_ONCE = {"cpu": 2_400, "cuda": 2**17}
"""Tokens of a batch, unless another size is asked for: what was fastest on a CPU, whose cache does
not hold more; enough to keep a large GPU busy. A small one runs out of memory and takes half."""
TRIALS_AT_ONCE = 256  # of a predictor without tokens
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")


class Predictor(Protocol):
    """Whatever can fill in hidden activity."""

    def predict(self, counts: Tensor, scheme: str, mask: Mask, session: str) -> Tensor:
        """Log-rates (B, T, N) for counts (B, T, N) in which ``mask.hidden`` entries are 0."""


Predicts = Predictor | Callable[..., Any] | np.ndarray


@dataclass
class TaskScores:
    """Scores of one task.

    Attributes:
        neurons: (n,) indices of the scored neurons.
        bins: (start, stop) of the scored bins.
        table: column -> (n,): ``bits_per_spike`` (null: the neuron's mean over the scored test
            entries, as the paper), ``bits_per_spike_train_null`` (null: its mean over the training
            trials), ``poisson_d2``, ``trial_r2``, ``psth_r2`` (where conditions are known),
            ``spikes`` (scored), ``visible`` (neurons that could be seen; 0 means that the score
            is that of guessing), ``region``. NaN = a silent neuron has no score.
        pooled: ``bits_per_spike`` and ``bits_per_spike_train_null``, all neurons' spikes together.
    """

    neurons: np.ndarray
    bins: tuple[int, int]
    table: dict[str, np.ndarray]
    pooled: dict[str, float]

    @property
    def n_silent(self) -> int:
        """Neurons without a spike among the scored entries; they have no score."""
        return int((self.table["spikes"] == 0).sum())

    def mean(self, column: str = "bits_per_spike") -> float:
        """Mean over the neurons that have a score; NaN where none has."""
        values = np.asarray(self.table[column], dtype=np.float64)
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else float("nan")

    def by_region(self, column: str = "bits_per_spike") -> dict[str, float]:
        """Region -> mean over its neurons that have a score."""
        regions = self.table["region"]
        parts = {r: self.table[column][regions == r] for r in np.unique(regions).tolist()}
        return {r: float(np.nanmean(v)) for r, v in parts.items() if not np.isnan(v).all()}


@dataclass(repr=False)
class Report:
    """Scores of one predictor on one session.

    Attributes:
        session: its name.
        n_trials: number of scored trials.
        tasks: task -> :class:`TaskScores`.
        left_out: task -> why it could not be scored.
    """

    session: str
    n_trials: int
    tasks: dict[str, TaskScores]
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Means, pooled values and counts of each task, as JSON can hold them (NaN = None)."""
        summary = {}
        for task, scores in self.tasks.items():
            columns = [c for c in scores.table if c not in ("region", "spikes", "visible")]
            means = {column: scores.mean(column) for column in columns}
            pooled = {f"pooled_{key}": value for key, value in scores.pooled.items()}
            numbers = {k: None if np.isnan(v) else round(v, 6) for k, v in (means | pooled).items()}
            blind = int((scores.table["visible"] == 0).sum())
            counts = {"neurons": len(scores.neurons), "silent_neurons": scores.n_silent}
            counts["neurons_with_nothing_visible"] = blind
            summary[task] = numbers | counts
        return summary

    def __str__(self) -> str:
        scores = self.tasks.values()
        rows = {
            "over their test mean": [_number(s.mean()) for s in scores],
            "over their training mean": [
                _number(s.mean("bits_per_spike_train_null")) for s in scores
            ],
            "neurons": [str(len(s.neurons)) for s in scores],
            "of them silent": [str(s.n_silent) for s in scores],
        }
        blind = [int((s.table["visible"] == 0).sum()) for s in scores]
        if any(blind):  # their score is that of guessing
            rows["with nothing visible"] = [str(n) for n in blind]
        title = (
            f"session {self.session!r}, {self.n_trials} trials; gain in bits per spike, mean over "
            "neurons"
        )
        notes = [f"{task}: left out, {reason}" for task, reason in self.left_out.items()]
        return "\n".join([title, _table(list(self.tasks), rows), *notes])

    __repr__ = __str__


def score_table(reports: Mapping[str, Report], column: str = "bits_per_spike") -> str:
    """A text table: a row for each predictor, a column for each task, means over neurons."""
    tasks = [task for task in TASKS if any(task in r.tasks for r in reports.values())]
    rows = {
        name: [_number(r.tasks[t].mean(column)) if t in r.tasks else "-" for t in tasks]
        for name, r in reports.items()
    }
    return _table(tasks, rows)


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    width = max([len(name) for name in rows] + [9])
    lines = [" " * width + "".join(f"  {column}" for column in columns)]
    for name, cells in rows.items():
        aligned = (f"  {c:>{len(column)}}" for c, column in zip(cells, columns, strict=True))
        lines.append(f"{name:<{width}}" + "".join(aligned))
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def evaluate(
    predictor: Predicts,
    session: Session,
    *,
    tasks: Sequence[str] | None = None,
    trials: np.ndarray | None = None,
    neurons: np.ndarray | None = None,
    split_seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Report:
    """Score a predictor on the activity tasks.

    Args:
        predictor: a model; a function ``(counts, scheme, mask, session) -> log-rates``; or
            log-rates for the whole session, broadcastable to (K, T, N).
        session: the recording.
        tasks: some of :data:`TASKS`. Default: all that the session allows.
        trials: indices of the scored trials. Default: the test trials of ``session.split``.
        neurons: indices of the scored neurons. All neurons stay in the input. Default: all.
        split_seed: of ``session.split``; its training trials make the honest null model. Default:
            the one that the model was trained with, else 0.
        batch_size: trials predicted at once. Default: what suits the device. Where memory runs out
            it is halved, and evaluation goes on from there.
        progress: show a bar.

    Returns:
        tables of scores; regional tasks score labelled neurons only.

    Raises:
        ValueError: for an unknown task, or predictions of a wrong shape or with NaN.
        SessionError: when a task that was asked for needs regions and there are none, or the bins
            are not those the model was trained on.
        MemoryError: when memory runs out with a single trial.
        TypeError: when ``session`` is no Session.
    """
    if not isinstance(session, Session):
        raise TypeError(
            f"evaluate(predictor, session) needs a Session, got {type(session).__name__}"
        )
    split = session.split(checked_split_seed(predictor, session, split_seed))
    trials = np.arange(session.n_trials)[split.test if trials is None else trials]
    wanted = np.zeros(session.n_neurons, dtype=bool)
    wanted[slice(None) if neurons is None else neurons] = True
    if len(trials) == 0 or not wanted.any():
        raise ValueError(f"session {session.name!r}: no trials or no neurons to score")
    left_out = {}
    for task in TASKS if tasks is None else tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; pass a list of some of: {', '.join(TASKS)}")
        if task.endswith("region") and not (session.region_codes[wanted] >= 0).any():
            left_out[task] = "no neuron has a region label"
    if tasks is not None and left_out:
        raise SessionError(
            f"session {session.name!r}, {', '.join(left_out)}: no scored neuron has a region "
            "label; pass regions, or leave the task out"
        )
    train_null = metrics.log_mean(session.counts[split.train])
    scores = {}
    for task in [t for t in (TASKS if tasks is None else tasks) if t not in left_out]:
        log_rates = predict_held_out(
            predictor, session, task, trials, wanted, batch_size=batch_size, progress=progress
        )
        hidden, scored, bins = _queries(task, session, wanted)
        hidden = hidden & (bins[0] == 0)  # in forward prediction, all are visible at first
        visible = scored.T @ (~hidden).sum(axis=1)  # (N,): each neuron is scored in one query
        scores[task] = _score(log_rates, session, task, trials, train_null, scored.any(0), visible)
    return Report(session.name, len(trials), scores, left_out)


def checked_split_seed(predictor: Predicts, session: Session, split_seed: int | None) -> int:
    """The split to use: the one asked for, else the one the model was trained on, else that of 0.

    Raises:
        SessionError: when a model was trained on bins of another width.
        ValueError: when a model was trained on another split, or on one that nobody knows.
    """
    config = getattr(getattr(predictor, "model", predictor), "config", None)  # of a Fit, its model
    bin_size = getattr(config, "bin_size", session.bin_size)
    if abs(bin_size - session.bin_size) > 1e-9:
        raise SessionError(
            f"session {session.name!r} has bins of {session.bin_size} s, the model was trained on "
            f"bins of {bin_size} s"
        )
    trained = getattr(config, "split_seed", None)
    if split_seed is None and hasattr(config, "split_seed") and trained is None:
        raise ValueError(
            "it is not known which trials this model was trained on; split_seed=0 scores it on the "
            "test trials of that split, some of which it may have learned from"
        )
    if split_seed is None:
        return trained or 0
    if trained is not None and trained != split_seed:
        raise ValueError(
            f"the model was trained on the split of seed {trained}, not {split_seed}; some of the "
            "test trials would be ones it has learned from"
        )
    return split_seed


def oracle(session: Session) -> np.ndarray:
    """Log of the true rates, (K, T, N): the best possible predictor of a simulated session.

    Raises:
        SessionError: for a recording whose true rates nobody knows.
    """
    if session.rates is None:
        raise SessionError(f"session {session.name!r}, rates: only simulated sessions have them")
    return np.log(session.rates)


def mean_rates(session: Session, split_seed: int = 0) -> np.ndarray:
    """Log of each neuron's mean count over the training trials, (1, 1, N): the null predictor."""
    return metrics.log_mean(session.counts[session.split(split_seed).train])[None, None]


def forward_bins(n_bins: int) -> tuple[int, int]:
    """The bins that forward prediction hides: the last 10 %, at least one; (start, stop)."""
    return n_bins - max(1, round(0.1 * n_bins)), n_bins


# ------------------------------------------------------------------- hiding and predicting


def predict_held_out(
    predictor: Predicts,
    session: Session,
    task: str,
    trials: np.ndarray,
    wanted: np.ndarray,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Log-rates of the scored entries, each predicted while it was hidden; NaN elsewhere.

    Args:
        predictor: see :func:`evaluate`.
        session: the recording.
        task: one of :data:`TASKS`.
        trials: (K',) indices.
        wanted: (N,) bool, neurons to score.
        batch_size: see :func:`evaluate`.
        progress: show a bar.

    Returns:
        (K', T, N) float64.

    Raises:
        ValueError: for predictions of a wrong shape, or with NaN where they are scored.
        MemoryError: when it runs out with a single trial.
    """
    queries, scored, bins = _queries(task, session, wanted)
    span, scored_neurons = slice(*bins), scored.any(axis=0)
    if isinstance(predictor, np.ndarray):
        return _known(predictor, session, trials, scored_neurons, span)
    predictor = predictor.model if type(predictor) is Fit else predictor
    size = _batch_size(predictor, session) if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    one_each = takes_neurons(predictor)
    device = getattr(predictor, "device", torch.device("cpu"))
    shares = one_each and not getattr(predictor, "sees_mask", True)
    fired = session.counts[trials][:, span].any(axis=1) if shares else None
    passes = _plan(queries, scored, len(trials), fired, device)
    hidden = torch.from_numpy(queries).to(device)
    counts = torch.from_numpy(session.counts[trials].astype(np.float32)).to(device)
    log_rates = torch.full_like(counts, float("nan"))

    def make(start: int, stop: int) -> None:
        """Some of the passes. On a GPU, nothing here waits for a result."""
        asked = slice(passes.ends[start], passes.ends[stop])
        row, neuron, trial = passes.owner[asked] - start, passes.neuron[asked], passes.trial
        mask = _mask(hidden[passes.query[start:stop]], row, neuron, counts.shape[1], task, span)
        visible = counts[trial[start:stop]].masked_fill_(mask.hidden, 0)
        one = neuron if one_each and stop - start == len(neuron) else None
        predicted = call_predictor(predictor, visible, TASKS[task], mask, session.name, one)
        predicted = predicted[row, span, neuron] if one is None else predicted[:, span]
        log_rates[trial[start:stop][row], span, neuron] = predicted.detach().float()

    n_passes, what = len(passes.trial), f"session {session.name!r}, {task}"
    with tqdm(total=n_passes, desc=task, disable=None if progress else True, leave=False) as bar:
        _in_batches(make, n_passes, size, what, bar)
    found = log_rates.cpu().numpy()
    require_finite(found[:, span][:, :, scored_neurons], TASKS[task], session.name)
    return found.astype(np.float64)


def _known(
    log_rates: np.ndarray, session: Session, trials: np.ndarray, scored: np.ndarray, span: slice
) -> np.ndarray:
    """An array of log-rates as :func:`predict_held_out` returns them."""
    if np.broadcast_shapes(log_rates.shape, session.counts.shape) != session.counts.shape:
        raise ValueError(
            f"log-rates of shape {log_rates.shape} do not fit counts {session.counts.shape}"
        )
    known = np.broadcast_to(log_rates, session.counts.shape)[trials].astype(np.float64)
    if not np.isfinite(known).all():
        raise ValueError("the predicted log-rates hold NaN or infinite values")
    bin_scored = np.zeros(session.n_bins, dtype=bool)
    bin_scored[span] = True
    return np.where(bin_scored[:, None] & scored, known, np.nan)


def _queries(
    task: str, session: Session, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """What to hide and score in turn: hidden (Q, N), scored (Q, N) bool, and the bins of both."""
    eye = np.eye(session.n_neurons, dtype=bool)
    codes = session.region_codes
    if task == "forward-prediction":
        everything = np.ones((1, session.n_neurons), dtype=bool)
        return everything, wanted[None], forward_bins(session.n_bins)
    if task == "co-smoothing":
        hidden = scored = eye[wanted]
    elif task == "inter-region":
        hidden = codes[None] == np.unique(codes[wanted & (codes >= 0)])[:, None]
        scored = hidden & wanted
    else:
        scored = eye[wanted & (codes >= 0)]
        hidden = scored | (codes[None] != codes[scored.argmax(axis=1)][:, None])
    return hidden, scored, (0, session.n_bins)


class Passes(NamedTuple):
    """The forward passes of a task, those for a single prediction first.

    Attributes:
        query: (P,) which of the task's queries each pass hides; on the device, as the next three.
        trial: (P,) the trial it is shown.
        owner: (M,) the pass of each prediction, in ascending order.
        neuron: (M,) the neuron predicted.
        ends: P + 1 numbers; those from ``ends[p]`` to ``ends[p + 1]`` are pass p's predictions.
    """

    query: Tensor
    trial: Tensor
    owner: Tensor
    neuron: Tensor
    ends: list[int]


def _plan(
    hidden: np.ndarray,
    scored: np.ndarray,
    n_trials: int,
    fired: np.ndarray | None,
    device: torch.device,
) -> Passes:
    """The passes that predict every scored neuron in every trial once.

    Args:
        hidden: (Q, N) bool.
        scored: (Q, N) bool; each neuron is scored in one query.
        n_trials: K'.
        fired: (K', N) bool, neurons with a spike in the bins that are hidden: queries that take
            the same spikes out of a trial share a pass. None = a pass for every query and trial.
        device: where the passes are made.
    """
    pair = np.arange(n_trials * len(hidden)).reshape(n_trials, len(hidden))
    for trial in range(0 if fired is None else n_trials):
        taken_out = np.packbits(hidden & fired[trial], axis=1)  # (Q, N / 8)
        taken_out = taken_out.view(f"V{taken_out.shape[1]}")[:, 0]  # a row is one thing to compare
        _, first, alike = np.unique(taken_out, return_index=True, return_inverse=True)
        pair[trial] = pair[trial, first[alike]]
    neurons = np.flatnonzero(scored.any(axis=0))
    pair = pair[:, scored[:, neurons].argmax(axis=0)].ravel()  # the pass of each prediction
    made, owner, sizes = np.unique(pair, return_inverse=True, return_counts=True)
    order = np.argsort(sizes, kind="stable")
    owner = np.argsort(order)[owner]
    by_owner = np.argsort(owner, kind="stable")
    trial, query = np.divmod(made[order], len(hidden))
    arrays = (query, trial, owner[by_owner], np.tile(neurons, n_trials)[by_owner])
    ends = [0, *np.cumsum(sizes[order]).tolist()]
    return Passes(*(torch.from_numpy(x).to(device) for x in arrays), ends)


def _mask(hidden: Tensor, row: Tensor, neuron: Tensor, n_bins: int, task: str, span: slice) -> Mask:
    """The mask (B, T, N) of passes that hide ``hidden`` (B, N) and predict pairs (row, neuron)."""
    target = torch.zeros_like(hidden)
    target.index_put_((row, neuron), torch.ones((), dtype=torch.bool, device=hidden.device))
    in_bins = torch.zeros(n_bins, 1, dtype=torch.bool, device=hidden.device)
    in_bins[span] = True
    hidden = hidden | target  # what any of the queries hides that share the pass
    causal = task == "forward-prediction"
    return Mask(hidden[:, None] & in_bins, target[:, None] & in_bins, causal)


def _batch_size(predictor: Predictor | Callable[..., Any], session: Session) -> int:
    """Trials to predict at once."""
    if not isinstance(predictor, MtM):
        return TRIALS_AT_ONCE
    tokens = TOKENS_AT_ONCE.get(predictor.device.type, TOKENS_AT_ONCE["cpu"])
    return max(1, tokens // predictor.n_tokens(session.name))


def _in_batches(
    make: Callable[[int, int], None], n_passes: int, size: int, what: str, bar: tqdm
) -> None:
    """Call ``make(start, stop)`` for all passes, ``size`` at once, fewer when memory runs out.

    Raises:
        MemoryError: when it runs out with a single one.
    """
    start = 0
    while start < n_passes:
        stop = min(start + size, n_passes)
        try:
            make(start, stop)
        except (RuntimeError, MemoryError) as error:
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not known and not any(text in str(error) for text in OUT_OF_MEMORY):
                raise
            if stop - start == 1:
                raise MemoryError(
                    f"{what}: memory runs out with a single trial; free some on this device, use "
                    "another device or take a smaller model"
                ) from error
            size = (stop - start) // 2
            continue
        bar.update(stop - start)
        start = stop


def takes_neurons(predictor: Predictor | Callable[..., Any]) -> bool:
    """Whether a predictor can be asked for one neuron of each trial, with ``neurons`` (B,)."""
    try:
        signature = inspect.signature(getattr(predictor, "predict", predictor))
    except (TypeError, ValueError):  # some built-in functions have none
        return False
    return "neurons" in signature.parameters


def call_predictor(
    predictor: Predictor | Callable[..., Any],
    counts: Tensor,
    scheme: str,
    mask: Mask,
    name: str,
    neurons: Tensor | None = None,
) -> Tensor:
    """Log-rates (B, T, N) from a model or a function; with ``neurons`` (B,), theirs alone, (B, T).

    Raises:
        ValueError: when their shape is another.
    """
    predict = getattr(predictor, "predict", predictor)
    one_each = {} if neurons is None else {"neurons": neurons}
    predicted = predict(counts, scheme, mask, name, **one_each)
    predicted = torch.as_tensor(predicted, device=counts.device)
    expected = counts.shape[: 2 if one_each else 3]
    if predicted.shape != expected:
        raise ValueError(
            f"the predictor returned shape {tuple(predicted.shape)} for counts of shape "
            f"{tuple(counts.shape)}; it must return a log-rate for every entry, {tuple(expected)}"
        )
    return predicted


def require_finite(log_rates: np.ndarray, scheme: str, name: str) -> None:
    """Raise ValueError where a predictor returned NaN or infinite values."""
    if not np.isfinite(log_rates).all():
        raise ValueError(
            f"the predictor returned NaN or infinite log-rates in session {name!r} "
            f"(scheme {scheme!r})"
        )


# --------------------------------------------------------------------------------- scoring


def _score(
    log_rates: np.ndarray,
    session: Session,
    task: str,
    trials: np.ndarray,
    train_null: np.ndarray,
    scored: np.ndarray,
    visible: np.ndarray,
) -> TaskScores:
    bins = forward_bins(session.n_bins) if task == "forward-prediction" else (0, session.n_bins)
    neurons = np.flatnonzero(scored)
    predicted = log_rates[:, slice(*bins)][:, :, neurons]
    counts = session.counts[trials][:, slice(*bins)][:, :, neurons]
    null = train_null[neurons]
    table = {
        "bits_per_spike": metrics.bits_per_spike(predicted, counts),
        "bits_per_spike_train_null": metrics.bits_per_spike(predicted, counts, null),
        "poisson_d2": metrics.poisson_d2(predicted, counts),
        "trial_r2": metrics.trial_r2(predicted, counts),
    }
    per_trial = {key for key, values in session.behaviour.items() if values.ndim == 1}
    known = [key for key in CONDITIONS if key in per_trial]
    if known:
        conditions = np.stack([session.behaviour[key][trials] for key in known], axis=1)
        table["psth_r2"] = metrics.psth_r2(predicted, counts, conditions)
    table["spikes"] = counts.sum(axis=(0, 1), dtype=np.int64)
    table["visible"] = visible[neurons]
    table["region"] = session.regions[neurons]
    pooled = {
        "bits_per_spike": metrics.pooled_bits_per_spike(predicted, counts),
        "bits_per_spike_train_null": metrics.pooled_bits_per_spike(predicted, counts, null),
    }
    return TaskScores(neurons, bins, table, pooled)
