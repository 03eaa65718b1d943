"""Baselines: the methods a user would otherwise pick, with the same interface as the model.

- PSTH: mean time course of the training trials, smoothed and shrunk
- ridge: linear regression of each neuron on the others, of its future on the past
- low-rank GLM: Poisson regression through a few latent variables
- reduced-rank regression: the low-rank GLM of several sessions, which share temporal filters
- temporal NDT1: our transformer, trained with temporal masking only
- random-token NDT2: our transformer on patches, trained with random-token masking only

Parameters are fitted on training trials, hyperparameters chosen on validation trials. Inputs of the
regressions are residuals, ``(count - PSTH) / sqrt(mean + population mean)``, summed over windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtm import metrics
from mtm.evaluation import evaluate
from mtm.masks import MTM_SCHEMES, Mask
from mtm.model import MtMConfig
from mtm.prediction import TASKS, forward_bins, unobserved
from mtm.session import Session, require_alike
from mtm.training import Fit, fit

# Grids of hyperparameters. Windows are (smallest, largest) distances in bins.
SMOOTHING_WIDTHS = (0.0, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # s.d. of the PSTH kernel, bins
PRIOR_SPIKES = (3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e9)  # weight of the mean rate in a PSTH
AROUND = ((0, 0), (1, 1), (2, 3), (4, 7), (0, inf))  # before and after the predicted bin
RIDGE_WINDOWS = {  # those of AROUND that a ridge regression uses
    "same bin and trial": [0, 4],
    "up to 1 bin and trial": [0, 1, 4],
    "up to 7 bins and trial": [0, 1, 2, 3, 4],
}
PAST = ((0, 0), (1, 2), (3, 6), (7, 14), (0, inf))  # before the last visible bin
COMPONENTS = (4, 16, 32)  # of the population, inputs of forward prediction
RANKS = (8, 32, 64)  # of the low-rank GLM
LARGEST_INPUT = 6.0
LBFGS_STEPS = 40  # at each penalty of the low-rank GLM
MIN_SPIKES = 5  # expected in the validation trials, for a neuron to count in a choice

# Settings of the transformers; they suit temporal masking better than the recipe "mtm".
SETTINGS: dict[str, Any] = dict(epochs=100, batch_size=16, batches_per_step=1, weight_decay=0.01)

Truth = tuple[Tensor, Tensor, Tensor]  # counts, log of the mean (N,), and what was observed


def validation_score(log_rates: Tensor, counts: Tensor, null: Tensor, known: Tensor) -> float:
    """Bits per spike over the null model (N,), mean over neurons with enough expected spikes.

    Entries that are not ``known`` have no spikes, and add nothing.
    """
    log_rates = torch.where(known, log_rates, null)
    bits = metrics.bits_per_spike(log_rates.numpy(), counts.numpy(), null.numpy())
    fired = ~np.isnan(bits)
    enough = fired & (null.exp() * (counts.numel() / len(null)) >= MIN_SPIKES).numpy()
    used = enough if enough.any() else fired
    return float(bits[used].mean()) if used.any() else 0.0


def search_penalty(attempt: Callable[[float], tuple[Any, ...]], start: float) -> tuple[Any, ...]:
    """The attempt of the best score, its first entry; climbs the grid ``start * 3**k``."""
    tried = {0: attempt(start)}
    for step in (1, -1):
        k = max(tried, key=lambda k: tried[k][0])
        while abs(k) < 15 and k + step not in tried:
            tried[k + step] = attempt(start * 3.0 ** (k + step))
            if tried[k + step][0] < tried[k][0] + 1e-5:
                break
            k += step
    return max(tried.values(), key=itemgetter(0))


def window_matrices(
    n_bins: int, windows: Sequence[tuple[int, float]], past: bool = False
) -> Tensor:
    """Matrices (L, T, T) that sum over windows of bins and divide by the root of their size."""
    lag = torch.arange(n_bins)[:, None] - torch.arange(n_bins)  # row minus column
    distance = lag if past else lag.abs()
    rows = []
    for low, high in windows:
        size = (high - low + 1) * (1 if past else 2) - (not past and low == 0)
        rows.append(((distance >= low) & (distance <= high)) / min(size, n_bins) ** 0.5)
    return torch.stack(rows)


def window_sums(x: Tensor, windows: Tensor) -> Tensor:
    """Residuals (K, T, N) to features (K, T, N L), the L windows of a neuron side by side."""
    return torch.einsum("lts,ksn->ktnl", windows, x).flatten(2)


def shared_directions(x: Tensor, n: int) -> Tensor:
    """The n directions (N, n) of largest covariance between a bin and its neighbours."""
    neighbours = window_matrices(x.shape[1], ((1, 3),)).to(x.dtype)[0] @ x
    covariance = x.flatten(0, 1).T @ neighbours.flatten(0, 1)
    _, vectors = torch.linalg.eigh((covariance + covariance.T).double())
    return vectors.flip(1)[:, :n].to(x.dtype)


class Link(NamedTuple):
    """From predicted changes of log-rates or, with a gain, of counts to log-rates."""

    rates: Tensor  # (T, N), or the shape of the changes
    largest: Tensor  # (N,) count, which limits predictions
    scale: Tensor  # (N,) divisor of the residuals
    gain: Tensor | None = None  # (N,)
    floor: float = 0.0  # share of the rate that is always left

    def __call__(self, delta: Tensor) -> Tensor:
        """Log-rates (..., N) of changes (..., N)."""
        if self.gain is None:
            return torch.minimum(self.rates.log() + delta, self.largest.log())
        counts = torch.maximum(self.rates + self.gain * delta, self.floor * self.rates)
        return torch.minimum(counts, self.largest).log()

    def residuals(self, counts: Tensor) -> Tensor:
        """Inputs of the regressions (K, T, N): counts minus rates, scaled; bursts are cut."""
        return ((counts - self.rates) / self.scale).clamp(max=LARGEST_INPUT)


def tune(delta: Tensor, link: Link, truth: Truth) -> tuple[float, Link]:
    """Choose gain (less for low rates) and floor; returns the score of the predicted changes."""

    def best(links: Iterable[Link]) -> tuple[float, Link]:
        scored = [(validation_score(link(delta), *truth), link) for link in links]
        return max(scored, key=itemgetter(0))

    mean = truth[1].exp()
    gains = [
        strength * mean / (mean + prior * mean.mean())
        for prior in (0.0, 0.03, 0.1, 0.3, 1.0)
        for strength in (0.6, 0.8, 1.0, 1.25, 1.6)
    ]
    _, link = best(link._replace(gain=gain, floor=0.2) for gain in gains)
    return best(link._replace(floor=floor) for floor in (0.2, 0.05, 0.1, 0.3, 0.5))


class Data:
    """A session, prepared for fitting: PSTH ``rates`` (T, N), counts and inputs by part."""

    def __init__(self, session: Session, split_seed: int, dtype: torch.dtype) -> None:
        split = session.split(split_seed)
        self.name, self.n_bins, self.n_neurons = session.name, session.n_bins, session.n_neurons
        parts, filled = {"train": split.train, "val": split.val}, session.filled(split.train)
        counts = {k: torch.from_numpy(session.counts[v]) for k, v in parts.items()}
        # What was observed, (K, 1, N); elsewhere counts are 0, and so are the inputs.
        self.known = {k: torch.from_numpy(~unobserved(session, v)) for k, v in parts.items()}
        null = torch.from_numpy(metrics.log_mean(filled))
        val = counts["val"].double(), null, self.known["val"]
        rates = _psth(torch.from_numpy(filled).double(), *val)
        self.rates, self.null = rates.to(dtype), null.to(dtype)
        mean = self.null.exp()
        scale = (mean + mean.mean()).sqrt()  # the population mean keeps rare spikes small
        self.counts = {part: each.to(dtype) for part, each in counts.items()}
        self.link = Link(self.rates, self.counts["train"].amax((0, 1)).clamp(min=1), scale)
        self.inputs = {k: self.link.residuals(c) * self.known[k] for k, c in self.counts.items()}
        self.truth = self.counts["val"], self.null, self.known["val"]
        codes, places = torch.from_numpy(session.region_codes), torch.arange(session.n_neurons)
        codes = torch.where(codes < 0, len(codes) + places, codes)  # no region: one of its own
        self.regions = [places[codes == code] for code in codes.unique()]
        itself, same = places[:, None] == places, codes[:, None] == codes
        # Whether the neuron of a column may see the neuron of a row, (N, N):
        self.visible = {"neuron": ~itself}
        if session.region_names:
            self.visible |= {"inter-region": ~same, "intra-region": same & ~itself}


def _psth(train: Tensor, val: Tensor, null: Tensor, known: Tensor) -> Tensor:
    """Mean counts per bin (T, N), smoothed over time and shrunk to each neuron's mean."""
    mean, spikes = null.exp(), train.sum((0, 1))
    bins, tried = torch.arange(train.shape[1]).double(), []
    for width in SMOOTHING_WIDTHS:
        kernel = torch.exp(-0.5 * ((bins[:, None] - bins) / max(width, 1e-3)) ** 2)
        smooth = kernel / kernel.sum(1, keepdim=True) @ train.mean(0)
        for prior in PRIOR_SPIKES:
            weight = spikes / (spikes + prior)  # neurons with few spikes are shrunk more
            log_rates = (mean + weight * (smooth - mean)).log()
            tried.append((validation_score(log_rates.expand_as(val), val, null, known), log_rates))
    return max(tried, key=itemgetter(0))[1].exp()


