"""Scores of a predictor: a table for each task with a row for each neuron, and their means.

A :class:`Report` holds one session and one run, or several joined. Means are over neurons first,
then over the seeds of a session, then over sessions, and each has its standard error.
"""

from __future__ import annotations

import json
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mtm.files import atomic_write
from mtm.session import has_region

LABELS = ("session", "seed", "neuron", "region", "features")  # columns that identify a row
COUNTS = ("spikes", "visible", "train_trials", "test_trials")
POOLED = {"bits_per_spike": "gain", "bits_per_spike_train_null": "gain_train_null"}


class Mean(NamedTuple):
    """A mean, its standard error (NaN of a single value), and the number of values."""

    value: float
    error: float
    n: int

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "-"
        value = round(self.value, 3) + 0.0  # no "-0.000"
        return f"{value:.3f}" + ("" if np.isnan(self.error) else f" ± {self.error:.3f}")


def mean_of(values: Iterable[float]) -> Mean:
    """Mean and standard error over the values that are not NaN."""
    series = pd.Series(list(values), dtype=np.float64)
    return Mean(float(series.mean()), float(series.sem()), int(series.count()))


@dataclass(eq=False)
class TaskScores:
    """Scores of one task.

    Attributes:
        table: of an activity task, a row for each neuron, session and seed (0, 1, ... of the runs
            of a session): ``bits_per_spike`` (null: the neuron's mean over the scored test entries,
            as in the paper), ``bits_per_spike_train_null`` (null: its mean over the training
            trials), ``poisson_d2``, ``trial_r2``, ``psth_r2`` (where conditions are known); the
            controls ``shuffled_trials`` (each trial gets another one's prediction, which keeps the
            mean time course) and ``shuffled_neurons`` (each neuron gets another one's, scaled to
            its own mean); ``gain`` and ``gain_train_null``, in bits; ``spikes`` scored;
            ``visible``, neurons that could be seen. Of a behaviour, a row for each session and
            seed: its score and controls. NaN = no score, as of a silent neuron.
        score: the column that is the task's score.
    """

    table: pd.DataFrame
    score: str = "bits_per_spike"

    @property
    def per_neuron(self) -> bool:
        """Whether rows are neurons (activity tasks), not sessions (behaviours)."""
        return "neuron" in self.table

    @property
    def each_neuron(self) -> pd.DataFrame:
        """A row of each neuron, whatever the seeds."""
        return self.table.drop_duplicates(["session", "neuron"])

    @property
    def neurons(self) -> np.ndarray:
        """(n,) indices of the scored neurons in their sessions."""
        return self.each_neuron["neuron"].to_numpy()

    @property
    def n_silent(self) -> int:
        """Neurons without a spike among the scored entries; they have no score."""
        return int((self.each_neuron["spikes"] == 0).sum())

    def mean(self, column: str | None = None, pooled: bool = False) -> float:
        """Mean over neurons, seeds and sessions; NaN where nothing has a score.

        Args:
            column: of the table. Default: the task's score.
            pooled: for bits per spike, the total gain over the total spikes of a session, as in the
                Neural Latents Benchmark: busy neurons weigh more, and rates predicted for silent
                ones lower it.
        """
        return self.over("sessions", column, pooled).value

    def over(self, what: str, column: str | None = None, pooled: bool = False) -> Mean:
        """The mean, and its standard error over ``"neurons"``, ``"sessions"`` or ``"seeds"``.

        Over neurons: their scores are averaged over seeds; the errors of several sessions add up as
        those of independent means do. Over seeds: of the means over sessions, for the seeds that
        every session has.
        """
        column = column or self.score
        runs = self.table.groupby(["session", "seed"], sort=False)
        if pooled:
            spikes = runs["spikes"].sum()
            means = runs[POOLED[column]].sum() / spikes.where(spikes > 0)
        else:
            means = runs[column].mean()
        means = means.dropna()
        if what == "sessions":
            return mean_of(means.groupby("session").mean())
        if what == "seeds":
            return mean_of(means.unstack("session").dropna().mean(axis=1))
        if what != "neurons" or pooled:
            raise ValueError(f"over 'sessions', 'seeds' or, unless pooled, 'neurons'; got {what!r}")
        if not self.per_neuron:
            return Mean(self.mean(column), np.nan, 0)
        each = self._by_neuron(column).groupby("session").agg(["mean", "sem", "count"])
        each = each[each["count"] > 0]
        error = np.linalg.norm(each["sem"]) / len(each) if len(each) else np.nan
        return Mean(float(each["mean"].mean()), float(error), int(each["count"].sum()))

    def by_session(self, column: str | None = None, pooled: bool = False) -> dict[str, float]:
        """Session -> mean over neurons, then over seeds; NaN where nothing has a score."""
        tables = self.table.groupby("session", sort=False)
        return {name: TaskScores(table, self.score).mean(column, pooled) for name, table in tables}

    def by_region(self, column: str | None = None) -> dict[str, Mean]:
        """Region -> mean over its neurons, of all sessions; a neuron's seeds are averaged first."""
        each = self._by_neuron(column, "region").groupby("region")
        return {name: mean_of(values) for name, values in each if has_region(name)}

    def by_neuron(self, session: str, column: str | None = None) -> np.ndarray:
        """(n,) the score of each scored neuron of a session, averaged over seeds."""
        return self._by_neuron(column)[session].to_numpy()

    def _by_neuron(self, column: str | None, *keys: str) -> pd.Series:
        """(session, neuron, and further keys) -> score, averaged over seeds."""
        each = self.table.groupby(["session", "neuron", *keys], sort=False)
        return each[column or self.score].mean()


