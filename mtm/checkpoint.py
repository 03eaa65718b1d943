"""Save, load and share models: ``config.json`` and ``weights.safetensors``, never a pickle.

The weights carry a copy of the description (but for the info), and a checksum of both. So a bit
that changed is noticed, and a save that was killed between the two files leaves a whole model: the
old or the new.
"""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import tempfile
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from mtm import distributed
from mtm.files import atomic_write as replacing
from mtm.files import optional as extra
from mtm.model import CheckpointError, MtM
from mtm.official import OfficialMtM

HISTORY = "history.jsonl"


History = list[dict[str, Any]]


def best_entry(history: History) -> dict[str, Any]:
    """The validation whose weights are kept: the first of the highest mean over the schemes."""
    return max(history, key=lambda entry: entry["mean"])


def write_history(folder: Path, history: History) -> None:
    """Write ``history.jsonl``, one validation a line; NaN becomes null."""
    lines = [json.dumps(entry) + "\n" for entry in without_nan(history)]
    with replacing(folder / HISTORY) as partial:
        partial.write_text("".join(lines))


def without_nan(value: Any) -> Any:
    """Lists and dicts of numbers with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if value != value else value


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What systems say where no more can be written: disk full, quota used up, file too large."""


@contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """As :func:`replacing`, of files that belong together: all are written before one moves."""
    partials = [path.parent / f".{path.name}.{uuid.uuid4().hex}.part" for path in paths]
    with room_for(*paths):
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partials
            for partial in partials:
                with open(partial, "rb+") as file:
                    os.fsync(file.fileno())  # before its move, or a power cut could empty it
            for partial, path in zip(partials, paths, strict=True):
                os.replace(partial, path)
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)


@contextmanager
def room_for(*paths: Path) -> Iterator[None]:
    """Within, the error of a full disk names the files, which the system's own does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}; free some space there, or write to another place",
            " and ".join(map(str, paths)),
        ) from error


FORMAT = "mtm-model"
FORMAT_VERSION = 3
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
CHECKSUM = "crc32"

SHIPPED = Path(__file__).parent / "weights"
"""Folder of the small models that come with the package, as in ``load(SHIPPED / "simulated")``.

