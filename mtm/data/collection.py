"""Many recordings on disk: listed, chosen from and trained on without loading them all."""

from __future__ import annotations

import functools
import inspect
import json
import os
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import joblib
import numpy as np
from joblib.externals.loky.process_executor import BrokenProcessPool
from tqdm import tqdm

from mtm.data.download import USER, public
from mtm.session import Session, SessionError, VersionError, has_region, read_meta, reading_file

SHOWN = 10  # sessions in the short description


@dataclass(frozen=True)
class Entry:
    """What is known of a recording without reading its counts.

    Attributes:
        path: its file.
        name, subject, bin_size, window: as in :class:`~mtm.session.Session`.
        shape: (K, T, N) of the file.
        regions: (N,) of the neurons chosen.
        firing_rates: (N,) Hz, over all trials and bins, of the neurons chosen.
        neurons: (N,) their places in the file.
        provenance: where the recording comes from, and how it was prepared.
        stamp: size and time of change of the file, when it was listed.
    """

    path: Path
    name: str
    subject: str
    bin_size: float
    window: tuple[float, float]
    shape: tuple[int, int, int]
    regions: np.ndarray
    firing_rates: np.ndarray
    neurons: np.ndarray
    provenance: dict[str, Any]
    stamp: tuple[int, int]

    @classmethod
    def read(cls, path: Path) -> Entry:
        """The entry of a file that ``Session.save`` wrote."""
        with reading_file(path), np.load(path, allow_pickle=False) as file:
            meta = read_meta(file, path)
            listed = json.loads(str(file["listed"][()]))
            rates = np.array(listed["firing_rates"], dtype=np.float64)
            regions, shape = file["regions"], tuple(listed["shape"])
            if not rates.shape == regions.shape == shape[2:]:
                raise ValueError("its list of neurons does not fit its shape")
            "".join(regions.tolist()).lower()  # raises where they are no text
            if not isinstance(meta["name"], str) or not isinstance(meta["subject"], str):
                raise ValueError("its name or subject is no text")
            if not isinstance(meta["provenance"], dict) or not all(type(n) is int for n in shape):
                raise ValueError("its provenance is no dict, or its shape not of whole numbers")
            return cls(
                path,
                name=meta["name"],
                subject=meta["subject"],
                bin_size=meta["bin_size"],
                window=tuple(meta["window"]),
                shape=shape,
                regions=regions,
                firing_rates=rates,
                neurons=np.arange(len(regions)),
                provenance=meta["provenance"],
                stamp=stamp(path),
            )

    def column(self, name: str) -> np.ndarray:
        """A column of the file's table of neurons, of the neurons chosen (N,)."""
        with reading_file(self.path), np.load(self.path, allow_pickle=False) as file:
            if f"neurons/{name}" in file.files:
                return file[f"neurons/{name}"][self.neurons]
            known = [key.removeprefix("neurons/") for key in file.files if key[:8] == "neurons/"]
        raise SessionError(
            f"session {self.name!r}, neurons: no column {name!r} in {self.path}; there are {known}"
        )

    def keep(self, chosen: np.ndarray) -> Entry:
        """The entry with some (N,) bool of its neurons."""
        return replace(
            self,
            regions=self.regions[chosen],
            firing_rates=self.firing_rates[chosen],
            neurons=self.neurons[chosen],
        )

    def load(self, mmap: bool) -> Session:
        """The recording with the neurons chosen; those are copied if they are not all."""
        if not self.path.exists() or stamp(self.path) != self.stamp:
            raise SessionError(
                f"session {self.name!r}: {self.path} has changed since it was listed; list again"
            )
        session = Session.load(self.path, mmap=mmap)
        if len(self.neurons) == session.n_neurons:
            return session
        chosen = session.select(neurons=self.neurons)
        chosen.provenance = {k: v for k, v in chosen.provenance.items() if k != "prepared"}
        chosen.provenance["neurons chosen"] = f"{len(self.neurons)} of {session.n_neurons}"
        return chosen


