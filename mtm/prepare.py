"""Many recordings to session files: in parallel, resumable, and saying what was left out and why.

The same for every origin: a function that makes a :class:`~mtm.session.Session` of one recording
(``load_session`` of a module in `mtm.sources`, or yours) is called for each, in processes of their
own, and what it returns is written as ``OUT/<name>.npz``. A file appears complete or not at all,
so that a run that was stopped is simply started again.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
from joblib.externals.loky.process_executor import BrokenProcessPool
from tqdm import tqdm

from mtm.download import USER, public
from mtm.session import Session, SessionError, VersionError
from mtm.sessions import Entry, stamp

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
