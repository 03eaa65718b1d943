"""International Brain Laboratory recordings through ONE: an eid in, a Session out.

Only ONE-api and iblatlas are needed, not ibllib. The same code reads the public server and a folder
on disk (downloaded, or written by `mtm.data.synthetic`), because it asks ONE for nothing but lists of datasets
and datasets. Facts about IBL's own pipeline are from ibllib (``brainbox.io.one``,
``brainbox.behavior.wheel``) and from MtM's data preparation; where those lose or mix up data, this
does not.

A session's behaviours, where NaN = missing:

- ``choice`` (K,): -1 right, +1 left, 0 none; ``block``: probability of a stimulus on the left;
  ``reward``: 1 or 0; ``contrast``: right minus left, -1..1; ``reaction-time``: first movement
  minus stimulus onset, s; ``reaction-time-filter``: 1 where `reaction_time_filter` keeps it.
- ``wheel-speed`` (K, T) rad/s: position at 1 kHz, low-pass 20 Hz (order 8, both ways, as IBL
  does), differentiated, absolute, averaged in each bin.
- ``whisker-motion-energy`` (K, T), arbitrary units: left camera, else right; averaged in each
  bin. Absent, with a warning, where neither is usable.
"""

from __future__ import annotations

import functools
import http.client
import re
import urllib.error
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mtm.checkpoint import extra
from mtm.checks import one_of
from mtm.data.collection import Prepared
from mtm.data.collection import prepare as run
from mtm.data.download import time_limit
from mtm.data.recording import ordered_samples, wheel_speed
from mtm.data.regions import LEVELS, acronyms, within
from mtm.session import Session, SessionError

SORTERS = ("iblsorter", "pykilosort", "")  # newest first; "" = files in alf/probeNN itself
TRIAL_COLUMNS = (
    *("stimOn_times", "goCue_times", "firstMovement_times", "response_times", "feedback_times"),
    *("choice", "feedbackType", "probabilityLeft", "contrastLeft", "contrastRight"),
)
PROBE_DATASETS = (
    *("spikes.times", "spikes.clusters", "channels.brainLocationIds_ccf_2017"),
    *("clusters.channels", "clusters.depths", "clusters.metrics", "clusters.uuids"),
)
TIMEOUT = 60.0  # seconds that a server may be silent
UNRECORDED = 0.1  # s without a spike of a whole probe that do not yet mean that it was off
PLACE = ("lab", "subject", "date", "number")
LATER = "check the network and try again later, or load what is on disk: connect(cache_dir) alone"


def connect(
    cache_dir: str | Path | None = None,
    *,
    username: str | None = None,
    password: str | None = None,
    token: str | None = None,
    base_url: str = "https://openalyx.internationalbrainlab.org",
) -> Any:
    """A ONE on a folder, or, with credentials, on IBL's public server. Never asks anything.

    With ``cache_dir`` alone, ONE works in local mode: no network, no account, nothing written. The
    folder needs ONE's tables (``sessions.pqt``, ``datasets.pqt``): `mtm.data.synthetic.index_alf` makes them
    for an ALF tree, ``one.save_cache()`` for what a server's ONE has downloaded.

    With credentials, ONE logs in at ``base_url`` and downloads what is loaded into ``cache_dir``,
    or else ``~/Downloads/ONE/<server>``. Since ONE 3.6 there is no shared public login; accounts
    are free, at https://openalyx.internationalbrainlab.org/signup. Pass ``username`` and
    ``password``, as chosen there, or ``token``, the text that ``<base_url>/me`` shows when you are
    logged in: the only way for accounts that sign in through ORCiD, which have no password (the
    server knows whose token it is). ONE keeps a token in ``~/.one``, as plain text, so that later
    ``username`` alone is enough on the same machine. On Colab, store it as a secret (the key symbol
    on the left) and pass ``google.colab.userdata.get("ALYX_TOKEN")``, never the text itself.

    Raises:
        ValueError: neither folder nor credentials; a username without password, token or saved
            token; a password without username.
        FileNotFoundError: no ONE tables in ``cache_dir``.
        ConnectionError: server out of reach, silent for `TIMEOUT` seconds, or failing.
        requests.HTTPError: from ONE: credentials that the server refuses.
        ImportError: without the ``[data]`` extra.
    """
    api = extra("one.api", "data")
    if username or password or token:
        where = {} if cache_dir is None else {"cache_dir": Path(cache_dir)}
        login = {"username": username, "password": password, "token": token}
        with warnings.catch_warnings():  # ONE's last words before it logs in without a password
            warnings.filterwarnings("error", message="No password, token or cached token")
            try:
                with answering(base_url):
                    return api.OneAlyx(base_url=base_url, silent=True, **login, **where)
            except UserWarning:
                raise ValueError(
                    f"no log-in of {username!r} at {base_url} is saved on this machine; pass "
                    f"password=..., or token=... from {base_url}/me"
                ) from None
    if cache_dir is None:
        raise ValueError(
            "pass cache_dir, a folder with ONE's tables (mtm.data.synthetic.index_alf makes them), or "
            f"username and password, or token: accounts are made at {base_url}/signup"
        )
    for table in ("sessions.pqt", "datasets.pqt"):
        if not (Path(cache_dir) / table).is_file():
            raise FileNotFoundError(
                f"{Path(cache_dir) / table} is missing; on an ALF tree, run `from mtm.data.synthetic import "
                f"index_alf; index_alf({str(cache_dir)!r})`, or pass credentials to download"
            )
    return api.One(cache_dir=Path(cache_dir), mode="local")


