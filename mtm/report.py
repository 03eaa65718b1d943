"""Scores of a predictor: tables with a row for each neuron, and what is said of them.

A :class:`Report` holds one session and one run, or several joined: means are over neurons first,
then over the seeds of a session, then over sessions, and each has its standard error.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtm.atomic import replacing

LABELS = ("session", "seed", "neuron", "region")  # columns that say what a row is
COUNTS = ("spikes", "visible", "train_trials", "test_trials")


class Mean(NamedTuple):
    """A mean, its standard error (NaN where it rests on one value), and the number of values."""

    value: float
    error: float
    n: int

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "-"
        return f"{self.value:.3f}" + ("" if np.isnan(self.error) else f" ± {self.error:.3f}")


def mean_of(values: Any) -> Mean:
    """Mean and standard error over the values that are not NaN."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Mean(float(values.mean()) if len(values) else np.nan, float(error), len(values))


@dataclass(eq=False)
class TaskScores:
    """Scores of one task.

    Attributes:
        table: column -> (n,). Of an activity task, a row for each neuron (and session, and seed):

            - ``session``, ``seed`` (0, 1, ... of the runs of a session), ``neuron``, ``region``;
            - ``bits_per_spike`` (null: the neuron's mean over the scored test entries, as the
              paper), ``bits_per_spike_train_null`` (null: its mean over the training trials),
              ``poisson_d2``, ``trial_r2``, ``psth_r2`` (where conditions are known);
            - controls, as ``bits_per_spike``: ``shuffled_trials`` (each trial has another one's
              prediction, which keeps the mean time course), ``shuffled_neurons`` (each neuron has
              another one's, scaled to its own mean);
            - ``gain`` and ``gain_train_null``, in bits; ``spikes`` scored; ``visible``, neurons
              that could be seen (0: the score is that of guessing).

            Of a behaviour, a row for each session (and seed): its score, its controls, and
            ``train_trials`` and ``test_trials``. NaN = no score, as of a silent neuron.
        score: the column that is the task's score.
    """

    table: dict[str, np.ndarray]
    score: str = "bits_per_spike"

    @property
    def neurons(self) -> np.ndarray:
        """(n,) indices of the scored neurons, in their sessions."""
        return self.table["neuron"]

    @property
    def n_silent(self) -> int:
        """Neurons without a spike among the scored entries; they have no score."""
        return int((self.table["spikes"] == 0).sum())

    def mean(self, column: str | None = None, pooled: bool = False) -> float:
        """Mean over neurons, seeds and sessions; NaN where nothing has a score.

        Args:
            column: default the task's score.
            pooled: for bits per spike, the total gain over the total spikes of a session instead of
                the mean over its neurons: busy neurons weigh more.
        """
        return self.over("sessions", column, pooled).value

    def over(self, what: str, column: str | None = None, pooled: bool = False) -> Mean:
        """The mean, and its standard error over ``"neurons"``, ``"sessions"`` or ``"seeds"``.

        Over neurons: their scores are averaged over seeds; the errors of several sessions add up as
        those of independent means do. Over seeds: of the means over sessions, for the seeds that
        every session has. A single session, or seed, has no error.

        Raises:
            ValueError: for another ``what``.
        """
        names = self.sessions
        if what == "sessions":
            return mean_of([mean_of(self._runs(name, column, pooled)).value for name in names])
        if what == "seeds":
            runs = [self._runs(name, column, pooled) for name in names]
            n = min(map(len, runs))
            return mean_of(np.mean([run[:n] for run in runs], axis=0))
        if what != "neurons":
            raise ValueError(f"over must be 'neurons', 'sessions' or 'seeds', got {what!r}")
        parts = [mean_of(self.by_neuron(name, column)) for name in names]
        parts = [part for part in parts if part.n]
        error = np.sqrt(sum(part.error**2 for part in parts)) / max(len(parts), 1)
        value = np.mean([part.value for part in parts]) if parts else np.nan
        return Mean(float(value), float(error), sum(part.n for part in parts))

    @property
    def sessions(self) -> list[str]:
        """Names of the sessions, in the order of the table."""
        return list(dict.fromkeys(self.table["session"].tolist()))

    def by_session(self, column: str | None = None, pooled: bool = False) -> dict[str, float]:
        """Session -> mean over neurons, then over seeds."""
        return {s: mean_of(self._runs(s, column, pooled)).value for s in self.sessions}

    def by_region(self, column: str | None = None) -> dict[str, Mean]:
        """Region -> mean over its neurons, of all sessions and seeds, that have a score."""
        regions, values = self.table["region"], self.table[column or self.score]
        return {r: mean_of(values[regions == r]) for r in np.unique(regions).tolist()}

    def by_neuron(self, session: str, column: str | None = None) -> np.ndarray:
        """(n,) the score of each scored neuron of a session, averaged over seeds."""
        mine = self.table["session"] == session
        values = self.table[column or self.score][mine].astype(np.float64)
        neurons, row = np.unique(self.table["neuron"][mine], return_inverse=True)
        scored = ~np.isnan(values)
        n = np.bincount(row[scored], minlength=len(neurons))
        total = np.bincount(row[scored], values[scored], minlength=len(neurons))
        return np.where(n > 0, total / np.maximum(n, 1), np.nan)

    def _runs(self, session: str, column: str | None, pooled: bool) -> list[float]:
        """One number for each seed of a session."""
        column = column or self.score
        mine = self.table["session"] == session
        numbers = []
        for seed in np.unique(self.table["seed"][mine]):
            rows = mine & (self.table["seed"] == seed)
            if pooled:
                gain = self.table[column.replace("bits_per_spike", "gain")][rows].sum()
                numbers.append(float(gain / max(self.table["spikes"][rows].sum(), 1)))
            else:
                numbers.append(mean_of(self.table[column][rows]).value)
        return numbers


