"""Behaviour from predicted activity: the choice, and behaviours recorded bin by bin.

A linear decoder reads the log-rates that a model predicts for every bin and neuron, or the model's
latents, whichever cross-validates better. It is fitted
on the training and validation trials, its penalty is chosen by cross-validation there, and it is
scored on the test trials. Source: arXiv 2407.14668, section 4, and the authors' final code.

Controls are the scores without activity, from the stimulus alone, from shuffled trials, from the
raw counts, and from counts smoothed by the Gaussian that cross-validates best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import joblib
import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from threadpoolctl import threadpool_limits

from mtm.prediction import (
    PredictorLike,
    Queries,
    as_predictor,
    choose_split,
    has_latents,
    predict_latents,
    predict_queries,
    require_unseen,
)
from mtm.session import Session, SessionError

FOLDS = 4
CHOICE_PENALTIES = np.logspace(-4, 4, 9)  # C of the logistic regression, as the paper
TRACE_PENALTIES = np.logspace(-3, 6, 10)  # alpha of the ridge regression
WIDTHS = (0, 1, 2, 4)  # bins, standard deviations of the Gaussians that smooth counts
_CONTROLS: dict[str, dict[str, float]] = {}  # cache: hash of the data -> scores of the controls


Source = tuple[str, Any]
"""What a decoder reads: see :meth:`Decoder.features`."""


@dataclass(frozen=True, repr=False)
class Decoded:
    """How well one behaviour was decoded."""

    behaviour: str
    session: str
    metric: str  # "accuracy" or "R2"
    score: float  # of the predicted activity, on the test trials
    others: dict[str, float]  # further scores and the controls, by name
    features: str  # what the decoder read: "rates" or "latents"
    n_train: int  # trials the decoder was fitted on
    n_test: int  # trials it was scored on

    def __repr__(self) -> str:
        others = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in self.others.items())
        return f"{self.behaviour} from {self.features}: {self.metric} {self.score:.3f} ({others})"

    def to_dict(self) -> dict[str, Any]:
        """The scores as a row of a table."""
        row = {"session": self.session, "seed": 0, self.metric: self.score, **self.others}
        row |= {"train_trials": self.n_train, "test_trials": self.n_test}
        return row | {"from_latents": float(self.features == "latents")}


def decode(
    predictor: PredictorLike | Mapping[str, PredictorLike],
    session: Session,
    behaviours: str | Sequence[str] | None = None,
    *,
    region: str | None = None,
    prompt: str | None = None,
    features: str | None = None,
    split_seed: int | None = None,
    batch_size: int | None = None,
    allow_seen: bool = False,
) -> dict[str, Decoded]:
    """Decode the choice and behaviours that are recorded bin by bin.

    The choice (-1 or +1; trials with other values are left out) is decoded with logistic
    regression. Its score is the accuracy; further scores are ``balanced_accuracy`` and the
    controls ``majority`` (the more frequent choice), ``shuffled`` (fitted to shuffled choices),
    ``raw_counts``, ``smoothed_counts`` and, where the contrast is known, ``stimulus_only`` with
    ``stimulus_only_balanced``.

    A behaviour of shape (K, T) is decoded with ridge regression, all bins at once. Its score is
    the R2 over all test trials and bins. The mean time course counts as explained variance, so
    compare it with the control ``time_course``; the others are as for the choice.

    All trials with a known behaviour are used. The paper decodes only those with a valid reaction
    time, as sessions loaded by ``ibl.load_session(..., trial_filter="reaction-time")``.

    Args:
        predictor: as in :func:`mtm.evaluate`.
        session: the recording.
        behaviours: a name or several. Default: ``choice`` where known, and all of shape (K, T).
        region: show the predictor this region only, and decode from its neurons.
        prompt: masking scheme whose prompt a model gets. Default, as in the paper: "neuron" for
            the choice, "causal" for behaviours of shape (K, T), "intra-region" with ``region``.
        features: what the decoder reads: the predicted log-"rates" (the paper), the model's
            "latents" (:meth:`mtm.MtM.latents`, smoothed by a Gaussian of cross-validated width), or
            "auto", whichever cross-validates better on training and validation trials. Default:
            "auto" for models with latents of the population, else "rates".
        split_seed: of ``session.split``. Default: the one the model was trained with, else 0.
        batch_size, allow_seen: as in :func:`mtm.evaluate`.

    Returns:
        behaviour -> :class:`Decoded`.

    Raises:
        SessionError: for an unknown behaviour or region, or too few trials.
        ValueError: for an unknown prompt, predictions of a wrong shape or with NaN, or test trials
            that the predictor was trained on.
    """
    if features not in (None, "auto", "rates", "latents"):
        raise ValueError(f"features must be 'rates', 'latents' or 'auto', got {features!r}")
    options = region, prompt, features, split_seed, batch_size, allow_seen
    decoder = Decoder(as_predictor(predictor, session), session, *options)
    names = decodable(session) if behaviours is None else behaviours
    names = [names] if isinstance(names, str) else names
    return {name: decoder.decode(name) for name in names}


def decode_by_region(
    predictor: PredictorLike | Mapping[str, PredictorLike],
    session: Session,
    behaviour: str,
    *,
    least: int = 1,
    **options: Any,
) -> dict[str, Decoded]:
    """Decode a behaviour from one region at a time: the predictor sees it alone (paper, Figure 5).

    Args:
        predictor, session, behaviour: as in :func:`decode`, whose other arguments are ``options``.
        least: smallest number of neurons of a region.

    Returns:
        region -> :class:`Decoded`.
    """
    names, sizes = np.unique(session.regions[session.region_codes >= 0], return_counts=True)
    if not (sizes >= least).any():
        raise SessionError(f"session {session.name!r}: no region has {least} neurons")
    return {
        region: decode(predictor, session, behaviour, region=region, **options)[behaviour]
        for region in names[sizes >= least].tolist()
    }


def decodable(session: Session) -> list[str]:
    """Behaviours that can be decoded: ``choice`` where known, and those recorded bin by bin."""
    traces = sorted(key for key, value in session.behaviour.items() if value.ndim == 2)
    return ["choice"] * ("choice" in session.behaviour) + traces


@dataclass
class Decoder:
    """Decodes behaviours of one session; activity is predicted once for each prompt.

    Arguments: see :func:`decode`; the predictor is what :func:`as_predictor` returns.
    """

    predictor: PredictorLike
    session: Session
    region: str | None = None
    prompt: str | None = None
    features_from: str | None = None
    split_seed: int | None = None
    batch_size: int | None = None
    allow_seen: bool = False

    def __post_init__(self) -> None:
        session = self.session
        split = choose_split(self.predictor, session, self.split_seed, allow_seen=self.allow_seen)
        self.trials = np.concatenate(split)  # (K,) training, validation, then test trials
        self.is_test = np.isin(self.trials, split.test)
        if not self.allow_seen:
            require_unseen(self.predictor, session, split.test)
        whole = self.region is None
        self.inside = np.ones(session.n_neurons, bool) if whole else session.regions == self.region
        if not self.inside.any():
            known = f"known: {', '.join(session.region_names) or 'none'}"
            raise SessionError(f"session {session.name!r} has no region {self.region!r}; {known}")
        self.features_from = self.features_from or (
            "auto" if has_latents(self.predictor) else "rates"
        )
        self._features: dict[tuple[Source, bytes], tuple[np.ndarray, np.ndarray]] = {}

    def decode(self, behaviour: str) -> Decoded:
        """Decode one behaviour: see :func:`decode`."""
        choice = behaviour == "choice"
        usable, y, truth = self._values(behaviour)
        default = "intra-region" if self.region else "neuron" if choice else "causal"
        prompt = self.prompt or default
        sources: list[Source] = [("rates", prompt)] if self.features_from != "latents" else []
        sources += [("latents", w) for w in WIDTHS] if self.features_from != "rates" else []
        fits = [search(self.features(source, usable)[0], y) for source in sources]
        best = int(np.argmax([fit.best_score_ for fit in fits]))
        x, x_test = self.features(sources[best], usable)
        guess = fits[best].predict(x_test)
        shuffled = y[np.random.default_rng(0).permutation(len(y))]
        others = {"balanced_accuracy": balanced_accuracy_score(truth, guess)} if choice else {}
        others["shuffled"] = score(truth, search(x, shuffled).predict(x_test))
        others |= self._controls(usable, y, truth)
        metric, found = "accuracy" if choice else "R2", score(truth, guess)
        name, sizes = self.session.name, (len(y), len(truth))
        return Decoded(behaviour, name, metric, found, others, sources[best][0], *sizes)

    def features(self, source: Source, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (K', F) and (K'', F) of the trials to fit to and to test on, computed once.

        Args:
            source: ("rates", prompt with which they are predicted), or ("latents", width) or
                ("counts", width) of the Gaussian that smooths them, bins.
            usable: (K,) bool, trials with a known behaviour.
        """
        key = source, usable.tobytes()
        if key in self._features:
            return self._features[key]
        session, inside, trials = self.session, self.inside, self.trials[usable]
        kind, how = source
        if kind == "counts":
            values = smoothed(session.counts[trials][:, :, inside].astype(np.float64), how)
        elif kind == "latents":
            values = smoothed(self._latents[usable], how)
        else:
            queries = Queries(~inside[None], inside[None])
            options = {"batch_size": self.batch_size}
            values = predict_queries(self.predictor, session, how, trials, queries, **options)
            values = values[:, :, inside]
        flat, is_test = values.reshape(len(trials), -1), self.is_test[usable]
        self._features[key] = principal_axes(flat[~is_test], flat[is_test])
        return self._features[key]

    @cached_property
    def _latents(self) -> np.ndarray:
        """Latents (K, T, R) of all trials, whatever behaviour is decoded and however smoothed."""
        return predict_latents(self.predictor, self.session, self.trials, ~self.inside)

    def _controls(self, usable: np.ndarray, y: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """Controls without a predictor: computed once, however many predictors are compared."""
        choice = y.ndim == 1
        counts = self.session.counts[self.trials][:, :, self.inside]
        stimulus = _stimulus(self.session)[self.trials] if choice else None
        key = joblib.hash((counts, usable, self.is_test, y, truth, stimulus))
        if key in _CONTROLS:
            return _CONTROLS[key]
        majority = -1.0 if (y == -1).mean() > 0.5 else 1.0
        constant = np.broadcast_to(majority if choice else y.mean(axis=0), truth.shape)
        found = {"majority" if choice else "time_course": score(truth, constant)}
        fits = [
            (search(x, y), x_test)
            for x, x_test in (self.features(("counts", w), usable) for w in WIDTHS)
        ]
        scores = [score(truth, fit.predict(x_test)) for fit, x_test in fits]
        best = int(np.argmax([fit.best_score_ for fit, _ in fits]))
        found |= {"raw_counts": scores[0], "smoothed_counts": scores[best]}
        if stimulus is not None and stimulus.size:
            fit = search(stimulus[usable & ~self.is_test], y)
            guess = fit.predict(stimulus[usable & self.is_test])
            found["stimulus_only"] = score(truth, guess)
            found["stimulus_only_balanced"] = balanced_accuracy_score(truth, guess)
        _CONTROLS[key] = found
        return found

    def _values(self, behaviour: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where a behaviour is usable, (K,) bool, and its values there: to fit to, to test on."""
        session, choice = self.session, behaviour == "choice"
        shape = session.counts.shape[: 1 if choice else 2]
        title = f"session {session.name!r}, behaviour {behaviour!r}"
        if behaviour not in session.behaviour:
            raise SessionError(f"{title}: there is none; there are: {', '.join(session.behaviour)}")
        values = session.behaviour[behaviour]
        if values.shape != shape:
            raise SessionError(f"{title} has shape {values.shape}; to be decoded it needs {shape}")
        values = values[self.trials].astype(np.float64)
        usable = np.isin(values, (-1, 1)) if choice else np.isfinite(values).all(axis=1)
        y, truth = values[usable & ~self.is_test], values[usable & self.is_test]
        if len(truth) == 0 or len(y) < 2 * FOLDS:
            n = f"{len(y)} usable training and {len(truth)} test trials"
            raise SessionError(f"{title}: {n}; at least {2 * FOLDS} and 1 are needed")
        if choice and (rarer := min((y == -1).sum(), (y == 1).sum())) < FOLDS:
            n = f"{rarer} training trials of the rarer choice, {FOLDS} are needed"
            raise SessionError(f"{title}: {n}; choices are -1 and +1")
        if not choice and np.ptp(truth) == 0:
            raise SessionError(f"{title} does not vary in the test trials")
        return usable, y, truth


def smoothed(x: np.ndarray, width: float) -> np.ndarray:
    """Smooth activity (K, T, N) in time by a Gaussian of this standard deviation, bins."""
    return gaussian_filter(x, (0, width, 0), mode="nearest")


def search(x: np.ndarray, y: np.ndarray) -> GridSearchCV:
    """Fit choices (K,) or traces (K, T) to features (K, F), the penalty cross-validated."""
    if y.ndim == 1:
        # Newton's line search warns of features that never vary, as those of the mean rates.
        solver = "newton-cholesky" if np.ptp(x, axis=0).max() > 1e-9 else "lbfgs"
        decoder, grid = LogisticRegression(solver=solver, max_iter=1000), {"C": CHOICE_PENALTIES}
        folds, scoring = StratifiedKFold(FOLDS, shuffle=True, random_state=0), "accuracy"
    else:
        decoder, grid = Ridge(), {"alpha": TRACE_PENALTIES}
        folds, scoring = KFold(FOLDS, shuffle=True, random_state=0), "neg_mean_squared_error"
    return fitted(GridSearchCV(decoder, grid, cv=folds, scoring=scoring), x, y)


def fitted(grid: GridSearchCV, x: np.ndarray, y: np.ndarray) -> GridSearchCV:
    """Fit on one thread: in the many small problems of a search, threads wait for each other."""
    with threadpool_limits(1):
        return grid.fit(x, y)


def score(truth: np.ndarray, guess: np.ndarray) -> float:
    """Accuracy of choices (K,), or R2 of traces (K, T) over all trials and bins."""
    if truth.ndim == 1:
        return float(accuracy_score(truth, guess))
    return float(r2_score(truth.ravel(), guess.ravel()))


def principal_axes(x: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate features (K, F) and (K', F) to at most K dimensions, without changing predictions.

    Decoders with a squared penalty and a free intercept only use inner products of centred
    features. Their projections on the training trials' principal axes are fewer, hence quicker.
    """
    mean = x.mean(axis=0)
    _, singular, axes = np.linalg.svd(x - mean, full_matrices=False)
    keep = singular > 1e-9 * singular.max()
    keep[0] = True  # features that never vary are one column of zeros
    return (x - mean) @ axes[keep].T, (x_test - mean) @ axes[keep].T


def _stimulus(session: Session) -> np.ndarray:
    """Contrast, its side, and the block's prior or 0, (K, 3); (K, 0) without contrasts."""
    if "contrast" not in session.behaviour:
        return np.zeros((session.n_trials, 0))
    contrast = session.behaviour["contrast"]
    columns = [contrast, np.sign(contrast), session.behaviour.get("block", 0 * contrast)]
    return np.nan_to_num(np.stack(columns, axis=1).astype(np.float64))
