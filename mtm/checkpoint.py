"""Models and training runs on disk, and models on the Hugging Face Hub.

A model is one file, ``model.safetensors``: the weights, and a JSON description in the header, which
is also written to ``config.json`` for people to read. The state of a training run is one file too,
``run.safetensors``. A process that is killed while it writes leaves the old file or the new one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
import time
from base64 import b64decode, b64encode
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from mtm import bwb_weights, distributed
from mtm.batches import SessionData
from mtm.files import atomic_write, optional
from mtm.model import CheckpointError, MtM, MtMConfig
from mtm.official import OfficialMtM
from mtm.recipes import TrainConfig

MODEL, CONFIG, RUN, HISTORY = "model.safetensors", "config.json", "run.safetensors", "history.jsonl"
HEADER = "mtm"  # key of the JSON description in a file's header
VERSION = 5
BWB_OPTIONS = ("sessions", "heads", "activation", "direct_paths")  # of bwb_weights.from_bwb
CLASSES: dict[str, type[MtM]] = {"mtm": MtM, "official": OfficialMtM}

SHIPPED = Path(__file__).parent / "weights"  # models that come with the package

History = list[dict[str, Any]]
Content = tuple[dict[str, Tensor], dict[str, Any]]  # of a file: tensors, and a description


def best_entry(history: History) -> dict[str, Any]:
    """Return the entry of the best validation: the first with the highest mean."""
    return max(history, key=lambda entry: entry["mean"])


def without_nan(value: Any) -> Any:
    """Return a copy of nested lists and dicts with None for NaN, which JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def _write(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and a description to one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        partial.write_bytes(to_bytes(tensors, metadata={HEADER: json.dumps(description)}))


def _read(path: Path) -> Content:
    """Read what :func:`_write` wrote."""
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            # Cloned, because the file's memory is mapped and would change with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        remedy = "copy it again, or train again with restart=True (--restart)"
        raise CheckpointError(f"{path} is damaged or cut short ({error}); {remedy}") from error
    if header is None:
        raise CheckpointError(f"{path} was not written by mtm: its header has no description")
    return tensors, json.loads(header)


# ------------------------------------------------------------------------------------------ models


def save(model: Any, folder: str | Path, info: dict[str, Any] | None = None) -> Path:
    """Write a model to a folder, in the place of one that it holds; returns the folder.

    Args:
        model: an :class:`~mtm.MtM`, or the result of ``fit``, whose settings and history are saved
            as ``info``.
        folder: created if missing.
        info: anything JSON can hold.
    """
    if not isinstance(model, MtM):
        model, info = model.model, info or model.to_dict()
    folder, described = Path(folder), settings(model)
    description = {"version": VERSION, "model": described, "info": info or {}}
    _write(folder / MODEL, model.state_dict(), description)
    del described["seen"]  # for people, without the long lists of fingerprints
    with atomic_write(folder / CONFIG) as partial:
        partial.write_text(json.dumps(description, indent=1) + "\n")
    return folder


def load(folder: str | Path) -> MtM:
    """Read a model that :func:`save` wrote; on the CPU, in evaluation mode.

    Raises:
        CheckpointError: when the folder has no model, or a damaged one.
    """
    tensors, description = _read_model(folder)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        model = from_settings(description["model"])
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def describe(folder: str | Path) -> dict[str, Any]:
    """Return the description of a saved model: its settings as ``model``, and ``info``."""
    return _read_model(folder)[1]


def _read_model(folder: str | Path) -> Content:
    path = Path(folder) / MODEL
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no model: there is no {path}")
    tensors, description = _read(path)
    if (version := description.get("version")) != VERSION:
        known = f"this version of mtm reads {VERSION}; use the version that wrote it"
        raise CheckpointError(f"{path} has format version {version}, {known}")
    return tensors, description


def settings(model: MtM) -> dict[str, Any]:
    """Return everything about a model but its weights, as JSON can hold it."""
    official = isinstance(model, OfficialMtM)
    names = ("n_bins", "bin_size", "causal", "init", "split_seed", "window")
    return {
        "class": "official" if official else "mtm",
        "config": asdict(model.config),
        "prompts": list(model.prompts),
        **{name: getattr(model, name) for name in (*names, *["n_places"] * official)},
        "calibration": model.calibration,
        "sessions": {name: model.session_layers(name).n_neurons for name in model.session_names},
        "seen": {name: b64encode(each.tobytes()).decode() for name, each in model.seen.items()},
    }


def from_settings(described: dict[str, Any]) -> MtM:
    """Make the model that :func:`settings` describes, with new weights."""
    given = {**described, "config": MtMConfig(**described["config"])}
    kind, split_seed, seen = (given.pop(key) for key in ("class", "split_seed", "seen"))
    window, calibration = given.pop("window", None), given.pop("calibration")
    model = CLASSES[kind](**given)
    model.split_seed, model.calibration = split_seed, calibration
    model.window = window and tuple(window)
    model.seen = {name: np.frombuffer(b64decode(each), np.int64) for name, each in seen.items()}
    return model


# ------------------------------------------------------------------------- the Hugging Face Hub


def push_to_hub(model: Any, repo_id: str, **options: Any) -> str:
    """Upload a model to the Hugging Face Hub, with a page that says how to use it.

    Args:
        model: see :func:`save`.
        repo_id: ``"user/name"``; created if missing.
        **options: of ``huggingface_hub.HfApi.create_repo``, as ``private=True`` or ``token=...``.

    Returns the address of the upload.
    """
    api = optional("huggingface_hub", "hub").HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, exist_ok=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        (Path(folder) / "README.md").write_text(MODEL_PAGE.format(repo_id=repo_id))
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="mtm model")
    return str(commit)