@dataclass(repr=False, eq=False)
class Report:
    """Scores of one predictor, on one session or several.

    Attributes:
        tasks: task or behaviour -> :class:`TaskScores`.
        sessions: name -> ``trials`` (scored), ``neurons`` (it has), ``wanted`` (to be scored).
        left_out: task -> why it could not be scored.
    """

    tasks: dict[str, TaskScores]
    sessions: dict[str, dict[str, int]]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def n_trials(self) -> int:
        """Scored trials of all sessions."""
        return sum(counts["trials"] for counts in self.sessions.values())

    @classmethod
    def join(cls, reports: Sequence[Report]) -> Report:
        """One report of several: of other sessions, or of the same with models of other seeds."""
        tasks = {name: [] for report in reports for name in report.tasks}
        sessions, left_out = {}, {}
        for report in reports:
            for name, scores in report.tasks.items():
                same = (np.isin(part["session"], scores.sessions) for part in tasks[name])
                runs = [part["seed"][rows].max(initial=-1) + 1
                        for part, rows in zip(tasks[name], same, strict=True)]  # fmt: skip
                shift = max(runs, default=0)
                tasks[name].append(scores.table | {"seed": scores.table["seed"] + shift})
            sessions |= report.sessions
            left_out |= report.left_out
        main = {name: scores.score for report in reports for name, scores in report.tasks.items()}
        joined = {name: TaskScores(_stacked(parts), main[name]) for name, parts in tasks.items()}
        return cls(joined, sessions, left_out)

    def n_dropped(self, task: str) -> int:
        """Neurons of the scored sessions that were not scored: no label, or not asked for."""
        table = self.tasks[task].table
        of = set(table["session"].tolist())
        pairs = set(zip(table["session"].tolist(), table["neuron"].tolist(), strict=True))
        return sum(self.sessions[name]["neurons"] for name in of) - len(pairs)

    def share(self, ceiling: Report, column: str = "bits_per_spike_train_null") -> dict[str, float]:
        """Task -> score as a share of another report's, such as the oracle's.

        With the honest null, the mean rates have a share of 0 by construction.
        """
        both = [t for t in self.tasks if column in self.tasks[t].table and t in ceiling.tasks]
        return {t: self.tasks[t].mean(column) / ceiling.tasks[t].mean(column) for t in both}

    def to_dict(self) -> dict[str, Any]:
        """Task -> means, standard errors and counts, as JSON can hold them (NaN = None)."""
        summary = {}
        for task, scores in self.tasks.items():
            columns = [c for c in scores.table if c not in (*LABELS, *COUNTS) and c[:4] != "gain"]
            numbers = {column: scores.mean(column) for column in columns}
            kinds = ["neurons"] * ("spikes" in scores.table) + ["sessions", "seeds"]
            errors = {kind: scores.over(kind).error for kind in kinds}
            numbers |= {f"error_over_{kind}": error for kind, error in errors.items()}
            counts = {}
            if "spikes" in scores.table:
                for column in ("bits_per_spike", "bits_per_spike_train_null"):
                    numbers[f"pooled_{column}"] = scores.mean(column, pooled=True)
                counts = {"neurons": len(scores.neurons), "silent_neurons": scores.n_silent}
                counts["dropped_neurons"] = self.n_dropped(task)
                blind = int((scores.table["visible"] == 0).sum())
                counts["neurons_with_nothing_visible"] = blind
            summary[task] = {k: _plain(v) for k, v in numbers.items()} | counts
        return summary

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as JSON, tables included; written to ``path`` if there is one."""
        tables = {
            task: {
                column: [_plain(v) for v in values.tolist()] for column, values in s.table.items()
            }
            for task, s in self.tasks.items()
        }
        scores = {task: s.score for task, s in self.tasks.items()}
        content = {"summary": self.to_dict(), "sessions": self.sessions, "scores": scores}
        content |= {"left_out": self.left_out, "tables": tables}
        text = json.dumps(content, allow_nan=False) + "\n"
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(Path(path)) as partial:
                partial.write_text(text)
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read what :meth:`to_json` wrote."""
        content = json.loads(Path(path).read_text())
        tasks = {}
        for task, table in content["tables"].items():
            columns = {
                key: np.array([np.nan if v is None else v for v in values])
                for key, values in table.items()
            }
            tasks[task] = TaskScores(columns, content["scores"][task])
        return cls(tasks, content["sessions"], content["left_out"])

    def __str__(self) -> str:
        names = list(self.sessions)
        who = f"session {names[0]!r}" if len(names) == 1 else f"{len(names)} sessions"
        lines = [f"{who}, {self.n_trials} trials; gain in bits per spike, mean over neurons"]
        activity = {task: s for task, s in self.tasks.items() if "spikes" in s.table}
        lines += [_table(list(activity), self._rows(activity))] if activity else []
        for task in [t for t in self.tasks if t not in activity]:
            scores = self.tasks[task]
            others = [c for c in scores.table if c not in (*LABELS, *COUNTS, scores.score)]
            beside = ", ".join(f"{c.replace('_', ' ')} {scores.mean(c):.3f}" for c in others)
            text = f"{task}: {scores.score} {scores.over('sessions')} ({beside})"
            lines.append(textwrap.fill(text, 79, subsequent_indent="    "))
        lines += [f"{task}: left out, {reason}" for task, reason in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _rows(self, activity: Mapping[str, TaskScores]) -> dict[str, list[str]]:
        """The rows of the printed table."""

        def row(cell: Callable[[TaskScores], float | int]) -> list[str]:
            return [_number(cell(scores)) for scores in activity.values()]

        rows = {"over their test mean": row(lambda s: s.mean())}
        for kind in ("neurons", "sessions", "seeds"):
            errors = row(lambda s, kind=kind: s.over(kind).error)
            if any(cell != "-" for cell in errors):
                rows[f"  ± over {kind}"] = errors
        rows |= {
            "  all spikes pooled": row(lambda s: s.mean("bits_per_spike", pooled=True)),
            "  trials shuffled": row(lambda s: s.mean("shuffled_trials")),
            "  neurons shuffled": row(lambda s: s.mean("shuffled_neurons")),
            "over their training mean": row(lambda s: s.mean("bits_per_spike_train_null")),
            "  all spikes pooled ": row(lambda s: s.mean("bits_per_spike_train_null", pooled=True)),
            "neurons": row(lambda s: len(s.neurons)),
            "of them silent": row(lambda s: s.n_silent),
        }
        dropped = [self.n_dropped(task) for task in activity]
        if any(dropped):
            rows["not scored"] = [str(n) for n in dropped]
        blind = row(lambda s: int((s.table["visible"] == 0).sum()))
        if any(cell != "0" for cell in blind):  # their score is that of guessing
            rows["with nothing visible"] = blind
        return rows


def score_table(reports: Mapping[str, Report], column: str | None = None) -> str:
    """A text table: a row for each predictor, a column for each task.

    Args:
        reports: name -> report.
        column: of the tables; default each task's own score.
    """
    tasks = [
        task
        for task in dict.fromkeys(task for report in reports.values() for task in report.tasks)
        if column is None or any(column in r.tasks[task].table for r in reports.values()
                                 if task in r.tasks)
    ]  # fmt: skip
    rows = {
        name: [_number(r.tasks[t].mean(column)) if t in r.tasks else "-" for t in tasks]
        for name, r in reports.items()
    }
    return _table(tasks, rows)


def _stacked(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tables one under the other; a column that some do not have is NaN there."""
    columns = dict.fromkeys(column for table in tables for column in table)
    return {
        column: np.concatenate(
            [t[column] if column in t else np.full(len(t["session"]), np.nan) for t in tables]
        )
        for column in columns
    }


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    heads = [column.removesuffix("-prediction") for column in columns]
    width = max([len(name) for name in rows] + [9])
    lines = [" " * width + "".join(f"  {head}" for head in heads)]
    for name, cells in rows.items():
        aligned = (f"  {c:>{len(head)}}" for c, head in zip(cells, heads, strict=True))
        lines.append(f"{name:<{width}}" + "".join(aligned))
    return "\n".join(lines)


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if np.isnan(value) else f"{value:.3f}"


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if not isinstance(value, float):
        return value
    return None if not np.isfinite(value) else round(value, 6)
