"""Linear paths of a session from its counts to its log-rates, around the encoder.

They are ours, not the paper's. The encoder sees all neurons through a bottleneck, which a neuron's
own history hardly passes, and needs more data than a linear map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtm.metrics import log_mean

SOFTENING = 0.1  # added to a mean count, so that rare spikes are not scaled up without bound
COMPONENTS = 32  # principal components that maps of the input start with
COMPONENTS_SCALE = 3.0  # their factor in initial weights of a stitcher
COMPONENT_BINS = 20_000  # most bins of training trials from which they are computed
SCALES = (1.0, 3.0, 10.0, math.inf)  # of the kernels, bins; inf: whole trial
LATENT_NOISE = (1.0, 0.5, 0.3, 0.15, 0.08)  # initial variance: a bin, then each kernel's average
LARGEST_INPUT = 4.0  # through an exponential, bursts would overshoot


def scaled(counts: Tensor, means: Tensor) -> Tensor:
    """Counts (..., N) as distances from the neurons' means (N,), in units of Poisson noise."""
    return (counts - means) * (means + SOFTENING).rsqrt()


def masked_input(counts: Tensor, means: Tensor, hidden: Tensor) -> Tensor:
    """Input of direct paths: scaled counts (B, T, N), 0 where hidden, large ones cut off."""
    x = scaled(counts.to(means.dtype), means).masked_fill(hidden, 0)
    return x.clamp(max=LARGEST_INPUT)


