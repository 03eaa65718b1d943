"""Many recordings on disk: prepared from raw data, listed, chosen from, trained on without loading.

`prepare` makes a session file of each recording, in several processes; `Sessions` lists such files
without reading their counts.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import joblib
import numpy as np
import pandas as pd
from joblib.externals.loky.process_executor import BrokenProcessPool
from tqdm import tqdm

from mtm.data.recording import public
from mtm.session import Session, SessionError, has_region, read_session_file

SECRETS = ("password", "token")  # options that no file keeps


@dataclass(frozen=True)
class Entry:
    """A recording, as far as it is known without reading its counts.

    ``shape`` (K, T, N) is that of the file; ``neurons`` (N',) are the chosen ones' places in it,
    ``regions`` and ``firing_rates`` (Hz, over all trials and bins) theirs.
    """

    path: Path
    name: str
    subject: str
    shape: tuple[int, int, int]
    regions: np.ndarray
    firing_rates: np.ndarray
    neurons: np.ndarray
    provenance: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Entry:
        """The entry of a file that ``Session.save`` wrote."""
        meta, arrays = read_session_file(path, only=("regions",))
        return cls(
            path=path,
            **{key: meta[key] for key in ("name", "subject", "provenance")},
            regions=arrays["regions"],
            shape=tuple(meta["shape"]),
            firing_rates=np.array(meta["firing_rates"]),
            neurons=np.arange(meta["shape"][2]),
        )

    def load(self) -> Session:
        """The recording with the neurons chosen; those are copied if they are not all."""
        session = Session.load(self.path, mmap=True)
        if session.counts.shape != self.shape:
            raise SessionError(
                f"session {self.name!r}: {self.path} has changed since it was listed; list again"
            )
        if len(self.neurons) == session.n_neurons:
            return session
        chosen = session.select(neurons=self.neurons)
        # It is no longer what `prepare` wrote.
        chosen.provenance = {k: v for k, v in chosen.provenance.items() if k != "prepared"}
        chosen.provenance["neurons chosen"] = f"{len(self.neurons)} of {session.n_neurons}"
        return chosen


class Sessions(Sequence[Session]):
    """Many recordings on disk, as a sequence of sessions that are read when they are asked for.

    Listing them reads names, regions and firing rates; a session taken out of it has its counts on
    disk (``Session.load(path, mmap=True)``). ``fit`` and ``evaluate`` take a collection like any
    other sequence of sessions. An index may also be a session's name; a slice is a collection.

    Args:
        where: a folder (every ``.npz`` in it, by name), a file, or several files.

    Raises:
        FileNotFoundError: no such file, or no ``.npz`` in the folder.
        SessionError: a file that is no session, or two sessions of the same name.

    Example:
        >>> sessions = Sessions("all").filter(regions=["CA1", "DG"], min_rate=1.0).save("chosen")
        >>> model = fit(sessions).model
    """

    def __init__(self, where: str | Path | Iterable[str | Path]) -> None:
        if isinstance(where, (str, Path)):
            folder = Path(where)
            paths = sorted(folder.glob("[!.]*.npz")) if folder.is_dir() else [folder]
        else:
            paths = [Path(path) for path in where]
        if not paths:
            raise FileNotFoundError(
                f"no session (*.npz) in {where}; Session.save and `python -m mtm prepare` make them"
            )
        self.entries = [Entry.read(path) for path in paths]
        if twice := [name for name, n in Counter(self.names).items() if n > 1]:
            both = " and ".join(str(e.path) for e in self.entries if e.name == twice[0])
            raise SessionError(f"{both} both hold a session named {twice[0]!r}; leave one out")

    def _of(self, entries: list[Entry]) -> Sessions:
        """A collection of these entries."""
        chosen = Sessions.__new__(Sessions)
        chosen.entries = entries
        return chosen

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int | str) -> Session: ...
    @overload
    def __getitem__(self, index: slice) -> Sessions: ...
    def __getitem__(self, index: int | str | slice) -> Session | Sessions:
        if isinstance(index, slice):
            return self._of(self.entries[index])
        if isinstance(index, str):
            if index not in self.names:
                raise KeyError(f"no session {index!r}; there are: {', '.join(self.names)}")
            index = self.names.index(index)
        return self.entries[index].load()

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @property
    def names(self) -> list[str]:
        """Name of each session."""
        return [entry.name for entry in self.entries]

    def filter(
        self,
        *,
        regions: str | Iterable[str] | None = None,
        min_rate: float = 0.0,
        min_neurons: int = 1,
    ) -> Sessions:
        """The neurons that pass, of the sessions that have enough of them.

        A session that keeps only some of its neurons is copied into memory when it is taken out;
        :meth:`save` writes such a choice to disk for good.

        Args:
            regions: labels of the neurons to keep.
            min_rate: Hz, over all trials and bins.
            min_neurons: sessions that are left with fewer are left out.

        Raises:
            SessionError: for regions that no session has.
        """
        wanted = [regions] if isinstance(regions, str) else [*(regions or ())]
        known = {label for entry in self.entries for label in entry.regions.tolist()}
        if wanted and known.isdisjoint(wanted):
            raise SessionError(f"no neuron is in {sorted(wanted)}; there are {sorted(known)}")
        chosen = []
        for entry in self.entries:
            passed = entry.firing_rates >= min_rate
            if wanted:
                passed &= np.isin(entry.regions, wanted)
            if passed.sum() >= min_neurons:
                columns = ("regions", "firing_rates", "neurons")
                kept: dict[str, Any] = {key: getattr(entry, key)[passed] for key in columns}
                chosen.append(replace(entry, **kept))
        return self._of(chosen)

    def save(self, folder: str | Path) -> Sessions:
        """Write every session, with the neurons chosen, into a folder; returns that collection.

        Raises:
            ValueError: where a file would be written over.
        """
        paths = [Path(folder) / entry.path.name for entry in self.entries]
        if any(path.exists() for path in paths) or len(set(paths)) < len(paths):
            raise ValueError(f"{folder} has files of these names; save into another folder")
        return Sessions([s.save(path) for s, path in zip(self, paths, strict=True)])

    def to_frame(self) -> pd.DataFrame:
        """A table with one row per session."""
        rows = []
        for e in self.entries:
            n_regions = len(set(filter(has_region, e.regions.tolist())))
            rate = e.firing_rates.mean().round(1)
            rows.append((e.name, e.subject, *e.shape[:2], len(e.neurons), n_regions, rate))
        columns = ["session", "subject", "trials", "bins", "neurons", "regions", "Hz"]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        table = self.to_frame()
        size = (table["trials"] * table["bins"] * table["neurons"]).sum() / 1e9
        return (
            f"{table.to_string(index=False, max_rows=10)}\n{len(table)} sessions of "
            f"{table['subject'].nunique()} subjects: {table['trials'].sum():,} trials, "
            f"{table['neurons'].sum():,} neurons, {size:.2f} GB of counts"
        )


class Outcome(NamedTuple):
    """What became of one recording: "written", "there already" or "skipped", and why."""

    name: str
    status: str
    note: str = ""
    path: Path | None = None


@dataclass(frozen=True)
class Prepared:
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
    the same options is left as it is. A recording that cannot be read is skipped and listed in the
    result. What is no session file is never written over. A session that is named by its folder, or
    not at all, gets its file's name.

    Args:
        load: ``load(recording, **options)`` returns a Session.
        recordings: name of the file -> what ``load`` takes. Or without names: paths, named by their
            last part without its ending, and by the folders above it where two are alike; URLs; or
            ids, named by themselves.
        out: folder of the files.
        workers: processes; each holds one recording at a time in memory. Default: one for each
            core, but at most 4. With 1, all is done in this process.
        overwrite: make again what is there.
        progress: show a bar, in a terminal.
        **options: of ``load``. The file keeps them, without ``password`` and ``token``.

    Raises:
        ValueError: two recordings of the same name.
        RuntimeError: a process that was killed; what was written by then is there.

    Example:
        >>> files = sorted(Path("nwb").glob("*.nwb"))
        >>> print(prepare(nwb.load_session, files, "sessions", align="start_time"))
    """
    named = _names(recordings)
    if named:
        inspect.signature(load).bind(next(iter(named.values())), **options)
    Path(out).mkdir(parents=True, exist_ok=True)
    workers = min(4, os.cpu_count() or 1, len(named) or 1) if workers is None else workers
    job = functools.partial(_prepare_one, load, out=Path(out), overwrite=overwrite, options=options)
    calls = (joblib.delayed(job)(recording, name=name) for name, recording in named.items())
    parallel = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1)
    outcomes = {}
    bar = tqdm(total=len(named), unit="session", disable=None if progress else True)
    try:
        with bar:
            for outcome in parallel(calls):
                outcomes[outcome.name] = outcome
                bar.update(1)
                bar.set_postfix_str(f"{outcome.status} {outcome.name}")
    except BrokenProcessPool as error:
        problem = "a process was killed, most likely because memory ran out"
        raise RuntimeError(f"{problem}; start again with fewer workers, it resumes") from error
    return Prepared([outcomes[name] for name in named])


