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
4. :class:`mtm.direct_paths.DirectPaths` add linear maps from counts to log-rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from mtm import direct_paths
from mtm.masks import MTM_SCHEMES, Mask
from mtm.masks import scheme as known_scheme
from mtm.metrics import log_mean

TOKEN_STD = 0.05  # initial standard deviation of session and prompt tokens
POSITION_SCALE = 0.3  # initial amplitude of time and space embeddings
READOUT_SCALE = 0.1  # factor on initial readout weights: predictions start near the mean rates

# The authors' options.
PUBLISHED = dict(positions="learned", input_counts="raw", own_history=False, latents=0)
CHOICES = {
    "tokenizer": ("ndt1", "ndt2"),
    "positions": ("rotary", "learned"),
    "input_counts": ("scaled", "raw"),
    "activation": ("gelu", "relu"),
    **dict.fromkeys(("session_token", "own_history", "causal"), (True, False)),
}


class CheckpointError(ValueError):
    """A file or folder that does not hold a readable model."""


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
    causal: bool = True  # in causal mode, none to later bins; False: full attention in every mode
    activation: str = "gelu"  # of the MLPs

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {known}; got {value!r}")
        if not self.depth >= 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")
        unit = self.heads * (2 if self.positions == "rotary" else 1)  # rotation acts on pairs
        if self.width % unit:
            raise ValueError(f"width {self.width} must be a multiple of {unit} (heads, rotation)")

    @classmethod
    def from_depth(cls, depth: int, **fields: Any) -> Self:
        """Sizes that go with a number of layers (5: the paper's); ``fields`` are set by hand."""
        heads = max(1, round(1.6 * depth))
        width = 64 * heads
        sizes: dict[str, Any] = dict(depth=depth, heads=heads, width=width, mlp_width=2 * width)
        sizes["stitch_width"] = round(width * 668 / 512)
        # Without dropout, small models overfit recordings of few trials and many neurons.
        sizes["dropout"] = min(0.4, round(0.1 * (depth + 1), 2))
        return cls(**sizes | fields)

    @classmethod
    def published(cls, depth: int = 5, **fields: Any) -> Self:
        """The authors' model: the paper's sizes, learned positions, raw counts, no direct paths."""
        return cls.from_depth(depth, **PUBLISHED | fields)


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
        paths = config.own_history, config.latents, config.latent_dropout
        self.direct = direct_paths.DirectPaths(n_neurons, *paths) if any(paths[:2]) else None
        self.raw = config.input_counts == "raw"
        if self.direct is not None or not self.raw:
            self.register_buffer("mean", torch.zeros(n_neurons))

    @property
    def blank(self) -> bool:
        """Whether the neurons' means, by which the input is scaled, are not known yet."""
        return not self.raw and not bool(self.mean.any())

    def init_from_means(self, log_means: Tensor, predict: bool) -> None:
        """Scale the input by mean counts, given their logs (N,); ``predict``: start at them."""
        if hasattr(self, "mean"):
            self.mean.copy_(log_means.exp())
        if predict and hasattr(self, "bias"):  # ndt2
            self.bias.copy_(log_means)
        elif predict:
            self.readout.weight.mul_(READOUT_SCALE)
            self.readout.bias.copy_(log_means)

    def init_from_components(self, directions: Tensor, variances: Tensor) -> None:
        """Start maps of the input at principal components of scaled counts, (N, R) and (R,)."""
        if self.direct is not None:
            self.direct.init_from_components(directions, variances)
        if hasattr(self, "stitcher") and not self.raw:
            start = direct_paths.stitcher_weights(directions, len(self.stitcher.weight))
            self.stitcher.weight += start


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
        self.patch_size = config.patch_size
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
        if self.time_norm is not None:
            x = x + self.time_norm(self.time)[:, None]
        return x.flatten(1, 2)  # bin by bin

    def read_out(self, x: Tensor, layers: SessionLayers) -> Tensor:
        """Tokens (B, T x patches, D) to log-rates (B, T, N)."""
        x = self.readout(x.unflatten(1, (-1, layers.n_patches)))  # (B, T, patches, P)
        return x.flatten(2)[..., : layers.n_neurons] + layers.bias

    def grow(self, n_patches: int) -> None:
        """Add random places for a session that is larger than all before."""
        if n_patches > len(self.space):
            new = torch.randn(n_patches - len(self.space), self.space.shape[1]).to(self.space)
            # In place: an optimizer that holds it would else go on with the old one.
            self.space.data = torch.cat([self.space.data, new])


