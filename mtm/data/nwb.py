"""NWB files, on disk or streamed from an archive such as DANDI: a path or URL in, a Session out.

Files of NWB 2 are read with h5py as they are stored (units, ``intervals/trials``, electrodes,
TimeSeries). So a file opens even where it uses extensions that are not installed, and of a remote
file only the datasets that are used are fetched. `describe` lists what a file has.

- Regions, the argument ``region``: a column of the units table; or ``"electrodes/<column>"`` of the
  electrodes table, the label that most of a unit's electrodes have (unlabelled ones do not count;
  on a tie the first listed); or ``"electrode_group/location"``. "auto" is the first of
  `REGION_SOURCES` that labels any unit. A unit's electrodes are in its column ``electrodes``, else
  it is the one whose id is ``peak_channel_id`` (Allen Institute).
- ``behaviour``: columns of the trials table. By default all with one number or boolean per trial,
  except those called ``*time`` or ``*times``. A column of text must be asked for; it becomes codes
  0, 1, ... of its sorted levels, which ``provenance["levels"]`` lists. Empty text is NaN.
- ``traces``: any TimeSeries, averaged in each bin, conversion and offset applied. Where a name
  occurs twice, give more of the path: ``"Position/head"``. ``"head[0]"`` is the first column of
  several. (The mean of an angle is wrong in bins where it jumps from 2 pi to 0: bin its sine and
  cosine yourself.)

Spikes at NaN times are dropped, with a warning; trials without the event are left out; unsorted
spikes and samples are sorted. Neurons are rows of the units table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mtm.data.recording import Recording, ordered_samples, public
from mtm.files import optional
from mtm.session import Session, has_region

REGION_SOURCES = (
    "electrodes/location",
    *("location", "brain_area", "brain_region", "region", "area"),
    "electrode_group/location",
)
ELECTRODES = "general/extracellular_ephys/electrodes"
SERIES_FOLDERS = ("acquisition", "processing", "stimulus/presentation", "analysis")
PROVENANCE = {  # key of Session.provenance: place in the file
    **{key: key for key in ("identifier", "session_start_time")},
    **{key: f"general/{key}" for key in ("session_id", "lab", "institution")},
    **{"subject": "general/subject/subject_id", "species": "general/subject/species"},
}


def load_session(
    source: str | Path,
    align: str | np.ndarray | Collection[float] = "start_time",
    *,
    window: tuple[float, float] = (-0.5, 1.5),
    bin_size: float = 0.02,
    trials: str = "trials",
    behaviour: Mapping[str, str] | Collection[str] | None = None,
    traces: Mapping[str, str] | Collection[str] = (),
    region: str | None = "auto",
    units: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Session:
    """Load one NWB file: all units, silent ones too, around events.

    Args:
        source: path of the file, or its http(s) URL, for DANDI ``https://api.dandiarchive.org/api/
            assets/<asset id>/download/``. A URL is streamed; the server must serve byte ranges.
        align: the event: a column of the trials table, in seconds; trials without it (NaN) are left
            out. Or (K,) event times in seconds; then no trials table is read. Consecutive windows
            of a file without trials: ``np.arange(start, stop, length)``, ``window=(0, length)``.
        window: (start, stop) around each event, seconds.
        bin_size: seconds.
        trials: the table among the file's ``intervals`` whose rows are the trials.
        behaviour: columns of the trials table, a list of names or {our name: column}; ``()`` for
            none. Default: see the top of this page, as for the next two.
        traces: continuous behaviour, a list of names of TimeSeries or {our name: name}.
        region: where region labels are, or None for none.
        units: the units to keep: {column: value, list of values, or function of the column (N,)
            that returns (N,) booleans}, of which all must hold. Default: all. E.g.
            ``{"quality": "good", "snr": lambda snr: snr > 2}``.
        name: the session's key; default the file's identifier, else the file's name.

    Returns:
        the session. ``neurons`` has ``cluster``, the unit's id, and every column of the units table
        with one number or text per unit. Splits go by the rows of the trials table.

    Raises:
        SessionError: naming session, dataset and remedy.
        ImportError: without the ``[nwb]`` extra.
    """
    with _opened(source, name) as file:
        fields = _units(file, units, region) | _trials(file, trials, align, behaviour)
        fields["traces"] = _traces(file, traces)
    fields |= {"name": file.name, "subject": file.provenance["subject"]}
    fields["provenance"] = file.provenance
    session = Session.from_spike_times(window=window, bin_size=bin_size, **fields)
    for key in fields["traces"]:
        if np.isnan(session.behaviour[key]).all():
            file.warn(f"trace {key!r}", "all NaN: no samples in trials, or over 0.2 s apart")
    return session


def describe(source: str | Path) -> str:
    """Describe what a file holds, by the names that `load_session` takes, in some lines of text.

    Columns called "(many)" have several values per row.

    Args:
        source: path or URL, as in `load_session`.

    Raises:
        SessionError: where the file cannot be read.
    """
    with _opened(source, None) as file:
        lines = [f"{file.name!r}, subject {file.provenance['subject'] or 'not named'}"]
        tables = [f"intervals/{key}" for key in file.h5.get("intervals", ())]
        for path in ("units", ELECTRODES, *tables):
            table = _Table(file, path)
            text = [f"{key} (text)" if table.is_text(key) else key for key in table.scalars]
            many = [f"{key} (many)" for key in table.columns if key not in table.scalars]
            if table.n or path == "units":
                lines.append(f"{path}: {table.n} rows; columns " + ", ".join(text + many))
            if path == "units":
                labels, place = _regions(file, table, "auto")
                sizes = pd.Series(labels).replace("", "none").value_counts()
                found = ", ".join(f"{label} {n}" for label, n in sizes.items())
                lines.append(f"regions, from {place}: {found}")
        for path, group in file.series().items():
            data = group["data"]
            lines.append(f"series {path}: shape {data.shape}, unit {data.attrs.get('unit', '?')}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the file


class _NwbFile(Recording):
    """An open file."""

    h5: Any

    def read(self, dataset: Any, part: Any = ()) -> np.ndarray:
        """A dataset, or part of it; text as str."""
        if optional("h5py", "nwb").check_string_dtype(dataset.dtype) is None:
            return np.asarray(dataset[part])
        return np.asarray(dataset.asstr(errors="replace")[part]).astype(np.str_)

    def series(self) -> dict[str, Any]:
        """Path -> group of every TimeSeries: whatever has data with times."""
        found: dict[str, Any] = {}

        def visit(group: Any, path: str, depth: int) -> None:
            if hasattr(group.get("data"), "shape") and {"timestamps", "starting_time"} & set(group):
                found[path] = group
            elif depth:  # links can form rings
                for key, item in group.items():
                    if hasattr(item, "keys"):
                        visit(item, f"{path}/{key}", depth - 1)

        for folder in SERIES_FOLDERS:
            visit(self.h5.get(folder, {}), folder, 4)
        return found


@contextmanager
def _opened(source: str | Path, name: str | None) -> Iterator[_NwbFile]:
    """Open a file; any error of a damaged or foreign one becomes a SessionError."""
    address = str(source)
    remote = address.lower().startswith(("http://", "https://"))
    shown = public(address) if remote else address
    file = _NwbFile(name or shown, origin="NWB", source=shown)
    if not remote and not Path(address).is_file():
        file.fail("file", f"{shown} does not exist; pass its path or its http(s) URL")
    h5py = optional("h5py", "nwb")
    remedy = f"try again, or pass the path of a copy of {shown}"
    with file.reading("file", remedy):
        with h5py.File(_stream(file, address) if remote else address, "r") as file.h5:
            if "nwb_version" not in file.h5.attrs:
                file.fail("nwb_version", "missing, so not a file of NWB 2; convert it")
            for key, path in PROVENANCE.items():
                dataset = file.h5.get(path)
                single = getattr(dataset, "size", 0) == 1
                file.provenance[key] = str(file.read(dataset).item()).strip() if single else ""
            file.name = name or file.provenance["identifier"] or Path(shown).name
            yield file


def _stream(file: _NwbFile, address: str) -> Any:
    """A file object that fetches what is read of it."""
    remfile, requests = optional("remfile", "nwb"), optional("requests", "nwb")
    headers = {"Range": "bytes=0-7"}
    with requests.get(address, headers=headers, stream=True, timeout=60) as reply:
        if reply.status_code != 206:  # remfile does not see that a server ignores ranges
            file.fail(
                public(address),
                f"the server answers {reply.status_code}, not 206 (a byte range); check the "
                "address (has it expired, must it be signed?), or download the file",
            )
        return remfile.File(reply.url)  # behind redirects, which cost time each


class _Table:
    """A DynamicTable: its columns and their content; empty where there is none."""

    def __init__(self, file: _NwbFile, path: str) -> None:
        self.file, self.path = file, path
        group = file.h5.get(path) or {}
        found = {key: item for key, item in group.items() if hasattr(item, "shape")}
        self.id = file.read(found.pop("id")) if "id" in found else np.zeros(0, np.int64)
        self.n = len(self.id)
        self.index = {key: found[f"{key}_index"] for key in found if f"{key}_index" in found}
        indices = {f"{key}_index" for key in self.index}
        self.columns = {key: item for key, item in found.items() if key not in indices}
        # Those with one number or text per row; a reference to another table is neither.
        self.scalars = [
            key
            for key, item in self.columns.items()
            if item.shape == (self.n,) and key not in self.index and "table" not in item.attrs
            and (item.dtype.kind in "uifb" or self.is_text(key))
        ]  # fmt: skip

    def is_text(self, name: str) -> bool:
        """Whether a column holds text."""
        dtype = self.columns[name].dtype
        return optional("h5py", "nwb").check_string_dtype(dtype) is not None

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
        sizes = np.diff(ends, prepend=0)
        if len(sizes) != self.n or np.any(sizes < 0) or sizes.sum() != len(values):
            problem = f"does not divide {len(values)} values among {self.n} rows"
            self.file.fail(f"{self.path}/{name}_index", problem)
        return values, np.repeat(np.arange(self.n), sizes)


# ---------------------------------------------------------------- units and regions


def _units(file: _NwbFile, units: Mapping[str, Any] | None, region: str | None) -> dict[str, Any]:
    """The arguments of `Session.from_spike_times` that come from the units table."""
    table = _Table(file, "units")
    if not table.n or "spike_times" not in table.index:
        file.fail("units/spike_times", "no sorted spikes; choose a file with a units table")
    keep = np.ones(table.n, dtype=bool)
    for column, wanted in (units or {}).items():
        values = table.column(column)
        with file.reading(f"units/{column}", "mend the filter"):
            keep &= wanted(values) if callable(wanted) else np.isin(values, wanted)
        if not keep.any():
            levels = ", ".join(map(repr, np.unique(values)[:8].tolist()))
            file.fail(f"units/{column}", f"the filter leaves no unit; there are {levels}")
    labels, file.provenance["regions"] = _regions(file, table, region)
    times, rows = table.ragged("spike_times")
    finite = np.isfinite(times)
    file.provenance |= {"units dropped": int((~keep).sum()), "spikes dropped": int((~finite).sum())}
    if not finite.all():
        file.warn("units/spike_times", f"dropped {(~finite).sum()} spikes at NaN or infinite times")
    used = keep[rows] & finite
    return {
        "spike_times": times[used].astype(np.float64),
        "spike_clusters": rows[used],
        "clusters": np.flatnonzero(keep),
        "regions": labels[keep],
        "neurons": {key: table.column(key)[keep] for key in table.scalars}
        | {"cluster": table.id[keep]},
    }


def _regions(file: _NwbFile, table: _Table, region: str | None) -> tuple[np.ndarray, str | None]:
    """The label of each unit, (N,), and where the labels are from."""
    for source in REGION_SOURCES if region == "auto" else (region,) if region else ():
        if (labels := _labels(file, table, source)) is not None:
            labels = np.char.strip(labels.astype(np.str_))
            if region != "auto" or any(map(has_region, labels)):
                return labels, source
    if region not in ("auto", None):
        problem = "no such labels; pass None, 'electrodes/<column of the electrodes>', or one of "
        file.fail(f"regions from {region}", f"{problem}{table.scalars}")
    return np.full(table.n, ""), None


def _labels(file: _NwbFile, table: _Table, source: str) -> np.ndarray | None:
    """Labels (N,) from one source; None where the file does not have it."""
    if source == "electrode_group/location" and "electrode_group" in table.columns:
        groups = file.read(table.columns["electrode_group"])
        labels = [file.h5[group].attrs.get("location", "") for group in groups]
        return np.array([x.decode() if isinstance(x, bytes) else x for x in labels])
    if not source.startswith("electrodes/"):
        return table.column(source) if source in table.scalars else None
    electrodes, column = _Table(file, ELECTRODES), source.removeprefix("electrodes/")
    if column not in electrodes.scalars:
        return None
    if "electrodes" in table.columns:
        places, rows = table.ragged("electrodes")
        if np.any((places < 0) | (places >= electrodes.n)):
            problem = f"not rows of the {electrodes.n} electrodes"
            file.fail("units/electrodes", f"{problem}; pass another region=, or None")
    elif "peak_channel_id" in table.scalars:
        places = pd.Index(electrodes.id).get_indexer(table.column("peak_channel_id"))
        rows = np.flatnonzero(places >= 0)
        places = places[rows]
    else:
        return None
    # The label that most of a unit's electrodes have; sort=False: on a tie the first listed.
    labels = np.char.strip(electrodes.column(column).astype(np.str_))[places]
    votes = pd.DataFrame({"unit": rows, "label": labels})[[has_region(label) for label in labels]]
    best = votes.groupby("unit")["label"].agg(lambda x: x.value_counts(sort=False).idxmax())
    return best.reindex(np.arange(table.n), fill_value="").to_numpy(np.str_)


# ---------------------------------------------------------------- trials, behaviour, traces


def _trials(file: _NwbFile, trials: str, align: Any, behaviour: Any) -> dict[str, Any]:
    """The arguments of `Session.from_spike_times` that come from the trials table."""
    file.provenance["align"] = align if isinstance(align, str) else "given times"
    if isinstance(align, str):
        table = _Table(file, f"intervals/{trials}")
        if not table.n:
            others = list(file.h5.get("intervals", ()))
            file.fail(table.path, f"no rows; pass trials=, one of {others}, or for consecutive "
                      "windows align=np.arange(start, stop, length)")  # fmt: skip
        times = table.column(align)
    elif behaviour:
        file.fail("behaviour", "belongs to the rows of the trials table; pass align, one of its "
                  "columns, or no behaviour")  # fmt: skip
    else:
        table, times = None, np.asarray(align)
    if times.dtype.kind not in "uif" or not np.isfinite(times).any():
        file.fail(f"align={file.provenance['align']}", "no times in it; name a column of seconds")
    rows = np.flatnonzero(np.isfinite(times))
    counts = {"recorded": len(times), "without the event": len(times) - len(rows)}
    file.provenance["trials"] = counts
    return {
        "align_times": times[rows].astype(np.float64),
        "trial_ids": rows,
        "n_recorded": len(times),
        "behaviour": {} if table is None else _behaviour(file, table, rows, behaviour),
    }


def _behaviour(
    file: _NwbFile, table: _Table, rows: np.ndarray, wanted: Any
) -> dict[str, np.ndarray]:
    """Columns (K,) of the trials table."""
    file.provenance["levels"] = levels = {}
    if wanted is None:
        wanted = [key for key in table.scalars if not table.is_text(key)]
        wanted = [key for key in wanted if not re.search(r"times?$", key.lower())]
    columns = {}
    for key, column in _names(wanted).items():
        values = table.column(column)[rows]
        if values.dtype.kind == "U":
            codes, known = pd.factorize(np.where(values == "", None, values), sort=True)
            levels[key] = list(known)
            columns[key] = np.where(codes < 0, np.nan, codes)
        else:
            columns[key] = np.where(np.isfinite(values), values, np.nan)
    return columns


def _names(wanted: Mapping[str, str] | Collection[str]) -> dict[str, str]:
    """{our name: name in the file}."""
    if isinstance(wanted, Mapping):
        return dict(wanted)
    return {key: key for key in ([wanted] if isinstance(wanted, str) else wanted)}


def _traces(file: _NwbFile, wanted: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Times and values (S',) of each trace."""
    known = file.series() if wanted else {}
    file.provenance["traces"] = found = {}
    traces = {}
    for key, name in _names(wanted).items():
        ((end, number),) = re.findall(r"^(.*?)(?:\[(\d+)\])?\Z", name)
        paths = [path for path in known if f"/{path}".endswith(f"/{end}")]
        paths = [path for path in paths if path == end] or paths
        if len(paths) != 1:
            problem = f"could be any of {paths}" if paths else f"not among {sorted(known)}"
            file.fail(f"series {name!r}", f"{problem}; give its path")
        found[key] = paths[0] + (f"[{number}]" if number else "")
        column = int(number) if number else None
        traces[key] = ordered_samples(*_samples(file, known[paths[0]], paths[0], column))
    return traces


