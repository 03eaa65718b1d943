"""Many recordings to session files: in parallel, resumable, and saying what was left out and why.

The same for every origin: a function that makes a :class:`~mtm.session.Session` of one recording
(``load_session`` of a module in `mtm.sources`, or yours) is called for each, in processes of their
own, and what it returns is written as ``OUT/<name>.npz``. A file appears complete or not at all,
so that a run that was stopped is simply started again.
"""

from __future__ import annotations

import functools
import json
import os
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
from joblib.externals.loky.process_executor import BrokenProcessPool
from tqdm import tqdm

from mtm.session import Session
from mtm.sessions import Entry

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
    """

    name: str
    status: str
    note: str = ""
    path: Path | None = None
    seconds: float = 0.0


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

    A recording whose file is there, made with the same options, is left as it is; with
    other options, or with ``overwrite``, it is made again. One that cannot be read is skipped and
    said in the result; the others are not held up by it.

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
        **options: of ``load``.

    Returns:
        what became of each recording, and the files there are.

    Raises:
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
    return Prepared([outcomes[name] for name in named])


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
        pairs = list(recordings.items())
    else:
        pairs = [(r.stem if isinstance(r, Path) else str(r), r) for r in recordings]
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two recordings are named {twice!r}; pass a mapping from distinct names")
    for name in named:
        if not name or name.startswith(".") or {"/", "\\", "\0"} & set(name):
            raise ValueError(f"{name!r} cannot be the name of a file; pass a mapping from names")
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
    made_with = json.loads(json.dumps(options, default=_plain))
    if not overwrite and _is_prepared(path, made_with):
        return Outcome(name, "there already", path=path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            session = load(recording, **options)
        except ImportError:
            raise
        except Exception as error:  # whatever it is, the other recordings are to go on
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return Outcome(name, "skipped", f"{kind}{error}", None, time.perf_counter() - start)
    session.provenance = session.provenance | {"mtm": __version__, "options": made_with}
    session.save(path)
    lacks = dict.fromkeys(str(w.message) for w in said if issubclass(w.category, UserWarning))
    return Outcome(name, "written", "\n".join(lacks), path, time.perf_counter() - start)


def _plain(value: Any) -> Any:
    """An option as JSON can hold it: the numbers of an array, the name of a function."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return getattr(value, "__qualname__", None) or str(value)


def _is_prepared(path: Path, options: dict[str, Any]) -> bool:
    """Whether the file is a session that was made with these options."""
    if not path.exists():
        return False
    try:
        return Entry.read(path).provenance.get("options") == options
    except ValueError:  # damaged, or of another version of the package: make it again
        return False


def _sweep(out: Path) -> None:
    """Remove what writers that were killed left behind."""
    for part in out.glob(".*.npz.*.part"):
        if time.time() - part.stat().st_mtime > STALE:
            part.unlink(missing_ok=True)