@contextmanager
def answering(server: str | None) -> Iterator[None]:
    """Within, a server may be silent for `TIMEOUT` seconds; ONE itself would wait for ever.

    Args:
        server: its address; None = nothing is asked of any.

    Raises:
        ConnectionError: naming server and remedy, where it is silent, out of reach, or fails.
    """
    if server is None:
        yield
        return
    web = extra("requests.exceptions", "data")
    try:
        with time_limit(TIMEOUT):
            yield
    except web.HTTPError as error:
        if getattr(error.response, "status_code", 0) < 500:
            raise  # a refusal, in ONE's words
        raise ConnectionError(f"{server} fails ({error}); {LATER}") from error
    except (web.RequestException, urllib.error.URLError, http.client.HTTPException,
            ConnectionError, TimeoutError) as error:  # fmt: skip
        where, problem = getattr(error, "url", None) or server, " ".join(str(error).split())
        raise ConnectionError(f"{where}: {problem}; {LATER}") from error


def load_session(
    one: Any,
    eid: Any,
    *,
    window: tuple[float, float] = (-0.5, 1.5),
    bin_size: float = 0.02,
    align: str = "stimOn_times",
    atlas: str | None = "Allen",
    trial_filter: str | None = None,
    units: str | None = None,
    probes: Sequence[str] | None = None,
) -> Session:
    """Load one IBL session: all probes, all trials, behaviour.

    Neurons are all sorted clusters, probe after probe, those that never fired included. A probe's
    sorting is taken from ``alf/probeNN/iblsorter``, else ``.../pykilosort``, else ``alf/probeNN``,
    else whatever folder there is; of revisions, ONE's default one. A cluster whose channel is not
    known has no region, and spikes without a time are left out: both with a warning. The behaviours
    are listed at the top of this page.

    Args:
        one: from `connect`, or any ONE.
        eid: session id (or whatever else ONE takes for one).
        window: (start, stop) around the event, seconds.
        bin_size: seconds.
        align: the event: a column of the trials table; trials without it are left out, as are
            those before or after the time in which all probes recorded.
        atlas: level of ``Session.regions``: "Allen" (as MtM), "Beryl" or "Cosmos". All three are
            columns of ``Session.neurons``. An id that the atlas does not know becomes "id 12345".
            ``None``: load without regions (a probe without histology).
        trial_filter: "reaction-time" leaves out the trials that `reaction_time_filter` rejects.
        units: "good" keeps the clusters with label 1 (IBL's three quality criteria) only.
        probes: names of those to load, as ``["probe00"]``. Default: all with a spike sorting; one
            without is named in a warning.

    Returns:
        the session, named by the eid. Its ``neurons`` have ``probe``, ``cluster`` (id on its
        probe), ``allen_id``, ``allen``, ``beryl``, ``cosmos``, and where present ``depth``
        (micrometres from the tip), ``label``, ``uuid``.

    Raises:
        SessionError: naming the eid, the dataset and the remedy.
        ConnectionError: a server out of reach, silent for `TIMEOUT` seconds, or failing.
        ValueError: for an unknown ``atlas``, ``trial_filter`` or ``units``.
    """
    one_of("atlas", atlas, (None, *LEVELS))
    one_of("trial_filter", trial_filter, (None, "reaction-time"))
    one_of("units", units, (None, "good"))
    recording = _Recording(one, eid)
    trials, dropped = _trials(recording, align, trial_filter)
    collections = _sortings(recording, probes)
    sorted_ = [_probe(recording, *item, atlas is not None) for item in collections.items()]
    trials = _recorded(trials, dropped, align, window, [times for times, *_ in sorted_])
    times, clusters, columns = _merge(sorted_)
    keep = _quality(recording, columns, units)
    inside = slice(None) if keep.all() else keep[clusters]
    camera, traces = _whisker(recording)
    traces |= _wheel(recording)
    return Session.from_spike_times(
        times[inside],
        clusters[inside],
        trials[align],
        clusters=np.flatnonzero(keep),
        regions=None if atlas is None else columns[atlas.lower()][keep],
        window=window,
        bin_size=bin_size,
        traces=traces,
        behaviour=_behaviour(trials),
        trial_ids=trials["row"],
        n_recorded=dropped["in the table"],
        name=recording.eid,
        subject=recording.place["subject"],
        neurons={key: values[keep] for key, values in columns.items()},
        provenance=recording.origin()
        | {"collections": collections, "camera": camera, "align": align, "trials": dropped}
        | {"clusters dropped": int(np.sum(~keep))},
    )


