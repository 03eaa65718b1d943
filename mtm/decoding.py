"""Behaviour from predicted activity: classes, numbers, and traces recorded bin by bin.

Linear decoders read the log-rates that a model predicts, or its latents. They and their penalties
are fitted on the training and validation trials, and scored on the test trials. Source of the
choice and of traces: arXiv 2407.14668, section 4, and the authors' final code.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import confusion_matrix, r2_score, recall_score
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from threadpoolctl import threadpool_limits

from mtm import prediction
from mtm.inputs import SessionError, plain
from mtm.prediction import PredictorLike, Predictors, Queries
from mtm.session import Session

FOLDS = 4
MOST_CLASSES = 10  # of whole numbers; with more different values they are decoded as numbers
CLASS_PENALTIES = np.logspace(-4, 4, 9)  # C of the logistic regression, as the paper
RIDGE_PENALTIES = np.logspace(-3, 6, 10)  # alpha of the ridge regression
FEATURES = ("rates", "latents", "auto")
WIDTHS = (0, 1, 2, 4)  # bins, standard deviations of the Gaussians that smooth
ENCODER_WIDTH = 1  # bins, of the Gaussian that smooths the encoder's output
STEEPNESS = 10  # of weights: a decoder of 10 % more cross-validated loss weighs 0.4 times as much
Source = tuple[str, Any]  # ("rates", prompt); or "latents", "encoder" or "counts", and a width
_CONTROLS: dict[str, dict[str, float]] = {}  # cache: hash of the data -> scores of the controls


@dataclass(frozen=True, repr=False)
class Decoded:
    """How well one behaviour was decoded, and the controls.

    ``others`` holds ``shuffled`` (fitted to shuffled trials), ``raw_counts``, ``smoothed_counts``
    (by the Gaussian that cross-validates best); of classes, ``balanced_accuracy`` (mean recall)
    and ``majority`` (the most frequent class); of the choice, where signed ``contrast`` is known,
    ``stimulus_only`` and ``stimulus_only_balanced``; of a number, ``mean``; of a trace,
    ``time_course``. R2 of a trace is over all bins: the mean time course counts as explained.
    """

    behaviour: str
    session: str
    kind: str  # "classes", "number" or "trace"
    metric: str  # "accuracy" of classes, else "R2"
    score: float  # on the test trials
    others: dict[str, float]
    features: str  # what was read: "rates", "latents", "latents and encoder", or "fine-tuned"
    n_train: int  # trials the decoder was fitted on; fine-tuning only stops by some of them
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
    predictor: Predictors,
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
    """Decode behaviours of a session: name -> scores and controls.

    Classes are decoded with logistic regression, numbers and traces with ridge regression, all bins
    of a trace at once. Cross-validation scores the log-likelihood of classes, else squared errors.
    Trials without a value (NaN, or an empty word) are left out, and so is a choice of 0 beside -1
    and +1, which means no response.

    Args:
        predictor, session, split_seed, batch_size, allow_seen: as in :func:`mtm.evaluate`.
        behaviours: a name or several. Default: ``choice`` where known, and all traces.
        region: show the predictor this region only, and decode from its neurons.
        prompt: masking scheme whose prompt a model gets when it predicts rates. Default, as in the
            paper: "neuron" (classes, numbers), "causal" (traces), "intra-region" with ``region``.
        features: what is decoded: the predicted log-"rates" (the paper); the model's "latents"
            (:meth:`mtm.MtM.latents`), smoothed by Gaussians of four widths; or "auto", these and
            latents beside the encoder's output. Several decoders are averaged, those of less
            cross-validated loss with more weight. Default: "auto" for models with latents, "rates"
            for others and with a ``prompt``.
        kinds: behaviour -> "classes" or "number". Default: words, booleans and whole numbers of at
            most 10 different values are classes.

    Raises:
        SessionError: for an unknown behaviour or region, too few trials (of a class), or a
            behaviour that does not vary in the test trials.
        ValueError: as from :func:`mtm.evaluate`, or for unknown features or prompt.
    """
    allowed = FEATURES if prompt is None else FEATURES[:1]  # rates alone depend on a prompt
    if features not in (None, *allowed):
        raise ValueError(f"features must be one of {FEATURES}, 'rates' with a prompt: {features!r}")
    options = region, prompt, features or "", kinds, split_seed, batch_size, allow_seen
    decoder = Decoder(prediction.as_predictor(predictor, session), session, *options)
    names = decodable(session) if behaviours is None else behaviours
    return {name: decoder.decode(name) for name in ([names] if isinstance(names, str) else names)}


def decode_by_region(
    predictor: Predictors, session: Session, behaviour: str, **options: Any
) -> dict[str, Decoded]:
    """Decode a behaviour from each region alone, with the options of :func:`decode` (Figure 5)."""
    if not session.region_names:
        raise SessionError(f"session {session.name!r}: no neuron has a region label")
    return {
        region: decode(predictor, session, behaviour, region=region, **options)[behaviour]
        for region in session.region_names
    }


def decodable(session: Session) -> list[str]:
    """Behaviours that are decoded by default: ``choice`` where known, and traces."""
    known = {key: np.ndim(value) for key, value in session.behaviour.items()}
    return [*["choice"] * (known.get("choice") == 1), *sorted(k for k in known if known[k] == 2)]


class Target(NamedTuple):
    """Values of a behaviour that a decoder is fitted to and tested on."""

    kind: str
    usable: np.ndarray  # (K,) bool, trials with a known value
    names: list[Any]  # of the classes, in order; y and truth then hold their indices
    y: np.ndarray  # (K',) or (K', T) values in usable training and validation trials
    truth: np.ndarray  # (K'',) or (K'', T) values in usable test trials


@dataclass
class Decoder:
    """Decodes behaviours with the options of :func:`decode`; predicts once for each prompt."""

    predictor: PredictorLike  # as `as_predictor` returns it
    session: Session
    region: str | None = None
    prompt: str | None = None
    read: str = ""  # features
    kinds: Mapping[str, str] | None = None
    split_seed: int | None = None
    batch_size: int | None = None
    allow_seen: bool = False

    def __post_init__(self) -> None:
        given, seen = (self.predictor, self.session), self.allow_seen
        split = prediction.choose_split(*given, self.split_seed, allow_seen=seen)
        if not seen:
            prediction.require_unseen(*given, split.test)
        self.trials = np.concatenate(split)  # (K,) training, validation, then test trials
        self.n_train = len(split.train)
        self.is_test = np.isin(self.trials, split.test)
        self.inside = np.array([self.region in (None, x) for x in self.session.regions.tolist()])
        if not self.inside.any():
            known = f"no region {self.region!r}; known: {', '.join(self.session.region_names)}"
            raise SessionError(f"session {self.session.name!r} has {known}")
        latent = prediction.has_latents(self.predictor) and self.prompt is None
        self.read = self.read or ("auto" if latent else "rates")
        self._latents: dict[str, np.ndarray] = {}  # "latents", "encoder" -> (K, T, R)
        self._features: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def decode(self, behaviour: str) -> Decoded:
        """Decode one behaviour: see :func:`decode`."""
        target = self.target(behaviour)
        kind, _, _, y, truth = target
        default = "intra-region" if self.region else "causal" if kind == "trace" else "neuron"
        sources: list[Source] = [("rates", self.prompt or default)]
        if self.read != "rates":
            sources = [("latents", width) for width in WIDTHS]
            sources += [("encoder", ENCODER_WIDTH)] * (self.read == "auto")
        prior = np.array([len(WIDTHS) if name == "encoder" else 1 for name, _ in sources])
        guesses = []
        for order in (np.arange(len(y)), np.random.default_rng(0).permutation(len(y))):
            fits = [self.fit(source, target, y[order]) for source in sources]
            loss = np.maximum([-value for value, _ in fits], np.finfo(float).tiny)
            weights = prior * (loss.min() / loss) ** STEEPNESS
            guesses.append(decided(np.average([each for _, each in fits], 0, weights), kind))
        read = "latents and encoder" if self.read == "auto" else self.read
        others = {"shuffled": score(truth, guesses[1], kind)}
        return self.scored(behaviour, target, guesses[0], read, others)

    def scored(
        self, behaviour: str, target: Target, guess: np.ndarray, read: str, others: dict[str, float]
    ) -> Decoded:
        """The scores of what was decoded in the test trials, with controls."""
        kind, usable, names, y, truth = target
        metric, confusion = "R2", None
        if kind == "classes":
            others = {"balanced_accuracy": balanced_accuracy(truth, guess), **others}
            matrix = confusion_matrix(truth, guess, labels=range(len(names)))
            metric, confusion = "accuracy", pd.DataFrame(matrix, index=names, columns=names)
        others = others | self._controls(behaviour, target)
        sizes = len(y), len(truth), int((~usable).sum())
        found = metric, score(truth, guess, kind), others, read
        return Decoded(behaviour, self.session.name, kind, *found, *sizes, confusion)

    def fit(self, source: Source, target: Target, y: np.ndarray) -> tuple[float, np.ndarray]:
        """Fit to values y; score in cross-validation, and test trials' values or probabilities."""
        x, x_test = self.features(source, target.usable)
        found = search(x, y, target.kind)
        predict = found.predict_proba if target.kind == "classes" else found.predict
        return found.best_score_, predict(x_test)

    def features(self, source: Source, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (K', F) and (K'', F) of usable trials to fit to and to test on, made once."""
        key = source, usable.tobytes()
        if key in self._features:
            return self._features[key]
        session, inside, trials = self.session, self.inside, self.trials[usable]
        kind, how = source
        if kind == "rates":
            asked = self.predictor, session, how, trials, Queries(~inside[None], inside[None])
            values = prediction.predict_queries(*asked, batch_size=self.batch_size)[:, :, inside]
        elif kind == "counts":
            counts = session.filled(trials, self.trials[: self.n_train])[:, :, inside]
            values = smoothed(counts.astype(np.float64), how)
        else:
            if kind not in self._latents:  # of all trials, whatever behaviour is decoded
                given = self.predictor, session, self.trials, ~inside, kind == "encoder"
                self._latents[kind] = prediction.predict_latents(*given)
            values = smoothed(self._latents[kind][usable], how)
        flat, is_test = values.reshape(len(trials), -1), self.is_test[usable]
        self._features[key] = principal_axes(flat[~is_test], flat[is_test])
        return self._features[key]

    def _controls(self, behaviour: str, target: Target) -> dict[str, float]:
        """Controls without a predictor: computed once, however many predictors are compared."""
        kind, usable, _, y, truth = target
        known, stimulus = self.session.behaviour, None
        contrast = plain(known.get("contrast", ""))
        if behaviour == "choice" and contrast.ndim == 1 and contrast.dtype.kind in "iuf":
            block = np.unique(known.get("block", 0 * contrast), return_inverse=True)[1]
            columns = [contrast, np.sign(contrast), block]  # with side, and prior of the block
            stimulus = np.nan_to_num(np.stack(columns, axis=1).astype(np.float64))[self.trials]
        counts = self.session.counts[self.trials][:, :, self.inside]
        key = joblib.hash((counts, self.session.observed, self.is_test, target, stimulus))
        if key in _CONTROLS:
            return _CONTROLS[key]
        name, constant = "time_course" if kind == "trace" else "mean", y.mean(axis=0)
        if kind == "classes":
            n_each = np.bincount(y)
            name, constant = "majority", np.flatnonzero(n_each == n_each.max())[-1]
        fits = [self.fit(("counts", width), target, y) for width in WIDTHS]
        found = {
            name: score(truth, np.broadcast_to(constant, truth.shape), kind),
            "raw_counts": score(truth, decided(fits[0][1], kind), kind),
            "smoothed_counts": score(truth, decided(max(fits, key=itemgetter(0))[1], kind), kind),
        }
        if stimulus is not None:
            fit = search(stimulus[usable & ~self.is_test], y, kind)
            guess = fit.predict(stimulus[usable & self.is_test])
            found["stimulus_only"] = score(truth, guess, kind)
            found["stimulus_only_balanced"] = balanced_accuracy(truth, guess)
        return _CONTROLS.setdefault(key, found)

    def target(self, behaviour: str) -> Target:
        """Values of a behaviour in the trials where it can be used."""
        known = self.session.behaviour
        title = f"session {self.session.name!r}, behaviour {behaviour!r}"
        if behaviour not in known:
            raise SessionError(f"{title}: there is none; there are: {', '.join(known)}")
        if len(known[behaviour]) != self.session.n_trials:  # added to the session afterwards
            sizes = f"{len(known[behaviour])} values for {self.session.n_trials} trials"
            raise SessionError(f"{title}: {sizes}; give one for each")
        values = plain(known[behaviour])[self.trials]
        empty = values == "" if values.dtype.kind == "U" else ~np.isfinite(values)
        absent = prediction.unobserved(self.session, self.trials)[:, 0, self.inside]
        usable = ~empty.reshape(len(values), -1).any(axis=1) & ~absent.all(axis=1)
        found, possible = np.unique(values[usable]), ["number", "classes"]
        if values.ndim == 2:
            possible = ["trace"]
        elif values.dtype.kind in "bU" or (len(found) <= MOST_CLASSES and (found % 1 == 0).all()):
            possible = ["classes"] + ["number"] * (values.dtype.kind != "U")
        kind = (self.kinds or {}).get(behaviour, possible[0])
        if kind not in possible:
            problem = f"{title} has {values.dtype} values of shape {values.shape}"
            raise SessionError(f"{problem}, so its kind is not {kind!r}")
        if behaviour == "choice" and kind == "classes" and np.isin((-1, 1), values).all():
            usable &= values != 0  # no response
        values, is_test, names = values[usable], self.is_test[usable], []
        if kind == "classes":
            classes, values = np.unique(values, return_inverse=True)
            names = classes.tolist()
        y, truth = (np.asarray(values[t], None if names else float) for t in (~is_test, is_test))
        if len(truth) == 0 or len(y) < 2 * FOLDS:
            n = f"{len(y)} usable training and {len(truth)} test trials"
            raise SessionError(f"{title}: {n}; at least {2 * FOLDS} and 1 are needed")
        if np.ptp(truth) == 0:
            only = names[truth[0]] if names else truth.flat[0]
            raise SessionError(f"{title} does not vary in the test trials: all are {only}")
        for i, name in enumerate(names):
            if (n := (y == i).sum()) < FOLDS:
                few = f"class {name!r} of {names} has {n} training trials, {FOLDS} are needed"
                raise SessionError(f"{title}: {few}; merge it, or set its trials to NaN or ''")
            if i not in truth:
                missing = f"no test trial is {name!r}; scores are of the other classes"
                warnings.warn(f"{title}: {missing}", stacklevel=4)
        return Target(kind, usable, names, y, truth)


def smoothed(x: np.ndarray, width: float) -> np.ndarray:
    """Smooth activity (K, T, N) in time by a Gaussian of this standard deviation, bins."""
    return gaussian_filter(x, (0, width, 0), mode="nearest")


def search(x: np.ndarray, y: np.ndarray, kind: str) -> GridSearchCV:
    """Fit a behaviour (K,) or (K, T) to features (K, F), the penalty cross-validated."""
    if kind == "classes":
        # Newton's line search warns of features that never vary, as those of the mean rates.
        solver = "newton-cholesky" if np.ptp(x, axis=0).max() > 1e-9 else "lbfgs"
        decoder, grid = LogisticRegression(solver=solver, max_iter=1000), {"C": CLASS_PENALTIES}
        n_folds = min(FOLDS, *np.unique(y, return_counts=True)[1])  # each holds every class
        # The accuracy of few trials is a coarse score, and often chooses too weak a penalty.
        folds, scoring = StratifiedKFold(n_folds, shuffle=True, random_state=0), "neg_log_loss"
    else:
        decoder, grid = Ridge(), {"alpha": RIDGE_PENALTIES}
        folds, scoring = KFold(FOLDS, shuffle=True, random_state=0), "neg_mean_squared_error"
    with threadpool_limits(1):  # in many small problems, threads wait for each other
        return GridSearchCV(decoder, grid, cv=folds, scoring=scoring).fit(x, y)


def decided(predicted: np.ndarray, kind: str) -> np.ndarray:
    """The most probable class, given probabilities (K, C); of other kinds, the values."""
    return predicted.argmax(axis=1) if kind == "classes" else predicted


def score(truth: np.ndarray, guess: np.ndarray, kind: str) -> float:
    """Accuracy of classes (K,), or R2 of numbers (K,) or traces (K, T) over all trials and bins."""
    classes = kind == "classes"
    return float(np.mean(truth == guess) if classes else r2_score(truth.ravel(), guess.ravel()))


def balanced_accuracy(truth: np.ndarray, guess: np.ndarray) -> float:
    """Mean over the classes of ``truth`` of the share of their trials that are decoded right."""
    return float(recall_score(truth, guess, labels=np.unique(truth), average="macro"))


def principal_axes(x: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate features (K, F) and (K', F) to at most K dimensions, without changing predictions.

    Decoders with a squared penalty and a free intercept only use inner products of centred
    features, which projections on the training trials' principal axes keep.
    """
    x, x_test = x - x.mean(axis=0), x_test - x.mean(axis=0)
    if len(x) > x.shape[1]:
        return x, x_test
    variances, vectors = np.linalg.eigh(x @ x.T)  # (K, K): quicker than of (F, F), or of x itself
    keep = variances > 1e-12 * variances.max()
    keep[-1] = True  # features that never vary are one column of zeros
    lengths = np.sqrt(variances[keep].clip(1e-300))
    return vectors[:, keep] * lengths, x_test @ x.T @ (vectors[:, keep] / lengths)
