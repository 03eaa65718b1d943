"""The whole model in this one file: embed, encode, read out.

MtM (arXiv 2407.14668, section 3) is one transformer encoder between two pairs of maps that know
about neurons. There are two ways to cut a trial of counts (B, T, N) into tokens (B, L, D):

=========  ====================================  =====================================  ===========
tokenizer  a token is                            whose maps                             L
=========  ====================================  =====================================  ===========
``ndt1``   one bin of all neurons                each session's own ("stitching")       T
``ndt2``   one bin of P neurons in a row         shared by all; a neuron is told by     T ceil(N/P)
                                                 its place
=========  ====================================  =====================================  ===========

In front of them stand a session token, which says whose brain it is, and a prompt token, which says
what masking scheme is on. Out come log-rates (B, T, N).

- Hidden entries are taken out before anything sees them. Of a neuron's count the model is shown how
  far it is from the neuron's mean, so what stands in a hidden entry's place, 0, is the mean. (In
  the authors' code it is a silent bin, and a region that is hidden one that fell silent.)
- Causal mode: a token attends to tokens of the same and of earlier bins, the two in front to no
  bin. No path, however many layers deep, leads from a later bin to an earlier output. (In
  the authors' code it does, by way of the tokens in front; for NDT2 the bins are mixed up, too.)
- Initialisation: each neuron's readout bias is its log mean count, learned tokens start small, and
  a session's map starts by looking at the principal components of its training trials. (A learned
  time embedding starts as slow and fast waves.) A new model therefore predicts the mean rates,
  knows which neurons go together, and learns from there; ``init="paper"`` starts as the authors'
  code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtm.checks import check_types, checked, one_of
from mtm.masks import MTM_SCHEMES, Mask

TOKEN_STD = 0.05  # of session and prompt tokens
POSITION_SCALE = 0.3  # amplitude of time and space embeddings
QUERIES = 160  # of a trial that attend at once, on CPUs
SOFTENING = 0.1  # added to a mean count, so that rare spikes are not scaled up without bound
COMPONENTS_SCALE = 3.0  # of the principal components that a session's map starts with
READOUT_SCALE = 0.1  # of the readout weights, so that a new model predicts close to the mean rates

CHOICES = {
    "tokenizer": ("ndt1", "ndt2"),
    "positions": ("learned", "rotary"),
    "hidden_input": ("zeros", "token", "indicator"),
    "input_transform": ("scaled", "raw", "log1p"),
    "init": ("mtm", "paper"),
}

AS_PUBLISHED: dict[str, Any] = {
    "init": "paper",
    "positions": "learned",
    "hidden_input": "zeros",
    "input_transform": "raw",
}
"""The authors' options."""