def stamp(path: Path) -> tuple[int, int]:
    """Size (bytes) and time of change (ns) of a file; of a folder, those of all files in it."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    states = [file.stat() for file in files]
    latest = max((state.st_mtime_ns for state in states), default=0)
    return sum(state.st_size for state in states), latest


class Sessions(Sequence[Session]):
    """Many recordings on disk, as a sequence of sessions that are read when they are asked for.

    Listing them reads names, regions and firing rates, not counts; a session taken out of it has
    its counts on disk (``Session.load(path, mmap=True)``). ``fit`` takes a collection like any
    other sequence of sessions. An index may also be a session's name; a slice is a collection.

    Args:
        where: a folder (every ``.npz`` in it, by name), a file, or several files.
        mmap: leave counts on disk; ``False`` reads each session whole, when it is asked for.

    Raises:
        FileNotFoundError: no such file, or no ``.npz`` in the folder.
        SessionError: a file that is no session, or two sessions of the same name.

    Example:
        >>> sessions = Sessions("all").filter(regions=["CA1", "DG"], min_rate=1.0).save("chosen")
        >>> print(sessions.summary())
        >>> model = fit(sessions).model
    """

    def __init__(self, where: str | Path | Iterable[str | Path], *, mmap: bool = True) -> None:
        if isinstance(where, (str, Path)):
            folder = Path(where)
            paths = sorted(folder.glob("*.npz")) if folder.is_dir() else [folder]
        else:
            paths = [Path(path) for path in where]
        if not paths:
            raise FileNotFoundError(
                f"no session (*.npz) in {where}; Session.save and `python -m mtm prepare` make them"
            )
        self._start([Entry.read(path) for path in paths], mmap)
        first: dict[str, Path] = {}
        for entry in self.entries:
            if entry.name in first:
                raise SessionError(
                    f"{first[entry.name]} and {entry.path} both hold a session named "
                    f"{entry.name!r}; names must differ, leave one out"
                )
            first[entry.name] = entry.path

    def _start(self, entries: list[Entry], mmap: bool) -> Sessions:
        self.entries, self.mmap = entries, mmap
        return self

    def _with(self, entries: list[Entry]) -> Sessions:
        return Sessions.__new__(Sessions)._start(entries, self.mmap)

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int | str) -> Session: ...
    @overload
    def __getitem__(self, index: slice) -> Sessions: ...
    def __getitem__(self, index: int | str | slice) -> Session | Sessions:
        if isinstance(index, slice):
            return self._with(self.entries[index])
        if isinstance(index, str):
            if index not in self.names:
                raise KeyError(f"no session {index!r}; there are: {', '.join(self.names)}")
            index = self.names.index(index)
        return self.entries[index].load(self.mmap)

    def __contains__(self, session: object) -> bool:
        return (session.name if isinstance(session, Session) else session) in self.names

    def __iter__(self) -> Iterator[Session]:
        return (entry.load(self.mmap) for entry in self.entries)

    @property
    def names(self) -> list[str]:
        """Name of each session."""
        return [entry.name for entry in self.entries]

    def filter(
        self,
        *,
        regions: str | Iterable[str] | None = None,
        min_rate: float = 0.0,
        units: Mapping[str, Any] | None = None,
        min_neurons: int = 1,
        min_trials: int = 1,
    ) -> Sessions:
        """The neurons that pass, of the sessions that have enough of them.

        Nothing is read but what decides. A session that keeps only some of its neurons is copied
        into memory when it is taken out; :meth:`save` writes such a choice to disk for good.

        Args:
            regions: labels of the neurons to keep.
            min_rate: Hz, over all trials and bins.
            units: columns of the table of neurons: name -> the value to keep, or several, or a
                function from the column (N,) to bool, as ``{"label": 1}``, ``{"depth": lambda d:
                d > 1000}``.
            min_neurons: sessions that are left with fewer are left out.
            min_trials: sessions of fewer trials are left out.

        Raises:
            SessionError: a column that a session does not have, a rule that does not give one bool
                a neuron, or regions that no session has.
        """
        wanted = None if regions is None else {regions} if isinstance(regions, str) else {*regions}
        there = {label for entry in self.entries for label in entry.regions.tolist()}
        if wanted and not wanted & there:
            raise SessionError(f"no neuron is in {sorted(wanted)}; there are {sorted(there)}")
        chosen = []
        for entry in self.entries:
            passed = entry.firing_rates >= min_rate
            if wanted is not None:
                passed &= np.isin(entry.regions, sorted(wanted))
            for name, rule in (units or {}).items():
                column = entry.column(name)
                test = np.asarray(rule(column) if callable(rule) else np.isin(column, rule))
                if test.dtype != bool or test.shape != passed.shape:
                    raise SessionError(
                        f"session {entry.name!r}, neurons {name!r}: the rule gives {test.dtype} "
                        f"{test.shape}, not a bool for each of {len(passed)} neurons"
                    )
                passed &= test
            if passed.sum() >= min_neurons and entry.shape[0] >= min_trials:
                chosen.append(entry.keep(passed))
        return self._with(chosen)

    def save(self, folder: str | Path) -> Sessions:
        """Write every session, with the neurons chosen, into a folder; returns that collection.

        Raises:
            ValueError: where a file of this collection would be written over, or two into one.
        """
        paths = [Path(folder) / entry.path.name for entry in self.entries]
        sources = {entry.path.resolve() for entry in self.entries}
        if sources & {path.resolve() for path in paths}:
            raise ValueError(f"{folder} holds files of this collection; save into another folder")
        if len({path.name for path in paths}) < len(paths):
            raise ValueError("two files of this collection have the same name; rename one")
        for entry, path in zip(self.entries, paths, strict=True):
            entry.load(mmap=True).save(path)
        return Sessions(paths, mmap=self.mmap)

    def summary(self) -> str:
        """A table: a line a session."""
        return "\n".join([*_table(self.entries), self._total()])

    def _total(self) -> str:
        trials = sum(entry.shape[0] for entry in self.entries)
        neurons = sum(len(entry.neurons) for entry in self.entries)
        size = sum(np.prod(entry.shape[:2]) * len(entry.neurons) for entry in self.entries)
        subjects = len({entry.subject for entry in self.entries})
        return (
            f"{len(self)} sessions of {subjects} subjects: {trials:,} trials, {neurons:,} neurons, "
            f"{size / 1e9:.2f} GB of counts"
        )

    def __repr__(self) -> str:
        lines = _table(self.entries[:SHOWN])
        if len(self) > SHOWN:
            lines.append(f"... and {len(self) - SHOWN} more; summary() lists all")
        return "\n".join([*lines, self._total()])


HEADER = ("session", "subject", "trials", "bins", "neurons", "regions", "Hz")


def _table(entries: Sequence[Entry]) -> list[str]:
    rows = [HEADER, *map(_row, entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ["<", "<", ">", ">", ">", ">", ">"]
    return [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligned, widths, strict=True))
        for row in rows
    ]


def _row(entry: Entry) -> tuple[str, ...]:
    labels = {label for label in entry.regions.tolist() if has_region(label)}
    rate = f"{entry.firing_rates.mean():.1f}" if len(entry.firing_rates) else ""
    trials, bins, _ = entry.shape
    numbers = (trials, bins, len(entry.neurons), len(labels))
    return (entry.name[:36], entry.subject[:12], *map(str, numbers), rate)


SECRETS = ("password", "token")  # options of which no file says what they were
STALE = 24 * 3600.0  # seconds after which a half-written file belongs to nobody any more


@dataclass
class Outcome:
    """What became of one recording.

    Attributes:
        name: of the recording.
        status: "written", "there already" or "skipped".
        note: why it was skipped, or what it lacks.
        path: its file, where there is one.
        seconds: that it took.
        session: the session's own name, where there is a file.
    """

    name: str
    status: str
    note: str = ""
    path: Path | None = None
    seconds: float = 0.0
    session: str = ""


@dataclass
class Prepared:
    """What became of all recordings; prints as a table."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        """The files there are now, in the order of the recordings."""
        return [outcome.path for outcome in self.outcomes if outcome.path is not None]

    @property
    def skipped(self) -> dict[str, str]:
        """Name -> why, of the recordings that were left out."""
        return {o.name: o.note for o in self.outcomes if o.status == "skipped"}

    def __str__(self) -> str:
        counts = {status: 0 for status in ("written", "there already", "skipped")}
        for outcome in self.outcomes:
            counts[outcome.status] += 1
        total = ", ".join(f"{number} {status}" for status, number in counts.items())
        lines = []
        for outcome in self.outcomes:
            if outcome.status == "skipped" or outcome.note:
                lines.append(f"{outcome.status}: {outcome.name}")
                for line in outcome.note.splitlines():
                    lines += textwrap.wrap(
                        line, 74, initial_indent=" " * 4, subsequent_indent=" " * 4
                    )
        return "\n".join([*lines, f"{len(self.outcomes)} recordings: {total}"])


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
    """Make a session file of each recording.

    A recording whose file is there, made of the same recording (its name, size and time of change,
    if it is a file or a folder of files) by the same function with the same options, is left as it
    is; else, or with ``overwrite``, or where an option is a function, it is made again. One that
    cannot be read is skipped and said in the result; the others are not held up by it. What is no
    session file is never written over. A session that ``load`` gave no name is called as its file.

    Args:
        load: ``load(recording, **options)`` returns a Session. A function that ``pickle`` can send
            to another process, if there are several.
        recordings: name -> what ``load`` takes. Names are those of the files. Without names:
            paths, named by their last part without its ending, or ids, named by themselves.
        out: folder of the files.
        workers: processes; each holds one recording at a time in memory. Default: one for each
            core, but at most 4. With 1, all is done in this process.
        overwrite: make again what is there.
        progress: show a bar, in a terminal.
        **options: of ``load``. A file says of what and how it was made, but keeps no ``password``
            and no ``token``, and of addresses only what is public.

    Returns:
        what became of each recording, and the files there are.

    Raises:
        TypeError: options that ``load`` does not take.
        ValueError: two recordings of the same name, or one that no file can have.
        ImportError: what ``load`` needs is not installed.
        OSError: a file that cannot be written.
        RuntimeError: a process that was killed; what was written by then is there.

    Example:
        >>> files = sorted(Path("nwb").glob("*.nwb"))
        >>> done = prepare(nwb.load_session, files, "sessions", align="start_time")
        >>> print(done)
    """
    named = _names(recordings)
    if named:
        inspect.signature(load).bind(next(iter(named.values())), **options)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    workers = min(4, os.cpu_count() or 1, len(named) or 1) if workers is None else workers
    job = functools.partial(_prepare_one, load, out=out, overwrite=overwrite, options=options)
    outcomes = {}
    with tqdm(total=len(named), unit="session", disable=None if progress else True) as bar:
        for outcome in _run(job, named, workers):
            outcomes[outcome.name] = outcome
            bar.update(1)
            bar.set_postfix_str(f"{outcome.status} {outcome.name}")
    first: dict[str, str] = {}
    for outcome in (ordered := [outcomes[name] for name in named]):
        if outcome.path and first.setdefault(outcome.session, outcome.name) != outcome.name:
            same = f"its session is named {outcome.session!r}, as that of {first[outcome.session]}"
            outcome.note = f"{outcome.note}\n{same}; they cannot be used together".strip()
    return Prepared(ordered)


def _run(job: Callable[..., Outcome], named: dict[str, Any], workers: int) -> Iterator[Outcome]:
    if workers == 1:
        yield from (job(recording, name=name) for name, recording in named.items())
        return
    parallel = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1)
    try:
        yield from parallel(
            joblib.delayed(job)(recording, name=name) for name, recording in named.items()
        )
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that prepared a session was killed, most likely for want of memory; pass "
            "fewer workers and start again: what was written stays"
        ) from error


def _names(recordings: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    """Name -> recording."""
    if isinstance(recordings, (str, Path)):
        recordings = [recordings]
    if isinstance(recordings, Mapping):
        pairs = [(str(name), recording) for name, recording in recordings.items()]
    else:
        pairs = [(r.stem if isinstance(r, Path) else str(r), r) for r in recordings]
    named = dict(pairs)
    if len({name.lower() for name in named}) < len(pairs):  # some systems ignore case
        names = [name.lower() for name, _ in pairs]
        twice = next(name for name, _ in pairs if names.count(name.lower()) > 1)
        raise ValueError(f"two recordings are named {twice!r}; pass a mapping from distinct names")
    for name in named:
        if not name or name.startswith(".") or {"/", "\\", "\0"} & set(name):
            shown = public(name) if "://" in name else name
            raise ValueError(f"{shown!r} cannot be the name of a file; pass a mapping from names")
    return named


def _prepare_one(
    load: Callable[..., Session],
    recording: Any,
    *,
    name: str,
    out: Path,
    overwrite: bool,
    options: dict[str, Any],
) -> Outcome:
    """Make one file. What goes wrong while reading is the outcome; while writing, an error."""
    from mtm import __version__

    path, start = out / f"{name}.npz", time.perf_counter()
    made = {"mtm": __version__, **_identity(load, recording, options)}
    try:
        entry = _there(path, recording)
    except SessionError as error:
        return Outcome(name, "skipped", str(error))
    if entry is not None and not overwrite:
        before = entry.provenance.get("prepared", {})
        if all(before.get(key) == value for key, value in made.items() if key != "mtm"):
            text = "\n".join(before["notes"])
            return Outcome(name, "there already", text, path, session=entry.name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            session = load(recording, **options)
        except ImportError:
            raise
        except Exception as error:  # whatever it is, the other recordings are to go on
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return Outcome(name, "skipped", f"{kind}{error}", None, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    if not isinstance(session, Session):
        what = type(session).__name__
        return Outcome(name, "skipped", f"load returned {what}, not a Session", None, seconds)
    if session.name == "session":  # nobody named it
        session.name = name
    notes = dict.fromkeys(str(w.message) for w in said if issubclass(w.category, UserWarning))
    made |= {"notes": list(notes)}
    session.provenance = session.provenance | {"prepared": made}
    session.save(path)
    seconds = time.perf_counter() - start
    return Outcome(name, "written", "\n".join(notes), path, seconds, session.name)


def _identity(
    load: Callable[..., Session], recording: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """What a file was made of and how, as JSON: made alike, it need not be made again."""
    function = load.func if isinstance(load, functools.partial) else load
    what = recording
    if isinstance(recording, (str, Path)) and os.path.exists(recording):
        what = [Path(recording).name, *stamp(Path(recording))]  # wherever it lies by now
    elif isinstance(recording, str) and "://" in recording:
        # Its query may be a signature, or tell one recording from another; a password is neither.
        what = [public(recording), zlib.crc32(USER.sub("", recording).encode())]
    name = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
    made = {"load": name, "recording": what, "options": _without_secrets(options)}
    return json.loads(json.dumps(made, default=_plain))


def _without_secrets(value: Any) -> Any:
    """Options without passwords and tokens, and of addresses what is public."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if key not in SECRETS}
        return {key: _without_secrets(inner) for key, inner in kept.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(inner) for inner in value]
    return public(value) if isinstance(value, str) and "://" in value else value


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: the numbers of an array, else its text.

    Functions are alike to nothing, not even to themselves: what one does may have changed.
    """
    if callable(value):
        return f"{getattr(value, '__qualname__', value)}, in a run of {time.time_ns()}"
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _there(path: Path, recording: Any) -> Entry | None:
    """The session that is at this place; refuses to touch anything else that is there."""
    if not path.exists():
        return None
    if isinstance(recording, (str, Path)) and Path(recording).resolve() == path.resolve():
        raise SessionError(f"{path} is the recording itself; prepare into another folder")
    try:
        return Entry.read(path)
    except VersionError:
        return None
    except SessionError as error:
        raise SessionError(
            f"{path} is there, and is no session file or damaged; move it away, or prepare into "
            "another folder"
        ) from error


def _sweep(out: Path) -> None:
    """Remove what writers that were killed left behind."""
    for part in out.glob(".*.npz.*.part"):
        if time.time() - part.stat().st_mtime > STALE:
            part.unlink(missing_ok=True)
