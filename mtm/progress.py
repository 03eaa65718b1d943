"""Progress of a training run: a bar in terminals, one line in notebooks, TensorBoard."""

from __future__ import annotations

import importlib.util
import sys
import time
import weakref
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
from tqdm import tqdm

from mtm.checkpoint import History, Run

LOG_INTERVAL = 30.0  # seconds between two lines in a log


class Progress(AbstractContextManager["Progress"]):
    """A bar in a terminal, one live line in a notebook, lines in a log; nothing without show."""

    def __init__(self, epochs: int, show: bool, setup: str) -> None:
        self.epochs, self.show, self.line, self.last = epochs, show, None, time.monotonic()
        ipython: Any = sys.modules.get("IPython")
        shell = ipython.get_ipython() if show and ipython else None
        if shell is not None and type(shell).__name__ != "TerminalInteractiveShell":
            self.line = ipython.display.display({"text/plain": ""}, raw=True, display_id=True)
        self.print(setup)
        no_bar = not show or self.line is not None or not sys.stderr.isatty()
        self.bar = tqdm(total=epochs, unit="epoch", disable=no_bar, leave=False)

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def print(self, text: str) -> None:
        """Print a line; in a notebook, in the place of the one before."""
        if self.line is not None:
            self.line.update({"text/plain": text}, raw=True)
        elif self.show:
            print(text, file=sys.stderr, flush=True)

    def update(self, epoch: int, history: History) -> None:
        """Show the epoch and the last validation score."""
        score = f"validation {history[-1]['mean']:.3f} bits per spike" if history else ""
        self.bar.update(epoch - self.bar.n)
        self.bar.set_postfix_str(score)
        log_due = self.bar.disable and time.monotonic() - self.last > LOG_INTERVAL
        if log_due or self.line is not None:
            self.print(f"epoch {epoch} of {self.epochs}  {score}")
            self.last = time.monotonic()


class TensorBoard:
    """Scalars of each validation, in ``tensorboard`` of a run's folder, if it is installed."""

    def __init__(self, run: Run) -> None:
        self.writer: Any = None
        if run.folder is not None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            # What a stopped run wrote after its last save is replaced.
            self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)
            weakref.finalize(self, self.writer.close)  # it has a thread

    def add(self, entry: dict[str, Any]) -> None:
        """Write the numbers of a history entry."""
        if self.writer is not None:
            for name, value in flat(entry).items():
                self.writer.add_scalar(name, value, entry["step"])
            self.writer.flush()


def flat(entry: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a history entry, with names as ``validation/neuron``."""
    return pd.json_normalize(entry, sep="/").dropna(axis=1).to_dict("records")[0]