@dataclass(frozen=True)
class MtMConfig:
    """Sizes and options of a model. The sizes are the paper's, the options those that did best.

    ``input_transform="scaled"`` shows counts as (count - mean) / sqrt(mean + 0.1), by each neuron's
    mean count in the training trials; the authors show ``"raw"`` counts.

    ``hidden_input`` is what stands where an entry is hidden: ``"zeros"`` (the paper); ``"token"``,
    a number that each neuron learns; ``"indicator"``, zeros, and a second input channel that tells
    a hidden entry from a visible one. ``positions="rotary"`` turns queries and keys by their bin
    instead of adding a learned embedding of it.
    """

    tokenizer: str = "ndt1"  # "ndt1": a token a bin; "ndt2": a token a bin and patch of neurons
    n_bins: int = 100  # T, time bins of a trial
    bin_size: float = 0.02  # seconds
    width: int = 512  # D, width of a token
    depth: int = 5  # transformer layers
    heads: int = 8
    mlp_width: int = 1024
    stitch_width: int = 668  # S, width that ndt1 maps all sessions to
    patch_size: int = 128  # P, neurons of an ndt2 token
    n_patches: int = 6  # places of patches that ndt2 knows; grows with larger sessions
    dropout: float = 0.4  # of attention and MLP
    embed_dropout: float = 0.2  # of the tokens
    positions: str = "rotary"  # of time: "learned" (the authors) or "rotary"
    hidden_input: str = "zeros"  # "zeros", "token" or "indicator"
    input_transform: str = "scaled"  # of the counts: "scaled", "raw" (the authors) or "log1p"
    prompts: tuple[str, ...] = MTM_SCHEMES  # schemes with a prompt token; () = no prompt
    causal: bool = True  # trained with causal attention too; if not, `predict` never uses it
    session_token: bool = True
    split_seed: int | None = 0  # of the splits it was trained on; None = not known (imported)
    init: str = "mtm"  # "mtm" or "paper"
    leak: bool = False  # the authors' attention and patches, for checkpoints of theirs only

    def __post_init__(self) -> None:
        check_types(self)
        if len(set(self.prompts)) < len(self.prompts):
            raise ValueError(f"prompts must be a list of different names, got {self.prompts!r}")
        if not self.bin_size > 0:
            raise ValueError(f"bin_size must be above 0, in seconds, got {self.bin_size}")
        sizes = ("n_bins", "width", "depth", "heads", "mlp_width", "stitch_width")
        for name in (*sizes, "patch_size", "n_patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "embed_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        for name, known in CHOICES.items():
            one_of(name, getattr(self, name), known)
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(
                f"rotary positions need an even width for each head, got {self.width} / "
                f"{self.heads}; choose other heads or positions='learned'"
            )
        if self.leak and any(getattr(self, name) != value for name, value in AS_PUBLISHED.items()):
            raise ValueError(
                f"leak is for the authors' checkpoints only, which have {AS_PUBLISHED}"
            )

    @classmethod
    def from_depth(cls, depth: int, **fields: Any) -> MtMConfig:
        """Sizes that go with a number of layers; ``from_depth(5)`` is the paper's model.

        Width, heads and dropout grow with depth. ``fields`` sets any field by hand.
        """
        if checked("depth", depth, "int") < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        heads = max(1, round(1.6 * depth))
        width = 64 * heads
        sizes: dict[str, Any] = {
            "depth": depth,
            "heads": heads,
            "width": width,
            "mlp_width": 2 * width,
            "stitch_width": round(width * 668 / 512),
            "dropout": min(0.4, round(0.1 * (depth - 1), 2)),
            "embed_dropout": min(0.2, round(0.05 * (depth - 1), 2)),
        }
        return cls(**{**sizes, **fields})

    @property
    def channels(self) -> int:
        """C, numbers that the model is shown of each entry: its count, and whether it is hidden."""
        return 2 if self.hidden_input == "indicator" else 1

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON can hold them."""
        return {**asdict(self), "prompts": list(self.prompts)}


# ------------------------------------------------------------------ from counts to tokens, and back


class Tokens(NamedTuple):
    """Tokens of a batch of trials, those in front first.

    Attributes:
        x: (B, L, D).
        bins: (L,) the bin of each token, -1 for those in front.
        n_front: how many stand in front: session token, prompt token.
        absent: (B, L) bool, tokens of nothing but padding; with ``leak`` only, else None.
    """

    x: Tensor
    bins: Tensor
    n_front: int
    absent: Tensor | None = None


class SessionMaps(nn.Module):
    """What belongs to one session alone: the maps of its neurons in and out, and its token."""

    mean: Tensor

    def __init__(self, n_neurons: int, config: MtMConfig) -> None:
        super().__init__()
        self.n_neurons = n_neurons
        if config.tokenizer == "ndt1":
            self.stitch = nn.Linear(config.channels * n_neurons, config.stitch_width)
            self.readout = nn.Linear(config.width, n_neurons)
        elif not config.leak:  # the authors' NDT2 has nothing of a neuron's own
            self.bias = nn.Parameter(torch.zeros(n_neurons))
        if config.hidden_input == "token":
            self.fill = nn.Parameter(torch.zeros(n_neurons))
        self.token = nn.Parameter(torch.zeros(config.width)) if config.session_token else None
        if config.input_transform == "scaled":
            self.register_buffer("mean", torch.zeros(n_neurons))

    @torch.no_grad()
    def start_at(self, means: Tensor, config: MtMConfig) -> None:
        """Let a new model predict each neuron's mean count (N,), and fill in what is hidden."""
        if config.input_transform == "scaled":
            self.mean.copy_(means)
        if config.init == "paper":
            return
        if config.tokenizer == "ndt1":
            self.readout.weight.mul_(READOUT_SCALE)
        (self.readout.bias if config.tokenizer == "ndt1" else self.bias).copy_(means.log())
        if config.hidden_input == "token" and config.input_transform != "scaled":
            self.fill.copy_(means.log1p() if config.input_transform == "log1p" else means)

    @torch.no_grad()
    def look_at(self, components: Tensor) -> None:
        """Let each output of the map start at a direction of the counts, (N, R), or its reverse."""
        components = components.to(self.stitch.weight)  # they come from where the counts are
        place = torch.arange(len(self.stitch.weight), device=components.device)
        sign = 1 - 2 * (place // components.shape[1] % 2)
        directions = sign[:, None] * components.T[place % components.shape[1]]  # (S, N)
        self.stitch.weight[:, : len(components)] += COMPONENTS_SCALE * directions


class Bins(nn.Module):
    """The NDT1 tokenizer: one token a bin. All sessions are stitched to one width first."""

    def __init__(self, config: MtMConfig) -> None:
        super().__init__()
        hidden_width = 2 * config.stitch_width
        self.embed_spikes = nn.Linear(config.stitch_width, hidden_width)
        self.project = nn.Linear(hidden_width, config.width)
        self.time = time_embedding(config)

    def forward(self, x: Tensor, maps: SessionMaps) -> Tensor:
        """What is shown of each entry, (B, T, C, N), to tokens (B, T, D)."""
        x = maps.stitch(x.flatten(2))  # (B, T, S)
        x = self.project(F.softsign(self.embed_spikes(x)))  # (B, T, D)
        return x if self.time is None else x + self.time

    def read_out(self, x: Tensor, maps: SessionMaps, neurons: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) to log-rates (B, T, N); (B, T) of a neuron for each trial (B,)."""
        return maps.readout(x) if neurons is None else read_out_one(x, maps.readout, neurons)

    def n_patches(self, maps: SessionMaps) -> int:
        """Tokens of a bin."""
        return 1


class Patches(nn.Module):
    """The NDT2 tokenizer: one token a bin and patch of neurons, with an embedding of both places.

    The last patch is filled up with zeros, and what is read out there is cut off.
    """

    def __init__(self, config: MtMConfig) -> None:
        super().__init__()
        self.n_bins, self.patch_size, self.leak = config.n_bins, config.patch_size, config.leak
        channels = config.channels * config.patch_size
        self.embed_spikes = nn.Linear(channels, 2 * channels)
        self.project = nn.Linear(2 * channels, config.width)
        self.space = nn.Parameter(torch.randn(config.n_patches, config.width))
        self.space_norm = nn.LayerNorm(config.width)
        self.time = time_embedding(config)
        self.time_norm = None if self.time is None else nn.LayerNorm(config.width)
        self.readout = nn.Linear(config.width, config.patch_size)
        if config.init != "paper":
            for norm in (self.space_norm, self.time_norm or self.space_norm):
                nn.init.constant_(norm.weight, POSITION_SCALE)
            self.readout.weight.data.mul_(READOUT_SCALE)
            nn.init.zeros_(self.readout.bias)

    def forward(self, x: Tensor, maps: SessionMaps) -> Tensor:
        """What is shown of each entry, (B, T, C, N), to tokens (B, T x patches, D)."""
        n_patches, n_neurons = self.n_patches(maps), maps.n_neurons
        x = F.pad(x, (0, n_patches * self.patch_size - n_neurons))
        if self.leak:  # the authors fill up a patch with the end of the one before it
            missing = -n_neurons % self.patch_size
            end = n_neurons - n_neurons % self.patch_size
            x[..., n_neurons : n_neurons + missing] = x[..., end - missing : end]
        x = x.unflatten(3, (n_patches, self.patch_size))  # (B, T, C, patches, P)
        x = x.transpose(2, 3).flatten(3)  # (B, T, patches, C P)
        x = self.project(F.softsign(self.embed_spikes(x)))  # (B, T, patches, D)
        x = x + self.space_norm(self.space[:n_patches])
        if self.time is not None and self.time_norm is not None:
            x = x + self.time_norm(self.time)[:, None]
        return x.flatten(1, 2)

    def read_out(self, x: Tensor, maps: SessionMaps, neurons: Tensor | None = None) -> Tensor:
        """Tokens (B, T x patches, D) to log-rates (B, T, N); (B, T) of a neuron for each trial."""
        if neurons is None:
            x = self.readout(x).unflatten(1, (self.n_bins, -1))  # (B, T, patches, P)
            x = x.flatten(2)[..., : maps.n_neurons]  # (B, T, N)
            return x if self.leak else x + maps.bias
        trials = torch.arange(len(x), device=x.device)
        x = x.unflatten(1, (self.n_bins, -1))[trials, :, neurons // self.patch_size]  # (B, T, D)
        x = read_out_one(x, self.readout, neurons % self.patch_size)
        return x if self.leak else x + maps.bias[neurons, None]

    def n_patches(self, maps: SessionMaps) -> int:
        """Tokens of a bin. The authors fill up smaller sessions to as many as the largest has."""
        return len(self.space) if self.leak else math.ceil(maps.n_neurons / self.patch_size)

    def grow(self, n_neurons: int) -> None:
        """Make places, at random, for a session that is larger than all before."""
        missing = math.ceil(n_neurons / self.patch_size) - len(self.space)
        if missing > 0:
            new = torch.randn(missing, self.space.shape[1]).to(self.space)
            self.space = nn.Parameter(torch.cat([self.space.detach(), new]))


def read_out_one(x: Tensor, readout: nn.Linear, rows: Tensor) -> Tensor:
    """One output for each trial: tokens (B, T, D) and rows (B,) of the readout, to (B, T)."""
    bias, weight = readout.bias[rows, None, None], readout.weight[rows, :, None]
    return torch.baddbmm(bias, x, weight)[..., 0]


# ------------------------------------------------------------------------------------ the encoder


class Pattern(NamedTuple):
    """Which token may look at which: all, by ``causal`` the earlier ones, or the ``allowed``.

    Attributes:
        causal: lower-triangular, which needs no matrix and keeps the fastest kernels.
        allowed: (L, L), or (B, 1, L, L) with leak; bool, True = query (row) may look at key.
        rotation: cosines and sines (L, D / heads / 2) for rotary positions.
    """

    causal: bool = False
    allowed: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """As ``F.dropout``, several times faster on a CPU."""
    if not training or p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return Dropout.apply(x, p)


class Dropout(torch.autograd.Function):
    """Dropout on a CPU, which draws its factors again for the gradient instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Any shape, to the same: a share ``p`` of the entries is 0, the others are scaled up."""
        ctx.p, ctx.seed = p, int(torch.randint(2**62, ()))
        return _factors(x, ctx).mul_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gradient of ``x``, in its shape; none of ``p``."""
        return _factors(gradient, ctx).mul_(gradient), None


def _factors(like: Tensor, ctx: Any) -> Tensor:
    factors = torch.empty_like(like, memory_format=torch.contiguous_format)
    return keep_(factors, ctx.p, torch.Generator().manual_seed(ctx.seed))


def keep_(
    factors: Tensor, p: float, generator: torch.Generator | None = None, bits: Tensor | None = None
) -> Tensor:
    """Fill a tensor with what dropout multiplies with: 0 with probability p, else 1 / (1 - p).

    torch draws a number for each entry. Here 64 random bits decide on eight entries, which makes p
    a multiple of 1 / 256: the one below or above, at random, so that on average p is as asked.
    ``bits`` is int64 memory to draw them in, one for each eight entries or more.
    """
    n_entries = factors.numel()
    n_draws = math.ceil(n_entries / 8)
    bits = torch.empty(n_draws, dtype=torch.int64) if bits is None else bits[:n_draws]
    dropped = min(255, int(256 * p + float(torch.rand((), generator=generator))))
    bits.random_(-(2**63), None, generator=generator)
    torch.ge(bits.view(torch.int8)[:n_entries].view(factors.shape), dropped - 128, out=factors)
    return factors.mul_(256 / (256 - dropped))


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, p: float) -> Tensor:
    """Weighted means of the values, (B, heads, L, d) each; ``p`` is the dropout of the weights."""
    if p == 0 or q.device.type != "cpu" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=pattern.allowed, dropout_p=p, is_causal=pattern.causal
        )
    allowed = pattern.allowed
    if pattern.causal:
        allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    bias = None if allowed is None else torch.where(allowed, 0.0, -math.inf).to(q.dtype)
    return DroppedAttention.apply(q / math.sqrt(q.shape[-1]), k, v, bias, p)