def from_pretrained(name: str | Path, **options: Any) -> MtM:
    """Read a model from disk or from the Hugging Face Hub; on the CPU, in evaluation mode.

    Args:
        name: a folder that :func:`save` wrote, or ``"user/name"``. Or BrainWideBench's public MtM:
            ``"NerDSLab/ibl-bwb-mtm"``, or its file (``best.pt``) or folder on disk.
        **options: of ``huggingface_hub.snapshot_download``, as ``revision=...`` or ``token=...``;
            for BrainWideBench's model also those of :func:`mtm.bwb_weights.from_bwb`.

    Example:
        >>> model = from_pretrained("NerDSLab/ibl-bwb-mtm", sessions=[])  # the core, without layers
        >>> model = fit(session, model).model
    """
    theirs = {key: options.pop(key) for key in BWB_OPTIONS if key in options}
    path = Path(name)
    if not path.exists():
        hub = optional("huggingface_hub", "hub")
        try:
            wanted = [MODEL, CONFIG, *bwb_weights.FILES]
            path = Path(hub.snapshot_download(str(name), allow_patterns=wanted, **options))
        except (hub.errors.HFValidationError, hub.errors.LocalEntryNotFoundError) as error:
            raise CheckpointError(f"{name} is neither on disk nor found on the Hub") from error
    files = [file for file in (path, *map(path.joinpath, bwb_weights.FILES)) if file.is_file()]
    if files and not (path / MODEL).exists():
        return bwb_weights.from_bwb(files[0], **theirs)
    if theirs:
        raise ValueError(f"{', '.join(theirs)}: of BrainWideBench's model, and {name} is another")
    return load(path)


MODEL_PAGE = """---
library_name: mtm-neural
tags: [neuroscience, spikes, masked-modelling]
---
A multi-task masking (MtM) model of neural population activity.

```python
import mtm

model = mtm.from_pretrained("{repo_id}")
```
"""


# ----------------------------------------------------------------------------------- training runs


def describe_run(
    model: MtM, start: MtM | MtMConfig | None, data: list[SessionData], config: TrainConfig
) -> dict[str, Any]:
    """Return what identifies a run: a stopped run resumes only if it is the same."""
    weights = None  # those of a new model follow from the settings
    if isinstance(start, MtM):
        values = parameters_to_vector(start.parameters()).detach().cpu().numpy()
        weights = hashlib.sha256(values.tobytes()).hexdigest()[:16]
    left_out = ("sessions", "seen", "calibration")
    kind = {key: value for key, value in settings(model).items() if key not in left_out}
    return {
        "train": asdict(config),
        "model": kind,
        "sessions": {one.name: [*one.session.counts.shape, one.digest] for one in data},
        "order of sessions": [one.name for one in data],
        "initial weights": weights,
    }


