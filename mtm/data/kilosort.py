"""A spike sorter's folder: Kilosort 2 to 4, curated in phy or not.

Read are ``spike_times.npy`` (samples), ``spike_clusters.npy`` or else ``spike_templates.npy``, the
sampling rate in ``params.py`` (as text, it is not run) and the tables ``cluster_*.tsv``. The
clusters are those that have spikes, as in phy: merging and splitting leave rows of old ids behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from mtm.data.recording import Folder, is_event
from mtm.inputs import plain
from mtm.session import Session


def load_session(
    folder: str | Path,
    align_times: ArrayLike | str | Path,
    *,
    align: str | None = None,
    window: tuple[float, float] = (-0.5, 1.5),
    bin_size: float = 0.02,
    units: str | None = None,
    sample_rate: float | None = None,
    regions: Sequence[str] | Mapping[int, str] | np.ndarray | None = None,
    behaviour: Mapping[str, ArrayLike] | None = None,
    traces: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    name: str = "",
) -> Session:
    """Load the folder of one sorting around events.

    Args:
        folder: with ``spike_times.npy`` in it.
        align_times: (K,) seconds from the first sample, the event of each trial; trials without it
            (NaN) are left out. Or a file, looked for in the folder first: ``.npy``, or ``.csv``
            with a line of column names.
        align: the column of the ``.csv`` with the event, where it has several.
        window, bin_size: (start, stop) around each event, and width of a bin; seconds.
        units: "good" keeps the clusters of quality good; None all but noise.
        sample_rate: Hz. Default: that of ``params.py``.
        regions, traces, name: as in :meth:`Session.from_spike_times`; default name the folder's.
        behaviour: name -> (K,) or (K, T). Default: columns of numbers not called ``*time(s)``.

    Returns:
        the session; ``neurons`` has ``cluster``, ``quality`` (phy's ``group``, or ``KSLabel`` for a
        cluster not labelled by hand, or "") and all columns of the tables, as ``depth``.

    Raises:
        SessionError: naming session, file and remedy.
    """
    if units not in (None, "good"):
        raise ValueError(f"units must be None or 'good', got {units!r}")
    files = Folder(folder, name, origin="Kilosort or phy", source=str(folder))
    times, clusters = _spikes(files, sample_rate)
    table = _clusters(files, np.unique(clusters))
    keep = table["quality"] == units if units else table["quality"] != "noise"
    fields = _trials(files, align_times, align, behaviour)
    grid: dict[str, Any] = {"window": window, "bin_size": bin_size, "traces": traces}
    return files.to_session(times, clusters, table, keep, regions=regions, **grid, **fields)


def _spikes(files: Folder, rate: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Time (S,) in seconds and cluster (S,) of every spike."""
    if not files.has("spike_times"):
        files.fail("spike_times.npy", "missing; pass the sorter's folder, which has it")
    samples = files.array("spike_times")
    if (samples % 1).any():
        files.fail("spike_times.npy", "not whole samples; for seconds, Session.from_spike_times")
    source = "spike_clusters" if files.has("spike_clusters") else "spike_templates"
    text = "".join(path.read_text("utf-8", "replace") for path in files.path.glob("params.py"))
    found = re.findall(r"^sample_rate\s*=\s*([\d._eE+]+)\s*(?:#.*)?$", text, re.M)
    if rate is None and not found:
        files.fail("params.py", "no sample_rate in it; pass sample_rate=, in Hz")
    files.provenance["sample_rate"] = rate = float(found[-1] if rate is None else rate)
    return samples / rate, files.array(source, len(samples)).astype(np.int64)


def _clusters(files: Folder, ids: np.ndarray) -> pd.DataFrame:
    """Columns of all tables, with the row of each id, and ``quality``."""
    table = pd.DataFrame(index=ids)
    for path in sorted(files.path.glob("cluster_*.tsv")):
        with files.reading(path.name):
            part = pd.read_csv(path, sep="\t", dtype={"group": str, "KSLabel": str})
            part = part.rename(columns={"id": "cluster_id"}).dropna(subset="cluster_id")
            part = part.drop_duplicates("cluster_id").set_index("cluster_id").reindex(ids)
        table = table.combine_first(part)  # cluster_info.tsv, a copy of the others, is among them
    labels = table.reindex(columns=["group", "KSLabel"]).astype(object).replace("unsorted", np.nan)
    table["quality"] = labels["group"].fillna(labels["KSLabel"]).fillna("").astype(str)
    return table


def _trials(
    files: Folder, align_times: Any, align: str | None, behaviour: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The arguments of `Session.from_spike_times` for the trials."""
    table = align_times
    if isinstance(align_times, str | Path):
        inside = files.path / align_times
        path = inside if inside.is_file() else Path(align_times)
        files.provenance["events"] = str(path)
        with files.reading(str(path), "pass a .npy or .csv file with times in seconds"):
            array = path.suffix == ".npy"
            table = np.load(path, allow_pickle=False) if array else pd.read_csv(path)
            table = table if array else table.drop(columns="Unnamed: 0", errors="ignore")  # index
    if not isinstance(table, pd.DataFrame):
        times = plain(table).astype(float)
        if times.size != max(times.shape, default=1):
            files.fail("align_times", f"need one time for each trial, got shape {times.shape}")
        table = pd.DataFrame({"align_times": times.ravel()})
    if pd.to_numeric(table.columns, errors="coerce").notna().any():
        files.fail(f"{align_times}", "its first line is numbers; let it name the columns")
    align = table.columns[0] if align is None and len(table.columns) == 1 else align
    events = files.event(table, align)
    if behaviour is None:
        numbers = table.select_dtypes(["number", "bool"])
        behaviour = {key: numbers[key] for key in numbers if key != align and not is_event(key)}
    return files.trials_to_use(events, behaviour, {})
