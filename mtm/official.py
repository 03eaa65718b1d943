"""Checkpoints of the authors' code, as models of this package that compute the same.

:class:`OfficialMtM` computes as their code does, leaks and padding included, and exists for their
checkpoints alone: train new models with :class:`mtm.MtM`.

Their checkpoints are pickles, which can run any code when they are opened the usual way. Here all
classes and functions that a pickle names are replaced by inert stand-ins, except for those that
rebuild tensors, dictionaries and sets.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtm.masks import MTM_SCHEMES, Mask
from mtm.model import (
    BinTokenizer,
    CheckpointError,
    MtM,
    MtMConfig,
    PatchTokenizer,
    SessionLayers,
    Tokens,
)

SESSIONS_OF_THE_PAPER = json.loads((Path(__file__).parent / "paper_sessions.json").read_text())
PAPER_EIDS: tuple[str, ...] = tuple(SESSIONS_OF_THE_PAPER["paper"])
"""The sessions of the MtM paper, as the authors' repository lists them (``target_eids.txt``): rows
of its session embedding, in order. They are 40, 35 to pretrain on and the 5 of `HELD_OUT_EIDS`,
where the paper speaks of 39, 34 and 5; which one it left out is not written down.

:meta hide-value:
"""
HELD_OUT_EIDS: tuple[str, ...] = tuple(SESSIONS_OF_THE_PAPER["held_out"])
"""The five sessions that the paper holds out of pretraining (``test_re_eids.txt``), first of
`PAPER_EIDS`. In the authors' ``ibl_100_eids.txt`` three of them are among the sessions to train on.

:meta hide-value:
"""
REPEATED_SITE_EIDS: tuple[str, ...] = tuple(SESSIONS_OF_THE_PAPER["repeated_site"])
"""The repeated-site sessions as the authors list them (``ibl_repro_ephys_eids.txt``), 83 (the paper
says 48): in each, one probe was aimed at the same place, through VISa/am, CA1, DG, LP and PO.

:meta hide-value:
"""
ABLATION_EID: str = SESSIONS_OF_THE_PAPER["ablation"]
"""The one session of the paper's ablations (its Tables 1 and 3).

