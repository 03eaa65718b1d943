"""Files that are written as a whole, arrays that stay on disk, and optional packages."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import struct
import textwrap
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

DESCRIPTION = "description"  # name of the JSON text among the arrays of a file


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file as a whole or not at all.

    Yields a temporary path beside ``path``, which replaces ``path`` at the end of the context.
    Folders are created. If writing fails, what was at ``path`` stays.
    """
    path = Path(path)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # before the move, or a power cut could leave an empty file
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.strerror = f"{os.strerror(error.errno)}; free some space, or write elsewhere"
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_arrays(
    path: str | Path, description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Path:
    """Write arrays and a JSON description to an uncompressed ``.npz``, atomically."""
    content: dict[str, Any] = {DESCRIPTION: np.array(json.dumps(description)), **arrays}
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, **content)
    return Path(path)


def read_arrays(
    path: str | Path, *, only: tuple[str, ...] | None = None, mmap: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what :func:`write_arrays` wrote: the description, and the arrays by name.

    Args:
        path: the file.
        only: names of the arrays to read. Default: all.
        mmap: names of arrays that stay on disk and are read where they are indexed.

    Raises:
        ValueError: for a file that is damaged or of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            description = json.loads(str(file[DESCRIPTION]))
            arrays = {
                name: _memory_map(Path(path), file.zip, name) if name in mmap else file[name]
                for name in file.files
                if name != DESCRIPTION and (only is None or name in only)
            }
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # of numpy, zip, json: no list of them is complete
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        raise ValueError(f"{path} is damaged or of another kind ({reason})") from error
    return description, arrays


class MemoryMapped(np.ndarray):
    """An array that is on disk."""


def _memory_map(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Memory-map an array of an uncompressed ``.npz``."""
    member = archive.getinfo(f"{name}.npy")
    with open(path, "rb") as file:
        # A zip member starts with a header of 30 bytes, the last four of which are the lengths of
        # its name and of an extra field; the .npy file follows.
        file.seek(member.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    stop = start + math.prod(shape) * dtype.itemsize
    # By torch, which keeps no file open; systems allow few hundred open files.
    content = torch.from_file(str(path), shared=False, size=stop, dtype=torch.uint8).numpy()
    return content[start:].view(dtype).reshape(shape).view(MemoryMapped)


def optional(module: str, extra: str) -> ModuleType:
    """Import a module, or name the extra of this package that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the module is there, and lacks something itself
        raise ImportError(f'{module} is missing: pip install "mtm-neural[{extra}]"') from error