:meta hide-value:
"""


def save(model: Any, folder: str | Path, info: dict[str, Any] | None = None) -> Path:
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
        "model": model.settings(),
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
    settings = description["model"]
    layers = {key.split(".")[1] for key in tensors if key.startswith("layers.")}
    if settings["config"]["depth"] != len(layers):  # before so many are made
        raise ValueError(f"{WEIGHTS} has {len(layers)} layers, but {CONFIG} says otherwise")
    with torch.device("meta"):  # no memory is taken before the sizes are known to fit
        kind = OfficialMtM if settings["class"] == "official" else MtM
        return kind.from_settings(settings)


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


def push_to_hub(model: Any, repo_id: str, **options: Any) -> str:
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


KEPT = 2  # states on disk; the one before the last in case the disk lost the last
UNSEEN = 1000  # steps whose losses may wait on the device before somebody looks at them
HEADER = "mtm-run"


class StateError(ValueError):
    """A folder in which training cannot go on; the message says why, and what to do."""


class Run:
    """A training run: how far it is, what it found, and where it is kept.

    Args:
        folder: where states and the best model are kept; None = nowhere.
        description: settings, sizes and data, as JSON can hold them; a state of a run of another
            description is refused.
        save_every: seconds between two states. There is one at the start, and one at each
            validation, as well.
        restart: begin anew, and replace what is in the folder.

    Attributes:
        step: steps taken.
        history: see :class:`mtm.Fit`.
        best: weights of the best validation.
        seconds: since the start, validations and saving included.

    Raises:
        StateError: the folder holds another run, a damaged one, or a model that is not of a run.
    """

    def __init__(
        self,
        folder: str | Path | None,
        description: dict[str, Any],
        save_every: float = 300.0,
        restart: bool = False,
    ) -> None:
        if not save_every >= 0:
            raise ValueError(f"save_every must be 0 or more seconds, got {save_every}")
        self.folder = None if folder is None else Path(folder)
        self.description = json.loads(json.dumps(description))
        self.save_every, self.saved = save_every, -math.inf  # the first state is that of the start
        self.step, self.seconds = 0, 0.0
        self.history: History = []
        self.best: dict[str, Tensor] = {}
        self.sums: dict[str, list[float]] = {}  # scheme -> sum and number of losses since the last
        self.unseen: list[tuple[int, Sequence[tuple[str, str]], Tensor]] = []
        self.last = ("", "")  # session and scheme of the last step's first batch
        self.state: State | None = None
        if self.folder is not None:
            self._open(self.folder, restart)

    def _open(self, folder: Path, restart: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written should fail now
        if distributed.rank() == 0:
            for left in folder.glob(".*.part"):
                left.unlink(missing_ok=True)
        if restart:  # the first state that is written takes the place of all that are there
            return
        self.state = read_state(folder)
        anew = f"begin anew with restart=True (--restart), which replaces what is in {folder}"
        if self.state is None:
            if (folder / CONFIG).exists():
                raise StateError(
                    f"{folder} holds a model, but no run to go on with; take another folder, or "
                    + anew
                )
            return
        for what, there in self.state.facts["description"].items():
            if there != self.description.get(what):
                raise StateError(
                    f"{folder} holds another run: {_difference(there, self.description.get(what))} "
                    f"({what}); take another folder, or {anew}"
                )
        for key in FACTS:
            setattr(self, key, self.state.facts[key])
        self.saved = time.monotonic()

    # --------------------------------------------------------------- what happens

    def taken(self, places: Sequence[tuple[str, str]], losses: Tensor) -> None:
        """A step was taken.

        Args:
            places: session and scheme of each batch.
            losses: (batches,) on the device, where they stay until somebody looks.
        """
        self.step += 1
        self.last = places[0]
        self.unseen.append((self.step, places, losses))
        if len(self.unseen) >= UNSEEN:
            self._look()

    def validated(self, entry: dict[str, Any], model: MtM) -> bool:
        """A validation was made; ``entry`` goes into the history. Whether it is the best."""
        better = not self.history or entry["mean"] > best_entry(self.history)["mean"]
        if better:
            self.best = copy.deepcopy(model.state_dict())
        self.history.append(entry)
        return better

    def mean_losses(self) -> dict[str, Any]:
        """Mean ``loss`` of all batches since the last call, and ``losses`` of each scheme."""
        self._look()
        sums, self.sums = self.sums, {}
        total, number = (sum(x) for x in zip(*sums.values(), strict=True))
        return {"loss": total / number, "losses": {k: s / n for k, (s, n) in sorted(sums.items())}}

    def _look(self) -> None:
        """Fetch the losses that wait on the device, which must have computed them for that."""
        if not self.unseen:
            return
        values = torch.cat([losses for *_, losses in self.unseen]).tolist()
        every = [(step, *place) for step, places, _ in self.unseen for place in places]
        self.unseen = []
        for (step, session, scheme), value in zip(every, values, strict=True):
            if not math.isfinite(value):
                self.fail(f"the loss became {value} in step {step}", session, scheme)
            entry = self.sums.setdefault(scheme, [0.0, 0])
            entry[0] += value
            entry[1] += 1

    def fail(self, problem: str, session: str, scheme: str) -> None:
        """Raise a FloatingPointError that says where, and what is kept."""
        kept = ""
        if self.history and self.folder is not None:
            best = best_entry(self.history)["epoch"]
            kept = f"; the best weights so far, of epoch {best}, are kept in {self.folder}"
        raise FloatingPointError(
            f"{problem}, session {session!r}, scheme {scheme!r}; lower lr "
            f"(now {self.description['train']['lr']:g}) or set clip{kept}"
        )

    # --------------------------------------------------------------- files

    def due(self) -> bool:
        """Whether it is time to save."""
        return self._place() is not None and time.monotonic() - self.saved >= self.save_every

    def _place(self) -> Path | None:
        """The folder, if this process writes."""
        return self.folder if distributed.rank() == 0 else None

    def save(
        self,
        model: MtM,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        """Write the state, if this process writes; never one that is not finite.

        Raises:
            FloatingPointError: losses or weights are not finite; the states before stay.
            OSError: no space, or no permission to write; likewise.
        """
        if (folder := self._place()) is None:
            return
        self._look()
        tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
        if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
            self.fail(f"weights became infinite or NaN in step {self.step}", *self.last)
        tensors |= {f"best/{key}": value for key, value in self.best.items()}
        moments = optimizer.state_dict()
        for number, entry in moments["state"].items():
            tensors |= {f"optimizer/{number}/{key}": value for key, value in entry.items()}
        facts = {key: getattr(self, key) for key in FACTS}
        facts |= {"groups": moments["param_groups"], "schedule": schedule.state_dict()}
        write_state(folder, self.step, tensors, facts)
        self.saved = time.monotonic()

    def restore(self, model: MtM, optimizer: torch.optim.Optimizer) -> None:
        """Give model and optimizer what the state on disk holds, if there is one."""
        if self.state is None:
            return
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, tensor in self.state.tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        model.load_state_dict(parts["model"])
        self.best = {key: value.to(model.device) for key, value in parts["best"].items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            number, _, key = name.partition("/")
            moments.setdefault(int(number), {})[key] = tensor
        groups = self.state.facts["groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.state = State({}, self.state.facts)  # the tensors have been given away

    def restore_schedule(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        """Go back to the learning rate of the state on disk."""
        assert self.state is not None
        schedule.load_state_dict(self.state.facts["schedule"])
        for group, stored in zip(optimizer.param_groups, self.state.facts["groups"], strict=True):
            group |= {key: value for key, value in stored.items() if key != "params"}

    def save_model(self, model: MtM) -> None:
        """Write the model as the best, with settings and history, if this process writes."""
        if (folder := self._place()) is not None:
            info = {"train": self.description["train"], "history": without_nan(self.history)}
            save(model, folder, info)


FACTS = ("step", "seconds", "history", "sums", "description")
"""Attributes of a run that its states keep."""


def _difference(there: Any, here: Any) -> str:
    """The first setting that differs, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *here]:
            if there.get(key) != here.get(key):
                return f"{key} is {there.get(key)} there, and {here.get(key)} now"
    return f"{there} there, and {here} now"


