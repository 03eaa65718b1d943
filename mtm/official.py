"""Checkpoints of the authors' code, as models of this package that compute the same.

Those are pickles, which can run any code when they are opened the usual way. Here all classes and
functions that they name are replaced by inert stand-ins, but for those that put tensors,
dictionaries and sets together.
"""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mtm.checkpoint import CheckpointError
from mtm.data.ibl import PAPER_EIDS
from mtm.masks import MTM_SCHEMES
from mtm.model import AS_PUBLISHED, MtM, MtMConfig

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
) -> MtM:
    """The authors' NDT1 (stitched) or NDT2 as a model of ours that computes the same.

    Their attention leaks the future in causal mode, so that the model has ``config.leak`` on; it
    understands their padding (-1) too. What weights do not show is taken as in their released
    settings: learned positions, softsign, GELU, input scale 1.

    Args:
        checkpoint: their state dict or module, or a file with one of them.
        sessions: name -> number of neurons. Names are looked up in ``eids`` for the session token.
        heads: of attention, which a state dict does not tell. Default: what a pickled module says,
            else the paper's 8.
        causal: whether it was trained with causal attention. Default: if it has prompts.
        eids: the sessions of the rows of their session embedding, in order.

    Returns:
        on the CPU, in evaluation mode. Which trials it was trained on is not known: to evaluate it
        say ``split_seed=0``, and mind that its training trials may be among that split's test
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
) -> MtM:
    """The model of a state dict, and of what else is known of theirs."""
    if attributes.get("use_rope"):
        raise CheckpointError("the checkpoint has rotary positions, which this cannot import")
    try:
        config = _official_config(checkpoint, heads or attributes.get("n_heads") or 8, causal)
    except ValueError as error:
        raise CheckpointError(f"cannot read this checkpoint: {error}") from error
    if config.session_token and len(checkpoint[TOKENS]) != len(eids):
        raise CheckpointError(
            f"{TOKENS} has {len(checkpoint[TOKENS])} rows for {len(eids)} sessions; pass the names "
            "of the rows as eids"
        )
    if strangers := [name for name in sessions if config.session_token and name not in eids]:
        raise KeyError(f"session {strangers[0]!r} has no row in their session embedding; see eids")
    try:
        model = MtM(config, sessions)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    left = dict(checkpoint)
    tensors, wrong = {}, []
    for key, own in model.state_dict().items():
        if own.numel() == 0:  # no prompts
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
    unused = [key for key in left if _is_spare(key, config)]
    wrong += [f"{key} is unknown" for key in left if key not in unused]
    if wrong:
        raise CheckpointError("the checkpoint does not fit: " + "; ".join(wrong))
    if unused:
        warnings.warn("not used of the checkpoint: " + ", ".join(unused), stacklevel=3)
    model.load_state_dict(tensors)
    return model.eval()


def _official_config(tensors: Mapping[str, Tensor], heads: int, causal: bool | None) -> MtMConfig:
    """Sizes from the shapes of their weights."""
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
    sizes: dict[str, Any] = {"stitch_width": inputs}
    if ndt2:
        sizes = {"patch_size": inputs, "n_patches": len(tensors[SPACE])}
    return MtMConfig(
        tokenizer="ndt2" if ndt2 else "ndt1",
        n_bins=len(tensors[time]),
        width=len(tensors[norm]),
        depth=len(numbers),
        heads=heads,
        mlp_width=len(tensors[up]),
        prompts=MTM_SCHEMES if PROMPT in tensors else (),
        causal=PROMPT in tensors if causal is None else causal,
        session_token=TOKENS in tensors,
        split_seed=None,
        leak=True,
        **AS_PUBLISHED,
        **sizes,
    )


def _their_key(key: str, model: MtM, eids: Sequence[str]) -> tuple[str, int | None]:
    """The authors' name of one of our parameters, and its row where they keep many in a table."""
    ndt2 = model.config.tokenizer == "ndt2"
    if key in ("prompt", "tokenizer.time", "tokenizer.space"):
        time = TIME if ndt2 else TIME_NDT1
        return {"prompt": PROMPT, "tokenizer.time": time, "tokenizer.space": SPACE}[key], None
    part, kind = key.rsplit(".", 1)
    if part.startswith("layers."):
        _, number, inner = part.split(".", 2)
        return f"encoder.layers.{number}.{THEIRS_IN_LAYER[inner]}.{kind}", None
    if part.startswith("sessions."):
        names = {model._key(name): name for name in model.session_names}
        session = key.split(".")[1]
        if kind == "token":
            return TOKENS, list(eids).index(names[session])
        n = model.sessions[session].n_neurons
        if part.endswith("stitch"):
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
