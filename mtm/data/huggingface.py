"""Rows of the data sets that the authors of MtM keep on the Hugging Face Hub, one set per session.

A row is a trial: its counts as the four parts of a sparse (CSR) matrix, its behaviour, and, the
same in every row, facts about session and neurons, as the authors' ``create_dataset`` writes them.

- ``<eid>_aligned``, splits train, val and test, which stay: trials of 2 s from 0.5 s before
  stimulus onset, not in order of time.
- ``<eid>``, one split: consecutive chunks of the recording, without behaviour.

Behaviour, NaN = missing: ``choice`` (K,), -1 right, +1 left, 0 none; ``block``, probability of a
stimulus on the left; ``reward``, 1 or 0; ``wheel-speed`` (rad/s) and ``whisker-motion-energy``
(arbitrary units), (K, T), one interpolated value at each bin's right edge, not the mean over it.
Counts are bytes: one of 256 or more was cut down by 256 when they stored it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from mtm.data.recording import Recording
from mtm.files import optional
from mtm.inputs import SessionError
from mtm.session import Session, Split

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
SPARSE = [f"spikes_sparse_{part}" for part in ("data", "indices", "indptr", "shape")]
BEHAVIOUR = ("choice", "reward", "block", "wheel-speed", "whisker-motion-energy")
NEURONS = {  # column -> column of Session.neurons
    "cluster_regions": "allen",
    "cluster_channels": "channel",
    "cluster_depths": "depth",
    "cluster_uuids": "uuid",
    "good_clusters": "good",
}
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def load_session(folder: str | Path) -> Session:
    """Load a data set from a folder, without the package ``datasets``.

    The folder is what ``DatasetDict.save_to_disk`` or ``Dataset.save_to_disk`` wrote (Arrow
    streams), or a snapshot of a repository on the Hub (``data/train-00000-of-00001.parquet``).
    """
    folder = Path(folder)
    with Recording(folder.name).reading(str(folder)):
        files = _files(folder)
        tables = {split: pd.concat(map(_table, paths)) for split, paths in files.items()}
    return from_tables(tables)


def from_tables(tables: Mapping[str, pd.DataFrame]) -> Session:
    """Make a session of tables with a row per trial, as ``datasets.Dataset.to_pandas`` gives them.

    Args:
        tables: one for each of the splits train, val (or validation) and test; or for one split of
            any name: then the session has no given split.

    Returns:
        the session, named by the column ``eid``, trials in the order of the rows, train first. Its
        window starts at -0.5 s, or at 0 for rows without ``choice``. Its ``neurons`` have the
        columns of ``NEURONS`` (``allen`` are the regions, too), ``label``, and ``qc-<name>`` for
        what else ``cluster_qc`` lists.

    Raises:
        SessionError: naming the session, the column and the remedy.
    """
    order = [split for split in SPLITS if split in tables] if len(tables) > 1 else list(tables)
    if len(order) < len(tables) or not any(map(len, tables.values())):
        problem = f"splits {list(tables)}; need train, val and test with rows, or one split"
        raise SessionError(f"session of rows: {problem}")
    table = pd.concat([tables[split] for split in order], ignore_index=True)
    if "eid" not in table or table["eid"].nunique() > 1:
        raise SessionError("session of rows: no column eid, or several sessions; pass those of one")
    facts = {key: table[key][0] for key in ("eid", "lab", "probe_name") if key in table}
    recording = Recording(facts["eid"])
    with recording.reading("spikes_sparse"):
        counts = np.stack([_matrix(row) for row in table.to_dict("records")])
        bin_size = float(np.squeeze(table["binsize"][0]))
    with recording.reading("neurons"):
        first = table.iloc[0]  # the same in every row
        neurons = {ours: first[theirs] for theirs, ours in NEURONS.items() if theirs in first}
        for key, values in (first.get("cluster_qc") or {}).items():
            neurons[key if key == "label" else f"qc-{key}"] = values
    behaviour = {}
    for key in filter(table.__contains__, BEHAVIOUR):
        with recording.reading(key):
            array = np.array([np.asarray(value, dtype=np.float64) for value in table[key]])
        behaviour[key] = array.ravel() if array.size == len(array) else array  # (K, 1) too
    given_split = None
    if len(tables) > 1:
        part = np.repeat([SPLITS[split] for split in order], [len(tables[s]) for s in order])
        given_split = Split(*(np.flatnonzero(part == field) for field in Split._fields))
    start = -0.5 if "choice" in table else 0.0
    return Session(
        counts=counts,
        regions=neurons.get("allen"),
        name=recording.name,
        subject=str(table.get("subject", [""])[0]),
        bin_size=bin_size,
        window=(start, start + counts.shape[1] * bin_size),
        behaviour=behaviour,
        neurons=neurons,
        provenance={"origin": "Hugging Face, MtM's authors", "splits": list(tables), **facts},
        given_split=given_split,
    )


def _matrix(row: Mapping[str, Any]) -> np.ndarray:
    """The counts (T, N) of one trial; entries given twice add up."""
    data, indices, indptr, shape = (np.asarray(row[part]) for part in SPARSE)
    matrix = csr_array((data.astype(np.float32), indices, indptr), shape=tuple(map(int, shape)))
    matrix.check_format(full_check=True)
    return matrix.toarray()


def _files(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files, in order; one split is called train."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
        return {split: _files(folder / split)["train"] for split in splits}
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text("utf-8"))
        return {"train": [folder / file["filename"] for file in state["_data_files"]]}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("data/[!.]*.parquet")) or sorted(folder.glob("[!.]*.parquet")):
        found.setdefault(re.split(r"\W", path.name)[0], []).append(path)
    for split, paths in found.items():
        n = int(re.findall(r"-of-(\d+)|$", paths[0].name)[0] or 1)
        if len(paths) != n:
            raise SessionError(f"{folder}, split {split!r}: {len(paths)} of its {n} files")
    if not found:
        raise SessionError(f"{folder}: no dataset_dict.json, state.json or .parquet file in it")
    return found


def _table(path: Path) -> pd.DataFrame:
    """The rows of one file."""
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    content = path.read_bytes()
    if not content.endswith(END_OF_STREAM):  # Arrow would take it for a shorter one
        raise ValueError(f"{path.name} is cut short")
    return optional("pyarrow", "data").ipc.open_stream(content).read_all().to_pandas()
