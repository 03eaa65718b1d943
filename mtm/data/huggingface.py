"""Rows of the data sets that the authors of MtM keep on the Hugging Face Hub, one set a session.

A row is a trial: its counts as the four parts of a sparse (CSR) matrix, its behaviour, and, the
same in every row, what is known of session and neurons. Facts about the columns are from the
authors' code (their ``create_dataset`` and data preparation). Two kinds of sets exist:

- ``<eid>_aligned``, splits train, val and test: trials of 2 s from 0.5 s before stimulus onset.
  The splits are the authors' and stay (`Session.given_split`); trials are not in order of time.
- ``<eid>``, one split: consecutive chunks of the recording, without behaviour.

A session's behaviours, where NaN = missing:

- ``choice`` (K,): -1 right, +1 left, 0 none; ``block``: probability of a stimulus on the left;
  ``reward``: 1 or 0.
- ``wheel-speed`` (rad/s) and ``whisker-motion-energy`` (arbitrary units), (K, T). The authors took
  one interpolated value at each bin's right edge, not the mean over the bin.

Their counts are bytes: one of 256 or more was cut down by 256 when they stored it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from scipy.sparse import csr_array

from mtm.checkpoint import extra
from mtm.session import Session, SessionError, Split, reading

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
SPARSE = tuple(f"spikes_sparse_{part}" for part in ("data", "indices", "indptr", "shape"))
BEHAVIOUR = ("choice", "reward", "block", "wheel-speed", "whisker-motion-energy")
NEURONS = (
    *(("cluster_regions", "allen"), ("cluster_channels", "channel"), ("cluster_depths", "depth")),
    *(("cluster_uuids", "uuid"), ("good_clusters", "good")),
)  # columns, and their names in a session
CONSTANTS = ("binsize", "interval_len", "eid", "subject", "lab", "probe_name")
MOST_NEURONS = 100_000  # more are damage, for which memory would not do
AGAIN = "download the data set again"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
Columns = Mapping[str, Sequence[Any]]  # one value a row


def load_session(folder: str | Path, **options: Any) -> Session:
    """Load a data set from a folder, without the package ``datasets``.

    Args:
        folder: what ``DatasetDict.save_to_disk`` or ``Dataset.save_to_disk`` wrote (Arrow streams),
            or a snapshot of a repository on the Hub (``data/train-00000-of-00001.parquet``).
        **options: of `from_rows`.

    Raises:
        SessionError: naming the session or the folder, the file or the column, and the remedy.
        ImportError: without the ``[data]`` extra.
    """
    who = options.get("name") or os.path.basename(os.path.abspath(folder))
    with reading(who, str(folder)):
        files = _files(who, Path(folder))
        table = {split: _columns(who, files[split]) for split in files}
    return _session(who, table, **options)


def from_rows(
    rows: Mapping[str, Iterable[Mapping[str, Any]]] | Iterable[Mapping[str, Any]],
    *,
    start: float | None = None,
    name: str | None = None,
) -> Session:
    """Make a session of rows, as iterating over a ``datasets.Dataset`` gives them.

    Args:
        rows: split -> rows, of the splits train, val (or validation) and test; or the rows of one
            split, or a mapping with one split: then the session has no given split.
        start: where the window starts, seconds from stimulus onset; the rows tell its length only.
            Default: -0.5, as in the authors' aligned sets, or 0 for rows without ``choice``.
        name: the session's name. Default: the column ``eid``.

    Returns:
        the session, trials in the order of the rows, train first. Its ``neurons`` have, where
        present, ``allen`` (acronym, also ``regions``), ``channel``, ``depth``, ``uuid``, ``good``,
        ``label`` and ``qc-<name>`` for what else ``cluster_qc`` lists. ``probe_name`` is kept in
        the provenance; of several probes, the authors stored the last one's.

    Raises:
        SessionError: naming the session, the column and the remedy.
    """
    table: dict[str, Columns] = {}
    for split, part in (rows if isinstance(rows, Mapping) else {"train": rows}).items():
        with reading(name or "rows", f"split {split!r}"):
            part = list(part)
            keys = {key for row in part for key in row}
            table[split] = {key: [row[key] for row in part] for key in keys}
    return _session(name or "rows", table, start=start, name=name)


def _fail(who: str, what: str, problem: str) -> NoReturn:
    raise SessionError(f"session {who!r}, {what}: {problem}")


def _session(
    who: str, table: Mapping[str, Columns], *, start: float | None = None, name: str | None = None
) -> Session:
    """A session of split -> columns."""
    columns, split = _joined(who, table)
    known = {key: _constant(who, key, columns) for key in CONSTANTS}
    who = name or known["eid"] or _fail(who, "eid", "no such column; pass name")
    counts = _counts(who, columns)
    bins = counts.shape[1]
    with reading(who, "binsize, interval_len"):
        bin_size = float(np.squeeze(known["binsize"]))
        length = known["interval_len"]
        if length is not None and not np.isclose(length, bins * bin_size):
            raise ValueError(f"{length} s, but {bins} bins of {bin_size} s")
    if start is None:
        start = -0.5 if "choice" in columns else 0.0
    neurons = _neurons(who, columns)
    return Session(
        counts=counts,
        regions=neurons.get("allen"),
        name=who,
        subject=str(known["subject"] or ""),
        bin_size=bin_size,
        window=(start, start + bins * bin_size),
        behaviour={key: _behaviour(who, key, columns[key]) for key in BEHAVIOUR if key in columns},
        neurons=neurons,
        given_split=split,
        provenance={"origin": "Hugging Face, MtM's authors", "splits": list(table)}
        | {key: known[key] for key in ("eid", "lab", "probe_name")},
    )


def _joined(who: str, table: Mapping[str, Columns]) -> tuple[Columns, Split | None]:
    """Columns of all trials, train first; and the split, where there are several."""
    order = [split for split in SPLITS if split in table] if len(table) > 1 else list(table)
    if len(order) < len(table) or {"val", "validation"} <= set(table):
        _fail(who, f"splits {list(table)}", f"need train, val and test once each; {AGAIN}")
    sizes = {split: max(map(len, table[split].values()), default=0) for split in order}
    order = [split for split in order if sizes[split]]  # one without rows may lack columns
    if not order:
        _fail(who, "rows", f"none; {AGAIN}")
    with reading(who, "columns, not the same in all splits"):
        names = {name for split in order for name in table[split]}
        columns = {name: [v for split in order for v in table[split][name]] for name in names}
    part = np.repeat([SPLITS.get(split, split) for split in order], [sizes[s] for s in order])
    parts = [np.flatnonzero(part == field) for field in Split._fields]
    return columns, Split(*parts) if len(table) > 1 else None


def _constant(who: str, key: str, columns: Columns) -> Any:
    """The value that a column has in all rows, arrays as lists; None without the column."""
    with reading(who, key):
        values = columns.get(key, [None])
        texts = {json.dumps(value, default=lambda array: array.tolist()) for value in values}
        if len(texts) > 1:
            _fail(who, key, "differs between rows; pass the rows of one session")
        return json.loads(texts.pop())


def _counts(who: str, columns: Columns) -> np.ndarray:
    """The sparse matrices (T, N) of K rows as counts (K, T, N); entries given twice add up."""
    trials = []
    with reading(who, "spikes_sparse"):
        for row in zip(*(columns[key] for key in SPARSE), strict=True):
            data, indices, indptr, shape = map(_whole, row)
            if shape[1] > MOST_NEURONS or indptr[-1] != len(data):
                raise ValueError(f"shape {shape}, {len(data)} entries, indptr to {indptr[-1]}")
            matrix = csr_array((data.astype(np.float32), indices, indptr), shape=tuple(shape))
            matrix.check_format(full_check=True)
            trials.append(matrix.toarray())
        return np.stack(trials)


def _whole(values: Any) -> np.ndarray:
    """Whole numbers (n,), int64."""
    numbers = np.asarray(values, dtype=np.float64)
    if not np.all((np.abs(numbers) < 2**31) & (numbers == np.floor(numbers))):
        raise ValueError("need whole numbers")
    return numbers.astype(np.int64)


def _behaviour(who: str, key: str, values: Sequence[Any]) -> np.ndarray:
    """One number a row (K,), or one a bin (K, T)."""
    with reading(who, key):
        array = np.array([np.asarray(value, dtype=np.float64) for value in values])
    array = array.ravel() if array.size == len(array) else array
    fine = np.isin(array, (-1, 0, 1)) if key == "choice" else ~np.isinf(array)
    if not np.all(fine | np.isnan(array)):
        _fail(who, key, f"infinite values, or choices other than -1, 0 and 1; {AGAIN}")
    return array


def _neurons(who: str, columns: Columns) -> dict[str, np.ndarray]:
    """The per-neuron table, column -> (N,)."""
    neurons = {}
    with reading(who, "neurons"):
        lists = {label: _constant(who, key, columns) for key, label in NEURONS}
        quality = _constant(who, "cluster_qc", columns) or {}
        lists |= {key if key == "label" else f"qc-{key}": quality[key] for key in quality}
        for label, values in lists.items():
            if values is not None:
                text = label in ("allen", "uuid") or any(isinstance(v, str) for v in values)
                missing = "" if text else np.nan
                values = [missing if v is None or v != v else v for v in values]
                neurons[label] = np.array(values, dtype=np.str_ if text else None)
    return neurons


def _files(who: str, folder: Path) -> dict[str, list[Path]]:
    """Split -> its files, in order."""
    if os.path.isfile(folder / "dataset_dict.json"):
        with reading(who, "dataset_dict.json"):
            splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
        return {split: _streams(who, folder / split) for split in splits}
    if os.path.isfile(folder / "state.json"):
        return {"train": _streams(who, folder)}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet")):
        found.setdefault(re.split(r"\W", path.name)[0], []).append(path)
    for split, paths in found.items():
        parts = re.search(r"-of-(\d+)", paths[0].name)
        if len(paths) != int(parts[1] if parts else 1):
            _fail(who, f"split {split!r}", f"{len(paths)} files, not all its parts; {AGAIN}")
    if not found:
        problem = "no dataset_dict.json, state.json or .parquet file"
        _fail(who, str(folder), f"{problem}; pass what save_to_disk wrote, or a Hub snapshot")
    return found


def _streams(who: str, folder: Path) -> list[Path]:
    with reading(who, f"{folder.name}/state.json"):
        files = json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]
        return [folder / file["filename"] for file in files]


def _columns(who: str, files: Sequence[Path]) -> Columns:
    """The columns of all files of a split."""
    pyarrow, parquet = extra("pyarrow", "data"), extra("pyarrow.parquet", "data")
    tables = []
    for path in files:
        with reading(who, path.name):
            if path.suffix == ".parquet":
                tables.append(parquet.ParquetFile(path).read())
            else:
                content = path.read_bytes()
                if not content.endswith(END_OF_STREAM):  # Arrow would take it for a shorter one
                    raise ValueError("its end is missing")
                tables.append(pyarrow.ipc.open_stream(content).read_all())
            tables[-1].validate(full=True)
    table = pyarrow.concat_tables(tables)
    return {name: table[name].to_numpy() for name in table.column_names}
