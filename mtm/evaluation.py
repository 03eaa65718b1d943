"""Hide parts of the test trials, predict them, score the predictions: the six tasks of `mtm.prediction`.

Source: arXiv 2407.14668, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import logsumexp

from mtm import metrics
from mtm.decoding import decodable, decode
from mtm.prediction import (
    TASKS,
    Predicts,
    checked_split_seed,
    predict_held_out,
    predictor_of,
    queries_of,
    require_unseen,
)
from mtm.report import Report, TaskScores
from mtm.session import Session, SessionError

CONDITIONS = ("choice", "reward", "block")
"""Behaviours that make up a trial's condition in PSTH R2."""


def evaluate(
    predictor: Predicts | Mapping[str, Predicts],
    session: Session | Sequence[Session],
    *,
    tasks: Sequence[str] | None = None,
    trials: np.ndarray | None = None,
    neurons: np.ndarray | None = None,
    split_seed: int | None = None,
    batch_size: int | None = None,
    allow_seen: bool = False,
    progress: bool = False,
) -> Report:
    """Score a predictor on the activity tasks, and decode behaviour from what it predicts.

    Args:
        predictor: a model; a function ``(counts, scheme, mask, session) -> log-rates``; or
            log-rates for the whole session, broadcastable to (K, T, N). A mapping from session
            names has one for each.
        session: the recording, or several, one after the other: :class:`mtm.Sessions` are read
            from disk in turn.
        tasks: some of :data:`mtm.prediction.TASKS`, and names of behaviours. Default: all that the
            session and the predictor allow. Of several sessions, those that lack a behaviour are
            left out there.
        trials: indices of the scored trials. Default: the test trials of ``session.split``.
            Of one session only; behaviours are always decoded in test trials (see :func:`decode`).
        neurons: indices of the scored neurons. All neurons stay in the input. Default: all. Of one
            session only.
        split_seed: of ``session.split``; its training trials make the honest null model. Default:
            the one that the model was trained with, else 0.
        batch_size: trials predicted at once. Default: what suits the device. Where memory runs out
            it is halved, and evaluation goes on from there.
        allow_seen: score trials that the model has learned from, instead of refusing them.
        progress: show a bar.

    Returns:
        tables of scores; regional tasks score labelled neurons only. Reports of models of other
        seeds are joined by :meth:`Report.join`.

    Raises:
        ValueError: for an unknown task, predictions of a wrong shape or with NaN, or trials that
            the predictor was trained on.
        SessionError: when a task that was asked for needs regions and there are none, or the bins
            are not those the model was trained on.
        MemoryError: when memory runs out with a single trial.
        TypeError: when ``session`` is no Session.
    """
    if isinstance(tasks, str):
        raise ValueError(f"tasks must be a list of names, got {tasks!r}; pass [{tasks!r}]")
    how: dict[str, Any] = {"trials": trials, "neurons": neurons, "split_seed": split_seed}
    how |= {"batch_size": batch_size, "allow_seen": allow_seen, "progress": progress}
    if isinstance(session, Session):
        return _evaluate(predictor_of(predictor, session.name), session, tasks, **how)
    if isinstance(session, str) or not isinstance(session, Sequence):
        raise TypeError(
            f"evaluate(predictor, session) needs a Session, got {type(session).__name__}"
        )
    names = [one.name for one in session]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"sessions must be one or more, with different names; got {names}")
    if trials is not None or neurons is not None:
        raise ValueError(
            "trials and neurons are of one session; evaluate the sessions one by one, and join "
            "their reports with Report.join"
        )
    return Report.join(_one_by_one(predictor, session, tasks, how))


def _one_by_one(
    predictor: Predicts | Mapping[str, Predicts],
    sessions: Sequence[Session],
    tasks: Sequence[str] | None,
    how: Mapping[str, Any],
) -> list[Report]:
    """Reports of several sessions; what one of them lacks is left out there."""
    known = {task for one in sessions for task in decodable(one)}
    reports = []
    for one in sessions:
        able = [t for t in tasks or () if t in TASKS or t in decodable(one) or t not in known]
        mine = predictor_of(predictor, one.name)
        report = _evaluate(mine, one, None if tasks is None else able, **how)
        report.left_out |= {t: "not recorded" for t in tasks or () if t not in able}
        report.left_out = {task: f"{one.name}: {why}" for task, why in report.left_out.items()}
        reports.append(report)
    return reports


