"""Save, load and share models: ``config.json`` and ``weights.safetensors``, never a pickle.

The weights carry a copy of the description (but for the info), and a checksum of both. So a bit
that changed is noticed, and a save that was killed between the two files leaves a whole model: the
old or the new.

``from_official`` reads the checkpoints of the authors' code. Those are pickles, which can run any
code when they are opened the usual way. Here all classes and functions that they name are replaced
by inert stand-ins, but for those that put tensors, dictionaries and sets together.
"""

from __future__ import annotations

import json
import pickle
import tempfile
import warnings
import zlib
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from mtm.atomic import replacing_all
from mtm.extras import extra
from mtm.masks import MTM_SCHEMES
from mtm.model import AS_PUBLISHED, MtM, MtMConfig
from mtm.sources.ibl import PAPER_EIDS

if TYPE_CHECKING:
    from mtm.train import Fit

FORMAT = "mtm-model"
FORMAT_VERSION = 2
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
CHECKSUM = "crc32"

SHIPPED = Path(__file__).parent / "weights"
"""Folder of the small models that come with the package, as in ``load(SHIPPED / "simulated")``.

:meta hide-value:
"""


class CheckpointError(ValueError):
    """A folder that does not hold a readable model of this package; the message says why."""


def save(model: MtM | Fit, folder: str | Path, info: dict[str, Any] | None = None) -> Path:
    """Write a model to a folder; returns the folder.

    Args:
        model: on any device; or the result of ``fit``, whose settings and history become the info.
        folder: made when missing.
        info: anything JSON can hold that should travel along: recipe, history, data.

    Raises:
        OSError: no space, or no permission to write; a model that was there stays.
    """
    if not isinstance(model, MtM):
        info = info or model.to_dict()
        model = model.model
    folder = Path(folder)
    description = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": model.config.to_dict(),
        "sessions": {
            name: maps.n_neurons
            for name, maps in zip(model.session_names, model.sessions.values(), strict=True)
        },
        "seen": {name: b64encode(prints.tobytes()).decode() for name, prints in model.seen.items()},
        "info": info or {},
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    said = json.dumps({key: description[key] for key in description if key != "info"})
    metadata = {FORMAT: said, CHECKSUM: checksum(tensors, said)}
    with replacing_all([folder / WEIGHTS, folder / CONFIG]) as (weights, config):
        weights.write_bytes(serialise(tensors, metadata=metadata))
        config.write_text(json.dumps(description, indent=1) + "\n")
    return folder


def checksum(tensors: Mapping[str, Tensor], said: str) -> str:
    """Of tensors on the CPU and a text; safetensors themselves notice no byte that changed."""
    check = zlib.crc32(said.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        check = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), check)
        check = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, check)
    return f"{check:08x}"


