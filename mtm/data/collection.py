"""Many recordings on disk: `prepare` makes a session file of each, `Sessions` lists and chooses."""

from __future__ import annotations

import functools
import json
import os
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import pandas as pd
from tqdm import tqdm

from mtm.data.recording import public
from mtm.inputs import SessionError
from mtm.session import Session, has_region, read_session_file

SECRETS = ("password", "token", "connection")  # options that no file keeps


class Entry(NamedTuple):
    """A recording, and what is known of it without reading its counts."""

    path: Path
    name: str
    subject: str
    shape: tuple[int, int, int]  # (K, T, N) of the file
    provenance: dict[str, Any]
    neurons: pd.DataFrame  # region and rate (Hz, over all trials and bins) of the neurons chosen

    @classmethod
    def read(cls, path: Path) -> Entry:
        """The entry of a file that ``Session.save`` wrote."""
        meta, arrays = read_session_file(path, only=("regions",))
        neurons = pd.DataFrame({"region": arrays["regions"], "rate": meta["firing_rates"]})
        who = meta["name"], meta["subject"], tuple(meta["shape"]), meta["provenance"]
        return cls(path, *who, neurons)

    def load(self) -> Session:
        """The recording with the neurons chosen; those are copied if they are not all."""
        session = Session.load(self.path, mmap=True)
        if session.counts.shape != self.shape:
            problem = f"{self.path} has changed since it was listed; list again"
            raise SessionError(f"session {self.name!r}: {problem}")
        if len(self.neurons) == session.n_neurons:
            return session
        chosen = session.select(neurons=self.neurons.index.to_numpy())
        origin = {"prepared": {}, "neurons chosen": f"{len(self.neurons)} of {session.n_neurons}"}
        chosen.provenance = chosen.provenance | origin  # it is no longer what `prepare` wrote
        return chosen


class Sessions(Sequence[Session]):
    """Many recordings on disk, as a sequence of sessions; an index may be a name, too.

    A session taken out of it leaves its counts on disk (``Session.load(path, mmap=True)``).

    Args:
        where: a folder (every ``.npz`` in it, by name), a file, or several of them.

    Raises:
        FileNotFoundError: no such file, or no ``.npz`` in the folder.
        SessionError: a file that is no session, or two sessions of the same name.
    """

    def __init__(self, where: str | Path | Iterable[str | Path]) -> None:
        paths: list[Path] = []
        for path in map(Path, [where] if isinstance(where, (str, Path)) else where):
            paths += sorted(path.glob("[!.]*.npz")) if path.is_dir() else [path]
        if not paths:
            remedy = "Session.save and `python -m mtm prepare` make them"
            raise FileNotFoundError(f"no session (*.npz) in {where}; {remedy}")
        self.entries = [Entry.read(path) for path in paths]
        if twice := [name for name, n in Counter(self.names).items() if n > 1]:
            both = " and ".join(str(e.path) for e in self.entries if e.name == twice[0])
            raise SessionError(f"{both} both hold a session named {twice[0]!r}; leave one out")

    @classmethod
    def _of(cls, entries: list[Entry]) -> Sessions:
        chosen = cls.__new__(cls)
        chosen.entries = entries
        return chosen

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int | str | slice) -> Any:
        if isinstance(index, slice):
            return self._of(self.entries[index])
        if isinstance(index, str):
            if index not in self.names:
                raise KeyError(f"no session {index!r}; there are: {', '.join(self.names)}")
            index = self.names.index(index)
        return self.entries[index].load()

    @property
    def names(self) -> list[str]:
        """Name of each session."""
        return [entry.name for entry in self.entries]

    def filter(
        self, *, regions: str | Iterable[str] = (), min_rate: float = 0.0, min_neurons: int = 1
    ) -> Sessions:
        """The neurons of some regions and of ``min_rate`` Hz or more, where they are enough.

        A session that keeps only some of its neurons is copied into memory when it is taken out;
        :meth:`save` writes such a choice to disk for good.
        """
        wanted = [regions] if isinstance(regions, str) else [*regions]
        known = {label for entry in self.entries for label in entry.neurons["region"]}
        if wanted and known.isdisjoint(wanted):
            raise SessionError(f"no neuron is in {sorted(wanted)}; there are {sorted(known)}")
        chosen = []
        for entry in self.entries:
            passed = entry.neurons[entry.neurons["rate"] >= min_rate]
            passed = passed[passed["region"].isin(wanted)] if wanted else passed
            if len(passed) >= min_neurons:
                chosen.append(entry._replace(neurons=passed))
        return self._of(chosen)

    def save(self, folder: str | Path) -> Sessions:
        """Write every session, with the neurons chosen, into a folder; returns that collection."""
        paths = [Path(folder) / entry.path.name for entry in self.entries]
        if any(path.exists() for path in paths) or len(set(paths)) < len(paths):
            raise ValueError(f"{folder} has files of these names; save into another folder")
        return Sessions([s.save(path) for s, path in zip(self, paths, strict=True)])

    def to_frame(self) -> pd.DataFrame:
        """A table with one row per session."""
        columns = ["session", "subject", "trials", "bins", "neurons", "regions", "Hz"]
        rows = []
        for _, name, subject, (n_trials, n_bins, _), _, neurons in self.entries:
            n_regions = sum(map(has_region, neurons["region"].unique()))
            rate = neurons["rate"].mean().round(1)
            rows.append((name, subject, n_trials, n_bins, len(neurons), n_regions, rate))
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        table = self.to_frame()
        who = f"{len(table)} sessions of {table['subject'].nunique()} subjects"
        size = f"{table['trials'].sum():,} trials, {table['neurons'].sum():,} neurons"
        return f"{table.to_string(index=False, max_rows=10)}\n{who}: {size}"