class DroppedAttention(torch.autograd.Function):
    """Attention with dropout of its weights, for CPUs, where torch has no fused kernel for it.

    Block by block the weights stay in the cache, and in the same memory. They are made again for
    the gradient instead of kept, which would take 2 GB for the paper's NDT2.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float) -> Tensor:
        """As :func:`attend`, with queries that are scaled, and what is added to the scores."""
        ctx.save_for_backward(q, k, v, bias)
        ctx.p, ctx.seed = p, int(torch.randint(2**62, ()))
        out = torch.empty_like(q)
        for queries, keys, _, weights, factors in _blocks(q, k, bias, p, ctx.seed):
            out[queries] = torch.bmm(weights.mul_(factors), v[keys])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values (B, heads, L, d)."""
        q, k, v, bias = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, scratch, weights, factors in _blocks(q, k, bias, ctx.p, ctx.seed):
            torch.bmm(gradient[queries], v[keys].transpose(1, 2), out=scratch).mul_(factors)
            dv[keys] += torch.bmm(factors.mul_(weights).transpose(1, 2), gradient[queries])
            torch._softmax_backward_data(scratch, weights, -1, q.dtype, grad_input=factors)
            dq[queries] = torch.bmm(factors, k[keys])
            dk[keys] += torch.bmm(factors.transpose(1, 2), q[queries])
        return dq, dk, dv, None, None


