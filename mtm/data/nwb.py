"""NWB files, on disk or streamed from an archive such as DANDI: a path or URL in, a Session out.

Files of NWB 2 are read with h5py, without their extensions; of a remote file only the datasets that
are used are fetched.

- ``region``: a column of the units table; ``"electrodes/<column>"``, the label of a unit's peak
  electrode, where a column such as ``peak_channel_id`` or ``max_electrode`` names it, or else the
  label that most of its ``electrodes`` have; or ``"electrode_group/location"``. "auto" is the first
  of `REGION_SOURCES` that labels any unit.
- ``behaviour``: columns of the trials table. Default: all with one number or boolean per trial,
  except those called ``*time`` or ``*times``. Columns of text must be asked for; codes whose words
  the file has are read as words.
- ``traces``: any TimeSeries, averaged in each bin. Where a name occurs twice, give more of the
  path: ``"Position/head"``. ``"head[0]"`` is the first column of several, ``"head"`` all of them.
  Angles do not average.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from mtm.data.recording import (
    Recording,
    is_event,
    observed_by_probe,
    ordered_samples,
    public,
    within,
)
from mtm.files import optional
from mtm.inputs import plain
from mtm.session import Session, has_region

REGION_SOURCES = (
    "electrodes/location",
    *("location", "brain_area", "brain_region", "region", "area"),
    "electrode_group/location",
)
PEAK = r"(peak|max|best|main|extremum).*(channel|electrode|ch\b)"  # columns that name an electrode
WIDEST = 32  # electrodes that one neuron can be seen on
PARTS = ("train", "val", "test")
ELECTRODES = "general/extracellular_ephys/electrodes"
PROVENANCE = {  # key of Session.provenance: place in the file
    **{key: key for key in ("identifier", "session_start_time")},
    **{key: f"general/{key}" for key in ("session_id", "lab", "institution")},
    **{"subject": "general/subject/subject_id", "species": "general/subject/species"},
}


def load_session(
    source: str | Path,
    align: str | Collection[float] | np.ndarray = "start_time",
    *,
    window: tuple[float, float] = (-0.5, 1.5),
    bin_size: float = 0.02,
    trials: str = "trials",
    behaviour: Collection[str] | None = None,
    traces: Collection[str] = (),
    region: str | None = "auto",
    split: str | Sequence[ArrayLike] | None = None,
) -> Session:
    """Load one NWB file: all units, silent ones too, around events.

    Args:
        source: path of the file, or its http(s) URL, for DANDI ``https://api.dandiarchive.org/api/
            assets/<asset id>/download/``. A URL is streamed; the server must serve byte ranges.
        align: the event: a column of the trials table, in seconds; trials without it (NaN) are left
            out, as are those whose window meets the table ``invalid_times``. Or (K,) event times in
            seconds; then no trials table is read. Of a file without trials: those of
            :func:`mtm.continuous_windows`.
        window, bin_size: (start, stop) around each event, and width of a bin; seconds.
        trials: the table among the file's ``intervals`` whose rows are the trials.
        behaviour, traces, region: see the top of this page; ``()`` and None for none.
        split: a column of the trials table that says "train", "val" or "test", or the indices of
            these three, as of :func:`mtm.continuous_windows`; other trials are left out. Default:
            splits are drawn by `Session.split`.

    Returns:
        the session, named by the file's identifier or else the file. ``neurons`` has ``cluster``,
        the unit's id, and every other column with one number or text per unit, for
        ``session.select(neurons=session.neurons["quality"] == "good")``. ``observed`` follows from
        the units' ``obs_intervals`` or, with ``probe_name``, from probes that stop or pause.

    Raises:
        SessionError: naming session, dataset and remedy.
    """
    with _opened(source) as file:
        table = _Table(file, "units")
        if not table.n or "spike_times" not in table.index:
            file.fail("units/spike_times", "no sorted spikes; choose a file with a units table")
        labels, file.provenance["regions"] = _regions(file, table, region)
        times, rows = table.ragged("spike_times")
        neurons = {key: table.column(key) for key in table.scalars} | {"cluster": table.id}
        fields = _trials(file, table, (times, rows), trials, align, behaviour, window, split)
        fields["traces"] = {}
        for name in traces:
            fields["traces"] |= _samples(file, name)
    fields |= {"regions": labels, "window": window, "bin_size": bin_size}
    return file.to_session(times.astype(np.float64), rows, pd.DataFrame(neurons), **fields)


def describe(source: str | Path) -> str:
    """List what a file, path or URL, holds, by the names that `load_session` takes."""
    with _opened(source) as file:
        lines = [f"{file.name!r}, subject {file.provenance['subject'] or 'not named'}"]
        tables = [f"intervals/{key}" for key in file.h5.get("intervals", ())]
        for table in (_Table(file, path) for path in ("units", ELECTRODES, *tables)):
            kinds = dict.fromkeys(table.columns, " (many)") | dict.fromkeys(table.scalars, "")
            kinds |= {key: " (text)" for key in table.scalars if file.is_text(table.columns[key])}
            columns = ", ".join(key + kind for key, kind in kinds.items())
            lines += [f"{table.path}: {table.n} rows; columns {columns}"] if table.n else []
        labels, place = _regions(file, _Table(file, "units"), "auto")
        sizes = pd.Series(labels).replace("", "none").value_counts().to_dict()
        lines.append(f"regions, from {place}: {sizes}")
        for path, group in file.series().items():
            data = group["data"]
            lines.append(f"series {path}: shape {data.shape}, unit {data.attrs.get('unit', '?')}")
    return "\n".join(lines)


class _NwbFile(Recording):
    """An open file."""

    h5: Any

    def is_text(self, dataset: Any) -> bool:
        text = optional("h5py", "nwb").check_string_dtype(dataset.dtype) is not None
        return text or self.words(dataset) is not None

    def words(self, dataset: Any) -> dict[int, str] | None:
        """What the codes in a dataset stand for: HDF5's enumerations, and NWB's EnumData."""
        if "elements" in dataset.attrs:
            return dict(enumerate(self.read(self.h5[dataset.attrs["elements"]]).tolist()))
        codes = optional("h5py", "nwb").check_enum_dtype(dataset.dtype)
        return codes and {code: word for word, code in codes.items()}

    def read(self, dataset: Any) -> np.ndarray:
        """The content of a dataset; text as str."""
        if (words := self.words(dataset)) is not None:
            return np.array([words.get(code, "") for code in dataset[()].tolist()], np.str_)
        if self.is_text(dataset):
            return np.asarray(dataset.asstr(errors="replace")[()]).astype(np.str_)
        return np.asarray(dataset[()])

    def series(self) -> dict[str, Any]:
        """Path -> group of every TimeSeries: whatever has data with times."""
        found: dict[str, Any] = {}
        self.h5.visititems(found.__setitem__)
        groups = {path: set(item) for path, item in found.items() if hasattr(item, "keys")}
        times = {"timestamps", "starting_time"}
        return {
            path: found[path] for path, keys in groups.items() if "data" in keys and keys & times
        }


@contextmanager
def _opened(source: str | Path) -> Iterator[_NwbFile]:
    """Open a file; any error of a damaged or foreign one becomes a SessionError."""
    address = str(source)
    remote = "://" in address
    shown = public(address) if remote else address
    file = _NwbFile(shown, origin="NWB", source=shown)
    h5py = optional("h5py", "nwb")
    if not remote and not Path(source).is_file():
        file.fail("file", f"{shown} does not exist; check the path")
    reading = file.reading("file", f"check the address, or pass the path of a copy of {shown}")
    with reading, h5py.File(_stream(file, address) if remote else address, "r") as file.h5:
        for key, path in PROVENANCE.items():
            dataset = file.h5.get(path)
            single = getattr(dataset, "size", 0) == 1
            file.provenance[key] = str(file.read(dataset).item()).strip() if single else ""
        file.name = file.provenance["identifier"] or Path(shown).name
        yield file


def _stream(file: _NwbFile, address: str) -> Any:
    """A file object that fetches what is read of it."""
    remfile, requests = optional("remfile", "nwb"), optional("requests", "nwb")
    with requests.get(address, headers={"Range": "bytes=0-7"}, stream=True, timeout=60) as reply:
        if reply.status_code != 206:  # remfile does not see that a server ignores ranges
            problem = f"the server answers {reply.status_code}, not 206 (a byte range)"
            file.fail(public(address), f"{problem}; check the address, or download the file")
        return remfile.File(reply.url)  # behind redirects, which cost time each


class _Table:
    """A DynamicTable: its columns and their content; empty where there is none."""

    def __init__(self, file: _NwbFile, path: str) -> None:
        self.file, self.path = file, path
        found = {k: item for k, item in (file.h5.get(path) or {}).items() if hasattr(item, "shape")}
        self.id = file.read(found.pop("id")) if found else np.zeros(0, np.int64)
        self.n = len(self.id)
        self.index = {key: found[f"{key}_index"] for key in found if f"{key}_index" in found}
        hidden = {f"{key}_{end}" for key in found for end in ("index", "elements")}
        self.columns = {key: item for key, item in found.items() if key not in hidden}
        # Those with one number or text per row; a reference to another table is neither.
        self.scalars = [
            key for key, item in self.columns.items() if item.shape == (self.n,)
            and key not in self.index and "table" not in item.attrs
            and (item.dtype.kind in "uifb" or file.is_text(item))
        ]  # fmt: skip

    def column(self, name: str) -> np.ndarray:
        """A column with one number or text per row, (n,)."""
        if name not in self.scalars:
            problem = f"no such column with one number or text per row; there are {self.scalars}"
            self.file.fail(f"{self.path}/{name}", problem)
        return self.file.read(self.columns[name])

    def ragged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """All values (S,) of a column, and the row (S,) of each; one per row without an index."""
        values, ends = self.file.read(self.columns[name]), np.arange(1, self.n + 1)
        if name in self.index:
            ends = self.file.read(self.index[name]).astype(np.int64)
        return values, np.repeat(np.arange(self.n), np.diff(ends, prepend=0))


def _regions(file: _NwbFile, table: _Table, region: str | None) -> tuple[np.ndarray, str | None]:
    """The label of each unit, (N,), and where the labels are from."""
    for source in REGION_SOURCES if region == "auto" else [region] if region else []:
        labels = _labels(file, table, source)
        if labels is not None and (region != "auto" or any(map(has_region, labels))):
            return labels, source
    if region not in (None, "auto"):
        problem = "no such labels; pass None, 'electrodes/<column>' of the electrodes, or one of"
        file.fail(f"regions from {region}", f"{problem} {table.scalars}")
    return np.full(table.n, ""), None


def _labels(file: _NwbFile, table: _Table, source: str) -> np.ndarray | None:
    """Labels (N,) from one source; None where the file does not have it."""
    if source == "electrode_group/location" and "electrode_group" in table.columns:
        groups = file.read(table.columns["electrode_group"])
        labels = [file.h5[group].attrs.get("location", "") for group in groups]
        return np.char.strip(np.array(labels, np.str_))
    if not source.startswith("electrodes/"):
        known = source in table.scalars
        return np.char.strip(table.column(source).astype(np.str_)) if known else None
    electrodes, column = _Table(file, ELECTRODES), source.removeprefix("electrodes/")
    if column not in electrodes.scalars or (found := _electrodes(file, table, electrodes)) is None:
        return None
    places, rows = found
    labels = np.char.strip(electrodes.column(column).astype(np.str_))[places]
    listed = pd.DataFrame({"unit": rows, "label": labels}).groupby("unit")["label"]
    wide = (listed.transform("size") > WIDEST) & (listed.transform("nunique") > 1)
    if wide.any():
        problem = f"{len(set(rows[wide]))} units list over {WIDEST} electrodes of several regions"
        file.warn("units/electrodes", f"{problem}, none as the peak; they have no region")
    labelled = (places >= 0) & ~wide.to_numpy() & [has_region(label) for label in labels]
    votes = pd.Series(labels[labelled]).groupby(rows[labelled])
    best = votes.agg(lambda x: x.value_counts(sort=False).idxmax())  # on a tie the first listed
    return best.reindex(np.arange(table.n), fill_value="").to_numpy(np.str_)


def _electrodes(
    file: _NwbFile, table: _Table, electrodes: _Table
) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows (S,) of the electrodes table, and the unit (S,) of each: of peaks, or of all listed.

    A column of peaks may hold rows or ids of electrodes, or numbers within one of several probes.
    What it holds must be among the electrodes that the units list, if they do.
    """
    units, every_row = np.arange(table.n), np.arange(electrodes.n)
    listed = table.ragged("electrodes") if "electrodes" in table.columns else None
    ids = electrodes.id if len(set(electrodes.id.tolist())) == electrodes.n else every_row
    for name, item in table.columns.items():
        if item.shape != (table.n,) or not re.match(PEAK, name.lower()):
            continue
        values, reference = file.read(item), "table" in item.attrs  # references hold rows
        for known in (ids, every_row)[reference:]:
            places = pd.Index(known).get_indexer(values)
            if listed is None:
                found = reference or name == "peak_channel_id"
            else:
                pairs = listed[1] * electrodes.n + listed[0]
                checked = np.isin(units, listed[1]) & (places >= 0)
                inside = np.isin(units * electrodes.n + places, pairs)[checked]
                found = checked.any() and inside.all()
            if found:
                return places, units
    return listed


