"""One interface for everything that predicts hidden activity.

A predictor is a model, a function ``(counts, scheme, mask, session) -> log-rates``, or an array of
log-rates. Evaluation and decoding zero the hidden entries here, so that models and functions cannot
see them; an array is used as it is.
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
from mtm.inputs import SessionError
from mtm.masks import Mask, scheme
from mtm.session import Session, Split

TASKS = {
    "co-smoothing": "neuron",
    "forward-prediction": "causal",
    "inter-region": "inter-region",
    "intra-region": "intra-region",
}
"""Each activity task, and the masking scheme that trains for it (whose prompt the model gets).
To add a task, add an entry here and a branch in :func:`queries_of`."""

TOKENS_AT_ONCE = {"cpu": 2_400, "cuda": 2**17}  # of a batch; the fastest measured on each device
TRIALS_AT_ONCE = 256  # of a batch, for predictors without tokens
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


class Predictor(Protocol):
    """Anything with this method can be evaluated.

    It may also take ``neurons`` (B,) and return the log-rates (B, T) of one neuron of each trial.
    Optional attributes: ``device``; ``n_bins``, ``bin_size``, ``window``, ``split_seed`` and
    ``seen`` (session name -> fingerprints of training trials), which are checked; ``schemes``.
    """

    def predict_log_rates(self, counts: Tensor, scheme: str, mask: Mask, session: str) -> Tensor:
        """Log-rates (B, T, N) for counts (B, T, N) in which ``mask.hidden`` entries are 0."""


PredictorLike = Predictor | Callable[..., Any] | np.ndarray
Predictors = PredictorLike | Mapping[str, PredictorLike]


def as_predictor(predictor: Predictors, session: Session) -> PredictorLike:
    """Return an array (K, T, N) or what to call for a session, see :func:`require_same_bins`."""
    if isinstance(predictor, Mapping):
        predictor = predictor[session.name]
    if isinstance(predictor, Tensor):
        predictor = predictor.detach().cpu().double().numpy()
    if isinstance(predictor, np.ndarray):
        return np.broadcast_to(predictor, session.counts.shape)
    require_same_bins(predictor, session)
    return predictor


def require_same_bins(predictor: PredictorLike, session: Session) -> None:
    """Raise SessionError where a predictor was trained on other bins; warn of other neurons.

    A session has other neurons, or the same in another order, if the predictor was trained on one
    of this name and knows none of its trials. (Or all its trials are new, which cannot be told.)
    """
    n = _attribute(predictor, "n_bins", session.n_bins)
    size = _attribute(predictor, "bin_size", session.bin_size)
    start = (_attribute(predictor, "window", None) or session.window)[0]  # None: not known
    found, trained = (session.n_bins, session.bin_size, session.window[0]), (n, size, start)
    if not np.allclose(found, trained):
        one, other = ("{} bins of {:g} s from {:g} s".format(*bins) for bins in (found, trained))
        call = f"load_session(..., window=({start:g}, {start + n * size:g}), bin_size={size:g})"
        problem = f"has {one}, the model was trained on {other}; bin it alike, with {call}"
        raise SessionError(f"session {session.name!r} {problem}")
    seen = _attribute(predictor, "seen", {}).get(session.name, ())
    trials = session.fingerprints(np.arange(session.n_trials)) if len(seen) else np.zeros(1)
    if trials.any() and not np.isin(trials[trials != 0], seen).any():
        doubt = "knows none of these trials: are these the same neurons, in the same order?"
        trained_on = "the predictor was trained on a session of this name, and"
        warnings.warn(f"session {session.name!r}: {trained_on} {doubt}", stacklevel=4)


def choose_split(
    predictor: PredictorLike,
    session: Session,
    split_seed: int | None = None,
    *,
    allow_seen: bool = False,
) -> Split:
    """Split a session by the seed asked for, else the predictor's own, else 0.

    Raises ValueError when it was trained with another, or none is asked for and its own unknown.
    """
    trained = _attribute(predictor, "split_seed", split_seed or 0)
    seed = trained if split_seed is None else split_seed
    names, seen = (_attribute(predictor, name, ()) for name in ("session_names", "seen"))
    # Of sessions that were imported, or added by hand, nobody knows which trials it has seen.
    unknown = seen and session.name in names and session.name not in seen
    if seed is None or (split_seed is None and unknown):
        raise ValueError(
            "it is not known which trials this model was trained on; pass split_seed=0 for test "
            "trials some of which may be its training trials"
        )
    if trained not in (None, seed) and not allow_seen:
        raise ValueError(f"the model was trained on the split of seed {trained}, not {seed}")
    return session.split(seed)


def require_unseen(predictor: PredictorLike, session: Session, trials: np.ndarray) -> None:
    """Raise ValueError for trials that a predictor was trained on.

    They are found by their fingerprints (``predictor.seen``), whatever the session was called and
    however it was split, as long as neurons and bins are those of training. Trials of fewer than
    ten spikes have none, and are not refused.
    """
    scored = session.fingerprints(trials)
    for name, trained in _attribute(predictor, "seen", {}).items():
        if n_known := int((np.isin(scored, trained) & (scored != 0)).sum()):
            raise ValueError(
                f"session {session.name!r}: the predictor was trained on {n_known} of the "
                f"{len(trials)} trials to be scored (in session {name!r}); score the test trials "
                "of the split that it was trained with, or pass allow_seen=True"
            )


def has_latents(predictor: PredictorLike) -> bool:
    """Whether a predictor is a model with a direct path from latents of the population."""
    model = getattr(predictor, "model", predictor)  # of a Fit
    return bool(getattr(getattr(model, "config", None), "latents", 0))


def _attribute(predictor: Any, name: str, default: Any) -> Any:
    """An attribute of a predictor, or of the model inside it (``Fit.model``)."""
    owner = predictor if hasattr(predictor, name) else getattr(predictor, "model", None)
    return getattr(owner, name, default)


def _method(predictor: PredictorLike) -> Any:
    return getattr(predictor, "predict_log_rates", predictor)


def predict_masked(
    predictor: PredictorLike, counts: Tensor, mask: Mask, scheme: str, session: str, **asked: Tensor
) -> Tensor:
    """Zero the hidden entries of counts (B, T, N), and predict log-rates (B, T, N).

    ``asked`` may be ``neurons`` (B,), for predictors that take them; log-rates are (B, T) then.
    """
    counts = counts.to(getattr(predictor, "device", "cpu"))
    hidden, target = (x.to(counts.device).expand_as(counts) for x in (mask.hidden, mask.target))
    visible, mask = counts.masked_fill(hidden, 0), Mask(hidden, target, mask.causal)
    with torch.no_grad():
        log_rates = _method(predictor)(visible, scheme, mask, session, **asked)
    log_rates = torch.as_tensor(log_rates, device=counts.device).detach().float()
    if (shape := tuple(log_rates.shape)) != (expected := tuple(counts.shape[: 2 if asked else 3])):
        shapes = f"the predictor returned shape {shape}, not {expected}"
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
        session, trials: the recording, and (K',) indices of its trials.
        name: masking scheme whose prompt a model gets; it decides whether attention is causal.
        queries: what to hide and predict.
        **options: ``batch_size`` and ``progress`` of :func:`mtm.evaluate`.

    Returns:
        log-rates (K', T, N) float64, NaN where nothing is wanted.
    """
    found = np.full((len(trials), session.n_bins, session.n_neurons), np.nan)
    entries = slice(None), queries.bins, np.flatnonzero(queries.wanted.any(axis=0))
    if isinstance(predictor, np.ndarray):
        found[entries] = predictor[trials][entries]
    else:
        for places, rates in _in_batches(predictor, session, name, trials, queries, **options):
            found[places] = rates
    if not np.isfinite(found[entries]).all():
        raise ValueError(f"session {session.name!r}: NaN or infinite log-rates were predicted")
    return found


