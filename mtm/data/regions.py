"""Brain regions at three levels of the Allen atlas, from the tables of iblatlas.

``Allen`` has about 1,300 structures, ``Beryl`` some 300 regions, as the International Brain
Laboratory reports its results, ``Cosmos`` ten large parts of the brain.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np

from mtm.files import optional
from mtm.session import Session, SessionError, has_region

LEVELS = ("Allen", "Beryl", "Cosmos")


def acronyms(ids: np.ndarray, level: str = "Allen") -> np.ndarray:
    """Look up the acronyms (N,) of Allen ids (N,) at a level; unknown ids become "id 12345".

    Negative ids are the left hemisphere's. (iblatlas's own ``id2acronym`` drops unknown ids.)
    """
    table, ids = _table(), np.asarray(ids, dtype=np.int64)
    order = np.argsort(table.id)
    row = order[np.searchsorted(table.id[order], ids).clip(max=len(order) - 1)]
    names = table.acronym[table.mappings[level][row]].astype(np.str_)
    return np.where(table.id[row] == ids, names, [f"id {i}" for i in ids])


def at_level(session: Session, level: str) -> Session:
    """Return the session with its regions named at another level, sharing counts and all else.

    Labels of each level that came with the recording (columns ``allen``, ``beryl`` and ``cosmos``
    of ``session.neurons``) are used, unless you have replaced its regions. Otherwise labels,
    acronyms or full names ("Primary visual area"), are looked up in the atlas, and the acronyms
    kept as column ``allen``. Other labels stay. Where a
    level has no region (fibre tracts; at ``Beryl``, whole areas such as ``TH``), the label becomes
    ``root``: such neurons form no region.

    Args:
        session: any; to go from coarse to fine it needs the column ``allen``.
        level: "Allen", "Beryl" or "Cosmos".

    Raises:
        SessionError: when no label is an acronym of the atlas.
        ImportError: without the ``[data]`` extra, where labels must be looked up.

    Example:
        >>> at_level(session, "Cosmos").region_names
        ['HPF', 'Isocortex', 'TH']
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}; got {level!r}")
    names = [name.lower() for name in LEVELS]
    columns = {name: session.neurons[name] for name in names if name in session.neurons}
    current = any(np.array_equal(session.regions, labels) for labels in columns.values())
    if session.region_names and not current:  # labels of the user's own; the columns are outdated
        columns = {}
    if level.lower() not in columns:
        columns |= _looked_up(session, columns.get("allen", session.regions), level)
    changed = copy.copy(session)
    changed.regions = columns[level.lower()]
    others = {name: values for name, values in session.neurons.items() if name not in names}
    changed.neurons = others | columns
    return changed


def _looked_up(session: Session, labels: np.ndarray, level: str) -> dict[str, np.ndarray]:
    """Columns with the labels at the levels Allen and ``level``."""
    ids = [_allen_id(label) for label in labels.tolist()]
    known = np.array([number is not None for number in ids])
    if not any(map(has_region, labels[known].tolist())):
        problem = f"none of {sorted(set(labels.tolist()))[:5]} is an acronym of the Allen atlas"
        raise SessionError(f"session {session.name!r}, regions: {problem}")
    columns = {}
    for name in ("Allen", level):
        column = labels.astype(object)
        column[known] = acronyms(np.array([number for number in ids if number is not None]), name)
        columns[name.lower()] = column.astype(np.str_)
    return columns


def within(region: str) -> np.ndarray:
    """Return Allen ids (right hemisphere) of a region, given as acronym, and of all its parts."""
    if region not in allen_ids():
        raise ValueError(f"region {region!r} is not an acronym of the Allen atlas")
    return _table().descendants(allen_ids()[region]).id


def _allen_id(label: str) -> int | None:
    """Allen id of an acronym, or of a full name in any case, with or without commas."""
    return allen_ids().get(label, _ids_by_name().get(label.lower().replace(",", "")))


@functools.cache
def allen_ids() -> dict[str, int]:
    """Acronym -> Allen id in the right hemisphere, for every structure of the atlas."""
    table = _table()
    right = table.id >= 0  # the left hemisphere repeats every acronym with a negative id
    return dict(zip(table.acronym[right].tolist(), table.id[right].tolist(), strict=True))


@functools.cache
def _ids_by_name() -> dict[str, int]:
    """Name in lower case, as "primary visual area layer 5", -> Allen id."""
    names = [name.lower() for name in _table().name.tolist()]
    return dict(zip(names, np.abs(_table().id).tolist(), strict=True))


@functools.cache
def _table() -> Any:
    return optional("iblatlas.regions", "data").BrainRegions()
