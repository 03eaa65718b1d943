"""Behaviour from predicted activity: classes, numbers, and traces recorded bin by bin.

A linear decoder reads the log-rates that a model predicts for every bin and neuron, or the model's
latents, whichever cross-validates better. It is fitted on the training and validation trials, its
penalty is chosen by cross-validation there, and it is scored on the test trials. Source of the
choice and of traces: arXiv 2407.14668, section 4, and the authors' final code.

Controls are the scores without activity, from the stimulus alone, from shuffled trials, from the
raw counts, and from counts smoothed by the Gaussian that cross-validates best.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, confusion_matrix, r2_score, recall_score
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
MOST_CLASSES = 10  # of whole numbers; with more different values they are decoded as numbers
CLASS_PENALTIES = np.logspace(-4, 4, 9)  # C of the logistic regression, as the paper
RIDGE_PENALTIES = np.logspace(-3, 6, 10)  # alpha of the ridge regression
FEATURES = ("rates", "latents", "encoder")
KINDS = ("classes", "number", "trace")
WIDTHS = (0, 1, 2, 4)  # bins, standard deviations of the Gaussians that smooth
ENCODER_WIDTH = 1  # bins, of the Gaussian that smooths the encoder's output
_CONTROLS: dict[str, dict[str, float]] = {}  # cache: hash of the data -> scores of the controls


Source = tuple[str, Any]  # what a decoder reads: see `Decoder.features`


@dataclass(frozen=True, repr=False)
class Decoded:
    """How well one behaviour was decoded.

    ``others`` holds, for each behaviour, the controls ``shuffled`` (fitted to shuffled trials),
    ``raw_counts`` and ``smoothed_counts``, and

    - of classes: ``balanced_accuracy`` (mean over the classes of the test trials) and the control
      ``majority`` (the most frequent class); of the choice, where the contrast is known, also the
      control ``stimulus_only``, with ``stimulus_only_balanced``;
    - of a number: the control ``mean``;
    - of a trace: the control ``time_course``. The R2 is over all test trials and bins, so that the
      mean time course counts as explained variance.
    """

    behaviour: str
    session: str
    kind: str  # "classes", "number" or "trace"
    metric: str  # "accuracy" of classes, else "R2"
    score: float  # of the predicted activity, on the test trials
    others: dict[str, float]  # further scores and the controls, by name
    features: str  # what the decoder read: "rates", "latents", "encoder", or "fine-tuned" ones
    n_train: int  # trials the decoder was fitted on
    n_test: int  # trials it was scored on
    n_left_out: int  # trials without a usable value
    confusion: pd.DataFrame | None = None  # test trials: true class (row) x decoded class (column)

    def __repr__(self) -> str:
        kind = self.kind if self.confusion is None else f"{len(self.confusion)} {self.kind}"
        others = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in self.others.items())
        text = f"{self.behaviour} ({kind}) from {self.features}: {self.metric} {self.score:.3f}"
        left_out = f"; {self.n_left_out} trials left out" if self.n_left_out else ""
        return textwrap.fill(f"{text} ({others}){left_out}", 79, subsequent_indent="    ")

    def to_dict(self) -> dict[str, Any]:
        """The scores as a row of a table."""
        row = {"session": self.session, "seed": 0, "features": self.features}
        row |= {self.metric: self.score, **self.others}
        return row | {"train_trials": self.n_train, "test_trials": self.n_test}


def decode(
    predictor: PredictorLike | Mapping[str, PredictorLike],
    session: Session,
    behaviours: str | Sequence[str] | None = None,
    *,
    region: str | None = None,
    prompt: str | None = None,
    features: str | None = None,
    kinds: Mapping[str, str] | None = None,
    split_seed: int | None = None,
    batch_size: int | None = None,
    allow_seen: bool = False,
) -> dict[str, Decoded]:
    """Decode behaviours of a session: a class or a number of each trial, or a trace.

    Classes are decoded with logistic regression, numbers and traces with ridge regression, all bins
    of a trace at once. Scores and controls: see :class:`Decoded`.

    Trials without a value (NaN, or an empty word) are left out, and so is a choice of 0 beside -1
    and +1, which means no response. The paper decodes only trials with a valid reaction time, as
    sessions loaded by ``ibl.load_session(..., trial_filter="reaction-time")``.

    Args:
        predictor: as in :func:`mtm.evaluate`.
        session: the recording.
        behaviours: a name or several. Default: ``choice`` where known, and all traces.
        region: show the predictor this region only, and decode from its neurons.
        prompt: masking scheme whose prompt a model gets. Default, as in the paper: "neuron" for
            the choice (and all classes and numbers), "causal" for traces, "intra-region" with
            ``region``.
        features: what the decoder reads: the predicted log-"rates" (the paper); the model's
            "latents" (:meth:`mtm.MtM.latents`, smoothed by a Gaussian of cross-validated width);
            these beside the output of its "encoder"; or "auto", whichever of the three
            cross-validates best on training and validation trials. Default: "auto" for models with
            latents of the population, else "rates".
        kinds: behaviour -> "classes" or "number", where :func:`kind_of` is not what you want.
        split_seed: of ``session.split``. Default: the one the model was trained with, else 0.
        batch_size, allow_seen: as in :func:`mtm.evaluate`.

    Returns:
        behaviour -> :class:`Decoded`.

    Raises:
        SessionError: for an unknown behaviour or region, too few trials (of a class), or a
            behaviour that does not vary in the test trials.
        ValueError: for an unknown prompt, predictions of a wrong shape or with NaN, or test trials
            that the predictor was trained on.
    """
    if features not in (None, "auto", *FEATURES):
        raise ValueError(f"features must be 'auto' or one of {FEATURES}, got {features!r}")
    options = region, prompt, features, kinds, split_seed, batch_size, allow_seen
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
    """Behaviours that are decoded by default: ``choice`` where known, and traces."""
    traces = sorted(key for key, value in session.behaviour.items() if value.ndim == 2)
    return ["choice"] * ("choice" in session.behaviour) + traces


def kind_of(values: np.ndarray) -> str:
    """Kind of a behaviour: "trace" (K, T); else "classes" or "number" (K,).

    Words, booleans, and whole numbers of at most 10 different values are classes.
    """
    if values.ndim == 2:
        return "trace"
    if values.dtype.kind in "bU":
        return "classes"
    known = np.unique(values[np.isfinite(values)])
    return "classes" if len(known) <= MOST_CLASSES and (known % 1 == 0).all() else "number"


class Target(NamedTuple):
    """Values of a behaviour that a decoder is fitted to and tested on."""

    kind: str
    usable: np.ndarray  # (K,) bool, trials with a known value
    names: list[Any]  # of the classes, in order; y and truth then hold their indices
    y: np.ndarray  # (K',) or (K', T) values in usable training and validation trials
    truth: np.ndarray  # (K'',) or (K'', T) values in usable test trials


@dataclass
class Decoder:
    """Decodes behaviours of one session; activity is predicted once for each prompt.

    Arguments: see :func:`decode`, whose ``features`` is ``features_from`` here; the predictor is
    what :func:`as_predictor` returns.
    """

    predictor: PredictorLike
    session: Session
    region: str | None = None
    prompt: str | None = None
    features_from: str | None = None
    kinds: Mapping[str, str] | None = None
    split_seed: int | None = None
    batch_size: int | None = None
    allow_seen: bool = False

    def __post_init__(self) -> None:
        session = self.session
        split = choose_split(self.predictor, session, self.split_seed, allow_seen=self.allow_seen)
        self.trials = np.concatenate(split)  # (K,) training, validation, then test trials
        self.n_train = len(split.train)
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
        self._latents: dict[str, np.ndarray] = {}  # "latents", "encoder" -> (K, T, R)
        self._features: dict[tuple[Source, bytes], tuple[np.ndarray, np.ndarray]] = {}

    def decode(self, behaviour: str) -> Decoded:
        """Decode one behaviour: see :func:`decode`."""
        target = self.target(behaviour)
        kind, usable, _, y, truth = target
        default = "intra-region" if self.region else "causal" if kind == "trace" else "neuron"
        prompt = self.prompt or default
        sources: list[Source] = [
            ("rates", prompt),
            *(("latents", w) for w in WIDTHS),
            ("encoder", ENCODER_WIDTH),
        ]
        sources = [s for s in sources if self.features_from in ("auto", s[0])]
        fits = [search(self.features(source, usable)[0], y, kind) for source in sources]
        best = int(np.argmax([fit.best_score_ for fit in fits]))
        x, x_test = self.features(sources[best], usable)
        shuffled = search(x, y[np.random.default_rng(0).permutation(len(y))], kind)
        others = {"shuffled": score(truth, shuffled.predict(x_test), kind)}
        return self.scored(behaviour, target, fits[best].predict(x_test), sources[best][0], others)

    def scored(
        self,
        behaviour: str,
        target: Target,
        guess: np.ndarray,
        features: str,
        others: dict[str, float],
    ) -> Decoded:
        """The scores of what was decoded in the test trials, with controls."""
        kind, usable, names, y, truth = target
        confusion = None
        if kind == "classes":
            others = {"balanced_accuracy": balanced_accuracy(truth, guess), **others}
            matrix = confusion_matrix(truth, guess, labels=range(len(names)))
            confusion = pd.DataFrame(matrix, index=names, columns=names)
        return Decoded(
            behaviour,
            self.session.name,
            kind,
            "accuracy" if kind == "classes" else "R2",
            score(truth, guess, kind),
            others | self._controls(target, with_stimulus=behaviour == "choice"),
            features=features,
            n_train=len(y),
            n_test=len(truth),
            n_left_out=int((~usable).sum()),
            confusion=confusion,
        )

    def features(self, source: Source, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (K', F) and (K'', F) of the trials to fit to and to test on, computed once.

        Args:
            source: ("rates", prompt with which they are predicted), or "latents", "encoder" or
                "counts" and the width of the Gaussian that smooths them, bins.
            usable: (K,) bool, trials with a known behaviour.
        """
        key = source, usable.tobytes()
        if key in self._features:
            return self._features[key]
        session, inside, trials = self.session, self.inside, self.trials[usable]
        kind, how = source
        if kind == "counts":
            values = smoothed(session.counts[trials][:, :, inside].astype(np.float64), how)
        elif kind in ("latents", "encoder"):
            if kind not in self._latents:  # of all trials, whatever behaviour is decoded
                given = self.trials, ~self.inside, kind == "encoder"
                self._latents[kind] = predict_latents(self.predictor, session, *given)
            values = smoothed(self._latents[kind][usable], how)
        else:
            queries = Queries(~inside[None], inside[None])
            options = {"batch_size": self.batch_size}
            values = predict_queries(self.predictor, session, how, trials, queries, **options)
            values = values[:, :, inside]
        flat, is_test = values.reshape(len(trials), -1), self.is_test[usable]
        self._features[key] = principal_axes(flat[~is_test], flat[is_test])
        return self._features[key]

    def _controls(self, target: Target, *, with_stimulus: bool) -> dict[str, float]:
        """Controls without a predictor: computed once, however many predictors are compared."""
        kind, usable, _, y, truth = target
        counts = self.session.counts[self.trials][:, :, self.inside]
        stimulus = _stimulus(self.session)[self.trials] if with_stimulus else None
        key = joblib.hash((counts, self.is_test, target, stimulus))
        if key in _CONTROLS:
            return _CONTROLS[key]
        name = {"classes": "majority", "number": "mean", "trace": "time_course"}[kind]
        constant = y.mean(axis=0) if kind != "classes" else most_frequent(y)
        found = {name: score(truth, np.broadcast_to(constant, truth.shape), kind)}
        fits = [
            (search(x, y, kind), x_test)
            for x, x_test in (self.features(("counts", w), usable) for w in WIDTHS)
        ]
        scores = [score(truth, fit.predict(x_test), kind) for fit, x_test in fits]
        best = int(np.argmax([fit.best_score_ for fit, _ in fits]))
        found |= {"raw_counts": scores[0], "smoothed_counts": scores[best]}
        if stimulus is not None and stimulus.size:
            fit = search(stimulus[usable & ~self.is_test], y, kind)
            guess = fit.predict(stimulus[usable & self.is_test])
            found["stimulus_only"] = score(truth, guess, kind)
            found["stimulus_only_balanced"] = balanced_accuracy(truth, guess)
        _CONTROLS[key] = found
        return found

    def target(self, behaviour: str) -> Target:
        """Values of a behaviour in the trials where it can be used."""
        session = self.session
        title = f"session {session.name!r}, behaviour {behaviour!r}"
        if behaviour not in session.behaviour:
            raise SessionError(f"{title}: there is none; there are: {', '.join(session.behaviour)}")
        values = session.behaviour[behaviour][self.trials]
        kind = (self.kinds or {}).get(behaviour) or kind_of(values)
        if kind not in KINDS or (kind == "trace") != (values.ndim == 2):
            raise SessionError(f"{title} has shape {values.shape}, so its kind is not {kind!r}")
        if values.dtype.kind == "U":
            if kind == "number":
                raise SessionError(f"{title} holds words, so its kind is not {kind!r}")
            usable = values != ""
        else:
            usable = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if behaviour == "choice" and kind == "classes" and np.isin((-1, 1), values).all():
            usable &= values != 0  # no response
        names: list[Any] = []
        if kind == "classes":
            names = np.unique(values[usable]).tolist()
            values = np.searchsorted(names, values)
        y, truth = values[usable & ~self.is_test], values[usable & self.is_test]
        if len(truth) == 0 or len(y) < 2 * FOLDS:
            n = f"{len(y)} usable training and {len(truth)} test trials"
            raise SessionError(f"{title}: {n}; at least {2 * FOLDS} and 1 are needed")
        if kind == "classes":
            _require_classes(title, names, y, truth)
        elif np.ptp(truth) == 0:
            raise SessionError(f"{title} does not vary in the test trials")
        return Target(kind, usable, names, y, truth)


