"""The public MtM of BrainWideBench (arXiv 2609.22064), as a model of this package.

It was pretrained on 423 recordings of the International Brain Laboratory: windows of 1 s inside
trials, 50 bins of 20 ms; its masks use the regions of the level "Cosmos". Attention is full in
causal mode, too (``model.config.causal`` is False).

Its file is a pickle, read by :func:`mtm.official.read_pickle`, which runs none of its code and maps
it from disk: layers of sessions that are not asked for are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtm.masks import MTM_SCHEMES
from mtm.model import CheckpointError, MtM, MtMConfig
from mtm.official import read_pickle

FILES = ("best.pt", "mtm.pt")
"""Names of the file on the Hugging Face Hub: the benchmark's documentation uses both."""

OURS = {  # their names of our parts, in the order in which they are replaced
    "encoder.layers": "layers",
    "encoder.norm": "norm",
    "shared_proj.0": "tokenizer.embed_spikes",
    "shared_proj.2": "tokenizer.project",
    "position_emb.weight": "tokenizer.time",
    "mask_emb.weight": "prompt_tokens",
    "self_attn.out_proj": "attention.out",
    "linear1": "up",
    "linear2": "down",
}


class Unknown(dict[Any, Any]):
    """Stands in for an object that torch does not know; runs nothing."""

    def __init__(self, *_: Any) -> None:
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

    What weights do not show are the arguments, and dropout, which is this package's.
    ``mtm.from_pretrained`` fetches the file and calls this.

    Args:
        path: the file, one of ``FILES``.
        sessions: ids of the recordings whose layers to keep; ``[]`` keeps the shared core alone.
            Default: all.
        heads: of attention. Any divisor of the width fits the weights, and only one is right; the
            default could not be compared with the benchmark's configuration.
        activation: of the MLPs, "gelu" or "relu"; as ``heads``.
        direct_paths: put :class:`mtm.direct_paths.DirectPaths` beside the encoder.
            They add 0 until ``fit`` has trained them.

    Raises:
        CheckpointError: for a file that cannot be read, or weights that do not fit.
        KeyError: for a session that is not in the file.
    """
    tensors = read_pickle(Path(path), Unknown)[0]
    found = {
        key.split(".")[1]: len(tensor)
        for key, tensor in tensors.items()
        if key.startswith("out_stitcher.") and key.endswith(".bias")
    }
    names = list(found) if sessions is None else list(sessions)
    if strangers := [name for name in names if name not in found]:
        problem = f"is not among the {len(found)} of {path}; leave it out, fit(session, model)"
        raise KeyError(f"session {strangers[0]!r} {problem} adds it")
    paths = {"own_history": True, "latents": MtMConfig.latents} if direct_paths else {}
    try:
        config = _config(tensors, heads=heads, activation=activation, **paths)
        n_bins = len(tensors["position_emb.weight"])
        kind: dict[str, Any] = {"bin_size": 0.02, "prompts": MTM_SCHEMES, "causal": False}
        model = MtM(config, n_bins, {name: found[name] for name in names}, **kind)
        missing, strange = model.load_state_dict(_weights(tensors, model._keys), strict=False)
        # Direct paths, which they do not have, stay as they are.
        missing = [key for key in missing if ".direct." not in key and not key.endswith(".mean")]
        if missing or strange:
            raise ValueError(f"{missing} missing, {strange} unknown")
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no MtM of BrainWideBench: {error}") from error
    return model.eval()


def _config(tensors: Mapping[str, Any], **fields: Any) -> MtMConfig:
    """The sizes that the shapes of their weights show."""
    up = tensors["encoder.layers.0.linear1.weight"]
    return MtMConfig.published(
        width=up.shape[1],
        depth=len({key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}),
        mlp_width=len(up),
        stitch_width=tensors["shared_proj.0.weight"].shape[1],
        causal=False,
        **fields,
    )


def _weights(tensors: Mapping[str, Any], sessions: Mapping[str, str]) -> dict[str, Tensor]:
    """Their weights by our names; ``sessions`` are the names to keep and our keys of them."""
    found = {}
    for name, key in sessions.items():
        row = tensors["session_emb.vocab"][name]
        found[f"sessions.{key}.token"] = tensors["session_emb.weight"][row]
        for ours, theirs in (("stitcher", "in_stitcher"), ("readout", "out_stitcher")):
            for kind in ("weight", "bias"):
                found[f"sessions.{key}.{ours}.{kind}"] = tensors[f"{theirs}.{name}.{kind}"]
    for key, value in tensors.items():
        if key.startswith(("in_stitcher.", "out_stitcher.", "session_emb.")):
            continue
        for theirs, ours in OURS.items():
            key = key.replace(theirs, ours)
        layer, joined, kind = key.partition(".self_attn.in_proj_")
        if joined:
            names = (f"{layer}.attention.{part}.{kind}" for part in ("query", "key", "value"))
            found |= dict(zip(names, value.chunk(3), strict=True))
        else:
            found[key] = value
    return found
