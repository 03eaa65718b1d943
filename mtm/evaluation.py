"""Evaluation: hide parts of the test trials, predict them, and score the predictions.

:func:`evaluate` scores the four activity tasks of :data:`mtm.prediction.TASKS` and decodes
behaviour. Source: arXiv 2407.14668, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logsumexp

from mtm import metrics, prediction
from mtm.decoding import Decoder, decodable
from mtm.inputs import SessionError, plain
from mtm.masks import SCHEMES, scheme
from mtm.prediction import TASKS, PredictorLike, Predictors, Queries
from mtm.report import Report, TaskScores
from mtm.session import Session
from mtm.validation import score_scheme

UNASKED = "decoded if `tasks` names it"
CONDITIONS = ("choice", "reward", "block")
"""Behaviours that make up a trial's condition in PSTH R2."""


def evaluate(
    predictor: Predictors,
    sessions: Session | Sequence[Session],
    *,
    tasks: Sequence[str] | None = None,
    trials: np.ndarray | None = None,
    neurons: np.ndarray | None = None,
    split_seed: int | None = None,
    batch_size: int | None = None,
    allow_seen: bool = False,
    progress: bool = False,
) -> Report:
    """Score a predictor on the activity tasks, and decode behaviour from its predictions.

    Args:
        predictor: a model or :class:`mtm.Fit`; a function ``(counts, scheme, mask, session) ->
            log-rates``; log-rates broadcastable to (K, T, N); or a mapping from session names.
        sessions: one recording or several. :class:`mtm.Sessions` are read from disk one by one.
        tasks: some of :data:`mtm.prediction.TASKS`, of masking schemes (such as one of yours: what
            it hides is scored), and of behaviours, which are left out for sessions that lack them.
            Default: all activity tasks and behaviours that can be scored.
        trials: indices of the scored trials, of one session only. Default: the test trials of
            ``session.split``. Behaviour is left out with other trials: :func:`mtm.decode` fits its
            decoders to all but the test trials.
        neurons: indices of the scored neurons, of one session only; all are in the input.
        split_seed: of ``session.split``, whose training trials make the honest null model.
            Default: the one that the predictor was trained with, else 0. Imported checkpoints,
            whose training trials are unknown, need it.
        batch_size: trials predicted at once; halved when memory runs out. Default: by the device.
        allow_seen: score trials that the model was trained on, instead of refusing them.
        progress: show a bar.

    Raises:
        ValueError: for an unknown task, predictions of a wrong shape or with NaN, or trials that
            the predictor was trained on.
        SessionError: when a task asked for cannot be scored, or the model knows other bins.
    """
    tasks = [tasks] if isinstance(tasks, str) else tasks
    seen = {"split_seed": split_seed, "allow_seen": allow_seen}
    how: dict[str, Any] = {"seen": seen, "batch_size": batch_size, "progress": progress}
    if isinstance(sessions, Session):
        return _evaluate(predictor, sessions, tasks, trials, neurons, **how)
    if trials is not None or neurons is not None:
        raise ValueError("trials and neurons are of one session; join reports with Report.join")
    if not (reports := list(_one_by_one(predictor, sessions, tasks, how))):
        raise ValueError("no session to evaluate")
    return Report.join(reports)


def _one_by_one(
    predictor: Predictors, sessions: Iterable[Session], tasks: Any, how: dict[str, Any]
) -> Iterator[Report]:
    """Evaluate several sessions, each read once; behaviours that one lacks are left out there."""
    names: set[str] = set()
    for session in sessions:
        if session.name in names:
            raise ValueError(f"two sessions have the name {session.name!r}; rename one")
        known = {*TASKS, *SCHEMES, *session.behaviour}
        missing = [task for task in tasks or () if task not in known]
        if missing and not names:  # a misspelt name is in no session: say so before any work
            _require_known(missing, {name for each in sessions for name in each.behaviour})
        names.add(session.name)
        able = None if tasks is None else [task for task in tasks if task not in missing]
        report = _evaluate(predictor, session, able, **how)
        left_out = report.left_out | dict.fromkeys(missing, "not recorded")
        report.left_out = {
            task: why if why == UNASKED else f"{session.name}: {why}"
            for task, why in left_out.items()
        }
        yield report


def _require_known(tasks: Iterable[str], behaviours: Iterable[str]) -> None:
    """Refuse names that are neither of a task nor of a behaviour."""
    known = dict.fromkeys([*TASKS, *SCHEMES, *behaviours])
    for task in [task for task in tasks if task not in known]:
        raise ValueError(f"unknown task {task!r}; pass a list of some of: {', '.join(known)}")