:meta hide-value:
"""

# ---------------------------------------------------------------- the model, as their code has it


class OfficialPatchTokenizer(PatchTokenizer):
    """Their NDT2 tokenizer: all sessions have as many patches as there are places."""

    def forward(self, x: Tensor, layers: SessionLayers) -> Tensor:
        """Masked input (B, T, N) to tokens (B, T x places, D)."""
        n_neurons, n_places = layers.n_neurons, len(self.space)
        # The last patch is filled up with the neurons before it, which it then shows twice.
        missing = -n_neurons % self.patch_size
        end = n_neurons - n_neurons % self.patch_size
        x = torch.cat([x, x[..., end - missing : end]], dim=-1)
        x = F.pad(x, (0, n_places * self.patch_size - x.shape[-1]))
        return self.embed_patches(x.unflatten(2, (n_places, self.patch_size)))

    def n_patches(self, layers: SessionLayers) -> int:
        """Tokens of a bin, those without a neuron included."""
        return len(self.space)


class OfficialMtM(MtM):
    """A model whose attention, padding and patches are those of the authors' code.

    In causal mode it leaks: a prediction of a bin depends on later bins. Trials that are shorter
    than ``n_bins`` are filled up with -1.

    Args:
        n_places: patches that their NDT2 has a space embedding for.
    """

    tokenizers: Mapping[str, type[BinTokenizer | PatchTokenizer]] = {
        "ndt1": BinTokenizer,
        "ndt2": OfficialPatchTokenizer,
    }

    def __init__(
        self,
        config: MtMConfig,
        n_bins: int,
        sessions: Mapping[str, int] | None = None,
        *,
        n_places: int = 6,
        **options: Any,
    ) -> None:
        super().__init__(config, n_bins, **options)
        self.n_places = n_places
        self.tokenizer.grow(n_places * config.patch_size)
        for name, n_neurons in (sessions or {}).items():
            self.add_session(name, n_neurons)

    def add_session(
        self,
        name: str,
        n_neurons: int,
        counts: np.ndarray | Tensor | None = None,
        token: str = "new",
    ) -> None:
        """As :meth:`mtm.MtM.add_session`; their NDT2 limits how many neurons a session has."""
        if self.config.tokenizer == "ndt2":
            size = self.config.patch_size
            if not size <= n_neurons <= size * self.n_places:
                raise ValueError(
                    f"session {name!r} has {n_neurons} neurons; the authors' NDT2 takes {size} "
                    f"(one patch) to {size * self.n_places} ({self.n_places} patches)"
                )
        super().add_session(name, n_neurons, counts, token)
        if self.config.tokenizer == "ndt2":  # where a neuron has nothing of its own
            self.session_layers(name).bias.requires_grad_(False).zero_()

    def embed(self, counts: Tensor, scheme: str | None, mask: Mask | None, session: str) -> Tokens:
        """Counts (B, T, N), -1 where padded, to tokens that attend as in the authors' code."""
        tokens = super().embed(counts, scheme, mask, session)
        causal = mask is not None and mask.causal
        length = len(tokens.bins)
        allowed = torch.ones(length, length, dtype=torch.bool, device=counts.device)
        n_prefix = length - self.n_tokens(session)
        if causal:
            # The prefix attends to every bin and every bin to the prefix, which from the second
            # layer on leads from the future to the past. And the number of a token modulo T is
            # taken for its bin, which in NDT2 is another one's.
            number = torch.arange(length - n_prefix, device=counts.device) % self.n_bins
            allowed[n_prefix:, n_prefix:] = number[:, None] >= number
        own = torch.eye(length, dtype=torch.bool, device=counts.device)
        absent = self._absent(counts, n_prefix, session)[:, None]  # (B, 1, L)
        # Nothing attends to padding but itself.
        return tokens._replace(causal=False, allowed=((allowed & ~absent) | own)[:, None])

    def _absent(self, counts: Tensor, n_prefix: int, session: str) -> Tensor:
        """Tokens of padded bins, or of places without a neuron, (B, L) bool."""
        n_patches = self.n_tokens(session) // self.n_bins
        absent = (counts < 0).all(dim=2)[:, :, None]  # (B, T, 1)
        first = torch.arange(n_patches, device=counts.device) * self.config.patch_size
        absent = absent | (first >= counts.shape[2])  # (B, T, patches)
        return F.pad(absent.flatten(1), (n_prefix, 0), value=False)

    def forward_many(
        self, batches: Sequence[tuple[Tensor, str | None, Mask | None, str]]
    ) -> list[Tensor]:
        """Run :meth:`forward` on several batches, one after the other."""
        return [self(*batch) for batch in batches]

    def settings(self) -> dict[str, Any]:
        """Everything about the model but its weights, as JSON can hold it."""
        return {**super().settings(), "class": "official", "n_places": self.n_places}


# ---------------------------------------------------------------- import of a checkpoint