def principal_components(counts: np.ndarray, means: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components (N, R) of scaled training counts (K, T, N), and variances (R,)."""
    n_trials, n_bins, _ = counts.shape
    some = counts[:: math.ceil(n_trials * n_bins / COMPONENT_BINS)]  # every so many-th trial
    x = scaled(torch.from_numpy(some.astype(np.float32)), means)
    # What neurons share changes more slowly than their spikes: average over 5 bins.
    x = F.avg_pool1d(x.transpose(1, 2), 5, stride=1, padding=2, count_include_pad=False)
    x = x.transpose(1, 2).flatten(0, 1)  # (K T, N)
    _, singular, components = torch.pca_lowrank(x, min(COMPONENTS, *x.shape), niter=4)
    return components, singular.square() / len(x)


def stitcher_weights(directions: Tensor, n_outputs: int) -> Tensor:
    """What principal components (N, R) add to initial weights of a stitcher, (n_outputs, N)."""
    # Outputs 0 to R-1 start at the R components in turn, R to 2R-1 at their negatives, ...
    turn, component = divmod(np.arange(n_outputs), directions.shape[1])
    sign = torch.from_numpy(1.0 - 2.0 * (turn % 2)).float()
    return COMPONENTS_SCALE * sign[:, None] * directions.T[component]


@torch.no_grad()
def init_direct_paths(layers: Any, counts: np.ndarray) -> None:
    """Start the direct paths of an imported session from its training trials (K, T, N).

    ``layers`` are the session's. Does nothing where there are no paths, or they have started.
    """
    if layers.raw and layers.direct is not None and not layers.mean.any():
        layers.mean.copy_(torch.from_numpy(log_mean(counts)).float().exp())
        layers.init_from_components(*principal_components(counts, layers.mean))


class DirectPaths(nn.Module):
    """Two terms, 0 at the start, that are added to the log-rates of a session.

    - own history: each neuron's visible counts in other bins, averaged by kernels
      ``exp(-|lag| / scale)``, with a weight for each kernel and neuron;
    - the population: ``latents`` (their number) of a factor analysis, of the bin and averaged by
      the same kernels, with a linear map to all log-rates. With loadings L (R, N) and V = diag(
      share of bins in which a neuron is visible), their posterior mean is
      ``(L V L' + noise I)^-1 L x``, where x is 0 at hidden entries. It shrinks as more neurons are
      hidden: its scale is right for any mask.

    In causal mode kernels average strictly earlier bins. Compare POCO (arXiv 2506.14957).
    """

    def __init__(self, n_neurons: int, own_history: bool, latents: int, dropout: float) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(len(SCALES), n_neurons)) if own_history else None
        self.readout: nn.Linear | None = None
        if latents:
            scale = math.sqrt(n_neurons)
            self.loadings = nn.Parameter(torch.randn(latents, n_neurons) / scale)  # L
            self.log_noise = nn.Parameter(torch.tensor(LATENT_NOISE).log())
            self.dropout = nn.Dropout(dropout)
            self.readout = nn.Linear((1 + len(SCALES)) * latents, n_neurons, bias=False)
            nn.init.zeros_(self.readout.weight)

    def init_from_components(self, directions: Tensor, variances: Tensor) -> None:
        """Start the loadings at :func:`principal_components`, (N, R) and (R,)."""
        if self.readout is not None:
            # Poisson noise of scaled counts has variance 1, averaged over 5 bins 1/5.
            strength = (variances - 0.2).clamp(min=0.02).sqrt()
            n = min(len(self.loadings), len(strength))
            self.loadings[:n] = (strength[:, None] * directions.T)[:n]

    def forward(
        self,
        batches: Sequence[tuple[Tensor, Tensor, bool]],
        means: Tensor,
        neurons: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Terms of the log-rates of each batch, (B, T, N).

        Args:
            batches: counts (B, T, N), what is hidden of them (B, T, N), and whether it is in causal
                mode, of each.
            means: (N,) mean counts, by which they are scaled.
            neurons: (B,) the one neuron that is wanted of each trial; terms are (B, T) then.
        """
        counts, hidden, modes = zip(*batches, strict=True)
        causal = [
            torch.full_like(part[:, 0, 0], mode, dtype=torch.bool)
            for part, mode in zip(counts, modes, strict=True)
        ]
        # Without autocast: bfloat16 has too few digits to solve linear equations.
        with torch.autocast(means.device.type, enabled=False):
            every = torch.cat(hidden)
            x = masked_input(torch.cat(counts), means, every)
            found = self.terms(x, every, torch.cat(causal), neurons)
        return found.split([len(part) for part in counts])

    def terms(
        self, x: Tensor, hidden: Tensor, causal: Tensor, neurons: Tensor | None = None
    ) -> Tensor:
        """Terms (B, T, N), or (B, T), of a :func:`masked_input` in which trials are ``causal``."""
        kernels = history_kernels((~hidden).any(dim=2), causal, x.dtype)  # (B, scales, T, T)
        found = torch.zeros_like(x if neurons is None else x[..., 0])
        if self.own is not None and neurons is None:
            averages = (kernels.flatten(1, 2) @ x).unflatten(1, kernels.shape[1:3])
            for i in range(len(SCALES)):  # quicker on a CPU than one product and a sum
                found = torch.addcmul(found, averages[:, i], self.own[i])
        elif self.own is not None:
            alone = x[torch.arange(len(x), device=x.device), :, neurons]  # (B, T)
            averages = (kernels @ alone[:, None, :, None])[..., 0]  # (B, scales, T)
            found = torch.einsum("bst,sb->bt", averages, self.own[:, neurons])
        if self.readout is None:
            return found
        z = self.dropout(self.population_latents(x, hidden, kernels).transpose(1, 2).flatten(2))
        if neurons is None:
            return found + self.readout(z)
        return found + (z @ self.readout.weight[neurons][..., None])[..., 0]

    def population_latents(
        self, x: Tensor, hidden: Tensor, kernels: Tensor | None = None
    ) -> Tensor:
        """Expected latents of each bin, alone and averaged, (B, 1 + scales, T, R)."""
        z = (x @ self.loadings.T)[:, None]
        if kernels is not None:  # linear, so it does not matter that they average afterwards
            z = torch.cat([z, kernels @ z], dim=1)
        # V: each neuron's share of visible bins, among the bins that are not hidden whole.
        n_bins = (~hidden).any(dim=2).sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
        visible = (~hidden).sum(dim=1) / n_bins  # (B, N)
        precision = (visible[:, None] * self.loadings) @ self.loadings.T  # (B, R, R)
        noise = self.log_noise[: z.shape[1]].exp()[:, None]  # (1 + scales, 1)
        noise = torch.diag_embed(noise.expand(-1, len(self.loadings)))
        # solve_ex, unlike solve, does not wait for the device's errors.
        return torch.linalg.solve_ex(precision[:, None] + noise, z.mT)[0].mT


def history_kernels(visible: Tensor, causal: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of other ``visible`` (B, T) bins in averages for each bin, (B, scales, T, T)."""
    bins = torch.arange(visible.shape[1], device=visible.device, dtype=dtype)
    lag = bins[:, None] - bins
    kernels = torch.stack([torch.exp(-lag.abs() / scale) for scale in SCALES])
    # Not the bin itself, nor, in trials that are ``causal`` (B,), later ones.
    allowed = torch.where(causal[:, None, None], lag > 0, lag != 0) & visible[:, None]  # (B, T, T)
    kernels = kernels * allowed[:, None]
    # The total weight plus 1 shrinks averages over few bins towards 0.
    return kernels / (kernels.sum(dim=3, keepdim=True) + 1)
