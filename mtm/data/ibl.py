"""International Brain Laboratory recordings through ONE: an eid in, a Session out.

Needs ONE-api and iblatlas, not ibllib. The same code reads the public server and a folder on disk
(downloaded, or written by `mtm.data.synthetic`). Facts about IBL's pipeline are from ibllib
(``brainbox.io.one``, ``brainbox.behavior.wheel``) and from MtM's data preparation.

A session's behaviour, NaN = missing:

- ``choice`` (K,): -1 right, +1 left, 0 none; ``block``: probability of a stimulus on the left;
  ``reward``: 1 or 0; ``contrast``: right minus left, -1..1; ``reaction-time``: first movement
  minus stimulus onset, seconds.
- ``wheel-speed`` (K, T) rad/s: position at 1 kHz, low-pass 20 Hz, differentiated, absolute, mean
  of each bin.
- ``whisker-motion-energy`` (K, T), arbitrary units: left camera, else right; averaged in each bin.
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
from mtm.data.recording import Recording, ordered_samples, wheel_speed
from mtm.data.regions import LEVELS, acronyms, within
from mtm.files import optional
from mtm.session import Session, SessionError

SORTERS = ("iblsorter", "pykilosort", "")  # newest first; "" = files in alf/probeNN itself
TRIAL_COLUMNS = (
    *("stimOn_times", "goCue_times", "firstMovement_times", "feedback_times"),
    *("choice", "feedbackType", "probabilityLeft", "contrastLeft", "contrastRight"),
)
LOCATIONS = "brainLocationIds_ccf_2017"  # of channels, or of a probe's electrodeSites
SORTING = ("spikes.times", "spikes.clusters", "clusters.channels")  # what a probe needs
SILENCE = 0.1  # seconds without a spike of a whole probe that do not yet mean that it was off


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
        cache_dir: a folder with ONE's tables (``sessions.pqt``, ``datasets.pqt``), made by
            `mtm.data.synthetic.index_alf` or, after downloads, by ``one.save_cache()``. It is read
            without a network. With credentials, where to download to.
        username, password: of a free account (``<base_url>/signup``). ONE keeps the log-in, so
            later the username alone is enough on the same machine.
        token: instead of both: the text that ``<base_url>/me`` shows (for ORCiD accounts).
        base_url: of the server.
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
                raise ValueError(
                    f"no log-in of {username!r} at {base_url} is saved on this machine; pass "
                    f"password=..., or token=... from {base_url}/me"
                ) from None
    if cache_dir is None:
        raise ValueError(
            "pass cache_dir, a folder with ONE's tables (mtm.data.synthetic.index_alf makes them), "
            f"or username and password, or token: accounts are made at {base_url}/signup"
        )
    for table in ("sessions.pqt", "datasets.pqt"):
        if not (Path(cache_dir) / table).is_file():
            raise FileNotFoundError(
                f"{Path(cache_dir) / table} is missing; on an ALF tree, call "
                f"mtm.data.synthetic.index_alf({str(cache_dir)!r}), or pass credentials to download"
            )
    return api.One(cache_dir=Path(cache_dir), mode="local")


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
    """Load one IBL session: all probes, clusters (silent ones included), trials, and behaviour.

    Args:
        one: from `connect`, or any ONE.
        eid: session id.
        window, bin_size: (start, stop) around the event, and width of a bin; seconds.
        align: the event: a column of the trials table. Trials without it are left out, as are
            those before or after the time in which all probes recorded.
        atlas: level of ``Session.regions``: "Allen" (as MtM), "Beryl" or "Cosmos". None: load
            without regions. A probe without histology, of two, has none.
        trial_filter: "reaction-time" keeps the trials that `reaction_time_filter` accepts, each in
            its part of the split. The paper decodes behaviour from these, and trains on all.
        units: "good" keeps the clusters with label 1 (IBL's three quality criteria) only.
        probes: names of those to load, as ``["probe00"]``. Default: all with a spike sorting.

    Returns:
        the session, named by the eid. ``neurons`` has ``probe``, ``cluster`` (id on its probe),
        ``allen_id``, ``allen``, ``beryl``, ``cosmos``, and where present ``depth`` (micrometres
        from the tip), ``label``, ``uuid``. Errors name the eid, the dataset and the remedy.
    """
    known = {"atlas": LEVELS, "trial_filter": ("reaction-time",), "units": ("good",)}
    for name, value in {"atlas": atlas, "trial_filter": trial_filter, "units": units}.items():
        if value not in (None, *known[name]):
            raise ValueError(f"{name} must be None or one of {', '.join(known[name])}: {value!r}")
    session = _OneSession(one, eid)
    spikes, clusters = _spikes(session, probes, atlas is not None, units)
    trials = _trials(session, align, trial_filter)
    trials = _while_recorded(session, trials, align, window, spikes)
    facts = session.provenance = {**session.provenance, "align": align, "units": units}
    return Session.from_spike_times(
        spikes["time"].to_numpy(),
        spikes["neuron"].to_numpy(),
        trials[align].to_numpy(),
        clusters=clusters.index,
        regions=None if atlas is None else clusters[atlas.lower()],
        window=window,
        bin_size=bin_size,
        traces=_whisker(session) | _wheel(session),
        behaviour=_behaviour(trials),
        neurons=clusters.to_dict("series"),
        name=session.name,
        subject=facts["subject"],
        trial_ids=trials.index.to_numpy(),
        n_recorded=facts["trials in the table"],
        provenance=facts,
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
    """Find sessions that have sorted spikes; returns their eids.

    Args:
        one: from `connect`. On a server, its database is asked; on a folder, ONE's tables.
        project, lab, subject: or part of the name.
        region: Allen acronym of a region that a probe went through, or of a larger one that
            contains it ("HPF" finds CA1). On a folder, each session's channels are read for that.
        quality: worst grade of the spike times that will do: "PASS", "WARNING", "FAIL".
        **terms: any other of ``one.search_terms()``, as ``date_range=("2020-01-01", None)``.
    """
    given = {"projects": project, "lab": lab, "subject": subject, "dataset_qc_lte": quality}
    inside = None if region is None else within(region)
    if not one.offline:
        given["atlas_acronym"] = region
    terms |= {key: value for key, value in given.items() if value is not None}
    with warnings.catch_warnings():  # ONE 3.6 with pandas 3
        warnings.filterwarnings("ignore", message="The copy keyword is deprecated")
        eids = [str(eid) for eid in one.search(datasets="spikes.times.npy", **terms)]
    if inside is None or not one.offline:
        return eids
    found = []
    for session in (_OneSession(one, eid) for eid in eids):
        try:
            places = _sortings(session, None).values()
            ids = [np.abs(_locations(session, place)) for place in places]
        except SessionError as error:  # the other sessions can still be searched
            warnings.warn(f"{error}; left out of the search", UserWarning, stacklevel=2)
            continue
        found += [session.name] * any(np.isin(each, inside).any() for each in ids)
    return found


def prepare(one: Any, eids: Iterable[Any], out: str | Path, **options: Any) -> Prepared:
    """Download and write many sessions, each as ``OUT/<eid>.npz``: :func:`mtm.prepare` for ONE.

    Args:
        one: from `connect`. Every process connects for itself, with the log-in that ONE has saved.
        eids: as from `search`, or `mtm.official.PAPER_EIDS`.
        out: folder.
        **options: those of :func:`mtm.prepare` and of `load_session`.

    Example:
        >>> done = ibl.prepare(one, official.PAPER_EIDS, "sessions", trial_filter="reaction-time")
    """
    where: dict[str, Any] = {"cache_dir": str(one.cache_dir)}
    if not one.offline:
        where |= {"username": one.alyx.user, "base_url": one.alyx.base_url}
    load = functools.partial(_connect_and_load, where)
    return prepare_all(load, {str(eid): eid for eid in eids}, out, **options)


def _connect_and_load(where: dict[str, Any], eid: Any, **options: Any) -> Session:
    return load_session(connect(**where), eid, **options)


def reaction_time_filter(trials: Mapping[str, Any]) -> np.ndarray:
    """The paper's trial filter: True for the trials to keep, (K,) bool.

    Kept are trials with 0.08 s <= first movement - stimulus onset <= 2 s, feedback at most 10 s
    after the go cue, a choice, and no NaN in stimulus onset, choice, feedback time and type, block
    and first movement. (As in the authors' code, a missing go cue rejects none.)

    Args:
        trials: IBL's trials table: column -> (K,).
    """
    required = ("choice", "feedback_times", "feedbackType", "probabilityLeft")
    columns = (*required, "stimOn_times", "firstMovement_times", "goCue_times")
    column = {name: np.asarray(trials[name], dtype=np.float64) for name in columns}
    reaction_time = column["firstMovement_times"] - column["stimOn_times"]  # NaN fails both bounds
    keep = (reaction_time >= 0.08) & (reaction_time <= 2.0) & (column["choice"] != 0)
    keep &= ~(column["feedback_times"] - column["goCue_times"] > 10.0)
    for name in required:
        keep &= ~np.isnan(column[name])
    return keep


# ---------------------------------------------------------------- what ONE has


class _OneSession(Recording):
    """The datasets of one session: which there are, and their content."""

    def __init__(self, one: Any, eid: Any) -> None:
        self.one = one
        try:
            self.id = one.to_eid(eid)
        except ValueError as error:
            raise SessionError(f"session {eid!r}: not a session id ({error})") from error
        server = None if one.offline else one.alyx.base_url
        super().__init__(str(self.id or eid), origin="ONE", server=server, eid=str(self.id or eid))
        paths = () if self.id is None else one.list_datasets(self.id)
        if not len(paths):
            self.fail("datasets", f"none in {one!r}; ibl.search(one) lists the sessions there are "
                      "(after adding files, call index_alf and connect again)")  # fmt: skip
        self.paths = sorted({re.sub(r"#[^#/]*#/", "", path) for path in paths})

    def find(self, name: str, collection: str | None = None) -> str | None:
        """Path of the dataset ``object.attribute`` in a collection, or in any."""
        where = r"alf(?:/[^/]+)*" if collection is None else re.escape(collection)
        pattern = rf"{where}/(?:_[^_/]+_)?{re.escape(name)}\.(?:npy|pqt|csv)"
        found = [path for path in self.paths if re.fullmatch(pattern, path)]
        return min(found, key=lambda path: (path.count("/"), path), default=None)

    def load(self, name: str, collection: str | None = None, remedy: str = "") -> Any:
        """Content of a dataset, downloaded where it is not on disk: numbers (n,), or a table."""
        path = self.find(name, collection)
        if path is None:
            remedy = remedy or "choose another session"
            self.fail(f"{collection or 'alf'}/{name}", f"no such dataset; {remedy}")
        with self.reading(path, f"delete the file in {self.one.cache_dir} and load again"):
            folder, _, file_name = path.rpartition("/")
            with warnings.catch_warnings():  # tables that ONE saved do not say which is the default
                warnings.filterwarnings("ignore", message="No default revision")
                how = {"collection": folder, "check_hash": False, "download_only": True}
                file = self.one.load_dataset(self.id, file_name, **how)
            if revision := re.search(r"#([^#/]+)#", str(file)):
                self.provenance.setdefault("revisions", {})[path] = revision[1]
            place = ("lab", "subject", "date", "number")
            self.provenance |= dict(zip(place, map(str, file.session_parts), strict=True))
            if not path.endswith(".npy"):
                return (pd.read_parquet if path.endswith(".pqt") else pd.read_csv)(file)
            array = np.load(file, allow_pickle=False) + 0  # text cannot be added to
            return array.reshape(len(array))


# ---------------------------------------------------------------- trials


def _trials(session: _OneSession, align: str, trial_filter: str | None) -> pd.DataFrame:
    """The trials to use; their index is the row in the table."""
    path, alone = session.find("trials.table"), session.find(f"trials.{align}")
    table = pd.DataFrame() if alone and not path else session.load("trials.table")
    path = path or "alf/trials.*"
    with session.reading(path):
        for name in dict.fromkeys((*TRIAL_COLUMNS, align)):
            if name not in table and session.find(f"trials.{name}"):  # in a file of its own
                table[name] = session.load(f"trials.{name}")
        if align not in table:
            events = sorted(name for name in table if name.endswith("_times"))
            session.fail(path, f"no column {align!r} to align to; there are {events}")
        names = [name for name in table if name in (*TRIAL_COLUMNS, align)]
        trials = table[names].astype(np.float64).reset_index(drop=True)
        keep = trials[align].notna()
        facts = {"trials in the table": len(keep), f"without {align}": int((~keep).sum())}
        if trial_filter is not None:
            accepted = reaction_time_filter(trials)
            facts["rejected by the filter"] = int((keep & ~accepted).sum())
            keep &= accepted
    session.provenance |= facts
    if not keep.any():
        session.fail(path, f"no trial has {align!r} and passes trial_filter={trial_filter!r}")
    return trials[keep]


def _while_recorded(
    session: _OneSession,
    trials: pd.DataFrame,
    align: str,
    window: tuple[float, float],
    spikes: pd.DataFrame,
) -> pd.DataFrame:
    """The trials during which all probes recorded; neurons would seem silent in the others.

    A probe records from its first to its last spike; one with few spikes does not tell.
    """
    ends = spikes.groupby("probe")["time"].agg(["min", "max", "size"])
    ends = ends[ends["size"] >= len(trials)]
    start, stop = ends["min"].max() - SILENCE, ends["max"].min() + SILENCE
    outside = (trials[align] + window[0] < start) | (trials[align] + window[1] > stop)
    if outside.all():  # another clock, or no spikes; binning reports it
        return trials
    session.provenance["beyond the recording"] = int(outside.sum())
    return trials[~outside]


def _behaviour(trials: pd.DataFrame) -> dict[str, np.ndarray]:
    """Behaviour with one value per trial; one that is known of no trial is left out."""
    column = trials.reindex(columns=list(TRIAL_COLUMNS))
    left, right, kind = column["contrastLeft"], column["contrastRight"], column["feedbackType"]
    found = {
        "choice": column["choice"],
        "block": column["probabilityLeft"],
        "reward": (kind > 0).astype(float).where(kind.notna()),
        # The side without a stimulus is NaN; where both are, the stimulus is not known.
        "contrast": right.sub(left, fill_value=0),
        "reaction-time": column["firstMovement_times"] - column["stimOn_times"],
    }
    return {key: x.to_numpy() for key, x in found.items() if x.notna().any()}


# ---------------------------------------------------------------- spikes and regions


def _sortings(session: _OneSession, wanted: Sequence[str] | None) -> dict[str, str]:
    """Probe name -> collection with its spike sorting, probes in order."""
    found: dict[str, list[str]] = {}
    pattern = r"alf/(probe[^/]+)(?:/([^/]+))?/(?:_[^_/]+_)?spikes\.times\.npy"
    for path in session.paths:
        if match := re.fullmatch(pattern, path):
            found.setdefault(match[1], []).append(match[2] or "")
    present = {path.split("/")[1] for path in session.paths if path.startswith("alf/probe")}
    names = present if wanted is None else {wanted} if isinstance(wanted, str) else {*wanted}
    if not names & set(found) or names - present:
        problem = f"no spike sorting in {sorted(names)}; there are {sorted(found)}"
        session.fail("alf/probe*/*/spikes.times.npy", problem)
    if unsorted := sorted(names - set(found)):
        session.warn(f"alf/{unsorted[0]}", f"no spike sorting; left out {', '.join(unsorted)}")
    best = {}
    for probe in sorted(names & set(found)):
        order = sorted(found[probe], key=lambda name: (*SORTERS, name).index(name))
        places = [f"alf/{probe}/{sorter}".rstrip("/") for sorter in order]
        whole = [place for place in places if all(session.find(n, place) for n in SORTING)]
        best[probe] = (whole or places)[0]
        if best[probe] != places[0]:
            session.warn(places[0], f"not all of a spike sorting; {best[probe]} instead")
    return best


def _spikes(
    session: _OneSession, wanted: Sequence[str] | None, regions: bool, units: str | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spikes (time, neuron, probe) of all probes, and the table of their clusters by neuron."""
    collections = session.provenance["collections"] = _sortings(session, wanted)
    places = collections.items() if regions else ()
    located = {probe: _locations(session, place) for probe, place in places}
    for probe in [probe for probe, ids in located.items() if not len(ids)]:
        if not any(map(len, located.values())):
            problem = "the probe has no histology: atlas=None loads it without regions"
            session.fail(f"{collections[probe]}/channels.{LOCATIONS}", f"missing; {problem}")
        session.warn(f"alf/{probe}", "no histology; its clusters have no region")
    tables, offset = [], 0
    for probe, collection in collections.items():
        with session.reading(collection, "the files are of different sortings or damaged"):
            spikes, table = _probe(session, probe, collection, located.get(probe))
        tables.append((spikes.assign(neuron=spikes["cluster"] + offset, probe=probe), table))
        offset += len(table)
    spikes, clusters = (pd.concat(each, ignore_index=True) for each in zip(*tables, strict=True))
    session.provenance["clusters"] = offset
    if "uuid" in clusters:
        clusters["uuid"] = clusters["uuid"].fillna("")  # of a probe without uuids
    if units == "good":
        for probe, labels in clusters.groupby("probe")["label"] if "label" in clusters else ():
            if labels.isna().all():
                problem = f"none of its {len(labels)} clusters has a label; they are left out"
                session.warn(f"{collections[probe]}/clusters.metrics", problem)
        clusters = clusters[clusters["label"] >= 1] if "label" in clusters else clusters[:0]
        if clusters.empty:
            session.fail("clusters.metrics", "no cluster has label 1; pass units=None")
        spikes = spikes[spikes["neuron"].isin(clusters.index)]
    return spikes, clusters


def _probe(
    session: _OneSession, probe: str, collection: str, locations: np.ndarray | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spikes (time, cluster) of one probe, and the table of its clusters."""
    remedy = f"leave the probe out with probes=..., all but {probe!r}"
    channels = session.load("clusters.channels", collection, remedy)
    times = session.load("spikes.times", collection, remedy)
    ids = session.load("spikes.clusters", collection, remedy).astype(np.int64)
    spikes = pd.DataFrame({"time": times, "cluster": ids})
    timed = np.isfinite(spikes["time"])
    if not timed.all():
        session.warn(f"{collection}/spikes.times", f"left out {(~timed).sum()} without a time")
    spikes = spikes[timed]
    if not spikes["cluster"].between(0, len(channels) - 1).all():
        raise ValueError(f"spikes of cluster {ids.max()}, but only {len(channels)} clusters")
    clusters = pd.DataFrame({"probe": probe, "cluster": np.arange(len(channels))})
    if locations is not None:
        clusters["allen_id"] = _allen_ids(session, collection, channels, locations)
        for level in LEVELS:
            clusters[level.lower()] = acronyms(clusters["allen_id"].to_numpy(), level)
    for column, name in (("depth", "depths"), ("uuid", "uuids"), ("label", "metrics")):
        if session.find(f"clusters.{name}", collection):
            found = session.load(f"clusters.{name}", collection)
            if name == "uuids":
                found = found.iloc[:, 0].to_numpy(str)
            elif name == "metrics":  # clusters without a spike have no row
                found = found if "cluster_id" in found else found.reset_index()
                if "label" not in found:
                    continue
                label = found.drop_duplicates("cluster_id").set_index("cluster_id")["label"]
                found = label.reindex(clusters["cluster"]).to_numpy(np.float64)
            clusters[column] = found
    return spikes, clusters


def _locations(session: _OneSession, collection: str) -> np.ndarray:
    """Allen id of each channel of a sorting, (n,) int64; empty for a probe without histology.

    Where the sorting has none, they are those of the probe's sites, or of another sorting's
    channels; ``rawInd`` is the site of each channel.
    """
    probe, ending = "/".join(collection.split("/")[:2]) + "/", f".{LOCATIONS}.npy"
    found = [path for path in session.paths if path.startswith(probe) and path.endswith(ending)]
    if not found:
        return np.zeros(0, np.int64)
    best = min(found, key=lambda path: (path.rpartition("/")[0] != collection, "Sites" not in path))
    place, _, file = best.rpartition("/")
    ids = np.nan_to_num(session.load(file.removesuffix(".npy"), place)).astype(np.int64)
    if place == collection:
        return ids

    def sites(collection: str) -> np.ndarray:
        known = session.find("channels.rawInd", collection)
        return session.load("channels.rawInd", collection) if known else np.arange(len(ids))

    with session.reading(best, "the files are of different sortings or damaged"):
        by_site = pd.Series(ids, np.arange(len(ids)) if "Sites" in file else sites(place))
        return by_site.reindex(sites(collection), fill_value=0).to_numpy()


def _allen_ids(
    session: _OneSession, collection: str, channels: np.ndarray, locations: np.ndarray
) -> np.ndarray:
    """Allen id of each cluster, (n,) int64, from that of its channel; 0, void, without one."""
    on_channel = channels >= 0  # neither NaN nor -1
    if not on_channel.all():
        problem = f"{(~on_channel).sum()} clusters without a channel; they have no region"
        session.warn(f"{collection}/clusters.channels", problem)
    found = np.zeros(len(channels), dtype=np.int64)
    if len(locations):
        found[on_channel] = locations[channels[on_channel].astype(np.int64)]
    return found


# ---------------------------------------------------------------- wheel and camera

Trace = dict[str, tuple[np.ndarray, np.ndarray]]


def _wheel(session: _OneSession) -> Trace:
    """Wheel speed at 1 kHz, rad/s; nothing, with a warning, where there is no usable wheel."""
    try:
        times, position = session.load("wheel.timestamps"), session.load("wheel.position")
        return {"wheel-speed": wheel_speed(*ordered_samples(times, position))}
    except ValueError as error:
        session.warn("wheel", f"{error}; the session has no behaviour 'wheel-speed'")
        return {}


def _whisker(session: _OneSession) -> Trace:
    """Motion energy at each frame; nothing, with a warning, where there is none.

    As IBL's loader has it: where there are more times than frames, the last times count, since the
    surplus ones are of frames before the video began; surplus frames cannot be placed.
    """
    problems = []
    for camera in ("left", "right"):
        try:
            energy = session.load(f"{camera}Camera.ROIMotionEnergy")
            times = session.load(f"{camera}Camera.times")
            n, surplus = len(energy), len(times) - len(energy)
            if n == 0 or not 0 <= surplus <= max(5, 0.01 * n):
                session.fail(f"{camera}Camera", f"{n} energies, {len(times)} times")
            session.provenance["camera"] = camera
            return {"whisker-motion-energy": ordered_samples(times[surplus:], energy)}
        except SessionError as error:
            problems.append(str(error))
    session.warn("camera", f"{'; '.join(problems)}; no behaviour 'whisker-motion-energy'")
    return {}
