"""Files that are complete or not there, whenever the process that writes them is killed."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What systems say where no more can be written: disk full, quota used up, file too large."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden place beside ``path`` to write to; what was written then moves to ``path`` at once.

    Folders are made if need be. When writing fails, what was at ``path`` stays as it was.

    Raises:
        OSError: where the disk is full, naming the file and the remedy.
    """
    with replacing_all([path]) as (partial,):
        yield partial


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