# ------------------------------------------------------------------------------------- the files


class State(NamedTuple):
    """What a file holds: tensors by name, on the CPU, and all else."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def states(folder: Path) -> list[Path]:
    """Files of the states in a folder, the latest last."""
    return sorted(folder.glob("state-*.safetensors"))


def write_state(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write the state after ``step`` steps, and remove all but the last two; returns the file.

    States of more steps are damaged, or of a run that is replaced: they are removed, too.
    """
    path = folder / f"state-{step:08d}.safetensors"
    with replacing(path) as partial:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        said = json.dumps(facts)
        metadata = {HEADER: said, CHECKSUM: checksum(whole, said)}
        partial.write_bytes(serialise(whole, metadata=metadata))
    older = [there for there in states(folder) if there <= path]
    for old in {*states(folder)} - {*older[-KEPT:]}:
        old.unlink()
    return path


def read_state(folder: Path) -> State | None:
    """The latest state in a folder that can be read; None where there is none.

    Raises:
        StateError: when there are some, and none can be read.

    Warns:
        UserWarning: naming a file that is damaged, when the one before it is taken.
    """
    found = states(folder)
    for path in reversed(found):
        try:
            return _read(path)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            problem = f"{path} is damaged ({type(error).__name__}: {error})"
            warnings.warn(f"{problem}; the state before it is taken, if any", stacklevel=2)
    if found:
        raise StateError(
            f"none of the {len(found)} states in {folder} can be read; begin anew with "
            "restart=True (on the command line --restart), or in another folder"
        )
    return None


def _read(path: Path) -> State:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        # Copies: the file's own memory is mapped, and would end with the file.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    said = metadata[HEADER]
    if CHECKSUM not in metadata:
        raise ValueError("it has no checksum, so an older version wrote it")
    if metadata[CHECKSUM] != checksum(tensors, said):
        raise ValueError("its checksum is that of other content")
    return State(tensors, json.loads(said))
