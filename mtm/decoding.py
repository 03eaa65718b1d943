"""Behaviour from predicted activity: choice, and behaviours that vary within a trial.

A linear decoder reads the log-rates that a model predicts for every bin and neuron. Fitted on the
training and validation trials, with its penalty chosen by cross-validation there, it is scored on
the test trials. Source: arXiv 2407.14668, section 4, and the final version of the authors' code.

Beside every score stand its controls: what the score would be without activity (majority class,
mean time course), from the stimulus alone, from shuffled trials, from the raw counts, and from
counts smoothed in time as suits them best, which is what a user would try without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mtm.masks import Mask, scheme
from mtm.prediction import (
    Model,
    Predicts,
    call_predictor,
    checked_split_seed,
    in_batches,
    known_log_rates,
    predictor_of,
    require_finite,
    require_unseen,
    trials_at_once,
)
from mtm.session import Session, SessionError

FOLDS = 4
CHOICE_PENALTIES = np.logspace(-4, 4, 9)  # C of the logistic regression, as the paper
TRACE_PENALTIES = np.logspace(-3, 6, 10)  # alpha of the ridge regression
WIDTHS = (0, 1, 2, 4)  # bins, standard deviations of the Gaussians that smooth counts


@dataclass(frozen=True, repr=False)
class Decoded:
    """How well one behaviour was decoded.

    Attributes:
        behaviour: its name.
        session: whose it is.
        metric: ``"accuracy"`` or ``"R2"``.
        score: of the predicted activity, on the test trials.
        others: further scores and the controls, by name.
        n_train: trials the decoder was fitted on.
        n_test: trials it was scored on.
    """

    behaviour: str
    session: str
    metric: str
    score: float
    others: dict[str, float]
    n_train: int
    n_test: int

    def __repr__(self) -> str:
        others = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in self.others.items())
        return f"{self.behaviour}: {self.metric} {self.score:.3f} ({others})"

    def to_row(self, seed: int = 0) -> dict[str, Any]:
        """As the row of a table."""
        numbers = {self.metric: float(self.score), **self.others}
        trials = {"train_trials": self.n_train, "test_trials": self.n_test}
        return {"session": self.session, "seed": seed, **numbers, **trials}

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        row = self.to_row()
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def decode(
    predictor: Predicts,
    session: Session,
    behaviours: list[str] | None = None,
    *,
    region: str | None = None,
    split_seed: int | None = None,
    batch_size: int | None = None,
    allow_seen: bool = False,
) -> dict[str, Decoded]:
    """Decode choice and every behaviour that is recorded bin by bin.

    Where the session has a behaviour ``reaction-time-filter``, as recordings of the IBL have, only
    trials in which it is 1 are fitted and scored, as in the paper.

    Args:
        predictor: as in :func:`mtm.evaluate`.
        session: the recording.
        behaviours: names; default ``choice`` where known, and all behaviours of shape (K, T).
        region: let the predictor see this region only, and decode from its neurons.
        split_seed: of ``session.split``; default the one the model was trained with, else 0.
        batch_size, allow_seen: as in :func:`mtm.evaluate`.

    Returns:
        behaviour -> :class:`Decoded`.

    Raises:
        SessionError: for a behaviour or region that the session does not have, or too few trials.
        ValueError: for predictions of a wrong shape or with NaN, or test trials that the predictor
            was trained on.
    """
    options: dict[str, Any] = {"region": region, "split_seed": split_seed}
    options |= {"batch_size": batch_size, "allow_seen": allow_seen}
    results = {}
    for behaviour in decodable(session) if behaviours is None else behaviours:
        if behaviour == "choice":
            results[behaviour] = decode_choice(predictor, session, **options)
        else:
            results[behaviour] = decode_trace(predictor, session, behaviour, **options)
    return results


def decode_by_region(
    predictor: Predicts,
    session: Session,
    behaviour: str,
    *,
    split_seed: int | None = None,
    batch_size: int | None = None,
    allow_seen: bool = False,
    least: int = 1,
) -> dict[str, Decoded]:
    """Decode a behaviour from one region at a time: the predictor sees it alone (paper, Figure 5).

    Args:
        predictor, session, split_seed, batch_size, allow_seen: see :func:`decode`.
        behaviour: its name.
        least: neurons that a region must have.

    Returns:
        region -> :class:`Decoded`.

    Raises:
        SessionError: as :func:`decode`, and when no region has so many neurons.
    """
    names, sizes = np.unique(session.regions[session.region_codes >= 0], return_counts=True)
    regions = names[sizes >= least].tolist()
    if not regions:
        raise SessionError(f"session {session.name!r}: no region has {least} neurons")
    how: dict[str, Any] = {"split_seed": split_seed, "batch_size": batch_size}
    how |= {"allow_seen": allow_seen}
    return {
        region: decode(predictor, session, [behaviour], region=region, **how)[behaviour]
        for region in regions
    }


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
    batch_size: int | None = None,
    allow_seen: bool = False,
) -> Decoded:
    """Decode the animal's choice (-1 or +1; other values are left out) with logistic regression.

    Returns:
        accuracy; also ``balanced_accuracy``, and the controls ``majority`` (always say the more
        frequent choice), ``shuffled`` (fitted to shuffled choices), ``raw_counts`` (the same
        decoder on the counts themselves), ``smoothed_counts`` (on counts smoothed by the Gaussian
        that cross-validates best) and, where the contrast is known, ``stimulus_only`` with
        ``stimulus_only_balanced``.

    Arguments: see :func:`decode`; ``prompt`` is the scheme whose prompt the model is shown,
    by default that of ``neuron`` as in the paper, or of ``intra-region`` for one region.
    """
    prompt = prompt or ("neuron" if region is None else "intra-region")
    predictor = predictor_of(predictor, session.name)
    split_seed = checked_split_seed(predictor, session, split_seed, allow_seen)
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
    features = _Features(session, fit_trials, test_trials, region, prompt)
    x, x_test = features.of(predictor, batch_size, allow_seen)
    guess = _choice_search(x, y).predict(x_test)
    shuffled = _choice_search(x, np.random.default_rng(0).permutation(y)).predict(x_test)
    of_counts = features.from_counts(lambda x: _choice_search(x, y))
    majority = -1.0 if (y == -1).mean() > 0.5 else 1.0
    others = {
        "balanced_accuracy": balanced_accuracy_score(truth, guess),
        "majority": float((truth == majority).mean()),
        "shuffled": accuracy_score(truth, shuffled),
    }
    others |= {name: accuracy_score(truth, found) for name, found in of_counts.items()}
    if "contrast" in session.behaviour:
        stimulus = _stimulus(session)
        stimulus_guess = _choice_search(stimulus[fit_trials], y).predict(stimulus[test_trials])
        others["stimulus_only"] = accuracy_score(truth, stimulus_guess)
        others["stimulus_only_balanced"] = balanced_accuracy_score(truth, stimulus_guess)
    score = accuracy_score(truth, guess)
    return Decoded(
        "choice", session.name, "accuracy", score, others, len(fit_trials), len(test_trials)
    )


def _choice_search(x: np.ndarray, choices: np.ndarray) -> GridSearchCV:
    """Logistic regression of (K,) choices on features (K, F), the penalty cross-validated."""
    # Newton's line search complains of features that never vary, as the mean rates'.
    solver = "newton-cholesky" if np.ptp(x, axis=0).max() > 1e-9 else "lbfgs"
    logistic = LogisticRegression(solver=solver, max_iter=1000)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    grid = GridSearchCV(logistic, {"C": CHOICE_PENALTIES}, cv=folds, scoring="accuracy")
    return fitted(grid, x, choices)


def decode_trace(
    predictor: Predicts,
    session: Session,
    behaviour: str,
    *,
    prompt: str | None = None,
    region: str | None = None,
    split_seed: int | None = None,
    batch_size: int | None = None,
    allow_seen: bool = False,
) -> Decoded:
    """Decode a behaviour of shape (K, T), all bins at once, with ridge regression.

    Returns:
        R2 over all test trials and bins; the mean time course counts as explained variance, so
        compare with the control ``time_course``. Also ``shuffled`` (fitted to other trials'
        traces), ``raw_counts`` (the same decoder on the counts themselves) and ``smoothed_counts``
        (on counts smoothed by the Gaussian that cross-validates best).

    Arguments: see :func:`decode`; ``prompt`` is the scheme whose prompt the model is shown,
    by default that of ``causal`` as in the paper, or of ``intra-region`` for one region.
    """
    prompt = prompt or ("causal" if region is None else "intra-region")
    predictor = predictor_of(predictor, session.name)
    split_seed = checked_split_seed(predictor, session, split_seed, allow_seen)
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

    def search(x: np.ndarray, targets: np.ndarray) -> GridSearchCV:
        grid = {"alpha": TRACE_PENALTIES}
        error = "neg_mean_squared_error"
        return fitted(GridSearchCV(Ridge(), grid, cv=folds, scoring=error), x, targets)

    def r2(guess: np.ndarray) -> float:
        return r2_score(truth.ravel(), guess.ravel())

    features = _Features(session, fit_trials, test_trials, region, prompt)
    x, x_test = features.of(predictor, batch_size, allow_seen)
    others_traces = y[np.random.default_rng(0).permutation(len(y))]
    of_counts = features.from_counts(lambda x: search(x, y))
    others = {
        "time_course": r2(np.broadcast_to(y.mean(axis=0), truth.shape)),
        "shuffled": r2(search(x, others_traces).predict(x_test)),
    }
    others |= {name: r2(guess) for name, guess in of_counts.items()}
    score = r2(search(x, y).predict(x_test))
    return Decoded(behaviour, session.name, "R2", score, others, len(y), len(truth))


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


class _Features:
    """Features of the trials to fit and to test on; refuses test trials that were learned from."""

    def __init__(
        self,
        session: Session,
        fit_trials: np.ndarray,
        test_trials: np.ndarray,
        region: str | None,
        prompt: str,
    ) -> None:
        self.session, self.prompt = session, prompt
        self.fit, self.test = fit_trials, test_trials
        self.inside: np.ndarray = np.ones(session.n_neurons, dtype=bool)
        if region is not None:
            self.inside = session.regions == region
            if not self.inside.any():
                known = ", ".join(session.region_names) or "none"
                raise SessionError(
                    f"session {session.name!r} has no region {region!r}; known: {known}"
                )
        scheme(prompt)  # says what is wrong with it

    def of(
        self, predictor: Predicts, batch_size: int | None = None, allow_seen: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicted log-rates, (K', F) and (K'', F), in as many dimensions as are needed."""
        if not allow_seen:
            require_unseen(predictor, self.session, self.test)
        trials = np.concatenate([self.fit, self.test])
        if isinstance(predictor, np.ndarray):
            found = known_log_rates(predictor, self.session, trials)[:, :, self.inside]
        else:
            found = self._predicted(predictor, trials, batch_size)
        found = found.reshape(len(trials), -1).astype(np.float64)
        return principal_axes(found[: len(self.fit)], found[len(self.fit) :])

    def _predicted(
        self, predictor: Model, trials: np.ndarray, batch_size: int | None
    ) -> np.ndarray:
        """(K', T, N') log-rates of the neurons inside, when nothing else can be seen."""
        session, prompt = self.session, self.prompt
        device = getattr(predictor, "device", torch.device("cpu"))
        hidden = torch.from_numpy(~self.inside).to(device)
        found = np.empty((len(trials), session.n_bins, int(self.inside.sum())), np.float32)

        def make(start: int, stop: int) -> None:
            counts = session.counts[trials[start:stop]].astype(np.float32)
            counts = torch.from_numpy(counts).to(device)
            everywhere = hidden.expand(counts.shape)
            mask = Mask(everywhere, everywhere, scheme(prompt).causal)
            visible = counts.masked_fill(mask.hidden, 0)
            predicted = call_predictor(predictor, visible, prompt, mask, session.name)
            found[start:stop] = predicted[:, :, ~hidden].detach().float().cpu().numpy()

        size = trials_at_once(predictor, session.name) if batch_size is None else batch_size
        with tqdm(total=len(trials), disable=True) as bar:
            in_batches(make, len(trials), size, f"session {session.name!r}, decoding", bar)
        require_finite(found, prompt, session.name)
        return found

    def from_counts(self, search: Callable[[np.ndarray], GridSearchCV]) -> dict[str, np.ndarray]:
        """What a decoder finds in the counts: as they are, and smoothed as suits it best."""
        found = []
        for width in WIDTHS:
            smoothed = self.session.counts.astype(np.float64)
            if width:
                smoothed = gaussian_filter1d(smoothed, width, axis=1, mode="nearest")
            x, x_test = self.of(smoothed)
            fitted = search(x)
            found.append((fitted.best_score_, fitted.predict(x_test)))
        best = max(range(len(WIDTHS)), key=lambda i: found[i][0])
        return {"raw_counts": found[0][1], "smoothed_counts": found[best][1]}


def fitted(grid: GridSearchCV, x: np.ndarray, y: np.ndarray) -> GridSearchCV:
    """The search, done on one thread: in its many small problems several would wait for another."""
    with threadpool_limits(1):
        return grid.fit(x, y)


def principal_axes(x: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
