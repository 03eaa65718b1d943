"""The model: spike counts to tokens, a transformer encoder, tokens to log-rates.

MtM (arXiv 2407.14668, section 3) cuts a trial of counts (B, T, N) into tokens in one of two ways:

=========  ==============================  ===================================  ===============
tokenizer  a token is                      layers that know about neurons       tokens of a bin
=========  ==============================  ===================================  ===============
``ndt1``   one bin of all neurons          each session's stitcher and readout  1
``ndt2``   one bin of a patch of neurons   shared; a bias for each neuron       ceil(N / P)
=========  ==============================  ===================================  ===============

The session token (whose recording it is) and the prompt token (which masking scheme is on) come
first. Differences from the authors' code:

1. counts are centred and scaled for each neuron, so that a hidden entry (0) looks like the neuron's
   mean rather than like silence;
2. in causal mode nothing flows from later to earlier bins;
3. a new model predicts the mean rates (``init="paper"`` starts as theirs does);
4. :class:`DirectPaths` add a linear map from counts to log-rates that bypasses the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtm.masks import MTM_SCHEMES, Mask
from mtm.masks import scheme as known_scheme
from mtm.metrics import log_mean

TOKEN_STD = 0.05  # initial standard deviation of session and prompt tokens
POSITION_SCALE = 0.3  # initial amplitude of time and space embeddings
READOUT_SCALE = 0.1  # factor on initial readout weights: predictions start near the mean rates
SOFTENING = 0.1  # added to a mean count, so that rare spikes are not scaled up without bound
COMPONENTS = 32  # principal components that a new stitcher starts with
SCALES = (1.0, 3.0, 10.0, math.inf)  # of the kernels of the direct paths, bins; inf: whole trial
LATENT_NOISE = (1.0, 0.5, 0.3, 0.15, 0.08)  # initial variance: a bin, then each kernel's average
LARGEST_INPUT = 4.0  # of the direct paths: through an exponential, bursts would overshoot
COMPONENTS_SCALE = 3.0  # their factor in its weights
COMPONENT_BINS = 20_000  # most bins of training trials from which they are computed

PUBLISHED: dict[str, Any] = {  # the authors' options
    "positions": "learned",
    "input_counts": "raw",
    "own_history": False,
    "latents": 0,
}
CHOICES = {
    "tokenizer": ("ndt1", "ndt2"),
    "positions": ("rotary", "learned"),
    "input_counts": ("scaled", "raw"),
    "activation": ("gelu", "relu"),
}


class CheckpointError(ValueError):
    """A file or folder that does not hold a readable model; the message says why."""


@dataclass(frozen=True)
class MtMConfig:
    """Sizes and options of a model. The default sizes are the paper's, the options our best."""

    tokenizer: str = "ndt1"  # "ndt1": a token for each bin; "ndt2": for each bin and patch
    width: int = 512  # D, of a token
    depth: int = 5  # transformer layers
    heads: int = 8  # attention heads; width must be a multiple
    mlp_width: int = 1024  # hidden units of a layer's MLP
    stitch_width: int = 668  # S, to which the stitchers of ndt1 map all sessions
    patch_size: int = 128  # P, neurons of an ndt2 token
    dropout: float = 0.4  # in attention and MLP
    embed_dropout: float = 0.2  # of the tokens
    positions: str = "rotary"  # of time: "rotary", or "learned" embeddings (the authors)
    input_counts: str = "scaled"  # (count - mean) / sqrt(mean + 0.1), or "raw" (the authors)
    session_token: bool = True
    own_history: bool = True  # direct path from each neuron's own counts to its log-rates
    latents: int = 32  # R, of the direct path from the population to the log-rates; 0: no path
    latent_dropout: float = 0.7  # of these latents
    causal: bool = True  # in causal mode: to earlier bins only; False: full attention in every mode
    activation: str = "gelu"  # of the MLPs

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp_width", "stitch_width", "patch_size"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.latents < 0 or not 0 <= self.latent_dropout < 1:
            raise ValueError("latents must be 0 or more, latent_dropout at least 0 and below 1")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        unit = self.heads * (2 if self.positions == "rotary" else 1)  # rotation acts on pairs
        if self.width % unit:
            raise ValueError(f"width {self.width} must be a multiple of {unit} (heads, rotation)")

    @property
    def direct_paths(self) -> bool:
        """Whether sessions have :class:`DirectPaths`, of either kind."""
        return self.own_history or self.latents > 0

    @classmethod
    def from_depth(cls, depth: int, **fields: Any) -> Self:
        """Sizes that go with a number of layers; those of ``from_depth(5)`` are the paper's.

        Width, heads and dropout grow with depth. ``fields`` sets any field by hand. Without
        dropout, small models overfit recordings of few trials and many neurons.
        """
        heads = max(1, round(1.6 * depth))
        width = 64 * heads
        sizes: dict[str, Any] = {
            "depth": depth,
            "heads": heads,
            "width": width,
            "mlp_width": 2 * width,
            "stitch_width": round(width * 668 / 512),
            "dropout": min(0.4, round(0.1 * (depth + 1), 2)),
        }
        return cls(**{**sizes, **fields})

    @classmethod
    def published(cls, depth: int = 5, **fields: Any) -> Self:
        """The authors' model: the paper's sizes, learned positions, raw counts, no direct paths."""
        return cls.from_depth(depth, **{**PUBLISHED, **fields})


