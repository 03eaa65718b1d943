"""Brain regions at three levels of the Allen atlas, from the tables of iblatlas.

``Allen`` has about 1,300 structures, ``Beryl`` some 300 regions, as the International Brain
Laboratory reports its results, ``Cosmos`` ten large parts of the brain.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from mtm.files import optional
from mtm.inputs import SessionError
from mtm.session import Session, has_region

LEVELS = ("Allen", "Beryl", "Cosmos")


def acronyms(ids: ArrayLike, level: str = "Allen") -> np.ndarray:
    """Look up the acronyms (N,) of Allen ids (N,) at a level; unknown ids become "id 12345".

    Negative ids are the left hemisphere's. (iblatlas's own ``id2acronym`` drops unknown ids.)
    """
    table, ids = _table(), np.asarray(ids, dtype=np.int64)
    names = pd.Series(table.acronym[table.mappings[level]], table.id).reindex(ids)
    return np.where(names.isna(), [f"id {i}" for i in ids], names).astype(np.str_)


def at_level(session: Session, level: str) -> Session:
    """Return the session with its regions named at another level, sharing counts and all else.

    Labels that came with the recording (columns ``allen``, ``beryl`` and ``cosmos`` of
    ``session.neurons``) are used, unless you have replaced its regions. Otherwise acronyms or full
    names ("Primary visual area") are looked up in the atlas, and the acronyms kept as column
    ``allen``, without which fine names cannot come back. Other labels stay. Where a level has no
    region (fibre tracts; at ``Beryl``, whole areas such as ``TH``), the label becomes ``root``:
    such neurons form no region.

    Raises:
        ValueError: an unknown level.
        SessionError: no label is an acronym of the atlas.

    Example:
        >>> at_level(session, "Cosmos").region_names
        ['HPF', 'Isocortex', 'TH']
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}; got {level!r}")
    given = {x: values for x, values in session.neurons.items() if x.title() in LEVELS}
    current = any(np.array_equal(session.regions, labels) for labels in given.values())
    if session.region_names and not current:  # labels of the user's own; the columns are outdated
        given = {}
    if level.lower() not in given:
        given |= _looked_up(session, given.get("allen", session.regions), level)
    others = {x: values for x, values in session.neurons.items() if x.title() not in LEVELS}
    changed = copy.copy(session)
    changed.regions, changed.neurons = given[level.lower()], others | given
    return changed


def _looked_up(session: Session, labels: np.ndarray, level: str) -> dict[str, np.ndarray]:
    """Columns with the labels at the levels Allen and ``level``."""
    table, of_acronym = _table(), allen_ids()
    of_name = {name.lower(): abs(i) for name, i in zip(table.name, table.id, strict=True)}
    ids = pd.Series([of_acronym.get(x, of_name.get(x.lower().replace(",", ""))) for x in labels])
    known = ids.notna().to_numpy()
    if not any(map(has_region, labels[known].tolist())):
        problem = f"none of {sorted(set(labels.tolist()))[:5]} is an acronym of the Allen atlas"
        raise SessionError(f"session {session.name!r}, regions: {problem}")
    found = {x.lower(): pd.Series(acronyms(ids.fillna(0), x)) for x in ("Allen", level)}
    return {key: names.where(known, labels).to_numpy(np.str_) for key, names in found.items()}


def within(region: str) -> np.ndarray:
    """Return Allen ids (right hemisphere) of a region, given as acronym, and of all its parts."""
    if region not in allen_ids():
        raise ValueError(f"region {region!r} is not an acronym of the Allen atlas")
    return _table().descendants(allen_ids()[region]).id


@functools.cache
def allen_ids() -> dict[str, int]:
    """Acronym -> Allen id in the right hemisphere, for every structure of the atlas."""
    table = _table()  # the left hemisphere repeats every acronym with a negative id
    return dict(zip(table.acronym.tolist(), np.abs(table.id).tolist(), strict=True))


@functools.cache
def _table() -> Any:
    return optional("iblatlas.regions", "data").BrainRegions()