def search(
    one: Any,
    *,
    project: str | None = None,
    lab: str | None = None,
    subject: str | None = None,
    region: str | None = None,
    quality: str | None = None,
    **terms: Any,
) -> list[str]:
    """Sessions that have sorted spikes, by what is known of them.

    Args:
        one: from `connect`. On a server, its database is asked; on a folder, ONE's tables.
        project: or part of its name, as "ibl_neuropixel_brainwide_01".
        lab, subject: or part of the name.
        region: Allen acronym of a region that a probe went through, or of a larger one that
            contains it ("HPF" finds CA1). On a folder, each session's channels are read for that.
        quality: worst grade of the spike times that will do: "PASS", "WARNING", "FAIL" (grades
            that were never given count as good).
        **terms: any other of ``one.search_terms()``, as ``date_range=("2020-01-01", None)``.

    Returns:
        eids.

    Raises:
        ValueError: for a region that the atlas does not have.
    """
    given = {"projects": project, "lab": lab, "subject": subject, "dataset_qc_lte": quality}
    terms |= {key: value for key, value in given.items() if value is not None}
    inside = None if region is None else within(region)
    if region is not None and not one.offline:
        terms["atlas_acronym"] = region
    with warnings.catch_warnings():  # ONE 3.6 with pandas 3
        warnings.filterwarnings("ignore", message="The copy keyword is deprecated")
        with answering(None if one.offline else one.alyx.base_url):
            eids = [str(eid) for eid in one.search(datasets="spikes.times.npy", **terms)]
    if inside is None or not one.offline:
        return eids
    return [eid for eid in eids if _passes_through(_Recording(one, eid), inside)]


def _passes_through(recording: _Recording, ids: np.ndarray) -> bool:
    """Whether a channel of any probe is in one of the regions with these ids."""
    name = "channels.brainLocationIds_ccf_2017"
    try:
        for collection in _sortings(recording, None).values():
            if recording.find(name, collection):
                located = np.nan_to_num(recording.load(name, collection)).astype(np.int64)
                if np.isin(np.abs(located), ids).any():
                    return True
    except SessionError as error:  # the other sessions can still be searched
        warnings.warn(f"{error}; left out of the search", UserWarning, stacklevel=3)
    return False