def _evaluate(
    predictor: Predicts,
    session: Session,
    tasks: Sequence[str] | None,
    *,
    trials: np.ndarray | None,
    neurons: np.ndarray | None,
    split_seed: int | None,
    batch_size: int | None,
    allow_seen: bool,
    progress: bool,
) -> Report:
    """One session."""
    split_seed = checked_split_seed(predictor, session, split_seed, allow_seen)
    split = session.split(split_seed)
    trials = np.arange(session.n_trials)[split.test if trials is None else trials]
    wanted = np.zeros(session.n_neurons, dtype=bool)
    if np.asarray(neurons).dtype.kind == "U":
        raise ValueError(
            f"neurons are indices, got {neurons!r}; of a region they are "
            "np.flatnonzero(session.regions == 'CA1')"
        )
    wanted[slice(None) if neurons is None else neurons] = True
    if len(trials) == 0 or not wanted.any():
        raise ValueError(
            f"session {session.name!r}: no {'neurons' if len(trials) else 'trials'} to score; its "
            f"regions are: {', '.join(session.region_names) or 'none'}"
        )
    if not allow_seen:
        require_unseen(predictor, session, trials)
    left_out = _cannot(predictor, session, wanted, tasks)
    scores = {}
    train_null = metrics.log_mean(session.counts[split.train])
    for task in [t for t in (TASKS if tasks is None else tasks) if t in TASKS]:
        if task not in left_out:
            log_rates = predict_held_out(
                predictor, session, task, trials, wanted, batch_size=batch_size, progress=progress
            )
            scores[task] = _score(log_rates, session, task, trials, train_null, wanted)
    for name in [t for t in (decodable(session) if tasks is None else tasks) if t not in TASKS]:
        try:
            found = decode(
                predictor,
                session,
                [name],
                split_seed=split_seed,
                batch_size=batch_size,
                allow_seen=allow_seen,
            )[name]
            scores[name] = TaskScores(
                {key: np.array([value]) for key, value in found.to_row().items()}, found.metric
            )
        except SessionError as error:
            if tasks is not None:
                raise
            left_out[name] = str(error)
    sizes = {"trials": len(trials), "neurons": session.n_neurons}
    return Report(scores, {session.name: sizes}, left_out)


def _cannot(
    predictor: Predicts, session: Session, wanted: np.ndarray, tasks: Sequence[str] | None
) -> dict[str, str]:
    """Tasks that cannot be scored -> why; raises where they were asked for."""
    left_out = {}
    able = getattr(predictor, "schemes", None)
    for task in TASKS if tasks is None else tasks:
        if task not in TASKS and task not in session.behaviour:
            known = ", ".join([*TASKS, *decodable(session)])
            raise ValueError(f"unknown task {task!r}; pass a list of some of: {known}")
        if task.endswith("region") and not (session.region_codes[wanted] >= 0).any():
            left_out[task] = "no scored neuron has a region label"
        elif task in TASKS and able is not None and TASKS[task] not in able:
            left_out[task] = "the predictor does not do it"
    if tasks is not None and left_out:
        raise SessionError(
            f"session {session.name!r}, {', '.join(left_out)}: "
            f"{' and '.join(dict.fromkeys(left_out.values()))}; pass regions, or leave the task out"
        )
    return left_out


def _score(
    log_rates: np.ndarray,
    session: Session,
    task: str,
    trials: np.ndarray,
    train_null: np.ndarray,
    wanted: np.ndarray,
) -> TaskScores:
    hidden, scored, bins = queries_of(task, session, wanted)
    hidden = hidden & (bins[0] == 0)  # in forward prediction, all are visible at first
    visible = scored.T @ (~hidden).sum(axis=1)  # (N,): each neuron is scored in one query
    neurons = np.flatnonzero(scored.any(axis=0))
    predicted = log_rates[:, slice(*bins)][:, :, neurons]
    counts = session.counts[trials][:, slice(*bins)][:, :, neurons]
    null = train_null[neurons]
    table = {
        "session": np.full(len(neurons), session.name),
        "seed": np.zeros(len(neurons), dtype=np.int64),
        "neuron": neurons,
        "region": session.regions[neurons],
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
    table |= _shuffled(predicted, counts)
    table["gain"] = metrics.gain(predicted, counts)
    table["gain_train_null"] = metrics.gain(predicted, counts, null)
    table["spikes"] = counts.sum(axis=(0, 1), dtype=np.int64)
    table["visible"] = visible[neurons]
    return TaskScores(table)


def _shuffled(log_rates: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Bits per spike when each trial, or each neuron, is given the prediction of another one."""
    rng = np.random.default_rng(0)

    def other(n: int) -> np.ndarray:
        """A permutation that leaves nothing in its place, but for n = 1."""
        order = rng.permutation(n)
        partner = np.empty(n, dtype=np.int64)
        partner[order] = np.roll(order, 1)
        return partner

    n_trials, _, n_neurons = counts.shape
    scores = {}
    nothing = np.full(n_neurons, np.nan)
    trials = metrics.bits_per_spike(log_rates[other(n_trials)], counts)
    scores["shuffled_trials"] = trials if n_trials > 1 else nothing
    mean = logsumexp(log_rates, axis=(0, 1))  # of each neuron, as predicted, but for a constant
    foreign = other(n_neurons)
    scaled = log_rates[:, :, foreign] - mean[foreign] + mean
    neurons = metrics.bits_per_spike(scaled, counts)
    scores["shuffled_neurons"] = neurons if n_neurons > 1 else nothing
    return scores
