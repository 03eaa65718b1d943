"""Behaviour from features, in the forms that the benchmark's scorer asks for.

Penalties are chosen by cross-validation within the trials to fit to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold

from mtm.decoding import CHOICE_PENALTIES, FOLDS, TRACE_PENALTIES, fitted

LOWEST = float(np.log(1e-9))  # of a log-rate or log-probability: that of 0 would be infinite


def decode_classes(
    x: np.ndarray, x_test: np.ndarray, labels: np.ndarray, n_classes: int
) -> np.ndarray:
    """Log-probabilities (K', n_classes) of classes, by logistic regression.

    Classes weigh equally, and the penalty is the one with the best balanced accuracy in
    cross-validation, since that is scored. A class that was never seen gets `LOWEST`.

    Args:
        x: features (K, F) of the trials to fit to.
        x_test: (K', F).
        labels: (K,) from 0 to n_classes - 1, of two or more classes, each twice or more often.
        n_classes: also of those not in ``labels``.
    """
    present, count = np.unique(labels, return_counts=True)
    solver = "newton-cholesky" if len(present) == 2 else "lbfgs"
    logistic = LogisticRegression(solver=solver, class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(min(FOLDS, count.min()), shuffle=True, random_state=0)
    grid = {"C": CHOICE_PENALTIES}
    search = GridSearchCV(logistic, grid, cv=folds, scoring="balanced_accuracy")
    search = fitted(search, x, labels)
    found = np.full((len(x_test), n_classes), LOWEST)
    found[:, search.classes_] = search.predict_log_proba(x_test).clip(min=LOWEST)
    return found


def decode_traces(
    x: np.ndarray, x_test: np.ndarray, values: np.ndarray, trusted: np.ndarray
) -> np.ndarray:
    """A trace (K', T), all samples at once, by ridge regression.

    Where a sample is not trusted, the mean of the others at its place stands for it; the penalty is
    the one with the least squared error of trusted samples in cross-validation.

    Args:
        x: features (K, F) of the trials to fit to.
        x_test: (K', F).
        values: (K, T).
        trusted: (K, T) bool.
    """
    known = np.where(trusted, values, 0.0).astype(np.float64)
    mean = known.sum(axis=0) / np.maximum(trusted.sum(axis=0), 1)
    filled = np.where(trusted, known, mean)
    error = np.zeros(len(TRACE_PENALTIES))
    for fit, held in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        for i, alpha in enumerate(TRACE_PENALTIES):
            guess = Ridge(alpha=alpha).fit(x[fit], filled[fit]).predict(x[held])
            error[i] += ((guess - filled[held]) ** 2)[trusted[held]].sum()
    best = TRACE_PENALTIES[error.argmin()]
    return Ridge(alpha=best).fit(x, filled).predict(x_test).reshape(len(x_test), -1)


def decode_counts(x: np.ndarray, x_test: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Log of the expected counts (K', T), all bins at once, by Poisson regression.

    The penalty is the one with the best likelihood in cross-validation. Predictions stay between
    half an event in all trials and one more than the largest count: the exponential of a line would
    leave these far behind in a trial unlike the others.

    Args:
        x: features (K, F) of the trials to fit to.
        x_test: (K', F).
        counts: (K, T).
    """
    counts = counts.astype(np.float64)
    bounds = np.log(0.5 / counts.size), np.log(counts.max() + 1.0)

    def guess(fit: Any, held: np.ndarray, penalties: np.ndarray) -> Iterator[np.ndarray]:
        for offset, weights in poisson_regressions(x[fit], counts[fit], penalties):
            yield (offset + held @ weights).clip(*bounds)

    penalties = TRACE_PENALTIES[::-1]
    loss = np.zeros(len(penalties))
    for fit, held in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        for i, found in enumerate(guess(fit, x[held], penalties)):
            loss[i] += (np.exp(found) - counts[held] * found).sum()
    *_, best = guess(slice(None), x_test, penalties[: loss.argmin() + 1])
    return best


def poisson_regressions(
    x: np.ndarray, counts: np.ndarray, penalties: Iterable[float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each penalty a, the weights W (F, T) of a Poisson regression.

    They minimise, for f = offset + x W::

        sum(exp(f) - counts * f) + a / 2 * sum(W ** 2)

    Each fit begins at the one before, so that falling penalties are quick. The offset (T,) is the
    log of the mean count of each bin, of which one without events has half of one.

    Args:
        x: (K, F), of mean 0.
        counts: (K, T).
        penalties: above 0.
    """
    offset = np.log(np.maximum(counts.sum(axis=0), 0.5) / len(counts))
    weights = np.zeros((x.shape[1], counts.shape[1]))

    def loss(flat: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        w = flat.reshape(weights.shape)
        f = (offset + x @ w).clip(max=20.0)  # a step too far: large, and still a number
        rate = np.exp(f)
        value = (rate - counts * f).sum() + penalty / 2 * (w**2).sum()
        return value, (x.T @ (rate - counts) + penalty * w).ravel()

    for penalty in penalties:
        found = minimize(loss, weights.ravel(), penalty, "L-BFGS-B", jac=True)
        weights = found.x.reshape(weights.shape)
        yield offset, weights