def _trials(
    file: _NwbFile,
    units: _Table,
    spikes: tuple[np.ndarray, np.ndarray],
    trials: str,
    align: Any,
    behaviour: Any,
    window: tuple[float, float],
    split: str | Sequence[ArrayLike] | None,
) -> dict[str, Any]:
    """The arguments of `Session.from_spike_times` that come from the trials table."""
    named = isinstance(align, str)
    file.provenance["align"] = align if named else "given times"
    table = _Table(file, f"intervals/{trials}" if named else "no trials table")
    if named and not table.n:
        problem = f"no rows; pass trials=, one of {list(file.h5.get('intervals', ()))}, or of a "
        file.fail(table.path, f"{problem}recording without trials, see mtm.continuous_windows")
    times = table.column(align) if named else plain(align)
    if times.dtype.kind not in "uif":
        file.fail(f"align={file.provenance['align']}", "no times in it; name a column of seconds")
    if behaviour is None:
        known = [key for key in table.scalars if table.columns[key].dtype.kind in "uifb"]
        behaviour = [key for key in known if not is_event(key)]
    columns = {key: table.column(key) for key in behaviour}
    numbers = {key: values for key, values in columns.items() if values.dtype.kind != "U"}
    columns |= {key: np.where(np.isfinite(x), x, np.nan) for key, x in numbers.items()}
    spans = times[:, None] + np.array(window, np.float64)
    bad = _Table(file, "intervals/invalid_times")
    start, stop = (bad.column(key) if bad.n else np.zeros(0) for key in ("start_time", "stop_time"))
    rejected = {"in invalid_times": ((spans[:, 1:] > start) & (spans[:, :1] < stop)).any(axis=1)}
    if split is not None:
        if isinstance(split, str):
            split = [np.flatnonzero(table.column(split) == name) for name in PARTS]
        every = np.arange(len(times))
        members = [np.isin(every, every[np.asarray(part)]) for part in split]
        rejected["in no part"] = ~np.any(members, axis=0)
    observed = np.ones((len(times), units.n), dtype=bool)
    if "obs_intervals" in units.index:
        intervals, unit = units.ragged("obs_intervals")
        for i in np.unique(unit):
            observed[:, i] = within(intervals[unit == i], spans)
    elif "probe_name" in units.scalars:
        observed = observed_by_probe(*spikes, units.column("probe_name"), spans)
    fields = file.trials_to_use(times.astype(np.float64), columns, rejected, observed)
    if split is not None:
        fields["given_split"] = [part[fields["trial_ids"]] for part in members]
    return fields