def _blocks(
    q: Tensor, k: Tensor, bias: Tensor | None, p: float, seed: int
) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], Tensor, Tensor, Tensor]]:
    """Blocks of a trial's queries, with the keys up to the last that one of them may look at.

    Yields: the place of the queries, and of the keys, in (B, heads, L, d); scratch memory, weights
    before dropout and its factors, (heads, queries, keys), overwritten by those of the next block.
    """
    n_trials, heads, length, _ = q.shape
    size = math.ceil(length / math.ceil(length / QUERIES))  # blocks alike in size
    generator = torch.Generator().manual_seed(seed)  # forward and backward drop the same
    memory = [q.new_empty(heads * min(size, length) * length) for _ in range(3)]
    bits = torch.empty(math.ceil(len(memory[0]) / 8), dtype=torch.int64)
    ends = [length] * math.ceil(length / size)
    if bias is not None:
        seen = [rows.isfinite().any(dim=-2) for rows in bias.split(size, dim=-2)]
        ends = [int(keys.nonzero()[:, -1].max()) + 1 for keys in seen]
    for b in range(n_trials):
        for start, end in zip(range(0, length, size), ends, strict=True):
            queries = (b, slice(None), slice(start, start + size))
            keys = (b, slice(None), slice(end))
            shape = (heads, min(size, length - start), end)
            scores, weights, factors = (x[: math.prod(shape)].view(shape) for x in memory)
            torch.bmm(q[queries], k[keys].transpose(1, 2), out=scores)
            if bias is not None:
                scores += (bias if bias.ndim == 2 else bias[b])[..., queries[2], keys[2]]
            torch.softmax(scores, dim=-1, out=weights)
            yield queries, keys, scores, weights, keep_(factors, p, generator, bits)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor, pattern: Pattern) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D / heads)
            for part in (self.query, self.key, self.value)
        )
        if pattern.rotation is not None:
            q, k = (rotate(part, *pattern.rotation) for part in (q, k))
        x = attend(q, k, v, pattern, self.dropout if self.training else 0.0)
        x = x.transpose(1, 2).flatten(2)  # (B, L, D)
        return self.out(dropout(x, self.dropout, self.training))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: MtMConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads, config.dropout)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)
        self.dropout = config.dropout

    def forward(self, x: Tensor, pattern: Pattern) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attention(self.norm1(x), pattern)
        inner = F.gelu(self.up(self.norm2(x)))  # (B, L, mlp_width)
        return x + dropout(self.down(inner), self.dropout, self.training)


