"""The six tasks: what each hides of a trial, and what of it is scored.

==================  ======================================================  ==================
task                hidden                                                  scored
==================  ======================================================  ==================
co-smoothing        one neuron at a time                                    it, all bins
forward-prediction  the last 10 % of the bins, all neurons                  those bins
inter-region        each region in turn                                     its neurons
intra-region        all outside a region, and one of its neurons at a time  it, all bins
choice              nothing                                                 see `mtm.decode`
other behaviours    nothing                                                 see `mtm.decode`
==================  ======================================================  ==================

Source: arXiv 2407.14668, section 4.
"""

from __future__ import annotations

import numpy as np

from mtm.session import Session, SessionError

TASKS = {
    "co-smoothing": "neuron",
    "forward-prediction": "causal",
    "inter-region": "inter-region",
    "intra-region": "intra-region",
}
"""Each activity task, and the masking scheme that trains for it (whose prompt is shown)."""


def forward_bins(n_bins: int) -> tuple[int, int]:
    """The bins that forward prediction hides: the last 10 %, at least one; (start, stop)."""
    return n_bins - max(1, round(0.1 * n_bins)), n_bins


def queries_of(
    task: str, session: Session, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """What to hide and score in turn: hidden (Q, N), scored (Q, N) bool, and the bins of both.

    Args:
        task: one of :data:`TASKS`.
        session: the recording.
        wanted: (N,) bool, neurons to score; regional tasks take those with a label.

    Raises:
        ValueError: for an unknown task.
        SessionError: where there is no neuron to score.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    codes = session.region_codes
    labelled = codes >= 0
    if not (wanted & labelled if task.endswith("region") else wanted).any():
        raise SessionError(f"session {session.name!r}, {task}: no neuron to score")
    eye = np.eye(session.n_neurons, dtype=bool)
    if task == "forward-prediction":
        everything = np.ones((1, session.n_neurons), dtype=bool)
        return everything, wanted[None], forward_bins(session.n_bins)
    if task == "co-smoothing":
        hidden = scored = eye[wanted]
    elif task == "inter-region":
        hidden = codes[None] == np.unique(codes[wanted & labelled])[:, None]
        scored = hidden & wanted
    else:
        scored = eye[wanted & labelled]
        hidden = scored | (codes[None] != codes[scored.argmax(axis=1)][:, None])
    return hidden, scored, (0, session.n_bins)
