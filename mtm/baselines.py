"""What a user would otherwise pick, behind the interface that the model has.

=======================  =======================================================================
PSTH                     the training trials' time course, smoothed and shrunk to the mean
ridge                    linear: each neuron from the others, its future from its past
low-rank GLM             the same through a few latents and with a Poisson likelihood
reduced-rank regression  the low-rank GLM of several sessions, which share temporal filters
temporal NDT1            our model, trained with temporal masking alone
random-token NDT2        our model of patches, trained with random-token masking alone
=======================  =======================================================================

All learn from training trials alone. What a regression has to choose (widths, windows, penalties,
ranks) it chooses on validation trials. So do the two transformers choose the epoch, and how much
they hide; the rest of their settings suits them. The regressions are in ``mtm.regression``.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtm import regression
from mtm.evaluate import evaluate
from mtm.masks import MTM_SCHEMES, Mask
from mtm.model import MtMConfig
from mtm.regression import (
    Data,
    Link,
    bits,
    fit_forward,
    fit_linear,
    fit_low_rank,
    keep_log,
    poisson_regression,
    psth,
    ridge_regression,
    tune_gain,
)
from mtm.session import Session, SessionError, require_alike
from mtm.tasks import TASKS
from mtm.train import Fit, fit

RATIOS = (0.1, 0.3)  # shares that the transformers may hide
OPTIONS: dict[str, Any] = {"positions": "learned", "input_transform": "raw"}
SETTINGS: dict[str, Any] = {"epochs": 100, "batch_size": 16, "batches_per_step": 1}
SETTINGS |= {"weight_decay": 0.01, "components": 0}
"""Of the transformers. With our recipe temporal masking, which is not trained for it, hardly fills
in a single neuron or a region (`benchmarks/results/claims.md`)."""

__all__ = [
    "BASELINES",
    "PSTH",
    "Baseline",
    "LowRankGLM",
    "ReducedRankRegression",
    "Ridge",
    "fit_baseline",
    "psth",
    "random_token_ndt2",
    "temporal_ndt1",
]


@dataclass(frozen=True)
class Settings:
    """What evaluation needs to know of a fitted baseline."""

    split_seed: int
    bin_size: float


class Baseline(ABC):
    """What the fitted baselines share: one map for each session and scheme, behind ``predict``.

    Attributes:
        config: the split it was fitted on, and the width of the bins.
        maps: (session, scheme) -> its map.
        seen: session -> fingerprints of the trials it was fitted on, which evaluation refuses.
        chosen: (session, scheme) -> what was chosen, and its score: bits per spike over the
            training mean on validation trials.
    """

    sees_mask = False  # a hidden entry looks like a silent one
    dtype = torch.float64  # of the fit

    def __init__(self, sessions: Session | Sequence[Session], split_seed: int = 0) -> None:
        sessions = [sessions] if isinstance(sessions, Session) else list(sessions)
        _check(sessions)
        self.config = Settings(split_seed, sessions[0].bin_size)
        self.shapes = {s.name: s.counts.shape[1:] for s in sessions}
        self.seen = {s.name: s.fingerprints(s.split(split_seed).train) for s in sessions}
        self.maps: dict[tuple[str, str], Any] = {}
        self.chosen: dict[tuple[str, str], tuple[str, float]] = {}
        for session in sessions:
            in_val = session.counts[session.split(split_seed).val].any()
            if not in_val:
                warnings.warn(
                    f"session {session.name!r}: no spike in the validation trials, so nothing can "
                    "be chosen by them; another split_seed may have some",
                    stacklevel=3,
                )
        self._fit(Data(session, split_seed, self.dtype) for session in sessions)

    @abstractmethod
    def _fit(self, sessions: Iterable[Data]) -> None:
        """Fill :attr:`maps`; what each baseline does its own way."""

    def _keep(self, session: str, scheme: str, found: Any, text: str, score: float) -> None:
        self.maps[session, scheme], self.chosen[session, scheme] = found, (text, score)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The masking schemes it can fill in, of one session or another."""
        return tuple(dict.fromkeys(scheme for _, scheme in self.maps))

    def summary(self) -> str:
        """What was chosen for each session and scheme, and its score on validation trials."""
        title = f"{type(self).__name__}; bits per spike over the training mean on validation trials"
        wide = max(map(len, self.shapes))
        return "\n".join([title] + [
            f"  {session:<{wide}}  {scheme:<12}  {score:6.3f}  {text}"
            for (session, scheme), (text, score) in self.chosen.items()
        ])  # fmt: skip

    __repr__ = summary

    @torch.no_grad()
    def predict(
        self,
        counts: Tensor,
        scheme: str,
        mask: Mask,
        session: str,
        neurons: Tensor | None = None,
    ) -> Tensor:
        """Log-rates, counts a bin.

        Args:
            counts: (B, T, N); hidden entries count as 0.
            scheme: one of :attr:`schemes`. "causal" predicts each bin from those before it, and
                before the first that is hidden whole; the others, each neuron from those
                it may see, the trial over.
            mask: what is hidden.
            session: name of a session it was fitted on.
            neurons: (B,) one neuron of each trial.

        Returns:
            (B, T, N), or (B, T) for ``neurons``.

        Raises:
            SessionError: for a session it was not fitted on, or counts of another shape.
            ValueError: for a scheme it has no map for.
        """
        if session not in self.shapes:
            raise SessionError(
                f"session {session!r} is not among those this baseline was fitted on "
                f"({', '.join(self.shapes)}); fit it on that session"
            )
        if tuple(counts.shape[1:]) != tuple(self.shapes[session]):
            n_bins, n_neurons = self.shapes[session]
            raise SessionError(
                f"session {session!r} was fitted with {n_bins} bins and {n_neurons} neurons, got "
                f"counts of shape {tuple(counts.shape)}; pass all of them, or fit anew"
            )
        if (session, scheme) not in self.maps:
            known = [known for name, known in self.maps if name == session]
            raise ValueError(
                f"{type(self).__name__} has no {scheme!r} predictions of session {session!r}; it "
                f"has: {', '.join(known)}"
            )
        hidden = mask.hidden.all(-1)  # (B, T); where some are visible, the hidden pass for silent
        first = torch.where(hidden.any(1), hidden.int().argmax(1), counts.shape[1])
        shown = counts.to(self.dtype).masked_fill(mask.hidden, 0)
        return self.maps[session, scheme](shown, neurons, first).float()


