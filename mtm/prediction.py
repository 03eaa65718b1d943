"""One interface for whatever fills in hidden activity, and the passes that ask it to.

Anything that predicts can be evaluated: a model, an array of log-rates, or a function of yours,
``predict(counts, scheme, mask, session) -> log-rates``. Models and functions are shown counts in
which hidden entries are zeroed; an array is taken as it is.

What a predictor need not do twice, or at all, is left out, which changes no score. One that takes
``neurons`` is asked for that output alone where one neuron a trial is scored. One that says
``sees_mask = False`` cannot tell a hidden entry from a silent one: in co-smoothing, a trial in
which 30 of 100 neurons never fire looks the same to it whichever of the 30 is hidden, so one pass
predicts all of them, and 71 passes do for 100 neurons.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mtm import metrics
from mtm.masks import Mask
from mtm.model import MtM
from mtm.session import Session, SessionError
from mtm.training import Fit

TASKS = {
    "co-smoothing": "neuron",
    "forward-prediction": "causal",
    "inter-region": "inter-region",
    "intra-region": "intra-region",
}
"""Each activity task, and the masking scheme that trains for it (whose prompt is shown)."""


def forward_bins(n_bins: int) -> tuple[int, int]:
    """The bins that forward prediction hides: the last 10 %, at least one; (start, stop)."""
    return n_bins - max(1, round(0.1 * n_bins)), n_bins


def queries_of(
    task: str, session: Session, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """What to hide and score in turn: hidden (Q, N), scored (Q, N) bool, and the bins of both.

    Args:
        task: one of :data:`TASKS`.
        session: the recording.
        wanted: (N,) bool, neurons to score; regional tasks take those with a label.

    Raises:
        ValueError: for an unknown task.
        SessionError: where there is no neuron to score.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    codes = session.region_codes
    labelled = codes >= 0
    if not (wanted & labelled if task.endswith("region") else wanted).any():
        raise SessionError(f"session {session.name!r}, {task}: no neuron to score")
    eye = np.eye(session.n_neurons, dtype=bool)
    if task == "forward-prediction":
        everything = np.ones((1, session.n_neurons), dtype=bool)
        return everything, wanted[None], forward_bins(session.n_bins)
    if task == "co-smoothing":
        hidden = scored = eye[wanted]
    elif task == "inter-region":
        hidden = codes[None] == np.unique(codes[wanted & labelled])[:, None]
        scored = hidden & wanted
    else:
        scored = eye[wanted & labelled]
        hidden = scored | (codes[None] != codes[scored.argmax(axis=1)][:, None])
    return hidden, scored, (0, session.n_bins)


TOKENS_AT_ONCE = {"cpu": 2_400, "cuda": 2**17}
"""Tokens of a batch, unless another size is asked for: what was fastest on a CPU, whose cache does
not hold more; enough to keep a large GPU busy. A small one runs out of memory and takes half."""
TRIALS_AT_ONCE = 256  # of a predictor without tokens
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")


class Predictor(Protocol):
    """Whatever can fill in hidden activity."""

    def predict_log_rates(self, counts: Tensor, scheme: str, mask: Mask, session: str) -> Tensor:
        """Log-rates (B, T, N) for counts (B, T, N) in which ``mask.hidden`` entries are 0."""


Model = Predictor | Callable[..., Any]
Predicts = Model | np.ndarray


def predictor_of(predictor: Predicts | Mapping[str, Predicts], name: str) -> Predicts:
    """The predictor of a session: the same for all, or one by the session's name.

    Raises:
        ValueError: when there is none of that name, or it does not take what a predictor is given.
    """
    if isinstance(predictor, Mapping):
        if name not in predictor:
            known = ", ".join(predictor)
            raise ValueError(f"no predictor for session {name!r}; there are: {known}")
        predictor = predictor[name]
    if type(predictor) is Fit:
        return predictor.model
    if isinstance(predictor, Tensor):
        return predictor.cpu().numpy()
    if not isinstance(predictor, np.ndarray):
        require_signature(getattr(predictor, "predict_log_rates", predictor))
    return predictor


