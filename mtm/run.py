"""The state of a training run, in memory and on disk, so that one that was killed goes on.

On disk a state is one file, ``state-00001234.safetensors``, named by the steps that were taken:
weights, the best weights, the optimizer's moments, and all else as JSON in its header, with a
checksum of it all. It appears complete or not at all, and the last two are kept. Seeds follow from
the step (see `mtm.train`), so that no generator has to be stored.
"""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from mtm import hub, parallel
from mtm.atomic import replacing
from mtm.model import MtM
from mtm.watch import History, best_entry, without_nan

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
        if parallel.rank() == 0:
            for left in folder.glob(".*.part"):
                left.unlink(missing_ok=True)
        if restart:  # the first state that is written takes the place of all that are there
            return
        self.state = read_state(folder)
        anew = f"begin anew with restart=True (--restart), which replaces what is in {folder}"
        if self.state is None:
            if (folder / hub.CONFIG).exists():
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
        return self.folder if parallel.rank() == 0 else None

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
            hub.save(model, folder, info)


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
        metadata = {HEADER: said, hub.CHECKSUM: hub.checksum(whole, said)}
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
    if hub.CHECKSUM not in metadata:
        raise ValueError("it has no checksum, so an older version wrote it")
    if metadata[hub.CHECKSUM] != hub.checksum(tensors, said):
        raise ValueError("its checksum is that of other content")
    return State(tensors, json.loads(said))