class PSTH(Baseline):
    """:func:`psth` of each session, whatever is visible."""

    def _fit(self, sessions: Iterable[Data]) -> None:
        for data in sessions:
            counts, link = data.counts["val"], Link(data.rates, data.most)
            score = bits(link(torch.zeros_like(counts)), counts, data.null)
            for scheme in MTM_SCHEMES:
                self._keep(data.name, scheme, partial(_unmoved, link), "", score)


def _unmoved(link: Link, counts: Tensor, neurons: Tensor | None, first: Tensor) -> Tensor:
    """The same time course in every trial."""
    return link(torch.zeros_like(counts if neurons is None else counts[..., 0]), neurons)


class Ridge(Baseline):
    """Ridge regressions of counts, each session by itself.

    Each neuron from the others, from other regions, or from its own region; forward prediction by
    autoregression, a map for each number of bins ahead.

    Example:
        >>> print(mtm.evaluate(Ridge(session), session))
    """

    def _fit(self, sessions: Iterable[Data]) -> None:
        for data in sessions:
            for found in fit_linear(data):
                self._keep(data.name, *found)
            self._keep(data.name, "causal", *fit_forward(data, ridge_regression, tune_gain))


class LowRankGLM(Baseline):
    """Poisson regressions through a few latents, each session by itself.

    log-rate_n(t) = log PSTH_n(t) + bias_n + sum_r V_rn sum_l f_lr sum_m x_ml(t) U_mr over the
    neurons m that n may see, with x_ml the windows of neuron m's residuals. The penalty is on the
    squares of U and V, and so on the sum of the map's singular values. Forward prediction is an
    autoregressive Poisson GLM.

    Args:
        sessions, split_seed: as of the others.
        ranks: numbers of latents to choose from; fewer are quicker.
    """

    dtype = torch.float32

    def __init__(
        self,
        sessions: Session | Sequence[Session],
        split_seed: int = 0,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.ranks = tuple(regression.RANKS if ranks is None else ranks)
        if not self.ranks or min(self.ranks) < 2:
            raise ValueError(f"ranks must be numbers of 2 or more, got {ranks}")
        super().__init__(sessions, split_seed)

    def _fit(self, sessions: Iterable[Data]) -> None:
        for data in sessions:
            self._fit_together([data])

    def _fit_together(self, sessions: list[Data]) -> None:
        for found in fit_low_rank(sessions, self.ranks):
            self._keep(*found)
        for data in sessions:
            self._keep(data.name, "causal", *fit_forward(data, poisson_regression, keep_log))


class ReducedRankRegression(LowRankGLM):
    """The low-rank GLM of several sessions trained together, with the same temporal filters f.

    Rank and penalty are the same for all sessions too. Forward prediction shares nothing.
    """

    def _fit(self, sessions: Iterable[Data]) -> None:
        self._fit_together(list(sessions))


def _check(sessions: list[Session]) -> None:
    if not sessions:
        raise SessionError("no session to fit a baseline on")
    require_alike(sessions)
    if sessions[0].n_bins < 2:
        raise SessionError(
            f"session {sessions[0].name!r} has a single bin; regressions over time need two or more"
        )


def temporal_ndt1(
    sessions: Session | Sequence[Session],
    split_seed: int = 0,
    ratios: Sequence[float] = RATIOS,
    depth: int = 2,
    **changes: Any,
) -> Fit:
    """Our model trained with temporal masking alone, with options and settings that suit it.

    Args:
        sessions, split_seed: as of the others.
        ratios: shares of the bins to hide, of which the one is kept that does best in the four
            activity tasks on validation trials, with a model for each.
        depth: see :meth:`mtm.MtMConfig.from_depth`.
        **changes: as in :func:`mtm.train.fit`. In a ``folder``, each ratio's run has a folder of
            its own, as ``temporal-0.3``.
    """
    sizes = {"depth": depth, "tokenizer": "ndt1"}
    return _best(sessions, split_seed, sizes, "temporal", ratios, changes)


def random_token_ndt2(
    sessions: Session | Sequence[Session],
    split_seed: int = 0,
    ratios: Sequence[float] = RATIOS,
    depth: int = 2,
    **changes: Any,
) -> Fit:
    """Our model of patches trained with random-token masking alone; see :func:`temporal_ndt1`."""
    sizes = {"depth": depth, "tokenizer": "ndt2"}
    return _best(sessions, split_seed, sizes, "random-token", ratios, changes)


def _best(
    sessions: Session | Sequence[Session],
    split_seed: int,
    sizes: dict[str, Any],
    scheme: str,
    ratios: Sequence[float],
    changes: dict[str, Any],
) -> Fit:
    """Of models that hide other shares, the one with most bits per spike on validation trials."""
    sessions = [sessions] if isinstance(sessions, Session) else list(sessions)
    model = MtMConfig.from_depth(n_bins=sessions[0].n_bins, **sizes, **OPTIONS)
    how = SETTINGS | {"schemes": (scheme,), "prompt": False, "split_seed": split_seed}
    runs = []
    for ratio in ratios:
        here = how | {"ratios": {scheme: ratio}} | changes
        if here.get("folder") is not None:  # a run of its own in a folder of its own
            here["folder"] = Path(here["folder"]) / f"{scheme}-{ratio:g}"
        runs.append(fit(sessions, model, **here))
    if len(runs) == 1:
        return runs[0]

    def score(run: Fit) -> float:
        parts = []
        for session in sessions:
            tasks = [t for t in TASKS if session.region_names or not t.endswith("region")]
            val = session.split(run.config.split_seed).val
            report = evaluate(run, session, tasks=tasks, trials=val)
            parts += [scores.mean("bits_per_spike_train_null") for scores in report.tasks.values()]
        return float(np.mean(parts))

    return max(runs, key=score)


BASELINES: dict[str, Callable[..., Any]] = {
    "PSTH": PSTH,
    "ridge": Ridge,
    "low-rank GLM": LowRankGLM,
    "reduced-rank regression": ReducedRankRegression,
    "temporal NDT1": temporal_ndt1,
    "random-token NDT2": random_token_ndt2,
}
"""Name -> function of (sessions, split_seed=0, ...) that returns a fitted predictor."""


def fit_baseline(name: str, sessions: Session | Sequence[Session], **settings: Any) -> Any:
    """Fit a baseline by its name.

    Args:
        name: one of :data:`BASELINES`.
        sessions: one, or several with distinct names, and the same bins and window.
        **settings: of the baseline: ``split_seed`` of all, ``ranks`` of the low-rank ones, what
            :func:`mtm.train.fit` takes of the transformers.

    Returns:
        a fitted predictor, for :func:`mtm.evaluate.evaluate`.

    Raises:
        ValueError: for an unknown name.
        SessionError: when the sessions do not go together.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    return BASELINES[name](sessions, **settings)
