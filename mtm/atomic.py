"""Files that are complete or not there, whenever the process that writes them is killed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden place beside ``path`` to write to; what was written then moves to ``path`` at once.

    Folders are made if need be. When writing fails, what was at ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.part"
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # before it takes its place, or a power cut could empty it
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