# ------------------------------------------------------------------- who may look at whom, and when


def pattern_of(tokens: Tokens, causal: bool, config: MtMConfig) -> Pattern:
    """Who may look at whom in a batch of tokens."""
    turns = None
    if config.positions == "rotary":
        turns = rotation(tokens.bins, config.width // config.heads)
    if tokens.absent is not None:
        allowed = leak(tokens, tokens.absent, config.n_bins, causal)
        return Pattern(allowed=allowed, rotation=turns)
    if causal and config.tokenizer == "ndt2":  # tokens of one bin see each other
        return Pattern(allowed=tokens.bins[:, None] >= tokens.bins, rotation=turns)
    return Pattern(causal=causal, rotation=turns)


def leak(tokens: Tokens, absent: Tensor, n_bins: int, causal: bool) -> Tensor:
    """What the authors' code allows, (B, 1, L, L), for checkpoints that were trained with it.

    In causal mode the tokens in front look at every bin and every bin at them, which leads from the
    future to the past from the second layer on; and a token's number modulo T is taken for its
    bin, which is another one's in NDT2. Padding is looked at by nobody but itself.
    """
    device, length = tokens.bins.device, len(tokens.bins)
    allowed = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        number = torch.arange(length - tokens.n_front, device=device) % n_bins
        allowed[tokens.n_front :, tokens.n_front :] = number[:, None] >= number
    own = torch.eye(length, dtype=torch.bool, device=device)
    return ((allowed & ~absent[:, None]) | own)[:, None]


def padding(counts: Tensor, bins: Tensor, n_patches: int, config: MtMConfig) -> Tensor:
    """Tokens without a bin or a neuron, (B, L): the authors pad short trials with -1."""
    absent = (counts < 0).all(dim=2)[:, bins.clamp(min=0)]  # (B, L)
    place = torch.arange(config.n_bins * n_patches, device=bins.device) % n_patches
    place = F.pad(place, (len(bins) - len(place), 0))
    return (absent | (place * config.patch_size >= counts.shape[2])) & (bins >= 0)


def time_embedding(config: MtMConfig) -> nn.Parameter | None:
    """A learned vector for each bin, (T, D), where it starts; None with rotary positions."""
    if config.positions == "rotary":
        return None
    if config.init == "paper":
        return nn.Parameter(torch.randn(config.n_bins, config.width))
    return nn.Parameter(POSITION_SCALE * waves(config.n_bins, config.width))


def waves(n_bins: int, width: int) -> Tensor:
    """Sines and cosines of the bin's number, (n_bins, width): near bins get similar embeddings.

    A start for the learned time embedding. From random ones a model has to find out first which
    bins are neighbours; from these it can begin with smoothing.
    """
    half = torch.arange((width + 1) // 2) / ((width + 1) // 2)
    periods = 4.0 * (n_bins / 2.0) ** half  # geometric, from 4 bins to twice the trial
    angle = 2 * math.pi * torch.arange(n_bins)[:, None] / periods
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


def rotation(bins: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (L, width / 2), of the angles that each bin turns its tokens by.

    Source: Su et al. 2021 (RoPE). The tokens in front are one bin ahead of the first.
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


# -------------------------------------------------------------------------------------- the model


class MtM(nn.Module):
    """Multi-task masking model of many sessions.

    Args:
        config: sizes and options.
        sessions: name -> number of neurons, whose mean counts are not known and count as 0;
            :meth:`add_session` takes them, and :func:`mtm.fit` does so.

    Attributes:
        seen: session -> fingerprints (n,) int64 of the trials it was trained on
            (:meth:`mtm.Session.fingerprints`), by which evaluation refuses them.
    """

    def __init__(self, config: MtMConfig, sessions: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = Bins(config) if config.tokenizer == "ndt1" else Patches(config)
        self.prompt = nn.Parameter(torch.empty(len(config.prompts), config.width))
        layers = [Layer(config) for _ in range(config.depth)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.width)
        self.sessions = nn.ModuleDict()
        self._keys: dict[str, str] = {}  # session name -> key in self.sessions
        self.seen: dict[str, np.ndarray] = {}
        self._initialise(layers)
        for name, n_neurons in (sessions or {}).items():
            self.add_session(name, n_neurons)

    # ------------------------------------------------------------------ forward

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
            session: its name.
            mask: what to hide, and whether attention is causal. Default: nothing is hidden.
            prompt: the scheme whose prompt token is shown; a scheme without one shows none.
            neurons: (B,) index of the one neuron of each trial that is wanted. Default: all.

        Returns:
            log-rates, (B, T, N); with ``neurons``, (B, T).

        Raises:
            KeyError: for a session that was never added.
            ValueError: when the counts' shape does not fit the session or the model.
        """
        causal = mask is not None and mask.causal
        tokens = self.embed(counts, scheme, mask, session)  # (B, L, D)
        x = self.encode(tokens, causal)  # (B, L, D)
        return self.read_out(x, session, neurons)  # (B, T, N) or (B, T)

    def embed(self, counts: Tensor, scheme: str | None, mask: Mask | None, session: str) -> Tokens:
        """Counts (B, T, N) to tokens: session, prompt, bin 0, bin 1, ..."""
        maps = self._maps(session)
        self._check(counts, session, maps)
        n_patches = self.tokenizer.n_patches(maps)  # tokens of a bin
        x = self.tokenizer(self._show(counts, mask, maps), maps)  # (B, L, D)
        x = x.to(self.norm.weight.dtype)  # with autocast too, residuals stay exact
        bins = torch.arange(self.config.n_bins, device=x.device)
        bins = bins.repeat_interleave(n_patches)  # (L,)
        front: list[Tensor] = [] if maps.token is None else [maps.token]
        if scheme in self.config.prompts:
            front.append(self.prompt[self.config.prompts.index(scheme)])
        if front:
            x = torch.cat([torch.stack(front).to(x.dtype).expand(len(x), -1, -1), x], dim=1)
            bins = F.pad(bins, (len(front), 0), value=-1)
        x = dropout(x, self.config.embed_dropout, self.training)
        absent = padding(counts, bins, n_patches, self.config) if self.config.leak else None
        return Tokens(x, bins, len(front), absent)

    def encode(self, tokens: Tokens, causal: bool) -> Tensor:
        """Transformer layers and the final norm; (B, L, D) -> (B, L, D)."""
        x, pattern = tokens.x, pattern_of(tokens, causal, self.config)
        for layer in self.layers:
            x = layer(x, pattern)
        return self.norm(x)

    def read_out(self, x: Tensor, session: str, neurons: Tensor | None = None) -> Tensor:
        """Encoded tokens (B, L, D), those in front left aside, to what :meth:`forward` returns."""
        x = x[:, -self.n_tokens(session) :]
        return self.tokenizer.read_out(x, self._maps(session), neurons)

    def forward_many(
        self, batches: Sequence[tuple[Tensor, str | None, Mask | None, str]]
    ) -> list[Tensor]:
        """:meth:`forward` of several batches, with one pass through the encoder where possible.

        Args:
            batches: the arguments of :meth:`forward`, for a session each. Those whose tokens are
                equally many and attend alike are encoded together, which keeps large accelerators
                busy.

        Returns:
            log-rates of each batch, the same as from one call after the other.
        """
        embedded = [self.embed(*batch) for batch in batches]
        alike: dict[tuple[int, int, bool], list[int]] = {}
        for i, (tokens, (_, _, mask, _)) in enumerate(zip(embedded, batches, strict=True)):
            causal = mask is not None and mask.causal
            alike.setdefault((len(tokens.bins), tokens.n_front, causal), []).append(i)
        log_rates: dict[int, Tensor] = {}
        for (_, _, causal), members in alike.items():
            parts = [embedded[i] for i in members]
            joined = parts[0]._replace(x=torch.cat([part.x for part in parts]))
            if absent := [part.absent for part in parts if part.absent is not None]:
                joined = joined._replace(absent=torch.cat(absent))
            x = self.encode(joined, causal).split([len(part.x) for part in parts])
            for i, part in zip(members, x, strict=True):
                log_rates[i] = self.read_out(part, batches[i][3])
        return [log_rates[i] for i in range(len(batches))]

    def _show(self, counts: Tensor, mask: Mask | None, maps: SessionMaps) -> Tensor:
        """What the model gets to see of each entry, (B, T, N) -> (B, T, C, N)."""
        x = counts.to(self.norm.weight.dtype)
        if self.config.input_transform == "log1p":
            x = x.log1p()
        elif self.config.input_transform == "scaled":
            x = (x - maps.mean) * (maps.mean + SOFTENING).rsqrt()
        hidden = torch.zeros_like(x, dtype=torch.bool) if mask is None else mask.hidden
        if self.config.hidden_input == "token":
            x = torch.where(hidden, maps.fill, x)
        else:
            x = x.masked_fill(hidden, 0)
        if self.config.hidden_input == "indicator":
            return torch.stack([x, hidden.expand_as(x).to(x.dtype)], dim=2)
        return x[:, :, None]

    @torch.no_grad()
    def predict_log_rates(
        self,
        counts: Tensor,
        scheme: str,
        mask: Mask,
        session: str,
        neurons: Tensor | None = None,
    ) -> Tensor:
        """Log-rates (B, T, N) without dropout and gradients: the predictor interface of `evaluate`.

        Args:
            counts: (B, T, N).
            scheme: name of the masking scheme, which picks the prompt.
            mask: what is hidden, and whether attention is causal.
            session: name.
            neurons: (B,) index of the one neuron of each trial that is wanted; returns (B, T).
        """
        was_training = self.training
        self.eval()
        mask = Mask(mask.hidden, mask.target, mask.causal and self.config.causal)
        try:
            return self(counts, scheme, mask, session, neurons)
        finally:
            self.train(was_training)

    @property
    def sees_mask(self) -> bool:
        """Whether a hidden entry is shown as anything but an entry without a spike."""
        return self.config.hidden_input != "zeros" or self.config.input_transform == "scaled"

    # ----------------------------------------------------------------- sessions

    def add_session(
        self,
        name: str,
        n_neurons: int,
        mean_counts: np.ndarray | Tensor | None = None,
        token: str = "new",
        components: Tensor | None = None,
    ) -> None:
        """Make maps and a token for a recording the model has not seen.

        Args:
            name: unique key of the session; two sessions with equally many neurons stay apart.
            n_neurons: N.
            mean_counts: (N,) each neuron's mean count a bin on the training trials, all above 0,
                where its readout starts, and by which counts are scaled. Without it biases start as
                torch starts them, as with ``init="paper"``, and the means count as 0.
            token: where the session token starts: ``"new"``, at random as in the paper, or
                ``"mean"``, at the mean of the other sessions'.
            components: (N, R) directions that an ndt1 map in starts to look at, as the principal
                components of the training trials. Default: none.

        Raises:
            ValueError: when the name is taken, a mean count is not above 0, or there is no other
                session to take the mean of.
        """
        if name in self._keys:
            raise ValueError(f"session {name!r} is in the model already")
        if checked(f"session {name!r}: n_neurons", n_neurons, "int") < 1:
            raise ValueError(f"session {name!r} needs at least 1 neuron, got {n_neurons}")
        if token not in ("new", "mean"):
            raise ValueError(f"session {name!r}: token must be 'new' or 'mean', got {token!r}")
        size, places = self.config.patch_size, self.config.n_patches
        ndt2 = self.config.tokenizer == "ndt2"
        if self.config.leak and ndt2 and not size <= n_neurons <= size * places:
            raise ValueError(
                f"session {name!r} has {n_neurons} neurons; the authors' NDT2 takes {size} (one "
                f"patch) to {size * places} ({places} patches)"
            )
        if components is not None and len(components) != n_neurons:
            raise ValueError(
                f"session {name!r}: components must be ({n_neurons}, any number), got "
                f"{tuple(components.shape)}"
            )
        maps = SessionMaps(n_neurons, self.config)
        if maps.token is not None and token == "mean":
            if not self.sessions:
                raise ValueError(
                    f"session {name!r}: no other session to take the mean token of; use token='new'"
                )
            others = [token.detach() for token in self._tokens()]
            maps.token.data.copy_(torch.stack(others).mean(dim=0))
        elif maps.token is not None:
            nn.init.normal_(maps.token, std=1.0 if self.config.init == "paper" else TOKEN_STD)
        if mean_counts is not None:
            means = torch.as_tensor(mean_counts, dtype=torch.float32)
            if means.shape != (n_neurons,) or not bool((means > 0).all()):
                raise ValueError(
                    f"session {name!r}: mean_counts must be ({n_neurons},) and above 0; count a "
                    "silent neuron as half a spike"
                )
            maps.start_at(means, self.config)
        if isinstance(self.tokenizer, Patches):
            self.tokenizer.grow(n_neurons)
        elif components is not None:
            maps.look_at(components)
        self._keys[name] = self._key(name)
        self.sessions[self._keys[name]] = maps.to(self.norm.weight)

    def n_tokens(self, session: str) -> int:
        """Tokens of a trial, without those in front."""
        return self.config.n_bins * self.tokenizer.n_patches(self._maps(session))

    @property
    def session_names(self) -> list[str]:
        """Names of the sessions the model has maps for."""
        return list(self._keys)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.norm.weight.device

    @staticmethod
    def _key(name: str) -> str:
        # Module names may not hold a dot, nor be a name that ModuleDict itself uses.
        return "session:" + quote(name, safe=" ").replace(".", "%2E")

    def _maps(self, session: str) -> SessionMaps:
        maps = self.sessions[self._keys[session]] if session in self._keys else None
        if not isinstance(maps, SessionMaps):
            known = ", ".join(self.session_names) or "none"
            raise KeyError(
                f"the model knows no session {session!r}; it knows: {known}. fit(session, model) "
                "goes on with it on a new one"
            )
        return maps

    def _tokens(self) -> list[nn.Parameter]:
        tokens = (self._maps(name).token for name in self.session_names)
        return [token for token in tokens if token is not None]

    def _check(self, counts: Tensor, session: str, maps: SessionMaps) -> None:
        expected = (self.config.n_bins, maps.n_neurons)
        if counts.ndim != 3 or tuple(counts.shape[1:]) != expected:
            raise ValueError(
                f"session {session!r}: counts have shape {tuple(counts.shape)}, the model needs "
                f"(trials, {expected[0]} bins, {expected[1]} neurons)"
            )

    # -------------------------------------------------------------------- sizes

    def summary(self) -> str:
        """Number of parameters of each part and of each session, as a table."""
        config, sizes = self.config, self.n_parameters()
        parts: dict[str, Iterable[Tensor]] = {
            "tokenizer": self.tokenizer.parameters(),
            "prompt tokens": [self.prompt],
            "session tokens": self._tokens(),
            f"layers ({config.depth})": self.layers.parameters(),
            "final norm": self.norm.parameters(),
        }
        rows = {name: sum(p.numel() for p in part) for name, part in parts.items()}
        rows["core, all of these"] = sizes["core"]
        for name, size in sizes["sessions"].items():
            rows[f"session {name!r}, {self._maps(name).n_neurons} neurons"] = size
        rows["total"] = sum(p.numel() for p in self.parameters())
        wide = max(map(len, rows))
        title = f"MtM with the {config.tokenizer} tokenizer, width {config.width}; parameters"
        return "\n".join([title, *(f"  {name:<{wide}} {n:>12,}" for name, n in rows.items())])

    def n_parameters(self) -> dict[str, Any]:
        """Number of parameters: ``core``, all tokens included, and ``sessions``, name -> maps."""
        sizes = {}
        for name in self.session_names:
            maps = self._maps(name)
            sizes[name] = sum(p.numel() for p in maps.parameters() if p is not maps.token)
        total = sum(p.numel() for p in self.parameters())
        return {"core": total - sum(sizes.values()), "sessions": sizes}

    def _initialise(self, layers: Sequence[Layer]) -> None:
        """Residual branches shrink with depth (as T-Fixup); prompt tokens start small."""
        nn.init.normal_(self.prompt, std=1.0 if self.config.init == "paper" else TOKEN_STD)
        scale = 0.67 * self.config.depth**-0.25
        with torch.no_grad():
            for layer in layers:
                for linear in (layer.attention.out, layer.up, layer.down):
                    linear.weight.mul_(scale)
                layer.attention.value.weight.mul_(scale * math.sqrt(2))