class Outcome(NamedTuple):
    """What became of one recording."""

    name: str
    status: str  # "written", "there already" or "skipped"
    note: str = ""  # why, or warnings
    path: Path | None = None  # of the file, if it is there


class Prepared(NamedTuple):
    """What became of all recordings; prints as a list of what was skipped or lacks something."""

    outcomes: list[Outcome]

    @property
    def paths(self) -> list[Path]:
        """The files there are now, in the order of the recordings."""
        return [outcome.path for outcome in self.outcomes if outcome.path is not None]

    @property
    def skipped(self) -> dict[str, str]:
        """Name -> why, of the recordings that were left out."""
        return {o.name: o.note for o in self.outcomes if o.status == "skipped"}

    def __str__(self) -> str:
        noted = [o for o in self.outcomes if o.note]
        lines = [f"{o.status}: {o.name}\n{textwrap.indent(o.note, '    ')}" for o in noted]
        statuses = [outcome.status for outcome in self.outcomes]
        counts = [f"{statuses.count(s)} {s}" for s in ("written", "there already", "skipped")]
        return "\n".join([*lines, f"{len(statuses)} recordings: {', '.join(counts)}"])


def prepare(
    load: Callable[..., Session],
    recordings: Mapping[str, Any] | Iterable[Any],
    out: str | Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Prepared:
    """Make a session file of each recording; called again, it resumes.

    A file made of the same recording (its name, size and time of change) by the same function with
    the same options is left as it is, and so is a file that is no session. A recording that cannot
    be read is skipped and listed. A session without a name of its own gets its file's.

    Args:
        load: ``load(recording, **options)`` returns a Session.
        recordings: name of the file -> what ``load`` takes. Or without names: paths, named by their
            last part without its ending, and by the folders above it where two are alike; URLs; or
            ids, named by themselves.
        out: folder of the files.
        workers: processes; default one for each core, but at most 4.
        overwrite: make again what is there.
        progress: show a bar, in a terminal.
        **options: of ``load``. The file keeps them, without ``password`` and ``token``.

    Raises:
        ValueError: two recordings of the same name.
        RuntimeError: a process was killed, mostly because memory ran out; use fewer workers.

    Example:
        >>> files = sorted(Path("nwb").glob("*.nwb"))
        >>> print(prepare(nwb.load_session, files, "sessions", align="start_time"))
    """
    named = _names(recordings)
    Path(out).mkdir(parents=True, exist_ok=True)
    workers = min(4, os.cpu_count() or 1, len(named) or 1) if workers is None else workers
    job = functools.partial(_prepare_one, load, options, Path(out), overwrite)
    done = joblib.Parallel(workers, return_as="generator", batch_size=1)(
        joblib.delayed(job)(*each) for each in named.items()
    )
    shown = None if progress else True  # None: on a terminal
    return Prepared(list(tqdm(done, total=len(named), unit="session", disable=shown)))


def _names(recordings: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    """Name -> recording."""
    if isinstance(recordings, Mapping):
        return dict(recordings)
    listed = [recordings] if isinstance(recordings, (str, Path)) else list(recordings)
    names = [""] * len(listed)
    for depth in range(1, 6):  # as many folders above as it takes: a sorter calls each "output"
        n, pairs = Counter(names), zip(names, listed, strict=True)
        names = [name if name and n[name] == 1 else _name(each, depth) for name, each in pairs]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise ValueError(f"two recordings are named {twice[0]!r}; pass a mapping from names")
    return dict(zip(names, listed, strict=True))


def _name(recording: Any, depth: int) -> str:
    """A path's last parts, without its ending; of an address what is public, not too long."""
    if isinstance(recording, Path) or (isinstance(recording, str) and os.path.exists(recording)):
        path = Path(recording).absolute()
        return "_".join([*path.parts[:-1], path.name if path.is_dir() else path.stem][-depth:])
    text = str(recording)
    return re.sub(r"\W+", "-", public(text))[-100:].strip("-") if "://" in text else text


def _prepare_one(
    load: Callable[..., Session],
    options: dict[str, Any],
    out: Path,
    overwrite: bool,
    name: str,
    recording: Any,
) -> Outcome:
    """Make one file. An error while reading is the outcome; an error while writing is raised."""
    path, origin = out / f"{name}.npz", _origin(load, recording, options)
    try:
        before = Entry.read(path).provenance.get("prepared", {}) if path.exists() else {}
    except SessionError as error:
        return Outcome(name, "skipped", f"{error}; it is not written over, move it away")
    if not overwrite and all(before.get(key) == value for key, value in origin.items()):
        return Outcome(name, "there already", "\n".join(before["notes"]), path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            session = load(recording, **options)
        except ImportError:
            raise
        except Exception as error:  # whatever it is, the other recordings are to go on
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return Outcome(name, "skipped", f"{kind}{error}")
    messages = (str(w.message) for w in caught if issubclass(w.category, UserWarning))
    notes = list(dict.fromkeys(messages))
    if session.name in ("session", Path(str(recording)).name):  # a reader's default
        session.name = name
    session.provenance = session.provenance | {"prepared": {**origin, "notes": notes}}
    for partial in out.glob(f".{path.name}.*.part"):
        partial.unlink()  # left behind by a process that was killed
    return Outcome(name, "written", "\n".join(notes), session.save(path))


def _origin(
    load: Callable[..., Session], recording: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """What a file was made of and how, as JSON: if it is the same, it need not be made again."""
    call = load if isinstance(load, functools.partial) else functools.partial(load)
    made = {
        "load": f"{call.func.__module__}.{call.func.__qualname__}",
        "recording": _shown(recording),
        "arguments": _shown(call.args),
        "options": {
            k: _shown(value) for k, value in (call.keywords | options).items() if k not in SECRETS
        },
    }
    # What JSON cannot hold: arrays and numpy's numbers have tolist; the words for other objects may
    # hold their address in memory, which is another each time.
    text = json.dumps(
        made,
        default=lambda x: x.tolist() if hasattr(x, "tolist") else re.sub(" at 0x.*", "", f"{x}"),
    )
    return json.loads(text)


def _shown(value: Any) -> Any:
    """Name, size and time of change of what is on disk; of an address what is public."""
    if isinstance(value, (str, Path)) and os.path.exists(value):
        path = Path(value)
        facts = [f.stat() for f in [path, *path.rglob("*")] if f.is_file()]
        size, latest = sum(f.st_size for f in facts), max((f.st_mtime_ns for f in facts), default=0)
        return [path.name, size, latest]
    if isinstance(value, Mapping):
        return {str(key): _shown(each) for key, each in value.items()}
    return public(value) if isinstance(value, str) and "://" in value else value
