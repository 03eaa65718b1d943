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
they hide; the rest of their settings suits them. The regressions are in ``mtm.baselines``.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtm import metrics
from mtm.evaluation import evaluate
from mtm.masks import MTM_SCHEMES, Mask
from mtm.model import MtMConfig
from mtm.prediction import TASKS, forward_bins
from mtm.session import Session, SessionError, require_alike
from mtm.training import Fit, fit

WIDTHS = (0.0, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # s.d. of the smoothing of PSTHs, bins
PRIORS = (3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e9)  # spikes that the mean counts as, in a PSTH
AROUND = ((0, 0), (1, 1), (2, 3), (4, 7), (0, None))  # windows: distances in bins, None: the trial
LAGS = {
    "same bin and trial": [0, 4],
    "up to 1 bin and trial": [0, 1, 4],
    "up to 7 bins and trial": [0, 1, 2, 3, 4],
}
"""Which of those windows ridge regressions may look at; one of them is chosen."""
PAST = ((0, 0), (1, 2), (3, 6), (7, 14), (0, None))  # windows: bins back from the last known one
COMPONENTS = (4, 16, 32)  # of the population, whose past forward prediction may look at
RANKS = (8, 32, 64)  # numbers of latents
BURST = 6.0  # largest input
STEPS = 40  # of L-BFGS at each penalty of the low-rank GLM
VOTES = 5  # spikes expected on the validation trials; neurons with fewer have no say in a choice


# ---------------------------------------------------------------------------- what all share


def psth(session: Session, split_seed: int = 0) -> np.ndarray:
    """Log of the mean count of each bin over the training trials, (1, T, N).

    Smoothed over time with a Gaussian, and shrunk to the neuron's mean the more, the fewer spikes
    it fired; both by as much as predicts the validation trials best.
    """
    split = session.split(split_seed)
    train, val = (torch.from_numpy(session.counts[part]).double() for part in split[:2])
    null = torch.from_numpy(metrics.log_mean(session.counts[split.train]))
    mean, spikes = null.exp(), train.sum((0, 1))
    bins = torch.arange(session.n_bins).double()
    distance = bins[:, None] - bins
    best, found = -np.inf, null.expand(session.n_bins, -1)
    for width in WIDTHS:
        kernel = torch.exp(-0.5 * (distance / max(width, 1e-3)) ** 2)
        smooth = kernel / kernel.sum(1, keepdim=True) @ train.mean(0)
        for prior in PRIORS:
            own = spikes / (spikes + prior)
            log_rates = (mean + own * (smooth - mean)).log()
            if (score := bits(log_rates.expand_as(val), val, null)) > best:
                best, found = score, log_rates
    return found[None].numpy()


def bits(log_rates: Tensor, counts: Tensor, null: Tensor) -> float:
    """Bits per spike over the null (N,), mean over neurons with enough spikes to expect."""
    flat = (-1, counts.shape[-1])
    log_rates, counts = log_rates.reshape(flat), counts.reshape(flat)
    gain = (counts * (log_rates - null) - log_rates.exp() + null.exp()).sum(0)
    spikes = counts.sum(0)
    fired = spikes > 0
    votes = fired & (null.exp() * len(counts) >= VOTES)
    votes = votes if votes.any() else fired
    return float((gain[votes] / spikes[votes]).mean() / metrics.LOG2) if votes.any() else 0.0


def climb(score: Callable[[float], float], start: float, factor: float = 3.0) -> float:
    """Of ``start * factor**k``, the value with the best score; ends where both sides are worse."""
    scores = {0: score(start)}
    for step in (1, -1):
        k = max(scores, key=scores.__getitem__)
        while abs(k) < 15 and k + step not in scores:
            scores[k + step] = score(start * factor ** (k + step))
            if scores[k + step] < scores[k] + 1e-5:
                break
            k += step
    return start * factor ** max(scores, key=scores.__getitem__)


def windows(
    n_bins: int,
    bounds: Sequence[tuple[int, int | None]],
    past: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Sums over windows of bins as matrices, (L, T, T), each over the root of its size.

    Args:
        n_bins: T.
        bounds: smallest and largest distance in bins; None = the whole trial.
        past: of bins before and up to the present one only.
        dtype: of the matrices.
    """
    lag = torch.arange(n_bins)[:, None] - torch.arange(n_bins)  # row: where, column: from where
    distance = lag if past else lag.abs()
    rows = []
    for low, high in bounds:
        high = n_bins if high is None else high
        size = (high - low + 1) * (1 if past else 2) - (not past and low == 0)
        rows.append(((distance >= low) & (distance <= high)) / min(size, n_bins) ** 0.5)
    return torch.stack(rows).to(dtype)


def residuals(counts: Tensor, rates: Tensor, scale: Tensor) -> Tensor:
    """Counts (K, T, N) as inputs: what is above the rates (T, N), scaled; bursts are cut."""
    return ((counts - rates) / scale).clamp(max=BURST)


def principal(x: Tensor, n: int) -> Tensor:
    """The n directions (N, n) of most covariance between a bin and the bins around it."""
    around = windows(x.shape[1], ((1, 3),)).to(x.dtype)[0] @ x
    shared = x.flatten(0, 1).T @ around.flatten(0, 1)
    _, vectors = torch.linalg.eigh((shared + shared.T).double())
    return vectors.flip(1)[:, :n].to(x.dtype)


class Data:
    """A session as the fits take it.

    Attributes:
        rates: (T, N) PSTH, counts a bin.
        null: (N,) log of the mean count.
        most: (N,) largest count of a bin in training.
        scale: (N,) by which residuals are divided.
        codes: (N,) region; a neuron without a label is a region by itself.
        regions: the members of each labelled region.
        counts: part -> (K', T, N).
        inputs: part -> (K', T, N) scaled residuals.
    """

    def __init__(self, session: Session, split_seed: int, dtype: torch.dtype) -> None:
        split = session.split(split_seed)
        _, self.n_bins, self.n_neurons = session.counts.shape
        self.name = session.name
        self.rates = torch.from_numpy(np.exp(psth(session, split_seed)[0])).to(dtype)
        self.null = torch.from_numpy(metrics.log_mean(session.counts[split.train])).to(dtype)
        mean = self.null.exp()
        most = session.counts[split.train].max(axis=(0, 1))
        self.most = torch.from_numpy(most).to(dtype).clamp(min=1)
        self.scale = (mean + mean.mean()).sqrt()  # the second: a rare spike is no huge input
        codes = torch.from_numpy(session.region_codes)
        self.labelled = codes >= 0
        self.codes = torch.where(self.labelled, codes, len(codes) + torch.arange(len(codes)))
        self.regions = [(codes == code).nonzero()[:, 0] for code in codes[self.labelled].unique()]
        members = [*self.regions, (~self.labelled).nonzero()[:, 0]]
        self.unsorted = torch.cat(members).argsort()  # from sorted by region to as recorded
        parts = {"train": split.train, "val": split.val}
        self.counts = {p: torch.from_numpy(session.counts[i]).to(dtype) for p, i in parts.items()}
        self.inputs = {
            part: residuals(c, self.rates, self.scale) for part, c in self.counts.items()
        }

    def seen(self, scheme: str, neurons: Tensor) -> Tensor:
        """Which neurons each of ``neurons`` (B,) is predicted from, (B, N) bool."""
        same = self.codes == self.codes[neurons][:, None]
        itself = torch.arange(self.n_neurons) == neurons[:, None]
        return {"neuron": ~itself, "inter-region": ~same, "intra-region": same & ~itself}[scheme]

    def without_trials(self) -> Data:
        """What is left when the trials are not needed any more."""
        left = copy.copy(self)
        left.counts = left.inputs = {}
        return left


class Link(NamedTuple):
    """From predicted changes ``delta`` to log-rates, none above the largest count in training.

    With a gain changes are counts, ``log(max(rates + gain * delta, floor * rates))``; without, they
    are of the log-rate, ``log(rates) + delta``.
    """

    rates: Tensor  # (T, N), or as delta
    most: Tensor  # (N,)
    gain: Tensor | None = None  # (N,)
    floor: float = 0.0

    def __call__(self, delta: Tensor, neurons: Tensor | None = None) -> Tensor:
        """Of delta (..., N), or (B, T) for ``neurons`` (B,)."""
        rates, most, gain = self.rates, self.most, self.gain
        if neurons is not None:
            rates, most = rates.T[neurons], most[neurons, None]
            gain = None if gain is None else gain[neurons, None]
        if gain is None:
            return torch.minimum(rates.log() + delta, most.log())
        return torch.minimum(torch.maximum(rates + gain * delta, self.floor * rates), most).log()


Tuned = tuple[float, Link]  # score, and what it was reached with


def tune_gain(delta: Tensor, link: Link, counts: Tensor, null: Tensor) -> Tuned:
    """Gain and floor of counts predicted linearly; the gain may be smaller at low rates."""
    mean, best = null.exp(), (-np.inf, link._replace(floor=0.2))

    def tried(**changes: Any) -> Tuned:
        found = best[1]._replace(**changes)
        return bits(found(delta), counts, null), found

    for prior in (0.0, 0.03, 0.1, 0.3, 1.0):  # of the population's mean count
        for strength in (0.6, 0.8, 1.0, 1.25, 1.6):
            gain = strength * mean / (mean + prior * mean.mean())
            best = max(best, tried(gain=gain), key=lambda found: found[0])
    others = [tried(floor=floor) for floor in (0.05, 0.1, 0.3, 0.5)]
    return max(best, *others, key=lambda found: found[0])


def keep_log(delta: Tensor, link: Link, counts: Tensor, null: Tensor) -> Tuned:
    """The score of changes of the log-rate, which need no more."""
    return bits(link(delta), counts, null), link


# ------------------------------------------------------ ridge: neurons from other neurons


def without_own(inverse: Tensor, weights: Tensor, n_lags: int) -> Tensor:
    """Ridge weights (N L, M) of M neurons, their own L features left out: exact.

    ``inverse`` is A = (Phi'Phi + penalty I)^-1 and ``weights`` A Phi'Y. To hold block n of column
    n at zero takes w - A[:, n] A[n, n]^-1 w[n].
    """
    n = weights.shape[1]
    each = torch.arange(n)
    blocks = inverse.view(n, n_lags, n, n_lags)[each, :, each]  # (N, L, L)
    own = weights.view(n, n_lags, n)[each, :, each]  # (N, L)
    shift = torch.linalg.solve(blocks, own)
    left = weights - torch.einsum("fnl,nl->fn", inverse.view(-1, n, n_lags), shift)
    left.view(n, n_lags, n)[each, :, each] = 0
    return left


def without_regions(
    inverse: Tensor, weights: Tensor, n_lags: int, regions: Sequence[Tensor]
) -> Tensor:
    """As :func:`without_own` for whole regions; other columns stay as they are."""
    left = weights.clone()
    for members in regions:
        block = (members[:, None] * n_lags + torch.arange(n_lags)).ravel()
        shift = torch.linalg.solve(inverse[block][:, block], weights[block][:, members])
        left[:, members] -= inverse[:, block] @ shift
        left[block[:, None], members] = 0
    return left


def within_regions(
    gram: Tensor, cross: Tensor, penalty: float, n_lags: int, regions: Sequence[Tensor]
) -> Tensor:
    """Ridge weights (N L, N) of each neuron from the others of its region."""
    weights = torch.zeros_like(cross)
    for members in regions:
        block = (members[:, None] * n_lags + torch.arange(n_lags)).ravel()
        inverse = _inverse(gram[block][:, block], penalty)
        own = without_own(inverse, inverse @ cross[block][:, members], n_lags)
        weights[block[:, None], members] = own
    return weights


def linear_maps(
    gram: Tensor, cross: Tensor, penalty: float, n_lags: int, data: Data
) -> dict[str, Tensor]:
    """Each scheme's ridge weights (N L, N) from Phi'Phi and Phi'Y."""
    inverse = _inverse(gram, penalty)
    weights = inverse @ cross
    maps = {"neuron": without_own(inverse, weights, n_lags)}
    if data.regions:
        others = without_regions(inverse, weights, n_lags, data.regions)
        maps["inter-region"] = torch.where(data.labelled, others, maps["neuron"])
        maps["intra-region"] = within_regions(gram, cross, penalty, n_lags, data.regions)
    return maps


def _inverse(gram: Tensor, penalty: float) -> Tensor:
    shifted = gram + penalty * torch.eye(len(gram), dtype=gram.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


@dataclass
class Linear:
    """Ridge weights that turn visible neurons into log-rates."""

    rates: Tensor  # (T, N)
    scale: Tensor  # (N,)
    windows: Tensor  # (L, T, T)
    weights: Tensor  # (N, L, N), zero where a neuron may not look
    link: Link

    def __call__(self, counts: Tensor, neurons: Tensor | None, first: Tensor) -> Tensor:
        """Log-rates (B, T, N) of counts that are 0 where hidden; of ``neurons`` (B,), (B, T)."""
        inputs = residuals(counts, self.rates, self.scale)
        if neurons is None:
            parts = torch.stack([inputs @ self.weights[:, i] for i in range(len(self.windows))])
            return self.link((self.windows[:, None] @ parts).sum(0))
        parts = torch.bmm(inputs, self.weights[..., neurons].permute(2, 0, 1))  # (B, T, L)
        return self.link(torch.einsum("lts,bsl->bt", self.windows, parts), neurons)


def features(x: Tensor, ops: Tensor) -> Tensor:
    """(K, T, N) residuals to (K T, N L) windows of them, those of a neuron side by side."""
    return torch.einsum("lts,ksn->ktnl", ops, x).flatten(2).flatten(0, 1)


_Found = tuple[float, Link, Tensor, Tensor, str, float]  # score, link, weights, ops, lags, penalty


def fit_linear(data: Data) -> Iterator[tuple[str, Linear, str, float]]:
    """Scheme, map, what was chosen and its score, for each scheme that the session allows."""
    best: dict[str, _Found] = {}
    for name in LAGS:
        _try_lags(data, name, best)
    for scheme, (score, link, weights, ops, name, penalty) in best.items():
        weights = weights.view(data.n_neurons, -1, data.n_neurons)
        found = Linear(data.rates, data.scale, ops, weights, link._replace(rates=data.rates))
        yield scheme, found, f"{name}; penalty {penalty:.3g}; floor {link.floor:g}", score


def _try_lags(data: Data, name: str, best: dict[str, _Found]) -> None:
    """Find the penalties for one choice of windows, and keep what is better than ``best``."""
    ops, n_lags = windows(data.n_bins, AROUND)[LAGS[name]], len(LAGS[name])
    x, counts = data.inputs["train"], data.counts["val"]
    gram = cross = torch.zeros(())
    targets = data.counts["train"] - data.rates
    for some, target in zip(x.split(64), targets.split(64), strict=True):
        phi = features(some, ops)  # of all trials, they might not fit into memory
        gram, cross = gram + phi.T @ phi, cross + phi.T @ target.flatten(0, 1)
    phi, link = features(data.inputs["val"], ops), Link(data.rates, data.most)

    @cache
    def scores(penalty: float) -> dict[str, float]:
        found = {}
        for scheme, weights in linear_maps(gram, cross, penalty, n_lags, data).items():
            tuned = tune_gain((phi @ weights).view_as(counts), link, counts, data.null)
            found[scheme] = tuned[0]
            if scheme not in best or tuned[0] > best[scheme][0]:
                best[scheme] = (*tuned, weights, ops, name, penalty)
        return found

    def score(penalty: float, scheme: str) -> float:
        return scores(penalty)[scheme]

    start = float(len(x) * data.n_bins)
    for scheme in list(scores(start)):
        climb(partial(score, scheme=scheme), start)


# ------------------------------------------------------ GLM: neurons from other neurons


@dataclass
class LowRank:
    """A few latents, filtered sums over the visible neurons, that move every neuron's log-rate."""

    data: Data
    scheme: str
    rates: Tensor  # (T, N)
    windows: Tensor  # (L, T, T)
    inputs: Tensor  # (N, R)
    filters: Tensor  # (L, R), of all sessions
    outputs: Tensor  # (R, N)
    bias: Tensor  # (N,)

    @classmethod
    def start(cls, data: Data, scheme: str, rank: int, filters: Tensor) -> LowRank:
        """A map that changes nothing yet and looks at principal components, twice at each."""
        x = data.inputs["train"]
        groups = data.regions if scheme == "intra-region" else [torch.arange(data.n_neurons)]
        inputs = torch.zeros(data.n_neurons, rank)
        for members in groups:
            directions = principal(x[..., members], rank // 2).repeat_interleave(2, 1)
            inputs[members, : directions.shape[1]] = 0.1 * directions
        zeros = torch.zeros(rank, data.n_neurons), torch.zeros(data.n_neurons)
        ops = windows(data.n_bins, AROUND).float()
        return cls(data, scheme, data.rates, ops, inputs, filters, *zeros)

    def descend(self, penalty: float) -> float:
        """Loss of the training trials and its gradient, which is added to the learned ones'.

        Above the largest count the rate grows linearly with its logarithm, so that no step of a
        line search is infinitely bad.
        """
        x, counts = self.data.inputs["train"], self.data.counts["train"]
        log_rates = self.rates.log() + self.delta(x)
        with torch.no_grad():
            bounded = torch.minimum(log_rates, self.data.most.log())
            rates = bounded.exp()
            total = torch.dot(rates.flatten(), (log_rates - bounded + 1).flatten())
            nll = float(total - torch.dot(counts.flatten(), log_rates.flatten()))
        squares = penalty / 2 * (self.inputs.square().sum() + self.outputs.square().sum())
        torch.autograd.backward([log_rates, squares], [rates - counts, None])
        return nll + float(squares.detach())

    def score(self) -> float:
        """Bits per spike on validation trials."""
        log_rates = Link(self.rates, self.data.most)(self.delta(self.data.inputs["val"]))
        return bits(log_rates, self.data.counts["val"], self.data.null)

    def frozen(self) -> LowRank:
        """A copy that learns no more."""
        names = ("inputs", "filters", "outputs", "bias")
        parts = {name: getattr(self, name).detach().clone() for name in names}
        return replace(self, data=self.data.without_trials(), **parts)

    def latents(self, visible: Tensor, inputs: Tensor) -> Tensor:
        """(K, T, N') residuals and (N', R) weights to (K, T, R)."""
        mixed = torch.einsum("lts,lr->rts", self.windows, self.filters / self.filters.norm(dim=0))
        return torch.einsum("rts,ksr->ktr", mixed, visible @ inputs)

    def itself(self, x: Tensor) -> Tensor:
        """What each neuron adds to its own prediction, (K, T, N)."""
        filters = self.filters / self.filters.norm(dim=0)
        strength = filters @ (self.inputs.T * self.outputs)  # (L, N)
        mixed = torch.einsum("lts,ln->nts", self.windows, strength)
        return torch.bmm(mixed, x.permute(2, 1, 0)).permute(2, 1, 0)

    def regional(self, x: Tensor) -> Tensor:
        """What each neuron's region, itself included, adds to its prediction; 0 without one."""
        parts = [
            self.latents(x[..., members], self.inputs[members]) @ self.outputs[:, members]
            for members in self.data.regions
        ]
        parts.append(x.new_zeros(*x.shape[:2], int((~self.data.labelled).sum())))
        return torch.cat(parts, -1)[..., self.data.unsorted]

    def delta(self, x: Tensor) -> Tensor:
        """Change of all log-rates, (K, T, N), for scaled residuals of that shape."""
        labelled = self.data.labelled
        if self.scheme == "intra-region":
            return (self.regional(x) - self.itself(x)) * labelled + self.bias
        full = self.latents(x, self.inputs) @ self.outputs + self.bias
        if self.scheme == "neuron":
            return full - self.itself(x)
        alone = self.itself(x) * ~labelled if not labelled.all() else 0.0
        return full - self.regional(x) - alone

    def __call__(self, counts: Tensor, neurons: Tensor | None, first: Tensor) -> Tensor:
        """Log-rates (B, T, N) of counts that are 0 where hidden; of ``neurons`` (B,), (B, T)."""
        x, link = residuals(counts, self.rates, self.data.scale), Link(self.rates, self.data.most)
        if neurons is None:
            return link(self.delta(x))
        x = x * self.data.seen(self.scheme, neurons)[:, None]
        z = self.latents(x, self.inputs)  # (B, T, R)
        delta = (z @ self.outputs.T[neurons, :, None])[..., 0] + self.bias[neurons, None]
        return link(delta, neurons)


def fit_low_rank(
    sessions: Sequence[Data], ranks: Sequence[int]
) -> Iterator[tuple[str, str, LowRank, str, float]]:
    """Session, scheme, map, what was chosen and its score; the rank is chosen for "neuron"."""
    spikes = sum(float(data.counts["train"].sum()) for data in sessions)
    penalty = 2.0 ** round(np.log2(2 * max(spikes, 1) ** 0.5))
    for scheme in ("neuron", "inter-region", "intra-region"):
        some = [data for data in sessions if data.regions or scheme == "neuron"]
        tried = {}
        for rank in ranks if some else ():
            tried[rank] = _fit_rank(some, scheme, rank, penalty)
            penalty = 2 * tried[rank][1]
        if tried:
            rank = max(tried, key=lambda rank: np.mean(tried[rank][0]))
            scores, chosen, maps = tried[rank]
            ranks, text = (rank,), f"rank {rank}; penalty {chosen:g}"
            for data, score, found in zip(some, scores, maps, strict=True):
                yield data.name, scheme, found, text, score


def _fit_rank(
    sessions: Sequence[Data], scheme: str, rank: int, penalty: float
) -> tuple[list[float], float, list[LowRank]]:
    """Scores, penalty and a map for each session, trained together.

    From ``penalty`` on, each half as strong starts where the last one ended, until one is worse.
    Where the first was best, all begins anew with a stronger one.
    """
    filters = torch.zeros(len(AROUND), rank)
    filters[:-1, ::2], filters[-1, 1::2] = 1.0, 1.0  # half of them begin fast, half slow
    maps = [LowRank.start(data, scheme, rank, filters + 0.1) for data in sessions]
    learned = [maps[0].filters, *(x for m in maps for x in (m.inputs, m.outputs, m.bias))]
    learned = [x.clone().requires_grad_() for x in learned]
    best: tuple[list[float], float, list[LowRank]] = ([-np.inf], penalty, [])
    first = penalty
    while penalty > 0.1:
        _descend(maps, learned, penalty)
        with torch.no_grad():
            scores = [model.score() for model in maps]
        if np.mean(scores) < np.mean(best[0]) + 1e-4:
            break
        best = (scores, penalty, [model.frozen() for model in maps])
        penalty /= 2
    if best[1] == first < 1e5:
        stronger = _fit_rank(sessions, scheme, rank, 4 * first)
        best = max(best, stronger, key=lambda found: np.mean(found[0]))
    return best


def _descend(maps: Sequence[LowRank], learned: Sequence[Tensor], penalty: float) -> None:
    """Some steps of L-BFGS on the loss of all sessions.

    ``learned`` has the filters, and each map's inputs, outputs and bias. Of the last two, neurons
    of low rate learn with larger steps, as their rates weigh less in the loss.
    """
    optimizer = torch.optim.LBFGS(
        learned, max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = 0.0
        for i, model in enumerate(maps):
            inputs, outputs, bias = learned[1 + 3 * i : 4 + 3 * i]
            mean = model.data.null.exp()
            even = (mean.mean() / (mean + 0.1 * mean.mean())).sqrt()
            model.filters, model.inputs = learned[0], inputs
            model.outputs, model.bias = outputs * even, bias * even
            loss += model.descend(penalty)
        return loss

    optimizer.step(closure)


# ------------------------------------------------------------- forward prediction: both


@dataclass
class Forward:
    """Each neuron's future from its own past and a few components of the population's."""

    rates: Tensor  # (T, N)
    scale: Tensor  # (N,)
    components: Tensor  # (N, C)
    windows: Tensor  # (L, T, T), of the past
    own: Tensor  # (H, L, N), a map for each horizon
    population: Tensor  # (H, C L, N)
    bias: Tensor  # (H, N)
    link: Link

    def __call__(self, counts: Tensor, neurons: Tensor | None, first: Tensor) -> Tensor:
        """Log-rates (B, T, N) of each bin from those before it, and before bin ``first`` (B,).

        With ``neurons`` (B,), theirs alone, (B, T).
        """
        x = residuals(counts, self.rates, self.scale)
        horizons, n_bins = len(self.own), counts.shape[1]
        bins = torch.arange(n_bins, device=x.device)
        known = torch.minimum(bins, first[:, None])  # (B, T): bins before this one are known
        ahead = (bins - known).clamp(max=horizons - 1)  # (B, T)
        trial = torch.arange(len(x), device=x.device)[:, None]

        def at_origin(features: Tensor) -> Tensor:
            """(B, T, ...) of the last known bin of each target; zeros where none is known."""
            none = torch.zeros_like(features[:, :1])
            return torch.cat([none, features], 1)[trial, known]

        population = at_origin(_population_past(x, self.components, self.windows))
        if neurons is None:
            delta = self.bias[ahead]
            for own, window in zip(self.own.unbind(1), self.windows, strict=True):
                delta = delta + at_origin(window @ x) * own[ahead]
            for h, weights in enumerate(self.population):
                delta[ahead == h] += population[ahead == h] @ weights
            return self.link(delta)
        past = torch.einsum("lts,bs->btl", self.windows, x[trial[:, 0], :, neurons])
        inputs = torch.cat([at_origin(past), population], -1)  # (B, T, L + C L)
        weights = torch.cat([self.own, self.population], 1)[:, :, neurons]  # (H, L + C L, B)
        delta = (inputs * weights.permute(2, 0, 1)[trial, ahead]).sum(-1)
        return self.link(delta + self.bias.T[neurons][trial, ahead], neurons)


def _population_past(x: Tensor, components: Tensor, windows: Tensor) -> Tensor:
    """(K, T, N) residuals to (K, T, C L) windows of the past of their components."""
    return torch.einsum("lts,ksc->ktcl", windows, x @ components).flatten(2)


class Past(NamedTuple):
    """Regression from a bin's past to the count ``horizon`` bins later; samples S = K (T - h)."""

    own: Tensor  # (L, S, N)
    population: Tensor  # (S, C L)
    rates: Tensor  # (S, N)
    counts: Tensor  # (S, N)


def past_of(data: Data, part: str, components: Tensor, horizon: int) -> Past:
    """The regression's samples: every bin of a part of the trials that has one so far ahead."""
    x, counts = data.inputs[part], data.counts[part]
    ops = windows(data.n_bins, PAST, past=True, dtype=data.rates.dtype)
    origin, target = slice(None, data.n_bins - horizon), slice(horizon, None)
    own = (ops[:, None] @ x)[:, :, origin].flatten(1, 2)
    population = _population_past(x, components, ops)[:, origin].flatten(0, 1)
    rates = data.rates.expand_as(counts)[:, target].flatten(0, 1)
    return Past(own, population, rates, counts[:, target].flatten(0, 1))


Coefficients = tuple[Tensor, Tensor, Tensor]  # own (L, N), population (C L, N), bias (N,)
Solver = Callable[[Past, float], Coefficients]


def fit_forward(
    data: Data, solve: Solver, tune: Callable[..., Tuned]
) -> tuple[Forward, str, float]:
    """The map of forward prediction, what was chosen and its score.

    Components and penalty are chosen for the middle one of the horizons, and serve all.
    """
    start, stop = forward_bins(data.n_bins)
    horizons = max(1, min(stop - start, data.n_bins - 1))
    directions, best = principal(data.inputs["train"], max(COMPONENTS)), []
    for n in COMPONENTS:
        middle = (horizons + 1) // 2
        best.append(_try_components(data, directions[:, :n], middle, solve, tune))
    (score, link), penalty, components = max(best, key=lambda found: found[0][0])
    solved = [solve(past_of(data, "train", components, h + 1), penalty) for h in range(horizons)]
    own, population, bias = (torch.stack(parts) for parts in zip(*solved, strict=True))
    ops = windows(data.n_bins, PAST, past=True, dtype=data.rates.dtype)
    text = f"{components.shape[1]} components of the population; penalty {penalty:.3g}"
    link = link._replace(rates=data.rates)
    found = Forward(data.rates, data.scale, components, ops, own, population, bias, link)
    return found, text, score


def _try_components(
    data: Data, components: Tensor, horizon: int, solve: Solver, tune: Callable[..., Tuned]
) -> tuple[Tuned, float, Tensor]:
    """What tuning finds with these components, the penalty, and the components."""
    train, val = (past_of(data, part, components, horizon) for part in ("train", "val"))

    @cache
    def tuned(penalty: float) -> Tuned:
        link = Link(val.rates, data.most)
        return tune(regress(val, solve(train, penalty)), link, val.counts, data.null)

    penalty = climb(lambda penalty: tuned(penalty)[0], 300.0)
    return tuned(penalty), penalty, components


def regress(past: Past, coefficients: Coefficients) -> Tensor:
    """Predictions (S, N)."""
    own, population, bias = coefficients
    delta = past.population @ population + bias
    for features, weights in zip(past.own, own, strict=True):
        delta = delta.addcmul(features, weights)
    return delta


def ridge_regression(past: Past, penalty: float) -> Coefficients:
    """Of counts minus rates, (S, N), on each neuron's own past and the population's."""
    own, shared = past.own, past.population
    residual = past.counts - past.rates
    n_own, _, n = own.shape
    size = n_own + shared.shape[1]
    gram, cross = own.new_zeros(n, size, size), own.new_zeros(n, size)
    for i, features in enumerate(own):
        gram[:, i, n_own:] = features.T @ shared
        gram[:, n_own:, i] = gram[:, i, n_own:]
        gram[:, i, :n_own] = (features * own).sum(1).T
        cross[:, i] = (features * residual).sum(0)
    gram[:, n_own:, n_own:] = shared.T @ shared
    cross[:, n_own:] = (shared.T @ residual).T
    gram += penalty * torch.eye(size, dtype=gram.dtype)
    weights = torch.linalg.solve(gram, cross).T
    return weights[:n_own], weights[n_own:], own.new_zeros(n)


def poisson_regression(past: Past, penalty: float, steps: int = 40) -> Coefficients:
    """Poisson regressions of all neurons, log-rate = log(rates) + inputs: one convex problem.

    Minimises the summed negative log-likelihood plus penalty / 2 times the squared weights; the
    bias is free.
    """
    own, shared, counts = past.own, past.population, past.counts
    offset = past.rates.log()
    shape = (own.shape[0] + shared.shape[1] + 1, own.shape[2])
    ones = own.new_ones(1, shape[1])
    power = torch.cat([own.square().mean(1), shared.square().mean(0)[:, None] * ones, ones])
    root = (power * past.rates.sum(0) + penalty).sqrt()  # of about the curvature
    scaled = own.new_zeros(shape).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled], max_iter=steps, history_size=20, tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    parts = (len(own), shared.shape[1], 1)

    @torch.no_grad()
    def closure() -> Tensor:
        weights = scaled / root
        mine, population, bias = weights.split(parts)
        log_rates = offset + regress(past, (mine, population, bias[0]))
        rates = log_rates.exp()
        error = rates - counts
        mine = torch.stack([(features * error).sum(0) for features in own])
        slope = torch.cat([mine, shared.T @ error, error.sum(0, keepdim=True)])
        slope[:-1] += penalty * weights[:-1]
        scaled.grad = slope / root
        squares = weights[:-1].square().sum()
        return (rates - counts * log_rates).double().sum() + penalty / 2 * squares

    optimizer.step(closure)
    mine, population, bias = (scaled.detach() / root).split(parts)
    return mine, population, bias[0]


RATIOS = (0.1, 0.3)  # shares that the transformers may hide
OPTIONS: dict[str, Any] = {"positions": "learned", "input_counts": "raw"}
SETTINGS: dict[str, Any] = {"epochs": 100, "batch_size": 16, "batches_per_step": 1}
SETTINGS |= {"weight_decay": 0.01}
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


class Baseline(ABC):
    """What the fitted baselines share: one map for each session and scheme, behind ``predict``.

    Attributes:
        split_seed: of the split it was fitted on.
        bin_size: of the bins, seconds.
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
        self.split_seed, self.bin_size = split_seed, sessions[0].bin_size
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
        self.ranks = tuple(RANKS if ranks is None else ranks)
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
        **changes: as in :func:`mtm.training.fit`. In a ``folder``, each ratio's run has a folder of
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
    model = MtMConfig.from_depth(**sizes, **OPTIONS)
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
            :func:`mtm.training.fit` takes of the transformers.

    Returns:
        a fitted predictor, for :func:`mtm.evaluate`.

    Raises:
        ValueError: for an unknown name.
        SessionError: when the sessions do not go together.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    return BASELINES[name](sessions, **settings)
