"""BrainWideBench (arXiv 2609.22064), the field's benchmark: read its files, submit predictions.

- `files`: list, download and read its session files;
- `submission`: predict its tasks, check the predictions, score and pack them.
"""

from mtm.bwb import submission
from mtm.bwb.files import (
    BUILDS,
    Entry,
    download,
    fetch,
    list_sessions,
    load_session,
    ts2_windows,
)
from mtm.data.synthetic import write_bwb_session as write_session

__all__ = [
    "BUILDS",
    "Entry",
    "download",
    "fetch",
    "list_sessions",
    "load_session",
    "submission",
    "ts2_windows",
    "write_session",
]
