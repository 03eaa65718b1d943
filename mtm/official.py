"""Checkpoints of the authors' code, as models of this package that compute the same.

:class:`OfficialMtM` exists for their checkpoints alone: train new models with :class:`mtm.MtM`.

Their checkpoints are pickles, which can run any code when they are opened the usual way;
:func:`read_pickle` runs none.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from mtm.masks import MTM_SCHEMES, Mask
from mtm.model import (
    Batch,
    BinTokenizer,
    CheckpointError,
    MtM,
    MtMConfig,
    PatchTokenizer,
    SessionLayers,
    Tokens,
)

_SESSIONS = json.loads((Path(__file__).parent / "paper_sessions.json").read_text())
# The sessions of the paper in the order of the authors' session embedding (`target_eids.txt`):
# 35 to pretrain on and the 5 held out (`test_re_eids.txt`), where the paper speaks of 34 and 5.
PAPER_EIDS: tuple[str, ...] = tuple(_SESSIONS["paper"])
HELD_OUT_EIDS: tuple[str, ...] = tuple(_SESSIONS["held_out"])
# The repeated-site sessions (`ibl_repro_ephys_eids.txt`), 83, where the paper speaks of 48.
REPEATED_SITE_EIDS: tuple[str, ...] = tuple(_SESSIONS["repeated_site"])
ABLATION_EID: str = _SESSIONS["ablation"]  # of the paper's Tables 1 and 3
STATE_DICTS = ("model_state_dict", "model", "state_dict")  # keys of what holds the weights

# ---------------------------------------------------------------- the model, as their code has it


class OfficialPatchTokenizer(PatchTokenizer):
    """Their NDT2 tokenizer."""

    def forward(self, x: Tensor, layers: SessionLayers) -> Tensor:
        """Masked input (B, T, N) to tokens (B, T x places, D)."""
        # The last patch is filled up with the neurons before it, which it then shows twice.
        missing, end = -x.shape[2] % self.patch_size, x.shape[2] - x.shape[2] % self.patch_size
        return super().forward(torch.cat([x, x[..., end - missing : end]], dim=2), layers)


class OfficialMtM(MtM):
    """A model whose attention, padding (-1) and patches are those of the authors' code.

    In causal mode it leaks: a prediction of a bin depends on later bins. ``n_places`` are the
    patches of a bin in their NDT2, the same for all sessions; ``others`` as of :class:`mtm.MtM`.
    """

    tokenizers = {"ndt1": BinTokenizer, "ndt2": OfficialPatchTokenizer}

    def __init__(
        self, config: MtMConfig, n_bins: int, sessions: Any = None, n_places: int = 6, **others: Any
    ) -> None:
        super().__init__(config, n_bins, **others)
        self.n_places = n_places
        if config.tokenizer == "ndt2":
            self.tokenizer.grow(n_places)
        for name, n_neurons in (sessions or {}).items():
            self.add_session(name, n_neurons)

    def add_session(
        self, name: str, n_neurons: int, counts: ArrayLike | None = None, token: str = "new"
    ) -> None:
        """As :meth:`mtm.MtM.add_session`; their NDT2 limits how many neurons a session has."""
        ndt2, size = self.config.tokenizer == "ndt2", self.config.patch_size
        if ndt2 and not size <= n_neurons <= size * self.n_places:
            limits = f"the authors' NDT2 takes {size} to {size * self.n_places}"
            raise ValueError(f"session {name!r} has {n_neurons} neurons; {limits}")
        super().add_session(name, n_neurons, counts, token)
        if ndt2:
            layers = self.session_layers(name)
            layers.n_patches = self.n_places
            layers.bias.requires_grad_(False).zero_()  # they have no bias for each neuron

    def embed(self, counts: Tensor, scheme: str | None, mask: Mask | None, session: str) -> Tokens:
        """Counts (B, T, N), -1 where padded, to tokens that attend as in the authors' code."""
        tokens = super().embed(counts, scheme, mask, session)
        length, n_prefix = len(tokens.bins), len(tokens.bins) - self.n_tokens(session)
        allowed = torch.ones(length, length, dtype=torch.bool, device=counts.device)
        if mask is not None and mask.causal:
            # The prefix attends to every bin and every bin to it: from the future to the past.
            # And a token's number modulo T is taken for its bin, in NDT2 that of another token.
            number = torch.arange(length - n_prefix, device=counts.device) % self.n_bins
            allowed[n_prefix:, n_prefix:] = number[:, None] >= number
        # Nothing attends to padding, bins without counts and places without neurons, but itself.
        place = torch.arange(self.session_layers(session).n_patches, device=counts.device)
        empty = place * self.config.patch_size >= counts.shape[2]  # (places,)
        absent = (counts < 0).all(dim=2)[:, :, None] | empty  # (B, T, places)
        absent = F.pad(absent.flatten(1), (n_prefix, 0), value=False)[:, None]  # (B, 1, L)
        own = torch.eye(length, dtype=torch.bool, device=counts.device)
        return tokens._replace(causal=False, allowed=((allowed & ~absent) | own)[:, None])

    def forward_many(self, batches: list[Batch]) -> list[Tensor]:
        """Log-rates of several batches, one after the other: trials differ in padding."""
        return [self(*batch) for batch in batches]