def checked_split_seed(
    predictor: Predicts, session: Session, split_seed: int | None, allow_seen: bool = False
) -> int:
    """The split to use: the one asked for, else the one the model was trained on, else that of 0.

    ``allow_seen`` lets a split be asked for that the model was not trained on.

    Raises:
        SessionError: when a model was trained on bins of another width.
        ValueError: when a model was trained on another split, or on one that nobody knows.
    """
    model = getattr(predictor, "model", predictor)  # of what wraps one
    bin_size = getattr(model, "bin_size", session.bin_size)
    if abs(bin_size - session.bin_size) > 1e-9:
        raise SessionError(
            f"session {session.name!r} has bins of {session.bin_size} s, the model was trained on "
            f"bins of {bin_size} s"
        )
    trained = getattr(model, "split_seed", None)
    if split_seed is None and hasattr(model, "split_seed") and trained is None:
        raise ValueError(
            "it is not known which trials this model was trained on; split_seed=0 scores it on the "
            "test trials of that split, some of which it may have learned from"
        )
    if split_seed is None:
        return trained or 0
    if trained is not None and trained != split_seed and not allow_seen:
        raise ValueError(
            f"the model was trained on the split of seed {trained}, not {split_seed}; some of the "
            "test trials would be ones it has learned from"
        )
    return split_seed


def require_unseen(predictor: Predicts, session: Session, trials: np.ndarray) -> None:
    """Refuse to score trials that the predictor was trained on.

    Models and baselines keep a fingerprint of every trial they learned from, in whatever session it
    was (``predictor.seen``): a recording under another name, or a split that changed, is found too.
    A predictor without ``seen``, as a checkpoint of the authors' or a function, cannot be checked;
    nor can trials of fewer than ten spikes.

    Raises:
        ValueError: naming how many there are.
    """
    seen = getattr(getattr(predictor, "model", predictor), "seen", {})
    if not seen:
        return
    mine = session.fingerprints(trials)
    known = np.isin(mine, np.concatenate(list(seen.values()))) & (mine != 0)
    if known.any():
        where = [name for name, prints in seen.items() if np.isin(mine[known], prints).any()]
        raise ValueError(
            f"session {session.name!r}: the predictor was trained on {int(known.sum())} of the "
            f"{len(trials)} trials to be scored (in session {where[0]!r}); score the test trials "
            "of the split that it was trained with, or pass allow_seen=True to see how well it "
            "fits what it knows"
        )


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


# ------------------------------------------------------------------- hiding and predicting


