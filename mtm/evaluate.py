"""The four activity tasks: hide part of the test trials, predict it, score the prediction.

==================  ======================================================  ==================
task                hidden                                                  scored
==================  ======================================================  ==================
co-smoothing        one neuron at a time                                    it, all bins
forward-prediction  the last 10 % of the bins, all neurons                  those bins
inter-region        each region in turn                                     its neurons
intra-region        all outside a region, and one of its neurons at a time  it, all bins
==================  ======================================================  ==================

Source: arXiv 2407.14668, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtm import metrics
from mtm.predict import (
    TASKS,
    Predicts,
    checked_split_seed,
    forward_bins,
    predict_held_out,
    queries_of,
)
from mtm.report import Report, TaskScores
from mtm.session import Session, SessionError

CONDITIONS = ("choice", "reward", "block")
"""Behaviours that make up a trial's condition in PSTH R2."""


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
        hidden, scored, bins = queries_of(task, session, wanted)
        hidden = hidden & (bins[0] == 0)  # in forward prediction, all are visible at first
        visible = scored.T @ (~hidden).sum(axis=1)  # (N,): each neuron is scored in one query
        scores[task] = _score(log_rates, session, task, trials, train_null, scored.any(0), visible)
    return Report(session.name, len(trials), scores, left_out)


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