def time_embedding(config: MtMConfig, n_bins: int, init: str) -> nn.Parameter | None:
    """A learned vector for each bin, (T, D), at its start; None with rotary positions."""
    if config.positions == "rotary":
        return None
    if init == "paper":  # random: the model first has to find out which bins are neighbours
        return nn.Parameter(torch.randn(n_bins, config.width))
    half = (config.width + 1) // 2
    periods = 4.0 * (n_bins / 2.0) ** (torch.arange(half) / half)  # 4 bins to twice the trial
    angle = 2 * math.pi * torch.arange(n_bins)[:, None] / periods
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)[:, : config.width]
    return nn.Parameter(POSITION_SCALE * waves)


def rotation(bins: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles, (L, width / 2), for rotary positions (Su et al. 2021)."""
    speed = 10_000.0 ** (-torch.arange(0, width, 2, device=bins.device) / width)
    angle = bins[:, None] * speed
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d / 2) of queries or keys (B, heads, L, d) by their tokens' angles."""
    # The product of a query and a key then depends on how far apart their bins are, not on when.
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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


class Batch(NamedTuple):
    """Trials of one session with a mask: the arguments of ``MtM.forward``."""

    counts: Tensor  # (B, T, N)
    scheme: str | None
    mask: Mask
    session: str


def nothing_hidden(counts: Tensor) -> Mask:
    """The mask that hides nothing of counts (B, T, N)."""
    nothing = torch.zeros_like(counts, dtype=torch.bool)
    return Mask(nothing, nothing)


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
        # What it was trained on; None: not known. Fingerprints of training trials, by session.
        self.split_seed: int | None = None
        self.window: tuple[float, float] | None = None
        self.seen: dict[str, np.ndarray] = {}
        # Session -> scheme -> factors of the encoder's and the direct paths' parts of log-rates.
        self.calibration: dict[str, dict[str, list[float]]] = {}
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
        """Log-rates (B, T, N): logs of the expected counts of all entries, hidden ones included.

        Args:
            counts: (B, T, N) spike counts of trials of one session.
            scheme: the masking scheme whose prompt token is shown, if it has one.
            mask: what to hide, and whether attention is causal. None hides nothing.
            session: its name.
            neurons: (B,) the one neuron of each trial that is wanted; log-rates are (B, T).
        """
        batch = Batch(counts, scheme, mask or nothing_hidden(counts), session)
        encoded, direct = self.parts(batch, neurons)
        return encoded + direct

    def parts(self, batch: Batch, neurons: Tensor | None = None) -> tuple[Tensor, Any]:
        """The encoder's part of the log-rates of :meth:`forward`, and that of the direct paths."""
        encoded = self.read_out(self.encode(self.embed(*batch)), batch.session)
        if neurons is not None:
            encoded = encoded[torch.arange(len(neurons), device=neurons.device), :, neurons]
        return encoded, self.direct_log_rates([batch], neurons)[0]

    def embed(self, counts: Tensor, scheme: str | None, mask: Mask | None, session: str) -> Tokens:
        """Counts (B, T, N) to tokens: session, prompt, bin 0, bin 1, ..."""
        layers, mask = self.session_layers(session), mask or nothing_hidden(counts)
        if tuple(counts.shape[1:]) != (self.n_bins, layers.n_neurons):
            needed = f"(trials, {self.n_bins} bins, {layers.n_neurons} neurons)"
            found = f"session {session!r}: counts have shape {tuple(counts.shape)}"
            raise ValueError(f"{found}, the model needs {needed}")
        x = counts.to(self.norm.weight.dtype)
        x = x if layers.raw else direct_paths.scaled(x, layers.mean)
        x = self.tokenizer(x.masked_fill(mask.hidden, 0), layers)
        x = x.to(self.norm.weight.dtype)  # residuals keep full precision under autocast
        prefix = self.prefix(scheme, layers)  # (0 to 2, D)
        x = torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (B, L, D)
        x = self.embed_dropout(x)
        bins = torch.arange(self.n_bins, device=x.device).repeat_interleave(layers.n_patches)
        bins = F.pad(bins, (len(prefix), 0), value=-1)  # (L,)
        causal = mask.causal and self.config.causal
        if causal and self.config.tokenizer == "ndt2":
            # Tokens of one bin attend to each other, which a lower triangle does not allow.
            return Tokens(x, bins, allowed=bins[:, None] >= bins)
        # Tokens are in order of time, so causal attention is lower-triangular. The prefix comes
        # first and attends to no bin: nothing passes through it from later to earlier bins.
        return Tokens(x, bins, causal)

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

    def direct_log_rates(self, batches: list[Batch], neurons: Tensor | None = None) -> list[Any]:
        """What direct paths add to the log-rates of each batch, a tensor; 0.0 without paths."""
        found: list[Any] = [0.0] * len(batches)
        # Batches of one session together, which takes fewer and larger operations.
        for session in dict.fromkeys(batch.session for batch in batches):
            layers = self.session_layers(session)
            if layers.direct is None:
                continue
            places = [i for i, batch in enumerate(batches) if batch.session == session]
            some = [
                (counts, mask.hidden, mask.causal and self.config.causal)
                for counts, _, mask, _ in (batches[i] for i in places)
            ]
            for i, added in zip(places, layers.direct(some, layers.mean, neurons), strict=True):
                found[i] = added
        return found

    def forward_many(self, batches: list[Batch]) -> list[Tensor]:
        """Log-rates of several batches, each of one session, as from :meth:`forward`."""
        embedded, direct = [self.embed(*batch) for batch in batches], self.direct_log_rates(batches)
        # Equally many tokens with the same attention go through the encoder together: quicker.
        groups: dict[tuple[int, int, bool], list[int]] = {}
        for i, (tokens, batch) in enumerate(zip(embedded, batches, strict=True)):
            kind = len(tokens.bins), self.n_tokens(batch.session), batch.mask.causal
            groups.setdefault(kind, []).append(i)
        for members in groups.values():
            joined = torch.cat([embedded[i].x for i in members])
            x = self.encode(embedded[members[0]]._replace(x=joined))
            parts = x.split([len(embedded[i].x) for i in members])
            for i, part in zip(members, parts, strict=True):
                direct[i] = self.read_out(part, batches[i].session) + direct[i]
        return direct

    def latents(
        self,
        counts: ArrayLike,
        session: str,
        mask: Mask | None = None,
        encoder: bool = False,
        train: bool = False,
    ) -> Tensor:
        """Latents of the population in each bin, given the visible counts (K, T, N).

        Returns (K, T, R) expected latents of the direct paths; with ``encoder``, or without them,
        also the encoder's output, (K, T, D) averaged over the tokens of a bin. ``train`` keeps
        gradients, and dropout in training mode.
        """
        given, layers = torch.as_tensor(counts, device=self.device), self.session_layers(session)
        mask, found = mask or nothing_hidden(given), []
        trained = train and torch.is_grad_enabled()
        with nullcontext() if train else evaluating(self), torch.set_grad_enabled(trained):
            if layers.direct is not None and layers.direct.readout is not None:
                x = direct_paths.masked_input(given, layers.mean, mask.hidden)
                found.append(layers.direct.population_latents(x, mask.hidden)[:, 0])
            if encoder or not found:
                x = self.encode(self.embed(given, None, mask, session))
                x = x[:, -self.n_tokens(session) :].unflatten(1, (self.n_bins, -1))
                found.append(x.mean(dim=2))
        return torch.cat(found, dim=2)

    def predict_log_rates(
        self,
        counts: ArrayLike,
        scheme: str | None,
        mask: Mask | None,
        session: str,
        neurons: Tensor | None = None,
    ) -> Tensor:
        """Log-rates as from :meth:`forward`, without dropout and gradients, and calibrated.

        Calibration multiplies what encoder and direct paths add to the mean log-rates by the
        factors ``calibration[session][scheme]``, see :func:`mtm.validation.calibrate`. A model
        never trained causally predicts without causality.
        """
        if mask is not None and not self.causal:
            mask = replace(mask, causal=False)
        given = torch.as_tensor(counts, device=self.device)
        batch = Batch(given, scheme, mask or nothing_hidden(given), session)
        with evaluating(self), torch.no_grad():
            encoded, direct = self.parts(batch, neurons)
        first, second = self.calibration.get(session, {}).get(scheme or "", (1.0, 1.0))
        if first != 1:
            mean = self.session_layers(session).mean.log()  # (N,)
            mean = mean if neurons is None else mean[neurons, None]
            encoded = mean + first * (encoded - mean)
        return torch.add(encoded, second * direct)

    @torch.no_grad()
    def add_session(
        self, name: str, n_neurons: int, counts: ArrayLike | None = None, token: str = "new"
    ) -> None:
        """Make layers and a token for a recording that the model does not know.

        Args:
            name: a name that no other session has, unless it was added without counts.
            n_neurons: N.
            counts: (K, T, N) spike counts of its training trials. Their means scale the input.
                Unless ``init="paper"``, predictions start at the means, and maps of scaled counts
                at the principal components. Default: means of 0, and a random start.
            token: the session token starts ``"new"``, at random, or at the ``"mean"`` of others.
        """
        if name in self._keys and not self.session_layers(name).blank:
            raise ValueError(f"session {name!r} is in the model already")
        if token != "new" and (token != "mean" or not self.sessions):
            raise ValueError(f"token must be 'new', or 'mean' of others if any; got {token!r}")
        config, ours, components = self.config, self.init != "paper", None
        if counts is not None:
            log_means = torch.from_numpy(log_mean(counts)).float()  # a silent neuron: half a spike
            stitched = config.tokenizer == "ndt1" and config.input_counts == "scaled"
            if ours and (stitched or config.latents):
                given = np.asarray(counts), log_means.exp()
                components = direct_paths.principal_components(*given)
        layers = SessionLayers(n_neurons, config)
        if counts is not None:
            layers.init_from_means(log_means, predict=ours)
        if components is not None:
            layers.init_from_components(*components)
        if layers.token is not None:
            start = self.token_std * torch.randn(config.width)
            if token == "mean":
                others: list[Any] = [self.session_layers(other).token for other in self._keys]
                start = torch.stack(others).mean(dim=0)
            layers.token.copy_(start)
        if config.tokenizer == "ndt2":
            self.tokenizer.grow(layers.n_patches)
        # Names of modules may not hold a dot, nor be an attribute of ModuleDict, as "keys" is.
        self._keys[name] = "session:" + quote(name, safe=" ").replace(".", "%2E")
        self.sessions[self._keys[name]] = layers.to(self.norm.weight)

    def session_layers(self, name: str) -> SessionLayers:
        """The layers of one session; raises KeyError with the names that are known."""
        if name not in self._keys:
            known = ", ".join(self._keys) or "none"
            remedy = "Training on the session, fit(session, model), adds it"
            raise KeyError(f"the model does not know session {name!r}; it knows: {known}. {remedy}")
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
        """Parameters of the shared parts, their sum ``core``, and ``sessions`` by name."""
        modules = {name: getattr(self, name) for name in ("tokenizer", "layers", "norm")}
        modules |= {name: self.session_layers(name) for name in self._keys}
        parts = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
        token = self.config.width * self.config.session_token
        sessions = {name: parts.pop(name) - token for name in self._keys}
        parts["tokens"] = self.prompt_tokens.numel() + token * len(sessions)
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
