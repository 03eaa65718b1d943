"""Regions at three levels, against iblatlas."""

import numpy as np
import pytest

pytest.importorskip("iblatlas")
from iblatlas.regions import BrainRegions  # noqa: E402

from mtm import Session, SessionError, at_level  # noqa: E402
from mtm.data.regions import acronyms, allen_ids, within  # noqa: E402

LABELS = np.array(["CA1", "VISp5", "VISp6a", "root", "fa", "my area", "", "TH", "PO"])


def session(regions=LABELS, **fields):
    return Session(np.ones((10, 2, 9)), regions, "atlas", **fields)


def test_levels_against_iblatlas():
    table = BrainRegions()
    known = np.array([label in allen_ids() for label in LABELS])
    for level in ("Allen", "Beryl", "Cosmos"):
        labels = at_level(session(), level).regions
        expected = table.acronym2acronym(LABELS[known], mapping=level)
        assert labels[known].tolist() == expected.tolist()
        assert labels[~known].tolist() == ["my area", ""]  # stay as they are
        ids = np.array([-385, allen_ids()["CA1"], 123456789])  # 385: primary visual area
        visual, hippocampal = table.id2acronym(np.abs(ids[:2]), mapping=level)
        assert acronyms(ids, level).tolist() == [visual, hippocampal, "id 123456789"]


def test_there_and_back():
    fine = session()
    coarse = at_level(fine, "Cosmos")
    assert coarse.region_names == ["HPF", "Isocortex", "TH", "my area"]
    assert coarse.counts is fine.counts and fine.regions.tolist() == LABELS.tolist()
    assert at_level(coarse, "Allen").regions.tolist() == LABELS.tolist()
    # Beryl has no region for TH as a whole: such neurons stay, but form none.
    beryl = at_level(coarse, "Beryl")
    assert beryl.regions[7] == "root" and beryl.region_names == ["CA1", "PO", "VISp", "my area"]
    assert beryl.region_codes.tolist() == [0, 2, 2, -1, -1, 3, -1, -1, 1]


def test_full_names_are_known_as_acronyms_are():
    names = np.array(["Primary visual area, layer 5", "field ca1", "Thalamus", "my area"])
    coarse = at_level(Session(np.ones((10, 2, 4)), names), "Cosmos")
    assert coarse.regions.tolist() == ["Isocortex", "HPF", "TH", "my area"]
    assert at_level(coarse, "Allen").regions.tolist() == ["VISp5", "CA1", "TH", "my area"]


def test_labels_of_the_recording_come_first():
    letters = np.array(list("abcdefghi"))
    columns = {"allen": LABELS, "cosmos": letters}
    for regions in (LABELS, None):
        labels = at_level(session(regions, neurons=columns), "Cosmos").regions
        assert labels.tolist() == letters.tolist()
    # Labels that the user has replaced count more than the columns.
    anew = at_level(session(["CA1"] * 9, neurons=columns), "Cosmos")
    assert set(anew.regions.tolist()) == {"HPF"}
    assert at_level(anew, "Allen").regions.tolist() == ["CA1"] * 9


def test_what_cannot_be_looked_up():
    with pytest.raises(SessionError, match=r"'atlas', regions: none of \['area 1', 'root'\] is an"):
        at_level(session(["area 1"] * 8 + ["root"]), "Beryl")
    with pytest.raises(ValueError, match="'V1' is not an acronym"):
        within("V1")
