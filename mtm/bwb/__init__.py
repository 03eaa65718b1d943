"""BrainWideBench (arXiv 2609.22064), the field's benchmark: its files in, predictions out.

Read in this order::

    files       its session files: listed, fetched, made a Session
    tasks       what its tasks ask: windows, targets, scores
    decoders    behaviour from what a model predicts, in the forms that it asks for
    submission  predictions as its scorer reads them, checked and packed
"""

from mtm.bwb.files import BUILDS, Entry, download, list_sessions, load_session, ts2_windows
from mtm.data.synthetic import write_bwb_session as write_session

__all__ = [
    "BUILDS",
    "Entry",
    "download",
    "list_sessions",
    "load_session",
    "ts2_windows",
    "write_session",
]
