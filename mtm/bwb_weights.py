"""The public MtM of BrainWideBench (arXiv 2609.22064), as a model of this package.

It was pretrained on 423 recordings of the International Brain Laboratory: windows of 1 s inside
trials, 50 bins of 20 ms; its masks use the regions of the level "Cosmos". Attention is full in
causal mode, too (``model.config.causal`` is False).

Its file is a pickle, which can run any code when it is opened the usual way. Here
``torch.load(weights_only=True)`` opens it, with a stand-in for each object that torch does not
know, and maps it from disk: layers of sessions that are not asked for are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtm.masks import MTM_SCHEMES
from mtm.model import CheckpointError, MtM, MtMConfig

REPOSITORY = "NerDSLab/ibl-bwb-mtm"
"""The weights on the Hugging Face Hub, one file of 839 MB."""
FILES = ("best.pt", "mtm.pt")  # its name there: the benchmark's documentation uses both
BIN_SIZE = 0.02  # seconds

THEIRS = {  # their names of our parts
    "tokenizer.embed_spikes": "shared_proj.0",
    "tokenizer.project": "shared_proj.2",
    "norm": "encoder.norm",
    # of a layer
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.out": "self_attn.out_proj",
    "up": "linear1",
    "down": "linear2",
    # of a session
    "stitcher": "in_stitcher",
    "readout": "out_stitcher",
}
TABLES = {"prompt_tokens": "mask_emb.weight", "tokenizer.time": "position_emb.weight"}
ATTENTION = ("query", "key", "value")  # in the order in which torch keeps them in one matrix


class Unknown(dict[Any, Any]):
    """Stands in for an object that torch does not know; runs nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Forget the object's attributes."""


def from_bwb(
    path: str | Path,
    sessions: Iterable[str] | None = None,
    *,
    heads: int = 8,
    activation: str = "gelu",
    direct_paths: bool = False,
) -> MtM:
    """Read the benchmark's checkpoint; on the CPU, in evaluation mode.

    What weights do not show are the arguments, and dropout, which is this package's (it matters to
    fine-tuning alone). ``mtm.from_pretrained`` fetches the file and calls this.

    Args:
        path: the file, one of ``FILES``.
        sessions: ids of the recordings whose layers to keep; ``[]`` keeps the shared core alone.
            Default: all.
        heads: of attention.
        activation: of the MLPs, "gelu" or "relu".
        direct_paths: put the direct paths of :class:`mtm.model.DirectPaths` beside the encoder.
            They add 0 until ``fit`` has trained them.

    Raises:
        CheckpointError: for a file that cannot be read, or weights that do not fit.
        KeyError: for a session that is not in the file.
    """
    tensors = _read(Path(path))
    found = {
        key.split(".")[1]: len(tensor)
        for key, tensor in tensors.items()
        if key.startswith("out_stitcher.") and key.endswith(".bias")
    }
    names = list(found) if sessions is None else list(sessions)
    if strangers := [name for name in names if name not in found]:
        raise KeyError(
            f"session {strangers[0]!r} is not among the {len(found)} of {path}; leave it out, "
            "fit(session, model) adds it"
        )
    try:
        up, stitched = tensors["encoder.layers.0.linear1.weight"], tensors["shared_proj.0.weight"]
        config = MtMConfig.published(
            width=up.shape[1],
            depth=len({key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}),
            heads=heads,
            mlp_width=len(up),
            stitch_width=stitched.shape[1],
            causal=False,
            activation=activation,
            own_history=direct_paths,
            latents=MtMConfig.latents if direct_paths else 0,
        )
        n_bins = len(tensors["position_emb.weight"])
        kind: dict[str, Any] = {"bin_size": BIN_SIZE, "prompts": MTM_SCHEMES, "causal": False}
        model = MtM(config, n_bins, {name: found[name] for name in names}, **kind)
        _copy(tensors, model)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no MtM of BrainWideBench: {error}") from error
    return model.eval()


@torch.no_grad()
def _copy(tensors: Mapping[str, Any], model: MtM) -> None:
    """Copy their weights into a model; direct paths, which they do not have, stay as they are."""
    session_of = {key: name for name, key in model._keys.items()}
    for key, own in model.state_dict().items():
        if ".direct." in key or key.endswith(".mean"):
            continue
        found = _find(tensors, key, session_of)
        if found.shape != own.shape:
            shapes = f"{tuple(found.shape)}, needed: {tuple(own.shape)}"
            raise ValueError(f"what should be {key} has shape {shapes}")
        own.copy_(found)


def _find(tensors: Mapping[str, Any], key: str, session_of: Mapping[str, str]) -> Tensor:
    """Their tensor for one of our parameters."""
    if key in TABLES:
        return tensors[TABLES[key]]
    part, kind = key.rsplit(".", 1)
    if part.startswith("sessions."):
        _, session, *inner = part.split(".")
        name = session_of[session]
        if not inner:  # the token
            return tensors["session_emb.weight"][tensors["session_emb.vocab"][name]]
        return tensors[f"{THEIRS[inner[0]]}.{name}.{kind}"]
    if not part.startswith("layers."):
        return tensors[f"{THEIRS[part]}.{kind}"]
    _, number, name = part.split(".", 2)
    layer, projection = f"encoder.layers.{number}", name.removeprefix("attention.")
    if projection in ATTENTION:
        joined = tensors[f"{layer}.self_attn.in_proj_{kind}"]
        return joined.chunk(3)[ATTENTION.index(projection)]
    return tensors[f"{layer}.{THEIRS[name]}.{kind}"]


def _read(path: Path) -> dict[str, Any]:
    """The state dict in the file, mapped from disk."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Unknown, name) for name in names]):
            found = torch.load(path, "cpu", weights_only=True, mmap=True)["model_state_dict"]
        return dict(found)
    except Exception as error:  # whatever a broken or hostile file leads to
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
