"""NWB files, on disk or streamed from an archive such as DANDI: a path or URL in, a Session out.

Files of NWB 2 are read with h5py as they lie on disk (units, ``intervals/trials``, electrodes,
TimeSeries: the same places in every version 2.x). So a file opens even where it uses extensions
that are not installed or lacks something that is required elsewhere in it; there are no warnings
about namespaces; and of a remote file only the datasets that are used are fetched.

Where things come from (`describe` lists the names that a file has):

- Regions, the argument ``region``: a column of the units table; or ``"electrodes/<column>"`` of the
  electrodes table, the label that most of a unit's electrodes have (unlabelled ones have no vote;
  on a tie the first listed); or ``"electrode_group/location"``. "auto" is the first of
  `REGION_SOURCES` that labels any unit. A unit's electrodes are in its column ``electrodes``, else
  it is the one whose id is ``peak_channel_id`` (Allen Institute). No label is "".
- ``behaviour``: columns of the trials table. By default all with one number or boolean a trial,
  except those called ``*time`` or ``*times``. A column of text must be asked for; it becomes codes
  0, 1, ... of its sorted levels, which ``provenance["levels"]`` lists. Empty text is NaN.
- ``traces``: any TimeSeries, averaged in each bin, conversion and offset applied. Where a name
  occurs twice, more of the path tells which: ``"Position/head"``, even
  ``"processing/behavior/Position/head"``. ``"head[0]"`` is the first column of several. (The mean
  of an angle is wrong in bins where it jumps from 2 pi to 0: bin its sine and cosine yourself.)

What is mended, and counted in ``Session.provenance``: spikes at NaN or infinite times are dropped,
with a warning; trials without the event are left out. What is mended silently: unsorted spikes and
samples are sorted, infinite behaviour counts as missing (NaN), unit ids may repeat (neurons are
rows of the units table). Negative times are times before the file's reference time, and stay.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mtm.data.download import public, time_limit
from mtm.data.recording import ordered_samples
from mtm.files import optional as extra
from mtm.session import Session, SessionError, has_region

REGION_SOURCES = (
    "electrodes/location",
    *("location", "brain_area", "brain_region", "region", "area"),
    "electrode_group/location",
)
ELECTRODES = "general/extracellular_ephys/electrodes"
SERIES_FOLDERS = ("acquisition", "processing", "stimulus/presentation", "analysis")
FACTS = {  # key of Session.provenance: place in the file
    **{key: key for key in ("identifier", "session_start_time")},
    **{key: f"general/{key}" for key in ("session_id", "lab", "institution")},
    **{"subject": "general/subject/subject_id", "species": "general/subject/species"},
}
TIMEOUT = 30.0  # seconds that a server may be silent; remfile tries nine times


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
            assets/<asset id>/download/``. A URL is streamed; the server must serve byte ranges, and
            may be silent for `TIMEOUT` seconds.
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
        with one number or text a unit. Splits go by the rows of the trials table.

    Raises:
        SessionError: naming session, dataset and remedy, whatever the file holds.
        ImportError: without the ``[nwb]`` extra.
    """
    with _opened(source, name) as recording:
        fields = _unit_fields(recording, units, region)
        fields |= _trial_fields(recording, trials, align, behaviour)
        fields["traces"] = _traces(recording, traces, taken=fields["behaviour"])
    fields |= {"name": recording.name, "subject": recording.facts["subject"]}
    fields["provenance"] = recording.facts
    session = Session.from_spike_times(window=window, bin_size=bin_size, **fields)
    for key in fields["traces"]:
        if np.isnan(session.behaviour[key]).all():
            recording.warn(f"trace {key!r}", "all NaN: no samples in trials, or over 0.2 s apart")
    if dropped := recording.facts["spikes dropped"]:
        recording.warn("units/spike_times", f"dropped {dropped} spikes at NaN or infinite times")
    return session