class SessionLayers(nn.Module):
    """What belongs to one session alone: stitcher, readout, session token and direct paths.

    With ndt2, whose layers all sessions share, a bias for each neuron replaces the first two.
    """

    mean: Tensor  # (N,) mean count of each neuron, by which the input is scaled

    def __init__(self, n_neurons: int, config: MtMConfig) -> None:
        super().__init__()
        self.n_neurons, self.n_patches = n_neurons, 1  # n_patches: tokens of a bin
        if config.tokenizer == "ndt1":
            self.stitcher = nn.Linear(n_neurons, config.stitch_width)
            self.readout = nn.Linear(config.width, n_neurons)
        else:
            self.n_patches = math.ceil(n_neurons / config.patch_size)
            self.bias = nn.Parameter(torch.zeros(n_neurons))
        self.token = nn.Parameter(torch.zeros(config.width)) if config.session_token else None
        self.raw = config.input_counts == "raw"
        if config.direct_paths or not self.raw:
            self.register_buffer("mean", torch.zeros(n_neurons))
        self.direct = DirectPaths(n_neurons, config) if config.direct_paths else None

    @torch.no_grad()
    def init_from(
        self, log_means: Tensor, components: tuple[Tensor, Tensor] | None, init: str
    ) -> None:
        """Start at log mean counts (N,) and :func:`principal_components` of the training trials."""
        if hasattr(self, "mean"):
            self.mean.copy_(log_means.exp())
        if init == "paper":
            return
        if self.direct is not None and components is not None:
            self.direct.init_from(*components)
        if hasattr(self, "bias"):  # ndt2
            self.bias.copy_(log_means)
            return
        self.readout.weight.mul_(READOUT_SCALE)
        self.readout.bias.copy_(log_means)
        if components is None or self.raw:  # components are of scaled counts
            return
        # Each output of the stitcher starts at a component: outputs 0 to R-1 at the R components
        # in turn, R to 2R-1 at their negatives, and so on.
        directions = components[0]
        turn, component = divmod(np.arange(len(self.stitcher.weight)), directions.shape[1])
        sign = torch.from_numpy(1.0 - 2.0 * (turn % 2)).float()
        self.stitcher.weight += COMPONENTS_SCALE * sign[:, None] * directions.T[component]