def predict_held_out(
    predictor: Predicts,
    session: Session,
    task: str,
    trials: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Log-rates of the scored entries, each predicted while it was hidden; NaN elsewhere.

    Args:
        predictor: see :func:`mtm.evaluate`.
        session: the recording.
        task: one of :data:`mtm.prediction.TASKS`.
        trials: (K',) indices; default the test trials, as in :func:`mtm.evaluate`.
        wanted: (N,) bool, neurons to score; default all.
        batch_size: see :func:`mtm.evaluate`.
        progress: show a bar.

    Returns:
        (K', T, N) float64.

    Raises:
        ValueError: for an unknown task, predictions of a wrong shape, or with NaN where they are
            scored.
        SessionError: where there is no neuron to score.
        MemoryError: when it runs out with a single trial.
    """
    predictor = predictor_of(predictor, session.name)
    if trials is None:
        trials = session.split(checked_split_seed(predictor, session, None)).test
    if wanted is None:
        wanted = np.ones(session.n_neurons, dtype=bool)
    queries, scored, bins = queries_of(task, session, wanted)
    span, scored_neurons = slice(*bins), scored.any(axis=0)
    if isinstance(predictor, np.ndarray):
        known = known_log_rates(predictor, session, trials)
        in_span = np.isin(np.arange(session.n_bins), np.arange(*bins))
        return np.where(in_span[:, None] & scored_neurons, known, np.nan)
    size = trials_at_once(predictor, session.name) if batch_size is None else batch_size
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
        in_batches(make, n_passes, size, what, bar)
    found = log_rates.cpu().numpy()
    require_finite(found[:, span][:, :, scored_neurons], TASKS[task], session.name)
    return found.astype(np.float64)


def known_log_rates(log_rates: np.ndarray, session: Session, trials: np.ndarray) -> np.ndarray:
    """Some trials of an array of log-rates, (K', T, N) float64.

    Raises:
        ValueError: when it does not fit the session's counts, or holds NaN or infinite values.
    """
    try:
        fits = np.broadcast_shapes(log_rates.shape, session.counts.shape) == session.counts.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"session {session.name!r}: log-rates of shape {log_rates.shape} do not fit counts "
            f"{session.counts.shape}"
        )
    known = np.broadcast_to(log_rates, session.counts.shape)[trials].astype(np.float64)
    if not np.isfinite(known).all():
        raise ValueError(
            f"session {session.name!r}: the predicted log-rates hold NaN or infinite values"
        )
    return known


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
    for trial, spiking in enumerate(() if fired is None else fired):
        taken_out = np.packbits(hidden & spiking, axis=1)  # (Q, N / 8)
        taken_out = taken_out.view(f"V{taken_out.shape[1]}")[:, 0]  # a row is one thing to compare
        _, first, alike = np.unique(taken_out, return_index=True, return_inverse=True)
        pair[trial] = pair[trial, first[alike]]
    neurons = np.flatnonzero(scored.any(axis=0))
    taken = pair[:, scored[:, neurons].argmax(axis=0)].ravel()  # the pass of each prediction
    made, owner, sizes = np.unique(taken, return_inverse=True, return_counts=True)
    order = np.argsort(sizes, kind="stable")
    owner = np.argsort(order)[owner]
    by_owner = np.argsort(owner, kind="stable")
    trials, queries = np.divmod(made[order], len(hidden))

    def on_device(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(device)

    return Passes(
        query=on_device(queries),
        trial=on_device(trials),
        owner=on_device(owner[by_owner]),
        neuron=on_device(np.tile(neurons, n_trials)[by_owner]),
        ends=[0, *np.cumsum(sizes[order]).tolist()],
    )


def _mask(hidden: Tensor, row: Tensor, neuron: Tensor, n_bins: int, task: str, span: slice) -> Mask:
    """The mask (B, T, N) of passes that hide ``hidden`` (B, N) and predict pairs (row, neuron)."""
    target = torch.zeros_like(hidden)
    target.index_put_((row, neuron), torch.ones((), dtype=torch.bool, device=hidden.device))
    in_bins = torch.zeros(n_bins, 1, dtype=torch.bool, device=hidden.device)
    in_bins[span] = True
    hidden = hidden | target  # what any of the queries hides that share the pass
    causal = task == "forward-prediction"
    return Mask(hidden[:, None] & in_bins, target[:, None] & in_bins, causal)


def trials_at_once(predictor: Model, session: str) -> int:
    """Trials of a session (its name) to predict at once, unless another size is asked for."""
    if not isinstance(predictor, MtM):
        return TRIALS_AT_ONCE
    tokens = TOKENS_AT_ONCE.get(predictor.device.type, TOKENS_AT_ONCE["cpu"])
    return max(1, tokens // predictor.n_tokens(session))


def in_batches(
    make: Callable[[int, int], None], n_passes: int, size: int, what: str, bar: tqdm
) -> None:
    """Call ``make(start, stop)`` for all passes, ``size`` at once, fewer when memory runs out.

    Raises:
        MemoryError: when it runs out with a single one.
        ValueError: for a size below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
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


def takes_neurons(predictor: Model) -> bool:
    """Whether a predictor can be asked for one neuron of each trial, with ``neurons`` (B,)."""
    try:
        predict: Any = getattr(predictor, "predict_log_rates", predictor)
        signature = inspect.signature(predict)
    except (TypeError, ValueError):  # some built-in functions have none
        return False
    return "neurons" in signature.parameters


def require_signature(predict: Any) -> None:
    """Refuse a function that does not take what every predictor is given.

    Raises:
        ValueError: saying what that is.
    """
    try:
        inspect.signature(predict).bind("counts", "scheme", "mask", "session")
    except TypeError as error:
        raise ValueError(
            f"a predictor is a function of (counts, scheme, mask, session), and {predict!r} is not"
            f": {error}"
        ) from error
    except ValueError:  # some built-in functions have no signature
        return


def call_predictor(
    predictor: Model,
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
    predict: Any = getattr(predictor, "predict_log_rates", predictor)
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