@dataclass
class Regression:
    """Fitted map from the visible entries of a trial to log-rates."""

    windows: Tensor  # (L, T, T)
    weights: Tensor  # (H, N, L, N) from neuron and window to neuron; if causal, by bins ahead
    bias: Tensor  # (H, N)
    link: Link
    score: float  # bits per spike over the training mean, validation trials
    chosen: str = ""  # hyperparameters
    causal: bool = False

    @torch.no_grad()
    def predict(self, counts: Tensor, hidden: Tensor, neurons: Tensor | None) -> Tensor:
        """Log-rates (B, T, N), or with ``neurons`` (B,), one a trial, (B, T)."""
        # At the PSTH, the input of a hidden neuron is 0; 0 spikes would be an observation.
        visible = torch.where(hidden, self.link.rates.to(counts), counts)
        x = self.link.residuals(visible.to(self.bias))
        trial, bins, delta = torch.arange(len(x)), torch.arange(x.shape[1]), torch.zeros_like(x)
        if neurons is not None and not self.causal:  # much faster than all neurons
            parts = torch.bmm(x, self.weights[0][..., neurons].permute(2, 0, 1))  # (B, T, L)
            delta[trial, :, neurons] = torch.einsum("lts,bsl->bt", self.windows, parts)
            return self.link(delta + self.bias[0]).float()[trial, :, neurons]
        sums = window_sums(x, self.windows)  # (B, T, N L)
        ahead = torch.zeros(x.shape[:2], dtype=torch.long)
        if self.causal:  # take the sums of the last visible bin, zeros where there is none
            seen = (~hidden.all(-1)).long().cumprod(1)
            known = seen.cumsum(1) - seen  # (B, T): visible bins before each bin
            sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)[trial[:, None], known]
            ahead = (bins - known).clamp(max=len(self.weights) - 1)
        for i, (weights, bias) in enumerate(zip(self.weights, self.bias, strict=True)):
            delta[ahead == i] = sums[ahead == i] @ weights.flatten(0, 1) + bias
        log_rates = self.link(delta).float()
        return log_rates if neurons is None else log_rates[trial, :, neurons]