# ---------------------------------------------------------------- import of a checkpoint

THEIRS = {  # their names of our parts
    "tokenizer.embed_spikes": "encoder.embedder.embed_spikes",
    "tokenizer.project": "encoder.embedder.projection",
    "tokenizer.space_norm": "encoder.embedder.embed_space_pos.1",
    "tokenizer.time_norm": "encoder.embedder.embed_time_pos.1",
    "tokenizer.readout": "decoder.0",
    "norm": "encoder.out_norm",
    # of a layer
    "norm1": "ln1",
    "norm2": "ln2",
    "attention.query": "attn.query",
    "attention.key": "attn.key",
    "attention.value": "attn.value",
    "attention.out": "attn.out_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    # of a session
    "stitcher": "encoder.stitcher.stitcher_dict",
    "readout": "stitch_decoder.stitch_decoder_dict",
}
SPACE, TIME = (f"encoder.embedder.embed_{what}_pos.0.weight" for what in ("space", "time"))
TIME_NDT1, PROMPT, TOKENS = (
    f"encoder.embedder.embed_{what}.weight" for what in ("pos", "prompt", "session")
)


def from_official(
    checkpoint: str | Path | Mapping[str, Tensor],
    sessions: Mapping[str, int],
    *,
    heads: int | None = None,
    causal: bool | None = None,
    eids: Sequence[str] = PAPER_EIDS,
) -> OfficialMtM:
    """Load the authors' NDT1 (stitched) or NDT2 as a model that computes the same.

    What weights do not show is taken as in their released settings.

    Args:
        checkpoint: their state dict, or a file with it or with their module.
        sessions: name -> number of neurons. Names are looked up in ``eids`` for the session token.
        heads: of attention. Default: what a pickled module says, else the paper's 8.
        causal: whether it was trained with causal attention. Default: if it has prompts.
        eids: the sessions of the rows of their session embedding, in order.

    Returns:
        on the CPU, in evaluation mode. Which trials it was trained on is not known: to evaluate it
        pass ``split_seed=0``, whose test trials it may have seen, unless the session was held out.

    Raises:
        CheckpointError: for a file that cannot be read, or weights that do not fit.
        KeyError: for a session that is not in ``eids``.
    """
    attributes: dict[str, Any] = {}
    if isinstance(checkpoint, str | Path):
        checkpoint, attributes = read_pickle(Path(checkpoint))
    if attributes.get("use_rope"):
        raise CheckpointError("the checkpoint has rotary positions, which this cannot import")
    if TOKENS in checkpoint:
        if (n := len(checkpoint[TOKENS])) != len(eids):
            problem = f"{TOKENS} has {n} rows for {len(eids)} sessions"
            raise CheckpointError(f"{problem}; pass the names of the rows as eids")
        if strangers := sorted(set(sessions) - set(eids)):
            raise KeyError(f"session {strangers[0]!r} has no row in {TOKENS}; see eids")
    try:
        heads = heads or attributes.get("n_heads") or 8
        model = _without_weights(checkpoint, sessions, heads, causal)
        model.load_state_dict(_weights(model, checkpoint, eids))
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"no NDT1 (stitched) or NDT2 of the authors': {error}") from error
    return model.eval()


