"""The whole model in this one file: stitch, embed, encode, read out.

MtM with the NDT1 tokenizer (arXiv 2407.14668, section 3): one token a time bin. Each session has
its own linear maps into and out of a shared transformer, as each animal has its own neurons:

    counts (B, T, N)  --stitch-->  (B, T, S)  --embed-->  (B, T, D)
    [session token, prompt token, bins]  --encode-->  (B, 2 + T, D)
    bins  --read out-->  log-rates (B, T, N)

- Hidden entries are set to 0 before anything sees them.
- The prompt token says which masking scheme is on, the session token whose brain it is.
- Causal mode: the two tokens come first and attention is lower-triangular, so no path, however many
  layers deep, leads from a later bin to an earlier output. (In the authors' code the two tokens see
  every bin and every bin sees them, which leaks the future from the second layer on.)
- Initialisation: each neuron's readout bias is its log mean count, learned tokens start small, and
  time embeddings start as slow and fast waves. A new model therefore predicts the mean rates, knows
  which bins are neighbours, and learns from there; ``init="paper"`` starts as the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from urllib.parse import quote, unquote

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtm.masks import MTM_SCHEMES, Mask

TOKEN_STD = 0.05  # of session and prompt tokens
POSITION_SCALE = 0.3  # amplitude of the waves that time embeddings start as
READOUT_SCALE = 0.1  # of the readout weights, so that a new model predicts close to the mean rates


@dataclass(frozen=True)
class MtMConfig:
    """Sizes and options of a model. The defaults are the paper's."""

    n_bins: int = 100  # T, time bins of a trial
    bin_size: float = 0.02  # seconds
    width: int = 512  # D, width of a token
    depth: int = 5  # transformer layers
    heads: int = 8
    mlp_width: int = 1024
    stitch_width: int = 668  # S, width that all sessions are mapped to
    embed_width: int = 1336  # hidden width of the embedding
    dropout: float = 0.4  # of attention and MLP
    embed_dropout: float = 0.2  # of the tokens
    prompts: tuple[str, ...] = MTM_SCHEMES  # schemes with a prompt token; () = no prompt
    causal: bool = True  # trained with causal attention too; if not, `predict` never uses it
    session_token: bool = True
    split_seed: int = 0  # of the splits it was trained on; evaluation uses the same
    init: str = "mtm"  # "mtm" or "paper"

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        for name in ("n_bins", "width", "depth", "heads", "mlp_width", "stitch_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.init not in ("mtm", "paper"):
            raise ValueError(f"init must be 'mtm' or 'paper', got {self.init!r}")

    @classmethod
    def from_depth(cls, depth: int, **fields: object) -> MtMConfig:
        """Sizes that go with a number of layers; ``from_depth(5)`` is the paper's model.

        Width, heads and dropout grow with depth. ``fields`` sets any field by hand.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        heads = max(1, round(1.6 * depth))
        width = 64 * heads
        stitch = round(width * 668 / 512)
        sizes: dict[str, object] = {
            "depth": depth,
            "heads": heads,
            "width": width,
            "mlp_width": 2 * width,
            "stitch_width": stitch,
            "embed_width": 2 * stitch,
            "dropout": min(0.4, round(0.1 * (depth - 1), 2)),
            "embed_dropout": min(0.2, round(0.05 * (depth - 1), 2)),
        }
        return cls(**{**sizes, **fields})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON can hold them."""
        return {**asdict(self), "prompts": list(self.prompts)}


def waves(n_bins: int, width: int) -> Tensor:
    """Sines and cosines of the bin's number, (n_bins, width): near bins get similar embeddings.

    A start for the learned time embedding. From random ones a model has to find out first which
    bins are neighbours; from these it can begin with smoothing.
    """
    half = torch.arange((width + 1) // 2) / ((width + 1) // 2)
    periods = 4.0 * (n_bins / 2.0) ** half  # geometric, from 4 bins to twice the trial
    angle = 2 * math.pi * torch.arange(n_bins)[:, None] / periods
    return POSITION_SCALE * torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


class Attention(nn.Module):
    """Multi-head self-attention, over all tokens or over earlier ones only."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D / heads)
            for part in (self.query, self.key, self.value)
        )
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal)
        x = x.transpose(1, 2).flatten(2)  # (B, L, D)
        return self.out(F.dropout(x, self.dropout, self.training))


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

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attention(self.norm1(x), causal)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class SessionMaps(nn.Module):
    """What belongs to one session alone: the maps of its neurons in and out, and its token."""

    def __init__(self, n_neurons: int, config: MtMConfig) -> None:
        super().__init__()
        self.n_neurons = n_neurons
        self.stitch = nn.Linear(n_neurons, config.stitch_width)
        self.readout = nn.Linear(config.width, n_neurons)
        self.token = nn.Parameter(torch.zeros(config.width)) if config.session_token else None


class MtM(nn.Module):
    """Multi-task-masking model of many sessions.

    Args:
        config: sizes and options.
        sessions: name -> number of neurons; more can follow with :meth:`add_session`.
    """

    def __init__(self, config: MtMConfig, sessions: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_spikes = nn.Linear(config.stitch_width, config.embed_width)
        self.project = nn.Linear(config.embed_width, config.width)
        self.position = nn.Parameter(torch.empty(config.n_bins, config.width))
        self.prompt = nn.Parameter(torch.empty(len(config.prompts), config.width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.sessions = nn.ModuleDict()
        self._initialise()
        for name, n_neurons in (sessions or {}).items():
            self.add_session(name, n_neurons)

    # ------------------------------------------------------------------ forward

    def forward(
        self, counts: Tensor, session: str, mask: Mask | None = None, prompt: str | None = None
    ) -> Tensor:
        """Log of the expected count of every entry, hidden ones included.

        Args:
            counts: (B, T, N) spike counts of trials of one session.
            session: its name.
            mask: what to hide, and whether attention is causal. Default: nothing is hidden.
            prompt: the scheme whose prompt token is shown; a scheme without one shows none.

        Returns:
            log-rates, (B, T, N).

        Raises:
            KeyError: for a session that was never added.
            ValueError: when the counts' shape does not fit the session or the model.
        """
        maps = self._maps(session)
        self._check(counts, session, maps)
        if mask is not None:
            counts = counts.masked_fill(mask.hidden, 0)
        causal = mask is not None and mask.causal
        tokens = self.embed(counts, maps, prompt)  # (B, prefix + T, D)
        tokens = self.encode(tokens, causal)  # (B, prefix + T, D)
        return maps.readout(tokens[:, -self.config.n_bins :])  # (B, T, N)

    def embed(self, counts: Tensor, maps: SessionMaps, prompt: str | None) -> Tensor:
        """Counts (B, T, N) to tokens (B, prefix + T, D): [session, prompt, bin 0, bin 1, ...]."""
        x = maps.stitch(counts.to(maps.stitch.weight.dtype))  # (B, T, S)
        x = self.project(F.softsign(self.embed_spikes(x)))  # (B, T, D)
        x = x + self.position
        prefix = [] if maps.token is None else [maps.token]
        if prompt in self.config.prompts:
            prefix.append(self.prompt[self.config.prompts.index(prompt)])
        if prefix:
            first = torch.stack(prefix).expand(len(x), -1, -1)  # (B, prefix, D)
            x = torch.cat([first.to(x.dtype), x], dim=1)
        return F.dropout(x, self.config.embed_dropout, self.training)

    def encode(self, tokens: Tensor, causal: bool) -> Tensor:
        """Transformer layers and the final norm; (B, L, D) -> (B, L, D)."""
        for layer in self.layers:
            tokens = layer(tokens, causal)
        return self.norm(tokens)

    @torch.no_grad()
    def predict(self, counts: Tensor, scheme: str, mask: Mask, session: str) -> Tensor:
        """Log-rates (B, T, N) without dropout and gradients: the predictor interface of `evaluate`.

        Args:
            counts: (B, T, N).
            scheme: name of the masking scheme, which picks the prompt.
            mask: what is hidden, and whether attention is causal.
            session: name.
        """
        was_training = self.training
        self.eval()
        mask = Mask(mask.hidden, mask.target, mask.causal and self.config.causal)
        try:
            return self(counts, session, mask, prompt=scheme)
        finally:
            self.train(was_training)

    # ----------------------------------------------------------------- sessions

    def add_session(
        self, name: str, n_neurons: int, mean_counts: np.ndarray | Tensor | None = None
    ) -> None:
        """Make maps and a token for a recording the model has not seen.

        Args:
            name: unique key of the session; two sessions with equally many neurons stay apart.
            n_neurons: N.
            mean_counts: (N,) each neuron's mean count a bin on the training trials, all above 0,
                where its readout starts. Without it, as with ``init="paper"``, biases start at
                random.

        Raises:
            ValueError: when the name is taken, or a mean count is not above 0.
        """
        if self._key(name) in self.sessions:
            raise ValueError(f"session {name!r} is in the model already")
        if n_neurons < 1:
            raise ValueError(f"session {name!r} needs at least 1 neuron, got {n_neurons}")
        maps = SessionMaps(n_neurons, self.config)
        paper = self.config.init == "paper"
        if maps.token is not None:
            nn.init.normal_(maps.token, std=1.0 if paper else TOKEN_STD)
        if mean_counts is not None and not paper:
            means = torch.as_tensor(mean_counts, dtype=torch.float32)
            if means.shape != (n_neurons,) or not bool((means > 0).all()):
                raise ValueError(
                    f"session {name!r}: mean_counts must be ({n_neurons},) and above 0; count a "
                    "silent neuron as half a spike"
                )
            with torch.no_grad():
                maps.readout.weight.mul_(READOUT_SCALE)
                maps.readout.bias.copy_(means.log())
        self.sessions[self._key(name)] = maps.to(self.device)

    @property
    def session_names(self) -> list[str]:
        """Names of the sessions the model has maps for."""
        return [unquote(key.removeprefix("session:")) for key in self.sessions]

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.position.device

    def n_parameters(self) -> dict[str, int]:
        """Number of parameters: of the shared ``core``, and of each session by name."""
        counts = {
            name: sum(p.numel() for p in maps.parameters())
            for name, maps in zip(self.session_names, self.sessions.values(), strict=True)
        }
        total = sum(p.numel() for p in self.parameters())
        return {"core": total - sum(counts.values()), **counts}

    @staticmethod
    def _key(name: str) -> str:
        # Module names may not hold a dot, nor be a name that ModuleDict itself uses.
        return "session:" + quote(name, safe=" ").replace(".", "%2E")

    def _maps(self, session: str) -> SessionMaps:
        if self._key(session) not in self.sessions:
            known = ", ".join(self.session_names) or "none"
            raise KeyError(f"the model knows no session {session!r}; it knows: {known}")
        return self.sessions[self._key(session)]

    def _check(self, counts: Tensor, session: str, maps: SessionMaps) -> None:
        expected = (self.config.n_bins, maps.n_neurons)
        if counts.ndim != 3 or tuple(counts.shape[1:]) != expected:
            raise ValueError(
                f"session {session!r}: counts have shape {tuple(counts.shape)}, the model needs "
                f"(trials, {expected[0]} bins, {expected[1]} neurons)"
            )

    # ------------------------------------------------------------ initialisation

    def _initialise(self) -> None:
        """Residual branches shrink with depth (as T-Fixup); tokens small, positions as waves."""
        if self.config.init == "paper":
            nn.init.normal_(self.position)
            nn.init.normal_(self.prompt)
        else:
            self.position.data.copy_(waves(*self.position.shape))
            nn.init.normal_(self.prompt, std=TOKEN_STD)
        scale = 0.67 * self.config.depth**-0.25
        with torch.no_grad():
            for layer in self.layers:
                for linear in (layer.attention.out, layer.up, layer.down):
                    linear.weight.mul_(scale)
                layer.attention.value.weight.mul_(scale * math.sqrt(2))
