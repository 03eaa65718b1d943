"""Regressions of spike counts on spike counts: what the linear and Poisson baselines are made of.

Inputs are (count - PSTH) / sqrt(mean + population mean), where the means are counts a bin, of the
neuron and of all neurons; sums over windows of bins are divided by the root of the window's size.
Noise then weighs about the same in every input, and rare spikes are not blown up. A neuron is
predicted from what its task leaves visible: one map, with zeros where a neuron may not look, serves
all neurons at once. Maps are fitted on training trials; windows, penalties, ranks and whatever else
is chosen are those with most bits per spike on validation trials.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtm import metrics
from mtm.session import Session
from mtm.tasks import forward_bins

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
