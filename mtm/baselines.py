"""Baselines: the methods a user would otherwise pick, with the same interface as the model.

=======================  =======================================================================
PSTH                     mean time course of the training trials, smoothed and shrunk
ridge                    linear regression of each neuron on the others
low-rank GLM             Poisson regression of each neuron on the others through latent variables
reduced-rank regression  the low-rank GLM of several sessions, which share temporal filters
temporal NDT1            our transformer, trained with temporal masking only
random-token NDT2        our transformer on patches, trained with random-token masking only
=======================  =======================================================================

Forward prediction of the regressions is an autoregressive Poisson GLM. Parameters are fitted on
training trials, hyperparameters chosen on validation trials. Inputs of the regressions are
residuals, ``(count - PSTH) / sqrt(mean + population mean)``, summed over windows of bins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtm import metrics
from mtm.checkpoint import save
from mtm.evaluation import evaluate
from mtm.masks import MTM_SCHEMES, Mask
from mtm.model import MtMConfig
from mtm.prediction import TASKS, forward_bins
from mtm.session import Session, SessionError, require_alike
from mtm.training import Fit, fit

# Grids of hyperparameters. Windows are (smallest, largest) distances in bins; None: whole trial.
SMOOTHING_WIDTHS = (0.0, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # s.d. of the PSTH kernel, bins
PRIOR_SPIKES = (3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e9)  # weight of the mean rate in a PSTH
AROUND = ((0, 0), (1, 1), (2, 3), (4, 7), (0, None))  # before and after the predicted bin
PAST = ((0, 0), (1, 2), (3, 6), (7, 14), (0, None))  # before the last visible bin
COMPONENTS = (4, 16, 32)  # of the population, inputs of forward prediction
RANKS = (8, 32, 64)  # of the low-rank GLM
SHRINKAGES = (0.0, 0.03, 0.1, 0.3, 1.0)  # of linear predictions at low rates
FLOOR = 0.3  # smallest linear prediction, as a share of the PSTH
LARGEST_INPUT = 6.0
LBFGS_STEPS = 40  # at each penalty of the GLMs
MIN_SPIKES = 5  # expected in the validation trials, for a neuron to count in a choice

# Settings of the transformers; they suit temporal masking better than the recipe "mtm".
RATIOS = (0.1, 0.3)
OPTIONS: dict[str, Any] = {"positions": "learned", "input_counts": "raw"}
SETTINGS: dict[str, Any] = {"epochs": 100, "batch_size": 16, "batches_per_step": 1}
SETTINGS |= {"weight_decay": 0.01}


# ------------------------------------------------------------------------- parts shared by all


def psth(session: Session, split_seed: int = 0) -> np.ndarray:
    """Log of each neuron's mean count per bin over the training trials, (1, T, N).

    Smoothed over time with a Gaussian and shrunk towards the neuron's mean, both by as much as
    predicts the validation trials best.
    """
    split = session.split(split_seed)
    train, val = (torch.from_numpy(session.counts[part]).double() for part in split[:2])
    null = torch.from_numpy(metrics.log_mean(session.counts[split.train]))
    mean, spikes, bins = null.exp(), train.sum((0, 1)), torch.arange(session.n_bins).double()
    tried = []
    for width in SMOOTHING_WIDTHS:
        kernel = torch.exp(-0.5 * ((bins[:, None] - bins) / max(width, 1e-3)) ** 2)
        smooth = kernel / kernel.sum(1, keepdim=True) @ train.mean(0)
        for prior in PRIOR_SPIKES:
            weight = spikes / (spikes + prior)  # neurons with few spikes are shrunk more
            log_rates = (mean + weight * (smooth - mean)).log()
            tried.append((validation_score(log_rates.expand_as(val), val, null), log_rates))
    return max(tried, key=itemgetter(0))[1][None].numpy()


def validation_score(log_rates: Tensor, counts: Tensor, null: Tensor) -> float:
    """Bits per spike over the null model (N,), mean over neurons with enough expected spikes."""
    bits = metrics.bits_per_spike(log_rates.numpy(), counts.numpy(), null.numpy())
    fired = ~np.isnan(bits)
    enough = fired & (null.exp() * (counts.numel() / len(null)) >= MIN_SPIKES).numpy()
    used = enough if enough.any() else fired
    return float(bits[used].mean()) if used.any() else 0.0


def search_penalty(score: Callable[[float], float], start: float) -> tuple[float, float]:
    """Best score and its penalty: hill climbing on the grid ``start * 3**k``."""
    scores = {0: score(start)}
    for step in (1, -1):
        k = max(scores, key=scores.__getitem__)
        while abs(k) < 15 and k + step not in scores:
            scores[k + step] = score(start * 3.0 ** (k + step))
            if scores[k + step] < scores[k] + 1e-5:
                break
            k += step
    k = max(scores, key=scores.__getitem__)
    return scores[k], start * 3.0**k


def window_matrices(
    n_bins: int, windows: Sequence[tuple[int, int | None]], past: bool = False
) -> Tensor:
    """Matrices (L, T, T) that sum over windows of bins and divide by the root of their size."""
    lag = torch.arange(n_bins)[:, None] - torch.arange(n_bins)  # row minus column
    distance = lag if past else lag.abs()
    rows = []
    for low, high in windows:
        high = n_bins if high is None else high
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


class Data:
    """A session, prepared for fitting.

    Attributes:
        rates, null: PSTH (T, N) in counts per bin; log of the mean count per bin (N,).
        largest, scale: (N,) largest count of a bin in training trials; divisor of the residuals.
        regions, alone: members of each region; neurons without one.
        counts, inputs: "train" or "val" -> counts (K', T, N) and their residuals.
    """

    def __init__(self, session: Session, split_seed: int) -> None:
        split = session.split(split_seed)
        self.name, self.n_bins, self.n_neurons = session.name, session.n_bins, session.n_neurons
        self.rates = torch.from_numpy(psth(session, split_seed)[0]).exp().float()
        self.null = torch.from_numpy(metrics.log_mean(session.counts[split.train])).float()
        largest = session.counts[split.train].max(axis=(0, 1))
        self.largest = torch.from_numpy(largest).float().clamp(min=1)
        mean = self.null.exp()
        self.scale = (mean + mean.mean()).sqrt()  # the population mean keeps rare spikes small
        self.codes = torch.from_numpy(session.region_codes)
        names = self.codes[self.codes >= 0].unique()
        self.regions = [(self.codes == code).nonzero()[:, 0] for code in names]
        self.alone = (self.codes < 0).nonzero()[:, 0]
        parts = {"train": split.train, "val": split.val}
        self.counts = {p: torch.from_numpy(session.counts[i]).float() for p, i in parts.items()}
        self.inputs = {part: self.residuals(counts) for part, counts in self.counts.items()}

    def residuals(self, counts: Tensor) -> Tensor:
        """Inputs of the regressions (K, T, N): counts minus PSTH, scaled; bursts are cut."""
        return ((counts - self.rates) / self.scale).clamp(max=LARGEST_INPUT)

    def link(self, delta: Tensor, gain: Tensor | None = None, start: int = 0) -> Tensor:
        """Log-rates for changes (K, T, N) of the PSTH's log, or with a gain (N,) of the count.

        No rate exceeds the neuron's largest count in training trials. ``start``: the first bin.
        """
        rates = self.rates[start:]
        if gain is not None:
            delta = (1 + gain * delta / rates).clamp(min=FLOOR).log()
        return torch.minimum(rates.log() + delta, self.largest.log())

    def score(self, delta: Tensor, gain: Tensor | None = None, start: int = 0) -> float:
        """:func:`validation_score` of changes (K', T, N) in the validation trials."""
        counts = self.counts["val"][:, start:]
        return validation_score(self.link(delta, gain, start), counts, self.null)

    def visible(self, scheme: str) -> Tensor:
        """(N, N) bool: whether the neuron of a column may see the neuron of a row."""
        itself = torch.eye(self.n_neurons, dtype=torch.bool)
        same = itself | ((self.codes == self.codes[:, None]) & (self.codes >= 0))
        return {"neuron": ~itself, "inter-region": ~same, "intra-region": same & ~itself}[scheme]


@dataclass
class Regression:
    """Fitted map from the visible entries of a trial to log-rates.

    Attributes:
        data: the session.
        windows: (L, T, T).
        weights: (H, N, L, N) from neuron and window to neuron, zero where it may not see the other;
            one map (H = 1), or if ``causal`` one for each number of bins ahead.
        bias: (H, N).
        gain: see :meth:`Data.link`.
    """

    data: Data
    windows: Tensor
    weights: Tensor
    bias: Tensor
    gain: Tensor | None = None
    causal: bool = False

    def __call__(self, counts: Tensor, first: Tensor, neurons: Tensor | None) -> Tensor:
        """Log-rates (B, T, N); with ``neurons`` (B,), only those of theirs are valid.

        ``counts`` (B, T, N) are 0 where hidden, which is everywhere from bin ``first`` (B,) on.
        """
        x = self.data.residuals(counts)
        trial, bins, delta = torch.arange(len(x)), torch.arange(x.shape[1]), torch.zeros_like(x)
        if neurons is not None and not self.causal:  # much faster than all neurons
            parts = torch.bmm(x, self.weights[0][..., neurons].permute(2, 0, 1))  # (B, T, L)
            delta[trial, :, neurons] = torch.einsum("lts,bsl->bt", self.windows, parts)
            return self.data.link(delta + self.bias[0], self.gain)
        sums = window_sums(x, self.windows)  # (B, T, N L)
        ahead = torch.zeros(x.shape[:2], dtype=torch.long)
        if self.causal:  # take the sums of the last visible bin, zeros where there is none
            known = torch.minimum(bins, first[:, None])  # (B, T): visible bins before each bin
            sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)[trial[:, None], known]
            ahead = (bins - known).clamp(max=len(self.weights) - 1)
        for i, (weights, bias) in enumerate(zip(self.weights, self.bias, strict=True)):
            delta[ahead == i] = sums[ahead == i] @ weights.flatten(0, 1) + bias
        return self.data.link(delta, self.gain)


Found = tuple[str, str, Regression, str, float]
"""Session, scheme, fitted map, chosen hyperparameters, validation score."""


# --------------------------------------------------------------- ridge: neurons from other neurons


def ridge_weights(
    gram: Tensor, cross: Tensor, penalty: float, among: Tensor, groups: Iterable[Tensor]
) -> Tensor:
    """Ridge weights (N L, N) of neurons from each other, without those of their own group; exact.

    With A = (F'F + penalty I)^-1 of the features F and w = A F'Y, the weights of a group with the
    block b of features held at zero are w - A[:, b] A[b, b]^-1 w[b].

    Args:
        gram, cross: F'F (N L, N L) and F'Y (N L, N).
        penalty: of the squared weights.
        among: the neurons to use; the weights of the others are 0.
        groups: positions in ``among`` of neurons that may not see each other.
    """
    columns = torch.arange(len(gram)).view(cross.shape[1], -1)  # (N, L)
    used = columns[among].ravel()
    shifted = gram[used][:, used] + penalty * torch.eye(len(used), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    weights = inverse @ cross[used][:, among]
    for members in groups:
        block = columns[members].ravel()
        shift = torch.linalg.solve(inverse[block][:, block], weights[block][:, members])
        weights[:, members] -= inverse[:, block] @ shift
        weights[block[:, None], members] = 0
    whole = torch.zeros_like(cross)
    whole[used[:, None], among] = weights
    return whole


def fit_ridge(data: Data) -> Iterator[Found]:
    """One regression for each scheme that the session has regions for."""
    windows = window_matrices(data.n_bins, AROUND).float()
    gram = cross = torch.zeros(())
    pairs = zip(*(part["train"].split(64) for part in (data.inputs, data.counts)), strict=True)
    for x, counts in pairs:  # the features of all trials could fill the memory
        features = window_sums(x, windows).flatten(0, 1).double()
        gram = gram + features.T @ features
        cross = cross + features.T @ (counts - data.rates).flatten(0, 1).double()
    everyone = torch.arange(data.n_neurons)
    parts = {"neuron": [(everyone, everyone.split(1))]}  # scheme -> (among, groups) of regressions
    if data.regions:
        parts["inter-region"] = [(everyone, (*data.regions, *data.alone.split(1)))]
        parts["intra-region"] = [(m, torch.arange(len(m)).split(1)) for m in data.regions]
    features, mean = window_sums(data.inputs["val"], windows), data.null.exp()
    # Linear predictions of neurons with low rates are noisier than a single penalty assumes.
    gains = [mean / (mean + shrinkage * mean.mean()) for shrinkage in SHRINKAGES]

    def fitted(scheme: str, penalty: float) -> tuple[float, Tensor, Tensor]:
        weights = [ridge_weights(gram, cross, penalty, *part) for part in parts[scheme]]
        whole = torch.stack(weights).sum(0).float()
        delta = features @ whole
        scores = [data.score(delta, gain) for gain in gains]
        return max(scores), gains[int(np.argmax(scores))], whole

    start = float(data.counts["train"][..., 0].numel())
    for scheme in parts:
        _, penalty = search_penalty(partial(lambda *case: fitted(*case)[0], scheme), start)
        score, gain, weights = fitted(scheme, penalty)
        weights = weights.view(1, data.n_neurons, -1, data.n_neurons)
        found = Regression(data, windows, weights, torch.zeros_like(weights[:, 0, 0]), gain)
        yield data.name, scheme, found, f"penalty {penalty:.3g}", score


# -------------------------------------------------------- low-rank GLM: neurons from other neurons


class LowRank:
    """Parameters of a low-rank GLM of one session; see :class:`LowRankGLM` for the formula.

    Outputs and bias are multiplied by ``gain``: neurons with low rates weigh less in the loss, and
    would be learned more slowly.
    """

    def __init__(self, data: Data, scheme: str, filters: Tensor) -> None:
        self.data, self.scheme, self.filters = data, scheme, filters  # (L, R), shared by sessions
        rank, n, mean = filters.shape[1], data.n_neurons, data.null.exp()
        self.windows = window_matrices(data.n_bins, AROUND).float()
        self.gain = (mean.mean() / (mean + 0.1 * mean.mean())).sqrt()
        self.inputs, self.outputs = torch.zeros(n, rank), torch.zeros(rank, n)
        self.bias = torch.zeros(n)
        for members in data.regions if scheme == "intra-region" else [torch.arange(n)]:
            x = data.inputs["train"][..., members]  # two filters for each of the directions
            directions = shared_directions(x, rank // 2).repeat_interleave(2, 1)
            self.inputs[members, : directions.shape[1]] = 0.1 * directions
        self.parameters = [p.requires_grad_() for p in (self.inputs, self.outputs, self.bias)]

    def delta(self, x: Tensor) -> Tensor:
        """Change of all log-rates (K, T, N), from residuals (K, T, N).

        A neuron's contribution to itself, or its region's, is computed apart and subtracted.
        """
        outputs, bias = self.outputs * self.gain, self.bias * self.gain
        filters = torch.einsum("lts,lr->rts", self.windows, self.filters / self.filters.norm(dim=0))

        def within(members: Tensor) -> Tensor:
            """Contribution of some neurons to each other, themselves included."""
            latents = torch.einsum("rts,ksr->ktr", filters, x[..., members] @ self.inputs[members])
            return latents @ outputs[:, members]

        def itself(members: Tensor) -> Tensor:
            """Contribution of some neurons, each to itself."""
            strength = self.inputs[members].T * outputs[:, members]  # (R, N')
            kernels = torch.einsum("rts,rn->nts", filters, strength)
            return torch.einsum("nts,ksn->ktn", kernels, x[..., members])

        everyone = torch.arange(x.shape[-1])
        if self.scheme == "neuron":
            return within(everyone) - itself(everyone) + bias
        order = torch.cat([*self.data.regions, self.data.alone]).argsort()
        parts = [*map(within, self.data.regions), itself(self.data.alone)]
        region = torch.cat(parts, -1)[..., order]
        if self.scheme == "intra-region":
            return region - itself(everyone) + bias
        return within(everyone) - region + bias

    def loss(self, penalty: float) -> Tensor:
        """Negative log-likelihood of the training trials and penalty.

        Above the largest count, the rate continues as a linear function of its logarithm, so that
        no step of a line search has an infinite loss.
        """
        log_rates = self.data.rates.log() + self.delta(self.data.inputs["train"])
        bounded = torch.minimum(log_rates, self.data.largest.log())
        rates = torch.dot(bounded.exp().ravel(), (log_rates - bounded + 1).ravel())
        nll = rates - torch.dot(self.data.counts["train"].ravel(), log_rates.ravel())
        squares = self.inputs.square().sum() + self.outputs.mul(self.gain).square().sum()
        return nll.double() + penalty / 2 * squares.double()

    @torch.no_grad()
    def fitted(self) -> tuple[float, Regression]:
        """Validation score, and the map as a matrix from neuron to neuron."""
        score = self.data.score(self.delta(self.data.inputs["val"]))
        filters, outputs = self.filters / self.filters.norm(dim=0), self.outputs * self.gain
        weights = torch.einsum("mr,lr,rn->mln", self.inputs, filters, outputs)
        weights = (weights * self.data.visible(self.scheme)[:, None])[None]
        return score, Regression(self.data, self.windows, weights, (self.bias * self.gain)[None])


def minimise(parameters: list[Tensor], loss: Callable[[], Tensor], **options: Any) -> None:
    """Minimise a loss with L-BFGS."""
    optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


RankFound = tuple[float, float, list[tuple[float, Regression]]]  # mean score, penalty, of each


def _fit_rank(sessions: Sequence[Data], scheme: str, rank: int, penalty: float) -> RankFound:
    """Fit sessions together; halve the penalty, from one solution to the next, until it is worse.

    Where the first penalty was the best, start again with a stronger one.
    """
    filters = torch.full((len(AROUND), rank), 0.1)
    filters[:-1, ::2] += 1  # half of the filters start with the short windows,
    filters[-1, 1::2] += 1  # half with the whole trial
    models = [LowRank(data, scheme, filters.requires_grad_()) for data in sessions]
    parameters = [filters, *(p for model in models for p in model.parameters)]
    best: RankFound = (-np.inf, penalty, [])
    first = penalty

    def loss() -> Tensor:
        return torch.stack([model.loss(penalty) for model in models]).sum()

    while penalty > 0.1:
        minimise(parameters, loss, max_iter=LBFGS_STEPS, history_size=10)
        found = [model.fitted() for model in models]
        mean = float(np.mean([score for score, _ in found]))
        if mean < best[0] + 1e-4:
            break
        best = (mean, penalty, found)
        penalty /= 2
    if best[1] == first < 1e5:
        best = max(best, _fit_rank(sessions, scheme, rank, 4 * first), key=itemgetter(0))
    return best


def fit_low_rank(sessions: Sequence[Data], ranks: Sequence[int]) -> Iterator[Found]:
    """Regressions of sessions that share filters; the rank is chosen for the scheme "neuron"."""
    spikes = sum(float(data.counts["train"].sum()) for data in sessions)
    penalty = 2.0 ** round(np.log2(2 * max(spikes, 1) ** 0.5))
    for scheme in ("neuron", "inter-region", "intra-region"):
        some = [data for data in sessions if data.regions or scheme == "neuron"]
        tried: dict[int, RankFound] = {}
        for rank in ranks if some else ():
            tried[rank] = _fit_rank(some, scheme, rank, penalty)
            penalty = 2 * tried[rank][1]
        if tried:
            rank = max(tried, key=lambda rank: tried[rank][0])
            ranks, text = (rank,), f"rank {rank}; penalty {tried[rank][1]:g}"
            for data, (score, found) in zip(some, tried[rank][2], strict=True):
                yield data.name, scheme, found, text, score


# ------------------------------------------------- forward prediction: neurons from their own past


class Past(NamedTuple):
    """Inputs of an autoregression: window sums up to a bin, ``horizon`` bins before the target."""

    own: Tensor  # (L, K, T - horizon, N) of each neuron
    population: Tensor  # (K, T - horizon, C L) of the components

    @classmethod
    def of(cls, data: Data, part: str, components: Tensor, horizon: int) -> Past:
        """Inputs of the training or validation trials, for components (N, C)."""
        x, windows = data.inputs[part], window_matrices(data.n_bins, PAST, past=True)
        windows = windows[:, :-horizon].float()
        return cls(windows[:, None] @ x, window_sums(x @ components, windows))

    def delta(self, own: Tensor, population: Tensor, bias: Tensor) -> Tensor:
        """Changes (K, T - horizon, N) for weights (L, N), (C L, N) and bias (N,)."""
        delta = self.population @ population + bias
        for sums, weights in zip(self.own, own, strict=True):
            delta = delta.addcmul(sums, weights)
        return delta


def poisson_regression(
    past: Past, rates: Tensor, counts: Tensor, penalty: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (L, N), (C L, N) and bias (N,) of Poisson regressions of all neurons at once.

    Minimises the negative log-likelihood of counts (K, T', N) with log-rate = log(rates (T', N)) +
    inputs, plus penalty / 2 times the squared weights, without the bias; a convex problem.
    """
    ones = torch.ones_like(rates[:1])
    power = [past.own.square().mean((1, 2)), past.population.square().mean((0, 1))[:, None] * ones]
    sizes = [*map(len, power), 1]
    # Weights are scaled by the root of about their curvature, which speeds up L-BFGS.
    root = (torch.cat([*power, ones]) * rates.sum(0) * len(counts) + penalty).sqrt()
    scaled = torch.zeros_like(root).requires_grad_()

    def weights() -> tuple[Tensor, Tensor, Tensor]:
        own, population, bias = (scaled / root).split(sizes)
        return own, population, bias[0]

    def loss() -> Tensor:
        own, population, bias = weights()
        log_rates = rates.log() + past.delta(own, population, bias)
        squares = own.square().sum() + population.square().sum()
        nll = metrics.poisson_nll(log_rates, counts)
        return nll.sum(dtype=torch.float64) + penalty / 2 * squares

    minimise([scaled], loss, max_iter=LBFGS_STEPS, history_size=20, tolerance_change=1e-10)
    scaled.requires_grad_(False)
    return weights()


def fit_forward(data: Data) -> Found:
    """Autoregressive Poisson GLM, a map for each number of bins ahead.

    Components and penalty are chosen for the middle horizon and used for all.
    """
    start, stop = forward_bins(data.n_bins)
    horizons = range(1, 1 + max(1, min(stop - start, data.n_bins - 1)))
    directions = shared_directions(data.inputs["train"], max(COMPONENTS))  # (N, at most N)

    def solve(n: int, horizon: int, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
        past = Past.of(data, "train", directions[:, :n], horizon)
        counts = data.counts["train"][:, horizon:]
        return poisson_regression(past, data.rates[horizon:], counts, penalty)

    def score(n: int, horizon: int, penalty: float) -> float:
        val = Past.of(data, "val", directions[:, :n], horizon)
        return data.score(val.delta(*solve(n, horizon, penalty)), start=horizon)

    middle = (len(horizons) + 1) // 2
    tried = [(*search_penalty(partial(score, n, middle), 300.0), n) for n in COMPONENTS]
    best, penalty, n = max(tried, key=itemgetter(0))
    maps, biases = [], []
    for horizon in horizons:
        own, population, bias = solve(n, horizon, penalty)
        population = population.view(-1, len(PAST), data.n_neurons)
        weights = torch.einsum("mc,cln->mln", directions[:, :n], population)
        weights.diagonal(dim1=0, dim2=2).add_(own)  # each neuron from itself
        maps.append(weights)
        biases.append(bias)
    windows = window_matrices(data.n_bins, PAST, past=True).float()
    text = f"{min(n, data.n_neurons)} components; penalty {penalty:.3g}"
    found = Regression(data, windows, torch.stack(maps), torch.stack(biases), causal=True)
    return data.name, "causal", found, text, best


# ------------------------------------------------------------------------------- the predictors


class Baseline(ABC):
    """Base class of the fitted regressions: one map for each session and masking scheme.

    Args:
        sessions: one, or several with distinct names and the same bins.
        split_seed: seed of the split into training, validation and test trials.

    Attributes:
        maps, chosen: (session, scheme) -> fitted map; chosen hyperparameters, validation score.
        schemes: the masking schemes that it can predict, for at least one session.
        seen: session -> fingerprints of its training trials, which evaluation refuses to score.
    """

    def __init__(self, sessions: Session | Sequence[Session], split_seed: int = 0) -> None:
        sessions = [sessions] if isinstance(sessions, Session) else list(sessions)
        if not sessions:
            raise SessionError("no session to fit a baseline on")
        require_alike(sessions)
        if sessions[0].n_bins < 2:
            raise SessionError(f"session {sessions[0].name!r}: baselines need two or more bins")
        self.split_seed, self.bin_size = split_seed, sessions[0].bin_size
        self.seen = {s.name: s.fingerprints(s.split(split_seed).train) for s in sessions}
        self.maps: dict[tuple[str, str], Regression] = {}
        self.chosen: dict[tuple[str, str], tuple[str, float]] = {}
        fitted = [Data(session, split_seed) for session in sessions]
        for name, scheme, found, text, score in self._fit(fitted):
            self.maps[name, scheme], self.chosen[name, scheme] = found, (text, score)
        for data in fitted:  # trials are not needed any more
            data.counts, data.inputs = {}, {}
        self.schemes = tuple(dict.fromkeys(scheme for _, scheme in self.maps))

    @abstractmethod
    def _fit(self, sessions: list[Data]) -> Iterator[Found]:
        """Fitted maps of all sessions and schemes."""

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}; bits per spike over the training mean, validation trials"]
        for (session, scheme), (text, score) in self.chosen.items():
            lines.append(f"  {session}  {scheme:<12}  {score:6.3f}  {text}")
        return "\n".join(lines)

    @torch.no_grad()
    def predict_log_rates(
        self, counts: Tensor, scheme: str, mask: Mask, session: str, neurons: Tensor | None = None
    ) -> Tensor:
        """Log-rates (B, T, N), in counts per bin; with ``neurons`` (B,), one a trial: (B, T).

        Hidden entries of counts (B, T, N) are set to 0. The scheme "causal" predicts each bin from
        those before it and before the first that is hidden in all neurons; the others predict each
        neuron from those that the scheme leaves visible.

        Raises:
            ValueError: for a session or a scheme that it was not fitted on.
        """
        if (session, scheme) not in self.maps:
            known = ", ".join(f"{scheme} of {name}" for name, scheme in self.maps)
            raise ValueError(
                f"{type(self).__name__} was not fitted on session {session!r}, scheme {scheme!r}; "
                f"it predicts: {known}"
            )
        hidden = mask.hidden.all(-1)  # (B, T): bins that are hidden in all neurons
        first = torch.where(hidden.any(1), hidden.int().argmax(1), counts.shape[1])
        visible = counts.float().masked_fill(mask.hidden, 0)
        log_rates = self.maps[session, scheme](visible, first, neurons)
        return log_rates if neurons is None else log_rates[torch.arange(len(counts)), :, neurons]


class PSTH(Baseline):
    """:func:`psth` of each session, whatever is visible."""

    def _fit(self, sessions: list[Data]) -> Iterator[Found]:
        for data in sessions:
            t, n, zeros = data.n_bins, data.n_neurons, torch.zeros
            found = Regression(data, zeros(0, t, t), zeros(1, n, 0, n), zeros(1, n))
            score = data.score(torch.zeros_like(data.counts["val"]))
            for scheme in MTM_SCHEMES:
                yield data.name, scheme, found, "", score


class Ridge(Baseline):
    """Ridge regressions of counts, each session on its own.

    A neuron is predicted from the other neurons, from other regions or from its own region; its
    future by an autoregressive Poisson GLM.

    Example:
        >>> print(mtm.evaluate(Ridge(session), session))
    """

    def _fit(self, sessions: list[Data]) -> Iterator[Found]:
        for data in sessions:
            yield from fit_ridge(data)
            yield fit_forward(data)


class LowRankGLM(Baseline):
    """Poisson regressions through a few latent variables, each session on its own.

    log-rate_n(t) = log PSTH_n(t) + bias_n + sum_r V_rn sum_l f_lr sum_m x_ml(t) U_mr over the
    neurons m that n may see, with x_ml the windows of neuron m's residuals. The penalty is on the
    squares of U and V, and so on the singular values of the map. Forward prediction is an
    autoregressive Poisson GLM. ``ranks`` are the numbers of latent variables to choose from.
    """

    together = False

    def __init__(
        self,
        sessions: Session | Sequence[Session],
        split_seed: int = 0,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.ranks = tuple(ranks or RANKS)
        if min(self.ranks) < 2:
            raise ValueError(f"ranks must be numbers of 2 or more, got {ranks}")
        super().__init__(sessions, split_seed)

    def _fit(self, sessions: list[Data]) -> Iterator[Found]:
        for group in [sessions] if self.together else [[data] for data in sessions]:
            yield from fit_low_rank(group, self.ranks)
        yield from map(fit_forward, sessions)


class ReducedRankRegression(LowRankGLM):
    """Low-rank GLM of sessions that are fitted together and share filters f, rank and penalty."""

    together = True


def temporal_ndt1(
    sessions: Session | Sequence[Session],
    split_seed: int = 0,
    ratios: Sequence[float] = RATIOS,
    depth: int = 2,
    *,
    tokenizer: str = "ndt1",
    scheme: str = "temporal",
    **changes: Any,
) -> Fit:
    """Transformer trained with temporal masking only, the paper's first baseline.

    A model is trained for each of the ``ratios``, shares of the bins to hide. The one with the best
    mean score in the activity tasks on validation trials is returned and, with ``folder``, saved
    there; each run has a folder of its own in it. ``changes`` are settings of :func:`mtm.fit`;
    tokenizer "ndt2" and scheme "random-token" make the paper's second baseline.
    """
    sessions = [sessions] if isinstance(sessions, Session) else list(sessions)
    config = MtMConfig.from_depth(depth, tokenizer=tokenizer, **OPTIONS)
    settings = {**SETTINGS, "schemes": (scheme,), "prompt": False, "split_seed": split_seed}
    settings |= changes
    runs, folder = [], changes.get("folder")
    for ratio in ratios:
        if folder is not None:
            settings["folder"] = Path(folder) / f"{scheme}-{ratio:g}"
        runs.append(fit(sessions, config, **settings, ratios={scheme: ratio}))

    def score(run: Fit) -> float:
        scores = []
        for session in sessions:
            tasks = [t for t in TASKS if session.region_names or not t.endswith("region")]
            report = evaluate(run, session, tasks=tasks, trials=session.split(split_seed).val)
            scores += [s.mean("bits_per_spike_train_null") for s in report.tasks.values()]
        return float(np.mean(scores))

    best = max(runs, key=score) if len(runs) > 1 else runs[0]
    if folder is not None:
        save(best, folder)
    return best


random_token_ndt2 = partial(temporal_ndt1, tokenizer="ndt2", scheme="random-token")
"""Transformer on patches trained with random-token masking only; see :func:`temporal_ndt1`."""

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
    """Fit one of :data:`BASELINES` to one session, or to several with the same bins.

    Settings are ``split_seed``; ``ranks`` of the low-rank GLMs; ``ratios``, ``depth`` and those of
    :func:`mtm.fit` of the transformers. Returns a predictor for :func:`mtm.evaluate`.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    return BASELINES[name](sessions, **settings)
