"""A spike sorter's folder: Kilosort 2 to 4, curated in phy or not.

Read are ``spike_times.npy`` (samples), ``spike_clusters.npy`` or else ``spike_templates.npy``, the
sampling rate in ``params.py`` (as text, it is not run) and the tables ``cluster_*.tsv``, whose
columns become columns of ``Session.neurons``:

- ``cluster``: the id in phy; ids may have gaps.
- ``quality``: phy's ``group``, or ``KSLabel`` for a cluster that was not labelled by hand; "" for
  one that no table has.
- ``depth`` and whatever else there is, as in ``cluster_info.tsv``; numbers are NaN where missing.

As in phy, the clusters are those that have spikes. A table may have more: merging and splitting
leave rows of the old ids behind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from mtm.data.recording import Folder, is_event
from mtm.session import Session


def load_session(
    folder: str | Path,
    align_times: ArrayLike | str | Path,
    *,
    align: str | None = None,
    window: tuple[float, float] = (-0.5, 1.5),
    bin_size: float = 0.02,
    units: str | Collection[int] | None = None,
    sample_rate: float | None = None,
    regions: Sequence[str] | Mapping[int, str] | np.ndarray | None = None,
    behaviour: Mapping[str, ArrayLike] | None = None,
    traces: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    name: str | None = None,
) -> Session:
    """Load the folder of one sorting around events.

    Args:
        folder: with ``spike_times.npy`` in it.
        align_times: (K,) seconds on the clock of the recording, whose first sample is at 0; the
            event of each trial. Trials without it (NaN) are left out. Or a file, looked for in the
            folder first: ``.npy``, or ``.csv`` with a line of column names.
        align: the column of the ``.csv`` with the event, where it has several.
        window: (start, stop) around each event, seconds.
        bin_size: seconds.
        units: None keeps all clusters but noise, "good" those of quality good; or a list of ids.
        sample_rate: Hz. Default: that of ``params.py``.
        regions: mapping from cluster id to label, or a label for each cluster kept, by id.
        behaviour: name -> (K,) or (K, T). Default: columns of numbers of the ``.csv``, except those
            called ``*time`` or ``*times``.
        traces: name -> (sample times in seconds, values), averaged in each bin.
        name: of the session; default the folder's.

    Raises:
        SessionError: naming session, file and remedy.
    """
    files = Folder(folder, name or "", origin="Kilosort or phy", source=str(folder))
    times, clusters = _spikes(files, sample_rate)
    table = _clusters(files, np.unique(clusters))
    kept = _kept(files, table, units)
    mine = np.isin(clusters, kept.index)
    events, trials = _trials(files, align_times, align, behaviour)
    files.provenance |= {"clusters": len(table), "noise": int((table["quality"] == "noise").sum())}
    return Session.from_spike_times(
        times[mine],
        clusters[mine],
        events,
        clusters=kept.index,
        regions=regions,
        window=window,
        bin_size=bin_size,
        traces=traces,
        neurons=kept.to_dict("series"),
        name=files.name,
        provenance=files.provenance,
        **trials,
    )


def _spikes(files: Folder, rate: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Time (S,) in seconds and cluster (S,) of every spike."""
    if not files.has("spike_times"):
        inside = sorted(str(path.parent) for path in files.path.glob("*/**/spike_times.npy"))
        files.fail("spike_times.npy", f"missing; pass the sorter's folder {inside[:3] or ''}")
    samples = files.array("spike_times")
    if (samples % 1).any():
        problem = "not whole samples; if they are seconds, use Session.from_spike_times"
        files.fail("spike_times.npy", problem)
    source = "spike_clusters" if files.has("spike_clusters") else "spike_templates"
    clusters = files.array(source, len(samples)).astype(np.int64)
    path = files.path / "params.py"
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    number = r"(\d[\d_]*\.?\d*(?:[eE]\+?\d+)?)"
    found = re.findall(rf"^sample_rate\s*=\s*{number}\s*(?:#.*)?$", text, re.M)
    if rate is None and not found:
        files.fail("params.py", "no sample_rate in it; pass sample_rate=, in Hz")
    files.provenance["sample_rate"] = rate = float(found[-1] if rate is None else rate)
    return samples / rate, clusters


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
    words = [key for key, column in table.items() if column.dtype.kind not in "uifb"]
    table[words] = table[words].fillna("").astype(str)
    return table


def _kept(files: Folder, table: pd.DataFrame, units: str | Collection[int] | None) -> pd.DataFrame:
    """The rows of the clusters to use."""
    if units is None or isinstance(units, str):
        if units not in (None, "good"):
            raise ValueError(f"units must be None, 'good' or a list of ids; got {units!r}")
        kept = table[table["quality"] == units if units else table["quality"] != "noise"]
    else:
        if missing := sorted(set(units) - set(table.index)):
            files.fail("units", f"no spikes of clusters {missing[:5]}; name others")
        kept = table[table.index.isin(list(units))]
    if kept.empty:
        found = table["quality"].value_counts().to_dict()
        files.fail("units", f"no cluster is left of {found}; pass units=, a list of ids")
    return kept


def _trials(
    files: Folder, align_times: Any, align: str | None, behaviour: Mapping[str, Any] | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Event times (K,), and the arguments of `Session.from_spike_times` that go with them."""
    table = pd.DataFrame()
    if not isinstance(align_times, str | Path):
        table["align_times"] = np.asarray(align_times, float)
    else:
        path = files.path / align_times
        path = path if path.is_file() else Path(align_times)
        files.provenance["events"] = str(path)
        with files.reading(str(path), "pass a .npy or .csv file with times in seconds"):
            if path.suffix == ".npy":
                table["align_times"] = np.load(path, allow_pickle=False).ravel().astype(float)
            else:
                table = pd.read_csv(path)
    if pd.to_numeric(table.columns, errors="coerce").notna().any():
        files.fail(f"{align_times}", "its first line is numbers; let it name the columns")
    numbers = table.select_dtypes(["number", "bool"])
    align = table.columns[0] if align is None and len(table.columns) == 1 else align
    if align not in numbers:
        files.fail(f"align={align!r}", f"name the column of the event, one of {list(numbers)}")
    rows = np.flatnonzero(np.isfinite(table[align]))
    if behaviour is None:
        behaviour = {key: numbers[key] for key in numbers if key != align and not is_event(key)}
    found = {key: np.asarray(values) for key, values in behaviour.items()}
    if bad := [key for key, values in found.items() if len(values) != len(table)]:
        files.fail(f"behaviour {bad[0]!r}", f"{len(found[bad[0]])} values of {len(table)} events")
    facts = {"trial_ids": rows, "n_recorded": len(table)}
    return table[align].to_numpy(float)[rows], facts | {
        "behaviour": {key: values[rows] for key, values in found.items()}
    }