def prepare(
    one: Any,
    eids: Iterable[Any],
    out: str | Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Prepared:
    """Download and write many sessions, each as ``OUT/<eid>.npz``: `mtm.prepare` for ONE.

    Every process connects for itself, with the log-in that ONE has saved.

    Args:
        one: from `connect`.
        eids: as from `search`, or `mtm.official.PAPER_EIDS`.
        out, workers, overwrite, progress: as in :func:`mtm.prepare.prepare`.
        **options: of `load_session`.

    Returns:
        what became of each session; it prints as a table.

    Example:
        >>> done = ibl.prepare(one, official.PAPER_EIDS, "sessions", trial_filter="reaction-time")
        >>> print(done)
    """
    where: dict[str, Any] = {"cache_dir": str(one.cache_dir)}
    if not one.offline:
        where |= {"username": one.alyx.user, "base_url": one.alyx.base_url}
    tables = (Path(one.cache_dir) / f"{name}.pqt" for name in ("sessions", "datasets"))
    known = tuple(table.stat().st_mtime_ns for table in tables if table.exists())
    load = functools.partial(_load_there, where, known)
    options |= {"workers": workers, "overwrite": overwrite, "progress": progress}
    return run(load, {str(eid): eid for eid in eids}, out, **options)


def _load_there(where: dict[str, Any], known: tuple[int, ...], eid: Any, **options: Any) -> Session:
    return load_session(_connected(known, **where), eid, **options)


@functools.cache
def _connected(known: tuple[int, ...], **where: Any) -> Any:
    """One connection a process, as long as ONE's tables (times of change: ``known``) are these."""
    return connect(**where)


def reaction_time_filter(trials: Mapping[str, Any]) -> np.ndarray:
    """The paper's trial filter: True for the trials to keep.

    Kept are trials with 0.08 s <= first movement - stimulus onset <= 2 s, with feedback at most
    10 s after the go cue, with a choice, and without NaN in stimulus onset, choice, feedback time
    and type, block and first movement. (As in the authors' code, a missing go cue rejects none.)

    Args:
        trials: IBL's trials table: column -> (K,).

    Returns:
        (K,) bool.

    Raises:
        SessionError: naming the columns that are missing.
    """
    needed: tuple[str, ...] = ("stimOn_times", "firstMovement_times", "feedback_times")
    needed += ("goCue_times", "choice", "feedbackType", "probabilityLeft")
    if missing := [name for name in needed if name not in trials]:
        raise SessionError(f"trials table: no column {missing}; pass trial_filter=None")
    column = {name: np.asarray(trials[name], dtype=np.float64) for name in needed}
    reaction_time = column["firstMovement_times"] - column["stimOn_times"]  # NaN fails both bounds
    keep = (reaction_time >= 0.08) & (reaction_time <= 2.0) & (column["choice"] != 0)
    keep &= ~(column["feedback_times"] - column["goCue_times"] > 10.0)
    for name in ("choice", "feedback_times", "feedbackType", "probabilityLeft"):
        keep &= ~np.isnan(column[name])
    return keep


# -------------------------------------------------------------------------- what ONE has


class _Recording:
    """The datasets of one session: which there are, and their content."""

    def __init__(self, one: Any, eid: Any) -> None:
        self.one: Any = one
        self.files: dict[str, Any] = {}  # dataset -> file on disk, or None
        self.place: dict[str, str] = {}
        self.revisions: dict[str, str] = {}
        try:
            self.id = one.to_eid(eid)
        except ValueError as error:
            raise SessionError(f"session {eid!r}: not a session id ({error})") from error
        self.eid = str(eid if self.id is None else self.id)
        try:
            with answering(self.server()):
                found: Any = () if self.id is None else one.list_datasets(self.id, details=True)
        except extra("requests.exceptions", "data").HTTPError as error:
            if getattr(error.response, "status_code", None) != 404:
                raise
            found = ()
        if not len(found):
            raise SessionError(
                f"session {self.eid}: no datasets of it in {one!r}; one.search() lists the "
                "sessions there are (after adding files, call index_alf again and connect anew)"
            )
        self.paths = sorted({re.sub(r"#[^#/]*#/", "", path) for path in found["rel_path"]})
        self.sizes = dict(zip(found["rel_path"], found["file_size"], strict=True))

    def server(self) -> str | None:
        """Address of the server that files are downloaded from, if they are."""
        return None if self.one.offline else self.one.alyx.base_url

    def origin(self) -> dict[str, Any]:
        """Where the session comes from: server, eid, its place, revisions of files."""
        place = {"eid": self.eid, **self.place}
        return {"origin": "ONE", "server": self.server(), **place, "revisions": self.revisions}

    def fail(self, dataset: str, problem: str) -> NoReturn:
        raise SessionError(f"session {self.eid}, {dataset}: {problem}")

    def find(self, name: str, collection: str | None = None) -> str | None:
        """Path of the dataset ``object.attribute`` in a collection; by default in any.

        Of several, ``alf`` itself comes first, then the others by name (``alf/task_00`` is the
        first task of a session with several).
        """
        where = r"alf(?:/[^/]+)*" if collection is None else re.escape(collection)
        pattern = rf"{where}/(?:_[^_/]+_)?{re.escape(name)}\.(?:npy|pqt|csv)"
        found = [path for path in self.paths if re.fullmatch(pattern, path)]
        return min(found, key=lambda path: (path.count("/"), path), default=None)

    def fetch(self, collection: str, *names: str) -> None:
        """Have these datasets on disk, those that there are: one request, parallel downloads."""
        found = [self.find(name, collection) for name in names]
        paths = [path for path in found if path is not None and path not in self.files]
        if not paths:
            return
        files, cut = self._download(paths)
        if cut:  # perhaps long ago: ONE takes what it once began for whole
            files, cut = self._download(paths)
        if cut:
            self.fail(cut[0], "the download was cut short, and is removed; load again later")
        self.files |= files

    def _download(self, paths: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Dataset -> file, or None; and those that arrived only in part, which are removed."""
        with warnings.catch_warnings(), answering(self.server()):
            # tables that ONE saved do not say which is the default
            warnings.filterwarnings("ignore", message="No default revision")
            files, _ = self.one.load_datasets(
                self.id,
                [path.rpartition("/")[2] for path in paths],
                collections=[path.rpartition("/")[0] for path in paths],
                download_only=True,
                assert_present=False,
                check_hash=False,
            )
        cut = []
        for path, file in zip(paths, files, strict=True):
            if file is not None and not self.one.offline:
                size = self.sizes.get(file.relative_to_session().as_posix()) or 0
                if file.stat().st_size < size:
                    file.unlink()
                    cut.append(path)
        return dict(zip(paths, files, strict=True)), cut

    def load(self, name: str, collection: str, remedy: str = "choose another session") -> Any:
        """Content of a dataset: an array, or a table."""
        path = self.find(name, collection)
        if path is None:
            self.fail(f"{collection}/{name}", f"no such dataset; {remedy}")
        self.fetch(collection, name)
        file = self.files[path]
        if file is None:
            self.fail(path, "listed, but not on disk; restore the file")
        if revision := re.search(r"#([^#/]+)#", str(file)):
            self.revisions[path] = revision[1]
        self.place = {  # .../lab/Subjects/subject/date/number
            key: str(part) for key, part in zip(PLACE, file.session_parts, strict=True)
        }
        try:
            if path.endswith(".npy"):
                return self.column(path, np.load(file, allow_pickle=False))
            pandas = extra("pandas", "data")
            return (pandas.read_parquet if path.endswith(".pqt") else pandas.read_csv)(file)
        except (OSError, ValueError, EOFError) as error:
            self.fail(path, f"damaged ({error}); delete {file} and load again")

    def column(self, path: str, content: np.ndarray) -> np.ndarray:
        """The content of a file, or a column of a table, as numbers (n,)."""
        if content.ndim == 2 and content.shape[1] == 1:
            content = content[:, 0]
        if content.ndim != 1 or content.dtype.kind not in "uifb":
            self.fail(path, f"not a column of numbers (shape {content.shape}, {content.dtype}); "
                      "download it again")  # fmt: skip
        return content


# ------------------------------------------------------------------------------- trials


def _trials(
    recording: _Recording, align: str, trial_filter: str | None
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Columns (K,) of the trials to use, with their ``row`` in the table.

    And how many there were and were dropped, and why.
    """
    if path := recording.find("trials.table"):
        trials = recording.load("trials.table", path.rpartition("/")[0])
        trials = {name: trials[name].to_numpy() for name in trials}
    elif path := recording.find(f"trials.{align}"):
        folder = path.rpartition("/")[0]
        names = [n for n in {*TRIAL_COLUMNS, align} if recording.find(f"trials.{n}", folder)]
        trials = {name: recording.load(f"trials.{name}", folder) for name in names}
    else:
        recording.fail(
            "alf/_ibl_trials.table.pqt",
            f"no trials table, nor a trials.{align}; choose another session",
        )
    if align not in trials:
        events = sorted(name for name in trials if name.endswith("_times"))
        recording.fail(path, f"no column {align!r} to align to; there are {events}")
    if len({len(values) for values in trials.values()}) > 1:
        recording.fail(path, "columns of different lengths; download them again")
    for name in {*TRIAL_COLUMNS, align} & set(trials):
        trials[name] = _numbers(recording, f"{path}, {name}", trials[name])
    keep = np.isfinite(trials[align])
    dropped = {"in the table": len(keep), f"without {align}": int(np.sum(~keep))}
    if not keep.any():
        recording.fail(path, f"all {len(keep)} trials lack {align!r}; align to another event")
    if trial_filter is not None:
        try:
            passed = reaction_time_filter(trials)
        except SessionError as error:  # it does not know whose trials these are
            recording.fail(path, str(error))
        dropped["rejected by the filter"] = int(np.sum(keep & ~passed))
        keep &= passed
        if not keep.any():
            recording.fail(path, "no trial passes the reaction-time filter; pass trial_filter=None")
    rows = {"row": np.flatnonzero(keep)}
    return rows | {name: values[keep] for name, values in trials.items()}, dropped


def _numbers(recording: _Recording, what: str, values: np.ndarray) -> np.ndarray:
    """A column of a table as float64 (n,), None as NaN; or an error that says which it is."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        recording.fail(what, f"not numbers ({error}); download it again")


def _recorded(
    trials: dict[str, np.ndarray],
    dropped: dict[str, int],
    align: str,
    window: tuple[float, float],
    spikes: list[np.ndarray],
) -> dict[str, np.ndarray]:
    """The trials while all probes recorded; the others would be silent. Counted in ``dropped``.

    A probe records from its first to its last spike, and `UNRECORDED` longer; one with fewer spikes
    than trials says nothing.
    """
    n = len(trials[align])
    busy = [times for times in spikes if len(times) >= n]
    start = max((times.min() for times in busy), default=-np.inf) - UNRECORDED
    stop = min((times.max() for times in busy), default=np.inf) + UNRECORDED
    keep = (trials[align] + window[0] >= start) & (trials[align] + window[1] <= stop)
    if not keep.any():  # another clock, or no spikes: what comes of it says so better
        return trials
    dropped["beyond the recording"] = int(np.sum(~keep))
    return {name: values[keep] for name, values in trials.items()}


def _behaviour(trials: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Behaviour with one value a trial, as far as the trials table has the columns for it."""
    recipes: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
        "choice": (("choice",), lambda choice: choice),
        "block": (("probabilityLeft",), lambda block: block),
        "reward": (("feedbackType",), lambda kind: np.where(np.isnan(kind), np.nan, kind > 0)),
        "contrast": (("contrastLeft", "contrastRight"), _signed_contrast),
        "reaction-time": (("stimOn_times", "firstMovement_times"), lambda on, move: move - on),
    }
    behaviour = {}
    for key, (names, recipe) in recipes.items():
        if all(name in trials for name in names):
            behaviour[key] = recipe(*(trials[name] for name in names))
    try:
        behaviour["reaction-time-filter"] = reaction_time_filter(trials).astype(float)
    except SessionError:  # a column is missing; without a filter asked for, the trials are fine
        pass
    return behaviour


def _signed_contrast(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Right minus left: IBL has NaN on the side without a stimulus. Both NaN: unknown."""
    signed = np.nan_to_num(right) - np.nan_to_num(left)
    return np.where(np.isnan(left) & np.isnan(right), np.nan, signed)


# --------------------------------------------------------------------- spikes, regions


def _sortings(recording: _Recording, wanted: Sequence[str] | None) -> dict[str, str]:
    """Probe name -> collection with its spike sorting, probes in order."""
    found: dict[str, list[str]] = {}
    there = {path.split("/")[1] for path in recording.paths if path.startswith("alf/probe")}
    pattern = r"alf/(probe[^/]+)(?:/([^/]+))?/(?:_[^_/]+_)?spikes\.times\.npy"
    for path in recording.paths:
        if match := re.fullmatch(pattern, path):
            found.setdefault(match[1], []).append(match[2] or "")
    if not found:
        recording.fail("alf/probe*/*/spikes.times.npy", "no spike sorting; choose another session")
    wanted = [wanted] if isinstance(wanted, str) else wanted
    wanted = sorted(there if wanted is None else wanted)
    if not wanted or not set(wanted) <= there:
        lacking = ", ".join(sorted(set(wanted) - there)) or "probe asked for"
        recording.fail("alf", f"no {lacking}; it has {sorted(there)}")
    if unsorted := [probe for probe in wanted if probe not in found]:
        problem = f"alf/{unsorted[0]}: no spikes.times, so no spike sorting"
        if len(unsorted) == len(wanted):
            recording.fail(f"alf/{unsorted[0]}", "no spike sorting; choose another probe")
        _warn(recording, f"{problem}; left out {', '.join(unsorted)}", None)
    found = {probe: found[probe] for probe in wanted if probe in found}
    rank = {sorter: place for place, sorter in enumerate(SORTERS)}
    best = {
        probe: min(sorters, key=lambda sorter: (rank.get(sorter, len(rank)), sorter))
        for probe, sorters in sorted(found.items())
    }
    return {probe: f"alf/{probe}/{sorter}".rstrip("/") for probe, sorter in best.items()}


def _probe(
    recording: _Recording, probe: str, collection: str, regions: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Spike times and clusters (S,) of one probe, and its clusters' columns (n,)."""
    recording.fetch(collection, *PROBE_DATASETS)
    remedy = f"leave the probe out with probes=..., all but {probe!r}"
    times = recording.load("spikes.times", collection, remedy)
    clusters = recording.load("spikes.clusters", collection, remedy)
    channels = recording.load("clusters.channels", collection, remedy)
    n = len(channels)
    if len(times) != len(clusters):
        recording.fail(
            f"{collection}/spikes.*", f"{len(times)} times, {len(clusters)} clusters; load it again"
        )
    if not (timed := np.isfinite(times)).all():
        _warn(recording, f"{collection}/spikes.times: left out {np.sum(~timed)} without time", None)
        times, clusters = times[timed], clusters[timed]
    if len(clusters) and not 0 <= clusters.min() <= clusters.max() < n:
        recording.fail(
            f"{collection}/spikes.clusters",
            f"ids {clusters.min()} to {clusters.max()}, but clusters.channels lists {n} clusters; "
            "the files are of different sortings, download them again",
        )
    columns = {"probe": np.full(n, probe), "cluster": np.arange(n)}
    if regions:
        ids = recording.load(
            "channels.brainLocationIds_ccf_2017",
            collection,
            "the probe has no histology: atlas=None loads it without regions",
        )
        columns["allen_id"] = _locate(recording, collection, channels, np.nan_to_num(ids))
        columns |= {level.lower(): acronyms(columns["allen_id"], level) for level in LEVELS}
    if recording.find("clusters.depths", collection):
        columns["depth"] = recording.load("clusters.depths", collection)
    if recording.find("clusters.uuids", collection):
        columns["uuid"] = recording.load("clusters.uuids", collection).iloc[:, 0].to_numpy(str)
    if recording.find("clusters.metrics", collection):
        metrics = recording.load("clusters.metrics", collection)
        metrics = metrics if "cluster_id" in metrics else metrics.reset_index()
        if {"label", "cluster_id"} <= set(metrics):  # IBL leaves out clusters without a spike
            label = metrics.drop_duplicates("cluster_id").set_index("cluster_id")["label"]
            label = label.reindex(np.arange(n)).to_numpy()
            columns["label"] = _numbers(recording, f"{collection}/clusters.metrics: label", label)
    for name, values in columns.items():
        if len(values) != n:
            recording.fail(f"{collection}/clusters: {name}", f"{len(values)} for {n} clusters")
    return times, clusters.astype(np.int32), columns  # of 20 million spikes, 80 MB less


def _locate(
    recording: _Recording, collection: str, channels: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """Allen id of each cluster, (n,) int64, from that of its channel; 0, void, without one."""
    channels = np.asarray(channels, dtype=np.float64)
    held = channels >= 0  # neither NaN nor -1
    if np.any(channels[held] >= len(ids)):
        recording.fail(
            f"{collection}/clusters.channels",
            f"channel {channels[held].max():g} of {len(ids)}; the files are of different sortings, "
            "download them again",
        )
    if not held.all():
        problem = f"{collection}/clusters.channels: {np.sum(~held)} clusters without a channel"
        _warn(recording, f"{problem}; they have no region", None)
    located = np.zeros(len(channels), dtype=np.int64)
    located[held] = ids[channels[held].astype(np.int64)]
    return located


def _merge(
    probes: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]],
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """All probes as one: cluster ids go on counting, columns that one probe lacks are NaN or ""."""
    sizes = [len(columns["cluster"]) for _, _, columns in probes]
    offsets = np.cumsum([0, *sizes[:-1]])
    merged = {}
    for name in dict.fromkeys(name for _, _, columns in probes for name in columns):
        gap = "" if name == "uuid" else np.nan
        parts = [c.get(name, np.full(n, gap)) for n, (_, _, c) in zip(sizes, probes, strict=True)]
        merged[name] = np.concatenate(parts)
    times = np.concatenate([times for times, _, _ in probes])
    clusters = [c + int(offset) for offset, (_, c, _) in zip(offsets, probes, strict=True)]
    return times, np.concatenate(clusters), merged


def _quality(
    recording: _Recording, columns: dict[str, np.ndarray], units: str | None
) -> np.ndarray:
    """The clusters to use, (N,) bool."""
    if units is None:
        return np.ones(len(columns["cluster"]), dtype=bool)
    if "label" not in columns:
        recording.fail("clusters.metrics.pqt", "missing, so quality is unknown; pass units=None")
    keep = columns["label"] >= 1
    if not keep.any():
        recording.fail("clusters.metrics.pqt", "no cluster has label 1; pass units=None")
    return keep


# --------------------------------------------------------------------- wheel, camera


def _wheel(recording: _Recording) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Wheel speed at 1 kHz, rad/s; nothing, with a warning, where there is no usable wheel."""
    path = recording.find("wheel.position")
    folder = (path or "alf/").rpartition("/")[0]
    if path is None or not recording.find("wheel.timestamps", folder):
        _warn(recording, f"{folder}: no wheel.position with timestamps", "wheel-speed")
        return {}
    recording.fetch(folder, "wheel.position", "wheel.timestamps")
    position = recording.load("wheel.position", folder)
    times = recording.load("wheel.timestamps", folder)
    if len(position) != len(times):
        problem = f"{path}: {len(position)} positions, but {len(times)} timestamps"
        _warn(recording, problem, "wheel-speed")
        return {}
    try:
        return {"wheel-speed": wheel_speed(*ordered_samples(times, position))}
    except ValueError as error:
        _warn(recording, f"{path}: {error}", "wheel-speed")
        return {}


def _whisker(
    recording: _Recording,
) -> tuple[str | None, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Camera used, and its motion energy at each frame; a warning where there is none.

    Times and frames can differ in number. As IBL's loader has it: surplus times are those of frames
    before the video began, so the last ones count; surplus frames cannot be placed.
    """
    problems = []
    for camera in ("left", "right"):
        path = recording.find(f"{camera}Camera.ROIMotionEnergy")
        if path is None or not recording.find(f"{camera}Camera.times", path.rpartition("/")[0]):
            problems.append(f"no {camera}Camera.ROIMotionEnergy with times")
            continue
        folder = path.rpartition("/")[0]
        recording.fetch(folder, f"{camera}Camera.ROIMotionEnergy", f"{camera}Camera.times")
        energy = recording.load(f"{camera}Camera.ROIMotionEnergy", folder)
        times = recording.load(f"{camera}Camera.times", folder)
        surplus = len(times) - len(energy)
        if not len(energy) or not 0 <= surplus <= max(5, 0.01 * len(energy)):
            problems.append(f"{camera}Camera: {len(energy)} energies, {len(times)} times")
            continue
        if any("energies" in problem for problem in problems):
            _warn(recording, f"{problems[0]}; took the right camera", None)
        return camera, {"whisker-motion-energy": ordered_samples(times[surplus:], energy)}
    _warn(recording, "; ".join(problems), "whisker-motion-energy")
    return None, {}


def _warn(recording: _Recording, problem: str, absent: str | None) -> None:
    outcome = f"; the session has no behaviour {absent!r}" if absent else ""
    warnings.warn(f"session {recording.eid}: {problem}{outcome}", UserWarning, stacklevel=4)
