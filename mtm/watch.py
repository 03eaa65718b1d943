"""What one sees of a training run: a bar or a line, files, TensorBoard, a function of one's own."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mtm.atomic import replacing

HISTORY = "history.jsonl"
SILENCE = 30.0  # seconds after which a log gets another line

History = list[dict[str, Any]]


def best_entry(history: History) -> dict[str, Any]:
    """The validation whose weights are kept: the first of the highest mean over the schemes."""
    return max(history, key=lambda entry: entry["mean"])


class Progress:
    """A bar in a terminal; in a notebook one line that is written over; lines at times in logs.

    A notebook that was run for a book then shows that one line, with the result.

    Args:
        epochs: until the end.
        show: nothing is shown otherwise.
        setup: what the run computes on and how; the first line.
    """

    def __init__(self, epochs: int, show: bool, setup: str) -> None:
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        self.epochs, self.show, self.line = epochs, show, None
        self.spoken = time.monotonic()
        if show and shell is not None and type(shell).__name__ != "TerminalInteractiveShell":
            from IPython.display import display

            self.line = display({"text/plain": setup}, raw=True, display_id=True)
        elif show:
            print(setup, file=sys.stderr)
        quiet = self.line is not None or not show or not sys.stderr.isatty()
        self.bar = tqdm(total=epochs, unit="epoch", disable=quiet, leave=False)

    def update(self, epoch: int, history: History) -> None:
        """Say how far training is."""
        score = f"validation {history[-1]['mean']:.3f} bits per spike" if history else ""
        self.bar.update(epoch - self.bar.n)
        self.bar.set_postfix_str(score)
        said = f"epoch {epoch} of {self.epochs}  {score}"
        if self.line is not None:
            self.line.update({"text/plain": said}, raw=True)
        elif self.show and self.bar.disable and time.monotonic() - self.spoken > SILENCE:
            print(said, file=sys.stderr, flush=True)
            self.spoken = time.monotonic()

    def stop(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def close(self, summary: str) -> None:
        """Leave the summary in the place of the bar."""
        self.stop()
        if self.line is not None:
            self.line.update({"text/plain": summary}, raw=True)
        elif self.show:
            print(summary, file=sys.stderr)


class Watch:
    """Passes on what each validation found, to whatever looks on.

    Args:
        progress: the bar or line.
        folder: where ``history.jsonl`` is written, a line a validation, and, where the package
            tensorboard is installed, the same for TensorBoard in ``tensorboard/``; None = nowhere.
        history: of a run that goes on; it is written again, for the case that it was killed
            before it could write the last entry.
        listener: called with the history after each validation.
    """

    def __init__(
        self,
        progress: Progress,
        folder: Path | None = None,
        history: Sequence[dict[str, Any]] = (),
        listener: Callable[[History], Any] | None = None,
    ) -> None:
        self.progress, self.folder, self.listener, self.board = progress, folder, listener, None
        if folder is not None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=0)
        if folder is not None:
            write_history(folder, list(history))
        for entry in history:
            self._show(entry)

    def validated(self, history: History) -> None:
        """Pass on the history, whose last entry is new."""
        if self.folder is not None:
            write_history(self.folder, history)
        self._show(history[-1])
        if self.listener is not None:
            self.listener(history)

    def _show(self, entry: dict[str, Any]) -> None:
        if self.board is not None:
            for name, value in flat(entry).items():
                self.board.add_scalar(name, value, entry["step"])
            self.board.flush()

    def close(self, summary: str) -> None:
        """The end of the run."""
        self.progress.close(summary)
        if self.board is not None:
            self.board.close()


def write_history(folder: Path, history: History) -> None:
    """Write ``history.jsonl``, one validation a line; NaN becomes null."""
    lines = [json.dumps(entry) + "\n" for entry in without_nan(history)]
    with replacing(folder / HISTORY) as partial:
        partial.write_text("".join(lines))


def flat(entry: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a history entry under one name each, as ``validation/neuron``."""
    found: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif value is not None:
            found[prefix + key] = value
    return found


def without_nan(value: Any) -> Any:
    """Lists and dicts of numbers with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if value != value else value
