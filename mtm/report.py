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

from mtm.checkpoint import replacing

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
              another one's, scaled to its own mean. Where neuron 1 is given the prediction of
              neuron 2, that was made with neuron 1 visible, and so knows some of its spikes: the
              control is a little too good);
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
        """(n,) indices of the scored neurons, in their sessions; each once, whatever the seeds."""
        return self.table["neuron"][self._first()]

    @property
    def session_of(self) -> np.ndarray:
        """(n,) the session of each of `neurons`."""
        return self.table["session"][self._first()]

    @property
    def regions(self) -> np.ndarray:
        """(n,) the region of each of `neurons`."""
        return self.table["region"][self._first()]

    @property
    def n_silent(self) -> int:
        """Neurons without a spike among the scored entries; they have no score."""
        return int((self.table["spikes"][self._first()] == 0).sum())

    @property
    def n_blind(self) -> int:
        """Neurons that were predicted with nothing visible."""
        return int((self.table["visible"][self._first()] == 0).sum())

    @property
    def sessions(self) -> list[str]:
        """Names of the sessions, in the order of the table."""
        return list(dict.fromkeys(self.table["session"].tolist()))

    def mean(self, column: str | None = None, pooled: bool = False) -> float:
        """Mean over neurons, seeds and sessions; NaN where nothing has a score.

        Args:
            column: default the task's score.
            pooled: for bits per spike, the total gain over the total spikes of a session instead of
                the mean over its neurons: busy neurons weigh more, and what was expected of silent
                ones counts against it, as in the Neural Latents Benchmark.
        """
        return self.over("sessions", column, pooled).value

    def over(self, what: str, column: str | None = None, pooled: bool = False) -> Mean:
        """The mean, and its standard error over ``"neurons"``, ``"sessions"`` or ``"seeds"``.

        Over neurons: their scores are averaged over seeds; the errors of several sessions add up as
        those of independent means do. Over seeds: of the means over sessions, for the seeds that
        every session has. A single session, or seed, has no error.

        Raises:
            ValueError: for another ``what``, or what cannot be pooled.
        """
        if what == "neurons":
            if pooled:
                raise ValueError("pooled scores have no error over neurons")
            parts = [mean_of(self.by_neuron(name, column)) for name in self.sessions]
            parts = [part for part in parts if part.n]
            if not parts:
                return mean_of([])
            error = np.sqrt(sum(part.error**2 for part in parts)) / len(parts)
            value = np.mean([part.value for part in parts])
            return Mean(float(value), float(error), sum(part.n for part in parts))
        runs = [self._runs(name, column, pooled) for name in self.sessions]
        runs = [run for run in runs if run]
        if what == "sessions":
            return mean_of([np.mean(list(run.values())) for run in runs])
        if what != "seeds":
            raise ValueError(f"over must be 'neurons', 'sessions' or 'seeds', got {what!r}")
        common = [seed for seed in runs[0] if all(seed in run for run in runs)] if runs else []
        return mean_of([np.mean([run[seed] for run in runs]) for seed in common])

    def by_session(self, column: str | None = None, pooled: bool = False) -> dict[str, float]:
        """Session -> mean over neurons, then over seeds; NaN where nothing has a score."""
        runs = {name: list(self._runs(name, column, pooled).values()) for name in self.sessions}
        return {name: mean_of(values).value for name, values in runs.items()}

    def by_region(self, column: str | None = None) -> dict[str, Mean]:
        """Region -> mean over its neurons, of all sessions; a neuron's seeds are averaged first."""
        column = column or self.score
        values = np.concatenate([self.by_neuron(name, column) for name in self.sessions])
        regions = self.regions
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

    def _first(self) -> np.ndarray:
        """A row of each neuron, session by session, in the order of `by_neuron`."""
        rows = []
        for name in self.sessions:
            mine = np.flatnonzero(self.table["session"] == name)
            rows.append(mine[np.unique(self.table["neuron"][mine], return_index=True)[1]])
        return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)

    def _runs(self, session: str, column: str | None, pooled: bool) -> dict[int, float]:
        """Seed -> one number, for the seeds of a session that have a score."""
        column = column or self.score
        if pooled and not column.startswith("bits_per_spike"):
            raise ValueError(f"only bits per spike can be pooled over spikes, not {column!r}")
        mine = self.table["session"] == session
        numbers = {}
        for seed in np.unique(self.table["seed"][mine]).tolist():
            rows = mine & (self.table["seed"] == seed)
            if pooled:
                spikes = self.table["spikes"][rows].sum()
                gain = self.table[column.replace("bits_per_spike", "gain")][rows].sum()
                value = gain / spikes if spikes else np.nan
            else:
                value = mean_of(self.table[column][rows]).value
            if not np.isnan(value):
                numbers[seed] = float(value)
        return numbers