def principal_components(counts: np.ndarray, means: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components (N, R) of scaled training counts (K, T, N), and variances (R,)."""
    n_trials, n_bins, _ = counts.shape
    some = counts[:: math.ceil(n_trials * n_bins / COMPONENT_BINS)]  # every so many-th trial
    x = (torch.from_numpy(some.astype(np.float32)) - means) * (means + SOFTENING).rsqrt()
    # What neurons share changes more slowly than their spikes: average over 5 bins.
    x = F.avg_pool1d(x.transpose(1, 2), 5, stride=1, padding=2, count_include_pad=False)
    x = x.transpose(1, 2).flatten(0, 1)  # (K T, N)
    _, singular, components = torch.pca_lowrank(x, min(COMPONENTS, *x.shape), niter=4)
    return components, singular.square() / len(x)


# ---------------------------------------------------------------- from counts to log-rates directly


class DirectPaths(nn.Module):
    """Linear paths of one session, from its counts to its log-rates.

    The encoder sees all neurons through a bottleneck, which a neuron's own history hardly passes,
    and needs more data than a linear map. Two terms are added to its log-rates:

    - own history: each neuron's visible counts in other bins of the trial, averaged by kernels
      ``exp(-|lag| / scale)``, with a weight for each kernel and neuron;
    - the population: latents of a factor analysis, averaged by the same kernels, with a linear map
      to all log-rates. With loadings L (R, N) and V = diag(share of bins in which a neuron is
      visible), their posterior mean is ``(L V L' + noise I)^-1 L x``, where x is 0 at hidden
      entries. It shrinks towards 0 as more neurons are hidden, so its scale is right for any mask.

    Both maps start at 0. In causal mode kernels average strictly earlier bins (the latents of the
    bin itself are used, too). The paths are ours, not the paper's; compare POCO (arXiv 2506.14957),
    a forecaster of single neurons given the population.
    """

    def __init__(self, n_neurons: int, config: MtMConfig) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(len(SCALES), n_neurons)) if config.own_history else None
        self.readout: nn.Linear | None = None
        if n := config.latents:
            self.loadings = nn.Parameter(torch.randn(n, n_neurons) / math.sqrt(n_neurons))  # L
            self.log_noise = nn.Parameter(torch.tensor(LATENT_NOISE).log())
            self.dropout = nn.Dropout(config.latent_dropout)
            self.readout = nn.Linear((1 + len(SCALES)) * n, n_neurons, bias=False)
            nn.init.zeros_(self.readout.weight)

    def init_from(self, components: Tensor, variances: Tensor) -> None:
        """Start the loadings at principal components (N, R) with variances (R,)."""
        if self.readout is None:
            return
        n = min(len(self.loadings), len(variances))
        # Poisson noise of scaled counts has variance 1, averaged over 5 bins 1/5.
        strength = (variances[:n] - 0.2).clamp(min=0.02).sqrt()
        self.loadings[:n] = strength[:, None] * components.T[:n]

    def forward(
        self, x: Tensor, hidden: Tensor, causal: Tensor, neurons: Tensor | None = None
    ) -> Tensor:
        """Masked input (B, T, N) to what is added to the log-rates, (B, T, N) or (B, T).

        Args:
            x: scaled counts, 0 where ``hidden`` (B, T, N).
            causal: (B,) bool.
            neurons: (B,) the one neuron wanted of each trial.
        """
        x = x.clamp(max=LARGEST_INPUT)
        kernels = history_kernels((~hidden).any(dim=2), causal, x.dtype)  # (B, scales, T, T)
        found = torch.zeros_like(x if neurons is None else x[..., 0])
        if self.own is not None:
            found = found + own_history(x, kernels, self.own, neurons)
        if self.readout is None:
            return found
        z = self.dropout(self.population_latents(x, hidden, kernels).transpose(1, 2).flatten(2))
        if neurons is None:
            return found + self.readout(z)
        return found + (z @ self.readout.weight[neurons][..., None])[..., 0]

    def population_latents(self, x: Tensor, hidden: Tensor, kernels: Tensor) -> Tensor:
        """Expected latents of each bin, alone and averaged, (B, 1 + scales, T, R)."""
        # Linear, so it does not matter that kernels average after the projection.
        z = (x @ self.loadings.T)[:, None]
        z = torch.cat([z, kernels @ z], dim=1)
        # V: for each neuron, in how many of the bins that are not hidden whole it is visible.
        n_bins = (~hidden).any(dim=2).sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
        visible = (~hidden).sum(dim=1) / n_bins  # (B, N)
        precision = (visible[:, None] * self.loadings) @ self.loadings.T  # (B, R, R)
        noise = self.log_noise[: z.shape[1]].exp()[:, None]  # (1 + scales, 1)
        noise = torch.diag_embed(noise.expand(-1, len(self.loadings)))
        # In float32 at least. solve_ex, unlike solve, does not wait for the device's errors.
        exact = torch.promote_types(x.dtype, torch.float32)
        equations = (precision[:, None] + noise).to(exact)
        return torch.linalg.solve_ex(equations, z.mT.to(exact))[0].mT.to(x.dtype)


def own_history(x: Tensor, kernels: Tensor, weights: Tensor, neurons: Tensor | None) -> Tensor:
    """Sum of each neuron's averages by ``kernels``, with its ``weights`` (scales, N)."""
    if neurons is not None:
        x = x[torch.arange(len(x), device=x.device), :, neurons]  # (B, T)
        averages = (kernels @ x[:, None, :, None])[..., 0]  # (B, scales, T)
        return torch.einsum("bst,sb->bt", averages, weights[:, neurons])
    averages = (kernels.flatten(1, 2) @ x).unflatten(1, kernels.shape[1:3])  # (B, scales, T, N)
    found = torch.zeros_like(x)
    for i in range(len(weights)):  # quicker on a CPU than one product and a sum
        found = torch.addcmul(found, averages[:, i], weights[i])
    return found


def history_kernels(visible: Tensor, causal: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of the visible bins in averages for each bin, (B, scales, T, T), itself left out.

    Sums are divided by the total weight plus 1, which shrinks averages over few bins towards 0.

    Args:
        visible: (B, T) bool, the bins to average.
        causal: (B,) bool, whether earlier bins only count.
    """
    bins = torch.arange(visible.shape[1], device=visible.device, dtype=dtype)
    lag = bins[:, None] - bins
    kernels = torch.stack([torch.exp(-lag.abs() / scale) for scale in SCALES])
    allowed = torch.where(causal[:, None, None], lag > 0, lag != 0) & visible[:, None]  # (B, T, T)
    kernels = kernels * allowed[:, None]
    return kernels / (kernels.sum(dim=3, keepdim=True) + 1)


# ---------------------------------------------------------------- from counts to tokens, and back


class BinTokenizer(nn.Module):
    """The NDT1 tokenizer: a token for each bin. Stitchers map all sessions to one width first."""

    def __init__(self, config: MtMConfig, n_bins: int, init: str) -> None:
        super().__init__()
        self.embed_spikes = nn.Linear(config.stitch_width, 2 * config.stitch_width)
        self.project = nn.Linear(2 * config.stitch_width, config.width)
        self.time = time_embedding(config, n_bins, init)

    def forward(self, x: Tensor, layers: SessionLayers) -> Tensor:
        """Masked input (B, T, N) to tokens (B, T, D)."""
        x = layers.stitcher(x)  # (B, T, S)
        x = self.project(F.softsign(self.embed_spikes(x)))  # (B, T, D)
        return x if self.time is None else x + self.time

    def read_out(self, x: Tensor, layers: SessionLayers) -> Tensor:
        """Tokens (B, T, D) to log-rates (B, T, N)."""
        return layers.readout(x)


class PatchTokenizer(nn.Module):
    """The NDT2 tokenizer: a token for each bin and patch of neurons, with embeddings of both.

    The last patch of a bin is filled up with zeros, and its surplus outputs are cut off.
    """

    def __init__(self, config: MtMConfig, n_bins: int, init: str) -> None:
        super().__init__()
        self.n_bins, self.patch_size = n_bins, config.patch_size
        self.embed_spikes = nn.Linear(config.patch_size, 2 * config.patch_size)
        self.project = nn.Linear(2 * config.patch_size, config.width)
        # A row for each place of a patch in a bin: see `grow`.
        self.space = nn.Parameter(torch.empty(0, config.width))
        self.space_norm = nn.LayerNorm(config.width)
        self.time = time_embedding(config, n_bins, init)
        self.time_norm = None if self.time is None else nn.LayerNorm(config.width)
        self.readout = nn.Linear(config.width, config.patch_size)
        if init != "paper":
            for norm in (self.space_norm, self.time_norm or self.space_norm):
                nn.init.constant_(norm.weight, POSITION_SCALE)
            self.readout.weight.data.mul_(READOUT_SCALE)
            nn.init.zeros_(self.readout.bias)  # each neuron has a bias of its own

    def forward(self, x: Tensor, layers: SessionLayers) -> Tensor:
        """Masked input (B, T, N) to tokens (B, T x patches, D)."""
        x = F.pad(x, (0, layers.n_patches * self.patch_size - x.shape[2]))
        x = x.unflatten(2, (-1, self.patch_size))  # (B, T, patches, P)
        x = self.project(F.softsign(self.embed_spikes(x)))  # (B, T, patches, D)
        x = x + self.space_norm(self.space[: layers.n_patches])
        if self.time is not None and self.time_norm is not None:
            x = x + self.time_norm(self.time)[:, None]
        return x.flatten(1, 2)  # bin by bin

    def read_out(self, x: Tensor, layers: SessionLayers) -> Tensor:
        """Tokens (B, T x patches, D) to log-rates (B, T, N)."""
        x = self.readout(x.unflatten(1, (self.n_bins, -1)))  # (B, T, patches, P)
        return x.flatten(2)[..., : layers.n_neurons] + layers.bias

    def grow(self, n_patches: int) -> None:
        """Add random places for a session that is larger than all before."""
        if n_patches > len(self.space):
            new = torch.randn(n_patches - len(self.space), self.space.shape[1]).to(self.space)
            self.space = nn.Parameter(torch.cat([self.space.detach(), new]))


def time_embedding(config: MtMConfig, n_bins: int, init: str) -> nn.Parameter | None:
    """A learned vector for each bin, (T, D), at its start; None with rotary positions."""
    if config.positions == "rotary":
        return None
    if init == "paper":
        return nn.Parameter(torch.randn(n_bins, config.width))
    return nn.Parameter(POSITION_SCALE * waves(n_bins, config.width))


def waves(n_bins: int, width: int) -> Tensor:
    """Sines and cosines of the bin's number, (n_bins, width): near bins get similar embeddings.

    From a random start a model first has to find out which bins are neighbours.
    """
    half = torch.arange((width + 1) // 2) / ((width + 1) // 2)
    periods = 4.0 * (n_bins / 2.0) ** half  # geometric, from 4 bins to twice the trial
    angle = 2 * math.pi * torch.arange(n_bins)[:, None] / periods
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


def rotation(bins: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (L, width / 2), of the angles by which bins turn their tokens (RoPE).

    Source: Su et al. 2021. The prefix counts as the bin before the first.
    """
    speed = 10_000.0 ** (-torch.arange(0, width, 2, device=bins.device) / width)
    angle = bins[:, None] * speed
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d / 2) of queries or keys (B, heads, L, d) by their tokens' angles.

    The product of a query and a key then depends on how far apart their bins are, not on when.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# ---------------------------------------------------------------- the encoder


class Tokens(NamedTuple):
    """Tokens of a batch of trials, and which of them attend to which."""

    x: Tensor  # (B, L, D), the prefix first
    bins: Tensor  # (L,) the bin of each token, -1 for the prefix
    causal: bool = False  # lower-triangular attention, which needs no mask tensor: the fast kernels
    allowed: Tensor | None = None  # (L, L) or (B, 1, L, L) bool: query (row) may attend to key


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tokens, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens to (B, L, D); ``turns`` are the cosines and sines of rotary positions."""
        q, k, v = (
            part(tokens.x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)
            for part in (self.query, self.key, self.value)
        )
        if turns is not None:
            q, k = rotate(q, *turns), rotate(k, *turns)
        p = self.dropout.p if self.training else 0.0  # of the attention weights
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=tokens.allowed, dropout_p=p, is_causal=tokens.causal
        )
        return self.dropout(self.out(x.transpose(1, 2).flatten(2)))  # heads side by side again


class Layer(nn.Module):
    """A pre-norm transformer layer: attention, then an MLP, each added to its input."""

    def __init__(self, config: MtMConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads, config.dropout)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = getattr(F, config.activation)

    def forward(self, tokens: Tokens, turns: tuple[Tensor, Tensor] | None = None) -> Tokens:
        """Tokens to tokens of the same bins."""
        x = tokens.x + self.attention(tokens._replace(x=self.norm1(tokens.x)), turns)
        x = x + self.dropout(self.down(self.activation(self.up(self.norm2(x)))))
        return tokens._replace(x=x)


# ---------------------------------------------------------------- the model


class Batch(NamedTuple):
    """Trials of one session with a mask: the arguments of ``MtM.forward``."""

    counts: Tensor  # (B, T, N)
    scheme: str | None
    mask: Mask
    session: str

    def split(self, size: int) -> list[Batch]:
        """Return batches of at most ``size`` trials."""
        parts = (x.split(size) for x in (self.counts, self.mask.hidden, self.mask.target))
        return [
            self._replace(counts=counts, mask=Mask(hidden, target, self.mask.causal))
            for counts, hidden, target in zip(*parts, strict=True)
        ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout; afterwards each part is in the mode in which it was."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class MtM(nn.Module):
    """A model of the activity of one or many sessions.

    Args:
        config: sizes and options.
        n_bins: T, time bins of a trial.
        sessions: name -> number of neurons, to begin with; see :meth:`add_session`.
        bin_size: of a time bin, seconds.
        prompts: masking schemes with a prompt token; () = no prompt tokens.
        causal: whether it is trained with causal attention too. If not, predictions never use it.
        init: how weights start: ``"mtm"``, or ``"paper"``, as in the authors' code.

    Attributes:
        split_seed: of the splits it was trained on (:meth:`mtm.Session.split`); None = not known.
        window: of the trials it was trained on (:class:`mtm.Session`); None = not known.
        seen: session -> :meth:`mtm.Session.fingerprints` of its training trials, (n,) int64.
        shrinkage: session -> scheme -> factor of :meth:`predict_log_rates`; 1 where there is none.
    """

    tokenizers: Mapping[str, type[Any]] = {"ndt1": BinTokenizer, "ndt2": PatchTokenizer}

    def __init__(
        self,
        config: MtMConfig,
        n_bins: int,
        sessions: Mapping[str, int] | None = None,
        *,
        bin_size: float = 0.02,
        prompts: Sequence[str] = MTM_SCHEMES,
        causal: bool = True,
        init: str = "mtm",
    ) -> None:
        super().__init__()
        if init not in ("mtm", "paper"):
            raise ValueError(f"init must be 'mtm' or 'paper', got {init!r}")
        self.config, self.n_bins, self.bin_size = config, n_bins, bin_size
        self.prompts, self.causal, self.init = tuple(prompts), causal, init
        self.split_seed: int | None = None
        self.window: tuple[float, float] | None = None
        self.seen: dict[str, np.ndarray] = {}
        self.shrinkage: dict[str, dict[str, float]] = {}
        self.token_std = 1.0 if init == "paper" else TOKEN_STD
        self.tokenizer = self.tokenizers[config.tokenizer](config, n_bins, init)
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.prompt_tokens = nn.Parameter(self.token_std * torch.randn(len(prompts), config.width))
        self.sessions = nn.ModuleDict()
        self._keys: dict[str, str] = {}  # session name -> key in self.sessions
        scale = 0.67 * config.depth**-0.25  # of residual branches, as in T-Fixup
        for key, weight in self.layers.named_parameters():
            if key.endswith(("out.weight", "up.weight", "down.weight")):
                weight.data.mul_(scale)
            elif key.endswith("value.weight"):
                weight.data.mul_(scale * math.sqrt(2))
        for name, n_neurons in (sessions or {}).items():
            self.add_session(name, n_neurons)

    def forward(
        self,
        counts: Tensor,
        scheme: str | None,
        mask: Mask | None,
        session: str,
        neurons: Tensor | None = None,
    ) -> Tensor:
        """Log of the expected count of every entry, hidden ones included.

        Args:
            counts: (B, T, N) spike counts of trials of one session.
            scheme: masking scheme whose prompt token is shown. One without a prompt token, or
                None, shows none.
            mask: what to hide, and whether attention is causal. None hides nothing.
            session: its name.
            neurons: (B,) index of the one neuron of each trial that is wanted. Default: all.

        Returns:
            log-rates, (B, T, N); with ``neurons``, (B, T).
        """
        tokens = self.embed(counts, scheme, mask, session)
        log_rates = self.read_out(self.encode(tokens), session)
        if neurons is not None:
            log_rates = log_rates[torch.arange(len(neurons), device=neurons.device), :, neurons]
        if mask is None:
            nothing = torch.zeros_like(counts, dtype=torch.bool)
            mask = Mask(nothing, nothing)
        return log_rates + self.direct_log_rates([Batch(counts, scheme, mask, session)], neurons)[0]

    def embed(self, counts: Tensor, scheme: str | None, mask: Mask | None, session: str) -> Tokens:
        """Counts (B, T, N) to tokens: session, prompt, bin 0, bin 1, ..."""
        layers = self.session_layers(session)
        if tuple(counts.shape[1:]) != (self.n_bins, layers.n_neurons):
            raise ValueError(
                f"session {session!r}: counts have shape {tuple(counts.shape)}, the model needs "
                f"(trials, {self.n_bins} bins, {layers.n_neurons} neurons)"
            )
        x = self.tokenizer(self.masked_input(counts, mask, layers), layers)
        x = x.to(self.norm.weight.dtype)  # residuals keep full precision under autocast
        prefix = self.prefix(scheme, layers)  # (0 to 2, D)
        x = torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (B, L, D)
        x = self.embed_dropout(x)
        bins = torch.arange(self.n_bins, device=x.device)
        bins = bins.repeat_interleave(layers.n_patches)
        bins = F.pad(bins, (len(prefix), 0), value=-1)  # (L,)
        causal = mask is not None and mask.causal and self.config.causal
        if causal and self.config.tokenizer == "ndt2":
            # Tokens of one bin attend to each other, which a lower triangle does not allow.
            return Tokens(x, bins, allowed=bins[:, None] >= bins)
        # Tokens are in order of time, so causal attention is lower-triangular. The prefix comes
        # first and attends to no bin: nothing passes through it from later to earlier bins.
        return Tokens(x, bins, causal)

    def masked_input(
        self, counts: Tensor, mask: Mask | None, layers: SessionLayers, direct: bool = False
    ) -> Tensor:
        """Counts as the tokenizer or the direct paths get them, (B, T, N): 0 where hidden."""
        x = counts.to(self.norm.weight.dtype)
        if direct or self.config.input_counts == "scaled":  # as in `principal_components`
            x = (x - layers.mean) * (layers.mean + SOFTENING).rsqrt()
        return x if mask is None else x.masked_fill(mask.hidden, 0)

    def prefix(self, scheme: str | None, layers: SessionLayers) -> Tensor:
        """Session token and prompt token, as far as there are any, (0 to 2, D)."""
        tokens: list[Tensor] = [] if layers.token is None else [layers.token]
        if scheme in self.prompts:
            tokens.append(self.prompt_tokens[self.prompts.index(scheme)])
        elif scheme is not None:
            known_scheme(scheme)  # raises for a misspelt name, which would mean no prompt
        return torch.stack(tokens) if tokens else self.prompt_tokens[:0]

    def encode(self, tokens: Tokens) -> Tensor:
        """Transformer layers and the final norm: tokens to (B, L, D)."""
        turns = None
        if self.config.positions == "rotary":
            turns = rotation(tokens.bins, self.config.width // self.config.heads)
        for layer in self.layers:
            tokens = layer(tokens, turns)
        return self.norm(tokens.x)

    def read_out(self, x: Tensor, session: str) -> Tensor:
        """Encoded tokens (B, L, D), with or without prefix, to log-rates (B, T, N)."""
        x = x[:, -self.n_tokens(session) :]
        return self.tokenizer.read_out(x, self.session_layers(session))

    def direct_log_rates(
        self, batches: Sequence[Batch], neurons: Tensor | None = None
    ) -> list[Any]:
        """What direct paths add to the log-rates of each batch, a tensor; 0.0 without paths.

        Batches of one session are computed together, which takes fewer and larger operations.
        """
        found: list[Any] = [0.0] * len(batches)
        for session in dict.fromkeys(batch.session for batch in batches):
            layers = self.session_layers(session)
            if layers.direct is None:
                continue
            places = [i for i, batch in enumerate(batches) if batch.session == session]
            inputs, hidden, causal = [], [], []
            for counts, _, mask, _ in (batches[i] for i in places):
                inputs.append(self.masked_input(counts, mask, layers, direct=True))
                hidden.append(mask.hidden.expand_as(counts))
                attends = mask.causal and self.config.causal
                causal.append(torch.full_like(counts[:, 0, 0], attends, dtype=torch.bool))
            # Without autocast: bfloat16 has too few digits to solve linear equations.
            with torch.autocast(self.device.type, enabled=False):
                added = layers.direct(*map(torch.cat, (inputs, hidden, causal)), neurons)
            for i, part in zip(places, added.split([len(x) for x in inputs]), strict=True):
                found[i] = part
        return found

    def forward_many(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Log-rates of several batches, each of one session, as from :meth:`forward`.

        Batches with equally many tokens and the same attention pass through the encoder together,
        which keeps large accelerators busy.
        """
        embedded, direct = [self.embed(*batch) for batch in batches], self.direct_log_rates(batches)
        groups: dict[tuple[int, int, bool], list[int]] = {}
        for i, (tokens, (_, _, mask, session)) in enumerate(zip(embedded, batches, strict=True)):
            causal = mask is not None and mask.causal
            groups.setdefault((len(tokens.bins), self.n_tokens(session), causal), []).append(i)
        log_rates = [torch.empty(0)] * len(batches)
        for members in groups.values():
            joined = torch.cat([embedded[i].x for i in members])
            x = self.encode(embedded[members[0]]._replace(x=joined))
            parts = x.split([len(embedded[i].x) for i in members])
            for i, part in zip(members, parts, strict=True):
                log_rates[i] = self.read_out(part, batches[i][3]) + direct[i]
        return log_rates

    @torch.no_grad()
    def latents(
        self,
        counts: Tensor | np.ndarray,
        session: str,
        mask: Mask | None = None,
        encoder: bool = False,
    ) -> Tensor:
        """Latents of the population in each bin, given its visible neurons.

        Args:
            counts: (K, T, N) of trials of one session.
            session: its name.
            mask: what to hide. Default: nothing.
            encoder: append the output of the encoder.

        Returns:
            (K, T, R) expected latents of the direct path, see :class:`DirectPaths`; of the encoder,
            (K, T, D) the mean over the tokens of a bin, which is all of a model without that path.
        """
        with evaluating(self):
            counts = torch.as_tensor(counts, device=self.device)
            return self.encode_latents(counts, session, mask, encoder)

    def encode_latents(
        self, counts: Tensor, session: str, mask: Mask | None, encoder: bool
    ) -> Tensor:
        """Latents as from :meth:`latents`, with gradients, and dropout in training."""
        layers, found = self.session_layers(session), []
        if (direct := layers.direct) is not None and direct.readout is not None:
            x = self.masked_input(counts, mask, layers, direct=True).clamp(max=LARGEST_INPUT)
            hidden = torch.zeros_like(x, dtype=torch.bool)
            hidden = hidden if mask is None else mask.hidden | hidden
            none = x.new_zeros(len(x), 0, self.n_bins, self.n_bins)  # no kernel: each bin alone
            found.append(direct.population_latents(x, hidden, none)[:, 0])
        if encoder or not found:
            x = self.encode(self.embed(counts, None, mask, session))[:, -self.n_tokens(session) :]
            found.append(x.unflatten(1, (self.n_bins, -1)).mean(dim=2))
        return torch.cat(found, dim=2)

    @torch.no_grad()
    def predict_log_rates(
        self,
        counts: Tensor | np.ndarray,
        scheme: str | None,
        mask: Mask | None,
        session: str,
        neurons: Tensor | None = None,
    ) -> Tensor:
        """Log-rates as from :meth:`forward`, without dropout and gradients, and calibrated.

        Their deviations from the mean log-rates are multiplied by ``shrinkage[session][scheme]``,
        which :func:`mtm.training.calibrate` chooses. A model that was not trained with causal
        attention predicts without it.
        """
        if mask is not None and not self.causal:
            mask = replace(mask, causal=False)
        with evaluating(self):
            counts = torch.as_tensor(counts, device=self.device)
            log_rates: Tensor = self(counts, scheme, mask, session, neurons)
        if (factor := self.shrinkage.get(session, {}).get(scheme or "", 1.0)) != 1:
            mean = self.session_layers(session).mean.log()  # (N,)
            mean = mean if neurons is None else mean[neurons, None]
            log_rates = mean + factor * (log_rates - mean)
        return log_rates

    def add_session(
        self,
        name: str,
        n_neurons: int,
        counts: np.ndarray | Tensor | None = None,
        token: str = "new",
    ) -> None:
        """Make layers and a token for a recording that the model does not know.

        Make the optimizer afterwards: it would not know the new parameters. With ndt2, a session
        with more patches than all before replaces ``tokenizer.space``, too.

        Args:
            name: a name that no other session has.
            n_neurons: N.
            counts: (K, T, N) spike counts of its training trials. Their means scale the input.
                Unless ``init="paper"``, predictions start at the means, and the stitcher of scaled
                counts at the principal components. Default: means of 0, and a random start.
            token: the session token starts ``"new"``, at random, or at the ``"mean"`` of others.
        """
        if name in self._keys:
            raise ValueError(f"session {name!r} is in the model already")
        if token != "new" and (token != "mean" or not self.sessions):
            raise ValueError(f"token must be 'new', or 'mean' if there are others; got {token!r}")
        if counts is not None:
            counts = np.asarray(counts.cpu() if isinstance(counts, Tensor) else counts)
            log_means = torch.from_numpy(log_mean(counts)).float()  # a silent neuron: half a spike
            stitched = self.config.tokenizer == "ndt1" and self.config.input_counts == "scaled"
            use_components = (stitched or self.config.latents > 0) and self.init != "paper"
            components = principal_components(counts, log_means.exp()) if use_components else None
        layers = SessionLayers(n_neurons, self.config)
        if counts is not None:
            layers.init_from(log_means, components, self.init)
        if layers.token is not None:
            start = self.token_std * torch.randn(self.config.width)
            if token == "mean":
                others = [self.session_layers(other).token for other in self._keys]
                start = torch.stack([each.detach() for each in others if each is not None])
                start = start.mean(dim=0)
            layers.token.data.copy_(start)
        if self.config.tokenizer == "ndt2":
            self.tokenizer.grow(layers.n_patches)
        # Names of modules may not hold a dot, nor be an attribute of ModuleDict, as "keys" is.
        self._keys[name] = "session:" + quote(name, safe=" ").replace(".", "%2E")
        self.sessions[self._keys[name]] = layers.to(self.norm.weight)

    @torch.no_grad()
    def init_direct_paths(self, name: str, counts: np.ndarray) -> None:
        """Start direct paths that were put on an imported session, at its training trials.

        Does nothing where there are none, or they have started. They add 0 until they are trained.

        Args:
            name: of the session.
            counts: (K, T, N) spike counts of its training trials.
        """
        layers = self.session_layers(name)
        if layers.raw and layers.direct is not None and not layers.mean.any():
            means = torch.from_numpy(log_mean(np.asarray(counts))).float().exp()
            layers.mean.copy_(means)
            layers.direct.init_from(*principal_components(np.asarray(counts), means))

    def session_layers(self, name: str) -> SessionLayers:
        """The layers of one session; raises KeyError with the names that are known."""
        if name not in self._keys:
            known = ", ".join(self._keys) or "none"
            raise KeyError(
                f"the model does not know session {name!r}; it knows: {known}. Training on the "
                "session, fit(session, model), adds it"
            )
        layers: Any = self.sessions[self._keys[name]]
        return layers

    @property
    def session_names(self) -> list[str]:
        """Names of the sessions that the model knows."""
        return list(self._keys)

    def n_tokens(self, session: str) -> int:
        """Tokens of a trial of the session, without the prefix."""
        return self.n_bins * self.session_layers(session).n_patches

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.norm.weight.device

    def n_parameters(self) -> dict[str, Any]:
        """Parameters of each part, of the ``core`` (all parts), and of ``sessions``, by name."""
        parts: dict[str, Any] = {
            name: sum(p.numel() for p in getattr(self, name).parameters())
            for name in ("tokenizer", "layers", "norm")
        }
        layers = {name: self.session_layers(name) for name in self._keys}
        tokens = [self.prompt_tokens, *(each.token for each in layers.values())]
        parts["tokens"] = sum(token.numel() for token in tokens if token is not None)
        sessions = {
            name: sum(p.numel() for p in each.parameters() if p is not each.token)
            for name, each in layers.items()
        }
        return {**parts, "core": sum(parts.values()), "sessions": sessions}

    def summary(self) -> str:
        """The numbers of parameters as a table."""
        rows = self.n_parameters()
        sessions = rows.pop("sessions")
        rows |= {f"session {name!r}": size for name, size in sessions.items()}
        rows["total"] = rows["core"] + sum(sessions.values())
        title = f"MtM, {self.config.tokenizer}, width {self.config.width}, depth {len(self.layers)}"
        lines = [f"  {name:<{max(map(len, rows))}} {size:>12,}" for name, size in rows.items()]
        return "\n".join([f"{title}; parameters", *lines])