def describe(source: str | Path) -> str:
    """What a file holds, by the names that `load_session` takes: some lines of text.

    Of a table's columns, those that are not called "(many)" have one value a row.

    Args:
        source: path or URL, as in `load_session`.

    Raises:
        SessionError: where the file cannot be read.
    """
    with _opened(source, None) as recording:
        lines = [f"{recording.name!r}, subject {recording.facts['subject'] or 'not named'}"]
        tables = [f"intervals/{key}" for key in recording.file.get("intervals", ())]
        for path in ("units", ELECTRODES, *tables):
            table = _Table(recording, path)
            if not table.n and path != "units":
                continue
            one = [f"{key} (text)" if text else key for key, text in table.scalars.items()]
            more = [f"{key} (many)" for key in table.columns if key not in table.scalars]
            lines.append(f"{path}: {table.n} rows; columns " + ", ".join(one + more))
            if path == "units":
                labels, place = _regions(recording, table, "auto")
                sizes = ", ".join(f"{key or 'none'} {n}" for key, n in Counter(labels).items())
                lines.append(f"regions, from {place}: {sizes}")
        for path, group in recording.series().items():
            data = group["data"]
            lines.append(f"series {path}: shape {data.shape}, unit {data.attrs.get('unit', '?')}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------ the file


class _Recording:
    """An open file: its datasets, and errors that name it."""

    def __init__(self, source: str, name: str | None) -> None:
        self.remote = source.lower().startswith(("http://", "https://"))
        self.source = public(source) if self.remote else source
        self.name = self.source if name is None else name
        self.file: Any = None
        self.facts: dict[str, Any] = {"origin": "NWB", "source": self.source}  # provenance

    def fail(self, dataset: str, problem: str) -> NoReturn:
        raise SessionError(f"session {self.name!r}, {dataset}: {problem}")

    def warn(self, dataset: str, problem: str) -> None:
        warnings.warn(f"session {self.name!r}, {dataset}: {problem}", stacklevel=3)

    def read(self, dataset: Any, part: Any = ()) -> np.ndarray:
        """A dataset, or part of it; text as str."""
        if extra("h5py", "nwb").check_string_dtype(dataset.dtype) is None:
            return np.asarray(dataset[part])
        return np.asarray(dataset.asstr(errors="replace")[part]).astype(np.str_)

    def text(self, path: str) -> str:
        """A text dataset with one entry; "" where there is none."""
        dataset = self.file.get(path)
        single = getattr(dataset, "size", 0) == 1
        return str(self.read(dataset).ravel()[0]).strip() if single else ""

    def series(self) -> dict[str, Any]:
        """Path -> group of every TimeSeries: whatever has data with times."""
        found: dict[str, Any] = {}

        def look(group: Any, path: str, depth: int) -> None:
            if hasattr(group.get("data"), "shape") and {"timestamps", "starting_time"} & set(group):
                found[path] = group
            elif depth:  # links can form rings
                for key, item in group.items():
                    if hasattr(item, "keys"):
                        look(item, f"{path}/{key}", depth - 1)

        for folder in SERIES_FOLDERS:
            look(self.file.get(folder, {}), folder, 4)
        return found


@contextmanager
def _opened(source: Any, name: str | None) -> Iterator[_Recording]:
    """The open file; whatever goes wrong with it becomes a SessionError."""
    recording = _Recording(str(source), name)
    h5py = extra("h5py", "nwb")
    try:
        if not recording.remote and not Path(str(source)).is_file():
            recording.fail(repr(str(source)), "no such file; pass its path or its http(s) URL")
        with _source(recording, source) as stream, h5py.File(stream, "r") as recording.file:
            if "nwb_version" not in recording.file.attrs:
                recording.fail("nwb_version", "missing, so not a file of NWB 2; convert it")
            recording.facts |= {key: recording.text(path) for key, path in FACTS.items()}
            if name is None:
                recording.name = recording.facts["identifier"] or Path(recording.source).name
            yield recording
    except (SessionError, ImportError):
        raise
    except Exception as error:  # h5py, remfile, requests and numpy raise all sorts
        problem = f"cannot be read ({type(error).__name__}: {public(str(error))})"
        remedy = "try again, or pass the path of a copy" if recording.remote else "get it anew"
        text = f"session {recording.name!r}, file: {problem}; {remedy}: {recording.source}"
        raise SessionError(text) from None  # that error may quote a signature


@contextmanager
def _source(recording: _Recording, source: Any) -> Iterator[Any]:
    """What h5py opens: a path, or a file object that fetches what is read of it.

    remfile alone tries for 25 s where nothing is, does not see that a server ignores ranges, and
    waits for ever for one that is silent.
    """
    if not recording.remote:
        yield str(source)
        return
    remfile, requests = extra("remfile", "nwb"), extra("requests", "nwb")
    with time_limit(TIMEOUT):
        with requests.get(str(source), headers={"Range": "bytes=0-7"}, stream=True) as reply:
            if reply.status_code != 206:
                recording.fail(recording.source, f"the server answers {reply.status_code}, not 206 "
                               "(a byte range); check the address (has it expired, must it be "
                               "signed?) or download the file and pass its path")  # fmt: skip
            url = reply.url  # behind redirects, which cost time each
        yield remfile.File(url)


class _Table:
    """A DynamicTable: which columns it has, and their content; empty where there is none."""

    def __init__(self, recording: _Recording, path: str) -> None:
        h5py = extra("h5py", "nwb")
        self.recording, self.path = recording, path
        group = recording.file.get(path) or {}
        found = {key: item for key, item in group.items() if hasattr(item, "shape")}
        self.id = recording.read(found.pop("id")) if found else np.zeros(0, np.int64)
        self.n = len(self.id)
        self.index = {key: found[f"{key}_index"] for key in found if f"{key}_index" in found}
        indices = {f"{key}_index" for key in self.index}
        self.columns = {key: item for key, item in found.items() if key not in indices}
        self.scalars = {  # those with one number or text a row -> whether it is text
            key: text
            for key, item in self.columns.items()
            if item.shape == (self.n,) and key not in self.index and "table" not in item.attrs
            and ((text := h5py.check_string_dtype(item.dtype) is not None)
                 or item.dtype.kind in "uifb")
        }  # fmt: skip

    def need(self, name: str) -> np.ndarray:
        """A column of `scalars`, (n,), or an error that lists them."""
        if name not in self.scalars:
            self.recording.fail(f"{self.path}/{name}", "no such column with a number or text a "
                                f"row; there are {list(self.scalars)}")  # fmt: skip
        return self.recording.read(self.columns[name])

    def ragged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """All values (S,) of a column, and the row (S,) of each; one a row if it has no index."""
        values, ends = self.recording.read(self.columns[name]), np.arange(1, self.n + 1)
        if name in self.index:
            ends = self.recording.read(self.index[name]).astype(np.int64)
        sizes = np.diff(ends, prepend=0)
        if len(sizes) != self.n or np.any(sizes < 0) or (sizes.sum(),) != values.shape:
            self.recording.fail(f"{self.path}/{name}_index", f"does not divide {values.shape} "
                                f"values among {self.n} rows; get the file anew")  # fmt: skip
        return values, np.repeat(np.arange(self.n), sizes)


# ------------------------------------------------------------------------- units, regions


def _unit_fields(recording: _Recording, units: Any, region: str | None) -> dict[str, Any]:
    """What `Session.from_spike_times` needs of the units."""
    table = _Table(recording, "units")
    if not table.n or "spike_times" not in table.index:
        recording.fail("units/spike_times", "no units, or no index that says whose the spikes are; "
                       "choose a file with sorted spikes")  # fmt: skip
    keep = _kept(recording, table, units)
    labels, place = _regions(recording, table, region)
    times, rows = table.ragged("spike_times")
    finite = np.isfinite(times)
    recording.facts |= {"units dropped": int(np.sum(~keep)), "spikes dropped": int(np.sum(~finite))}
    recording.facts["regions"] = place
    used = keep[rows] & finite
    return {
        "spike_times": times[used].astype(np.float64),
        "spike_clusters": rows[used],
        "clusters": np.flatnonzero(keep),
        "regions": labels[keep],
        "neurons": {key: table.need(key)[keep] for key in table.scalars}
        | {"cluster": table.id[keep]},
    }


def _kept(recording: _Recording, table: _Table, units: Mapping[str, Any] | None) -> np.ndarray:
    """The units to use, (N,) bool."""
    keep = np.ones(table.n, dtype=bool)
    for column, wanted in ({} if units is None else units).items():
        values = table.need(column)
        try:
            test = np.asarray(wanted(values) if callable(wanted) else np.isin(values, wanted))
        except Exception as error:
            recording.fail(f"units/{column}", f"the filter fails ({error!r}); mend it")
        if test.dtype != bool or test.shape != keep.shape or not np.any(keep & test):
            levels = ", ".join(map(repr, np.unique(values)[:8].tolist()))
            recording.fail(f"units/{column}", f"the filter leaves no unit, or is not ({table.n},) "
                           f"booleans; there are {levels}")  # fmt: skip
        keep &= test
    return keep


def _regions(
    recording: _Recording, table: _Table, region: str | None
) -> tuple[np.ndarray, str | None]:
    """The label of each unit, (N,), and where they are from."""
    for source in REGION_SOURCES if region == "auto" else (region,) if region else ():
        if (labels := _labels(recording, table, source)) is not None:
            labels = np.char.strip(labels.astype(np.str_))
            if region != "auto" or any(map(has_region, labels)):
                return labels, source
    if region not in ("auto", None):
        recording.fail(f"regions from {region}", "no such labels; pass None, 'electrodes/<column "
                       f"of the electrodes>', or one of {list(table.scalars)}")  # fmt: skip
    return np.full(table.n, ""), None


def _labels(recording: _Recording, table: _Table, source: str) -> np.ndarray | None:
    """Labels (N,) from one source; None where the file does not have it."""
    if source.startswith("electrodes/"):
        return _electrode_labels(recording, table, source.removeprefix("electrodes/"))
    if source == "electrode_group/location" and "electrode_group" in table.columns:
        references = recording.read(table.columns["electrode_group"])
        labels = [recording.file[group].attrs.get("location", "") for group in references]
        return np.array([x.decode(errors="replace") if isinstance(x, bytes) else x for x in labels])
    return table.need(source) if source in table.scalars else None


def _electrode_labels(recording: _Recording, table: _Table, column: str) -> np.ndarray | None:
    """The label that most electrodes of a unit have, (N,); None where the file has none."""
    electrodes = _Table(recording, ELECTRODES)
    if column not in electrodes.scalars:
        return None
    if "electrodes" in table.columns:
        places, units = table.ragged("electrodes")
    elif "peak_channel_id" in table.scalars:
        row_of = {electrode: row for row, electrode in enumerate(electrodes.id.tolist())}
        peaks = table.need("peak_channel_id").tolist()
        units = np.array([unit for unit, peak in enumerate(peaks) if peak in row_of], np.int64)
        places = np.array([row_of[peak] for peak in peaks if peak in row_of], np.int64)
    else:
        return None
    if np.any((places < 0) | (places >= electrodes.n)):
        recording.fail("units/electrodes", f"not rows of the {electrodes.n} electrodes; pass "
                       "region=None or a column of the units table")  # fmt: skip
    labels = np.char.strip(electrodes.need(column).astype(np.str_)).tolist()
    votes: list[Counter[str]] = [Counter() for _ in range(table.n)]
    for unit, place in zip(units.tolist(), places.tolist(), strict=True):
        if has_region(labels[place]):
            votes[unit][labels[place]] += 1
    chosen = [max(vote, key=vote.__getitem__, default="") for vote in votes]  # tie: first listed
    return np.array(chosen)


# ------------------------------------------------------------- trials, behaviour, traces


def _trial_fields(recording: _Recording, trials: str, align: Any, behaviour: Any) -> dict[str, Any]:
    """What `Session.from_spike_times` needs of the trials: those whose event has a time."""
    table, what = None, "align"
    if isinstance(align, str):
        table, what = _Table(recording, f"intervals/{trials}"), f"intervals/{trials}/{align}"
        if not table.n:
            others = list(recording.file.get("intervals", ()))
            recording.fail(table.path, f"no rows; pass trials=, one of {others}, or for windows "
                           "in a row align=np.arange(start, stop, length)")  # fmt: skip
    times = np.asarray(align) if table is None else table.need(align)
    if times.dtype.kind not in "uif" or times.ndim != 1 or not np.isfinite(times).any():
        recording.fail(what, f"{times.dtype} {times.shape} without any time; name a column of "
                       "seconds, or pass (K,) seconds")  # fmt: skip
    rows = np.flatnonzero(np.isfinite(times))
    recording.facts["align"] = "given times" if table is None else align
    counted = {"recorded": len(times), "without the event": len(times) - len(rows)}
    recording.facts["trials"] = counted
    return {
        "align_times": times[rows].astype(np.float64),
        "trial_ids": rows,
        "n_recorded": len(times),
        "behaviour": _behaviour(recording, table, rows, behaviour),
    }


def _behaviour(
    recording: _Recording, table: _Table | None, rows: np.ndarray, behaviour: Any
) -> dict[str, np.ndarray]:
    """Columns (K,) of the trials."""
    recording.facts["levels"] = levels = {}
    if table is None:
        if behaviour:
            recording.fail("behaviour", "is of trials, and align gives other times; pass align, a "
                           "column of the trials table, or no behaviour")  # fmt: skip
        return {}
    if behaviour is None:
        numbers = [key for key, text in table.scalars.items() if not text]
        behaviour = [key for key in numbers if not re.search(r"times?$", key.lower())]
    columns = {}
    for key, column in _names(behaviour).items():
        values = table.need(column)[rows]
        if values.dtype.kind == "U":
            present, codes = np.unique(values, return_inverse=True)
            levels[key] = present[present != ""].tolist()
            gap = len(present) - len(levels[key])  # "" sorts first
            values = np.where(codes < gap, np.nan, codes - gap)
        elif values.dtype.kind == "f":
            values = np.where(np.isfinite(values), values, np.nan)
        columns[key] = values.astype(np.int64) if values.dtype == bool else values
    return columns


def _names(wanted: Mapping[str, str] | Collection[str] | str) -> dict[str, str]:
    """{our name: name in the file}."""
    if isinstance(wanted, Mapping):
        return dict(wanted)
    return {key: key for key in ([wanted] if isinstance(wanted, str) else wanted)}


def _traces(
    recording: _Recording, traces: Any, taken: Collection[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Times and values (S',) of each trace."""
    wanted, found, series = _names(traces), {}, {}
    if twice := sorted(set(wanted) & set(taken)):
        recording.fail("traces", f"{twice} are behaviour too; rename: {{new name: series}}")
    known = recording.series() if wanted else {}
    for key, name in wanted.items():
        path, column = _find(recording, known, str(name))
        found[key] = path if column is None else f"{path}[{column}]"
        series[key] = ordered_samples(*_samples(recording, known[path], path, column))
    recording.facts["traces"] = found
    return series


def _find(recording: _Recording, known: dict[str, Any], name: str) -> tuple[str, int | None]:
    """Path of the series that a name means, and the column."""
    ((end, number),) = re.findall(r"^(.*?)(?:\[(\d+)\])?\Z", name, re.DOTALL)
    paths = [path for path in known if f"/{path}".endswith(f"/{end}")]
    paths = [path for path in paths if path == end] or paths
    if not paths:
        recording.fail(f"series {name!r}", f"not in the file; traces can be of {sorted(known)}")
    if len(paths) > 1:
        recording.fail(f"series {name!r}", f"could be any of {paths}; give more of the path")
    return paths[0], int(number) if number else None


def _samples(
    recording: _Recording, group: Any, path: str, column: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Times and values (S,) of one column of a series, as they are in the file."""
    data, shape = group["data"], group["data"].shape
    width = shape[1] if len(shape) == 2 else 1
    if len(shape) > 2 or (column or 0) >= width or (column is None and width != 1):
        recording.fail(f"{path}/data", f"shape {shape}; name one column, as in "
                       f"'{path.rpartition('/')[2]}[0]', of those over time")  # fmt: skip
    part = (slice(None), column or 0) if len(shape) == 2 else ()
    values = recording.read(data, part).astype(np.float64)
    scale = _attribute(data, "conversion", 1.0)
    if "channel_conversion" in group:
        scale *= float(recording.read(group["channel_conversion"])[column or 0])
    if hasattr(group.get("timestamps"), "shape"):
        times = recording.read(group["timestamps"])
    else:
        start, rate = group["starting_time"], _attribute(group["starting_time"], "rate", np.nan)
        if not 0 < rate < np.inf:
            recording.fail(f"{path}/starting_time", f"sampled at {rate} Hz; leave it out")
        times = float(recording.read(start)) + np.arange(len(values)) / rate
    if times.shape != values.shape:
        recording.fail(path, f"{times.shape} times for {values.shape} samples; leave it out")
    return times, values * scale + _attribute(data, "offset", 0.0)


def _attribute(dataset: Any, key: str, default: float) -> float:
    """A number stored with a dataset, be it alone or in an array."""
    return float(np.ravel(dataset.attrs.get(key, default))[0])