Found = Iterator[tuple[str, str, Regression]]  # session, scheme, map
Coefficients = tuple[Tensor, Tensor, Tensor]  # own (L, N), population (C L, N), bias (N,)
Ranked = tuple[float, float, int, list[Regression]]  # mean score, penalty, rank, maps


def fit_psth(data: Data) -> Found:
    """The PSTH, whatever is visible."""
    counts, n = data.counts["val"], data.n_neurons
    windows = counts.new_zeros(0, data.n_bins, data.n_bins)
    weights, bias = counts.new_zeros(1, n, 0, n), counts.new_zeros(1, n)
    score = validation_score(data.link(torch.zeros_like(counts)), *data.truth)
    found = Regression(windows, weights, bias, data.link, score)
    yield from ((data.name, scheme, found) for scheme in MTM_SCHEMES)


def ridge_weights(
    gram: Tensor, cross: Tensor, penalty: float, among: Tensor, groups: Iterable[Tensor]
) -> Tensor:
    """Ridge weights (N L, N) of neurons ``among`` each other, from F'F and F'Y of features F.

    Those of a group (positions in ``among``) do not see each other. With A = (F'F + penalty I)^-1
    and w = A F'Y, the weights of a group with the block b of features held at zero are exactly
    w - A[:, b] A[b, b]^-1 w[b].
    """
    features = torch.arange(len(gram)).view(cross.shape[1], -1)  # (N, L)
    used = features[among].ravel()
    shifted = gram[used][:, used] + penalty * torch.eye(len(used), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    weights = inverse @ cross[used][:, among]
    for members in groups:
        block = features[members].ravel()
        shift = torch.linalg.solve(inverse[block][:, block], weights[block][:, members])
        weights[:, members] -= inverse[:, block] @ shift
        weights[block[:, None], members] = 0
    whole = torch.zeros_like(cross)
    whole[used[:, None], among] = weights
    return whole


def fit_ridge(data: Data) -> Found:
    """One regression for each scheme that the session has regions for, and autoregressions."""
    windows = window_matrices(data.n_bins, AROUND).double()
    # Neurons that were observed in the same trials have the same equations.
    patterns, pattern = data.known["train"][:, 0].unique(dim=1, return_inverse=True)
    equations = []
    for trials in patterns.T:
        gram = cross = torch.zeros(())
        pairs = (part["train"][trials].split(64) for part in (data.inputs, data.counts))
        for x, counts in zip(*pairs, strict=True):  # features of all trials could fill the memory
            sums = window_sums(x, windows).flatten(0, 1)
            gram = gram + sums.T @ sums
            cross = cross + sums.T @ (counts - data.rates).flatten(0, 1)
        equations.append((gram, cross))
    features = torch.arange(len(gram)).view(data.n_neurons, -1)  # (N, L)
    everyone = torch.arange(data.n_neurons)
    parts = {  # (among, groups) of regressions
        "neuron": [(everyone, everyone.split(1))],
        "inter-region": [(everyone, data.regions)],
        "intra-region": [(members, everyone[: len(members)].split(1)) for members in data.regions],
    }

    def attempt(scheme: str, name: str, penalty: float) -> tuple[float, Regression]:
        chosen = RIDGE_WINDOWS[name]
        used = features[:, chosen].ravel()
        weights = torch.zeros_like(equations[0][1][used])
        for i, (gram, cross) in enumerate(equations):
            known = gram[used][:, used], cross[used], penalty
            found = torch.stack([ridge_weights(*known, *part) for part in parts[scheme]]).sum(0)
            weights[:, pattern == i] = found[:, pattern == i]
        delta = window_sums(data.inputs["val"], windows[chosen]) @ weights
        score, link = tune(delta, data.link, data.truth)
        weights = weights.view(1, data.n_neurons, -1, data.n_neurons)
        text = f"{name}; penalty {penalty:.3g}; floor {link.floor:g}"
        bias = torch.zeros_like(weights[:, 0, 0])
        return score, Regression(windows[chosen], weights, bias, link, score, text)

    start = float(data.counts["train"][..., 0].numel())
    for scheme in data.visible:
        tried = [search_penalty(partial(attempt, scheme, name), start) for name in RIDGE_WINDOWS]
        yield data.name, scheme, max(tried, key=itemgetter(0))[1]
    yield data.name, "causal", fit_forward(data, ridge_regression)


class LowRank:
    """Parameters of a low-rank GLM of one session.

    log-rate_n(t) = log PSTH_n(t) + bias_n + sum_r V_rn sum_l f_lr sum_m x_ml(t) U_mr over the
    neurons m that n may see, with x_ml the windows of neuron m's residuals. The penalty is on the
    squares of inputs U and outputs V, and so on the singular values of the map. V and bias are
    multiplied by ``gain``: neurons with low rates weigh less, and would be learned more slowly.
    """

    def __init__(self, data: Data, scheme: str, filters: Tensor) -> None:
        self.data, self.scheme, self.filters = data, scheme, filters  # (L, R), shared by sessions
        rank, n, mean = filters.shape[1], data.n_neurons, data.null.exp()
        self.windows = window_matrices(data.n_bins, AROUND).float()
        self.gain = (mean.mean() / (mean + 0.1 * mean.mean())).sqrt()
        self.inputs, self.outputs = torch.zeros(n, rank), torch.zeros(rank, n)
        self.bias = torch.zeros(n)
        self.together = [members for members in data.regions if len(members) > 1]
        self.alone = torch.cat([torch.arange(0), *(m for m in data.regions if len(m) == 1)])
        for members in self.together if scheme == "intra-region" else [torch.arange(n)]:
            x = data.inputs["train"][..., members]  # two filters for each of the directions
            directions = shared_directions(x, (rank + 1) // 2).repeat_interleave(2, 1)[:, :rank]
            self.inputs[members, : directions.shape[1]] = 0.1 * directions
        self.parameters = [p.requires_grad_() for p in (self.inputs, self.outputs, self.bias)]

    def delta(self, x: Tensor) -> Tensor:
        """Change of all log-rates (K, T, N), from residuals (K, T, N)."""
        outputs = self.outputs * self.gain
        filters = torch.einsum("lts,lr->rts", self.windows, self.filters / self.filters.norm(dim=0))

        def within(members: Tensor) -> Tensor:  # from neurons to each other and themselves
            latents = torch.einsum("rts,ksr->ktr", filters, x[..., members] @ self.inputs[members])
            return latents @ outputs[:, members]

        def itself(members: Tensor) -> Tensor:  # from each to itself
            strength = self.inputs[members].T * outputs[:, members]  # (R, N')
            kernels = torch.einsum("rts,rn->nts", filters, strength)
            return torch.einsum("nts,ksn->ktn", kernels, x[..., members])

        everyone = torch.arange(x.shape[-1])
        if self.scheme != "neuron":
            order = torch.cat([*self.together, self.alone]).argsort()
            parts = [*map(within, self.together), itself(self.alone)]
            region = torch.cat(parts, -1)[..., order]
        # What a neuron adds to itself, or to its region, is computed apart and subtracted.
        seen = region if self.scheme == "intra-region" else within(everyone)
        unseen = region if self.scheme == "inter-region" else itself(everyone)
        return seen - unseen + self.bias * self.gain

    def loss(self, penalty: float) -> Tensor:
        """Negative log-likelihood of the training trials and penalty."""
        log_rates = self.data.rates.log() + self.delta(self.data.inputs["train"])
        # Above the largest count, the rate continues as a linear function of its logarithm, so that
        # no step of a line search has an infinite loss.
        log_rates = torch.where(self.data.known["train"], log_rates, self.data.null)
        bounded = torch.minimum(log_rates, self.data.link.largest.log())
        rates = torch.dot(bounded.exp().ravel(), (log_rates - bounded + 1).ravel())
        nll = rates - torch.dot(self.data.counts["train"].ravel(), log_rates.ravel())
        squares = self.inputs.square().sum() + self.outputs.mul(self.gain).square().sum()
        return nll.double() + penalty / 2 * squares.double()

    @torch.no_grad()
    def fitted(self, chosen: str) -> Regression:
        """The map as a matrix from neuron to neuron."""
        data, bias = self.data, (self.bias * self.gain)[None]
        score = validation_score(data.link(self.delta(data.inputs["val"])), *data.truth)
        filters, outputs = self.filters / self.filters.norm(dim=0), self.outputs * self.gain
        weights = torch.einsum("mr,lr,rn->mln", self.inputs, filters, outputs)
        weights = weights * data.visible[self.scheme][:, None]
        return Regression(self.windows, weights[None], bias, data.link, score, chosen)


def _minimise(parameters: list[Tensor], loss: Callable[[], Tensor], **options: Any) -> None:
    """Minimise a loss with L-BFGS."""
    optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def _fit_rank(sessions: Sequence[Data], scheme: str, rank: int, penalty: float) -> Ranked:
    """Fit sessions together; halve the penalty, from solution to solution, until it is worse."""
    filters = torch.full((len(AROUND), rank), 0.1)
    filters[:-1, ::2] += 1  # half of the filters start with the short windows,
    filters[-1, 1::2] += 1  # half with the whole trial
    models = [LowRank(data, scheme, filters.requires_grad_()) for data in sessions]
    parameters = [filters, *(p for model in models for p in model.parameters)]
    best: Ranked = (-np.inf, penalty, rank, [])
    first = penalty

    def loss() -> Tensor:
        return torch.stack([model.loss(penalty) for model in models]).sum()

    while penalty > 0.1:
        _minimise(parameters, loss, max_iter=LBFGS_STEPS, history_size=10)
        found = [model.fitted(f"rank {rank}; penalty {penalty:g}") for model in models]
        mean = float(np.mean([each.score for each in found]))
        if mean < best[0] + 1e-4:
            break
        best, penalty = (mean, penalty, rank, found), penalty / 2
    if best[1] == first < 1e5:  # start again with a stronger one
        best = max(best, _fit_rank(sessions, scheme, rank, 4 * first), key=itemgetter(0))
    return best


def fit_low_rank(*sessions: Data, ranks: Sequence[int] | None = None) -> Found:
    """Regressions of sessions that share filters, and an autoregression of each session."""
    ranks = ranks or RANKS
    spikes = sum(float(data.counts["train"].sum()) for data in sessions)
    penalty = 2.0 ** round(np.log2(2 * max(spikes, 1) ** 0.5))
    for scheme in max((data.visible for data in sessions), key=len):
        some, tried = [data for data in sessions if scheme in data.visible], []
        for rank in ranks:
            tried.append(_fit_rank(some, scheme, rank, penalty))
            penalty = 2 * tried[-1][1]
        _, _, best, maps = max(tried, key=itemgetter(0))
        ranks = (best,)  # for the other schemes too
        yield from ((data.name, scheme, found) for data, found in zip(some, maps, strict=True))
    for data in sessions:
        yield data.name, "causal", fit_forward(data, poisson_regression)


class Past(NamedTuple):
    """Samples of a regression from a bin's past to the count some bins later."""

    own: Tensor  # (L, S, N) window sums of each neuron; S = K (T - horizon)
    population: Tensor  # (S, C L) window sums of the components
    rates: Tensor  # (S, N)
    counts: Tensor  # (S, N)
    known: Tensor  # (S, N) bool

    @classmethod
    def of(cls, data: Data, part: str, components: Tensor, horizon: int) -> Past:
        """Samples of the training or validation trials, for components (N, C)."""
        x, counts = data.inputs[part], data.counts[part]
        windows = window_matrices(data.n_bins, PAST, past=True).to(x.dtype)[:, :-horizon]
        population = window_sums(x @ components, windows).flatten(0, 1)
        own = (windows[:, None] @ x).flatten(1, 2)
        later = data.rates.expand_as(counts), counts, data.known[part].expand_as(counts)
        return cls(own, population, *(each[:, horizon:].flatten(0, 1) for each in later))

    def predict(self, own: Tensor, population: Tensor, bias: Tensor) -> Tensor:
        """Changes (S, N) for weights (L, N), (C L, N) and bias (N,)."""
        delta = self.population @ population + bias
        for features, weights in zip(self.own, own, strict=True):
            delta = delta.addcmul(features, weights)
        return delta


def ridge_regression(past: Past, penalty: float) -> Coefficients:
    """Ridge regression of counts minus rates, by the normal equations of each neuron."""
    known, shared = past.known.to(past.own), past.population
    own, residual = past.own * known, (past.counts - past.rates) * known
    both = torch.einsum("isn,sc->nic", own, shared)
    own_gram = torch.einsum("isn,jsn->nij", own, own)
    if past.known.all():
        shared_gram = (shared.T @ shared).expand(len(both), -1, -1)
    else:
        shared_gram = torch.einsum("sn,sc,sd->ncd", known, shared, shared)
    rows = torch.cat([own_gram, both], 2), torch.cat([both.mT, shared_gram], 2)
    gram = torch.cat(rows, 1)  # (N, L + C L, L + C L)
    gram += penalty * torch.eye(gram.shape[1], dtype=gram.dtype)
    cross = torch.cat([(own * residual).sum(1), shared.T @ residual])  # (L + C L, N)
    weights = torch.linalg.solve(gram, cross.T).T
    return weights[: len(own)], weights[len(own) :], torch.zeros_like(weights[0])


def poisson_regression(past: Past, penalty: float, steps: int = 40) -> Coefficients:
    """Poisson regressions of all neurons at once, penalty / 2 times the squared weights."""
    ones = torch.ones_like(past.own[0, :1])
    power = [past.own.square().mean(1), past.population.square().mean(0)[:, None] * ones, ones]
    # Weights are scaled by the root of about their curvature, which speeds up L-BFGS.
    root = (torch.cat(power) * past.rates.sum(0) + penalty).sqrt()
    scaled = torch.zeros_like(root).requires_grad_()
    offset = past.rates.log()

    def coefficients() -> Coefficients:
        own, population, bias = (scaled / root).split([len(part) for part in power])
        return own, population, bias[0]

    def loss() -> Tensor:
        own, population, bias = coefficients()
        # A constant where it is not known, which has no gradient.
        log_rates = torch.where(past.known, offset + past.predict(own, population, bias), offset)
        nll = (log_rates.exp() - past.counts * log_rates).sum(dtype=torch.float64)
        return nll + penalty / 2 * (own.square().sum() + population.square().sum())

    _minimise([scaled], loss, max_iter=steps, history_size=20, tolerance_change=1e-10)
    scaled.requires_grad_(False)
    return coefficients()


def fit_forward(data: Data, solve: Callable[[Past, float], Coefficients]) -> Regression:
    """Regressions for each number of bins ahead, with components and penalty of the middle one."""
    start, stop = forward_bins(data.n_bins)
    horizons = range(1, 1 + stop - start)
    directions = shared_directions(data.inputs["train"], max(COMPONENTS))

    def attempt(components: Tensor, train: Past, val: Past, penalty: float) -> tuple[Any, ...]:
        delta, link = val.predict(*solve(train, penalty)), data.link._replace(rates=val.rates)
        truth = val.counts, data.null, val.known
        if solve is ridge_regression:
            return *tune(delta, link, truth), penalty, components
        return validation_score(link(delta), *truth), link, penalty, components

    tried = []
    for components in (directions[:, :n] for n in COMPONENTS):
        middle = components, (len(horizons) + 1) // 2
        train, val = (Past.of(data, part, *middle) for part in ("train", "val"))
        tried.append(search_penalty(partial(attempt, components, train, val), 300.0))
    score, link, penalty, components = max(tried, key=itemgetter(0))
    n, maps, biases = components.shape[1], [], []
    for horizon in horizons:
        own, population, bias = solve(Past.of(data, "train", components, horizon), penalty)
        maps.append(torch.einsum("mc,cln->mln", components, population.view(n, len(PAST), -1)))
        maps[-1].diagonal(dim1=0, dim2=2).add_(own)  # each neuron from itself
        biases.append(bias)
    windows = window_matrices(data.n_bins, PAST, past=True).to(own)
    fitted = windows, torch.stack(maps), torch.stack(biases), link._replace(rates=data.rates)
    text = f"{n} components of the population; penalty {penalty:.3g}"
    return Regression(*fitted, score, text, causal=True)


class Baseline:
    """A fitted PSTH or regression: one of ``maps`` for each session and masking scheme."""

    def __init__(
        self,
        name: str,
        solve: Callable[..., Found],
        dtype: torch.dtype,
        sessions: Sequence[Session],
        split_seed: int = 0,
        together: bool = False,
        **settings: Any,
    ) -> None:
        require_alike(sessions)
        self.name, self.split_seed, self.bin_size = name, split_seed, sessions[0].bin_size
        self.n_bins, self.window = sessions[0].n_bins, sessions[0].window
        # Fingerprints of training trials, which evaluation refuses to score:
        self.seen = {s.name: s.fingerprints(s.split(split_seed).train) for s in sessions}
        data = [Data(session, split_seed, dtype) for session in sessions]
        self.maps: dict[tuple[str, str], Regression] = {
            (session, scheme): found
            for group in ([data] if together else [[each] for each in data])
            for session, scheme, found in solve(*group, **settings)
        }
        self.schemes = tuple(dict.fromkeys(scheme for _, scheme in self.maps))

    def __repr__(self) -> str:
        lines = [f"{self.name}; bits per spike over the training mean, validation trials"]
        for (session, scheme), found in self.maps.items():
            lines.append(f"  {session}  {scheme:<12}  {found.score:6.3f}  {found.chosen}")
        return "\n".join(lines)

    def predict_log_rates(
        self, counts: Tensor, scheme: str, mask: Mask, session: str, neurons: Tensor | None = None
    ) -> Tensor:
        """Log-rates (B, T, N), in counts per bin; with ``neurons`` (B,), one a trial: (B, T).

        The scheme "causal" predicts each bin from those before it and before the first that is
        hidden in all neurons; the others predict each neuron from those they leave visible.
        """
        if (session, scheme) not in self.maps:
            what = f"not fitted on session {session!r}, scheme {scheme!r}"
            raise ValueError(f"{self.name} was {what}; it predicts {list(self.maps)}")
        return self.maps[session, scheme].predict(counts, mask.hidden, neurons)


def temporal_ndt1(
    sessions: Sequence[Session],
    split_seed: int = 0,
    ratios: Sequence[float] = (0.1, 0.3),
    depth: int = 2,
    *,
    tokenizer: str = "ndt1",
    scheme: str = "temporal",
    **changes: Any,
) -> Fit:
    """Transformer trained with temporal masking only, the paper's first baseline.

    With "ndt2" and "random-token", it is the second. Of the models of all ``ratios`` (shares that
    are hidden), the one with the best mean over the activity tasks in the validation trials is
    returned. ``changes`` are settings of :func:`mtm.fit`.
    """
    config = MtMConfig.published(depth, tokenizer=tokenizer)
    settings = {**SETTINGS, "schemes": (scheme,), "prompt": False, "split_seed": split_seed}
    runs = []
    for ratio in ratios:
        changes |= {"ratios": {scheme: ratio}}
        run, scores = fit(sessions, config, **settings | changes), [0.0]
        for session in sessions if len(ratios) > 1 else ():
            tasks = [t for t in TASKS if session.region_names or not t.endswith("region")]
            report = evaluate(run, session, tasks=tasks, trials=session.split(split_seed).val)
            scores += [s.mean("bits_per_spike_train_null") for s in report.tasks.values()]
        runs.append((sum(scores), run))  # as many scores for each ratio
    return max(runs, key=itemgetter(0))[1]


# Name -> function of (sessions, split_seed=0, ...) that returns a fitted predictor
BASELINES: dict[str, Callable[..., Any]] = {
    "PSTH": partial(Baseline, "PSTH", fit_psth, torch.float64),
    "ridge": partial(Baseline, "ridge", fit_ridge, torch.float64),
    "low-rank GLM": partial(Baseline, "low-rank GLM", fit_low_rank, torch.float32),
    "reduced-rank regression": partial(
        Baseline, "reduced-rank regression", fit_low_rank, torch.float32, together=True
    ),
    "temporal NDT1": temporal_ndt1,
    "random-token NDT2": partial(temporal_ndt1, tokenizer="ndt2", scheme="random-token"),
}


def fit_baseline(name: str, sessions: Session | Sequence[Session], **settings: Any) -> Any:
    """Fit a baseline by its name; returns a predictor for :func:`mtm.evaluate`.

    Args:
        name: one of :data:`BASELINES`.
        sessions: one, or several with distinct names and the same bins.
        **settings: ``split_seed``; ``ranks`` of the low-rank GLMs; of the transformers ``ratios``,
            ``depth`` and the settings of :func:`mtm.fit`.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    sessions = [sessions] if isinstance(sessions, Session) else list(sessions)
    return BASELINES[name](sessions, **settings)
