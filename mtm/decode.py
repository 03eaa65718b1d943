"""Behaviour from predicted activity: choice, and behaviours that vary within a trial.

A linear decoder reads the log-rates that a model predicts for every bin and neuron. Fitted on the
training and validation trials, with its penalty chosen by cross-validation there, it is scored on
the test trials. Source: arXiv 2407.14668, section 4, and the final version of the authors' code.

Beside every score stand its controls: what the score would be without activity (majority class,
mean time course), from the stimulus alone, from shuffled trials, and from the raw counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold

from mtm.masks import Mask, scheme
from mtm.predict import Predicts, call_predictor, checked_split_seed, require_finite
from mtm.session import Session, SessionError

FOLDS = 4
CHOICE_PENALTIES = np.logspace(-4, 4, 9)  # C of the logistic regression, as the paper
TRACE_PENALTIES = np.logspace(-1, 6, 8)  # alpha of the ridge regression


@dataclass(frozen=True, repr=False)
class Decoded:
    """How well one behaviour was decoded.

    Attributes:
        behaviour: its name.
        metric: ``"accuracy"`` or ``"R2"``.
        score: of the predicted activity, on the test trials.
        others: further scores and the controls, by name.
        n_train: trials the decoder was fitted on.
        n_test: trials it was scored on.
    """

    behaviour: str
    metric: str
    score: float
    others: dict[str, float]
    n_train: int
    n_test: int

    def __repr__(self) -> str:
        others = ", ".join(f"{key} {value:.3f}" for key, value in self.others.items())
        return f"{self.behaviour}: {self.metric} {self.score:.3f} ({others})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        rounded = {key: round(float(value), 6) for key, value in self.others.items()}
        return (
            {self.metric: round(float(self.score), 6)}
            | rounded
            | {
                "train_trials": self.n_train,
                "test_trials": self.n_test,
            }
        )


def decode(
    predictor: Predicts,
    session: Session,
    *,
    behaviours: list[str] | None = None,
    region: str | None = None,
    split_seed: int | None = None,
) -> dict[str, Decoded]:
    """Decode choice and every behaviour that is recorded bin by bin.

    Args:
        predictor: as in :func:`mtm.evaluate.evaluate`.
        session: the recording.
        behaviours: names; default ``choice`` where known, and all behaviours of shape (K, T).
        region: let the predictor see this region only, and decode from its neurons.
        split_seed: of ``session.split``; default the one the model was trained with, else 0.

    Returns:
        behaviour -> :class:`Decoded`.

    Raises:
        SessionError: for a behaviour or region that the session does not have, or too few trials.
    """
    options = {"region": region, "split_seed": split_seed}
    results = {}
    for behaviour in decodable(session) if behaviours is None else behaviours:
        if behaviour == "choice":
            results[behaviour] = decode_choice(predictor, session, **options)
        else:
            results[behaviour] = decode_trace(predictor, session, behaviour, **options)
    return results


def decodable(session: Session) -> list[str]:
    """Behaviours that can be decoded: ``choice`` where known, and those recorded bin by bin."""
    traces = sorted(key for key, value in session.behaviour.items() if value.ndim == 2)
    return ["choice"] * ("choice" in session.behaviour) + traces


def decode_choice(
    predictor: Predicts,
    session: Session,
    *,
    prompt: str | None = None,
    region: str | None = None,
    split_seed: int | None = None,
) -> Decoded:
    """Decode the animal's choice (-1 or +1; other values are left out) with logistic regression.

    Returns:
        accuracy; also ``balanced_accuracy``, and the controls ``majority`` (always say the more
        frequent choice), ``shuffled`` (fitted to shuffled choices), ``raw_counts`` (the same
        decoder on the counts themselves) and, where the contrast is known, ``stimulus_only``.

    Arguments: see :func:`decode`; ``prompt`` is the scheme whose prompt the model is shown,
    by default that of ``neuron`` as in the paper, or of ``intra-region`` for one region.
    """
    prompt = prompt or ("neuron" if region is None else "intra-region")
    split_seed = checked_split_seed(predictor, session, split_seed)
    choice = _behaviour(session, "choice", (session.n_trials,))
    if set(np.unique(choice[~np.isnan(choice)])) == {0, 1}:
        raise SessionError(
            f"session {session.name!r}, behaviour 'choice': -1 and +1 are the two choices and 0 is "
            "none, but the values are 0 and 1; pass 2 * choice - 1"
        )
    fit_trials, test_trials = _trials(session, np.isin(choice, (-1, 1)), split_seed)
    y, truth = choice[fit_trials], choice[test_trials]
    least = min((y == -1).sum(), (y == 1).sum())
    if least < FOLDS:
        raise SessionError(
            f"session {session.name!r}: only {least} training trials of the rarer choice, "
            f"{FOLDS} are needed to cross-validate"
        )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    logistic = LogisticRegression(solver="newton-cholesky", max_iter=1000)

    def decoded(x: np.ndarray, x_test: np.ndarray, labels: np.ndarray) -> np.ndarray:
        search = GridSearchCV(logistic, {"C": CHOICE_PENALTIES}, cv=folds, scoring="accuracy")
        return search.fit(x, labels).predict(x_test)

    trials = np.concatenate([fit_trials, test_trials])
    n_fit = len(fit_trials)
    features = _features(predictor, session, trials, prompt, region)
    x, x_test = rotate(features[:n_fit], features[n_fit:])
    guess = decoded(x, x_test, y)
    shuffled = decoded(x, x_test, np.random.default_rng(0).permutation(y))
    raw = _features(None, session, trials, prompt, region)
    majority = -1.0 if (y == -1).mean() > 0.5 else 1.0
    others = {
        "balanced_accuracy": balanced_accuracy_score(truth, guess),
        "majority": float((truth == majority).mean()),
        "shuffled": accuracy_score(truth, shuffled),
        "raw_counts": accuracy_score(truth, decoded(*rotate(raw[:n_fit], raw[n_fit:]), y)),
    }
    if "contrast" in session.behaviour:
        stimulus = _stimulus(session)
        stimulus_guess = decoded(stimulus[fit_trials], stimulus[test_trials], y)
        others["stimulus_only"] = accuracy_score(truth, stimulus_guess)
        others["stimulus_only_balanced"] = balanced_accuracy_score(truth, stimulus_guess)
    score = accuracy_score(truth, guess)
    return Decoded("choice", "accuracy", score, others, n_fit, len(test_trials))


def decode_trace(
    predictor: Predicts,
    session: Session,
    behaviour: str,
    *,
    prompt: str | None = None,
    region: str | None = None,
    split_seed: int | None = None,
) -> Decoded:
    """Decode a behaviour of shape (K, T), all bins at once, with ridge regression.

    Returns:
        R2 over all test trials and bins; the mean time course counts as explained variance, so
        compare with the control ``time_course``. Also ``shuffled`` (fitted to other trials' traces)
        and ``raw_counts`` (the same decoder on the counts themselves).

    Arguments: see :func:`decode`; ``prompt`` is the scheme whose prompt the model is shown,
    by default that of ``causal`` as in the paper, or of ``intra-region`` for one region.
    """
    prompt = prompt or ("causal" if region is None else "intra-region")
    split_seed = checked_split_seed(predictor, session, split_seed)
    traces = _behaviour(session, behaviour, (session.n_trials, session.n_bins))
    fit_trials, test_trials = _trials(session, np.isfinite(traces).all(axis=1), split_seed)
    if len(fit_trials) < 2 * FOLDS:
        raise SessionError(
            f"session {session.name!r}, behaviour {behaviour!r}: {len(fit_trials)} training trials "
            f"without NaN, {2 * FOLDS} are needed to cross-validate"
        )
    y, truth = traces[fit_trials], traces[test_trials]
    if np.ptp(truth) == 0:
        raise SessionError(
            f"session {session.name!r}, behaviour {behaviour!r} does not vary in the test trials"
        )
    folds = KFold(FOLDS, shuffle=True, random_state=0)

    def r2(x: np.ndarray, x_test: np.ndarray, targets: np.ndarray) -> float:
        search = GridSearchCV(
            Ridge(), {"alpha": TRACE_PENALTIES}, cv=folds, scoring="neg_mean_squared_error"
        )
        return r2_score(truth.ravel(), search.fit(x, targets).predict(x_test).ravel())

    trials = np.concatenate([fit_trials, test_trials])
    n_fit = len(fit_trials)
    features = _features(predictor, session, trials, prompt, region)
    x, x_test = rotate(features[:n_fit], features[n_fit:])
    raw = _features(None, session, trials, prompt, region)
    average = np.broadcast_to(y.mean(axis=0), truth.shape)
    others = {
        "time_course": r2_score(truth.ravel(), average.ravel()),
        "shuffled": r2(x, x_test, y[np.random.default_rng(0).permutation(n_fit)]),
        "raw_counts": r2(*rotate(raw[:n_fit], raw[n_fit:]), y),
    }
    return Decoded(behaviour, "R2", r2(x, x_test, y), others, n_fit, len(test_trials))


def _behaviour(session: Session, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A behaviour as floats; raises where there is none of this name and shape."""
    if name not in session.behaviour:
        known = ", ".join(session.behaviour) or "none"
        raise SessionError(f"session {session.name!r} has no behaviour {name!r}; it has: {known}")
    values = np.asarray(session.behaviour[name], dtype=np.float64)
    if values.shape != shape:
        raise SessionError(
            f"session {session.name!r}, behaviour {name!r} has shape {values.shape}; to be decoded "
            f"this way it needs {shape}"
        )
    return values


def _trials(session: Session, usable: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Trials to fit and to test on; those that fail the reaction-time filter are left out."""
    if "reaction-time-filter" in session.behaviour:
        usable = usable & (session.behaviour["reaction-time-filter"] == 1)
    split = session.split(seed)
    fit_trials = np.concatenate([split.train, split.val])
    fit_trials, test_trials = fit_trials[usable[fit_trials]], split.test[usable[split.test]]
    if len(test_trials) == 0:
        raise SessionError(f"session {session.name!r}: no usable test trial for this behaviour")
    return fit_trials, test_trials


def _features(
    predictor: Predicts | None,
    session: Session,
    trials: np.ndarray,
    prompt: str,
    region: str | None,
) -> np.ndarray:
    """Predicted log-rates, or the counts where there is no predictor, flattened; (K', T * N)."""
    causal = scheme(prompt).causal
    inside = np.ones(session.n_neurons, dtype=bool)
    if region is not None:
        inside = session.regions == region
        if not inside.any():
            known = ", ".join(session.region_names) or "none"
            raise SessionError(f"session {session.name!r} has no region {region!r}; known: {known}")
    if predictor is None:
        features = session.counts[trials]
    elif isinstance(predictor, np.ndarray):
        features = np.broadcast_to(predictor, session.counts.shape)[trials]
    else:
        device = getattr(predictor, "device", torch.device("cpu"))
        hidden = torch.from_numpy(~inside).to(device)
        parts = []
        for part in np.split(trials, range(256, len(trials), 256)):
            counts = torch.from_numpy(session.counts[part].astype(np.float32)).to(device)
            mask = Mask(*[hidden.expand(counts.shape)] * 2, causal=causal)
            visible = counts.masked_fill(mask.hidden, 0)
            predicted = call_predictor(predictor, visible, prompt, mask, session.name)
            parts.append(predicted.cpu().numpy())
        features = np.concatenate(parts)
        require_finite(features[:, :, inside], prompt, session.name)
    return features[:, :, inside].reshape(len(trials), -1).astype(np.float64)


def rotate(x: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same features in as many dimensions as there are training trials.

    Decoders with a squared penalty and a free intercept only use inner products of centred
    features, so projecting on the training trials' principal axes changes no prediction: it turns
    T * N columns into at most K and makes cross-validation quick.
    """
    mean = x.mean(axis=0)
    _, singular, axes = np.linalg.svd(x - mean, full_matrices=False)
    keep = singular > 1e-9 * singular.max()
    keep[0] = True  # features that never vary are one column of zeros
    axes = axes[keep]
    return (x - mean) @ axes.T, (x_test - mean) @ axes.T


def _stimulus(session: Session) -> np.ndarray:
    """What the animal was shown: contrast, its side, and the block's prior where known; (K, C)."""
    contrast = np.asarray(session.behaviour["contrast"], dtype=np.float64)
    columns = [contrast, np.sign(contrast)]
    if "block" in session.behaviour:
        columns.append(np.asarray(session.behaviour["block"], dtype=np.float64))
    return np.nan_to_num(np.stack(columns, axis=1))
