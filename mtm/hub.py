"""Save, load and share models: ``config.json`` and ``weights.safetensors``, never a pickle.

The weights carry a copy of the description (but for the info), and a checksum of both. So a bit
that changed is noticed, and a save that was killed between the two files leaves a whole model: the
old or the new.
"""

from __future__ import annotations

import json
import tempfile
import warnings
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from mtm.atomic import replacing_all
from mtm.extras import extra
from mtm.model import MtM, MtMConfig

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
        model = _without_weights(description, tensors)
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
    _require_weights_of(model, tensors, folder / WEIGHTS)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _without_weights(description: dict[str, Any], tensors: Mapping[str, Tensor]) -> MtM:
    """The model that is described, whose weights take no memory yet."""
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
    return model


def _require_weights_of(model: MtM, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights of other names or shapes than the model's, or that are no finite numbers."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if expected != found:
        wrong = sorted(
            key for key in expected.keys() | found if expected.get(key) != found.get(key)
        )
        raise CheckpointError(
            f"{path} does not fit {CONFIG}; missing, unknown or of another shape: "
            + ", ".join(wrong[:5])
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    for key, value in tensors.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{path}: {key} is not all finite numbers, as where a training has diverged or a "
                "file is damaged; copy the model again, or train it again"
            )


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
        lacks = f"{CONFIG} is missing" if path.parent.is_dir() else "there is no such folder"
        raise CheckpointError(f"{folder} holds no model ({lacks})") from error
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
