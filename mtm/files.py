"""Files that are written as a whole, arrays that stay on disk, and optional packages."""

from __future__ import annotations

import errno
import importlib
import json
import os
import struct
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file as a whole or not at all; if writing fails, what was at ``path`` stays.

    Yields a path beside it, which replaces ``path`` at the end. Folders are created.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
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
    content: dict[str, Any] = {"description": np.array(json.dumps(description)), **arrays}
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, **content)
    return Path(path)


def read_arrays(
    path: str | Path, *, only: tuple[str, ...] | None = None, mmap: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what :func:`write_arrays` wrote: the description, and the arrays by name.

    ``only`` names the arrays to read (default: all), ``mmap`` those that stay on disk and are read
    where they are indexed. A file that is damaged or of another kind is a ValueError.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: _memory_map(Path(path), file.zip, name) if name in mmap else file[name]
                for name in (file.files if only is None else ("description", *only))
            }
        return json.loads(str(arrays.pop("description"))), arrays
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # of numpy, zip, json: no list of them is complete
        problem = f"{path} is damaged or of another kind ({type(error).__name__}: {error})"
        raise ValueError(f"{problem}; Session.save writes session files") from error


class MemoryMapped(np.ndarray):
    """An array that is on disk."""


def _memory_map(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Memory-map an array of an uncompressed ``.npz``."""
    with open(path, "rb") as file:
        # A zip member starts with a header of 30 bytes, the last four of which are the lengths of
        # its name and of an extra field; the .npy file follows.
        file.seek(archive.getinfo(f"{name}.npy").header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    stop = start + dtype.itemsize * int(np.prod(shape))
    # By torch, which keeps no file open; systems allow few hundred open files.
    content = torch.from_file(str(path), shared=False, size=stop, dtype=torch.uint8).numpy()
    array = content[start:].view(dtype)
    # numpy saves an array in the order that it has in memory
    array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    return array.view(MemoryMapped)


def optional(module: str, extra: str) -> ModuleType:
    """Import a module, or name the extra of this package that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is missing: pip install "mtm-neural[{extra}]"') from error
