"""Brain regions at three levels of the Allen atlas.

``Allen`` names every structure, layers and nuclei apart (about 1,300 acronyms); ``Beryl`` joins
them to some 300 regions, as the International Brain Laboratory reports its results; ``Cosmos`` to
ten large parts of the brain. The tables are those of iblatlas, which needs no network.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from mtm.checkpoint import extra
from mtm.checks import one_of
from mtm.session import Session, SessionError, has_region

LEVELS = ("Allen", "Beryl", "Cosmos")
COLUMNS = tuple(level.lower() for level in LEVELS)  # of Session.neurons


def acronyms(ids: np.ndarray, level: str = "Allen") -> np.ndarray:
    """Acronym of each Allen id at a level of the hierarchy; unknown ids become "id 12345".

    Args:
        ids: (N,) integers; negative = left hemisphere.
        level: "Allen", "Beryl" or "Cosmos".

    Returns:
        (N,) strings. (iblatlas's own ``id2acronym`` leaves unknown ids out, and the rest moves up.)
    """
    one_of("level", level, LEVELS)
    ids = np.asarray(ids, dtype=np.int64)
    known, names, _ = _tables()
    place = np.searchsorted(known, ids).clip(max=len(known) - 1)
    labels = names[level][place].astype(object)
    strange = known[place] != ids
    labels[strange] = [f"id {i}" for i in ids[strange]]
    return labels.astype(np.str_)


def at_level(session: Session, level: str) -> Session:
    """The session with its regions named at another level; counts and all else are shared.

    Where the recording came with the labels of each level (columns ``allen``, ``beryl`` and
    ``cosmos`` of ``session.neurons``), these are used, unless its regions are none of them (you
    have named them anew). Otherwise each label is looked up among the
    acronyms of the atlas, and what it was is kept as column ``allen``, so that one can go back.
    Labels that are no acronym stay as they are. What a level has no region for (fibre tracts; at
    ``Beryl``, whole areas such as ``TH`` that hold several) becomes ``root``: such neurons are
    seen, but form no region.

    Args:
        session: any; the levels from coarse to fine cannot be made up: go back through ``allen``.
        level: "Allen", "Beryl" or "Cosmos".

    Raises:
        SessionError: when no label is an acronym of the atlas.
        ValueError: for an unknown level.
        ImportError: without the ``[data]`` extra, where labels must be looked up.

    Example:
        >>> at_level(session, "Cosmos").region_names
        ['HPF', 'Isocortex', 'TH']
    """
    one_of("level", level, LEVELS)
    column = level.lower()
    columns = {name: session.neurons[name] for name in COLUMNS if name in session.neurons}
    if not any(np.array_equal(session.regions, labels) for labels in columns.values()):
        if session.region_names:  # labels of the user's own: what the columns say is past
            columns = {}
    if column in columns:
        return replace(session, regions=columns[column])
    allen = columns.get("allen", session.regions)
    ids = allen_ids()
    known = np.array([name in ids for name in allen.tolist()], dtype=bool)
    named = np.array([has_region(name) for name in allen.tolist()], dtype=bool)
    if not (known & named).any():
        labels = sorted(set(allen[named].tolist()))[:5]
        raise SessionError(
            f"session {session.name!r}, regions: none of {labels} is an "
            "acronym of the Allen atlas; rename the regions with dataclasses.replace(session, "
            "regions=...)"
        )
    renamed = allen.astype(object)
    renamed[known] = acronyms(np.array([ids[name] for name in allen[known].tolist()]), level)
    renamed = renamed.astype(np.str_)
    others = {name: values for name, values in session.neurons.items() if name not in COLUMNS}
    columns |= {"allen": allen, column: renamed}
    return replace(session, regions=renamed, neurons=others | columns)


def allen_ids() -> dict[str, int]:
    """Acronym -> Allen id of the right hemisphere, for every structure of the atlas."""
    return _tables()[2]


def within(region: str) -> np.ndarray:
    """Allen ids (right hemisphere) of a region and of all that it contains.

    Args:
        region: acronym.

    Raises:
        ValueError: for one that the atlas does not have.
    """
    if region not in allen_ids():
        raise ValueError(f"region {region!r} is not an acronym of the Allen atlas")
    return _table().descendants(allen_ids()[region]).id


@functools.cache
def _table() -> Any:
    return extra("iblatlas.regions", "data").BrainRegions()


@functools.cache
def _tables() -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, int]]:
    """Allen ids, sorted; at each level the acronym that belongs to each; and acronym -> id."""
    table = _table()
    order = np.argsort(table.id)
    names = {level: table.acronym[table.mappings[level]][order] for level in LEVELS}
    right = table.id >= 0  # the left hemisphere repeats every acronym with a negative id
    ids = dict(zip(table.acronym[right].tolist(), table.id[right].tolist(), strict=True))
    return table.id[order], names, ids
