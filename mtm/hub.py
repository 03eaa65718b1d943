"""Save and load models: a folder of ``config.json`` and ``weights.safetensors``, never a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from mtm.model import MtM, MtMConfig
from mtm.train import Fit

FORMAT = "mtm-model"
FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"

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
    """
    if isinstance(model, Fit):
        model, info = model.model, info or model.to_dict()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": model.config.to_dict(),
        "sessions": {
            name: maps.n_neurons
            for name, maps in zip(model.session_names, model.sessions.values(), strict=True)
        },
        "info": info or {},
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    partial = folder / (WEIGHTS + ".part")
    partial.write_bytes(serialise(tensors))
    os.replace(partial, folder / WEIGHTS)
    partial = folder / (CONFIG + ".part")
    partial.write_text(json.dumps(description, indent=1) + "\n")
    os.replace(partial, folder / CONFIG)
    return folder


def load(folder: str | Path) -> MtM:
    """Read a model that :func:`save` wrote; on the CPU, in evaluation mode.

    Raises:
        CheckpointError: when the folder is missing, damaged, or not a model of this package.
    """
    folder = Path(folder)
    description = read_config(folder)
    try:
        model = MtM(MtMConfig(**description["model"]), description["sessions"])
        tensors = load_file(folder / WEIGHTS)
    except (TypeError, KeyError, ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
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
    model.load_state_dict(tensors)
    return model.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a saved model: its sizes, its sessions, and the ``info`` saved along.

    Raises:
        CheckpointError: when there is none, or it is not of this package.
    """
    path = Path(folder) / CONFIG
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no model ({CONFIG} is missing)") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a model of this package")
    if description.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {description.get('version')}, this package reads "
            f"{FORMAT_VERSION}"
        )
    return description