def _evaluate(
    predictor: Predictors,
    session: Session,
    tasks: Sequence[str] | None,
    trials: np.ndarray | None = None,
    neurons: np.ndarray | None = None,
    *,
    seen: dict[str, Any],
    **how: Any,
) -> Report:
    """Evaluate one session."""
    predictor = prediction.as_predictor(predictor, session)
    split = prediction.choose_split(predictor, session, **seen)
    trials = np.arange(session.n_trials)[split.test if trials is None else trials]
    wanted = prediction.selected(neurons, session.n_neurons)
    wanted &= ~prediction.unobserved(session, trials)[:, 0].all(axis=0)
    if len(trials) == 0 or not wanted.any():
        known = ", ".join(session.region_names) or "none"
        problem = f"no {'neurons' if len(trials) else 'trials'} to score"
        raise ValueError(f"session {session.name!r}: {problem}; its regions are: {known}")
    if not seen["allow_seen"]:
        prediction.require_unseen(predictor, session, trials)
    _require_known(tasks or (), session.behaviour)
    asked = [*TASKS, *decodable(session)] if tasks is None else tasks
    left_out = _unscorable(predictor, session, wanted, asked)
    if not np.array_equal(np.sort(trials), split.test):
        reason = "decoded in the test trials alone, which `trials` are not"
        left_out |= {task: reason for task in asked if task not in {**TASKS, **SCHEMES}}
    if tasks is not None and left_out:
        reasons = "; ".join(f"{task}: {why}" for task, why in left_out.items())
        raise SessionError(f"session {session.name!r}, {reasons}")
    scores: dict[str, TaskScores] = {}
    train_null = metrics.log_mean(session.filled(split.train))
    decoder = None
    for task in sorted([t for t in asked if t not in left_out], key=lambda t: t not in TASKS):
        if task in TASKS:
            queries = prediction.queries_of(task, session, wanted)
            given = predictor, session, TASKS[task], trials, queries
            log_rates = prediction.predict_queries(*given, **how)
            scores[task] = _score(log_rates, session, queries, trials, train_null)
            continue
        if task in SCHEMES and task not in session.behaviour:
            table = score_scheme(predictor, session, task, trials, wanted, train_null)
            scores[task] = TaskScores(table)
            continue
        try:
            decoder = decoder or Decoder(predictor, session, batch_size=how["batch_size"], **seen)
            decoded = decoder.decode(task)
            scores[task] = TaskScores(pd.DataFrame([decoded.to_dict()]), decoded.metric)
        except SessionError as error:
            if tasks is not None:
                raise
            left_out[task] = str(error)
    if tasks is None:
        left_out |= {name: UNASKED for name in session.behaviour if name not in asked}
    sizes = {"trials": len(trials), "neurons": session.n_neurons}
    return Report(scores, {session.name: sizes}, left_out)


def _unscorable(
    predictor: PredictorLike, session: Session, wanted: np.ndarray, tasks: Iterable[str]
) -> dict[str, str]:
    """Activity tasks that cannot be scored, and why."""
    reasons = {}
    schemes = getattr(predictor, "schemes", SCHEMES)
    for task in [task for task in tasks if task in {**TASKS, **SCHEMES}]:
        name = TASKS.get(task, task)
        if scheme(name).needs_regions and not (session.region_codes[wanted] >= 0).any():
            reasons[task] = "no scored neuron has a region label"
        elif name not in schemes:
            reasons[task] = f"the predictor is for {', '.join(schemes)} masking alone"
    return reasons


def _score(
    log_rates: np.ndarray, session: Session, queries: Queries, trials: np.ndarray, null: np.ndarray
) -> TaskScores:
    """Score the predictions (K', T, N) of a task, neuron by neuron, where it was observed."""
    hidden, scored, bins = queries
    # Neurons that could be seen; in forward prediction, whose first bins are visible, all of them.
    n_visible = (~hidden | (bins.start > 0)).sum(axis=1)[scored.argmax(axis=0)]
    known = {k: x for k in CONDITIONS if (x := plain(session.behaviour.get(k, 0))).ndim == 1}
    neurons = np.flatnonzero(scored.any(axis=0))
    seen = ~prediction.unobserved(session, trials)[:, 0]
    # Together: neurons that were observed in the same trials.
    patterns, group = np.unique(seen[:, neurons], axis=1, return_inverse=True)
    tables = []
    for i, pattern in enumerate(patterns.T):
        some, places = neurons[group == i], trials[pattern]
        predicted = log_rates[pattern][:, bins, some]
        counts = session.counts[places][:, bins, some]
        table = {
            "session": session.name,
            "seed": 0,
            "neuron": some,
            "region": session.regions[some],
            "bits_per_spike": metrics.bits_per_spike(predicted, counts),
            "bits_per_spike_train_null": metrics.bits_per_spike(predicted, counts, null[some]),
            "poisson_d2": metrics.poisson_d2(predicted, counts),
            "trial_r2": metrics.trial_r2(predicted, counts),
        }
        if known:
            conditions = pd.DataFrame({key: values[places] for key, values in known.items()})
            table["psth_r2"] = metrics.psth_r2(predicted, counts, conditions)
        table |= _shuffled(predicted, counts)
        table["gain"] = metrics.gain(predicted, counts)
        table["gain_train_null"] = metrics.gain(predicted, counts, null[some])
        table["spikes"] = counts.sum(axis=(0, 1), dtype=np.int64)
        tables.append(pd.DataFrame(table | {"visible": n_visible[some]}))
    return TaskScores(pd.concat(tables).sort_values("neuron", ignore_index=True))


def _shuffled(log_rates: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Bits per spike when each trial, or each neuron, gets the prediction of another one."""
    rng = np.random.default_rng(0)
    n_trials, _, n_neurons = counts.shape
    # Each one's successor in a random circle, so that none stays in its place.
    orders = rng.permutation(n_trials), rng.permutation(n_neurons)
    trials, others = (np.roll(order, 1)[np.argsort(order)] for order in orders)
    # Each neuron keeps its own predicted mean rate.
    mean = logsumexp(log_rates, axis=(0, 1))
    scaled = log_rates[:, :, others] - mean[others] + mean
    none = np.full(n_neurons, np.nan)
    by_trial = metrics.bits_per_spike(log_rates[trials], counts) if n_trials > 1 else none
    by_neuron = metrics.bits_per_spike(scaled, counts) if n_neurons > 1 else none
    return {"shuffled_trials": by_trial, "shuffled_neurons": by_neuron}