def _in_batches(
    predictor: PredictorLike,
    session: Session,
    name: str,
    trials: np.ndarray,
    queries: Queries,
    batch_size: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[Any, np.ndarray]]:
    """Predict batch by batch: entries and their log-rates. Batches that do not fit are halved."""
    hidden, wanted, bins = queries
    # All that batches are made of is copied to the device once.
    on_device = partial(torch.as_tensor, device=getattr(predictor, "device", "cpu"))
    hide, target = on_device(hidden), on_device(hidden & wanted)
    counts = on_device(session.counts[trials].astype(np.float32))
    absent = on_device(unobserved(session, trials))
    inside = torch.zeros_like(counts[0, :, :1], dtype=torch.bool)
    inside[bins] = True
    query, trial = np.divmod(np.arange(len(hidden) * len(trials)), len(trials))  # of each pass
    # A predictor that can is asked for one neuron a pass, where each query wants one.
    one_each = "neurons" in inspect.signature(_method(predictor)).parameters
    one_each = one_each and (wanted.sum(axis=1) == 1).all()
    if batch_size is None:
        n_tokens = _attribute(predictor, "n_tokens", None)
        tokens = TOKENS_AT_ONCE.get(counts.device.type, TOKENS_AT_ONCE["cpu"])
        batch_size = max(1, tokens // n_tokens(session.name)) if n_tokens else TRIALS_AT_ONCE
    start, disable = 0, None if progress else True
    with tqdm(total=len(query), desc=name, disable=disable, leave=False) as bar:
        while start < len(query):
            some = slice(start, start + max(1, batch_size))
            of, shown = on_device(query[some]), on_device(trial[some])
            mask = Mask(hide[of, None] & inside, target[of, None] & inside, scheme(name).causal)
            mask = mask.leave_out(absent[shown])
            neurons = on_device(wanted.argmax(axis=1)[query[some]])
            asked = {"neurons": neurons} if one_each else {}
            try:
                rates = predict_masked(predictor, counts[shown], mask, name, session.name, **asked)
            except (RuntimeError, MemoryError) as error:
                # torch has no exception of its own for this on a CPU, nor for cuBLAS.
                known = any(text in str(error) for text in OUT_OF_MEMORY)
                if len(of) == 1 or not (known or isinstance(error, MemoryError)):
                    raise
                batch_size = len(of) // 2
                continue
            row, neuron = np.nonzero(wanted[query[some]])
            rates = rates if one_each else rates[row, :, neuron]
            yield (trial[some][row], bins, neuron), rates[:, bins].cpu().numpy()
            bar.update(len(of))
            start += len(of)


def predict_latents(
    predictor: PredictorLike,
    session: Session,
    trials: np.ndarray,
    hidden: np.ndarray,
    encoder: bool = False,
) -> np.ndarray:
    """Latents (K', T, D) without the neurons ``hidden``, see :meth:`mtm.MtM.latents`."""
    latents = _attribute(predictor, "latents", None)
    if latents is None:
        raise ValueError("this predictor has no latents to decode from; pass features='rates'")
    on_device = partial(torch.as_tensor, device=_attribute(predictor, "device", "cpu"))
    found = []
    for some in np.array_split(trials, -(-len(trials) // TRIALS_AT_ONCE)):
        counts = on_device(session.counts[some].astype(np.float32))
        mask = (on_device(hidden) | on_device(unobserved(session, some))).expand_as(counts)
        visible = counts.masked_fill(mask, 0)
        found.append(latents(visible, session.name, Mask(mask, mask), encoder).cpu())
    return torch.cat(found).double().numpy()


def unobserved(session: Session, trials: np.ndarray) -> np.ndarray:
    """What was not observed in some trials, (K', 1, N) bool."""
    if session.observed is None:
        return np.zeros((len(trials), 1, session.n_neurons), dtype=bool)
    return ~session.observed[trials][:, None]


def forward_bins(n_bins: int) -> tuple[int, int]:
    """The bins that forward prediction hides: the last 10 %, at least one; (start, stop)."""
    return n_bins - max(1, round(0.1 * n_bins)), n_bins


def queries_of(task: str, session: Session, wanted: np.ndarray) -> Queries:
    """The queries of one of :data:`TASKS` that score the neurons ``wanted`` (N,) bool."""
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
    return Queries(each | (codes != codes[wanted][:, None]), each)  # intra-region


def selected(which: ArrayLike | None, n: int) -> np.ndarray:
    """What is selected of ``n`` by indices or a mask, (n,) bool; all by None."""
    found, places = np.zeros(n, dtype=bool), np.arange(n) if which is None else np.asarray(which)
    if places.dtype.kind not in "biu":
        problem = f"need indices or ({n},) bool, such as session.regions == 'CA1'"
        raise ValueError(f"neurons: {problem}; got {which!r}")
    found[places] = True
    return found


def predict_held_out(
    predictor: Predictors,
    session: Session,
    task: str,
    trials: np.ndarray | None = None,
    wanted: ArrayLike | None = None,
    *,
    split_seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Predict the scored entries of a task, each while it is hidden.

    Args:
        predictor, session, split_seed, batch_size, progress: as in :func:`mtm.evaluate`.
        task: one of :data:`TASKS`.
        trials: (K',) indices. Default: the test trials.
        wanted: neurons to score, indices or (N,) bool. Default: all.

    Returns:
        log-rates (K', T, N) float64, NaN where nothing is scored.
    """
    predictor = as_predictor(predictor, session)
    if trials is None:
        trials = choose_split(predictor, session, split_seed).test
    queries = queries_of(task, session, selected(wanted, session.n_neurons))
    asked = predictor, session, TASKS[task], np.asarray(trials), queries
    return predict_queries(*asked, batch_size=batch_size, progress=progress)


def oracle(session: Session) -> np.ndarray:
    """Log of the true rates, (K, T, N): the best possible predictor of a simulated session."""
    if session.rates is None:
        raise SessionError(f"session {session.name!r}, rates: only simulated sessions have them")
    return np.log(session.rates)


def mean_rates(session: Session, split_seed: int = 0) -> np.ndarray:
    """Log of each neuron's mean count over the training trials, (1, 1, N): the null predictor."""
    return metrics.log_mean(session.filled(session.split(split_seed).train))[None, None]