def load(folder: str | Path) -> MtM:
    """Read a model that :func:`save` wrote; on the CPU, in evaluation mode.

    Raises:
        CheckpointError: when the folder is missing, damaged, or not a model of this package.

    Warns:
        UserWarning: ``config.json`` is of another model, or was edited; the weights know better.
    """
    folder = Path(folder)
    description = read_config(folder)
    try:
        tensors, said = _read_weights(folder / WEIGHTS)
        mine = {key: value for key, value in description.items() if key != "info"}
        if said and json.loads(said) != mine:
            warnings.warn(
                f"{folder / CONFIG} is not that of the {WEIGHTS} beside it, as where saving was "
                "killed between the two; what the weights say of themselves is taken",
                stacklevel=2,
            )
            description = _checked(json.loads(said), folder / WEIGHTS)
        sizes = {field.name for field in fields(MtMConfig)}
        known = set(description["model"])
        if missing := sorted(sizes - known):  # a default need not be what was saved
            raise ValueError(f"{CONFIG} lacks of a model's fields: {', '.join(missing)}")
        if strange := sorted(known - sizes):
            raise ValueError(f"{CONFIG} has fields that no model has: {', '.join(strange)}")
        layers = {key.split(".")[1] for key in tensors if key.startswith("layers.")}
        if description["model"]["depth"] != len(layers):  # before so many are made
            raise ValueError(f"{WEIGHTS} has {len(layers)} layers, but {CONFIG} says otherwise")
        with torch.device("meta"):  # no memory is taken before the sizes are known to fit
            model = MtM(MtMConfig(**description["model"]), description["sessions"])
        for name, prints in description.get("seen", {}).items():
            model.seen[name] = np.frombuffer(b64decode(prints), dtype=np.int64)
    except SafetensorError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged or cut short ({error}); copy or save the model again"
        ) from error
    except CheckpointError:
        raise
    except (TypeError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG} does not describe a model: {error}") from error
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if expected != found:
        wrong = sorted(
            key for key in expected.keys() | found if expected.get(key) != found.get(key)
        )
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit {CONFIG}; missing, unknown or of another shape: "
            + ", ".join(wrong[:5])
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    for key, value in tensors.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} is not all finite numbers, as where a training has "
                "diverged or a file is damaged; copy the model again, or train it again"
            )
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a saved model: its sizes, its sessions, and the ``info`` saved along.

    As it stands there: only :func:`load` compares it with the weights.

    Raises:
        CheckpointError: when there is none, or it is not of this package.
    """
    path = Path(folder) / CONFIG
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no model ({CONFIG} is missing)") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable: {error}") from error
    return _checked(description, path)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and what the file says of itself; "" where it says nothing."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    said = metadata.get(FORMAT, "")
    if {FORMAT, CHECKSUM} & set(metadata) and metadata.get(CHECKSUM) != checksum(tensors, said):
        raise CheckpointError(
            f"{path} is damaged (its checksum is that of other content); copy or save the model "
            "again"
        )
    return tensors, said


def _checked(description: Any, path: Path) -> dict[str, Any]:
    """A description of a model, if it is one of this version of the package."""
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a model of this package")
    if description.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {description.get('version')}, this package reads "
            f"{FORMAT_VERSION}; take the version of the package that wrote it, or train again"
        )
    return description


# ------------------------------------------------------------------------- the Hugging Face Hub


def push_to_hub(model: MtM | Fit, repo_id: str, **options: Any) -> str:
    """Upload a model, as :func:`save` writes it, with a page that says how to use it.

    Args:
        model: see :func:`save`.
        repo_id: ``"user/name"``; made when missing.
        **options: of ``huggingface_hub.HfApi.create_repo``, as ``private=True`` or ``token=...``.

    Returns:
        the address of the upload.

    Raises:
        ImportError: without the extra ``hub``.
    """
    api = extra("huggingface_hub", "hub").HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, exist_ok=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        network = model if isinstance(model, MtM) else model.model
        page = MODEL_PAGE.format(repo_id=repo_id, summary=network.summary())
        (Path(folder) / "README.md").write_text(page)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="mtm model")
    return str(commit)


def from_pretrained(name: str | Path, **options: Any) -> MtM:
    """A model from a folder, or from the Hugging Face Hub; on the CPU, in evaluation mode.

    Args:
        name: a folder that :func:`save` wrote, or ``"user/name"``. Only the two files that a model
            consists of are fetched, whatever else is there.
        **options: of ``huggingface_hub.snapshot_download``, as ``revision=...`` or ``token=...``.

    Raises:
        CheckpointError: when that is no model of this package.
        ImportError: for a name on the Hub, without the extra ``hub``.
    """
    if Path(name).is_dir():
        return load(name)
    hub = extra("huggingface_hub", "hub")
    try:
        folder = hub.snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS], **options)
    except hub.errors.HFValidationError as error:
        raise CheckpointError(f"{name} is neither a folder nor a name on the Hub") from error
    except hub.errors.LocalEntryNotFoundError as error:
        raise CheckpointError(f"no folder {name}, and the Hub is out of reach") from error
    return load(folder)


MODEL_PAGE = """---
library_name: mtm-neural
tags: [neuroscience, spikes, masked-modelling]
---
A multi-task masking (MtM) model of neural population activity.

```python
import mtm

model = mtm.from_pretrained("{repo_id}")
```

```text
{summary}
```
"""


# ------------------------------------------------------------- checkpoints of the authors' code

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
    """Keys that are understood and not needed: maps of other sessions, and their dead decoder."""
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