def _names(recordings: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    """Name -> recording."""
    if isinstance(recordings, Mapping):
        return dict(recordings)
    listed = [recordings] if isinstance(recordings, (str, Path)) else list(recordings)
    names = [_name(recording, 1) for recording in listed]
    for depth in (2, 3, 4, 5):  # as many folders above as it takes: a sorter calls each "output"
        counted = Counter(names)
        names = [
            name if counted[name] == 1 else _name(recording, depth)
            for name, recording in zip(names, listed, strict=True)
        ]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise ValueError(f"two recordings are named {twice[0]!r}; pass a mapping from names")
    return dict(zip(names, listed, strict=True))


def _name(recording: Any, depth: int) -> str:
    """A path's last parts, without its ending; of an address what is public, not too long."""
    if isinstance(recording, Path):
        path = recording.absolute()
        return "_".join([*path.parts[:-1], path.name if path.is_dir() else path.stem][-depth:])
    text = str(recording)
    return re.sub(r"\W+", "-", public(text))[-100:].strip("-") if "://" in text else text


def _prepare_one(
    load: Callable[..., Session],
    recording: Any,
    *,
    name: str,
    out: Path,
    overwrite: bool,
    options: dict[str, Any],
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
    kept = (str(w.message) for w in caught if issubclass(w.category, UserWarning))
    notes = list(dict.fromkeys(kept))
    folder = isinstance(recording, (str, Path)) and os.path.isdir(recording)
    if session.name in ("session", Path(recording).name if folder else ""):  # a reader's default
        session.name = name
    session.provenance = session.provenance | {"prepared": {**origin, "notes": notes}}
    for partial in out.glob(f".{path.name}.*.part"):
        partial.unlink()  # left behind by a process that was killed
    return Outcome(name, "written", "\n".join(notes), session.save(path))


def _origin(
    load: Callable[..., Session], recording: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """What a file was made of and how, as JSON: if it is the same, it need not be made again."""
    function = load.func if isinstance(load, functools.partial) else load

    def shown(value: Any) -> Any:
        if isinstance(value, (str, Path)) and os.path.exists(value):  # wherever it lies by now
            path = Path(value)
            files = [f for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file()]
            facts = [file.stat() for file in files]
            latest = max((fact.st_mtime_ns for fact in facts), default=0)
            return [path.name, sum(fact.st_size for fact in facts), latest]
        # of an address what is public: no password, no signature
        return public(value) if isinstance(value, str) and "://" in value else value

    kept = {key: shown(value) for key, value in options.items() if key not in SECRETS}
    name = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
    made = {"load": name, "recording": shown(recording), "options": kept}
    # What JSON cannot hold: arrays and numpy's numbers have tolist.
    text = json.dumps(made, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    return json.loads(text)