def _samples(file: _NwbFile, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Times and values (S,) of a series, conversion and offset applied; of each of its columns."""
    ((end, number),) = re.findall(r"^(.*?)(?:\[(\d+)\])?\Z", name)
    known = file.series()
    paths = [end] if end in known else [path for path in known if path.endswith(f"/{end}")]
    if len(paths) != 1:
        problem = f"could be any of {paths}" if paths else f"not among {sorted(known)}"
        file.fail(f"series {name!r}", f"{problem}; give its path")
    group = known[paths[0]]
    with file.reading(f"series {name!r}", "leave it out"):
        data = group["data"]
        values = file.read(data).astype(np.float64) * data.attrs.get("conversion", 1.0)
        values += data.attrs.get("offset", 0.0)
        if "channel_conversion" in group:
            values *= file.read(group["channel_conversion"])
        if "timestamps" in group:
            times = file.read(group["timestamps"])
        else:
            start = group["starting_time"]
            times = file.read(start).item() + np.arange(len(values)) / start.attrs["rate"]
        values = values.reshape(len(values), -1)
        columns = [int(number)] if number else range(values.shape[1])
        samples = [ordered_samples(times, values[:, i]) for i in columns]
    if len(columns) == 1:
        return {name: samples[0]}
    return {f"{name}[{i}]": samples[i] for i in columns}