def _without_weights(
    tensors: Mapping[str, Tensor], sessions: Mapping[str, int], heads: int, causal: bool | None
) -> OfficialMtM:
    """A model with the sizes that the shapes of their weights show."""
    ndt2 = SPACE in tensors
    time, up = tensors[TIME if ndt2 else TIME_NDT1], tensors["encoder.layers.0.mlp.up_proj.weight"]
    spikes = tensors["encoder.embedder.embed_spikes.weight"]
    config = MtMConfig.published(
        tokenizer="ndt2" if ndt2 else "ndt1",
        width=up.shape[1],
        depth=len({key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}),
        heads=heads,
        mlp_width=len(up),
        session_token=TOKENS in tensors,
        **{"patch_size" if ndt2 else "stitch_width": spikes.shape[1]},
    )
    return OfficialMtM(
        config,
        len(time),
        sessions,
        n_places=len(tensors[SPACE]) if ndt2 else 1,
        prompts=MTM_SCHEMES if PROMPT in tensors else (),
        causal=PROMPT in tensors if causal is None else causal,
        init="paper",
    )


def _weights(
    model: OfficialMtM, checkpoint: Mapping[str, Tensor], eids: Sequence[str]
) -> dict[str, Tensor]:
    """Their weights by our names; warns of those that are not used."""
    unused, tensors = dict(checkpoint), model.state_dict()
    for key, own in tensors.items():
        theirs, row = their_key(key, model, eids)
        if theirs is not None and own.numel():  # else nothing of theirs, as without prompts
            unused.pop(theirs, None)
            tensors[key] = checkpoint[theirs] if row is None else checkpoint[theirs][row]
    # Stitchers and readouts of other sessions, and a decoder that their NDT1 never uses.
    spare = (THEIRS["stitcher"], THEIRS["readout"], "decoder.0.")
    if unknown := [key for key in unused if not key.startswith(spare)]:
        raise ValueError(f"{', '.join(unknown)} unknown")
    if unused:
        warnings.warn("not used of the checkpoint: " + ", ".join(unused), stacklevel=3)
    return tensors


def their_key(key: str, model: OfficialMtM, eids: Sequence[str]) -> tuple[str | None, int | None]:
    """The authors' name of one of our parameters (None: not in theirs), and its row in a table."""
    time = TIME if model.config.tokenizer == "ndt2" else TIME_NDT1
    tables = {"prompt_tokens": PROMPT, "tokenizer.space": SPACE, "tokenizer.time": time}
    if key in tables:
        return tables[key], None
    part, kind = key.rsplit(".", 1)
    if part.startswith("layers."):
        _, number, inner = part.split(".", 2)
        return f"encoder.layers.{number}.{THEIRS[inner]}.{kind}", None
    if not part.startswith("sessions."):
        return f"{THEIRS[part]}.{kind}", None
    _, session, *inner_parts = part.split(".")
    name = next(name for name in model.session_names if model._keys[name] == session)
    if not inner_parts:
        return (TOKENS, list(eids).index(name)) if kind == "token" else (None, None)
    return f"{THEIRS[inner_parts[0]]}.{model.session_layers(name).n_neurons}.{kind}", None


# ---------------------------------------------------------------- files, without running their code


def read_pickle(path: Path, stand_in: Any = OrderedDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict in a file, and what a pickled module's attention has as attributes.

    ``stand_in`` takes the place of each class or function that torch does not know, and must run
    nothing. Tensors are mapped from disk. Raises CheckpointError for a file without.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(stand_in, name) for name in names]):
            found = torch.load(path, "cpu", weights_only=True, mmap=True)
        found = next((found[key] for key in STATE_DICTS if key in found), found)
        attributes = {}
        if "_modules" in getattr(found, "__dict__", {}):
            attention = found
            for name in ("encoder", "layers", "0", "attn"):  # knows n_heads, use_rope
                attention = vars(attention)["_modules"][name]
            found, attributes = dict(_tensors(found)), vars(attention)
        if not any(isinstance(value, Tensor) for value in found.values()):
            raise ValueError("it holds neither a state dict nor a module")
    except Exception as error:  # whatever a broken or hostile file leads to
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    return found, attributes


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """What ``module.state_dict()`` would give."""
    state = vars(module)
    for name, value in {**state["_parameters"], **state["_buffers"]}.items():
        if isinstance(value, Tensor) and name not in state["_non_persistent_buffers_set"]:
            yield prefix + name, value.detach()
    for name, child in state["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")