# Their names of our parts.
THEIRS = {
    "tokenizer.embed_spikes": "encoder.embedder.embed_spikes",
    "tokenizer.project": "encoder.embedder.projection",
    "norm": "encoder.out_norm",
}
THEIRS_NDT2 = {
    "tokenizer.space_norm": "encoder.embedder.embed_space_pos.1",
    "tokenizer.time_norm": "encoder.embedder.embed_time_pos.1",
    "tokenizer.readout": "decoder.0",
}
THEIRS_IN_LAYER = {
    "norm1": "ln1",
    "norm2": "ln2",
    **{f"attention.{part}": f"attn.{part}" for part in ("query", "key", "value")},
    "attention.out": "attn.out_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
SPACE, TIME = (f"encoder.embedder.embed_{what}_pos.0.weight" for what in ("space", "time"))
TIME_NDT1, PROMPT, TOKENS = (
    f"encoder.embedder.embed_{what}.weight" for what in ("pos", "prompt", "session")
)


def from_official(
    checkpoint: str | Path | Mapping[str, Tensor] | torch.nn.Module,
    sessions: Mapping[str, int],
    *,
    heads: int | None = None,
    causal: bool | None = None,
    eids: Sequence[str] = PAPER_EIDS,
) -> OfficialMtM:
    """Load the authors' NDT1 (stitched) or NDT2 as a model that computes the same.

    What weights do not show is taken as in their released settings: learned positions, softsign,
    GELU, input scale 1.

    Args:
        checkpoint: their state dict or module, or a file with one of them.
        sessions: name -> number of neurons. Names are looked up in ``eids`` for the session token.
        heads: of attention, which a state dict does not tell. Default: what a pickled module says,
            else the paper's 8.
        causal: whether it was trained with causal attention. Default: if it has prompts.
        eids: the sessions of the rows of their session embedding, in order.

    Returns:
        on the CPU, in evaluation mode. Which trials it was trained on is not known: to evaluate it
        pass ``split_seed=0``, and mind that its training trials may be among that split's test
        trials, unless the session was held out.

    Raises:
        CheckpointError: when the file cannot be read, or a key is missing, unknown or of another
            shape; the message names all of them.
        KeyError: for a session that is not in ``eids``.

    Warns:
        UserWarning: naming the keys that no session of ``sessions`` uses.
    """
    attributes: dict[str, Any] = {}
    if isinstance(checkpoint, torch.nn.Module):
        checkpoint = checkpoint.state_dict()
    path = None
    if not isinstance(checkpoint, Mapping):
        path = Path(checkpoint)
        checkpoint, attributes = _read_official(path)
    try:
        return _imported(checkpoint, attributes, sessions, heads, causal, eids)
    except CheckpointError as error:
        if path is None:
            raise
        raise CheckpointError(f"{path}: {error}") from error


def _imported(
    checkpoint: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    sessions: Mapping[str, int],
    heads: int | None,
    causal: bool | None,
    eids: Sequence[str],
) -> OfficialMtM:
    """The model of a state dict, and of what else is known of theirs."""
    if attributes.get("use_rope"):
        raise CheckpointError("the checkpoint has rotary positions, which this cannot import")
    try:
        model = _without_weights(checkpoint, heads or attributes.get("n_heads") or 8, causal)
    except ValueError as error:
        raise CheckpointError(f"cannot read this checkpoint: {error}") from error
    if TOKENS in checkpoint and len(checkpoint[TOKENS]) != len(eids):
        raise CheckpointError(
            f"{TOKENS} has {len(checkpoint[TOKENS])} rows for {len(eids)} sessions; pass the names "
            "of the rows as eids"
        )
    if strangers := [name for name in sessions if TOKENS in checkpoint and name not in eids]:
        raise KeyError(f"session {strangers[0]!r} has no row in their session embedding; see eids")
    try:
        for name, n_neurons in sessions.items():
            model.add_session(name, n_neurons)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    left = dict(checkpoint)
    tensors, wrong = {}, []
    for key, own in model.state_dict().items():
        # No prompts, or the bias of a neuron, which their NDT2 does not have.
        if own.numel() == 0 or (key.startswith("sessions.") and key.split(".")[2] == "bias"):
            tensors[key] = own
            continue
        theirs, row = _their_key(key, model, eids)
        left.pop(theirs, None)
        value = checkpoint.get(theirs)
        value = value if value is None or row is None else value[row]
        if value is None or value.shape != own.shape:
            found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            wrong.append(f"{theirs} {found}, needed: {tuple(own.shape)}")
        else:
            tensors[key] = value
    unused = [key for key in left if _is_spare(key, model.config)]
    wrong += [f"{key} is unknown" for key in left if key not in unused]
    if wrong:
        raise CheckpointError("the checkpoint does not fit: " + "; ".join(wrong))
    if unused:
        warnings.warn("not used of the checkpoint: " + ", ".join(unused), stacklevel=3)
    model.load_state_dict(tensors)
    return model.eval()


def _without_weights(tensors: Mapping[str, Tensor], heads: int, causal: bool | None) -> OfficialMtM:
    """A model without sessions, with sizes from the shapes of their weights."""
    ndt2 = SPACE in tensors
    time = TIME if ndt2 else TIME_NDT1
    spikes, norm, up = (
        "encoder.embedder.embed_spikes.weight",
        "encoder.out_norm.weight",
        "encoder.layers.0.mlp.up_proj.weight",
    )
    needed = {time: 2, spikes: 2, norm: 1, up: 2}  # and how many dimensions
    needed |= {key: 2 for key in (SPACE, TOKENS) if key in tensors}
    if wrong := [key for key, n in needed.items() if key not in tensors or tensors[key].ndim != n]:
        raise CheckpointError(
            f"this is no NDT1 or NDT2 of the authors' code: {', '.join(wrong)} missing or misshapen"
        )
    if not ndt2 and not any(key.startswith("encoder.stitcher.") for key in tensors):
        raise CheckpointError("their NDT1 without stitching cannot be imported: it has no stitcher")
    numbers = {key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}
    inputs = tensors[spikes].shape[1]
    config = MtMConfig.published(
        tokenizer="ndt2" if ndt2 else "ndt1",
        width=len(tensors[norm]),
        depth=len(numbers),
        heads=heads,
        mlp_width=len(tensors[up]),
        session_token=TOKENS in tensors,
        **{"patch_size" if ndt2 else "stitch_width": inputs},
    )
    return OfficialMtM(
        config,
        len(tensors[time]),
        n_places=len(tensors[SPACE]) if ndt2 else 0,
        prompts=MTM_SCHEMES if PROMPT in tensors else (),
        causal=PROMPT in tensors if causal is None else causal,
        init="paper",
    )


def _their_key(key: str, model: MtM, eids: Sequence[str]) -> tuple[str, int | None]:
    """The authors' name of one of our parameters, and its row where they keep many in a table."""
    ndt2 = model.config.tokenizer == "ndt2"
    if key in ("prompt_tokens", "tokenizer.time", "tokenizer.space"):
        time = TIME if ndt2 else TIME_NDT1
        return {"prompt_tokens": PROMPT, "tokenizer.time": time, "tokenizer.space": SPACE}[
            key
        ], None
    part, kind = key.rsplit(".", 1)
    if part.startswith("layers."):
        _, number, inner = part.split(".", 2)
        return f"encoder.layers.{number}.{THEIRS_IN_LAYER[inner]}.{kind}", None
    if part.startswith("sessions."):
        names = {key: name for name, key in model._keys.items()}
        session = key.split(".")[1]
        if kind == "token":
            return TOKENS, list(eids).index(names[session])
        n = model.session_layers(names[session]).n_neurons
        if part.endswith("stitcher"):
            return f"encoder.stitcher.stitcher_dict.{n}.{kind}", None
        return f"stitch_decoder.stitch_decoder_dict.{n}.{kind}", None
    return f"{(THEIRS | THEIRS_NDT2)[part]}.{kind}", None


def _is_spare(key: str, config: MtMConfig) -> bool:
    """Keys that are not needed: maps of other sessions, a decoder that their NDT1 never uses."""
    ndt1 = config.tokenizer == "ndt1"
    maps = ("encoder.stitcher.stitcher_dict.", "stitch_decoder.stitch_decoder_dict.", "decoder.0.")
    return ndt1 and key.startswith(maps)


def _read_official(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in a file of ``torch.save`` by name, and a few attributes of a pickled module."""
    try:
        path.open("rb").close()  # says best what is wrong with a path
        # A file of TorchScript would be handed on to its own loader, which runs what is in it.
        reader: Any = torch._C.PyTorchFileReader(str(path))
        if reader.has_record("constants.pkl"):
            raise CheckpointError(f"{path} holds a TorchScript program, not a checkpoint")
        inert = SimpleNamespace(Unpickler=_InertUnpickler, __name__="inert")
        found = torch.load(path, "cpu", pickle_module=inert, weights_only=False)
        found = found.get("model", found.get("state_dict", found))
        if isinstance(found, _Inert):
            return dict(_tensors(found)), _attributes(found)
        if not all(isinstance(value, Tensor) for value in found.values()):
            raise CheckpointError(f"{path} holds neither a state dict nor a module")
    except CheckpointError:
        raise
    except Exception as error:  # whatever a broken or hostile file leads to
        raise CheckpointError(f"{path} is not a readable file of torch.save: {error}") from error
    return dict(found), {}


class _Inert:
    """Stands in for the classes and functions of a pickle: keeps attributes, runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Whatever it is called with is dropped."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of their configuration are not needed."""

    append = extend = __call__


class _InertUnpickler(pickle.Unpickler):
    """Gives a pickle what puts tensors together, and a stand-in for all else it asks for."""

    KNOWN = {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
    }
    REBUILD = ("_rebuild_tensor_v2", "_rebuild_parameter")

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in self.REBUILD:
            rebuild = getattr(torch._utils, name)
            return lambda *args: rebuild(*args)  # its own: a pickle may change what it is given
        return self.KNOWN.get((module, name), _Inert)


def _tensors(
    module: _Inert, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What ``module.state_dict()`` would give; a module that is found twice gives its own once."""
    state, seen = vars(module), set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    passing = state.get("_non_persistent_buffers_set", set())
    for name, value in {**state.get("_parameters", {}), **state.get("_buffers", {})}.items():
        if isinstance(value, Tensor) and name not in passing:
            yield prefix + name, value.detach()
    for name, child in state.get("_modules", {}).items():
        if isinstance(child, _Inert):
            yield from _tensors(child, f"{prefix}{name}.", seen)


def _attributes(module: _Inert) -> dict[str, Any]:
    """Plain attributes of the first attention layer: ``n_heads``, ``use_rope`` and others."""
    for name in ("encoder", "layers", "0", "attn"):
        module = vars(module).get("_modules", {}).get(name, _Inert())
    return {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float)}
