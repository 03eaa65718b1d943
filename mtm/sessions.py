"""Many recordings on disk: listed, chosen from and trained on without loading them all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from mtm.session import Session, SessionError, has_region, read_meta, reading_file

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
