"""International Brain Laboratory recordings through ONE: an eid in, a Session out.

Needs ONE-api and iblatlas, not ibllib. The same code reads the public server and a folder on disk.
Facts about IBL's pipeline are from ibllib (``brainbox.io.one``, ``brainbox.behavior.wheel``).

A session's behaviour, NaN = missing:

- ``choice`` (K,): -1 right, +1 left, 0 none; ``block``: probability of a stimulus on the left;
  ``reward``: 1 or 0; ``contrast``: right minus left, -1..1; ``reaction-time``: first movement
  minus stimulus onset, seconds.
- ``wheel-speed`` (K, T) rad/s, see `mtm.data.recording.wheel_speed`, and
  ``whisker-motion-energy`` (K, T), arbitrary units, left camera, else right: averaged in each bin.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mtm.data.collection import Prepared
from mtm.data.collection import prepare as prepare_all
from mtm.data.recording import Recording, observed_by_probe, ordered_samples, wheel_speed
from mtm.data.regions import LEVELS, acronyms, within
from mtm.files import optional
from mtm.inputs import SessionError
from mtm.session import Session

SORTERS = ("iblsorter", "pykilosort", "")  # newest first; "" = files in alf/probeNN itself
TRIAL_COLUMNS = [f"{event}_times" for event in ("stimOn", "goCue", "firstMovement", "feedback")]
TRIAL_COLUMNS += ["choice", "feedbackType", "probabilityLeft", "contrastLeft", "contrastRight"]
LOCATIONS = "brainLocationIds_ccf_2017"  # of channels, or of a probe's electrodeSites
SORTING = ("spikes.times", "spikes.clusters", "clusters.channels")  # what a probe needs


def connect(
    cache_dir: str | Path | None = None,
    *,
    username: str | None = None,
    password: str | None = None,
    token: str | None = None,
    base_url: str = "https://openalyx.internationalbrainlab.org",
) -> Any:
    """Make a ONE on a folder or, with credentials, on IBL's public server. Never asks anything.

    Args:
        cache_dir: a folder with ONE's tables, made by `mtm.data.synthetic.index_alf` or, after
            downloads, by ``one.save_cache()``. With credentials, where to download to.
        username, password: of a free account (``<base_url>/signup``). ONE keeps the log-in, so
            later the username alone is enough on the same machine.
        token: instead of both: the text that ``<base_url>/me`` shows (for ORCiD accounts).
    """
    api = optional("one.api", "data")
    if username or password or token:
        where = {} if cache_dir is None else {"cache_dir": Path(cache_dir)}
        login = {"username": username, "password": password, "token": token}
        with warnings.catch_warnings():  # what ONE says before it logs in without a password
            warnings.filterwarnings("error", message="No password, token or cached token")
            try:
                return api.OneAlyx(base_url=base_url, silent=True, **login, **where)
            except UserWarning:
                problem = f"no log-in of {username!r} at {base_url} is saved on this machine; pass"
                raise ValueError(f"{problem} password=..., or token=... from /me there") from None
    folder = Path(cache_dir or "")
    if not all((folder / f"{table}.pqt").is_file() for table in ("sessions", "datasets")):
        problem = f"{folder} lacks sessions.pqt or datasets.pqt; on an ALF tree, call"
        remedy = f"or pass username and password, or token, of {base_url}/signup"
        raise FileNotFoundError(f"{problem} mtm.data.synthetic.index_alf, {remedy}")
    return api.One(cache_dir=folder, mode="local")


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
    """Load one IBL session: all probes, clusters (silent ones too), trials and behaviour.

    Args:
        one: from `connect`, or any ONE.
        eid: session id.
        window, bin_size: (start, stop) around the event, and width of a bin; seconds.
        align: the event: a column of the trials table. Trials without it are left out, as are
            those that no probe recorded; what one of several did not is not ``observed``.
        atlas: level of ``Session.regions``: "Allen" (as MtM), "Beryl" or "Cosmos"; None: no
            regions. A probe without histology, of two, has none.
        trial_filter: "reaction-time": only trials that `reaction_time_filter` accepts. The paper
            decodes behaviour from these, and trains on all.
        units: "good": only clusters with label 1 (IBL's three quality criteria).
        probes: names of those to load. Default: all with a spike sorting.

    Returns:
        the session, named by the eid. ``neurons`` has ``probe``, ``cluster`` (id on its probe),
        ``allen_id``, ``allen``, ``beryl``, ``cosmos``, and where present ``depth`` (micrometres
        from the tip), ``label``, ``uuid``.

    Raises:
        SessionError: naming session, dataset and remedy.
    """
    known = {"atlas": LEVELS, "trial_filter": ["reaction-time"], "units": ["good"]}
    for name, value in {"atlas": atlas, "trial_filter": trial_filter, "units": units}.items():
        if value not in (None, *known[name]):
            raise ValueError(f"{name} must be None or one of {', '.join(known[name])}: {value!r}")
    session = _OneSession(one, eid)
    session.provenance |= {"align": align, "units": units}
    times, neurons, clusters = _spikes(session, probes, atlas is not None, units)
    trials = _trials(session, align)
    events = session.event(trials, align)
    spans = events[:, None] + np.array(window)
    observed = observed_by_probe(times, neurons, clusters["probe"].to_numpy(), spans)
    rejected = {"not accepted": ~reaction_time_filter(trials)} if trial_filter else {}
    fields = session.trials_to_use(events, _behaviour(trials), rejected, observed)
    fields |= {"window": window, "bin_size": bin_size, "traces": _traces(session)}
    fields["regions"] = None if atlas is None else clusters[atlas.lower()]
    keep = clusters.pop("keep") if units else True
    return session.to_session(times, neurons, clusters, keep, **fields)


def search(one: Any, *, region: str | None = None, **terms: Any) -> list[str]:
    """Find sessions that have sorted spikes, on a server or a folder; returns their eids.

    Args:
        one: from `connect`.
        region: Allen acronym of a region that a probe went through, or of a larger one that
            contains it ("HPF" finds CA1). On a folder, each session's channels are read for that.
        **terms: of ``one.search_terms()``, as ``lab``, ``subject``, ``projects``, or
            ``dataset_qc_lte="PASS"``, the worst grade of the spike times that will do.
    """
    inside = None if region is None else within(region)
    if not one.offline and region is not None:
        terms["atlas_acronym"] = region
    with warnings.catch_warnings():  # ONE 3.6 with pandas 3
        warnings.filterwarnings("ignore", message="The copy keyword is deprecated")
        eids = [str(eid) for eid in one.search(datasets="spikes.times.npy", **terms)]
    if inside is None or not one.offline:
        return eids
    found = []
    for session in (_OneSession(one, eid) for eid in eids):
        try:
            ids = [_locations(session, place) for place in _sortings(session, None).values()]
            found += [session.name] * bool(np.isin(np.abs(np.concatenate(ids)), inside).any())
        except SessionError as error:  # the other sessions can still be searched
            warnings.warn(f"{error}; left out of the search", UserWarning, stacklevel=2)
    return found


def prepare(one: Any, eids: Iterable[Any], out: str | Path, **options: Any) -> Prepared:
    """Download and write many sessions, each as ``OUT/<eid>.npz``: :func:`mtm.prepare` for ONE.

    Each process connects for itself, with the log-in that ONE has saved. ``options`` are those of
    :func:`mtm.prepare` and of `load_session`. After a new spike sorting, pass ``overwrite=True``.
    """
    where: dict[str, Any] = {"cache_dir": str(one.cache_dir)}
    if not one.offline:
        where |= {"username": one.alyx.user, "base_url": one.alyx.base_url}
    load = functools.partial(_connect_and_load, connection=where)
    return prepare_all(load, {str(eid): eid for eid in eids}, out, **options)


def _connect_and_load(eid: Any, connection: dict[str, Any], **options: Any) -> Session:
    return load_session(connect(**connection), eid, **options)


def reaction_time_filter(trials: Mapping[str, Any]) -> np.ndarray:
    """The paper's trial filter of IBL's trials table: True for the trials to keep, (K,) bool.

    Kept are trials with 0.08 s <= first movement - stimulus onset <= 2 s, feedback at most 10 s
    after the go cue, and a choice; NaN but in the go cue rejects a trial, as in the authors' code.
    """
    required = ["choice", "feedback_times", "feedbackType", "probabilityLeft"]
    table = pd.DataFrame(dict(trials), dtype=np.float64)
    reaction_time = table["firstMovement_times"] - table["stimOn_times"]
    keep = reaction_time.between(0.08, 2.0) & (table["choice"] != 0)  # NaN is not between
    keep &= ~(table["feedback_times"] - table["goCue_times"] > 10.0)
    return (keep & table[required].notna().all(axis=1)).to_numpy()


class _OneSession(Recording):
    """The datasets of one session: which there are, and their content."""

    def __init__(self, one: Any, eid: Any) -> None:
        self.one, self.id = one, one.to_eid(eid)
        server = None if one.offline else one.alyx.base_url
        super().__init__(str(self.id or eid), origin="ONE", server=server, eid=str(self.id or eid))
        if not len(paths := one.list_datasets(self.id) if self.id else ()):
            problem = f"none in {one!r}; ibl.search(one) lists the sessions there are (after adding"
            self.fail("datasets", f"{problem} files, call index_alf and connect again)")
        self.paths = sorted({re.sub(r"#[^#/]*#/", "", path) for path in paths})

    def find(self, name: str, collection: str | None = None) -> str | None:
        """Path of the dataset ``object.attribute`` in a collection, or in any."""
        where = r"alf(?:/[^/]+)*" if collection is None else re.escape(collection)
        pattern = rf"{where}/(?:_[^_/]+_)?{re.escape(name)}\.(?:npy|pqt|csv)"
        found = [path for path in self.paths if re.fullmatch(pattern, path)]
        return min(found, key=lambda path: (path.count("/"), path), default=None)

    def load(self, name: str, collection: str | None = None) -> Any:
        """Content of a dataset, downloaded where it is not on disk: numbers (n,), or a table."""
        if (path := self.find(name, collection)) is None:
            problem = "no such dataset; leave its probe out with probes=..., or choose another"
            self.fail(f"{collection or 'alf'}/{name}", f"{problem} session")
        with self.reading(path, f"delete the file in {self.one.cache_dir} and load again"):
            folder, _, file_name = path.rpartition("/")
            with warnings.catch_warnings():  # tables that ONE saved do not say which is the default
                warnings.filterwarnings("ignore", message="No default revision")
                how = {"collection": folder, "check_hash": False, "download_only": True}
                file = self.one.load_dataset(self.id, file_name, **how)
            if revision := re.search(r"#([^#/]+)#", str(file)):
                self.provenance.setdefault("revisions", {})[path] = revision[1]
            place = zip(("lab", "subject", "date", "number"), file.session_parts, strict=True)
            self.provenance |= {key: str(part) for key, part in place}
            if not path.endswith(".npy"):
                return (pd.read_parquet if path.endswith(".pqt") else pd.read_csv)(file)
            array = np.load(file, allow_pickle=False) + 0  # text cannot be added to
            return array.reshape(len(array))


def _trials(session: _OneSession, align: str) -> pd.DataFrame:
    """The table of trials; columns may be in files of their own, in older recordings all."""
    path = session.find("trials.table")
    alone = not path and session.find(f"trials.{align}")
    table = pd.DataFrame() if alone else session.load("trials.table")
    with session.reading(path or "alf/trials.*"):
        for name in {*TRIAL_COLUMNS, align} - {*table}:
            if session.find(f"trials.{name}"):
                table[name] = session.load(f"trials.{name}")
        columns = dict.fromkeys(TRIAL_COLUMNS + [align] * (align in table))
        return table.reindex(columns=list(columns)).astype(np.float64)


def _behaviour(trials: pd.DataFrame) -> dict[str, np.ndarray]:
    """Behaviour with one value per trial; one that is known of no trial is left out."""
    left, right, kind = trials["contrastLeft"], trials["contrastRight"], trials["feedbackType"]
    found = {
        "choice": trials["choice"],
        "block": trials["probabilityLeft"],
        "reward": (kind > 0).astype(float).where(kind.notna()),
        # The side without a stimulus is NaN; where both are, the stimulus is not known.
        "contrast": right.sub(left, fill_value=0),
        "reaction-time": trials["firstMovement_times"] - trials["stimOn_times"],
    }
    return {key: x.to_numpy() for key, x in found.items() if x.notna().any()}


def _sortings(session: _OneSession, wanted: Sequence[str] | None) -> dict[str, str]:
    """Probe name -> collection with its spike sorting, probes in order."""
    found: dict[str, tuple[bool, int, str]] = {}
    for path in session.paths:
        pattern = r"(alf/(probe[^/]+)(?:/([^/]+))?)/(?:_[^_/]+_)?spikes\.times\.npy"
        if match := re.fullmatch(pattern, path):
            place, probe, sorter = match[1], match[2], match[3] or ""
            half = not all(session.find(name, place) for name in SORTING)
            rank = (half, (*SORTERS, sorter).index(sorter), place)
            found[probe] = min(rank, found.get(probe, rank))
    present = {path.split("/")[1] for path in session.paths if path.startswith("alf/probe")}
    names = present if wanted is None else {*wanted}
    if not names & set(found) or names - present:
        problem = f"no spike sorting in {sorted(names)}; there are {sorted(found)}"
        session.fail("alf/probe*/*/spikes.times.npy", problem)
    for probe in sorted(names - set(found)):
        session.warn(f"alf/{probe}", "no spike sorting; it is left out")
    return {probe: found[probe][-1] for probe in sorted(names & set(found))}


def _spikes(
    session: _OneSession, wanted: Sequence[str] | None, regions: bool, units: str | None
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Time and neuron (S,) of the spikes of all probes, and the table of the neurons."""
    collections = session.provenance["collections"] = _sortings(session, wanted)
    times, neurons, tables, offset = [], [], [], 0
    for probe, collection in collections.items():
        with session.reading(collection, "the files are of different sortings or damaged"):
            time, cluster, table = _probe(session, probe, collection, regions)
        times.append(time)
        neurons.append(cluster + offset)
        tables.append(table)
        offset += len(table)
    clusters = pd.concat(tables, ignore_index=True)
    if regions:
        if "allen_id" not in clusters:
            problem = "missing; the session has no histology: atlas=None loads it without regions"
            session.fail(f"alf/probe*/*/channels.{LOCATIONS}", problem)
        for probe in sorted(set(clusters["probe"][clusters["allen_id"].isna()])):
            session.warn(f"alf/{probe}", "no histology; its clusters have no region")
        clusters["allen_id"] = clusters["allen_id"].fillna(0).astype(np.int64)
        for level in LEVELS:
            clusters[level.lower()] = acronyms(clusters["allen_id"].to_numpy(), level)
    if units == "good":
        labels = clusters.get("label", pd.Series(np.nan, clusters.index))
        known = labels.groupby(clusters["probe"]).count()
        for probe in known.index[(known == 0) & known.any()]:
            session.warn(f"alf/{probe}/clusters.metrics", "no cluster has a label; none is used")
        clusters["keep"] = labels >= 1
    return np.concatenate(times), np.concatenate(neurons), clusters


def _probe(
    session: _OneSession, probe: str, collection: str, regions: bool
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Time and cluster (S,) of the spikes of one probe, and the table of its clusters."""
    times, ids, channels = (session.load(name, collection) for name in SORTING)
    if len(times) != len(ids) or ids.min(initial=0) < 0 or ids.max(initial=0) >= len(channels):
        raise ValueError(f"{len(times)} spikes of {len(ids)} clusters up to {len(channels) - 1}")
    clusters = pd.DataFrame({"probe": probe, "cluster": np.arange(len(channels))})
    for column, name in (("depth", "clusters.depths"), ("uuid", "clusters.uuids")):
        if session.find(name, collection):
            clusters[column] = np.ravel(session.load(name, collection))
    if session.find("clusters.metrics", collection):  # clusters without a spike have no row
        table = session.load("clusters.metrics", collection)
        table = table if "cluster_id" in table else table.reset_index()
        table = table.drop_duplicates("cluster_id").set_index("cluster_id")
        clusters["label"] = clusters["cluster"].map(table.get("label", {}))
    if regions and len(located := _locations(session, collection)):
        on_channel = channels >= 0  # neither NaN nor -1
        if not on_channel.all():
            problem = f"{(~on_channel).sum()} clusters without a channel; they have no region"
            session.warn(f"{collection}/clusters.channels", problem)
        places = np.where(on_channel, channels, 0).astype(np.int64)
        clusters["allen_id"] = np.where(on_channel, located[places], 0)  # 0: void
    return times, ids.astype(np.int64), clusters


def _locations(session: _OneSession, collection: str) -> np.ndarray:
    """Allen id of each channel of a sorting, (n,) int64; empty for a probe without histology.

    Where the sorting has none, they are those of the probe's sites, or of another sorting's
    channels; ``rawInd`` is the site of each channel.
    """
    probe, end = "/".join(collection.split("/")[:2]) + "/", f".{LOCATIONS}.npy"
    files = [path for path in session.paths if path.startswith(probe) and path.endswith(end)]
    own, sites = f"{collection}/channels{end}", f"electrodeSites{end}"
    if not files:
        return np.zeros(0, np.int64)
    best = min(files, key=lambda path: (path != own, not path.endswith(sites)))
    place, _, file = best.rpartition("/")
    ids = np.nan_to_num(session.load(file.removesuffix(".npy"), place)).astype(np.int64)
    if best == own:
        return ids

    def site_of_channel(collection: str) -> np.ndarray:
        known = session.find("channels.rawInd", collection)
        return session.load("channels.rawInd", collection) if known else np.arange(len(ids))

    by_site = pd.Series(ids, None if file == sites else site_of_channel(place))
    return by_site.reindex(site_of_channel(collection), fill_value=0).to_numpy()


def _traces(session: _OneSession) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Wheel speed (rad/s) and motion energy; what is not usable is left out, with a warning."""
    traces, problems = {}, []
    try:
        position = session.load("wheel.position")
        traces["wheel-speed"] = wheel_speed(session.load("wheel.timestamps"), position)
    except ValueError as error:
        session.warn("wheel", f"{error}; the session has no behaviour 'wheel-speed'")
    for camera in ("left", "right"):
        try:
            energy = session.load(f"{camera}Camera.ROIMotionEnergy")
            times = session.load(f"{camera}Camera.times")
            n, surplus = len(energy), len(times) - len(energy)
            if n == 0 or not 0 <= surplus <= max(5, 0.01 * n):
                session.fail(f"{camera}Camera", f"{n} energies, {len(times)} times")
            # As in IBL's loader, the last times count: surplus ones are before the video began.
            traces["whisker-motion-energy"] = ordered_samples(times[surplus:], energy)
            session.provenance["camera"] = camera
            return traces
        except SessionError as error:
            problems.append(str(error))
    session.warn("camera", f"{'; '.join(problems)}; no behaviour 'whisker-motion-energy'")
    return traces
