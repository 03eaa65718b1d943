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
    of ``session.neurons``) are used, unless you have replaced its regions. Otherwise labels are
    looked up in the atlas, and kept as column ``allen``. Labels that are no acronym stay. Where a
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
    """Columns with the labels as they are and at a level."""
    ids, atlas = allen_ids(), labels.astype(object)
    known = np.isin(labels, list(ids))
    if not any(map(has_region, labels[known].tolist())):
        problem = f"none of {sorted(set(labels.tolist()))[:5]} is an acronym of the Allen atlas"
        raise SessionError(f"session {session.name!r}, regions: {problem}")
    atlas[known] = acronyms(np.array([ids[label] for label in labels[known].tolist()]), level)
    return {"allen": labels, level.lower(): atlas.astype(np.str_)}


def within(region: str) -> np.ndarray:
    """Return Allen ids (right hemisphere) of a region, given as acronym, and of all its parts."""
    if region not in allen_ids():
        raise ValueError(f"region {region!r} is not an acronym of the Allen atlas")
    return _table().descendants(allen_ids()[region]).id


@functools.cache
def allen_ids() -> dict[str, int]:
    """Acronym -> Allen id in the right hemisphere, for every structure of the atlas."""
    table = _table()
    right = table.id >= 0  # the left hemisphere repeats every acronym with a negative id
    return dict(zip(table.acronym[right].tolist(), table.id[right].tolist(), strict=True))


@functools.cache
def _table() -> Any:
    return optional("iblatlas.regions", "data").BrainRegions()