def _samples(
    file: _NwbFile, group: Any, path: str, column: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Times and values (S,) of one column of a series, as they are in the file."""
    data, shape = group["data"], group["data"].shape
    width = shape[1] if len(shape) == 2 else 1
    if len(shape) > 2 or (column or 0) >= width or (column is None and width != 1):
        file.fail(f"{path}/data", f"shape {shape}; name one column, as in "
                  f"'{path.rpartition('/')[2]}[0]', of those over time")  # fmt: skip
    part = (slice(None), column or 0) if len(shape) == 2 else ()
    values = file.read(data, part).astype(np.float64)
    scale = _attribute(data, "conversion", 1.0)
    if "channel_conversion" in group:
        scale *= float(file.read(group["channel_conversion"])[column or 0])
    if "timestamps" in group:
        times = file.read(group["timestamps"])
    else:
        start, rate = group["starting_time"], _attribute(group["starting_time"], "rate", np.nan)
        times = float(file.read(start)) + np.arange(len(values)) / rate
    if times.shape != values.shape or not np.isfinite(times).any():
        file.fail(path, f"{times.shape} times for {values.shape} samples; leave it out")
    return times, values * scale + _attribute(data, "offset", 0.0)


def _attribute(dataset: Any, key: str, default: float) -> float:
    """A number stored with a dataset, alone or in an array."""
    return float(np.ravel(dataset.attrs.get(key, default))[0])