class Run:
    """Progress of a training run, saved in a folder so that a stopped run can resume.

    Of several processes, the first reads and writes the files and sends the state to the others.

    Args:
        folder: None saves nothing.
        description: settings, sizes, data and initial weights, as JSON can hold them. Only a run
            with the same description resumes.
        save_every: seconds between two saves within an epoch.
        restart: delete the run and the model in the folder, and start anew.
    """

    def __init__(
        self, folder: Any, description: dict[str, Any], save_every: float, restart: bool
    ) -> None:
        self.folder = Path(folder) if folder is not None and distributed.rank() == 0 else None
        self.description = json.loads(json.dumps(description))
        self.save_every, self.saved_at = save_every, -math.inf  # the first save is before step 1
        self.step, self.seconds = 0, 0.0
        self.history: History = []
        self.losses: dict[str, list[float]] = {}  # scheme -> sum, number since the last validation
        self.best: dict[str, Tensor] = {}  # weights of the best validation
        self.groups: Any = None  # of the optimizer
        state = self._open(self.folder, restart) if self.folder is not None else None
        found: Content = distributed.broadcast_object(state) or ({}, {})
        self.tensors, facts = found  # of a run that resumes
        vars(self).update(facts)

    def _open(self, folder: Path, restart: bool) -> Content | None:
        """Return what the folder holds of this run, if anything."""
        for left in folder.glob(".*.part"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        # At once: a run that fails before its first validation must not leave the old model.
        for name in (MODEL, CONFIG, HISTORY, RUN) if restart else ():
            (folder / name).unlink(missing_ok=True)
        remedy = "use another folder, or restart=True (--restart), which deletes what is in it"
        if not (folder / RUN).exists():
            if (folder / MODEL).exists():
                raise CheckpointError(f"{folder} holds a model but no run to resume; {remedy}")
            return None
        tensors, facts = _read(folder / RUN)
        if (stored := facts.pop("description")) != self.description:
            problem = _difference(stored, self.description)
            remedy += "; to train its model further, fit(sessions, mtm.load(it)) in another folder"
            raise CheckpointError(f"{folder} holds another run: {problem}; {remedy}")
        return tensors, facts

    def due(self) -> bool:
        """Return whether it is time to save."""
        return self.folder is not None and time.monotonic() - self.saved_at >= self.save_every

    def save(self, model: MtM, optimizer: torch.optim.Optimizer) -> None:
        """Write the state of the run, and ``history.jsonl`` with one validation per line."""
        if self.folder is None:
            return
        adam = optimizer.state_dict()
        tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
        tensors |= {f"best/{key}": value for key, value in self.best.items()}
        for number, entry in adam["state"].items():
            tensors |= {f"optimizer/{number}/{key}": value for key, value in entry.items()}
        names = ("step", "seconds", "history", "losses", "description")
        facts = {name: getattr(self, name) for name in names} | {"groups": adam["param_groups"]}
        with atomic_write(self.folder / HISTORY) as partial:
            lines = (json.dumps(entry) + "\n" for entry in without_nan(self.history))
            partial.write_text("".join(lines))
        _write(self.folder / RUN, tensors, facts)
        self.saved_at = time.monotonic()

    def restore(self, model: MtM, optimizer: torch.optim.Optimizer) -> None:
        """Load the saved weights and optimizer state, if there are any."""
        if not self.tensors:
            return
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self.tensors.items():
            part, key = name.rsplit("/", 1)
            parts[part][key] = tensor
        self.tensors = {}
        model.load_state_dict(parts.pop("model"))
        self.best = {key: value.to(model.device) for key, value in parts.pop("best", {}).items()}
        moments = {int(part.removeprefix("optimizer/")): found for part, found in parts.items()}
        optimizer.load_state_dict({"state": moments, "param_groups": self.groups})

    def add(self, entry: dict[str, Any], model: MtM) -> bool:
        """Append a validation to the history; if it is the best, keep the weights, return True."""
        better = not self.history or entry["mean"] > best_entry(self.history)["mean"]
        if better:
            self.best = copy.deepcopy(model.state_dict())
        self.history.append(entry)
        return better

    def save_model(self, model: MtM) -> None:
        """Write the model for users, with settings and history."""
        if self.folder is not None:
            info = {"train": self.description["train"], "history": without_nan(self.history)}
            save(model, self.folder, info)


def _difference(stored: Any, now: Any) -> str:
    """Return the first setting that differs, in words."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in [*stored, *now]:
            if stored.get(key) != now.get(key):
                return f"{key} {_difference(stored.get(key), now.get(key))}"
    return f"was {stored} and is now {now}"
