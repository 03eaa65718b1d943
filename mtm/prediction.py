"""One interface for everything that predicts hidden activity.

Evaluation and decoding zero the hidden entries here, so a predictor cannot see them.

A predictor is a model, a function ``(counts, scheme, mask, session) -> log-rates``, or an array of
log-rates. Models and functions get counts in which every hidden entry is zero; an array is used as
it is.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from mtm import metrics
from mtm.masks import Mask, scheme
from mtm.session import Session, SessionError, Split

TASKS = {
    "co-smoothing": "neuron",
    "forward-prediction": "causal",
    "inter-region": "inter-region",
    "intra-region": "intra-region",
}
"""Each activity task, and the masking scheme that trains for it (whose prompt the model gets).
To add a task, add an entry here and a branch in :func:`queries_of`."""

BINS = ("n_bins", "bin_size")
TOKENS_AT_ONCE = {"cpu": 2_400, "cuda": 2**17}  # of a batch; the fastest measured on each device
TRIALS_AT_ONCE = 256  # of a batch, for predictors without tokens
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


class Predictor(Protocol):
    """Anything with this method can be evaluated.

    It may also take ``neurons`` (B,) and return the log-rates (B, T) of one neuron of each trial.
    Optional attributes: ``device``; ``n_bins``, ``bin_size``, ``window``, ``split_seed`` and
    ``seen`` (session name -> fingerprints of training trials), which are checked; ``schemes``,
    those that it can predict.
    """

    def predict_log_rates(self, counts: Tensor, scheme: str, mask: Mask, session: str) -> Tensor:
        """Log-rates (B, T, N) for counts (B, T, N) in which ``mask.hidden`` entries are 0."""


PredictorLike = Predictor | Callable[..., Any] | np.ndarray


def as_predictor(
    predictor: PredictorLike | Mapping[str, PredictorLike], session: Session
) -> PredictorLike:
    """Check a predictor, and return the one for a session: an array (K, T, N), or what to call.

    Raises:
        ValueError: when it is not for this session, or a function with other arguments.
        SessionError: for a model that was trained on other bins.

    Warns:
        UserWarning: for a model that knows none of the session's trials, see `require_same_bins`.
    """
    if isinstance(predictor, Mapping):
        if session.name not in predictor:
            known = ", ".join(predictor)
            raise ValueError(f"no predictor for session {session.name!r}; there are: {known}")
        predictor = predictor[session.name]
    if isinstance(predictor, Tensor):
        predictor = predictor.detach().cpu().double().numpy()
    if isinstance(predictor, np.ndarray):
        try:
            return np.broadcast_to(predictor, session.counts.shape)
        except ValueError as error:
            raise ValueError(f"session {session.name!r}: log-rates do not fit: {error}") from None
    try:
        inspect.signature(_method(predictor)).bind("counts", "scheme", "mask", "session")
    except TypeError as error:
        message = f"a predictor is a function of (counts, scheme, mask, session): {error}"
        raise ValueError(message) from error
    require_same_bins(predictor, session)
    return predictor


def require_same_bins(predictor: PredictorLike, session: Session) -> None:
    """Raise SessionError where a predictor was trained on other bins; warn of other neurons.

    A session has other neurons, or the same in another order, if the predictor was trained on one
    of this name and knows none of its trials. (Or all its trials are new, which cannot be told.)
    """
    window = _attribute(predictor, "window", None) or session.window  # None: not known
    found = session.n_bins, session.bin_size, session.window[0]
    trained = [*(_attribute(predictor, key, getattr(session, key)) for key in BINS), window[0]]
    if not np.allclose(found, trained):
        one, other = ("{} bins of {:g} s from {:g} s".format(*bins) for bins in (found, trained))
        n, size, start = trained
        call = f"load_session(..., window=({start:g}, {start + n * size:g}), bin_size={size:g})"
        problem = f"has {one}, the model was trained on {other}; bin it alike, with {call}"
        raise SessionError(f"session {session.name!r} {problem}")
    seen = _attribute(predictor, "seen", {}).get(session.name, ())
    trials = session.fingerprints(np.arange(session.n_trials)) if len(seen) else np.zeros(1)
    if trials.any() and not np.isin(trials[trials != 0], seen).any():
        warnings.warn(
            f"session {session.name!r}: the predictor was trained on a session of this name, and "
            "knows none of these trials: are these the same neurons, in the same order?",
            stacklevel=4,
        )


def choose_split(
    predictor: PredictorLike,
    session: Session,
    split_seed: int | None = None,
    *,
    allow_seen: bool = False,
) -> Split:
    """Split a session by the seed asked for, else the predictor's own, else 0.

    Raises:
        ValueError: when the predictor was trained with another seed (unless ``allow_seen``), or
            with an unknown one and none is asked for.
    """
    trained = _attribute(predictor, "split_seed", split_seed or 0)
    if split_seed is None and trained is None:
        raise ValueError(
            "it is not known which trials this model was trained on; pass split_seed=0 for test "
            "trials some of which may be its training trials"
        )
    if split_seed is not None and trained not in (None, split_seed) and not allow_seen:
        raise ValueError(f"the model was trained on the split of seed {trained}, not {split_seed}")
    return session.split(trained if split_seed is None else split_seed)


def require_unseen(predictor: PredictorLike, session: Session, trials: np.ndarray) -> None:
    """Raise ValueError for trials that a predictor was trained on.

    They are found by their fingerprints (``predictor.seen``), whatever the session was called and
    however it was split, as long as neurons and bins are those of training. Trials of fewer than
    ten spikes cannot be checked.
    """
    scored = session.fingerprints(trials)
    for name, trained in _attribute(predictor, "seen", {}).items():
        n_known = int((np.isin(scored, trained) & (scored != 0)).sum())
        if n_known:
            raise ValueError(
                f"session {session.name!r}: the predictor was trained on {n_known} of the "
                f"{len(trials)} trials to be scored (in session {name!r}); score the test trials "
                "of the split that it was trained with, or pass allow_seen=True"
            )


def _method(predictor: PredictorLike) -> Any:
    return getattr(predictor, "predict_log_rates", predictor)


def _attribute(predictor: Any, name: str, default: Any) -> Any:
    """An attribute of a predictor, or of the model inside it (``Fit.model``)."""
    for owner in (predictor, getattr(predictor, "model", None)):
        if hasattr(owner, name):
            return getattr(owner, name)
    return default


# ---------------------------------------------------------------- hiding and predicting


def predict_in_batches(
    predictor: PredictorLike,
    session: str,
    scheme: str,
    n: int,
    inputs: Callable[[slice], tuple[Tensor, Mask]],
    neurons: Tensor | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[slice, Tensor]]:
    """Hide entries and predict, batch by batch; halve the batch when memory runs out.

    Args:
        predictor, session, scheme: a model or function, and the names that it gets.
        n: number of forward passes.
        inputs: slice of ``range(n)`` -> counts (B, T, N) and a mask that broadcasts to them.
        neurons: (n,) the one neuron wanted of each pass, for predictors that take it.
        batch_size, progress: as in :func:`mtm.evaluate`.

    Yields:
        the slice, and log-rates (B, T, N), or (B, T) of ``neurons``, on the predictor's device.

    Raises:
        ValueError: for log-rates of another shape, or a batch size below 1.
        MemoryError: when memory runs out with a single trial.
    """
    if batch_size is None:
        n_tokens = _attribute(predictor, "n_tokens", None)
        device = torch.device(getattr(predictor, "device", "cpu")).type
        tokens = TOKENS_AT_ONCE.get(device, TOKENS_AT_ONCE["cpu"])
        batch_size = max(1, tokens // n_tokens(session)) if n_tokens else TRIALS_AT_ONCE
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    start = 0
    with tqdm(total=n, desc=scheme, disable=None if progress else True, leave=False) as bar:
        while start < n:
            batch = slice(start, min(start + batch_size, n))
            wanted = {} if neurons is None else {"neurons": neurons[batch]}
            try:
                log_rates = _predict(predictor, *inputs(batch), scheme, session, wanted)
            except (RuntimeError, MemoryError) as error:
                # torch has no exception of its own for this on a CPU, nor for cuBLAS.
                no_memory = any(text in str(error) for text in OUT_OF_MEMORY)
                if not (no_memory or isinstance(error, MemoryError)):
                    raise
                batch_size = (batch.stop - start) // 2
                if batch_size == 0:
                    message = f"session {session!r}: memory runs out with a single trial"
                    raise MemoryError(message) from error
                continue
            yield batch, log_rates
            bar.update(batch.stop - start)
            start = batch.stop


def _predict(
    predictor: PredictorLike,
    counts: Tensor,
    mask: Mask,
    scheme: str,
    session: str,
    wanted: dict[str, Tensor],
) -> Tensor:
    """Zero the hidden entries, ask the predictor, and check the shape of what it returns."""
    counts = counts.to(getattr(predictor, "device", "cpu"))
    hidden, target = (x.to(counts.device).expand_as(counts) for x in (mask.hidden, mask.target))
    visible, mask = counts.masked_fill(hidden, 0), Mask(hidden, target, mask.causal)
    with torch.no_grad():
        log_rates = _method(predictor)(visible, scheme, mask, session, **wanted)
    log_rates = torch.as_tensor(log_rates, device=counts.device).detach().float()
    expected = counts.shape[: 2 if wanted else 3]
    if log_rates.shape != expected:
        shapes = f"the predictor returned shape {tuple(log_rates.shape)}, not {tuple(expected)}"
        raise ValueError(f"{shapes}; it must return a log-rate for every entry")
    return log_rates


class Queries(NamedTuple):
    """What to hide and predict, one query after the other."""

    hidden: np.ndarray  # (Q, N) bool, neurons hidden in each query
    wanted: np.ndarray  # (Q, N) bool, neurons to predict in it; each neuron in one query at most
    bins: slice = slice(0, None)  # time bins that are hidden and predicted


def predict_queries(
    predictor: PredictorLike,
    session: Session,
    name: str,
    trials: np.ndarray,
    queries: Queries,
    **options: Any,
) -> np.ndarray:
    """Predict the wanted neurons, in one forward pass for each query and trial.

    Args:
        predictor: as :func:`as_predictor` returns it.
        session: the recording.
        name: masking scheme whose prompt a model gets; it decides whether attention is causal.
        trials: (K',) indices.
        queries: what to hide and predict.
        **options: ``batch_size`` and ``progress`` of :func:`predict_in_batches`.

    Returns:
        log-rates (K', T, N) float64, NaN where nothing is wanted.

    Raises:
        ValueError: for an unknown scheme, or predictions that are NaN or infinite.
    """
    causal, (hidden, wanted, bins) = scheme(name).causal, queries
    found = np.full((len(trials), session.n_bins, session.n_neurons), np.nan)
    entries = slice(None), bins, np.flatnonzero(wanted.any(axis=0))
    if isinstance(predictor, np.ndarray):
        found[entries] = predictor[trials][entries]
    else:
        # All that batches are made of is copied to the device once.
        on_device = partial(torch.as_tensor, device=getattr(predictor, "device", "cpu"))
        hide, target = on_device(hidden), on_device(hidden & wanted)
        counts = on_device(session.counts[trials].astype(np.float32))
        inside = torch.zeros_like(counts[0, :, :1], dtype=torch.bool)
        inside[bins] = True
        query, trial = np.divmod(np.arange(len(hidden) * len(trials)), len(trials))  # of each pass

        def inputs(batch: slice) -> tuple[Tensor, Mask]:
            of = on_device(query[batch])
            mask = Mask(hide[of, None] & inside, target[of, None] & inside, causal)
            return counts[on_device(trial[batch])], mask

        # A predictor that can is asked for one neuron a pass, where each query wants one.
        one_each = "neurons" in inspect.signature(_method(predictor)).parameters
        one_each = one_each and (wanted.sum(axis=1) == 1).all()
        neurons = on_device(wanted.argmax(axis=1)[query]) if one_each else None
        asked = predictor, session.name, name, len(query), inputs, neurons
        for batch, log_rates in predict_in_batches(*asked, **options):
            row, neuron = np.nonzero(wanted[query[batch]])
            log_rates = log_rates if one_each else log_rates[row, :, neuron]
            found[trial[batch][row], bins, neuron] = log_rates[:, bins].cpu().numpy()
    if not np.isfinite(found[entries]).all():
        raise ValueError(f"session {session.name!r}: NaN or infinite log-rates were predicted")
    return found


def predict_latents(
    predictor: PredictorLike,
    session: Session,
    trials: np.ndarray,
    hidden: np.ndarray,
    encoder: bool = False,
) -> np.ndarray:
    """Latents (K', T, D) of a model, see :meth:`mtm.MtM.latents`, without the neurons ``hidden``.

    Raises:
        ValueError: for a predictor that has no latents.
    """
    latents = _attribute(predictor, "latents", None)
    if latents is None:
        raise ValueError("this predictor has no latents to decode from; pass features='rates'")
    on_device = partial(torch.as_tensor, device=_attribute(predictor, "device", "cpu"))
    found = []
    for some in np.array_split(trials, -(-len(trials) // TRIALS_AT_ONCE)):
        counts = on_device(session.counts[some].astype(np.float32))
        mask = on_device(hidden).expand_as(counts)
        visible = counts.masked_fill(mask, 0)
        found.append(latents(visible, session.name, Mask(mask, mask), encoder).cpu())
    return torch.cat(found).double().numpy()


def has_latents(predictor: PredictorLike) -> bool:
    """Whether a predictor is a model with a direct path from latents of the population."""
    model = getattr(predictor, "model", predictor)  # of a Fit
    return bool(getattr(getattr(model, "config", None), "latents", 0))


# ---------------------------------------------------------------- the activity tasks


def forward_bins(n_bins: int) -> tuple[int, int]:
    """The bins that forward prediction hides: the last 10 %, at least one; (start, stop)."""
    return n_bins - max(1, round(0.1 * n_bins)), n_bins


def queries_of(task: str, session: Session, wanted: np.ndarray) -> Queries:
    """The queries of one of :data:`TASKS` that score the neurons ``wanted`` (N,) bool.

    Raises:
        ValueError: for an unknown task.
        SessionError: when there is no neuron to score; regional tasks need region labels.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    codes = session.region_codes
    if scheme(TASKS[task]).needs_regions:
        wanted = wanted & (codes >= 0)
    if not wanted.any():
        raise SessionError(f"session {session.name!r}, {task}: no neuron to score")
    if task == "forward-prediction":
        bins = slice(*forward_bins(session.n_bins))
        return Queries(np.ones_like(wanted)[None], wanted[None], bins)
    if task == "inter-region":  # one region a query
        hidden = codes == np.unique(codes[wanted])[:, None]
        return Queries(hidden, hidden & wanted)
    each = np.eye(session.n_neurons, dtype=bool)[wanted]  # one neuron a query
    if task == "co-smoothing":
        return Queries(each, each)
    if task == "intra-region":
        return Queries(each | (codes != codes[wanted][:, None]), each)
    raise ValueError(f"task {task!r} has no branch in queries_of")


def selected(which: ArrayLike | None, n: int) -> np.ndarray:
    """What is selected of ``n`` by indices or a mask, (n,) bool; all by None."""
    found = np.zeros(n, dtype=bool)
    found[slice(None) if which is None else np.asarray(which)] = True
    return found


def predict_held_out(
    predictor: PredictorLike | Mapping[str, PredictorLike],
    session: Session,
    task: str,
    trials: np.ndarray | None = None,
    wanted: ArrayLike | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Predict the scored entries of a task, each while it is hidden.

    Args:
        predictor, batch_size, progress: as in :func:`mtm.evaluate`.
        session: the recording.
        task: one of :data:`TASKS`.
        trials: (K',) indices. Default: the test trials, as in :func:`mtm.evaluate`.
        wanted: neurons to score, indices or (N,) bool. Default: all.

    Returns:
        log-rates (K', T, N) float64, NaN where nothing is scored.
    """
    predictor = as_predictor(predictor, session)
    trials = choose_split(predictor, session).test if trials is None else np.asarray(trials)
    queries = queries_of(task, session, selected(wanted, session.n_neurons))
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    return predict_queries(predictor, session, TASKS[task], trials, queries, **how)


def oracle(session: Session) -> np.ndarray:
    """Log of the true rates, (K, T, N): the best possible predictor of a simulated session.

    Raises:
        SessionError: for a recording, whose true rates are unknown.
    """
    if session.rates is None:
        raise SessionError(f"session {session.name!r}, rates: only simulated sessions have them")
    return np.log(session.rates)


def mean_rates(session: Session, split_seed: int = 0) -> np.ndarray:
    """Log of each neuron's mean count over the training trials, (1, 1, N): the null predictor."""
    return metrics.log_mean(session.counts[session.split(split_seed).train])[None, None]