@dataclass(repr=False, eq=False)
class Report:
    """Scores of one predictor, on one session or several.

    Attributes:
        tasks: task or behaviour -> :class:`TaskScores`.
        sessions: name -> ``trials`` (scored) and ``neurons`` (of the recording).
        left_out: task -> why it could not be scored, for each session where it could not.
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
        """Join reports of several sessions, or of one session with several seeds."""
        joined, reasons = cls({}, {}), dict[str, list[str]]()
        for report in reports:
            for task, scores in report.tasks.items():
                table = scores.table
                if task in joined.tasks:
                    before = joined.tasks[task].table
                    table = pd.concat([before, _next_seeds(before, table)], ignore_index=True)
                joined.tasks[task] = TaskScores(table, scores.score)
            joined.sessions |= report.sessions
            for task, reason in report.left_out.items():
                reasons.setdefault(task, []).append(reason)
        joined.left_out = {task: "; ".join(dict.fromkeys(each)) for task, each in reasons.items()}
        return joined

    def means(self, column: str | None = None) -> dict[str, float]:
        """Task -> mean of a column, by default of the task's score, where the task has it."""
        having = {t: s for t, s in self.tasks.items() if (column or s.score) in s.table}
        return {task: scores.mean(column) for task, scores in having.items()}

    def to_frame(self) -> pd.DataFrame:
        """One table of all tasks, with a column ``task``; NaN where a task lacks a column."""
        tables = [scores.table.assign(task=task) for task, scores in self.tasks.items()]
        return pd.concat(tables, ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """Task -> column -> mean, for JSON (NaN = None).

        Also ``pooled_...``; ``errors``, over what -> column -> the standard error; counts of
        neurons; ``regions``, region -> [mean, error, neurons].
        """
        summary = {}
        for task, scores in self.tasks.items():
            columns = [c for c in scores.table if c not in (*LABELS, *COUNTS, *POOLED.values())]
            numbers: dict[str, Any] = {column: scores.mean(column) for column in columns}
            numbers["errors"] = {
                kind: {column: scores.over(kind, column).error for column in columns}
                for kind in ["neurons"] * scores.per_neuron + ["sessions", "seeds"]
            }
            if scores.per_neuron:
                numbers |= {f"pooled_{null}": scores.mean(null, pooled=True) for null in POOLED}
                numbers |= self._counted(scores)
                numbers["regions"] = {name: list(m) for name, m in scores.by_region().items()}
            summary[task] = numbers
        return _plain(summary)

    def _counted(self, scores: TaskScores) -> dict[str, int]:
        """Numbers of neurons: scored, of them silent, not scored, predicted with none visible."""
        recorded = sum(self.sessions[name]["neurons"] for name in scores.table["session"].unique())
        return {
            "neurons": len(scores.neurons),
            "silent_neurons": scores.n_silent,
            "dropped_neurons": recorded - len(scores.neurons),
            "neurons_with_nothing_visible": int((scores.each_neuron["visible"] == 0).sum()),
        }

    def to_json(self, path: str | Path) -> None:
        """Write all of it as JSON, to six decimals."""
        content = {
            "summary": self.to_dict(),
            "sessions": self.sessions,
            "scores": {task: s.score for task, s in self.tasks.items()},
            "left_out": self.left_out,
            "tables": {task: s.table.to_dict("list") for task, s in self.tasks.items()},
        }
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(_plain(content), allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read a file that :meth:`to_json` wrote."""
        content, tasks = json.loads(Path(path).read_text()), {}
        for task, columns in content["tables"].items():
            nan = {k: [np.nan if v is None else v for v in values] for k, values in columns.items()}
            tasks[task] = TaskScores(pd.DataFrame(nan), content["scores"][task])
        return cls(tasks, content["sessions"], content["left_out"])

    def __str__(self) -> str:
        several, who = "sessions", f"{len(self.sessions)} sessions"
        if len(self.sessions) == 1:
            seeds = any(scores.table["seed"].max() > 0 for scores in self.tasks.values())
            several, who = "seeds" if seeds else "neurons", f"session {next(iter(self.sessions))!r}"
        lines = [f"{who}, {self.n_trials} trials; gain in bits per spike, ± over {several}"]
        rows = {
            task: {
                "over their test mean": s.over(several),
                "over their training mean": s.over(several, "bits_per_spike_train_null"),
                "all spikes pooled": s.mean(pooled=True),
                "trials shuffled": s.mean("shuffled_trials"),
                "neurons shuffled": s.mean("shuffled_neurons"),
                **{key.replace("_", " "): n for key, n in self._counted(s).items()},
            }
            for task, s in self.tasks.items()
            if s.per_neuron
        }
        lines += [_text(pd.DataFrame(rows, dtype=object))] if rows else []
        for task, scores in ((t, s) for t, s in self.tasks.items() if not s.per_neuron):
            others = [c for c in scores.table if c not in (*LABELS, *COUNTS, scores.score)]
            beside = ", ".join(f"{c.replace('_', ' ')} {scores.mean(c):.3f}" for c in others)
            value = scores.over("sessions" if several == "neurons" else several)
            read = " or ".join(scores.table["features"].unique())
            text = f"{task} from {read}: {scores.score} {value} ({beside})"
            lines.append(textwrap.fill(text, 79, subsequent_indent="    "))
        for reason in dict.fromkeys(self.left_out.values()):
            tasks = [task for task, why in self.left_out.items() if why == reason]
            lines.append(f"{', '.join(tasks)}: left out, {reason}")
        return "\n".join(lines)

    __repr__ = __str__


def score_table(reports: Mapping[str, Report], column: str | None = None) -> str:
    """A text table: a row for each predictor, a column for each task; "-" where there is no score.

    ``column`` is of the tables of scores; default: each task's own score. Reports of other neurons
    or trials than the first one's are named in a warning, for activity tasks.
    """
    means = {name: report.means(column) for name, report in reports.items()}
    if not any(means.values()):
        raise ValueError(f"no report has a column {column!r}")
    scored: dict[str, tuple[str, set[Any]]] = {}
    for name, report in reports.items():
        for task, scores in report.tasks.items():
            rows = scores.table.reindex(columns=["session", "neuron", "spikes"])
            mine = set(rows.dropna().itertuples(index=False))
            first, theirs = scored.setdefault(task, (name, mine))
            if mine != theirs:
                doubt = f"{name!r} and {first!r} were scored on other neurons, trials or masks"
                warnings.warn(f"{task}: {doubt}", stacklevel=2)
    return _text(pd.DataFrame.from_dict(means, orient="index"))


def _next_seeds(before: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """A table whose seeds follow those that its sessions have in another table."""
    same = before[before["session"].isin(table["session"])]
    if same.empty:
        return table
    # The same in every run of a session, of behaviours the controls.
    fixed = "neuron", "spikes", "train_trials", "test_trials", "majority", "mean", "time_course"
    rows = [column for column in fixed if column in table and column in before]
    for name, theirs in same.groupby("session"):
        ours = table[table["session"] == name]
        a, b = (x[x["seed"] == x["seed"].iloc[0]][rows].to_numpy(float) for x in (ours, theirs))
        # Scores in files have six decimals.
        if a.shape != b.shape or not np.allclose(a, b, 0, 1e-5, equal_nan=True):
            message = "these reports scored other neurons or other trials, not only other seeds"
            raise ValueError(f"session {name!r}: {message}")
    return table.assign(seed=table["seed"] + same["seed"].max() + 1)


def _text(table: pd.DataFrame) -> str:
    """A table of numbers and means as text."""
    heads = [column.removesuffix("-prediction") for column in table]
    cells = table.map(lambda x: str(x if isinstance(x, Mean | int) else Mean(x, np.nan, 1)))
    return cells.set_axis(heads, axis=1).to_string()


def _plain(value: Any) -> Any:
    """A value as JSON holds it, with numbers rounded to six decimals and None for NaN."""
    text = json.dumps(value)
    return json.loads(text, parse_float=lambda x: round(float(x), 6), parse_constant=lambda _: None)