@dataclass(repr=False, eq=False)
class Report:
    """Scores of one predictor, on one session or several.

    Attributes:
        tasks: task or behaviour -> :class:`TaskScores`.
        sessions: name -> ``trials`` (scored) and ``neurons`` (it has).
        left_out: task -> why it could not be scored, for each session that it could not.
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
        """One report of several: of other sessions, or of the same with models of other seeds.

        Raises:
            ValueError: when reports of one session scored other neurons or other trials.
        """
        tasks: dict[str, list[dict[str, np.ndarray]]] = {}
        main: dict[str, str] = {}
        sessions: dict[str, dict[str, int]] = {}
        left_out: dict[str, list[str]] = {}
        for report in reports:
            for name, scores in report.tasks.items():
                parts = tasks.setdefault(name, [])
                parts.append(_as_next_seed(scores.table, parts))
                main[name] = scores.score
            sessions |= report.sessions
            for task, reason in report.left_out.items():
                left_out.setdefault(task, []).append(reason)
        joined = {name: TaskScores(_stacked(parts), main[name]) for name, parts in tasks.items()}
        reasons = {task: "; ".join(dict.fromkeys(all_of)) for task, all_of in left_out.items()}
        return cls(joined, sessions, reasons)

    def n_dropped(self, task: str) -> int:
        """Neurons of the scored sessions that were not scored: no label, or not asked for."""
        scores = self.tasks[task]
        return sum(self.sessions[s]["neurons"] for s in scores.sessions) - len(scores.neurons)

    def share(self, ceiling: Report, column: str = "bits_per_spike_train_null") -> dict[str, float]:
        """Task -> score as a share of another report's, such as the oracle's.

        With the honest null, the default, the mean rates have a share of 0 by construction.

        Raises:
            ValueError: when the two reports are of other sessions.
        """
        if set(self.sessions) != set(ceiling.sessions):
            raise ValueError(
                f"a share needs reports of the same sessions, got {', '.join(self.sessions)} and "
                f"{', '.join(ceiling.sessions)}"
            )
        shares = {}
        for task in [t for t in self.tasks if column in self.tasks[t].table and t in ceiling.tasks]:
            best = ceiling.tasks[task].mean(column)
            shares[task] = self.tasks[task].mean(column) / best if best else float("nan")
        return shares

    def to_dict(self) -> dict[str, Any]:
        """Task -> means, errors and counts, as JSON can hold them (NaN = None).

        Of a task: a mean for each column; ``pooled_...``; ``errors``, over what -> column -> the
        standard error; counts of neurons; ``regions``, region -> [mean, error, neurons].
        """
        summary = {}
        for task, scores in self.tasks.items():
            columns = [c for c in scores.table if c not in (*LABELS, *COUNTS) and c[:4] != "gain"]
            activity = "spikes" in scores.table
            numbers: dict[str, Any] = {column: _plain(scores.mean(column)) for column in columns}
            numbers["errors"] = {
                kind: {column: _plain(scores.over(kind, column).error) for column in columns}
                for kind in ["neurons"] * activity + ["sessions", "seeds"]
            }
            if activity:
                for column in ("bits_per_spike", "bits_per_spike_train_null"):
                    numbers[f"pooled_{column}"] = _plain(scores.mean(column, pooled=True))
                regions = scores.by_region().items()
                numbers |= {
                    "neurons": len(scores.neurons),
                    "silent_neurons": scores.n_silent,
                    "dropped_neurons": self.n_dropped(task),
                    "neurons_with_nothing_visible": scores.n_blind,
                    "regions": {region: [_plain(x) for x in mean] for region, mean in regions},
                }
            summary[task] = numbers
        return summary

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as JSON, to six decimals; written to ``path`` if there is one."""
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
    def from_json(cls, source: str | Path) -> Report:
        """Read what :meth:`to_json` gave: a file, or its text."""
        text = str(source) if str(source).lstrip().startswith("{") else Path(source).read_text()
        content = json.loads(text)
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
            errors = ((kind, scores.over(kind).error) for kind in ("sessions", "seeds"))
            sure = "".join(f", ± {e:.3f} over {kind}" for kind, e in errors if not np.isnan(e))
            text = f"{task}: {scores.score} {scores.mean():.3f}{sure} ({beside})"
            lines.append(textwrap.fill(text, 79, subsequent_indent="    "))
        lines += [f"{task}: left out, {reason}" for task, reason in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _rows(self, activity: Mapping[str, TaskScores]) -> dict[str, list[str]]:
        """The rows of the printed table."""

        def row(cell: Callable[..., float]) -> list[str]:
            return [_number(cell(scores)) for scores in activity.values()]

        rows = {}
        nulls = {"over their test mean": "bits_per_spike"}
        nulls["over their training mean"] = "bits_per_spike_train_null"
        for title, column in nulls.items():
            rows[title] = row(lambda s, c=column: s.mean(c))
            indent = "  " if column == "bits_per_spike" else "   "  # rows need different names
            for kind in ("neurons", "sessions", "seeds"):
                errors = row(lambda s, c=column, kind=kind: s.over(kind, c).error)
                if any(cell != "-" for cell in errors):
                    rows[f"{indent}± over {kind}"] = errors
            rows[f"{indent}all spikes pooled"] = row(lambda s, c=column: s.mean(c, pooled=True))
            if column == "bits_per_spike":
                rows["  trials shuffled"] = row(lambda s: s.mean("shuffled_trials"))
                rows["  neurons shuffled"] = row(lambda s: s.mean("shuffled_neurons"))
        rows["neurons"] = row(lambda s: len(s.neurons))
        rows["of them silent"] = row(lambda s: s.n_silent)
        dropped = [self.n_dropped(task) for task in activity]
        if any(dropped):
            rows["not scored"] = [str(n) for n in dropped]
        blind = row(lambda s: s.n_blind)
        if any(cell != "0" for cell in blind):  # their score is that of guessing
            rows["with nothing visible"] = blind
        return rows


def score_table(reports: Mapping[str, Report], column: str | None = None) -> str:
    """A text table: a row for each predictor, a column for each task.

    Args:
        reports: name -> report.
        column: of the tables; default each task's own score.

    Raises:
        ValueError: for a column that no task has.
    """
    tasks = [
        task
        for task in dict.fromkeys(task for report in reports.values() for task in report.tasks)
        if column is None or any(column in r.tasks[task].table for r in reports.values()
                                 if task in r.tasks)
    ]  # fmt: skip
    if not tasks:
        known = {c: None for r in reports.values() for s in r.tasks.values() for c in s.table}
        raise ValueError(f"no task has a column {column!r}; there are: {', '.join(known)}")
    rows = {
        name: [_number(r.tasks[t].mean(column)) if t in r.tasks else "-" for t in tasks]
        for name, r in reports.items()
    }
    return _table(tasks, rows)


def _as_next_seed(
    table: dict[str, np.ndarray], parts: Sequence[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """A table whose seeds follow those that its sessions have in other tables."""
    shift = 0
    for part in parts:
        same = np.isin(part["session"], table["session"])
        if not same.any():
            continue
        shift = max(shift, part["seed"][same].max() + 1)
        for name in np.unique(part["session"][same]).tolist():
            for column in ("neuron", "spikes"):
                if column not in table:
                    continue
                ours, theirs = (_of_one_run(t, name, column) for t in (part, table))
                if not np.array_equal(ours, theirs):
                    raise ValueError(
                        f"session {name!r}: these reports scored other neurons or other trials, so "
                        "they do not differ by their seeds alone; join those of the same"
                    )
    return table | {"seed": table["seed"] + shift}


def _of_one_run(table: dict[str, np.ndarray], session: str, column: str) -> np.ndarray:
    mine = table["session"] == session
    return table[column][mine & (table["seed"] == table["seed"][mine][0])]


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