def _require_classes(title: str, names: list[Any], y: np.ndarray, truth: np.ndarray) -> None:
    """Refuse classes that cannot be fitted or scored; warn of those that no test trial has."""
    fitted, tested = (np.bincount(x, minlength=len(names)) for x in (y, truth))  # trials of each
    if fitted.min() < FOLDS:
        raise SessionError(
            f"{title}: class {names[fitted.argmin()]!r} of {names} has {fitted.min()} training "
            f"trials, {FOLDS} are needed; merge it with another, or set its trials to NaN or ''"
        )
    if (tested > 0).sum() == 1:
        raise SessionError(f"{title}: all test trials are {names[tested.argmax()]!r}; no score")
    if missing := [name for name, n in zip(names, tested, strict=True) if n == 0]:
        warnings.warn(f"{title}: no test trial is {missing}; scores are of the rest", stacklevel=5)


def smoothed(x: np.ndarray, width: float) -> np.ndarray:
    """Smooth activity (K, T, N) in time by a Gaussian of this standard deviation, bins."""
    return gaussian_filter(x, (0, width, 0), mode="nearest")


def search(x: np.ndarray, y: np.ndarray, kind: str) -> GridSearchCV:
    """Fit a behaviour (K,) or (K, T) to features (K, F), the penalty cross-validated."""
    if kind == "classes":
        # Newton's line search warns of features that never vary, as those of the mean rates.
        solver = "newton-cholesky" if np.ptp(x, axis=0).max() > 1e-9 else "lbfgs"
        decoder, grid = LogisticRegression(solver=solver, max_iter=1000), {"C": CLASS_PENALTIES}
        folds, scoring = StratifiedKFold(FOLDS, shuffle=True, random_state=0), "accuracy"
    else:
        decoder, grid = Ridge(), {"alpha": RIDGE_PENALTIES}
        folds, scoring = KFold(FOLDS, shuffle=True, random_state=0), "neg_mean_squared_error"
    return fitted(GridSearchCV(decoder, grid, cv=folds, scoring=scoring), x, y)


def fitted(grid: GridSearchCV, x: np.ndarray, y: np.ndarray) -> GridSearchCV:
    """Fit on one thread: in the many small problems of a search, threads wait for each other."""
    with threadpool_limits(1):
        return grid.fit(x, y)


def score(truth: np.ndarray, guess: np.ndarray, kind: str) -> float:
    """Accuracy of classes (K,), or R2 of numbers (K,) or traces (K, T) over all trials and bins."""
    if kind == "classes":
        return float(accuracy_score(truth, guess))
    return float(r2_score(truth.ravel(), guess.ravel()))


def most_frequent(y: np.ndarray) -> Any:
    """The most frequent class; of several, the last in order."""
    names, n_each = np.unique(y, return_counts=True)
    return names[n_each == n_each.max()][-1]


def balanced_accuracy(truth: np.ndarray, guess: np.ndarray) -> float:
    """Mean over the classes of ``truth`` of the share of their trials that are decoded right."""
    classes = np.unique(truth)
    return float(recall_score(truth, guess, labels=classes, average="macro", zero_division=0.0))


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
