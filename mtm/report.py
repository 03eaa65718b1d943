"""Scores of a predictor, neuron by neuron, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtm.predict import TASKS


@dataclass
class TaskScores:
    """Scores of one task.

    Attributes:
        neurons: (n,) indices of the scored neurons.
        bins: (start, stop) of the scored bins.
        table: column -> (n,): ``bits_per_spike`` (null: the neuron's mean over the scored test
            entries, as the paper), ``bits_per_spike_train_null`` (null: its mean over the training
            trials), ``poisson_d2``, ``trial_r2``, ``psth_r2`` (where conditions are known),
            ``spikes`` (scored), ``visible`` (neurons that could be seen; 0 means that the score
            is that of guessing), ``region``. NaN = a silent neuron has no score.
        pooled: ``bits_per_spike`` and ``bits_per_spike_train_null``, all neurons' spikes together.
    """

    neurons: np.ndarray
    bins: tuple[int, int]
    table: dict[str, np.ndarray]
    pooled: dict[str, float]

    @property
    def n_silent(self) -> int:
        """Neurons without a spike among the scored entries; they have no score."""
        return int((self.table["spikes"] == 0).sum())

    def mean(self, column: str = "bits_per_spike") -> float:
        """Mean over the neurons that have a score; NaN where none has."""
        values = np.asarray(self.table[column], dtype=np.float64)
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else float("nan")

    def by_region(self, column: str = "bits_per_spike") -> dict[str, float]:
        """Region -> mean over its neurons that have a score."""
        regions = self.table["region"]
        parts = {r: self.table[column][regions == r] for r in np.unique(regions).tolist()}
        return {r: float(np.nanmean(v)) for r, v in parts.items() if not np.isnan(v).all()}


@dataclass(repr=False)
class Report:
    """Scores of one predictor on one session.

    Attributes:
        session: its name.
        n_trials: number of scored trials.
        tasks: task -> :class:`TaskScores`.
        left_out: task -> why it could not be scored.
    """

    session: str
    n_trials: int
    tasks: dict[str, TaskScores]
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Means, pooled values and counts of each task, as JSON can hold them (NaN = None)."""
        summary = {}
        for task, scores in self.tasks.items():
            columns = [c for c in scores.table if c not in ("region", "spikes", "visible")]
            means = {column: scores.mean(column) for column in columns}
            pooled = {f"pooled_{key}": value for key, value in scores.pooled.items()}
            numbers = {k: None if np.isnan(v) else round(v, 6) for k, v in (means | pooled).items()}
            blind = int((scores.table["visible"] == 0).sum())
            counts = {"neurons": len(scores.neurons), "silent_neurons": scores.n_silent}
            counts["neurons_with_nothing_visible"] = blind
            summary[task] = numbers | counts
        return summary

    def __str__(self) -> str:
        scores = self.tasks.values()
        rows = {
            "over their test mean": [_number(s.mean()) for s in scores],
            "over their training mean": [
                _number(s.mean("bits_per_spike_train_null")) for s in scores
            ],
            "neurons": [str(len(s.neurons)) for s in scores],
            "of them silent": [str(s.n_silent) for s in scores],
        }
        blind = [int((s.table["visible"] == 0).sum()) for s in scores]
        if any(blind):  # their score is that of guessing
            rows["with nothing visible"] = [str(n) for n in blind]
        title = (
            f"session {self.session!r}, {self.n_trials} trials; gain in bits per spike, mean over "
            "neurons"
        )
        notes = [f"{task}: left out, {reason}" for task, reason in self.left_out.items()]
        return "\n".join([title, _table(list(self.tasks), rows), *notes])

    __repr__ = __str__


def score_table(reports: Mapping[str, Report], column: str = "bits_per_spike") -> str:
    """A text table: a row for each predictor, a column for each task, means over neurons."""
    tasks = [task for task in TASKS if any(task in r.tasks for r in reports.values())]
    rows = {
        name: [_number(r.tasks[t].mean(column)) if t in r.tasks else "-" for t in tasks]
        for name, r in reports.items()
    }
    return _table(tasks, rows)


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    width = max([len(name) for name in rows] + [9])
    lines = [" " * width + "".join(f"  {column}" for column in columns)]
    for name, cells in rows.items():
        aligned = (f"  {c:>{len(column)}}" for c, column in zip(cells, columns, strict=True))
        lines.append(f"{name:<{width}}" + "".join(aligned))
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
